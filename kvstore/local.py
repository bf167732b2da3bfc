"""The values of a ``local`` store: they live in this process, and the engine is all it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

import engine
from kvstore import comm
from kvstore.arrays import Array
from kvstore.checkpoint.cut import VALUE, CutSource, KeyRecord, Part
from kvstore.errors import DuplicateKeyError, OptimizerError, UpdateError
from kvstore.handle import Ended, when_ended
from kvstore.home import Gradient, Held, Home, HomeBundle, Reading, Source, Updater
from kvstore.optim import Optimizer
from kvstore.protocol.messages import Spec
from kvstore.protocol.pieces import Key
from kvstore.protocol.sampling import factor
from kvstore.stored import Rule, Stored, multiply

INLINE_BYTES = 64 << 10  # smaller work is done by the calling thread: a hand-over costs more


class _UpdaterRule:
    """A user's updater in the form of an optimizer."""

    def __init__(self, key: Key, updater: Updater) -> None:
        self._key, self._updater = key, updater

    def create_state(self, value: Array) -> dict[str, Array]:
        return {}

    def update(
        self, value: Array, pushes: Sequence[Array], state: dict[str, Array], step: int, target: Array, factor: float
    ) -> None:
        merged = pushes[0]
        if len(pushes) > 1 or factor != 1.0:
            merged = np.empty_like(merged)
            comm.merge(pushes, merged)
            multiply(merged, factor)
        if target is not value:
            np.copyto(target, value)
        self._updater(self._key, merged, target)


