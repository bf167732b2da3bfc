"""The one seam to array libraries: what counts as an array, and how its memory is seen.

Everything behind this file works on NumPy arrays that share the caller's memory. CPU arrays of other
libraries come in through DLPack (or the buffer they expose to NumPy) without a copy.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from kvstore.errors import DtypeError, ReadOnlyError

Array = npt.NDArray[Any]

_DTYPES = {
    np.dtype(kind).name: np.dtype(kind)
    for kind in (
        *(bool, "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"),
        *("f2", "f4", "f8", "c8", "c16", ml_dtypes.bfloat16),
    )
}
_NATIVE = frozenset(_DTYPES.values())


def dtype_named(name: str) -> np.dtype[Any]:
    """The dtype that :func:`dtype_name` named. Raises DtypeError for another name."""
    try:
        return _DTYPES[name]
    except KeyError:
        raise DtypeError(f"a dtype: expected one of {', '.join(_DTYPES)}; got {name!r}") from None


def is_array(value: object) -> bool:
    """Is this one array (and not, say, a list of them)?"""
    return isinstance(value, np.ndarray | np.generic) or hasattr(value, "__dlpack__")


def view(value: object, what: str) -> Array:
    """``value`` as a NumPy array that shares its memory; ``what`` names it in errors.

    Raises:
        DtypeError: not an array, or of a dtype that a store cannot hold.
    """
    if isinstance(value, np.ma.MaskedArray):
        raise DtypeError(f"{what}: expected an array, got a masked one, whose mask no store holds")
    if isinstance(value, np.ndarray):
        array: Array = value
    elif isinstance(value, np.generic):
        array = np.asarray(value)
    elif hasattr(value, "__dlpack__"):
        array = _import(value, what)
    else:
        raise DtypeError(f"{what}: expected an array, got {type(value).__name__}")
    if array.dtype not in _NATIVE:
        raise DtypeError(f"{what}: expected dtype one of {', '.join(_DTYPES)}; got {array.dtype}")
    return array


def writable_view(value: object, what: str) -> Array:
    """Like :func:`view`, for an array that will be written.

    Raises:
        ReadOnlyError: it cannot be written.
    """
    array = view(value, what)
    if not array.flags.writeable or isinstance(value, np.generic):
        raise ReadOnlyError(f"{what}: expected an array that can be written, got a read-only {type(value).__name__}")
    if array.size and any(step == 0 and length > 1 for step, length in zip(array.strides, array.shape, strict=True)):
        raise ReadOnlyError(f"{what}: expected an array that can be written, got one that repeats its elements")
    return array


def is_writable(value: object) -> bool:
    """Could ``value`` be an ``out``?"""
    try:
        writable_view(value, "")
    except (ReadOnlyError, DtypeError):
        return False
    return True


def _import(value: Any, what: str) -> Array:
    try:
        array: Array = _from_dlpack(value)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        raise DtypeError(f"{what}: expected an array in host memory that DLPack can share; {error}") from error
    if not array.flags.writeable and hasattr(value, "__array__"):  # e.g. a torch tensor: NumPy's import is read-only
        with contextlib.suppress(TypeError, ValueError, RuntimeError):  # as of what NumPy has no dtype for
            other = np.asarray(value)
            if other.flags.writeable and other.size and np.shares_memory(other, array):
                return other
    return array


def _from_dlpack(value: Any) -> Array:
    try:
        return np.from_dlpack(value)
    except (BufferError, RuntimeError):  # NumPy 2 and 1
        bits = _Bits(value)
        array = np.from_dlpack(bits)
        if not bits.are_bfloat16:
            raise
        return array.view(ml_dtypes.bfloat16)


_TENSOR_AT = {b"dltensor": 0, b"dltensor_versioned": 32}  # in what a capsule of that name points to
_TYPE_AT = 20  # in a tensor: behind the pointer to the data, the device and the number of dimensions


class _Bits:
    """A bfloat16 tensor as NumPy, which knows none, can import it: as unsigned integers of 16 bits.

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
