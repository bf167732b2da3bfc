"""The lock of an engine: one whose waiters do not hold it before they can run."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from typing import Any


class Mutex:
    """A reentrant lock.

    A thread that waits for a lock of :mod:`threading` owns it as soon as it is free, but has yet to get
    the GIL. The thread that has the GIL meets the lock again before that, finds it taken and gives
    the GIL up; and so on, with a switch of threads for every op. Here one who waits is told that the lock is
    free, and when it runs it tries again.

    ``with mutex`` costs two Python calls, which is dear for what is run for every op. There it is written out::

        if not mutex.attempt(False):
            mutex.wait()
        try:
            ...
        finally:
            mutex.leave()
            if mutex.waiting:
                mutex.tell_one()
    """

    __slots__ = ("_lock", "attempt", "leave", "waiting")

    def __init__(self) -> None:
        self._lock: Any = threading.RLock()
        self.attempt: Callable[[bool], bool] = self._lock.acquire
        self.leave: Callable[[], None] = self._lock.release
        self.waiting: deque[threading.Lock] = deque()  # what the threads that wait are locked out by

    def __repr__(self) -> str:
        return f"<Mutex: {self._lock!r}, {len(self.waiting)} waiting>"

    def __enter__(self) -> None:
        if not self.attempt(False):
            self.wait()

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self.leave()
        if self.waiting:
            self.tell_one()

    def acquire(self) -> bool:
        """Wait until this thread has it."""
        self.__enter__()
        return True

    def release(self) -> None:
        """Let go of it, and tell one of those who wait."""
        self.__exit__(None, None, None)

    def condition(self) -> threading.Condition:
        """A condition of it."""
        return threading.Condition(self)  # type: ignore[arg-type]

    def wait(self) -> None:
        """Until this thread has it."""
        bell = threading.Lock()
        bell.acquire()
        while True:
            self.waiting.append(bell)
            try:
                if self.attempt(False):  # the holder may have looked for waiters before there was this one
                    with contextlib.suppress(ValueError):  # rung meanwhile
                        self.waiting.remove(bell)
                    return
                bell.acquire()
            except BaseException:  # an interrupt
                try:
                    self.waiting.remove(bell)
                except ValueError:
                    self.tell_one()  # in place of this one
                raise
            if self.attempt(False):
                return

    def tell_one(self) -> None:
        """It is free: say so to one of those who wait."""
        with contextlib.suppress(IndexError):  # another thread has told the last one
            self.waiting.popleft().release()

    # what a Condition needs of a lock that is reentrant

    def _is_owned(self) -> bool:
        return bool(self._lock._is_owned())

    def _release_save(self) -> Any:
        state = self._lock._release_save()
        if self.waiting:
            self.tell_one()
        return state

    def _acquire_restore(self, state: Any) -> None:
        self.__enter__()
        self._lock.release()
        self._lock._acquire_restore(state)
