"""The deadlines of ops, watched by one thread that lives only while there are any."""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable

from engine.scheduler import DONE, Op


class Deadlines:
    """Calls ``expire(op)`` for each op that is not done by its time."""

    def __init__(self, expire: Callable[[Op], None]) -> None:
        self._expire = expire
        self._heap: list[tuple[float, int, Op]] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def add(self, at: float, op: Op) -> None:
        """Watch ``op`` until ``at`` (monotonic seconds)."""
        with self._changed:
            heapq.heappush(self._heap, (at, op.sequence, op))
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="engine-deadlines", daemon=True)
                self._thread.start()
            self._changed.notify()

    def _watch(self) -> None:
        while True:
            with self._changed:
                while self._heap and self._heap[0][2].state == DONE:
                    heapq.heappop(self._heap)
                if not self._heap:
                    self._thread = None
                    return
                left = self._heap[0][0] - time.monotonic()
                if left > 0:
                    self._changed.wait(min(left, 0.5))
                    continue
                op = heapq.heappop(self._heap)[2]
            self._expire(op)
