"""NumPy's arrays mirrored in a GPU's memory: same strides, same alignment, the same overlaps.

So that the contract test, which is written for NumPy, says the same of kernels on CuPy's arrays.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

ALIGNMENT = 256  # of what CuPy allocates


class Mirror:
    def __init__(self, arrays: list[np.ndarray], cupy: Any) -> None:
        self._cupy = cupy
        self._spans: list[list[Any]] = []  # first address, last address, whether to bring it back, its mirror
        for array in arrays:
            low, high = np.lib.array_utils.byte_bounds(array)
            writable = array.flags.writeable
            for span in [span for span in self._spans if low < span[1] and span[0] < high]:
                self._spans.remove(span)
                low, high, writable = min(low, span[0]), max(high, span[1]), writable or span[2]
            self._spans.append([low, high, writable, None])
        for span in self._spans:
            start = span[0] % ALIGNMENT
            memory = cupy.zeros(start + span[1] - span[0] + 1, np.uint8)
            memory[start : start + span[1] - span[0]] = cupy.asarray(_host(span[0], span[1]))
            span[3] = memory

    def of(self, array: np.ndarray) -> Any:
        low, _ = np.lib.array_utils.byte_bounds(array)
        for start, _, _, memory in self._spans:
            if start <= low < start + memory.size - start % ALIGNMENT:
                at = memory.data + (start % ALIGNMENT + array.ctypes.data - start)
                return self._cupy.ndarray(array.shape, array.dtype, at, array.strides)
        raise AssertionError("it was not among the arrays")

    def scribble(self) -> None:
        """Overwrite all of it there."""
        for *_, memory in self._spans:
            memory.fill(0xA5)

    def bring_back(self) -> None:
        for start, end, writable, memory in self._spans:
            if writable:
                shift = start % ALIGNMENT
                _host(start, end)[:] = self._cupy.asnumpy(memory[shift : shift + end - start])


def _host(start: int, end: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_uint8 * (end - start)).from_address(start), np.uint8)


def mirrored(kernel: Any, cupy: Any) -> Any:
    """The kernel for NumPy's arrays, done on their mirrors."""

    def arrays_in(value: Any) -> list[np.ndarray]:
        if isinstance(value, np.ndarray):
            return [value]
        return [array for part in value for array in arrays_in(part)] if isinstance(value, list | tuple) else []

    def call(*arguments: Any) -> Any:
        mirror = Mirror(arrays_in(arguments), cupy)
        images: dict[int, Any] = {}

        def image(value: Any) -> Any:
            if isinstance(value, np.ndarray):  # the same array stays the same array
                return images.setdefault(id(value), mirror.of(value))
            if isinstance(value, list | tuple):
                parts = [image(part) for part in value]
                return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
            return value

        result = kernel(*[image(argument) for argument in arguments])
        mirror.bring_back()
        return brought(result)

    def brought(result: Any) -> Any:
        """What a kernel returned: numbers, or new arrays."""
        if isinstance(result, tuple):
            return tuple(brought(part) for part in result)
        if isinstance(result, cupy.ndarray):
            return cupy.asnumpy(result) if result.ndim else float(result)
        return result

    return call
