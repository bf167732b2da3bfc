"""When devices did the work of ops, told on the host's axis of time, for one profile.

A device knows only how long after one event another came to pass. So for each device there is an event of which the
host knows the time, too: one that was recorded on a stream with nothing else in it, while the host looked on.
"""

from __future__ import annotations

import contextlib
import threading
import time
from time import perf_counter

from engine.devices import Devices, Event, Stream

FAR_MS = 10_000.0  # CUDA tells the time between events as a float32: from so far off to a microsecond


class Timing:
    """Of one op."""

    __slots__ = ("_axis", "_began", "_device", "ms", "started_at")

    def __init__(self, axis: DeviceTime, device: int, began: Event) -> None:
        self._axis = axis
        self._device = device
        self._began = began
        self.started_at = 0.0  # by the device, in seconds of ``perf_counter``; if ``ms`` is known
        self.ms: float | None = None  # how long the device worked on it

    def __repr__(self) -> str:
        return f"<Timing: {self.ms} ms>"

    def end(self, event: Event) -> None:
        """A timed event behind its work has come to pass."""
        if self.ms is None:
            with contextlib.suppress(Exception):  # the work is done all the same
                self.started_at = self._axis.at(self._device, self._began)
                self.ms = self._axis.devices.elapsed_ms(self._began, event)


class DeviceTime:
    """Thread-safe."""

    def __init__(self, devices: Devices) -> None:
        self.devices = devices
        self._known: dict[int, tuple[Event, float]] = {}  # by device: an event, and seconds of ``perf_counter``
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<DeviceTime of devices {sorted(self._known)}>"

    def begin(self, device: int, stream: Stream) -> Timing:
        """The work of an op is about to be enqueued. Of each device's first the thread waits for an empty stream."""
        with self._lock:
            if device not in self._known:
                empty = self.devices.stream(device)
                before = perf_counter()
                event = self.devices.record(empty, timed=True)
                while not self.devices.done(event):
                    time.sleep(0)
                self._known[device] = event, (before + perf_counter()) / 2
        return Timing(self, device, self.devices.record(stream, timed=True))

    def at(self, device: int, event: Event) -> float:
        """When a timed event came to pass, in seconds of ``perf_counter``."""
        with self._lock:
            known, then = self._known[device]
            ms = self.devices.elapsed_ms(known, event)
            when = then + ms / 1e3
            if ms > FAR_MS:
                self._known[device] = event, when
            return when
