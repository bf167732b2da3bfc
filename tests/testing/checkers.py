"""What must hold in every simulation, whatever happens: exactly once, in order, no staler than the model allows, equal
for all in sequential rounds, and nothing that was committed is lost."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvstore.protocol.placement import Placing
from kvstore.testing import Cluster
from tests.testing.plans import Plan
from tests.testing.programs import Life, Seen


class Violation(AssertionError):
    """A checker's finding."""


class Checkers:
    """They look at every value when it is read, and once more when all is over."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.lives: list[Life] = []
        self.seen: list[Seen] = []
        self._slack = int(plan.model[8:-1]) if plan.model.startswith("bounded") else 0

    def begin_life(self, rank: int) -> Life:
        """A process of this rank begins."""
        life = Life(rank, 1 + sum(life.rank == rank for life in self.lives))
        self.lives.append(life)
        return life

    # --- when a value is read -------------------------------------------------------------------

    def look(self, seen: Seen) -> None:
        """Raises Violation."""
        self._once(seen)
        for life in self.lives:
            if life.first:
                self._of(life, seen)
        first, own = seen.life.first[seen.key], seen.own
        if own >= first and not seen.lives[:, seen.life.rank, first - 1 : own].all():
            self.fail(seen, "its reader's own pushes are not in it")
        if self.plan.model == "sequential" and not seen.final and seen.lives[:, :, own:].any():
            self.fail(seen, f"expected no round after {own}")
        if self.plan.on_loss != "continue" and self.plan.model != "eventual":
            self._fresh(seen)
        if seen.sure is not None:
            self._nothing_lost(seen, seen.sure)
        self.seen.append(seen)

    def _once(self, seen: Seen) -> None:
        if (seen.lives < 0).any():
            self.fail(seen, "a push is in it more than once")

    def _of(self, life: Life, seen: Seen) -> None:
        """Is of this life there what may be, in its order?"""
        rows, first = seen.lives[:, life.rank], life.first[seen.key]
        if (rows == life.number)[:, life.pushed.get(seen.key, 0) :].any():
            self.fail(seen, f"pushes of worker {life.rank} are in it before they were made")
        for row in rows:
            mine = np.flatnonzero(row == life.number)
            if mine.size and not row[first - 1 : mine[-1]].all():
                self.fail(seen, f"worker {life.rank}'s pushes are in it out of their order")
        if self.plan.on_loss == "continue":  # else what it had sent counts, and it may have been ahead at some pieces
            older = ((rows > 0) & (rows < life.number))[:, first:]
            if older.any():
                self.fail(seen, f"pushes of an earlier life of worker {life.rank} are in it, made when it was over")

    def _fresh(self, seen: Seen) -> None:
        """Nobody is left out: is everybody's there who was there from the beginning and does not leave?"""
        due = max(0, seen.own - self._slack)
        for rank in set(range(self.plan.workers)) - set(self.plan.leaves):
            if not seen.lives[:, rank, :due].all():
                self.fail(seen, f"expected rounds 1..{due} of worker {rank}")

    def _nothing_lost(self, final: Seen, sure: list[tuple[Life, int]]) -> None:
        for life, last in sure:
            first = life.first[final.key]
            if not final.lives[:, life.rank, first - 1 : max(first - 1, last)].all():
                self.fail(final, f"a committed push of worker {life.rank} is lost")
            joined = life.number == 1 and life.rank >= self.plan.workers
            if joined and final.lives[:, life.rank, : first - 1].any():
                self.fail(final, f"worker {life.rank} counts before it joined")

    # --- when all is over -----------------------------------------------------------------------

    def end(self) -> None:
        """Now all lives are known. Raises Violation."""
        same: dict[tuple[str, int], Any] = {}
        for seen in self.seen:
            if self.plan.model != "eventual":
                self._whole(seen)
            if self.plan.model == "sequential":
                until = seen.lives[:, :, : seen.own]
                if (same.setdefault((seen.key, seen.own), until) != until).any():
                    self.fail(seen, f"another worker read something else after its round {seen.own}")

    def _whole(self, seen: Seen) -> None:
        """Are the pushes there of all who ended in order, as far as the model demands?"""
        for life in self.lives:
            if life.ended:
                first, last = life.first[seen.key], min(life.pushed.get(seen.key, 0), seen.own - self._slack)
                if not seen.lives[:, life.rank, first - 1 : max(first - 1, last)].all():
                    self.fail(seen, f"expected rounds {first}..{last} of worker {life.rank}")

    def replicas(self, cluster: Cluster, placing: Placing) -> int:
        """Does every replica that is in step hold what its primary holds? How many could be compared?"""
        compared = 0
        for number, placed in enumerate(placing.shards):
            for replica in placed.replicas:
                one = cluster.daemon("server", placed.primary).shards.get(number)
                other = cluster.daemon("server", replica.server).shards.get(number)
                if one is None or other is None or not (replica.in_step and other.is_replica):
                    continue
                if one._stream is not None and one._stream.log.over:
                    self._compare(number, one, other)
                    compared += 1
        return compared

    def _compare(self, number: int, one: Any, other: Any) -> None:
        pieces = [sorted(str(piece) for piece, _ in shard.serving.counted()) for shard in (one, other)]
        if pieces[0] != pieces[1]:
            raise Violation(f"shard {number}: the primary has {pieces[0]}, its replica {pieces[1]}")
        for piece, counted in one.serving.counted():
            value, copy = one._work.stored[piece].value, other._work.stored[piece].value
            if not (value == copy).all():
                raise Violation(f"shard {number}, {piece}: the primary has {value}, its replica {copy}")
            if not counted.held and not counted.same_history(other.serving.pieces[piece]):
                raise Violation(f"shard {number}, {piece}: {counted} and {other.serving.pieces[piece]}")

    def fail(self, seen: Seen, what: str) -> None:
        lives = "; ".join(map(str, self.lives))
        raise Violation(
            f"worker {seen.life.rank} (life {seen.life.number}) read {seen.key} after its round {seen.own}: {what}; it "
            f"contains pushes of the lives\n{seen.lives}\n{lives}"
        )
