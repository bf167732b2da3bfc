"""A record of what ran when, in the form that chrome://tracing and Perfetto read."""

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
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<Trace: {len(self._events)} events>"

    def add(self, op: Op, ended_at: float) -> None:
        """Record an op that has ended (seconds of ``time.perf_counter``)."""
        event = {
            "name": op.name,
            "cat": op.lane,
            "ph": "X",
            "ts": op.started_at * 1e6,
            "dur": (ended_at - op.started_at) * 1e6,
            "pid": os.getpid(),
            "tid": op.thread,
            "args": {**(op.info or {}), "site": op.site, "priority": op.priority},
        }
        with self._lock:
            self._events.append(event)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the events as JSON."""
        with self._lock, open(path, "w") as file:
            json.dump({"traceEvents": self._events, "displayTimeUnit": "ms"}, file, default=str)
