"""A server's conclusions: what each message means for the pieces it owns. Pure.

What this file decides: whether a message is new, a repeat or refused; what is answered at once;
who is told when a round has taken effect. Rounds are counted by :mod:`kvstore.consistency` and
nowhere else. A push is known by (rank, key, round, piece); all that is kept to tell a repeat is one
integer per (rank, piece), the last accepted round. Which keys are counted together is decided in
:mod:`kvstore.protocol.binding`, which optimizer is in effect in
:mod:`kvstore.protocol.settings`, and which workers there are in :mod:`kvstore.protocol.workers`.

What it refuses to know: arrays (a payload is an opaque object that it hands on), sockets, the
clock (``now`` is an argument). The caller performs the returned actions
(:mod:`kvstore.protocol.actions`) in their order; because
``Apply`` comes before the replies it makes possible, and the engine keeps that order per piece,
a reply can never run ahead of its update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from kvstore import consistency
from kvstore.consistency import Answer, Level, Pull, Update
from kvstore.errors import (
    CheckpointError,
    DisagreementError,
    FencedError,
    KVStoreError,
    LimitError,
    ProtocolError,
    UnknownKeyError,
    WorkerLostError,
    to_wire,
)
from kvstore.protocol.actions import (
    Action,
    Apply,
    Create,
    Forget,
    LoseCut,
    Reply,
    ReplyAfter,
    ReplyValue,
    Restored,
    SendState,
    StoreState,
    TakeCut,
    failure,
)
from kvstore.protocol.binding import Binding
from kvstore.protocol.counted import Piece, Ticket, check_room, ticket_of
from kvstore.protocol.cutting import Cutting, Held
from kvstore.protocol.messages import (
    Accepted,
    Admit,
    Bind,
    Committed,
    Divided,
    Done,
    Drop,
    Explain,
    Explanation,
    Failed,
    Fetch,
    Freeze,
    Frozen,
    Init,
    Initialized,
    Leave,
    Mark,
    Message,
    Missing,
    PieceRecord,
    Push,
    ReadState,
    Restore,
    SetHyperparameters,
    SetOptimizer,
    Spec,
    WriteState,
)
from kvstore.protocol.pieces import BundleId, Key, PieceId, Span
from kvstore.protocol.sampling import check_model, factor
from kvstore.protocol.settings import Rule, Settings
from kvstore.protocol.workers import Waiting, Workers

RANKS_MAX = 1 << 16
AHEAD_MAX = 8  # rounds of one worker and piece that are not merged yet
PIECES_MAX = 1 << 20  # per server
PARKED_MAX = 1 << 17  # pulls of one worker that wait; half of it when they are counted exactly


class Serving:
    """The pure core of one server.

    Args:
        num_workers: ranks 0 .. num_workers-1 take part in keys that do not choose, before others join.
        parse_optimizer: from its description on the wire to a rule; raises OptimizerError.
        name: how this server calls itself in messages.
        restored: what a checkpoint has of a new piece, in place of the value that rank 0 sends.
    """

    def __init__(
        self,
        num_workers: int,
        parse_optimizer: Callable[[dict[str, Any]], Rule],
        name: str = "server",
        restored: Callable[[PieceId, Spec], Restored | None] = lambda piece_id, spec: None,
    ) -> None:
        self.name = name
        self.workers = Workers(num_workers)
        self.pieces: dict[PieceId, Piece] = {}
        self.settings = Settings()
        self.binding = Binding(self.pieces, self.settings, name)
        self.cutting = Cutting()
        self.parse_optimizer = parse_optimizer
        self._parked: dict[int, int] = {}  # pulls of a worker that had to wait, since they were last counted
        self._early: dict[PieceId, dict[int, Init]] = {}  # init of others before the first worker's
        self._now = 0.0
        self._restored = restored
        self._handlers: dict[type[Message], Callable[[int, Any, object], list[Action]]] = {
            Init: self._init,
            Bind: self._bind,
            Push: self._push,
            Fetch: self._fetch,
            SetOptimizer: self._set_optimizer,
            SetHyperparameters: self._set_hyperparameters,
            Drop: self._drop,
            ReadState: self._read_state,
            WriteState: self._write_state,
            Restore: self._restore,
            Mark: self._mark,
            Leave: self._leave,
            Freeze: self._freeze,
            Admit: self._admit,
        }

    def __repr__(self) -> str:
        return f"<Serving {self.name}: {len(self.pieces)} pieces, {self.workers!r}>"

    def handle(self, rank: int, incarnation: int, message: Message, payload: object, now: float) -> list[Action]:
        """One message of a worker; ``payload`` is None when it came without a frame."""
        self._now = now
        try:
            refusal = self.refuses(rank, incarnation)
            if refusal is None and rank not in self.workers.known and not isinstance(message, Freeze | Admit):
                refusal = ProtocolError(f"{self.name}: expected a worker of this cluster, the sender is {rank}")
            if refusal is not None:
                raise refusal
            if self.workers.hear(rank, incarnation, now):
                self._forget_requests(rank)
            if isinstance(message, Explain):
                return [Reply(rank, Explanation(message.request_id, self._explain(rank, message.about, now)))]
        except KVStoreError as error:
            return [failure(rank, message, error)]
        if isinstance(message, Push) and self._held_back(rank, message, payload):
            return [Reply(rank, Accepted(message.request_id))] if message.acknowledge else []
        actions = self._conclude(rank, incarnation, message, payload)
        return actions + self._take_cuts(now) if self.cutting.open else actions

    def _conclude(self, rank: int, incarnation: int, message: Message, payload: object) -> list[Action]:
        try:
            handler = self._handlers.get(type(message))
            if handler is None:
                raise ProtocolError(f"a server does not take {type(message).__name__} from rank {rank}")
            if self.workers.joining and isinstance(message, Push | Init) and self._begins_something(message):
                self.workers.hold(self._waiting(rank, incarnation, message, payload))
                return []
            actions = handler(rank, message, payload)
        except KVStoreError as error:
            actions = [failure(rank, message, error)]
        return [*self.binding.take_moved(), *actions] if self.binding.moved else actions

    def refuses(self, rank: int, incarnation: int) -> KVStoreError | None:
        """Why nothing is taken from this sender; None: it may be a worker, in its latest life."""
        if not 0 <= rank < RANKS_MAX:
            return ProtocolError(f"{self.name}: expected a worker's rank below {RANKS_MAX}, the sender's is {rank}")
        if self.workers.is_over(rank, incarnation):
            return FencedError(f"rank {rank}: this worker was taken for lost, or a newer one took over its rank")
        return None

    def lost(
        self, rank: int, reason: str, on_loss: str = "fail", incarnation: int | None = None, now: float = 0.0
    ) -> list[Action]:
        """That life of the worker is over; ``on_loss`` says what becomes of those who wait for its pushes.

        ``fail``: they fail, and whoever would wait for it will. ``wait``: they wait for its return. ``continue``: it
        counts up to its last accepted push, as one who leaves.
        """
        self._now = now
        workers = self.workers
        if incarnation is None:
            incarnation = workers.incarnations.get(rank, 1)
        if workers.is_over(rank, incarnation):
            return []
        self._forget_requests(rank)
        workers.give_up(rank)
        self.cutting.excuse(rank)
        if on_loss == "wait":
            workers.miss(rank, reason, hopeless=False)
            return self._resume() + self._take_cuts(now)
        workers.fence(rank, incarnation)
        if on_loss == "continue":
            return self._go_on_without(rank) + self._resume() + self._take_cuts(now)
        workers.miss(rank, reason, hopeless=True)
        actions: list[Action] = []
        for piece_id, piece in self.counted():
            actions += self._fail_hopeless(piece_id, piece)
        return actions + self._settle_early() + self._resume() + self._take_cuts(now)

    def leaves(self, rank: int, incarnation: int) -> list[Action]:
        """That life of the worker has left in order, as it has said here, too, unless it died just then."""
        if self.workers.is_over(rank, incarnation):
            return []
        return self._go_on_without(rank)

    def counted(self) -> Iterator[tuple[PieceId, Piece]]:
        """The pieces that are counted by themselves: all but the members of united bundles."""
        return ((piece_id, piece) for piece_id, piece in self.pieces.items() if piece_id not in self.binding.united)

    def spec_of(self, key: Key | BundleId, number: int) -> Spec | None:
        """What a push of this piece or bundle must fit; None: there is none such."""
        if isinstance(key, bytes):
            bundle = self.binding.bundles.get(key)
            return None if bundle is None or number else bundle.spec
        piece = self.pieces.get((key, number))
        return None if piece is None else piece.spec

    # --- keys ---------------------------------------------------------------------------------

    def _init(self, rank: int, message: Init, payload: object) -> list[Action]:
        piece_id = (message.key, message.piece)
        piece = self.pieces.get(piece_id)
        if piece is not None:
            return [self._agree(rank, message, piece)]
        first = self.workers.first
        if rank != first:
            if first is None:
                raise DisagreementError(
                    f"init of key {message.key!r}: expected a worker that takes part, all have left"
                )
            if first in self.workers.hopeless:
                raise self._lost_error(piece_id, 0, [first])
            if piece_id not in self._early:
                check_room(self.name, "inits that wait for the first worker's", len(self._early), PIECES_MAX)
            self._early.setdefault(piece_id, {})[rank] = message
            return []
        if payload is None:
            return [Reply(rank, Missing(message.request_id))]
        check_room(self.name, "pieces", len(self.pieces), PIECES_MAX)
        members = consistency.participants_of(message.spec.participants, self.workers.members)
        if not members or not self.workers.known.issuperset(members):
            raise DisagreementError(
                f"key {message.key!r}: expected participants among workers {sorted(self.workers.known)}, "
                f"got {list(members)}"
            )
        model = consistency.parse(message.spec.cluster_model)
        check_model(message.spec.samples_per_round, model, f"key {message.key!r}, cluster level")
        piece = Piece(message.spec, Level(model, members), dict.fromkeys(members, 0))
        restored = self._restored(piece_id, message.spec)
        if restored is not None:
            self._count_restored(piece, restored)
        self.pieces[piece_id] = piece
        for member in members:
            if member not in self.workers.members:
                piece.level.leave(member)
        actions: list[Action] = [
            Create(piece_id, message.spec, payload, restored),
            Reply(rank, Initialized(message.request_id, 0)),
        ]
        for other, init in self._early.pop(piece_id, {}).items():
            actions.append(self._agree(other, init, piece))
        return actions

    def _settle_early(self) -> list[Action]:
        """What becomes of the inits that wait for the first worker's, when that is lost or has left."""
        first = self.workers.first
        if first is not None and first not in self.workers.hopeless:  # it may have come without its value
            early = [inits.pop(first) for inits in self._early.values() if first in inits]
            return [Reply(first, Missing(init.request_id)) for init in early]
        failed: list[Action] = []
        for piece_id, inits in self._early.items():
            for rank, init in inits.items():
                failed.append(failure(rank, init, self._lost_error(piece_id, 0, [] if first is None else [first])))
        self._early.clear()
        return failed

    def _agree(self, rank: int, message: Init, piece: Piece) -> Action:
        if message.spec == piece.spec:
            # What took effect: a takeover may lose what is only accepted, and then it takes a push again.
            return Reply(rank, Initialized(message.request_id, piece.level.effective(rank)))
        return failure(
            rank,
            message,
            DisagreementError(
                f"key {message.key!r}: worker {rank} and the servers disagree\n"
                f"  on the servers: {piece.spec}\n  worker {rank}: {message.spec}"
            ),
        )

    def _bind(self, rank: int, message: Bind, payload: object) -> list[Action]:
        self.binding.bind(message)
        return [Reply(rank, Done(message.request_id))]

    def _drop(self, rank: int, message: Drop, payload: object) -> list[Action]:
        mine = [piece_id for piece_id in self.pieces if piece_id[0] == message.key]
        actions = self.binding.drop(mine)
        for piece_id in mine:
            del self.pieces[piece_id]
        return [*actions, *(Forget(piece_id) for piece_id in mine), Reply(rank, Done(message.request_id))]

    def _find(self, key: Key | BundleId, number: int) -> tuple[PieceId, Piece]:
        try:
            return (key, number), self.pieces[key, number]
        except KeyError:
            what = "a bundle" if isinstance(key, bytes) else f"key {key!r}"
            raise UnknownKeyError(f"{what}: expected an initialised key, {self.name} has none such") from None

    # --- push and pull ------------------------------------------------------------------------

    def _push(self, rank: int, message: Push, payload: object) -> list[Action]:
        if isinstance(message.key, bytes):
            bundle = self.binding.find(message.key, message.piece)
            if not bundle.united and (payload is None or not self.binding.pushed(bundle, rank, message.round)):
                accepted = [self.pieces[piece_id].accepted.get(rank, 0) for piece_id in bundle.members]
                return [Reply(rank, Divided(message.request_id, message.round <= min(accepted)))]
        piece_id, piece = self._find(message.key, message.piece)
        if rank not in piece.level.rounds:
            raise DisagreementError(
                f"push of {self.binding.called(piece_id)} by worker {rank}: expected a participant, "
                f"one of {list(piece.level.participants)}"
            )
        last = piece.accepted.get(rank, 0)
        if message.round > last + 1:
            return []  # a gap: the missing one will be sent again, and then this one
        actions: list[Action] = []
        if message.round == last + 1:
            if payload is None:
                return [Reply(rank, Missing(message.request_id))]
            if not piece.level.is_here(rank):
                raise DisagreementError(f"push of {self.binding.called(piece_id)} by worker {rank}: it has left")
            self._check_ahead(rank, message.round, piece_id, piece)
            per_round = piece.spec.samples_per_round
            if (message.samples is None) is not (per_round is None):
                raise DisagreementError(
                    f"push of {self.binding.called(piece_id)} by worker {rank}: its rounds are of {per_round} samples, "
                    f"the push says that it holds {message.samples}"
                )
            self.binding.part(piece_id)
            piece.accepted[rank] = message.round
            piece.held[rank, message.round] = payload
            if message.samples is not None:
                piece.samples[rank, message.round] = message.samples
            if not message.pull:
                piece.commits[rank, message.round] = message.request_id
            actions += self._perform(piece_id, piece, *piece.level.push(rank))
        elif not message.pull:
            if not piece.level.in_effect(rank, message.round):
                self.binding.part(piece_id)
            piece.commits[rank, message.round] = message.request_id
            actions += self._commits_due(piece_id, piece, [(rank, message.round)])
        if message.pull:
            answered = self._pull(rank, message, piece_id, piece, whole=message.whole)
            if not answered and piece.level.in_effect(rank, message.round):
                answered.append(ReplyAfter(rank, Committed(message.request_id), self.binding.place_of(piece_id)[0]))
            actions += answered
        if message.acknowledge and not piece.level.in_effect(rank, message.round):
            actions.append(Reply(rank, Accepted(message.request_id)))
        return actions + self._fail_hopeless(piece_id, piece)

    def _check_ahead(self, rank: int, round: int, piece_id: PieceId, piece: Piece) -> None:
        """A worker sends a round when its last one is over, so hardly any payloads of one have to be kept."""
        if len(piece.held) < AHEAD_MAX or sum(one == rank for one, _ in piece.held) < AHEAD_MAX:
            return
        missing = self.workers.hopeless.intersection(piece.level.behind(round))
        if missing:
            raise self._lost_error(piece_id, round, sorted(missing))
        raise LimitError(
            f"push of {self.binding.called(piece_id)} by worker {rank}: expected at most {AHEAD_MAX} rounds that are "
            f"not merged yet, round {round} is one more"
        )

    def _fetch(self, rank: int, message: Fetch, payload: object) -> list[Action]:
        if isinstance(message.key, bytes) and not self.binding.find(message.key, message.piece).united:
            return [Reply(rank, Divided(message.request_id, False))]
        piece_id, piece = self._find(message.key, message.piece)
        actions = self._pull(rank, message, piece_id, piece)
        return actions + self._fail_hopeless(piece_id, piece)

    def _pull(
        self, rank: int, message: Push | Fetch, piece_id: PieceId, piece: Piece, *, whole: bool = False
    ) -> list[Action]:
        ticket = Ticket(rank, message.request_id, message.near, piece_id, whole)
        answer = piece.level.pull(Pull(ticket, ((rank, message.round),)))
        return self._parked_now(piece, ticket) if answer is None else [self._value(answer)]

    def _parked_now(self, piece: Piece, ticket: Ticket) -> list[Action]:
        """A pull waits, unless its worker has too many that do.

        They are counted only when there have been many, for most are answered soon.
        """
        parked = self._parked[ticket.rank] = self._parked.get(ticket.rank, 0) + 1
        if parked > PARKED_MAX:
            waiting = (ticket_of(one) for _, other in self.counted() for one in other.level.waiting)
            parked = self._parked[ticket.rank] = sum(one.rank == ticket.rank for one in waiting)
            if parked > PARKED_MAX // 2:
                del piece.level.waiting[ticket]
                error = LimitError(f"worker {ticket.rank}: expected at most {PARKED_MAX // 2} pulls that wait")
                return [Reply(ticket.rank, Failed(ticket.request_id, *to_wire(error)))]
        return []

    def _value(self, answer: Answer) -> ReplyValue:
        ticket = ticket_of(answer.ticket)
        piece, span = self.binding.place_of(ticket.piece)
        near = ticket.near and span is None
        return ReplyValue(
            ticket.rank, ticket.request_id, piece, answer.version, answer.staleness, near, span, ticket.whole
        )

    def _perform(self, piece_id: PieceId, piece: Piece, updates: list[Update], answers: list[Answer]) -> list[Action]:
        actions: list[Action] = []
        for update in updates:
            payloads = tuple([piece.held.pop(contribution) for contribution in update.contributions])
            samples = None
            if piece.spec.samples_per_round is not None:
                samples = sum([piece.samples.pop(contribution) for contribution in update.contributions])
            actions.append(self.apply(piece_id, piece, update, payloads, samples))
            if piece.commits:
                actions += self._commits_due(piece_id, piece, update.contributions)
        actions += [self._value(answer) for answer in answers]
        return actions

    def apply(
        self, piece_id: PieceId, piece: Piece, update: Update, payloads: tuple[object, ...], samples: int | None
    ) -> Apply:
        """An update takes effect: by which rule, and multiplied by what. Of no samples it changes nothing."""
        rule, generation = self.settings.at(self.binding.key_of(piece_id), update.round)
        multiplied = 1.0
        if samples == 0:
            payloads = ()
        elif samples is not None and piece.spec.samples_per_round is not None:
            multiplied = factor(piece.spec.samples_per_round, samples)
        if rule is not None and payloads:
            piece.count_update(generation)
        return Apply(piece_id, update.round, payloads, rule, generation, update.contributions, samples, multiplied)

    def _commits_due(
        self, piece_id: PieceId, piece: Piece, pushes: tuple[tuple[int, int], ...] | list[tuple[int, int]]
    ) -> list[Action]:
        return [
            ReplyAfter(rank, Committed(piece.commits.pop((rank, round))), self.binding.place_of(piece_id)[0])
            for rank, round in pushes
            if (rank, round) in piece.commits and piece.level.in_effect(rank, round)
        ]

    # --- optimizer ----------------------------------------------------------------------------

    def _set_optimizer(self, rank: int, message: SetOptimizer, payload: object) -> list[Action]:
        rule = self.parse_optimizer(message.optimizer)
        self.settings.set(rule, message.since, replace=message.replace, by=rank)
        return self._settings_changed(rank, message)

    def _set_hyperparameters(self, rank: int, message: SetHyperparameters, payload: object) -> list[Action]:
        self.settings.change(message.changes, message.since)
        return self._settings_changed(rank, message)

    def _settings_changed(self, rank: int, message: Message) -> list[Action]:
        self.binding.settings_changed()
        self.settings.forget(
            (key, piece.level.slowest()) for (key, _), piece in self.pieces.items() if not isinstance(key, bytes)
        )
        return [Reply(rank, Done(message.request_id))]

    def _read_state(self, rank: int, message: ReadState, payload: object) -> list[Action]:
        piece_id, _ = self._find(message.key, message.piece)
        return [SendState(rank, message.request_id, *self.binding.place_of(piece_id))]

    def _write_state(self, rank: int, message: WriteState, payload: object) -> list[Action]:
        piece_id, piece = self._find(message.key, message.piece)
        self.binding.part(piece_id)
        piece.generation = self.settings.generation
        piece.steps, piece.written = message.step, (message.names, message.dtypes)
        return [StoreState(rank, message, payload, piece.generation)]

    def _restore(self, rank: int, message: Restore, payload: object) -> list[Action]:
        piece_id, piece = self._find(message.key, message.piece)
        self.binding.part(piece_id)
        self._count_restored(piece, message)
        return [StoreState(rank, message, payload, piece.generation)]

    def _count_restored(self, piece: Piece, restored: Restored) -> None:
        """The piece has seen what it had in a checkpoint. Without an update so far it has no state, of no optimizer."""
        updated = bool(restored.step or restored.names)
        piece.level.version, piece.steps = restored.version, restored.step
        piece.generation = self.settings.generation if updated else 0
        piece.written = (restored.names, restored.dtypes) if updated else None

    # --- cuts ---------------------------------------------------------------------------------

    def open_cut(self, cut: int, awaited: tuple[int, ...], now: float) -> list[Action]:
        """Somebody asks for the cut with this number, of these workers."""
        self.cutting.begin(cut, awaited, self.workers.members - set(self.workers.missed), now)
        return self._take_cuts(now)

    def end_cut(self, cut: int, now: float) -> list[Action]:
        """The cut is not wanted any more: what was held back for it goes on."""
        self.cutting.end(cut)
        return self._take_cuts(now)

    def expire_cuts(self, now: float) -> list[Action]:
        """Called now and then: no marker is awaited for ever."""
        actions: list[Action] = []
        for cut in self.cutting.expire(now):
            actions.append(LoseCut(cut.number, CheckpointError(self.explain_cut(cut.number, cut.missing, now))))
        return [*actions, *self._take_cuts(now)] if actions else []

    def explain_cut(self, cut: int, missing: list[int] | None, now: float) -> str:
        """What the cut waits for."""
        if missing is None:
            missing = self.cutting.open[cut].missing if cut in self.cutting.open else []
        if missing:
            return f"a cut on {self.name}: {self.workers.missing(missing, now)}, who have not reached their cut point"
        return f"a cut on {self.name}: pushes that belong to it have not come, or wait for others"

    def _mark(self, rank: int, message: Mark, payload: object) -> list[Action]:
        here = self.workers.members - set(self.workers.missed)
        cut = self.cutting.begin(message.cut, message.awaited, here, self._now)
        if cut is not None:
            self.cutting.mark(cut, rank, message.rounds, self.pieces, self._now)
        return [Reply(rank, Done(message.request_id))]

    def _held_back(self, rank: int, message: Push, payload: object) -> bool:
        """Does the push have to wait until a cut before it has been taken?"""
        if not self.cutting.open:
            return False
        key = message.key
        if isinstance(key, bytes):
            if key not in self.binding.bundles:
                return False
            key = self.binding.bundles[key].keys[0]
        piece = self.pieces.get((key, message.piece))
        in_step = piece is not None and piece.level.model.updates_per_round(2) == 1
        return self.cutting.hold_back(Held(rank, self.workers.incarnations[rank], message, payload, key, in_step))

    def _take_cuts(self, now: float) -> list[Action]:
        """Take the cuts that are due, then let the pushes go on that waited for them."""
        actions: list[Action] = []
        for cut in self.cutting.due(self.pieces):
            if cut.failure is not None:
                actions.append(LoseCut(cut.number, cut.failure))
                continue
            places: dict[PieceId, list[tuple[PieceRecord, Span | None]]] = {}
            for key, number in cut.keys or ():
                piece = self.pieces.get((key, number))
                if piece is not None:
                    place, span = self.binding.place_of((key, number))
                    level, steps = piece.level, self.pieces[place].steps
                    record = PieceRecord(key, number, piece.spec, level.version, steps, dict(level.rounds))
                    places.setdefault(place, []).append((record, span))
            many = tuple((place, tuple(parts)) for place, parts in places.items())
            actions.append(TakeCut(cut.number, self.settings.latest, many))
        for held in self.cutting.released():
            if held.incarnation == self.workers.incarnations[held.rank]:
                actions += self._conclude(held.rank, held.incarnation, held.message, held.payload)
        if actions and self.cutting.open:
            actions += self._take_cuts(now)
        return actions

    # --- members ------------------------------------------------------------------------------

    def _leave(self, rank: int, message: Leave, payload: object) -> list[Action]:
        reply: Action = Reply(rank, Done(message.request_id))
        if message.reason:  # what follows from this the scheduler will say
            return [reply]
        return [reply, *self._go_on_without(rank)]

    def _go_on_without(self, rank: int) -> list[Action]:
        """The worker counts up to its last accepted push, and is no member of keys to come."""
        self.workers.leaves(rank)
        actions: list[Action] = []
        for piece_id, piece in self.counted():
            actions += self._perform(piece_id, piece, *piece.level.leave(rank))
        self.cutting.excuse(rank)
        return actions + self._settle_early()

    def _freeze(self, rank: int, message: Freeze, payload: object) -> list[Action]:
        incarnation = self.workers.incarnations[rank]
        ended: list[Action] = []
        if not self.workers.is_admitted(rank, incarnation):  # else this comes late
            ended = self._go_on_without(rank)  # an earlier life, of whose end this server may not have heard
            self.workers.begin_to_join(rank)
        rounds: dict[Key, int] = {}
        for (key, _), piece in self.pieces.items():
            if not isinstance(key, bytes):
                rounds[key] = max(rounds.get(key, 0), piece.level.begun)
        return [*ended, Reply(rank, Frozen(message.request_id, rounds))]

    def _begins_something(self, message: Push | Init) -> bool:
        """Is it a push of a round that nobody has pushed here, or the creation of a key?"""
        if isinstance(message, Init):
            return (message.key, message.piece) not in self.pieces
        key = message.key
        bundle = self.binding.bundles.get(key) if isinstance(key, bytes) else None
        pieces = [(key, message.piece)] if bundle is None else bundle.members
        begun = [self.pieces[one].level.begun for one in pieces if one in self.pieces]
        return bool(begun) and message.round > max(begun)  # of an unknown key it is refused now

    def _waiting(self, rank: int, incarnation: int, message: Push | Init, payload: object) -> Waiting:
        """It is held up. A first value will be asked for when it is its turn: nobody says how large it may be."""
        if isinstance(message, Init):
            return Waiting(rank, incarnation, message, None, 0)
        spec = self.spec_of(message.key, message.piece)
        here = payload is not None and message.place is None and spec is not None
        return Waiting(rank, incarnation, message, payload, spec.cut.size(message.piece) if here and spec else 0)

    def _admit(self, rank: int, message: Admit, payload: object) -> list[Action]:
        incarnation = self.workers.incarnations[rank]
        done: Action = Reply(rank, Done(message.request_id))
        if self.workers.is_admitted(rank, incarnation):
            return [done]
        joins: list[tuple[Piece, int]] = []
        for (key, number), piece in self.counted():
            name = self.binding.key_of((key, number))
            chosen = piece.spec.participants
            if chosen is None or rank in chosen:
                round = message.rounds.get(name, -1)
                if round < piece.level.begun or piece.level.is_here(rank):
                    raise ProtocolError(f"admit: key {name!r} has begun round {piece.level.begun}, got {round}")
                joins.append((piece, round))
        for piece, round in joins:
            piece.level.join(rank, round + 1)
            piece.accepted[rank] = round
        self.workers.admit(rank, incarnation)
        return [done, *self._resume()]

    def _resume(self) -> list[Action]:
        """If nobody is joining any more, what was held up goes on."""
        return [
            action
            for one in self.workers.resumed()
            for action in self.handle(one.rank, one.incarnation, one.message, one.payload, self._now)
        ]

    def _forget_requests(self, rank: int) -> None:
        """Nobody waits for what the worker asked for until now: it is gone, or has begun a new life."""
        for inits in self._early.values():
            inits.pop(rank, None)
        for _, piece in self.counted():
            for ticket in [ticket for ticket in piece.level.waiting if ticket_of(ticket).rank == rank]:
                del piece.level.waiting[ticket]
            for pushed in [pushed for pushed in piece.commits if pushed[0] == rank]:
                del piece.commits[pushed]

    def _fail_hopeless(self, piece_id: PieceId, piece: Piece) -> list[Action]:
        """Fail the parked requests of the piece that wait for a worker which is lost."""
        lost = self.workers.hopeless
        if not lost:
            return []
        actions: list[Action] = []
        for pull in list(piece.level.waiting.values()):
            missing = lost.intersection(piece.level.blockers(pull))
            if missing:
                del piece.level.waiting[pull.ticket]
                ticket = ticket_of(pull.ticket)
                error = self._lost_error(ticket.piece, pull.needs[0][1], sorted(missing))
                actions.append(Reply(ticket.rank, Failed(ticket.request_id, *to_wire(error))))
        for (rank, round), request_id in list(piece.commits.items()):
            missing = lost.intersection(piece.level.behind(round))
            if missing and not piece.level.in_effect(rank, round):
                del piece.commits[rank, round]
                error = self._lost_error(piece_id, round, sorted(missing))
                actions.append(Reply(rank, Failed(request_id, *to_wire(error))))
        return actions

    def _lost_error(self, piece_id: PieceId, round: int, ranks: list[int]) -> WorkerLostError:
        return WorkerLostError(
            f"{self.binding.called(piece_id)}, round {round}: {self.workers.missing(ranks, self._now)}"
        )

    def _explain(self, rank: int, about: int, now: float) -> str:
        for piece_id, piece in self.counted():
            asked = ((pull, ticket_of(ticket)) for ticket, pull in piece.level.waiting.items())
            pull, ticket = next((p for p in asked if (p[1].rank, p[1].request_id) == (rank, about)), (None, None))
            if pull is not None and ticket is not None:
                piece_id, round, missing = ticket.piece, pull.needs[0][1], piece.level.blockers(pull)
            else:
                rounds = [n for (r, n), request in piece.commits.items() if r == rank and request == about]
                if not rounds:
                    continue
                round, missing = rounds[0], piece.level.behind(rounds[0])
            what = f"{self.binding.called(piece_id)}, piece {piece_id[1]} on {self.name}"
            return f"{what}, round {round}: {self.workers.missing(missing, now)}"
        for (key, _), early in self._early.items():
            if rank in early and early[rank].request_id == about:
                first = self.workers.first
                missing = [] if first is None else [first]
                return f"key {key!r}: its init waits for that of worker {first}; {self.workers.missing(missing, now)}"
        return f"{self.name} has no such request waiting"
