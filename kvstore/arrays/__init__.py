"""The one seam to array libraries: what counts as an array, in which memory it lies, and how it is seen.

Everything behind this package works on NumPy arrays and, where there are GPUs, on CuPy arrays, which share the
caller's memory; both are called :data:`Array`. Arrays of other libraries come in through DLPack without a copy.
``host.py`` knows the memory of the host, ``gpu.py`` that of GPUs; ``copies.py`` copies between them, and ``foreign.py``
knows other libraries' arrays of GPUs. Only ``gpu.py`` imports CuPy, and only when the first array of a GPU comes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from kvstore.arrays import copies, foreign, gpu, host
from kvstore.arrays.host import Array
from kvstore.errors import DtypeError, ReadOnlyError

__all__ = [
    "HOST",
    "Array",
    "beside",
    "callers",
    "copy_to",
    "dtype_named",
    "empty",
    "empty_like",
    "flat",
    "found_in",
    "host_copy",
    "is_array",
    "is_writable",
    "may_write",
    "memory_of",
    "read_only",
    "to_host",
    "view",
    "writable_view",
]

HOST = -1  # the memory of the host; that of a GPU is called by its number

_NATIVE = frozenset(host.DTYPES.values())
_NOBODY = nullcontext()


def dtype_named(name: str) -> np.dtype[Any]:
    """The dtype of that name. Raises DtypeError for another than those that a store holds."""
    try:
        return host.DTYPES[name]
    except KeyError:
        raise DtypeError(f"a dtype: expected one of {', '.join(host.DTYPES)}; got {name!r}") from None


# --- the caller's arrays ------------------------------------------------------------------------


def is_array(value: object) -> bool:
    """Is this one array (and not, say, a list of them)?"""
    return isinstance(value, np.ndarray | np.generic) or hasattr(value, "__dlpack__") or foreign.is_there(value)


def view(value: object, what: str) -> Array:
    """``value`` as an array that shares its memory; ``what`` names it in errors.

    What has been enqueued for an array of a GPU comes before what will be, on CuPy's current stream.

    Raises:
        DtypeError: not an array, of a dtype that a store cannot hold, or of a GPU that is out of reach.
    """
    if isinstance(value, np.ma.MaskedArray):
        raise DtypeError(f"{what}: expected an array, got a masked one, whose mask no store holds")
    if isinstance(value, np.ndarray):
        array: Array = value
    elif isinstance(value, np.generic):
        array = np.asarray(value)
    elif foreign.is_there(value):
        array = foreign.imported(value, what)
    elif hasattr(value, "__dlpack__"):
        array = host.imported(value, what)
    else:
        raise DtypeError(f"{what}: expected an array, got {type(value).__name__}")
    if array.dtype not in _NATIVE:
        raise DtypeError(f"{what}: expected dtype one of {', '.join(host.DTYPES)}; got {array.dtype}")
    return array


def writable_view(value: object, what: str) -> Array:
    """Like :func:`view`, for an array that will be written.

    Raises:
        ReadOnlyError: it cannot be written.
    """
    array = view(value, what)
    if not may_write(array) or isinstance(value, np.generic) or foreign.is_immutable(value):
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


def callers(*values: Any) -> AbstractContextManager[Any]:
    """Within the block, CuPy's current streams are those on which the caller of the store works with these arrays.

    They are anyway, but for tensors of PyTorch: it has current streams of its own.
    """
    return _NOBODY if foreign.torch() is None else foreign.callers(values)


# --- memory -------------------------------------------------------------------------------------


def may_write(array: Array) -> bool:
    """Can the array be written? CuPy has none that cannot."""
    writable: bool = getattr(array.flags, "writeable", True)
    return writable


def read_only(array: Array) -> Array:
    """The array, which is now read-only, if it is of the host: CuPy has none that is."""
    if memory_of(array) == HOST:
        array.flags.writeable = False
    return array


def memory_of(array: Array) -> int:
    """Where the array lies: :data:`HOST`, or the number of a GPU."""
    return HOST if type(array) is np.ndarray or isinstance(array, np.ndarray) else gpu.device_of(array)


def beside(array: Array) -> AbstractContextManager[Any]:
    """Within the block, the device that the array lies on, if it does, is CuPy's current one."""
    return _NOBODY if memory_of(array) == HOST else gpu.at(gpu.device_of(array))


def empty(shape: int | tuple[int, ...], dtype: np.dtype[Any], memory: int = HOST) -> Array:
    """A new array, of arbitrary content."""
    return np.empty(shape, dtype) if memory == HOST else gpu.empty(shape, dtype, memory)


def found_in(value: object) -> int:
    """:func:`memory_of` an array of any library."""
    return foreign.found_on(value) if foreign.is_there(value) else HOST


def flat(array: Array) -> Array:
    """Its elements in C order, in one dimension and the same memory; a copy only if they do not lie so."""
    return np.ascontiguousarray(array).reshape(-1) if memory_of(array) == HOST else copies.flat(array)


def empty_like(array: Array) -> Array:
    """A new array of the same shape and dtype in the same memory, in C order, of arbitrary content."""
    return empty(array.shape, array.dtype, memory_of(array))


def to_host(array: Array) -> Array:
    """The array in host memory: itself if it lies there, else a copy, which is complete when this returns."""
    return array if memory_of(array) == HOST else gpu.to_host(array)


def host_copy(array: Array) -> Array:
    """A copy in host memory, complete when this returns."""
    return array.copy() if memory_of(array) == HOST else gpu.to_host(array)


def copy_to(source: Array, target: Array) -> None:
    """Copy between any memories, both of one shape and dtype; enqueued on the current stream if a GPU's is concerned.

    Host memory that is not pinned is read before this returns; one that is written is complete by then.
    """
    if memory_of(source) == memory_of(target) == HOST:
        np.copyto(target, source)
    else:
        copies.copy(source, target)
