"""Who waits for a handle goes on soon after it is done, though other threads of the process run pure Python.

CPython gives the GIL to a thread that asks for it once the switch interval has passed: 5 ms if nobody has set it, which
is as long as ten small rounds. While somebody waits the interval is shorter, and afterwards it is 5 ms again. Another
one, set by ``sys.setswitchinterval``, stays. Who reads it while a thread waits, to set it again later, sets the short
one for good.
"""

from __future__ import annotations

import os
import sys
import threading
from types import TracebackType

DEFAULT_US = 5000  # CPython's
PROMPT_US = 500  # ten times what a switch takes, so threads that compute lose little by it


class Promptness:
    """A context for the time in which a thread waits; any number of threads may be in it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal's handler may wait as well
        self._waiting = 0
        self._shortened = False

    def __repr__(self) -> str:
        return f"<Promptness: {self._waiting} threads wait>"

    def __enter__(self) -> None:
        with self._lock:
            self._waiting += 1
            self._shortened |= _change(DEFAULT_US, PROMPT_US)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._lock:
            self._waiting = max(0, self._waiting - 1)  # the thread that has forked was not counted any more
            if not self._waiting:
                self._restore()

    def forked(self) -> None:
        """This is the child of a fork: those who waited are not in it."""
        self._lock = threading.RLock()
        self._waiting = 0
        self._restore()

    def _restore(self) -> None:
        if self._shortened:
            self._shortened = False
            _change(PROMPT_US, DEFAULT_US)


def _change(old_us: int, new_us: int) -> bool:
    """Change the switch interval, unless somebody else has; is it changed?"""
    is_old = round(sys.getswitchinterval() * 1e6) == old_us
    if is_old:
        sys.setswitchinterval(new_us / 1e6)
    return is_old


promptly = Promptness()
os.register_at_fork(after_in_child=promptly.forked)
