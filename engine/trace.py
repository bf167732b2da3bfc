"""A record of what ran when, in the form that chrome://tracing and Perfetto read.

A row is a thread, or a stream of a device.
"""

from __future__ import annotations

import json
import os
import threading
from typing import Any

from engine.scheduler import Op


class Trace:
    """The ops that have ended since it was made. Appending is thread-safe."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._streams: dict[str, int] = {}  # their rows; identifiers of threads are far from such small numbers
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<Trace: {len(self._events)} events>"

    def add(self, op: Op, start: float, end: float, *, stream: str | None = None, what: str = "") -> None:
        """Record an op, from ``start`` to ``end`` (seconds of ``time.perf_counter``).

        Args:
            op: the op.
            start, end: of what is to be seen.
            stream: the name of the row, if it is not that of the thread that ran it.
            what: goes before the op's name.
        """
        with self._lock:
            row = op.thread if stream is None else self._streams.setdefault(stream, len(self._streams) + 1)
            self._events.append(
                {
                    "name": what + op.name,
                    "cat": op.lane,
                    "ph": "X",
                    "ts": start * 1e6,
                    "dur": (end - start) * 1e6,
                    "pid": os.getpid(),
                    "tid": row,
                    "args": {**(op.info or {}), "site": op.site, "priority": op.priority},
                }
            )

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the events as JSON."""
        with self._lock, open(path, "w") as file:
            names = [
                {"name": "thread_name", "ph": "M", "pid": os.getpid(), "tid": row, "args": {"name": name}}
                for name, row in self._streams.items()
            ]
            json.dump({"traceEvents": names + self._events, "displayTimeUnit": "ms"}, file, default=str)
