"""A shard: what one :class:`kvstore.protocol.serving.Serving` decides on, with all that it needs to run.

The core decides; this file turns its actions into engine ops on the piece's var, and sends the replies. Small work is
done at once on the server's own thread, larger work by the engine's pool, so that the socket is free for what is
urgent. Each shard has an address of its own, at which workers find it whichever process has it.

It is the shard's primary, or a replica that follows the primary's log until it becomes primary itself; see
:mod:`kvstore.protocol.replicating`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np

import engine
from kvstore import kernels
from kvstore.arrays import Array, dtype_named
from kvstore.checkpoint.restoring import RestoredPiece
from kvstore.cluster.address import advertised, split
from kvstore.cluster.copies import Copies
from kvstore.cluster.near import Neighbourhood
from kvstore.cluster.outbox import OnSent, Outbox, Outgoing
from kvstore.cluster.session import Session
from kvstore.cluster.stream import Mark, Stream
from kvstore.cluster.values import SharedValues
from kvstore.errors import DisagreementError, KVStoreError, ProtocolError, to_wire
from kvstore.handle import when_ended
from kvstore.protocol.actions import (
    Action,
    Apply,
    Create,
    Forget,
    LoseCut,
    Reply,
    ReplyAfter,
    ReplyValue,
    SendState,
    Split,
    StoreState,
    TakeCut,
    Unite,
)
from kvstore.protocol.bundles import Bundle, Part
from kvstore.protocol.leases import Lending, Reader
from kvstore.protocol.messages import (
    FRAME_BYTES_MAX,
    NOBODY,
    Departed,
    Done,
    EndCut,
    Entry,
    Explain,
    Explanation,
    Failed,
    Fetch,
    Init,
    Joined,
    Meet,
    Message,
    Met,
    Place,
    Push,
    ReadCopy,
    ReadCut,
    ReadStatus,
    Restore,
    RestorePiece,
    Spec,
    State,
    Status,
    Taken,
    Updated,
    Value,
    WriteState,
)
from kvstore.protocol.pieces import PieceId, Span
from kvstore.protocol.replicating import Copy, Log, Replica, Steps, follow, refuse
from kvstore.protocol.serving import Serving
from kvstore.protocol.wire import Sender, decode, envelope, paired
from kvstore.stored import Stored
from kvstore.transport.network import Frames, Loop, Network

LOOK_S = 0.002  # how often it is looked whether the replica has everything
INLINE_BYTES = 64 << 10  # up to this much, work is done on the thread of the socket: a hand-over costs more
EARLY_MAX = 4096  # envelopes of workers that know of a takeover before the replica does
FAR_INLINE_BYTES = 1 << 20  # the same for what came through the socket and lies in this core's caches
OUTBOX_BYTES = 256 << 20  # that wait for one peer, beside OUTBOX_SHARE times what is stored; looked at now and then
OUTBOX_SHARE = 4
REPLIES_MAX = 1 << 18  # that wait for one peer
STALLED_S = 30.0  # how long a peer may take to read anything, while replies wait for it
LENT_MAX = 32  # places of a piece that one worker may hold; beyond that it gets frames

log = logging.getLogger(__name__)


class Shard:
    """One shard. But for the constructor and :meth:`serve`, everything happens on the reactor's thread.

    Args:
        network: how workers reach it.
        reactor: the loop it lives in.
        runtime: does the work.
        neighbourhood: memory for values that workers of this host read in place.
        bind: where to listen; port ``*`` lets the system choose.
        advertise: the address that workers reach it by, if another than the bound one.

    Raises:
        OptionError: an address that cannot be bound.
    """

    def __init__(
        self,
        network: Network,
        reactor: Loop,
        runtime: engine.Engine,
        neighbourhood: Neighbourhood,
        bind: str,
        advertise: str | None = None,
    ) -> None:
        split(bind)  # for ZeroMQ port 70000 is port 4464
        self._network = network
        self._reactor = reactor
        self._engine = runtime
        self._neighbourhood = neighbourhood
        self._endpoint = network.listen(reactor, self._receive, frame_bytes_max=FRAME_BYTES_MAX, watch=True)
        self._endpoint.on_gone = self._discard
        self._endpoint.on_stuck = self._drop
        self.address = advertised(self._endpoint.bind(bind), advertise)
        self.serving: Serving  # from :meth:`serve` on, as the next two
        self._session: Session
        self._values: SharedValues
        self._stored: dict[PieceId, Stored] = {}
        self._shared: set[PieceId] = set()  # those whose values lie in shared memory, as far as there is any
        self._copies = Copies(runtime, reactor.post, self._reply_to)
        self._lending = Lending()
        self._lending_lock = threading.Lock()
        self._peers: dict[int, bytes] = {}  # rank -> its latest connection
        self._outboxes: dict[bytes, Outbox] = {}  # by connection
        self._outbox_bytes_max = OUTBOX_BYTES
        self._unflushed: dict[bytes, Outbox] = {}
        self._flushing = False
        self.epoch = 0  # in which it became what it is
        self._replica: Replica | None = None  # it is one, and follows a log
        self._stream: Stream | None = None  # it has one
        self._served = False
        self._early: list[tuple[bytes, Frames]] = []  # came before it was primary
        self._closed = False  # it takes in nothing more
        self._on_refused: Callable[[KVStoreError], None]

    def __repr__(self) -> str:
        return f"<Shard at {self.address}: {getattr(self, 'serving', None)!r}>"

    def serve(
        self,
        session: Session,
        serving: Serving,
        epoch: int,
        on_refused: Callable[[KVStoreError], None],
        *,
        follow: bool,
    ) -> None:
        """Answer from here on, as this core says; or follow the log of this epoch, as a replica.

        Args:
            on_refused: told when it turns out that this process is not what it believes to be.
        """
        self.serving = serving
        self._session = session
        self._values = SharedValues(self._neighbourhood.arena, len(session.servers))
        self.epoch = epoch
        self._replica = Replica(epoch) if follow else None
        self._on_refused = on_refused
        self._served = True
        if not follow:
            self._take_early()

    def changed(self, change: Departed | Joined) -> None:
        """The scheduler says that a member is gone, or that a worker has joined."""
        if isinstance(change, Joined):
            self._take_all_back(change.rank, change.incarnation - 1)
            return
        if change.role != "worker":
            return
        returns = change.reason and change.on_loss == "wait"
        if not (change.stays or returns):  # else it may go on reading
            self._take_all_back(change.rank, change.incarnation)
        if self.is_replica:
            return  # its primary's log will tell
        if change.reason:
            now = self._reactor.now()
            actions = self.serving.lost(change.rank, change.reason, change.on_loss, change.incarnation, now)
        else:
            actions = self.serving.leaves(change.rank, change.incarnation)
        self._conclude(NOBODY, NOBODY, change, actions)
        self._flush()

    # --- replication --------------------------------------------------------------------------

    @property
    def is_replica(self) -> bool:
        return self._replica is not None

    @property
    def replicated_in(self) -> int:
        """The epoch of its log; 0: it has none, and commits alone."""
        return 0 if self._stream is None else self._stream.log.epoch

    def take_over(self, epoch: int, lost: Iterable[Departed]) -> None:
        """The replica becomes primary. ``lost``: the workers that are, of whom the log may not have told."""
        self._replica = None
        self.epoch = epoch
        for gone in lost:
            self.changed(gone)
        self._take_early()

    def _take_early(self) -> None:
        early, self._early = self._early, []
        for peer, frames in early:
            self._receive(peer, frames)

    def replicate(self, epoch: int, address: str, on_in_step: Callable[[], None]) -> None:
        """From here on there is a replica, new and empty."""
        self.stop_replicating()
        began = Log(epoch)
        steps = began.begin(self.serving)
        self._stream = Stream(
            self._network, self._reactor, began, address, lambda: self._session.sender, self._flush, on_in_step,
            self._refused,
        )  # fmt: skip
        self._log(self._stream, steps)
        self._flush()

    def _refused(self, error: KVStoreError) -> None:
        """The replica is primary already; when it has been handed over to, that is as it should be."""
        if not self._closed:
            self._on_refused(error)

    def stop_replicating(self) -> None:
        """From here on it commits alone."""
        if self._stream is not None:
            stream, self._stream = self._stream, None
            stream.close()
            self._flush()

    def hand_over(self, done: Callable[[], None]) -> None:
        """Take in nothing more, and call ``done`` when the replica has everything."""
        self._closed = True

        def look() -> None:
            if self._closed and self._stream is not None:
                if self._stream.log.over:
                    done()
                else:
                    self._reactor.call_later(LOOK_S, look)

        look()

    def go_on(self) -> None:
        """It is not handed over after all."""
        self._closed = False

    def tick(self, now: float) -> None:
        """Now and then."""
        if self._stream is not None:
            self._stream.tick(now)
        if self._served and not self.is_replica:
            self._conclude(NOBODY, NOBODY, EndCut(0, 0), self.serving.expire_cuts(now))
            self._copies.tick(now)
            self._flush()
            self._drop_stalled(now)

    def close(self) -> None:
        """This process does not have the shard any more."""
        self._closed = True
        self.stop_replicating()
        self._endpoint.close()

    def _take_entry(self, peer: bytes, entry: Entry, payload: Frames) -> None:
        if self._replica is None:
            refuse(entry.epoch, self.epoch)
            return
        for due, frames in self._replica.take(entry, payload):
            arrays = self._check(NOBODY, due.message, frames)
            for action in follow(self.serving, due, arrays, self._reactor.now()):
                self._perform(action)
        self._outbox(peer).put(Taken(self._replica.taken, self._replica.epoch))

    def report(self) -> dict[str, int]:
        """How many keys it has, and their bytes."""
        keys = {key for key, _ in self.serving.pieces if not isinstance(key, bytes)}
        counted = [self._stored[piece] for piece, _ in self.serving.counted()]
        return {"keys": len(keys), "bytes": sum(stored.value.nbytes for stored in counted)}

    def _receive(self, peer: bytes, frames: Frames) -> None:
        if self._closed:
            return  # who has sent it will send it to the next primary
        if not self._served:
            self._early.append((peer, frames))
            return
        try:
            sender, messages = decode(frames[0], len(frames) - 1)
            if sender.cluster != self._session.sender.cluster:
                raise DisagreementError("the sender belongs to another cluster than this server")
        except KVStoreError as error:
            self._outbox(peer).put(Failed(0, *to_wire(error)))
            self._flush()
            return
        if messages and isinstance(messages[0][0], Entry):
            self._receive_log(peer, messages, frames)
            return
        if self._replica is not None and messages and not isinstance(messages[0][0], ReadStatus):
            if len(self._early) < EARLY_MAX:
                self._early.append((peer, frames))
            return
        refusal = self.serving.refuses(sender.rank, sender.incarnation)
        if refusal is None:
            self._peers[sender.rank] = peer
        for message, payload in paired(messages, frames):
            if not isinstance(message, Push | Fetch) and self._handle_reader(peer, message):
                continue
            if refusal is not None:
                self._outbox(peer).put(Failed(message.request_id, *to_wire(refusal)))
            else:
                self._handle(peer, sender, message, payload)
        self._flush()

    def _receive_log(self, peer: bytes, messages: Sequence[tuple[Message, int]], frames: Frames) -> None:
        try:
            for message, payload in paired(messages, frames):
                if isinstance(message, Entry):
                    self._take_entry(peer, message, payload)
        except KVStoreError as error:
            self._outbox(peer).put(Failed(0, *to_wire(error)))
        self._flush()

    def _handle(self, peer: bytes, sender: Sender, message: Message, payload: Frames) -> None:
        if isinstance(message, Meet):
            met = self._neighbourhood.reaches(sender.rank, message.probe)
            probe, line = (self._neighbourhood.probe(), self._endpoint.offer(peer)) if met else (None, "")
            self._outbox(peer).put(Met(message.request_id, probe, line))
            return
        try:
            arrays = self._check(sender.rank, message, payload)
        except KVStoreError as error:
            self._outbox(peer).put(Failed(message.request_id, *to_wire(error)))
            return
        priority = 0
        if isinstance(message, Push | Fetch):
            priority = message.priority
            self._take_back(sender, message)
        now = self._reactor.now()
        actions = self.serving.handle(sender.rank, sender.incarnation, message, arrays, now)
        self._conclude(sender.rank, sender.incarnation, message, actions, priority)

    def _handle_reader(self, peer: bytes, message: Message) -> bool:
        """Somebody, who need not be a worker, asks about the server or makes a checkpoint; False: it is not so."""
        now = self._reactor.now()
        actions: list[Action] = []
        match message:
            case ReadStatus():
                self._outbox(peer).put(Status(message.request_id, self.report()))
            case ReadCopy():
                self._copies.read_copy(peer, message)
            case ReadCut():
                self._copies.read(peer, message)
                actions = self.serving.open_cut(message.cut, message.awaited, now)
            case EndCut():
                actions = self.serving.end_cut(message.cut, now)
                self._copies.end(peer, message)
            case Explain(about=cut) if cut in self.serving.cutting.open:
                why = self.serving.explain_cut(cut, None, now)
                self._outbox(peer).put(Explanation(message.request_id, why))
            case _:
                return False
        self._conclude(NOBODY, NOBODY, message, actions)
        return True

    def _reply_to(self, peer: bytes, message: Message, frames: Sequence[Any]) -> None:
        """To a connection that need not be a worker's."""
        self._outbox(peer).put(message, frames)
        self._flush_soon()

    def _take_back(self, sender: Sender, message: Push | Fetch) -> None:
        """A request says which of the earlier ones' places its worker still reads."""
        piece_id = (message.key, message.piece)
        speaker = Reader(sender.rank, sender.incarnation, message.request_id)
        with self._lending_lock:
            over = self._lending.heard(piece_id, speaker, message.held)
        stored = self._stored.get(piece_id)
        if stored is not None:
            for reader in over:
                stored.give_back(reader)

    def _check(self, rank: int, message: Message, payload: Frames) -> Any:
        """The frames as arrays of the right dtype and size; ProtocolError otherwise."""
        if isinstance(message, Init):
            kind, nbytes = _form(message.spec, message.piece)
            return self._one_frame(message, nbytes, kind, payload)
        if isinstance(message, Push | Updated):
            spec = self.serving.spec_of(message.key, message.piece)
            if spec is None:
                return None
            kind, nbytes = _form(spec, message.piece)
            if isinstance(message, Push) and message.place is not None:
                return self._neighbourhood.array(rank, message.place, nbytes).view(kind)
            return self._one_frame(message, nbytes, kind, payload)
        if isinstance(message, RestorePiece):
            kind, nbytes = _form(message.spec, message.piece)
            if rank != NOBODY or not payload or len(payload[0]) != nbytes:
                raise ProtocolError(f"a log's piece of key {message.key!r}: expected a first frame of {nbytes} bytes")
            return np.frombuffer(payload[0], kind), _state(message.spec, message, payload[1:])
        if isinstance(message, WriteState):
            return _state(self.serving.spec_of(message.key, message.piece), message, payload)
        if isinstance(message, Restore):
            spec = self.serving.spec_of(message.key, message.piece)
            if spec is None:
                return None
            kind, nbytes = _form(spec, message.piece)
            if not payload or len(payload[0]) != nbytes:
                raise ProtocolError(f"restore of key {message.key!r}: expected a first frame of {nbytes} bytes")
            return np.frombuffer(payload[0], kind).copy(), _state(spec, message, payload[1:])
        if payload:
            raise ProtocolError(f"{type(message).__name__}: expected no value frame, got {len(payload)}")
        return None

    def _one_frame(
        self, message: Init | Push | Updated, expected: int, dtype: np.dtype[Any], payload: Frames
    ) -> Array | None:
        if not payload:
            return None
        if len(payload) != 1 or len(payload[0]) != expected:
            raise ProtocolError(
                f"{type(message).__name__.lower()} of key {message.key!r}, piece {message.piece}: expected one frame "
                f"of {expected} bytes, got {[len(frame) for frame in payload]}"
            )
        array: Array = np.frombuffer(payload[0], dtype)
        return array

    def _conclude(
        self, rank: int, incarnation: int, message: Message, actions: list[Action], priority: int = 0
    ) -> None:
        """Perform what followed from a message, with a log if there is a replica."""
        if self._stream is None:
            for action in actions:
                self._perform(action, priority)
        else:
            self._log(self._stream, self._stream.log.conclude(rank, incarnation, message, actions), priority)

    def _log(self, stream: Stream, steps: Steps, priority: int = 0) -> None:
        """Perform what the log says."""
        for action, number in steps:
            mark = Mark(stream, number) if number else None
            if not isinstance(action, Copy):
                self._perform(action, priority, mark)
            elif mark is not None:
                self._copy(action.piece, mark)

    def _perform(self, action: Action, priority: int = 0, mark: Mark | None = None) -> None:
        """``mark``: what is to have the action's payload, or what a reply has to wait for."""
        match action:
            case Reply(rank, message):
                self._reply(rank, message, mark=mark)
            case ReplyValue():
                self._reply_value(action, priority, mark)
            case ReplyAfter(rank, message, piece):
                self._then(self._stored[piece], rank, message.request_id, lambda: (message, ()), priority, mark=mark)
            case Apply():
                self._apply(action, priority, mark)
            case Create():
                self._create(action, mark)
            case SendState(rank, request_id, piece, span):
                stored = self._stored[piece]
                self._then(stored, rank, request_id, lambda: _state_of(stored, request_id, span), mark=mark)
            case StoreState():
                self._store_state(action, mark)
            case Forget(piece):
                self._stored.pop(piece, None)
                self._shared.discard(piece)
                self._values.forget(piece)
            case TakeCut():
                self._copies.take(action, self._stored)
            case LoseCut(cut, error):
                self._copies.lose(cut, error)
            case Unite(bundle):
                self._unite(bundle)
            case Split(bundle):
                self._split(bundle)

    def _create(self, action: Create, mark: Mark | None) -> None:
        piece, value = action.piece, action.payload
        if isinstance(action.restored, RestoredPiece):
            value = action.restored.value
        assert isinstance(value, np.ndarray)
        stored = self._stored[piece] = Stored(value, f"{piece[0]!r}[{piece[1]}]")
        if isinstance(action.restored, RestoredPiece):
            stored.restore(action.restored.state, action.restored.step, self.serving.pieces[piece].generation)
        if mark is not None:  # a restored piece is copied afterwards, with its state
            self._complete(mark, [value.copy()])

    def _complete(self, mark: Mark, arrays: Sequence[Array], **fields: Any) -> None:
        """The payload of an entry of the log; from any thread."""
        frames = tuple(array.reshape(-1).view(np.uint8) for array in arrays)
        if self._reactor.is_here:
            mark.complete(frames, **fields)
            return

        def complete() -> None:
            mark.complete(frames, **fields)
            self._flush_soon()

        self._reactor.post(complete)

    def _copy(self, piece: PieceId, mark: Mark) -> None:
        """What a new replica is to begin with."""
        stored = self._stored[piece]

        def copy() -> None:
            arrays = [array.copy() for array in (stored.value, *stored.state.values())]
            names, dtypes = tuple(stored.state), tuple(array.dtype.name for array in arrays[1:])
            self._complete(mark, arrays, names=names, dtypes=dtypes)

        self._engine.push(copy, reads=[stored.var], name="copy", inline=True)

    def _unite(self, bundle: Bundle) -> None:
        parts = [self._stored.pop(piece) for piece in bundle.members]
        whole = self._stored.get(bundle.piece)  # it has been united before: its memory may still be read
        if whole is None:
            value = np.empty(bundle.spec.shape, dtype_named(bundle.spec.dtype))
            whole = self._stored[bundle.piece] = Stored(value, str(bundle))
        reads = [part.var for part in parts]
        self._engine.push(lambda: whole.unite(parts), reads=reads, writes=[whole.var], name="unite", inline=True)

    def _split(self, bundle: Bundle) -> None:
        whole = self._stored[bundle.piece]
        empty: Array = np.empty(0, whole.value.dtype)
        parts = [(Stored(empty, repr(piece)), slice(*span)) for piece, span in bundle]
        self._stored.update(zip(bundle.members, (part for part, _ in parts), strict=True))
        writes = [whole.var, *(part.var for part, _ in parts)]
        self._engine.push(lambda: whole.split(parts), reads=[whole.var], writes=writes, name="split", inline=True)

    def _apply(self, action: Apply, priority: int, mark: Mark | None) -> None:
        stored = self._stored[action.piece]
        pushes = [_elements(payload) for payload in action.payloads]
        rule: Any = action.rule
        info = {"key": action.piece[0], "bytes": stored.value.nbytes, "round": action.round}
        far = all(push.flags.writeable for push in pushes)  # what lies in another process's memory is not
        reads: tuple[engine.Var, ...]
        work: Callable[[], None]
        if mark is not None:
            name, reads = "merge, log, update", (stored.var,)
            work = partial(self._update_and_log, stored, pushes, action, mark)
        elif rule is None:
            name, reads, work = "merge", (), lambda: stored.assign(pushes, owned=True)
        else:
            name, reads, work = "merge+update", (stored.var,), lambda: stored.update(pushes, rule, action.generation)
        self._work(stored, work, name, priority, reads, (stored.var,), info, far=far)

    def _update_and_log(self, stored: Stored, pushes: list[Array], action: Apply, mark: Mark) -> None:
        """An update whose merged payload goes to the replica; it gives the same bits as one without."""
        rule: Any = action.rule
        if rule is None:
            stored.assign(pushes, owned=True)
            value = stored.lend(mark)
            self._complete(mark, [value])
            self._reactor.post(lambda: mark.then(lambda: stored.give_back(mark)))
            return
        merged = pushes[0]
        if len(pushes) > 1:
            merged = merged if merged.flags.writeable else np.empty_like(merged)
            kernels.merge(pushes, merged)
        self._complete(mark, [merged])
        stored.update([merged], rule, action.generation)

    def _work(
        self,
        stored: Stored,
        work: Callable[[], None],
        name: str,
        priority: int,
        reads: tuple[engine.Var, ...],
        writes: tuple[engine.Var, ...],
        info: dict[str, Any] | None = None,
        far: bool = False,
    ) -> engine.Handle | None:
        """Do this after what was to be done on the piece before: as an op, or at once and then there is no handle.

        ``far``: it concerns no shared memory. Small work is done at once if the piece is free, and it stays so:
        no other thread submits ops on it.
        """
        inline = stored.value.nbytes <= (FAR_INLINE_BYTES if far else INLINE_BYTES)
        if inline and self._engine.free(stored.var):
            try:
                work()
                return None
            except Exception as raised:
                work = partial(_raise, raised)  # so that those hear of it who would hear of an op's error
        return self._engine.push(work, reads, writes, priority, name=name, inline=inline, info=info)

    def _reply_value(self, action: ReplyValue, priority: int, mark: Mark | None) -> None:
        stored, request_id = self._stored[action.piece], action.request_id
        with self._lending_lock:
            near = action.near and self._lending.count(action.piece, action.rank) < LENT_MAX
        if near and action.piece not in self._shared:
            self._share(action.piece)
        reader = Reader(action.rank, self.serving.workers.incarnations[action.rank], request_id)

        def make() -> Outgoing:
            place = self._lend_in_place(action.piece, reader) if near else None
            value = Value(request_id, action.version, action.staleness, place)
            if place is not None:
                return value, ()
            return value, (stored.lend(reader).reshape(-1)[_slice(action.span)].view(np.uint8),)

        on_sent = partial(stored.give_back, reader)
        self._then(stored, action.rank, request_id, make, priority, on_sent, far=not near, mark=mark)

    def _share(self, piece: PieceId) -> None:
        """From here on the value lies in shared memory, if there is enough."""
        self._shared.add(piece)
        stored = self._stored[piece]
        allocate = self._values.allocator(piece, self.serving.pieces[piece].spec)

        def move() -> None:
            row = allocate()
            if row is not None:
                stored.move(row, allocate)

        self._engine.push(move, reads=[stored.var], writes=[stored.var], name="share", inline=True)

    def _lend_in_place(self, piece: PieceId, reader: Reader) -> Place | None:
        """Where the value lies for a worker of this host to read; None: not in shared memory."""
        stored = self._stored[piece]
        place = self._values.place(stored.lend(reader))
        if place is not None:
            with self._lending_lock:
                self._lending.lend(piece, reader)
        return place

    def _then(
        self,
        stored: Stored,
        rank: int,
        request_id: int,
        make: Callable[[], Outgoing],
        priority: int = 0,
        on_sent: OnSent | None = None,
        far: bool = False,
        mark: Mark | None = None,
    ) -> None:
        """Send what ``make`` returns after all earlier ops on the piece; or their failure.

        ``on_sent`` is called once the memory of the frames, if there are any, is not needed any more.
        """

        def reply() -> None:
            message, frames = make()
            then = on_sent if frames else None
            if self._reactor.is_here:
                self._reply(rank, message, frames, priority, then, mark)
            else:
                self._reactor.post(lambda: self._reply_now(rank, message, frames, priority, then, mark))

        handle = self._work(stored, reply, "reply", priority, (stored.var,), (), far=far)

        def ended(error: BaseException | None) -> None:
            if error is not None:
                failed = Failed(request_id, *to_wire(error))
                self._reactor.post(lambda: self._reply_now(rank, failed, (), priority, None))

        if handle is not None:
            when_ended(handle, ended)

    def _store_state(self, action: StoreState, mark: Mark | None) -> None:
        message = action.message
        value, state = action.payload if isinstance(action.payload, tuple) else (None, action.payload)
        assert isinstance(state, dict)
        stored = self._stored[message.key, message.piece]
        if mark is not None:
            values = [] if value is None else [value.copy()]
            self._complete(mark, [*values, *(array.copy() for array in state.values())])
        self._engine.push(
            lambda: stored.restore(state, message.step, action.generation, value),
            reads=[stored.var], writes=[stored.var], name="write state",
        )  # fmt: skip
        self._then(stored, action.rank, message.request_id, lambda: (Done(message.request_id), ()), mark=mark)

    def _reply_now(
        self,
        rank: int,
        message: Message,
        frames: Sequence[Any],
        priority: int,
        on_sent: OnSent | None,
        mark: Mark | None = None,
    ) -> None:
        self._reply(rank, message, frames, priority, on_sent, mark)
        self._flush_soon()

    def _flush_soon(self) -> None:
        """After all that was posted until now, in as few messages as that allows."""
        if not self._flushing:
            self._flushing = True
            self._reactor.post(self._flush)

    def _reply(
        self,
        rank: int,
        message: Message,
        frames: Sequence[Any] = (),
        priority: int = 0,
        on_sent: OnSent | None = None,
        mark: Mark | None = None,
    ) -> None:
        if mark is not None and not mark.passed:
            mark.then(lambda: self._reply(rank, message, frames, priority, on_sent))
            return
        peer = self._peers.get(rank)
        if peer is not None:
            self._outbox(peer).put(message, frames, priority, on_sent)
        elif on_sent is not None:
            on_sent()

    def _outbox(self, peer: bytes) -> Outbox:
        """The peer's replies, which :meth:`_flush` will look at."""
        outbox = self._outboxes.get(peer)
        if outbox is None:
            outbox = self._outboxes[peer] = Outbox()
        self._unflushed[peer] = outbox
        return outbox

    def _flush(self) -> None:
        self._flushing = False
        if self._stream is not None:
            self._stream.flush()
        unflushed, self._unflushed = self._unflushed, {}
        for peer, outbox in unflushed.items():
            for batch in outbox.batches():
                on_sent = [*batch.on_sent, lambda peer=peer: self._sent(peer)] if batch.on_sent else []  # type: ignore[misc]
                if not self._endpoint.send(peer, envelope(self._session.sender, batch.messages), on_sent):
                    self._discard(peer)
                    break

    def _sent(self, peer: bytes) -> None:
        """The socket has done with some large replies: the next may follow."""
        outbox = self._outboxes.get(peer)
        if outbox is not None:
            self._unflushed[peer] = outbox
            self._reactor.post(self._flush)

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

    def _drop_stalled(self, now: float) -> None:
        self._outbox_bytes_max = OUTBOX_BYTES + OUTBOX_SHARE * self.report()["bytes"]
        for peer, outbox in list(self._outboxes.items()):
            if outbox.stalled(now, STALLED_S) or outbox.nbytes > self._outbox_bytes_max or len(outbox) > REPLIES_MAX:
                self._drop(peer)

    def _take_all_back(self, rank: int, incarnation: int) -> None:
        """That life of a worker is over, and reads nothing any more."""
        with self._lending_lock:
            over = self._lending.gone(rank, incarnation)
        for piece, reader in over:
            if piece in self._stored:
                self._stored[piece].give_back(reader)
        self._neighbourhood.forget(rank)


