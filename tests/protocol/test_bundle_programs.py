"""Nobody can tell bundles from keys: the same program, once with bundles and once key by key, has the same outcome.

Two servers hear the same program. To one a list of keys goes as a bundle, and key by key when the server says so; to
the other as single requests, which is all that this oracle knows. After each step the values, optimizer states and
counts of all keys must agree, and so must what every worker has been told.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import Any

import pytest

from kvstore import consistency
from kvstore.consistency import Sequential
from kvstore.protocol import requesting
from kvstore.protocol.actions import Split, Unite
from kvstore.protocol.dividing import Division
from kvstore.protocol.messages import (
    Accepted,
    Bind,
    Committed,
    Divided,
    Drop,
    Explain,
    Explanation,
    Failed,
    Fetch,
    Init,
    Initialized,
    Leave,
    Message,
    Missing,
    Push,
    ReadState,
    SetHyperparameters,
    SetOptimizer,
    Spec,
    Value,
    WriteState,
)
from kvstore.protocol.pieces import bundle_id
from kvstore.protocol.serving import Serving
from tests.protocol.conversation import Rule
from tests.protocol.shell import Shell

MODELS = ("sequential", "bounded(0)", "bounded(1)", "eventual")
PROGRAMS = 150  # of each model
STEPS = 60
EXPLAIN = 10**9  # a request id
SUB = 100  # request ids of the single requests that a bundle's stands for: its own times this, and more


@dataclass
class Request:
    """What a worker has asked for and not yet got."""

    id: int
    rank: int
    keys: tuple[str, ...]
    round: int
    push: bool
    pull: bool
    bundled: bool
    payloads: tuple[tuple[Any, ...], ...]  # by key
    sent: bool = False  # ever
    division: Division | None = None

    def parts(self) -> list[Message]:
        """What has been asked in place of a bundle's request; else itself."""
        return [self.message()] if self.division is None else [part.message for part in self.division.parts]

    def message(self) -> Message:
        name = bundle_id(self.keys) if self.bundled else self.keys[0]
        if self.push:
            return Push(self.id, name, 0, self.round, self.pull, True)
        return Fetch(self.id, name, 0, self.round)

    def singles(self) -> list[Message]:
        """What the oracle is told instead."""
        if not self.bundled:
            return [self.message()]
        ids = range(self.id * SUB, self.id * SUB + len(self.keys))
        if self.push:
            return [Push(i, key, 0, self.round, self.pull, True) for i, key in zip(ids, self.keys, strict=True)]
        return [Fetch(i, key, 0, self.round) for i, key in zip(ids, self.keys, strict=True)]

    def payload(self) -> tuple[Any, ...]:
        return tuple(symbol for payload in self.payloads for symbol in payload)

    def divide(self, next_id: Callable[[], int], *, taken: bool) -> None:
        """Go on key by key."""
        request = requesting.Request(0, self.message(), self.payload(), is_push=self.push, is_pull=self.pull)
        request.accepted = taken
        ends = list(accumulate(map(len, self.payloads)))
        spans = zip([0, *ends], ends, strict=False)
        self.division = Division(request, list(zip(self.keys, spans, strict=True)), next_id)


@dataclass
class Side:
    """One of the two servers, and what it has told."""

    serving: Serving
    shell: Shell = field(default_factory=Shell)
    told: dict[tuple[int, int], list[tuple[Message, Any]]] = field(default_factory=dict)
    moves: Counter[str] = field(default_factory=Counter)

    def perform(self, actions) -> None:
        for action in actions:
            self.moves[type(action).__name__] += isinstance(action, Unite | Split)
            sent = self.shell.perform(action)
            if sent is not None:
                rank, message, value = sent
                self.told.setdefault((rank, message.request_id), []).append((message, value))

    def say(self, rank: int, incarnation: int, message: Message, payload: Any = None) -> None:
        self.perform(self.serving.handle(rank, incarnation, message, payload, 0.0))

    def stored(self, key: str):
        piece, span = self.serving.binding.place_of((key, 0))
        return self.shell.stored[piece].part(span)

    def heard(self, rank: int, request_id: int, kind: type[Message]) -> bool:
        return any(isinstance(message, kind) for message, _ in self.told.get((rank, request_id), ()))


