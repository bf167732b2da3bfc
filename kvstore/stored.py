"""One value (or one piece of it) at the place where it lives: its array, and the optimizer's state.

The local store and the servers share this. Its methods are bodies of engine ops on ``var``; nothing
else may touch the array.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

import engine
from kvstore import kernels
from kvstore.arrays import Array


class Rule(Protocol):
    """How a merged push changes a stored value; an optimizer, or a wrapped updater."""

    def create_state(self, value: Array) -> dict[str, Array]: ...
    def update(self, value: Array, gradient: Array, state: dict[str, Array], step: int) -> None: ...


class Stored:
    """A value with the state of its updates.

    Args:
        value: taken over, not copied; it may be read-only.
        name: of the var, for traces and errors.
    """

    __slots__ = ("_generation", "_handed_out", "state", "step", "value", "var")

    def __init__(self, value: Array, name: str) -> None:
        self.value = value
        self.state: dict[str, Array] = {}
        self.step = 0
        self.var = engine.Var(name)
        self._generation = 0
        self._handed_out = False

    def __repr__(self) -> str:
        return f"<Stored {self.var!r}: {self.value.dtype}{self.value.shape}, {self.step} updates>"

    def assign(self, pushes: Sequence[Array]) -> None:
        """The merged pushes become the value. One push alone is taken over, not copied."""
        if len(pushes) == 1:
            self.value = pushes[0]
        else:
            self.value = np.empty_like(pushes[0])
            kernels.merge(pushes, self.value)
        self._handed_out = False

    def update(self, pushes: Sequence[Array], rule: Rule, generation: int = 1) -> None:
        """Apply the merged pushes by ``rule``; another ``generation`` than before begins with a new state."""
        if len(pushes) == 1:
            merged = pushes[0]
        else:
            merged = np.empty_like(pushes[0])
            kernels.merge(pushes, merged)
        if self._handed_out or not self.value.flags.writeable:
            self.value = self.value.copy()
            self._handed_out = False
        if generation != self._generation:
            self.state = rule.create_state(self.value)
            self.step = 0
            self._generation = generation
        rule.update(self.value, merged, self.state, self.step + 1)
        self.step += 1

    def share(self) -> Array:
        """The value as it is now, never to be changed: the next update works on a copy."""
        self._handed_out = True
        return self.value

    def restore(self, state: dict[str, Array], step: int, generation: int) -> None:
        """Replace the optimizer's state."""
        self.state = state
        self.step = step
        self._generation = generation
