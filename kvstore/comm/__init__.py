"""How the arrays of one process's devices become one, and one becomes many, whichever memories they lie in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvstore.arrays import Array
from kvstore.comm import device, host
from kvstore.comm.device import AUTO, NCCL, WAYS, near, packed, split

__all__ = ["AUTO", "NCCL", "WAYS", "broadcast", "in_host_memory", "merge", "near", "packed", "split"]


def merge(arrays: Sequence[Array], out: Array, way: str = AUTO, *, large: bool = False) -> None:
    """``out`` = the sum of ``arrays``, left to right, in the accumulation rules of :mod:`kvstore.kernels`.

    Args:
        way: one of :data:`WAYS` in which arrays of several GPUs come together; two of them have another order.
        large: they are among more than stays in the host's caches until it is read again.
    """
    if in_host_memory(out) and in_host_memory(*arrays):
        host.merge(arrays, out, large=large)
    else:
        device.merge(arrays, out, way)


def broadcast(source: Array, outs: Sequence[Array], start: int = 0, *, large: bool = False) -> None:
    """Copy the flat ``source`` into each of ``outs``, all of one shape, from element ``start`` on in C order.

    ``large``: as in :func:`merge`.
    """
    if in_host_memory(source) and in_host_memory(*outs):
        host.broadcast(source, outs, start, large=large)
    else:
        device.broadcast(source, outs, start)


def in_host_memory(*arrays: Array) -> bool:
    """Do all of these lie there?"""
    for array in arrays:  # noqa: SIM110  a generator costs more than the rest
        if not isinstance(array, np.ndarray):
            return False
    return True
