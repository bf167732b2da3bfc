"""The life of an op: submitted, started, run, ended; and the ways in which an engine starts and stops.

What is ready is known to :mod:`engine.scheduler`, how it is started to those who implement :meth:`Core._dispatch`.
"""

from __future__ import annotations

import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future
from pathlib import Path
from sys import _getframe
from threading import get_ident
from time import perf_counter
from types import FrameType
from typing import Any

from engine import waiting
from engine.claim import Claim
from engine.deadlines import Deadlines
from engine.errors import ArgumentError, ClosedError, DeadlineError, ForkedError
from engine.handle import Completion, Handle
from engine.mutex import Mutex
from engine.operands import Operands
from engine.scheduler import DONE, READY, RUNNING, WAITING, Op, Scheduler
from engine.streams import Streams
from engine.trace import Trace
from engine.var import Var

Outcome = tuple[Any, BaseException | None]

_FILES = frozenset(map(str, Path(__file__).parent.glob("*.py")))  # whose frames push on behalf of others

_process = object()  # another one in a forked child; cheaper to look at than the process's id


def _forked() -> None:
    global _process
    _process = object()


os.register_at_fork(after_in_child=_forked)


class _Here(threading.local):
    """What the thread at hand is doing with one engine."""

    def __init__(self) -> None:
        self.ops: list[Op] = []  # on its stack
        self.bulks = 0  # blocks of Engine.bulk it is in


