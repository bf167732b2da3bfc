"""Rounds of so many samples: what the server makes of the numbers, in conversations and against the oracle."""

from __future__ import annotations

import random
from dataclasses import replace
from fractions import Fraction

import pytest

from kvstore.protocol.actions import Apply, Reply
from kvstore.protocol.messages import Bind, Failed, Init, Push, SetOptimizer
from kvstore.protocol.pieces import bundle_id
from kvstore.protocol.replicating import follow
from tests.consistency.oracle import Oracle
from tests.protocol.conversation import Conversation, spec
from tests.protocol.test_replicating import WHAT, Chain

PER_ROUND = 64


def of_samples(model: str = "sequential", per_round: int | None = PER_ROUND):
    return replace(spec(model), samples_per_round=per_round)


def push(round: int, samples: int | None, key: object = "w") -> Push:
    return Push(round, key, 0, round, False, False, samples=samples)  # type: ignore[arg-type]


def begun(workers: int = 2, keys: str = "w", optimizer: bool = True) -> Conversation:
    talk = Conversation(workers)
    for key in keys:
        for rank in range(workers):
            talk.say(rank, Init(0, key, 0, of_samples()), key + "0" if rank == 0 else None)
    if optimizer:
        talk.say(0, SetOptimizer(1, {"name": "sgd"}, False, {}))
    return talk


def applied(talk: Conversation, rank: int, message: Push, payload: object = "g") -> list[Apply]:
    actions = talk.serving.handle(rank, 1, message, payload, 0.0)
    assert not [a for a in actions if isinstance(a, Reply) and isinstance(a.message, Failed)], actions
    return [action for action in actions if isinstance(action, Apply)]


def test_the_factor_makes_every_update_one_of_as_many_samples():
    talk = begun()
    assert applied(talk, 0, push(1, 10)) == []
    (update,) = applied(talk, 1, push(1, 22))
    assert (update.samples, update.factor) == (32, 2.0)


def test_as_many_samples_as_asked_for_leave_the_sum_as_it_is():
    talk = begun()
    applied(talk, 0, push(1, 63))
    (update,) = applied(talk, 1, push(1, 1))
    assert update.factor == 1.0


def test_a_round_without_samples_changes_nothing_and_is_counted():
    talk = begun()
    applied(talk, 0, push(1, 0))
    (update,) = applied(talk, 1, push(1, 0))
    piece = talk.serving.pieces["w", 0]
    assert update.payloads == ()
    assert (piece.level.version, piece.level.closed, piece.steps) == (1, 1, 0)
    applied(talk, 0, push(2, 0))
    (update,) = applied(talk, 1, push(2, 1))
    assert (len(update.payloads), update.factor, piece.steps) == (2, 64.0, 1)


def test_who_leaves_takes_its_samples_along():
    talk = begun(3)
    applied(talk, 0, push(1, 16))
    applied(talk, 1, push(1, 16))
    actions = talk.serving.lost(2, "killed", "continue")
    (update,) = [action for action in actions if isinstance(action, Apply)]
    assert (update.contributions, update.factor) == (((0, 1), (1, 1)), 2.0)


@pytest.mark.parametrize(("per_round", "samples"), [(64, None), (None, 5)])
def test_a_push_that_says_too_little_or_too_much_is_refused(per_round, samples):
    talk = Conversation(1)
    talk.say(0, Init(0, "w", 0, of_samples(per_round=per_round)), "w0")
    (said,) = talk.say(0, push(1, samples), "g")
    assert "DisagreementError" in said
    assert f"its rounds are of {per_round} samples" in said
    assert talk.serving.pieces["w", 0].accepted == {0: 0}


@pytest.mark.parametrize("model", ["eventual", "bounded(2)"])
def test_models_that_do_not_merge_are_refused(model):
    (said,) = Conversation(1).say(0, Init(1, "w", 0, of_samples(model)), "w0")
    assert "OptionError" in said
    assert f"got {model}" in said


def test_workers_agree_on_the_number():
    talk = begun()
    (said,) = talk.say(1, Init(3, "w", 0, of_samples(per_round=32)))
    assert "DisagreementError" in said
    assert "64 samples per round" in said
    assert "32 samples per round" in said


