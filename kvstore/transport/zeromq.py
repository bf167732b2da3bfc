"""ZeroMQ sockets in a :class:`~kvstore.transport.reactor.Reactor`.

A :class:`Connection` (DEALER) speaks to one server, an :class:`Endpoint` (ROUTER) to all who connect. High-water marks
are 0: the credit of :mod:`kvstore.protocol.requesting` is the bound. Nothing survives a reconnect;
whoever sends keeps its requests until they are answered. Liveness is libzmq's own heartbeat, which
its I/O thread answers even while Python is busy. Between processes of one host small messages may take
a shorter way, see :mod:`kvstore.transport.lines`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from kvstore.errors import OptionError
from kvstore.transport.lines import Line, Lines, connect
from kvstore.transport.network import BULK_HEARTBEAT_S, Frames, Network
from kvstore.transport.reactor import Reactor

PING, TIMEOUT = 1 / 6, 1 / 2  # of the heartbeat's deadline: how often a peer is asked, how soon it must answer
LOOPBACK_SNDBUF = 512 << 10  # more has left the caches before it is received; a far peer may need more
COPY_BYTES = 64 << 10  # frames below this are cheaper to copy than to track
LOOK_S, LOOK_S_MAX = 0.001, 0.05  # how often it is looked whether large frames have been sent

_LOOPBACK = re.compile(r"tcp://(127\.\d+\.\d+\.\d+|localhost|\[::1\]):")


def _tune(socket: zmq.Socket[bytes], address: str, heartbeat_s: float) -> None:
    """Options of a socket that is about to bind or connect to ``address``."""
    socket.set_hwm(0)
    socket.setsockopt(zmq.IPV6, 1)
    socket.setsockopt(zmq.HEARTBEAT_IVL, max(1, int(heartbeat_s * PING * 1000)))
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, max(1, int(heartbeat_s * TIMEOUT * 1000)))
    socket.setsockopt(zmq.LINGER, 0)
    if _LOOPBACK.match(address):
        socket.setsockopt(zmq.SNDBUF, LOOPBACK_SNDBUF)


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


def _receive(socket: zmq.Socket[bytes]) -> list[zmq.Frame] | None:
    """The frames of one message; None when there is none."""
    try:
        frame = socket.recv(zmq.NOBLOCK, copy=False)
    except zmq.Again:
        return None
    frames = [frame]
    while frame.more:
        frame = socket.recv(zmq.NOBLOCK, copy=False)
        frames.append(frame)
    return frames


class Connection:
    """A DEALER to one peer. All methods within the reactor's loop; ``on_receive(frames)`` too.

    ``on_lost``, if given, is called when the connection has ended: what it has not sent it will send when it is
    renewed, which may be out of place.
    """

    def __init__(
        self,
        reactor: Reactor,
        address: str,
        on_receive: Callable[[Frames], None],
        on_lost: Callable[[], None] | None = None,
        heartbeat_s: float = BULK_HEARTBEAT_S,
    ) -> None:
        self.address = address
        self._reactor = reactor
        self._on_receive = on_receive
        self._line: Line | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._socket = reactor.context.socket(zmq.DEALER)
        _tune(self._socket, address, heartbeat_s)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 100)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self._socket.close()
            raise OptionError(f"an address: expected tcp://host:port, got {address!r}") from error
        reactor.add(self._socket, self._receive)
        if on_lost is not None:
            monitor = self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            reactor.add(monitor, lambda: _observe(monitor, lambda _: on_lost()))

    def __repr__(self) -> str:
        return f"<Connection to {self.address}>"

    def close(self) -> None:
        """End it at once; what it has not sent is forgotten."""
        if self._line is not None:
            self._reactor.forget(self._line)
            self._line = None
        if self._monitor is not None:
            self._reactor.remove(self._monitor)
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
        self._reactor.remove(self._socket)
        self._socket.close(linger=0)

    def shorten(self, offered: str) -> None:
        """Open the line that the peer's :meth:`Endpoint.offer` offered, for small messages."""
        if self._line is None and (line := connect(offered)) is not None:
            self._line = line
            self._reactor.watch(line, lambda: self._receive_by(line))

    def send(self, frames: Sequence[Any]) -> None:
        """Queue one message; buffers of 64 KiB and more are sent in place and must not change."""
        if self._line is None or not self._line.send(frames):
            self._reactor.used(self._socket)
            _send(self._socket, frames)

    def _receive(self) -> None:
        frames = _receive(self._socket)
        if frames is not None:
            self._on_receive([frame.buffer for frame in frames])

    def _receive_by(self, line: Line) -> None:
        try:
            frames = line.receive()
        except OSError:
            self._line = None
            self._reactor.forget(line)
            return
        if frames is not None:
            self._on_receive(frames)


