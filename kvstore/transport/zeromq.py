"""ZeroMQ endpoints and the one thread that owns them.

A :class:`Reactor` is a thread with a ZeroMQ poller. Everything that touches a socket happens on
it; other threads hand it work with :meth:`Reactor.post`. A :class:`Connection` (DEALER) speaks to
one server, a :class:`Endpoint` (ROUTER) to all who connect. High-water marks are 0: the credit
of :mod:`kvstore.protocol.requesting` is the bound. Nothing survives a reconnect; whoever sends
keeps its requests until they are answered. Liveness is libzmq's own heartbeat, which its I/O
thread answers even while Python is busy.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import zmq
from zmq.utils.monitor import parse_monitor_message

from kvstore.errors import OptionError

log = logging.getLogger(__name__)

HEARTBEAT_MS = 1000
HEARTBEAT_TIMEOUT_MS = 10000
TICK_S = 0.5
COPY_BYTES = 64 << 10  # frames below this are cheaper to copy than to track

T = TypeVar("T")
Frames = list[Any]  # the first a header (bytes-like), then value buffers


class Reactor:
    """One thread, its ZeroMQ context and its sockets.

    Args:
        name: of the thread.
        on_tick: called on the thread about every ``TICK_S`` seconds.
    """

    def __init__(self, name: str, on_tick: Callable[[float], None] | None = None) -> None:
        self.context = zmq.Context()
        self.context.setsockopt(zmq.MAX_SOCKETS, 4096)
        self._poller = zmq.Poller()
        self._on_readable: dict[Any, Callable[[], None]] = {}
        self._posted: deque[Callable[[], None]] = deque()
        self._awake = True  # the thread will look at _posted before it sleeps
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller.register(self._wake_fd, zmq.POLLIN)
        self._lock = threading.Lock()
        self._stopping = False
        self._linger_ms = 1000
        self._on_tick = on_tick
        self._sockets: list[zmq.Socket[bytes]] = []
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._pid = os.getpid()

    def __repr__(self) -> str:
        state = "alive" if self.thread.is_alive() else "stopped"
        return f"<Reactor {self.thread.name}: {state}, {len(self._sockets)} sockets>"

    def start(self) -> None:
        """Start the thread; endpoints are bound before."""
        self.thread.start()

    def post(self, work: Callable[[], None]) -> None:
        """Run ``work`` on the thread, soon and in order. Thread-safe; ignored after stop."""
        with self._lock:
            if self._stopping:
                return
            self._posted.append(work)
            if self._awake:
                return
            self._awake = True
            os.eventfd_write(self._wake_fd, 1)

    def call(self, work: Callable[[], T], timeout_s: float = 30.0) -> T:
        """Run ``work`` on the thread and return what it returns. Not from the thread itself."""
        outcome: Future[T] = Future()

        def run() -> None:
            try:
                outcome.set_result(work())
            except BaseException as error:
                outcome.set_exception(error)

        self.post(run)
        return outcome.result(timeout_s)

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
        if self.thread.is_alive() and self.thread is not threading.current_thread():
            self.thread.join(linger_s + 10)
        elif not self.thread.ident:
            self._release()

    def abandon(self) -> None:
        """Free everything of a reactor that was never started."""
        self._stopping = True
        self._release()

    def endpoint(self, on_receive: Callable[[bytes, Frames, int], None], *, watch: bool = False) -> Endpoint:
        """A ROUTER of this reactor. ``watch``: also report ended connections (see :class:`Endpoint`)."""
        return Endpoint(self, on_receive, watch=watch)

    def connection(self, address: str, on_receive: Callable[[Frames], None]) -> Connection:
        """A DEALER of this reactor, connected to ``address``."""
        return Connection(self, address, on_receive)

    def add(self, socket: zmq.Socket[bytes], on_readable: Callable[[], None]) -> None:
        """Watch a socket; on the reactor's thread, or before it starts."""
        self._sockets.append(socket)
        self._on_readable[socket] = on_readable
        self._poller.register(socket, zmq.POLLIN)

    def _run(self) -> None:
        next_tick = time.monotonic() + TICK_S
        try:
            while not self._stopping:
                with self._lock:
                    self._awake = bool(self._posted)
                ready = self._poller.poll(
                    0 if self._awake else max(0, math.ceil((next_tick - time.monotonic()) * 1000))
                )
                with self._lock:
                    self._awake = True
                for socket, _ in ready:
                    if socket == self._wake_fd:
                        os.eventfd_read(self._wake_fd)
                    else:
                        self._guarded(self._on_readable[socket])
                while self._posted:
                    self._guarded(self._posted.popleft())
                now = time.monotonic()
                if now >= next_tick:
                    next_tick = now + TICK_S
                    if self._on_tick is not None:
                        self._guarded(self._on_tick, now)
        finally:
            while self._posted:  # farewells that were posted before the stop
                self._guarded(self._posted.popleft())
            self._release()

    def _release(self) -> None:
        for socket in self._sockets:
            socket.close(linger=self._linger_ms)
        with self._lock:
            os.close(self._wake_fd)
        self.context.term()

    def _guarded(self, work: Callable[..., None], *args: Any) -> None:
        try:
            work(*args)
        except Exception:
            log.exception("%r: an event handler failed", self)


