"""The kernels as they are called: by Numba's machine code where it is there and fits, else by plain NumPy.

It fits arrays that lie in one run of memory (of any alignment, of any number of dimensions), of the usual
types. What the kernels do is written in :mod:`kvstore.kernels.reference`. Arrays that are not NumPy's lie in other
memory, and are computed with by :mod:`kvstore.kernels.cuda`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy import ndarray

from kvstore.kernels import nontemporal, reference
from kvstore.kernels.dispatch import Forms, by_memory
from kvstore.kernels.loader import LOADER
from kvstore.kernels.reference import HALVES, Array, Change, States

TINY = 512  # elements: to find fewer takes longer than NumPy takes to add them, if they have dimensions
PAIR = 16 << 10  # the same for two arrays, which NumPy adds in one pass as well; fewer than TINY need not be found

NONTEMPORAL_BYTES = 1 << 20  # smaller arrays stay in the caches for whoever reads them; as in ``jitted.py``

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
    (_FLOAT32, half): _SEEN[half] for half in HALVES
}
_HALVES_SEEN = frozenset(_SEEN[half] for half in HALVES)
_NOTHING = {dtype: np.empty(0, dtype) for dtype in (_FLOAT32, _FLOAT64)}
_INT64, _UINT32, _INT8 = np.dtype(np.int64), np.dtype(np.uint32), np.dtype(np.int8)
_FIRST_WRONG, _GATHER = ("first_wrong", _INT64, _INT64), ("gather", _BYTE, _BYTE)
_ORDER = ("order", _INT64, _INT64)
_DEDUPLICATE = {dtype: ("deduplicate", dtype, dtype) for dtype in _NOTHING}
_SCATTER_ADD = {dtype: ("scatter_add", dtype, dtype) for dtype in _NOTHING}
_ONE_PUSH = np.empty(0, _INT64)
_empty = np.empty


def prepare() -> None:
    """Load what a server or a store of several devices begins with, in the background."""
    LOADER["merge", _FLOAT32, _FLOAT32]


def wait(timeout: float | None = None) -> bool:
    """Until every kernel that was called or prepared is there, if it can be had. False: not in ``timeout`` seconds."""
    return LOADER.wait(timeout)


# --- sums ---------------------------------------------------------------------------------------


@by_memory(1)
def merge(arrays: Sequence[Array], out: Array) -> None:
    """See :func:`kvstore.kernels.reference.merge`."""
    seen, count = _SEEN.get(out.dtype), len(arrays)
    if count == 2 and out.size < TINY and seen is not None and _add(arrays[0], arrays[1], out, seen):
        return
    worth_it = PAIR if count == 2 else TINY if out.ndim != 1 else 0
    tiny = out.size < worth_it and seen not in _HALVES_SEEN
    if seen is not None and count > 1 and not tiny and out.flags.c_contiguous:
        kernel = LOADER["merge", seen, seen]
        if kernel is not None and (pushes := _pushes(arrays, seen)) is not None:
            kernel(_flat(out, seen), *pushes)
            return
    reference.merge(arrays, out)


def _add(one: Array, other: Array, out: Array, seen: np.dtype[Any]) -> bool:
    """Add two small arrays. False: they do not fit."""
    if out.ndim != 1 or not out.flags.c_contiguous:
        return False
    for array in (one, other):
        if array.shape != out.shape or array.dtype != out.dtype or not array.flags.c_contiguous:
            return False
    kernel = LOADER["add", seen, seen]
    if kernel is None:
        return False
    try:
        kernel(_flat(out, seen), _flat(one, seen), _flat(other, seen))
    except TypeError:  # an ``out`` that may not be written
        return False
    return True


@by_memory(1)
def merge_nontemporal(arrays: Sequence[Array], out: Array) -> None:
    """See :func:`kvstore.kernels.reference.merge_nontemporal`."""
    seen, first = _SEEN.get(out.dtype), arrays[0]
    if out.flags.c_contiguous and out.nbytes >= NONTEMPORAL_BYTES and first is not out:
        if len(arrays) == 1:
            if first.flags.c_contiguous:
                nontemporal.copy(first.reshape(-1), out.reshape(-1))
                return
        elif seen is not None:
            kernel = LOADER["allreduce", seen, seen]
            if kernel is not None and (pushes := _pushes(arrays, seen)) is not None:
                kernel(np.array([out.ctypes.data]), *pushes)
                return
    merge(arrays, out)


@by_memory(1)
def allreduce(arrays: Sequence[Array], out: Array, others: Sequence[Array]) -> None:
    """See :func:`kvstore.kernels.reference.allreduce`."""
    if not others or out.size < TINY:
        merge(arrays, out)
        for other in others:  # of the same shape, so that a broadcast's look at it would be a tenth more
            np.copyto(other, out)
        return
    seen, outs = _SEEN.get(out.dtype), [out, *others]
    if seen is not None and all(each.flags.c_contiguous for each in outs):
        kernel = LOADER["allreduce", seen, seen]
        if kernel is not None and not any(_overlap_in_part(array, other) for array in arrays for other in others):
            pushes, targets = _pushes(arrays, seen), _pushes(outs, seen)
            if pushes is not None and targets is not None:
                kernel(targets[1], *pushes)
                return
    reference.allreduce(arrays, out, others)


@by_memory(1)
def merge_many(groups: Sequence[Sequence[Array]], out: Array) -> None:
    """See :func:`kvstore.kernels.reference.merge_many`."""
    seen, count = _SEEN.get(out.dtype), len(groups[0])
    if count == 1:
        reference.concatenate([arrays[0] for arrays in groups], out)
        return
    if seen is not None and out.flags.c_contiguous:
        kernel = LOADER["merge_many", seen, seen]
        if kernel is not None and (found := _located([a for arrays in groups for a in arrays], seen)) is not None:
            flats, table = found
            kernel(_flat(out, seen), table, np.array([flat.size for flat in flats[::count]]))
            return
    reference.merge_many(groups, out)


def _overlap_in_part(one: Array, other: Array) -> bool:
    return one is not other and np.may_share_memory(one, other) and one.ctypes.data != other.ctypes.data


@by_memory(0)
def norm(arrays: Sequence[Array]) -> float:
    """See :func:`kvstore.kernels.reference.norm`. Of CuPy's arrays: one that stays on the device."""
    seen = _SEEN.get(arrays[0].dtype)
    if seen is not None and arrays[0].dtype.kind in "fV":
        kernel = LOADER["norm", seen, seen]
        if kernel is not None and (pushes := _pushes(arrays, seen)) is not None:
            return float(kernel(*pushes))
    return reference.norm(arrays)


