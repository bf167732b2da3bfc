"""Clusters with replication whose servers crash, stop and are cut off, and their scheduler too: is every push in the
values, once?

The servers, stores and the scheduler are the real ones, in the failure laboratory (:mod:`kvstore.testing`). A value
has one element per push of the whole run, (rank, round); a push adds 1 to its own element. So a push that is lost or
applied twice stays visible for ever, and a pull shows what its model promises.

Servers fail only when every shard has all its replicas in step, and then no more at once than there are replicas; the
scheduler dies at any time, also just before, after and while servers do. ``python -m tests.testing.replicated --seed
17`` replays one run, ``--seeds 1000`` runs many, ``--servers 4 --replication 2`` runs them in such clusters only.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

import kvstore
from kvstore import KVStore
from kvstore.cluster.scheduler import RETURN_S
from kvstore.protocol.placement import Placing
from kvstore.testing import Cluster

MODELS = ("sequential", "bounded(0)", "bounded(2)", "eventual")
ROUNDS = 12
END_S = 900.0
NOTICED_S = 5.0  # until the scheduler knows of a fault, or of none
LOOK_S = 0.05  # how often it is looked whether the next fault may come


class Violation(AssertionError):
    """A checker's finding; its text says how to replay it."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a seed decides before the clock starts."""

    model: str
    workers: int
    servers: int
    replication: int
    keys: tuple[str, ...]
    together: bool  # all keys in one call, so that they travel as bundles
    faults: tuple[str, ...]
    loss: float
    repetition: float
    delay_s: float
    pause_s: float  # of a worker between its rounds
    alone: tuple[float, ...]  # when the scheduler dies, whatever else happens

    @classmethod
    def of(cls, chance: random.Random, size: tuple[int, int] | None) -> Plan:
        """``size``: servers and replication; None: any."""
        bad = chance.random() < 0.7
        servers = chance.choice((2, 2, 3, 4))
        replication = chance.randint(1, min(2, servers - 1))
        if size is not None:
            servers, replication = size
        return cls(
            model=chance.choice(MODELS),
            workers=chance.randint(1, 3),
            servers=servers,
            replication=replication,
            keys=tuple(f"key{i}" for i in range(chance.choice((1, 2, 4)))),
            together=chance.random() < 0.5,
            faults=tuple(chance.choice(("crash", "crash", "pause", "cut")) for _ in range(chance.randint(1, 3))),
            loss=chance.choice((0.0, 0.02, 0.05)) if bad else 0.0,
            repetition=chance.choice((0.0, 0.1)) if bad else 0.0,
            delay_s=chance.choice((0.001, 0.05, 0.3)),
            pause_s=chance.choice((0.0, 0.3, 1.0)),
            alone=tuple(chance.choice(((), (), (chance.uniform(0.0, 1.0),), (chance.uniform(0.0, 60.0),)))),
        )


