"""The engine's random programs on CuPy, on streams of the lanes and of the caller; and programs of copies."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import pytest

import engine
from tests.engine.device_programs import LIMIT_S, PRIME, VIEWS, with_streams
from tests.engine.simulated import Nowhere

PROGRAMS = 10_000
PROGRAMS_SIMULATED = 200


def seeds(cupy):
    return range(PROGRAMS_SIMULATED if hasattr(cupy, "kvstore_simulated") else PROGRAMS)


class OnCupy:
    """What a program asks for: kernels are CuPy's own, on the current stream."""

    def __init__(self, cupy):
        self.cupy = cupy

    def array(self, values, device):
        array = self.cupy.asarray(values)
        self.cupy.cuda.get_current_stream().synchronize()
        return array

    def enqueue(self, work, device=None):
        work()

    def callers(self, rng):
        own = rng.random(), rng.random()
        return self.cupy.cuda.Stream(non_blocking=True) if own[0] < 0.7 else contextlib.nullcontext()

    def drain(self):
        self.cupy.cuda.runtime.deviceSynchronize()


class OnDevices(OnCupy):
    """The same on the first two GPUs, or twice on the only one."""

    def __init__(self, cupy):
        super().__init__(cupy)
        self.count = cupy.cuda.runtime.getDeviceCount()

    def array(self, values, device):
        with self.cupy.cuda.Device(device % self.count):
            return super().array(values, device)

    def enqueue(self, work, device=None):
        with contextlib.nullcontext() if device is None else self.cupy.cuda.Device(device % self.count):
            work()

    @contextlib.contextmanager
    def callers(self, rng):
        own = [rng.random() < 0.7, rng.random() < 0.7][: self.count]
        before = self.streams()
        for device, has in enumerate(own):
            with self.cupy.cuda.Device(device):
                if has:
                    self.cupy.cuda.Stream(non_blocking=True).use()
        try:
            yield
        finally:
            for device, stream in enumerate(before):
                with self.cupy.cuda.Device(device):
                    stream.use()

    def streams(self):
        return [self.cupy.cuda.get_current_stream(device) for device in range(self.count)]

    def drain(self):
        for device in range(self.count):
            self.cupy.cuda.Device(device).synchronize()


@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:The device where the array resides")
@pytest.mark.parametrize("machine", [OnCupy, OnDevices])
def test_agrees_with_the_serial_engine_on_the_host(cupy, machine):
    serial, streams = engine.create("serial"), engine.create("threaded", threads=3)
    streams.use(engine.Cuda(cupy))
    for seed in seeds(cupy):
        got = with_streams(streams, machine(cupy), seed)
        assert got == with_streams(serial, Nowhere(), seed), f"seed {seed}"
    streams.close()
    serial.close()


class Plain:
    """What a program of copies asks for, on NumPy's arrays."""

    def device(self, values, number):
        return values.copy()

    def host(self, values, number):
        return values.copy()

    def copy(self, source, target):
        target[...] = source

    def drain(self):
        pass


class Copies(Plain):
    """On CuPy's: every third array of the host lies in pageable memory, the others in pinned memory of either kind."""

    def __init__(self, cupy):
        self.cupy = cupy
        self.registered = []

    def device(self, values, number):
        with self.cupy.cuda.Device(number % self.cupy.cuda.runtime.getDeviceCount()):
            array = self.cupy.asarray(values)
            self.cupy.cuda.get_current_stream().synchronize()
            return array

    def host(self, values, number):
        made = values.copy()
        if number % 3 == 1:
            made = np.frombuffer(self.cupy.cuda.alloc_pinned_memory(values.nbytes), values.dtype, values.size)
            made[...] = values
        elif number % 3 == 2:
            self.cupy.cuda.runtime.hostRegister(made.ctypes.data, made.nbytes, 0)
            self.registered.append(made)
        return made

    def copy(self, source, target):
        if isinstance(source, np.ndarray):
            target.set(source) if not isinstance(target, np.ndarray) else super().copy(source, target)
        elif isinstance(target, np.ndarray):
            source.get(out=target, blocking=False)
        else:
            target[...] = source

    def drain(self):
        for made in self.registered:
            self.cupy.cuda.runtime.hostUnregister(made.ctypes.data)


