"""Merge and broadcast for devices whose arrays lie in host memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvstore import kernels
from kvstore.arrays import Array


def merge(arrays: Sequence[Array], out: Array, *, large: bool = False) -> None:
    """See :func:`kvstore.comm.merge`."""
    if large:
        kernels.merge_nontemporal(arrays, out)
    elif len(arrays) == 1:
        np.copyto(out, arrays[0])
    else:
        kernels.merge(arrays, out)


def broadcast(source: Array, outs: Sequence[Array], start: int = 0, *, large: bool = False) -> None:
    """See :func:`kvstore.comm.broadcast`."""
    stop = start + source.size
    if outs and source.size == outs[0].size:
        _copy(source, outs, large)
    elif all(out.flags.c_contiguous for out in outs):
        _copy(source, [out.reshape(-1)[start:stop] for out in outs], large)
    else:
        for out in outs:
            out.flat[start:stop] = source


def _copy(source: Array, outs: Sequence[Array], large: bool) -> None:
    if len(outs) != 1:
        kernels.broadcast(source, outs)
    elif large and outs[0].flags.c_contiguous:
        kernels.merge_nontemporal([source.reshape(-1)], outs[0].reshape(-1))
    else:
        np.copyto(outs[0], source.reshape(outs[0].shape))
