"""Ranges of bytes, and many arrays that are read or written together."""

from __future__ import annotations

import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import ArgumentError

try:
    from numpy.lib.array_utils import byte_bounds
except ImportError:  # NumPy 1
    from numpy import byte_bounds  # type: ignore[attr-defined,no-redef]

if TYPE_CHECKING:
    from engine.devices import Devices

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


class Part(Ranges):
    """The arrays of a group that lie in one memory, each with its range."""

    __slots__ = ("arrays",)

    def __init__(self, arrays: list[tuple[Range, Any]]) -> None:
        self.arrays = arrays
        super().__init__(range_ for range_, _ in arrays)

    def __repr__(self) -> str:
        return f"<Part of a group: {len(self.arrays)} arrays>"


class ArrayGroup:
    """Arrays that ops read or write together: as an item of ``reads`` or ``writes`` it stands for all of them.

    Making it costs as much as one op on all its arrays (its first use, if some are of devices); each op on it then
    costs as much as one on a single array. They share an error, too: when an op that writes them fails, all of them
    carry it until one op has written them all. A group over several memories, the host's and devices', counts as one
    for each.

    Args:
        arrays: NumPy arrays, and those of devices that the engine uses; they are kept as long as the group.

    Raises:
        ArgumentError: something else; at the first use, if that is an array, but of no device that the engine uses.
    """

    __slots__ = ("_devices", "_parts", "arrays")

    def __init__(self, arrays: Iterable[Any]) -> None:
        self.arrays = tuple(arrays)
        self._devices: Devices | None = None
        self._parts: dict[int | None, Part] | None = None
        for array in self.arrays:
            if not isinstance(array, np.ndarray):
                if not hasattr(array, "shape"):
                    raise _unknown(array)
                return  # only an engine knows which memory that is in
        self._parts = self._by_memory(None)

    def __repr__(self) -> str:
        return f"<ArrayGroup of {len(self.arrays)} arrays>"

    def parts(self, devices: Devices | None) -> dict[int | None, Part]:
        """Its arrays that have bytes, by the device whose memory they are in; None is the host's."""
        if self._parts is None or (self._devices is not None and self._devices is not devices):
            self._parts, self._devices = self._by_memory(devices), devices
        return self._parts

    def _by_memory(self, devices: Devices | None) -> dict[int | None, Part]:
        found: dict[int | None, list[tuple[Range, Any]]] = {}
        for array in self.arrays:
            device = None
            if isinstance(array, np.ndarray):
                low, high = range_of(array)
            elif devices is not None and (device := devices.device_of(array)) is not None:
                low, high = devices.range_of(array)
            else:
                raise _unknown(array)
            if high > low:
                found.setdefault(device, []).append(((low, high), array))
        return {device: Part(some) for device, some in found.items()}


class Scar(Ranges):
    """What is left of a group that no op uses but an error marks: the memory, as far as it has not been freed."""

    __slots__ = ("_owners",)

    def __init__(self, group: Part, owner_of: Callable[[Any], Any]) -> None:
        self._owners = [(range_, weakref.ref(owner_of(array))) for range_, array in group.arrays]
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


def _unknown(item: Any) -> ArgumentError:
    return ArgumentError(f"a group: expected arrays of NumPy or of devices in use, got {type(item).__name__}")


def _joined(ranges: list[Range]) -> list[Range]:
    """Sorted ranges without overlaps: those that touch or overlap become one."""
    joined: list[Range] = []
    for low, high in ranges:
        if joined and low <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(high, joined[-1][1]))
        else:
            joined.append((low, high))
    return joined
