"""Nobody can tell bundles from keys: the same program, once with bundles and once key by key, has the same outcome.

Two servers hear the same program. To one a list of keys goes as a bundle, to the other as so many single requests,
which is all that this oracle knows. After each step the values, optimizer states and counts of all keys must agree,
and so must what every worker has been told.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest

from kvstore import consistency
from kvstore.consistency import Pull, Sequential
from kvstore.protocol.messages import (
    Accepted,
    Bind,
    Committed,
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
from kvstore.protocol.serving import Serving, Split, Unite
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
        piece, span = self.serving._place_of((key, 0))
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
        self.bundled.say(request.rank, incarnation, request.message(), request.payload() if carries else None)
        payloads = request.payloads if request.push else [None] * len(request.keys)
        for message, payload in zip(request.singles(), payloads, strict=True):
            self.oracle.say(request.rank, incarnation, message, payload if carries else None)

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
        if isinstance(self.model, Sequential):
            return True
        return request.push and not self.bundled.heard(request.rank, request.id, Committed)

    def repeat(self, rank: int) -> None:
        old = [request for request in self.closed if request.rank == rank]
        asked = self.rng.choice([*self.open[rank], *self.open[rank], *old[-5:], None])
        if asked is None:
            return
        bare = asked.push and self.rng.random() < 0.5
        if bare and not asked.sent:
            self.ask(asked, bare=True)
            singles = [self.oracle.heard(rank, message.request_id, Missing) for message in asked.singles()]
            assert all(singles)
            assert self.bundled.heard(rank, asked.id, Missing), self.where
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
        ids = [message.request_id for message in request.singles()]
        if not request.bundled:
            told = self.bundled.told.get((rank, request.id), [])
            assert told == self.oracle.told.get((rank, request.id), []), where
        failed = any(self.oracle.heard(rank, number, Failed) for number in ids)
        assert self.bundled.heard(rank, request.id, Failed) == failed, where
        if failed:
            self.close(request)
            return
        valued = all(self.oracle.heard(rank, number, Value) for number in ids)
        committed = all(
            self.oracle.heard(rank, number, Committed) or self.oracle.heard(rank, number, Value) for number in ids
        )
        assert self.bundled.heard(rank, request.id, Value) == valued, where
        told = self.bundled.heard(rank, request.id, Committed)
        assert (told or valued) == committed, where
        if request.push and not committed and self.bundled.told.get((rank, request.id)):
            assert self.bundled.heard(rank, request.id, Accepted) or not request.sent, where
        if valued if request.pull else committed:
            if request.pull and request.bundled:
                self.compare_value(request)
            self.close(request)

    def close(self, request: Request) -> None:
        self.open[request.rank].remove(request)
        self.closed.append(request)

    def compare_value(self, request: Request) -> None:
        """What the bundle's pull got is what single pulls get at this moment; sequential ones got it before, too."""
        ((reply, value),) = [
            (message, value)
            for message, value in self.bundled.told[request.rank, request.id]
            if isinstance(message, Value)
        ]
        pull = Pull("now", ((request.rank, request.round),))
        answers = [self.oracle.serving.pieces[key, 0].level.answer(pull) for key in request.keys]
        version, staleness = min(a.version for a in answers), max(a.staleness for a in answers)
        assert reply == Value(request.id, version, staleness), (self.where, request)
        assert value == tuple(element for key in request.keys for element in self.oracle.stored(key).value)
        member = request.rank in (self.participants or self.ranks)
        if isinstance(self.model, Sequential) and member:
            got = [self.oracle.told[request.rank, message.request_id][-1] for message in request.singles()]
            assert value == tuple(element for _, some in got for element in some), (self.where, request)

    def compare_explanations(self) -> None:
        """Who waits for somebody, is told so on both sides."""
        for rank, requests in self.open.items():
            for request in requests:
                number = EXPLAIN
                self.bundled.say(rank, self.incarnations[rank], Explain(number, request.id))
                ((explained, _),) = self.bundled.told.pop((rank, number))
                assert isinstance(explained, Explanation)
                waits = "no such request" not in explained.text
                explanations = []
                for message in request.singles():
                    self.oracle.say(rank, self.incarnations[rank], Explain(number, message.request_id))
                    explanations.append(self.oracle.told.pop((rank, number))[0][0].text)
                assert waits == any("no such request" not in text for text in explanations), (self.where, explained)
                if waits and not request.bundled:
                    assert [explained.text] == explanations, self.where


@pytest.mark.parametrize("model", MODELS)
def test_bundles_cannot_be_told_from_keys(model):
    moves: Counter[str] = Counter()
    for seed in range(PROGRAMS):
        program = Program(model, seed)
        for _ in range(STEPS):
            program.step()
        moves += program.bundled.moves
    assert moves["Unite"] > PROGRAMS
    assert moves["Split"] > PROGRAMS / 2
