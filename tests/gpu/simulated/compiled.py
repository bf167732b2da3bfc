"""``cupy.RawModule``: kernels whose one argument is a struct, compiled by g++ and run thread after thread."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from tests.gpu.simulated import cuda, runtime
from tests.gpu.simulated.runtime import machine
from tests.kernels import on_cpu


class RawModule:
    def __init__(self, *, code: str, options: tuple[str, ...] = (), **_: Any) -> None:
        self._library = on_cpu.build(code, tuple(options))

    def get_function(self, name: str) -> Function:
        return Function(name, self._library[name], self._library)


class Function:
    def __init__(self, name: str, address: Any, library: Any) -> None:
        self.name, self._address, self._library = name, address, library

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], **_: Any) -> None:
        (argument,) = args
        work = np.frombuffer(argument.tobytes(), np.uint64).copy()
        (blocks, threads), place = (grid[0], block[0]), ctypes.c_void_p(work.ctypes.data)
        touches = [(int(word), 1) for word in work if _is_pointer(int(word))]

        def run() -> None:
            assert work.size  # it is held until then
            self._library.run(self._address, blocks, threads, place)

        runtime.ask(machine().launch, self.name, cuda.get_current_stream().ptr, run, touches)


def _is_pointer(word: int) -> bool:
    """Whatever looks like the address of memory that a device may reach is one; no other number does."""
    return machine().arena_of(word) is not None or machine()._registration(word) is not None
