"""``cupy.ndarray``: what it is made of is known at once, what is in it when its stream comes to it.

Every operation is a kernel or a copy in the current stream of the current device, as in CuPy; NumPy computes it.
"""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

from tests.gpu.simulated import cuda, dlpack, runtime
from tests.gpu.simulated.runtime import machine

SCALARS = (bool, int, float, complex, np.generic)
_KNOWN = {*"?bhilqBHILQefdFD"}


class PerformanceWarning(RuntimeWarning):
    """``cupy._util.PerformanceWarning``."""


def check_dtype(dtype: Any) -> np.dtype[Any]:
    dtype = np.dtype(dtype)
    if dtype.char in _KNOWN or dtype == ml_dtypes.bfloat16 or dtype.kind == "V":
        return dtype
    raise ValueError(f"Unsupported dtype {dtype}")


def contiguous_strides(shape: Sequence[int], itemsize: int, order: str = "C") -> tuple[int, ...]:
    strides, step = [], itemsize
    for length in reversed(shape) if order == "C" else shape:
        strides.append(step)
        step *= max(length, 1)
    return tuple(reversed(strides) if order == "C" else strides)


def _lies(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> bool:
    """Do its elements lie one behind the other?"""
    step = itemsize
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1:
            if stride != step:
                return False
            step *= length
    return True


class Flags(SimpleNamespace):
    c_contiguous: bool
    f_contiguous: bool
    owndata: bool

    def __getitem__(self, name: str) -> bool:
        names = {"C_CONTIGUOUS": "c_contiguous", "F_CONTIGUOUS": "f_contiguous", "OWNDATA": "owndata"}
        flag: bool = getattr(self, names[name])
        return flag

    @property
    def forc(self) -> bool:
        return self.f_contiguous or self.c_contiguous

    @property
    def fnc(self) -> bool:
        return self.f_contiguous and not self.c_contiguous


class ndarray:
    """An array in a device's memory."""

    __slots__ = ("__weakref__", "_shape", "_strides", "base", "data", "dtype", "size")
    __array_priority__ = 100
    __hash__ = None  # type: ignore[assignment]

    def __init__(
        self, shape: Any, dtype: Any = float, memptr: Any = None, strides: Any = None, order: str = "C"
    ) -> None:
        self._shape = (operator.index(shape),) if not isinstance(shape, tuple | list) else tuple(map(int, shape))
        if any(length < 0 for length in self._shape):
            raise ValueError("Negative dimensions are not allowed")
        self.dtype = check_dtype(dtype)
        self.size = int(np.prod(self._shape, dtype=np.int64)) if self._shape else 1
        laid = contiguous_strides(self._shape, self.dtype.itemsize, order or "C")
        self._strides = laid if strides is None else tuple(map(int, strides))
        self.data = cuda.alloc(self.size * self.dtype.itemsize) if memptr is None else memptr
        self.base = None

    # --- what it is ---

    shape = property(lambda self: self._shape)

    @shape.setter
    def shape(self, shape: Any) -> None:
        view = self.reshape(shape)
        if view.data.ptr != self.data.ptr:
            raise AttributeError("incompatible shape")
        self._shape, self._strides = view._shape, view._strides

    strides = property(lambda self: self._strides)
    ndim = property(lambda self: len(self._shape))
    itemsize = property(lambda self: self.dtype.itemsize)
    nbytes = property(lambda self: self.size * self.dtype.itemsize)
    device = property(lambda self: self.data.device)

    @property
    def flags(self) -> Flags:
        straight = not self.size or _lies(self._shape, self._strides, self.itemsize)
        turned = not self.size or _lies(self._shape[::-1], self._strides[::-1], self.itemsize)
        return Flags(c_contiguous=straight, f_contiguous=turned, owndata=self.base is None)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self._shape,
            "typestr": self.dtype.str,
            "descr": self.dtype.descr,
            "stream": cuda.get_current_stream().ptr or runtime.streamLegacy,
            "version": 3,
            "strides": None if self.flags.c_contiguous else self._strides,
            "data": (self.data.ptr if self.size else 0, False),
        }

    def __dlpack__(
        self, *, stream: Any = None, max_version: Any = None, dl_device: Any = None, copy: Any = None
    ) -> Any:
        if dl_device is not None and dl_device != self.__dlpack_device__():
            raise BufferError("unsupported device requested.")
        if copy:
            raise BufferError("copy=True only supported for copy to CPU.")
        consumer = runtime.streamLegacy if stream in (None, 0) else stream
        current = cuda.get_current_stream()
        if consumer != -1 and consumer != (current.ptr or runtime.streamLegacy):
            cuda._BaseStream(consumer, -1).wait_event(current.record())
        versioned = max_version is not None and max_version[0] >= 1
        if self.dtype == ml_dtypes.bfloat16 and machine().version < "14":
            raise BufferError("dtype is not supported for dlpack export")
        return dlpack.export(self, self.data.ptr, (dlpack.CUDA, self.data.device_id), versioned)

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, self.data.device_id

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. "
            "Please use `.get()` to construct a NumPy array explicitly."
        )

    def __reduce__(self) -> Any:
        return array, (self.get(),)

    def __len__(self) -> int:
        if not self._shape:
            raise TypeError("len() of unsized object")
        return self._shape[0]

    def __iter__(self) -> Any:
        if not self._shape:
            raise TypeError("iteration over a 0-d array")
        return (self[i] for i in range(self._shape[0]))

    def __repr__(self) -> str:
        return repr(self.get())

    def __str__(self) -> str:
        return str(self.get())

    def __bool__(self) -> bool:
        return bool(self.get())

    def __int__(self) -> int:
        return int(self.get())

    def __float__(self) -> float:
        return float(self.get())

    def __complex__(self) -> complex:
        return complex(self.get())

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        from tests.gpu.simulated import functions

        if "out" in options:
            if len(options["out"]) != 1:
                raise ValueError("The 'out' parameter must have exactly one array value")
            options["out"] = options["out"][0]
        function = functions.MODULE.get(ufunc.__name__)
        if method != "__call__":
            function = getattr(function, method, None)
        return NotImplemented if function is None else function(*inputs, **options)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        from tests.gpu.simulated import functions

        function = functions.MODULE.get(func.__name__) if func.__module__ == "numpy" else None
        if function is None or not all(issubclass(kind, ndarray | np.ndarray) for kind in types):
            return NotImplemented
        return function(*args, **kwargs)

    # --- host ---

    def get(self, stream: Any = None, order: str = "C", out: Any = None, blocking: bool = True) -> Any:
        stream = cuda.get_current_stream() if stream is None else stream
        if out is not None:
            if not isinstance(out, np.ndarray):
                raise TypeError("Only numpy.ndarray can be obtained fromcupy.ndarray")
            if self.dtype != out.dtype:
                raise TypeError(f"{out.dtype} array cannot be obtained from {self.dtype} array")
            if self.shape != out.shape:
                raise ValueError(f"Shape mismatch. Expected shape: {self.shape}, actual shape: {out.shape}")
            if not (out.flags.c_contiguous or out.flags.f_contiguous):
                raise RuntimeError("`out` cannot be specified when copying to non-contiguous ndarray")
        elif not self.size:
            return np.ndarray(self._shape, self.dtype)
        else:
            order = order.upper()
            if order == "A":
                order = "F" if self.flags.fnc else "C"
            out = np.empty(self._shape, self.dtype, order)
        own, there = self, "C" if out.flags.c_contiguous else "F"
        if not (self.flags.c_contiguous if there == "C" else self.flags.f_contiguous):
            with cuda.Device(self.data.device_id), stream:
                own = self.astype(self.dtype, there)
        with cuda.Device(self.data.device_id):
            own.data.copy_to_host_async(out.ctypes.data, own.nbytes, stream)
            if blocking:
                stream.synchronize()
        return out

    def set(self, arr: Any, stream: Any = None) -> None:
        if not isinstance(arr, np.ndarray):
            raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
        if self.dtype != arr.dtype:
            raise TypeError(f"{arr.dtype} array cannot be set to {self.dtype} array")
        if self.shape != arr.shape:
            raise ValueError(f"Shape mismatch. Old shape: {self.shape}, new shape: {arr.shape}")
        if self.flags.c_contiguous:
            arr = np.ascontiguousarray(arr)
        elif self.flags.f_contiguous:
            arr = np.asfortranarray(arr)
        else:
            raise RuntimeError("Cannot set to non-contiguous array")
        stream = cuda.get_current_stream() if stream is None else stream  # of the current device, as in CuPy
        with cuda.Device(self.data.device_id):
            self.data.copy_from_host_async(arr.ctypes.data, self.nbytes, stream)

    def item(self) -> Any:
        if self.size != 1:
            raise ValueError("can only convert an array of size 1 to a Python scalar")
        return self.get().item()

    def tolist(self) -> Any:
        return self.get().tolist()

    def tobytes(self, order: str = "C") -> bytes:
        data: bytes = self.get().tobytes(order)
        return data

    # --- views ---

    def _view(self, ptr: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any = None) -> ndarray:
        view = ndarray(shape, self.dtype if dtype is None else dtype, self.data + (ptr - self.data.ptr), strides)
        view.base = self if self.base is None else self.base
        return view

    def _like_numpy(self, change: Callable[[np.ndarray], np.ndarray]) -> ndarray | None:
        """What NumPy makes of an array at the same place; None: a copy."""
        if not self.size:
            seen = change(np.empty(self._shape, self.dtype))
            return self._view(self.data.ptr, seen.shape, contiguous_strides(seen.shape, seen.itemsize), seen.dtype)
        mirror = host(self)
        seen = change(mirror)
        if seen.size and not np.may_share_memory(seen, mirror):
            return None
        return self._view(seen.ctypes.data if seen.size else self.data.ptr, seen.shape, seen.strides, seen.dtype)

    def view(self, dtype: Any = None, type: Any = None) -> ndarray:
        view = self._like_numpy(lambda array: array.view(array.dtype if dtype is None else dtype))
        assert view is not None
        return view

    def reshape(self, *shape: Any, order: str = "C") -> ndarray:
        wanted = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        view = self._like_numpy(lambda array: array.reshape(wanted, order=order))
        if view is None:
            return self.copy().reshape(wanted, order=order)
        return view

    def ravel(self, order: str = "C") -> ndarray:
        return self.reshape(-1, order=order)

    def flatten(self, order: str = "C") -> ndarray:
        return self.copy().reshape(-1, order=order)

    def squeeze(self, axis: Any = None) -> ndarray:
        view = self._like_numpy(lambda array: array.squeeze(axis))
        assert view is not None
        return view

    def transpose(self, *axes: Any) -> ndarray:
        view = self._like_numpy(lambda array: array.transpose(*axes))
        assert view is not None
        return view

    def swapaxes(self, one: int, other: int) -> ndarray:
        view = self._like_numpy(lambda array: array.swapaxes(one, other))
        assert view is not None
        return view

    @property
    def T(self) -> ndarray:
        return self if self.ndim < 2 else self.transpose()

    def __getitem__(self, key: Any) -> ndarray:
        if _is_advanced(key):
            return _taken(self, key)
        parts = key if isinstance(key, tuple) else (key,)
        parts = parts if any(part is ... for part in parts) else (*parts, ...)
        view = self._like_numpy(lambda array: array[parts])
        assert view is not None
        return view

    def __setitem__(self, key: Any, value: Any) -> None:
        if _is_advanced(key):
            _put(self, key, value)
            return
        target = self[key]
        if not isinstance(value, ndarray):
            if isinstance(value, np.ndarray) and value.ndim:
                raise ValueError("non-scalar numpy.ndarray cannot be used for fill")
            target.fill(value)
            return
        same = target.shape == value.shape and target.strides == value.strides
        if same and target.data.ptr == value.data.ptr and target.dtype == value.dtype:
            return
        if same and target.flags.c_contiguous and target.dtype == value.dtype:
            target.data.copy_from_device_async(value.data, value.nbytes)
            return
        elementwise_copy(value, target)

    # --- copies ---

    def fill(self, value: Any) -> None:
        if isinstance(value, ndarray):
            if value.size != 1:
                raise ValueError("non-scalar cupy.ndarray cannot be used for fill")
            elementwise_copy(value.reshape(()), self)
            return
        if isinstance(value, np.ndarray):
            if value.size != 1:
                raise ValueError("non-scalar numpy.ndarray cannot be used for fill")
            value = value.item() if value.dtype.kind != "V" else value.reshape(())[()]
        if not isinstance(value, SCALARS):
            value = np.asarray(value)[()]
            if np.ndim(value):
                raise TypeError(f"Unsupported type {type(value)}")
        launch("fill", lambda out: out.fill(value), [], [self])

    def astype(self, dtype: Any, order: str = "K", casting: Any = None, subok: Any = None, copy: bool | None = True):
        dtype = check_dtype(dtype)
        if not copy and dtype == self.dtype and (order in ("K", "A", None) or self.flags[f"{order}_CONTIGUOUS"]):
            return self
        turned = order == "F" or (order in ("K", "A", None) and self.flags.fnc)
        out = ndarray(self._shape, dtype, order="F" if turned else "C")
        elementwise_copy(self, out)
        return out

    def copy(self, order: str = "C") -> ndarray:
        if self.data.device_id == runtime.getDevice() or not self.size:
            return self.astype(self.dtype, order)
        if not self.flags.forc:
            with cuda.Device(self.data.device_id):
                own = self.astype(self.dtype, order, copy=False)
            if not own.flags.forc:
                raise NotImplementedError("CuPy cannot copy non-contiguous array between devices.")
        else:
            own = self
        out = ndarray(own._shape, own.dtype, order="F" if own.flags.fnc else "C")
        out.data.copy_from_device_async(own.data, own.nbytes)
        return out

    __copy__ = copy

    def __deepcopy__(self, memo: Any) -> ndarray:
        with self.device:
            return self.copy()


