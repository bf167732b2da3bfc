"""What a push of an op returns, and what completes an asynchronous op."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from concurrent.futures._base import FINISHED, PENDING
from contextlib import AbstractContextManager, nullcontext
from threading import Condition
from typing import TYPE_CHECKING, Any

from engine import waiting

if TYPE_CHECKING:
    from engine.core import Core
    from engine.scheduler import Op

log = logging.getLogger(__name__)


class Handle(Future[Any]):
    """A :class:`concurrent.futures.Future` of an op's result.

    Waiting for an op that is ready runs it in the waiting thread; waiting inside an op for
    something that this op blocks raises :class:`engine.DeadlockError`. Thread-safe.

    Few handles are waited for: most are done before. So the condition, and the list that goes with it, are
    made when a method of Future first asks for them, and under the engine's lock, under which the engine settles
    a handle that has none. Callbacks need no condition.
    """

    _result: Any = None
    _exception: BaseException | None = None
    _waiters: list[Any]

    def __init__(self, engine: Core, op: Op) -> None:  # in place of Future's
        self._engine = engine
        self.op = op
        self._state = PENDING
        self._watched: Condition | None = None
        self._callbacks: list[Callable[[Future[Any]], Any]] | None = None

    def __repr__(self) -> str:
        return f"<Handle of {self.op!r}>"

    @property
    def _condition(self) -> Condition:  # type: ignore[override]
        """What Future, and ``wait`` of concurrent.futures, acquire before they look at anything else."""
        if self._state == PENDING:
            self._engine._before_wait()
        with self._engine._lock:
            if self._watched is None:
                self._waiters = []
                self._watched = Condition()
            return self._watched

    def _settle(self, result: Any, error: BaseException | None) -> bool:
        """The op has ended. Called with the engine's lock held.

        Returns:
            Does somebody watch, whom :meth:`_announce` has to tell without the lock?
        """
        if self._watched is None:
            if result is not None:
                self._result = result
            if error is not None:
                self._exception = error
            self._state = FINISHED
            return self._callbacks is not None
        return True

    def _announce(self, result: Any, error: BaseException | None) -> None:
        """The op has ended and :meth:`_settle` has left the rest to this; or it has been given up."""
        if self._state != PENDING:
            if self._callbacks is not None:
                self._invoke_callbacks()
        elif error is not None:
            self.set_exception(error)
        else:
            self.set_result(result)

    def _invoke_callbacks(self) -> None:  # in place of Future's
        with self._engine._lock:  # under which they are added as long as the op is pending
            callbacks, self._callbacks = self._callbacks, None
        for tell in callbacks or ():
            self._tell(tell)

    def _tell(self, fn: Callable[[Future[Any]], Any]) -> None:
        try:
            fn(self)
        except Exception:
            log.exception("%r: a callback failed", self)

    def done(self) -> bool:
        """Has the op ended, or been given up?"""
        return self._state != PENDING

    def result(self, timeout: float | None = None) -> Any:
        """The op's result; raises its error, :class:`engine.DeadlineError` after ``timeout`` seconds."""
        error = self.exception(timeout)
        if error is not None:
            try:
                raise error
            finally:
                del self, error  # whose traceback holds this frame
        return self._result

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The op's error or None; waits like :meth:`result`."""
        if self._state == PENDING:
            self._engine._await(self, timeout)
        if self._state == FINISHED:
            return self._exception
        raise CancelledError

    def follow(self, timeout: float | None = None) -> None:
        """Have what this thread does from now on come after the op, without waiting for a device.

        For an op of a device: wait until its work is in its stream. Then what this thread enqueues on its current
        streams, of the devices whose arrays the op was pushed with, starts when that work is done. For an op of the
        host, or one that has been given up: wait until the handle is done.

        The op's error is not raised: an op of a device need not have met it yet. The handle tells it.

        Raises:
            DeadlineError: after ``timeout`` seconds, naming the ops awaited.
            DeadlockError: inside an op, for something that this op blocks.
        """
        waiting.follow(self._engine, self, timeout)

    @property
    def device_ms(self) -> float | None:
        """How long the device worked on the op, in milliseconds, from what it waited for to its end.

        None: it is no op of a device, or not complete, or was not timed, since nobody was profiling when it was issued.
        """
        flight = self.op.flight
        return None if flight is None or flight.timing is None else flight.timing.ms

    def add_done_callback(self, fn: Callable[[Future[Any]], Any]) -> None:
        """Call ``fn(handle)`` when the op has ended, or now if it has."""
        with self._engine._lock:
            if self._state == PENDING:
                if self._callbacks is None:
                    self._callbacks = []
                self._callbacks.append(fn)
                return
        self._tell(fn)

    def cancel(self) -> bool:
        """Give the op up if it has not started; what it would have written is poisoned."""
        return self._engine._cancel(self)


class Completion:
    """Given to the function of an asynchronous op, which sets result or exception later, once, from any thread."""

    __slots__ = ("_engine", "_op")

    def __init__(self, engine: Core, op: Op) -> None:
        self._engine = engine
        self._op = op

    def __repr__(self) -> str:
        return f"<Completion of {self._op!r}>"

    def on(self) -> AbstractContextManager[Any]:
        """Within the block, in any thread, the op's stream is the current one, if it is an op of a device.

        So more of its work can be enqueued after its function has returned, and before its result is set.
        """
        return nullcontext()

    def set_result(self, result: Any) -> None:
        """The op is complete."""
        self._engine._finish(self._op, result, None)

    def set_exception(self, error: BaseException) -> None:
        """The op has failed."""
        self._engine._finish(self._op, None, error)