class Endpoint:
    """A ROUTER. ``on_receive(peer, frames)``; ``peer`` addresses a reply.

    A frame of more than ``frame_bytes_max`` costs its sender the connection before it is read. With ``watch``,
    ``on_disconnect()`` tells that some connection ended; soon after, :meth:`send` knows which.
    """

    def __init__(
        self,
        reactor: Reactor,
        on_receive: Callable[[bytes, Frames], None],
        *,
        frame_bytes_max: int,
        watch: bool = False,
        heartbeat_s: float = BULK_HEARTBEAT_S,
    ) -> None:
        self.address = ""
        self._heartbeat_s = heartbeat_s
        self.on_disconnect: Callable[[], None] | None = None
        self._on_receive = on_receive
        self._reactor = reactor
        self._sending: list[tuple[list[zmq.MessageTracker], Sequence[Callable[[], None]]]] = []
        self._socket = reactor.context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.MAXMSGSIZE, frame_bytes_max)
        self._lines = Lines(reactor, lambda peer, frames: on_receive(peer, frames))
        reactor.add(self._socket, self._receive)
        if watch:
            monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            reactor.add(monitor, lambda: _observe(monitor, self._ended))

    def __repr__(self) -> str:
        return f"<Endpoint at {self.address or 'no address yet'}>"

    def bind(self, address: str) -> str:
        """Bind before the reactor starts; the address with the port that was chosen for ``*``.

        Raises:
            OptionError: not an address, or one that cannot be bound.
        """
        _tune(self._socket, address, self._heartbeat_s)
        self._socket.setsockopt(zmq.IPV6, int("[" in address))
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            raise OptionError(
                f"bind: expected a free address such as tcp://0.0.0.0:9091, got {address!r} ({error})"
            ) from error
        self.address = self._socket.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()  # type: ignore[union-attr]
        return self.address

    def offer(self, peer: bytes) -> str:
        """By what a peer of this host may :meth:`Connection.shorten` its connection."""
        return self._lines.offer(peer)

    def send(self, peer: bytes, frames: Sequence[Any], on_sent: Sequence[Callable[[], None]] = ()) -> bool:
        """Queue one message; False when the peer's connection is gone.

        Each of ``on_sent`` is called, in time, once the frames' memory may be changed again.
        """
        if self._lines.send(peer, frames):
            for tell in on_sent:
                tell()
            return True
        trackers: list[zmq.MessageTracker] = []
        self._reactor.used(self._socket)
        try:
            self._socket.send(peer, zmq.SNDMORE)
        except zmq.ZMQError:
            self._lines.end(peer)
            return False
        else:
            trackers = _send(self._socket, frames, track=bool(on_sent))
            return True
        finally:
            if on_sent:
                self._sending.append((trackers, on_sent))
                if len(self._sending) == 1:
                    self._reactor.call_later(LOOK_S, lambda: self._look_again(LOOK_S))

    def close(self) -> None:
        """For good; nobody is told any more about what was sent. From within the loop."""
        self._sending.clear()
        self._lines.close()
        self._reactor.remove(self._socket)
        self._socket.close(linger=0)

    def _look_for_sent(self) -> bool:
        """Tell about what the socket has sent; was there any?"""
        over = [sent for sent in self._sending if all(tracker.done for tracker in sent[0])]
        for sent in over:
            self._sending.remove(sent)
            for tell in sent[1]:
                tell()
        return bool(over)

    def _look_again(self, delay_s: float) -> None:
        """Trackers tell nobody: look at them soon, and then less and less often as long as nothing moves."""
        delay_s = LOOK_S if self._look_for_sent() else min(2 * delay_s, LOOK_S_MAX)
        if self._sending:
            self._reactor.call_later(delay_s, lambda: self._look_again(delay_s))

    def _receive(self) -> None:
        if self._sending:
            self._look_for_sent()
        frames = _receive(self._socket)
        if frames is not None and len(frames) > 1:
            self._on_receive(frames[0].bytes, [frame.buffer for frame in frames[1:]])

    def _ended(self, fd: int) -> None:
        if self.on_disconnect is not None:
            self.on_disconnect()


def _observe(monitor: zmq.Socket[bytes], tell: Callable[[int], None]) -> None:
    """Tell the value of each event, for one that ends a connection its file descriptor."""
    with contextlib.suppress(zmq.Again):
        while True:
            tell(int(parse_monitor_message(monitor.recv_multipart(zmq.NOBLOCK))["value"]))


class ZeroMQ:
    """The network between real processes."""

    def __repr__(self) -> str:
        return "<ZeroMQ>"

    def loop(
        self,
        name: str,
        on_tick: Callable[[float], None] | None = None,
        busy: Callable[[], bool] = lambda: True,
        *,
        io_threads: int = 1,
    ) -> Reactor:
        """A loop, not yet started."""
        return Reactor(name, on_tick, busy, io_threads=io_threads)

    def connect(
        self,
        loop: Reactor,
        address: str,
        on_receive: Callable[[Frames], None],
        on_lost: Callable[[], None] | None = None,
        heartbeat_s: float = BULK_HEARTBEAT_S,
    ) -> Connection:
        """A connection in this loop."""
        return Connection(loop, address, on_receive, on_lost, heartbeat_s)

    def listen(
        self,
        loop: Reactor,
        on_receive: Callable[[bytes, Frames], None],
        *,
        frame_bytes_max: int,
        watch: bool = False,
        heartbeat_s: float = BULK_HEARTBEAT_S,
    ) -> Endpoint:
        """An endpoint in this loop, not yet bound."""
        return Endpoint(loop, on_receive, frame_bytes_max=frame_bytes_max, watch=watch, heartbeat_s=heartbeat_s)


NETWORK: Network = ZeroMQ()