ndarray.__module__ = "cupy"


def host(array: ndarray) -> np.ndarray:
    """Its memory as NumPy's: to be read or written when the device's turn comes, and not before."""
    arena = machine().arena_of(array.data.ptr)
    if arena is None:
        if array.size:
            raise ValueError(f"{array.data.ptr:#x} is no memory of a device")
        return np.empty(array.shape, array.dtype)
    return arena.array(array.data.ptr, array._shape, array._strides, array.dtype)


def span(array: ndarray) -> tuple[int, int]:
    """Address and bytes."""
    low = sum((n - 1) * s for n, s in zip(array._shape, array._strides, strict=True) if s < 0)
    high = sum((n - 1) * s for n, s in zip(array._shape, array._strides, strict=True) if s > 0)
    return array.data.ptr + low, high - low + array.itemsize


def check_peer(array: ndarray) -> None:
    """As CuPy: peer access is enabled when a kernel needs it, with a warning, or refused."""
    device = runtime.getDevice()
    if array.data.device_id != device:
        said = (
            f"The device where the array resides ({array.data.device_id}) is different from the current device "
            f"({device})."
        )
        if not runtime.ensure_peer_access(device, array.data.device_id):
            raise ValueError(f"{said} Peer access is unavailable between these devices.")
        warnings.warn(f"{said} Peer access has been activated automatically.", PerformanceWarning, stacklevel=3)


