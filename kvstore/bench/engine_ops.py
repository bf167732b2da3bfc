"""What an engine op costs, pattern by pattern, each beside a limit, and beside MXNet's engine where that is."""

from __future__ import annotations

import functools
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

import engine
from kvstore.bench.cases import Line
from kvstore.bench.statistic import Rows, row
from kvstore.errors import KVStoreError

TINY_OPS = 20_000
SMALL_OPS = 10_000
WAITS = 2_000
DEVICE_OPS = 5_000
BULK = 50
READERS = 8
ARRAYS = 16
SMALL_ELEMENTS = 1 << 13  # float64: 64 KB
LARGE_ELEMENTS = 1 << 19  # float64: 4 MB
LARGE_OPS = 32
WAIT_S = 60.0

Work = Callable[[], Any]
Array = np.ndarray[Any, Any]


def measure(repeats: int, mxnet: MXNetEngine | None) -> Rows:
    """One row per pattern, microseconds per op, with MXNet's figures for the tiny ones.

    Ops are pushed from one thread, which then waits for all of them; the engine has two threads
    unless the case says otherwise.
    """
    rows = []
    for case, run, limit, limit_name in (
        ("chain", _chain, _call_us, "a Python call"),
        ("independent", _independent, _call_us, "a Python call"),
        ("1 writer, 8 readers", _fan, _call_us, "a Python call"),
        ("bulk of 50", _bulk, _call_us, "a Python call"),
        ("op and wait", _op_and_wait, _round_trip_us, "a round trip"),
    ):
        theirs = {} if mxnet is None else {"MXNet": functools.partial(mxnet.us, case)}
        rows.append(_measure(case, run, 2, repeats, limit, limit_name, theirs))
    for case, run in (("device op, chain", _device_chain), ("device op, independent", _device_independent)):
        rows.append(_measure(case, run, 2, repeats, _call_us, "a Python call", {}))
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
            run = functools.partial(_calls, works, writes, ops)
            alone = functools.partial(_plain_us, works, ops, threads)
            what = "1 thread" if threads == 1 else f"{threads} threads"
            rows.append(_measure(f"{case}, {what}", run, threads, repeats, alone, "the calls alone", {}))
    return rows


def _measure(
    case: str,
    run: Callable[[engine.Engine], int],
    threads: int,
    repeats: int,
    limit: Callable[[], float],
    limit_name: str,
    others: Mapping[str, Callable[[], float]],
) -> dict[str, Any]:
    """A row; ``run`` pushes, waits and says how many ops there were."""
    runtime = engine.create("threaded", threads=threads)
    samples: dict[str, list[float]] = {}
    try:
        run(runtime)  # starts the threads
        for _ in range(repeats):
            start = time.perf_counter()
            ops = run(runtime)
            samples.setdefault("engine", []).append((time.perf_counter() - start) / ops * 1e6)
            samples.setdefault("limit", []).append(limit())
            for name, other in others.items():
                samples.setdefault(name, []).append(other())
    finally:
        runtime.close()
    line = Line(case, "engine", "limit", limit_name, beside={name: name for name in others})
    return row("engine", line, samples, {}, unit="us/op")


class MXNetEngine:
    """MXNet's engine in a process of its own, used as its users do: by imperative operators on arrays of one element.

    Raises:
        KVStoreError: it did not come up.
    """

    def __init__(self, python: str, script: Path) -> None:
        self._process = subprocess.Popen(
            [python, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.version = self._answer()

    def __enter__(self) -> MXNetEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def us(self, case: str) -> float:
        """Microseconds per operator of one such pattern."""
        assert self._process.stdin is not None
        self._process.stdin.write(case + "\n")
        self._process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            raise KVStoreError("MXNet's engine: expected an answer, its process has ended")
        return line


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


def _device_chain(runtime: engine.Engine) -> int:
    return _on_devices(runtime, 1)


def _device_independent(runtime: engine.Engine) -> int:
    return _on_devices(runtime, ARRAYS)


def _on_devices(runtime: engine.Engine, arrays: int) -> int:
    """Ops that change one array each, on devices that cost nothing: what is left is the engine's own part."""
    runtime.use(NOTHING)
    items = [[_OnDevice(number)] for number in range(arrays)]
    for number in range(DEVICE_OPS):
        changed = items[number % arrays]
        runtime.push(_nothing, changed, changed)
    runtime.wait_all(WAIT_S)
    return DEVICE_OPS


class _OnDevice:
    """An array of a device that does not exist."""

    def __init__(self, number: int) -> None:
        self.range = number << 12, (number + 1) << 12


class _Nothing:
    """One device, whose streams do nothing and are done with it at once; see :class:`engine.Devices`."""

    def device_of(self, array: Any) -> int | None:
        return 0 if type(array) is _OnDevice else None

    def range_of(self, array: Any) -> tuple[int, int]:
        low, high = array.range
        return low, high

    def owner_of(self, array: Any) -> Any:
        return array

    def stream(self, device: int) -> Any:
        return object()

    def current(self, device: int) -> Any:
        return self

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        return NO_BLOCK

    def record(self, stream: Any, timed: bool = False) -> Any:
        return self

    def wait(self, stream: Any, event: Any) -> None:
        pass

    def done(self, event: Any) -> bool:
        return True

    def synchronise(self, event: Any) -> None:
        pass

    def elapsed_ms(self, first: Any, second: Any) -> float:
        return 0.0


NOTHING = _Nothing()
NO_BLOCK = nullcontext()


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