# --- how arrays are handed over -----------------------------------------------------------------
#
# Numba looks at every array that it is given, and raises TypeError before it does anything if one is not of the
# dtype or does not lie in one run of memory. So small arrays of one dimension are not looked at here: that takes
# longer than to compute with them. The error takes 60 us, which is why others are.


def _pushes(arrays: Sequence[Array], seen: np.dtype[Any]) -> tuple[Array, Array] | None:
    """The first and the addresses of all (none if there is one); None: they do not fit."""
    if len(arrays) == 1:
        return (_flat(arrays[0], seen), _ONE_PUSH) if arrays[0].flags.c_contiguous else None
    found = _located(arrays, seen)
    return None if found is None else (found[0][0], found[1])


def _located(arrays: Sequence[Array], seen: np.dtype[Any]) -> tuple[Sequence[Array], Array] | None:
    """All of them in one dimension, and their addresses; None: they do not fit."""
    locate = LOADER["locate", seen, seen]
    if locate is None:
        return None
    if arrays[0].ndim == 1 and arrays[0].dtype is seen:
        try:
            return arrays, _addresses(arrays, locate)
        except TypeError:
            return _located_flat(arrays, seen, locate)
    return _located_flat(arrays, seen, locate)


def _located_flat(
    arrays: Sequence[Array], seen: np.dtype[Any], locate: Callable[..., Any]
) -> tuple[Sequence[Array], Array] | None:
    flats = [_flat(array, seen) for array in arrays if array.flags.c_contiguous]
    return (flats, _addresses(flats, locate)) if len(flats) == len(arrays) else None


