"""One operation on all pieces of a key: what has come, what is missing, who is told.

Outcomes come piece by piece on the session's thread. A pull's pieces are copied as they come, while
the next ones are still on their way; a push has ended when every piece has.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

import engine
from kvstore import comm
from kvstore.arrays import Array
from kvstore.cluster.near import NEAR_BYTES, Arena, Neighbourhood
from kvstore.cluster.session import OnOutcome, Session
from kvstore.cluster.staging import Slot, Staging
from kvstore.delivery import Delivery, apart
from kvstore.errors import BrokenRoundError, KVStoreError
from kvstore.handle import Ended
from kvstore.home import Held, Source
from kvstore.protocol.dividing import Division
from kvstore.protocol.leases import Holding
from kvstore.protocol.messages import Place, Spec, Value
from kvstore.protocol.pieces import PIECE_BYTES, SMALL_PIECE_BYTES, WHOLE_BYTES, BundleId, Cut, Key, Span
from kvstore.protocol.requesting import Answered, Divide, Outcome, Request
from kvstore.records import record

CROWDED = (os.cpu_count() or 1) <= 2  # a worker and a server have all cores: a thread more takes one from the other
INLINE_BYTES = 64 << 10  # smaller pieces are copied where they arrive: a hand-over costs more
ALONE_INLINE_BYTES = SMALL_PIECE_BYTES  # the same for a value in one piece: nothing is to be shared out among threads
CROWDED_INLINE_BYTES = WHOLE_BYTES  # the same for all values, where there is no core for another thread
FAR_INLINE_BYTES = PIECE_BYTES  # the same for those from a socket, which come no faster than one thread copies


@dataclass(slots=True, eq=False)
class Remote:
    """A key (or a bundle of keys), as this worker sees it in the cluster."""

    key: Key | BundleId
    spec: Spec
    dtype: np.dtype[Any]
    owners: tuple[int, ...]  # server of each piece
    near: tuple[bool, ...]  # may the piece be read in place, both ways?
    pulls_first: bool
    arena: Arena | None  # where its gradients are staged; None: in private memory
    order: engine.Var  # ops that hand requests of this key to the session
    cut: Cut = field(init=False)
    pieces: int = field(init=False)
    piece_bytes: int = field(init=False)  # of all but the last
    is_near: bool = field(init=False)  # may any of them be read in place?
    bundle: Remote | None = None  # that it is a member of
    former: Remote | None = None  # that it was a member of; its rounds have not been taken over yet
    blamed: int = 0  # how often a bundle ended because of it
    members: tuple[tuple[Remote, Span], ...] = ()  # of a bundle, and the bytes of each
    times: int = 0  # that the bundle has begun
    divided: bool = False  # since it last began: its keys are on their way one by one
    impatient: bool = False  # since then: somebody waits for its open requests, so that it will soon be divided
    round: int = 0  # pushes handed over, as far as it is counted by itself
    unsent: int = 0  # pieces of the latest of these that have not been handed over
    broken: BaseException | None = None  # what has kept them from it for good
    open: dict[int, int] = field(default_factory=dict)  # request id -> server
    lock: threading.Lock = field(default_factory=threading.Lock)
    _staging: Staging | None = None
    _when_quiet: list[Callable[[], None]] = field(default_factory=list)
    _holding: dict[int, Holding] = field(default_factory=dict)  # by piece
    _spares: list[Array] = field(default_factory=list)  # memory for values that cannot be read in place

    def __post_init__(self) -> None:
        self.cut = self.spec.cut
        self.pieces = len(self.cut)
        self.piece_bytes = self.cut.piece_items * self.dtype.itemsize
        self.is_near = any(self.near)

    @property
    def staging(self) -> Staging:
        """Its gradients on their way; made when needed, which for the keys of a bundle is never."""
        with self.lock:
            if self._staging is None:
                self._staging = Staging(self.spec.shape, self.cut.items, self.dtype, self.arena)
            return self._staging

    @property
    def counted(self) -> Remote:
        """Where its rounds are counted and its requests kept in order: itself, or its bundle."""
        return self.bundle or self

    @property
    def latest(self) -> Remote:
        """Whose ``round`` is its own: itself, or the bundle that it is or was a member of."""
        return self.bundle or self.former or self

    @property
    def quiet(self) -> bool:
        """Is nothing of it on its way?"""
        return self.order.idle and not self.open and (self.former is None or self.former.quiet)

    def channel(self, piece: int) -> tuple[Key | BundleId, int]:
        """The name of the order that requests for this piece keep."""
        if self.bundle is not None:
            return self.bundle.channel(0)
        return self.key, self.times if self.members else piece

    def closed(self, request_id: int) -> None:
        """The request has its outcome."""
        with self.lock:
            self.open.pop(request_id, None)
            told, self._when_quiet = ([], self._when_quiet) if self.open else (self._when_quiet, [])
        for tell in told:
            tell()

    def when_quiet(self, tell: Callable[[], None]) -> None:
        """Call ``tell`` when no request is open, perhaps now."""
        with self.lock:
            if self.open:
                self._when_quiet.append(tell)
                return
        tell()

    def hold(self, piece: int, request_id: int, *, pull: bool) -> tuple[bool, tuple[int, ...]]:
        """For a new request: may it be answered with a place, and which earlier ones of the piece are held?"""
        if not self.near[piece]:
            return False, ()
        with self.lock:
            return self._holding.setdefault(piece, Holding()).request(request_id, pull=pull)

    def give_back(self, piece: int, request_id: int) -> None:
        """The place that the request was answered with, if it was, is not read any more."""
        if not self.near[piece]:
            return
        with self.lock:
            holding = self._holding.get(piece)
            if holding is not None:
                holding.over(request_id)

    def take_spare(self) -> Array:
        """Private memory for one value."""
        with self.lock:
            if self._spares:
                return self._spares.pop()
        return np.empty(self.spec.shape, self.dtype)

    def return_spare(self, array: Array) -> None:
        with self.lock:
            if not self._spares:
                self._spares.append(array)


@record
class _Piece:
    """A piece of a value that has come."""

    number: int
    request_id: int
    array: Array
    place: Place | None


class Arrivals(Source):
    """The pieces of one pull. ``large``: its values are more than caches keep."""

    def __init__(self, remote: Remote, runtime: engine.Engine, neighbourhood: Neighbourhood, *, large: bool) -> None:
        self._remote = remote
        self._large = large
        self._engine = runtime
        self._neighbourhood = neighbourhood
        self._lock = threading.Lock()
        self._waiting: list[_Piece] = []  # come before anybody takes them
        self._take: Callable[[_Piece], None] | None = None
        self._end: Callable[[BaseException | None], None] | None = None
        self._claim: engine.Claim | None = None  # of where it will be asked for: it is copied to there already
        self._outs: Sequence[Array] = ()  # that is
        self._outcome: tuple[BaseException | None] | None = None  # of that
        self._tell: Ended | None = None  # who asked
        self._taken = 0
        self._expected = remote.pieces
        self._error: BaseException | None = None

    def __repr__(self) -> str:
        return f"<Arrivals of key {self._remote.key!r}: {self._taken} of {self._expected} pieces>"

    # --- producing ----------------------------------------------------------------------------

    def arrive(self, number: int, outcome: Answered) -> None:
        """One piece has come. On the session's thread."""
        reply, remote = outcome.reply, self._remote
        assert isinstance(reply, Value)
        if reply.place is None:
            remote.give_back(number, reply.request_id)
            frames: Any = outcome.payload
            array = np.frombuffer(frames[0] if len(frames) == 1 else b"".join(frames), remote.dtype)
        else:
            nbytes = remote.cut.size(number) * remote.dtype.itemsize
            array = self._neighbourhood.array(remote.owners[number], reply.place, nbytes).view(remote.dtype)
        piece = _Piece(number, reply.request_id, array, reply.place)
        with self._lock:
            self.version = reply.version if self.version is None else min(self.version, reply.version)
            self.staleness = max(self.staleness or 0, reply.staleness)
            take = self._take
            if take is None:
                self._waiting.append(piece)
                return
        take(piece)

    def fail(self, error: BaseException, came: int) -> None:
        """Only ``came`` pieces have come, and no more will."""
        with self._lock:
            self._error = error
            self._expected = came
            ended = self._taken == came and self._end is not None
        if ended:
            self._over()

    # --- consuming ----------------------------------------------------------------------------

    def _consume(self, take: Callable[[_Piece], None], end: Callable[[BaseException | None], None]) -> None:
        """From now on every piece goes to ``take``, which calls :meth:`_took` when it is through with it."""
        with self._lock:
            self._take, self._end = take, end
            waiting, self._waiting = self._waiting, []
            over = self._expected == 0
        for piece in waiting:
            take(piece)
        if over:
            self._over()

    def _took(self, error: BaseException | None = None) -> None:
        with self._lock:
            self._error = self._error or error
            self._taken += 1
            ended = self._taken == self._expected
        if ended:
            self._over()

    def _over(self) -> None:
        """No piece will come any more."""
        end, self._take, self._end = self._end, None, None  # so that this is no cycle, and is freed at once
        assert end is not None
        end(self._error)

    def begin(self, outs: Sequence[Array], priority: int) -> bool:
        """Copy the pieces to ``outs`` as they come, ahead of :meth:`deliver` if need be.

        False: an op is in the way, or they are arrays of a device.
        """
        self._claim = claim = self._engine.claim(outs, "pull")
        if claim is None:
            return False
        self._outs = outs
        try:
            self._consume(self._each(self._copy, len(outs), priority), self._copied)
        except BaseException as error:
            claim.end(error)
            raise
        return True

    def _copy(self, piece: _Piece) -> None:
        comm.broadcast(piece.array, self._outs, self._remote.cut.span(piece.number)[0], large=self._large)
        self._remote.give_back(piece.number, piece.request_id)

    def _copied(self, error: BaseException | None) -> None:
        """All that was begun."""
        assert self._claim is not None
        self._claim.end(error)
        with self._lock:
            self._outcome, tell, self._tell = (error,), self._tell, None
        if tell is not None:
            tell(error)

    def deliver(self, outs: Sequence[Array], priority: int, ended: Ended) -> None:
        if self._claim is not None or self.begin(outs, priority):
            with self._lock:
                outcome = self._outcome
                if outcome is None:
                    self._tell = ended
            if outcome is not None:
                ended(*outcome)
            return

        on_host, on_devices = apart(outs)

        def begin(delivery: Delivery) -> None:
            def copy(piece: _Piece) -> None:
                pinned = False
                if on_devices is not None and piece.place is not None:
                    pinned = self._neighbourhood.pin(self._remote.owners[piece.number], piece.place)
                over = partial(self._remote.give_back, piece.number, piece.request_id)
                start = self._remote.cut.span(piece.number)[0]
                delivery.write(piece.array, start, over, pinned=pinned, large=self._large)

            times = 0 if on_host is None else len(on_host.writes)
            self._consume(self._each(copy, times, priority), delivery.end)

        Delivery(self._engine, on_host, on_devices, priority, begin, ended, self._forget)

    def _each(self, copy: Callable[[_Piece], None], times: int, priority: int) -> Callable[[_Piece], None]:
        """What copies each piece, in this thread so many times: at once, or by an engine op if it is large."""
        remote = self._remote
        inline_bytes = INLINE_BYTES if remote.pieces > 1 else ALONE_INLINE_BYTES
        if CROWDED:
            inline_bytes = CROWDED_INLINE_BYTES

        def take(piece: _Piece) -> None:
            nbytes = piece.array.nbytes * times
            if nbytes <= inline_bytes or (piece.place is None and nbytes <= FAR_INLINE_BYTES):
                self._take_by(copy, piece)
            else:
                info = {"key": remote.key, "bytes": nbytes, "piece": piece.number}
                self._engine.push(partial(self._take_by, copy, piece), priority=priority, name="deliver", info=info)

        return take

    def _take_by(self, copy: Callable[[_Piece], None], piece: _Piece) -> None:
        try:
            copy(piece)
        except Exception as error:
            self._took(error)
        else:
            self._took()

    def _forget(self) -> None:
        """Nobody wants them any more."""

        def take(piece: _Piece) -> None:
            self._remote.give_back(piece.number, piece.request_id)
            self._took()

        self._consume(take, lambda error: None)

    def hold(self, ended: Callable[[Held | BaseException], None]) -> None:
        pieces: list[_Piece] = []

        def take(piece: _Piece) -> None:
            pieces.append(piece)
            self._took()

        self._consume(take, lambda error: ended(self._whole(pieces) if error is None else error))

    def _whole(self, pieces: list[_Piece]) -> Held:
        """The pieces as one array: in place where they lie side by side, else a copy."""
        remote = self._remote
        pieces.sort(key=lambda piece: piece.number)

        def give_back() -> None:
            for piece in pieces:
                remote.give_back(piece.number, piece.request_id)

        first = pieces[0].place
        if first is not None and _side_by_side(pieces):
            nbytes = sum(piece.array.nbytes for piece in pieces)
            array = self._neighbourhood.array(remote.owners[0], first, nbytes).view(remote.dtype)
            pin = partial(self._neighbourhood.pin, remote.owners[0], first)
            return Held(array.reshape(remote.spec.shape), self.version, self.staleness, give_back, pin)
        copied = remote.take_spare()
        flat = copied.reshape(-1)
        for piece in pieces:
            start, stop = remote.cut.span(piece.number)
            np.copyto(flat[start:stop], piece.array)
        give_back()
        array = copied.view()
        array.flags.writeable = False
        return Held(array, self.version, self.staleness, lambda: remote.return_spare(copied))


