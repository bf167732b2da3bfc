"""Which arrays share memory: from an array to the vars of all memory it overlaps.

An array counts by the range of bytes between its first and last element, so two views interleaved
in one buffer conflict; that is safe, and cheap to decide. A range stays known while an op uses it,
and after a failed write until it is written whole or its memory is freed.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left, bisect_right, insort
from itertools import pairwise
from typing import Any

import numpy as np

from engine.errors import ArgumentError
from engine.var import Var

try:
    from numpy.lib.array_utils import byte_bounds
except ImportError:  # NumPy 1
    from numpy import byte_bounds  # type: ignore[attr-defined,no-redef]


Range = tuple[int, int]

CROWDED = 4096  # so many ranges are known before the idle ones are forgotten; arrays come again
CROWDED_OVERLAPPING = 64  # if some overlap, since then all near a range are looked at


class Memory:
    """The ranges of bytes in use. Not thread-safe."""

    def __init__(self) -> None:
        self._vars: dict[Range, Var] = {}
        self._ranges: list[Range] = []  # sorted
        self._arrays: dict[int, tuple[weakref.ref[Any], Range]] = {}  # by id: to ask an array for its range takes long
        self._longest = 0
        self._disjoint = True  # no two of them overlap, as a rule
        self._crowded = CROWDED
        self._crowded_overlapping = CROWDED_OVERLAPPING
        self._owners: dict[Range, weakref.ref[Any]] = {}
        self._freed: list[Range] = []  # filled by weakref callbacks, emptied under the lock

    def __repr__(self) -> str:
        return f"<Memory: {len(self._ranges)} ranges>"

    def vars_of(self, array: Any) -> tuple[list[Var], list[Var]]:
        """The vars of the ranges that the array covers whole (its own first), and of those it overlaps in part.

        Raises:
            ArgumentError: not an array.
        """
        known = self._arrays.get(id(array))
        range_ = known[1] if known is not None and known[0]() is array else self._range_of(array)
        if range_ is None:
            return [], []
        own = self._vars.get(range_)
        if own is not None and self._disjoint:
            return [own], []
        if own is None:
            own = self._vars[range_] = Var(f"array of {range_[1] - range_[0]} bytes")
            insort(self._ranges, range_)
            self._longest = max(self._longest, range_[1] - range_[0])
            self._watch(range_, array)
        whole: list[Var] = [own]
        part: list[Var] = []
        if self._disjoint:  # then of those that begin before this one only the last can reach into it
            first = max(0, bisect_left(self._ranges, (range_[0], 0)) - 1)
        else:
            first = bisect_left(self._ranges, (range_[0] - self._longest, 0))
        last = bisect_right(self._ranges, (range_[1], 0))
        for other in self._ranges[first:last]:
            if other != range_ and other[1] > range_[0] and other[0] < range_[1]:
                self._disjoint = False
                covered = range_[0] <= other[0] and other[1] <= range_[1]
                (whole if covered else part).append(self._vars[other])
        return whole, part

    def _range_of(self, array: Any) -> Range | None:
        """None: it has no bytes."""
        if not isinstance(array, np.ndarray):
            if not hasattr(array, "__array_interface__"):
                raise ArgumentError(f"reads and writes: expected Vars or arrays, got {type(array).__name__}")
            array = np.asarray(array)
        if array.size == 0:
            return None
        low, high = byte_bounds(array)
        if len(self._arrays) > CROWDED:
            self._arrays.clear()
        self._arrays[id(array)] = weakref.ref(array), (int(low), int(high))
        return int(low), int(high)

    def tidy(self) -> None:
        """Now and then, forget the ranges that no op uses and no error marks.

        Call it before an op's arrays are looked up, never between them: until the op is submitted
        its new ranges look unused.
        """
        if self._freed:
            self._forget_freed()
        if len(self._ranges) > self._crowded or (not self._disjoint and len(self._ranges) > self._crowded_overlapping):
            self._keep([r for r in self._ranges if not (self._vars[r].idle and self._vars[r].poison is None)])
            self._crowded = CROWDED + 2 * len(self._ranges)
            self._crowded_overlapping = CROWDED_OVERLAPPING + 2 * len(self._ranges)

    def _watch(self, range_: Range, array: np.ndarray[Any, Any]) -> None:
        owner: Any = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        freed = self._freed
        self._owners[range_] = weakref.ref(owner, lambda _: freed.append(range_))

    def _forget_freed(self) -> None:
        in_use = []
        while self._freed:
            range_ = self._freed.pop()
            owner = self._owners.get(range_)
            if owner is not None and owner() is None:
                if self._vars[range_].idle:
                    del self._vars[range_], self._owners[range_], self._ranges[bisect_left(self._ranges, range_)]
                else:
                    in_use.append(range_)
        self._freed.extend(in_use)

    def _keep(self, ranges: list[Range]) -> None:
        for gone in set(self._ranges).difference(ranges):
            del self._vars[gone]
            self._owners.pop(gone, None)
        self._ranges = ranges
        self._longest = max((high - low for low, high in ranges), default=0)
        self._disjoint = all(one[1] <= other[0] for one, other in pairwise(ranges))
