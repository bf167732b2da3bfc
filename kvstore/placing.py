"""On which GPU a value lives: one of those whose arrays are pushed to it, chosen by bytes. Pure.

The largest come first, each to the device that has least, so that the fullest is little fuller than the mean (Graham
1969, longest processing time first). Names and sizes decide, and which devices push: not who is first.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from kvstore.protocol.pieces import Key


class Placing:
    """Where the values of one store are, or will be once they are pushed from GPUs. Not thread-safe."""

    def __init__(self) -> None:
        self._bytes: dict[int, int] = {}  # by device
        self._planned: dict[Key, int] = {}

    def __repr__(self) -> str:
        return f"<Placing: {self._bytes} bytes by GPU>"

    def place(self, key: Key, devices: Collection[int], waiting: Mapping[Key, int]) -> int:
        """The device for a value that these have pushed first.

        Args:
            waiting: the bytes of all values that have no place yet, this one among them: they are taken for values
                that the same devices will push.
        """
        if self._planned.get(key) not in devices:
            self._forget(key, waiting[key])
            for name in sorted(waiting, key=lambda name: (-waiting[name], str(name))):
                if name not in self._planned:
                    device = min(devices, key=lambda one: (self._bytes.get(one, 0), one))
                    self._planned[name] = device
                    self._bytes[device] = self._bytes.get(device, 0) + waiting[name]
        return self._planned[key]

    def _forget(self, key: Key, nbytes: int) -> None:
        device = self._planned.pop(key, None)
        if device is not None:
            self._bytes[device] -= nbytes
