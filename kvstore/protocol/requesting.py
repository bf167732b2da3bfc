"""A worker's side of the conversation: in which order requests go out, and what replies mean. Pure.

What this file decides:

- the order: per piece, push n+1 goes out when push n has committed (and, in a sequential key, when
  the pulls before it are answered); among what may go, larger priority first, then age;
- the credit: bytes on the way to one server, from sending to acceptance, stay within a bound, so
  that an urgent piece is never behind more than that; what waits for credit holds up nothing that
  needs none, above all not the resends by which credit comes back;
- resends: a request without an answer is sent again, a push that was accepted only asks, without
  its bytes, what became of it.

What it refuses to know: arrays (a payload is opaque), sockets, the clock (``now`` is an argument).
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field

from kvstore.errors import KVStoreError, from_wire
from kvstore.protocol.messages import Accepted, Committed, Divided, Failed, Init, Message, Missing, Push, Register
from kvstore.protocol.pieces import PIECE_BYTES
from kvstore.records import record

CREDIT_BYTES = 2 * PIECE_BYTES  # what an urgent piece may have to wait for
CREDIT_FREE_BYTES = 64 << 10  # requests up to this size need no credit
RESEND_S = 5.0
RESEND_S_MAX = 30.0
REGISTER_S = 1.0  # the same for a registration: a restarted scheduler does not wait long for it
SLOWEST_LINK = 1 << 20  # bytes/s: how long the bytes ahead of a request may take before it is resent


@dataclass(slots=True, eq=False)
class Request:
    """One request to one server, and how far it has come."""

    server: int
    message: Message
    payload: object = None  # also of a push whose bytes lie at a place
    nbytes: int = 0  # that travel; 0 if they lie at a place
    priority: int = 0
    channel: Hashable = None  # requests of one channel keep their order; None: no order
    is_push: bool = False
    is_pull: bool = False
    taken: bool = False  # by the session, which will send it
    accepted: bool = False  # the server has its payload, or does not need it
    sequence: int = field(default=0, init=False)
    committed: bool = field(default=False, init=False)
    holds_credit: bool = field(default=False, init=False)
    queued: bool = field(default=False, init=False)
    sent_times: int = field(default=0, init=False)
    resend_at: float = field(default=0.0, init=False)

    @property
    def request_id(self) -> int:
        return self.message.request_id

    @property
    def frames(self) -> object:
        """What travels with the message."""
        return None if isinstance(self.message, Push) and self.message.place is not None else self.payload


@record
class Answered:
    """The request got its final reply."""

    request: Request
    reply: Message
    payload: object


@record
class Refused:
    """The request failed."""

    request: Request
    error: KVStoreError


Outcome = Answered | Refused


@record
class Divide:
    """These requests are withdrawn; they go on as others, for the keys of their bundle. In their order."""

    requests: tuple[Request, ...]


@dataclass(slots=True)
class _Channel:
    pulls_first: bool
    queue: deque[Request] = field(default_factory=deque)
    pushing: Request | None = None
    pulling: int = 0


class Requesting:
    """The pure core of one worker. Not thread-safe."""

    def __init__(self, credit_bytes: int = CREDIT_BYTES, resend_s: float = RESEND_S) -> None:
        self.credit_bytes = credit_bytes
        self.resend_s = resend_s
        self.open: dict[int, Request] = {}  # submitted and not finished, by request id
        self.in_flight: dict[int, int] = {}  # server -> bytes that hold credit
        self.stirred: set[int] = set()  # servers that something may be sent to; emptied by whoever asks for it
        self._ready: dict[int, list[tuple[int, int, Request]]] = {}
        self._costly: dict[int, list[tuple[int, int, Request]]] = {}  # ready, but for their credit
        self._channels: dict[Hashable, _Channel] = {}
        self._divided: set[Hashable] = set()  # channels of bundles that are over
        self._submitted = 0

    def __repr__(self) -> str:
        return f"<Requesting: {len(self.open)} open, in flight {self.in_flight}>"

    def submit(self, request: Request, *, pulls_first: bool = False) -> Divide | None:
        """Take over a request. ``pulls_first``: in this channel a push waits for earlier pulls.

        Returns:
            If the channel has been divided, nothing is taken over.
        """
        if request.channel in self._divided:
            return Divide((request,))
        self._submitted += 1
        request.sequence = self._submitted
        self.open[request.request_id] = request
        if request.channel is None:
            self._enqueue(request)
            return None
        channel = self._channels.get(request.channel)
        if channel is None:
            channel = self._channels[request.channel] = _Channel(pulls_first)
        channel.queue.append(request)
        self._release(channel)
        return None

    def divide(self, name: Hashable) -> Divide:
        """Withdraw all requests of this channel; whatever is submitted to it later is not taken over."""
        self._divided.add(name)
        mine = [request for request in self.open.values() if request.channel == name]
        self._channels.pop(name, None)
        for request in mine:
            self._return_credit(request)
            del self.open[request.request_id]
        return Divide(tuple(sorted(mine, key=lambda request: request.sequence)))

    def forget(self, name: Hashable) -> None:
        """Nothing more will be submitted to this channel."""
        self._divided.discard(name)

    def outgoing(self, server: int, now: float) -> Iterator[tuple[Message, object]]:
        """What is to be sent to ``server`` now, with its payload; counts as sent when yielded."""
        while (request := self._next(server)) is not None:
            request.queued = False
            first = REGISTER_S if isinstance(request.message, Register) else self.resend_s
            patience = min(RESEND_S_MAX, first * 2.0 ** min(request.sent_times, 16))
            request.sent_times += 1
            request.resend_at = now + patience + self.in_flight.get(server, 0) / SLOWEST_LINK
            yield request.message, None if _is_bare(request) else request.frames

    def reply(self, message: Message, payload: object) -> Outcome | Divide | None:
        """Conclude from a server's reply; None while the request stays open (or was closed before)."""
        request = self.open.get(message.request_id)
        if request is None:
            return None
        if request.queued:
            self.stirred.add(request.server)  # it may go now without credit, or others in its place
        if isinstance(message, Missing):
            request.accepted = False
            self._enqueue(request)
            return None
        if isinstance(message, Divided):
            request.accepted = message.taken
            return self.divide(request.channel)
        request.accepted = True
        self._return_credit(request)
        if isinstance(message, Accepted):
            return None
        if isinstance(message, Committed) and request.is_pull:
            self._push_done(request)
            return None
        self._close(request)
        if isinstance(message, Failed):
            return Refused(request, from_wire(message.error, message.text))
        return Answered(request, message, payload)

    def restart(self, server: int) -> None:
        """Another process answers for ``server``: it has what was committed, and nothing that was only accepted."""
        for request in self.open.values():
            if request.server != server:
                continue
            request.accepted = request.committed
            self._return_credit(request)
            if request.sent_times and not request.queued:
                self._enqueue(request)

    def resend(self, server: int) -> None:
        """The connection to ``server`` was renewed: send again what it has not answered."""
        for request in self.open.values():
            if request.server == server and request.sent_times:
                request.sent_times = 0
                self._enqueue(request)

    def change(self, server: int, revise: Callable[[Request], None]) -> None:
        """Revise the open requests to ``server``."""
        for request in self.open.values():
            if request.server == server:
                revise(request)

    def tick(self, now: float) -> bool:
        """Queue again what has waited too long for a reply; is there any?"""
        late = [r for r in self.open.values() if r.sent_times and not r.queued and now >= r.resend_at]
        for request in late:
            self._enqueue(request)
        return bool(late)

    def abandon(self, server: int, error: KVStoreError) -> list[Outcome]:
        """``server`` is gone: everything that waits for it, and would, fails."""
        failed: list[Outcome] = []
        while True:
            mine = [request for request in self.open.values() if request.server == server]
            if not mine:
                return failed
            for request in mine:
                self._return_credit(request)
                self._close(request)
                failed.append(Refused(request, error))

    def _next(self, server: int) -> Request | None:
        """Take the most urgent request that may go to ``server`` now; it holds its credit then."""
        ready, costly = self._ready.get(server, []), self._costly.get(server, [])
        while costly and costly[0][2].request_id not in self.open:
            heapq.heappop(costly)
        while ready:
            request = ready[0][2]
            if request.request_id not in self.open:
                heapq.heappop(ready)
            elif self._needs_credit(request):  # accepted when queued, then found missing
                costly = self._costly.setdefault(server, costly)
                heapq.heappush(costly, heapq.heappop(ready))
            else:
                break
        if costly and (not ready or costly[0] < ready[0]):
            request = costly[0][2]
            if not self._needs_credit(request):
                return heapq.heappop(costly)[2]
            used = self.in_flight.get(server, 0)
            if not used or used + request.nbytes <= self.credit_bytes:
                self.in_flight[server] = used + request.nbytes
                request.holds_credit = True
                return heapq.heappop(costly)[2]
        return heapq.heappop(ready)[2] if ready else None

    def _needs_credit(self, request: Request) -> bool:
        return not _is_bare(request) and not request.holds_credit and request.nbytes > CREDIT_FREE_BYTES

    def _enqueue(self, request: Request) -> None:
        if not request.queued:
            request.queued = True
            heaps = self._costly if self._needs_credit(request) else self._ready
            heap = heaps.setdefault(request.server, [])
            heapq.heappush(heap, (-request.priority, request.sequence, request))
            self.stirred.add(request.server)

    def _release(self, channel: _Channel) -> None:
        while channel.queue:
            request = channel.queue[0]
            if request.is_push:
                if channel.pushing is not None or (channel.pulls_first and channel.pulling):
                    return
                channel.pushing = request
            if request.is_pull:
                channel.pulling += 1
            channel.queue.popleft()
            self._enqueue(request)

    def _push_done(self, request: Request) -> None:
        request.committed = True
        channel = self._channels.get(request.channel)
        if channel is not None and channel.pushing is request:
            channel.pushing = None
            self._release(channel)

    def _close(self, request: Request) -> None:
        del self.open[request.request_id]
        channel = self._channels.get(request.channel)
        if channel is None:
            return
        if request in channel.queue:  # never went out
            channel.queue.remove(request)
        elif request.is_pull:
            channel.pulling -= 1
        if channel.pushing is request:
            channel.pushing = None
        self._release(channel)
        if not channel.queue and channel.pushing is None and not channel.pulling:
            del self._channels[request.channel]

    def _return_credit(self, request: Request) -> None:
        if request.holds_credit:
            request.holds_credit = False
            self.in_flight[request.server] -= request.nbytes
            self.stirred.add(request.server)


def _is_bare(request: Request) -> bool:
    """Is it enough to ask what became of it, or to wait for another's?"""
    return request.accepted and isinstance(request.message, Push | Init)
