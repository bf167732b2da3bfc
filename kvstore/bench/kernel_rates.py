"""How near the kernels come to the machine's memory: each beside loops that only read and write as many arrays.

Both are measured in turn, with the same threads on the same memory. Where Numba is missing there is nothing to measure.
"""

from __future__ import annotations

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
from kvstore.bench.statistic import Rows, row
from kvstore.errors import KVStoreError
from kvstore.kernels import Change, reference

TINY_ELEMENTS = 64
TINY_CALLS = 20_000
ROWS, COLUMNS = 100_000, 64  # gathered from and added to ten times as many
TIMES = 5  # of a repeat; the fastest counts: whoever else uses the machine only takes
LOAD_S = 120.0

Work = Callable[[Sequence[Array]], Any]  # on the same part of each array
loops = njit(nogil=True, error_model="numpy")


# --- what memory can do -------------------------------------------------------------------------


@loops
def _copy(source: Any, target: Any) -> None:
    """1 read, 1 written."""
    for i in range(source.size):
        target[i] = source[i]


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

SGD = (1e-3, 0.0, 0.9, 1.0, 0.0, 0.0)
ADAM = (1e-4, 0.9, 0.9, 0.999, 1e-8, 0.0, 1.0)


def _cases(form: Any) -> dict[str, tuple[int, Any, Work]]:
    """By name: how many float32 arrays are used, the loops that touch as many, the kernel by ``form``."""

    def sgd(a: Sequence[Array]) -> None:
        form.sgd(Change(a[1], a[1], a[:1]), (a[2],), *SGD)

    def sgd_of_four(a: Sequence[Array]) -> None:
        form.sgd(Change(a[4], a[4], a[:4]), (a[5],), *SGD)

    def adam(a: Sequence[Array]) -> None:
        form.adam(Change(a[1], a[1], a[:1]), (a[2], a[3], None), *ADAM)

    return {
        "merge of 4": (5, _sum, lambda a: form.merge(a[:4], a[4])),
        "SGD": (2, _add, lambda a: form.sgd(Change(a[1], a[1], a[:1]), (None,), *SGD)),
        "SGD momentum": (3, _add_twice, sgd),
        "merge of 4 + SGD momentum": (6, _sum_and_add, sgd_of_four),
        "Adam": (4, _add_thrice, adam),
        "Adagrad": (3, _add_twice, lambda a: form.adagrad(Change(a[1], a[1], a[:1]), (a[2],), 1e-3, 1e-8, 0.0)),
        "RMSProp": (3, _add_twice, lambda a: form.rmsprop(
            Change(a[1], a[1], a[:1]), (a[2], None, None), 1e-3, 0.99, 1e-8, 0.0, 0.0)),
        "Adadelta": (4, _add_thrice, lambda a: form.adadelta(
            Change(a[1], a[1], a[:1]), (a[2], a[3]), 1.0, 0.9, 1e-6, 0.0)),
        "FTRL": (4, _add_thrice, lambda a: form.ftrl(Change(a[1], a[1], a[:1]), (a[2], a[3]), 0.1, 1.0, 0.01, 0.0)),
    }  # fmt: skip


def measure(elements: int, repeats: int) -> Rows:
    """One row per kernel and number of threads."""
    fast, plain = _cases(kernels), _cases(reference)
    rng = np.random.default_rng(0)
    memory = [
        np.abs(rng.standard_normal(elements, np.float32)) for _ in range(max(count for count, _, _ in fast.values()))
    ]
    rows: Rows = []
    with ThreadPoolExecutor(2, "bench-kernels") as pool:
        for name, (count, touch, work) in fast.items():
            arrays = memory[:count]
            for threads in (1, 2):
                works: dict[str, Work] = {"kernel": work, "memory": lambda parts, touch=touch: touch(*parts)}  # type: ignore[misc]
                if threads == 1:
                    works["NumPy"] = plain[name][2]
                calls = {what: _shared(one, arrays, threads, pool) for what, one in works.items()}
                title = f"{name}, {elements / 1e6:g} M, {'1 thread' if threads == 1 else f'{threads} threads'}"
                rows.append(_row(title, calls, repeats, "ms"))
    rows += _casts(memory, repeats)
    rows += _rows_of_a_table(max(1, min(ROWS, elements // COLUMNS // 10)), repeats)
    return rows + _tiny(repeats)


def _shared(work: Work, arrays: Sequence[Array], threads: int, pool: ThreadPoolExecutor) -> Callable[[], float]:
    """Milliseconds for all of the arrays, a part for each thread."""
    parts = list(zip(*(np.array_split(array, threads) for array in arrays), strict=True))

    def once() -> float:
        start = time.perf_counter()
        if threads == 1:
            work(parts[0])
        else:
            list(pool.map(work, parts))
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
    rows, plain = [], _cases(reference)
    for name, (_, _, work) in _cases(kernels).items():
        calls = {
            "kernel": _per_call(lambda work=work: work(arrays)),  # type: ignore[misc]
            "memory": _per_call(lambda: np.add(arrays[0], arrays[1], out=arrays[5])),
            "NumPy": _per_call(lambda work=plain[name][2]: work(arrays)),  # type: ignore[misc]
        }
        made = _row(f"{name}, {TINY_ELEMENTS} elements", calls, repeats, "us")
        rows.append(made | {"limit_name": "one np.add"})
    return rows


def _timed(work: Callable[[], Any]) -> Callable[[], float]:
    def once() -> float:
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) * 1e3

    return once


def _per_call(work: Callable[[], Any]) -> Callable[[], float]:
    calls = TINY_CALLS // TIMES

    def some() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            work()
        return (time.perf_counter() - start) / calls * 1e6

    return some
