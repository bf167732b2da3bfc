"""What every engine does the same way: arguments, poison, completion, waiting, the trace.

An engine is this class with a way to start ready ops: :mod:`engine.threaded` hands them to pools,
:mod:`engine.serial` runs them on the spot.
"""

from __future__ import annotations

import math
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from pathlib import Path
from sys import _getframe
from threading import get_ident
from time import perf_counter
from types import FrameType
from typing import Any

from engine import waiting
from engine.claim import Claim
from engine.deadlines import Deadlines
from engine.device_time import DeviceTime
from engine.devices import Devices
from engine.errors import ArgumentError, ClosedError, DeadlineError, DeadlockError, ForkedError
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


class Engine(ABC):
    """Orders functions by what they read and write. All methods are thread-safe."""

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

    def use(self, devices: Devices) -> None:
        """Have ops on arrays of these devices run on streams. Using them again changes nothing.

        Raises:
            ArgumentError: the engine uses others.
        """
        with self._lock:
            if self._streams is None:
                self._streams = Streams(self, devices)
                self._operands.devices = devices
                if self.profiling:
                    self._streams.time = DeviceTime(devices)
            elif self._streams.devices is not devices:
                raise ArgumentError(f"use: expected {self._streams.devices!r}, which the engine uses, got {devices!r}")

    # --- pushing ------------------------------------------------------------------------------

    def push(
        self,
        fn: Callable[[], Any],
        reads: Iterable[Any] = (),
        writes: Iterable[Any] = (),
        priority: int = 0,
        lane: str | None = None,
        name: str | None = None,
        *,
        inline: bool = False,
        info: dict[str, Any] | None = None,
        deadline: float | None = None,
        lent: bool = False,
    ) -> Handle:
        """Run ``fn()`` when everything it reads and writes is free, in program order per var.

        With an array of a device that the engine uses (:meth:`use`) among them, ``fn`` is to enqueue work on the
        current stream, and the op ends when the device has done that work. It is called in this thread and at once,
        unless an op of the host that has not ended is in the way. Then what this thread has enqueued on its own
        current streams comes before the op, and what it enqueues later comes after it; otherwise only the former.

        Args:
            fn: called without arguments; its return value is the handle's result.
            reads, writes: vars, arrays and groups of arrays. In both: it changes the value; in writes alone: it
                writes it whole, whatever was there before.
            priority: larger starts sooner among the ready ones.
            lane: a named pool of threads, and of streams on each device; None is ``cpu``, or ``copy`` for an op of a
                device that touches another memory, too.
            name: for traces and errors.
            inline: run it in the calling thread, before returning, if nothing is in the way.
            info: shown in the trace.
            deadline: seconds after which the op fails with :class:`DeadlineError`.
            lent: the arrays are left alone until the op has ended. So what this thread enqueues later need not come
                after an op of a device, and can overlap with it.

        Raises:
            ArgumentError, ClosedError, ForkedError: nothing was submitted.
        """
        handle = self._submit(fn, reads, writes, priority, lane, name, inline, info, deadline, False, False, lent)
        assert handle is not None
        return handle

    def push_if_free(
        self,
        fn: Callable[[], Any],
        reads: Iterable[Any] = (),
        writes: Iterable[Any] = (),
        priority: int = 0,
        lane: str | None = None,
        name: str | None = None,
        *,
        inline: bool = False,
        info: dict[str, Any] | None = None,
    ) -> Handle | None:
        """Like :meth:`push` if nothing is in the op's way. Else nothing is submitted, and the answer is None."""
        return self._submit(fn, reads, writes, priority, lane, name, inline, info, None, False, True)

    def push_async(
        self,
        fn: Callable[[Completion], Any],
        reads: Iterable[Any] = (),
        writes: Iterable[Any] = (),
        priority: int = 0,
        lane: str | None = None,
        name: str | None = None,
        *,
        inline: bool = False,
        info: dict[str, Any] | None = None,
        deadline: float | None = None,
    ) -> Handle:
        """Like :meth:`push` for an op that ends later: ``fn(completion)`` starts it."""
        handle = self._submit(fn, reads, writes, priority, lane, name, inline, info, deadline, True)
        assert handle is not None
        return handle

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

    def claim(self, arrays: Iterable[Any], name: str) -> Claim | None:
        """Like an asynchronous op that has begun, and writes these arrays whole until :meth:`Claim.end` is called.

        It costs next to nothing as long as no other op or wait comes near arrays; then it is made an op.

        Returns:
            None if an op in the way, another claim, or an array of a device makes :meth:`push_async` necessary.
        """
        self._check_process()
        arrays = tuple(arrays)
        places = self._operands.places(arrays)
        if any(device is not None for device in self._operands.memories(places)):
            return None
        with self._lock:
            if self._claimed is not None or self._operands.in_use() or self.profiling or self._closed:
                return None
            claim = self._claimed = Claim(self, arrays, name, _getframe(1))
        return claim

    def _come_near_arrays(self) -> None:
        """Arrays are about to be looked up: what claims some is made an op. Called with the lock held."""
        if self._claimed is not None:
            self._claimed.become_op()

    @contextmanager
    def bulk(self) -> Iterator[None]:
        """Push many ops for the price of one wake-up: none is woken for them before the block ends.

        Ops of devices can overlap, for they meet the thread's own streams only twice: what it had enqueued when the
        first of them was pushed comes before them all, what it enqueues after the block comes after them all.

        Nothing else changes: an op may start at once if a thread happens to be awake, ``inline`` ops run at
        their push, and a wait for this engine within the block wakes what it needs. Only a wait
        for something else, that one of these ops would bring about, would be in vain.
        """
        self._here.bulks += 1
        try:
            yield
        finally:
            self._here.bulks -= 1
            if not self._here.bulks:
                if self._streams is not None:
                    self._streams.end_block()
                self._wake_up()

    def _before_wait(self) -> None:
        """This thread may be about to wait for an op."""
        self._check_process()
        if self._here.bulks:
            self._wake_up()

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

    # --- waiting ------------------------------------------------------------------------------

    def wait(self, *items: Any, timeout: float | None = None) -> None:
        """Wait until the arrays, vars or handles are ready to be read; raises the error that one carries.

        Raises:
            DeadlineError: after ``timeout`` seconds, naming the ops awaited.
            DeadlockError: inside an op, for something that this op blocks.
        """
        end = None if timeout is None else time.monotonic() + timeout
        for item in items:
            handle = item if isinstance(item, Handle) else self._reader(item)
            if handle is not None:
                handle.result(None if end is None else max(0.0, end - time.monotonic()))

    def _vars_of(self, item: Any) -> list[Var]:
        if isinstance(item, Var):
            return [item]
        self._come_near_arrays()
        self._operands.tidy()
        return self._operands.vars_of(item)

    def _reader(self, item: Any) -> Handle | None:
        with self._lock:
            vars_ = self._vars_of(item)
            if all(v.writer is None and not v.queue for v in vars_):
                error = next((v.poison for v in vars_ if v.poison is not None), None)
                if error is None:
                    return None
                raise error
        return self.push(_nothing, reads=[item], name="wait", inline=True)

    def wait_all(self, timeout: float | None = None) -> None:
        """Wait until nothing is pending. Raises DeadlineError, DeadlockError (inside an op)."""
        if self._here.ops:
            raise DeadlockError("wait_all inside an op would wait for that op")
        end = math.inf if timeout is None else time.monotonic() + timeout
        self._before_wait()
        self._help(timeout)
        with self._lock:
            self._come_near_arrays()
            self._awaiting_idle += 1
            try:
                while self._scheduler.pending:
                    left = end - time.monotonic()
                    if left <= 0:
                        some = waiting.listed(self._scheduler.pending.values())
                        raise DeadlineError(f"wait_all: after {timeout:g} s still pending: {some}")
                    self._idle.wait(None if timeout is None else left)
            finally:
                self._awaiting_idle -= 1

    def _help(self, timeout: float | None) -> None:
        """Before this thread waits for all: run ready ops here, while that pays."""

    def pending(self, *items: Any) -> bool:
        """Is there an unfinished op that writes any of these arrays or vars?"""
        with self._lock:
            for item in items:
                for var in self._vars_of(item):
                    if var.writer is not None or any(var in op.writes for op in var.queue):
                        return True
        return False

    def uses_arrays(self) -> bool:
        """Is there an unfinished op that was pushed with arrays, or an array that carries an error?

        Cheap, where :meth:`pending` looks each array up.
        """
        with self._lock:
            return self._claimed is not None or self._operands.in_use()

    def free(self, *vars: Var) -> bool:
        """Does no op hold these or wait for them, and do they carry no error?"""
        with self._lock:
            for var in vars:
                if var.writer is not None or var.readers or var.queue or var.poison is not None:
                    return False
        return True

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

    # --- life ---------------------------------------------------------------------------------

    def retain(self) -> None:
        """Somebody uses the engine; see :meth:`release`."""
        with self._lock:
            self._users += 1

    def release(self) -> None:
        """One user less; when none is left the threads end, once their work has. They start again on demand."""
        with self._lock:
            self._users -= 1
            last = self._users <= 0
        if last:
            self._retire()

    def _retire(self) -> None:
        """Let the threads end when nothing is left to do."""
        with self._lock:
            self._retiring = True
            if self._streams is not None:
                self._streams.landing.retire()

    def close(self) -> None:
        """Finish what is pending, end the threads; a later push raises ClosedError."""
        if not self._inherited and not self._closed:
            self.wait_all(timeout=60)
            self._closed = True
            self._retire()

    @property
    def _inherited(self) -> bool:
        """Is this a forked child, and the engine the parent's?"""
        return self._process is not _process

    def _check_process(self) -> None:
        if self._process is not _process:
            raise ForkedError(f"the engine belongs to process {self._pid}; create another after fork")

    @contextmanager
    def profile(self, path: str | os.PathLike[str]) -> Iterator[None]:
        """Record the ops that end within the ``with`` and write a Chrome/Perfetto trace to ``path``.

        Ops of devices that are pushed meanwhile are timed by their devices, too; see :attr:`Handle.device_ms`.
        """
        self.start_profile()
        try:
            yield
        finally:
            self.stop_profile(path)

    @property
    def profiling(self) -> bool:
        """Are ops being recorded?"""
        return self._trace is not None

    def start_profile(self) -> None:
        """Begin to record."""
        with self._lock:
            self._trace = Trace()
            if self._streams is not None:
                self._streams.time = DeviceTime(self._streams.devices)

    def stop_profile(self, path: str | os.PathLike[str]) -> None:
        """Stop recording and write the trace."""
        with self._lock:
            trace, self._trace = self._trace, None
            if self._streams is not None:
                self._streams.time = None
        if trace is not None:
            trace.write(path)

    def validate(self) -> None:
        """Assert the scheduler's invariants."""
        with self._lock:
            self._scheduler.validate()


def _nothing() -> None:
    pass


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
