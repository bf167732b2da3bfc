"""How near the kernels come to the machine's memory: each beside loops that only read and write as many arrays.

Both are measured in turn, with the same threads on the same memory. Where Numba is missing there is nothing to measure.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
from numba import njit

from kvstore import kernels
from kvstore.arrays import Array
from kvstore.bench.cases import Line
from kvstore.bench.kernel_cases import KERNEL_CASES, Call, update
from kvstore.bench.statistic import Rows, row
from kvstore.errors import KVStoreError
from kvstore.kernels import FORMATS, reference

TINY_ELEMENTS = 64
TINY_CALLS, TINY_TIMES = 200, 20
ROWS, COLUMNS = 100_000, 64  # gathered from and added to ten times as many
TIMES = 5  # of a repeat; the fastest counts: whoever else uses the machine only takes
LOAD_S = 120.0

loops = njit(nogil=True, error_model="numpy")


# --- what memory can do -------------------------------------------------------------------------


@loops
def _copy(source: Any, target: Any) -> None:
    """1 read, 1 written."""
    for i in range(source.size):
        target[i] = source[i]


@loops
def _fill(a: Any) -> None:
    """1 written."""
    for i in range(a.size):
        a[i] = 1


@loops
def _add(a: Any, b: Any) -> None:
    """2 read, 1 of them written."""
    for i in range(a.size):
        b[i] += a[i]


@loops
def _add_twice(a: Any, b: Any, c: Any) -> None:
    """3 read, 2 of them written."""
    for i in range(a.size):
        b[i] += a[i]
        c[i] += a[i]


@loops
def _add_thrice(a: Any, b: Any, c: Any, d: Any) -> None:
    """4 read, 3 of them written."""
    for i in range(a.size):
        b[i] += a[i]
        c[i] += a[i]
        d[i] += a[i]


@loops
def _sum(a: Any, b: Any, c: Any, d: Any, out: Any) -> None:
    """4 read, 1 more written."""
    for i in range(a.size):
        out[i] = a[i] + b[i] + c[i] + d[i]


@loops
def _sum_and_add(a: Any, b: Any, c: Any, d: Any, e: Any, f: Any) -> None:
    """6 read, 2 of them written."""
    for i in range(a.size):
        total = a[i] + b[i] + c[i] + d[i]
        e[i] += total
        f[i] += total


# --- what is measured ---------------------------------------------------------------------------

LOOPS = {  # that touch as many arrays as the kernel
    "merge of 4": _sum,
    "SGD": _add,
    "SGD momentum": _add_twice,
    "merge of 4 + SGD momentum": _sum_and_add,
    "Adam": _add_thrice,
    "Adagrad": _add_twice,
    "RMSProp": _add_twice,
    "Adadelta": _add_thrice,
    "FTRL": _add_thrice,
    **{f"compress to {name}": _add for name in FORMATS},
    **{f"decompress {name}": _fill for name in FORMATS},
}


def measure(elements: int, repeats: int) -> Rows:
    """One row per kernel and number of threads."""
    rng = np.random.default_rng(0)
    most = max(case.arrays for case in KERNEL_CASES.values())
    memory = [np.abs(rng.standard_normal(elements, np.float32)) for _ in range(most)]
    rows: Rows = []
    with ThreadPoolExecutor(2, "bench-kernels") as pool:
        for name, case in KERNEL_CASES.items():
            for threads in (1, 2):
                parts = list(zip(*(np.array_split(array, threads) for array in memory[: case.arrays]), strict=True))
                calls = {
                    "kernel": _shared([case.make(kernels, part) for part in parts], pool),
                    "memory": _shared([functools.partial(LOOPS[name], *part) for part in parts], pool),
                }
                if threads == 1:
                    calls["NumPy"] = _shared([case.make(reference, parts[0])], pool)
                title = f"{name}, {elements / 1e6:g} M, {'1 thread' if threads == 1 else f'{threads} threads'}"
                rows.append(_row(title, calls, repeats, "ms"))
    rows += _casts(memory, repeats)
    rows += _rows_of_a_table(max(1, min(ROWS, elements // COLUMNS // 10)), repeats)
    return rows + _tiny(repeats)


def _shared(calls: Sequence[Call], pool: ThreadPoolExecutor) -> Callable[[], float]:
    """Milliseconds for all of them, a thread for each."""

    def once() -> float:
        start = time.perf_counter()
        if len(calls) == 1:
            calls[0]()
        else:
            list(pool.map(lambda call: call(), calls))
        return (time.perf_counter() - start) * 1e3

    return once


def _row(title: str, calls: dict[str, Callable[[], float]], repeats: int, unit: str) -> dict[str, Any]:
    """The kernel beside the others, measured in turn."""
    for call in calls.values():
        call()  # asks for it
    if not kernels.wait(LOAD_S):
        raise KVStoreError("the kernels are not compiled yet")
    samples: dict[str, list[float]] = {what: [] for what in calls}
    for _ in range(repeats):
        fastest = {what: min(times) for what, times in _in_turn(calls).items()}
        for what, best in fastest.items():
            samples[what].append(best)
    beside = {"NumPy": "NumPy"} if "NumPy" in calls else {}
    return row("kernels", Line(title, "kernel", "memory", beside=beside), samples, {}, unit)


def _in_turn(calls: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {what: [] for what in calls}
    for _ in range(TIMES):
        for what, call in calls.items():
            times[what].append(call())
    return times


def _casts(memory: Sequence[Array], repeats: int) -> Rows:
    rows = []
    for half in (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)):
        wide = memory[0]
        narrow = wide.astype(half)
        for name, source, target in (("from", narrow, wide), ("to", wide, narrow)):
            as_many = [
                part.view(np.float32)[: narrow.nbytes // 8 * 2] for part in (narrow, memory[1][: wide.size // 2])
            ]
            calls = {
                "kernel": _timed(lambda s=source, t=target: kernels.cast(s, t)),  # type: ignore[misc]
                "memory": _timed(lambda a=as_many, w=memory[2]: (_copy(*a), _copy(a[1], w[: a[1].size]))),  # type: ignore[misc]
                "NumPy": _timed(lambda s=source, t=target: reference.cast(s, t)),  # type: ignore[misc]
            }
            rows.append(_row(f"cast {name} {half.name}, {wide.size / 1e6:g} M", calls, repeats, "ms"))
    return rows


def _rows_of_a_table(count: int, repeats: int) -> Rows:
    rng = np.random.default_rng(0)
    table = np.zeros((10 * count, COLUMNS), np.float32)
    ids = rng.integers(0, len(table), count)
    some, out = np.ones((count, COLUMNS), np.float32), np.empty((count, COLUMNS), np.float32)
    rows = []
    for name, work, touch in (
        ("gather", lambda form: form.gather(table, ids, out), lambda: _copy(some.reshape(-1), out.reshape(-1))),
        (
            "scatter-add",
            lambda form: form.scatter_add(table, ids, some),
            lambda: _add(some.reshape(-1), out.reshape(-1)),
        ),
    ):
        calls = {
            "kernel": _timed(lambda work=work: work(kernels)),  # type: ignore[misc]
            "memory": _timed(touch),
            "NumPy": _timed(lambda work=work: work(reference)),  # type: ignore[misc]
        }
        rows.append(_row(f"{name} {count:,} rows of {COLUMNS} in any order", calls, repeats, "ms"))
    return rows


def _tiny(repeats: int) -> Rows:
    """Microseconds per call on next to nothing."""
    arrays = [np.ones(TINY_ELEMENTS, np.float32) for _ in range(6)]
    rows = []
    for name, make in {**{name: case.make for name, case in KERNEL_CASES.items()}, **_others(arrays)}.items():
        for array in arrays:
            array.fill(1)  # no numbers that take the processor longer
        calls = {
            "kernel": _per_call(make(kernels, arrays)),
            "memory": _per_call(lambda: np.add(arrays[0], arrays[1], out=arrays[5])),
            "NumPy": _per_call(make(reference, arrays)),
        }
        made = _row(f"{name}, {TINY_ELEMENTS} elements", calls, repeats, "us")
        rows.append(made | {"limit_name": "one np.add"})
    return rows


def _others(arrays: Sequence[Array]) -> dict[str, Callable[[Any, Sequence[Array]], Call]]:
    """Kernels that are measured on little only."""
    half, table = arrays[0].astype(np.float16), np.ones((100, 16), np.float32)
    ids, some = np.array([3, 5, 3, 7]), arrays[0].reshape(4, 16)
    pair, out, others, gradient = arrays[:2], arrays[2], arrays[3:4], arrays[:1]
    return {
        "merge of 2": lambda form, _: lambda: form.merge(pair, out),
        "merge of 2 to 2": lambda form, _: lambda: form.allreduce(pair, out, others),
        "norm": lambda form, _: lambda: form.norm(gradient),
        "LARS": update("lars", 1, 1, 0, 1e-6, 1e-3, 1e-8, 0.0, 0.9).make,
        "LAMB": update("lamb", 1, 2, 0, 1e-6, 0.1, 0.3, 0.9, 0.999, 1e-6, 0.01).make,
        "cast to float16": lambda form, _: lambda: form.cast(out, half),
        "cast from float16": lambda form, _: lambda: form.cast(half, out),
        "broadcast to 2": lambda form, _: lambda: form.broadcast(out, arrays[3:5]),
        "gather": lambda form, _: lambda: form.gather(table, ids, some),
        "scatter-add": lambda form, _: lambda: form.scatter_add(table, ids, some),
        "deduplicate": lambda form, _: lambda: form.deduplicate(ids, some),
    }


def _timed(work: Callable[[], Any]) -> Callable[[], float]:
    def once() -> float:
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) * 1e3

    return once


def _per_call(work: Call) -> Callable[[], float]:
    """Microseconds of one of some calls, of so few that another process seldom gets in between."""

    def some() -> float:
        fastest = math.inf
        for _ in range(TINY_TIMES):
            start = time.perf_counter()
            for _ in range(TINY_CALLS):
                work()
            fastest = min(fastest, time.perf_counter() - start)
        return fastest / TINY_CALLS * 1e6

    return some
