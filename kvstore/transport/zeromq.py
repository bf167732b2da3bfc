"""ZeroMQ sockets in a :class:`~kvstore.transport.reactor.Reactor`.

A :class:`Connection` (DEALER) speaks to one server, an :class:`Endpoint` (ROUTER) to all who connect. High-water marks
are 0: the credit of :mod:`kvstore.protocol.requesting` is the bound. Nothing survives a reconnect;
whoever sends keeps its requests until they are answered. Liveness is libzmq's own heartbeat, which
its I/O thread answers even while Python is busy. Between processes of one host small messages may take
a shorter way, see :mod:`kvstore.transport.lines`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket as sockets
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from kvstore.errors import OptionError
from kvstore.transport.curve import Gate, Identity, protect_connection
from kvstore.transport.lines import Line, Lines, connect
from kvstore.transport.network import BULK_HEARTBEAT_S, Frames, Network
from kvstore.transport.reactor import Reactor

log = logging.getLogger(__name__)

PING, TIMEOUT = 1 / 6, 1 / 2  # of the heartbeat's deadline: how often a peer is asked, how soon it must answer
LOOPBACK_SNDBUF = 512 << 10  # more has left the caches before it is received; a far peer may need more
COPY_BYTES = 64 << 10  # frames below this are cheaper to copy than to track
QUEUE_MESSAGES = 4096  # that one peer has sent or been sent, and that have not been read; more ends its connection
HANDSHAKE_MS = 10000  # a peer that has not shown who it is by then is cut off
REFUSALS_SUSPECT = 3  # handshakes in a row that end without a reason before that is a reason
LOOK_S, LOOK_S_MAX = 0.001, 0.05  # how often it is looked whether large frames have been sent

_LOOPBACK = re.compile(r"tcp://(127\.\d+\.\d+\.\d+|localhost|\[::1\]):")
_HANDSHAKES = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


def is_loopback(address: str) -> bool:
    """Can only processes of this host reach it?"""
    return _LOOPBACK.match(address) is not None


def hang_up(fd: int) -> None:
    """End the TCP connection behind a descriptor that ZeroMQ owns, which then learns that it ended."""
    with contextlib.suppress(OSError):  # it has ended meanwhile
        copy = os.dup(fd)
        try:
            with sockets.socket(fileno=copy) as connection:
                copy = -1
                connection.shutdown(sockets.SHUT_RDWR)
        finally:
            if copy >= 0:
                os.close(copy)


def _events(monitor: zmq.Socket[bytes]) -> list[tuple[int, int]]:
    """What a monitor has seen since it was last asked: kinds of event with their values."""
    seen = []
    with contextlib.suppress(zmq.Again):
        while True:
            event = parse_monitor_message(monitor.recv_multipart(zmq.NOBLOCK))
            seen.append((int(event["event"]), int(event["value"])))
    return seen


def _tune(socket: zmq.Socket[bytes], address: str, heartbeat_s: float) -> None:
    """Options of a socket that is about to bind or connect to ``address``."""
    socket.set_hwm(0)
    socket.setsockopt(zmq.IPV6, 1)
    socket.setsockopt(zmq.HEARTBEAT_IVL, max(1, int(heartbeat_s * PING * 1000)))
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, max(1, int(heartbeat_s * TIMEOUT * 1000)))
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.setsockopt(zmq.LINGER, 0)
    if is_loopback(address):
        socket.setsockopt(zmq.SNDBUF, LOOPBACK_SNDBUF)


def _send(socket: zmq.Socket[bytes], frames: Sequence[Any], *, track: bool = False) -> list[zmq.MessageTracker]:
    """Send the frames, big ones in place; if asked, what tells when they are on their way and their memory is free."""
    last = len(frames) - 1
    trackers = []
    for index, frame in enumerate(frames):
        flags = zmq.NOBLOCK | (zmq.SNDMORE if index < last else 0)
        if memoryview(frame).nbytes < COPY_BYTES and not (track and index == 0):
            socket.send(frame, flags)
        elif track:
            trackers.append(socket.send(frame, flags, copy=False, track=True))
        else:
            socket.send(frame, flags, copy=False)
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


def _told(frame: zmq.Frame, what: int | str, default: int | str) -> int | str:
    """What ZeroMQ knows of the connection that a frame came by; it is not there when that has ended, sometimes."""
    try:
        return frame.get(what)
    except zmq.ZMQError:
        return default


class Connection:
    """A DEALER to one peer. All methods within the reactor's loop; ``on_receive(frames)`` too.

    ``on_lost``, if given, is called when the connection has ended: what it has not sent it will send when it is
    renewed, which may be out of place.

    ``own``: this process's keys; None: it has none. When it is certain that the peer and this process do not accept
    each other's keys, ``refused`` says why, and nothing more will come. ``suspicion`` is the same where it is only
    likely.
    """

    def __init__(
        self,
        reactor: Reactor,
        address: str,
        on_receive: Callable[[Frames], None],
        on_lost: Callable[[], None] | None = None,
        heartbeat_s: float = BULK_HEARTBEAT_S,
        own: Identity | None = None,
    ) -> None:
        self.address = address
        self.refused = self.suspicion = ""
        self._failures = 0  # handshakes since the last one that went well
        self._up = False
        self._own = own
        self._on_lost = on_lost
        self._reactor = reactor
        self._on_receive = on_receive
        self._line: Line | None = None
        self._socket = reactor.context.socket(zmq.DEALER)
        _tune(self._socket, address, heartbeat_s)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 100)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        if own is not None:
            protect_connection(self._socket, own)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | _HANDSHAKES)  # before there is any
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self._monitor.close()
            self._socket.close()
            raise OptionError(f"an address: expected tcp://host:port, got {address!r}") from error
        reactor.add(self._socket, self._receive)
        reactor.add(self._monitor, self._observe)

    def __repr__(self) -> str:
        return f"<Connection to {self.address}{': ' * bool(self.refused)}{self.refused}>"

    def close(self) -> None:
        """End it at once; what it has not sent is forgotten."""
        if self._line is not None:
            self._reactor.forget(self._line)
            self._line = None
        self._reactor.remove(self._monitor)
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._reactor.remove(self._socket)
        self._socket.close(linger=0)

    def shorten(self, offered: str) -> None:
        """Open the line that the peer's :meth:`Endpoint.offer` offered, for small messages."""
        if self._line is None and (line := connect(offered)) is not None:
            self._line = line
            self._reactor.watch(line, partial(self._receive_by, line))

    def send(self, frames: Sequence[Any]) -> None:
        """Queue one message; buffers of 64 KiB and more are sent in place and must not change."""
        if self._line is None or not self._line.send(frames):
            self._reactor.used(self._socket)
            with contextlib.suppress(zmq.Again):  # the peer has refused us, and ZeroMQ has nowhere to queue it
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

    def _observe(self) -> None:
        for event, _ in _events(self._monitor):
            if event == zmq.EVENT_DISCONNECTED:
                up, self._up = self._up, False
                if up and self._on_lost is not None:
                    self._on_lost()
                    return  # which may have closed it
            elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self.refused = "it does not accept this process's key, which is unknown to it or was revoked"
            elif event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                self.refused = self._mismatch()
            elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._up, self._failures, self.suspicion = True, 0, ""
            else:
                self._failures += 1
                if self._failures >= REFUSALS_SUSPECT:
                    another = "it has another cluster's keys or none" if self._own else self._mismatch()
                    self.suspicion = f"it ended the connection {self._failures} times; perhaps {another}"

    def _mismatch(self) -> str:
        if self._own is None:
            return "it is protected by keys, and this process was given none (keys=, --keys or KVSTORE_KEYS)"
        return "it is not protected by keys, and this process was given some"