def _addresses(flats: Sequence[Array], locate: Callable[..., Any]) -> Array:
    count = len(flats)
    table: Array = _empty(count, _INT64)
    if count == 4:
        locate(table, 0, *flats)
        return table
    if count == 2:
        locate(table, 0, *flats, *flats)
        return table
    for at in range(0, count - 3, 4):
        locate(table, at, *flats[at : at + 4])
    if left := count % 4:
        locate(table, count - left, *flats[count - left :], *[flats[0]] * (4 - left))
    return table


def _flat(array: Array, seen: np.dtype[Any]) -> Array:
    """The array, which lies in one run of memory, in one dimension and seen as ``seen``."""
    flat = array if array.ndim == 1 else array.ravel()
    return flat if flat.dtype is seen else flat.view(seen)


# --- optimizers ---------------------------------------------------------------------------------


def _present(states: States, nothing: Array) -> list[Array]:
    """The states, with ``nothing`` in place of those that are left out."""
    return [nothing if state is None else state for state in states]


def _optimizer(plain: Callable[..., None]) -> Callable[..., None]:
    name = plain.__name__
    known = {
        (dtype, pushed): ((name, dtype, seen), ("locate", seen, seen), _NOTHING[dtype], seen == pushed)
        for (dtype, pushed), seen in _PUSHED.items()
    }

    def kernel(change: Change, states: States, *numbers: float) -> None:
        value, target, pushes, scale, clip = change
        if type(target) is not ndarray and not isinstance(target, ndarray):  # which is a file's memory, say
            forms[type(target)](change, states, *numbers)
            return
        found = known.get((target.dtype, pushes[0].dtype))
        if found is None or (code := LOADER[found[0]]) is None:
            plain(change, states, *numbers)
            return
        _, to_locate, nothing, as_they_are = found
        own: Sequence[Array | None] = states
        for state in states:
            if state is None:
                own = _present(states, nothing)
                break
        locate = None if len(pushes) == 1 else LOADER[to_locate]
        if target.ndim != 1 or not as_they_are or (locate is None and len(pushes) > 1):
            flat(code, change, states, nothing, numbers)
            return
        try:
            table = _ONE_PUSH if locate is None else _addresses(pushes, locate)
            code(target, value, pushes[0], table, scale, clip, *own, *numbers)
        except TypeError:
            flat(code, change, states, nothing, numbers)

    def flat(
        code: Callable[..., Any], change: Change, states: States, nothing: Array, numbers: tuple[float, ...]
    ) -> None:
        value, target, pushes, scale, clip = change
        own = _present(states, nothing)
        taken = _pushes(pushes, _SEEN[pushes[0].dtype])
        flats = [array.ravel() for array in (target, value, *own) if array.flags.c_contiguous]
        if taken is not None and len(flats) == 2 + len(own):
            code(*flats[:2], *taken, scale, clip, *flats[2:], *numbers)
        else:
            plain(change, states, *numbers)

    kernel.__name__ = kernel.__qualname__ = name
    forms = Forms(kernel)
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


@by_memory(1)
def cast(source: Array, target: Array) -> None:
    """See :func:`kvstore.kernels.reference.cast`."""
    if source.flags.c_contiguous and target.flags.c_contiguous:
        name, half, wide = "widen", source.dtype, target.dtype
        if half == _FLOAT32:
            name, half, wide = "narrow", wide, half
        if wide == _FLOAT32 and half in HALVES:
            kernel = LOADER[name, _SEEN[half], _SEEN[half]]
            if kernel is not None:
                kernel(_flat(source, _SEEN[source.dtype]), _flat(target, _SEEN[target.dtype]))
                return
    reference.cast(source, target)