def copies(runtime, machine, seed):
    """Copies among arrays of the host and of two devices, sums of what lies in one memory, and the host's own work."""
    rng = random.Random(seed)
    start = [np.arange(8, dtype=np.int64) + 100 * n for n in range(7)]
    memories = [[machine.host(start[n], n) for n in range(3)]]
    memories += [[machine.device(start[3 + n], n % 2) for n in range(4)][device::2] for device in range(2)]
    outcome = []
    for _ in range(rng.randrange(4, 24)):
        here, there = rng.choice(memories), rng.choice(memories)
        view, other = rng.choice(VIEWS), rng.choice(here)
        source, target = rng.choice(here)[view], rng.choice(there)[view]
        luck = rng.random()
        if luck < 0.6:

            def copy(source=source, target=target):
                machine.copy(source, target)

            if np.ndim(source) and source is not target:
                runtime.push(copy, reads=[source], writes=[target], lane=rng.choice([None, None, "other"]))
        elif luck < 0.9:

            def add(source=source, other=other):
                other[...] = (other * 3 + source.sum()) % PRIME

            runtime.push(add, reads=[source, other], writes=[other])
        else:
            mine = rng.choice(memories[0])
            runtime.push(lambda: None, reads=[mine], writes=[mine]).result(LIMIT_S)
            outcome.append(mine.tolist())
            mine += 1  # nothing uses it any more
    runtime.wait_all(LIMIT_S)
    machine.drain()
    return outcome + [array.tolist() for memory in memories for array in memory]


@pytest.mark.timeout(900)
def test_programs_of_copies_agree_with_the_serial_engine(cupy):
    serial, streams = engine.create("serial"), engine.create("threaded", threads=3)
    streams.use(engine.Cuda(cupy))
    for seed in seeds(cupy):
        assert copies(streams, Copies(cupy), seed) == copies(serial, Plain(), seed), f"seed {seed}"
    streams.close()
    serial.close()


def test_a_copy_that_is_not_said_to_write_is_caught(simulated_cupy):
    """The comparison can fail."""

    class Forgets(engine.ThreadedEngine):
        def push(self, fn, reads=(), writes=(), **options):
            if writes and isinstance(writes[0], np.ndarray):
                writes = []
            return super().push(fn, reads, writes, **options)

    cupy, serial, streams = simulated_cupy(), engine.create("serial"), Forgets(3)
    streams.use(engine.Cuda(cupy))
    assert any(copies(streams, Copies(cupy), seed) != copies(serial, Plain(), seed) for seed in range(100))
    streams.close()
    serial.close()


def test_the_stream_that_the_caller_has_made_current_stays_so(cupy):
    runtime, own = engine.create("threaded"), cupy.cuda.Stream(non_blocking=True)
    runtime.use(engine.Cuda(cupy))
    array = cupy.zeros(8)
    try:
        own.use()  # CuPy's `with` blocks know nothing of it
        runtime.push(lambda: array.fill(1), writes=[array])
        assert cupy.cuda.get_current_stream() == own
    finally:
        cupy.cuda.Stream.null.use()
    runtime.wait_all(LIMIT_S)
    runtime.close()


def test_copies_go_up_and_down(cupy):
    runtime = engine.create("threaded")
    runtime.use(engine.Cuda(cupy))
    up, down = np.arange(8.0), np.zeros(8)
    array = cupy.zeros(8)
    runtime.push(lambda: array.set(up), reads=[up], writes=[array])
    runtime.push(lambda: array.__imul__(2), reads=[array], writes=[array])
    runtime.push(lambda: array.get(out=down), reads=[array], writes=[down])
    runtime.wait(down, timeout=30)
    assert down.tolist() == (2 * up).tolist()
    runtime.close()
