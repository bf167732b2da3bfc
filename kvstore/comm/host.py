"""Merge and broadcast for devices whose arrays lie in host memory."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore import kernels
from kvstore.arrays import Array


def merge(arrays: Sequence[Array], out: Array) -> None:
    """``out`` = the sum of ``arrays``, left to right, in the accumulation rules of :mod:`kvstore.kernels`."""
    kernels.merge(arrays, out)


def broadcast(source: Array, outs: Sequence[Array], start: int = 0) -> None:
    """Copy the flat ``source`` into each of ``outs``, all of one shape, from element ``start`` on in C order."""
    stop = start + source.size
    if outs and source.size == outs[0].size:
        kernels.broadcast(source, outs)
    elif all(out.flags.c_contiguous for out in outs):
        kernels.broadcast(source, [out.reshape(-1)[start:stop] for out in outs])
    else:
        for out in outs:
            out.flat[start:stop] = source
