"""The copy past the caches, against one byte after the other."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from kvstore.kernels import nontemporal


@pytest.fixture(params=["machine code", "NumPy"])
def way(request, monkeypatch):
    nontemporal._compiled.cache_clear()
    if request.param == "NumPy":
        monkeypatch.setitem(sys.modules, "llvmlite.binding", None)
    assert (nontemporal._compiled() is None) == (request.param == "NumPy")
    yield
    nontemporal._compiled.cache_clear()


def test_every_byte_and_no_other(way):
    rng = np.random.default_rng(1)
    for size in (*range(200), *rng.integers(200, 5000, 300)):
        source, target = rng.integers(0, 256, (2, size + 200), np.uint8)
        at, to = rng.integers(0, 100, 2)
        expected = target.copy()
        expected[to : to + size] = source[at : at + size]
        nontemporal.copy(source[at : at + size], target[to : to + size])
        assert np.array_equal(target, expected)


def test_elements_of_any_type(way):
    source = np.arange(1000, dtype=np.complex128)
    source.flags.writeable = False
    target = np.zeros(1000, np.complex128)
    nontemporal.copy(source, target)
    assert np.array_equal(source, target)
