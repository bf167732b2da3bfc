"""What a shard has to say: kept until its peer's connection takes it, and freed when nobody will read it any more.

It is known here which connection a rank has, and how much may wait for one. What is said, and when it is true, is
decided elsewhere.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from kvstore.cluster.outbox import OnSent, Outbox
from kvstore.cluster.stream import Mark
from kvstore.protocol.messages import Message
from kvstore.protocol.pieces import BundleId, Key
from kvstore.protocol.wire import Sender, envelope
from kvstore.transport.network import Loop, Port

log = logging.getLogger(__name__)

OUTBOX_BYTES = 256 << 20  # that wait for one peer, beside OUTBOX_SHARE times what is stored; looked at now and then
OUTBOX_SHARE = 4
REPLIES_MAX = 1 << 18  # that wait for one peer
STALLED_S = 30.0  # how long a peer may take to read anything, while replies wait for it

Together = tuple[int, Key | BundleId]  # a rank and a key: the replies for its pieces had better travel together


class Replies:
    """The replies of one shard. Within the loop, but for :meth:`post`.

    Args:
        endpoint: what they are sent by. It says here which connections have ended.
        sender: how this server presents itself.
        first: called before each :meth:`flush`: what has to be sent before the replies.
    """

    def __init__(self, loop: Loop, endpoint: Port, sender: Callable[[], Sender], first: Callable[[], None]) -> None:
        self._loop = loop
        self._endpoint = endpoint
        self._sender = sender
        self._first = first
        self._peers: dict[int, bytes] = {}  # rank -> its latest connection
        self._outboxes: dict[bytes, Outbox] = {}  # by connection
        self._unflushed: dict[bytes, Outbox] = {}
        self._flushing = False
        self._expected: dict[Together, int] = {}  # replies that have not come yet
        endpoint.on_gone = self._discard
        endpoint.on_stuck = self._drop

    def __repr__(self) -> str:
        return f"<Replies by {self._endpoint!r}: {sum(map(len, self._outboxes.values()))} wait>"

    def heard(self, rank: int, peer: bytes) -> None:
        """The rank's replies go to this connection from here on."""
        self._peers[rank] = peer

    def put(self, peer: bytes, message: Message, frames: Sequence[Any] = ()) -> None:
        """To whoever has that connection."""
        self._outbox(peer).put(message, frames)

    def reply(
        self,
        rank: int,
        message: Message,
        frames: Sequence[Any] = (),
        priority: int = 0,
        on_sent: OnSent | None = None,
        mark: Mark | None = None,
        together: Together | None = None,
    ) -> None:
        """To a worker, once ``mark`` has been passed.

        Args:
            on_sent: called when the memory of the frames is not needed any more.
            together: it is one of the replies that were expected under this name.
        """
        if together is not None:
            self._count_off(together)
        if mark is not None and not mark.passed:
            mark.then(lambda: self.reply(rank, message, frames, priority, on_sent))
            return
        peer = self._peers.get(rank)
        if peer is not None:
            self._outbox(peer).put(message, frames, priority, on_sent)
        elif on_sent is not None:
            on_sent()

    def post(
        self,
        rank: int,
        message: Message,
        frames: Sequence[Any] = (),
        priority: int = 0,
        on_sent: OnSent | None = None,
        mark: Mark | None = None,
        together: Together | None = None,
    ) -> None:
        """As :meth:`reply`, and flush, unless more is expected to go with it; from any thread."""

        def reply() -> None:
            self.reply(rank, message, frames, priority, on_sent, mark, together)
            if together not in self._expected:
                self.flush_soon()

        self._loop.post(reply)

    def expect(self, together: Together) -> None:
        """One more reply that goes with those of this name will come, by :meth:`reply` or :meth:`post`."""
        self._expected[together] = self._expected.get(together, 0) + 1

    def _count_off(self, together: Together) -> None:
        left = self._expected.pop(together) - 1
        if left:
            self._expected[together] = left

    def flush(self) -> None:
        """Send what may be sent now."""
        self._flushing = False
        self._first()
        unflushed, self._unflushed = self._unflushed, {}
        for peer, outbox in unflushed.items():
            for batch in outbox.batches():
                on_sent = [*batch.on_sent, lambda peer=peer: self._sent(peer)] if batch.on_sent else []  # type: ignore[misc]
                if not self._endpoint.send(peer, envelope(self._sender(), batch.messages), on_sent):
                    self._discard(peer)
                    break

    def flush_soon(self) -> None:
        """After all that was posted until now, in as few messages as that allows."""
        if not self._flushing:
            self._flushing = True
            self._loop.post(self.flush)

    def drop_stalled(self, now: float, stored_bytes: int) -> None:
        """End the connections of those who do not read their replies, beside values of so many bytes."""
        bytes_max = OUTBOX_BYTES + OUTBOX_SHARE * stored_bytes
        for peer, outbox in list(self._outboxes.items()):
            if outbox.stalled(now, STALLED_S) or outbox.nbytes > bytes_max or len(outbox) > REPLIES_MAX:
                self._drop(peer)

    def _outbox(self, peer: bytes) -> Outbox:
        """The peer's replies, which :meth:`flush` will look at."""
        outbox = self._outboxes.get(peer)
        if outbox is None:
            outbox = self._outboxes[peer] = Outbox()
        self._unflushed[peer] = outbox
        return outbox

    def _sent(self, peer: bytes) -> None:
        """The socket has done with some large replies: the next may follow."""
        outbox = self._outboxes.get(peer)
        if outbox:
            self._unflushed[peer] = outbox
            self._loop.post(self.flush)

    def _discard(self, peer: bytes) -> None:
        """Forget the replies to a connection that has ended; whoever still wants them asks again."""
        outbox = self._outboxes.pop(peer, None)
        self._unflushed.pop(peer, None)
        if outbox is not None:
            for tell in outbox.discard():
                tell()

    def _drop(self, peer: bytes) -> None:
        """End the connection of one who does not read its replies: it may not hold more of our memory."""
        log.warning("%r: ended the connection of a peer that does not read its replies", self)
        self._endpoint.end(peer)
        self._discard(peer)
