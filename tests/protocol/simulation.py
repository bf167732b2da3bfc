"""A whole cluster in simulated time: the real pure cores of workers and servers on a network that misbehaves.

Everything is drawn from one seed, so a failure replays. A "value" is the list of the pushes that
were merged into it, so that a lost, repeated or misordered push can be seen.

``python -m tests.protocol.simulation --seeds 2000`` runs many seeds.
"""

from __future__ import annotations

import argparse
import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kvstore.protocol.messages import Committed, Failed, Fetch, Init, Leave, Message, Push, Spec, Value
from kvstore.protocol.pieces import owner
from kvstore.protocol.requesting import Answered, Refused, Request, Requesting
from kvstore.protocol.serving import Apply, Create, Reply, ReplyAfter, ReplyValue, Serving

MODELS = ("sequential", "bounded(0)", "bounded(2)", "eventual")
TIME_LIMIT_S = 100_000.0
TICK_S = 0.5


class Violation(AssertionError):
    """A promise was broken; the message has the seed."""


@dataclass
class Network:
    """Delays, drops, repeats and reorders."""

    rng: random.Random
    drop: float
    repeat: float
    delay_s_max: float

    def copies(self) -> list[float]:
        """The delays of the copies of one message that arrive."""
        copies = 1 + (self.rng.random() < self.repeat)
        return [self.rng.uniform(0.001, self.delay_s_max) for _ in range(copies) if self.rng.random() >= self.drop]


@dataclass
class Server:
    """A server core, and the arrays it would have: per piece the (rank, round) pushes in their order."""

    serving: Serving
    values: dict[Any, list[tuple[int, int]]] = field(default_factory=dict)

    def receive(self, rank: int, message: Message, payload: object, now: float) -> list[tuple[int, Message, Any]]:
        replies: list[tuple[int, Message, Any]] = []
        for action in self.serving.handle(rank, 1, message, payload, now):
            match action:
                case Create(piece, _, _):
                    self.values[piece] = []
                case Apply(piece, _, payloads, _, _):
                    self.values[piece] = self.values[piece] + list(payloads)  # type: ignore[arg-type]
                case ReplyValue(to, request_id, piece, version, staleness):
                    replies.append((to, Value(request_id, version, staleness), self.values[piece]))
                case ReplyAfter(to, reply, _) | Reply(to, reply):
                    replies.append((to, reply, None))
        return replies


@dataclass
class Operation:
    """One step of a worker's program, with what is outstanding of it."""

    kind: str  # push, pull, pushpull
    key: str
    round: int  # of the key, after this operation
    left: int
    values: dict[int, tuple[Value, list[tuple[int, int]]]] = field(default_factory=dict)


@dataclass
class Worker:
    """A worker core and its program; a blocking pull holds the program up, others go on."""

    rank: int
    core: Requesting
    program: list[tuple[str, str, bool]]  # (kind, key, wait for it)
    rounds: dict[str, int] = field(default_factory=dict)
    next_id: int = 0
    waiting: set[int] = field(default_factory=set)  # ids of the operations that must end first
    operations: dict[int, tuple[Operation, int]] = field(default_factory=dict)  # request -> (operation, piece)
    phase: str = "init"
    done: bool = False


