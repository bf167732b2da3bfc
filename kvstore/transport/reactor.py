"""The loop that works a process's ZeroMQ sockets: on a thread of its own, or on a thread that waits.

A hand-over from one thread to another costs tens of microseconds, on a small request more than the
request. So a thread that waits for a reply may :meth:`Reactor.drive` the loop itself: it polls, receives and
runs what follows. The loop's own thread steps back meanwhile, and for a moment afterwards (a training loop comes
back at once); what other threads post in that moment they run themselves.

Whoever holds ``_turns`` works the sockets. A ZeroMQ socket may be used by one thread after another as
long as a lock lies between them.

The loop sleeps in epoll, on plain descriptors and on those of ZeroMQ's sockets. The latter tell of news once, to
whoever uses the socket next, for whatever purpose. So a socket that has been used is asked before the loop sleeps
again (:meth:`Reactor.used`); zmq's own poller asks each one twice whenever it sleeps.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, Protocol, TypeVar

import zmq

log = logging.getLogger(__name__)

TICK_S = 0.5
STEP_BACK_S = 0.002  # how long after it was last driven the loop stays without its own thread

T = TypeVar("T")


class Descriptor(Protocol):
    """What can be watched beside ZeroMQ's sockets."""

    def fileno(self) -> int: ...
    def close(self) -> None: ...


