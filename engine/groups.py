"""Ranges of bytes, and many arrays that are read or written together."""

from __future__ import annotations

import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from typing import Any

import numpy as np

from engine.errors import ArgumentError

try:
    from numpy.lib.array_utils import byte_bounds
except ImportError:  # NumPy 1
    from numpy import byte_bounds  # type: ignore[attr-defined,no-redef]

Range = tuple[int, int]  # the first byte, and the one after the last


def range_of(array: np.ndarray[Any, Any]) -> Range:
    """The bytes from its first element to its last."""
    if array.flags.forc:  # as a rule
        start: int = array.__array_interface__["data"][0]
        return start, start + array.nbytes
    low, high = byte_bounds(array)
    return int(low), int(high)


class Ranges:
    """Some memory, as sorted ranges that do not touch."""

    __slots__ = ("ranges",)

    def __init__(self, ranges: Iterable[Range]) -> None:
        self.ranges = _joined(sorted(ranges))

    def overlaps(self, range_: Range) -> bool:
        """Has ``range_`` a byte of it?"""
        index = bisect_left(self.ranges, (range_[1], 0)) - 1
        return index >= 0 and self.ranges[index][1] > range_[0]

    def covers(self, range_: Range) -> bool:
        """Is every byte of ``range_`` in it?"""
        index = bisect_right(self.ranges, (range_[0], 1 << 64)) - 1
        return index >= 0 and self.ranges[index][1] >= range_[1]


class ArrayGroup(Ranges):
    """Arrays that ops read or write together: as an item of ``reads`` or ``writes`` it stands for all of them.

    Making it costs as much as one op on all its arrays; each op on it then costs as much as one on a single array.
    They share an error, too: when an op that writes them fails, all of them carry it until one op has written them all.

    Args:
        arrays: NumPy arrays; they are kept as long as the group.

    Raises:
        ArgumentError: something else.
    """

    __slots__ = ("arrays",)

    def __init__(self, arrays: Iterable[Any]) -> None:
        self.arrays = tuple(arrays)
        super().__init__([range_of(array) for array in self.arrays if _is_array(array).size])

    def __repr__(self) -> str:
        return f"<ArrayGroup of {len(self.arrays)} arrays>"


class Scar(Ranges):
    """What is left of a group that no op uses but an error marks: the memory, as far as it has not been freed."""

    __slots__ = ("_owners",)

    def __init__(self, group: ArrayGroup) -> None:
        self._owners = [(range_of(array), weakref.ref(owner_of(array))) for array in group.arrays if array.size]
        super().__init__(group.ranges)

    def forget_freed(self) -> None:
        left = [(range_, owner) for range_, owner in self._owners if owner() is not None]
        if len(left) < len(self._owners):
            self._owners = left
            self.ranges = _joined(sorted(range_ for range_, _ in left))


def owner_of(array: np.ndarray[Any, Any]) -> Any:
    """The object whose memory the array is in."""
    owner: Any = array
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    return owner


def _is_array(item: Any) -> np.ndarray[Any, Any]:
    if not isinstance(item, np.ndarray):
        raise ArgumentError(f"a group: expected NumPy arrays, got {type(item).__name__}")
    return item


def _joined(ranges: list[Range]) -> list[Range]:
    """Sorted ranges without overlaps: those that touch or overlap become one."""
    joined: list[Range] = []
    for low, high in ranges:
        if joined and low <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(high, joined[-1][1]))
        else:
            joined.append((low, high))
    return joined
