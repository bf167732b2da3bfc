"""Arrays in the memory of GPUs: the one file of this seam that imports CuPy, with the first such array.

Everything is put in the queue of a stream, and nothing waits for a GPU but :func:`to_host`, and :func:`copy` where the
array in host memory is not pinned. The *current* device and stream are CuPy's, of the calling thread; within an op of
the engine they are the op's.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import ml_dtypes
import numpy as np

import engine
from engine.groups import owner_of
from kvstore.arrays import host
from kvstore.arrays.host import Array
from kvstore.errors import DtypeError

log = logging.getLogger(__name__)

_CUDA, _MANAGED = 2, 13  # types of devices in DLPack
_REGISTER_PORTABLE, _REGISTER_READ_ONLY = 1, 8  # flags of cudaHostRegister
_SHARED_KINDS = ("Memory", "PooledMemory")  # of CuPy's, that come from cudaMalloc
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


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


# --- the caller's arrays ------------------------------------------------------------------------


def is_there(value: object) -> bool:
    """Is this an array in the memory of a GPU, of whatever library?"""
    if _library(value) == "cupy":
        return hasattr(value, "__dlpack__")
    if hasattr(value, "__dlpack_device__"):
        try:
            return value.__dlpack_device__()[0] in (_CUDA, _MANAGED)
        except (TypeError, ValueError, RuntimeError, BufferError):
            return False
    return hasattr(value, "__cuda_array_interface__")


def imported(value: Any, what: str) -> Array:
    """The array as CuPy's, on the same memory. Raises DtypeError."""
    if _library(value) == "cupy":
        return value  # type: ignore[no-any-return]
    if reason := missing():
        raise DtypeError(f"{what}: expected an array in host memory, got one of a GPU, {reason}")
    cupy = module()
    try:
        array: Array = (
            host.from_dlpack(value, cupy.from_dlpack) if hasattr(value, "__dlpack__") else cupy.asarray(value)
        )
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        raise DtypeError(f"{what}: expected an array of a GPU that DLPack can share; {error}") from error
    return array


def is_immutable(value: object) -> bool:
    """Is this an array of a GPU that its library never changes?"""
    library = _library(value)
    if isinstance(value, np.ndarray) or library in ("cupy", "torch"):
        return False
    if library in ("jax", "jaxlib"):
        return True
    interface = getattr(value, "__cuda_array_interface__", None)
    return interface is not None and bool(interface["data"][1])


def _library(value: object) -> str:
    return type(value).__module__.partition(".")[0]


# --- the caller's streams -----------------------------------------------------------------------


def torch() -> Any:
    """PyTorch, which does not work on CuPy's current streams. None: it is not in use here, not with GPUs."""
    found = sys.modules.get("torch")
    return found if found is not None and found.cuda.is_initialized() else None


@contextmanager
def callers(values: Any) -> Iterator[None]:
    """Within the block PyTorch's current streams are CuPy's, for the devices of the tensors among ``values``.

    If there are arrays of other libraries there too, what CuPy's current streams hold comes before all, and what they
    will hold after all.
    """
    tensors, others = _numbers(values)
    if not tensors:
        yield
        return
    cuda, here = devices(), current_device()
    current = {device: cuda.current(device) for device in tensors}
    own = {device: _external(torch().cuda.current_stream(device).cuda_stream, device) for device in tensors}
    apart = [device for device in tensors if own[device].stream.ptr != current[device].stream.ptr]
    for device in apart if others else ():
        cuda.wait(own[device], cuda.record(current[device]))
    try:
        with ExitStack() as inside:
            for device in apart:
                inside.enter_context(cuda.on(own[device]))
            inside.enter_context(at(here))
            yield
    finally:
        for device in apart if others else ():
            cuda.wait(current[device], cuda.record(own[device]))


def _numbers(values: Any) -> tuple[set[int], bool]:
    """The devices of the tensors of PyTorch among these, and whether there are arrays of GPUs of other libraries."""
    tensors: set[int] = set()
    others = False
    left = [values]
    while left:
        value = left.pop()
        if isinstance(value, list | tuple):
            left.extend(value)
        elif _library(value) == "torch":
            if is_there(value):
                tensors.add(value.__dlpack_device__()[1])
        else:
            others = others or is_there(value)
    return tensors, others


class _Foreign:
    """A stream of another library, as CuPy asks for one."""

    def __init__(self, address: int) -> None:
        self._address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._address


def _external(address: int, device: int) -> engine.CudaStream:
    cuda = module().cuda
    with cuda.Device(device):
        if address == 0:
            stream = cuda.Stream.null
        elif hasattr(cuda.Stream, "from_external"):
            stream = cuda.Stream.from_external(_Foreign(address))
        else:  # CuPy 13
            stream = cuda.ExternalStream(address, device)
    return engine.CudaStream(device, stream)


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


def flat(array: Any) -> Array:
    """Its elements in C order, in one dimension; a copy only if they do not lie so."""
    if not array.flags.c_contiguous:
        with at(device_of(array)):
            array = module().ascontiguousarray(_bits(array)).view(array.dtype)
    return array.reshape(-1)  # type: ignore[no-any-return]


def found_on(value: Any) -> int:
    """The device that an array of any library lies on, for which :func:`is_there` holds."""
    if _library(value) == "cupy":
        return device_of(value)
    if hasattr(value, "__dlpack_device__"):
        return int(value.__dlpack_device__()[1])
    return device_of(module().asarray(value))


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
            with cuda.Device(device):
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


# --- copies -------------------------------------------------------------------------------------


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


def address(array: Any) -> int:
    """Of its first element."""
    at: int = array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr
    return at


def _bits(array: Any) -> Any:
    """The array, as integers if it is of a type that not every release of CuPy copies."""
    return array.view(np.uint16) if array.dtype == _BFLOAT16 else array


def mark() -> Callable[[], bool]:
    """Puts a mark into the current stream; calling it tells whether what comes before has been done, or raises."""
    cuda = devices()
    return functools.partial(cuda.done, cuda.record(cuda.current(current_device())))


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
