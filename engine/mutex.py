"""The lock of an engine: one whose waiters do not hold it before they can run."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from typing import Any


class Mutex:
    """A reentrant lock.

    A thread that waits for a lock of :mod:`threading` owns it as soon as it is free, but has yet to get
    the GIL. The thread that has the GIL meets the lock again before that, finds it taken and gives
    the GIL up; and so on, with a switch of threads for every op. Here one who waits is told that the lock is
    free, and when it runs it tries again.
    """

    __slots__ = ("_lock", "_try", "_waiting")

    def __init__(self) -> None:
        self._lock: Any = threading.RLock()
        self._try = self._lock.acquire
        self._waiting: deque[threading.Lock] = deque()  # what the threads that wait are locked out by

    def __repr__(self) -> str:
        return f"<Mutex: {self._lock!r}, {len(self._waiting)} waiting>"

    def __enter__(self) -> None:
        if not self._try(False):
            self._wait()

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self._lock.release()
        if self._waiting:
            self._tell_one()

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

    def _wait(self) -> None:
        bell = threading.Lock()
        bell.acquire()
        while True:
            self._waiting.append(bell)
            try:
                if self._try(False):  # the holder may have looked for waiters before there was this one
                    with contextlib.suppress(ValueError):  # rung meanwhile
                        self._waiting.remove(bell)
                    return
                bell.acquire()
            except BaseException:  # an interrupt
                try:
                    self._waiting.remove(bell)
                except ValueError:
                    self._tell_one()  # in place of this one
                raise
            if self._try(False):
                return

    def _tell_one(self) -> None:
        with contextlib.suppress(IndexError):  # another thread has told the last one
            self._waiting.popleft().release()

    # what a Condition needs of a lock that is reentrant

    def _is_owned(self) -> bool:
        return bool(self._lock._is_owned())

    def _release_save(self) -> Any:
        state = self._lock._release_save()
        if self._waiting:
            self._tell_one()
        return state

    def _acquire_restore(self, state: Any) -> None:
        self.__enter__()
        self._lock.release()
        self._lock._acquire_restore(state)