@by_memory(0)
def broadcast(source: Array, outs: Sequence[Array]) -> None:
    """See :func:`kvstore.kernels.reference.broadcast`."""
    if len(outs) > 1 and source.size >= TINY and source.flags.c_contiguous:
        kernel = LOADER["broadcast", _BYTE, _BYTE]
        if kernel is not None and (found := _pushes(outs, _BYTE)) is not None:
            kernel(_flat(source, _BYTE), found[1])
            return
    reference.broadcast(source, outs)


@by_memory(1)
def concatenate(arrays: Sequence[Array], out: Array) -> None:
    """See :func:`kvstore.kernels.reference.concatenate`: it takes NumPy less to copy a small array than to find it."""
    reference.concatenate(arrays, out)


@by_memory(0)
def split(source: Array, outs: Sequence[Array]) -> None:
    """See :func:`kvstore.kernels.reference.split`."""
    seen = _SEEN.get(source.dtype)
    if seen is not None and source.flags.c_contiguous:
        kernel = LOADER["split", seen, seen]
        if kernel is not None and (found := _located(outs, seen)) is not None:
            kernel(_flat(source, seen), found[1], np.array([flat.size for flat in found[0]]))
            return
    reference.split(source, outs)


@by_memory(2)
def gather(source: Array, row_ids: Array, out: Array) -> None:
    """See :func:`kvstore.kernels.reference.gather`."""
    kernel = LOADER[_GATHER]
    if kernel is not None and _rows_fit(source, row_ids, out):
        kernel(_rows(source).view(_BYTE), row_ids, _rows(out).view(_BYTE))
    else:
        reference.gather(source, row_ids, out)


@by_memory(0)
def scatter_add(target: Array, row_ids: Array, rows: Array) -> None:
    """See :func:`kvstore.kernels.reference.scatter_add`."""
    kernel = LOADER[asked] if (asked := _SCATTER_ADD.get(target.dtype)) is not None else None
    if kernel is not None and _rows_fit(target, row_ids, rows):
        kernel(_rows(target), row_ids, _rows(rows))
    else:
        reference.scatter_add(target, row_ids, rows)


@by_memory(1)
def deduplicate(row_ids: Array, rows: Array) -> tuple[Array, Array]:
    """See :func:`kvstore.kernels.reference.deduplicate`."""
    asked = _DEDUPLICATE.get(rows.dtype)
    kernel, order = (None, None) if asked is None else (LOADER[asked], LOADER[_ORDER])
    fit = rows.flags.c_contiguous and row_ids.flags.c_contiguous and row_ids.dtype is _INT64 and rows.size
    if kernel is None or order is None or not fit:
        return reference.deduplicate(row_ids, rows)
    positions = np.empty(row_ids.size, _INT64)
    count = order(row_ids, positions)
    ids, sums = np.empty(count, _INT64), np.empty((count, *rows.shape[1:]), rows.dtype)
    kernel(row_ids, positions, _rows(rows), ids, _rows(sums))
    return ids, sums


def _rows_fit(table: Array, row_ids: Array, rows: Array) -> bool:
    """Can a kernel do it? Then all the ids are rows. Raises IndexError if one is not."""
    if row_ids.dtype is not _INT64 or rows.dtype is not table.dtype or (check := LOADER[_FIRST_WRONG]) is None:
        return False
    if not (table.flags.c_contiguous and rows.flags.c_contiguous and row_ids.flags.c_contiguous):
        return False
    if rows.shape != (*row_ids.shape, *table.shape[1:]) or not (table.size and rows.size):
        return False
    if check(row_ids, len(table)) >= 0:
        reference.check_rows(table, row_ids)
    return True


def _rows(array: Array) -> Array:
    """As a matrix."""
    return array if array.ndim == 2 else array.reshape(len(array), -1)


