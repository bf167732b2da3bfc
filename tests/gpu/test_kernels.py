"""The kernels' contract, on CuPy's arrays; and what only a GPU has, streams."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from kvstore import kernels
from tests.gpu.mirror import mirrored
from tests.kernels import test_compression, test_contract
from tests.kernels.forms import Form

SMALL = [(), (0,), (7,), (3, 5), (5, 41, 7)]

# Their tests are run again, with the form below.
for module in (test_contract, test_compression):
    globals().update({name: test for name, test in vars(module).items() if name.startswith("test_")})


@pytest.fixture(params=["current stream", "own stream"])
def form(request, monkeypatch, cupy):
    if hasattr(cupy, "kvstore_simulated"):
        monkeypatch.setattr(test_contract, "SHAPES", SMALL)
        monkeypatch.setattr(test_contract, "LARGE_BYTES", 100)
    for name in kernels.NAMES:
        monkeypatch.setattr(kernels, name, mirrored(getattr(kernels, name), cupy))
    if request.param == "current stream":
        yield Form("cuda")
    else:
        with cupy.cuda.Stream(non_blocking=True):
            yield Form("cuda")


def test_kernels_are_put_into_the_current_stream(cupy):
    """What was put there before has been done, also where nobody waited; the host finds the sum."""
    size = 1 << (10 if hasattr(cupy, "kvstore_simulated") else 24)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        arrays = [cupy.full(size, k, np.float32) for k in (1, 2, 3)]
        out = cupy.empty(size, np.float32)
        for _ in range(50):
            kernels.merge([out if _ else arrays[0], *arrays[1:]], out)
        stream.synchronize()
    assert bool((out == 1 + 50 * 5).all())


def test_row_ids_of_the_host_are_looked_at_there(cupy):
    """So nothing waits for the device, nor is an error told too late."""
    table, rows, out = cupy.zeros((5, 2), np.float32), cupy.ones((3, 2), np.float32), cupy.empty((3, 2), np.float32)
    ids = np.array([4, 0, 4])
    still = cupy.machine.standstill() if hasattr(cupy, "kvstore_simulated") else contextlib.nullcontext()
    with still:
        kernels.scatter_add(table, ids, rows)
        kernels.gather(table, ids, out)
        for wrong in (-1, 5):
            with pytest.raises(IndexError, match=rf"0\.\.4, got {wrong}"):
                kernels.gather(table, np.array([1, wrong, 0]), out)
        ids[:] = 3  # it was read
    assert table.get().tolist() == [[1, 1], [0, 0], [0, 0], [0, 0], [2, 2]]
    assert out.get().tolist() == [[2, 2], [1, 1], [2, 2]]


def test_kernels_refuse_arrays_of_both_memories(cupy):
    with pytest.raises((TypeError, AttributeError)):
        kernels.merge([np.zeros(3), np.zeros(3)], cupy.zeros(3))