def test_a_bundle_counts_samples_before_and_after_it_is_split():
    talk = begun(2, "ab")
    bundle = bundle_id(["a", "b"])
    talk.say(0, Bind(2, bundle, ("a", "b")))
    applied(talk, 0, push(1, 8, bundle))
    (update,) = applied(talk, 1, push(1, 8, bundle))
    assert update.factor == 4.0
    applied(talk, 0, push(2, 8, bundle))
    (update,) = applied(talk, 1, push(2, 24, "b"))  # splits it, with a push that waits
    assert (update.piece, update.factor) == (("b", 0), 2.0)
    (update,) = applied(talk, 1, push(2, 56, "a"))
    assert (update.piece, update.factor) == (("a", 0), 1.0)
    assert not any(piece.samples for piece in talk.serving.pieces.values())


@pytest.mark.parametrize("optimizer", [True, False])
@pytest.mark.parametrize("numbers", [(5, 6), (32, 32), (0, 0), (0, 9)])
def test_the_replica_does_the_same(numbers, optimizer):
    chain = Chain()
    chain.say(0, Init(1, "w", 0, of_samples()), ((),) * 4)
    chain.say(1, Init(1, "w", 0, of_samples()))
    if optimizer:
        chain.say(0, SetOptimizer(2, {"name": "sgd"}, False, {}))
    chain.catch_up()
    there: list[Apply] = []
    for rank, samples in enumerate(numbers):
        actions = chain.servers[0].core.handle(rank, 1, push(1, samples), WHAT, 0.0)
        for _, number in chain.log.conclude(rank, 1, push(1, samples), actions):
            if number and not chain.log._waiting[number].ready:
                chain.log.complete(number, WHAT)
        there += [action for action in actions if isinstance(action, Apply)]
    here: list[Apply] = []
    replica = chain.servers[1].replica
    assert replica is not None
    for entry, payload in chain.log.outgoing():
        for due, frames in replica.take(entry, payload):
            here += [action for action in follow(chain.servers[1].core, due, frames, 0.0) if isinstance(action, Apply)]
    ((one,), (other,)) = there, here
    assert one.samples == other.samples == sum(numbers)
    assert bool(one.payloads) == bool(other.payloads) == any(numbers)
    assert other.factor == (one.factor if optimizer else 1.0)  # what is assigned comes as the value that it becomes
    assert chain.servers[0].core.pieces["w", 0].steps == chain.servers[1].core.pieces["w", 0].steps
    assert chain.servers[1].core.pieces["w", 0].level.version == 1


@pytest.mark.parametrize("seed", range(60))
def test_random_schedules_against_the_oracle(seed):
    rng = random.Random(seed)
    workers = rng.randint(1, 4)
    talk, oracle = begun(workers), Oracle("sequential", 0, tuple(range(workers)))
    stated: dict[tuple[int, int], int] = {}
    updates: list[Apply] = []
    here = set(range(workers))
    for _ in range(40):
        rank = rng.randrange(workers)
        if rank not in here or oracle.rounds()[rank] > min(oracle.rounds()[p] for p in here) + 2:
            continue
        if rng.random() < 0.04 and len(here) > 1:
            here.discard(rank)
            oracle.history.append(("leave", rank))
            actions = talk.serving.lost(rank, "killed", "continue")
        else:
            round = oracle.rounds()[rank] + 1
            stated[rank, round] = samples = rng.choice((0, 0, 1, 7, 16, 64))
            oracle.history.append(("push", rank))
            actions = talk.serving.handle(rank, 1, push(round, samples), (rank, round), 0.0)
        updates += [action for action in actions if isinstance(action, Apply)]
    factors = oracle.factors(PER_ROUND, stated)
    assert [list(update.contributions) for update in updates] == oracle.updates()
    assert [Fraction(update.factor) if update.payloads else None for update in updates] == [
        None if factor is None else Fraction(float(factor)) for factor in factors
    ]
    assert len(talk.serving.pieces["w", 0].samples) == len(talk.serving.pieces["w", 0].held)
