"""Devices that do not exist: streams are queues, and nothing but their order and events decides what comes when.

Work is done lazily, some of it at every call to the device, by a random choice among the streams whose first piece
can be done. Whatever an engine forgets to order will sooner or later happen in the wrong order.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import deque

import numpy as np


class Lost(Exception):
    """A stream waits for something that never comes."""


class Array:
    """A contiguous piece of a device's memory."""

    def __init__(self, data, device, address, base=None):
        self.data, self.device, self.address, self.base = data, device, address, base

    def __getitem__(self, key):
        part = self.data[key]
        start = part.__array_interface__["data"][0] - self.data.__array_interface__["data"][0]
        return Array(part, self.device, self.address + start, self if self.base is None else self.base)

    @property
    def shape(self):
        return self.data.shape

    @property
    def nbytes(self):
        return self.data.nbytes


class Stream:
    def __init__(self, device, name, speed):
        self.device, self.name, self.speed, self.queue = device, name, speed, deque()
        self.errors = {}  # of the work since the last mark, by the thread that enqueued it

    def __repr__(self):
        return f"<Stream {self.name} of {self.device}: {len(self.queue)} queued>"


class Event:
    def __init__(self, stream, timed):
        self.stream, self.happened, self.error = stream, False, None
        self.timed, self.at = timed, None
        self.thread = threading.get_ident()


class Kernel:
    def __init__(self, work):
        self.work, self.thread = work, threading.get_ident()


class Current(threading.local):
    def __init__(self):
        self.device, self.streams = 0, {}


class Simulated:
    """Some devices.

    Args:
        seed: of the choices.
        start: the address at which the memory of every device begins.
        lose: ``lose(stream, event)`` says that this wait is to be forgotten.
    """

    def __init__(self, seed=0, start=4096, lose=None):
        self.random = random.Random(seed)
        self.lock = threading.RLock()
        self.start, self.next, self.lose = start, {}, lose
        self.null, self.streams = {}, []
        self.here = Current()
        self.diligence = self.random.choice([0.05, 0.2, 1.0])  # how likely a piece of work is done at a call
        self.frozen = False
        self.synchronised = []  # the threads that have waited for a device
        self.launched = 0
        self.timed = 0  # events
        self.worked_s = 0.0  # what kernels have added, in place of taking time

    # --- what the engine asks for ---

    def device_of(self, array):
        return array.device if isinstance(array, Array) else None

    def range_of(self, array):
        return array.address, array.address + array.nbytes

    def owner_of(self, array):
        return array if array.base is None else array.base

    def stream(self, device):
        with self.lock:
            one = Stream(device, f"s{len(self.streams)}", self.random.choice([1, 5, 25]))
            self.streams.append(one)
            return one

    def current(self, device):
        with self.lock:
            if device not in self.null:
                self.null[device] = self.stream(device)
            return self.here.streams.get(device, self.null[device])

    @contextlib.contextmanager
    def on(self, stream):
        before = self.here.device, dict(self.here.streams)
        self.here.device = stream.device
        self.here.streams[stream.device] = stream
        try:
            yield
        finally:
            self.here.device, self.here.streams = before

    def record(self, stream, timed=False):
        with self.lock:
            event = Event(stream, timed)
            self.timed += timed
            stream.queue.append(event)
            self.advance()
            return event

    def wait(self, stream, event):
        with self.lock:
            if not (self.lose and self.lose(stream, event)):
                stream.queue.append((event,))
            self.advance()

    def done(self, event):
        with self.lock:
            if not self.frozen and any(map(self._can, self.streams)):
                self.step()
            if event.happened and event.error is not None:
                raise event.error
            return event.happened

    def synchronise(self, event):
        with self.lock:
            assert not self.frozen
            self.synchronised.append(threading.current_thread().name)
            while not event.happened:
                self.step()
            if event.error is not None:
                raise event.error

    def elapsed_ms(self, first, second):
        with self.lock:
            assert first.timed and second.timed and first.happened and second.happened
            assert first.stream.device == second.stream.device
            return float(np.float32((second.at - first.at) * 1e3))

    # --- what a program asks for ---

    def clock(self, device):
        """Seconds since some time of the device's own."""
        return time.perf_counter() + self.worked_s - 1e4 * device

    def array(self, values, device):
        data = np.array(values)
        address = self.next.get(device, self.start)
        self.next[device] = address + data.nbytes
        return Array(data, device, address)

    def enqueue(self, work, device=None):
        """A kernel: ``work()`` is done on the current stream of the device, the current one unless said."""
        with self.lock:
            self.launched += 1
            self.current(self.here.device if device is None else device).queue.append(Kernel(work))
            self.advance()

    @contextlib.contextmanager
    def callers(self, rng):
        """Within the block, the thread has a stream of its own on some devices."""
        before = dict(self.here.streams)
        for device, luck in enumerate((rng.random(), rng.random())):
            if luck < 0.7:
                self.here.streams[device] = self.stream(device)
        try:
            yield
        finally:
            self.here.streams = before

    def drain(self):
        """Do all there is."""
        with self.lock:
            while any(stream.queue for stream in self.streams):
                self.step()

    # --- what happens ---

    def advance(self):
        if not self.frozen:
            while self.random.random() < self.diligence * 0.7 and any(map(self._can, self.streams)):
                self.step()

    @staticmethod
    def _can(stream):
        return bool(stream.queue) and not (isinstance(stream.queue[0], tuple) and not stream.queue[0][0].happened)

    def step(self):
        able = list(filter(self._can, self.streams))
        if not able:
            raise Lost(f"{self.streams}")
        stream = self.random.choices(able, [one.speed for one in able])[0]
        first = stream.queue.popleft()
        if isinstance(first, Event):
            first.happened, first.error = True, stream.errors.pop(first.thread, None)
            first.at = self.clock(stream.device)
        elif isinstance(first, Kernel):
            try:
                first.work()
            except Exception as error:
                stream.errors.setdefault(first.thread, error)


class Nowhere:
    """What a program asks for, without any device: work is done when it is enqueued, on NumPy's arrays."""

    def array(self, values, device):
        return np.array(values)

    def enqueue(self, work, device=None):
        work()

    def callers(self, rng):
        rng.random(), rng.random()
        return contextlib.nullcontext()

    def drain(self):
        pass