class Simulation:
    """One seed."""

    def __init__(
        self, seed: int, model: str | None = None, serving: type[Serving] = Serving, drop: float = 0.1
    ) -> None:
        rng = random.Random(seed)
        self.seed, self.rng = seed, rng
        self.num_workers, self.num_servers = rng.randint(1, 4), rng.randint(1, 3)
        self.keys = {f"k{n}": rng.randint(1, 3) for n in range(rng.randint(1, 3))}  # pieces of each
        self.models = {key: model or rng.choice(MODELS) for key in self.keys}
        self.network = Network(rng, rng.uniform(0, drop), rng.uniform(0, 0.2), rng.choice([0.01, 0.2, 3.0]))
        self.servers = [Server(serving(self.num_workers, lambda _: None)) for _ in range(self.num_servers)]  # type: ignore[arg-type, return-value]
        self.now, self.events, self.count = 0.0, [], 0  # type: ignore[var-annotated]
        self.pulled: list[tuple[int, Operation]] = []
        # equally many pushes per key and worker, in different orders: sequential needs no less
        steps = [(rng.choice(["push", "pushpull"]), key) for key in self.keys for _ in range(rng.randint(1, 6))]
        self.workers = []
        for rank in range(self.num_workers):
            program = [(kind, key, rng.random() < 0.3) for kind, key in steps]
            for _ in range(rng.randint(0, 6)):
                program.insert(rng.randint(0, len(program)), ("pull", rng.choice(list(self.keys)), rng.random() < 0.5))
            self.workers.append(Worker(rank, Requesting(credit_bytes=200_000), program))

    # --- events -------------------------------------------------------------------------------

    def at(self, delay: float, work: Callable[[], None]) -> None:
        self.count += 1
        heapq.heappush(self.events, (self.now + delay, self.count, work))

    def run(self) -> Simulation:
        for worker in self.workers:
            self.start(worker)
            self.tick(worker)
        while self.events and not all(worker.done for worker in self.workers):
            self.now, _, work = heapq.heappop(self.events)
            if self.now > TIME_LIMIT_S:
                stuck = {
                    w.rank: [r.message for r in list(w.core.open.values())[:3]] for w in self.workers if not w.done
                }
                self.broken(f"no progress: {stuck}")
            work()
        self.check_end()
        return self

    def broken(self, what: str) -> None:
        raise Violation(f"seed {self.seed}: {what}")

    def start(self, worker: Worker) -> None:
        for key, pieces in self.keys.items():
            spec = Spec((pieces,), "int64", 1, "sequential", self.models[key], None)
            for piece in range(pieces):
                payload = () if worker.rank == 0 else None
                self.submit(
                    worker,
                    Operation("init", key, 0, 1),
                    piece,
                    lambda i, k=key, p=piece, s=spec: Init(i, k, p, s),
                    payload,
                )

    def tick(self, worker: Worker) -> None:
        if not worker.done:
            worker.core.tick(self.now)
            self.pump(worker)
            self.at(TICK_S, lambda: self.tick(worker))

    def submit(
        self, worker: Worker, operation: Operation, piece: int, make: Callable[[int], Message], payload: object
    ) -> int:
        worker.next_id += 1
        message = make(worker.next_id)
        worker.operations[worker.next_id] = (operation, piece)
        ordered = operation.kind != "init"
        request = Request(
            owner(operation.key, piece, self.num_servers),
            message,
            payload,
            self.rng.choice([8, 100_000]) if payload is not None else 0,
            self.rng.randint(0, 3),
            (operation.key, piece) if ordered else None,
            operation.kind in ("push", "pushpull"),
            operation.kind in ("pull", "pushpull"),
        )
        worker.core.submit(request, pulls_first=self.models[operation.key] == "sequential")
        return worker.next_id

    def proceed(self, worker: Worker) -> None:
        """Run the program until it has to wait."""
        if worker.phase == "init":
            if worker.operations:
                return
            worker.phase = "run"
        while worker.program and not worker.waiting:
            kind, key, wait = worker.program.pop(0)
            if kind != "pull":
                worker.rounds[key] = worker.rounds.get(key, 0) + 1
            round = worker.rounds.get(key, 0)
            operation = Operation(kind, key, round, self.keys[key])
            for piece in range(self.keys[key]):
                if kind == "pull":

                    def make(i: int, p: int = piece) -> Message:
                        return Fetch(i, key, p, round)
                else:

                    def make(i: int, p: int = piece) -> Message:
                        return Push(i, key, p, round, kind == "pushpull", self.rng.random() < 0.5)

                payload = (worker.rank, round) if kind != "pull" else None
                request = self.submit(worker, operation, piece, make, payload)
                if wait:
                    worker.waiting.add(request)
        if not worker.program and not worker.operations and worker.phase == "run":
            worker.phase = "leave"
            for number in range(self.num_servers):
                worker.next_id += 1
                worker.operations[worker.next_id] = (Operation("leave", "k0", 0, 1), number)
                worker.core.submit(Request(number, Leave(worker.next_id, "")))
        elif worker.phase == "leave" and not worker.operations:
            worker.done = True

    def pump(self, worker: Worker) -> None:
        for number in range(self.num_servers):
            for message, payload in worker.core.outgoing(number, self.now):
                for delay in self.network.copies():
                    self.at(delay, lambda n=number, m=message, p=payload: self.to_server(n, worker.rank, m, p))  # type: ignore[misc]
            in_flight = worker.core.in_flight.get(number, 0)
            if in_flight > worker.core.credit_bytes:
                self.broken(f"{in_flight} bytes in flight, credit is {worker.core.credit_bytes}")

    def to_server(self, number: int, rank: int, message: Message, payload: object) -> None:
        for to, reply, value in self.servers[number].receive(rank, message, payload, self.now):
            for delay in self.network.copies():
                self.at(delay, lambda w=self.workers[to], r=reply, v=value: self.to_worker(w, r, v))  # type: ignore[misc]

    def to_worker(self, worker: Worker, reply: Message, value: Any) -> None:
        outcome = worker.core.reply(reply, value)
        if isinstance(outcome, Refused):
            self.broken(f"worker {worker.rank}: {outcome.error!r}")
        if isinstance(outcome, Answered):
            self.ended(worker, outcome)
        self.proceed(worker)
        self.pump(worker)

    def ended(self, worker: Worker, outcome: Answered) -> None:
        operation, piece = worker.operations.pop(outcome.request.request_id)
        worker.waiting.discard(outcome.request.request_id)
        if isinstance(outcome.reply, Value):
            operation.values[piece] = (outcome.reply, outcome.payload)  # type: ignore[assignment]
            self.check_pull(worker.rank, operation, piece)
        elif operation.kind in ("pull", "pushpull"):
            self.broken(f"a pull was answered with {outcome.reply}")
        elif isinstance(outcome.reply, Failed) or (operation.kind == "push" and type(outcome.reply) is not Committed):
            self.broken(f"a push was answered with {outcome.reply}")

    # --- checks, from the table of the models ---------------------------------------------------

    def check_pull(self, rank: int, operation: Operation, piece: int) -> None:
        reply, value = operation.values[piece]
        key, own, model = operation.key, operation.round, self.models[operation.key]
        where = f"{model}, worker {rank}, {operation.kind} of {key}[{piece}] after round {own}: {value}"
        if len(set(value)) != len(value):
            self.broken(f"a push is in the value twice: {where}")
        missing = [(rank, n) for n in range(1, own + 1) if (rank, n) not in value]
        if missing:
            self.broken(f"its own pushes {missing} are missing: {where}")
        if model == "sequential":
            expected = [(p, n) for n in range(1, own + 1) for p in range(self.num_workers)]
            if value != expected or reply.version != own or reply.staleness:
                self.broken(f"expected {expected}, version {reply.version}, staleness {reply.staleness}: {where}")
        if model.startswith("bounded"):
            bound = int(model[8:-1])
            behind = [(p, n) for p in range(self.num_workers) for n in range(1, own - bound + 1) if (p, n) not in value]
            if behind or reply.staleness > bound:
                self.broken(f"{behind} missing, staleness {reply.staleness}: {where}")

    def check_end(self) -> None:
        """Every push took effect exactly once, each worker's in its order."""
        for key, pieces in self.keys.items():
            for piece in range(pieces):
                value = self.servers[owner(key, piece, self.num_servers)].values[key, piece]
                expected = {(w.rank, n) for w in self.workers for n in range(1, w.rounds.get(key, 0) + 1)}
                if sorted(value) != sorted(expected):
                    self.broken(f"{key}[{piece}] ends as {value}, expected {sorted(expected)}")
                for worker in self.workers:
                    mine = [n for rank, n in value if rank == worker.rank]
                    if mine != sorted(mine):
                        self.broken(f"{key}[{piece}]: worker {worker.rank}'s pushes took effect as {mine}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    args = parser.parse_args()
    for seed in range(args.first, args.first + args.seeds):
        Simulation(seed).run()
    print(f"{args.seeds} seeds from {args.first}: no violation")


if __name__ == "__main__":
    main()