def launch(name: str, compute: Callable[..., Any], sources: Sequence[ndarray], outs: Sequence[ndarray]) -> None:
    """``compute(*sources, *outs)``, on NumPy's arrays, in the current stream."""
    arrays = [*sources, *outs]
    for array in arrays:
        check_peer(array)
        if array.dtype == ml_dtypes.bfloat16 and machine().version < "14":
            raise KeyError(array.dtype.type)  # kernels of CuPy 13 know no such type
    if not all(out.size for out in outs):
        return
    touches = [span(array) for array in arrays if array.size]

    def work() -> None:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compute(*[host(array) for array in bare])

    bare = [_bare(array) for array in arrays]
    runtime.ask(machine().launch, name, cuda.get_current_stream().ptr, work, touches)


def _bare(array: ndarray) -> Any:
    """What a kernel knows of an array: it keeps no memory alive."""
    return SimpleNamespace(
        data=SimpleNamespace(ptr=array.data.ptr), shape=array._shape, _shape=array._shape, _strides=array._strides,
        dtype=array.dtype, size=array.size,
    )  # fmt: skip


def elementwise_copy(source: ndarray, target: ndarray) -> None:
    np.broadcast_shapes(source.shape, target.shape)

    def compute(given: np.ndarray, out: np.ndarray) -> None:
        while given.ndim > out.ndim and given.shape[0] == 1:
            given = given[0]
        np.copyto(out, given, casting="unsafe")

    launch("elementwise_copy", compute, [source], [target])