class LocalHome(Home):
    """Values of one process; pushes are applied in their order."""

    rank = 0
    workers = (0,)

    def __init__(self, runtime: engine.Engine) -> None:
        self._engine = runtime
        self._stored: dict[Key, Stored] = {}
        self._specs: dict[Key, Spec] = {}
        self._staging: dict[Key, Array] = {}
        self._optimizer: Optimizer | None = None
        self._updater: Updater | None = None
        self._generation = 0
        self._rounds: dict[Key, int] = {}

    def __repr__(self) -> str:
        return f"<LocalHome: {len(self._stored)} keys>"

    def init(self, key: Key, spec: Spec, value: Array) -> Future[Any]:
        if key in self._stored:
            raise DuplicateKeyError(f"init of key {key!r}: expected a new key, it exists")
        self._specs[key] = spec
        self._rounds[key] = 0
        self._stored[key] = Stored(value.reshape(spec.shape).copy(), repr(key))
        done: Future[Any] = Future()
        done.set_result(None)
        return done

    def push(self, key: Key, gradient: Gradient, ended: Ended) -> Reading:
        self._rounds[key] += 1
        applied = self._apply(key, gradient, ())
        if applied is not None:
            when_ended(applied, ended)
            return None if applied.done() else applied
        # It will be applied later, but must be read now; unless an array has still to be written.
        staged, var = np.empty(self._specs[key].shape, self._stored[key].value.dtype), engine.Var(f"staged {key!r}")
        self._engine.push(
            lambda: comm.merge(gradient.arrays, staged), reads=gradient.arrays, writes=[var], name="stage", inline=True
        )
        op = self._op(key, gradient, [staged], [var], ())
        when_ended(self._engine.push(**op), ended)
        return None

    def pull(self, key: Key, priority: int) -> Source:
        return _LocalSource(key, self._stored[key], self._engine)

    def pushpull(self, key: Key, gradient: Gradient, ended: Ended) -> tuple[Reading, Source]:
        # One op if that can be, so that what was just merged goes on from the processor's cache.
        applied = self._apply(key, gradient, gradient.outs) if gradient.outs else None
        if applied is None:
            return self.push(key, gradient, ended), self.pull(key, gradient.priority)
        self._rounds[key] += 1
        when_ended(applied, ended)
        return None if applied.done() else applied, _Delivered(applied)

    def _apply(self, key: Key, gradient: Gradient, outs: Sequence[Array]) -> engine.Handle | None:
        """Let the gradient change the value, which then goes to ``outs``. None: something else is under way there."""
        return self._engine.push_if_free(**self._op(key, gradient, gradient.arrays, gradient.arrays, outs))

    def _op(
        self, key: Key, gradient: Gradient, arrays: list[Array], reads: Sequence[Any], outs: Sequence[Array]
    ) -> dict[str, Any]:
        """What the engine is told of such a change. ``arrays``: the gradient's, or their sum."""
        stored, rule, generation = self._stored[key], self._rule(key), self._generation
        nbytes = stored.value.nbytes
        per_round, samples = self._specs[key].samples_per_round, gradient.samples
        multiplied = factor(per_round, samples) if per_round is not None and samples else 1.0

        def apply() -> None:
            if samples == 0:
                pass  # it changes nothing
            elif rule is None:
                stored.assign(arrays, factor=multiplied)
            else:
                _update(key, stored, arrays, rule, generation, multiplied)
            if outs:
                comm.broadcast(stored.value.reshape(-1), outs)

        return {
            "fn": apply,
            "reads": reads if rule is None else [*reads, stored.var],
            "writes": [stored.var, *outs],
            "priority": gradient.priority,
            "name": "assign" if rule is None else "update",
            "inline": nbytes * (len(arrays) + len(outs)) <= INLINE_BYTES,
            "info": {"key": key, "bytes": nbytes},
        }

    def bundle(self, keys: Sequence[Key], timeout_s: float) -> list[HomeBundle]:
        return []

    def staging(self, key: Key, timeout_s: float) -> Array:
        array = self._staging.get(key)
        if array is None:
            array = self._staging[key] = np.empty(self._specs[key].shape, self._stored[key].value.dtype)
        return array

    def _rule(self, key: Key) -> Rule | None:
        if self._updater is not None:
            return _UpdaterRule(key, self._updater)
        return self._optimizer

    def set_updater(self, updater: Updater) -> None:
        """In effect from the next push, in place of what was set."""
        self._updater, self._optimizer = updater, None
        self._generation += 1

    def set_optimizer(self, optimizer: Optimizer, replace: bool, timeout_s: float) -> None:
        if self._optimizer == optimizer:
            return
        current = "an updater" if self._updater is not None else self._optimizer
        if current is not None and not replace:
            raise OptimizerError(
                f"set_optimizer: expected what is set, {current}, got {optimizer}; replace=True replaces it"
            )
        self._optimizer, self._updater = optimizer, None
        self._generation += 1

    def set_hyperparameters(self, changes: Mapping[str, Any], timeout_s: float) -> None:
        if self._optimizer is None:
            raise OptimizerError("set_hyperparameters: expected an optimizer, none is set")
        self._optimizer = self._optimizer.with_hyperparameters(**changes)

    def read_state(self, key: Key, timeout_s: float) -> tuple[int, dict[str, Array]]:
        stored = self._stored[key]

        def read() -> tuple[int, dict[str, Array]]:
            return stored.step, {name: array.reshape(-1).copy() for name, array in stored.state.items()}

        step, state = self._engine.push(read, reads=[stored.var], name="read state").result(timeout_s)
        return step, state

    def write_state(self, key: Key, step: int, state: dict[str, Array], timeout_s: float) -> None:
        stored, generation = self._stored[key], self._generation
        shaped = {name: array.reshape(stored.value.shape) for name, array in state.items()}
        self._engine.push(
            lambda: stored.restore(shaped, step, generation),
            reads=[stored.var], writes=[stored.var], name="write state",
        ).result(timeout_s)  # fmt: skip

    def restore(
        self, key: Key, value: Array, version: int, step: int, state: dict[str, Array], timeout_s: float
    ) -> None:
        stored = self._stored[key]
        generation = self._generation if step or state else 0  # without an update there is no state yet
        shaped = {name: array.reshape(stored.value.shape).copy() for name, array in state.items()}
        self._engine.push(
            lambda: stored.restore(shaped, step, generation, value),
            reads=[stored.var], writes=[stored.var], name="restore",
        ).result(timeout_s)  # fmt: skip

    @property
    def writes_checkpoints(self) -> bool:
        return True

    def meet(self, timeout_s: float) -> None:
        return

    def cut_point(self) -> None:
        return

    def last_cut_point(self) -> None:
        return

    def ask_cut(self, versions: Mapping[Key, int], timeout_s: float) -> Callable[[], CutSource]:
        cut = _LocalCut(self._optimizer)
        keys = dict(self._stored)

        def take() -> None:
            for key, stored in keys.items():
                cut.add(key, self._specs[key], versions.get(key, 0), stored)

        reads = [stored.var for stored in keys.values()]
        taken = self._engine.push(take, reads=reads, name="take cut", inline=True)

        def wait() -> CutSource:
            taken.result(timeout_s)
            return cut

        return wait

    def barrier(self, timeout_s: float) -> None:
        return

    def drive(self, awaited: Future[Any], timeout_s: float) -> bool:
        return False

    def explain(self, key: Key) -> str:
        return f"key {key!r}: its engine ops have not run yet"

    def dead_workers(self) -> list[int]:
        return []

    def rounds(self, key: Key, timeout_s: float) -> int:
        return self._rounds[key]

    def leave(self, timeout_s: float) -> None:
        pass

    def close(self, reason: str, timeout_s: float) -> None:
        self._stored.clear()


