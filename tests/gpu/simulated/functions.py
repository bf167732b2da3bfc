"""The functions of the module ``cupy``: each is one kernel, whose result NumPy computes when its turn comes."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.gpu.simulated import cuda, runtime
from tests.gpu.simulated.array import (
    SCALARS,
    arranged,
    array,
    asarray,
    elementwise_copy,
    from_dlpack,
    from_interface,
    launch,
    ndarray,
    split,
)

MODULE: dict[str, Any] = {}  # by name


def _export(function: Callable[..., Any]) -> Callable[..., Any]:
    MODULE[function.__name__] = function
    return function


def _operand(value: Any) -> Any:
    """An array of a device, or a number. Raises TypeError: as CuPy does for arrays of the host."""
    if isinstance(value, (ndarray, *SCALARS)):
        return value
    if hasattr(value, "__cuda_array_interface__"):
        return from_interface(value)
    raise TypeError(f"Unsupported type {type(value)}")


def _quiet(function: Callable[..., Any]) -> Any:
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function()


class ufunc:
    """One of NumPy's, element by element."""

    def __init__(self, plain: np.ufunc) -> None:
        self._plain, self.__name__ = plain, plain.__name__
        self._result = functools.cache(self._result_of)

    def __repr__(self) -> str:
        return f"<ufunc 'cupy_{self.__name__}'>"

    def _result_of(self, dtype: Any, *kinds: Any) -> np.dtype[Any]:
        options = {} if dtype is None else {"dtype": dtype}
        given = [np.ones(1, kind) if isinstance(kind, np.dtype) else kind(1) for kind in kinds]
        result: np.dtype[Any] = np.asarray(_quiet(lambda: self._plain(*given, **options))).dtype
        return result

    def __call__(self, *arguments: Any, out: Any = None, dtype: Any = None, casting: str = "same_kind") -> ndarray:
        inputs = [_operand(value) for value in arguments[: self._plain.nin]]
        if len(arguments) > self._plain.nin:
            out = arguments[self._plain.nin]
        if isinstance(out, tuple):
            (out,) = out
        if out is not None and not isinstance(out, ndarray):
            raise TypeError("return arrays must be of ArrayType")
        kinds = [one.dtype if isinstance(one, ndarray | np.generic) else type(one) for one in inputs]
        result = self._result(None if dtype is None else np.dtype(dtype), *kinds)
        shape = np.broadcast_shapes(*[one.shape for one in inputs if isinstance(one, ndarray)])
        if out is None:
            out = ndarray(shape, result)
        else:
            if np.broadcast_shapes(shape, out.shape) != out.shape:
                raise ValueError(f"non-broadcastable output operand with shape {out.shape} doesn't match {shape}")
            if not np.can_cast(result, out.dtype, casting):
                raise TypeError(f"Cannot cast output from {result!r} to {out.dtype!r} according to '{casting}'")
        operands, arrays = split(inputs)
        options = {} if dtype is None else {"dtype": dtype}

        def compute(*given: np.ndarray) -> None:
            np.copyto(given[-1], self._plain(*arranged(operands, given), **options), casting="unsafe")

        launch(f"cupy_{self.__name__}", compute, arrays, [out])
        return out

    def at(self, a: ndarray, indices: ndarray, b: ndarray) -> None:
        """In place, once for each index; in any order on a GPU."""

        def compute(indices: np.ndarray, b: np.ndarray, a: np.ndarray) -> None:
            self._plain.at(a, indices, b)

        launch(f"cupy_{self.__name__}_at", compute, [indices, b], [a])

    def reduce(self, a: ndarray, axis: Any = 0, dtype: Any = None, out: Any = None, keepdims: bool = False) -> ndarray:
        return _reduced(self.__name__, self._plain.reduce, a, axis, dtype, out, keepdims)


