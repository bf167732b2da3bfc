"""Whole clusters whose workers are killed, cut off, come back, join and leave: real stores, servers and scheduler.

Every value is cut into pieces that lie on different servers. A worker's n-th push of a key adds, in every piece, a
number that tells its life to an element of its own, by SGD. So each value that is read tells which pushes of which life
it contains.

``python -m tests.testing.membership --seeds 1000`` runs many, ``--seed 17`` one, with its trace.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np

import kvstore
from kvstore import KVStore
from kvstore.errors import FencedError, KVStoreError, OptionError
from kvstore.protocol.pieces import Cut
from kvstore.testing import Cluster

MODELS = ("sequential", "bounded(0)", "bounded(2)", "eventual")
RANKS, LIVES, PIECES = 7, 5, 3
SIGN = 16.0  # a push of life n adds SIGN ** (n - 1)
LIMIT_S = 1500.0


class Violation(AssertionError):
    """A checker's finding."""


@dataclass(slots=True)
class Life:
    """One process of a rank."""

    rank: int
    number: int
    first: dict[str, int] = field(default_factory=dict)  # by key its first round
    pushed: dict[str, int] = field(default_factory=dict)  # by key its last round that was handed over
    committed: dict[str, int] = field(default_factory=dict)
    ended: bool = False  # in order


@dataclass(slots=True)
class Plan:
    """What a seed decides before the clock starts."""

    seed: int
    model: str
    on_loss: str
    workers: int
    servers: int
    rounds: int
    keys: list[str]
    slow_s: float
    repetition: float
    leaves: dict[int, int]  # rank -> after so many rounds
    events: list[tuple[float, str, int, float]]  # when, what, whose rank, for how long

    @classmethod
    def of(cls, seed: int, model: str | None = None, on_loss: str | None = None) -> Plan:
        rng = random.Random(seed)
        workers = rng.randint(1, 4)
        plan = cls(
            seed,
            model or rng.choice(MODELS),
            on_loss or rng.choice(("wait", "continue")),
            workers,
            rng.randint(1, 3),
            rng.randint(4, 12),
            [f"k{n}" for n in range(rng.randint(1, 3))],
            rng.choice((0.001, 0.02, 0.3)),
            rng.choice((0.0, 0.1)),
            {},
            [],
        )
        if rng.random() < 0.4:
            plan.leaves[rng.randrange(workers)] = rng.randint(0, plan.rounds)
        for _ in range(rng.randint(1, 4)):
            kind = rng.choice(("crash", "crash", "pause", "cut off", "join"))
            plan.events.append((rng.uniform(0.5, 50.0), kind, rng.randrange(workers), rng.uniform(0.2, 12.0)))
        return plan


@dataclass(slots=True)
class Seen:
    """One value that a worker read."""

    life: Life
    key: str
    own: int
    pieces: Any  # (PIECES, RANKS, rounds)