class _LocalCut(CutSource):
    """All values of this process as they were in one moment: lent, the optimizer's state copied."""

    def __init__(self, optimizer: Optimizer | None) -> None:
        self.optimizer = None if optimizer is None else optimizer.to_wire()
        self.records = []
        self._arrays: list[dict[str, Array]] = []
        self._lent: list[Stored] = []

    def add(self, key: Key, spec: Spec, version: int, stored: Stored) -> None:
        """One more value."""
        state = {name: array.reshape(-1).copy() for name, array in stored.state.items()}
        dtypes = {name: array.dtype.name for name, array in state.items()}
        self.records.append(KeyRecord(key, spec, version, stored.step, {0: version}, dtypes))
        self._arrays.append({VALUE: stored.lend(self).reshape(-1), **state})
        self._lent.append(stored)

    def parts(self) -> Iterator[Part]:
        for record, arrays in zip(self.records, self._arrays, strict=True):
            yield Part(record, 0, arrays)

    def close(self) -> None:
        for stored in self._lent:
            stored.give_back(self)
        self._lent.clear()
        self._arrays.clear()


class _LocalSource(Source):
    """A value of this process. It has not to come, but the engine's order decides when it may be read."""

    def __init__(self, key: Key, stored: Stored, runtime: engine.Engine) -> None:
        self._key, self._stored, self._engine = key, stored, runtime

    def deliver(self, outs: Sequence[Array], priority: int, ended: Ended) -> None:
        stored, nbytes = self._stored, self._stored.value.nbytes * len(outs)
        delivered = self._engine.push(
            lambda: comm.broadcast(stored.value.reshape(-1), outs),
            reads=[stored.var], writes=outs, priority=priority, name="deliver", inline=nbytes <= INLINE_BYTES,
            info={"key": self._key, "bytes": nbytes},
        )  # fmt: skip
        when_ended(delivered, ended)

    def hold(self, ended: Callable[[Held | BaseException], None]) -> None:
        stored, reader = self._stored, object()

        def lend() -> Held:
            array = stored.lend(reader).view()
            array.flags.writeable = False
            return Held(array, None, None, lambda: stored.give_back(reader))

        held = self._engine.push(lend, reads=[stored.var], name="hold", inline=True)
        when_ended(held, lambda error: ended(held.result() if error is None else error))


class _Delivered(Source):
    """A value that an op copies to where it is wanted as soon as it is there."""

    def __init__(self, op: engine.Handle) -> None:
        self._op = op

    def deliver(self, outs: Sequence[Array], priority: int, ended: Ended) -> None:
        when_ended(self._op, ended)

    def hold(self, ended: Callable[[Held | BaseException], None]) -> None:
        raise AssertionError("it is delivered to the gradient's outs")


def _update(
    key: Key, stored: Stored, pushes: Sequence[Array], rule: Rule, generation: int, multiplied: float
) -> None:
    try:
        stored.update(pushes, rule, generation, multiplied)
    except Exception as error:
        raise UpdateError(f"key {key!r}: its update failed with {type(error).__name__}: {error}") from error
