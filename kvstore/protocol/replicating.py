"""A shard on several servers: the log of what its primary has done, and what its replicas make of it. Pure.

The primary merges what the workers push, and replicates the sum (Li et al., OSDI'14, section 4.3). Whatever changes
what is committed is an entry of the log: an update with its merged payload, a bundle that is united or split, and
those messages of workers that change something by themselves. A push that only waits for its round is none: it counts
when it takes effect, and after a takeover its worker sends it again. A replica feeds a core of its own, in the log's
order.

The servers are a chain (van Renesse and Schneider, "Chain replication", OSDI'04): each passes the log on to the one
after it, and says that it has taken an entry when all behind it have. A reply that tells of something is sent when the
entries that it tells of have been taken. So whatever a worker was told is true of every replica, nobody has less than
those behind it, and what they may lack is still kept for them. When one is lost, the one before it sends that to the
one after it; when the primary is lost, the first replica goes on from where it is.

A fresh replica comes to the end. It first gets all pieces as they are, in entries whose numbers end with that of the
last entry that they contain; so an entry has one number on all servers. Until it is in step, nobody waits for it, and
it may not take over.

Whenever somebody gets the log from another server than before, that has a new epoch. What comes under an earlier one is
refused, so that a primary which was only stopped, or cut off, cannot commit.
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
from kvstore.protocol.pieces import PieceId, Span
from kvstore.protocol.serving import Serving
from kvstore.protocol.settings import Setting

_AS_THEY_ARE = Bind | SetOptimizer | SetHyperparameters | Leave | Freeze | Admit | Departed  # entries of the log
EARLY_MAX = 1024  # entries that a replica keeps because others before them have not come
RESEND_S = 2.0  # without news of the replica, all that it has not taken is sent again


FIRST = 1 << 32  # number of a shard's first entry: those that describe all pieces to a new replica come before


@dataclass(frozen=True, slots=True)
class Copy:
    """Give the entry with this number the piece's value and optimizer state, as the earlier actions leave them.

    ``span``: these elements of them; None: all.
    """

    piece: PieceId
    span: Span | None = None


@dataclass(slots=True)
class Logged:
    """An entry that the next server has not taken, or those behind it have not."""

    rank: int
    incarnation: int
    message: Message
    payload: Any = None
    ready: bool = True  # its payload is there, if it has one


# Actions with a number each. Create, Apply, StoreState, Copy: of the entry that their payload is for, see Log.complete.
# Replies: of the last entry that they tell of; they are sent when that has been taken.
Steps = list[tuple[Action | Copy, int]]


class Log:
    """What the next server has to be told.

    Args:
        taken: the last entry that this server has made or taken.
    """

    def __init__(self, epoch: int, taken: int = FIRST) -> None:
        self.epoch = epoch
        self.taken = taken  # by the next one, and those behind it
        self.in_step = False  # may the next one take over?
        self._first = taken + 1
        self._waiting: dict[int, Logged] = {}  # by number
        self._unsent: deque[int] = deque()  # those of them that are ready
        self._number = taken
        self._told = 0  # replies wait for this one at least
        self._pieces: Mapping[PieceId, Piece] = {}
        self._latest: dict[PieceId, int] = {}  # the last entry that changed the piece
        self._incarnations: dict[int, int] = {}
        self._snapshot_end = 0
        self._in_step_at: int | None = None  # replies wait for the next one; it is in step when this has been taken
        self._news_at = 0.0
        self._silent = False

    def __repr__(self) -> str:
        state = "in step" if self.in_step else "catching up"
        return f"<Log of epoch {self.epoch}: {len(self._waiting)} entries up to {self._number} not taken, {state}>"

    @property
    def number(self) -> int:
        """Of the last entry."""
        return self._number

    def lead(self, serving: Serving) -> None:
        """This server is primary from here on, with this core. It tells nothing that the next one has not."""
        self._pieces = serving.pieces
        self._incarnations = dict(serving.workers.incarnations)
        self._told = self._number

    def begin(self, serving: Serving) -> Steps:
        """The next server is new: it is to get everything as it is."""
        described = list(describe(serving))
        self._first = self._number + 1 - len(described)
        self.taken = self._first - 1
        steps: Steps = []
        for number, (message, copy) in enumerate(described, self._first):
            self._put(number, Logged(NOBODY, NOBODY, message, ready=copy is None))
            if copy is not None:
                steps.append((copy, number))
        self._snapshot_end = self._number
        return steps

    def go_on(self, epoch: int) -> None:
        """Another server is next, which was in step: it has taken what this one knows to be taken, or more."""
        self.epoch = epoch
        self.in_step = True
        self._in_step_at = self.taken
        self._send_again()

    def relay(self, entry: Entry, payload: Any) -> None:
        """This server has taken an entry: pass it on."""
        assert entry.request_id == self._number + 1
        self._number = entry.request_id
        self._put(self._number, Logged(entry.rank, entry.incarnation, entry.message, payload))

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
                    restore = _restore(*piece, self._pieces[piece], self._pieces[piece])
                    number = self._latest[piece] = self._add(restore, ready=False)
                    logged += [(action, 0), (Copy(piece), number)]
                    continue
                case Create(piece, spec):
                    number = self._latest[piece] = self._add(Init(0, *piece, spec), ready=False)  # type: ignore[arg-type]
                case Apply(piece, round, _, _, _, contributions, samples):
                    update = Updated(0, *piece, round, contributions, samples)
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
                return max(self._latest.get(piece, 0), self._told)
            case Reply(_, Done() | Initialized() | Frozen()):
                return self._number
        return 0

    def _add(self, message: Message, rank: int = NOBODY, incarnation: int = NOBODY, *, ready: bool = True) -> int:
        self._number += 1
        self._put(self._number, Logged(rank, incarnation, message, ready=ready))
        return self._number

    def _put(self, number: int, logged: Logged) -> None:
        self._waiting[number] = logged
        if logged.ready:
            self._unsent.append(number)

    def complete(self, number: int, payload: Any, **fields: Any) -> None:
        """The payload of an entry; ``fields`` of its message that were not known before."""
        logged = self._waiting[number]
        if fields:
            logged.message = replace(logged.message, **fields)
        logged.payload, logged.ready = payload, True
        self._unsent.append(number)

    def may_tell(self, number: int) -> bool:
        """May a reply be sent that tells of the entries up to this one?"""
        return number <= self.taken or self._in_step_at is None

    def held(self, taken: int) -> int:
        """The last entry that this server, which has taken so many, and all behind it have."""
        return taken if self._in_step_at is None else min(taken, self.taken)

    def outgoing(self) -> Iterator[tuple[Entry, Any]]:
        """What is to be sent now, with its payload; it counts as sent when yielded."""
        if self._silent:
            self._silent = False
            yield self._entry(0, Logged(NOBODY, NOBODY, Arrived(0))), None
        while self._unsent:
            number = self._unsent.popleft()
            logged = self._waiting.get(number)
            if logged is not None:
                yield self._entry(number, logged), logged.payload

    def _entry(self, number: int, logged: Logged) -> Entry:
        return Entry(number, self.epoch, self._first, logged.rank, logged.incarnation, logged.message)

    def tick(self, now: float) -> None:
        """Send again what has not been taken, if there was no news of it for long.

        If there is nothing, send what says nothing: so that a primary which is none any more hears of it.
        """
        if now >= self._news_at + RESEND_S:
            self._news_at = now
            self._silent = not self._waiting
            self._send_again()

    def _send_again(self) -> None:
        self._unsent = deque(number for number, logged in self._waiting.items() if logged.ready)

    def heard(self, taken: int, now: float) -> bool:
        """The next server has taken all up to this number. True when that brings it in step."""
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
        """Has everything been taken?"""
        return self.in_step and not self._waiting


def describe(serving: Serving) -> Iterator[tuple[Message, Copy | None]]:
    """All that is committed here, as entries for a new replica, each with what its payload is to be."""
    for piece_id, piece in serving.pieces.items():
        key, number = piece_id
        if isinstance(key, bytes):
            continue
        place, span = serving.binding.place_of(piece_id)
        yield _restore(key, number, piece, serving.pieces[place]), Copy(place, span)
    for bundle in serving.binding.bundles.values():
        yield Bind(0, bundle.id, bundle.keys), None
    for setting in serving.settings:
        rule, asked = setting.rule.to_wire(), setting.asked.to_wire()
        yield RestoreSetting(0, rule, setting.since, setting.generation, asked), None
    for bundle in serving.binding.bundles.values():
        if bundle.united:
            yield UniteBundle(0, bundle.id), None
    yield serving.workers.described(), None


def forget_uncommitted(serving: Serving, new: Serving) -> None:
    """A primary becomes a replica: ``new`` is to know what is committed, and nothing of what waits for its round."""
    for message, _ in describe(serving):
        follow(new, Entry(0, 0, 0, NOBODY, NOBODY, message), (None, {}), 0.0)


def _failed(actions: list[Action], message: Message) -> bool:
    return any(
        isinstance(action, Reply)
        and isinstance(action.message, Failed)
        and action.message.request_id == message.request_id
        for action in actions
    )


def _restore(key: Any, number: int, piece: Piece, counted: Piece) -> RestorePiece:
    """``counted``: the piece itself, or the bundle that it is in."""
    level = counted.level
    rounds = tuple((p, level.effective(p)) for p in level.rounds)
    away = tuple((p, *span) for p in level.away for span in level.effective_absences(p))
    return RestorePiece(
        0, key, number, piece.spec, level.closed, level.version, rounds, away, counted.generation, counted.steps,
        counted.written is not None, (), (),
    )  # fmt: skip


class Replica:
    """What comes from the server before this one: entries in their order, each once.

    Args:
        taken: the last entry that this server has; None: it is new.
    """

    def __init__(self, epoch: int, taken: int | None = None) -> None:
        self.epoch = epoch
        self._taken = taken
        self._early: dict[int, tuple[Entry, Any]] = {}

    def __repr__(self) -> str:
        return f"<Replica in epoch {self.epoch}: {self._taken} entries taken, {len(self._early)} early>"

    @property
    def taken(self) -> int:
        """The last entry that this server has."""
        return self._taken or 0

    def go_on(self, epoch: int) -> None:
        """Another server is before this one."""
        self.epoch = epoch
        self._early.clear()

    def take(self, entry: Entry, payload: Any) -> list[tuple[Entry, Any]]:
        """An entry has come. Returns those whose turn it is, for :func:`follow`.

        Raises:
            FencedError: it is of an earlier epoch.
        """
        refuse(entry.epoch, self.epoch)
        if entry.epoch > self.epoch:
            return []
        if self._taken is None:
            self._taken = entry.first - 1
        if entry.request_id <= self._taken:
            return []
        if entry.request_id > self._taken + EARLY_MAX:
            return []  # it will be sent again
        self._early[entry.request_id] = entry, payload
        due = []
        while self._taken + 1 in self._early:
            self._taken += 1
            due.append(self._early.pop(self._taken))
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
    update = Update(message.round, message.contributions)
    piece.level.follow(update)
    action = serving.apply(piece_id, piece, update, (payload,), message.samples)
    return action if action.rule is not None else replace(action, factor=1.0)  # the frame is the value already


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
