"""The serial engine: every op runs at its push, in the thread that pushes. The oracle of the others."""

from __future__ import annotations

import threading
from collections import deque

from engine.base import Engine
from engine.scheduler import Op


class SerialEngine(Engine):
    """Runs ops in program order; one behind an asynchronous op runs when that is complete. It waits for devices."""

    _watches_devices = False

    def __init__(self) -> None:
        super().__init__()
        self._ready: deque[Op] = deque()
        self._draining = threading.local()

    def _dispatch(self, op: Op) -> None:
        self._ready.append(op)

    def _submitted(self) -> None:
        self._drain()

    def _finish(self, op: Op, result: object, error: BaseException | None) -> None:
        super()._finish(op, result, error)
        self._landed()

    def _landed(self) -> None:
        if not getattr(self._draining, "depth", 0):  # else the loop below comes to them, without recursion
            self._drain()

    def _drain(self) -> None:
        depth = getattr(self._draining, "depth", 0)
        self._draining.depth = depth + 1
        try:
            while True:
                with self._lock:
                    op = self._ready.popleft() if self._ready else None
                    mine = op is not None and self._claim(op)
                if op is None:
                    return
                if mine:
                    self._run(op)
        finally:
            self._draining.depth = depth
