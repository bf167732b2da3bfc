"""``cupy.RawModule``: kernels whose one argument is a struct, compiled by g++ and run thread after thread."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
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

    def __call__(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: tuple[Any, ...],
        shared_mem: int = 0,
        stream: Any = None,
    ) -> None:
        (argument,) = args
        if argument.size != 1:
            raise TypeError("Only numpy.ndarrays of size one can be passed by value.")
        work = np.frombuffer(argument.tobytes(), np.uint64).copy()
        (blocks, threads), place = (grid[0], block[0]), ctypes.c_void_p(work.ctypes.data)
        words = _addresses(work)
        live = cuda._pool.device_pool().live
        tables = [(word, live[word] // 8) for word in words if word in live]

        def run() -> None:
            assert work.size  # held until now
            self._library.run(self._address, blocks, threads, place)

        number = cuda._number(stream)
        runtime.ask(machine().launch, self.name, number, run, lambda: _touched(words, tables))


def _touched(words: list[int], tables: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """What a kernel gets hold of: the addresses that it is given, and those in a table at one of them."""
    yield from ((word, 1) for word in words)
    for start, length in tables:
        arena = machine().arena_of(start)
        assert arena is not None
        table = arena.array(start, (length,), None, np.uint64)
        if _addresses(table[:1]):  # data does not begin like that
            yield from ((address, 1) for address in _addresses(table))


def _addresses(words: Any) -> list[int]:
    """What looks like the address of memory that a device may reach is one; other numbers are far from them."""
    one = machine()
    ranges = [(arena.start, arena.end) for arena in (*[device.arena for device in one.devices], one.pinned)]
    ranges += [(start, start + size) for start, size in one.registered.items()]
    found: set[int] = set()
    for start, end in ranges:
        found.update(words[(words >= start) & (words < end)].tolist())
    return sorted(found)
