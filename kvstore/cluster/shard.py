"""A shard: what one :class:`kvstore.protocol.serving.Serving` decides on, with all that it needs to run.

The core decides; its actions go to those who carry them out: the work on values (:mod:`kvstore.cluster.work`), the
answers that tell of them (``answers.py``), copies for cuts (``copies.py``). Each shard has an address of its own, at
which workers find it whichever process has it.

It is the shard's primary, or a replica that follows the log until it becomes primary itself. Either may pass the log on
to the next server that has the shard; see :mod:`kvstore.protocol.replicating`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import engine
from kvstore.cluster.address import advertised, split
from kvstore.cluster.answers import Answers
from kvstore.cluster.copies import Copies
from kvstore.cluster.early import Early
from kvstore.cluster.near import Neighbourhood
from kvstore.cluster.payloads import checked
from kvstore.cluster.replies import Replies
from kvstore.cluster.session import Session
from kvstore.cluster.stream import Mark, Stream
from kvstore.cluster.values import SharedValues
from kvstore.cluster.work import Work
from kvstore.errors import DisagreementError, KVStoreError, to_wire
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
from kvstore.protocol.messages import (
    FRAME_BYTES_MAX,
    NOBODY,
    Departed,
    EndCut,
    Entry,
    Explain,
    Explanation,
    Failed,
    Fetch,
    Joined,
    Meet,
    Message,
    Met,
    Push,
    ReadCopy,
    ReadCut,
    ReadStatus,
    Status,
    Taken,
)
from kvstore.protocol.replicating import FIRST, Copy, Log, Replica, Steps, follow, forget_uncommitted, refuse
from kvstore.protocol.serving import Serving
from kvstore.protocol.wire import Sender, decode, paired
from kvstore.transport.network import Frames, Loop, Network

LOOK_S = 0.002  # how often it is looked whether the replica has everything


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
        self._replies = Replies(reactor, self._endpoint, lambda: self._session.sender, self._flush_log)
        self._copies = Copies(runtime, reactor.post, self._answer)
        self.address = advertised(self._endpoint.bind(bind), advertise)
        self.serving: Serving  # from :meth:`serve` on, as the next three
        self._session: Session
        self._work: Work
        self._answers: Answers
        self.epoch = 0  # in which it became what it is
        self._replica: Replica | None = None  # it is one, and follows a log
        self._before: bytes = b""  # where the log came from
        self._stream: Stream | None = None  # another replica is next
        self._number = FIRST  # of the last entry, while there is neither
        self._served = False
        self._early = Early()  # came before it was primary
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
        self._work = Work(serving, self._reactor, self._engine, self._replies.flush_soon)
        values = SharedValues(self._neighbourhood.arena, len(session.servers))
        self._answers = Answers(serving, self._work, self._replies, self._reactor, self._engine, values)
        self.epoch = epoch
        self._replica = Replica(epoch) if follow else None
        self._on_refused = on_refused
        self._served = True
        if not follow:
            self._take_early()

    def changed(self, change: Departed | Joined) -> None:
        """The scheduler says that a member is gone, or that a worker has joined."""
        if isinstance(change, Joined):
            self._life_over(change.rank, change.incarnation - 1)
            return
        if change.role != "worker":
            return
        returns = change.reason and change.on_loss == "wait"
        if not (change.stays or returns):  # else it may go on reading
            self._life_over(change.rank, change.incarnation)
        if self.is_replica or self._closed:
            return  # its primary's log will tell, or who takes over is told
        if change.reason:
            now = self._reactor.now()
            actions = self.serving.lost(change.rank, change.reason, change.on_loss, change.incarnation, now)
        else:
            actions = self.serving.leaves(change.rank, change.incarnation)
        self._conclude(NOBODY, NOBODY, change, actions)
        self._replies.flush()

    def _life_over(self, rank: int, incarnation: int) -> None:
        """That life of a worker reads nothing any more."""
        self._answers.take_all_back(rank, incarnation)
        self._neighbourhood.forget(rank)

    # --- replication --------------------------------------------------------------------------

    @property
    def is_replica(self) -> bool:
        return self._replica is not None

    @property
    def replicated_in(self) -> int:
        """In which epoch the next server was appointed; 0: there is none."""
        return 0 if self._stream is None else self._stream.log.epoch

    def take_over(self, epoch: int) -> None:
        """The replica becomes primary; it answers from :meth:`go_on` on."""
        assert self._replica is not None
        self._number, self._replica = self._replica.taken, None
        self.epoch = epoch
        self._closed = True
        if self._stream is not None:
            self._stream.log.lead(self.serving)

    def step_down(self, serving: Serving, epoch: int) -> None:
        """The primary, which has handed over, becomes a replica. ``serving``: a new core."""
        forget_uncommitted(self.serving, serving)
        self._replica = Replica(epoch, self._last)
        self.serving = self._work.serving = self._answers.serving = serving
        self.epoch = epoch
        self._closed = False

    def follow(self, epoch: int) -> None:
        """The replica gets the log from another server from here on, and goes on from what it has."""
        assert self._replica is not None
        self._replica.go_on(epoch)
        self.epoch = epoch

    @property
    def _last(self) -> int:
        """The number of the last entry."""
        if self._stream is not None:
            return self._stream.log.number
        return self._number if self._replica is None else self._replica.taken

    def _take_early(self) -> None:
        for peer, frames in self._early.take():
            self._receive(peer, frames)

    def replicate(self, epoch: int, address: str, on_in_step: Callable[[], None], *, new: bool) -> None:
        """From here on this server is next. ``new``: it has nothing; else it was in step."""
        if self._stream is not None and not new:
            self._stream.go_on(epoch, address)
            return
        self.stop_replicating()
        began = Log(epoch, self._last)
        if not self.is_replica:
            began.lead(self.serving)
        steps: Steps = []
        if new:
            steps = began.begin(self.serving)
        else:
            began.go_on(epoch)
        self._stream = Stream(
            self._network, self._reactor, began, address, lambda: self._session.sender, self._news, on_in_step,
            self._refused,
        )  # fmt: skip
        self._log(self._stream, steps)
        self._replies.flush()

    def _news(self) -> None:
        """The next server has taken something, or there is none any more."""
        if self._replica is not None and self._before:
            self._replies.put(self._before, Taken(self._held, self._replica.epoch))
        self._replies.flush()

    @property
    def _held(self) -> int:
        """The last entry that this replica has, and all behind it."""
        assert self._replica is not None
        taken = self._replica.taken
        return taken if self._stream is None else self._stream.log.held(taken)

    def _refused(self, error: KVStoreError) -> None:
        """Another server is primary already; when it has been handed over to, that is as it should be."""
        if not (self._closed or self.is_replica):  # a replica that is none any more hears of it from the scheduler
            self._on_refused(error)

    def stop_replicating(self) -> None:
        """From here on no other server is next."""
        if self._stream is not None:
            self._number = self._last
            stream, self._stream = self._stream, None
            stream.close()
            stream.tell()
            self._news()

    def hand_over(self, done: Callable[[], None]) -> None:
        """Take in nothing more, and call ``done`` when the replicas have everything."""
        self._closed = True

        def look() -> None:
            if self._closed and self._stream is not None:
                if self._stream.log.over:
                    done()
                else:
                    self._reactor.call_later(LOOK_S, look)

        look()

    def go_on(self, gone: Iterable[Departed]) -> None:
        """It has been taken over, or is not handed over after all.

        Args:
            gone: the workers that are, of whom nobody may have told it.
        """
        if self._closed:
            self._closed = False
            for one in gone:
                self.changed(one)
            self._take_early()

    def tick(self, now: float) -> None:
        """Now and then."""
        if self._stream is not None:
            self._stream.tick(now)
        if self._served and not (self.is_replica or self._closed):
            self._conclude(NOBODY, NOBODY, EndCut(0, 0), self.serving.expire_cuts(now))
            self._copies.tick(now)
            self._replies.flush()
            self._replies.drop_stalled(now, self.report()["bytes"])

    def close(self) -> None:
        """This process does not have the shard any more."""
        self._closed = True
        if self._stream is not None:
            self._stream.close()  # and nothing is told that waits for others
        self._endpoint.close()

    def _take_entry(self, peer: bytes, entry: Entry, payload: Frames) -> None:
        if self._replica is None:
            refuse(entry.epoch, self.epoch)
            return
        for due, frames in self._replica.take(entry, payload):
            if self._stream is not None:
                self._stream.log.relay(due, frames)
                frames = [bytearray(frame) for frame in frames]  # they will be changed, perhaps before they are sent
            arrays = checked(self.serving, self._neighbourhood, NOBODY, due.message, frames)
            for action in follow(self.serving, due, arrays, self._reactor.now()):
                self._perform(action)
        self._before = peer

    def report(self) -> dict[str, int]:
        """How many keys it has, and their bytes."""
        keys = {key for key, _ in self.serving.pieces if not isinstance(key, bytes)}
        counted = [self._work.stored[piece] for piece, _ in self.serving.counted()]
        return {"keys": len(keys), "bytes": sum(stored.value.nbytes for stored in counted)}

    def _receive(self, peer: bytes, frames: Frames) -> None:
        if self._closed:
            return  # who has sent it will send it to the next primary
        if not self._served:
            self._early.keep(peer, frames)
            return
        try:
            sender, messages = decode(frames[0], len(frames) - 1)
            if sender.cluster != self._session.sender.cluster:
                raise DisagreementError("the sender belongs to another cluster than this server")
        except KVStoreError as error:
            self._replies.put(peer, Failed(0, *to_wire(error)))
            self._replies.flush()
            return
        if messages and isinstance(messages[0][0], Entry):
            self._receive_log(peer, messages, frames)
            return
        if self._replica is not None and messages and not isinstance(messages[0][0], ReadStatus):
            self._early.keep(peer, frames)
            return
        refusal = self.serving.refuses(sender.rank, sender.incarnation)
        if refusal is None:
            self._replies.heard(sender.rank, peer)
        if len(messages) == 1:
            self._work.alone = isinstance(messages[0][0], Push | Fetch) and not self.serving.cutting.open
            try:
                self._handle_each(peer, sender, refusal, messages, frames)
            finally:
                self._work.alone = False
        else:
            with self._engine.bulk():  # the threads that are woken for ops would want the GIL at once
                self._handle_each(peer, sender, refusal, messages, frames)
        self._replies.flush()

    def _handle_each(
        self,
        peer: bytes,
        sender: Sender,
        refusal: KVStoreError | None,
        messages: Sequence[tuple[Message, int]],
        frames: Frames,
    ) -> None:
        for message, payload in paired(messages, frames):
            if not isinstance(message, Push | Fetch) and self._handle_reader(peer, message):
                continue
            if refusal is not None:
                self._replies.put(peer, Failed(message.request_id, *to_wire(refusal)))
            else:
                self._handle(peer, sender, message, payload)

    def _receive_log(self, peer: bytes, messages: Sequence[tuple[Message, int]], frames: Frames) -> None:
        try:
            for message, payload in paired(messages, frames):
                if isinstance(message, Entry):
                    self._take_entry(peer, message, payload)
        except KVStoreError as error:
            self._replies.put(peer, Failed(0, *to_wire(error)))
        self._news()

    def _handle(self, peer: bytes, sender: Sender, message: Message, payload: Frames) -> None:
        if isinstance(message, Meet):
            met = self._neighbourhood.reaches(sender.rank, message.probe)
            probe, line = (self._neighbourhood.probe(), self._endpoint.offer(peer)) if met else (None, "")
            self._replies.put(peer, Met(message.request_id, probe, line))
            return
        try:
            arrays = checked(self.serving, self._neighbourhood, sender.rank, message, payload)
        except KVStoreError as error:
            self._replies.put(peer, Failed(message.request_id, *to_wire(error)))
            return
        priority = 0
        if isinstance(message, Push | Fetch):
            priority = message.priority
            self._answers.take_back(sender, message)
        now = self._reactor.now()
        actions = self.serving.handle(sender.rank, sender.incarnation, message, arrays, now)
        self._conclude(sender.rank, sender.incarnation, message, actions, priority)

    def _handle_reader(self, peer: bytes, message: Message) -> bool:
        """Somebody, who need not be a worker, asks about the server or makes a checkpoint; False: it is not so."""
        now = self._reactor.now()
        actions: list[Action] = []
        match message:
            case ReadStatus():
                self._replies.put(peer, Status(message.request_id, self.report()))
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
                self._replies.put(peer, Explanation(message.request_id, why))
            case _:
                return False
        self._conclude(NOBODY, NOBODY, message, actions)
        return True

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
                self._work.copy(action.piece, action.span, mark)

    def _perform(self, action: Action, priority: int = 0, mark: Mark | None = None) -> None:
        """``mark``: what is to have the action's payload, or what a reply has to wait for."""
        match action:
            case Reply(rank, message):
                self._replies.reply(rank, message, mark=mark)
            case ReplyValue():
                self._answers.value(action, priority, mark)
            case ReplyAfter():
                self._answers.message(action, priority, mark)
            case Apply():
                self._work.apply(action, priority, mark)
            case Create():
                self._work.create(action, mark)
            case SendState():
                self._answers.state(action, mark)
            case StoreState():
                self._work.store_state(action, mark)
                self._answers.stored(action, mark)
            case Forget(piece):
                self._work.forget(piece)
                self._answers.forget(piece)
            case TakeCut():
                self._copies.take(action, self._work.stored)
            case LoseCut(cut, error):
                self._copies.lose(cut, error)
            case Unite(bundle):
                self._work.unite(bundle)
            case Split(bundle):
                self._work.split(bundle)

    def _answer(self, peer: bytes, message: Message, frames: Sequence[Any]) -> None:
        """To a connection that need not be a worker's."""
        self._replies.put(peer, message, frames)
        self._replies.flush_soon()

    def _flush_log(self) -> None:
        if self._stream is not None:
            self._stream.flush()
