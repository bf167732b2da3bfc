"""Merge and broadcast in host memory, of what the caches keep and of more, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from kvstore import comm
from kvstore.kernels import compiled


@pytest.fixture(autouse=True)
def nothing_is_too_small(monkeypatch):
    monkeypatch.setattr(compiled, "NONTEMPORAL_BYTES", 1)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("shape", [(), (0,), (70_001,), (300, 700)], ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_merge(count, shape, large):
    arrays = [np.random.default_rng(number).random(shape, np.float32) for number in range(count)]
    out = np.full(shape, -1, np.float32)
    comm.merge(arrays, out, large=large)
    np.testing.assert_array_equal(out, sum(arrays[1:], start=arrays[0]))


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("shape", [(), (0,), (70_001,), (300, 700)], ids=str)
@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("turned", [False, True])
def test_broadcast(turned, count, shape, large):
    source = np.random.default_rng(1).random(shape, np.float32)
    outs = [np.full(shape[::-1], -1, np.float32).T if turned else np.full(shape, -1, np.float32) for _ in range(count)]
    parts = np.array_split(source.reshape(-1), 3)
    comm.broadcast(source.reshape(-1), outs, large=large)
    for out in outs:
        np.testing.assert_array_equal(out, source)
        out.fill(-1)
    start = 0
    for part in parts:
        comm.broadcast(part, outs, start, large=large)
        start += part.size
    for out in outs:
        np.testing.assert_array_equal(out, source)
