"""Merge and broadcast for devices whose arrays lie in host memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvstore import kernels
from kvstore.arrays import Array


def merge(arrays: Sequence[Array], out: Array) -> None:
    """``out`` = the sum of ``arrays``, left to right, in the accumulation rules of :mod:`kvstore.kernels`."""
    kernels.merge(arrays, out)


def broadcast(source: Array, outs: Sequence[Array], start: int = 0) -> None:
    """Copy the flat ``source`` into each of ``outs``, from element ``start`` on in C order."""
    for out in outs:
        if source.size == out.size:
            np.copyto(out, source.reshape(out.shape))
        elif out.flags.c_contiguous:
            np.copyto(out.reshape(-1)[start : start + source.size], source)
        else:
            out.flat[start : start + source.size] = source
