"""A server as a running process: a socket and the engine around :class:`kvstore.protocol.serving.Serving`.

The core decides; this file turns its actions into engine ops on the piece's var. Small work is done at once on
the server's own thread, larger work by the engine's pool, so that the socket is free for what is urgent.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np

import engine
from kvstore import kernels, optim
from kvstore.arrays import Array, dtype_named
from kvstore.checkpoint.restoring import RestoredPiece, Restoring
from kvstore.cluster.address import advertised, reachable, split
from kvstore.cluster.copies import Copies
from kvstore.cluster.near import Neighbourhood
from kvstore.cluster.outbox import OnSent, Outbox, Outgoing
from kvstore.cluster.session import Session
from kvstore.cluster.values import SharedValues
from kvstore.errors import DisagreementError, KVStoreError, OptionError, ProtocolError, to_wire
from kvstore.handle import when_ended
from kvstore.protocol.bundles import Bundle, Part
from kvstore.protocol.leases import Lending, Reader
from kvstore.protocol.messages import (
    FRAME_BYTES_MAX,
    NOBODY,
    Departed,
    Done,
    EndCut,
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
    Sender,
    Spec,
    State,
    Status,
    Value,
    WriteState,
    decode,
    envelope,
)
from kvstore.protocol.pieces import PieceId, Span
from kvstore.protocol.serving import (
    Action,
    Apply,
    Create,
    Forget,
    LoseCut,
    Reply,
    ReplyAfter,
    ReplyValue,
    SendState,
    Serving,
    Split,
    StoreState,
    TakeCut,
    Unite,
)
from kvstore.stored import Stored
from kvstore.transport.network import HEARTBEAT_S, Frames, Network
from kvstore.transport.zeromq import NETWORK

log = logging.getLogger(__name__)

INLINE_BYTES = 64 << 10  # up to this much, work is done on the thread of the socket: a hand-over costs more
FAR_INLINE_BYTES = 1 << 20  # the same for what came through the socket and lies in this core's caches
IO_THREADS = 2  # one copies what comes from or goes to all workers at 4-5 GB/s
OUTBOX_BYTES = 256 << 20  # that wait for one peer, beside OUTBOX_SHARE times what is stored; looked at now and then
OUTBOX_SHARE = 4
REPLIES_MAX = 1 << 18  # that wait for one peer
STALLED_S = 30.0  # how long a peer may take to read anything, while replies wait for it
LENT_MAX = 32  # places of a piece that one worker may hold; beyond that it gets frames
JOIN_TIMEOUT_S = 300.0
KERNELS_S = 5.0  # more than the first start on a machine needs to compile what the first round needs


class Server:
    """One server of a cluster.

    Args:
        address: the scheduler's.
        bind: where to listen; port ``*`` lets the system choose.
        advertise: the address that workers reach it by, if another than the bound one.
        rank: its number among the servers; None: any.
        neighbourhood: memory for values that workers of this host read in place; None: none is shared.
        restore: a checkpoint; new keys that it has begin with what it says.
        network: how others are reached, and reach it.
        runtime: the engine; None: the process's default.
        heartbeat: seconds after which a scheduler that shows no life is taken for gone, and connected anew.
    """

    def __init__(
        self,
        address: str,
        *,
        bind: str = "tcp://127.0.0.1:*",
        advertise: str | None = None,
        rank: int | None = None,
        neighbourhood: Neighbourhood | None = None,
        restore: Restoring | None = None,
        network: Network = NETWORK,
        runtime: engine.Engine | None = None,
        heartbeat: float = HEARTBEAT_S,
    ) -> None:
        self._heartbeat = heartbeat
        self._scheduler = reachable(address)
        self._wanted = NOBODY if rank is None else rank
        self._engine = runtime or engine.default()
        self._network = network
        self._restore = restore
        self._reactor = network.loop("kvstore-server", self._tick, io_threads=IO_THREADS)
        try:
            self._endpoint = network.listen(self._reactor, self._receive, frame_bytes_max=FRAME_BYTES_MAX, watch=True)
            self._endpoint.on_gone = self._discard
            self._endpoint.on_stuck = self._drop
            split(bind)  # for ZeroMQ port 70000 is port 4464
            self.address = advertised(self._endpoint.bind(bind), advertise)
        except OptionError:
            self._reactor.abandon()
            raise
        self._session: Session | None = None
        self._serving: Serving | None = None
        self._neighbourhood = neighbourhood or Neighbourhood(0)
        self._values: SharedValues | None = None
        self._stored: dict[PieceId, Stored] = {}
        self._shared: set[PieceId] = set()  # those whose values lie in shared memory, as far as there is any
        self._copies = Copies(self._engine, self._reactor.post, self._reply_to)
        self._lending = Lending()
        self._lending_lock = threading.Lock()
        self._peers: dict[int, bytes] = {}  # rank -> its latest connection
        self._outboxes: dict[bytes, Outbox] = {}  # by connection
        self._outbox_bytes_max = OUTBOX_BYTES
        self._unflushed: dict[bytes, Outbox] = {}
        self._flushing = False
        self._stopped = threading.Event()
        self._retained = False

    def __repr__(self) -> str:
        return f"<Server at {self.address}: {self._serving!r}>"

    def start(self, connect_timeout: float = 30.0) -> None:
        """Join the cluster and start to answer.

        Raises:
            UnreachableError: no scheduler at the address.
            PeerError: the scheduler refused.
        """
        kernels.prepare()
        self._engine.retain()
        self._retained = True
        session = Session(self._scheduler, "server", self._changed, network=self._network, heartbeat=self._heartbeat)
        self._session = session
        try:
            session.register(self._wanted, self.address, connect_timeout, JOIN_TIMEOUT_S)
        except BaseException:
            self.stop()
            raise
        name = f"server {session.sender.rank} at {self.address}"
        if self._restore is None:
            self._serving = Serving(session.num_workers, optim.from_wire, name)
        else:
            self._serving = Serving(session.num_workers, optim.from_wire, name, self._restore.piece)
            self._restore.begin(self._serving.settings)
        self._values = SharedValues(self._neighbourhood.arena, len(session.servers))
        kernels.wait(KERNELS_S)
        self._reactor.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until :meth:`stop` was called; False when ``timeout`` seconds passed first."""
        return self._stopped.wait(timeout)

    def stop(self) -> None:
        """Stop answering. Safe from any thread, more than once."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        if self._session is not None:
            self._session.leave()
        self._reactor.stop(linger_s=0.2)
        self._neighbourhood.close()
        if self._retained:
            self._engine.release()

    # --- on the reactor's thread ----------------------------------------------------------------

    def _receive(self, peer: bytes, frames: Frames) -> None:
        assert self._session is not None and self._serving is not None
        try:
            sender, messages = decode(frames[0], len(frames) - 1)
            if sender.cluster != self._session.sender.cluster:
                raise DisagreementError("the sender belongs to another cluster than this server")
        except KVStoreError as error:
            self._outbox(peer).put(Failed(0, *to_wire(error)))
            self._flush()
            return
        refusal = self._serving.refuses(sender.rank, sender.incarnation)
        if refusal is None:
            self._peers[sender.rank] = peer
        position = 1
        for message, count in messages:
            payload = frames[position : position + count]
            position += count
            if not isinstance(message, Push | Fetch) and self._handle_reader(peer, message):
                continue
            if refusal is not None:
                self._outbox(peer).put(Failed(message.request_id, *to_wire(refusal)))
            else:
                self._handle(peer, sender, message, payload)
        self._flush()

    def _handle(self, peer: bytes, sender: Sender, message: Message, payload: Frames) -> None:
        assert self._serving is not None
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
        self._perform(self._serving.handle(sender.rank, sender.incarnation, message, arrays, now), priority)

    def _handle_reader(self, peer: bytes, message: Message) -> bool:
        """Somebody, who need not be a worker, asks about the server or makes a checkpoint; False: it is not so."""
        assert self._serving is not None
        now = self._reactor.now()
        match message:
            case ReadStatus():
                self._outbox(peer).put(Status(message.request_id, self._report()))
            case ReadCopy():
                self._copies.read_copy(peer, message)
            case ReadCut():
                self._copies.read(peer, message)
                self._perform(self._serving.open_cut(message.cut, message.awaited, now))
            case EndCut():
                self._perform(self._serving.end_cut(message.cut, now))
                self._copies.end(peer, message)
            case Explain(about=cut) if cut in self._serving.cutting.open:
                why = self._serving.explain_cut(cut, None, now)
                self._outbox(peer).put(Explanation(message.request_id, why))
            case _:
                return False
        return True

    def _tick(self, now: float) -> None:
        if self._serving is not None:
            self._perform(self._serving.expire_cuts(now))
            self._copies.tick(now)
            self._flush()
        self._drop_stalled(now)

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
        assert self._serving is not None
        if isinstance(message, Init):
            kind, nbytes = _form(message.spec, message.piece)
            return self._one_frame(message, nbytes, kind, payload)
        if isinstance(message, Push):
            spec = self._serving.spec_of(message.key, message.piece)
            if spec is None:
                return None
            kind, nbytes = _form(spec, message.piece)
            if message.place is not None:
                return self._neighbourhood.array(rank, message.place, nbytes).view(kind)
            return self._one_frame(message, nbytes, kind, payload)
        if isinstance(message, WriteState):
            return _state(self._serving.spec_of(message.key, message.piece), message, payload)
        if isinstance(message, Restore):
            spec = self._serving.spec_of(message.key, message.piece)
            if spec is None:
                return None
            kind, nbytes = _form(spec, message.piece)
            if not payload or len(payload[0]) != nbytes:
                raise ProtocolError(f"restore of key {message.key!r}: expected a first frame of {nbytes} bytes")
            return np.frombuffer(payload[0], kind).copy(), _state(spec, message, payload[1:])
        if payload:
            raise ProtocolError(f"{type(message).__name__}: expected no value frame, got {len(payload)}")
        return None

    def _one_frame(self, message: Init | Push, expected: int, dtype: np.dtype[Any], payload: Frames) -> Array | None:
        if not payload:
            return None
        if len(payload) != 1 or len(payload[0]) != expected:
            raise ProtocolError(
                f"{type(message).__name__.lower()} of key {message.key!r}, piece {message.piece}: expected one frame "
                f"of {expected} bytes, got {[len(frame) for frame in payload]}"
            )
        array: Array = np.frombuffer(payload[0], dtype)
        return array

    def _perform(self, actions: list[Action], priority: int = 0) -> None:
        for action in actions:
            match action:
                case Reply(rank, message):
                    self._reply(rank, message)
                case ReplyValue():
                    self._reply_value(action, priority)
                case ReplyAfter(rank, message, piece):
                    self._then(self._stored[piece], rank, message.request_id, lambda m=message: (m, ()), priority)  # type: ignore[misc]
                case Apply():
                    self._apply(action, priority)
                case Create():
                    self._create(action)
                case SendState(rank, request_id, piece, span):
                    stored = self._stored[piece]
                    self._then(stored, rank, request_id, lambda s=stored, i=request_id, p=span: _state_of(s, i, p))  # type: ignore[misc]
                case StoreState():
                    self._store_state(action)
                case Forget(piece):
                    assert self._values is not None
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

    def _create(self, action: Create) -> None:
        assert self._serving is not None
        piece, value = action.piece, action.payload
        if isinstance(action.restored, RestoredPiece):
            value = action.restored.value
        assert isinstance(value, np.ndarray)
        stored = self._stored[piece] = Stored(value, f"{piece[0]!r}[{piece[1]}]")
        if isinstance(action.restored, RestoredPiece):
            stored.restore(action.restored.state, action.restored.step, self._serving.pieces[piece].generation)

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

    def _apply(self, action: Apply, priority: int) -> None:
        stored = self._stored[action.piece]
        pushes = [_elements(payload) for payload in action.payloads]
        rule: Any = action.rule
        info = {"key": action.piece[0], "bytes": stored.value.nbytes, "round": action.round}
        far = all(push.flags.writeable for push in pushes)  # what lies in another process's memory is not
        reads: tuple[engine.Var, ...]
        if rule is None:
            name, reads, work = "merge", (), lambda: stored.assign(pushes, owned=True)
        else:
            name, reads, work = "merge+update", (stored.var,), lambda: stored.update(pushes, rule, action.generation)
        self._work(stored, work, name, priority, reads, (stored.var,), info, far=far)

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

    def _reply_value(self, action: ReplyValue, priority: int) -> None:
        assert self._serving is not None
        stored, request_id = self._stored[action.piece], action.request_id
        with self._lending_lock:
            near = action.near and self._lending.count(action.piece, action.rank) < LENT_MAX
        if near and action.piece not in self._shared:
            self._share(action.piece)
        reader = Reader(action.rank, self._serving.workers.incarnations[action.rank], request_id)

        def make() -> Outgoing:
            place = self._lend_in_place(action.piece, reader) if near else None
            value = Value(request_id, action.version, action.staleness, place)
            if place is not None:
                return value, ()
            return value, (stored.lend(reader).reshape(-1)[_slice(action.span)].view(np.uint8),)

        on_sent = partial(stored.give_back, reader)
        self._then(stored, action.rank, request_id, make, priority, on_sent, far=not near)

    def _share(self, piece: PieceId) -> None:
        """From here on the value lies in shared memory, if there is enough."""
        assert self._serving is not None and self._values is not None
        self._shared.add(piece)
        stored = self._stored[piece]
        allocate = self._values.allocator(piece, self._serving.pieces[piece].spec)

        def move() -> None:
            row = allocate()
            if row is not None:
                stored.move(row, allocate)

        self._engine.push(move, reads=[stored.var], writes=[stored.var], name="share", inline=True)

    def _lend_in_place(self, piece: PieceId, reader: Reader) -> Place | None:
        """Where the value lies for a worker of this host to read; None: not in shared memory."""
        assert self._values is not None
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
    ) -> None:
        """Send what ``make`` returns after all earlier ops on the piece; or their failure.

        ``on_sent`` is called once the memory of the frames, if there are any, is not needed any more.
        """

        def reply() -> None:
            message, frames = make()
            then = on_sent if frames else None
            if self._reactor.is_here:
                self._reply(rank, message, frames, priority, then)
            else:
                self._reactor.post(lambda: self._reply_now(rank, message, frames, priority, then))

        handle = self._work(stored, reply, "reply", priority, (stored.var,), (), far=far)

        def ended(error: BaseException | None) -> None:
            if error is not None:
                failed = Failed(request_id, *to_wire(error))
                self._reactor.post(lambda: self._reply_now(rank, failed, (), priority, None))

        if handle is not None:
            when_ended(handle, ended)

    def _store_state(self, action: StoreState) -> None:
        message = action.message
        value, state = action.payload if isinstance(action.payload, tuple) else (None, action.payload)
        assert isinstance(state, dict)
        stored = self._stored[message.key, message.piece]
        self._engine.push(
            lambda: stored.restore(state, message.step, action.generation, value),
            reads=[stored.var], writes=[stored.var], name="write state",
        )  # fmt: skip
        self._then(stored, action.rank, message.request_id, lambda: (Done(message.request_id), ()))

    def _reply_now(
        self, rank: int, message: Message, frames: Sequence[Any], priority: int, on_sent: OnSent | None
    ) -> None:
        self._reply(rank, message, frames, priority, on_sent)
        self._flush_soon()

    def _flush_soon(self) -> None:
        if not self._flushing:  # after all that was posted until now, in as few messages as that allows
            self._flushing = True
            self._reactor.post(self._flush)

    def _reply(
        self,
        rank: int,
        message: Message,
        frames: Sequence[Any] = (),
        priority: int = 0,
        on_sent: OnSent | None = None,
    ) -> None:
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
        assert self._session is not None
        self._flushing = False
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
        self._outbox_bytes_max = OUTBOX_BYTES + OUTBOX_SHARE * int(self._report()["bytes"])
        for peer, outbox in list(self._outboxes.items()):
            if outbox.stalled(now, STALLED_S) or outbox.nbytes > self._outbox_bytes_max or len(outbox) > REPLIES_MAX:
                self._drop(peer)

    def _changed(self, change: Departed | Joined) -> None:
        self._reactor.post(lambda: self._take_change(change))

    def _take_change(self, change: Departed | Joined) -> None:
        """A member is gone, or a worker has joined."""
        if isinstance(change, Joined):
            self._take_all_back(change.rank, change.incarnation - 1)
            return
        if change.role != "worker":
            return
        if change.stays:
            self._perform(self._serving.leaves(change.rank, change.incarnation) if self._serving is not None else [])
            self._flush()
            return
        if not (change.reason and change.on_loss == "wait"):  # then it may go on reading when it is back
            self._take_all_back(change.rank, change.incarnation)
        if self._serving is None:
            return
        if change.reason:
            lost = self._serving.lost(
                change.rank, change.reason, change.on_loss, change.incarnation, self._reactor.now()
            )
            self._perform(lost)
        else:
            self._perform(self._serving.leaves(change.rank, change.incarnation))
        self._flush()

    def _take_all_back(self, rank: int, incarnation: int) -> None:
        """That life of a worker is over, and reads nothing any more."""
        with self._lending_lock:
            over = self._lending.gone(rank, incarnation)
        for piece, reader in over:
            if piece in self._stored:
                self._stored[piece].give_back(reader)
        self._neighbourhood.forget(rank)

    def _report(self) -> dict[str, Any]:
        if self._serving is None:
            return {"keys": 0, "bytes": 0}
        keys = {key for key, _ in self._serving.pieces if not isinstance(key, bytes)}
        counted = [self._stored[piece] for piece, _ in self._serving.counted()]
        return {"keys": len(keys), "bytes": sum(stored.value.nbytes for stored in counted)}


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


def _state(spec: Spec | None, message: WriteState | Restore, frames: Frames) -> dict[str, Array]:
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
