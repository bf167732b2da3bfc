"""Lines: a shorter way for small messages between two processes of one host that a ZeroMQ connection joins already.

What ZeroMQ sends goes through a thread of its own on either side, and each of these hand-overs costs more than
a small message does. A line is a Unix socket from the thread that has the message to the thread that waits for it:
a bare round of two clients takes a third of the time.

What this file decides: how frames become one packet, who may open a line. A line promises little: what it cannot
take, because it is too large, or too much is on the way, or the line has ended, is left to the ZeroMQ connection, and
comes in another order then. Liveness and waiting for a peer that has yet to come are left to that connection, too.

The listening socket has a random name in Linux's abstract namespace: nothing is left of it when its process ends.
"""

from __future__ import annotations

import secrets
import socket
import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from kvstore.transport.reactor import Reactor

PACKET_BYTES_MAX = 96 << 10  # with what is beside the frames; ZeroMQ, which copies in the background, is no worse above
FRAMES_MAX = 64
WAITING_MAX = 64  # lines that have yet to say whose they are
ALIGNMENT = 16  # of the value frames in a packet: kernels want aligned arrays

Frames = list[Any]


class Line:
    """One end of a line. Within the reactor's loop.

    A packet is ``[number of frames, their sizes]`` as 32-bit integers, then the value frames, then the header frame
    (the first), all but the last padded to 16 bytes.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        sock.setblocking(False)

    def __repr__(self) -> str:
        return f"<Line {self.fileno()}>"

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def send(self, frames: Sequence[Any]) -> bool:
        """Send one message now; False: it has to go another way."""
        sizes = [memoryview(frame).nbytes for frame in frames]
        if len(sizes) > FRAMES_MAX or sum(sizes) > PACKET_BYTES_MAX - 2 * ALIGNMENT * FRAMES_MAX:
            return False
        packet = [_HEADS[len(sizes)].pack(len(sizes), *sizes)]
        for frame, size in zip(frames[1:], sizes[1:], strict=True):
            packet.append(frame)
            if size % ALIGNMENT:
                packet.append(bytes(-size % ALIGNMENT))
        packet.append(frames[0])
        try:
            self._socket.sendmsg(packet)
        except OSError:  # full, or broken: then whoever reads it will see
            return False
        return True

    def receive(self) -> Frames | None:
        """The frames of one message; None when there is none.

        Raises:
            ConnectionError: the line has ended, or what came is no message.
        """
        try:
            packet = self._socket.recv(PACKET_BYTES_MAX)
        except BlockingIOError:
            return None
        if not packet:
            raise ConnectionError("the line has ended")
        return _frames(packet)


def _padded(size: int) -> int:
    return size + -size % ALIGNMENT


def _head(frames: int) -> struct.Struct:
    """The form of the number of frames and their sizes."""
    filled = 4 + 4 * frames
    return struct.Struct(f"<{1 + frames}I{_padded(filled) - filled}x")


_HEADS = [_head(frames) for frames in range(FRAMES_MAX + 1)]


def _frames(packet: bytes) -> Frames:
    """What :meth:`Line.send` was given."""
    count = packet[0]  # the lowest byte of it
    if not 1 <= count <= FRAMES_MAX or len(packet) < _HEADS[count].size:
        raise ConnectionError(f"a line's packet: expected 1 to {FRAMES_MAX} frames, got {len(packet)} other bytes")
    start = _HEADS[count].size
    said, header_bytes, *sizes = _HEADS[count].unpack_from(packet)
    view = memoryview(packet)
    frames: Frames = [b""]
    for size in sizes:
        frames.append(view[start : start + size])
        start += size + -size % ALIGNMENT
    if said != count or start + header_bytes != len(packet):
        raise ConnectionError(
            f"a line's packet: expected frames of {sizes} and {header_bytes}, got {len(packet)} bytes"
        )
    frames[0] = view[start:]
    return frames


class Lines:
    """The ends of an endpoint: for each of its peers a line, if the peer has opened one.

    Args:
        on_receive: called with the peer and the frames of a message.
    """

    def __init__(self, reactor: Reactor, on_receive: Callable[[bytes, Frames], None]) -> None:
        self._reactor = reactor
        self._on_receive = on_receive
        self._listening: socket.socket | None = None
        self._name = f"kvstore-{secrets.token_hex(8)}"
        self._tickets: dict[bytes, bytes] = {}  # what a line has to show -> the peer it is for
        self._waiting: list[Line] = []  # lines that have shown nothing yet
        self._lines: dict[bytes, Line] = {}  # by peer

    def __repr__(self) -> str:
        return f"<Lines {self._name}: {len(self._lines)}>"

    def offer(self, peer: bytes) -> str:
        """What ``peer``, and nobody else, may :func:`connect` to; "" where there are no such sockets."""
        try:
            self._listen()
        except OSError:
            return ""
        ticket = secrets.token_hex(16)
        self._tickets = {t: p for t, p in self._tickets.items() if p != peer} | {ticket.encode(): peer}
        return f"{self._name}/{ticket}"

    def send(self, peer: bytes, frames: Sequence[Any]) -> bool:
        """Send one message to ``peer`` now; False: it has to go another way."""
        line = self._lines.get(peer)
        return line is not None and line.send(frames)

    def end(self, peer: bytes) -> None:
        """The peer is not reached any more by what this is a shorter way for."""
        line = self._lines.pop(peer, None)
        if line is not None:
            self._reactor.forget(line)

    def close(self) -> None:
        """End all lines, and take no more. From within the loop."""
        for peer in list(self._lines):
            self.end(peer)
        while self._waiting:
            self._reactor.forget(self._waiting.pop())
        if self._listening is not None:
            self._reactor.forget(self._listening)
            self._listening = None

    def _listen(self) -> None:
        if self._listening is None:
            listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            listening.setblocking(False)
            listening.bind(f"\0{self._name}")
            listening.listen(WAITING_MAX)
            self._listening = listening
            self._reactor.watch(listening, self._accept)

    def _accept(self) -> None:
        assert self._listening is not None
        line = Line(self._listening.accept()[0])
        self._waiting.append(line)
        self._reactor.watch(line, lambda: self._greet(line))
        if len(self._waiting) > WAITING_MAX:
            self._reactor.forget(self._waiting.pop(0))

    def _greet(self, line: Line) -> None:
        """The first message is the ticket."""
        self._waiting.remove(line)
        self._reactor.forget(line, close=False)
        try:
            frames = line.receive()
        except ConnectionError:
            frames = None
        peer = self._tickets.pop(bytes(frames[0]), None) if frames else None
        if peer is None:
            line.close()
            return
        self.end(peer)
        self._lines[peer] = line
        self._reactor.watch(line, partial(self._receive, peer, line))

    def _receive(self, peer: bytes, line: Line) -> None:
        try:
            frames = line.receive()
        except (ConnectionError, OSError):
            self.end(peer)
            return
        if frames is not None:
            self._on_receive(peer, frames)


def connect(offered: str) -> Line | None:
    """The other end of what :meth:`Lines.offer` offered; None when there is no way there."""
    name, _, ticket = offered.partition("/")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    line = Line(sock)
    try:
        sock.connect(f"\0{name}")
        if line.send([ticket.encode()]):
            return line
    except OSError:
        pass
    line.close()
    return None
