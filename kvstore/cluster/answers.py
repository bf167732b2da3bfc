"""What workers are answered with, once the ops before it have run: values, states, and that something is done.

A value is lent, not copied: to the socket until it is sent, to a worker of this host until it has read it in place. Who
has finished reading is decided in :mod:`kvstore.protocol.leases`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import numpy as np

import engine
from kvstore.cluster.outbox import OnSent, Outgoing
from kvstore.cluster.replies import Replies, Together
from kvstore.cluster.stream import Mark
from kvstore.cluster.values import SharedValues
from kvstore.cluster.work import Work
from kvstore.errors import to_wire
from kvstore.handle import when_ended
from kvstore.protocol.actions import ReplyAfter, ReplyValue, SendState, StoreState
from kvstore.protocol.leases import Lending, Reader
from kvstore.protocol.messages import Done, Failed, Fetch, Place, Push, State, Value
from kvstore.protocol.pieces import PieceId, Span
from kvstore.protocol.serving import Serving
from kvstore.protocol.wire import Sender
from kvstore.stored import Stored
from kvstore.transport.network import Loop

COPIED_BYTES = 16 << 10  # smaller values are copied into their reply: to lend costs more
LENT_MAX = 32  # places of a piece that one worker may hold; beyond that it gets frames


class Answers:
    """The answers of one shard. Within the loop.

    Args:
        values: memory for what workers of this host read in place.
    """

    def __init__(
        self,
        serving: Serving,
        work: Work,
        replies: Replies,
        loop: Loop,
        runtime: engine.Engine,
        values: SharedValues,
    ) -> None:
        self.serving = serving
        self._work = work
        self._replies = replies
        self._loop = loop
        self._engine = runtime
        self._values = values
        self._shared: set[PieceId] = set()  # those whose values lie in shared memory, as far as there is any
        self._lending = Lending()
        self._lending_lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<Answers: {len(self._shared)} pieces in shared memory, {self._lending!r}>"

    def value(self, action: ReplyValue, priority: int, mark: Mark | None) -> None:
        """Send a value, or the place where it lies."""
        stored, request_id = self._work.stored[action.piece], action.request_id
        near = action.near
        if near:
            with self._lending_lock:
                near = self._lending.count(action.piece, action.rank) < LENT_MAX
        if near and action.piece not in self._shared:
            self._share(action.piece)
        if not near and stored.value.nbytes <= COPIED_BYTES:

            def copy() -> Outgoing:
                elements = memoryview(stored.snapshot(_slice(action.span)))
                return Value(request_id, action.version, action.staleness), (elements,)

            self._after(stored, action.rank, request_id, copy, priority, far=True, mark=mark)
            return
        reader = Reader(action.rank, self.serving.workers.incarnations[action.rank], request_id)

        def make() -> Outgoing:
            place = self._lend_in_place(action.piece, reader) if near else None
            value = Value(request_id, action.version, action.staleness, place)
            if place is not None:
                return value, ()
            return value, (stored.lend(reader).reshape(-1)[_slice(action.span)].view(np.uint8),)

        on_sent = partial(stored.give_back, reader)
        together = (action.rank, action.piece[0]) if near and action.whole else None
        self._after(
            stored, action.rank, request_id, make, priority, on_sent, far=not near, mark=mark, together=together
        )

    def _share(self, piece: PieceId) -> None:
        """From here on the value lies in shared memory, if there is enough."""
        self._shared.add(piece)
        stored = self._work.stored[piece]
        allocate = self._values.allocator(piece, self.serving.pieces[piece].spec)

        def move() -> None:
            row = allocate()
            if row is not None:
                stored.move(row, allocate)

        self._engine.push(move, reads=[stored.var], writes=[stored.var], name="share", inline=True)

    def _lend_in_place(self, piece: PieceId, reader: Reader) -> Place | None:
        """Where the value lies for a worker of this host to read; None: not in shared memory."""
        stored = self._work.stored[piece]
        place = self._values.place(stored.lend(reader))
        if place is not None:
            with self._lending_lock:
                self._lending.lend(piece, reader)
        return place

    def _after(
        self,
        stored: Stored,
        rank: int,
        request_id: int,
        make: Callable[[], Outgoing],
        priority: int = 0,
        on_sent: OnSent | None = None,
        far: bool = False,
        mark: Mark | None = None,
        together: Together | None = None,
    ) -> None:
        """Send what ``make`` returns after all earlier ops on the piece; or their failure.

        ``on_sent`` is called once the memory of the frames, if there are any, is not needed any more.
        """

        def reply() -> None:
            message, frames = make()
            then = on_sent if frames else None
            send = self._replies.reply if self._loop.is_here else self._replies.post
            send(rank, message, frames, priority, then, mark, together)

        if together is not None:
            self._replies.expect(together)
        handle = self._work.do(stored, reply, "reply", priority, (stored.var,), (), far=far)
        if handle is None:
            return

        def ended(error: BaseException | None) -> None:
            if error is not None:
                failed = Failed(request_id, *to_wire(error))
                self._replies.post(rank, failed, (), priority, together=together)

        when_ended(handle, ended)

    def take_back(self, sender: Sender, message: Push | Fetch) -> None:
        """A request says which of the earlier ones' places its worker still reads."""
        piece_id = (message.key, message.piece)
        with self._lending_lock:
            over = self._lending.heard(piece_id, sender.rank, sender.incarnation, message.request_id, message.held)
        if over and (stored := self._work.stored.get(piece_id)) is not None:
            for reader in over:
                stored.give_back(reader)

    def take_all_back(self, rank: int, incarnation: int) -> None:
        """That life of a worker is over, and reads nothing any more."""
        with self._lending_lock:
            over = self._lending.gone(rank, incarnation)
        for piece, reader in over:
            if piece in self._work.stored:
                self._work.stored[piece].give_back(reader)

    def message(self, action: ReplyAfter, priority: int, mark: Mark | None) -> None:
        """Send a message that tells of an update."""
        stored, message = self._work.stored[action.piece], action.message
        self._after(stored, action.rank, message.request_id, lambda: (message, ()), priority, mark=mark)

    def stored(self, action: StoreState, mark: Mark | None) -> None:
        """Say that a state has been written."""
        stored, request_id = self._work.stored[action.message.key, action.message.piece], action.message.request_id
        self._after(stored, action.rank, request_id, lambda: (Done(request_id), ()), mark=mark)

    def state(self, action: SendState, mark: Mark | None) -> None:
        """Send the optimizer's state of a piece."""
        stored, request_id = self._work.stored[action.piece], action.request_id
        self._after(stored, action.rank, request_id, lambda: _state_of(stored, request_id, action.span), mark=mark)

    def forget(self, piece: PieceId) -> None:
        """The piece is no more."""
        self._shared.discard(piece)
        self._values.forget(piece)


def _slice(span: Span | None) -> slice:
    """These elements, or all."""
    return slice(None) if span is None else slice(*span)


def _state_of(stored: Stored, request_id: int, span: Span | None) -> Outgoing:
    arrays = {name: array.reshape(-1)[_slice(span)].copy() for name, array in stored.state.items()}
    names, dtypes = tuple(arrays), tuple(array.dtype.name for array in arrays.values())
    return State(request_id, stored.step, names, dtypes), tuple(array.view(np.uint8) for array in arrays.values())
