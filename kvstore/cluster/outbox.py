"""Replies of a server to one peer, on their way to the socket: urgent ones first.

What a socket has been given can no longer be overtaken. So large replies are given to it a few at a time, the
next when the memory of an earlier one is free again; what needs to be sent quickly goes before those that wait here.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvstore.protocol.messages import Message
from kvstore.protocol.pieces import PIECE_BYTES
from kvstore.records import record

WINDOW_BYTES = 2 * PIECE_BYTES  # of large replies that the socket has
WINDOW_BYTES_MAX = 2 * WINDOW_BYTES  # of all that it is asked about
TRACKED_BYTES = 16 << 10  # of less than this it is not asked when it is sent
BATCH_BYTES = 256 << 10  # replies travel together up to this size

Outgoing = tuple[Message, Sequence[Any]]
OnSent = Callable[[], None]


@dataclass(order=True, slots=True)
class _Waiting:
    urgency: tuple[int, int]  # smaller is sooner
    message: Message = field(compare=False)
    frames: Sequence[Any] = field(compare=False)
    nbytes: int = field(compare=False)
    on_sent: OnSent | None = field(compare=False)


@record
class Batch:
    """What goes to the socket as one ZeroMQ message."""

    messages: list[Outgoing]
    nbytes: int
    on_sent: list[OnSent]


class Outbox:
    """The replies to one peer. Not thread-safe."""

    def __init__(self) -> None:
        self.in_flight = 0  # bytes that the socket has been given and not yet sent, as far as it tells
        self.nbytes = 0  # of the frames that wait here
        self._moved_at: float | None = None  # when it was first seen to wait like this
        self._waiting: list[_Waiting] = []
        self._count = 0

    def __repr__(self) -> str:
        return f"<Outbox: {len(self._waiting)} replies, {self.in_flight} bytes in flight>"

    def put(
        self, message: Message, frames: Sequence[Any] = (), priority: int = 0, on_sent: OnSent | None = None
    ) -> None:
        """A reply; ``on_sent`` is called when the memory of its frames is free again."""
        self._count += 1
        nbytes = sum(frame.nbytes for frame in frames)
        self.nbytes += nbytes
        heapq.heappush(self._waiting, _Waiting((-priority, self._count), message, frames, nbytes, on_sent))

    def batches(self) -> Iterator[Batch]:
        """What may go to the socket now."""
        while self._waiting and self._may_go(self._waiting[0].nbytes):
            self._moved_at = None
            messages: list[Outgoing] = []
            on_sent: list[OnSent] = []
            size = 0
            while self._waiting and not (size and size + self._waiting[0].nbytes > BATCH_BYTES):
                reply = heapq.heappop(self._waiting)
                messages.append((reply.message, reply.frames))
                size += reply.nbytes
                if reply.on_sent is not None:
                    on_sent.append(reply.on_sent)
            self.nbytes -= size
            if size > TRACKED_BYTES:
                self.in_flight += size
                on_sent.append(lambda size=size: self._sent(size))  # type: ignore[misc]
            yield Batch(messages, size, on_sent)

    def _may_go(self, nbytes: int) -> bool:
        window = WINDOW_BYTES_MAX if nbytes <= BATCH_BYTES else WINDOW_BYTES
        return not self.in_flight or self.in_flight + nbytes <= window

    def __len__(self) -> int:
        return len(self._waiting)

    def stalled(self, now: float, patience_s: float) -> bool:
        """Have the replies that wait here waited for so long, and nothing moved? Ask now and then."""
        if not self._waiting:
            self._moved_at = None
            return False
        if self._moved_at is None:
            self._moved_at = now
        return now - self._moved_at > patience_s

    def discard(self) -> list[OnSent]:
        """Forget what waits; returns whom to tell that its memory is free."""
        waiting, self._waiting = self._waiting, []
        self.nbytes = 0
        return [reply.on_sent for reply in waiting if reply.on_sent is not None]

    def _sent(self, nbytes: int) -> None:
        self._moved_at = None
        self.in_flight -= nbytes
