"""What an asynchronous call of the store returns."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures._base import FINISHED, PENDING
from functools import partial
from typing import Any, NoReturn

from kvstore.errors import DeadlineError
from kvstore.promptness import promptly

Staleness = int | tuple[int, int]
Drive = Callable[[Future[Any], float], bool]  # brings it about, if it can; has it waited so many seconds?
Ended = Callable[[BaseException | None], None]  # called once, with the error if there was one

log = logging.getLogger(__name__)


class Handle(Future[Any]):
    """A :class:`concurrent.futures.Future` with the store's deadline and an answer to *why am I waiting*.

    Attributes:
        version: pulls: how many updates the value has seen, the smallest over its pieces; else None.
        staleness: pulls: rounds that the slowest participant is behind; in a cluster the pair
            (device level, cluster level); else None.

    What a Future needs to be waited for is made when somebody waits: most handles are done before.
    """

    version: int | None = None
    staleness: Staleness | None = None
    _state: str = PENDING
    _result: Any = None
    _exception: BaseException | None = None
    _observed = False
    _explain: Callable[[], str] | None = None
    _parts: Sequence[Handle] = ()
    _drive: Drive | None = None
    _on_end: Callable[[Any], object] | None = None
    _watched: threading.Condition | None = None
    _waiters: list[Any]
    _callbacks: list[Callable[[Future[Any]], object]] | None = None
    _lock = threading.Lock()  # of all handles: held for a few instructions only

    def __init__(
        self,
        what: str,
        timeout_s: float,
        explain: Callable[[], str] | None = None,
        parts: Sequence[Handle] = (),
        drive: Drive | None = None,
        on_end: Callable[[Handle], object] | None = None,
    ) -> None:  # in place of Future's
        self._what = what
        self._timeout_s = timeout_s
        self._explain = explain
        self._parts = parts
        self._drive = drive
        self._on_end = on_end

    @property
    def what(self) -> str:
        """The operation, for people."""
        return self._what

    def __repr__(self) -> str:
        state = "pending" if not self.done() else "failed" if self.exception_now() else "done"
        return f"<Handle {self.what}: {state}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self!r} cannot be copied or pickled: it is of a store of this process; use its result()")

    @property
    def _condition(self) -> threading.Condition:  # type: ignore[override]
        """What Future's own methods, and ``wait`` of concurrent.futures, hold while they look."""
        with self._lock:
            if self._watched is None:
                self._waiters = []
                self._watched = threading.Condition()
            return self._watched

    def done(self) -> bool:
        """Has the operation ended?"""
        return self._state == FINISHED

    def result(self, timeout: float | None = None) -> Any:
        """The value pulled (None for a push).

        Args:
            timeout: seconds; None is the store's own, ``math.inf`` for ever.

        Raises:
            DeadlineError: it took longer; the operation stays pending.
            KVStoreError: the operation failed.
        """
        self.wait(timeout)
        self.observed = True
        if self._exception is not None:
            raise self._exception
        return self._result

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The error of the operation, or None; waits like :meth:`result`."""
        self.wait(timeout)
        self.observed = True
        return self._exception

    def wait(self, timeout: float | None = None) -> None:
        """Wait like :meth:`result`, without looking at the outcome. Raises DeadlineError."""
        if self.done():
            return
        limit = self._timeout_s if timeout is None else timeout
        with promptly:
            self._wait(limit)
        if not self.done():
            why = self.why()
            raise DeadlineError(f"{self.what}: not done after {limit:g} s" + (f"; {why}" if why else ""))

    def _wait(self, limit: float) -> None:
        """Wait until it is done, for at most ``limit`` seconds."""
        end = time.monotonic() + limit
        if self._drive is not None:
            waited = self._drive(self, limit)
            if self.done():
                return
            end = -math.inf if waited else end
        condition = self._condition
        with condition:
            while not self.done():
                left = end - time.monotonic()
                if left <= 0:
                    break
                condition.wait(min(left, threading.TIMEOUT_MAX))

    def add_done_callback(self, fn: Callable[[Future[Any]], object]) -> None:
        """Call ``fn(handle)`` when the operation has ended, or now if it has."""
        with self._lock:
            if self._state == PENDING:
                if self._callbacks is None:
                    self._callbacks = []
                self._callbacks.append(fn)
                return
        fn(self)

    def cancel(self) -> bool:
        """False: what was pushed or asked cannot be taken back."""
        return False

    @property
    def observed(self) -> bool:
        """Has somebody looked at this handle's outcome?"""
        return self._observed

    @observed.setter
    def observed(self, value: bool) -> None:
        self._observed = value
        for part in self._parts:
            part.observed = value

    def why(self) -> str:
        """What the operation waits for; may ask a server."""
        return self._explain() if self._explain is not None else ""

    def exception_now(self) -> BaseException | None:
        """The error so far; does not wait and does not count as looking."""
        return self._exception

    def _has_ended(self) -> None:
        """It is finished now; before callbacks are called."""
        if self._on_end is not None:
            self._on_end(self)

    def finish(self, result: Any, error: BaseException | None = None) -> None:
        """Called by the store; the first call counts."""
        with self._lock:
            if self._state == FINISHED:
                return
            self._result = result
            self._exception = error
            self._state = FINISHED
            watched, callbacks, self._callbacks = self._watched, self._callbacks, None
        if watched is not None:
            with watched:
                for waiter in self._waiters:
                    waiter.add_result(self) if error is None else waiter.add_exception(self)
                watched.notify_all()
        self._has_ended()
        for tell in callbacks or ():
            try:
                tell(self)
            except Exception:
                log.exception("%r: a callback failed", self)