class Reactor:
    """One loop, its ZeroMQ context and its sockets.

    Args:
        name: of its thread.
        on_tick: called by the loop about every ``TICK_S`` seconds.
        busy: is something awaited from the network? Then the loop is never left alone.
        io_threads: of ZeroMQ, over which its connections are spread.
    """

    def __init__(
        self,
        name: str,
        on_tick: Callable[[float], None] | None = None,
        busy: Callable[[], bool] = lambda: True,
        *,
        io_threads: int = 1,
    ) -> None:
        self.context = zmq.Context(io_threads)
        self.context.setsockopt(zmq.MAX_SOCKETS, 4096)
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._epoll = select.epoll()
        self._on_readable: dict[int, Callable[[], object]] = {}  # by descriptor
        self._sockets: dict[zmq.Socket[bytes], Callable[[], object]] = {}
        self._used: set[zmq.Socket[bytes]] = set()  # may have something that their descriptors do not tell of
        self._watched: dict[int, Descriptor] = {}
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._on_readable[self._wake_fd] = lambda: os.eventfd_read(self._wake_fd)
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self._turns = threading.Lock()  # whoever holds it works the sockets
        self._lock = threading.RLock()  # guards what follows
        self._changed = threading.Condition(self._lock)
        self._posted: deque[Callable[[], None]] = deque()
        self._polling = False  # somebody sleeps in poll, or is about to
        self._driver: int | None = None  # the thread that drives, or wants to
        self._parked = False  # the own thread has stepped back
        self._others_wait = False  # for something else than the driver does
        self._works_on: int | None = None  # the thread that is handling an event
        self._driven_at = -math.inf
        self._stopping = False
        self._on_tick = on_tick
        self._busy = busy
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._timer_count = itertools.count()
        self._linger_ms = 1000
        self._pid = os.getpid()
        self.call_later(TICK_S, self._tick)

    def __repr__(self) -> str:
        state = "alive" if self.thread.is_alive() else "stopped"
        return f"<Reactor {self.thread.name}: {state}, {len(self._sockets)} sockets>"

    @property
    def is_here(self) -> bool:
        """Is the caller called from within the loop?"""
        return self._works_on == threading.get_ident()

    def now(self) -> float:
        """Seconds on the clock of this loop's timers."""
        return time.monotonic()

    def future(self) -> Future[Any]:
        """A future for what this loop will bring about."""
        return Future()

    def start(self) -> None:
        """Start the thread; endpoints are bound before."""
        self.thread.start()

    # --- from any thread ------------------------------------------------------------------------

    def post(self, work: Callable[[], None]) -> None:
        """Run ``work`` in the loop, soon and in order; ignored after :meth:`stop`."""
        with self._lock:
            if self._stopping:
                return
            self._posted.append(work)
            alone = self._parked and self._driver is None
            if not alone:
                self._wake()
        while alone and self._posted and self._turns.acquire(blocking=False):
            try:
                self._run_posted()
            finally:
                self._turns.release()

    def call(self, work: Callable[[], T], timeout_s: float = 30.0) -> T:
        """Run ``work`` in the loop and return what it returns. Not from within the loop."""
        outcome: Future[T] = Future()

        def run() -> None:
            try:
                outcome.set_result(work())
            except BaseException as error:
                outcome.set_exception(error)

        self.post(run)
        return outcome.result(timeout_s)

    def drive(self, awaited: Future[Any], timeout_s: float) -> bool:
        """Work the loop on this thread until ``awaited`` is done, for at most ``timeout_s`` seconds.

        Returns:
            Whether it has waited. Not if another thread drives already.
        """
        me = threading.get_ident()
        with self._lock:
            if self._driver is not None:
                self._others_wait = True
                return False
            if self._stopping or me == self.thread.ident or self._pid != os.getpid():
                return False
            self._driver = me
            self._wake()
        awaited.add_done_callback(self._nudge)
        end = time.monotonic() + timeout_s
        with self._turns:
            try:
                while not awaited.done() and not self._stopping and time.monotonic() < end:
                    self._turn(end)
            finally:
                with self._lock:
                    self._driver = None
                    self._driven_at = -math.inf if self._others_wait else time.monotonic()
                    self._others_wait = False
                    if self._posted or self._stopping or self._busy():
                        self._changed.notify()
        return not self._stopping

    def aside(self, work: Callable[[], None]) -> None:
        """Do what may wait on a thread of its own, so that the loop need not."""
        threading.Thread(target=work, name=f"{self.thread.name}-aside", daemon=True).start()

    def stop(self, linger_s: float = 1.0) -> None:
        """End the thread and close its sockets; what is queued is sent for up to ``linger_s``."""
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
            self._linger_ms = int(linger_s * 1000)
            if self._pid != os.getpid():
                return
            os.eventfd_write(self._wake_fd, 1)
            self._changed.notify()
        if self.thread.is_alive() and self.thread is not threading.current_thread():
            self.thread.join(linger_s + 10)
        elif not self.thread.ident:
            self._release()

    def abandon(self) -> None:
        """Free everything of a reactor that was never started."""
        self._stopping = True
        self._release()

    def add(self, socket: zmq.Socket[bytes], on_readable: Callable[[], None]) -> None:
        """Watch a ZeroMQ socket; from within the loop, or before it starts."""
        fd = int(socket.getsockopt(zmq.FD))
        self._sockets[socket] = on_readable
        self._on_readable[fd] = partial(self._used.add, socket)
        self._epoll.register(fd, select.EPOLLIN)
        self._used.add(socket)

    def used(self, socket: zmq.Socket[bytes]) -> None:
        """The loop has sent by this socket or received from it, outside of its ``on_readable``."""
        self._used.add(socket)

    def watch(self, item: Descriptor, on_readable: Callable[[], None]) -> None:
        """Watch something else until :meth:`forget`; from within the loop."""
        fd = item.fileno()
        self._watched[fd] = item
        self._on_readable[fd] = on_readable
        self._epoll.register(fd, select.EPOLLIN)

    def forget(self, item: Descriptor, *, close: bool = True) -> None:
        """Watch it no more; from within the loop."""
        fd = item.fileno()
        del self._watched[fd], self._on_readable[fd]
        self._epoll.unregister(fd)
        if close:
            item.close()

    def remove(self, socket: zmq.Socket[bytes]) -> None:
        """Watch it no longer; from within the loop."""
        fd = int(socket.getsockopt(zmq.FD))
        del self._sockets[socket], self._on_readable[fd]
        self._used.discard(socket)
        self._epoll.unregister(fd)

    def call_later(self, delay_s: float, work: Callable[[], None]) -> None:
        """Run ``work`` after so many seconds. From within the loop."""
        heapq.heappush(self._timers, (time.monotonic() + delay_s, next(self._timer_count), work))

    # --- the loop -------------------------------------------------------------------------------

    def _wake(self) -> None:
        """Let whoever polls look up. With ``_lock`` held."""
        if self._polling:
            self._polling = False
            os.eventfd_write(self._wake_fd, 1)

    def _nudge(self, _: Future[Any]) -> None:
        """What the driver waits for is done, by another thread perhaps."""
        with self._lock:
            if self._driver != threading.get_ident():
                self._wake()

    def _run(self) -> None:
        try:
            while not self._stopping:
                with self._turns:
                    while self._driver is None and not self._stopping:
                        self._turn(math.inf)
                self._step_back()
        finally:
            with self._turns:
                self._run_posted()  # farewells that were posted before the stop
                self._release()

    def _step_back(self) -> None:
        """Leave the loop to those who drive it."""
        with self._lock:
            self._parked = True
            while not self._stopping:
                if self._driver is None and time.monotonic() >= self._driven_at + STEP_BACK_S:
                    break
                self._changed.wait(STEP_BACK_S if self._driver is None else 10 * STEP_BACK_S)
            self._parked = False

    def _turn(self, end: float) -> None:
        """Wait for something to happen, at most until ``end``, and do what follows. With ``_turns`` held."""
        with self._lock:
            self._polling = not self._posted
            until = min(end, self._timers[0][0])
            timeout_s = until - time.monotonic() if self._polling else 0.0
        readable = self._readable() if self._used else ()
        ready = self._epoll.poll(0.0 if readable or timeout_s < 0 else timeout_s)
        with self._lock:
            self._polling = False
        for fd, _ in ready:
            on_readable = self._on_readable.get(fd)  # none: forgotten a moment ago
            if on_readable is not None:
                self._guarded(on_readable)
        for socket in readable:
            if socket in self._sockets:  # or an earlier one has removed it
                self._guarded(self._sockets[socket])
        self._run_posted()
        while self._timers[0][0] <= time.monotonic():
            self._guarded(heapq.heappop(self._timers)[2])

    def _readable(self) -> list[zmq.Socket[bytes]]:
        """Those of the sockets just used that have something to read; the descriptors of the others will tell."""
        readable = [socket for socket in self._used if int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN]
        self._used.intersection_update(readable)
        return readable

    def _tick(self) -> None:
        self.call_later(TICK_S, self._tick)
        if self._on_tick is not None:
            self._on_tick(time.monotonic())

    def _run_posted(self) -> None:
        while self._posted:
            self._guarded(self._posted.popleft())

    def _release(self) -> None:
        with self._lock:  # also if it was an error that ended the loop
            self._stopping, self._polling = True, False
        for socket in self._sockets:
            socket.close(linger=self._linger_ms)
        for item in self._watched.values():
            item.close()
        with self._lock:
            self._epoll.close()
            os.close(self._wake_fd)
        self.context.term()

    def _guarded(self, work: Callable[..., object], *args: Any) -> None:
        self._works_on = threading.get_ident()
        try:
            work(*args)
        except Exception:
            log.exception("%r: an event handler failed", self)
        finally:
            self._works_on = None
