"""Devices that do not exist, as the engine asks for them: streams are the queues of :mod:`tests.engine.queues`."""

from __future__ import annotations

import contextlib
import threading
import time

import numpy as np

from tests.engine.queues import Item, Mark, Queue, Queues, Wait


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


class Stream(Queue):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.errors = {}  # of the work since the last mark, by the thread that enqueued it


class Event(Mark):
    def __init__(self, devices, stream, timed):
        super().__init__()
        self.devices, self.stream, self.error = devices, stream, None
        self.timed, self.at = timed, None
        self.thread = threading.get_ident()

    def run(self, stream):
        self.error = stream.errors.pop(self.thread, None)
        self.at = self.devices.clock(stream.device)
        return super().run(stream)


class Kernel(Item):
    def __init__(self, work):
        self.work, self.thread = work, threading.get_ident()

    def run(self, stream):
        try:
            self.work()
        except Exception as error:
            stream.errors.setdefault(self.thread, error)
        return True


class Current(threading.local):
    def __init__(self):
        self.device, self.streams = 0, {}


class Simulated(Queues):
    """Some devices.

    Args:
        seed: of the choices.
        start: the address at which the memory of every device begins.
        lose: ``lose(stream, event)`` says that this wait is to be forgotten.
    """

    def __init__(self, seed=0, start=4096, lose=None):
        super().__init__(seed)
        self.start, self.next, self.lose = start, {}, lose
        self.null = {}
        self.here = Current()
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
        return self.queue(device, Stream)

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
        event = Event(self, stream, timed)
        self.timed += timed
        self.put(stream, event)
        return event

    def wait(self, stream, event):
        if self.lose and self.lose(stream, event):
            self.advance()
        else:
            self.put(stream, Wait(event))

    def done(self, event):
        self.step()
        if event.happened and event.error is not None:
            raise event.error
        return event.happened

    def synchronise(self, event):
        assert not self.frozen
        self.synchronised.append(threading.current_thread().name)
        self.until(lambda: event.happened, repr(event.stream))
        if event.error is not None:
            raise event.error

    def elapsed_ms(self, first, second):
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
            self.put(self.current(self.here.device if device is None else device), Kernel(work))

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
