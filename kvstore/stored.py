"""One value (or one piece of it) at the place where it lives: its array, and the optimizer's state.

The local store and the servers share this. Its methods are bodies of engine ops on ``var``; nothing
else may touch the array, but for those to whom it was lent.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import numpy as np

import engine
from kvstore import kernels
from kvstore.arrays import HOST, Array, copy_to, empty, empty_like, may_write, memory_of

SPARES_MAX = 2


class Rule(Protocol):
    """How the sum of some pushes changes a stored value; an optimizer, or a wrapped updater."""

    def create_state(self, value: Array) -> dict[str, Array]: ...
    def update(
        self, value: Array, pushes: Sequence[Array], state: dict[str, Array], step: int, target: Array, factor: float
    ) -> None: ...


class Stored:
    """A value with the state of its updates.

    An array that is lent to readers is not changed: the next update goes to other memory, and the
    array is used again once all have given it back.

    Args:
        value: taken over, not copied; it may be read-only.
        name: of the var, for traces and errors.
    """

    __slots__ = (
        *("_generation", "_lock", "_readers", "_shed", "_spares"),
        *("allocate", "names", "state", "step", "value", "var"),
    )

    def __init__(self, value: Array, name: str) -> None:
        self.value = value
        self.state: dict[str, Array] = {}
        self.step = 0
        self.var = engine.Var(name)
        self.names: list[Any] = [self.var]  # by which ops that use it call it; and what tells the engine its device
        self.allocate: Callable[[], Array | None] | None = None  # memory for one more copy of the value
        self._generation = 0
        self._spares: list[Array] = []
        self._readers: dict[int, set[Hashable]] = {}  # by id of the value or spare that is lent
        self._shed: list[Array] = []
        self._lock = threading.Lock()  # readers come and go at any time

    def __repr__(self) -> str:
        return f"<Stored {self.var!r}: {self.value.dtype}{self.value.shape}, {self.step} updates>"

    # --- changes ------------------------------------------------------------------------------

    def assign(
        self, pushes: Sequence[Array], *, owned: bool = False, outs: Sequence[Array] = (), factor: float = 1.0
    ) -> None:
        """The merged pushes, times ``factor``, become the value.

        Args:
            owned: the memory of the pushes may be used for that.
            outs: where the value shall go as well; they may be the pushes themselves.
        """
        if owned and self.allocate is None and pushes[0].flags.writeable:
            if len(pushes) > 1:
                kernels.merge(pushes, pushes[0])
            multiply(pushes[0], factor)
            with self._lock:  # who still reads the value keeps it alive
                self._readers.clear()
                self._spares.clear()
                self.value = pushes[0]
            return
        target = self._unread()
        if factor == 1.0:
            kernels.allreduce(pushes, target, outs)
        else:
            kernels.merge(pushes, target)
            multiply(target, factor)
            kernels.broadcast(target, outs)
        self._become(target)

    def update(self, pushes: Sequence[Array], rule: Rule, generation: int = 1, factor: float = 1.0) -> None:
        """Apply the merged pushes, times ``factor``, by ``rule``.

        Another ``generation`` than before begins with a new state.
        """
        target = self._unread()
        if generation != self._generation:
            self._drop(*self.state.values())
            self.state = rule.create_state(self.value)
            self.step = 0
            self._generation = generation
        rule.update(self.value, pushes, self.state, self.step + 1, target, factor)
        self._become(target)
        self.step += 1

    def restore(self, state: dict[str, Array], step: int, generation: int, value: Array | None = None) -> None:
        """Replace the optimizer's state, and the value if there is one."""
        if value is not None:
            target = self._unread()
            copy_to(value.reshape(target.shape), target)
            self._become(target)
        self._drop(*self.state.values())
        self.state = {name: self._beside(array) for name, array in state.items()}
        self.step = step
        self._generation = generation

    def unite(self, parts: Sequence[Stored]) -> None:
        """Become the concatenation of values that have had the same updates; they are not needed any more.

        Raises:
            ValueError: they have not.
        """
        if len({(part.step, part._generation, *part.state) for part in parts}) > 1:
            raise ValueError(f"expected values that have had the same updates, got {parts}")
        target = self._unread()
        kernels.concatenate([part.value for part in parts], target)
        self._become(target)
        first = parts[0]
        for name, array in first.state.items():
            self.state[name] = empty(target.shape, array.dtype, memory_of(target))
            kernels.concatenate([part.state[name] for part in parts], self.state[name])
        self.step, self._generation = first.step, first._generation

    def split(self, parts: Sequence[tuple[Stored, slice]]) -> None:
        """Give each of ``parts`` its elements, flat; the inverse of :meth:`unite`."""
        for part, elements in parts:
            self._drop(part.value, *part.state.values())
            part.value = self.value[elements].copy()
            part.state = {name: array[elements].copy() for name, array in self.state.items()}
            part.step, part._generation = self.step, self._generation
        self._drop(*self.state.values())
        self.state = {}  # the value stays: it may be lent

    def reshape(self, shape: tuple[int, ...]) -> None:
        """The same elements in another shape."""
        self.value = self.value.reshape(shape)
        self.state = {name: array.reshape(shape) for name, array in self.state.items()}

    def move(self, target: Array, allocate: Callable[[], Array | None] | None = None) -> None:
        """Continue in ``target``, of any memory, and when more is needed in what ``allocate`` gives."""
        copy_to(self.value, target)
        self.allocate = allocate
        with self._lock:
            self._readers.clear()
            former, self.value = [self.value, *self._spares, *self.state.values()], target
            self._spares.clear()
        self.state = {name: self._beside(array) for name, array in self.state.items()}
        self._drop(*former)

    # --- readers ------------------------------------------------------------------------------

    def lend(self, reader: Hashable) -> Array:
        """The value as it is now, which stays so until :meth:`give_back`."""
        with self._lock:
            self._readers.setdefault(id(self.value), set()).add(reader)
        return self.value

    def snapshot(self, elements: slice) -> bytes:
        """These elements of the value, which lies in host memory, as it is now."""
        return self.value.reshape(-1)[elements].tobytes()

    def give_back(self, reader: Hashable) -> None:
        """``reader`` no longer looks at anything that it was lent."""
        with self._lock:
            for key, readers in list(self._readers.items()):
                readers.discard(reader)
                if not readers:
                    del self._readers[key]

    def _unread(self) -> Array:
        """Memory that nobody reads: the value's own where possible."""
        with self._lock:
            for array in (self.value, *self._spares):
                if may_write(array) and id(array) not in self._readers:
                    return array
        fresh = self.allocate() if self.allocate is not None else None
        return empty_like(self.value) if fresh is None else fresh

    def _become(self, array: Array) -> None:
        if array is self.value:
            return
        with self._lock:
            self._spares = [spare for spare in self._spares if spare is not array]
            if may_write(self.value) and len(self._spares) < SPARES_MAX:
                self._spares.append(self.value)
            else:
                self._readers.pop(id(self.value), None)
                self._drop(self.value)
            self.value = array

    # --- memory of devices --------------------------------------------------------------------

    def shed(self) -> list[Array]:
        """What is used no more on a device, or has been copied to one: the op at hand has to keep it until it ends."""
        shed, self._shed = self._shed, []
        return shed

    def _drop(self, *arrays: Array) -> None:
        if memory_of(self.value) != HOST:
            self._shed.extend(arrays)

    def _beside(self, array: Array) -> Array:
        """The array in the memory of the value."""
        memory = memory_of(self.value)
        if memory_of(array) == memory:
            return array
        there = empty(array.shape, array.dtype, memory)
        copy_to(array, there)
        return there


def multiply(array: Array, factor: float) -> None:
    """``array`` *= ``factor``, in place; half precision in float32, rounded once."""
    if factor == 1.0:
        return
    real = np.float32(factor) if array.dtype.itemsize <= 4 else np.float64(factor)
    memory = memory_of(array)
    if memory == HOST:
        np.multiply(array, real, out=array, casting="same_kind")
    elif array.dtype in kernels.HALVES:  # which CuPy multiplies in half precision
        wide = empty(array.shape, np.dtype(np.float32), memory)
        kernels.cast(array, wide)
        wide *= real
        kernels.cast(wide, array)
    else:
        array *= real
