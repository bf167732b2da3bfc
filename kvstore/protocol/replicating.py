"""A shard on two servers: the log of what its primary has done, and what a replica makes of it. Pure.

The primary merges what the workers push, and replicates the sum (Li et al., OSDI'14, section 4.3). Whatever changes
what is committed is an entry of the log: an update with its merged payload, a bundle that is united or split, and
those messages of workers that change something by themselves. A push that only waits for its round is none: it counts
when it takes effect, and after a takeover its worker sends it again. The replica feeds a core of its own, in the log's
order.

A reply that tells of something is sent when the replica has taken the entries that it tells of; the :class:`Log` says
which. So whatever a worker was told is true of the replica too. A fresh replica first gets all pieces as they are;
until it is in step, nobody waits for it, and it may not take over.

Each appointment of a replica has an epoch and a log of its own. A replica that became primary refuses what comes under
an earlier epoch, so that a primary which was only stopped, or cut off, cannot commit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from kvstore import consistency
from kvstore.consistency import Level, Update
from kvstore.errors import FencedError, ProtocolError
from kvstore.protocol.actions import (
    Action,
    Apply,
    Create,
    Reply,
    ReplyAfter,
    ReplyValue,
    SendState,
    Split,
    StoreState,
    Unite,
)
from kvstore.protocol.counted import Piece
from kvstore.protocol.messages import (
    NOBODY,
    Admit,
    Arrived,
    Bind,
    Departed,
    Done,
    Drop,
    Entry,
    Failed,
    Freeze,
    Frozen,
    Init,
    Initialized,
    Leave,
    Message,
    Restore,
    RestorePiece,
    RestoreSetting,
    RestoreWorkers,
    SetHyperparameters,
    SetOptimizer,
    SplitBundle,
    UniteBundle,
    Updated,
    WriteState,
)
from kvstore.protocol.pieces import PieceId
from kvstore.protocol.serving import Serving
from kvstore.protocol.settings import Setting

_AS_THEY_ARE = Bind | SetOptimizer | SetHyperparameters | Leave | Freeze | Admit | Departed  # entries of the log
RESEND_S = 2.0  # without news of the replica, all that it has not taken is sent again


@dataclass(frozen=True, slots=True)
class Copy:
    """Give the entry with this number the piece's value and optimizer state, as the earlier actions leave them."""

    piece: PieceId


@dataclass(slots=True)
class Logged:
    """An entry that the replica has not taken."""

    entry: Entry
    payload: Any = None
    ready: bool = True  # its payload is there, if it has one


# Actions with a number each. Create, Apply, StoreState, Copy: of the entry that their payload is for, see Log.complete.
# Replies: of the last entry that they tell of; they are sent when that has been taken.
Steps = list[tuple[Action | Copy, int]]


