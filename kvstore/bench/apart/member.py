"""One worker process of a system under measurement: does what the driver tells it, and times it.

The driver and its members exchange JSON lines over a Unix socket. A request is an object with ``do``; the
answer has ``error`` when it failed. The same file serves kvstore, MXNet and gloo, so that all of them are
started, synchronised and timed by the same code.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

BARRIER_BYTES = 4096
LEAD_NS = 500_000  # from the moment all are there to the start, so that all have noticed
DEADLINE_S = 240.0
POLL_S = 50e-6


class Round(NamedTuple):
    """One case, ready to run."""

    fill: Callable[[], object]  # writes the gradients; not timed
    once: Callable[[], object]  # the timed round
    check: Callable[[], object]  # raises when the last round's result is wrong


class Barrier:
    """Lets processes start at the same moment, through a shared page: nobody is woken late by another.

    Slots: 0 the start time in ns, 1 the round it is for, 2 + rank the round that rank has arrived for.
    """

    def __init__(self, path: str, rank: int, workers: int) -> None:
        with open(path, "r+b") as file:
            self._slots = memoryview(mmap.mmap(file.fileno(), BARRIER_BYTES)).cast("q")
        self._rank = rank
        self._workers = workers
        self._round = 0
        self._spin = workers <= (os.cpu_count() or 1)

    def wait(self) -> None:
        """Return when all have called it.

        Raises:
            TimeoutError: somebody did not.
        """
        self._round += 1
        slots, now = self._slots, self._round
        slots[2 + self._rank] = now
        if self._rank == 0:
            self._until(lambda: all(slots[2 + rank] >= now for rank in range(self._workers)))
            slots[0] = time.perf_counter_ns() + LEAD_NS
            slots[1] = now
        else:
            self._until(lambda: slots[1] >= now)
        if self._spin:
            while time.perf_counter_ns() < slots[0]:
                pass
        else:
            time.sleep(max(0, slots[0] - time.perf_counter_ns()) / 1e9)

    @staticmethod
    def _until(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + DEADLINE_S
        pause = POLL_S
        while not condition():
            if time.monotonic() > end:
                raise TimeoutError("not all workers came to the start of a round")
            time.sleep(pause)
            pause = min(4 * POLL_S, pause * 1.1)


class Member:
    """A worker's connection to the driver."""

    def __init__(self, control: str, barrier: str, rank: int, workers: int) -> None:
        self.rank = rank
        self.workers = workers
        self._barrier = Barrier(barrier, rank, workers)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(control)
        self._cases: dict[str, Round] = {}

    def serve(self, make: Callable[[dict[str, Any]], Round], **hello: Any) -> None:
        """Answer requests until ``quit``; ``make`` gets a case ready."""
        with self._socket, self._socket.makefile("rw") as stream:

            def say(answer: dict[str, Any]) -> None:
                stream.write(json.dumps(answer) + "\n")
                stream.flush()

            say({"rank": self.rank, "pid": os.getpid(), **hello})
            for line in stream:
                request = json.loads(line)
                try:
                    answer = self._do(make, request)
                except Exception as error:
                    answer = {"error": f"{type(error).__name__}: {error}"}
                say(answer)
                if request["do"] == "quit":
                    return

    def _do(self, make: Callable[[dict[str, Any]], Round], request: dict[str, Any]) -> dict[str, Any]:
        name = request.get("name", "")
        if request["do"] == "prepare":
            self._cases[name] = make(request["case"])
        elif request["do"] == "rounds":
            with spinning() if request["spinning"] else contextlib.nullcontext():
                return self._time(self._cases[name], request["count"])
        elif request["do"] == "check":
            self._cases[name].check()
        elif request["do"] == "drop":
            self._cases.pop(name, None)
        elif request["do"] != "quit":
            raise ValueError(f"unknown request {request['do']!r}")
        return {}

    def _time(self, case: Round, count: int) -> dict[str, Any]:
        times = []
        cpu = 0.0
        for _ in range(count):
            case.fill()
            self._barrier.wait()
            cpu -= time.process_time()
            start = time.perf_counter()
            case.once()
            times.append(time.perf_counter() - start)
            cpu += time.process_time()
        return {"times": times, "cpu_s": cpu}


@contextlib.contextmanager
def spinning() -> Iterator[None]:
    """Another thread of the caller is busy with pure Python meanwhile."""
    stop: list[int] = []

    def spin() -> None:
        while not stop:
            pass

    thread = threading.Thread(target=spin, name="bench-spinning")
    thread.start()
    try:
        yield
    finally:
        stop.append(1)
        thread.join()