def _is_advanced(key: Any) -> bool:
    parts = key if isinstance(key, tuple) else (key,)
    return any(isinstance(part, ndarray | np.ndarray | list) for part in parts)


ARRAY = object()  # in its place among arguments


def arranged(arguments: Sequence[Any], arrays: Sequence[np.ndarray]) -> list[Any]:
    """The arguments, with these arrays in the places for them."""
    given = iter(arrays)
    return [next(given) if one is ARRAY else one for one in arguments]


def split(arguments: Sequence[Any]) -> tuple[list[Any], list[ndarray]]:
    """The arguments without their arrays, and those: what a kernel holds keeps no memory alive."""
    return (
        [ARRAY if isinstance(one, ndarray) else one for one in arguments],
        [one for one in arguments if isinstance(one, ndarray)],
    )


def _key(key: Any) -> tuple[list[Any], list[ndarray]]:
    parts = list(key) if isinstance(key, tuple) else [key]
    return split([asarray(part) if isinstance(part, np.ndarray | list) else part for part in parts])


def _taken(array: ndarray, key: Any) -> ndarray:
    parts, indices = _key(key)
    # The shape: of masks it has to be counted, for which CuPy waits as well.
    mirrors = [part.get() if part.dtype.kind == "b" else np.zeros(part.shape, part.dtype) for part in indices]
    shape = np.broadcast_to(np.empty((), np.bool_), array.shape)[tuple(arranged(parts, mirrors))].shape
    out = ndarray(shape, array.dtype)

    def compute(given: np.ndarray, *rest: np.ndarray) -> None:
        np.copyto(rest[-1], given[tuple(arranged(parts, rest[:-1]))])

    launch("take", compute, [array, *indices], [out])
    return out