class Log:
    """The primary's side: what the replica of this epoch has to be told."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.taken = 0  # up to this number
        self.in_step = False  # may the replica take over?
        self._waiting: dict[int, Logged] = {}  # by number, ascending
        self._unsent: deque[int] = deque()  # those of them that are ready
        self._number = 0
        self._pieces: Mapping[PieceId, Piece] = {}
        self._latest: dict[PieceId, int] = {}  # the last entry that changed the piece
        self._incarnations: dict[int, int] = {}
        self._snapshot_end = 0
        self._in_step_at: int | None = None  # replies wait for the replica; it is in step when this has been taken
        self._news_at = 0.0

    def __repr__(self) -> str:
        state = "in step" if self.in_step else "catching up"
        return f"<Log of epoch {self.epoch}: {len(self._waiting)} of {self._number} entries not taken, {state}>"

    def begin(self, serving: Serving) -> Steps:
        """The replica is new: it is to get everything as it is."""
        self._pieces = serving.pieces
        for bundle in serving.binding.bundles.values():
            if bundle.united:
                serving.binding.split(bundle)
        steps: Steps = [(action, 0) for action in serving.binding.take_moved()]
        for (key, number), piece in serving.pieces.items():
            assert not isinstance(key, bytes)
            steps.append((Copy((key, number)), self._add(_restore(key, number, piece), ready=False)))
        for bundle in serving.binding.bundles.values():
            self._add(Bind(0, bundle.id, bundle.keys))
        for setting in serving.settings:
            rule, asked = setting.rule.to_wire(), setting.asked.to_wire()
            self._add(RestoreSetting(0, rule, setting.since, setting.generation, asked))
        self._incarnations = dict(serving.workers.incarnations)
        self._add(serving.workers.described())
        self._snapshot_end = self._number
        return steps

    def conclude(self, rank: int, incarnation: int, message: Message, actions: list[Action]) -> Steps:
        """What :class:`Serving` concluded from a message, as entries of the log."""
        if self._incarnations.get(rank) != incarnation and rank >= 0:
            self._incarnations[rank] = incarnation
            self._add(Arrived(0), rank, incarnation)
        if isinstance(message, _AS_THEY_ARE) and not _failed(actions, message):
            self._add(message, rank, incarnation)
        logged: list[tuple[Action | Copy, int]] = []
        for action in actions:
            number = 0
            match action:
                case Create(piece, _, _, restored) if restored is not None:
                    restore = _restore(*piece, self._pieces[piece])
                    number = self._latest[piece] = self._add(restore, ready=False)
                    logged += [(action, 0), (Copy(piece), number)]
                    continue
                case Create(piece, spec):
                    number = self._latest[piece] = self._add(Init(0, *piece, spec), ready=False)  # type: ignore[arg-type]
                case Apply(piece, round, _, _, _, contributions):
                    update = Updated(0, *piece, round, contributions)
                    number = self._latest[piece] = self._add(update, ready=False)
                case StoreState(_, written, _, _):
                    number = self._add(written, rank, incarnation, ready=False)
                    self._latest[written.key, written.piece] = number
                case Unite(bundle):
                    self._latest[bundle.piece] = self._add(UniteBundle(0, bundle.id))
                case Split(bundle):
                    self._latest.update(dict.fromkeys(bundle.members, self._add(SplitBundle(0, bundle.id))))
            logged.append((action, number))
        if isinstance(message, Drop) and not _failed(actions, message):
            self._add(message, rank, incarnation)
        return [(action, number or self._gate(action)) for action, number in logged]

    def _gate(self, action: Action | Copy) -> int:
        """The last entry that this reply tells of."""
        match action:
            case ReplyAfter(_, _, piece) | ReplyValue(_, _, piece) | SendState(_, _, piece):
                return self._latest.get(piece, 0)
            case Reply(_, Done() | Initialized() | Frozen()):
                return self._number
        return 0

    def _add(self, message: Message, rank: int = NOBODY, incarnation: int = NOBODY, *, ready: bool = True) -> int:
        self._number += 1
        entry = Entry(self._number, self.epoch, rank, incarnation, message)
        self._waiting[self._number] = Logged(entry, ready=ready)
        if ready:
            self._unsent.append(self._number)
        return self._number

    def complete(self, number: int, payload: Any, **fields: Any) -> None:
        """The payload of an entry; ``fields`` of its message that were not known before."""
        logged = self._waiting[number]
        if fields:
            logged.entry = replace(logged.entry, message=replace(logged.entry.message, **fields))
        logged.payload, logged.ready = payload, True
        self._unsent.append(number)

    def may_tell(self, number: int) -> bool:
        """May a reply be sent that tells of the entries up to this one?"""
        return number <= self.taken or self._in_step_at is None

    def outgoing(self) -> Iterator[tuple[Entry, Any]]:
        """What is to be sent now, with its payload; it counts as sent when yielded."""
        while self._unsent:
            logged = self._waiting.get(self._unsent.popleft())
            if logged is not None:
                yield logged.entry, logged.payload

    def tick(self, now: float) -> None:
        """Send again what the replica has not taken, if there was no news of it for long.

        If there is nothing, send something: so that a primary which is none any more hears of it.
        """
        if now >= self._news_at + RESEND_S:
            self._news_at = now
            if not self._waiting:
                self._add(Arrived(0))
            self._unsent = deque(number for number, logged in self._waiting.items() if logged.ready)

    def heard(self, taken: int, now: float) -> bool:
        """The replica has taken all up to this number. True when that brings it in step."""
        self._news_at = now
        for number in range(self.taken + 1, min(taken, self._number) + 1):
            del self._waiting[number]
            self.taken = number
        if self._in_step_at is None and self.taken >= self._snapshot_end:
            self._in_step_at = self._number  # what was told until now, it may not have
        if self.in_step or self._in_step_at is None or self.taken < self._in_step_at:
            return False
        self.in_step = True
        return True

    @property
    def over(self) -> bool:
        """Has the replica taken everything?"""
        return self.in_step and not self._waiting


def _failed(actions: list[Action], message: Message) -> bool:
    return any(
        isinstance(action, Reply)
        and isinstance(action.message, Failed)
        and action.message.request_id == message.request_id
        for action in actions
    )


def _restore(key: Any, number: int, piece: Piece) -> RestorePiece:
    level = piece.level
    rounds = tuple((p, level.effective(p)) for p in level.rounds)
    away = tuple((p, *span) for p in level.away for span in level.effective_absences(p))
    written = piece.written is not None
    return RestorePiece(
        0, key, number, piece.spec, level.closed, level.version, rounds, away, piece.generation, piece.steps, written,
        (), (),
    )  # fmt: skip


class Replica:
    """The replica's side: entries in their order, each once."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.taken = 0
        self._early: dict[int, tuple[Entry, Any]] = {}

    def __repr__(self) -> str:
        return f"<Replica in epoch {self.epoch}: {self.taken} entries taken, {len(self._early)} early>"

    def take(self, entry: Entry, payload: Any) -> list[tuple[Entry, Any]]:
        """An entry has come. Returns those whose turn it is, for :func:`follow`.

        Raises:
            FencedError: it is of an earlier epoch.
        """
        refuse(entry.epoch, self.epoch)
        if entry.epoch > self.epoch or entry.request_id <= self.taken:
            return []
        self._early[entry.request_id] = entry, payload
        due = []
        while self.taken + 1 in self._early:
            self.taken += 1
            due.append(self._early.pop(self.taken))
        return due


