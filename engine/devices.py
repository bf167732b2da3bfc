"""What the engine asks of devices: the seam between the ordering of work and whatever does it.

A device works through *streams*: queues that do one piece of work after another, beside each other. Work is
enqueued by ordinary calls while a stream is *current* in the calling thread. An *event* is a mark in a stream;
another stream, or the host, can wait for it. That is all the engine knows. What an array of a device is made of, and
what library enqueues work, is known to a :class:`Devices`, which the caller gives to :meth:`engine.Engine.use`; for
CuPy it is :class:`engine.Cuda`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

from engine.groups import Range
from engine.memory import Memory

Stream = Any  # of its Devices' own kind; hashable, and equal if it is the same stream
Event = Any


class Devices(Protocol):
    """The devices of one kind that this process has. Thread-safe; no method but ``synchronise`` waits for a device."""

    def device_of(self, array: Any) -> int | None:
        """The number of the device whose memory the array is in; None if it is in none of these."""

    def range_of(self, array: Any) -> Range:
        """The addresses of its first byte and the one after its last, as its device counts them."""

    def owner_of(self, array: Any) -> Any:
        """An object that lives as long as the array's memory does; weak references to it can be made."""

    def stream(self, device: int) -> Stream:
        """A new stream, which waits for no other unless told to."""

    def current(self, device: int) -> Stream:
        """The stream that the calling thread enqueues its work for this device on."""

    def on(self, stream: Stream) -> AbstractContextManager[Any]:
        """Within the block, the stream is the calling thread's current one, and its device the current one."""

    def record(self, stream: Stream, timed: bool = False) -> Event:
        """A mark behind what has been enqueued on the stream so far; ``timed``: for :meth:`elapsed_ms`."""

    def wait(self, stream: Stream, event: Event) -> None:
        """What will be enqueued on the stream starts when the event, of any device, has come to pass."""

    def done(self, event: Event) -> bool:
        """Has it come to pass? Raises the error of the work before it, if the device reports one."""

    def synchronise(self, event: Event) -> None:
        """Block the calling thread until it has come to pass; raises like :meth:`done`."""

    def elapsed_ms(self, first: Event, second: Event) -> float:
        """Milliseconds between two timed events of one device that have come to pass."""


class DeviceMemory(Memory):
    """The ranges of bytes in use on one device, apart from those of the host and of other devices."""

    def __init__(self, devices: Devices) -> None:
        super().__init__()
        self._devices = devices

    def _range_of(self, array: Any) -> Range | None:
        low, high = self._devices.range_of(array)
        return (low, high) if high > low else None

    def _owner_of(self, array: Any) -> Any:
        return self._devices.owner_of(array)
