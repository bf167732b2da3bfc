"""The values of a ``local`` store: they live in this process, and the engine is all it takes."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import engine
from kvstore.arrays import Array
from kvstore.errors import DuplicateKeyError, OptimizerError, UpdateError
from kvstore.home import Home, Parts, Source, Updater
from kvstore.optim import Optimizer
from kvstore.protocol.messages import Spec
from kvstore.protocol.pieces import Key
from kvstore.stored import Rule, Stored

INLINE_BYTES = 64 << 10  # smaller work is done by the calling thread: a hand-over costs more


class _UpdaterRule:
    """A user's updater in the form of an optimizer."""

    def __init__(self, key: Key, shape: tuple[int, ...], updater: Updater) -> None:
        self._key, self._shape, self._updater = key, shape, updater

    def create_state(self, value: Array) -> dict[str, Array]:
        return {}

    def update(self, value: Array, gradient: Array, state: dict[str, Array], step: int) -> None:
        self._updater(self._key, gradient.reshape(self._shape), value.reshape(self._shape))


class LocalHome(Home):
    """Values of one process; pushes are applied in their order."""

    rank = 0
    num_workers = 1

    def __init__(self, runtime: engine.Engine) -> None:
        self._engine = runtime
        self._stored: dict[Key, Stored] = {}
        self._specs: dict[Key, Spec] = {}
        self._optimizer: Optimizer | None = None
        self._updater: Updater | None = None
        self._generation = 0

    def __repr__(self) -> str:
        return f"<LocalHome: {len(self._stored)} keys>"

    def init(self, key: Key, spec: Spec, value: Array) -> Future[Any]:
        if key in self._stored:
            raise DuplicateKeyError(f"init of key {key!r}: expected a new key, it exists")
        self._specs[key] = spec
        self._stored[key] = Stored(value.copy(), repr(key))
        done: Future[Any] = Future()
        done.set_result(None)
        return done

    def push(self, key: Key, staged: Array, var: engine.Var, priority: int) -> Future[Any]:
        stored = self._stored[key]
        rule, generation = self._rule(key), self._generation
        inline = staged.nbytes <= INLINE_BYTES
        info = {"key": key, "bytes": staged.nbytes}
        if rule is None:
            return self._engine.push(
                lambda: stored.assign([staged]),
                reads=[var], writes=[stored.var], priority=priority, name="assign", inline=inline, info=info,
            )  # fmt: skip
        return self._engine.push(
            lambda: _update(key, stored, staged, rule, generation),
            reads=[var, stored.var], writes=[stored.var], priority=priority, name="update", inline=inline, info=info,
        )  # fmt: skip

    def pull(self, key: Key, priority: int) -> Source:
        stored = self._stored[key]

        def keep() -> Parts:
            return [(0, stored.share())]

        return Source(stored.var, lambda: [(0, stored.value)], keep, lambda: None, lambda: None)

    def pushpull(self, key: Key, staged: Array, var: engine.Var, priority: int) -> tuple[Future[Any], Source]:
        return self.push(key, staged, var, priority), self.pull(key, priority)

    def _rule(self, key: Key) -> Rule | None:
        if self._updater is not None:
            return _UpdaterRule(key, self._specs[key].shape, self._updater)
        return self._optimizer

    def set_updater(self, updater: Updater) -> None:
        """In effect from the next push."""
        self._updater = updater
        self._generation += 1

    def set_optimizer(self, optimizer: Optimizer, replace: bool, timeout_s: float) -> None:
        if self._optimizer == optimizer:
            return
        if self._optimizer is not None and not replace:
            raise OptimizerError(
                f"set_optimizer: expected the one that is set, {self._optimizer}, got {optimizer}; "
                "replace=True replaces it"
            )
        self._optimizer = optimizer
        self._generation += 1

    def set_hyperparameters(self, changes: Mapping[str, Any], timeout_s: float) -> None:
        if self._optimizer is None:
            raise OptimizerError("set_hyperparameters: expected an optimizer, none is set")
        self._optimizer = self._optimizer.with_hyperparameters(**changes)

    def read_state(self, key: Key, timeout_s: float) -> tuple[int, dict[str, Array]]:
        stored = self._stored[key]

        def read() -> tuple[int, dict[str, Array]]:
            return stored.step, {name: array.copy() for name, array in stored.state.items()}

        step, state = self._engine.push(read, reads=[stored.var], name="read state").result(timeout_s)
        return step, state

    def write_state(self, key: Key, step: int, state: dict[str, Array], timeout_s: float) -> None:
        stored, generation = self._stored[key], self._generation
        self._engine.push(
            lambda: stored.restore(state, step, generation),
            reads=[stored.var], writes=[stored.var], name="write state",
        ).result(timeout_s)  # fmt: skip

    def barrier(self, timeout_s: float) -> None:
        return

    def explain(self, key: Key) -> str:
        return f"key {key!r}: its engine ops have not run yet"

    def dead_workers(self) -> list[int]:
        return []

    def close(self, reason: str, timeout_s: float) -> None:
        self._stored.clear()


def _update(key: Key, stored: Stored, staged: Array, rule: Rule, generation: int) -> None:
    try:
        stored.update([staged], rule, generation)
    except Exception as error:
        raise UpdateError(f"key {key!r}: its update failed with {type(error).__name__}: {error}") from error
