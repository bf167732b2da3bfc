"""Copies between any memories of which one is a GPU's, and work on several GPUs side by side.

Everything is put in the queue of a stream; nothing waits for a GPU, unless the array in host memory is not pinned.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np

import engine
from kvstore.arrays.gpu import address, at, current_device, current_stream, device_of, devices, module
from kvstore.arrays.host import Array

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def copy(source: Array, target: Array) -> None:
    """Copy between any memories of which one is a GPU's at least; enqueued, in the order of the current stream."""
    if source.size == 0:
        return
    if source.flags.c_contiguous and target.flags.c_contiguous:
        _copy_bytes(source, target)
    elif isinstance(source, np.ndarray) and not source.flags.c_contiguous:
        copy(np.ascontiguousarray(source), target)
    elif isinstance(target, np.ndarray) and not target.flags.c_contiguous:
        room = np.empty(target.shape, target.dtype)  # not pinned: what is copied there is complete at once
        copy(source, room)
        np.copyto(target, room)
    else:
        _copy_strided(_bits(source), _bits(target))


def flat(array: Any) -> Array:
    """Its elements in C order, in one dimension; a copy only if they do not lie so."""
    if not array.flags.c_contiguous:
        with at(device_of(array)):
            array = module().ascontiguousarray(_bits(array)).view(array.dtype)
    return array.reshape(-1)  # type: ignore[no-any-return]


def _copy_strided(source: Any, target: Any) -> None:
    """Where one of the two has its elements apart, on a device: that device gathers or scatters them."""
    apart = target if source.flags.c_contiguous else source
    with Fork() as fork, fork.on(device_of(apart)):
        other = source if apart is target else target
        if not isinstance(other, np.ndarray) and device_of(other) == device_of(apart):
            target[...] = source
        elif apart is source:
            copy(module().ascontiguousarray(source), target)
        else:
            room = module().empty(target.shape, target.dtype)
            copy(source, room)
            target[...] = room


def _copy_bytes(source: Any, target: Any) -> None:
    """From one run of memory to another."""
    runtime = module().cuda.runtime
    to, at, nbytes = address(target), address(source), source.nbytes
    if isinstance(source, np.ndarray) or isinstance(target, np.ndarray):
        down = isinstance(target, np.ndarray)
        with Fork() as fork, fork.on(device_of(source if down else target)):
            kind = runtime.memcpyDeviceToHost if down else runtime.memcpyHostToDevice
            runtime.memcpyAsync(to, at, nbytes, kind, current_stream())
        return
    here, there = device_of(source), device_of(target)
    if here == there:
        runtime.memcpyAsync(to, at, nbytes, runtime.memcpyDeviceToDevice, current_stream())
    else:
        runtime.memcpyPeerAsync(to, there, at, here, nbytes, current_stream())


def _bits(array: Any) -> Any:
    """The array, as integers if it is of a type that not every release of CuPy copies."""
    return array.view(np.uint16) if array.dtype == _BFLOAT16 else array


@functools.cache
def _branch(device: int) -> engine.CudaStream:
    """The stream of all forks on the device: the memory of a pool belongs to a stream for good."""
    return devices().stream(device)


class Fork:
    """Work on several devices side by side: after what the current stream holds, and before what follows on it.

    Memory that was made before the block may be used in all of it; what is made within :meth:`on`, only there, and
    after :meth:`join` in the rest of the block.
    """

    def __enter__(self) -> Fork:
        self._device = current_device()
        self._stream = devices().current(self._device)
        self._begin: Any = None
        self._used: list[engine.CudaStream] = []  # since then
        self._lent: list[engine.CudaStream] = []  # those of the last join
        return self

    @contextmanager
    def on(self, device: int) -> Iterator[None]:
        """Within the block the thread works on this device."""
        if device == self._device:
            yield
            return
        stream = _branch(device)
        if stream not in self._used:
            self._branch_off(stream)
            self._used.append(stream)
        with devices().on(stream):
            yield

    def _branch_off(self, stream: engine.CudaStream) -> None:
        cuda = devices()
        if self._begin is None:
            self._begin = cuda.record(self._stream)
        cuda.wait(stream, self._begin)

    def join(self) -> None:
        """What follows on the stream at hand comes after all that has been enqueued within :meth:`on`."""
        cuda = devices()
        for stream in self._used:
            cuda.wait(self._stream, cuda.record(stream))
        self._lent, self._used, self._begin = self._used, [], None

    def meet(self, device: int, other: int) -> None:
        """What follows on ``device`` comes after what has been enqueued on the other; both have been used."""
        cuda = devices()
        cuda.wait(self._on(device), cuda.record(self._on(other)))

    def _on(self, device: int) -> engine.CudaStream:
        return self._stream if device == self._device else _branch(device)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        cuda = devices()
        lent = self._lent
        self.join()
        if lent:  # their memory has been used on the stream at hand, and will be given anew on theirs
            over = cuda.record(self._stream)
            for stream in lent:
                cuda.wait(stream, over)
