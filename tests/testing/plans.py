"""What a seed decides before the clock starts: who trains what, how bad the network is, and what happens to whom.

A *profile* says which faults there are: ``network`` (nobody dies), ``workers``, ``servers``, or ``mixed``: all of
them at once, and the scheduler's.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

MODELS = ("sequential", "bounded(0)", "bounded(2)", "eventual")
PROFILES = ("mixed", "network", "workers", "servers")
RANKS = 8  # of workers, with those who join
LIVES = 5  # of one rank
FAULTS_S = 60.0  # from here on nothing bad begins, and the network is kind

Member = tuple[str, int]  # a role and a rank


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that happens to one process, or between it and others.

    ``kind``: ``crash`` and ``drain`` (it is started again after ``seconds``, a worker perhaps never), ``pause``,
    ``cut`` (from the ``others``), ``join`` (a worker that is new).
    """

    at: float
    kind: str
    role: str
    rank: int
    seconds: float
    others: tuple[Member, ...] = ()
    also: tuple[int, ...] = ()  # to more servers at the same time

    @property
    def each(self) -> list[Fault]:
        """One by one."""
        return [replace(self, rank=rank, also=()) for rank in (self.rank, *self.also)]

    @property
    def who(self) -> Member:
        return self.role, self.rank

    @property
    def deadly(self) -> bool:
        """May a server lose its place by it?"""
        return self.role == "scheduler" or (
            self.role == "server" and (self.kind in ("crash", "drain") or self.seconds >= 2.0)
        )


@dataclass(slots=True)
class Plan:
    """One seed's."""

    seed: int
    profile: str
    model: str
    on_loss: str
    workers: int
    servers: int
    replication: int
    rounds: int
    keys: list[str]
    pieces: int  # of every value
    together: bool  # all keys in one call: small ones travel as bundles
    loss: float
    repetition: float
    slow_s: float
    leaves: dict[int, int]  # rank -> after so many rounds
    faults: list[Fault]

    @classmethod
    def of(cls, seed: int, profile: str = "mixed", model: str | None = None, on_loss: str | None = None) -> Plan:
        rng = random.Random(f"{profile} {seed}")
        servers = rng.choice((2, 2, 3, 4)) if profile in ("mixed", "servers") else rng.randint(1, 3)
        replication = rng.randint(1, min(2, servers - 1)) if profile in ("mixed", "servers") else 0
        losing = profile in ("mixed", "workers")
        plan = cls(
            seed,
            profile,
            model or rng.choice(MODELS),
            on_loss or (rng.choice(("wait", "continue")) if losing else "fail"),
            rng.randint(1, 4),
            servers,
            replication,
            rng.randint(4, 12),
            [f"k{n}" for n in range(rng.randint(1, 3))],
            rng.choice((1, 3)),
            rng.random() < 0.5,
            rng.choice((0.0, 0.02, 0.1)) if profile != "mixed" else 0.1,
            rng.choice((0.0, 0.1)) if profile != "mixed" else 0.1,
            rng.choice((0.001, 0.02, 0.3)),
            {},
            [],
        )
        if losing and rng.random() < 0.4:
            plan.leaves[rng.randrange(plan.workers)] = rng.randint(0, plan.rounds)
        if profile in ("mixed", "network"):
            plan.faults += [plan._of_network(rng) for _ in range(rng.randint(0, 3))]
        if losing:
            plan.faults += [plan._of_worker(rng, n) for n in range(rng.randint(profile == "workers", 4))]
        if replication:
            plan.faults += [plan._of_server(rng) for _ in range(rng.randint(1, 3))]
        if profile == "mixed":
            plan.faults += [plan._of_scheduler(rng) for _ in range(rng.randint(0, 2))]
        plan.faults.sort(key=lambda fault: fault.at)
        return plan

    def _of_network(self, rng: random.Random) -> Fault:
        """Too short for anybody to be given up."""
        at, seconds = rng.uniform(1.0, FAULTS_S), rng.uniform(0.05, 1.9)
        worker, server = rng.randrange(self.workers), rng.randrange(self.servers)
        if rng.random() < 0.5:
            return Fault(at, "cut", "worker", worker, seconds, (("server", server),))
        return Fault(at, "pause", *rng.choice((("worker", worker), ("server", server))), seconds)

    def _of_worker(self, rng: random.Random, number: int) -> Fault:
        at, seconds = rng.uniform(0.5, 50.0), rng.uniform(0.2, 12.0)
        kind = rng.choice(("crash", "crash", "pause", "cut", "join"))
        rank = rng.randrange(self.workers)
        if kind == "join":
            return Fault(at, kind, "worker", self.workers + number, 0.0)
        if kind == "crash" and self.on_loss == "continue" and rng.random() < 0.5:
            return Fault(at, kind, "worker", rank, float("inf"))
        others = (("scheduler", 0),) if kind == "cut" else ()  # it goes on to talk to the servers
        return Fault(at, kind, "worker", rank, seconds, others)

    def _of_scheduler(self, rng: random.Random) -> Fault:
        return Fault(
            rng.uniform(0.5, 50.0), rng.choice(("crash", "crash", "pause")), "scheduler", 0, rng.uniform(0.2, 8.0)
        )

    def _of_server(self, rng: random.Random) -> Fault:
        at, seconds = rng.uniform(0.5, 40.0), rng.choice((2.0, 4.0, 8.0))
        kind = rng.choice(("crash", "crash", "pause", "cut", "drain"))
        rank, *also = rng.sample(range(self.servers), rng.randint(1, self.replication))
        others = [("scheduler", 0), *(("server", n) for n in range(self.servers) if n not in (rank, *also))]
        cut = tuple(rng.sample(others, rng.randint(1, len(others)))) if kind == "cut" else ()
        return Fault(at, kind, "server", rank, seconds, cut, tuple(also))
