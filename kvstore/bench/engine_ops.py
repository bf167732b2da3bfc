"""What an engine op costs, pattern by pattern, each beside a limit measured in the same run.

``python -m kvstore.bench.engine_ops`` prints the table.
"""

from __future__ import annotations

import functools
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import engine

TINY_OPS = 20_000
SMALL_OPS = 10_000
WAITS = 2_000
BULK = 50
READERS = 8
ARRAYS = 16
SMALL_ELEMENTS = 1 << 13  # float64: 64 KB
LARGE_ELEMENTS = 1 << 19  # float64: 4 MB
LARGE_OPS = 32
WAIT_S = 60.0

Row = dict[str, Any]
Work = Callable[[], Any]
Array = np.ndarray[Any, Any]


def measure(repeats: int = 5) -> list[Row]:
    """One row per pattern: case, unit, median, low, high, limit and limit_name.

    Ops are pushed from one thread, which then waits for all of them; the engine has two threads
    unless the case says otherwise.
    """
    call = _call_us()
    round_trip = _round_trip_us()
    rows: list[Row] = []
    for case, run in (
        ("chain", _chain),
        ("independent", _independent),
        ("1 writer, 8 readers", _fan),
        ("bulk of 50", _bulk),
    ):
        rows.append(_row(case, "us/op", _times(run, 2, repeats), call, "a Python call"))
    rows.append(_row("op and wait", "us/op", _times(_op_and_wait, 2, repeats), round_trip, "a round trip"))
    small, large = _arrays(SMALL_ELEMENTS), _arrays(LARGE_ELEMENTS)
    chains = [[engine.Var()] for _ in range(ARRAYS)]
    none: list[list[engine.Var]] = [[] for _ in range(ARRAYS)]
    for case, function, arrays, writes, ops in (
        ("64 KB independent", np.negative, small, none, SMALL_OPS),
        ("64 KB in chains", np.negative, small, chains, SMALL_OPS),
        ("4 MB tanh", np.tanh, large, none, LARGE_OPS),
    ):
        works: list[Work] = [functools.partial(function, array, out=array) for array in arrays]
        for threads in (1, 2):
            limit = min(_plain_us(works, ops, threads) for _ in range(repeats))
            times = _times(functools.partial(_calls, works, writes, ops), threads, repeats)
            what = "1 thread" if threads == 1 else f"{threads} threads"
            rows.append(_row(f"{case}, {what}", "us/op", times, limit, "the calls alone"))
    return rows


def _row(case: str, unit: str, values: list[float], limit: float, limit_name: str) -> Row:
    return {
        "case": case,
        "unit": unit,
        "median": statistics.median(values),
        "low": min(values),
        "high": max(values),
        "limit": limit,
        "limit_name": limit_name,
    }


def _times(run: Callable[[engine.Engine], int], threads: int, repeats: int) -> list[float]:
    """Microseconds per op; ``run`` pushes, waits and says how many ops there were."""
    runtime = engine.create("threaded", threads=threads)
    run(runtime)  # starts the threads
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        ops = run(runtime)
        times.append((time.perf_counter() - start) / ops * 1e6)
    runtime.close()
    return times


# --- the patterns -----------------------------------------------------------------------------


def _nothing() -> None:
    pass


def _chain(runtime: engine.Engine) -> int:
    writes = [engine.Var()]
    for _ in range(TINY_OPS):
        runtime.push(_nothing, writes=writes)
    runtime.wait_all(WAIT_S)
    return TINY_OPS


def _independent(runtime: engine.Engine) -> int:
    for _ in range(TINY_OPS):
        runtime.push(_nothing)
    runtime.wait_all(WAIT_S)
    return TINY_OPS


def _fan(runtime: engine.Engine) -> int:
    vars_ = [engine.Var()]
    rounds = TINY_OPS // (1 + READERS)
    for _ in range(rounds):
        runtime.push(_nothing, writes=vars_)
        for _ in range(READERS):
            runtime.push(_nothing, reads=vars_)
    runtime.wait_all(WAIT_S)
    return rounds * (1 + READERS)


def _bulk(runtime: engine.Engine) -> int:
    rounds = TINY_OPS // BULK
    for _ in range(rounds):
        with runtime.bulk():
            for _ in range(BULK):
                runtime.push(_nothing)
        runtime.wait_all(WAIT_S)
    return rounds * BULK


def _op_and_wait(runtime: engine.Engine) -> int:
    for _ in range(WAITS):
        runtime.push(_nothing).result(WAIT_S)
    return WAITS


def _calls(works: list[Work], writes: list[list[engine.Var]], ops: int, runtime: engine.Engine) -> int:
    for number in range(ops):
        runtime.push(works[number % ARRAYS], writes=writes[number % ARRAYS])
    runtime.wait_all(WAIT_S)
    return ops


def _arrays(elements: int) -> list[Array]:
    return [np.full(elements, 0.5) for _ in range(ARRAYS)]


# --- the limits -------------------------------------------------------------------------------


def _call_us() -> float:
    start = time.perf_counter()
    for _ in range(TINY_OPS):
        _nothing()
    return (time.perf_counter() - start) / TINY_OPS * 1e6


def _round_trip_us() -> float:
    """Two threads that hand a turn to and fro."""
    changed = threading.Condition()
    turn = [0]

    def take(mine: int) -> None:
        for _ in range(WAITS):
            with changed:
                changed.wait_for(lambda: turn[0] == mine, WAIT_S)
                turn[0] = 1 - mine
                changed.notify()

    other = threading.Thread(target=take, args=(1,))
    other.start()
    start = time.perf_counter()
    take(0)
    elapsed = time.perf_counter() - start
    other.join()
    return elapsed / WAITS * 1e6


def _plain_us(works: list[Work], calls: int, threads: int) -> float:
    """The calls without an engine, shared out among this thread and ``threads - 1`` more."""

    def some(first: int) -> None:
        together.wait(WAIT_S)
        for number in range(first, calls, threads):
            works[number % ARRAYS]()
        together.wait(WAIT_S)

    together = threading.Barrier(threads)
    for first in range(1, threads):
        threading.Thread(target=some, args=(first,), daemon=True).start()
    start = time.perf_counter()
    some(0)
    return (time.perf_counter() - start) / calls * 1e6


def show(rows: list[Row]) -> None:
    """The rows as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="engine ops, microseconds each", box=None)
    for column in ("case", "median", "low", "high", "limit", ""):
        table.add_column(column, justify="left" if column in ("case", "") else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["case"], *(f"{row[column]:,.2f}" for column in ("median", "low", "high", "limit")), row["limit_name"]
        )
    Console().print(table)


if __name__ == "__main__":
    show(measure())
