"""Whole clusters to which everything happens that may: real stores, servers and scheduler, simulated network and clock.

Messages are lost, come twice and overtake each other, the network breaks, workers crash and come back, join and leave,
servers crash, stop, drain and return. :mod:`tests.testing.plans` says what a seed makes happen,
:mod:`tests.testing.programs` what the workers do meanwhile, :mod:`tests.testing.checkers` what must hold nevertheless.

``python -m tests.testing.mixed --seeds 2000`` runs many seeds, ``--seed 17`` one, and ``--only network`` (``workers``,
``servers``) such faults alone.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import kvstore
from kvstore import KVStore
from kvstore.errors import FencedError
from kvstore.testing import Cluster
from tests.testing.checkers import Checkers, Violation
from tests.testing.faults import Faults
from tests.testing.plans import LIVES, MODELS, PROFILES, Plan
from tests.testing.programs import cut_as, train

LIMIT_S = 1500.0  # for progress, from beginning to end


class Run:
    """One seed's run."""

    def __init__(self, plan: Plan, limit_s: float = LIMIT_S) -> None:
        self.plan = plan
        self.limit_s = limit_s
        self.checkers = Checkers(plan)
        self.done: Counter[str] = Counter()  # what happened
        self.trace: list[str] = []

    def __repr__(self) -> str:
        return f"<Run of {self.plan}>"

    def run(self) -> None:
        """Raises Violation, or whatever error a program met."""
        plan = self.plan
        excused = (FencedError,) if plan.on_loss != "fail" else ()
        with (
            cut_as(plan),
            Cluster(
                plan.workers, plan.servers, seed=plan.seed, replication=plan.replication, loss=plan.loss,
                repetition=plan.repetition, delay_s=(0.0001, plan.slow_s), cluster_consistency=plan.model,
                on_worker_loss=plan.on_loss, timeout=self.limit_s, excused=excused,
            ) as cluster,
        ):  # fmt: skip
            self.trace = cluster.trace
            faults = Faults(cluster, plan, lambda rank: self._start(cluster, rank))
            self.done = faults.done
            faults.begin()
            for rank in range(plan.workers):
                self._start(cluster, rank)
            cluster.join(2 * self.limit_s)
            self.checkers.end()
            self.done["replica compared"] += self.checkers.replicas(cluster, faults.placing)

    def _start(self, cluster: Cluster, rank: int) -> None:
        if sum(life.rank == rank for life in self.checkers.lives) < LIVES:
            cluster.start_worker(rank, lambda kv: self._train(cluster, kv))

    def _train(self, cluster: Cluster, kv: KVStore) -> None:
        life = self.checkers.begin_life(kv.rank)
        if life.number > 1:
            self.done["worker back"] += 1
        try:
            train(self.plan, kv, life, self.checkers.lives, cluster.sleep, self.checkers.look)
        except FencedError:
            self.done["worker fenced"] += 1
            raise


def main(arguments: list[str] | None = None) -> int:
    """Run seeds from the command line, and print what was found."""
    parser = argparse.ArgumentParser(description="simulate clusters in which everything fails that may")
    parser.add_argument("--seeds", type=int, default=100, help="how many seeds")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="replay this seed, with the log")
    parser.add_argument("--only", choices=PROFILES, default="mixed", help="which faults")
    parser.add_argument("--model", choices=MODELS)
    parser.add_argument("--on-loss", choices=("wait", "continue"))
    chosen = parser.parse_args(arguments)
    if chosen.seed is not None:
        logging.basicConfig(level=logging.INFO)
    with _quiet(chosen.seed is None):
        return _run_all(chosen)


@contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    """Within the block, nothing is logged; what a simulated cluster says of its faults is no news."""
    before = logging.root.manager.disable
    if quiet:
        logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _run_all(chosen: argparse.Namespace) -> int:
    seeds = range(chosen.first, chosen.first + chosen.seeds) if chosen.seed is None else [chosen.seed]
    failed, values, began = 0, 0, time.monotonic()
    done: Counter[str] = Counter()
    for seed in seeds:
        run = Run(Plan.of(seed, chosen.only, chosen.model, chosen.on_loss))
        try:
            run.run()
        except (Violation, kvstore.KVStoreError, AssertionError) as error:
            failed += 1
            print(f"seed {seed}: {type(error).__name__}: {error}", run.plan, *run.trace, sep="\n", flush=True)
            print(f"replay: python -m tests.testing.mixed --only {chosen.only} --seed {seed}", flush=True)
        done += run.done
        values += len(run.checkers.seen)
    happened = ", ".join(f"{what} {count}" for what, count in sorted(done.items()))
    print(f"{len(seeds)} seeds, {failed} failed, {values} values seen, {time.monotonic() - began:.0f} s; {happened}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