def _put(array: ndarray, key: Any, value: Any) -> None:
    parts, indices = _key(key)
    (plain,), values = split([value])

    def compute(*given: np.ndarray) -> None:
        given[-1][tuple(arranged(parts, given))] = given[-2] if plain is ARRAY else plain

    launch("scatter_update", compute, [*indices, *values], [array])


# --- from the host ----------------------------------------------------------------------------------


def array(
    obj: Any, dtype: Any = None, copy: Any = True, order: str = "K", subok: bool = False, ndmin: int = 0, *,
    blocking: bool = False,
) -> ndarray:  # fmt: skip
    """A new array. From the host: pageable memory has been read when this returns, pinned memory has not."""
    made: ndarray
    if not isinstance(obj, ndarray) and hasattr(obj, "__cuda_array_interface__"):
        obj = from_interface(obj)
    if isinstance(obj, ndarray):
        dtype = obj.dtype if dtype is None else dtype
        if obj.data.device_id == runtime.getDevice():
            made = obj.astype(dtype, order, copy=copy)
        else:
            made = obj.copy(order if order in "CF" else "C").astype(dtype, copy=None)
    elif isinstance(obj, list | tuple) and obj and all(isinstance(one, ndarray) for one in obj):
        from tests.gpu.simulated import functions

        made = functions.stack(obj).astype(dtype or np.result_type(*[one.dtype for one in obj]), copy=False)
    else:
        made = _uploaded(np.array(obj, dtype=dtype, copy=None, ndmin=ndmin), order, blocking)
    while made.ndim < ndmin:
        made = made[None]
    return made


def _uploaded(source: np.ndarray, order: str, blocking: bool) -> ndarray:
    check_dtype(source.dtype)
    turned = order == "F" or (order in ("K", "A", None) and source.flags.fnc)
    made = ndarray(source.shape, source.dtype, order="F" if turned else "C")
    if not source.ndim:
        made.fill(source)
        return made
    stream = cuda.get_current_stream()
    lies = source.flags.f_contiguous if turned else source.flags.c_contiguous
    if lies and source.size and runtime.pointerGetMemoryType(source.ctypes.data) == runtime.memoryTypeHost:
        made.data.copy_from_host_async(source.ctypes.data, made.nbytes, stream)
        cuda._watcher.add(stream.record(), source)
    elif source.size:
        staging = cuda.alloc_pinned_memory(made.nbytes)
        there = np.frombuffer(staging, source.dtype, source.size).reshape(source.shape, order="F" if turned else "C")
        there[...] = source
        made.data.copy_from_host_async(staging.ptr, made.nbytes, stream)
        cuda._watcher.add(stream.record(), staging)
    if blocking:
        stream.synchronize()
    return made


