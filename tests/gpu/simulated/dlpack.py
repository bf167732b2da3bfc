"""DLPack capsules (https://dmlc.github.io/dlpack, dlpack.h), made and taken with ctypes."""

from __future__ import annotations

import ctypes
import sys
import threading
from typing import Any

import ml_dtypes
import numpy as np

CPU, CUDA, CUDA_HOST = 1, 2, 3
_CODES = {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6}
_KINDS = {0: "i", 1: "u", 2: "f", 5: "c"}


class DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Managed(ctypes.Structure):
    _fields_ = (("tensor", DLTensor), ("context", ctypes.c_void_p), ("deleter", DELETER))


class Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", DELETER),
        ("flags", ctypes.c_uint64),
        ("tensor", DLTensor),
    )


READ_ONLY = 1
_python = ctypes.pythonapi
_python.PyCapsule_New.restype = ctypes.py_object
_python.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_python.PyCapsule_IsValid.restype = ctypes.c_int
_python.PyCapsule_IsValid.argtypes = [ctypes.py_object, ctypes.c_char_p]
_get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", _python))
_set_name = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_SetName", _python))

NAMES = {b"dltensor": (Managed, b"used_dltensor"), b"dltensor_versioned": (Versioned, b"used_dltensor_versioned")}
_alive: dict[int, tuple[Any, ...]] = {}  # what capsules stand for, by the address of their structs
_made: list[Any] = []  # the capsules
_lock = threading.RLock()


@DELETER
def _delete(address: int) -> None:
    _alive.pop(address, None)


def sweep() -> None:
    """Let go of what stands behind capsules that went without having been taken.

    They have no destructor for that: in Python none can be written that may be called while an error is being raised.
    """
    gone = []  # what they held is let go of without the lock
    with _lock:
        for at in reversed(range(len(_made))):
            if sys.getrefcount(_made[at]) <= 2:
                capsule = _made.pop(at)
                for name in NAMES:
                    if _python.PyCapsule_IsValid(capsule, name):
                        gone.append(_alive.pop(_get_pointer(capsule, name), None))


def export(owner: Any, address: int, device: tuple[int, int], versioned: bool, read_only: bool = False) -> Any:
    """A capsule for an array with NumPy's attributes, which it keeps alive."""
    dtype, dimensions = owner.dtype, len(owner.shape)
    numbers = ctypes.c_int64 * dimensions
    shape, strides = numbers(*owner.shape), numbers(*[step // dtype.itemsize for step in owner.strides])
    struct = Versioned() if versioned else Managed()
    tensor = struct.tensor
    tensor.data, (tensor.device_type, tensor.device_id), tensor.ndim = address, device, dimensions
    if dtype == ml_dtypes.bfloat16:
        tensor.code = 4
    elif dtype.kind in _CODES:
        tensor.code = _CODES[dtype.kind]
    else:
        raise BufferError("dtype is not supported for dlpack export")
    tensor.bits, tensor.lanes = 8 * dtype.itemsize, 1
    tensor.shape = ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64))
    tensor.strides = ctypes.cast(strides, ctypes.POINTER(ctypes.c_int64))
    struct.deleter = _delete
    if versioned:
        struct.major, struct.minor, struct.flags = 1, 0, READ_ONLY * read_only
    at = ctypes.addressof(struct)
    sweep()
    _alive[at] = owner, struct, shape, strides
    capsule = _python.PyCapsule_New(at, _static(b"dltensor_versioned" if versioned else b"dltensor"), None)
    with _lock:
        _made.append(capsule)
    return capsule


_STATIC = {name: ctypes.create_string_buffer(name) for pair in NAMES.items() for name in (pair[0], pair[1][1])}


def _static(name: bytes) -> Any:
    """Capsules keep no copy of their name."""
    return ctypes.cast(_STATIC[name], ctypes.c_char_p)


class Tensor:
    """What a capsule stands for, taken from it; it goes back to its maker with this object."""

    def __init__(self, capsule: Any) -> None:
        for name, (kind, used) in NAMES.items():
            if _python.PyCapsule_IsValid(capsule, name):
                self._struct = kind.from_address(_get_pointer(capsule, name))
                _set_name(capsule, _static(used))
                break
        else:
            raise ValueError("A DLPack tensor object cannot be consumed multiple times")
        tensor = self._struct.tensor
        self.address = (tensor.data or 0) + tensor.byte_offset
        self.device = tensor.device_type, tensor.device_id
        self.shape = tuple(tensor.shape[: tensor.ndim])
        self.strides = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else None
        self.dtype = _dtype(tensor.code, tensor.bits)
        self.nbytes = int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def __del__(self) -> None:
        struct = getattr(self, "_struct", None)
        if struct is not None and struct.deleter:
            struct.deleter(ctypes.addressof(struct))


def _dtype(code: int, bits: int) -> np.dtype[Any]:
    if (code, bits) == (4, 16):
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(np.bool_) if code == 6 else np.dtype(f"{_KINDS[code]}{bits // 8}")
