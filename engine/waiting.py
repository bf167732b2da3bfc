"""How a thread waits for an op: it runs the op itself if that is ready, and is told why if it waits in vain."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from engine.errors import DeadlineError, DeadlockError
from engine.scheduler import DONE, ISSUED, WAITING, Op

if TYPE_CHECKING:
    from engine.core import Core
    from engine.handle import Handle


def until_done(engine: Core, handle: Handle, timeout: float | None) -> None:
    """Wait until the handle is done. Raises DeadlineError, DeadlockError."""
    op = handle.op
    _meet(engine, op)
    if handle.done():
        return
    with _waiting(engine, op, timeout):
        if op.state == ISSUED and timeout is None:
            engine._streams_in_use.landing.synchronise(op)
        with suppress(CancelledError):
            Future.exception(handle, timeout)


def follow(engine: Core, handle: Handle, timeout: float | None) -> None:
    """See :meth:`Handle.follow`."""
    if handle.op.flight is None:
        engine._await(handle, timeout)
        return
    _until_issued(engine, handle, timeout)
    if handle.op.state == ISSUED:
        engine._streams_in_use.follow(handle.op)


def _until_issued(engine: Core, handle: Handle, timeout: float | None) -> None:
    """Wait until an op of a device is issued, or the handle is done."""
    op = handle.op
    _meet(engine, op)
    issued = threading.Event()
    with engine._lock:
        if op.state in (ISSUED, DONE):
            return
        op.flight.followers = [*(op.flight.followers or ()), issued.set]
    handle.add_done_callback(lambda _: issued.set())  # it may be given up
    engine._before_wait()
    with _waiting(engine, op, timeout):
        if not issued.wait(timeout):
            raise TimeoutError


def listed(ops: Iterable[Op]) -> str:
    """The first few of them, for an error."""
    some = [f"{op.name!r} pushed at {op.site}" for op in list(ops)[:5]]
    return ", ".join(some) or "nothing"


def _meet(engine: Core, op: Op) -> None:
    """This thread is about to wait for the op: run it here if it is ready."""
    engine._check_process()
    stack = engine._here.ops
    with engine._lock:
        if stack and op.state != DONE:
            for own in stack:
                if own is op or engine._scheduler.waits_for(op, own):
                    raise DeadlockError(f"{own!r} would wait for {op!r}, which waits for it")
        mine = engine._claim(op)
    if mine:
        engine._run(op)


@contextmanager
def _waiting(engine: Core, op: Op, timeout: float | None) -> Iterator[None]:
    """Within the block this thread waits for the op; a TimeoutError becomes the one that names the ops awaited."""
    inside = bool(engine._here.ops)
    if inside:
        engine._lend()
    try:
        yield
    except TimeoutError:
        with engine._lock:
            ahead = listed(engine._scheduler.blockers(op)) if op.state == WAITING else repr(op)
        raise DeadlineError(
            f"op {op.name!r} pushed at {op.site}: not done after {timeout:g} s; waits for {ahead}"
        ) from None
    finally:
        if inside:
            engine._take_back()
