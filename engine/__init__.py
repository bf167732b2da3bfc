"""A runtime dependency engine: functions run when what they read and write is free.

Say what a function reads and writes (arrays, or :class:`Var` for anything else) and push it; the
engine runs it on its threads, as early as the order of pushes allows, and the outcome is the one
of running everything in that order::

    >>> import numpy as np, engine
    >>> a = np.zeros(3)
    >>> h = engine.push(lambda: a.fill(2), writes=[a])
    >>> engine.push(lambda: a.sum(), reads=[a]).result()
    np.float64(6.0)

``operands``, ``memory`` and ``var`` say what conflicts, ``scheduler`` (pure) what may run, ``core`` what becomes of an
op, ``threaded`` and ``serial`` how it is started, ``waiting`` how a thread waits, ``base`` what users call. Work of
devices goes to ``streams`` and comes back by ``landing``; ``devices`` says what a device is to the engine, and ``cuda``
what CuPy makes of that.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

from engine.base import Engine
from engine.claim import Claim
from engine.cuda import Cuda, CudaStream
from engine.devices import Devices
from engine.errors import (
    ArgumentError,
    ClosedError,
    DeadlineError,
    DeadlockError,
    EngineError,
    ForkedError,
)
from engine.groups import ArrayGroup
from engine.handle import Completion, Handle
from engine.serial import SerialEngine
from engine.threaded import ThreadedEngine
from engine.var import Var

__all__ = [
    "ArgumentError",
    "ArrayGroup",
    "Claim",
    "ClosedError",
    "Completion",
    "Cuda",
    "CudaStream",
    "DeadlineError",
    "DeadlockError",
    "Devices",
    "Engine",
    "EngineError",
    "ForkedError",
    "Handle",
    "Var",
    "bulk",
    "close",
    "create",
    "default",
    "pending",
    "profile",
    "push",
    "push_async",
    "wait",
    "wait_all",
]

_default: Engine | None = None
_lock = threading.Lock()


def create(kind: str = "threaded", threads: int | None = None) -> Engine:
    """An engine of one's own: ``threaded``, or ``serial``, the oracle. Raises ArgumentError."""
    if kind == "serial":
        return SerialEngine()
    if kind == "threaded":
        return ThreadedEngine(threads)
    raise ArgumentError(f"create: expected 'threaded' or 'serial', got {kind!r}")


def default() -> Engine:
    """The engine of this process; made on demand, and again after :func:`close` or in a forked child."""
    global _default
    with _lock:
        if _default is None or _default._closed or _default._inherited:
            _default = create()
        return _default


def push(fn: Callable[[], Any], reads: Iterable[Any] = (), writes: Iterable[Any] = (), **options: Any) -> Handle:
    """:meth:`Engine.push` on the default engine."""
    return default().push(fn, reads, writes, **options)


def push_async(
    fn: Callable[[Completion], Any], reads: Iterable[Any] = (), writes: Iterable[Any] = (), **options: Any
) -> Handle:
    """:meth:`Engine.push_async` on the default engine."""
    return default().push_async(fn, reads, writes, **options)


def wait(*items: Any, timeout: float | None = None) -> None:
    """:meth:`Engine.wait` on the default engine."""
    default().wait(*items, timeout=timeout)


def wait_all(timeout: float | None = None) -> None:
    """:meth:`Engine.wait_all` on the default engine."""
    default().wait_all(timeout)


def bulk() -> AbstractContextManager[None]:
    """:meth:`Engine.bulk` on the default engine."""
    return default().bulk()


def pending(*items: Any) -> bool:
    """:meth:`Engine.pending` on the default engine."""
    return default().pending(*items)


def profile(path: str | os.PathLike[str]) -> AbstractContextManager[None]:
    """:meth:`Engine.profile` on the default engine."""
    return default().profile(path)


def close() -> None:
    """End the default engine's threads, once their work has."""
    if _default is not None:
        _default.close()
