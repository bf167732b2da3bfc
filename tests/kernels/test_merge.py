"""Merge against a dumb oracle."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from kvstore import kernels

DTYPES = ["bool", "int8", "uint8", "int32", "int64", "float16", "float32", "float64", "complex64", ml_dtypes.bfloat16]
HALVES = (np.float16, ml_dtypes.bfloat16)


def oracle(arrays):
    dtype = arrays[0].dtype
    wide = np.float32 if dtype in HALVES else dtype
    total = arrays[0].astype(wide)
    with np.errstate(over="ignore"):
        for array in arrays[1:]:
            total = np.asarray(total + array.astype(wide)).astype(wide)
    return total.astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (100_000,), (3, 4), (2, 0)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_merge(dtype, shape, count):
    rng = np.random.default_rng(0)
    arrays = [np.asarray(rng.standard_normal(shape) * 100).astype(np.int64).astype(dtype) for _ in range(count)]
    expected = oracle(arrays)
    out = np.empty(shape, dtype)
    kernels.merge(arrays, out)
    np.testing.assert_array_equal(out, expected)
    kernels.merge(arrays, arrays[0])
    np.testing.assert_array_equal(arrays[0], expected)


def test_any_strides():
    base = np.arange(240, dtype=np.float16).reshape(12, 20)
    arrays = [base[::2, ::3], base[::-2, ::3], np.asfortranarray(base[:6, :7])]
    out = np.empty((12, 7), np.float16)[::2]
    kernels.merge(arrays, out)
    np.testing.assert_array_equal(out, oracle(arrays))


def test_halves_are_rounded_once():
    """1 + 2^-11 twice: rounding after each sum would lose both."""
    small = np.full(3, 2.0**-11, np.float16)
    out = np.empty(3, np.float16)
    kernels.merge([np.ones(3, np.float16), small, small], out)
    assert out.tolist() == [1 + 2.0**-10] * 3
