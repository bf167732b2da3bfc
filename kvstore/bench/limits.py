"""What the machine itself can do: plain NumPy on the same number of bytes, in the driver's process."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from kvstore.arrays import Array
from kvstore.bench.apart.member import Round
from kvstore.bench.cases import Case, Rounds


def make(case: Case, pool: ThreadPoolExecutor) -> Round:
    """``copy``, ``add``, ``add, 2 threads``, or ``sums and copies`` of some devices."""
    if case.operation == "sums and copies":
        return _sums_and_copies(case)
    size = case.bytes // 4
    source, target = np.ones(size, np.float32), np.zeros(size, np.float32)
    once: Callable[[], object]
    if case.operation == "copy":

        def once() -> None:
            np.copyto(target, source)
    elif case.operation == "add":

        def once() -> None:
            np.add(target, source, out=target)
    else:
        half = size // 2
        parts = [(target[:half], source[:half]), (target[half:], source[half:])]

        def add(part: tuple[Array, Array]) -> None:
            np.add(part[0], part[1], out=part[0])

        def once() -> None:
            list(pool.map(add, parts))

    return Round(lambda: source.fill(1), once, lambda: None)


def _sums_and_copies(case: Case) -> Round:
    """What a store of one process cannot avoid: add up the devices' arrays, copy the sum to each."""
    count = case.system.devices
    arrays = [[np.empty(shape, np.float32) for _ in range(count)] for shape in case.shapes]
    outs = [[np.zeros(shape, np.float32) for _ in range(count)] for shape in case.shapes]
    sums = [np.empty(shape, np.float32) for shape in case.shapes]

    def fill() -> None:
        for values in arrays:
            for value in values:
                value.fill(1)

    def once() -> None:
        for values, results, total in zip(arrays, outs, sums, strict=True):
            np.add(values[0], values[1], out=total)
            for value in values[2:]:
                np.add(total, value, out=total)
            for result in results:
                np.copyto(result, total)

    return Round(fill, once, lambda: None)


class Numpy:
    """The system ``numpy``: no processes."""

    version = np.__version__

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(2, "bench-limits")
        self._cases: dict[str, Round] = {}

    def prepare(self, name: str, case: Case, group: str) -> None:
        self._cases[name] = make(case, self._pool)

    def rounds(self, name: str, case: Case, count: int) -> Rounds:
        times = []
        one = self._cases[name]
        for _ in range(count):
            one.fill()
            start = time.perf_counter()
            one.once()
            times.append(time.perf_counter() - start)
        return Rounds(times)

    def check(self, name: str) -> None:
        self._cases[name].check()

    def drop(self, name: str) -> None:
        self._cases.pop(name, None)

    def pids(self) -> dict[str, list[int]]:
        return {}

    def close(self) -> None:
        self._pool.shutdown()