class Endpoint:
    """A ROUTER. ``on_receive(peer, frames)``; ``peer`` addresses a reply.

    A frame of more than ``frame_bytes_max`` costs its sender the connection before it is read. With ``watch``,
    ``on_disconnect()`` tells that some connection ended; soon after, :meth:`send` knows which. ``on_gone(peer)`` tells
    which, and ``on_stuck(peer)`` that a peer has not read the last ``QUEUE_MESSAGES`` that it was sent. With a
    ``gate``, only those whom it admits are heard, and the connection of one who is no longer admitted is ended.
    """

    def __init__(
        self,
        reactor: Reactor,
        on_receive: Callable[[bytes, Frames], None],
        *,
        frame_bytes_max: int,
        watch: bool = False,
        heartbeat_s: float = BULK_HEARTBEAT_S,
        gate: Gate | None = None,
    ) -> None:
        self.address = ""
        self.on_gone: Callable[[bytes], None] | None = None
        self.on_stuck: Callable[[bytes], None] | None = None
        self._gate = gate
        self._peers: dict[int, tuple[bytes, str]] = {}  # fd -> the peer behind it, and its key
        self._heartbeat_s = heartbeat_s
        self.on_disconnect: Callable[[], None] | None = None
        self._on_receive = on_receive
        self._reactor = reactor
        self._sending: list[tuple[list[zmq.MessageTracker], Sequence[Callable[[], None]]]] = []
        self._socket = reactor.context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.MAXMSGSIZE, frame_bytes_max)
        self._lines = Lines(reactor, on_receive)
        reactor.add(self._socket, self._receive)
        if gate is not None:
            gate.protect(self._socket)
            gate.on_change.append(self._expel)
        self._watch = watch or gate is not None
        if self._watch:
            monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | _HANDSHAKES)
            reactor.add(monitor, lambda: self._observe(monitor))

    def __repr__(self) -> str:
        return f"<Endpoint at {self.address or 'no address yet'}>"

    def bind(self, address: str) -> str:
        """Bind before the reactor starts; the address with the port that was chosen for ``*``.

        Raises:
            OptionError: not an address, or one that cannot be bound.
        """
        _tune(self._socket, address, self._heartbeat_s)
        self._socket.set_hwm(QUEUE_MESSAGES)
        self._socket.setsockopt(zmq.IPV6, int("[" in address))
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            raise OptionError(
                f"bind: expected a free address such as tcp://0.0.0.0:9091, got {address!r} ({error})"
            ) from error
        if self._gate is None and not is_loopback(address):
            log.warning("%s is open to all who reach it, unencrypted: give it keys (kvstore keygen, --keys)", address)
        self.address = self._socket.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()  # type: ignore[union-attr]
        return self.address

    def offer(self, peer: bytes) -> str:
        """By what a peer of this host may :meth:`Connection.shorten` its connection."""
        return self._lines.offer(peer)

    def send(self, peer: bytes, frames: Sequence[Any], on_sent: Sequence[Callable[[], None]] = ()) -> bool:
        """Queue one message; False when the peer's connection is gone, or its queue is full.

        Each of ``on_sent`` is called, in time, once the frames' memory may be changed again.
        """
        if self._lines.send(peer, frames):
            for tell in on_sent:
                tell()
            return True
        trackers: list[zmq.MessageTracker] = []
        self._reactor.used(self._socket)
        try:
            self._socket.send(peer, zmq.SNDMORE | zmq.NOBLOCK)
        except zmq.Again:
            if self.on_stuck is not None:
                self.on_stuck(peer)
            return False
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
            if self._watch and not self._knows(frames[0].bytes, frames[1]):
                return
            self._on_receive(frames[0].bytes, [frame.buffer for frame in frames[1:]])

    def end(self, peer: bytes) -> None:
        """End the connection of this peer."""
        self._lines.end(peer)
        for fd, (one, _) in self._peers.items():
            if one == peer:
                hang_up(fd)

    def _knows(self, peer: bytes, frame: zmq.Frame) -> bool:
        """Note behind which descriptor a peer is, and whether it may speak."""
        fd = int(_told(frame, zmq.SRCFD, -1))
        key = "" if self._gate is None else str(_told(frame, "User-Id", ""))
        if fd >= 0:
            self._peers[fd] = peer, key
        if self._gate is None or self._gate.admits(key):
            return True
        hang_up(fd)
        return False

    def _observe(self, monitor: zmq.Socket[bytes]) -> None:
        for event, value in _events(monitor):
            if event == zmq.EVENT_DISCONNECTED:
                peer, _ = self._peers.pop(value, (b"", ""))
                if self.on_disconnect is not None:
                    self.on_disconnect()
                if peer and self.on_gone is not None:
                    self.on_gone(peer)
            elif event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL and self._gate is not None:
                self._gate.note("a peer that has no keys, or those of another cluster")

    def _expel(self) -> None:
        """End the connections of those who are not admitted any more."""
        assert self._gate is not None
        for peer, key in list(self._peers.values()):
            if not self._gate.admits(key):
                self.end(peer)


