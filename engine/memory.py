"""Which arrays share memory: from an array to the vars of all memory it overlaps.

An array counts by the range of bytes between its first and last element, so two views interleaved
in one buffer conflict; that is safe, and cheap to decide. A range stays known while an op uses it,
and after a failed write until it is written whole or its memory is freed.

Arrays that are always read or written together can be an :class:`ArrayGroup`: what is in this memory of it has one
var, and is known while an op uses it. After a failed write that memory stays known, like that of arrays.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left, bisect_right, insort
from itertools import pairwise
from typing import Any

import numpy as np

from engine.errors import ArgumentError
from engine.groups import Part, Range, Scar, owner_of, range_of
from engine.var import Var

MANY = 2048  # ranges that are known before the idle ones are forgotten: arrays come again
FEW = 64  # so many if some overlap, or there are groups, since then many are looked at for each array


class Memory:
    """The ranges of bytes in use. Not thread-safe."""

    def __init__(self) -> None:
        self._vars: dict[Range, Var] = {}
        self._ranges: list[Range] = []  # sorted
        self._groups: dict[Part | Scar, Var] = {}
        self._arrays: dict[int, tuple[weakref.ref[Any], int, Range]] = {}  # by id: to ask for a range takes long
        self._longest = 0
        self._disjoint = True  # no two ranges overlap, as a rule
        self._kept = 0  # ranges, when they were looked through last
        self._owners: dict[Range, weakref.ref[Any]] = {}
        self._freed: list[Range] = []  # filled by weakref callbacks, emptied under the lock

    def __repr__(self) -> str:
        return f"<Memory: {len(self._ranges)} ranges, {len(self._groups)} groups>"

    def only_var_of(self, array: Any) -> Var | None:
        """The var of an array that is known, where none overlaps another, as is the rule; there is nothing to tidy."""
        if self._freed or self._groups or not self._disjoint:
            return None
        range_ = self._range_of(array)
        return None if range_ is None else self._vars.get(range_)

    def vars_of(self, array: Any) -> tuple[list[Var], list[Var]]:
        """The vars of what the array (or part of a group) covers whole, its own first; of what it overlaps in part.

        Raises:
            ArgumentError: not an array.
        """
        if isinstance(array, Part):
            return self._vars_of_group(array)
        range_ = self._range_of(array)
        if range_ is None:
            return [], []
        own = self._vars.get(range_)
        if own is not None and self._disjoint and not self._groups:
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
        for group, var in self._groups.items():
            if group.overlaps(range_):
                covered = range_[0] <= group.ranges[0][0] and group.ranges[-1][1] <= range_[1]
                (whole if covered else part).append(var)
        return whole, part

    def _vars_of_group(self, group: Part) -> tuple[list[Var], list[Var]]:
        own = self._groups.get(group)
        if own is None:
            own = self._groups[group] = Var(f"group of {len(group.arrays)} arrays")
        whole: list[Var] = [own]
        part: list[Var] = []
        for range_, var in self._vars.items():
            if not (var.idle and var.poison is None) and group.overlaps(range_):
                (whole if group.covers(range_) else part).append(var)
        for other, var in self._groups.items():
            if other is not group and any(map(group.overlaps, other.ranges)):
                (whole if all(map(group.covers, other.ranges)) else part).append(var)
        return whole, part

    def _range_of(self, array: Any) -> Range | None:
        """The range of the array; None: it has no bytes."""
        known = self._arrays.get(id(array))
        if known is not None and known[0]() is not None and known[1] == array.nbytes:
            return known[2]
        return self._learn(array)

    def _learn(self, array: Any) -> Range | None:
        """The array's range, from now on known; None: it has no bytes."""
        if not isinstance(array, np.ndarray):
            if not hasattr(array, "__array_interface__"):
                raise ArgumentError(f"reads and writes: expected Vars or arrays, got {type(array).__name__}")
            array = np.asarray(array)
        if array.size == 0:
            return None
        range_ = range_of(array)
        if len(self._arrays) > MANY:
            self._arrays.clear()
        self._arrays[id(array)] = weakref.ref(array), array.nbytes, range_
        return range_

    def _owner_of(self, array: Any) -> Any:
        return owner_of(array)

    def tidy(self) -> None:
        """Now and then, forget the ranges that no op uses and no error marks.

        Call it before an op's arrays are looked up, never between them: until the op is submitted
        its new ranges look unused.
        """
        if self._freed:
            self._forget_freed()
        if self._groups:
            self._tidy_groups()
        if len(self._ranges) > 2 * self._kept + (MANY if self._disjoint and not self._groups else FEW):
            self._keep([r for r in self._ranges if not (self._vars[r].idle and self._vars[r].poison is None)])
            self._kept = len(self._ranges)

    def _tidy_groups(self) -> None:
        groups: dict[Part | Scar, Var] = {}
        for group, var in self._groups.items():
            if not var.idle:
                groups[group] = var
            elif var.poison is not None:
                scar = Scar(group, self._owner_of) if isinstance(group, Part) else group
                scar.forget_freed()
                if scar.ranges:
                    groups[scar] = var
        self._groups = groups

    def in_use(self) -> bool:
        """Does an op use any range or group, or an error mark one?"""
        return any(
            not var.idle or var.poison is not None for vars_ in (self._groups, self._vars) for var in vars_.values()
        )

    def _watch(self, range_: Range, array: Any) -> None:
        freed = self._freed
        self._owners[range_] = weakref.ref(self._owner_of(array), lambda _: freed.append(range_))

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
