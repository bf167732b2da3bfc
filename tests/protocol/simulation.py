"""A whole cluster in one thread: the real pure cores, a bad network and a clock that jumps.

What is real: :class:`Requesting` in every worker, :class:`Serving` in every server, the headers. What is
simulated: the network (it delays, drops, repeats and reorders, and its connections break), the clock, and the
arithmetic: the value of a piece is the tuple of its updates, each the tuple of the (rank, round) merged into
it, in their order. So a push that is lost, applied twice or out of turn stays visible for ever. (A piece has one
element here, so that this is what :mod:`tests.protocol.shell` keeps for it.)

A program's calls are of one key or of several; those it makes as bundles or one by one.

Everything follows from the seed. ``python -m tests.protocol.simulation --seed 17`` replays one run,
``--seeds 2000`` runs many.
"""

from __future__ import annotations

import argparse
import heapq
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from kvstore import consistency
from kvstore.consistency import Bounded, Model, Sequential
from kvstore.protocol import messages, wire
from kvstore.protocol.actions import Action, Apply, Create, Reply, ReplyAfter, ReplyValue, Split, Unite
from kvstore.protocol.dividing import Division
from kvstore.protocol.messages import Bind, Done, Fetch, Init, Leave, Message, Push, Spec, Value
from kvstore.protocol.pieces import PieceId, bundle_id, owner
from kvstore.protocol.requesting import CREDIT_FREE_BYTES, Answered, Divide, Outcome, Request, Requesting
from kvstore.protocol.serving import Serving
from kvstore.protocol.wire import Sender
from tests.protocol.shell import Shell

CREDIT_BYTES = 200_000
RESEND_S = 0.5
PATIENCE_S = 0.05
TICK_S = 0.25
FAULTS_S = 40.0  # after this the network is kind, so that everything must end
END_S = 400.0
MODELS = ("sequential", "bounded(0)", "bounded(1)", "bounded(3)", "eventual")

Merged = tuple[tuple[Any, ...], ...]  # a piece's value
Keys = tuple[str, ...]


class Violation(AssertionError):
    """A checker's finding; its text says how to replay it."""


@dataclass(frozen=True, slots=True)
class Op:
    """One call of a worker's program."""

    kind: str  # push, pull, pushpull
    keys: Keys
    together: bool  # as a bundle, if that may be
    sync: bool  # the program goes on when it is done
    priority: int
    pause_s: float


@dataclass(slots=True)
class Asked:
    """What a checker knows of one request."""

    rank: int
    keys: Keys  # one, or those of a bundle
    piece: int
    own: int  # the worker's pushes of the keys before its reply


@dataclass(slots=True)
class Plan:
    """What a seed decides before the clock starts."""

    model: str
    workers: int
    servers: int
    pieces: dict[str, int]
    nbytes: dict[str, int]
    participants: dict[str, tuple[int, ...] | None]
    programs: list[list[Op]]
    drop: float
    repeat: float
    slow: float
    breaks: float

    @classmethod
    def of(cls, rng: random.Random, model: str | None) -> Plan:
        workers, servers = rng.randint(1, 4), rng.choice((1, 1, 2, 3))
        keys = [f"key{i}" for i in range(rng.choice((1, 2, 3, 3, 5)))]
        participants: dict[str, tuple[int, ...] | None] = {}
        for key in keys:
            few = workers > 1 and rng.random() < 0.2
            participants[key] = tuple(sorted(rng.sample(range(workers), rng.randint(1, workers)))) if few else None
        chosen = model or rng.choice(MODELS)
        cut = rng.choice((1, 1, 4))
        pieces = {key: rng.randint(1, cut) for key in keys}
        alike: dict[object, list[str]] = {}  # what can be in a bundle
        for key in keys:
            if pieces[key] == 1:
                alike.setdefault((owner(key, 0, servers), participants[key]), []).append(key)
        calls: list[Keys] = [(key,) for key in keys]
        lists = [
            tuple(rng.sample(some, rng.randint(2, len(some))))
            for some in alike.values()
            if len(some) > 1
            for _ in range(rng.choice((1, 1, 3)))
        ]
        calls += lists * rng.choice((1, 5, 20))
        # A worker that waits inside its program could wait for one that waits for it. Two ways exclude this:
        # all push in one common order (then some may end early), or nobody waits before the end.
        common = [rng.choice(calls) for _ in range(rng.randint(1, 14))]
        in_order = rng.random() < 0.6
        programs = []
        for rank in range(workers):
            order = list(common)
            if in_order and rng.random() < 0.3:
                order = order[: rng.randint(0, len(order))]
            elif not in_order:
                rng.shuffle(order)
            together = rng.choice((0.0, 0.5, 1.0, 1.0, 1.0))
            program: list[Op] = []
            for call in order:
                takes_part = rank in (participants[call[0]] or range(workers))
                kind = rng.choice(("push", "pushpull")) if takes_part else "pull"
                if len(call) > 1 and rng.random() < 0.1:
                    call = tuple(rng.sample(call, len(call)))  # another bundle
                program.append(_op(rng, kind, call, in_order, together))
                while rng.random() < 0.4:
                    program.append(_op(rng, "pull", rng.choice(calls), in_order, together))
            programs.append(program)
        kind_network = rng.random() < 0.15
        return cls(
            model=chosen,
            workers=workers,
            servers=servers,
            pieces=pieces,
            nbytes={key: rng.choice((8, 60_000, 90_000, 150_000, 300_000)) for key in keys},
            participants=participants,
            programs=programs,
            drop=0.0 if kind_network else rng.choice((0.0, 0.05, 0.2)),
            repeat=0.0 if kind_network else rng.choice((0.0, 0.1, 0.3)),
            slow=rng.choice((0.001, 0.05, 0.8)),
            breaks=0.0 if kind_network else rng.choice((0.0, 0.02, 0.1)),
        )


