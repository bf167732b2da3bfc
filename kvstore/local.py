"""The values of a store of one process: the engine is all it takes.

They lie in host memory, or, as :mod:`kvstore.places` says, on GPUs that push them. Then an op on a value is one of its
GPU, and does nothing but put work into a stream. What GPUs push to a value in host memory is brought by another op.

A small key that is moved in lists lies within the value of a bundle meanwhile: see :mod:`kvstore.together`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

import engine
from kvstore import comm, kernels
from kvstore.arrays import HOST, Array, copy_to, empty_like, host_copy, memory_of, read_only, to_host
from kvstore.checkpoint.cut import VALUE, CutSource, KeyRecord, Part
from kvstore.delivery import apart
from kvstore.errors import DuplicateKeyError, OptimizerError, UpdateError
from kvstore.handle import Ended, all_ended, when_ended
from kvstore.home import Gradient, Held, Home, HomeBundle, Reading, Source, Updater
from kvstore.optim import Optimizer
from kvstore.places import Places
from kvstore.protocol.messages import Spec
from kvstore.protocol.pieces import Key
from kvstore.protocol.sampling import factor
from kvstore.stored import Rule, Stored, multiply
from kvstore.together import Value, bundles_of

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
            merged = empty_like(merged)
            kernels.merge(pushes, merged)
            multiply(merged, factor)
        if target is not value:
            copy_to(value, target)
        self._updater(self._key, merged, target)


class LocalHome(Home):
    """Values of one process; pushes are applied in their order.

    Args:
        on_gpus: values that are pushed from GPUs live there.
    """

    rank = 0
    workers = (0,)
    shards = 1

    def __init__(self, runtime: engine.Engine, *, on_gpus: bool = False) -> None:
        self._engine = runtime
        self._values: dict[Key, Value] = {}
        self._optimizer: Optimizer | None = None
        self._updater: Updater | None = None
        self._generation = 0
        self._bundling = True  # may keys be moved together?
        self._lock = threading.RLock()  # held while values come into bundles, leave them, or are looked for
        self._places = Places(runtime, self._lock, on_gpus=on_gpus, unplaced=self._unplaced)

    def __repr__(self) -> str:
        return f"<LocalHome: {len(self._values)} keys>"

    def init(self, key: Key, spec: Spec, value: Array) -> Future[Any]:
        if key in self._values:
            raise DuplicateKeyError(f"init of key {key!r}: expected a new key, it exists")
        first = self._places.first(key, spec, value.reshape(spec.shape))
        with self._lock:
            self._values[key] = first
        done: Future[Any] = Future()
        done.set_result(None)
        return done

    # --- push and pull ------------------------------------------------------------------------------

    def push(self, key: Key, gradient: Gradient, ended: Ended) -> Reading:
        return self.push_value(self._values[key], gradient, ended)

    def pull(self, key: Key, priority: int) -> Source:
        return self.pull_value(self._values[key], priority)

    def pushpull(self, key: Key, gradient: Gradient, ended: Ended) -> tuple[Reading, Source]:
        return self.pushpull_value(self._values[key], gradient, ended)

    def push_value(self, value: Value, gradient: Gradient, ended: Ended) -> Reading:
        """:meth:`push` of a key or a bundle."""
        return self._push(value, self._places.prepared(value, gradient), ended)

    def _push(self, value: Value, gradient: Gradient, ended: Ended) -> Reading:
        """:meth:`push` of what has been prepared."""
        value.rounds, value.version = value.rounds + 1, value.version + 1
        applied = self._apply(value, gradient, ())
        if applied is not None:
            when_ended(applied, ended)
            return _still_reading(value, applied)
        # It will be applied later, but must be read now; unless an array has still to be written.
        staged, var = self._places.room(value, gradient), engine.Var(f"staged {value.key!r}")
        self._engine.push(
            lambda: gradient.write(staged.reshape(-1)), reads=[*value.own.names[1:], *gradient.reads], writes=[var],
            name="stage", inline=True,
        )  # fmt: skip
        later = Gradient([staged], gradient.priority, lent=True, samples=gradient.samples)
        applied = self._engine.push(**self._op(value, later, [var], ()))
        when_ended(applied, ended)
        return None

    def pull_value(self, value: Value, priority: int) -> Source:
        """:meth:`pull` of a key or a bundle."""
        return _LocalSource(value, self._engine)

    def pushpull_value(self, value: Value, gradient: Gradient, ended: Ended) -> tuple[Reading, Source]:
        """:meth:`pushpull` of a key or a bundle."""
        # One op if that can be, so that what was just merged goes on from the processor's cache.
        gradient = self._places.prepared(value, gradient)
        applied = self._apply(value, gradient, gradient.outs) if gradient.outs else None
        if applied is None:
            return self._push(value, gradient, ended), self.pull_value(value, gradient.priority)
        value.rounds, value.version = value.rounds + 1, value.version + 1
        when_ended(applied, ended)
        return _still_reading(value, applied), _Delivered(applied, value.version)

    def _apply(self, value: Value, gradient: Gradient, outs: Sequence[Array]) -> engine.Handle | None:
        """Let the gradient change the value, which then goes to ``outs``, in one op.

        None: something else is under way there, or it takes ops of the host and of devices.
        """
        if not self._places.fit(value, gradient, outs):
            return None
        return self._engine.push_if_free(**self._op(value, gradient, gradient.reads, outs))

    def _op(self, value: Value, gradient: Gradient, reads: Sequence[Any], outs: Sequence[Array]) -> dict[str, Any]:
        """What the engine is told of such a change: an op of the host, or of the device that the value is on."""
        key, stored, rule, generation = value.key, value.own, self._rule(value.key), self._generation
        count, nbytes = len(gradient.arrays), stored.value.nbytes
        per_round, samples = value.spec.samples_per_round, gradient.samples
        multiplied = factor(per_round, samples) if per_round is not None and samples else 1.0

        def apply() -> None:
            if samples != 0:  # else it changes nothing
                pushes = gradient.summands()
                if rule is None:
                    stored.assign(pushes, outs=outs, factor=multiplied)
                    return
                _update(key, stored, pushes, rule, generation, multiplied)
            if outs:
                comm.broadcast(stored.value.reshape(-1), outs)

        def apply_there() -> list[Array]:
            others = outs
            if samples != 0:
                with gradient.near() as pushes:
                    if rule is None:
                        beside = [out for out in outs if memory_of(out) == value.memory]
                        others = [out for out in outs if memory_of(out) != value.memory]
                        stored.assign(pushes, outs=beside, factor=multiplied)
                    else:
                        _update(key, stored, pushes, rule, generation, multiplied)
            comm.broadcast(stored.value.reshape(-1), others)
            return stored.shed()

        return {
            "fn": apply if value.memory == HOST else apply_there,
            "reads": reads if rule is None else [*reads, stored.var],
            "writes": [*stored.names, *outs],
            "priority": gradient.priority,
            "name": "assign" if rule is None else "update",
            "inline": nbytes * (count + len(outs)) <= INLINE_BYTES,
            "info": {"key": key, "bytes": nbytes},
            "lent": gradient.lent,
        }

    def _unplaced(self) -> dict[Key, int]:
        owners = [value.whole or value for value in self._values.values()]
        return {one.key: one.own.value.nbytes for one in owners if not one.placed}

    def gathering(self) -> AbstractContextManager[None]:
        return nullcontext()

    def bundle(self, keys: Sequence[Key], timeout_s: float) -> list[HomeBundle]:
        return bundles_of([self._values[key] for key in keys], self) if self._bundling else []

    def unite(self, values: Sequence[Value], whole: Value) -> bool:
        """From here on the values lie within that of a bundle. False if they are in use, or differ in their updates."""
        with self._lock:
            if not self._bundling or any(value.whole is not None for value in values):
                return False
            parts = [value.own for value in values]
            united = self._engine.push_if_free(
                lambda: whole.own.unite(parts), reads=[part.var for part in parts], writes=whole.own.names,
                name="unite", inline=True,
            )  # fmt: skip
            if united is None or united.exception() is not None:
                return False
            start = 0
            for value in values:
                value.whole, value.elements = whole, slice(start, start + value.own.value.size)
                start = value.elements.stop
            return True

    def split(self, values: Sequence[Value], whole: Value) -> None:
        """From here on they are by themselves again."""
        with self._lock:
            parts = [(value.own, value.elements) for value in values]

            def part() -> list[Array]:
                whole.own.split(parts)
                for value in values:
                    value.own.reshape(value.spec.shape)
                return whole.own.shed()

            writes = [value.own.var for value in values]
            self._engine.push(part, reads=whole.own.names, writes=writes, name="split", inline=True)
            for value in values:
                (value.rounds, value.version), value.whole = value.seen, None
                value.memory, value.placed = whole.memory, whole.placed
                value.own.names = [value.own.var, *whole.own.names[1:]]

    def staging(self, key: Key, timeout_s: float) -> Array:
        value = self._values[key]
        if value.staging is None:
            value.staging = np.empty(value.spec.shape, value.own.value.dtype)
        return value.staging

    # --- optimizer ----------------------------------------------------------------------------------

    def _rule(self, key: Key) -> Rule | None:
        if self._updater is not None:
            return _UpdaterRule(key, self._updater)
        return self._optimizer

    def stop_bundling(self) -> None:
        """No more bundles: what is to be set sees each value by itself. Those that there are have to be given up."""
        with self._lock:
            self._bundling = False

    def set_updater(self, updater: Updater) -> None:
        """In effect from the next push, in place of what was set. After :meth:`stop_bundling`."""
        self._updater, self._optimizer = updater, None
        self._generation += 1

    def set_optimizer(self, optimizer: Optimizer, replace: bool, timeout_s: float) -> None:
        """See :class:`Home`; one of whole tensors after :meth:`stop_bundling`."""
        if self._optimizer == optimizer:
            return
        current = "an updater" if self._updater is not None else self._optimizer
        if current is not None and not replace:
            raise OptimizerError(
                f"set_optimizer: expected what is set, {current}, got {optimizer}; replace=True replaces it"
            )
        self._optimizer, self._updater = optimizer, None
        self._generation += 1
        self._bundling = not optimizer.whole_tensor

    def set_hyperparameters(self, changes: Mapping[str, Any], timeout_s: float) -> None:
        if self._optimizer is None:
            raise OptimizerError("set_hyperparameters: expected an optimizer, none is set")
        self._optimizer = self._optimizer.with_hyperparameters(**changes)

    def read_state(self, key: Key, timeout_s: float) -> tuple[int, dict[str, Array]]:
        with self._lock:
            stored, elements = self._values[key].place

            def read() -> tuple[int, dict[str, Array]]:
                return stored.step, _flat_copies(stored.state, elements)

            op = self._engine.push(read, reads=[stored.var], name="read state")
        step, state = op.result(timeout_s)
        return step, state

    def write_state(self, key: Key, step: int, state: dict[str, Array], timeout_s: float) -> None:
        stored, generation = self._values[key].own, self._generation
        shaped = {name: array.reshape(stored.value.shape) for name, array in state.items()}
        self._change(stored, lambda: stored.restore(shaped, step, generation), "write state", timeout_s)

    def restore(
        self, key: Key, value: Array, version: int, step: int, state: dict[str, Array], timeout_s: float
    ) -> None:
        stored = self._values[key].own
        self._values[key].version = version
        generation = self._generation if step or state else 0  # without an update there is no state yet
        shaped = {name: array.reshape(stored.value.shape).copy() for name, array in state.items()}
        self._change(stored, lambda: stored.restore(shaped, step, generation, value), "restore", timeout_s)

    def _change(self, stored: Stored, change: Callable[[], None], name: str, timeout_s: float) -> None:
        """Do it in an op, and wait for that."""

        def do() -> list[Array]:
            change()
            return stored.shed()

        self._engine.push(do, reads=stored.names, writes=stored.names, name=name).result(timeout_s)

    # --- the rest -----------------------------------------------------------------------------------

    @property
    def writes_checkpoints(self) -> bool:
        return True

    def meet(self, timeout_s: float) -> None:
        return

    def cut_point(self) -> None:
        return

    def last_cut_point(self) -> None:
        return

    def ask_cut(self, timeout_s: float) -> Callable[[], CutSource]:
        cut = _LocalCut(self._optimizer)
        with self._lock:
            places = [(value, value.seen[1], *value.place) for value in self._values.values()]

            def take() -> None:
                for value, version, stored, elements in places:
                    cut.add(value, version, stored, elements)

            reads = [stored.var for _, _, stored, _ in places]
            taken = self._engine.push(take, reads=list(dict.fromkeys(reads)), name="take cut", inline=True)

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
        return self._values[key].seen[0]

    def leave(self, timeout_s: float) -> None:
        pass

    def close(self, reason: str, timeout_s: float) -> None:
        self._values.clear()


class _LocalCut(CutSource):
    """All values of this process as they were in one moment: lent, the optimizer's state copied to the host."""

    def __init__(self, optimizer: Optimizer | None) -> None:
        self.optimizer = None if optimizer is None else optimizer.to_wire()
        self.records = []
        self._arrays: list[dict[str, Array]] = []
        self._lent: list[Stored] = []

    def add(self, value: Value, version: int, stored: Stored, elements: slice) -> None:
        """One more value, which is so many elements of what is stored."""
        state = _flat_copies(stored.state, elements)
        dtypes = {name: array.dtype.name for name, array in state.items()}
        self.records.append(KeyRecord(value.key, value.spec, version, stored.step, {0: version}, dtypes))
        self._arrays.append({VALUE: stored.lend(self).reshape(-1)[elements], **state})
        self._lent.append(stored)

    def parts(self) -> Iterator[Part]:
        for record, arrays in zip(self.records, self._arrays, strict=True):
            yield Part(record, 0, {name: to_host(array) for name, array in arrays.items()})

    def close(self) -> None:
        for stored in self._lent:
            stored.give_back(self)
        self._lent.clear()
        self._arrays.clear()


