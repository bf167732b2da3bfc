"""The consistency models, and the counting that they decide on. Pure.

What this file decides: when a push takes effect and when a pull may be answered, for one key at
one level. A :class:`Level` counts the rounds of its participants; a model (:class:`Sequential`,
:class:`Bounded`, :class:`Eventual`) looks at the counts and says yes or no. The same classes serve
the devices of a worker and the workers of a cluster.

What it refuses to know: arrays, messages, clocks, threads. A push counts when :meth:`Level.push`
is called; whoever calls it submits the work in the same order.

Sources: bulk synchronous parallel (Valiant, CACM 1990); stale synchronous parallel (Ho et al.,
NIPS 2013, section 3); asynchronous push and pull (Li et al., OSDI'14, section 3.4).
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvstore.errors import OptionError
from kvstore.records import record


@record
class Update:
    """These pushes take effect now, together, merged in this order."""

    round: int  # the largest round of the merged pushes; for one push its own round
    contributions: tuple[tuple[int, int], ...]  # (participant, round)


@record
class Pull:
    """A wish to read. ``needs``: the participants it reads for, each with its own round."""

    ticket: Hashable
    needs: tuple[tuple[int, int], ...]


@record
class Answer:
    """The pull with this ticket may be answered with the value as it is after the updates so far."""

    ticket: Hashable
    version: int
    staleness: int  # max(0, own round - smallest round of any member), the largest over ``needs``


class Model(Protocol):
    """One consistency model; see the table in docs/consistency.md."""

    def due(self, level: Level, participant: int) -> list[Update]:
        """What takes effect because ``participant`` pushed, or (-1) because somebody left."""

    def answers(self, level: Level, participant: int, own: int) -> bool:
        """May a pull by ``participant``, made after its ``own``-th push, be answered now?"""

    def in_effect(self, level: Level, participant: int, round: int) -> bool:
        """Has that push taken effect?"""

    def settled(self, level: Level, marks: Mapping[int, int]) -> bool:
        """Are the pushes up to these rounds in effect, as far as they can be without later ones of somebody?"""

    def updates_per_round(self, participants: int) -> int:
        """As how many updates does a round take effect that all of so many participants pushed?"""

    @property
    def pull_before_next_push(self) -> bool:
        """Must a pull be answered before its participant's next push is counted?"""


@record
class Sequential:
    """A round takes effect when every participant has pushed it; all read the same values."""

    pull_before_next_push = True

    def due(self, level: Level, participant: int) -> list[Update]:
        updates: list[Update] = []
        rounds = level.rounds
        round = level.next_round(level.closed)
        while members := level.members_of(round):
            for p in members:
                if rounds[p] < round:
                    return updates
            updates.append(Update(round, tuple([(p, round) for p in members])))
            round = level.next_round(round)
        return updates

    def answers(self, level: Level, participant: int, own: int) -> bool:
        return level.closed >= own

    def in_effect(self, level: Level, participant: int, round: int) -> bool:
        return round <= level.closed

    def settled(self, level: Level, marks: Mapping[int, int]) -> bool:
        return level.closed >= min((n for p, n in marks.items() if level.is_here(p)), default=0)

    def updates_per_round(self, participants: int) -> int:
        return 1

    def __str__(self) -> str:
        return "sequential"


class _AtOnce:
    """A push takes effect when it arrives."""

    __slots__ = ()
    pull_before_next_push = False

    def due(self, level: Level, participant: int) -> list[Update]:
        if participant < 0:
            return []
        round = level.rounds[participant]
        return [Update(round, ((participant, round),))]

    def in_effect(self, level: Level, participant: int, round: int) -> bool:
        return round <= level.rounds.get(participant, 0)

    def settled(self, level: Level, marks: Mapping[int, int]) -> bool:
        return all(level.rounds[p] >= n for p, n in marks.items())

    def updates_per_round(self, participants: int) -> int:
        return participants


@record
class Bounded(_AtOnce):
    """A pull waits until nobody is more than ``staleness`` rounds behind the one who pulls."""

    staleness: int

    def __post_init__(self) -> None:
        if type(self.staleness) is not int or not 0 <= self.staleness < 10**9:
            raise OptionError(f"bounded: expected a whole number 0 <= s < 10**9, got {self.staleness!r}")

    def answers(self, level: Level, participant: int, own: int) -> bool:
        return level.rounds.get(participant, own) >= own and level.slowest() >= own - self.staleness

    def __str__(self) -> str:
        return f"bounded({self.staleness})"


@record
class Eventual(_AtOnce):
    """A pull waits for nothing but the puller's own pushes."""

    def answers(self, level: Level, participant: int, own: int) -> bool:
        return level.rounds.get(participant, own) >= own

    def __str__(self) -> str:
        return "eventual"