def asarray(a: Any, dtype: Any = None, order: Any = None, *, blocking: bool = False) -> ndarray:
    return array(a, dtype, copy=False, order=order or "K", blocking=blocking)


def from_interface(obj: Any) -> ndarray:
    """Another library's array, by ``__cuda_array_interface__``."""
    interface = obj.__cuda_array_interface__
    shape, strides = tuple(interface["shape"]), interface.get("strides")
    dtype = np.dtype(interface["typestr"])
    size = max((abs(n * s) for n, s in zip(shape, strides, strict=True)), default=dtype.itemsize) if strides else (
        int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    )  # fmt: skip
    memory = cuda.UnownedMemory(interface["data"][0], size, obj, -1 if size else runtime.getDevice())
    if interface.get("stream") is not None:
        runtime.streamSynchronize(interface["stream"])
    return ndarray(shape, dtype, cuda.MemoryPointer(memory, 0), strides)


def from_dlpack(array: Any, *, device: Any = None, copy: Any = None) -> ndarray:
    kind, number = array.__dlpack_device__()
    if kind == dlpack.CPU:
        raise TypeError(
            "CPU arrays cannot be directly imported to CuPy. Use `cupy.array(numpy.from_dlpack(input))` instead."
        )
    if kind != dlpack.CUDA:
        raise TypeError(f"Unsupported array type: {kind}")
    with cuda.Device(number):
        stream = cuda.get_current_stream().ptr or runtime.streamLegacy
        try:
            capsule = array.__dlpack__(stream=stream, max_version=(1, 0), copy=copy)
        except TypeError:
            if copy is not None:
                raise
            capsule = array.__dlpack__(stream=stream)
    tensor = dlpack.Tensor(capsule)
    if tensor.dtype == ml_dtypes.bfloat16 and machine().version < "14":
        raise NotImplementedError("CuPy does not support bfloat16 yet")
    memory = cuda.DLPackMemory(tensor.address, tensor.nbytes, tensor, tensor.device[1])
    strides = None if tensor.strides is None else [step * tensor.dtype.itemsize for step in tensor.strides]
    return ndarray(tensor.shape, tensor.dtype, cuda.MemoryPointer(memory, 0), strides)


def _operators() -> None:
    from tests.gpu.simulated import functions

    def plain(name: str) -> Callable[..., Any]:
        def operate(self: ndarray, other: Any) -> Any:
            if not isinstance(other, (ndarray, np.ndarray, *SCALARS)) and hasattr(other, "__array_ufunc__"):
                return NotImplemented
            return functions.MODULE[name](self, other)

        return operate

    def turned(name: str) -> Callable[..., Any]:
        return lambda self, other: functions.MODULE[name](other, self)

    def in_place(name: str) -> Callable[..., Any]:
        return lambda self, other: functions.MODULE[name](self, other, self)

    for name, function in {
        "add": "add", "sub": "subtract", "mul": "multiply", "truediv": "true_divide", "floordiv": "floor_divide",
        "mod": "remainder", "pow": "power", "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor",
        "lshift": "left_shift", "rshift": "right_shift", "matmul": "matmul",
    }.items():  # fmt: skip
        setattr(ndarray, f"__{name}__", plain(function))
        setattr(ndarray, f"__r{name}__", turned(function))
        setattr(ndarray, f"__i{name}__", in_place(function))
    for name, function in {
        "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal", "eq": "equal", "ne": "not_equal",
    }.items():  # fmt: skip
        setattr(ndarray, f"__{name}__", plain(function))
    for name, function in {"neg": "negative", "abs": "absolute", "invert": "invert"}.items():
        setattr(ndarray, f"__{name}__", functools.partialmethod(_call, functions.MODULE[function]))
    for name in ("sum", "prod", "max", "min", "all", "any", "mean", "argmax", "argmin", "argsort", "clip", "dot"):
        setattr(ndarray, name, functools.partialmethod(_call, functions.MODULE[name]))


def _call(self: ndarray, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    return function(self, *arguments, **options)