@lru_cache(maxsize=65536)
def _form(spec: Spec, number: int) -> tuple[np.dtype[Any], int]:
    """The dtype of a piece and its size in bytes; -1 if there is no such piece."""
    kind, cut = dtype_named(spec.dtype), spec.cut
    return kind, cut.size(number) * kind.itemsize if number < len(cut) else -1


def _elements(payload: object) -> Array:
    """A payload as the array it is, or is a part of."""
    if isinstance(payload, Part):
        return _elements(payload.payload).reshape(-1)[slice(*payload.span)]
    assert isinstance(payload, np.ndarray)
    return payload


def _slice(span: Span | None) -> slice:
    """These elements, or all."""
    return slice(None) if span is None else slice(*span)


def _raise(error: Exception) -> None:
    raise error


def _state(spec: Spec | None, message: WriteState | Restore | RestorePiece, frames: Frames) -> dict[str, Array]:
    """The arrays of an optimizer's state, by name."""
    if not len(frames) == len(message.names) == len(message.dtypes):
        raise ProtocolError(f"optimizer state of key {message.key!r}: expected one frame and dtype per name")
    state = {}
    for name, dtype, frame in zip(message.names, message.dtypes, frames, strict=True):
        kind = dtype_named(dtype)
        if spec is not None and len(frame) != spec.cut.size(message.piece) * kind.itemsize:
            raise ProtocolError(f"optimizer state of key {message.key!r}: a frame of {len(frame)} bytes")
        state[name] = np.frombuffer(frame, kind).copy()
    return state


def _state_of(stored: Stored, request_id: int, span: Span | None) -> Outgoing:
    arrays = {name: array.reshape(-1)[_slice(span)].copy() for name, array in stored.state.items()}
    names, dtypes = tuple(arrays), tuple(array.dtype.name for array in arrays.values())
    return State(request_id, stored.step, names, dtypes), tuple(array.view(np.uint8) for array in arrays.values())