for _name in (
    *("add", "subtract", "multiply", "divide", "true_divide", "floor_divide", "remainder", "power", "mod", "fmod"),
    *("maximum", "minimum", "fmax", "fmin", "negative", "positive", "absolute", "abs", "sign", "copysign"),
    *("sqrt", "square", "reciprocal", "exp", "log", "tanh", "floor", "ceil", "rint", "conjugate"),
    *("equal", "not_equal", "less", "less_equal", "greater", "greater_equal", "isnan", "isinf", "isfinite"),
    *("logical_and", "logical_or", "logical_not", "logical_xor", "bitwise_and", "bitwise_or", "bitwise_xor", "invert"),
    *("left_shift", "right_shift"),
):
    MODULE[_name] = MODULE[getattr(np, _name).__name__] = ufunc(getattr(np, _name))


# --- reductions -------------------------------------------------------------------------------------


def _reduced(name: str, plain: Any, a: Any, axis: Any, dtype: Any, out: Any, keepdims: bool) -> ndarray:
    if not isinstance(a, ndarray):
        raise TypeError(f"Argument 'a' has incorrect type (expected cupy.ndarray, got {type(a)})")
    options = {"axis": axis, "keepdims": keepdims} | ({} if dtype is None else {"dtype": dtype})
    shape, kind = _reduction(name, plain, a.shape, a.dtype, tuple(options.items()))
    if out is None:
        out = ndarray(shape, kind)
    elif out.shape != shape:
        raise ValueError(f"Output shape {out.shape} does not match {shape}")
    launch(f"cupy_{name}", lambda given, to: np.copyto(to, plain(given, **options), casting="unsafe"), [a], [out])
    return out


@functools.cache
def _reduction(name: str, plain: Any, shape: tuple[int, ...], dtype: Any, options: Any) -> tuple[Any, Any]:
    """Shape and dtype of the result."""
    axis, keepdims = dict(options)["axis"], dict(options)["keepdims"]
    axes = range(len(shape)) if axis is None else [axis] if isinstance(axis, int) else axis
    gone = {one % max(len(shape), 1) for one in axes}
    left = tuple(1 if at in gone else n for at, n in enumerate(shape) if keepdims or at not in gone)
    small = np.ones((1,) * len(shape), dtype)
    return left, np.asarray(_quiet(lambda: plain(small, **dict(options)))).dtype


def _reduction_named(name: str, takes_dtype: bool) -> Callable[..., Any]:
    plain = getattr(np, name)
    if takes_dtype:

        def reduce(a: Any, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: bool = False) -> ndarray:
            return _reduced(name, plain, a, axis, dtype, out, keepdims)

    else:

        def reduce(a: Any, axis: Any = None, out: Any = None, keepdims: bool = False) -> ndarray:  # type: ignore[misc]
            return _reduced(name, plain, a, axis, None, out, keepdims)

    return reduce


for _name in ("sum", "prod", "mean"):
    MODULE[_name] = _reduction_named(_name, True)
for _name in ("max", "min", "all", "any", "argmax", "argmin"):
    MODULE[_name] = _reduction_named(_name, False)
MODULE["amax"], MODULE["amin"] = MODULE["max"], MODULE["min"]


@_export
def array_equal(a1: Any, a2: Any) -> ndarray:
    if a1.shape != a2.shape:
        return array(False)
    return MODULE["all"](MODULE["equal"](a1, a2))


@_export
def allclose(a: Any, b: Any, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False) -> ndarray:
    return MODULE["all"](isclose(a, b, rtol, atol, equal_nan))


@_export
def isclose(a: Any, b: Any, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False) -> ndarray:
    operands, arrays = split([_operand(a), _operand(b)])
    out = ndarray(np.broadcast_shapes(*[one.shape for one in arrays]), np.bool_)

    def compute(*given: np.ndarray) -> None:
        np.copyto(given[-1], np.isclose(*arranged(operands, given), rtol, atol, equal_nan))

    launch("cupy_isclose", compute, arrays, [out])
    return out


# --- creation ---------------------------------------------------------------------------------------


