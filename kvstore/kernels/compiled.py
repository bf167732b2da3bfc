"""The kernels as they are called: by Numba's machine code where it is there and fits, else by plain NumPy.

It fits arrays that lie in one run of memory (of any alignment, of any number of dimensions), of the usual
types. What the kernels do is written in :mod:`kvstore.kernels.reference`. Arrays that are not NumPy's lie in other
memory, and are computed with by :mod:`kvstore.kernels.cuda`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy import ndarray

from kvstore.kernels import reference
from kvstore.kernels.loader import LOADER
from kvstore.kernels.reference import Array, Change, States

TINY = 512  # elements: to find the addresses of fewer takes longer than NumPy takes to add them

_FLOAT32, _FLOAT64, _BYTE = np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.uint8)
_UNSIGNED = {size: np.dtype(f"u{size}") for size in (1, 4, 8)}

_SEEN: dict[np.dtype[Any], np.dtype[Any]] = {  # as what kernels see the memory that they add up
    _FLOAT32: _FLOAT32,
    _FLOAT64: _FLOAT64,
    np.dtype(np.float16): np.dtype(np.uint16),
    np.dtype(ml_dtypes.bfloat16): np.dtype(np.int16),
    np.dtype(np.complex64): _FLOAT32,
    np.dtype(np.complex128): _FLOAT64,
    **{np.dtype(f"{sign}{size}"): _UNSIGNED[size] for sign in "iu" for size in (1, 4, 8)},  # what wraps needs no sign
}
_PUSHED = {(value, value): value for value in (_FLOAT32, _FLOAT64)} | {  # by the types of value and pushes, the same
    (_FLOAT32, half): _SEEN[half] for half in reference.HALVES
}
_NOTHING = {dtype: np.empty(0, dtype) for dtype in (_FLOAT32, _FLOAT64)}
_ONE_PUSH = np.empty(0, np.int64)


def prepare() -> None:
    """Load what a server or a store of several devices begins with, in the background."""
    LOADER.get("merge", _FLOAT32, _FLOAT32)


def wait(timeout: float | None = None) -> bool:
    """Until every kernel that was called or prepared is there, if it can be had. False: not in ``timeout`` seconds."""
    return LOADER.wait(timeout)


def _elsewhere(array: Any) -> Any | None:
    """The form for an array whose type is not NumPy's own. None: it is in host memory all the same."""
    if isinstance(array, ndarray | np.generic):
        return None
    kind = type(array)
    if kind.__module__.partition(".")[0] != "cupy":
        raise TypeError(f"kernels: expected arrays of NumPy or CuPy, got {kind.__module__}.{kind.__qualname__}")
    from kvstore.kernels.cuda import gpu

    return gpu.KERNELS


# --- sums ---------------------------------------------------------------------------------------


def merge(arrays: Sequence[Array], out: Array) -> None:
    """See :func:`kvstore.kernels.reference.merge`."""
    if type(out) is not ndarray and (form := _elsewhere(out)) is not None:
        form.merge(arrays, out)
        return
    seen = _SEEN.get(out.dtype)
    tiny = out.size < TINY and out.dtype not in reference.HALVES
    if seen is not None and len(arrays) > 1 and not tiny and out.flags.c_contiguous:
        kernel = LOADER.get("merge", seen, seen)
        if kernel is not None and (pushes := _pushes(arrays, seen)) is not None:
            kernel(_flat(out, seen), *pushes)
            return
    reference.merge(arrays, out)


def allreduce(arrays: Sequence[Array], out: Array, others: Sequence[Array]) -> None:
    """See :func:`kvstore.kernels.reference.allreduce`."""
    if type(out) is not ndarray and (form := _elsewhere(out)) is not None:
        form.allreduce(arrays, out, others)
        return
    if not others:
        merge(arrays, out)
        return
    seen, outs = _SEEN.get(out.dtype), [out, *others]
    if seen is not None and out.size >= TINY and all(each.flags.c_contiguous for each in outs):
        kernel = LOADER.get("allreduce", seen, seen)
        if kernel is not None and not any(_overlap_in_part(array, other) for array in arrays for other in others):
            pushes, targets = _pushes(arrays, seen), _pushes(outs, seen)
            if pushes is not None and targets is not None:
                kernel(targets[1], *pushes)
                return
    reference.allreduce(arrays, out, others)


