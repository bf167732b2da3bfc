"""The kernels that are measured on large arrays, by name: on a processor beside loops, on a GPU beside a copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from kvstore.arrays import Array, empty, memory_of
from kvstore.kernels import FORMATS, Change

Call = Callable[[], Any]

SGD = (1e-3, 0.0, 0.9, 1.0, 0.0, 0.0)
ADAM = (1e-4, 0.9, 0.9, 0.999, 1e-8, 0.0, 1.0)
THRESHOLD = 1.0


class KernelCase(NamedTuple):
    """A kernel on float32 arrays of one size.

    Args:
        arrays: how many are used.
        read, written: how many go through the processor, each way.
        make: ``make(form, arrays)``: the call of the kernel by a form of them, on these arrays.
    """

    arrays: int
    read: float
    written: float
    make: Callable[[Any, Sequence[Array]], Call]


def update(name: str, pushes: int, states: int, absent: int, *numbers: float) -> KernelCase:
    """An optimizer: by so many pushes, with so many states and some that it has not."""

    def make(form: Any, a: Sequence[Array]) -> Call:
        kernel = getattr(form, name)
        change = Change(a[pushes], a[pushes], a[:pushes])
        own = (*a[pushes + 1 : pushes + 1 + states], *[None] * absent)
        return lambda: kernel(change, own, *numbers)

    arrays = pushes + 1 + states
    return KernelCase(arrays, arrays, 1 + states, make)


def _merge(form: Any, a: Sequence[Array]) -> Call:
    pushes, out = a[:4], a[4]
    return lambda: form.merge(pushes, out)


def _compress(name: str) -> KernelCase:
    numbers = (THRESHOLD,) if name == "2bit" else ()

    def make(form: Any, a: Sequence[Array]) -> Call:
        kernel, codes = getattr(form, f"quantize_{name}"), _codes(name, a[0])
        return lambda: kernel(a[0], a[1], *numbers, codes)

    return KernelCase(2, 2, 1 + FORMATS[name].bits / 32, make)


def _decompress(name: str) -> KernelCase:
    numbers = (THRESHOLD,) if name == "2bit" else ()

    def make(form: Any, a: Sequence[Array]) -> Call:
        kernel, codes = getattr(form, f"dequantize_{name}"), _codes(name, a[0])
        return lambda: kernel(codes, *numbers, a[0])

    return KernelCase(1, FORMATS[name].bits / 32, 1, make)


def _codes(name: str, values: Array) -> Array:
    codes = empty(FORMATS[name].nbytes(values.size), np.dtype(np.uint8), memory_of(values))
    codes.fill(1)  # a small scale, and some of each
    return codes


KERNEL_CASES = {
    "merge of 4": KernelCase(5, 4, 1, _merge),
    "SGD": update("sgd", 1, 0, 1, *SGD),
    "SGD momentum": update("sgd", 1, 1, 0, *SGD),
    "merge of 4 + SGD momentum": update("sgd", 4, 1, 0, *SGD),
    "Adam": update("adam", 1, 2, 1, *ADAM),
    "Adagrad": update("adagrad", 1, 1, 0, 1e-3, 1e-8, 0.0),
    "RMSProp": update("rmsprop", 1, 1, 2, 1e-3, 0.99, 1e-8, 0.0, 0.0),
    "Adadelta": update("adadelta", 1, 2, 0, 1.0, 0.9, 1e-6, 0.0),
    "FTRL": update("ftrl", 1, 2, 0, 0.1, 1.0, 0.01, 0.0),
    **{f"compress to {name}": _compress(name) for name in FORMATS},
    **{f"decompress {name}": _decompress(name) for name in FORMATS},
}