FOR_GOOD = (1 << 63) - 1  # the last round of an absence that has no end yet

Absence = tuple[int, int]  # the first and the last round

_SEQUENTIAL = Sequential()
_FORM = re.compile(r"(sequential|eventual)|bounded\((\d{1,9})\)")


def parse(text: str | Model) -> Model:
    """The model that ``text`` names: ``sequential``, ``bounded(s)`` or ``eventual``.

    Raises:
        OptionError: another text.
    """
    if isinstance(text, Sequential | Bounded | Eventual):
        return text
    match = _FORM.fullmatch(text.replace(" ", "")) if isinstance(text, str) else None
    if match is None:
        raise OptionError(
            "a consistency model: expected 'sequential', 'bounded(s)' with a whole number s >= 0, "
            f"or 'eventual'; got {text!r}"
        )
    if match[2] is not None:
        return Bounded(int(match[2]))
    return _SEQUENTIAL if match[1] == "sequential" else Eventual()


@dataclass(slots=True)
class Level:
    """The rounds of one key at one level, and the pulls that wait for them.

    Not thread-safe: the caller holds its lock and submits the returned updates and answers to the
    engine, in their order, before it lets go.
    """

    model: Model
    participants: Sequence[int]
    rounds: dict[int, int] = field(init=False)  # participants only: their last round so far
    away: dict[int, list[Absence]] = field(init=False)  # the rounds of which a participant is not a member, ascending
    closed: int = 0  # the largest round that has taken effect
    version: int = 0  # updates so far
    waiting: dict[Hashable, Pull] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.participants = tuple(self.participants)
        self.rounds = dict.fromkeys(self.participants, 0)
        self.away = {}

    def members_of(self, round: int) -> Sequence[int]:
        """The members of that round, in their order."""
        if not self.away:
            return self.participants
        return [p for p in self.participants if not any(first <= round <= last for first, last in self._absences(p))]

    def next_round(self, closed: int) -> int:
        """The first round after ``closed`` that has members, if any round has; between some who left and one who joined
        there may be none."""
        round = closed + 1
        while self.away and not self.members_of(round):
            ends = [last for spans in self.away.values() for _, last in spans if round <= last < FOR_GOOD]
            if not ends:
                break
            round = min(ends) + 1
        return round

    def is_here(self, participant: int) -> bool:
        """Is it a member of the rounds to come?"""
        spans = self._absences(participant)
        return participant in self.rounds and not (spans and spans[-1][1] == FOR_GOOD)

    def slowest(self) -> int:
        """The smallest round of those who are still here; when everybody left, nobody is behind."""
        if not self.away:
            return min(self.rounds.values(), default=0)
        here = [n for p, n in self.rounds.items() if self.is_here(p)]
        return min(here) if here else max(self.rounds.values(), default=0)

    @property
    def begun(self) -> int:
        """The largest round that any participant has pushed; who has just joined has pushed none."""
        pushed = (n for p, n in self.rounds.items() if not (self.away and self._has_just_joined(p, n)))
        return max(self.closed, *pushed, 0)

    def push(self, participant: int) -> tuple[list[Update], list[Answer]]:
        """Count one push. Raises KeyError when ``participant`` is not a member."""
        self.rounds[participant] += 1
        return self._advance(participant)

    def push_together(self, rounds: int = 1) -> None:
        """Count ``rounds`` rounds in each of which every participant pushed, as one after another would be counted.

        Nobody waits, nobody has left and all are in the same round; then every model lets each round take effect.
        """
        assert self.in_step and not self.away
        for participant in self.rounds:
            self.rounds[participant] += rounds
        self.closed += rounds
        self.version += rounds * self.model.updates_per_round(len(self.rounds))

    @property
    def in_step(self) -> bool:
        """Has everybody pushed equally often, all of it taken effect, and does nobody wait?"""
        return not self.waiting and all(n == self.closed for n in self.rounds.values())

    def pull(self, pull: Pull) -> Answer | None:
        """Answer at once, or None: then a later push or leave answers it."""
        if self._may_answer(pull):
            return self.answer(pull)
        self.waiting[pull.ticket] = pull
        return None

    def answer(self, pull: Pull) -> Answer:
        """What a pull is told that may be answered now."""
        slowest, staleness = self.slowest(), 0
        for participant, own in pull.needs:
            if own - slowest > staleness and participant in self.rounds and not self._has_just_joined(participant, own):
                staleness = own - slowest
        return Answer(pull.ticket, self.version, staleness)

    def copy(self) -> Level:
        """The same counts; the pulls that wait stay behind."""
        other = Level(self.model, self.participants)
        other.rounds = dict(self.rounds)
        other.away = {p: list(spans) for p, spans in self.away.items()}
        other.closed, other.version = self.closed, self.version
        return other

    def same_history(self, other: Level) -> bool:
        """Is it the copy of ``other``, or could be?"""
        return (
            self.model == other.model
            and self.rounds == other.rounds
            and self.away == other.away
            and (self.closed, self.version) == (other.closed, other.version)
        )

    def follow(self, update: Update) -> None:
        """Count an update that took effect elsewhere: nothing is known here of pushes that have not."""
        for participant, round in update.contributions:
            self.rounds[participant] = max(self.rounds[participant], round)
            if participant in self.away:  # perhaps it had pushed that round before it left, which was not known here
                self.away[participant] = [
                    (round + 1 if first <= round <= last else first, last) for first, last in self.away[participant]
                ]
        self.closed = max(self.closed, update.round)
        self.version += 1

    def effective(self, participant: int) -> int:
        """The last of its rounds that has taken effect, or after which it has joined; 0: there is none."""
        round = self.rounds.get(participant, 0)
        while not self.in_effect(participant, round) and not self._has_just_joined(participant, round):
            round -= 1
        return round

    def effective_absences(self, participant: int) -> list[Absence]:
        """Its absences, as if it had not pushed what has not taken effect, when it left."""
        absences: list[Absence] = []
        for first, last in self._absences(participant):
            while not self.in_effect(participant, first - 1) and participant in self.members_of(first - 1):
                first -= 1
            absences.append((first, last))
        return absences

    def push_alone(self) -> None:
        """Count a push of the only participant: in every model it takes effect at once, and nobody waits."""
        (participant,) = self.participants
        self.rounds[participant] += 1
        self.closed = self.rounds[participant]
        self.version += 1

    def leave(self, participant: int) -> tuple[list[Update], list[Answer]]:
        """``participant`` counts up to its last round and no further, unless it joins again."""
        if not self.is_here(participant):
            return [], []
        self.away.setdefault(participant, []).append((self.rounds[participant] + 1, FOR_GOOD))
        return self._advance(-1)

    def join(self, participant: int, round: int) -> None:
        """``participant``, new or back again, counts from ``round`` on, which nobody has begun.

        It will push that round next; until then its pulls are answered at once.
        """
        assert round > self.begun and not self.is_here(participant)
        left = self._absences(participant)
        first = left[-1][0] if left else 1
        over = min(self.closed, self.slowest())  # nobody will ask who was a member until then
        self.away[participant] = [span for span in left[:-1] if span[1] > over] + [(first, round - 1)]
        self.rounds[participant] = round - 1
        self.participants = tuple(sorted(self.rounds))

    def in_effect(self, participant: int, round: int) -> bool:
        return self.model.in_effect(self, participant, round)

    def settled(self, marks: Mapping[int, int]) -> bool:
        """Are the pushes of every participant up to its round in ``marks`` in effect, as far as they can be?"""
        return self.model.settled(self, marks)

    def behind(self, needed: int) -> list[int]:
        """The members that have not yet pushed round ``needed``."""
        return [p for p in self.members_of(needed) if self.rounds[p] < needed]

    def blockers(self, pull: Pull) -> list[int]:
        """The members a waiting pull waits for."""
        slack = self.model.staleness if isinstance(self.model, Bounded) else 0
        return self.behind(max(own for _, own in pull.needs) - slack)

    def _advance(self, participant: int) -> tuple[list[Update], list[Answer]]:
        updates = self.model.due(self, participant)
        if updates:
            self.version += len(updates)
            self.closed = max(self.closed, updates[-1].round)
        if not self.waiting:
            return updates, []
        ready = [pull for pull in self.waiting.values() if self._may_answer(pull)]
        for pull in ready:
            del self.waiting[pull.ticket]
        return updates, [self.answer(pull) for pull in ready]

    def _may_answer(self, pull: Pull) -> bool:
        for participant, own in pull.needs:
            if participant in self.rounds and not self.model.answers(self, participant, own):
                if self.away and self._has_just_joined(participant, own):
                    continue
                return False
        return True

    def _has_just_joined(self, participant: int, own: int) -> bool:
        """Was it, after its ``own``-th round, about to push its first since it joined?"""
        return any(last == own for _, last in self._absences(participant))

    def _absences(self, participant: int) -> list[Absence]:
        return self.away.get(participant, [])


def participants_of(chosen: Iterable[int] | None, everybody: Iterable[int]) -> tuple[int, ...]:
    """The participants of a key, ascending: those chosen, or everybody."""
    return tuple(sorted(set(everybody if chosen is None else chosen)))