def _tune(socket: zmq.Socket[bytes]) -> None:
    socket.set_hwm(0)
    socket.setsockopt(zmq.IPV6, 1)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.LINGER, 0)


def _send(socket: zmq.Socket[bytes], frames: Sequence[Any], *, track: bool = False) -> list[zmq.MessageTracker]:
    """Send the frames, big ones in place; if asked, what tells when the memory of those is free again."""
    last = len(frames) - 1
    trackers = []
    for index, frame in enumerate(frames):
        more = zmq.SNDMORE if index < last else 0
        if memoryview(frame).nbytes < COPY_BYTES:
            socket.send(frame, more)
        elif track:
            trackers.append(socket.send(frame, more, copy=False, track=True))
        else:
            socket.send(frame, more, copy=False)
    return trackers


class Connection:
    """A DEALER to one peer. All methods on the reactor's thread; ``on_receive(frames)`` too."""

    def __init__(self, reactor: Reactor, address: str, on_receive: Callable[[Frames], None]) -> None:
        self.address = address
        self._on_receive = on_receive
        self._socket = reactor.context.socket(zmq.DEALER)
        _tune(self._socket)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 100)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self._socket.close()
            raise OptionError(f"an address: expected tcp://host:port, got {address!r}") from error
        reactor.add(self._socket, self._receive)

    def __repr__(self) -> str:
        return f"<Connection to {self.address}>"

    def send(self, frames: Sequence[Any]) -> None:
        """Queue one message; buffers of 64 KiB and more are sent in place and must not change."""
        _send(self._socket, frames)

    def _receive(self) -> None:
        for _ in range(64):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            self._on_receive([frame.buffer for frame in frames])


class Endpoint:
    """A ROUTER. ``on_receive(peer, frames, fd)``; ``peer`` addresses a reply.

    With ``watch``, ``on_disconnect(fd)`` tells that the connection behind ``fd`` ended.
    """

    def __init__(
        self, reactor: Reactor, on_receive: Callable[[bytes, Frames, int], None], *, watch: bool = False
    ) -> None:
        self.address = ""
        self.on_disconnect: Callable[[int], None] | None = None
        self._on_receive = on_receive
        self._watch = watch
        self._sending: deque[tuple[list[zmq.MessageTracker], Sequence[Callable[[], None]]]] = deque()
        self._socket = reactor.context.socket(zmq.ROUTER)
        _tune(self._socket)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        reactor.add(self._socket, self._receive)
        if watch:
            monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            reactor.add(monitor, lambda: self._observe(monitor))

    def __repr__(self) -> str:
        return f"<Endpoint at {self.address or 'no address yet'}>"

    def bind(self, address: str) -> str:
        """Bind before the reactor starts; the address with the port that was chosen for ``*``.

        Raises:
            OptionError: not an address, or one that cannot be bound.
        """
        self._socket.setsockopt(zmq.IPV6, int("[" in address))
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            raise OptionError(
                f"bind: expected a free address such as tcp://0.0.0.0:9091, got {address!r} ({error})"
            ) from error
        self.address = self._socket.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()  # type: ignore[union-attr]
        return self.address

    def send(self, peer: bytes, frames: Sequence[Any], on_sent: Sequence[Callable[[], None]] = ()) -> bool:
        """Queue one message; False when the peer's connection is gone.

        Each of ``on_sent`` is called, in time, once the frames' memory may be changed again.
        """
        trackers: list[zmq.MessageTracker] = []
        try:
            self._socket.send(peer, zmq.SNDMORE)
        except zmq.ZMQError:
            return False
        else:
            trackers = _send(self._socket, frames, track=bool(on_sent))
            return True
        finally:
            if on_sent:
                self._sending.append((trackers, on_sent))

    def _look_for_sent(self) -> None:
        while self._sending and all(tracker.done for tracker in self._sending[0][0]):
            for tell in self._sending.popleft()[1]:
                tell()

    def _receive(self) -> None:
        self._look_for_sent()
        for _ in range(64):
            try:
                peer, *frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            if not frames:
                continue
            fd = frames[0].get(zmq.SRCFD) if self._watch else -1
            self._on_receive(peer.bytes, [frame.buffer for frame in frames], int(fd))

    def _observe(self, monitor: zmq.Socket[bytes]) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                event = parse_monitor_message(monitor.recv_multipart(zmq.NOBLOCK))
                if self.on_disconnect is not None:
                    self.on_disconnect(int(event["value"]))