def merge_many(groups: Sequence[Sequence[Array]], out: Array) -> None:
    """See :func:`kvstore.kernels.reference.merge_many`."""
    if type(out) is not ndarray and (form := _elsewhere(out)) is not None:
        form.merge_many(groups, out)
        return
    seen, count = _SEEN.get(out.dtype), len(groups[0])
    if count == 1:
        reference.concatenate([arrays[0] for arrays in groups], out)
        return
    if seen is not None and out.flags.c_contiguous:
        kernel = LOADER.get("merge_many", seen, seen)
        if kernel is not None and (found := _located([a for arrays in groups for a in arrays], seen)) is not None:
            flats, table = found
            kernel(_flat(out, seen), table, np.array([flat.size for flat in flats[::count]]))
            return
    reference.merge_many(groups, out)


def _overlap_in_part(one: Array, other: Array) -> bool:
    return one is not other and np.may_share_memory(one, other) and one.ctypes.data != other.ctypes.data


def norm(arrays: Sequence[Array]) -> float:
    """See :func:`kvstore.kernels.reference.norm`. Of CuPy's arrays: one that stays on the device."""
    if type(arrays[0]) is not ndarray and (form := _elsewhere(arrays[0])) is not None:
        there: float = form.norm(arrays)
        return there
    seen = _SEEN.get(arrays[0].dtype)
    if seen is not None and arrays[0].dtype.kind in "fV":
        kernel = LOADER.get("norm", seen, seen)
        if kernel is not None and (pushes := _pushes(arrays, seen)) is not None:
            return float(kernel(*pushes))
    return reference.norm(arrays)


def _pushes(arrays: Sequence[Array], seen: np.dtype[Any]) -> tuple[Array, Array] | None:
    """The first and the addresses of all (none if there is one); None: they do not fit."""
    if len(arrays) == 1:
        return (_flat(arrays[0], seen), _ONE_PUSH) if arrays[0].flags.c_contiguous else None
    found = _located(arrays, seen)
    return None if found is None else (found[0][0], found[1])


def _located(arrays: Sequence[Array], seen: np.dtype[Any]) -> tuple[Sequence[Array], Array] | None:
    """All of them in one dimension, and their addresses; None: they do not fit."""
    locate = LOADER.get("locate", seen, seen)
    if locate is None:
        return None
    if arrays[0].ndim == 1 and arrays[0].dtype is seen:
        with contextlib.suppress(TypeError):  # Numba's, which looks at each: not all lie so
            return arrays, _addresses(arrays, locate)
    flats = [_flat(array, seen) for array in arrays if array.flags.c_contiguous]
    return (flats, _addresses(flats, locate)) if len(flats) == len(arrays) else None


def _addresses(flats: Sequence[Array], locate: Callable[..., Any]) -> Array:
    count = len(flats)
    table = np.empty(count, np.int64)
    for at in range(0, count - 3, 4):
        locate(table, at, *flats[at : at + 4])
    if left := count % 4:
        locate(table, count - left, *flats[count - left :], *[flats[0]] * (4 - left))
    return table


def _flat(array: Array, seen: np.dtype[Any]) -> Array:
    """The array in one dimension, its memory seen as ``seen``."""
    flat = array if array.ndim == 1 else array.reshape(-1)
    return flat if flat.dtype is seen else flat.view(seen)


# --- optimizers ---------------------------------------------------------------------------------


def _optimizer(plain: Callable[..., None]) -> Callable[..., None]:
    name = plain.__name__

    def kernel(change: Change, states: States, *numbers: float) -> None:
        value, target, pushes, scale, clip = change
        if type(target) is not ndarray and (form := _elsewhere(target)) is not None:
            getattr(form, name)(change, states, *numbers)
            return
        dtype = target.dtype
        seen = _PUSHED.get((dtype, pushes[0].dtype))
        loaded = None if seen is None else LOADER.get(name, dtype, seen)
        if seen is not None and loaded is not None and target.flags.c_contiguous and value.flags.c_contiguous:
            taken = _pushes(pushes, seen)
            flats = [
                _NOTHING[dtype] if s is None else _flat(s, dtype) for s in states if s is None or s.flags.c_contiguous
            ]
            if taken is not None and len(flats) == len(states):
                loaded(_flat(target, dtype), _flat(value, dtype), *taken, scale, clip, *flats, *numbers)
                return
        plain(change, states, *numbers)

    kernel.__name__ = kernel.__qualname__ = name
    kernel.__doc__ = f"See :func:`kvstore.kernels.reference.{name}`."
    return kernel


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
    if type(target) is not ndarray and (form := _elsewhere(target)) is not None:
        form.cast(source, target)
        return
    if source.flags.c_contiguous and target.flags.c_contiguous:
        name, half, wide = "widen", source.dtype, target.dtype
        if half == _FLOAT32:
            name, half, wide = "narrow", wide, half
        if wide == _FLOAT32 and half in reference.HALVES:
            kernel = LOADER.get(name, _SEEN[half], _SEEN[half])
            if kernel is not None:
                kernel(_flat(source, _SEEN[source.dtype]), _flat(target, _SEEN[target.dtype]))
                return
    reference.cast(source, target)


