"""What a store does with a cut in the background: write it, or give it out as arrays, while training goes on."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvstore import plain
from kvstore.checkpoint import directory
from kvstore.checkpoint.cut import CutSource, values
from kvstore.errors import OptionError
from kvstore.handle import Handle

EXPLAIN_S = 5.0  # more than it takes to find out why a cut has not been taken in time

Wait = Callable[[], CutSource]  # until the cut that was asked for has been taken


class Saving:
    """The cuts of one store that are under way."""

    def __init__(self) -> None:
        self._under_way: set[Handle] = set()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<Saving: {self._under_way}>"

    def save(self, path: str | os.PathLike[str], keep: int | None, cut: Wait, timeout_s: float) -> Handle:
        """Write the cut as the newest checkpoint of the directory; the handle's result is its path."""

        def write() -> Path:
            with cut() as taken:
                return directory.write(path, taken, keep=keep, timeout_s=timeout_s)

        return self._start(f"checkpoint in {os.fspath(path)}", write, timeout_s)

    def snapshot(self, cut: Wait, timeout_s: float) -> Handle:
        """The handle's result is the values of the cut, by key."""

        def read() -> Any:
            with cut() as taken:
                return values(taken)

        return self._start("snapshot", read, timeout_s)

    def wait(self, timeout_s: float) -> None:
        """Until nothing is under way. Raises the first error that nobody has looked at, or DeadlineError."""
        with self._lock:
            handles = list(self._under_way)
        for handle in handles:
            handle.wait(timeout_s)
            if not handle.observed and (error := handle.exception(0)) is not None:
                raise error

    def _start(self, what: str, work: Callable[[], Any], timeout_s: float) -> Handle:
        handle = Handle(what, timeout_s + EXPLAIN_S, on_end=self._ended)
        with self._lock:
            self._under_way.add(handle)

        def run() -> None:
            try:
                handle.finish(work())
            except BaseException as error:
                handle.finish(None, error)

        threading.Thread(target=run, name="kvstore-checkpoint", daemon=True).start()
        return handle

    def _ended(self, handle: Handle) -> None:
        if handle.exception_now() is None or handle.observed:
            with self._lock:
                self._under_way.discard(handle)


def checked_keep(keep: int | None) -> int | None:
    """How many checkpoints are kept; None: all. Raises OptionError for what is no such number."""
    number = None if keep is None else plain.whole(keep)
    if keep is not None and (number is None or number < 1):
        raise OptionError(f"keep: expected a whole number >= 1 or None, got {keep!r}")
    return number
