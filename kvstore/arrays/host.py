"""Arrays in host memory: NumPy's, and those of other libraries that come in through DLPack without a copy."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from kvstore.errors import DtypeError

Array = npt.NDArray[Any]

DTYPES = {
    np.dtype(kind).name: np.dtype(kind)
    for kind in (
        *(bool, "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"),
        *("f2", "f4", "f8", "c8", "c16", ml_dtypes.bfloat16),
    )
}


def imported(value: Any, what: str) -> Array:
    """Another library's array as NumPy's, on the same memory. Raises DtypeError."""
    try:
        array: Array = from_dlpack(value, np.from_dlpack)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        raise DtypeError(f"{what}: expected an array in host memory that DLPack can share; {error}") from error
    if not array.flags.writeable and hasattr(value, "__array__"):  # e.g. a torch tensor: NumPy's import is read-only
        with contextlib.suppress(TypeError, ValueError, RuntimeError):  # as of what NumPy has no dtype for
            other = np.asarray(value)
            if other.flags.writeable and other.size and np.shares_memory(other, array):
                return other
    return array


def from_dlpack(value: Any, importer: Callable[[Any], Any]) -> Any:
    """What ``importer`` makes of the value, which it may see as bits if it knows no bfloat16."""
    try:
        return importer(value)
    except (BufferError, RuntimeError):  # NumPy 2 and 1
        bits = _Bits(value)
        array = importer(bits)
        if not bits.are_bfloat16:
            raise
        return array.view(ml_dtypes.bfloat16)


_TENSOR_AT = {b"dltensor": 0, b"dltensor_versioned": 32}  # in what a capsule of that name points to
_TYPE_AT = 20  # in a tensor: behind the pointer to the data, the device and the number of dimensions


class _Bits:
    """A bfloat16 tensor as a library that knows none can import it: as unsigned integers of 16 bits.

    The type stands in the DLTensor of the capsule, which is this consumer's own (https://dmlc.github.io/dlpack,
    dlpack.h): a code of 8 bits, here 4 for bfloat and 1 for unsigned integers, then their number of bits.
    """

    def __init__(self, value: Any) -> None:
        self._value = value
        self.are_bfloat16 = False

    def __dlpack_device__(self) -> Any:
        return self._value.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        capsule = self._value.__dlpack__(**options)
        name = ctypes.pythonapi.PyCapsule_GetName(ctypes.py_object(capsule))
        address = ctypes.pythonapi.PyCapsule_GetPointer(ctypes.py_object(capsule), name)
        kind = (ctypes.c_uint8 * 2).from_address(address + _TENSOR_AT[name] + _TYPE_AT)
        if tuple(kind) == (4, 16):
            self.are_bfloat16 = True
            kind[0] = 1
        return capsule


ctypes.pythonapi.PyCapsule_GetName.restype = ctypes.c_char_p
ctypes.pythonapi.PyCapsule_GetName.argtypes = [ctypes.py_object]
ctypes.pythonapi.PyCapsule_GetPointer.restype = ctypes.c_void_p
ctypes.pythonapi.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
