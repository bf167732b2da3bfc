"""The log of a shard and its replica, as conversations: what is told, in which order, and what waits for it."""

from __future__ import annotations

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
from kvstore.protocol.replicating import RESEND_S, Copy, Log, Replica, follow
from kvstore.protocol.serving import Serving
from kvstore.protocol.wire import Sender, decode, encode
from tests.protocol.conversation import Rule, spec
from tests.protocol.shell import Shell


class Pair:
    """A primary and its replica, with the shells that hold their values, and nothing between them that fails."""

    def __init__(self, workers: int = 2, *, late: bool = False) -> None:
        self.cores = [Serving(workers, Rule.parse, name) for name in ("primary", "replica")]
        self.shells = [Shell(), Shell()]
        self.log = Log(1)
        self.replica = Replica(1)
        self.replies: list[tuple[int, int, Message]] = []  # rank, the entry they wait for, message
        self.attached = False
        if not late:
            self.attach()

    def attach(self) -> None:
        self.attached = True
        self._perform(self.log.begin(self.cores[0]))
        self.catch_up()

    def say(self, rank: int, message: Message, payload: Any = None, incarnation: int = 1) -> None:
        actions = self.cores[0].handle(rank, incarnation, message, payload, 0.0)
        if self.attached:
            self._perform(self.log.conclude(rank, incarnation, message, actions))
        else:
            for action in actions:
                self.shells[0].perform(action)

    def lose(self, rank: int, on_loss: str, incarnation: int = 1) -> None:
        """The scheduler says that the worker is lost."""
        said = Departed(0, "worker", rank, "killed", incarnation, on_loss)
        self._perform(self.log.conclude(-1, -1, said, self.cores[0].lost(rank, "killed", on_loss, incarnation)))

    def take_over(self) -> Serving:
        """The primary dies."""
        self.catch_up()
        return self.cores[1]

    def _perform(self, steps: Any) -> None:
        for action, number in steps:
            if isinstance(action, Copy):
                stored = self.shells[0].stored[action.piece]
                self.log.complete(number, (stored.value, stored.state))
                continue
            if isinstance(action, Apply):
                merged = tuple(zip(*(_elements(p) for p in action.payloads), strict=True))
                self.log.complete(number, merged)
                payloads = (merged,)
                action = Apply(action.piece, action.round, payloads, action.rule, action.generation)
            elif isinstance(action, Create | StoreState):
                self.log.complete(number, action.payload)
            sent = self.shells[0].perform(action)
            if sent is not None:
                self.replies.append((sent[0], number, sent[1]))

    def catch_up(self) -> None:
        """Everything that is under way arrives, as often as it takes."""
        for entry, payload in list(self.log.outgoing()):
            header = encode(Sender(7, 1, 0, 1), [(entry, 0)])  # it must also be possible to write it down
            ((came, _),) = decode(header, 0)[1]
            assert came == entry
            for due, frames in self.replica.take(entry, payload):
                for action in follow(self.cores[1], due, frames, 0.0):
                    if isinstance(action, StoreState) and action.rank < 0:
                        piece = self.shells[1].stored[action.message.key, action.message.piece]
                        piece.generation, piece.step, piece.state = (
                            action.generation,
                            action.message.step,
                            action.payload,
                        )
                    else:
                        self.shells[1].perform(action)
        self.log.heard(self.replica.taken, 0.0)

    def check(self) -> None:
        """The replica holds what is committed."""
        one, other = self.cores
        assert one.pieces.keys() == other.pieces.keys()
        for piece_id, piece in one.counted():
            copy = other.pieces[piece_id]
            level = piece.level
            assert {p: level.effective(p) for p in level.rounds} == copy.level.rounds
            assert (level.closed, level.version) == (copy.level.closed, copy.level.version)
            assert (piece.generation, piece.steps) == (copy.generation, copy.steps)
            first, second = self.shells[0].stored[piece_id], self.shells[1].stored[piece_id]
            assert (first.value, first.generation, first.step) == (second.value, second.generation, second.step)
        assert one.workers.described() == other.workers.described()
        assert {b.id: b.united for b in one.binding.bundles.values()} == {
            b.id: b.united for b in other.binding.bundles.values()
        }


def _elements(payload: Any) -> Any:
    if hasattr(payload, "span"):
        return _elements(payload.payload)[slice(*payload.span)]
    return payload