def _op(rng: random.Random, kind: str, keys: Keys, may_wait: bool, together: float) -> Op:
    sync = may_wait and rng.random() < 0.4
    return Op(
        kind,
        keys,
        len(keys) > 1 and rng.random() < together,
        sync,
        rng.choice((0, 0, 1, 5)),
        rng.choice((0.0, 0.0, 0.01, 1.0)),
    )


@dataclass(slots=True, eq=False)
class Call:
    """Requests of one op for one key, or for one bundle, in the order of their keys."""

    op: Op
    keys: Keys
    own: int  # the worker's pushes of these keys, this one included
    token: int  # awaited until it is over


@dataclass(slots=True)
class Worker:
    """A program and the real core that carries it out; requests share channels as in kvstore.cluster.bundles."""

    rank: int
    core: Requesting
    program: list[Op]
    at: int = 0
    rounds: Counter[str] = field(default_factory=Counter)
    awaited: set[int] = field(default_factory=set)  # request ids and tokens before the program goes on
    state: str = "init"  # init, running, ending, leaving, gone
    first_sent: Counter[tuple[str, int]] = field(default_factory=Counter)
    bundled: dict[str, Keys] = field(default_factory=dict)  # by the calls so far
    counted: dict[str, Keys] = field(default_factory=dict)  # by those handed over: the bundle in whose channel a key is
    times: Counter[Keys] = field(default_factory=Counter)  # that a bundle has begun
    bound: dict[Keys, bool] = field(default_factory=dict)  # asked for; and there
    waiting: list[Call] = field(default_factory=list)  # not handed over yet, in program order
    open: dict[int, Call] = field(default_factory=dict)  # by request id, until it is answered as a whole
    on_the_way: dict[int, Keys] = field(default_factory=dict)  # by request id, parts instead of what was divided
    parts: dict[int, Division] = field(default_factory=dict)  # by their request ids
    impatient: set[Hashable] = field(default_factory=set)  # with these channels, soon divided
    left: Counter[int] = field(default_factory=Counter)  # requests of a token that are not answered

    def channel(self, key: str) -> Keys:
        return self.counted.get(key, (key,))

    def name(self, channel: Keys, piece: int = 0) -> tuple[Keys | str, int]:
        """The channel's name among the requests."""
        return (channel, self.times[channel]) if len(channel) > 1 else (channel[0], piece)

    def quiet(self, channel: Keys) -> bool:
        """Is nothing of it on its way?"""
        return not any(set(keys) <= set(channel) for keys in self.on_the_way.values())


def _leave(bundles: dict[str, Keys], keys: Keys) -> None:
    """A bundle ends for all its keys."""
    for key in keys:
        for member in bundles.get(key, ()):
            del bundles[member]


