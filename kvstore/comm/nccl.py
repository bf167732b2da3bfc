"""Sums made by NCCL, NVIDIA's library for collective operations, one array per GPU.

In its own order, and its own rounding of 16-bit floating point. What it has no type for is not summed here.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import ml_dtypes
import numpy as np

from kvstore.arrays import Array, empty_like, gpu
from kvstore.arrays.copies import Fork
from kvstore.errors import OptionError

_KINDS = {
    np.dtype(name): name.upper()
    for name in ("int8", "int32", "int64", "uint8", "uint32", "uint64", "float16", "float32", "float64")
} | {np.dtype(ml_dtypes.bfloat16): "BFLOAT16"}
_calling = threading.Lock()  # every device must see the operations in the same order


def takes(dtype: np.dtype[Any]) -> bool:
    """Can it sum arrays of this type? Raises OptionError if it is not there at all."""
    return dtype in _KINDS and hasattr(_library(), f"NCCL_{_KINDS[dtype]}")


def summed(partial: Mapping[int, Array], root: int, fork: Fork) -> Array:
    """The sum of one array per device, on ``root``, the device of the stream at hand; the fork is joined."""
    nccl, devices = _library(), tuple(sorted(partial))
    kind = getattr(nccl, f"NCCL_{_KINDS[partial[root].dtype]}")
    total = empty_like(partial[root])
    streams = {}
    for device in devices:
        with fork.on(device):
            streams[device] = gpu.current_stream()
    with _calling:
        communicators = _communicators(devices)
        nccl.groupStart()
        with ExitStack() as group:
            group.callback(nccl.groupEnd)
            for device, communicator in zip(devices, communicators, strict=True):
                there = gpu.address(partial[device]), gpu.address(total), total.size
                communicator.reduce(*there, kind, nccl.NCCL_SUM, devices.index(root), streams[device])
    fork.join()
    return total


@functools.cache
def _communicators(devices: tuple[int, ...]) -> list[Any]:
    made: list[Any] = _library().NcclCommunicator.initAll(list(devices))
    return made


def _library() -> Any:
    library = gpu.nccl()
    if library is None:
        raise OptionError(
            "sums by NCCL: CuPy cannot load it (pip install nvidia-nccl-cu12, or -cu13); device_merge='auto' needs none"
        )
    return library
