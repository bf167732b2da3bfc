"""The threaded engine: pools of threads, one per lane, start the ready ops by priority, then age.

A pool has few threads and wakes one only when there is work that no awake thread will take. A thread
that waits inside an op lends its place: a spare thread may start meanwhile.
"""

from __future__ import annotations

import heapq
import os
import threading

from engine.base import Engine
from engine.scheduler import READY, RUNNING, Op

IDLE_S = 30.0  # a thread with nothing to do for so long ends


class _Lane:
    """One pool. Everything under the engine's lock."""

    def __init__(self, engine: ThreadedEngine, name: str, size: int) -> None:
        self.name = name
        self.size = size  # threads allowed; grows while some wait inside an op
        self.alive = 0
        self.asleep = 0
        self.heap: list[Op] = []
        self.wake = threading.Condition(engine._lock)

    def __repr__(self) -> str:
        return f"<_Lane {self.name}: {self.alive} threads, {self.asleep} asleep, {len(self.heap)} ready>"


class ThreadedEngine(Engine):
    """Runs ops on threads.

    Args:
        threads: per lane; None is the number of CPUs.
    """

    def __init__(self, threads: int | None = None) -> None:
        super().__init__()
        self._size = threads or os.cpu_count() or 1
        self._lanes: dict[str, _Lane] = {}
        self._local = threading.local()
        self._retiring = False

    def _dispatch(self, op: Op) -> None:
        lane = self._lanes.get(op.lane)
        if lane is None:
            lane = self._lanes[op.lane] = _Lane(self, op.lane, self._size)
        heapq.heappush(lane.heap, op)
        self._retiring = False
        if lane.asleep:
            if lane.alive - lane.asleep < len(lane.heap):
                lane.wake.notify()
        elif lane.alive < lane.size:
            lane.alive += 1
            number = lane.alive
            threading.Thread(target=self._work, args=(lane,), name=f"engine-{lane.name}-{number}", daemon=True).start()

    def _work(self, lane: _Lane) -> None:
        self._local.lane = lane
        while True:
            with self._lock:
                op = self._next(lane)
                if op is None:
                    lane.alive -= 1
                    return
            self._run(op)
            del op

    def _next(self, lane: _Lane) -> Op | None:
        while True:
            if lane.alive > lane.size:
                return None
            while lane.heap:
                op = heapq.heappop(lane.heap)
                if op.state == READY:
                    op.state = RUNNING
                    return op
            if self._retiring or self._closed:
                return None
            lane.asleep += 1
            woken = lane.wake.wait(IDLE_S)
            lane.asleep -= 1
            if not woken and not lane.heap:
                return None

    def _lend(self) -> None:
        lane: _Lane | None = getattr(self._local, "lane", None)
        if lane is not None:
            with self._lock:
                lane.size += 1
                if lane.heap and not lane.asleep:
                    self._dispatch(heapq.heappop(lane.heap))

    def _take_back(self) -> None:
        lane: _Lane | None = getattr(self._local, "lane", None)
        if lane is not None:
            with self._lock:
                lane.size -= 1
                lane.wake.notify()

    def _retire(self) -> None:
        with self._lock:
            self._retiring = True
            for lane in self._lanes.values():
                lane.wake.notify_all()
