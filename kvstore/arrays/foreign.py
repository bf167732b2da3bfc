"""Arrays of GPUs as callers have them, of whatever library: how they are known, seen as CuPy's, and on which streams.

What CuPy has nothing to do with is not imported here: where there is no GPU nothing is, and of PyTorch only what the
caller has imported is looked at.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

import engine
from kvstore.arrays import gpu, host
from kvstore.arrays.host import Array
from kvstore.errors import DtypeError

_CUDA, _MANAGED = 2, 13  # types of devices in DLPack


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
    if reason := gpu.missing():
        raise DtypeError(f"{what}: expected an array in host memory, got one of a GPU, {reason}")
    cupy = gpu.module()
    try:
        array: Array = (
            host.from_dlpack(value, cupy.from_dlpack) if hasattr(value, "__dlpack__") else cupy.asarray(value)
        )
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        raise DtypeError(f"{what}: expected an array of a GPU that DLPack can share; {error}") from error
    return array


def found_on(value: Any) -> int:
    """The device that an array of any library lies on, for which :func:`is_there` holds."""
    if _library(value) == "cupy":
        return gpu.device_of(value)
    if hasattr(value, "__dlpack_device__"):
        return int(value.__dlpack_device__()[1])
    return gpu.device_of(gpu.module().asarray(value))


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
    cuda, here = gpu.devices(), gpu.current_device()
    current = {device: cuda.current(device) for device in tensors}
    own = {device: _external(torch().cuda.current_stream(device).cuda_stream, device) for device in tensors}
    apart = [device for device in tensors if own[device].stream.ptr != current[device].stream.ptr]
    for device in apart if others else ():
        cuda.wait(own[device], cuda.record(current[device]))
    try:
        with ExitStack() as inside:
            for device in apart:
                inside.enter_context(cuda.on(own[device]))
            inside.enter_context(gpu.at(here))
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
    cuda = gpu.module().cuda
    with cuda.Device(device):
        if address == 0:
            stream = cuda.Stream.null
        elif hasattr(cuda.Stream, "from_external"):
            stream = cuda.Stream.from_external(_Foreign(address))
        else:  # CuPy 13
            stream = cuda.ExternalStream(address, device)
    return engine.CudaStream(device, stream)
