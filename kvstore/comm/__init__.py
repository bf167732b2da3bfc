"""How the arrays of one process's devices become one, and one becomes many, whichever memories they lie in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvstore.arrays import Array
from kvstore.comm import device, host

__all__ = ["broadcast", "merge"]


def merge(arrays: Sequence[Array], out: Array, *, large: bool = False) -> None:
    """``out`` = the sum of ``arrays``, left to right, in the accumulation rules of :mod:`kvstore.kernels`.

    ``large``: they are among more than stays in the host's caches until it is read again.
    """
    if _in_host_memory(out, arrays):
        host.merge(arrays, out, large=large)
    else:
        device.merge(arrays, out)


def broadcast(source: Array, outs: Sequence[Array], start: int = 0, *, large: bool = False) -> None:
    """Copy the flat ``source`` into each of ``outs``, all of one shape, from element ``start`` on in C order.

    ``large``: as in :func:`merge`.
    """
    if _in_host_memory(source, outs):
        host.broadcast(source, outs, start, large=large)
    else:
        device.broadcast(source, outs, start)


def _in_host_memory(one: Array, more: Sequence[Array]) -> bool:
    if not isinstance(one, np.ndarray):
        return False
    for array in more:  # noqa: SIM110  a generator costs more than the rest
        if not isinstance(array, np.ndarray):
            return False
    return True