def broadcast(source: Array, outs: Sequence[Array]) -> None:
    """See :func:`kvstore.kernels.reference.broadcast`."""
    if type(source) is not ndarray and (form := _elsewhere(source)) is not None:
        form.broadcast(source, outs)
        return
    if len(outs) > 1 and source.size >= TINY and source.flags.c_contiguous:
        kernel = LOADER.get("broadcast", _BYTE, _BYTE)
        if kernel is not None and (found := _pushes(outs, _BYTE)) is not None:
            kernel(_flat(source, _BYTE), found[1])
            return
    reference.broadcast(source, outs)


def concatenate(arrays: Sequence[Array], out: Array) -> None:
    """See :func:`kvstore.kernels.reference.concatenate`: it takes NumPy less to copy a small array than to find it."""
    if type(out) is not ndarray and (form := _elsewhere(out)) is not None:
        form.concatenate(arrays, out)
        return
    reference.concatenate(arrays, out)


def split(source: Array, outs: Sequence[Array]) -> None:
    """See :func:`kvstore.kernels.reference.split`."""
    if type(source) is not ndarray and (form := _elsewhere(source)) is not None:
        form.split(source, outs)
        return
    seen = _SEEN.get(source.dtype)
    if seen is not None and source.flags.c_contiguous:
        kernel = LOADER.get("split", seen, seen)
        if kernel is not None and (found := _located(outs, seen)) is not None:
            kernel(_flat(source, seen), found[1], np.array([flat.size for flat in found[0]]))
            return
    reference.split(source, outs)


def gather(source: Array, row_ids: Array, out: Array) -> None:
    """See :func:`kvstore.kernels.reference.gather`."""
    if type(out) is not ndarray and (form := _elsewhere(out)) is not None:
        form.gather(source, row_ids, out)
        return
    kernel, fit = LOADER.get("gather", _BYTE, _BYTE), _rows_fit(source, out, row_ids)
    if kernel is not None and fit:
        kernel(_rows(source, _BYTE), row_ids, _rows(out, _BYTE))
    else:
        reference.gather(source, row_ids, out)


def scatter_add(target: Array, row_ids: Array, rows: Array) -> None:
    """See :func:`kvstore.kernels.reference.scatter_add`."""
    if type(target) is not ndarray and (form := _elsewhere(target)) is not None:
        form.scatter_add(target, row_ids, rows)
        return
    dtype = target.dtype
    if dtype in _NOTHING:
        kernel, fit = LOADER.get("scatter_add", dtype, dtype), _rows_fit(target, rows, row_ids)
        if kernel is not None and fit:
            kernel(_rows(target, dtype), row_ids, _rows(rows, dtype))
            return
    reference.scatter_add(target, row_ids, rows)


def _rows_fit(table: Array, rows: Array, row_ids: Array) -> bool:
    """Can a kernel do it? Then all the ids are rows. Raises IndexError if one is not."""
    check = LOADER.get("first_wrong", row_ids.dtype, row_ids.dtype) if row_ids.dtype == np.int64 else None
    if check is None or not (table.flags.c_contiguous and rows.flags.c_contiguous and row_ids.flags.c_contiguous):
        return False
    if not (table.size and row_ids.size) or rows.dtype != table.dtype:
        return False
    if rows.shape != (row_ids.size, *table.shape[1:]):
        return False
    if check(row_ids, len(table)) >= 0:
        reference.check_rows(table, row_ids)
    return True


def _rows(array: Array, seen: np.dtype[Any]) -> Array:
    """As a matrix, whose memory is seen as ``seen``."""
    return array.reshape(len(array), -1).view(seen)
