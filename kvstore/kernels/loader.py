"""When kernels are compiled: in the background, once somebody has asked for one. Nobody waits for it.

Until a kernel is there, its plain form does the work; both give the same bits, so nobody can tell when it came.
Numba is imported with the first kernel, and only here. Compiled kernels stay in Numba's cache on disk.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

Kernel = Callable[..., Any]
Dtype = np.dtype[Any]
Wanted = tuple[str, Dtype, Dtype]  # its name, the type of the elements and that of the pushes

log = logging.getLogger(__name__)


class Loader(dict[Wanted, Kernel | None]):
    """The kernels of this process: one is there, or None and will be, where that can be. Thread-safe."""

    def __init__(self) -> None:
        super().__init__()
        self._queue: deque[Wanted] = deque()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._usable = True
        os.register_at_fork(after_in_child=self._forked)

    def __repr__(self) -> str:
        there = sum(kernel is not None for kernel in self.values())
        return f"<Loader: {there} kernels, {len(self._queue)} to come>"

    def __missing__(self, wanted: Wanted) -> None:
        self._ask_for(wanted)
        self._ask_for(("locate", wanted[2], wanted[2]))  # for pushes of more than one array

    def wait(self, timeout: float | None = None) -> bool:
        """Until all that was asked for is there, or known not to be had. False: ``timeout`` seconds have passed."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout)
            return not thread.is_alive()
        return True

    def _ask_for(self, wanted: Wanted) -> None:
        with self._lock:
            if wanted in self:
                return
            self[wanted] = None
            if not self._usable:
                return
            self._queue.append(wanted)
            if self._thread is None:
                # No daemon: one that compiles while the process ends would use what is gone.
                self._thread = threading.Thread(target=self._load, name="kernels", daemon=False)
                self._thread.start()

    def _load(self) -> None:
        while True:
            with self._lock:
                if not self._queue or not threading.main_thread().is_alive():
                    self._thread = None
                    return
                wanted = self._queue.popleft()
            try:
                from kvstore.kernels import jitted

                self[wanted] = jitted.build(*wanted)
            except ImportError as error:
                log.info("NumPy's kernels are used, which are slower: Numba cannot be imported: %s", error)
                with self._lock:
                    self._usable = False
                    self._queue.clear()
            except Exception:
                log.warning("NumPy's form of kernel %s is used, which is slower", wanted, exc_info=True)

    def _forked(self) -> None:
        """A child inherits what is there; but not the thread, nor Numba's lock in the state of being free."""
        self._lock = threading.Lock()
        self._usable = self._usable and self._thread is None
        self._thread = None
        self._queue.clear()


LOADER = Loader()
