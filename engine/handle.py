"""What a push of an op returns, and what completes an asynchronous op."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.base import Engine
    from engine.scheduler import Op


class Handle(Future[Any]):
    """A :class:`concurrent.futures.Future` of an op's result.

    Waiting for an op that is ready runs it in the waiting thread; waiting inside an op for
    something that this op blocks raises :class:`engine.DeadlockError`. Thread-safe.
    """

    def __init__(self, engine: Engine, op: Op) -> None:
        super().__init__()
        self._engine = engine
        self.op = op

    def __repr__(self) -> str:
        return f"<Handle of {self.op!r}>"

    def result(self, timeout: float | None = None) -> Any:
        """The op's result; raises its error, :class:`engine.DeadlineError` after ``timeout`` seconds."""
        if not self.done():
            self._engine._await(self, timeout)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The op's error or None; waits like :meth:`result`."""
        if not self.done():
            self._engine._await(self, timeout)
        return super().exception(0)

    def cancel(self) -> bool:
        """Give the op up if it has not started; what it would have written is poisoned."""
        return self._engine._cancel(self.op)


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
