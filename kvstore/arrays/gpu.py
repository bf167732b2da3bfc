"""GPUs and their memory: the one file of this seam that imports CuPy, with the first array of a GPU.

The *current* device and stream are CuPy's, of the calling thread; within an op of the engine they are the op's.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
import sys
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

import engine
from engine.groups import owner_of
from kvstore.arrays.host import Array

log = logging.getLogger(__name__)

_REGISTER_PORTABLE, _REGISTER_READ_ONLY = 1, 8  # flags of cudaHostRegister
_SHARED_KINDS = ("Memory", "PooledMemory")  # of CuPy's, that come from cudaMalloc


def missing() -> str | None:
    """Why there are no GPUs here. None: there are. The first call imports CuPy, where it is installed."""
    try:
        import cupy
    except ImportError as error:
        return f"CuPy cannot be imported: {error}"
    try:
        cupy.cuda.runtime.getDeviceCount()  # an error where there is none
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CuPy {cupy.__version__} finds no GPU: {error}"
    return None


def described() -> str:
    """Which GPUs there are here, or why there are none: for people. Imports CuPy, where it is installed."""
    if reason := missing():
        return f"none: {reason}"
    runtime = module().cuda.runtime
    names = [runtime.getDeviceProperties(device)["name"].decode() for device in range(runtime.getDeviceCount())]
    return ", ".join(f"{device}: {name}" for device, name in enumerate(names))


@functools.cache
def unlikely() -> str | None:
    """Why there can be no GPUs here, as far as can be seen without importing CuPy. None: there may be some."""
    if "cupy" in sys.modules:
        return missing()
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no CUDA driver"
    return None


@functools.cache
def module() -> Any:
    """CuPy."""
    import cupy

    return cupy


@functools.cache
def devices() -> engine.Cuda:
    """The GPUs of this process, for :meth:`engine.Engine.use`."""
    return engine.Cuda(module())


# --- memory -------------------------------------------------------------------------------------


def device_of(array: Any) -> int:
    """The number of the device that an array of CuPy lies on."""
    number: int = array.device.id
    return number


def at(device: int) -> Any:
    """Within the block, the device is the current one."""
    return module().cuda.Device(device)


def current_device() -> int:
    """The number of the device that the thread works on now."""
    number: int = module().cuda.runtime.getDevice()
    return number


def current_stream() -> int:
    """The address of the stream that the thread works on now."""
    address: int = module().cuda.get_current_stream().ptr
    return address


def mark() -> Callable[[], bool]:
    """Puts a mark into the current stream; calling it tells whether what comes before has been done, or raises."""
    cuda = devices()
    return functools.partial(cuda.done, cuda.record(cuda.current(current_device())))


def nccl() -> Any | None:
    """NVIDIA's library for collective operations, if CuPy can load it."""
    try:
        from cupy.cuda import nccl
    except ImportError:
        return None
    return nccl if nccl.available else None


def milliseconds(work: Callable[[], None]) -> float:
    """How long the device takes for what this enqueues in the current stream. Waits for it."""
    cuda = module().cuda
    begin, end = cuda.Event(), cuda.Event()
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(cuda.get_elapsed_time(begin, end))


def empty(shape: int | tuple[int, ...], dtype: np.dtype[Any], device: int) -> Array:
    """A new array on the device. Its memory is given back in the order of the stream that is current there now."""
    with at(device):
        array: Array = module().empty(shape, dtype)
    return array


def address(array: Any) -> int:
    """Of its first element."""
    at: int = array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr
    return at


def to_host(array: Any) -> Array:
    """A copy in host memory. Waits for the device's current stream."""
    with at(device_of(array)):
        copied: Array = module().asnumpy(array)
    return copied


def pinned(nbytes: int) -> Array:
    """Host memory that devices copy from and to while the host goes on: bytes, from CuPy's pool.

    It goes back to the pool with the last reference, at once: hold it for as long as a device uses it. Where there is
    none to be had, which is logged once, it is ordinary memory.
    """
    if nbytes == 0:
        return np.empty(0, np.uint8)
    try:
        return np.frombuffer(module().cuda.alloc_pinned_memory(nbytes), np.uint8, nbytes)
    except module().cuda.runtime.CUDARuntimeError as error:
        _say_once(f"no pinned memory is to be had: {error}; copies are slower")
        return np.empty(nbytes, np.uint8)


@functools.cache
def _say_once(what: str) -> None:
    log.warning("%s", what)


def pin(array: Array, *, read_only: bool = False) -> bool:
    """Make memory of the host such as :func:`pinned` gives, for as long as it lives. False: it cannot be.

    Args:
        read_only: this process cannot write it.
    """
    if array.nbytes == 0:
        return False
    runtime = module().cuda.runtime
    flags = _REGISTER_PORTABLE | (_REGISTER_READ_ONLY if read_only else 0)
    address = array.ctypes.data
    try:
        runtime.hostRegister(address, array.nbytes, flags)
    except runtime.CUDARuntimeError:
        return False
    weakref.finalize(owner_of(array), _unpin, runtime, address).atexit = False
    return True


def _unpin(runtime: Any, address: int) -> None:
    try:
        runtime.hostUnregister(address)
    except runtime.CUDARuntimeError:  # the device failed, or has been reset
        return


@functools.cache
def peers(device: int) -> frozenset[int]:
    """The other devices whose memory kernels of this device can use; from the first call on they may."""
    cuda = module().cuda
    found = set()
    for other in range(cuda.runtime.getDeviceCount()):
        if other != device and cuda.runtime.deviceCanAccessPeer(device, other):
            with at(device):
                try:
                    cuda.runtime.deviceEnablePeerAccess(other)
                except cuda.runtime.CUDARuntimeError as error:
                    if "AlreadyEnabled" not in str(error):
                        continue
            found.add(other)
    return frozenset(found)


def is_reachable(array: Any, device: int) -> bool:
    """Can kernels of this device use the array as it lies?

    In memory of a peer it has to be in one run, and come from cudaMalloc; of other memory nobody knows.
    """
    own = device_of(array)
    if own == device:
        return True
    shared: bool = array.flags.c_contiguous and type(array.data.mem).__name__ in _SHARED_KINDS
    return shared and own in peers(device)
