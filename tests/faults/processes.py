"""Workers, servers and a scheduler as real processes, which a test kills, stops and lets go on."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LIMIT_S = 60.0
KVSTORE = [sys.executable, "-m", "kvstore"]

PROGRAM = """
import sys, time
import numpy as np
import kvstore

def say(*words):
    print(*words, flush=True)

def told():
    return sys.stdin.readline().strip()

{body}
"""


@dataclass(eq=False)
class Process:
    """A child whose lines are read one by one."""

    name: str
    popen: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)  # read so far
    _came: list[str] = field(default_factory=list)
    _news: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            with self._news:
                self._came.append(line.rstrip())
                self._news.notify_all()

    def line(self, begins: str, timeout_s: float = LIMIT_S) -> str:
        """The next line that begins so; those before it are skipped."""
        end = time.monotonic() + timeout_s
        with self._news:
            while True:
                while self._came:
                    self.lines.append(self._came.pop(0))
                    if self.lines[-1].startswith(begins):
                        return self.lines[-1]
                left = end - time.monotonic()
                if left <= 0 or (self.popen.poll() is not None and not self._news.wait(1.0) and not self._came):
                    raise AssertionError(f"{self.name}: no line {begins!r} came, but {self.lines}")
                self._news.wait(min(left, 0.5))

    def tell(self, text: str = "") -> None:
        """A line that it waits for."""
        assert self.popen.stdin is not None
        self.popen.stdin.write(text + "\n")
        self.popen.stdin.flush()

    def signal(self, number: int) -> None:
        self.popen.send_signal(number)

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait(LIMIT_S)

    def ends_within(self, timeout_s: float) -> bool:
        """Does it end in that time?"""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(timeout_s)
        return self.popen.poll() is not None

    def ends(self, timeout_s: float = LIMIT_S) -> int:
        """Its exit code."""
        return self.popen.wait(timeout_s)


class Processes:
    """A cluster; everything is killed at the end."""

    def __init__(self, workers: int, servers: int, folder: Path, *options: str, **around: str) -> None:
        """``options``: of the scheduler's command."""
        self.around = {**os.environ, "PYTHONUNBUFFERED": "1", **around}
        self.children: list[Process] = []
        self.servers: dict[int, Process] = {}
        self._sizes = ["-w", str(workers), "-s", str(servers), "--journal", str(folder / "journal"), *options]
        self.address = "tcp://127.0.0.1:*"
        self.scheduler = self.start_scheduler()
        for number in range(servers):
            self.server(number)

    def start_scheduler(self) -> Process:
        """The first one, or another in its place."""
        command = [*KVSTORE, "scheduler", "--bind", self.address, *self._sizes]
        self.scheduler = self._start("scheduler", command)
        self.address = self.scheduler.line("scheduler at ").removeprefix("scheduler at ")
        return self.scheduler

    def server(self, number: int) -> Process:
        """A server of this number, perhaps in the place of one that is gone."""
        says = {"KVSTORE_ROLE": "server", "KVSTORE_RANK": str(number)}
        one = self._start(f"server {number}", [*KVSTORE, "server", "--address", self.address], says)
        self.servers[number] = one
        return one

    def worker(self, body: str, rank: int | None = None, **around: str) -> Process:
        """A process that runs ``body``, where ``kvstore.create("dist")`` finds the cluster."""
        says: dict[str, Any] = {"KVSTORE_ADDRESS": self.address, **around}
        if rank is not None:
            says["KVSTORE_RANK"] = str(rank)
        return self._start(f"worker {rank}", [sys.executable, "-c", PROGRAM.format(body=body)], says)

    def _start(self, name: str, command: list[str], around: dict[str, str] | None = None) -> Process:
        popen = subprocess.Popen(
            command,
            env={**self.around, **(around or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        child = Process(name, popen)
        self.children.append(child)
        return child

    def stop(self) -> None:
        for child in self.children:
            with contextlib.suppress(ProcessLookupError):
                child.signal(signal.SIGKILL)
            child.popen.wait(LIMIT_S)
            for pipe in (child.popen.stdin, child.popen.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()


@contextlib.contextmanager
def processes(workers: int = 2, servers: int = 1, replication: int = 0, **around: str) -> Iterator[Processes]:
    """A cluster of real processes, with its journal in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--replication", str(replication)] if replication else []
        running = Processes(workers, servers, Path(folder), *options, **around)
        try:
            yield running
        finally:
            running.stop()
