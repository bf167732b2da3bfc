"""A server's conclusions: what each message means for the pieces it owns. Pure.

What this file decides: whether a message is new, a repeat or refused; what is answered at once;
who is told when a round has taken effect. Rounds are counted by :mod:`kvstore.consistency` and
nowhere else. A push is known by (rank, key, round, piece); all that is kept to tell a repeat is one
integer per (rank, piece), the last accepted round.

What it refuses to know: arrays (a payload is an opaque object that it hands on), sockets, the
clock (``now`` is an argument). The caller performs the returned actions in their order; because
``Apply`` comes before the replies it makes possible, and the engine keeps that order per piece,
a reply can never run ahead of its update.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

from kvstore import consistency
from kvstore.consistency import Answer, Level, Pull, Update
from kvstore.errors import (
    DisagreementError,
    FencedError,
    KVStoreError,
    OptimizerError,
    ProtocolError,
    UnknownKeyError,
    WorkerLostError,
    to_wire,
)
from kvstore.protocol.messages import (
    Accepted,
    Committed,
    Done,
    Drop,
    Explain,
    Explanation,
    Failed,
    Fetch,
    Init,
    Initialized,
    Leave,
    Message,
    Missing,
    Push,
    ReadState,
    SetHyperparameters,
    SetOptimizer,
    Spec,
    WriteState,
)
from kvstore.protocol.pieces import Key, PieceId


class Rule(Protocol):
    """An optimizer, as far as this file looks into it."""

    def with_hyperparameters(self, **changes: Any) -> Rule: ...


# --- actions --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Create:
    """Store this payload as the first value of the piece."""

    piece: PieceId
    spec: Spec
    payload: object


@dataclass(frozen=True, slots=True)
class Apply:
    """Merge these payloads in this order and apply them to the piece as one update."""

    piece: PieceId
    round: int
    payloads: tuple[object, ...]
    rule: Rule | None  # None: assign
    generation: int  # another generation than before: the optimizer's state begins anew


@dataclass(frozen=True, slots=True)
class Reply:
    """Send this message now."""

    rank: int
    message: Message


@dataclass(frozen=True, slots=True)
class ReplyAfter:
    """Send this message when all earlier actions on the piece are done; or their failure."""

    rank: int
    message: Message
    piece: PieceId


@dataclass(frozen=True, slots=True)
class ReplyValue:
    """Send the piece's value as the earlier actions leave it; or their failure."""

    rank: int
    request_id: int
    piece: PieceId
    version: int
    staleness: int
    near: bool = False  # it may stay where it is: send its place


@dataclass(frozen=True, slots=True)
class SendState:
    """Send the optimizer's state of the piece."""

    rank: int
    request_id: int
    piece: PieceId


@dataclass(frozen=True, slots=True)
class StoreState:
    """Replace the optimizer's state of the piece, then say Done."""

    rank: int
    message: WriteState
    payload: object


@dataclass(frozen=True, slots=True)
class Forget:
    """Free the piece."""

    piece: PieceId


Action = Create | Apply | Reply | ReplyAfter | ReplyValue | SendState | StoreState | Forget


# --- state ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Piece:
    """What the server knows of one piece, its array excepted."""

    spec: Spec
    level: Level
    accepted: dict[int, int] = field(default_factory=dict)  # rank -> last accepted round
    held: dict[tuple[int, int], object] = field(default_factory=dict)  # payloads before their turn
    commits: dict[tuple[int, int], int] = field(default_factory=dict)  # (rank, round) -> request


@dataclass(frozen=True, slots=True)
class Ticket:
    """A pull, as the cluster level is asked it."""

    rank: int
    request_id: int
    near: bool


@dataclass(frozen=True, slots=True)
class Setting:
    """An optimizer, and for each key the round after which it is in effect."""

    since: dict[Key, int]
    rule: Rule
    generation: int


