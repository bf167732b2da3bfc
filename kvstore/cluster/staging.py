"""A worker's memory for gradients on their way: filled by the store or by the caller, then read by the servers."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np

from kvstore.arrays import Array, gpu
from kvstore.cluster.near import Arena, Region
from kvstore.errors import DeadlineError

SLOTS = 2  # per key: one can be filled while the other travels


class Slot:
    """Memory for one gradient of a key."""

    __slots__ = ("_arena", "array", "busy", "pinned", "region")

    def __init__(self, items: int, dtype: np.dtype[Any], arena: Arena | None) -> None:
        nbytes = items * dtype.itemsize
        self._arena = arena
        self.pinned = False  # as far as that can be
        self.region: Region | None = arena.allocate(nbytes) if arena is not None else None
        self.array: Array = (
            np.empty(items, dtype) if self.region is None else self.region.array[:nbytes].view(dtype)
        )  # flat
        self.busy = False

    def pin(self) -> None:
        """See that GPUs copy to it at their full speed. It may be other memory afterwards."""
        if self.pinned:
            return
        self.pinned = True
        if self.region is not None:
            assert self._arena is not None
            self._arena.pin(self.region)
        else:
            self.array = gpu.pinned(self.array.nbytes).view(self.array.dtype)

    def __repr__(self) -> str:
        return f"<Slot of {self.array.nbytes} bytes: {'busy' if self.busy else 'free'}>"


class Staging:
    """The slots of one key. Thread-safe.

    Args:
        items, dtype: of the value.
        shape: of the value, for what :meth:`lend` returns.
        arena: where slots are allocated if they are to be shared; None: in private memory.
    """

    def __init__(self, shape: tuple[int, ...], items: int, dtype: np.dtype[Any], arena: Arena | None) -> None:
        self._shape = shape
        self._items = items
        self._dtype = dtype
        self._arena = arena
        self._own: list[Slot] = []
        self._lent: list[tuple[Slot, Array]] = []  # the caller's, each with the array that the caller has
        self._freed = threading.Condition()
        self._waiting = 0  # for one that was lent to come back

    def __repr__(self) -> str:
        return f"<Staging: {self._own}, lent {[slot for slot, _ in self._lent]}>"

    def take(self, *, pinned: bool = False) -> Slot:
        """A slot for the store to fill, by GPUs if it is to be ``pinned``. When all are on their way, one not kept."""
        slot = self._take()
        if pinned:
            slot.pin()
        return slot

    def _take(self) -> Slot:
        with self._freed:
            for slot in self._own:
                if not slot.busy:
                    slot.busy = True
                    return slot
            arena = self._arena if len(self._own) < SLOTS else None
            slot = Slot(self._items, self._dtype, arena)
            slot.busy = True
            if len(self._own) < SLOTS:
                self._own.append(slot)
            return slot

    def lend(self, timeout_s: float, what: str) -> Array:
        """A slot for the caller to fill: always the same one until it is pushed.

        Raises:
            DeadlineError: all are on their way, and none came back within ``timeout_s`` seconds.
        """
        end = time.monotonic() + timeout_s
        with self._freed:
            while True:
                for slot, array in self._lent:
                    if not slot.busy:
                        return array
                if len(self._lent) < SLOTS:
                    slot = Slot(self._items, self._dtype, self._arena)
                    array = slot.array.reshape(self._shape)
                    self._lent.append((slot, array))
                    return array
                self._waiting += 1
                freed = self._freed.wait(max(0.0, end - time.monotonic()))
                self._waiting -= 1
                if not freed and time.monotonic() >= end:
                    raise DeadlineError(f"{what}: both of its arrays are on their way; after {timeout_s:g} s still")

    def lent(self, array: Array) -> Slot | None:
        """The slot behind ``array``, now busy, if it is one that was lent and came back filled."""
        if not self._lent:
            return None
        with self._freed:
            for slot, known in self._lent:
                if known is array and not slot.busy:
                    slot.busy = True
                    return slot
        return None

    def give_back(self, slot: Slot) -> None:
        """The servers have read it."""
        with self._freed:
            slot.busy = False
            if self._waiting:
                self._freed.notify_all()

    def lose(self, slot: Slot) -> None:
        """The push failed: a server may still read the slot some day, so it is not used again."""
        with self._freed:
            self._own = [own for own in self._own if own is not slot]
            self._lent = [lent for lent in self._lent if lent[0] is not slot]
            self._freed.notify_all()