def last_of(parts: int, ended: Ended) -> Ended:
    """To be called with the outcome of each of ``parts``; the last one calls ``ended`` with the first error."""
    if parts == 1:
        return ended
    left = parts
    first: BaseException | None = None
    lock = threading.Lock()

    def one_ended(error: BaseException | None) -> None:
        nonlocal left, first
        with lock:
            first = first or error
            left -= 1
            if left:
                return
        ended(first)

    return one_ended


def countdown(handle: Handle, parts: int) -> Ended:
    """To be called with the outcome of each of ``parts``; when all are done, so is ``handle``, with the first error."""
    return last_of(parts, partial(handle.finish, None))


def gather(
    what: str,
    timeout_s: float,
    parts: list[Handle],
    drive: Drive | None = None,
    positions: list[list[int]] | None = None,
) -> Handle:
    """One handle for a list call: done when all are; its result is the list of theirs (None if all are).

    Args:
        positions: where in that list the elements of each part's result go, which is a list then.
    """
    whole = Handle(what, timeout_s, lambda: "; ".join(p.why() for p in parts if not p.done()), parts, drive)
    left = [len(parts)]
    lock = threading.Lock()

    def ended(_: Future[Any]) -> None:
        with lock:
            left[0] -= 1
            if left[0]:
                return
        error = next((e for e in (part.exception_now() for part in parts) if e is not None), None)
        whole.version = min((p.version for p in parts if p.version is not None), default=None)
        whole.staleness = _largest([p.staleness for p in parts if p.staleness is not None])
        results = [] if error else [part._result for part in parts]
        if positions is not None and not error and any(result is not None for result in results):
            results = _placed(results, positions)
        whole.finish(None if all(r is None for r in results) else results, error)

    for part in parts:
        part.add_done_callback(ended)
    if not parts:
        whole.finish(None)
    return whole


def _placed(parts: list[list[Any]], positions: list[list[int]]) -> list[Any]:
    """The elements of all parts, each at its position."""
    placed: list[Any] = [None] * sum(map(len, positions))
    for part, some in zip(parts, positions, strict=True):
        for element, position in zip(part, some, strict=True):
            placed[position] = element
    return placed


def _largest(staleness: list[Staleness]) -> Staleness | None:
    pairs = [s for s in staleness if isinstance(s, tuple)]
    if pairs:
        return max(device for device, _ in pairs), max(cluster for _, cluster in pairs)
    return max((s for s in staleness if isinstance(s, int)), default=None)


def all_ended(ops: Sequence[Future[Any]], ended: Ended) -> None:
    """Call ``ended`` when all these engine ops have ended, with the first error."""
    one_ended = last_of(len(ops), ended)
    for op in ops:
        when_ended(op, one_ended)


def when_ended(op: Future[Any], ended: Ended) -> None:
    """Call ``ended`` with the outcome of an engine op; at once if it is over."""
    if op.done():
        ended(op.exception())
    else:
        op.add_done_callback(lambda _: ended(op.exception()))
