"""The kernels as they are called: by Numba's machine code where it is there and fits, else by plain NumPy.

It fits arrays that lie in one run of memory (of any alignment, of any number of dimensions), of the usual
types. What the kernels do is written in :mod:`kvstore.kernels.reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from kvstore.kernels import reference
from kvstore.kernels.loader import LOADER, Kernel
from kvstore.kernels.reference import Array, Change, States

BLOCK = 4096  # elements of the kernels' scratch

_FLOAT32, _FLOAT64, _BYTE = np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.uint8)

_ADDED: dict[np.dtype[Any], tuple[str, np.dtype[Any] | None]] = {  # the kernel's type, and as what it sees the memory
    _FLOAT32: ("float32", None),
    _FLOAT64: ("float64", None),
    np.dtype(np.float16): ("float16", np.dtype(np.uint16)),
    np.dtype(ml_dtypes.bfloat16): ("bfloat16", np.dtype(np.int16)),
    np.dtype(np.complex64): ("float32", _FLOAT32),
    np.dtype(np.complex128): ("float64", _FLOAT64),
    np.dtype(np.int8): ("uint8", _BYTE),  # what wraps does so with and without a sign
    _BYTE: ("uint8", None),
    np.dtype(np.int32): ("uint32", np.dtype(np.uint32)),
    np.dtype(np.uint32): ("uint32", None),
    np.dtype(np.int64): ("uint64", np.dtype(np.uint64)),
    np.dtype(np.uint64): ("uint64", None),
}
_UPDATED = {_FLOAT32: "float32", _FLOAT64: "float64"}
_NOTHING = {dtype: np.empty(0, dtype) for dtype in _UPDATED}
_ONE_PUSH = np.empty(0, np.int64)


def prepare() -> None:
    """Load what a server or a store of several devices begins with, in the background."""
    for name in ("locate", "merge"):
        LOADER.get(name, "float32", "float32")


def wait(timeout: float | None = None) -> bool:
    """Until every kernel that was called or prepared is there, if it can be had. False: not in ``timeout`` seconds."""
    return LOADER.wait(timeout)


# --- sums ---------------------------------------------------------------------------------------


def merge(arrays: Sequence[Array], out: Array) -> None:
    """See :func:`kvstore.kernels.reference.merge`."""
    known = _ADDED.get(out.dtype)
    if known is not None and len(arrays) > 1 and out.flags.c_contiguous:
        kind, seen = known
        kernel, pushes = LOADER.get("merge", kind, kind), _pushes(arrays, kind, seen)
        if kernel is not None and pushes is not None:
            flat = _seen(out, seen)
            kernel(flat, *pushes, _scratch(flat))
            return
    reference.merge(arrays, out)


def norm(arrays: Sequence[Array]) -> float:
    """See :func:`kvstore.kernels.reference.norm`."""
    dtype = arrays[0].dtype
    if dtype in _UPDATED or dtype in reference.HALVES:
        kind, seen = _ADDED[dtype]
        kernel, pushes = LOADER.get("norm", kind, kind), _pushes(arrays, kind, seen)
        if kernel is not None and pushes is not None:
            return float(kernel(*pushes, _scratch(pushes[0])))
    return reference.norm(arrays)


def _pushes(arrays: Sequence[Array], kind: str, seen: np.dtype[Any] | None) -> tuple[Array, Array] | None:
    """The first and the addresses of all (none if there is one); None: they do not fit."""
    for array in arrays:
        if not array.flags.c_contiguous:
            return None
    if len(arrays) == 1:
        return _seen(arrays[0], seen), _ONE_PUSH
    locate = LOADER.get("locate", kind, kind)
    if locate is None:
        return None
    flat = [_seen(array, seen) for array in arrays]
    table = np.empty(len(flat) + 3, np.int64)
    for at in range(0, len(flat), 4):
        four = flat[at : at + 4]
        locate(table, at, *four, *[flat[0]] * (4 - len(four)))
    return flat[0], table[: len(flat)]


def _seen(array: Array, dtype: np.dtype[Any] | None) -> Array:
    """The array in one dimension, its memory seen as ``dtype``."""
    flat = array if array.ndim == 1 else array.reshape(-1)
    return flat if dtype is None else flat.view(dtype)


def _scratch(flat: Array) -> Array:
    """A block of what the elements are added up in."""
    return np.empty(min(BLOCK, flat.size), _FLOAT32 if flat.itemsize == 2 else flat.dtype)


# --- optimizers ---------------------------------------------------------------------------------


def _optimizer(plain: Callable[..., None]) -> Callable[..., None]:
    name = plain.__name__

    def kernel(change: Change, states: States, *numbers: float) -> None:
        loaded = _loaded(name, change, states)
        if loaded is None:
            plain(change, states, *numbers)
            return
        kernel, (first, table) = loaded
        target = _seen(change.target, None)
        value = target if change.value is change.target else _seen(change.value, None)
        nothing = _NOTHING[target.dtype]
        flats = [nothing if state is None else _seen(state, None) for state in states]
        kernel(target, value, first, table, change.scale, change.clip, _scratch(target), *flats, *numbers)

    kernel.__name__ = kernel.__qualname__ = name
    kernel.__doc__ = f"See :func:`kvstore.kernels.reference.{name}`."
    return kernel


def _loaded(name: str, change: Change, states: States) -> tuple[Kernel, tuple[Array, Array]] | None:
    """The kernel, and the pushes as it takes them; None: this is for plain NumPy."""
    dtype, pushed = change.target.dtype, change.pushes[0].dtype
    kind = _UPDATED.get(dtype)
    if kind is None or (pushed != dtype and pushed not in reference.HALVES):
        return None
    push_kind, seen = _ADDED[pushed]
    if not (change.target.flags.c_contiguous and change.value.flags.c_contiguous):
        return None
    for state in states:
        if state is not None and not state.flags.c_contiguous:
            return None
    kernel, pushes = LOADER.get(name, kind, push_kind), _pushes(change.pushes, push_kind, seen)
    return None if kernel is None or pushes is None else (kernel, pushes)


accumulate = _optimizer(reference.accumulate)
sgd = _optimizer(reference.sgd)
adam = _optimizer(reference.adam)
adagrad = _optimizer(reference.adagrad)
rmsprop = _optimizer(reference.rmsprop)
adadelta = _optimizer(reference.adadelta)
ftrl = _optimizer(reference.ftrl)
lars = _optimizer(reference.lars)
lamb = _optimizer(reference.lamb)


# --- other --------------------------------------------------------------------------------------


def cast(source: Array, target: Array) -> None:
    """See :func:`kvstore.kernels.reference.cast`."""
    half = source if target.dtype == _FLOAT32 else target if source.dtype == _FLOAT32 else None
    if half is not None and half.dtype in reference.HALVES and source.flags.c_contiguous and target.flags.c_contiguous:
        kind = half.dtype.name
        kernel = LOADER.get("widen" if half is source else "narrow", kind, kind)
        if kernel is not None:
            kernel(_seen(source, _ADDED[source.dtype][1]), _seen(target, _ADDED[target.dtype][1]))
            return
    reference.cast(source, target)


def gather(source: Array, row_ids: Array, out: Array) -> None:
    """See :func:`kvstore.kernels.reference.gather`."""
    kernel, fit = LOADER.get("gather", "uint8", "uint8"), _rows_fit(source, out, row_ids)
    if kernel is not None and fit:
        kernel(_rows(source, _BYTE), row_ids, _rows(out, _BYTE))
    else:
        reference.gather(source, row_ids, out)


def scatter_add(target: Array, row_ids: Array, rows: Array) -> None:
    """See :func:`kvstore.kernels.reference.scatter_add`."""
    kind = _UPDATED.get(target.dtype)
    kernel = None if kind is None else LOADER.get("scatter_add", kind, kind)
    fit = rows.dtype == target.dtype and _rows_fit(target, rows, row_ids)
    if kernel is not None and fit:
        kernel(_rows(target, None), row_ids, _rows(rows, None))
    else:
        reference.scatter_add(target, row_ids, rows)


def _rows_fit(table: Array, rows: Array, row_ids: Array) -> bool:
    """Can a kernel do it? Then all the ids are rows. Raises IndexError if one is not."""
    check = LOADER.get("first_wrong", "uint64", "uint64")
    if check is None or not (table.flags.c_contiguous and rows.flags.c_contiguous and row_ids.flags.c_contiguous):
        return False
    if row_ids.dtype != np.int64 or not (table.size and row_ids.size) or rows.shape != (row_ids.size, *table.shape[1:]):
        return False
    if check(row_ids, len(table)) >= 0:
        reference.check_rows(table, row_ids)
    return True


def _rows(array: Array, dtype: np.dtype[Any] | None) -> Array:
    """As a matrix, whose memory is seen as ``dtype``."""
    matrix = array.reshape(len(array), -1)
    return matrix if dtype is None else matrix.view(dtype)