class Serving:
    """The pure core of one server.

    Args:
        num_workers: ranks 0 .. num_workers-1 take part in keys that do not choose.
        parse_optimizer: from its description on the wire to a rule; raises OptimizerError.
        name: how this server calls itself in messages.
    """

    def __init__(
        self, num_workers: int, parse_optimizer: Callable[[dict[str, Any]], Rule], name: str = "server"
    ) -> None:
        self.num_workers = num_workers
        self.name = name
        self.pieces: dict[PieceId, Piece] = {}
        self.incarnations: dict[int, int] = {}
        self.heard: dict[int, float] = {}
        self.gone: dict[int, str] = {}  # rank -> why; "" when it left in order
        self.settings: list[Setting] = []
        self._parse_optimizer = parse_optimizer
        self._early: dict[PieceId, dict[int, Init]] = {}  # init of others before rank 0's
        self._handlers: dict[type[Message], Callable[[int, Any, object], list[Action]]] = {
            Init: self._init,
            Push: self._push,
            Fetch: self._fetch,
            SetOptimizer: self._set_optimizer,
            SetHyperparameters: self._set_hyperparameters,
            Drop: self._drop,
            ReadState: self._read_state,
            WriteState: self._write_state,
            Leave: self._leave,
        }

    def __repr__(self) -> str:
        return f"<Serving {self.name}: {len(self.pieces)} pieces, heard of {sorted(self.heard)}, gone {self.gone}>"

    def handle(self, rank: int, incarnation: int, message: Message, payload: object, now: float) -> list[Action]:
        """One message of a worker; ``payload`` is None when it came without a frame."""
        known = self.incarnations.get(rank, incarnation)
        if incarnation < known:
            return [_failed(rank, message, FencedError(f"rank {rank}: a newer worker took over this rank"))]
        if incarnation > known:
            self.gone.pop(rank, None)
        self.incarnations[rank] = incarnation
        self.heard[rank] = now
        if isinstance(message, Explain):
            return [Reply(rank, Explanation(message.request_id, self._explain(rank, message.about, now)))]
        handler = self._handlers.get(type(message))
        try:
            if handler is None or rank < 0:
                raise ProtocolError(f"a server does not take {type(message).__name__} from rank {rank}")
            return handler(rank, message, payload)
        except KVStoreError as error:
            return [_failed(rank, message, error)]

    def lost(self, rank: int, reason: str) -> list[Action]:
        """``rank`` died: whatever waits for it fails, and whatever would wait for it will."""
        self.gone[rank] = reason
        actions: list[Action] = []
        for piece_id, piece in self.pieces.items():
            actions += self._fail_hopeless(piece_id, piece)
        return actions + self._fail_early()

    # --- keys ---------------------------------------------------------------------------------

    def _init(self, rank: int, message: Init, payload: object) -> list[Action]:
        piece_id = (message.key, message.piece)
        piece = self.pieces.get(piece_id)
        if piece is not None:
            return [self._agree(rank, message, piece)]
        if rank != 0:
            if 0 in self.gone:
                raise self._lost_error(piece_id, 0, [0])
            self._early.setdefault(piece_id, {})[rank] = message
            return []
        if payload is None:
            raise ProtocolError(f"init of key {message.key!r} by rank 0: expected its value, none came")
        members = consistency.participants_of(message.spec.participants, self.num_workers)
        if not members or members[-1] >= self.num_workers:
            raise DisagreementError(
                f"key {message.key!r}: expected participants among workers 0..{self.num_workers - 1}, "
                f"got {list(members)}"
            )
        piece = Piece(message.spec, Level(consistency.parse(message.spec.cluster_model), members))
        self.pieces[piece_id] = piece
        for left, reason in self.gone.items():
            if not reason:
                piece.level.leave(left)
        actions: list[Action] = [
            Create(piece_id, message.spec, payload),
            Reply(rank, Initialized(message.request_id, 0)),
        ]
        for other, init in self._early.pop(piece_id, {}).items():
            actions.append(self._agree(other, init, piece))
        return actions

    def _fail_early(self) -> list[Action]:
        """Once rank 0 is gone, fail the inits that wait for it."""
        if 0 not in self.gone:
            return []
        early, self._early = self._early, {}
        return [
            _failed(rank, init, self._lost_error(piece_id, 0, [0]))
            for piece_id, inits in early.items()
            for rank, init in inits.items()
        ]

    def _agree(self, rank: int, message: Init, piece: Piece) -> Action:
        if message.spec == piece.spec:
            return Reply(rank, Initialized(message.request_id, piece.accepted.get(rank, 0)))
        return _failed(
            rank,
            message,
            DisagreementError(
                f"key {message.key!r}: worker {rank} and the servers disagree\n"
                f"  on the servers: {piece.spec}\n  worker {rank}: {message.spec}"
            ),
        )

    def _drop(self, rank: int, message: Drop, payload: object) -> list[Action]:
        mine = [piece_id for piece_id in self.pieces if piece_id[0] == message.key]
        for piece_id in mine:
            del self.pieces[piece_id]
        return [*(Forget(piece_id) for piece_id in mine), Reply(rank, Done(message.request_id))]

    def _find(self, key: Key, number: int) -> tuple[PieceId, Piece]:
        try:
            return (key, number), self.pieces[key, number]
        except KeyError:
            raise UnknownKeyError(f"key {key!r}: expected an initialised key, {self.name} has none such") from None

    # --- push and pull ------------------------------------------------------------------------

    def _push(self, rank: int, message: Push, payload: object) -> list[Action]:
        piece_id, piece = self._find(message.key, message.piece)
        if rank not in piece.level.rounds:
            raise DisagreementError(
                f"push of key {message.key!r} by worker {rank}: expected a participant, "
                f"one of {list(piece.level.participants)}"
            )
        last = piece.accepted.get(rank, 0)
        if message.round > last + 1:
            return []  # a gap: the missing one will be sent again, and then this one
        actions: list[Action] = []
        if message.round == last + 1:
            if payload is None:
                return [Reply(rank, Missing(message.request_id))]
            if rank in piece.level.left:
                raise DisagreementError(f"push of key {message.key!r} by worker {rank}: it has left")
            piece.accepted[rank] = message.round
            piece.held[rank, message.round] = payload
            if not message.pull:
                piece.commits[rank, message.round] = message.request_id
            actions += self._perform(piece_id, piece, *piece.level.push(rank))
        elif not message.pull:
            piece.commits[rank, message.round] = message.request_id
            actions += self._commits_due(piece_id, piece, [(rank, message.round)])
        if message.pull:
            answered = self._pull(rank, message, piece_id, piece)
            if not answered and piece.level.in_effect(rank, message.round):
                answered.append(ReplyAfter(rank, Committed(message.request_id), piece_id))
            actions += answered
        if message.acknowledge and not piece.level.in_effect(rank, message.round):
            actions.append(Reply(rank, Accepted(message.request_id)))
        return actions + self._fail_hopeless(piece_id, piece)

    def _fetch(self, rank: int, message: Fetch, payload: object) -> list[Action]:
        piece_id, piece = self._find(message.key, message.piece)
        actions = self._pull(rank, message, piece_id, piece)
        return actions + self._fail_hopeless(piece_id, piece)

    def _pull(self, rank: int, message: Push | Fetch, piece_id: PieceId, piece: Piece) -> list[Action]:
        ticket = Ticket(rank, message.request_id, message.near)
        answer = piece.level.pull(Pull(ticket, ((rank, message.round),)))
        return [] if answer is None else [_value(piece_id, answer)]

    def _perform(self, piece_id: PieceId, piece: Piece, updates: list[Update], answers: list[Answer]) -> list[Action]:
        actions: list[Action] = []
        for update in updates:
            rule, generation = self._setting(piece_id[0], update.round)
            payloads = tuple([piece.held.pop(contribution) for contribution in update.contributions])
            actions.append(Apply(piece_id, update.round, payloads, rule, generation))
            if piece.commits:
                actions += self._commits_due(piece_id, piece, update.contributions)
        actions += [_value(piece_id, answer) for answer in answers]
        return actions

    def _commits_due(
        self, piece_id: PieceId, piece: Piece, pushes: tuple[tuple[int, int], ...] | list[tuple[int, int]]
    ) -> list[Action]:
        return [
            ReplyAfter(rank, Committed(piece.commits.pop((rank, round))), piece_id)
            for rank, round in pushes
            if (rank, round) in piece.commits and piece.level.in_effect(rank, round)
        ]

    # --- optimizer ----------------------------------------------------------------------------

    def _setting(self, key: Key, round: int) -> tuple[Rule | None, int]:
        for setting in reversed(self.settings):
            if round > setting.since.get(key, 0):
                return setting.rule, setting.generation
        return None, 0

    def _set_optimizer(self, rank: int, message: SetOptimizer, payload: object) -> list[Action]:
        rule = self._parse_optimizer(message.optimizer)
        if not self.settings:
            self.settings.append(Setting(message.since, rule, 1))
        elif self.settings[-1].rule != rule:
            if not message.replace:
                raise OptimizerError(
                    f"set_optimizer by worker {rank}: expected the one that is set, {self.settings[-1].rule}, "
                    f"got {rule}; replace=True replaces it"
                )
            self.settings.append(Setting(message.since, rule, self.settings[-1].generation + 1))
        return [Reply(rank, Done(message.request_id))]

    def _set_hyperparameters(self, rank: int, message: SetHyperparameters, payload: object) -> list[Action]:
        if not self.settings:
            raise OptimizerError("set_hyperparameters: expected an optimizer, none is set")
        current = self.settings[-1]
        rule = current.rule.with_hyperparameters(**message.changes)
        if rule != current.rule:
            self.settings.append(Setting(message.since, rule, current.generation))
        return [Reply(rank, Done(message.request_id))]

    def _read_state(self, rank: int, message: ReadState, payload: object) -> list[Action]:
        piece_id, _ = self._find(message.key, message.piece)
        return [SendState(rank, message.request_id, piece_id)]

    def _write_state(self, rank: int, message: WriteState, payload: object) -> list[Action]:
        self._find(message.key, message.piece)
        return [StoreState(rank, message, payload)]

    # --- members ------------------------------------------------------------------------------

    def _leave(self, rank: int, message: Leave, payload: object) -> list[Action]:
        reply: Action = Reply(rank, Done(message.request_id))
        if message.reason:
            return [reply, *self.lost(rank, message.reason)]
        self.gone[rank] = ""
        actions: list[Action] = [reply]
        for piece_id, piece in self.pieces.items():
            actions += self._perform(piece_id, piece, *piece.level.leave(rank))
        return actions + self._fail_early()

    def _fail_hopeless(self, piece_id: PieceId, piece: Piece) -> list[Action]:
        """Fail the parked requests of the piece that wait for a worker which is lost."""
        if not self.gone:
            return []
        lost = {rank for rank, reason in self.gone.items() if reason}
        actions: list[Action] = []
        for pull in list(piece.level.waiting.values()):
            missing = lost.intersection(piece.level.blockers(pull))
            if missing:
                del piece.level.waiting[pull.ticket]
                ticket = _ticket(pull.ticket)
                error = self._lost_error(piece_id, pull.needs[0][1], sorted(missing))
                actions.append(Reply(ticket.rank, Failed(ticket.request_id, *to_wire(error))))
        for (rank, round), request_id in list(piece.commits.items()):
            missing = lost.intersection(piece.level.behind(round))
            if missing and not piece.level.in_effect(rank, round):
                del piece.commits[rank, round]
                error = self._lost_error(piece_id, round, sorted(missing))
                actions.append(Reply(rank, Failed(request_id, *to_wire(error))))
        return actions

    def _lost_error(self, piece_id: PieceId, round: int, ranks: list[int]) -> WorkerLostError:
        why = "; ".join(f"worker {rank}: {self.gone[rank] or 'it has left'}" for rank in ranks)
        return WorkerLostError(f"key {piece_id[0]!r}, round {round}: waits for a worker that is gone ({why})")

    def _explain(self, rank: int, about: int, now: float) -> str:
        for (key, number), piece in self.pieces.items():
            tickets = (Ticket(rank, about, near) for near in (False, True))
            pull = next((piece.level.waiting[ticket] for ticket in tickets if ticket in piece.level.waiting), None)
            if pull is not None:
                round, missing = pull.needs[0][1], piece.level.blockers(pull)
            else:
                rounds = [n for (r, n), request in piece.commits.items() if r == rank and request == about]
                if not rounds:
                    continue
                round, missing = rounds[0], piece.level.behind(rounds[0])
            return f"key {key!r}, piece {number} on {self.name}, round {round}: {self._missing(missing, now)}"
        for (key, _), early in self._early.items():
            if rank in early and early[rank].request_id == about:
                return f"key {key!r}: its init waits for rank 0's; {self._missing([0], now)}"
        return f"{self.name} has no such request waiting"

    def _missing(self, ranks: list[int], now: float) -> str:
        def last_heard(rank: int) -> str:
            if rank not in self.heard:
                return f"{rank} (never heard of)"
            return f"{rank} (last heard {now - self.heard[rank]:.1f} s ago)"

        return f"waits for workers {', '.join(map(last_heard, ranks)) or 'nobody'}"


def _failed(rank: int, message: Message, error: KVStoreError) -> Reply:
    return Reply(rank, Failed(message.request_id, *to_wire(error)))


def _value(piece_id: PieceId, answer: Answer) -> ReplyValue:
    ticket = _ticket(answer.ticket)
    return ReplyValue(ticket.rank, ticket.request_id, piece_id, answer.version, answer.staleness, ticket.near)


def _ticket(ticket: Hashable) -> Ticket:
    assert isinstance(ticket, Ticket)
    return ticket
