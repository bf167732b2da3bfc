"""The engine's random programs on CuPy: all arrays on the current GPU, on streams of the lanes and of the caller."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

import engine
from tests.engine.device_programs import with_streams
from tests.engine.simulated import Nowhere

PROGRAMS = 10_000
PROGRAMS_SIMULATED = 300


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


@pytest.mark.timeout(900)
def test_agrees_with_the_serial_engine_on_the_host(cupy):
    serial, streams = engine.create("serial"), engine.create("threaded", threads=3)
    streams.use(engine.Cuda(cupy))
    for seed in range(PROGRAMS_SIMULATED if hasattr(cupy, "kvstore_simulated") else PROGRAMS):
        got = with_streams(streams, OnCupy(cupy), seed)
        assert got == with_streams(serial, Nowhere(), seed), f"seed {seed}"
    streams.close()
    serial.close()


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
