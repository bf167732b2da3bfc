"""The kernels in plain NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

BLOCK = 32 << 10  # elements: a few blocks fit the second-level cache
HALVES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


def merge(arrays: Sequence[Array], out: Array) -> None:
    """``out`` = the sum of ``arrays``, folded left to right.

    Args:
        arrays: at least one, all of ``out``'s shape and dtype, with any strides.
        out: may be ``arrays[0]``, may overlap no other.

    float16 and bfloat16 are accumulated in float32 and rounded once; integers wrap in their own
    dtype; bool is the logical or.
    """
    if len(arrays) == 1:
        if arrays[0] is not out:
            np.copyto(out, arrays[0])
        return
    with np.errstate(all="ignore"):
        if out.dtype in HALVES:
            _merge_halves(arrays, out)
            return
        np.add(arrays[0], arrays[1], out=out)
        for array in arrays[2:]:
            np.add(out, array, out=out)


def _merge_halves(arrays: Sequence[Array], out: Array) -> None:
    if out.ndim != 1 or not all(array.flags.c_contiguous for array in (*arrays, out)):
        total = arrays[0].astype(np.float32)
        for array in arrays[1:]:
            total += array.astype(np.float32)
        out[...] = total.astype(out.dtype)
        return
    scratch = np.empty(min(BLOCK, out.size), np.float32)
    for start in range(0, out.size, BLOCK):
        stop = min(out.size, start + BLOCK)
        total = scratch[: stop - start]
        np.copyto(total, arrays[0][start:stop])
        for array in arrays[1:]:
            total += array[start:stop].astype(np.float32)
        out[start:stop] = total
