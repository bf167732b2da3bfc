"""When devices did the work of ops, told on the host's axis of time, for one profile.

A device knows only how long after one event another came to pass. So for each device there is an event of which the
host knows the time, too: one that was recorded on a stream with nothing else in it, while the host looked on.
"""

from __future__ import annotations

import threading
import time
from time import perf_counter

from engine.devices import Devices, Event

FAR_MS = 10_000.0  # CUDA tells the time between events as a float32: from so far off to a microsecond


class DeviceTime:
    """Thread-safe."""

    def __init__(self, devices: Devices) -> None:
        self._devices = devices
        self._known: dict[int, tuple[Event, float]] = {}  # by device: an event, and seconds of ``perf_counter``
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<DeviceTime of devices {sorted(self._known)}>"

    def begin(self, device: int) -> None:
        """An op of the device is about to be timed. The first time, this thread waits for an empty stream of it."""
        with self._lock:
            if device not in self._known:
                stream = self._devices.stream(device)
                before = perf_counter()
                event = self._devices.record(stream, timed=True)
                while not self._devices.done(event):
                    time.sleep(0)
                self._known[device] = event, (before + perf_counter()) / 2

    def at(self, device: int, event: Event) -> float:
        """When a timed event came to pass, in seconds of ``perf_counter``."""
        with self._lock:
            known, then = self._known[device]
            ms = self._devices.elapsed_ms(known, event)
            when = then + ms / 1e3
            if ms > FAR_MS:
                self._known[device] = event, when
            return when