@dataclass(slots=True)
class Run:
    """One seed's run and what was seen in it."""

    plan: Plan
    limit_s: float = LIMIT_S
    seen: list[Seen] = field(default_factory=list)
    lives: list[Life] = field(default_factory=list)
    finals: dict[str, Any] = field(default_factory=dict)
    joined: int = 0
    returned: int = 0
    fenced: int = 0

    def run(self) -> None:
        """Raises Violation, or whatever error a program met."""
        plan = self.plan
        options = {"cluster_consistency": plan.model, "on_worker_loss": plan.on_loss, "timeout": self.limit_s}
        weather = {"delay_s": (0.0001, plan.slow_s), "repetition": plan.repetition}
        with (
            _pieces_of(RANKS * plan.rounds * 4),
            Cluster(plan.workers, plan.servers, seed=plan.seed, **weather, **options) as cluster,
        ):
            for at, kind, rank, seconds in plan.events:
                self._plan_event(cluster, at, kind, rank, seconds)
            cluster.run(lambda kv: self._program(cluster, kv), limit_s=2 * self.limit_s)
            cluster.join(2 * self.limit_s)
        self._check_end()

    def _plan_event(self, cluster: Cluster, at: float, kind: str, rank: int, seconds: float) -> None:
        def restart() -> None:
            if ("worker", rank) in crashed and sum(life.rank == rank for life in self.lives) < LIVES:
                crashed.discard(("worker", rank))
                cluster.start_worker(rank, lambda kv: self._program(cluster, kv))

        def crash() -> None:
            if _done(lambda: cluster.crash("worker", rank)):
                crashed.add(("worker", rank))

        crashed: set[tuple[str, int]] = set()
        if kind == "crash":
            cluster.at(at, crash)
            if self.plan.on_loss == "wait" or seconds < 6:
                cluster.at(at + 4.5 + seconds, restart)
        elif kind == "pause":
            cluster.at(at, lambda: _done(lambda: cluster.pause("worker", rank)))
            cluster.at(at + seconds, lambda: _done(lambda: cluster.resume("worker", rank)))
        elif kind == "cut off":  # from the scheduler only: it goes on to talk to the servers
            cluster.at(at, lambda: cluster.partition([("worker", rank)], [("scheduler", 0)]))
            cluster.at(at + seconds, cluster.heal)
        elif len(self.plan.events) < RANKS - self.plan.workers:
            newcomer = self.plan.workers + self.plan.events.index((at, kind, rank, seconds))
            cluster.at(at, lambda: cluster.start_worker(newcomer, lambda kv: self._program(cluster, kv)))

    # --- what workers do ------------------------------------------------------------------------

    def _program(self, cluster: Cluster, kv: KVStore) -> None:
        plan = self.plan
        life = Life(kv.rank, 1 + sum(life.rank == kv.rank for life in self.lives))
        self.lives.append(life)
        rng = random.Random(f"{plan.seed} {life.rank} {life.number}")
        shape = (PIECES, RANKS, plan.rounds)
        try:
            kv.set_optimizer(kvstore.optim.SGD(lr=1.0))
            kv.init(plan.keys, [np.zeros(shape, np.float32) for _ in plan.keys])
            life.first.update({key: kv.rounds(key) + 1 for key in plan.keys})
            self.joined += life.rank >= plan.workers
            self.returned += life.number > 1
            last = plan.leaves.get(life.rank, plan.rounds) if life.number == 1 else plan.rounds
            for step in range(min(life.first.values()) - 1, last):
                cluster.sleep(rng.choice((0.0, 0.5, 4.0)))
                for key in plan.keys:
                    if kv.rounds(key) == step:
                        self._push(kv, life, key, step + 1, rng)
            if last < plan.rounds:
                kv.leave()
            kv.barrier()
            for key in plan.keys:
                self._look(Seen(life, key, life.pushed.get(key, 0), kv.pull(key).result()), final=True)
            life.ended = True
            kv.close()
        except FencedError:
            self.fenced += 1
            raise _Gone from None

    def _push(self, kv: KVStore, life: Life, key: str, round: int, rng: random.Random) -> None:
        gradient = np.zeros((PIECES, RANKS, self.plan.rounds), np.float32)
        gradient[:, life.rank, round - 1] = -(SIGN ** (life.number - 1))
        life.pushed[key] = round
        if rng.random() < 0.3:
            kv.push(key, gradient).result()
        else:
            value = kv.pushpull(key, gradient, np.empty_like(gradient)).result()
            self._look(Seen(life, key, round, value.copy()))
        life.committed[key] = round

    # --- what must hold --------------------------------------------------------------------------

    def _look(self, seen: Seen, *, final: bool = False) -> None:
        """Check a value when it is read, and keep it for :meth:`_check_end`."""
        lives = _lives(seen.pieces)
        if (lives < 0).any():
            self.fail(seen, "a push is in it more than once")
        for life in self.lives:
            row = lives[:, life.rank] == life.number
            if row[:, life.pushed.get(seen.key, 0) :].any():
                self.fail(seen, f"pushes of worker {life.rank} are in it before they were made")
            if life.number > 1 and life.first:  # of an older life that was fenced
                older = (lives[:, life.rank] > 0) & (lives[:, life.rank] < life.number)
                if older[:, life.first[seen.key] :].any():
                    self.fail(seen, f"pushes of an earlier life of worker {life.rank} are in it, made when it was over")
        first, own = seen.life.first[seen.key], seen.own
        if own >= first and not lives[:, seen.life.rank, first - 1 : own].all():
            self.fail(seen, "its reader's own pushes are not in it")
        if self.plan.model == "sequential" and not final and lives[:, :, own:].any():
            self.fail(seen, f"expected no round after {own}")
        if final:
            self.finals[seen.key] = seen.pieces.copy()
        self.seen.append(seen)

    def _check_end(self) -> None:
        """Now all lives are known."""
        slack = int(self.plan.model[8:-1]) if self.plan.model.startswith("bounded") else 0
        same: dict[tuple[str, int], Any] = {}
        for seen in self.seen:
            lives = _lives(seen.pieces)
            if seen.pieces is self.seen[-1].pieces or self.plan.model != "eventual":
                for life in self.lives:
                    first, last = life.first.get(seen.key, 1), min(life.pushed.get(seen.key, 0), seen.own - slack)
                    if life.ended and not lives[:, life.rank, first - 1 : max(first - 1, last)].all():
                        self.fail(seen, f"expected rounds {first}..{last} of worker {life.rank}")
            if self.plan.model == "sequential" and seen.own < self.plan.rounds:
                until = lives[:, :, : seen.own]
                known = same.setdefault((seen.key, seen.own), until)
                if (known != until).any():
                    self.fail(seen, f"another worker read something else after its round {seen.own}")
        for key, final in self.finals.items():
            lives = _lives(final)
            for life in self.lives:
                if key not in life.first:
                    continue
                sure = slice(life.first[key] - 1, life.pushed.get(key, 0) if life.ended else life.committed.get(key, 0))
                if not lives[:, life.rank, sure].all():
                    self.fail(Seen(life, key, sure.stop, final), "a committed push is lost")
                if life.number == 1 and life.rank >= self.plan.workers and lives[:, life.rank, : sure.start].any():
                    self.fail(Seen(life, key, sure.stop, final), "a joiner counts before it joined")

    def fail(self, seen: Seen, what: str) -> None:
        plan = self.plan
        raise Violation(
            f"seed {plan.seed}, {plan.model}, {plan.on_loss}: worker {seen.life.rank} (life {seen.life.number}) read "
            f"{seen.key} after its round {seen.own}: {what}; it contains pushes of the lives\n{_lives(seen.pieces)}\n"
            f"{self.lives}\nreplay: python -m tests.testing.membership --seed {plan.seed}"
        )


