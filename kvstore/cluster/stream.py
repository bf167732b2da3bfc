"""The log of a shard on its way to the next server that has it, and what waits until it has arrived: replies, memory.

What the log holds, and which reply waits for which entry, is decided in :mod:`kvstore.protocol.replicating`. No credit
is needed: what is under way is bounded by the pushes that workers may have open.
"""

from __future__ import annotations

import heapq
import itertools
import logging
from collections.abc import Callable
from typing import Any

from kvstore.errors import FencedError, KVStoreError, from_wire
from kvstore.protocol.messages import Entry, Failed, Taken
from kvstore.protocol.replicating import Log
from kvstore.protocol.wire import Sender, decode, envelope
from kvstore.transport.network import Frames, Loop, Network

log = logging.getLogger(__name__)

BATCH_BYTES = 256 << 10  # entries travel together up to this size
BATCH_ENTRIES = 1024


class Mark:
    """One entry of a stream: whose payload an action makes, or which a reply has to wait for."""

    __slots__ = ("_number", "_stream")

    def __init__(self, stream: Stream, number: int) -> None:
        self._stream = stream
        self._number = number

    def __repr__(self) -> str:
        return f"<Mark {self._number} of {self._stream!r}>"

    @property
    def passed(self) -> bool:
        """Have all replicas taken the entry, or does nobody wait for it (any more)?"""
        return self._stream.closed or self._stream.log.may_tell(self._number)

    def then(self, tell: Callable[[], None]) -> None:
        """Call ``tell`` when it has been passed, perhaps now. Within the loop."""
        if self.passed:
            tell()
        else:
            self._stream.after(self._number, tell)

    def when_taken(self, tell: Callable[[], None]) -> None:
        """Call ``tell`` when the payload is not needed any more, perhaps now. Within the loop."""
        self._stream.when_taken(self._number, tell)

    def complete(self, payload: tuple[Any, ...], **fields: Any) -> None:
        """The payload of the entry; see :meth:`Log.complete`. Within the loop."""
        if not self._stream.closed:
            self._stream.log.complete(self._number, payload, **fields)


class Stream:
    """One log and the connection that it takes. Within the loop.

    Args:
        log: it has begun.
        address: of the next server.
        sender: how this server presents itself.
        on_news: it has taken something.
        on_in_step: it may take over from here on.
        on_refused: it says that it does not get the log from here, in a later epoch.
    """

    def __init__(
        self,
        network: Network,
        loop: Loop,
        log: Log,
        address: str,
        sender: Callable[[], Sender],
        on_news: Callable[[], None],
        on_in_step: Callable[[], None],
        on_refused: Callable[[KVStoreError], None],
    ) -> None:
        self.log = log
        self.closed = False
        self._loop = loop
        self._network = network
        self._line = network.connect(loop, address, self._receive)
        self._sender = sender
        self._on_news = on_news
        self._on_in_step = on_in_step
        self._on_refused = on_refused
        self._held: list[tuple[int, int, Callable[[], None]]] = []  # replies, by the entry that they wait for
        self._lent: list[tuple[int, int, Callable[[], None]]] = []  # memory, by the entry whose payload it is
        self._order = itertools.count()

    def __repr__(self) -> str:
        return f"<Stream to {self._line.address}: {self.log!r}, {len(self._held)} replies wait>"

    def after(self, number: int, tell: Callable[[], None]) -> None:
        """Call ``tell`` when this entry may be told of."""
        heapq.heappush(self._held, (number, next(self._order), tell))

    def when_taken(self, number: int, tell: Callable[[], None]) -> None:
        """Call ``tell`` when this entry has been taken, or will not be sent any more."""
        if self.closed or number <= self.log.taken:
            tell()
        else:
            heapq.heappush(self._lent, (number, next(self._order), tell))

    def go_on(self, epoch: int, address: str) -> None:
        """The next server is another one, which was in step."""
        self._line.close()
        self._line = self._network.connect(self._loop, address, self._receive)
        self.log.go_on(epoch)
        self.flush()

    def flush(self) -> None:
        """Send what is ready."""
        batch: list[tuple[Entry, tuple[Any, ...]]] = []
        size = 0
        for entry, payload in self.log.outgoing():
            frames = payload or ()
            nbytes = sum(memoryview(frame).nbytes for frame in frames)
            if batch and (size + nbytes > BATCH_BYTES or len(batch) >= BATCH_ENTRIES):
                self._line.send(envelope(self._sender(), batch))
                batch, size = [], 0
            batch.append((entry, frames))
            size += nbytes
        if batch:
            self._line.send(envelope(self._sender(), batch))

    def tick(self, now: float) -> None:
        """Now and then."""
        self.log.tick(now)
        self.flush()

    def close(self) -> None:
        """Nothing is sent any more."""
        self.closed = True
        self._line.close()

    def tell(self) -> None:
        """Nobody has to wait for the next server: there is none any more."""
        waiting, self._held, self._lent = [*sorted(self._held), *self._lent], [], []
        for _, _, tell in waiting:
            tell()

    def _receive(self, frames: Frames) -> None:
        _, messages = decode(frames[0], len(frames) - 1)
        for message, _ in messages:
            if isinstance(message, Taken) and message.epoch == self.log.epoch:
                if self.log.heard(message.request_id, self._loop.now()):
                    self._on_in_step()
            elif isinstance(message, Failed):
                error = from_wire(message.error, message.text)
                if isinstance(error, FencedError):
                    self._on_refused(error)
                    return
                log.error("%r: the next server does not take the log: %s", self, error)
        while self._held and self.log.may_tell(self._held[0][0]):
            heapq.heappop(self._held)[2]()
        while self._lent and self._lent[0][0] <= self.log.taken:
            heapq.heappop(self._lent)[2]()
        self._on_news()
