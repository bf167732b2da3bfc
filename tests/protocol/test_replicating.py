"""The log of a shard and its replica, as conversations: what is told, in which order, and what waits for it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from kvstore.errors import FencedError
from kvstore.protocol.actions import Apply, Create, StoreState
from kvstore.protocol.messages import (
    Admit,
    Bind,
    Departed,
    Drop,
    Entry,
    Fetch,
    Freeze,
    Frozen,
    Init,
    Initialized,
    Leave,
    Message,
    Push,
    SetHyperparameters,
    SetOptimizer,
    WriteState,
)
from kvstore.protocol.pieces import bundle_id
from kvstore.protocol.replicating import FIRST, RESEND_S, Copy, Log, Replica, follow, forget_uncommitted
from kvstore.protocol.serving import Serving
from kvstore.protocol.wire import Sender, decode, encode
from tests.protocol.conversation import Rule, spec
from tests.protocol.shell import Shell


class Server:
    """One of the servers that have the shard, with the shell that holds its values."""

    def __init__(self, workers: int, name: str) -> None:
        self.core = Serving(workers, Rule.parse, name)
        self.shell = Shell()
        self.log: Log | None = None  # to the next one
        self.replica: Replica | None = None

    @property
    def last(self) -> int:
        if self.log is not None:
            return self.log.number
        return self.replica.taken if self.replica is not None else FIRST

    def take(self, entry: Entry, payload: Any) -> None:
        assert self.replica is not None
        for due, frames in self.replica.take(entry, payload):
            if self.log is not None:
                self.log.relay(due, frames)
            for action in follow(self.core, due, frames, 0.0):
                if isinstance(action, StoreState) and action.rank < 0:
                    piece = self.shell.stored[action.message.key, action.message.piece]
                    piece.generation, piece.step, piece.state = action.generation, action.message.step, action.payload
                else:
                    self.shell.perform(action)


class Chain:
    """A primary and its replicas, and nothing between them that fails."""

    def __init__(self, workers: int = 2, *, servers: int = 2, late: bool = False) -> None:
        self.workers = workers
        self.servers = [Server(workers, "primary")]
        self.epoch = 0
        self.replies: list[tuple[int, int, Message]] = []  # rank, the entry they wait for, message
        if not late:
            for _ in range(servers - 1):
                self.attach()

    @property
    def log(self) -> Log:
        assert self.servers[0].log is not None
        return self.servers[0].log

    def attach(self) -> None:
        """A new server comes to the end."""
        last, new = self.servers[-1], Server(self.workers, f"replica {len(self.servers)}")
        self.epoch += 1
        last.log = Log(self.epoch, last.last)
        if last is self.servers[0]:
            last.log.lead(last.core)
        new.replica = Replica(self.epoch)
        self._perform(last, last.log.begin(last.core))
        self.servers.append(new)
        self.catch_up()

    def lose(self, place: int) -> None:
        """One dies: those around it go on."""
        lost = self.servers.pop(place)
        if place == 0:
            self.servers[0].replica = None
            if self.servers[0].log is not None:
                self.servers[0].log.lead(self.servers[0].core)
        elif place == len(self.servers):
            self.servers[-1].log = None
        else:
            self.epoch += 1
            before, after = self.servers[place - 1 : place + 1]
            assert before.log is not None and after.replica is not None and lost.log is not None
            before.log.go_on(self.epoch)
            after.replica.go_on(self.epoch)

    def say(self, rank: int, message: Message, payload: Any = None, incarnation: int = 1) -> None:
        first = self.servers[0]
        actions = first.core.handle(rank, incarnation, message, payload, 0.0)
        if first.log is not None:
            self._perform(first, first.log.conclude(rank, incarnation, message, actions))
        else:
            for action in actions:
                first.shell.perform(action)

    def _perform(self, server: Server, steps: Any) -> None:
        assert server.log is not None
        for action, number in steps:
            if isinstance(action, Copy):
                stored = server.shell.stored[action.piece]
                part = stored if action.span is None else stored.part(action.span)
                server.log.complete(number, (part.value, part.state))
                continue
            if isinstance(action, Apply):
                merged = tuple(zip(*(_elements(p) for p in action.payloads), strict=True))
                server.log.complete(number, merged)
                payloads = (merged,)
                action = Apply(action.piece, action.round, payloads, action.rule, action.generation)
            elif isinstance(action, Create | StoreState):
                server.log.complete(number, action.payload)
            sent = server.shell.perform(action)
            if sent is not None:
                self.replies.append((sent[0], number, sent[1]))

    def catch_up(self, upto: int | None = None) -> None:
        """Everything that is under way arrives, as often as it takes; ``upto``: at the first so many servers only."""
        for server, following in pairwise(self.servers[:upto]):
            assert server.log is not None and following.replica is not None
            for entry, payload in list(server.log.outgoing()):
                header = encode(Sender(7, 1, 0, 1), [(entry, 0)])  # it must also be possible to write it down
                ((came, _),) = decode(header, 0)[1]
                assert came == entry
                following.take(entry, payload)
        for server, following in reversed(list(pairwise(self.servers[:upto]))):
            assert server.log is not None and following.replica is not None
            taken = following.replica.taken
            server.log.heard(taken if following.log is None else following.log.held(taken), 0.0)

    def check(self) -> None:
        """The replicas hold what is committed."""
        one = self.servers[0]
        for other in self.servers[1:]:
            assert one.core.pieces.keys() == other.core.pieces.keys()
            for piece_id, piece in one.core.counted():
                copy = other.core.pieces[piece_id]
                level = piece.level
                assert {p: level.effective(p) for p in level.rounds} == copy.level.rounds
                assert (level.closed, level.version) == (copy.level.closed, copy.level.version)
                assert (piece.generation, piece.steps) == (copy.generation, copy.steps)
                first, second = one.shell.stored[piece_id], other.shell.stored[piece_id]
                assert (first.value, first.generation, first.step) == (second.value, second.generation, second.step)
            assert one.core.workers.described() == other.core.workers.described()
            united = [{b.id: b.united for b in server.core.binding.bundles.values()} for server in (one, other)]
            assert united[0] == united[1]


def _elements(payload: Any) -> Any:
    if hasattr(payload, "span"):
        return _elements(payload.payload)[slice(*payload.span)]
    return payload


def begin(chain: Chain, keys: str = "a", model: str = "sequential") -> None:
    for key in keys:
        chain.say(0, Init(1, key, 0, spec(model)), ((),) * 4)
        chain.say(1, Init(1, key, 0, spec(model)))


def push(key: Any, round: int, request_id: int = 0) -> Push:
    return Push(request_id or 10 + round, key, 0, round, False, False)


WHAT = ("w", "x", "y", "z")


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("model", ["sequential", "bounded(1)", "eventual"])
def test_the_replica_holds_what_is_committed(model, late):
    chain = Chain(late=late)
    begin(chain, model=model)
    chain.say(0, SetOptimizer(2, {"name": "sgd"}, False, {}))
    chain.say(0, push("a", 1), WHAT)
    chain.say(1, push("a", 1), WHAT)
    chain.say(0, push("a", 2), WHAT)  # in a sequential key it waits
    if late:
        chain.attach()
    chain.catch_up()
    chain.check()
    chain.say(1, push("a", 2), WHAT)
    chain.say(1, SetHyperparameters(3, {"lr": 0.5}, {"a": 2}))
    chain.say(0, push("a", 3), WHAT)
    chain.say(1, push("a", 3), WHAT)
    chain.say(1, Leave(9, ""))
    chain.say(0, push("a", 4), WHAT)
    chain.catch_up()
    chain.check()


@pytest.mark.parametrize("late", [False, True])
def test_bundles_are_united_and_split_on_both(late):
    chain = Chain(late=late)
    begin(chain, "ab")
    bundle = bundle_id(["a", "b"])
    chain.say(0, Bind(2, bundle, ("a", "b")))
    chain.say(0, push(bundle, 1), WHAT * 2)
    chain.say(1, push(bundle, 1), WHAT * 2)
    chain.say(0, push(bundle, 2), WHAT * 2)
    if late:
        chain.attach()
    assert chain.servers[0].core.binding.bundles[bundle].united
    chain.catch_up()
    chain.check()
    chain.say(1, push("b", 2), WHAT)  # which splits it, with a push that waits
    chain.catch_up()
    chain.check()
    chain.say(1, push("a", 2), WHAT)
    chain.catch_up()
    chain.check()
    chain.say(0, push(bundle, 3), WHAT * 2)
    chain.say(1, push(bundle, 3), WHAT * 2)
    chain.say(0, WriteState(6, "a", 0, 3, ("m",), ("float32",)), WHAT)
    chain.catch_up()
    chain.check()
    chain.say(0, Drop(7, "b"))
    chain.catch_up()
    chain.check()


def test_a_reply_waits_for_the_entries_that_it_tells_of():
    chain = Chain()
    begin(chain, "ab")
    chain.catch_up()
    chain.replies.clear()
    chain.say(0, push("a", 1), WHAT)
    chain.say(1, push("a", 1), WHAT)
    chain.say(0, Fetch(5, "b", 0, 0))
    committed, _, value = (number for _, number, _ in chain.replies)
    assert not chain.log.may_tell(committed)
    assert chain.log.may_tell(value)  # of another piece, about which nothing new was said
    chain.catch_up()
    assert chain.log.may_tell(committed)


def test_nobody_waits_for_a_replica_that_catches_up():
    chain = Chain(late=True)
    begin(chain)
    log = Log(1)
    steps = log.begin(chain.servers[0].core)
    assert [type(action) for action, _ in steps] == [Copy]
    assert log.may_tell(steps[0][1])
    assert log.held(7) == 7
    assert not log.in_step


def test_entries_are_taken_in_order_and_once():
    replica = Replica(1)
    entries = [Entry(n, 1, 1, 0, 1, Leave(0, "")) for n in (1, 2, 3)]
    assert replica.take(entries[1], None) == []
    assert replica.take(entries[1], None) == []
    assert [entry.request_id for entry, _ in replica.take(entries[0], None)] == [1, 2]
    assert replica.take(entries[0], None) == []
    assert [entry.request_id for entry, _ in replica.take(entries[2], None)] == [3]
    assert replica.taken == 3


def test_an_earlier_epoch_is_refused_and_a_later_one_is_not_for_it():
    replica = Replica(4)
    with pytest.raises(FencedError, match="epoch 3"):
        replica.take(Entry(1, 3, 1, 0, 1, Leave(0, "")), None)
    assert replica.take(Entry(1, 5, 1, 0, 1, Leave(0, "")), None) == []
    assert replica.taken == 0


def test_what_was_not_taken_is_sent_again_and_silence_is_broken():
    chain = Chain()
    begin(chain)
    first = [entry.request_id for entry, _ in chain.log.outgoing()]
    assert first
    chain.log.tick(RESEND_S / 2)
    assert not list(chain.log.outgoing())
    chain.log.tick(RESEND_S)
    assert [entry.request_id for entry, _ in chain.log.outgoing()] == first
    chain.log.heard(first[-1], RESEND_S)
    chain.log.tick(3 * RESEND_S)
    assert len(list(chain.log.outgoing())) == 1


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_whoever_is_lost_the_others_go_on_from_what_they_have(place):
    """Before each loss some entries have come to the first servers of the chain only."""
    chain = Chain(servers=4)
    begin(chain, "ab")
    chain.say(0, SetOptimizer(2, {"name": "sgd"}, False, {}))
    chain.catch_up()
    for round, upto in enumerate((4, 3, 2, 1), 1):
        chain.say(0, push("a", round), WHAT)
        chain.say(1, push("a", round), WHAT)
        chain.catch_up(upto)
    committed = [server.core.pieces["a", 0].level.version for server in chain.servers]
    assert committed == [4, 3, 2, 1]
    chain.lose(place)
    assert [server.core.pieces["a", 0].level.version for server in chain.servers] == [
        version for version in committed if version != 4 - place
    ]
    chain.log.tick(10.0)
    for _ in range(3):  # what one has got at last it passes on
        chain.catch_up()
    chain.check()
    chain.attach()
    for rank in (0, 1):
        chain.say(rank, push("b", 1), WHAT)
    chain.catch_up()
    chain.check()
    assert chain.log.over


def test_an_entry_is_taken_when_the_last_has_it():
    chain = Chain(servers=3)
    begin(chain)
    chain.catch_up()
    chain.replies.clear()
    chain.say(0, push("a", 1), WHAT)
    chain.say(1, push("a", 1), WHAT)
    (number,) = {number for _, number, _ in chain.replies}
    chain.catch_up(2)
    assert not chain.log.may_tell(number)
    chain.catch_up()
    assert chain.log.may_tell(number)


def test_a_new_primary_tells_nothing_that_those_behind_it_may_lack():
    chain = Chain(servers=3)
    begin(chain)
    chain.catch_up()
    for rank in (0, 1):
        chain.say(rank, push("a", 1), WHAT)
    chain.catch_up(2)
    chain.lose(0)
    chain.replies.clear()
    chain.say(0, Fetch(5, "a", 0, 0))
    ((_, number, _),) = chain.replies
    assert not chain.log.may_tell(number)
    chain.catch_up()
    assert chain.log.may_tell(number)


def test_a_primary_that_becomes_a_replica_forgets_what_only_waits():
    chain = Chain()
    begin(chain, "ab")
    bundle = bundle_id(["a", "b"])
    chain.say(0, Bind(2, bundle, ("a", "b")))
    for rank in (0, 1):
        chain.say(rank, push(bundle, 1), WHAT * 2)
    chain.say(0, push(bundle, 2), WHAT * 2)  # waits for worker 1
    chain.catch_up()
    former = chain.servers[0]
    core = Serving(2, Rule.parse, "new")
    forget_uncommitted(former.core, core)
    former.core = core
    chain.check()
    assert core.pieces[bundle, 0].accepted == {0: 1, 1: 1}


# --- workers that come and go while a server takes over -------------------------------------------


def answers(core: Serving, rank: int, message: Message, payload: Any = None, incarnation: int = 1) -> list[Any]:
    """What a worker is told by a server, and Apply where a round takes effect."""
    actions = core.handle(rank, incarnation, message, payload, 0.0)
    return [getattr(action, "message", action) for action in actions]


def loses(chain: Chain, rank: int, on_loss: str) -> None:
    """The scheduler says that the worker is lost."""
    said, first = Departed(0, "worker", rank, "killed", 1, on_loss), chain.servers[0]
    chain._perform(first, chain.log.conclude(-1, -1, said, first.core.lost(rank, "killed", on_loss, 1)))


def takes_over(chain: Chain) -> Serving:
    """The core of the replica, when its primary has died."""
    chain.catch_up()
    return chain.servers[1].core


@pytest.mark.parametrize("late", [False, True])
def test_a_join_goes_on_with_the_server_that_takes_over(late):
    chain = Chain(late=late)
    begin(chain, model="eventual")
    chain.say(0, push("a", 1), WHAT)
    chain.say(2, Freeze(1))
    if late:
        chain.attach()
    successor = takes_over(chain)
    assert answers(successor, 0, push("a", 2), WHAT) == []  # no round begins until the join has ended
    told, applied, *_ = answers(successor, 2, Admit(2, {"a": 1}))
    assert told.request_id == 2
    assert applied.contributions == ((0, 2),)


def test_who_joins_is_told_what_has_begun_when_the_replica_knows_of_it():
    chain = Chain()
    begin(chain)
    chain.catch_up()
    chain.replies.clear()
    chain.say(2, Freeze(1))
    ((_, number, frozen),) = chain.replies
    assert isinstance(frozen, Frozen)
    assert not chain.log.may_tell(number)


def test_a_life_that_returns_makes_again_what_a_takeover_has_lost():
    """What was only accepted of the life before: the primary has it, and so it counts; its successor takes it anew."""
    chain = Chain()
    begin(chain)
    chain.say(1, push("a", 1), WHAT)
    loses(chain, 1, "wait")
    assert answers(chain.servers[0].core, 1, Init(5, "a", 0, spec()), incarnation=2) == [Initialized(5, 0)]
    successor = takes_over(chain)
    assert answers(successor, 1, push("a", 1), ("new",) * 4, incarnation=2) == []
    (applied, *_) = answers(successor, 0, push("a", 1), WHAT)
    assert applied.payloads == (WHAT, ("new",) * 4)
    (applied, *_) = answers(chain.servers[0].core, 0, push("a", 1), WHAT)
    assert applied.payloads == (WHAT, WHAT)


def test_a_replica_waits_for_no_push_of_one_who_has_left_that_only_its_primary_had():
    chain = Chain(late=True)
    begin(chain)
    chain.say(1, push("a", 1), WHAT)  # waits for worker 0's
    chain.say(1, Leave(9, ""))
    chain.attach()
    successor = takes_over(chain)
    (applied, *_) = answers(successor, 0, push("a", 1), WHAT)
    assert applied.contributions == ((0, 1),)


@pytest.mark.parametrize("late", [False, True])
def test_it_counts_when_it_has_taken_effect_though_the_worker_has_joined_again(late):
    chain = Chain(late=late)
    begin(chain)
    chain.say(1, push("a", 1), WHAT)
    chain.say(1, Leave(9, ""))
    chain.say(1, Freeze(1), incarnation=2)
    chain.say(1, Admit(2, {"a": 1}), incarnation=2)
    if late:
        chain.attach()
    chain.catch_up()
    assert 1 not in chain.servers[1].core.pieces["a", 0].level.members_of(1)
    for server in chain.servers:  # it counts from round 2 on, whatever becomes of what it had pushed before
        assert answers(server.core, 1, Init(5, "a", 0, spec()), incarnation=2) == [Initialized(5, 1)]
    chain.say(0, push("a", 1), WHAT)
    chain.catch_up()
    one, other = (core.pieces["a", 0] for core in (server.core for server in chain.servers))
    assert list(other.level.members_of(1)) == [0, 1]
    assert one.same_history(other)