def refuse(epoch: int, now: int) -> None:
    """Raises FencedError for an entry of an earlier epoch than that in which the shard is held now."""
    if epoch < now:
        raise FencedError(f"log of epoch {epoch}: another server took over this shard in epoch {now}")


def follow(serving: Serving, entry: Entry, payload: object, now: float) -> list[Action]:
    """Do what the primary did; nobody is told anything."""
    message = entry.message
    match message:
        case Updated():
            return [_update(serving, message, payload)]
        case UniteBundle(_, bundle):
            serving.binding.unite(serving.binding.bundles[bundle])
            return serving.binding.take_moved()
        case SplitBundle(_, bundle):
            serving.binding.split(serving.binding.bundles[bundle])
            return [action for action in serving.binding.take_moved() if isinstance(action, Split)]
        case RestorePiece():
            return _create(serving, message, payload)
        case RestoreSetting(_, optimizer, since, generation, asked):
            rules = serving.parse_optimizer(optimizer), serving.parse_optimizer(asked)
            serving.settings.restore(Setting(since, rules[0], generation, rules[1]))
        case SetOptimizer():  # what it does to bundles is in the log by itself
            rule = serving.parse_optimizer(message.optimizer)
            serving.settings.set(rule, message.since, replace=message.replace, by=entry.rank)
        case SetHyperparameters():
            serving.settings.change(message.changes, message.since)
        case Arrived():
            if entry.rank >= 0:
                serving.workers.hear(entry.rank, entry.incarnation, now)
        case RestoreWorkers():
            serving.workers.restore(message)
        case Bind():
            serving.binding.bind(message)
        case Departed() if message.reason:
            serving.lost(message.rank, message.reason, message.on_loss, message.incarnation, now)
        case Departed():
            serving.leaves(message.rank, message.incarnation)
        case Init() | Drop() | WriteState() | Restore() | Leave() | Freeze() | Admit():
            rank, incarnation = entry.rank, entry.incarnation
            if isinstance(message, Init):  # it was created, whoever came first
                rank = serving.workers.first or 0
                incarnation = serving.workers.incarnations.get(rank, 1)
            actions = serving.handle(rank, incarnation, message, payload, now)
            if _failed(actions, message):
                raise ProtocolError(f"log: {message} failed here: {actions}")
            return [action for action in actions if not isinstance(action, Reply | ReplyAfter | ReplyValue | SendState)]
    return []


def _update(serving: Serving, message: Updated, payload: object) -> Apply:
    piece_id = (message.key, message.piece)
    piece = serving.pieces[piece_id]
    piece.accepted.update(message.contributions)
    piece.level.follow(Update(message.round, message.contributions))
    rule, generation = serving.settings.at(serving.binding.key_of(piece_id), message.round)
    if rule is not None:
        piece.count_update(generation)
    return Apply(piece_id, message.round, (payload,), rule, generation, message.contributions)


def _create(serving: Serving, message: RestorePiece, payload: Any) -> list[Action]:
    piece_id = (message.key, message.piece)
    level = Level(consistency.parse(message.spec.cluster_model), tuple(p for p, _ in message.rounds))
    level.rounds = dict(message.rounds)
    for participant, first, last in message.away:
        level.away.setdefault(participant, []).append((first, last))
    level.closed, level.version = message.closed, message.version
    piece = Piece(message.spec, level, dict(message.rounds))
    piece.generation, piece.steps = message.generation, message.step
    piece.written = (message.names, message.dtypes) if message.written else None
    serving.pieces[piece_id] = piece
    value, state = payload
    write = WriteState(0, message.key, message.piece, message.step, message.names, message.dtypes)
    return [Create(piece_id, message.spec, value), StoreState(NOBODY, write, state, message.generation)]