class Core(ABC):
    """An engine without what its users call."""

    _watches_devices = True  # else it waits for each op of a device by itself

    def __init__(self) -> None:
        self._lock = Mutex()
        self._scheduler = Scheduler()
        self._operands = Operands()
        self._streams: Streams | None = None
        self._deadlines = Deadlines(self._expire)
        self._here = _Here()
        self._idle = self._lock.condition()
        self._awaiting_idle = 0  # threads that wait for it
        self._claimed: Claim | None = None
        self._trace: Trace | None = None
        self._process = _process
        self._pid = os.getpid()
        self._closed = False
        self._retiring = False  # threads are to end rather than idle, until the next push
        self._users = 0

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self._scheduler!r}>"

    # --- submitting -----------------------------------------------------------------------------

    def _submit(
        self,
        fn: Callable[..., Any],
        reads: Iterable[Any],
        writes: Iterable[Any],
        priority: int,
        lane: str | None,
        name: str | None,
        inline: bool,
        info: dict[str, Any] | None,
        deadline: float | None,
        is_async: bool,
        if_free: bool = False,
        lent: bool = False,
    ) -> Handle | None:
        if self._process is not _process:
            self._check_process()
        if not callable(fn):
            raise ArgumentError(f"push: expected a function, got {type(fn).__name__}")
        if lane is not None and not isinstance(lane, str):
            raise ArgumentError(f"push: expected a lane's name, got {type(lane).__name__}")
        if name is None:
            name = getattr(fn, "__name__", "op")
        try:
            reads, writes = tuple(reads), tuple(writes)
        except TypeError as error:
            raise ArgumentError(f"push: expected lists of reads and writes: {error}") from error
        caller = _getframe(2)  # as a rule
        if caller.f_code.co_filename in _FILES:
            caller = _outside(caller)
        op, launch = None, None
        if _only_vars(reads, writes):
            op = Op(name, reads, writes, priority)
        else:
            places = self._operands.places(writes + reads)
            if self._streams is not None:
                launch, own_lane = self._streams.launch_for(places)
                lane = lane or own_lane
        lock = self._lock  # as `with` does, in less time
        if not lock.attempt(False):
            lock.wait()
        try:
            if self._closed:
                raise ClosedError("the engine is closed")
            if op is None:
                if self._claimed is not None:
                    self._claimed.become_op()
                op = self._operands.op(name, reads, writes, priority, places)
                op.flight = launch
            if if_free and not self._scheduler.free(op):
                return None
            op.fn = fn
            op.caller, op.caller_at = caller.f_code, caller.f_lasti
            op.handle = handle = Handle(self, op)
            op.is_async = is_async
            op.info = info
            if lane is not None:
                op.lane = lane
            if op.holds is not None:
                self._operands.begun()
                inline = inline or launch is not None
            self._retiring = False
            ready = self._scheduler.submit(op)
            if ready:
                if inline:
                    op.state = RUNNING
                    op.started_at = perf_counter()
                else:
                    self._dispatch(op)
        finally:
            lock.leave()
            if lock.waiting:
                lock.tell_one()
        if deadline is not None:
            self._deadlines.add(time.monotonic() + deadline, op)
        if ready and inline:
            self._run(op)
            if launch is not None and not lent and self._streams is not None:
                self._streams.join(launch)
        else:
            self._submitted()
        return handle

    @property
    def _streams_in_use(self) -> Streams:
        assert self._streams is not None
        return self._streams

    def _come_near_arrays(self) -> None:
        """Arrays are about to be looked up: what claims some is made an op. Called with the lock held."""
        if self._claimed is not None:
            self._claimed.become_op()

    # --- how ready ops start --------------------------------------------------------------------

    @abstractmethod
    def _dispatch(self, op: Op) -> None:
        """``op`` is ready; start it soon. Called with the lock held."""

    def _submitted(self) -> None:
        """An op has been submitted; called without the lock."""

    def _wake_up(self) -> None:
        """See that a thread is awake for what is ready: a bulk of pushes is over, or waited for."""

    def _claim(self, op: Op) -> bool:
        """Take a ready op out of its pool to run it here. Called with the lock held."""
        if op.state != READY:
            return False
        op.state = RUNNING
        op.started_at = perf_counter()
        return True

    def _run(self, op: Op) -> None:
        """Run a claimed op on this thread."""
        outcome = self._execute(op, self._here.ops)
        if outcome is not None:
            result, error = outcome
            self._finish(op, result, error)
        if op.interrupt is not None:
            raise op.interrupt

    def _execute(self, op: Op, stack: list[Op]) -> Outcome | None:
        """Call the op's function. Its result and error; None if it is asynchronous, and has begun."""
        fn = op.fn  # first: gone when the op has been given up and finished
        error = op.given_up or (self._scheduler.poison_of(op) if op.reads else None)
        if error is None:
            op.thread = get_ident()
        elif op.flight is None:
            return None, error
        stack.append(op)
        try:
            if op.flight is not None and self._streams is not None:
                self._streams.run(op, fn, error)
                return None
            if not op.is_async:
                return fn(), None
            fn(Completion(self, op))
            return None
        except BaseException as raised:
            self._blame(raised, op)
            return None, raised
        finally:
            stack.pop()

    @staticmethod
    def _blame(raised: BaseException, op: Op) -> None:
        """``raised`` came out of the op."""
        _note(raised, op)
        if not isinstance(raised, Exception):
            op.interrupt = raised

    def _landed(self) -> None:
        """Ops of devices have ended; called without the lock."""

    def _finish(self, op: Op, result: Any, error: BaseException | None) -> None:
        with self._lock:
            if op.state == DONE:
                return
            for ready in self._end(op, result, error):
                self._dispatch(ready)
        self._leave(op, result, error)

    def _end(self, op: Op, result: Any, error: BaseException | None) -> list[Op]:
        """The op has ended; called with the lock held, and :meth:`_leave` is to follow. The ops that are ready now."""
        if op.given_up is not None:
            error = op.given_up
        ready = self._scheduler.complete(op, error)
        if op.holds is not None:
            self._operands.ended(error)
        if op.given_up is None:
            op.watched = op.handle._settle(result, error)
        if self._trace is not None and op.thread:
            if op.flight is None:
                self._trace.add(op, op.started_at, perf_counter())
            else:
                self._streams_in_use.trace(op, self._trace)
        if self._awaiting_idle and not self._scheduler.pending:
            self._idle.notify_all()
        return ready

    def _leave(self, op: Op, result: Any, error: BaseException | None) -> None:
        """Tell those who watch an op that has ended, and let go of what it held; without the lock."""
        handle = op.handle
        op.fn = op.holds = op.handle = None
        if op.watched:
            handle._announce(result, error)

    # --- waiting --------------------------------------------------------------------------------

    def _before_wait(self) -> None:
        """This thread may be about to wait for an op."""
        self._check_process()
        if self._here.bulks:
            self._wake_up()

    def _help(self, timeout: float | None) -> None:
        """Before this thread waits for all: run ready ops here, while that pays."""

    def _await(self, handle: Handle, timeout: float | None) -> None:
        """Until the handle is done."""
        waiting.until_done(self, handle, timeout)

    def _lend(self) -> None:
        """This thread is about to wait inside an op."""

    def _take_back(self) -> None:
        """It has waited."""

    def _cancel(self, handle: Handle) -> bool:
        op = handle.op
        with self._lock:
            if op.state not in (WAITING, READY) or op.given_up is not None:
                return False
            op.given_up = CancelledError()
        Future.cancel(handle)
        return not handle.set_running_or_notify_cancel()  # which notifies concurrent.futures.wait

    def _expire(self, op: Op) -> None:
        with self._lock:
            if op.state == DONE or op.given_up is not None:
                return
            error = op.given_up = DeadlineError(f"op {op.name!r} pushed at {op.site}: its deadline has passed")
            handle: Handle = op.handle
            begun = op.state == RUNNING and op.is_async
        handle._announce(None, error)
        if begun and op.flight is None:
            self._finish(op, None, error)
        elif begun:
            self._streams_in_use.issue(op, None, error)

    # --- life -----------------------------------------------------------------------------------

    def _retire(self) -> None:
        """Let the threads end when nothing is left to do."""
        with self._lock:
            self._retiring = True
            if self._streams is not None:
                self._streams.landing.retire()

    @property
    def _inherited(self) -> bool:
        """Is this a forked child, and the engine the parent's?"""
        return self._process is not _process

    def _check_process(self) -> None:
        if self._process is not _process:
            raise ForkedError(f"the engine belongs to process {self._pid}; create another after fork")


def _only_vars(reads: tuple[Any, ...], writes: tuple[Any, ...]) -> bool:
    for item in reads:  # loops, since a generator costs more than the rest of a push's checks
        if type(item) is not Var:
            return False
    for item in writes:  # noqa: SIM110
        if type(item) is not Var:
            return False
    return True


def _outside(frame: FrameType) -> FrameType:
    """The frame outside this package that the call comes from."""
    while frame.f_back is not None and frame.f_code.co_filename in _FILES:
        frame = frame.f_back
    return frame


def _note(error: BaseException, op: Op) -> None:
    note = f"in the engine op {op.name!r} pushed at {op.site}"
    if note not in getattr(error, "__notes__", ()):
        error.add_note(note)
