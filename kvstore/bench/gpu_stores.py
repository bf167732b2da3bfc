"""The suite ``gpu``, what stores make of it: copies to the host, rounds of a cluster, ops of the engine.

One worker, this process, with its arrays in the memory of the current GPU, and one server beside it, a process of its
own. Times are the host's, from the call until everything is known to be done.
"""

from __future__ import annotations

import contextlib
import functools
import math
import queue
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import engine
import kvstore
from kvstore import comm, environment, kernels
from kvstore.arrays import Array, copy_to, gpu
from kvstore.bench.cases import Line, Shapes
from kvstore.bench.statistic import Rows, row
from kvstore.bench.systems import GRACE_S, START_TIMEOUT_S, BenchError
from kvstore.cli.supervisor import Supervisor
from kvstore.cluster.client import CHUNK_BYTES
from kvstore.cluster.staging import Slot

ANY_PORT = "tcp://127.0.0.1:*"
WARM_UP = 3
WAIT_S = 300.0
STAGING_WANTED, OP_WANTED_US = 0.9, 15.0

Clock = Callable[[], float]  # a figure


def measure_staging(elements: int, repeats: int) -> Rows:
    """A gradient that a GPU copies down into the memory that servers read, part by part, by ops of the engine."""
    cupy, runtime = gpu.module(), engine.create("threaded")
    runtime.use(gpu.devices())
    source, slot = cupy.ones(elements, np.float32), Slot(elements, np.dtype(np.float32), None)
    slot.pin()
    room, part = gpu.pinned(source.nbytes).view(np.float32), CHUNK_BYTES // 4

    def staged() -> None:
        parts = [slice(start, start + part) for start in range(0, elements, part)]
        with runtime.bulk():
            for some in parts:
                copy = functools.partial(comm.merge, [source[some]], slot.array[some])
                runtime.push(copy, reads=[source], writes=[engine.Var()], lane="copy")
        runtime.wait_all(WAIT_S)

    def at_once() -> None:
        copy_to(source, room)
        cupy.cuda.get_current_stream().synchronize()

    try:
        title = f"staging of {source.nbytes / 1e6:.3g} MB (at most {1 / STAGING_WANTED:.2f} x)"
        line = Line(title, "parts", "pinned copy", more={"wanted": STAGING_WANTED})
        return [_row(line, {"parts": _ms(staged), "pinned copy": _ms(at_once)}, repeats)]
    finally:
        runtime.close()


# --- rounds ---------------------------------------------------------------------------------------


def measure_rounds(models: dict[str, Shapes], repeats: int) -> Rows:
    """A model's parameters in one pushpull, beside copies of as many bytes down and up at once."""
    rows = []
    for optimizer in (None, kvstore.optim.SGD(lr=1e-3, momentum=0.9)):
        with _server() as address, kvstore.create("dist", address=address, timeout=WAIT_S) as kv:
            if optimizer is not None:
                kv.set_optimizer(optimizer)
            for model, shapes in models.items():
                rows.append(_rounds(kv, model, shapes, optimizer is not None, repeats))
    return rows


def _rounds(kv: kvstore.KVStore, model: str, shapes: Shapes, updates: bool, repeats: int) -> dict[str, Any]:
    cupy = gpu.module()
    keys = [f"{model} {number}" for number in range(len(shapes))]
    values, outs = ([cupy.ones(shape, np.float32) for shape in shapes] for _ in range(2))
    kv.init(keys, outs)
    nbytes = 4 * sum(math.prod(shape) for shape in shapes)
    title = f"pushpull of {model}, {nbytes / 1e6:.0f} MB{', SGD momentum' if updates else ''}"
    works = {"pushpull": lambda: kv.pushpull(keys, values, outs).result(), "copies down and up": _both_ways(nbytes)}
    made = _row(
        Line(title, "pushpull", "copies down and up"), {name: _ms(work) for name, work in works.items()}, repeats
    )
    if not updates and any(not bool((out == 1).all()) for out in outs):
        raise BenchError(f"{title}: wrong values")
    return made


