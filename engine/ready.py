"""The ops that are ready and wait for a thread, in the order in which they are to start."""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush

from engine.scheduler import READY, Op


class Ready:
    """A larger priority comes first, then the older op. Not thread-safe.

    As a rule an op that becomes ready comes after all that are: so there is a line, and a heap for the others.
    Ops that have been started elsewhere, by a thread that waits for them, are passed over.
    """

    __slots__ = ("_heap", "_line", "count")

    def __init__(self) -> None:
        self.count = 0  # with those started elsewhere that have not been met yet
        self._line: deque[Op] = deque()
        self._heap: list[tuple[int, int, Op]] = []

    def __repr__(self) -> str:
        return f"<Ready: {self.count} ops>"

    def add(self, op: Op) -> None:
        """Take in an op."""
        self.count += 1
        line = self._line
        if line:
            last = line[-1]
            if op.priority > last.priority or (op.priority == last.priority and op.sequence < last.sequence):
                heappush(self._heap, (-op.priority, op.sequence, op))
                return
        line.append(op)

    def take(self) -> Op | None:
        """The first of them; None: there is none."""
        line, heap = self._line, self._heap
        while self.count:
            self.count -= 1
            if not heap or (line and (-line[0].priority, line[0].sequence) < heap[0]):
                op = line.popleft()
            else:
                op = heappop(heap)[2]
            if op.state == READY:
                return op
        return None

    def started(self) -> None:
        """One of them has been started elsewhere: forget those in front that have."""
        line, heap = self._line, self._heap
        while line and line[0].state != READY:
            line.popleft()
        while heap and heap[0][2].state != READY:
            heappop(heap)
        self.count = len(line) + len(heap)