# --- compression --------------------------------------------------------------------------------


@by_memory(3)
def quantize_2bit(gradient: Array, residual: Array, threshold: float, out: Array) -> None:
    """See :func:`kvstore.kernels.reference.quantize_2bit`."""
    kernel = _quantizer("quantize_2bit", gradient, residual, out) if threshold > 0 else None
    if kernel is not None:
        kernel(_flat_gradient(gradient), _flat(residual, _FLOAT32), out.view(_UINT32), threshold)
    else:
        reference.quantize_2bit(gradient, residual, threshold, out)


@by_memory(2)
def dequantize_2bit(codes: Array, threshold: float, out: Array) -> None:
    """See :func:`kvstore.kernels.reference.dequantize_2bit`."""
    kernel = _dequantizer("dequantize_2bit", codes, out)
    if kernel is not None:
        kernel(codes.view(_UINT32), _flat(out, _FLOAT32), threshold)
    else:
        reference.dequantize_2bit(codes, threshold, out)


@by_memory(2)
def quantize_1bit(gradient: Array, residual: Array, out: Array) -> None:
    """See :func:`kvstore.kernels.reference.quantize_1bit`."""
    _quantize(reference.quantize_1bit, _UINT32, gradient, residual, out)


@by_memory(1)
def dequantize_1bit(codes: Array, out: Array) -> None:
    """See :func:`kvstore.kernels.reference.dequantize_1bit`."""
    _dequantize(reference.dequantize_1bit, _UINT32, codes, out)


@by_memory(2)
def quantize_int8(gradient: Array, residual: Array, out: Array) -> None:
    """See :func:`kvstore.kernels.reference.quantize_int8`."""
    _quantize(reference.quantize_int8, _INT8, gradient, residual, out)


@by_memory(1)
def dequantize_int8(codes: Array, out: Array) -> None:
    """See :func:`kvstore.kernels.reference.dequantize_int8`."""
    _dequantize(reference.dequantize_int8, _INT8, codes, out)


def _quantize(
    plain: Callable[[Array, Array, Array], None], seen: np.dtype[Any], gradient: Array, residual: Array, out: Array
) -> None:
    """To codes that are seen as ``seen``, with a scale for each block among them."""
    kernel = _quantizer(plain.__name__, gradient, residual, out)
    if kernel is not None:
        kernel(_flat_gradient(gradient), _flat(residual, _FLOAT32), out.view(seen), out.view(_FLOAT32))
    else:
        plain(gradient, residual, out)


def _dequantize(plain: Callable[[Array, Array], None], seen: np.dtype[Any], codes: Array, out: Array) -> None:
    """The inverse of :func:`_quantize`."""
    kernel = _dequantizer(plain.__name__, codes, out)
    if kernel is not None:
        kernel(codes.view(seen), codes.view(_FLOAT32), _flat(out, _FLOAT32))
    else:
        plain(codes, out)


def _quantizer(name: str, gradient: Array, residual: Array, out: Array) -> Callable[..., Any] | None:
    """The kernel, if it fits."""
    seen = _PUSHED.get((residual.dtype, gradient.dtype))
    if seen is None or residual.dtype is not _FLOAT32 or (kernel := LOADER[name, _FLOAT32, seen]) is None:
        return None
    fits = gradient.flags.c_contiguous and residual.flags.c_contiguous and out.flags.c_contiguous
    return kernel if fits else None


def _dequantizer(name: str, codes: Array, out: Array) -> Callable[..., Any] | None:
    """The kernel, if it fits."""
    if out.dtype is not _FLOAT32 or (kernel := LOADER[name, _FLOAT32, _FLOAT32]) is None:
        return None
    return kernel if codes.flags.c_contiguous and out.flags.c_contiguous else None


def _flat_gradient(gradient: Array) -> Array:
    return _flat(gradient, _SEEN[gradient.dtype])