class Run:
    """One seed."""

    def __init__(self, seed: int, size: tuple[int, int] | None = None) -> None:
        self.seed = seed
        self.chance = random.Random(seed)
        self.plan = plan = Plan.of(self.chance, size)
        self.done: Counter[str] = Counter()  # faults
        self.took_over = 0
        self.pulls = 0
        self._faults = list(plan.faults)
        self._calm_at = 0.0  # nothing is down from here on
        self.cluster = Cluster(
            plan.workers, plan.servers, seed=seed, replication=plan.replication, loss=plan.loss,
            repetition=plan.repetition, delay_s=(0.0005, plan.delay_s), cluster_consistency=plan.model,
            timeout=END_S,
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"<Run of seed {self.seed}: {self.plan}>"

    @property
    def items(self) -> int:
        return self.plan.workers * ROUNDS

    def fail(self, what: str) -> None:
        raise Violation(
            f"seed {self.seed}: {what}\n{self.plan}\nfaults: {self.cluster.trace}\n"
            f"replay: python -m tests.testing.replicated --seed {self.seed}"
        )

    @property
    def placing(self) -> Placing:
        scheduler: Any = self.cluster._daemons["scheduler", 0]
        placing: Placing = scheduler.membership.placing
        return placing

    # --- the run ------------------------------------------------------------------------------

    def run(self) -> None:
        """Run to the end and check everything; raises :class:`Violation`."""
        with self.cluster as cluster:
            cluster.at(0.5 + self.chance.random(), self._next_fault)
            for at in self.plan.alone:
                cluster.at(at, self._crash_scheduler)
            finals = cluster.run(self._train, limit_s=END_S)
            for values in finals:
                for key, value in zip(self.plan.keys, values, strict=True):
                    if not (value == 1).all():
                        self.fail(f"{key}: at the end {value}")
            self._check_replicas()

    def _train(self, kv: KVStore) -> list[Any]:
        plan = self.plan
        keys = list(plan.keys)
        kv.init(keys, [np.zeros(self.items, np.int64) for _ in keys])
        kv.set_optimizer(kvstore.optim.Accumulate())
        for round in range(1, ROUNDS + 1):
            push = np.zeros(self.items, np.int64)
            push[kv.rank * ROUNDS + round - 1] = 1
            if plan.together:
                got = kv.pushpull(keys, [push.copy() for _ in keys]).result()
            else:
                got = [handle.result() for handle in [kv.pushpull(key, push.copy()) for key in keys]]
            for key, value in zip(keys, got, strict=True):
                self._check(key, kv.rank, round, value)
            if plan.pause_s:
                self.cluster.sleep(plan.pause_s)
        kv.barrier()
        return [kv.pull(key).result() for key in keys]

    # --- faults -------------------------------------------------------------------------------

    def _next_fault(self) -> None:
        cluster, chance = self.cluster, self.chance
        if not self._faults:
            return
        placing = self.placing
        calm = placing.shards and all(placing.settled(number) for number in range(self.plan.servers))
        if not calm or cluster.now < self._calm_at or not self._scheduled:
            cluster.at(cluster.now + LOOK_S, self._next_fault)
            return
        self._fault(self._faults.pop())
        if chance.random() < 0.5:
            cluster.at(cluster.now + chance.choice((0.0, 0.3, 1.0, 4.0, 8.0, 12.0)), self._crash_scheduler)
        cluster.at(self._calm_at + chance.choice((0.2, 3.0, 10.0)), self._next_fault)

    @property
    def _scheduled(self) -> bool:
        """Is there a scheduler?"""
        return self.cluster._processes["scheduler", 0].alive

    def _crash_scheduler(self) -> None:
        if not self._scheduled:
            return
        self.done["scheduler"] += 1
        self.cluster.crash("scheduler")
        length = self.chance.choice((0.2, 2.0, 6.0, 20.0))
        back = self.cluster.now + length
        self._calm_at = max(self._calm_at, back + RETURN_S + NOTICED_S)
        self.cluster.at(back, lambda: self.cluster.restart("scheduler"))

    def _fault(self, fault: str) -> None:
        """Servers fail now."""
        cluster, chance = self.cluster, self.chance
        self.done[fault] += 1
        length = chance.choice((2.0, 4.0, 8.0))
        self._calm_at = max(self._calm_at, cluster.now + max(NOTICED_S, length))
        for server in chance.sample(range(self.plan.servers), chance.randint(1, self.plan.replication)):
            self._strike(fault, server, length)

    def _strike(self, fault: str, server: int, length: float) -> None:
        cluster, chance = self.cluster, self.chance
        if fault == "crash":
            cluster.crash("server", server)
            cluster.at(cluster.now + length, lambda: self._restart(server))
        elif fault == "pause":
            cluster.pause("server", server)
            cluster.at(cluster.now + length, lambda: self._resume(server))
        else:
            members = [*(("server", n) for n in range(self.plan.servers)), ("scheduler", 0)]
            others = [member for member in members if member != ("server", server)]
            cluster.partition([("server", server)], chance.sample(others, chance.randint(1, len(others))))
            cluster.at(cluster.now + length, lambda: self._heal(server))

    def _resume(self, server: int) -> None:
        self.cluster.resume("server", server)
        self.cluster.at(self.cluster.now + 15.0, lambda: self._begin_again(server))

    def _heal(self, server: int) -> None:
        self.cluster.heal()
        self.cluster.at(self.cluster.now + 15.0, lambda: self._begin_again(server))

    def _begin_again(self, server: int) -> None:
        """A server that lost its place has stepped back by now; its supervisor starts it again."""
        if not self._scheduled:
            self.cluster.at(self.cluster.now + LOOK_S, lambda: self._begin_again(server))
            return
        daemon: Any = self.cluster._daemons["server", server]
        placed = self.placing
        if server not in placed.servers:
            if any(not shard._closed for shard in daemon.shards.values()) and placed.awaits(server):
                self.done["did not step back"] += 1
            self._restart(server)
            self._calm_at = max(self._calm_at, self.cluster.now + NOTICED_S)

    def _restart(self, server: int) -> None:
        if self.cluster._processes["server", server].alive:
            self.cluster.crash("server", server)
        self.cluster.restart("server", server)

    # --- the checkers -------------------------------------------------------------------------

    def _check(self, key: str, rank: int, round: int, value: Any) -> None:
        self.pulls += 1
        counts = value.reshape(self.plan.workers, ROUNDS)
        who = f"worker {rank} after its round {round} of {key}"
        if counts.max() > 1:
            self.fail(f"{who}: a push is in it twice: {counts.tolist()}")
        if (np.diff(counts, axis=1) > 0).any():
            self.fail(f"{who}: a push without the one before: {counts.tolist()}")
        seen = counts.sum(axis=1)
        if seen[rank] < round:
            self.fail(f"{who}: its own pushes are missing: {seen}")
        if self.plan.model == "sequential" and (seen != round).any():
            self.fail(f"{who}: not the value of this round: {seen}")
        if self.plan.model.startswith("bounded"):
            slack = int(self.plan.model[len("bounded(") : -1])
            if (seen < round - slack).any():
                self.fail(f"{who}: too old: {seen}")

    def _check_replicas(self) -> None:
        """Where a replica is in step it holds what its primary holds, once all entries have come."""
        if not self._scheduled:
            return
        daemons: Any = self.cluster._daemons
        for number, placed in enumerate(self.placing.shards):
            for replica in placed.replicas:
                one = daemons["server", placed.primary].shards.get(number)
                other = daemons["server", replica.server].shards.get(number)
                if one is None or other is None or not (replica.in_step and other.is_replica):
                    continue
                if one._stream is not None and one._stream.log.over:
                    self._compare(number, one, other)

    def _compare(self, number: int, one: Any, other: Any) -> None:
        pieces = [sorted(str(piece) for piece, _ in shard.serving.counted()) for shard in (one, other)]
        if pieces[0] != pieces[1]:
            self.fail(f"shard {number}: the primary has {pieces[0]}, its replica {pieces[1]}")
        for piece, counted in one.serving.counted():
            value, copy = one._work.stored[piece].value, other._work.stored[piece].value
            if not (value == copy).all():
                self.fail(f"shard {number}, {piece}: {value} and {copy}")
            if not counted.same_history(other.serving.pieces[piece]):
                self.fail(f"shard {number}, {piece}: {counted} and {other.serving.pieces[piece]}")
        self.done["replicas compared"] += 1


def main(arguments: list[str] | None = None) -> int:
    """Run seeds and print what was found."""
    parser = argparse.ArgumentParser(description="simulate clusters whose servers fail")
    parser.add_argument("--seeds", type=int, default=20, help="how many seeds")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="replay this seed, with the log")
    parser.add_argument("--servers", type=int, help="how many servers each cluster has")
    parser.add_argument("--replication", type=int, default=1, help="and how many replicas a shard has then")
    chosen = parser.parse_args(arguments)
    if chosen.seed is not None:
        logging.basicConfig(level=logging.INFO)
    seeds = range(chosen.first, chosen.first + chosen.seeds) if chosen.seed is None else [chosen.seed]
    started, failed, pulls = time.perf_counter(), 0, 0
    done: Counter[str] = Counter()
    for seed in seeds:
        run = Run(seed, None if chosen.servers is None else (chosen.servers, chosen.replication))
        try:
            run.run()
        except Exception as error:
            failed += 1
            print(f"seed {seed}: {type(error).__name__}: {error}\n{run.plan}\n{run.cluster.trace}")
        done += run.done
        pulls += run.pulls
    seconds = time.perf_counter() - started
    print(f"{len(seeds)} seeds, {failed} failed, {pulls} pulls checked, {seconds:.1f} s; {dict(sorted(done.items()))}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
