"""The threaded engine: pools of threads, one per lane, start the ready ops by priority, then age.

To hand work to another thread costs tens of microseconds, and a Python thread more only helps while
ops leave the GIL alone. So a second thread has to pay:

* A ready op wakes a thread if none of its lane is awake. Another one is woken if two of the ops that ended last,
  or the one running now, took long (``LONG_S``).
* A thread with a short op behind it goes to sleep if another has started one meanwhile: they would only
  pass the GIL to and fro.
* Nobody knows whether a running op ever ends. So while there are ready ops and threads asleep,
  a monitor looks every ``LOOK_S`` (less often, if all goes well), and wakes another if no op has been started since the
  last look.

Two threads lend a hand: one that waits for a ready op runs it itself, and one that waits for all ops
runs what is ready as if it were of the lane. A thread that waits inside an op lends
its place: a spare one may be awake meanwhile.
"""

from __future__ import annotations

import math
import os
import threading
from time import perf_counter

from engine.base import Engine
from engine.ready import Ready
from engine.scheduler import DONE, READY, RUNNING, Op

LONG_S = 100e-6  # worth a thread of its own: a hand-over and the way back
LOOK_S = 5e-3  # the GIL's switch interval: in less a runnable thread need not have come to run
LOOK_S_MAX = 20e-3  # while ops are started all the time: whoever looks takes the GIL from them
LOOKS = 4  # without a reason, then the monitor goes to sleep
RECENT = 0xFF  # eight ops
CROWD = 2  # ready ops: for the next one, nobody looks how long the running op has taken but the monitor
IDLE_S = 30.0  # a thread with nothing to do for so long ends


class _Lane:
    """One pool. Everything under the engine's lock.

    Whenever something is ready, a thread is awake, or a bulk is going on in the thread that pushed it.
    """

    def __init__(self, engine: ThreadedEngine, name: str, size: int) -> None:
        self.name = name
        self.size = size  # threads that may be awake
        self.ready = Ready()
        self.awake = 0  # and not waiting inside an op
        self.asleep = 0
        self.called = 0  # of those counted awake: have been woken and not come yet
        self.wake = engine._lock.condition()
        self.started = 0  # ops
        self.started_at = 0.0  # the last of them
        self.seen = 0  # ``started`` when the monitor last looked
        self.recent = RECENT  # of the ops that ended last, a bit each: did it take long?
        self.long = True  # did two of them?

    def __repr__(self) -> str:
        return f"<_Lane {self.name}: {self.awake} threads awake, {self.asleep} asleep, {self.ready.count} ready>"

    def took(self, long: bool) -> None:
        """An op has ended. One that took long among many that did not has waited for the GIL."""
        self.recent = recent = (self.recent << 1 | long) & RECENT
        self.long = recent & (recent - 1) != 0

    def start(self, op: Op, now: float) -> None:
        """The thread at hand is to run ``op``."""
        op.state = RUNNING
        op.started_at = self.started_at = now
        self.started += 1


class _Worker:
    """A thread's place in a lane: one of the lane's own, or one that helps before it waits."""

    __slots__ = ("lane", "number", "short", "stack")

    def __init__(self, lane: _Lane, stack: list[Op]) -> None:
        self.lane = lane
        self.stack = stack  # the ops that the thread is in
        self.short = False  # the op it ran last was
        self.number = 0  # of that op: the lane's ``started``


class _Place(threading.local):
    worker: _Worker | None = None  # what the thread at hand is to a lane, if anything


