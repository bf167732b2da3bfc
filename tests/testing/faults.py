"""Whole clusters under random faults: stores, servers and scheduler as they are, and checkers that look at every value.

A worker's n-th push of a key adds 1 to an element of its own, by SGD. So every value
that is ever read tells which pushes it contains, and how often: a push that is lost, applied twice, or
seen too early or too late shows at once.

``python -m tests.testing.faults --seeds 2000`` runs many, ``--seed 17`` one, with its trace.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import kvstore
from kvstore import KVStore
from kvstore.testing import Cluster

MODELS = ("sequential", "bounded(0)", "bounded(2)", "eventual")
FAULTS_S = 60.0  # after this nothing bad happens any more
LIMIT_S = 3000.0


class Violation(AssertionError):
    """A checker's finding."""


@dataclass(slots=True)
class Plan:
    """What a seed decides before the clock starts."""

    seed: int
    model: str
    workers: int
    servers: int
    rounds: int
    keys: list[str]
    loss: float
    repetition: float
    slow_s: float
    faults: list[tuple[float, str, tuple[Any, ...]]]  # when, what, to whom

    @classmethod
    def of(cls, seed: int, model: str | None = None) -> Plan:
        rng = random.Random(seed)
        workers, servers = rng.randint(1, 4), rng.randint(1, 3)
        plan = cls(
            seed,
            model or rng.choice(MODELS),
            workers,
            servers,
            rng.randint(3, 12),
            [f"k{n}" for n in range(rng.randint(1, 4))],
            rng.choice((0.0, 0.02, 0.1)),
            rng.choice((0.0, 0.1)),
            rng.choice((0.001, 0.02, 0.3)),
            [],
        )
        for _ in range(rng.randint(0, 3)):
            plan.faults.append(plan._fault(rng))
        return plan

    def _fault(self, rng: random.Random) -> tuple[float, str, tuple[Any, ...]]:
        at = rng.uniform(1.0, FAULTS_S)
        role, rank = rng.choice((("worker", self.workers), ("server", self.servers)))
        short = rng.uniform(0.05, 2.0)  # no reason to give anybody up
        kind = rng.choice(("pause", "partition"))
        if kind == "pause":
            return at, "pause", (role, rng.randrange(rank), short)
        return (
            at,
            "partition",
            (("worker", rng.randrange(self.workers)), ("server", rng.randrange(self.servers)), short),
        )


@dataclass(slots=True)
class Seen:
    """One value that a worker read."""

    rank: int
    key: str
    own: int  # its own rounds of the key before
    counts: Any  # (workers, rounds): how often each push is in it


