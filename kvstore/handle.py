"""What an asynchronous call of the store returns."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from kvstore.errors import DeadlineError

Staleness = int | tuple[int, int]
Drive = Callable[[Future[Any], float], None]


class Handle(Future[Any]):
    """A :class:`concurrent.futures.Future` with the store's deadline and an answer to *why am I waiting*.

    Attributes:
        version: pulls: how many updates the value has seen, the smallest over its pieces; else None.
        staleness: pulls: rounds that the slowest participant is behind; in a cluster the pair
            (device level, cluster level); else None.
    """

    def __init__(
        self,
        what: str,
        timeout_s: float,
        explain: Callable[[], str] | None = None,
        parts: Sequence[Handle] = (),
        drive: Drive | None = None,
    ) -> None:
        super().__init__()
        self.what = what
        self.version: int | None = None
        self.staleness: Staleness | None = None
        self._observed = False
        self._timeout_s = timeout_s
        self._explain = explain
        self._parts = parts
        self._drive = drive

    def __repr__(self) -> str:
        state = "pending" if not self.done() else "failed" if self.exception_now() else "done"
        return f"<Handle {self.what}: {state}>"

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
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The error of the operation, or None; waits like :meth:`result`."""
        self.wait(timeout)
        self.observed = True
        return super().exception(0)

    def wait(self, timeout: float | None = None) -> None:
        """Wait like :meth:`result`, without looking at the outcome. Raises DeadlineError."""
        if self.done():
            return
        limit = self._timeout_s if timeout is None else timeout
        end = time.monotonic() + limit
        if self._drive is not None:
            self._drive(self, limit)
        try:
            super().exception(None if limit == math.inf else max(0.0, end - time.monotonic()))
        except TimeoutError as error:
            why = self.why()
            raise DeadlineError(f"{self.what}: not done after {limit:g} s" + (f"; {why}" if why else "")) from error

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
        return super().exception(0) if self.done() and not self.cancelled() else None

    def finish(self, result: Any, error: BaseException | None = None) -> None:
        """Called by the store, once."""
        if error is not None:
            self.set_exception(error)
        else:
            self.set_result(result)


def countdown(handle: Handle, parts: int) -> Callable[[Future[Any]], None]:
    """A callback to be given to ``parts`` futures; when all are done, so is ``handle``, with the first error."""
    left = [parts]
    errors: list[BaseException] = []
    lock = threading.Lock()

    def ended(part: Future[Any]) -> None:
        error = part.exception()
        with lock:
            if error is not None:
                errors.append(error)
            left[0] -= 1
            if left[0]:
                return
        handle.finish(None, errors[0] if errors else None)

    return ended


def gather(what: str, timeout_s: float, parts: list[Handle], drive: Drive | None = None) -> Handle:
    """One handle for a list call: done when all are; its result is the list of theirs (None if all are)."""
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
        results = [] if error else [Future.result(part, 0) for part in parts]
        whole.finish(None if all(r is None for r in results) else results, error)

    for part in parts:
        part.add_done_callback(ended)
    if not parts:
        whole.finish(None)
    return whole


def _largest(staleness: list[Staleness]) -> Staleness | None:
    pairs = [s for s in staleness if isinstance(s, tuple)]
    if pairs:
        return max(device for device, _ in pairs), max(cluster for _, cluster in pairs)
    return max((s for s in staleness if isinstance(s, int)), default=None)