@dataclass(slots=True)
class Server:
    """The real core and the values that a shell would hold."""

    core: Serving
    shell: Shell = field(default_factory=Shell)
    left: set[int] = field(default_factory=set)


class Simulation:
    """One run. ``serving`` and ``requesting`` can be replaced to plant a bug."""

    def __init__(
        self,
        seed: int,
        model: str | None = None,
        *,
        serving: type[Serving] = Serving,
        requesting: type[Requesting] = Requesting,
        performed: Callable[[list[Action]], list[Action]] = lambda actions: actions,
    ) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.plan = Plan.of(self.rng, model)
        self.model: Model = consistency.parse(self.plan.model)
        self.now = 0.0
        self.events = 0
        self.trace: list[str] = []
        self.asked: dict[tuple[int, int], Asked] = {}
        self.pulled: list[tuple[Asked, str, Merged]] = []
        self.moves: Counter[str] = Counter()  # of bundles
        self.divided = 0  # requests
        self._performed = performed
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._order = 0
        self._ids = 0
        self._links: Counter[tuple[int, int]] = Counter()  # (worker, server) -> how often it broke
        self.workers = [
            Worker(rank, requesting(CREDIT_BYTES, RESEND_S), program) for rank, program in enumerate(self.plan.programs)
        ]
        self.servers = [
            Server(serving(self.plan.workers, lambda described: None, f"server {n}"))  # type: ignore[arg-type,return-value]
            for n in range(self.plan.servers)
        ]

    def __repr__(self) -> str:
        return f"<Simulation seed {self.seed}: {self.plan.model}, {self.plan.workers} workers, {self.now:.2f} s>"

    def fail(self, what: str) -> None:
        raise Violation(
            f"seed {self.seed} at {self.now:.3f} s, {self.plan.model}: {what}\n"
            f"replay: python -m tests.protocol.simulation --seed {self.seed} --model '{self.plan.model}'"
        )

    # --- the run --------------------------------------------------------------------------------

    def run(self) -> None:
        """Run to the end and check everything; raises :class:`Violation`."""
        for worker in self.workers:
            self._later(self.rng.random(), lambda w=worker: self._init(w))  # type: ignore[misc]
            self._later(TICK_S, lambda w=worker: self._tick(w))  # type: ignore[misc]
        while any(worker.state != "gone" for worker in self.workers):
            if self.now > END_S or not self._agenda:
                waiting = [
                    f"worker {w.rank} {w.state}: {[str(r.message) for r in w.core.open.values()][:3]}"
                    for w in self.workers
                    if w.state != "gone"
                ]
                self.fail("no progress: " + "; ".join(waiting))
            self.now, _, event = heapq.heappop(self._agenda)
            self.events += 1
            event()
        self._check_end()

    def _later(self, delay: float, event: Callable[[], None]) -> None:
        self._order += 1
        heapq.heappush(self._agenda, (self.now + delay, self._order, event))

    def _note(self, text: str) -> None:
        self.trace.append(f"{self.now:9.3f} {text}")

    # --- a worker -------------------------------------------------------------------------------

    def _spec(self, key: str) -> Spec:
        pieces, participants = self.plan.pieces[key], self.plan.participants[key]
        return Spec((pieces,), "float32", 1, "sequential", self.plan.model, participants)

    def _submit(
        self, worker: Worker, make: Callable[[int], Message], keys: Keys, piece: int, own: int, **kind: Any
    ) -> int:
        self._next_id()
        self.asked[worker.rank, self._ids] = Asked(worker.rank, keys, piece, own)
        server = kind.pop("server", None)
        if server is None:
            server = owner(keys[0], piece, self.plan.servers)
        call = kind.pop("call", None)
        request = Request(server, make(self._ids), **kind)
        if call is not None:
            worker.open[request.request_id] = call
            worker.on_the_way[request.request_id] = keys
        divide = worker.core.submit(request, pulls_first=self.model.pull_before_next_push)
        if divide is not None:
            self._divide(worker, divide)
        return request.request_id

    def _next_id(self) -> int:
        self._ids += 1
        return self._ids

    def _init(self, worker: Worker) -> None:
        for key in self.rng.sample(sorted(self.plan.pieces), len(self.plan.pieces)):
            for piece in range(self.plan.pieces[key]):
                first = worker.rank == 0
                worker.awaited.add(
                    self._submit(
                        worker,
                        lambda i, k=key, p=piece: Init(i, k, p, self._spec(k)),  # type: ignore[misc]
                        (key,),
                        piece,
                        0,
                        payload=((),) if first else None,
                        nbytes=self.plan.nbytes[key] if first else 0,
                    )
                )
        self._pump(worker)

    def _advance(self, worker: Worker) -> None:
        """Go on with the program as far as it does not have to wait."""
        if worker.awaited:
            return
        if worker.state == "init":
            worker.state = "running"
        if worker.state == "running" and worker.at < len(worker.program):
            op = worker.program[worker.at]
            worker.at += 1
            tokens = self._perform_op(worker, op)
            if op.sync:
                worker.awaited |= tokens & worker.left.keys()
            self._later(op.pause_s, lambda: self._advance(worker))
        elif worker.state == "running" and not worker.core.open and not worker.waiting:
            worker.state = "leaving"
            for number in range(self.plan.servers):
                worker.awaited.add(self._submit(worker, lambda i: Leave(i, ""), (), 0, 0, server=number))
        elif worker.state == "leaving":
            worker.state = "gone"
        self._pump(worker)

    def _perform_op(self, worker: Worker, op: Op) -> set[int]:
        """Its requests are handed over as soon as their channels allow it."""
        together = op.together and len({worker.rounds[key] for key in op.keys}) == 1
        if op.kind == "pull":  # it makes no bundle
            together = together and all(worker.bundled.get(key) == op.keys for key in op.keys)
        else:
            _leave(worker.bundled, op.keys)
            worker.bundled.update(dict.fromkeys(op.keys, op.keys) if together else {})
            for key in op.keys:
                worker.rounds[key] += 1
        tokens = set()
        for keys in [op.keys] if together else [(key,) for key in op.keys]:
            self._ids += 1
            call = Call(op, keys, worker.rounds[keys[0]], self._ids)
            worker.waiting.append(call)
            worker.left[call.token] = len(range(self.plan.pieces[keys[0]]))
            tokens.add(call.token)
        self._hand_over(worker)
        return tokens

    def _hand_over(self, worker: Worker) -> None:
        """Submit what need not wait: for an earlier call of its keys, for their channel to be quiet, or for Bind."""
        held_up: set[str] = set()
        for call in list(worker.waiting):
            if held_up.intersection(call.keys) or not self._may_go(worker, call):
                held_up.update(call.keys)
                continue
            worker.waiting.remove(call)
            if call.op.kind != "pull" and {worker.channel(key) for key in call.keys} != {call.keys}:
                _leave(worker.counted, call.keys)
                if len(call.keys) > 1:
                    worker.times[call.keys] += 1
                    worker.counted.update(dict.fromkeys(call.keys, call.keys))
            self._request(worker, call)

    def _may_go(self, worker: Worker, call: Call) -> bool:
        channels = {worker.channel(key) for key in call.keys}
        if call.op.kind == "pull" or channels == {call.keys}:
            return True  # in the channel where its keys are
        if len(call.keys) > 1 and not worker.bound.get(call.keys):
            if call.keys not in worker.bound:
                worker.bound[call.keys] = False
                self._submit(worker, lambda i: Bind(i, bundle_id(call.keys), call.keys), call.keys, 0, 0)
            return False
        for channel in channels:
            if len(channel) > 1 and not worker.quiet(channel):
                self._lose_patience(worker, worker.name(channel))
        return all(worker.quiet(channel) for channel in channels)

    def _lose_patience(self, worker: Worker, channel: Hashable) -> None:
        if channel in worker.impatient:
            return
        worker.impatient.add(channel)
        self._later(PATIENCE_S, lambda: self._divide(worker, worker.core.divide(channel)))

    def _divide(self, worker: Worker, divide: Divide) -> None:
        """Go on with requests for the single keys."""
        for request in divide.requests:
            keys = worker.on_the_way.pop(request.request_id)
            self.divided += len(keys) > 1
            division = Division(request, [(key, (n, n + 1)) for n, key in enumerate(keys)], self._next_id)
            if keys in worker.counted.values() and len(keys) > 1:
                _leave(worker.counted, keys)
            own = self.asked[worker.rank, request.request_id].own
            for key, part in zip(keys, division.parts, strict=True):
                self.asked[worker.rank, part.request_id] = Asked(worker.rank, (key,), 0, own)
                worker.parts[part.request_id] = division
                worker.on_the_way[part.request_id] = (key,)
                assert worker.core.submit(part, pulls_first=self.model.pull_before_next_push) is None
        self._hand_over(worker)
        self._pump(worker)

    def _request(self, worker: Worker, call: Call) -> None:
        op, keys, own = call.op, call.keys, call.own
        pushes, pulls = op.kind != "pull", op.kind != "push"
        nbytes = sum(self.plan.nbytes[key] for key in keys) if pushes else 0
        self._note(f"worker {worker.rank}: {op.kind} {' '.join(keys)} round {own}")
        name = bundle_id(keys) if len(keys) > 1 else keys[0]
        for piece in range(self.plan.pieces[keys[0]]):

            def make(request_id: int, piece: int = piece) -> Message:
                if pushes:
                    return Push(request_id, name, piece, own, pulls, nbytes > CREDIT_FREE_BYTES)
                return Fetch(request_id, name, piece, own)

            self._submit(
                worker,
                make,
                keys,
                piece,
                own,
                call=call,
                payload=((worker.rank, own),) * len(keys) if pushes else None,
                nbytes=nbytes,
                priority=op.priority,
                channel=worker.name(keys if len(keys) > 1 else worker.channel(keys[0]), piece),
                is_push=pushes,
                is_pull=pulls,
            )

    def _tick(self, worker: Worker) -> None:
        if worker.state == "gone":
            return
        worker.core.tick(self.now)
        self._pump(worker)
        self._later(TICK_S, lambda: self._tick(worker))

    def _pump(self, worker: Worker) -> None:
        stirred = worker.core.stirred
        for number in range(self.plan.servers):
            for message, payload in worker.core.outgoing(number, self.now):
                if number not in stirred:
                    self.fail(f"worker {worker.rank}: {message} may go, but server {number} is not among {stirred}")
                self._check_order(worker, message)
                self._travel(worker.rank, number, True, message, payload)
            self._check_credit(worker, number)
        stirred.clear()

    def _answer(self, rank: int, message: Message, payload: Any) -> None:
        worker = self.workers[rank]
        outcome = worker.core.reply(message, payload)
        if isinstance(outcome, Divide):
            self._divide(worker, outcome)
        elif outcome is not None:
            self._conclude(worker, outcome)
        self._pump(worker)
        if worker.state != "gone" and (outcome is not None):
            self._advance_when_paused(worker)

    def _conclude(self, worker: Worker, outcome: Outcome) -> None:
        if not isinstance(outcome, Answered):
            self.fail(f"worker {worker.rank}: {outcome.request.message} failed: {outcome.error}")
            return
        number, reply = outcome.request.request_id, outcome.reply
        if outcome.request.is_pull:
            if not isinstance(reply, Value):
                self.fail(f"worker {worker.rank}: a pull was answered with {reply}")
                return
            self._check_pull(self.asked[worker.rank, number], tuple(outcome.payload), reply)  # type: ignore[arg-type]
        if isinstance(reply, Done) and isinstance(outcome.request.message, Bind):
            worker.bound[self.asked[worker.rank, number].keys] = True
        worker.awaited.discard(number)
        worker.on_the_way.pop(number, None)
        division = worker.parts.pop(number, None)
        if division is not None:
            whole = division.conclude(outcome)
            if whole is not None:
                self._conclude(worker, whole)
        call = worker.open.pop(number, None)
        if call is not None:
            worker.left[call.token] -= 1
            if not worker.left[call.token]:
                del worker.left[call.token]
                worker.awaited.discard(call.token)
        self._hand_over(worker)

    def _advance_when_paused(self, worker: Worker) -> None:
        if not worker.awaited:
            self._later(0.0, lambda: self._advance(worker))

    # --- the network ----------------------------------------------------------------------------

    def _travel(self, rank: int, number: int, up: bool, message: Message, payload: Any) -> None:
        """One message on its way: dropped, delayed, repeated, or cut off when its connection breaks."""
        rng, plan, faulty = self.rng, self.plan, self.now < FAULTS_S
        frames = 0 if payload is None else 1
        sender = Sender(7, 1, rank if up else messages.NOBODY, 1)
        header = wire.encode(sender, [(message, frames)])
        if faulty and rng.random() < plan.breaks:
            self._links[rank, number] += 1
            self._note(f"the connection of worker {rank} to server {number} breaks")
        copies = 2 if faulty and rng.random() < plan.repeat else 1
        link = self._links[rank, number]
        for _ in range(copies):
            if faulty and rng.random() < plan.drop:
                self._note(f"lost on the way, worker {rank} {'>' if up else '<'} server {number}: {message}")
                continue
            delay = 0.0005 + rng.expovariate(1.0 / plan.slow)

            def arrive() -> None:
                if self._links[rank, number] != link:
                    return
                ((came, _),) = wire.decode(header, frames)[1]
                self._note(f"worker {rank} {'>' if up else '<'} server {number}: {came} {payload!r}")
                if up:
                    self._serve(rank, number, came, payload)
                else:
                    self._answer(rank, came, payload)

            self._later(delay, arrive)

    # --- a server -------------------------------------------------------------------------------

    def _serve(self, rank: int, number: int, message: Message, payload: Any) -> None:
        server = self.servers[number]
        actions = server.core.handle(rank, 1, message, payload, self.now)
        if isinstance(message, Leave):
            server.left.add(rank)
        for action in self._performed(actions):
            match action:
                case Create(piece, _, _) if piece in server.shell.stored:
                    self.fail(f"{piece} is created twice")
                case Unite() | Split():
                    self.moves[type(action).__name__] += 1
                case Create() | Apply() | Reply() | ReplyAfter() | ReplyValue():
                    pass
                case _:
                    self.fail(f"an action that nobody asked for: {action}")
            sent = server.shell.perform(action)
            if sent is not None:
                to, reply, value = sent
                if isinstance(reply, Value):
                    self._check_staleness(server, self.asked[to, reply.request_id], reply, value)
                self._travel(to, number, False, reply, value)

    # --- the checkers ---------------------------------------------------------------------------

    def _members(self, key: str) -> list[int]:
        return list(self.plan.participants[key] or range(self.plan.workers))

    def _total(self, rank: int, key: str) -> int:
        return sum(key in op.keys and op.kind != "pull" for op in self.plan.programs[rank])

    def _rounds_of(self, key: str, last: int) -> Merged:
        """What a sequential key holds after ``last`` rounds."""
        return tuple(tuple((p, n) for p in self._members(key) if self._total(p, key) >= n) for n in range(1, last + 1))

    def _check_order(self, worker: Worker, message: Message) -> None:
        if isinstance(message, Push):
            for key in self.asked[worker.rank, message.request_id].keys:
                seen = worker.first_sent[key, message.piece]
                if message.round > seen + 1:
                    self.fail(f"worker {worker.rank} sent {message} after round {seen}")
                worker.first_sent[key, message.piece] = max(seen, message.round)

    def _check_credit(self, worker: Worker, number: int) -> None:
        holders = [r.nbytes for r in worker.core.open.values() if r.holds_credit and r.server == number]
        used = worker.core.in_flight.get(number, 0)
        if used != sum(holders):
            self.fail(f"worker {worker.rank}: credit of {used} bytes is counted, {sum(holders)} are held")
        if used > CREDIT_BYTES and len(holders) > 1:
            self.fail(f"worker {worker.rank}: {used} bytes in flight to server {number}, credit {CREDIT_BYTES}")

    def _check_staleness(self, server: Server, asked: Asked, reply: Value, values: tuple[Merged, ...]) -> None:
        """The number a reply carries is the one that its value shows."""
        rank, told, right = asked.rank, reply.staleness, 0
        for key, value in zip(asked.keys, values, strict=True):
            members = self._members(key)
            merged = Counter(p for update in value for p, _ in update)
            here = [merged[p] for p in members if p not in server.left]  # when all have left, nobody is behind
            if rank in members and here:
                right = max(right, asked.own - min(here))
        exact = not isinstance(self.model, Sequential)  # there, pushes count before they are merged
        if (exact and told != right) or (isinstance(self.model, Bounded) and told > self.model.staleness):
            self.fail(f"pull by worker {rank} of {asked.keys} after round {asked.own}: staleness {told}, it is {right}")
        if not exact and told:
            self.fail(f"pull by worker {rank} of {asked.keys}: staleness {told} in a sequential key")

    def _check_pull(self, asked: Asked, values: tuple[Merged, ...], reply: Value) -> None:
        if min(map(len, values)) != reply.version:
            self.fail(f"{asked}: version {reply.version}, but {list(map(len, values))} updates: {values}")
        for key, value in zip(asked.keys, values, strict=True):
            self._check_value(asked, key, value)

    def _check_value(self, asked: Asked, key: str, value: Merged) -> None:
        own, members = asked.own, self._members(key)
        who = f"pull by worker {asked.rank} of {key!r}[{asked.piece}] after round {own}"
        self.pulled.append((asked, key, value))
        if isinstance(self.model, Sequential):
            expected = self._rounds_of(key, own if asked.rank in members else len(value))
            if value != expected:
                self.fail(f"{who}: expected {expected}, got {value}")
            return
        held = {push for update in value for push in update}
        if asked.rank in members:
            needed = {(asked.rank, n) for n in range(1, own + 1)}
            if isinstance(self.model, Bounded):
                for p in members:
                    last = min(own - self.model.staleness, self._total(p, key))
                    needed |= {(p, n) for n in range(1, last + 1)}
            if not needed <= held:
                self.fail(f"{who}: it misses {sorted(needed - held)}, got {value}")

    def _check_end(self) -> None:
        final: dict[PieceId, Merged] = {}
        for server in self.servers:
            for piece_id in server.core.pieces:
                if isinstance(piece_id[0], str):
                    whole, span = server.core.binding.place_of(piece_id)
                    (final[piece_id],) = server.shell.stored[whole].part(span).value
        for key, pieces in self.plan.pieces.items():
            totals = {p: self._total(p, key) for p in self._members(key)}
            everything = Counter((p, n) for p, total in totals.items() for n in range(1, total + 1))
            for piece in range(pieces):
                value = final[key, piece]
                merged = [push for update in value for push in update]
                if Counter(merged) != everything:
                    lost, twice = everything - Counter(merged), Counter(merged) - everything
                    self.fail(f"{key!r}[{piece}]: lost {sorted(lost)}, too often {sorted(twice)}")
                for p, total in totals.items():
                    if [n for q, n in merged if q == p] != list(range(1, total + 1)):
                        self.fail(f"{key!r}[{piece}]: the pushes of worker {p} are out of order: {merged}")
                if isinstance(self.model, Sequential) and value != self._rounds_of(key, max(totals.values())):
                    self.fail(f"{key!r}[{piece}]: merged in another order: {value}")
                if not isinstance(self.model, Sequential) and any(len(update) != 1 for update in value):
                    self.fail(f"{key!r}[{piece}]: pushes were merged that take effect one by one: {value}")
        for asked, key, value in self.pulled:
            if final[key, asked.piece][: len(value)] != value:
                self.fail(f"{asked}: read {value}, which never was the value")
        for server in self.servers:
            for piece_id, piece in server.core.pieces.items():
                if (
                    piece.held
                    or piece.commits
                    or any(piece.accepted.get(p, 0) != n for p, n in piece.level.rounds.items())
                ):
                    self.fail(f"{piece_id}: left over: held {piece.held}, commits {piece.commits}")
        for worker in self.workers:
            left = worker.open or worker.on_the_way or worker.parts or worker.left
            if left or worker.core.open or any(worker.core.in_flight.values()):
                self.fail(f"worker {worker.rank}: left over: {worker.core}")


def main(arguments: list[str] | None = None) -> int:
    """Run seeds and print what was found."""
    parser = argparse.ArgumentParser(description="simulate clusters with a bad network")
    parser.add_argument("--seeds", type=int, default=20, help="how many seeds")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="replay this seed and print its trace when it fails")
    parser.add_argument("--model", help="one consistency model instead of a random one")
    chosen = parser.parse_args(arguments)
    seeds = range(chosen.first, chosen.first + chosen.seeds) if chosen.seed is None else [chosen.seed]
    started, events, pulls, failed = time.perf_counter(), 0, 0, 0
    by_model: Counter[str] = Counter()
    for seed in seeds:
        simulation = Simulation(seed, chosen.model)
        try:
            simulation.run()
        except Violation as violation:
            failed += 1
            if chosen.seed is not None:
                print(*simulation.trace, sep="\n")
            print(violation)
        events += simulation.events
        pulls += len(simulation.pulled)
        by_model[simulation.plan.model] += 1
    print(
        f"{sum(by_model.values())} seeds, {failed} failed, {events} events, {pulls} pulls checked, "
        f"{time.perf_counter() - started:.1f} s; {dict(sorted(by_model.items()))}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
