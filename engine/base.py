"""What every engine does the same way: arguments, poison, completion, waiting, the trace.

An engine is this class with a way to start ready ops: :mod:`engine.threaded` hands them to pools,
:mod:`engine.serial` runs them on the spot.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from typing import Any

from engine.deadlines import Deadlines
from engine.errors import ArgumentError, ClosedError, DeadlineError, DeadlockError, ForkedError
from engine.handle import Completion, Handle
from engine.memory import Memory
from engine.scheduler import DONE, READY, RUNNING, WAITING, Op, Scheduler
from engine.trace import Trace
from engine.var import Var

_HERE = os.path.dirname(__file__)


class Engine(ABC):
    """Orders functions by what they read and write. All methods are thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._scheduler = Scheduler()
        self._memory = Memory()
        self._deadlines = Deadlines(self._expire)
        self._running = threading.local()  # .ops: the ops on this thread's stack
        self._idle = threading.Condition(self._lock)
        self._trace: Trace | None = None
        self._pid = os.getpid()
        self._closed = False
        self._users = 0

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self._scheduler!r}>"

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
    ) -> Handle:
        """Run ``fn()`` when everything it reads and writes is free, in program order per var.

        Args:
            fn: called without arguments; its return value is the handle's result.
            reads, writes: vars and arrays. In both: it changes the value; in writes alone: it
                writes it whole, whatever was there before.
            priority: larger starts sooner among the ready ones.
            lane: a named pool of threads; None is ``cpu``.
            name: for traces and errors.
            inline: run it in the calling thread, before returning, if nothing is in the way.
            info: shown in the trace.
            deadline: seconds after which the op fails with :class:`DeadlineError`.

        Raises:
            ArgumentError, ClosedError, ForkedError: nothing was submitted.
        """
        return self._push(fn, reads, writes, priority, lane, name, inline, info, deadline, False)

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
        return self._push(fn, reads, writes, priority, lane, name, inline, info, deadline, True)

    def _push(
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
    ) -> Handle:
        if self._pid != os.getpid():
            raise ForkedError(f"the engine belongs to process {self._pid}; create another after fork")
        if not callable(fn):
            raise ArgumentError(f"push: expected a function, got {type(fn).__name__}")
        if isinstance(reads, Var) or isinstance(writes, Var):
            raise ArgumentError("push: expected lists of reads and writes, got a Var")
        if lane is not None and not isinstance(lane, str):
            raise ArgumentError(f"push: expected a lane's name, got {type(lane).__name__}")
        reads, writes = tuple(reads), tuple(writes)
        with self._lock:
            if self._closed:
                raise ClosedError("the engine is closed")
            op = self._op(name or str(getattr(fn, "__name__", "op")), reads, writes, priority)
            op.fn = fn
            op.holds = (reads, writes)
            op.info = info
            op.async_start = is_async
            if lane is not None:
                op.lane = lane
            op.site = _site()
            op.handle = Handle(self, op)
            ready = self._scheduler.submit(op)
            if ready and inline:
                op.state = RUNNING
            elif ready:
                self._dispatch(op)
        if deadline is not None:
            self._deadlines.add(time.monotonic() + deadline, op)
        if ready and inline:
            self._run(op)
        else:
            self._submitted(op)
        handle: Handle = op.handle
        return handle

    def _op(self, name: str, reads: tuple[Any, ...], writes: tuple[Any, ...], priority: int) -> Op:
        read_vars: list[Var] = []
        write_vars: list[Var] = []
        partial: list[Var] = []
        self._memory.tidy()
        for item in reads:
            if type(item) is Var:
                read_vars.append(item)
            else:
                whole, part = self._memory.vars_of(item)
                read_vars += whole
                read_vars += part
        for item in writes:
            if type(item) is Var:
                write_vars.append(item)
            else:
                whole, part = self._memory.vars_of(item)
                write_vars += whole
                write_vars += part
                partial += part
        return Op(name, read_vars, write_vars, priority, partial)

    # --- how ready ops start --------------------------------------------------------------------

    @abstractmethod
    def _dispatch(self, op: Op) -> None:
        """``op`` is ready; start it soon. Called with the lock held."""

    def _submitted(self, op: Op) -> None:
        """``op`` has been submitted; called without the lock."""

    def _claim(self, op: Op) -> bool:
        """Take a ready op out of its pool to run it here. Called with the lock held."""
        if op.state != READY:
            return False
        op.state = RUNNING
        return True

    def _run(self, op: Op) -> None:
        """Run a claimed op on this thread."""
        error = op.deadline_error or self._scheduler.poison_of(op)
        if error is not None:
            self._finish(op, None, error)
            return
        stack = self._stack()
        stack.append(op)
        op.started_at = time.perf_counter()
        op.async_thread = threading.get_ident()
        try:
            result = op.fn(Completion(self, op)) if op.async_start else op.fn()
        except BaseException as raised:
            _note(raised, op)
            self._finish(op, None, raised)
            if not isinstance(raised, Exception):
                raise
        else:
            if not op.async_start:
                self._finish(op, result, None)
        finally:
            stack.pop()

    def _stack(self) -> list[Op]:
        try:
            ops: list[Op] = self._running.ops
        except AttributeError:
            ops = self._running.ops = []
        return ops

    def _finish(self, op: Op, result: Any, error: BaseException | None) -> None:
        with self._lock:
            if op.state == DONE:
                return
            error = error or op.deadline_error
            for ready in self._scheduler.complete(op, error):
                self._dispatch(ready)
            if not self._scheduler.pending:
                self._idle.notify_all()
            trace = self._trace
        if trace is not None and op.started_at:
            trace.add(op, time.perf_counter())
        op.fn = op.holds = None
        _settle(op.handle, result, error)

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
        self._memory.tidy()
        whole, part = self._memory.vars_of(item)
        return whole + part

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
        if self._stack():
            raise DeadlockError("wait_all inside an op would wait for that op")
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            with self._lock:
                op = min((o for o in self._scheduler.pending.values() if o.state == READY), default=None)
                if op is not None and self._claim(op):
                    pass
                elif not self._scheduler.pending:
                    return
                elif not self._idle.wait(0.05 if end is None else max(0.0, min(0.05, end - time.monotonic()))) and (
                    end is not None and time.monotonic() >= end
                ):
                    raise DeadlineError(
                        f"wait_all: after {timeout:g} s still pending: {self._list(self._scheduler.pending.values())}"
                    )
                else:
                    continue
            self._run(op)

    def pending(self, *items: Any) -> bool:
        """Is there an unfinished op that writes any of these arrays or vars?"""
        with self._lock:
            for item in items:
                for var in self._vars_of(item):
                    if var.writer is not None or any(writes for _, writes in var.queue):
                        return True
        return False

    def _await(self, handle: Handle, timeout: float | None) -> None:
        """Until the handle is done: run its op here if it is ready, else wait."""
        if self._pid != os.getpid():
            raise ForkedError(f"the engine belongs to process {self._pid}; its ops end there")
        op = handle.op
        stack = self._stack()
        with self._lock:
            if stack and op.state != DONE:
                for own in stack:
                    if own is op or self._scheduler.waits_for(op, own):
                        raise DeadlockError(f"{own!r} would wait for {op!r}, which waits for it")
            mine = self._claim(op)
        if mine:
            self._run(op)
            if handle.done():
                return
        if stack:
            self._lend()
        try:
            Future.exception(handle, timeout)
        except CancelledError:
            pass
        except TimeoutError:
            with self._lock:
                ahead = self._list(self._scheduler.blockers(op)) if op.state == WAITING else repr(op)
            raise DeadlineError(
                f"op {op.name!r} pushed at {op.site}: not done after {timeout:g} s; waits for {ahead}"
            ) from None
        finally:
            if stack:
                self._take_back()

    def _lend(self) -> None:
        """This thread is about to wait inside an op."""

    def _take_back(self) -> None:
        """It has waited."""

    @staticmethod
    def _list(ops: Iterable[Op]) -> str:
        some = [f"{op.name!r} pushed at {op.site}" for op in list(ops)[:5]]
        return ", ".join(some) or "nothing"

    def _cancel(self, op: Op) -> bool:
        with self._lock:
            if op.state not in (WAITING, READY) or op.deadline_error is not None:
                return False
            op.deadline_error = CancelledError()
        return Future.cancel(op.handle)

    def _expire(self, op: Op) -> None:
        with self._lock:
            if op.state == DONE or op.deadline_error is not None:
                return
            op.deadline_error = DeadlineError(f"op {op.name!r} pushed at {op.site}: its deadline has passed")
            finish = op.state == RUNNING and op.async_start
        if finish:
            self._finish(op, None, op.deadline_error)
        else:
            _settle(op.handle, None, op.deadline_error)

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

    def close(self) -> None:
        """Finish what is pending, end the threads; a later push raises ClosedError."""
        if self._pid == os.getpid() and not self._closed:
            self.wait_all(timeout=60)
            self._closed = True
            self._retire()

    @contextmanager
    def profile(self, path: str | os.PathLike[str]) -> Iterator[None]:
        """Record the ops that end within the ``with`` and write a Chrome/Perfetto trace to ``path``."""
        self.start_profile()
        try:
            yield
        finally:
            self.stop_profile(path)

    def start_profile(self) -> None:
        """Begin to record."""
        self._trace = Trace()

    def stop_profile(self, path: str | os.PathLike[str]) -> None:
        """Stop recording and write the trace."""
        trace, self._trace = self._trace, None
        if trace is not None:
            trace.write(path)

    def validate(self) -> None:
        """Assert the scheduler's invariants."""
        with self._lock:
            self._scheduler.validate()


def _nothing() -> None:
    pass


def _site() -> str:
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_HERE):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _note(error: BaseException, op: Op) -> None:
    note = f"in the engine op {op.name!r} pushed at {op.site}"
    if note not in getattr(error, "__notes__", ()):
        error.add_note(note)


def _settle(handle: Handle, result: Any, error: BaseException | None) -> None:
    if handle.done():
        return
    if error is not None:
        handle.set_exception(error)
    else:
        handle.set_result(result)
