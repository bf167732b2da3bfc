"""A set of child processes that live and die together.

Each child leads a process group of its own, so that its grandchildren can be ended with it, and
asks the kernel to be ended when this process dies, however it dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO

_PR_SET_PDEATHSIG = 1


@dataclass(eq=False)
class Child:
    """One process and the threads that copy its output."""

    name: str
    process: subprocess.Popen[bytes]
    copiers: list[threading.Thread] = field(default_factory=list)

    def signal(self, number: int) -> None:
        """To its whole group; nothing happens when that is gone."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)


@dataclass(frozen=True)
class Ended:
    """A child has ended with this code (negative: by that signal)."""

    child: Child
    code: int


class Supervisor:
    """Starts children, copies their output whole line by whole line, and stops them."""

    def __init__(self, log: IO[str] | None = None) -> None:
        """``log``: where the children's output goes instead of stdout and stderr."""
        self.children: list[Child] = []
        self._log = log
        self.events: queue.Queue[Ended | int] = queue.Queue()  # what happened: an end, or a signal's number
        self._print = threading.Lock()

    def start(
        self, name: str, command: Sequence[str], environ: Mapping[str, str], first_line: queue.Queue[str] | None = None
    ) -> Child:
        """Start a child; its first line of stdout also goes to ``first_line``.

        Raises:
            OSError: it could not be started.
        """
        process = subprocess.Popen(
            command,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
        child = Child(name, process)
        self.children.append(child)
        assert process.stdout is not None and process.stderr is not None
        for source, target, tap in (
            (process.stdout, self._log or sys.stdout, first_line),
            (process.stderr, self._log or sys.stderr, None),
        ):
            copier = threading.Thread(target=self._copy, args=(name, source, target, tap), daemon=True)
            child.copiers.append(copier)
            copier.start()
        threading.Thread(target=self._await, args=(child,), daemon=True).start()
        return child

    def _copy(self, name: str, source: IO[bytes], target: IO[str], tap: queue.Queue[str] | None) -> None:
        with source:
            for line in source:
                text = line.decode(errors="replace").rstrip("\r\n")
                if tap is not None:
                    tap.put(text)
                    tap = None
                with self._print, contextlib.suppress(OSError, ValueError):
                    target.write(f"{name} | {text}\n")
                    target.flush()
        if tap is not None:
            tap.put("")

    def _await(self, child: Child) -> None:
        code = child.process.wait()
        self.events.put(Ended(child, code))

    def stop(self, children: Sequence[Child], grace_s: float, first: int = signal.SIGTERM) -> None:
        """End ``children``: ``first``, then after ``grace_s`` seconds SIGKILL; returns when they are gone."""
        for child in children:
            if child.process.poll() is None:
                child.signal(first)
        end = time.monotonic() + grace_s
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(max(0.0, end - time.monotonic()))
        for child in children:
            child.signal(signal.SIGKILL)  # also what it may have left behind
            child.process.wait()
            for copier in child.copiers:
                copier.join(5)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