def begin(pair: Pair, keys: str = "a", model: str = "sequential") -> None:
    for key in keys:
        pair.say(0, Init(1, key, 0, spec(model)), ((),) * 4)
        pair.say(1, Init(1, key, 0, spec(model)))


def push(key: Any, round: int, request_id: int = 0) -> Push:
    return Push(request_id or 10 + round, key, 0, round, False, False)


WHAT = ("w", "x", "y", "z")


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("model", ["sequential", "bounded(1)", "eventual"])
def test_the_replica_holds_what_is_committed(model, late):
    pair = Pair(late=late)
    begin(pair, model=model)
    pair.say(0, SetOptimizer(2, {"name": "sgd"}, False, {}))
    pair.say(0, push("a", 1), WHAT)
    pair.say(1, push("a", 1), WHAT)
    pair.say(0, push("a", 2), WHAT)  # in a sequential key it waits
    if late:
        pair.attach()
    pair.catch_up()
    pair.check()
    pair.say(1, push("a", 2), WHAT)
    pair.say(1, SetHyperparameters(3, {"lr": 0.5}, {"a": 2}))
    pair.say(0, push("a", 3), WHAT)
    pair.say(1, push("a", 3), WHAT)
    pair.say(1, Leave(9, ""))
    pair.say(0, push("a", 4), WHAT)
    pair.catch_up()
    pair.check()


@pytest.mark.parametrize("late", [False, True])
def test_bundles_are_united_and_split_on_both(late):
    pair = Pair(late=late)
    begin(pair, "ab")
    bundle = bundle_id(["a", "b"])
    pair.say(0, Bind(2, bundle, ("a", "b")))
    pair.say(0, push(bundle, 1), WHAT * 2)
    pair.say(1, push(bundle, 1), WHAT * 2)
    pair.say(0, push(bundle, 2), WHAT * 2)
    if late:
        pair.attach()  # which splits it
        assert not pair.cores[0].binding.bundles[bundle].united
        pair.say(1, push("b", 2), WHAT)
        pair.say(1, push("a", 2), WHAT)
    else:
        pair.catch_up()
        pair.check()
        pair.say(1, push("b", 2), WHAT)  # which splits it, with a push that waits
        pair.catch_up()
        pair.check()
        pair.say(1, push("a", 2), WHAT)
    pair.catch_up()
    pair.check()
    pair.say(0, push(bundle, 3), WHAT * 2)
    pair.say(1, push(bundle, 3), WHAT * 2)
    pair.say(0, WriteState(6, "a", 0, 3, ("m",), ("float32",)), WHAT)
    pair.catch_up()
    pair.check()
    pair.say(0, Drop(7, "b"))
    pair.catch_up()
    pair.check()


def test_a_reply_waits_for_the_entries_that_it_tells_of():
    pair = Pair()
    begin(pair, "ab")
    pair.catch_up()
    pair.replies.clear()
    pair.say(0, push("a", 1), WHAT)
    pair.say(1, push("a", 1), WHAT)
    pair.say(0, Fetch(5, "b", 0, 0))
    committed, _, value = (number for _, number, _ in pair.replies)
    assert not pair.log.may_tell(committed)
    assert pair.log.may_tell(value)  # of another piece, about which nothing new was said
    pair.catch_up()
    assert pair.log.may_tell(committed)


def test_nobody_waits_for_a_replica_that_catches_up():
    pair = Pair(late=True)
    begin(pair)
    steps = pair.log.begin(pair.cores[0])
    assert [type(action) for action, _ in steps] == [Copy]
    assert pair.log.may_tell(steps[0][1])
    assert not pair.log.in_step


def test_entries_are_taken_in_order_and_once():
    replica = Replica(1)
    entries = [Entry(n, 1, 0, 1, Leave(0, "")) for n in (1, 2, 3)]
    assert replica.take(entries[1], None) == []
    assert replica.take(entries[1], None) == []
    assert [entry.request_id for entry, _ in replica.take(entries[0], None)] == [1, 2]
    assert replica.take(entries[0], None) == []
    assert [entry.request_id for entry, _ in replica.take(entries[2], None)] == [3]
    assert replica.taken == 3


