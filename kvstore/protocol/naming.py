"""The scheduler's part in a cut: it names the cut point at which every worker sends its marker. Pure.

Every worker counts the cut points that it has passed. A number that nobody has passed yet is found in one round of
questions: the scheduler says Halt, each worker answers how many it has passed and does not pass another until it is
told the number. So none can run ahead of what it said, and none waits longer than the slowest answer takes.

Workers that wait for each other's pushes (any model but ``eventual``) all get the same number, one more than the
largest: what a worker needs before its k-th cut point was pushed before the others' k-th. Workers that wait for nobody
may be far apart; each gets its own next cut point, so that none is held up until the slowest has caught up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvstore.errors import CheckpointError, to_wire
from kvstore.protocol.messages import AskCut, Failed, Halt, Message, Named, Passed

ANSWER_S = 5.0  # how long a worker may take to say where it is
AGAIN_S = 0.5  # it is asked again then
APART_MAX = 64  # cut points; workers that wait for each other and are further apart do not pass the same ones

Peer = Any  # how the shell addresses a connection; opaque here
Sends = list[tuple[Peer, Message]]


@dataclass(slots=True)
class _Asked:
    """One cut whose point has no name yet."""

    cut: int
    peer: Peer
    request_id: int
    since: float
    awaited: set[int]
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
        asked = self._asked[message.cut] = _Asked(message.cut, peer, message.request_id, now, set(workers))
        return [(worker, Halt(0, message.cut)) for worker in workers.values()] + self._name_if_all(asked)

    def passed(self, peer: Peer, rank: int, message: Passed) -> Sends:
        """A worker says how many cut points it has passed."""
        asked = self._asked.get(message.cut)
        if asked is None:
            error = CheckpointError("a cut: its point has been named, or it was given up")
            return [(peer, Failed(message.request_id, *to_wire(error)))]
        asked.answers[rank] = peer, message
        return self._name_if_all(asked)

    def gone(self, rank: int) -> Sends:
        """The worker has left or is lost: nobody waits for it."""
        sends: Sends = []
        for asked in list(self._asked.values()):
            asked.awaited.discard(rank)
            asked.answers.pop(rank, None)
            sends += self._name_if_all(asked)
        return sends

    def tick(self, workers: Mapping[int, Peer], now: float, heard: Callable[[int], float]) -> Sends:
        """Ask again who has not answered; give up after a while. ``heard``: when a worker was last heard of."""
        sends: Sends = []
        for asked in list(self._asked.values()):
            waited = now - asked.since
            if waited > ANSWER_S:
                del self._asked[asked.cut]
                who = ", ".join(f"{rank} (last heard {now - heard(rank):.1f} s ago)" for rank in asked.missing)
                error = CheckpointError(f"a cut: workers {who} have not said within {ANSWER_S:g} s where they are")
                sends += [(peer, Failed(m.request_id, *to_wire(error))) for peer, m in asked.answers.values()]
                sends.append((asked.peer, Failed(asked.request_id, *to_wire(error))))
            elif waited > AGAIN_S:
                sends += [(workers[rank], Halt(0, asked.cut)) for rank in asked.missing if rank in workers]
        return sends

    def _name_if_all(self, asked: _Asked) -> Sends:
        if asked.missing:
            return []
        del self._asked[asked.cut]
        awaited = tuple(sorted(asked.awaited))
        counts = [message.count for _, message in asked.answers.values()]
        common = max(counts, default=0) + 1
        coupled = any(message.coupled for _, message in asked.answers.values())
        if coupled and common - 1 - min(counts) > APART_MAX:
            passed = {rank: message.count for rank, (_, message) in sorted(asked.answers.items())}
            error = CheckpointError(f"a cut: workers that wait for each other have passed cut points unlike: {passed}")
            refused: Sends = [(peer, Failed(m.request_id, *to_wire(error))) for peer, m in asked.answers.values()]
            return [*refused, (asked.peer, Failed(asked.request_id, *to_wire(error)))]
        sends: Sends = [
            (peer, Named(message.request_id, asked.cut, common if coupled else message.count + 1, awaited))
            for peer, message in asked.answers.values()
        ]
        return [*sends, (asked.peer, Named(asked.request_id, asked.cut, common, awaited))]