@_export
def empty(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    return ndarray(shape, dtype, order=order)


@_export
def zeros(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    made = ndarray(shape, dtype, order=order)
    made.data.memset_async(0, made.nbytes)
    return made


@_export
def ones(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    return full(shape, 1, float if dtype is None else dtype, order)


@_export
def full(shape: Any, fill_value: Any, dtype: Any = None, order: str = "C") -> ndarray:
    if dtype is None:
        dtype = fill_value.dtype if isinstance(fill_value, ndarray) else np.array(fill_value).dtype
    made = ndarray(shape, dtype, order=order)
    made.fill(fill_value)
    return made


def _like(a: Any, dtype: Any, order: str, shape: Any) -> ndarray:
    turned = order == "F" or (order in ("K", "A") and a.flags.fnc and shape is None)
    return ndarray(a.shape if shape is None else shape, dtype or a.dtype, order="F" if turned else "C")


@_export
def empty_like(prototype: Any, dtype: Any = None, order: str = "K", subok: Any = None, shape: Any = None) -> ndarray:
    return _like(prototype, dtype, order, shape)


@_export
def zeros_like(a: Any, dtype: Any = None, order: str = "K", subok: Any = None, shape: Any = None) -> ndarray:
    made = _like(a, dtype, order, shape)
    made.data.memset_async(0, made.nbytes)
    return made


@_export
def ones_like(a: Any, dtype: Any = None, order: str = "K", subok: Any = None, shape: Any = None) -> ndarray:
    return full_like(a, 1, dtype, order, subok, shape)


@_export
def full_like(
    a: Any, fill_value: Any, dtype: Any = None, order: str = "K", subok: Any = None, shape: Any = None
) -> ndarray:
    made = _like(a, dtype, order, shape)
    made.fill(fill_value)
    return made


@_export
def arange(start: Any, stop: Any = None, step: Any = 1, dtype: Any = None) -> ndarray:
    wanted = np.arange(start, dtype=dtype) if stop is None else np.arange(start, stop, step, dtype=dtype)
    made = ndarray(wanted.shape, wanted.dtype)
    launch("cupy_arange", lambda out: np.copyto(out, wanted), [], [made])
    return made


MODULE["array"], MODULE["asarray"], MODULE["from_dlpack"] = array, asarray, from_dlpack


@_export
def ascontiguousarray(a: Any, dtype: Any = None) -> ndarray:
    a = asarray(a, dtype)
    return a if a.flags.c_contiguous else a.astype(a.dtype, "C")


@_export
def asnumpy(a: Any, stream: Any = None, order: str = "C", out: Any = None, *, blocking: bool = True) -> Any:
    if not isinstance(a, ndarray) and hasattr(a, "__cuda_array_interface__"):
        a = from_interface(a)
    if isinstance(a, ndarray):
        return a.get(stream, order, out, blocking)
    if out is not None:
        out[...] = a
        return out
    return np.asarray(a, order=order)


@_export
def copy(a: ndarray, order: str = "K") -> ndarray:
    return a.copy(order)


@_export
def copyto(dst: Any, src: Any, casting: str = "same_kind", where: Any = None) -> None:
    if not isinstance(src, ndarray):
        if not isinstance(src, SCALARS):
            raise TypeError(f"Unsupported type {type(src)}")
        dst.fill(src)
        return
    if not np.can_cast(src.dtype, dst.dtype, casting):
        raise TypeError(f"Cannot cast {src.dtype} to {dst.dtype} in {casting} casting mode")
    alike = src.dtype == dst.dtype and src.shape == dst.shape and src.flags.c_contiguous and dst.flags.c_contiguous
    if src.size and alike and src.data.device_id != dst.data.device_id:
        dst.data.copy_from_device_async(src.data, src.nbytes)
    else:
        elementwise_copy(src, dst)


# --- rearrangement ----------------------------------------------------------------------------------


def _made(name: str, plain: Callable[..., Any], arrays: Sequence[Any], out: Any = None) -> ndarray:
    """What NumPy's function makes of arrays, whose shape depends on theirs alone."""
    given = [_operand(one) for one in arrays]
    like = [np.broadcast_to(np.ones((), one.dtype), one.shape) for one in given]
    seen = plain(like)
    out = ndarray(seen.shape, seen.dtype) if out is None else out
    launch(f"cupy_{name}", lambda *all_: np.copyto(all_[-1], plain(list(all_[:-1])), casting="unsafe"), given, [out])
    return out


@_export
def concatenate(tup: Any, axis: Any = 0, out: Any = None, *, dtype: Any = None, casting: str = "same_kind") -> ndarray:
    return _made("concatenate", lambda given: np.concatenate(given, axis, dtype=dtype, casting=casting), tup, out)


@_export
def stack(tup: Any, axis: int = 0, out: Any = None) -> ndarray:
    return _made("stack", lambda given: np.stack(given, axis), tup, out)


@_export
def argsort(a: ndarray, axis: int = -1, kind: Any = None) -> ndarray:
    return _made("argsort", lambda given: np.argsort(given[0], axis, kind="stable"), [a])


@_export
def flatnonzero(a: ndarray) -> ndarray:
    """Waits: its size is that of the result."""
    return asarray(np.flatnonzero(a.get()))


@_export
def sort(a: ndarray, axis: int = -1, kind: Any = None) -> ndarray:
    return _made("sort", lambda given: np.sort(given[0], axis, kind="stable"), [a])


@_export
def dot(a: ndarray, b: ndarray, out: Any = None) -> ndarray:
    return _made("dot", lambda given: np.asarray(np.dot(*given)), [a, b], out)


@_export
def matmul(x1: ndarray, x2: ndarray, out: Any = None) -> ndarray:
    return _made("matmul", lambda given: np.matmul(given[0], given[1]), [x1, x2], out)


@_export
def where(condition: Any, x: Any, y: Any) -> ndarray:
    operands, arrays = split([_operand(one) for one in (condition, x, y)])
    return _made("where", lambda given: np.where(*arranged(operands, given)), arrays)


@_export
def clip(a: ndarray, a_min: Any = None, a_max: Any = None, out: Any = None) -> ndarray:
    return _made("clip", lambda given: np.clip(given[0], a_min, a_max), [a], out)


@_export
def take(a: ndarray, indices: Any, axis: Any = None, out: Any = None) -> ndarray:
    return _made("take", lambda given: np.take(given[0], given[1], axis), [a, asarray(indices)], out)


@_export
def broadcast_to(array: ndarray, shape: Any) -> ndarray:
    view = array._like_numpy(lambda one: np.broadcast_to(one, shape))
    assert view is not None
    return view


@_export
def reshape(a: ndarray, newshape: Any, order: str = "C") -> ndarray:
    return a.reshape(newshape, order=order)


@_export
def ravel(a: ndarray, order: str = "C") -> ndarray:
    return a.ravel(order)


@_export
def transpose(a: ndarray, axes: Any = None) -> ndarray:
    return a.transpose(axes)


@_export
def shares_memory(a: Any, b: Any, max_work: Any = None) -> bool:
    """Whether their ranges meet."""
    from tests.gpu.simulated.array import span

    (one, size), (other, room) = span(a), span(b)
    return bool(a.size and b.size and one < other + room and other < one + size)


MODULE["may_share_memory"] = shares_memory
MODULE["shape"], MODULE["ndim"], MODULE["size"] = (lambda a: a.shape), (lambda a: a.ndim), (lambda a: a.size)


@_export
def get_array_module(*args: Any) -> Any:
    import sys

    return sys.modules["cupy"] if any(isinstance(one, ndarray) for one in args) else np


@_export
def get_default_memory_pool() -> Any:
    return cuda._pool


@_export
def get_default_pinned_memory_pool() -> Any:
    return cuda._pinned_pool


MODULE["is_available"] = lambda: bool(runtime._machine)


# --- other modules ----------------------------------------------------------------------------------


class Generator:
    """``cupy.random.default_rng``: NumPy's numbers."""

    def __init__(self, seed: Any = None) -> None:
        self._host = np.random.default_rng(seed)

    def __getattr__(self, name: str) -> Callable[..., ndarray]:
        return lambda *arguments, **options: asarray(getattr(self._host, name)(*arguments, **options))


def empty_pinned(shape: Any, dtype: Any = float, order: str = "C") -> np.ndarray:
    """``cupyx.empty_pinned``."""
    size = int(np.prod(shape, dtype=np.int64))
    memory = cuda.alloc_pinned_memory(size * np.dtype(dtype).itemsize)
    return np.frombuffer(memory, dtype, size).reshape(shape, order=order)


def zeros_pinned(shape: Any, dtype: Any = float, order: str = "C") -> np.ndarray:
    """``cupyx.zeros_pinned``."""
    made = empty_pinned(shape, dtype, order)
    made.fill(0)
    return made
