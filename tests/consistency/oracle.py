"""The table of docs/consistency.md, word for word and as slow as it likes: everything from the full history.

It keeps nothing but what happened, in order, and answers each question by going through all of it. No state is
carried from one question to the next, so there is nothing to get wrong twice in the same way as the real
:class:`kvstore.consistency.Level`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

Push = tuple[int, int]  # (participant, round)


@dataclass
class Oracle:
    """What a key's history means under one model: ``sequential``, ``eventual`` or a bound."""

    model: str
    bound: int
    participants: tuple[int, ...]
    history: list[tuple[str, int]] = field(default_factory=list)  # ("push" or "leave", participant)

    def rounds(self, upto: int | None = None) -> dict[int, int]:
        """Pushes of each participant."""
        past = self.history[:upto]
        return {p: sum(event == ("push", p) for event in past) for p in self.participants}

    def gone(self) -> set[int]:
        return {p for what, p in self.history if what == "leave"}

    def last_round(self, p: int) -> int | None:
        """The last round that ``p`` is a member of; None: no end is known."""
        return self.rounds()[p] if p in self.gone() else None

    def members(self, n: int) -> list[int]:
        return [p for p in self.participants if (last := self.last_round(p)) is None or last >= n]

    def updates(self) -> list[list[Push]]:
        """All updates so far, each the pushes merged into it."""
        rounds = self.rounds()
        if self.model == "sequential":
            done: list[list[Push]] = []
            for n in range(1, 1 + max(rounds.values(), default=0)):
                if not all(rounds[p] >= n for p in self.members(n)):
                    break
                done.append([(p, n) for p in self.members(n)])
            return done
        return [
            [(p, sum(event == ("push", p) for event in self.history[: i + 1]))]
            for i, (what, p) in enumerate(self.history)
            if what == "push"
        ]

    def held(self) -> set[Push]:
        return {push for update in self.updates() for push in update}

    def slowest(self) -> int | None:
        """The smallest round of those still here; None when nobody is."""
        return min((n for p, n in self.rounds().items() if p not in self.gone()), default=None)

    def may_answer(self, p: int, own: int) -> bool:
        """May a pull by ``p``, made after its ``own``-th push, be answered now?"""
        if p not in self.participants:
            return True
        mine = {(p, n) for n in range(1, own + 1)}
        if not mine <= self.held():
            return False
        if self.model != "bounded":
            return True
        slowest = self.slowest()
        return slowest is None or slowest >= own - self.bound

    def staleness(self, p: int, own: int) -> int:
        slowest = self.slowest()
        return 0 if p not in self.participants or slowest is None else max(0, own - slowest)

    def factors(self, samples_per_round: int, samples: dict[Push, int]) -> list[Fraction | None]:
        """For each update what makes its sum that of so many samples; None where no sample is in it."""
        totals = [sum(samples[push] for push in update) for update in self.updates()]
        return [Fraction(samples_per_round, total) if total else None for total in totals]