class ZeroMQ:
    """The network between real processes.

    Args:
        own: this process's keys; None: the cluster is not protected.
        allowed: the keys that may connect now, each with its name; None: this process may not be connected to.
    """

    def __init__(self, own: Identity | None = None, allowed: Callable[[], Mapping[str, str]] | None = None) -> None:
        self._own = own
        self._allowed = allowed
        self._gates: weakref.WeakKeyDictionary[Reactor, Gate] = weakref.WeakKeyDictionary()

    def __repr__(self) -> str:
        return f"<ZeroMQ{', protected' if self._own else ''}>"

    def _gate(self, loop: Reactor) -> Gate | None:
        """What all endpoints of the loop let peers in by."""
        if self._own is None:
            return None
        if self._allowed is None:
            raise OptionError(
                "keys: expected cluster.key_secret, which schedulers and servers need; got those of a client"
            )
        if loop not in self._gates:
            self._gates[loop] = Gate(loop, self._own, self._allowed)
        return self._gates[loop]

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
        return Connection(loop, address, on_receive, on_lost, heartbeat_s, self._own)

    def listen(
        self,
        loop: Reactor,
        on_receive: Callable[[bytes, Frames], None],
        *,
        frame_bytes_max: int,
        watch: bool = False,
        heartbeat_s: float = BULK_HEARTBEAT_S,
    ) -> Endpoint:
        """An endpoint in this loop, not yet bound.

        Raises:
            OptionError: these are the keys of a client.
        """
        return Endpoint(
            loop,
            on_receive,
            frame_bytes_max=frame_bytes_max,
            watch=watch,
            heartbeat_s=heartbeat_s,
            gate=self._gate(loop),
        )


NETWORK: Network = ZeroMQ()