def _side_by_side(pieces: list[_Piece]) -> bool:
    place = pieces[0].place
    for piece in pieces:
        if piece.place != place or place is None:
            return False
        place = Place(place.segment, place.offset + piece.array.nbytes)
    return True


class Exchange:
    """One push, pull or pushpull under way. Called with each piece's outcome, on the session's thread.

    Args:
        arrivals: where the pieces of a pull go; None for a push alone.
        ended: called when every piece has: a push is committed then; None for a pull alone.
    """

    def __init__(self, session: Session, remote: Remote, arrivals: Arrivals | None, ended: Ended | None) -> None:
        self._session = session
        self.remote = remote
        self.counted = remote.counted
        self.slot: Slot | None = None  # what the servers read from
        self.whole = False  # the value is read once all of it is there, and not as it comes
        self._arrivals = arrivals
        self._tell = ended
        self._sent = 0  # pieces handed to the session, in their order; all of them if the rest never will be
        self._is_round = False
        self._left = remote.pieces
        self._came = 0
        self._error: BaseException | None = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<Exchange of key {self.remote.key!r}: {self._left} pieces left>"

    def __call__(self, outcome: Outcome | Divide) -> None:
        if isinstance(outcome, Divide):
            self._divide(*outcome.requests)
            return
        request, remote = outcome.request, self.remote
        number = request.message.piece  # type: ignore[attr-defined]
        self.counted.closed(request.request_id)
        if isinstance(outcome, Answered):
            if self._arrivals is None:
                self._ended(1, None)
                return
            try:
                self._arrivals.arrive(number, outcome)
            except KVStoreError as error:
                self._ended(1, error)
            else:
                self._came += 1
                self._ended(1, None)
        else:
            remote.give_back(number, request.request_id)
            self._ended(1, outcome.error)

    def _divide(self, request: Request) -> None:
        """Go on with so many requests for the keys of the bundle."""
        whole = self.counted
        members = self.remote.members or ((self.remote, (0, 0)),)
        division = Division(request, [(key_of(member), span) for member, span in members], self._session.next_id)
        submitted: list[tuple[Request, OnOutcome]] = []
        for (member, _), part in zip(members, division.parts, strict=True):
            with member.lock:
                member.open[part.request_id] = part.server
            submitted.append((part, partial(self._part_ended, division, member)))
        self._session.submit(submitted, pulls_first=whole.pulls_first)
        whole.divided = True
        whole.closed(request.request_id)

    def _part_ended(self, division: Division, member: Remote, outcome: Outcome | Divide) -> None:
        assert not isinstance(outcome, Divide)
        member.closed(outcome.request.request_id)
        concluded = division.conclude(outcome)
        if concluded is not None:
            self(concluded)

    def count(self) -> None:
        """A push, whose turn it is, is its key's next round. Raises BrokenRoundError."""
        remote = self.remote
        with self._lock:
            if self._sent == remote.pieces:  # given up
                return
            self.check_whole()
            remote.round += 1
            remote.unsent = remote.pieces
            self._is_round = True

    def check_whole(self) -> None:
        """Has all of the key's latest round been handed over, now that it is this one's turn? Else BrokenRoundError."""
        remote = self.remote
        if remote.unsent:
            why = "" if remote.broken is None else f": {remote.broken!r}"
            raise BrokenRoundError(
                f"key {remote.key!r}: expected whole rounds; of round {remote.round} this worker has sent a part only, "
                f"as its push failed{why}"
            ) from remote.broken

    def is_next(self, piece: int) -> bool:
        """Is this the piece to be sent now? Not if one before it failed, or all have been given up."""
        return self._sent == piece

    def submit(self, requests: list[Request]) -> None:
        """Send the next pieces."""
        counted = self.counted
        with self._lock:
            if self._sent + len(requests) > self.remote.pieces:  # given up this moment
                return
            self._sent += len(requests)
        with counted.lock:
            for request in requests:
                counted.open[request.request_id] = request.server
        try:
            nbytes = len(requests) * self.remote.piece_bytes
            mine = [(request, self) for request in requests]
            self._session.submit(mine, pulls_first=counted.pulls_first, nbytes=nbytes)
        finally:  # an interrupt may come before they are taken, or after
            taken = sum([request.taken for request in requests])
            with self._lock:
                self._sent -= len(requests) - taken
                if self._is_round:
                    self.remote.unsent -= taken

    def give_up(self, error: BaseException) -> None:
        """What has not been sent will not be. A round of which nothing has been is none; a part of one is for good."""
        remote = self.remote
        with self._lock:
            sent, self._sent = self._sent, remote.pieces
            if sent == remote.pieces:
                return
            if self._is_round and sent:
                remote.broken = error
            elif self._is_round:
                remote.round -= 1
                remote.unsent = 0
        self._ended(remote.pieces - sent, error)

    def _ended(self, pieces: int, error: BaseException | None) -> None:
        with self._lock:
            self._left -= pieces
            self._error = self._error or error
            if self._left:
                return
        error = self._error
        if self.slot is not None:
            if error is None:
                self.remote.staging.give_back(self.slot)
            else:
                self.remote.staging.lose(self.slot)
        if error is not None and self._arrivals is not None:
            self._arrivals.fail(error, self._came)
        if self._tell is not None:
            self._tell(error)


def key_of(remote: Remote) -> Key:
    assert not isinstance(remote.key, bytes)
    return remote.key


def near_pieces(cut: Cut, owners: Sequence[int], itemsize: int, near_servers: set[int]) -> tuple[bool, ...]:
    """Which pieces are worth reading in place: those of a server of this host that are not small."""
    return tuple(
        [owner in near_servers and cut.size(piece) * itemsize >= NEAR_BYTES for piece, owner in enumerate(owners)]
    )