def _both_ways(nbytes: int) -> Callable[[], None]:
    """What the bus could do: so many bytes from pinned memory up and as many down, at the same time."""
    cupy = gpu.module()
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
    there, here = cupy.empty((2, nbytes), np.uint8), [gpu.pinned(nbytes) for _ in range(2)]
    ends: list[tuple[Array, Array]] = [(there[0], here[0]), (here[1], there[1])]

    def copies() -> None:
        for stream, (source, target) in zip(streams, ends, strict=True):
            with stream:
                copy_to(source, target)
        for stream in streams:
            stream.synchronize()

    return copies


@contextlib.contextmanager
def _server() -> Iterator[str]:
    """A server that is its own scheduler, for one worker; its address."""
    command = [
        sys.executable,
        "-m",
        "kvstore",
        "server",
        "--with-scheduler",
        "--address",
        "tcp://127.0.0.1:*",
        "-w",
        "1",
    ]
    first_line: queue.Queue[str] = queue.Queue()
    with tempfile.TemporaryFile("w+") as log:
        supervisor = Supervisor(log)
        try:
            supervisor.start("server", command, environment.inherited(), first_line)
            said = first_line.get(timeout=START_TIMEOUT_S)
            if not said.startswith("scheduler at "):
                raise BenchError(f"the server did not start: {said}")
            yield said.removeprefix("scheduler at ")
        except queue.Empty:
            raise BenchError(f"the server is not up after {START_TIMEOUT_S:g} s") from None
        finally:
            supervisor.stop(supervisor.children, GRACE_S)


# --- the engine -----------------------------------------------------------------------------------


def measure_engine(ops: int, elements: int, trace: str | None, repeats: int) -> Rows:
    """What an op on an empty kernel costs the host, and whether independent ops overlap.

    Args:
        elements: of the array whose norm each of the independent ones takes: long work that fills little of a GPU.
        trace: where one run of the independent ops is recorded.
    """
    from kvstore.kernels.cuda.gpu import KERNELS

    cupy, runtime = gpu.module(), engine.create("threaded")
    runtime.use(gpu.devices())
    arrays = [cupy.empty(1, np.float32) for _ in range(ops)]
    large = cupy.ones(elements, np.float32)

    def push_all() -> None:
        for array in arrays:
            runtime.push(KERNELS.nothing, writes=[array])

    def in_bulk() -> None:
        with runtime.bulk():
            push_all()

    def bare() -> None:
        for _ in arrays:
            KERNELS.nothing()
        cupy.cuda.get_current_stream().synchronize()

    def pushed(push: Callable[[], None]) -> float:
        """Microseconds of the pushing thread, per op."""
        start = time.perf_counter()
        push()
        took = time.perf_counter() - start
        runtime.wait_all(WAIT_S)
        return took / ops * 1e6

    def overlapping() -> None:
        with runtime.bulk():
            for _ in range(ops):
                runtime.push(lambda: kernels.norm([large]), reads=[large], writes=[engine.Var()], name="norm")
        runtime.wait_all(WAIT_S)

    def one_after_the_other() -> None:
        for _ in range(ops):
            kernels.norm([large])
        cupy.cuda.get_current_stream().synchronize()

    try:
        limit: Clock = lambda: _ms(bare)() / ops * 1e3  # noqa: E731
        rows = []
        for title, push in (("op on an empty kernel", push_all), ("op on an empty kernel, in bulk", in_bulk)):
            line = Line(
                f"{title} (at most {OP_WANTED_US:g} us)", "op", "kernel alone", more={"wanted_us": OP_WANTED_US}
            )
            rows.append(_row(line, {"op": functools.partial(pushed, push), "kernel alone": limit}, repeats, "us"))
        line = Line(f"{ops} independent norms of {elements * 4 / 1e6:.3g} MB", "ops", "one after the other")
        rows.append(_row(line, {"ops": _ms(overlapping), "one after the other": _ms(one_after_the_other)}, repeats))
        if trace is not None:
            with runtime.profile(trace):
                overlapping()
        return rows
    finally:
        runtime.close()


def _row(line: Line, clocks: dict[str, Clock], repeats: int, unit: str = "ms") -> dict[str, Any]:
    """Measured in turn."""
    samples: dict[str, list[float]] = {what: [] for what in clocks}
    for clock in clocks.values():
        for _ in range(WARM_UP):
            clock()
    for _ in range(repeats):
        for what, clock in clocks.items():
            samples[what].append(clock())
    return row("gpu", line, samples, {}, unit)


def _ms(work: Callable[[], Any]) -> Clock:
    def clock() -> float:
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) * 1e3

    return clock
