"""CuPy as the :class:`~kvstore.kernels.cuda.launches.Processor`. Imported with the first CuPy array to compute with.

NVRTC compiles the source for the device at hand when a kernel is first started there; CuPy keeps it on disk.
"""

from __future__ import annotations

import functools
from typing import Any

import cupy
import numpy as np

from kvstore.kernels.cuda.launches import OPTIONS, THREADS, WORK, Launches, source
from kvstore.kernels.reference import Array

BLOCKS_PER_MULTIPROCESSOR = 8  # of 256 threads: as many as one holds at a time

_PASSED = np.dtype([("work", f"V{WORK.size}")])  # CuPy passes an array of NumPy's with one struct by value


class Gpu:
    """CuPy's current device and stream."""

    def __init__(self) -> None:
        self._module = cupy.RawModule(code=source(), options=OPTIONS)
        self._kernel = functools.cache(self._module.get_function)
        self._blocks = functools.cache(_blocks)

    def __repr__(self) -> str:
        return f"<Gpu {cupy.cuda.Device().id}>"

    def blocks(self) -> int:
        return self._blocks(cupy.cuda.runtime.getDevice())

    def start(self, kernel: str, blocks: int, work: bytes) -> None:
        self._kernel(kernel)((blocks,), (THREADS,), (np.frombuffer(work, _PASSED),))

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        array: Array = cupy.empty(shape, dtype)
        return array

    def upload(self, array: Array) -> Array:
        there: Array = cupy.asarray(array)
        return there

    def download(self, array: Array) -> Array:
        here: Array = cupy.asnumpy(array)
        return here

    def address(self, array: Any) -> int:
        at: int = array.data.ptr
        return at

    def copy(self, source: Array, target: Array) -> None:
        target[...] = source if source.dtype == target.dtype else source.astype(target.dtype)

    def as_bytes(self, array: Array) -> Array:
        shape, strides = (*array.shape, array.itemsize), (*array.strides, 1)
        raw: Array = cupy.ndarray(shape, np.uint8, array.data, strides)
        return raw

    def order(self, ids: Array) -> Array:
        positions: Array = cupy.argsort(ids, kind="stable")
        return positions

    def positions(self, mask: Array) -> Array:
        there: Array = cupy.flatnonzero(mask)
        return there

    def is_here(self, array: Array) -> bool:
        return isinstance(array, np.ndarray)


def _blocks(device: int) -> int:
    multiprocessors: int = cupy.cuda.Device(device).attributes["MultiProcessorCount"]
    return multiprocessors * BLOCKS_PER_MULTIPROCESSOR


KERNELS = Launches(Gpu())