class _LocalSource(Source):
    """A value of this process. It has not to come, but the engine's order decides when it may be read."""

    def __init__(self, value: Value, runtime: engine.Engine) -> None:
        self._value, self._engine = value, runtime
        self._stored, self._elements = value.place
        self.version = value.seen[1]

    def deliver(self, outs: Sequence[Array], priority: int, ended: Ended) -> None:
        if self._engine.devices is None or self._value.memory != HOST or comm.in_host_memory(*outs):
            when_ended(self._copy(outs, priority), ended)
            return
        parts = [part.writes for part in apart(outs) if part is not None]  # for an op of the host, and of a device
        all_ended([self._copy(part, priority) for part in parts], ended)

    def _copy(self, outs: Sequence[Array], priority: int) -> engine.Handle:
        stored, elements, nbytes = self._stored, self._elements, self._value.own.value.nbytes
        return self._engine.push(
            lambda: comm.broadcast(stored.value.reshape(-1)[elements], outs),
            reads=stored.names, writes=outs, priority=priority, name="deliver",
            inline=nbytes * len(outs) <= INLINE_BYTES, info={"key": self._value.key, "bytes": nbytes}, lent=True,
        )  # fmt: skip

    def hold(self, ended: Callable[[Held | BaseException], None]) -> None:
        stored, reader = self._stored, object()
        elements, shape = self._elements, self._value.own.value.shape

        def lend() -> Held:
            array = read_only(stored.lend(reader).reshape(-1)[elements].reshape(shape))
            pinned = stored.allocate is not None  # as such memory of the host is, and on a GPU nobody asks
            return Held(array, self.version, None, lambda: stored.give_back(reader), lambda: pinned)

        held = self._engine.push(lend, reads=[stored.var], name="hold", inline=True)
        when_ended(held, lambda error: ended(held.result() if error is None else error))


class _Delivered(Source):
    """A value that an op copies to where it is wanted as soon as it is there."""

    def __init__(self, op: engine.Handle, version: int) -> None:
        self._op = op
        self.version = version

    def deliver(self, outs: Sequence[Array], priority: int, ended: Ended) -> None:
        when_ended(self._op, ended)

    def hold(self, ended: Callable[[Held | BaseException], None]) -> None:
        raise AssertionError("it is delivered to the gradient's outs")


def _update(key: Key, stored: Stored, pushes: Sequence[Array], rule: Rule, generation: int, multiplied: float) -> None:
    try:
        stored.update(pushes, rule, generation, multiplied)
    except Exception as error:
        raise UpdateError(f"key {key!r}: its update failed with {type(error).__name__}: {error}") from error


def _flat_copies(arrays: Mapping[str, Array], elements: slice) -> dict[str, Array]:
    """In host memory."""
    return {name: host_copy(array.reshape(-1)[elements]) for name, array in arrays.items()}


def _still_reading(value: Value, applied: engine.Handle) -> Reading:
    """What the caller has to wait for: not for an op of a device, which his streams have met as it was free."""
    return None if value.memory != HOST or applied.done() else applied
