"""What a push of an op returns, and what completes an asynchronous op."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures._base import FINISHED, PENDING
from threading import Condition
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.base import Engine
    from engine.scheduler import Op


class Handle(Future[Any]):
    """A :class:`concurrent.futures.Future` of an op's result.

    Waiting for an op that is ready runs it in the waiting thread; waiting inside an op for
    something that this op blocks raises :class:`engine.DeadlockError`. Thread-safe.

    Most handles are never watched: nobody waits for them before they are done, nobody adds a callback. So what
    a Future needs for that is made when it is first asked for, under the lock under which
    the engine settles the handle; :class:`~concurrent.futures.Future` itself does the rest.
    """

    _state = PENDING
    _result = None
    _exception = None
    _watched: Condition | None = None
    _waiters: list[Any]
    _done_callbacks: list[Callable[[Future[Any]], Any]]

    def __init__(self, engine: Engine, op: Op) -> None:  # in place of Future's
        self._engine = engine
        self.op = op

    def __repr__(self) -> str:
        return f"<Handle of {self.op!r}>"

    @property
    def _condition(self) -> Condition:
        """What Future's methods, and the waits of concurrent.futures, acquire before they look at anything else."""
        self._engine._before_wait()
        with self._engine._lock:
            if self._watched is None:
                self._waiters = []
                self._done_callbacks = []
                self._watched = Condition()
            return self._watched

    def _settle(self, result: Any, error: BaseException | None) -> bool:
        """The op has ended; with the engine's lock held. False: it is watched, so :meth:`_announce` is to follow."""
        if self._watched is not None:
            return False
        self._result = result
        self._exception = error
        self._state = FINISHED
        return True

    def _announce(self, result: Any, error: BaseException | None) -> None:
        """Tell those who watch; without the lock."""
        if error is not None:
            self.set_exception(error)
        else:
            self.set_result(result)

    def done(self) -> bool:
        """Has the op ended, or been given up?"""
        return self._state != PENDING

    def result(self, timeout: float | None = None) -> Any:
        """The op's result; raises its error, :class:`engine.DeadlineError` after ``timeout`` seconds."""
        if self._state == PENDING:
            self._engine._await(self, timeout)
        if self._state == FINISHED and self._exception is None:
            return self._result
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The op's error or None; waits like :meth:`result`."""
        if self._state == PENDING:
            self._engine._await(self, timeout)
        return super().exception(0)

    def cancel(self) -> bool:
        """Give the op up if it has not started; what it would have written is poisoned."""
        return self._engine._cancel(self)


class Completion:
    """Given to the function of an asynchronous op, which calls one of these later, once, from any thread."""

    __slots__ = ("_engine", "_op")

    def __init__(self, engine: Engine, op: Op) -> None:
        self._engine = engine
        self._op = op

    def __repr__(self) -> str:
        return f"<Completion of {self._op!r}>"

    def set_result(self, result: Any) -> None:
        """The op is complete."""
        self._engine._finish(self._op, result, None)

    def set_exception(self, error: BaseException) -> None:
        """The op has failed."""
        self._engine._finish(self._op, None, error)