class ThreadedEngine(Engine):
    """Runs ops on threads.

    Args:
        threads: per lane; None is the number of CPUs.
    """

    def __init__(self, threads: int | None = None) -> None:
        super().__init__()
        self._size = threads or os.cpu_count() or 1
        self._lanes: dict[str, _Lane] = {}
        self._place = _Place()
        self._monitor = _Monitor(self)

    # --- who runs what; with the lock held --------------------------------------------------------

    def _dispatch(self, op: Op) -> None:
        lane = self._enqueue(op)
        if lane.awake < lane.size and not self._here.bulks:
            if lane.ready.count > CROWD and self._monitor.active and lane.awake and not lane.long:
                return  # as was found for those before it
            self._attend(lane)

    def _enqueue(self, op: Op) -> _Lane:
        lane = self._lanes.get(op.lane)
        if lane is None:
            lane = self._lanes[op.lane] = _Lane(self, op.lane, self._size)
        lane.ready.add(op)
        return lane

    def _attend(self, lane: _Lane) -> None:
        """Ops are ready and threads asleep: wake one, or see that the monitor will in time."""
        if not lane.awake or lane.long or not (lane.called or perf_counter() - lane.started_at < LONG_S):
            self._wake(lane)
        elif not self._monitor.active:
            self._monitor.rouse()

    def _look_after(self, lane: _Lane) -> None:
        """See that what is ready will be run."""
        if lane.ready.count and lane.awake < lane.size:
            self._attend(lane)

    def _wake(self, lane: _Lane) -> None:
        if lane.asleep > lane.called:
            lane.called += 1
            lane.wake.notify()
        else:
            name = f"engine-{lane.name}-{lane.awake + 1}"
            try:
                threading.Thread(target=self._serve, args=(lane,), name=name, daemon=True).start()
            except RuntimeError:  # no thread is to be had
                if not lane.awake:
                    raise
                return  # then those awake will have to do
        lane.awake += 1

    def _take(self, worker: _Worker, now: float) -> Op | None:
        """The op that this thread, one of those awake, is to run now, if any."""
        lane = worker.lane
        if lane.awake > 1 and (
            (worker.short and lane.started != worker.number) or lane.awake - lane.called > lane.size
        ):
            return None
        op = lane.ready.take()
        if op is not None:
            lane.start(op, now)
            worker.number = lane.started
            if lane.ready.count and lane.awake < lane.size:
                if lane.long:
                    self._wake(lane)
                elif not self._monitor.active:
                    self._monitor.rouse()
        return op

    def _claim(self, op: Op) -> bool:
        if op.state != READY:
            return False
        lane = self._lanes[op.lane]
        lane.start(op, perf_counter())
        lane.ready.started()
        return True

    def _sleep(self, lane: _Lane) -> bool:
        """Until this thread is woken, and then True. False: it is to end."""
        lane.awake -= 1
        if lane.ready.count:
            self._monitor.rouse()
        elif self._retiring:
            return False
        lane.asleep += 1
        lane.wake.wait(IDLE_S)
        lane.asleep -= 1
        if not lane.called:
            return False
        lane.called -= 1
        return True

    # --- the threads ------------------------------------------------------------------------------

    def _serve(self, lane: _Lane) -> None:
        """A thread of the lane."""
        worker = self._place.worker = _Worker(lane, self._here.ops)
        while True:
            with self._lock:
                while (op := self._take(worker, perf_counter())) is None:
                    if not self._sleep(lane):
                        return
                    worker.short = False
            self._run_on(worker, op)
            del op

    def _help(self, timeout: float | None) -> None:
        until = math.inf if timeout is None else perf_counter() + timeout
        with self._lock:
            lanes = list(self._lanes.values())
        for lane in lanes:
            self._join(lane, until)

    def _join(self, lane: _Lane, until: float) -> None:
        """Be one of the lane's threads for a while."""
        worker = self._place.worker = _Worker(lane, self._here.ops)
        interrupt = None
        with self._lock:
            lane.awake += 1
            op = self._take(worker, perf_counter())
        try:
            if op is not None:
                interrupt = self._run_on(worker, op, until)
        finally:
            self._place.worker = None
            with self._lock:
                lane.awake -= 1
                self._look_after(lane)
        if interrupt is not None:
            raise interrupt

    def _run_on(self, worker: _Worker, op: Op, until: float = math.inf) -> BaseException | None:
        """Run ``op`` and what is ready after it, while that is for this thread; the lock is taken once per op.

        Returns:
            What interrupted an op, as KeyboardInterrupt does; no other op is run after that.
        """
        lane, lock = worker.lane, self._lock
        following: Op | None = op
        while following is not None:
            op, following = following, None
            outcome = result = error = None  # nothing of the last op is kept while this one runs
            outcome = self._execute(op, worker.stack)
            now = perf_counter()
            if not lock.attempt(False):  # as `with` does, in less time
                lock.wait()
            try:
                took_long = now - op.started_at > LONG_S
                worker.short = not took_long
                lane.took(took_long)
                if op.state == DONE:  # given up meanwhile
                    outcome = None
                elif outcome is not None:
                    result, error = outcome
                    for ready in self._end(op, result, error):
                        if self._enqueue(ready) is not lane:
                            self._look_after(self._lanes[ready.lane])
                if now < until and op.interrupt is None:
                    following = self._take(worker, now)
            finally:
                lock.leave()
                if lock.waiting:
                    lock.tell_one()
            if outcome is not None:
                self._leave(op, result, error)
            if op.interrupt is not None:
                return op.interrupt
        return None

    def _wake_up(self) -> None:
        with self._lock:
            for lane in self._lanes.values():
                self._look_after(lane)

    def _lend(self) -> None:
        worker = self._place.worker
        if worker is not None:
            with self._lock:
                worker.lane.awake -= 1
                self._look_after(worker.lane)

    def _take_back(self) -> None:
        worker = self._place.worker
        if worker is not None:
            with self._lock:
                worker.lane.awake += 1

    def _retire(self) -> None:
        super()._retire()
        with self._lock:
            for lane in self._lanes.values():
                lane.wake.notify_all()
            self._monitor.retire()


class _Monitor:
    """Wakes another thread for lanes whose ready ops nobody comes to start. Everything under the engine's lock."""

    def __init__(self, engine: ThreadedEngine) -> None:
        self._engine = engine
        self._changed = engine._lock.condition()
        self.active = False  # it looks every now and then
        self._alive = False

    def rouse(self) -> None:
        """Ops are ready and threads asleep: look."""
        if self.active:
            return
        self.active = True
        if self._alive:
            self._changed.notify()
        else:
            self._alive = True
            threading.Thread(target=self._watch, name="engine-monitor", daemon=True).start()

    def retire(self) -> None:
        """End when there is nothing to look at."""
        self._changed.notify()

    def _watch(self) -> None:
        engine, quiet, pause_s = self._engine, 0, LOOK_S
        with engine._lock:
            while True:
                self._changed.wait(pause_s)
                quiet += 1
                moving, stuck = False, False
                for lane in engine._lanes.values():
                    if lane.ready.count and lane.awake < lane.size:
                        quiet = 0
                        if lane.started != lane.seen:
                            moving = True
                        elif not lane.called:
                            stuck = True
                            lane.recent, lane.long = RECENT, True
                            engine._wake(lane)
                    lane.seen = lane.started
                pause_s = min(2 * pause_s, LOOK_S_MAX) if moving and not stuck else LOOK_S
                if quiet > LOOKS:
                    self.active = False
                    if not engine._retiring:
                        self._changed.wait(IDLE_S)
                    if not self.active:
                        self._alive = False
                        return
                    quiet = 0