class _Gone(kvstore.testing.world.Crashed):
    """A fenced program ends as one that has crashed."""


def _lives(pieces: Any) -> Any:
    """For each push the life that made it; 0: it is not there, -1: it is not one push."""
    lives = np.full(pieces.shape, -1)
    lives[pieces == 0] = 0
    for number in range(1, LIVES + 1):
        lives[pieces == SIGN ** (number - 1)] = number
    return lives


@contextmanager
def _pieces_of(nbytes: int) -> Iterator[None]:
    """Stores cut values into pieces of that size."""
    with mock.patch.object(Cut, "of", lambda items, itemsize, **_: Cut(items, nbytes // itemsize)):
        yield


def _done(fault: Callable[[], None]) -> bool:
    """Do it to a process that is alive."""
    try:
        fault()
    except OptionError:
        return False
    return True


def main() -> int:
    """Run seeds from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--model")
    parser.add_argument("--on-loss")
    options = parser.parse_args()
    logging.disable(logging.ERROR)
    seeds = [options.seed] if options.seed is not None else range(options.first, options.first + options.seeds)
    failed, began, joined, returned, fenced, seen = 0, time.monotonic(), 0, 0, 0, 0
    for seed in seeds:
        run = Run(Plan.of(seed, options.model, options.on_loss))
        try:
            run.run()
        except (Violation, KVStoreError, AssertionError) as error:
            failed += 1
            print(f"seed {seed}: {type(error).__name__}: {error}", *getattr(error, "__notes__", ()), run.plan, sep="\n")
        joined, returned, fenced = joined + run.joined, returned + run.returned, fenced + run.fenced
        seen += len(run.seen)
    print(
        f"{len(list(seeds))} seeds, {failed} failed, {seen} values seen, {joined} joined, {returned} came back, "
        f"{fenced} fenced, {time.monotonic() - began:.0f} s"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