@dataclass(slots=True)
class Run:
    """One seed's run and what was seen in it."""

    plan: Plan
    limit_s: float = LIMIT_S
    seen: list[Seen] = field(default_factory=list)
    begun: dict[tuple[str, int], int] = field(default_factory=dict)  # (key, rank) -> rounds handed over
    committed: dict[tuple[str, int], int] = field(default_factory=dict)

    def run(self) -> None:
        """Raises Violation, or whatever error a program met."""
        plan = self.plan
        with Cluster(
            plan.workers,
            plan.servers,
            seed=plan.seed,
            loss=plan.loss,
            repetition=plan.repetition,
            delay_s=(0.0001, plan.slow_s),
            cluster_consistency=plan.model,
            timeout=self.limit_s,
        ) as cluster:
            for at, kind, arguments in plan.faults:
                self._plan_fault(cluster, at, kind, arguments)
            cluster.at(FAULTS_S, cluster.kind)
            finals = cluster.run(lambda kv: self._program(cluster, kv), limit_s=2 * self.limit_s)
        self._check_end(finals)

    def _plan_fault(self, cluster: Cluster, at: float, kind: str, arguments: tuple[Any, ...]) -> None:
        if kind == "pause":
            role, rank, seconds = arguments
            cluster.at(at, lambda: _if_alive(cluster.pause, role, rank))
            cluster.at(at + seconds, lambda: _if_alive(cluster.resume, role, rank))
        else:
            one, other, seconds = arguments
            cluster.at(at, lambda: cluster.partition([one], [other]))
            cluster.at(at + seconds, cluster.heal)

    # --- what workers do ------------------------------------------------------------------------

    def _program(self, cluster: Cluster, kv: KVStore) -> dict[str, Any]:
        plan, rng = self.plan, random.Random(f"{self.plan.seed} {kv.rank}")
        shape = (plan.workers, plan.rounds)
        kv.set_optimizer(kvstore.optim.SGD(lr=1.0))
        kv.init(plan.keys, [np.zeros(shape, np.float32) for _ in plan.keys])
        for round in range(plan.rounds):
            gradient = np.zeros(shape, np.float32)
            gradient[kv.rank, round] = -1
            cluster.sleep(rng.choice((0.0, 0.5, 8.0)))
            together = rng.random() < 0.5
            for keys in [plan.keys] if together else [[key] for key in plan.keys]:
                self._step(kv, keys, gradient, round + 1, rng)
        kv.barrier()
        return {key: kv.pull(key).result() for key in plan.keys}

    def _step(self, kv: KVStore, keys: list[str], gradient: Any, round: int, rng: random.Random) -> None:
        for key in keys:
            self.begun[key, kv.rank] = round
        how = rng.choice(("push", "pushpull", "push and pull"))
        values: list[Any] = []
        if how == "pushpull":
            values = kv.pushpull(keys, [gradient] * len(keys), [np.empty_like(gradient) for _ in keys]).result()
        else:
            pushed = kv.push(keys, [gradient] * len(keys))
            if how == "push and pull":
                values = kv.pull(keys).result()
            if rng.random() < 0.5 and how == "push":
                pushed.result()
                for key in keys:
                    self.committed[key, kv.rank] = round
        for key, value in zip(keys, values, strict=False):
            self._look(Seen(kv.rank, key, round, value.copy()))

    # --- what must hold --------------------------------------------------------------------------

    def _look(self, seen: Seen) -> None:
        """Check a value when it is read, and keep it for :meth:`_check_end`."""
        counts, model = seen.counts, self.plan.model
        if not ((counts == 0) | (counts == 1)).all():
            self.fail(seen, "a push is in it more than once")
        rounds = counts.sum(axis=1).astype(int)
        for rank, n in enumerate(rounds):
            if not counts[rank, :n].all():
                self.fail(seen, f"worker {rank}'s pushes are in it out of their order")
            if n > self.begun.get((seen.key, rank), 0):
                self.fail(seen, f"worker {rank}'s pushes are in it before they were made")
        if rounds[seen.rank] < seen.own:
            self.fail(seen, "its reader's own pushes are not in it")
        if model == "sequential" and (rounds != seen.own).any():
            self.fail(seen, f"expected {seen.own} rounds of everybody")
        if model.startswith("bounded"):
            slack = int(model[8:-1])
            if rounds.min() < seen.own - slack:
                self.fail(seen, f"expected at least {seen.own - slack} rounds of everybody")
        self.seen.append(seen)

    def _check_end(self, finals: list[Any]) -> None:
        for rank, values in enumerate(finals):
            for key, value in values.items():
                if not (value == 1).all():
                    self.fail(Seen(rank, key, self.plan.rounds, value), "expected every push, once, after the barrier")

    def fail(self, seen: Seen, what: str) -> None:
        raise Violation(
            f"seed {self.plan.seed}, {self.plan.model}: worker {seen.rank} read {seen.key} after its round {seen.own}: "
            f"{what}; it contains\n{seen.counts.astype(int)}\n"
            f"replay: python -m tests.testing.faults --seed {self.plan.seed}"
        )


def _if_alive(fault: Callable[..., None], *arguments: Any) -> None:
    with contextlib.suppress(kvstore.errors.OptionError):  # it has ended already
        fault(*arguments)


def main() -> int:
    """Run seeds from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--model")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    seeds = [options.seed] if options.seed is not None else range(options.first, options.first + options.seeds)
    failed, began = 0, time.monotonic()
    for seed in seeds:
        run = Run(Plan.of(seed, options.model))
        try:
            run.run()
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            failed += 1
            print(
                f"seed {seed}: {run.plan}\n{type(error).__name__}: {error}", *getattr(error, "__notes__", ()), sep="\n"
            )
        else:
            if options.seed is not None:
                print(run.plan, f"{len(run.seen)} values seen", sep="\n")
    print(f"{len(list(seeds))} seeds, {failed} failed, {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