def test_an_earlier_epoch_is_refused_and_a_later_one_is_not_for_it():
    replica = Replica(4)
    with pytest.raises(FencedError, match="epoch 3"):
        replica.take(Entry(1, 3, 0, 1, Leave(0, "")), None)
    assert replica.take(Entry(1, 5, 0, 1, Leave(0, "")), None) == []
    assert replica.taken == 0


def test_what_was_not_taken_is_sent_again_and_silence_is_broken():
    pair = Pair()
    begin(pair)
    first = [entry.request_id for entry, _ in pair.log.outgoing()]
    assert first
    pair.log.tick(RESEND_S / 2)
    assert not list(pair.log.outgoing())
    pair.log.tick(RESEND_S)
    assert [entry.request_id for entry, _ in pair.log.outgoing()] == first
    pair.log.heard(first[-1], RESEND_S)
    pair.log.tick(3 * RESEND_S)
    assert len(list(pair.log.outgoing())) == 1


# --- workers that come and go while a server takes over -------------------------------------------


def answers(core: Serving, rank: int, message: Message, payload: Any = None, incarnation: int = 1) -> list[Any]:
    """What a worker is told by a server, and Apply where a round takes effect."""
    actions = core.handle(rank, incarnation, message, payload, 0.0)
    return [getattr(action, "message", action) for action in actions]


@pytest.mark.parametrize("late", [False, True])
def test_a_join_goes_on_with_the_server_that_takes_over(late):
    pair = Pair(late=late)
    begin(pair, model="eventual")
    pair.say(0, push("a", 1), WHAT)
    pair.say(2, Freeze(1))
    if late:
        pair.attach()
    successor = pair.take_over()
    assert answers(successor, 0, push("a", 2), WHAT) == []  # no round begins until the join has ended
    told, applied, *_ = answers(successor, 2, Admit(2, {"a": 1}))
    assert told.request_id == 2
    assert applied.contributions == ((0, 2),)


def test_who_joins_is_told_what_has_begun_when_the_replica_knows_of_it():
    pair = Pair()
    begin(pair)
    pair.catch_up()
    pair.replies.clear()
    pair.say(2, Freeze(1))
    ((_, number, frozen),) = pair.replies
    assert isinstance(frozen, Frozen)
    assert not pair.log.may_tell(number)


def test_a_life_that_returns_makes_again_what_a_takeover_has_lost():
    """What was only accepted of the life before: the primary has it, and so it counts; its successor takes it anew."""
    pair = Pair()
    begin(pair)
    pair.say(1, push("a", 1), WHAT)
    pair.lose(1, "wait")
    assert answers(pair.cores[0], 1, Init(5, "a", 0, spec()), incarnation=2) == [Initialized(5, 0)]
    successor = pair.take_over()
    assert answers(successor, 1, push("a", 1), ("new",) * 4, incarnation=2) == []
    (applied, *_) = answers(successor, 0, push("a", 1), WHAT)
    assert applied.payloads == (WHAT, ("new",) * 4)
    (applied, *_) = answers(pair.cores[0], 0, push("a", 1), WHAT)
    assert applied.payloads == (WHAT, WHAT)


def test_a_replica_waits_for_no_push_of_one_who_has_left_that_only_its_primary_had():
    pair = Pair(late=True)
    begin(pair)
    pair.say(1, push("a", 1), WHAT)  # waits for worker 0's
    pair.say(1, Leave(9, ""))
    pair.attach()
    successor = pair.take_over()
    (applied, *_) = answers(successor, 0, push("a", 1), WHAT)
    assert applied.contributions == ((0, 1),)


@pytest.mark.parametrize("late", [False, True])
def test_it_counts_when_it_has_taken_effect_though_the_worker_has_joined_again(late):
    pair = Pair(late=late)
    begin(pair)
    pair.say(1, push("a", 1), WHAT)
    pair.say(1, Leave(9, ""))
    pair.say(1, Freeze(1), incarnation=2)
    pair.say(1, Admit(2, {"a": 1}), incarnation=2)
    if late:
        pair.attach()
    pair.catch_up()
    assert 1 not in pair.cores[1].pieces["a", 0].level.members_of(1)
    pair.say(0, push("a", 1), WHAT)
    pair.catch_up()
    one, other = (core.pieces["a", 0] for core in pair.cores)
    assert list(other.level.members_of(1)) == [0, 1]
    assert one.same_history(other)
