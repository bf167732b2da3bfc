"""The scheduler's part in a cut: it names the cut point at which every worker sends its marker. Pure.

Every worker counts the cut points that it has passed. A number that nobody has passed yet is found in one round of
questions: the scheduler says Halt, each worker answers how many it has passed and does not pass another until it is
told the number. So none can run ahead of what it said, and none waits longer than the slowest answer takes.

Workers that wait for each other's pushes (any model but ``eventual``) all get the same number, one more than the
largest: what a worker needs before its k-th cut point was pushed before the others' k-th. Workers that wait for nobody
may be far apart; each gets its own next cut point, so that none is held up until the slowest has caught up.

A worker that came later counts from then on. Which of its cut points is which of the others' follows from what each
pushed between them: its latest cut points, told by its round of one key and by being a barrier or not, must be some of
theirs. As long as that is not clear, because it has passed none yet for instance, all go on and are asked again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvstore.errors import CheckpointError, to_wire
from kvstore.protocol.messages import AskCut, Failed, Halt, Message, Named, Passed

ANSWER_S = 5.0  # how long a worker may take to say where it is
AGAIN_S = 0.5  # it is asked again then
PLACE_S = 60.0  # how long it is tried to find out which cut points of a worker that came later are which of the others'
APART_MAX = 64  # cut points; workers that wait for each other and are further apart do not pass the same ones

Peer = Any  # how the shell addresses a connection; opaque here
Sends = list[tuple[Peer, Message]]


@dataclass(slots=True)
class _Asked:
    """One cut whose point has no name yet."""

    cut: int
    peer: Peer
    request_id: int
    since: float  # the workers are asked, this time
    awaited: set[int]
    began: float
    answers: dict[int, tuple[Peer, Passed]] = field(default_factory=dict)

    @property
    def missing(self) -> list[int]:
        return sorted(self.awaited - set(self.answers))


class Naming:
    """All cuts that have been asked for and have no name yet."""

    def __init__(self) -> None:
        self._asked: dict[int, _Asked] = {}

    def __repr__(self) -> str:
        return f"<Naming: {[(one.cut, one.missing) for one in self._asked.values()]}>"

    def ask(self, peer: Peer, message: AskCut, workers: Mapping[int, Peer], now: float) -> Sends:
        """Somebody wants a cut of what these workers (by rank) push."""
        asked = self._asked.get(message.cut)
        if asked is not None:  # the same question again
            asked.peer = peer
            return []
        asked = self._asked[message.cut] = _Asked(message.cut, peer, message.request_id, now, set(workers), now)
        return [(worker, Halt(0, message.cut)) for worker in workers.values()] + self._name_if_all(asked, now)

    def passed(self, peer: Peer, rank: int, message: Passed, now: float) -> Sends:
        """A worker says how many cut points it has passed."""
        asked = self._asked.get(message.cut)
        if asked is None:
            error = CheckpointError("a cut: its point has been named, or it was given up")
            return [(peer, Failed(message.request_id, *to_wire(error)))]
        asked.answers[rank] = peer, message
        return self._name_if_all(asked, now)

    def gone(self, rank: int) -> Sends:
        """The worker has left or is lost: nobody waits for it."""
        sends: Sends = []
        for asked in list(self._asked.values()):
            asked.awaited.discard(rank)
            asked.answers.pop(rank, None)
            sends += self._name_if_all(asked, asked.since)
        return sends

    def tick(self, workers: Mapping[int, Peer], now: float, heard: Callable[[int], float]) -> Sends:
        """Ask again who has not answered; give up after a while. ``heard``: when a worker was last heard of."""
        sends: Sends = []
        for asked in list(self._asked.values()):
            waited = now - asked.since
            if waited > ANSWER_S:
                who = ", ".join(f"{rank} (last heard {now - heard(rank):.1f} s ago)" for rank in asked.missing)
                sends += self._refuse(asked, f"workers {who} have not said within {ANSWER_S:g} s where they are")
            elif waited > AGAIN_S:
                asked.awaited.update(rank for rank in workers if not asked.answers)  # who came since may belong to it
                sends += [(workers[rank], Halt(0, asked.cut)) for rank in asked.missing if rank in workers]
        return sends

    def _refuse(self, asked: _Asked, why: str) -> Sends:
        """There will be no such cut."""
        self._asked.pop(asked.cut, None)
        told = [(peer, message.request_id) for peer, message in asked.answers.values()]
        return [(peer, _failed(request_id, why)) for peer, request_id in (*told, (asked.peer, asked.request_id))]

    def _name_if_all(self, asked: _Asked, now: float) -> Sends:
        if asked.missing:
            return []
        answers = {rank: message for rank, (_, message) in sorted(asked.answers.items())}
        coupled = any(message.coupled for message in answers.values())
        ahead = _ahead(answers) if coupled else dict.fromkeys(answers, 0)
        lost = [rank for rank, by in ahead.items() if by is None]
        if lost and now - asked.began > PLACE_S:
            return self._refuse(
                asked, f"workers {lost} came later, and have passed no cut point that others have passed"
            )
        if lost:
            told, asked.answers, asked.since = asked.answers, {}, now
            return [(peer, Named(message.request_id, asked.cut, 0, ())) for peer, message in told.values()]
        passed = {rank: answers[rank].count + by for rank, by in ahead.items() if by is not None}
        at = max(passed.values(), default=0) + 1
        if coupled and at - 1 - min(passed.values()) > APART_MAX:
            return self._refuse(asked, f"workers that wait for each other have passed cut points unlike: {passed}")
        del self._asked[asked.cut]
        awaited = tuple(sorted(asked.awaited))
        sends: Sends = []
        for rank, (peer, message) in asked.answers.items():
            mine = at + message.count - passed[rank] if coupled else message.count + 1
            sends.append((peer, Named(message.request_id, asked.cut, mine, awaited)))
        return [*sends, (asked.peer, Named(asked.request_id, asked.cut, at, awaited))]


def _failed(request_id: int, why: str) -> Failed:
    return Failed(request_id, *to_wire(CheckpointError(f"a cut: {why}")))


def _ahead(answers: Mapping[int, Passed]) -> dict[int, int | None]:
    """By how much the others' counts are ahead of each worker's; None where that is not clear.

    The others are those who are here from the beginning, and if they are all gone the first of those who came later.
    """
    first = [rank for rank, message in answers.items() if not message.joined] or list(answers)[:1]
    clocks = {answers[rank].clock for rank in first}
    reference = {number: what for rank in first for number, *what in answers[rank].history}
    ahead: dict[int, int | None] = dict.fromkeys(first, 0)
    for rank, message in answers.items():
        if rank not in ahead:
            mine = {number: what for number, *what in message.history}
            ahead[rank] = _shift(mine, reference) if clocks == {message.clock} else None
    return ahead


def _shift(mine: Mapping[int, list[int]], theirs: Mapping[int, list[int]]) -> int | None:
    """What has to be added to numbers of mine so that they mean the same as theirs; None unless there is one answer."""
    same = {other - number for number, what in mine.items() for other, that in theirs.items() if what == that}
    fit = [by for by in same if all(theirs.get(number + by, what) == what for number, what in mine.items())]
    return fit[0] if len(fit) == 1 else None