class Program:
    """A random program, its workers and both servers."""

    def __init__(self, model: str, seed: int) -> None:
        self.rng = rng = random.Random(f"{model} {seed}")
        self.where = f"{model}, seed {seed}"
        self.model = consistency.parse(model)
        self.ranks = list(range(rng.randint(1, 3)))
        names = [f"k{n}" for n in range(rng.randint(2, 5))]
        self.participants = None
        if len(self.ranks) > 1 and rng.random() < 0.2:
            self.participants = tuple(sorted(rng.sample(self.ranks, rng.randint(1, len(self.ranks)))))
        self.specs = {
            key: Spec((items,), "float32", max(1, items), "sequential", model, self.participants)
            for key in names
            for items in (rng.choice((0, 1, 1, 2, 3)),)
        }
        count = rng.randint(1, 4)
        self.lists = [tuple(rng.sample(names, rng.randint(1, len(names)))) for _ in range(count)] + [tuple(names)]
        self.bundled, self.oracle = (Side(Serving(len(self.ranks), Rule.parse, "server")) for _ in range(2))
        self.ids = dict.fromkeys(self.ranks, 0)  # the last one of this life
        self.rounds = {rank: dict.fromkeys(names, 0) for rank in self.ranks}
        self.bound: dict[int, set[tuple[str, ...]]] = {rank: set() for rank in self.ranks}
        self.open: dict[int, list[Request]] = {rank: [] for rank in self.ranks}
        self.closed: list[Request] = []
        self.incarnations = dict.fromkeys(self.ranks, 1)
        self.gone: dict[int, str] = {}
        self.divided = 0
        self.unlikely = rng.choice((0.0, 0.05, 0.25))  # how often something other than a push or pull
        for key in names:
            self.init(key)

    # --- saying the same to both --------------------------------------------------------------

    def next_id(self, rank: int) -> int:
        self.ids[rank] += 1
        return self.ids[rank]

    def both(self, rank: int, message: Message, payload: Any = None) -> None:
        for side in (self.bundled, self.oracle):
            side.say(rank, self.incarnations[rank], message, payload)

    def init(self, key: str) -> None:
        items = self.specs[key].shape[0]
        for rank in self.ranks:
            if rank == 0 or rank not in self.gone:
                first = tuple((f"{key}.{n}",) for n in range(items)) if rank == 0 else None
                self.both(rank, Init(self.next_id(rank), key, 0, self.specs[key]), first)

    def ask(self, request: Request, *, bare: bool = False) -> None:
        """The request, once as it is and once key by key."""
        incarnation, carries = self.incarnations[request.rank], request.push and not bare
        if request.division is None or self.rng.random() < 0.3:  # a late repeat
            self.bundled.say(request.rank, incarnation, request.message(), request.payload() if carries else None)
        if request.division is not None:
            for message, payload in zip(request.parts(), request.payloads, strict=True):
                self.bundled.say(request.rank, incarnation, message, payload if carries else None)
        payloads = request.payloads if request.push else [None] * len(request.keys)
        for message, payload in zip(request.singles(), payloads, strict=True):
            self.oracle.say(request.rank, incarnation, message, payload if carries else None)

    def divide(self) -> None:
        """Whose bundle is split, asks key by key, by which another bundle may be split."""
        while told := next(filter(None, map(self.told_to_divide, self.every_request())), None):
            request, taken = told
            request.divide(lambda rank=request.rank: self.next_id(rank), taken=taken)
            assert request.division is not None
            self.divided += 1
            for part in request.division.parts:
                payload = None if part.accepted or not request.push else part.payload
                self.bundled.say(request.rank, self.incarnations[request.rank], part.message, payload)

    def every_request(self) -> Iterator[Request]:
        return chain.from_iterable(self.open.values())

    def told_to_divide(self, request: Request) -> tuple[Request, bool] | None:
        said = (message for message, _ in self.bundled.told.get((request.rank, request.id), []))
        divided = next((message for message in said if isinstance(message, Divided)), None)
        return None if divided is None or request.division is not None else (request, divided.taken)

    # --- steps --------------------------------------------------------------------------------

    def step(self) -> None:
        here = [rank for rank in self.ranks if rank not in self.gone]
        if not here:
            return
        rank = self.rng.choice(here)
        if self.rng.random() < self.unlikely:
            self.rng.choice(
                (self.optimizer, self.hyperparameters, self.write, self.write, self.read, self.drop, self.leave,
                 self.restart, self.lose)
            )(rank)  # fmt: skip
        elif self.rng.random() < 0.2:
            self.repeat(rank)
        else:
            self.operate(rank)
        self.divide()
        self.compare()

    def operate(self, rank: int) -> None:
        rng = self.rng
        takes_part = rank in (self.participants or self.ranks)
        kind = rng.choice(("push", "pull", "pushpull", "pushpull")) if takes_part else "pull"
        bundled = rng.random() < 0.6
        keys = rng.choice(self.lists) if bundled else (rng.choice(list(self.specs)),)
        rounds = {self.rounds[rank][key] for key in keys}
        if len(rounds) > 1:
            return
        push = kind != "pull"
        if push and any(self.hinders(request, keys) for request in self.open[rank]):
            return
        if bundled and keys not in self.bound[rank]:
            self.bundled.say(rank, self.incarnations[rank], Bind(self.next_id(rank), bundle_id(keys), keys))
            self.bound[rank].add(keys)
        for key in keys:
            self.rounds[rank][key] += push
        round = self.rounds[rank][keys[0]]
        payloads = tuple(tuple((rank, round, f"{key}.{n}") for n in range(self.specs[key].shape[0])) for key in keys)
        request = Request(self.next_id(rank), rank, keys, round, push, kind != "push", bundled, payloads)
        self.open[rank].append(request)
        if rng.random() < 0.9:  # else it is lost on the way, until it is repeated
            request.sent = True
            self.ask(request)

    def hinders(self, request: Request, keys: tuple[str, ...]) -> bool:
        """Must a push of these keys wait for this request?"""
        if not set(keys) & set(request.keys):
            return False
        asked = [request.message()]
        if request.division is not None:
            asked = [part for part in request.parts() if part.key in keys]  # type: ignore[attr-defined]
        if isinstance(self.model, Sequential):
            final = Value if request.pull else Committed
            return not all(self.bundled.heard(request.rank, message.request_id, final) for message in asked)
        return request.push and not all(self.done(request.rank, message.request_id) for message in asked)

    def done(self, rank: int, request_id: int) -> bool:
        """Has the push been committed, as far as the worker knows?"""
        return self.bundled.heard(rank, request_id, Committed) or self.bundled.heard(rank, request_id, Value)

    def repeat(self, rank: int) -> None:
        old = [request for request in self.closed if request.rank == rank]
        asked = self.rng.choice([*self.open[rank], *self.open[rank], *old[-5:], None])
        if asked is None:
            return
        bare = asked.push and self.rng.random() < 0.5
        counted = [self.oracle.serving.pieces[key, 0].accepted.get(rank, 0) for key in asked.keys]
        if bare and not asked.sent and max(counted) >= asked.round:  # an earlier life has made some of it
            bare = False
        if bare and not asked.sent:
            self.ask(asked, bare=True)
            singles = [self.oracle.heard(rank, message.request_id, Missing) for message in asked.singles()]
            assert all(singles)
            said, _ = self.bundled.told[rank, asked.id][-1]
            assert said in (Missing(asked.id), Divided(asked.id, False)), self.where
            asked.sent = said != Missing(asked.id)  # then all of it will be sent, key by key
            if asked.sent:
                for message, payload in zip(asked.singles(), asked.payloads, strict=True):
                    self.oracle.say(rank, self.incarnations[rank], message, payload)
            return
        asked.sent = True
        self.ask(asked, bare=bare)

    def since(self, rank: int) -> dict[str, int]:
        if self.rng.random() < 0.4:
            return {key: self.rng.randint(0, round + 1) for key, round in self.rounds[rank].items()}
        return {key: round for key, round in self.rounds[rank].items() if round}

    def optimizer(self, rank: int) -> None:
        described = {"name": self.rng.choice(("sgd", "sgd", "adam", "lars"))}
        self.both(rank, SetOptimizer(self.next_id(rank), described, self.rng.random() < 0.7, self.since(rank)))

    def hyperparameters(self, rank: int) -> None:
        changes = {"lr": self.rng.choice((0.1, 0.2, 0.3))}
        self.both(rank, SetHyperparameters(self.next_id(rank), changes, self.since(rank)))

    def write(self, rank: int) -> None:
        keys = self.rng.choice(self.lists) if self.rng.random() < 0.5 else (self.rng.choice(list(self.specs)),)
        number, names, dtype = self.next_id(rank), self.rng.choice((("m",), ("m", "v"))), self.rng.choice("fd")
        for key in keys:
            state = tuple(f"state {number} {n}" for n in range(self.specs[key].shape[0]))
            step = self.rng.choice((3, self.bundled.serving.pieces[key, 0].steps))
            self.both(rank, WriteState(self.next_id(rank), key, 0, step, names, (dtype,) * len(names)), state)

    def read(self, rank: int) -> None:
        number = self.next_id(rank)
        self.both(rank, ReadState(number, self.rng.choice(list(self.specs)), 0))
        assert self.bundled.told[rank, number] == self.oracle.told[rank, number], self.where

    def drop(self, rank: int) -> None:
        key = self.rng.choice(list(self.specs))
        if 0 in self.gone or any(key in request.keys for some in self.open.values() for request in some):
            return
        self.both(rank, Drop(self.next_id(rank), key))
        for one in self.ranks:
            self.rounds[one][key] = 0
            self.bound[one] = {keys for keys in self.bound[one] if key not in keys}
        self.closed = [request for request in self.closed if key not in request.keys]
        self.init(key)

    def leave(self, rank: int) -> None:
        if self.rng.random() < 0.5 and not self.open[rank]:
            self.gone[rank] = ""
            self.both(rank, Leave(self.next_id(rank), ""))

    def lose(self, rank: int) -> None:
        if self.rng.random() < 0.5:
            self.gone[rank] = "killed"
            self.open[rank].clear()
            for side in (self.bundled, self.oracle):
                side.perform(side.serving.lost(rank, "killed"))

    def restart(self, rank: int) -> None:
        """A new life goes on from what the server says that it has; its request ids begin anew."""
        self.open[rank].clear()
        self.closed = [request for request in self.closed if request.rank != rank]
        self.bound[rank].clear()
        self.incarnations[rank] += 1
        self.ids[rank] = 0
        for side in (self.bundled, self.oracle):
            side.told = {asked: told for asked, told in side.told.items() if asked[0] != rank}
        for key, spec in self.specs.items():
            number = self.next_id(rank)
            self.both(rank, Init(number, key, 0, spec))
            ((reply, _),) = self.bundled.told[rank, number]
            assert isinstance(reply, Initialized)
            self.rounds[rank][key] = reply.round

    # --- comparing ----------------------------------------------------------------------------

    def compare(self) -> None:
        for key in self.specs:
            assert self.bundled.stored(key) == self.oracle.stored(key), (self.where, key)
            ours, theirs = (side.serving.pieces[key, 0] for side in (self.bundled, self.oracle))
            assert ours.level.same_history(theirs.level), (self.where, key)
            assert ours.accepted == theirs.accepted, (self.where, key)
        for rank in self.ranks:
            answered = [number for one, number in self.bundled.told if one == rank]
            assert max(answered, default=0) <= self.ids[rank], (self.where, "a reply to a former life")
            for request in list(self.open[rank]):
                self.compare_request(request)
            for request in self.closed:
                if request.rank == rank and not request.bundled:
                    assert self.bundled.told[rank, request.id] == self.oracle.told[rank, request.id], self.where
        self.compare_explanations()

    def compare_request(self, request: Request) -> None:
        rank, where = request.rank, (self.where, request)
        singles = [message.request_id for message in request.singles()]
        parts = [message.request_id for message in request.parts()]
        if not request.bundled:
            told = self.bundled.told.get((rank, request.id), [])
            assert told == self.oracle.told.get((rank, request.id), []), where
        outcomes = []
        for side, ids in ((self.bundled, parts), (self.oracle, singles)):
            failed = any(side.heard(rank, number, Failed) for number in ids)
            valued = all(side.heard(rank, number, Value) for number in ids)
            committed = all(side.heard(rank, number, Value) or side.heard(rank, number, Committed) for number in ids)
            outcomes.append("failed" if failed else (valued, committed))
        assert outcomes[0] == outcomes[1], where
        if outcomes[0] == "failed":
            self.close(request)
            return
        valued, committed = outcomes[0]
        if request.push and not committed and request.division is None and self.bundled.told.get((rank, request.id)):
            assert self.bundled.heard(rank, request.id, Accepted) or not request.sent, where
        if valued if request.pull else committed:
            if request.pull:
                assert self.values(self.bundled, rank, parts) == self.values(self.oracle, rank, singles), where
            self.close(request)

    def values(self, side: Side, rank: int, ids: list[int]) -> tuple[int, int, tuple[Any, ...]]:
        """The smallest version, the largest staleness, and the elements that the requests were answered with."""
        answers = [
            next((message, value) for message, value in side.told[rank, number] if isinstance(message, Value))
            for number in ids
        ]
        elements = tuple(element for _, value in answers for element in value)
        return min(m.version for m, _ in answers), max(m.staleness for m, _ in answers), elements

    def close(self, request: Request) -> None:
        self.open[request.rank].remove(request)
        self.closed.append(request)

    def compare_explanations(self) -> None:
        """Who waits for somebody, is told so on both sides."""
        for rank, requests in self.open.items():
            for request in requests:
                ours = self.explained(self.bundled, rank, request.parts())
                theirs = self.explained(self.oracle, rank, request.singles())
                if request.bundled and request.division is None:
                    assert {"no such request" in text for text in theirs} == {"no such request" in ours[0]}, self.where
                else:
                    assert ours == theirs, self.where

    def explained(self, side: Side, rank: int, messages: list[Message]) -> list[str]:
        texts = []
        for message in messages:
            side.say(rank, self.incarnations[rank], Explain(EXPLAIN, message.request_id))
            ((explanation, _),) = side.told.pop((rank, EXPLAIN))
            assert isinstance(explanation, Explanation)
            texts.append(explanation.text)
        return texts


@pytest.mark.parametrize("model", MODELS)
def test_bundles_cannot_be_told_from_keys(model):
    moves: Counter[str] = Counter()
    for seed in range(PROGRAMS):
        program = Program(model, seed)
        for _ in range(STEPS):
            program.step()
        moves += program.bundled.moves
        moves["divided"] += program.divided
    assert moves["Unite"] > PROGRAMS
    assert moves["Split"] > PROGRAMS / 2
    assert moves["divided"] > PROGRAMS
