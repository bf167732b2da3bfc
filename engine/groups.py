"""Ranges of bytes, and many arrays that are read or written together."""

from __future__ import annotations

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


class ArrayGroup:
    """Arrays that ops read or write together: as an item of ``reads`` or ``writes`` it stands for all of them.

    Making it costs as much as one op on all its arrays; each op on it then costs as much as one on a single array.

    Args:
        arrays: NumPy arrays; they are kept as long as the group.

    Raises:
        ArgumentError: something else.
    """

    __slots__ = ("__weakref__", "arrays", "ranges")

    def __init__(self, arrays: Iterable[Any]) -> None:
        self.arrays = tuple(arrays)
        self.ranges: list[Range] = _joined(sorted(range_of(array) for array in self.arrays if _is_array(array).size))

    def __repr__(self) -> str:
        return f"<ArrayGroup of {len(self.arrays)} arrays>"

    def overlaps(self, range_: Range) -> bool:
        """Has ``range_`` a byte of any of the arrays?"""
        index = bisect_left(self.ranges, (range_[1], 0)) - 1
        return index >= 0 and self.ranges[index][1] > range_[0]

    def covers(self, range_: Range) -> bool:
        """Is every byte of ``range_`` one of the arrays'?"""
        index = bisect_right(self.ranges, (range_[0], 1 << 64)) - 1
        return index >= 0 and self.ranges[index][1] >= range_[1]


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
