"""What the users of an engine call, whichever it is.

An engine is this class with a way to start ready ops: :mod:`engine.threaded` hands them to pools,
:mod:`engine.serial` runs them on the spot. What becomes of an op is in :mod:`engine.core`.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from sys import _getframe
from typing import Any

from engine import waiting
from engine.claim import Claim
from engine.core import Core
from engine.device_time import DeviceTime
from engine.devices import Devices
from engine.errors import ArgumentError, DeadlineError, DeadlockError
from engine.handle import Completion, Handle
from engine.streams import Streams
from engine.trace import Trace
from engine.var import Var


class Engine(Core):
    """Orders functions by what they read and write. All methods are thread-safe."""

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

    @property
    def devices(self) -> Devices | None:
        """Those that it uses."""
        return self._operands.devices

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
        lent: bool = False,
    ) -> Handle | None:
        """Like :meth:`push` if nothing is in the op's way. Else nothing is submitted, and the answer is None."""
        return self._submit(fn, reads, writes, priority, lane, name, inline, info, None, False, True, lent)

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
        lent: bool = False,
    ) -> Handle:
        """Like :meth:`push` for an op that ends later: ``fn(completion)`` starts it."""
        handle = self._submit(fn, reads, writes, priority, lane, name, inline, info, deadline, True, False, lent)
        assert handle is not None
        return handle

    def claim(self, arrays: Iterable[Any], name: str) -> Claim | None:
        """Like an asynchronous op that has begun, and writes these arrays whole until :meth:`Claim.end` is called.

        It costs next to nothing as long as no other op or wait comes near arrays; then it is made an op.

        Returns:
            None if an op in the way, another claim, or an array of a device makes :meth:`push_async` necessary.
        """
        self._check_process()
        arrays = tuple(arrays)
        places = self._operands.places(arrays)
        for device in self._operands.memories(places):
            if device is not None:
                return None
        with self._lock:
            if self._claimed is not None or self._operands.in_use() or self.profiling or self._closed:
                return None
            claim = self._claimed = Claim(self, arrays, name, _getframe(1))
        return claim

    @contextmanager
    def bulk(self) -> Iterator[None]:
        """Push many ops for the price of one wake-up: none is woken for them before the block ends.

        Ops of devices can overlap, for the thread's own streams wait for them only when the block ends: what it
        enqueues after that comes after them all.

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

    def close(self) -> None:
        """Finish what is pending, end the threads; a later push raises ClosedError."""
        if not self._inherited and not self._closed:
            self.wait_all(timeout=60)
            self._closed = True
            self._retire()

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
