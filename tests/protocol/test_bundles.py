"""Conversations about bundles, as transcripts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvstore.protocol import binding
from kvstore.protocol.messages import (
    Bind,
    Drop,
    Explain,
    Fetch,
    Init,
    Leave,
    Push,
    ReadState,
    SetHyperparameters,
    SetOptimizer,
    WriteState,
)
from kvstore.protocol.pieces import bundle_id
from tests.protocol.conversation import Conversation, spec

SHAPES = {"a": (2,), "b": (), "c": (1, 1), "d": (1,)}
AB, BC, ABC = ("a", "b"), ("b", "c"), ("a", "b", "c")


def begun(model="sequential", workers=2, bundles=(AB,), **described) -> Conversation:
    """A conversation in which all workers have initialised a, b, c and d, and the bundles are bound."""
    talk = Conversation(workers)
    for key, shape in SHAPES.items():
        for rank in range(workers):
            form = replace(spec(model, shape=shape), **described)
            talk.say(rank, Init(0, key, 0, form), f"{key}0" if rank == 0 else None)
    for keys in bundles:
        assert talk.say(0, Bind(0, bundle_id(keys), keys)) == ["0 < Done(request_id=0)"]
    return talk


def push(request_id, keys, round, pull=False, acknowledge=False):
    """Of a bundle, or of one key."""
    return Push(request_id, keys if isinstance(keys, str) else bundle_id(keys), 0, round, pull, acknowledge)


def fetch(request_id, keys, round):
    return Fetch(request_id, keys if isinstance(keys, str) else bundle_id(keys), 0, round)


def divided(request_id, rank=0, *, taken=False):
    return [f"{rank} < Divided(request_id={request_id}, taken={taken})"]


def united(talk: Conversation, keys=AB) -> bool:
    return talk.serving.binding.bundles[bundle_id(keys)].united


# --- united -----------------------------------------------------------------------------------------


def test_a_round_of_a_bundle_is_one_update():
    talk = begun()
    assert talk.say(1, push(3, AB, 1), "x") == ["unite a b"]
    assert talk.say(0, push(5, AB, 1, pull=True, acknowledge=True), "y") == [
        "apply round 1 of a+b: y + x",
        "1 < Committed(request_id=3) when applied",
        "0 < value(5) of a+b version 1 staleness 0",
    ]


def test_a_member_is_pulled_from_the_bundle():
    talk = begun("eventual")
    talk.say(0, push(5, AB, 1), "x")
    assert talk.say(1, fetch(6, "a", 0)) == ["1 < value(6) of a+b[0:2] version 1 staleness 0"]
    assert talk.say(1, fetch(7, "b", 0)) == ["1 < value(7) of a+b[2:3] version 1 staleness 0"]
    assert talk.say(1, fetch(8, AB, 0)) == ["1 < value(8) of a+b version 1 staleness 0"]
    assert talk.say(1, Init(9, "b", 0, spec("eventual", shape=()))) == ["1 < Initialized(request_id=9, round=0)"]
    assert united(talk)


def test_a_member_s_pull_waits_with_the_bundle():
    talk = begun()
    talk.say(0, push(5, AB, 1), "x")
    assert talk.say(0, fetch(6, "b", 1)) == []
    assert talk.say(1, push(3, AB, 1), "y") == [
        "apply round 1 of a+b: x + y",
        "0 < Committed(request_id=5) when applied",
        "1 < Committed(request_id=3) when applied",
        "0 < value(6) of a+b[2:3] version 1 staleness 0",
    ]


def test_repeats_gaps_and_questions_while_united():
    talk = begun("eventual")
    talk.say(1, push(3, AB, 1), "w")
    assert talk.say(0, push(5, AB, 1)) == ["0 < Missing(request_id=5)"]
    assert talk.say(0, push(6, AB, 2), "y") == []
    talk.say(0, push(5, AB, 1), "x")
    for payload in ("x", None):
        assert talk.say(0, push(5, AB, 1), payload) == ["0 < Committed(request_id=5) when applied"]
        assert talk.say(0, push(5, AB, 1, pull=True), payload) == ["0 < value(5) of a+b version 2 staleness 0"]
    assert talk.serving.pieces["a", 0].level.version == 2


def test_only_a_push_that_counts_unites():
    talk = begun("eventual")
    assert talk.say(0, push(5, AB, 1)) == divided(5)
    assert talk.say(0, push(6, AB, 2), "y") == divided(6)
    assert talk.say(0, fetch(7, AB, 0)) == divided(7)
    talk.say(0, push(5, AB, 1), "x")
    talk.say(0, push(8, "a", 2), "y")
    talk.say(0, push(9, "b", 2), "y")
    assert talk.say(0, push(5, AB, 1), "x") == divided(5, taken=True)
    assert not united(talk)


def test_an_old_push_of_a_member_does_not_split():
    talk = begun("eventual")
    talk.say(0, push(4, "a", 1), "x")
    talk.say(0, push(5, "b", 1), "y")
    talk.say(0, push(6, AB, 2), "z")
    assert talk.say(0, push(4, "a", 1), "x") == ["0 < Committed(request_id=4) when applied"]
    assert talk.say(0, push(9, "a", 4), "later") == []
    assert talk.say(0, push(8, "a", 3)) == ["0 < Missing(request_id=8)"]
    assert united(talk)


# --- splitting --------------------------------------------------------------------------------------


def test_a_member_pushed_by_itself_splits_parked_pushes():
    talk = begun()
    talk.say(0, push(5, AB, 1, pull=True, acknowledge=True), "x")
    assert talk.say(1, push(3, "a", 1), "y") == [
        "split a b",
        *divided(5, taken=True),
        "apply round 1 of a: x[0:2] + y",
        "1 < Committed(request_id=3) when applied",
    ]
    assert talk.say(0, push(6, "a", 1, pull=True)) == ["0 < value(6) of a version 1 staleness 0"]
    assert talk.say(0, push(7, "b", 1, pull=True)) == []
    assert talk.say(0, push(8, "a", 2, pull=True), "z") == []  # which need not wait for b
    assert talk.say(1, push(4, "b", 1), "z") == [
        "apply round 1 of b: x[2:3] + z",
        "1 < Committed(request_id=4) when applied",
        "0 < value(7) of b version 1 staleness 0",
    ]


def test_commits_that_are_due_when_it_splits():
    talk = begun()
    talk.say(0, push(5, AB, 1), "x")
    assert talk.say(1, push(3, "b", 1), "z") == [
        "split a b",
        *divided(5, taken=True),
        "apply round 1 of b: x[2:3] + z",
        "1 < Committed(request_id=3) when applied",
    ]
    assert talk.say(0, push(6, "a", 1)) == []
    assert talk.say(0, push(7, "b", 1)) == ["0 < Committed(request_id=7) when applied"]
    assert talk.say(1, push(4, "a", 1), "y") == [
        "apply round 1 of a: x[0:2] + y",
        "0 < Committed(request_id=6) when applied",
        "1 < Committed(request_id=4) when applied",
    ]
    assert talk.say(0, push(8, AB, 2), "v") == ["unite a b"]


def test_pulls_that_wait_when_it_splits():
    talk = begun("bounded(0)")
    talk.say(0, push(5, AB, 1), "x")
    assert talk.say(0, fetch(6, AB, 1)) == []
    assert talk.say(0, fetch(7, "b", 1)) == []
    assert talk.say(1, push(3, "b", 1), "y") == [
        "split a b",
        *divided(6, taken=True),
        "apply round 1 of b: y",
        "1 < Committed(request_id=3) when applied",
        "0 < value(7) of b version 2 staleness 0",
    ]
    assert talk.say(0, fetch(6, AB, 1)) == divided(6)
    assert talk.say(0, fetch(8, "b", 1)) == ["0 < value(8) of b version 2 staleness 0"]


def test_a_worker_that_divides_by_itself():
    """It asks what became of the members' pushes while the server has the bundle in one piece."""
    talk = begun()
    talk.say(0, push(5, AB, 1, pull=True), "x")
    assert talk.say(0, push(6, "a", 1, pull=True)) == []  # as a pull
    assert united(talk)
    talk = begun()
    talk.say(0, push(5, AB, 1), "x")
    assert talk.say(0, push(6, "a", 1)) == ["split a b", *divided(5, taken=True)]
    assert talk.say(0, push(7, "b", 1)) == []
    assert talk.say(1, push(3, AB, 1), "y") == divided(3, rank=1)
    assert talk.say(1, push(4, "a", 1), "y") == [
        "apply round 1 of a: x[0:2] + y",
        "0 < Committed(request_id=6) when applied",
        "1 < Committed(request_id=4) when applied",
    ]


def test_a_split_bundle_is_not_pushed_and_not_pulled():
    talk = begun("eventual")
    talk.say(1, push(3, "a", 1), "y")
    for payload in ("x", None):
        assert talk.say(0, push(5, AB, 1, pull=True), payload) == divided(5)
    assert talk.say(0, fetch(6, AB, 0)) == divided(6)
    talk.say(0, push(7, "a", 1), "x")
    assert talk.say(0, push(5, AB, 1, pull=True)) == divided(5)  # half of it is here
    talk.say(0, push(8, "b", 1), "x")
    assert talk.say(0, push(5, AB, 1, pull=True)) == divided(5, taken=True)
    assert talk.serving.pieces["a", 0].level.version == 2


# --- bundles that share keys ------------------------------------------------------------------------


def test_two_bundles_that_share_keys():
    talk = begun(bundles=(AB, BC))
    talk.say(0, push(5, AB, 1), "x")
    assert talk.say(1, push(3, BC, 1), "y") == divided(3, rank=1)
    assert united(talk, AB)
    assert talk.say(1, push(4, "b", 1), "y") == [
        "split a b",
        *divided(5, taken=True),
        "apply round 1 of b: x[2:3] + y",
        "1 < Committed(request_id=4) when applied",
    ]
    assert talk.say(1, push(6, "c", 1), "y") == []
    assert talk.say(0, push(7, "c", 1), "z") == [
        "apply round 1 of c: z + y",
        "0 < Committed(request_id=7) when applied",
        "1 < Committed(request_id=6) when applied",
    ]
    assert talk.say(0, push(8, BC, 2), "v") == ["unite b c"]
    assert talk.say(1, push(9, AB, 2), "u") == divided(9, rank=1)  # it has not pushed a yet
    assert united(talk, BC)


def test_the_same_keys_in_another_order_are_another_bundle():
    talk = begun(bundles=(AB, AB[::-1]))
    talk.say(0, push(5, AB, 1), "x")
    assert talk.say(1, push(3, AB[::-1], 1, pull=True), "y") == divided(3, rank=1)
    assert united(talk)


def test_another_bundle_of_the_same_keys_takes_over_when_all_is_quiet():
    talk = begun("eventual", bundles=(AB, AB[::-1], ABC))
    talk.say(0, push(5, AB, 1), "x")
    assert talk.say(1, push(3, AB[::-1], 1), "y") == divided(3, rank=1)
    talk.say(1, push(4, "a", 1), "y")
    talk.say(1, push(6, "b", 1), "y")
    assert talk.say(0, push(7, AB[::-1], 2), "x")[:2] == ["unite b a", "apply round 2 of b+a: x"]
    assert talk.say(0, fetch(8, "a", 2)) == ["0 < value(8) of b+a[1:3] version 3 staleness 1"]


# --- bind -------------------------------------------------------------------------------------------


def test_bind():
    talk = begun(bundles=())
    assert "UnknownKeyError" in talk.say(0, push(1, AB, 1), "x")[0]
    assert "UnknownKeyError" in talk.say(0, fetch(2, AB, 0))[0]
    for rank in (0, 1, 0):
        assert talk.say(rank, Bind(3, bundle_id(AB), AB)) == [f"{rank} < Done(request_id=3)"]
    assert "UnknownKeyError" in talk.say(0, Push(4, bundle_id(AB), 1, 1, False, False), "x")[0]
    assert "UnknownKeyError" in talk.say(0, Bind(5, bundle_id(("a", "x")), ("a", "x")))[0]
    for keys in ((), ("a", "a")):
        assert "each key once" in talk.say(0, Bind(6, bundle_id(keys), keys))[0]
    for keys in (BC, AB[::-1]):
        assert "id that follows" in talk.say(0, Bind(7, bundle_id(AB), keys))[0]


@pytest.mark.parametrize(
    "form",
    [
        spec("eventual", shape=(1,)),
        spec("sequential", (0,), shape=(1,)),
        replace(spec("sequential", shape=(1,)), dtype="float64"),
        spec("sequential", shape=(5,)),  # in two pieces
    ],
)
def test_only_keys_of_a_kind_can_be_bound(form):
    talk = begun(bundles=())
    talk.say(0, Init(1, "e", 0, form), "e0")
    keys = ("a", "e")
    assert "ProtocolError" in talk.say(0, Bind(2, bundle_id(keys), keys))[0]
    assert talk.serving.binding.bundles == {}


def test_there_is_a_limit(monkeypatch):
    monkeypatch.setattr(binding, "BUNDLES_MAX", 1)
    talk = begun(bundles=(AB,))
    assert "at most 1 bundles" in talk.say(0, Bind(1, bundle_id(BC), BC))[0]
    assert talk.say(0, Bind(1, bundle_id(AB), AB)) == ["0 < Done(request_id=1)"]


# --- optimizer --------------------------------------------------------------------------------------

SGD, ADAM, LARS = {"name": "sgd"}, {"name": "adam"}, {"name": "lars"}


def test_an_optimizer_updates_the_bundle():
    talk = begun(workers=1)
    talk.say(0, push(1, AB, 1), "x")
    assert talk.say(0, SetOptimizer(2, SGD, False, {"a": 1, "b": 1})) == ["0 < Done(request_id=2)"]
    assert talk.say(0, push(3, AB, 2), "y")[0] == "apply round 2 of a+b: y by sgd lr=0.1 #1"
    assert talk.say(0, SetHyperparameters(4, {"lr": 0.5}, {"a": 2, "b": 2})) == ["0 < Done(request_id=4)"]
    assert talk.say(0, push(5, AB, 3), "z")[0] == "apply round 3 of a+b: z by sgd lr=0.5 #1"


def test_a_setting_that_begins_at_different_rounds_splits():
    talk = begun(workers=1)
    talk.say(0, push(1, AB, 1), "x")
    assert talk.say(0, SetOptimizer(2, SGD, False, {"a": 2, "b": 1})) == ["split a b", "0 < Done(request_id=2)"]
    assert talk.say(0, push(3, AB, 2), "y") == divided(3)
    assert talk.say(0, push(4, "a", 2), "y")[0] == "apply round 2 of a: y"
    assert talk.say(0, push(5, "b", 2), "y")[0] == "apply round 2 of b: y by sgd lr=0.1 #1"
    assert talk.say(0, push(6, AB, 3), "z") == divided(6)  # b has had one step more


def test_a_setting_that_has_begun_for_all_is_over_once():
    talk = begun(workers=1)
    talk.say(0, SetOptimizer(1, SGD, False, {}))
    talk.say(0, push(2, AB, 1), "x")
    lines = talk.say(0, SetHyperparameters(3, {"lr": 0.5}, {"a": 2, "b": 1}))
    assert lines == ["split a b", "0 < Done(request_id=3)"]
    assert talk.say(0, push(4, AB, 2), "y") == divided(4)
    assert talk.say(0, push(5, "a", 2), "y")[0] == "apply round 2 of a: y by sgd lr=0.1 #1"
    assert talk.say(0, push(6, "b", 2), "y")[0] == "apply round 2 of b: y by sgd lr=0.5 #1"
    assert talk.say(0, push(7, AB, 3), "z")[:2] == ["unite a b", "apply round 3 of a+b: z by sgd lr=0.5 #1"]


def test_an_optimizer_that_needs_whole_tensors_keeps_keys_apart():
    talk = begun(workers=1)
    talk.say(0, push(1, AB, 1), "x")
    assert talk.say(0, SetOptimizer(2, LARS, False, {})) == ["split a b", "0 < Done(request_id=2)"]
    assert talk.say(0, push(3, AB, 2), "y") == divided(3)
    for key in AB:
        assert talk.say(0, push(3, key, 2), "y")[0] == f"apply round 2 of {key}: y by lars lr=0.1 #1"
    talk.say(0, SetOptimizer(4, SGD, True, {"a": 2, "b": 2}))
    assert talk.say(0, push(5, AB, 3), "z")[:2] == ["unite a b", "apply round 3 of a+b: z by sgd lr=0.1 #2"]


def test_an_earlier_optimizer_that_needs_whole_tensors_is_not_over_yet():
    talk = begun("eventual")
    talk.say(0, SetOptimizer(1, LARS, False, {}))
    for key in AB:
        talk.say(0, push(2, key, 1), "x")
    talk.say(0, SetOptimizer(3, SGD, True, {"a": 1, "b": 1}))
    assert talk.say(1, push(4, AB, 1), "y") == divided(4, rank=1)
    for key in AB:
        assert talk.say(1, push(4, key, 1), "y")[0] == f"apply round 1 of {key}: y by lars lr=0.1 #1"
    assert talk.say(1, push(5, AB, 2), "z")[:2] == ["unite a b", "apply round 2 of a+b: z by sgd lr=0.1 #2"]


def test_keys_with_other_optimizer_states_are_not_united():
    """Counted alike, but the setting came between the pushes of a and of b."""
    talk = begun("eventual")
    talk.say(1, push(1, "a", 1), "x")
    talk.say(0, SetOptimizer(2, SGD, False, {}))
    talk.say(1, push(3, "b", 1), "y")
    assert talk.say(0, push(4, AB, 1), "z") == divided(4)


def test_a_member_s_state():
    talk = begun("eventual")
    talk.say(0, SetOptimizer(1, SGD, False, {}))
    talk.say(0, push(2, AB, 1), "x")
    assert talk.say(0, ReadState(3, "b", 0)) == ["0 < state(3) of a+b[2:3]"]
    assert talk.say(0, WriteState(4, "b", 0, 7, ("m",), ("float32",)), "state") == [
        "split a b",
        "store state state, then 0 < Done(4)",
    ]
    assert talk.say(0, ReadState(5, "b", 0)) == ["0 < state(5) of b"]
    assert talk.say(0, push(6, AB, 2), "y") == divided(6)
    talk.say(0, WriteState(7, "a", 0, 7, ("m",), ("float32",)), "state")
    assert talk.say(0, push(8, AB, 2), "z")[0] == "unite a b"
    talk.say(0, WriteState(9, "a", 0, 3, ("m",), ("float32",)), "state")
    talk.say(0, WriteState(10, "b", 0, 3, ("m",), ("float64",)), "state")
    assert talk.say(0, push(11, AB, 3), "v") == divided(11)  # their states have different dtypes


# --- drop -------------------------------------------------------------------------------------------


def test_drop_of_a_member_ends_its_bundles():
    talk = begun("eventual", bundles=(AB, BC))
    talk.say(0, push(1, AB, 1), "x")
    lines = talk.say(0, Drop(2, "b"))
    assert lines == ["split a b", "forget a bundle", "forget a bundle", "forget b", "0 < Done(request_id=2)"]
    assert talk.serving.binding.bundles == {}
    assert "UnknownKeyError" in talk.say(0, push(3, AB, 2), "y")[0]
    assert talk.say(0, push(3, "a", 2), "y")[0] == "apply round 2 of a: y"
    talk.say(0, Init(4, "b", 0, spec("eventual", shape=(1,))), "b0")
    assert "UnknownKeyError" in talk.say(0, fetch(5, AB, 0))[0]
    talk.say(0, Bind(5, bundle_id(AB), AB))
    assert talk.say(1, fetch(6, AB, 0)) == divided(6, rank=1)


def test_drop_divides_the_requests_for_the_bundle():
    talk = begun()
    talk.say(0, push(5, AB, 1, pull=True), "x")
    assert talk.say(0, Drop(6, "a"))[:2] == ["split a b", *divided(5, taken=True)]
    assert "UnknownKeyError" in talk.say(0, push(7, "a", 1, pull=True))[0]
    assert talk.say(0, push(8, "b", 1, pull=True)) == []
    assert talk.say(1, push(4, "b", 1), "z")[-1] == "0 < value(8) of b version 1 staleness 0"


# --- members ----------------------------------------------------------------------------------------


def test_strangers_and_those_who_have_left():
    talk = begun("eventual", workers=3, participants=(0, 1))
    talk.say(0, push(2, AB, 1), "x")
    (line,) = talk.say(2, push(1, AB, 1), "x")
    assert "push of the bundle of 2 keys, 'a' ... 'b' by worker 2: expected a participant, one of [0, 1]" in line
    assert talk.say(2, fetch(3, AB, 0)) == ["2 < value(3) of a+b version 1 staleness 0"]
    talk.say(1, Leave(6, ""))
    assert "push of the bundle of 2 keys, 'a' ... 'b' by worker 1: it has left" in talk.say(1, push(7, AB, 1), "z")[0]
    talk.say(0, push(8, "a", 2), "y")
    assert talk.serving.pieces["b", 0].level.is_here(1) is False
    for round in (1, 2):
        assert talk.say(2, push(9, AB, round), "x") == divided(9, rank=2)
    assert "it has left" in talk.say(1, push(10, "b", 1), "z")[0]
    assert talk.serving.pieces["b", 0].level.version == 1


def test_who_leaves_is_waited_for_no_longer():
    talk = begun()
    talk.say(0, push(5, AB, 1, pull=True), "x")
    assert talk.say(1, Leave(9, "")) == [
        "1 < Done(request_id=9)",
        "apply round 1 of a+b: x",
        "0 < value(5) of a+b version 1 staleness 0",
    ]
    talk = begun()
    talk.say(0, push(5, AB, 1, pull=True), "x")
    talk.say(1, push(3, "a", 1), "y")
    talk.say(0, push(6, "b", 1, pull=True))
    assert talk.say(1, Leave(9, "")) == [
        "1 < Done(request_id=9)",
        "apply round 1 of b: x[2:3]",
        "0 < value(6) of b version 1 staleness 0",
    ]


def test_one_who_left_is_left_in_the_parts_too():
    talk = begun(workers=3)
    for rank in range(3):
        talk.say(rank, push(1, AB, 1), f"x{rank}")
    talk.say(2, Leave(2, ""))
    talk.say(0, push(3, "a", 2), "y")
    assert talk.say(1, push(3, "a", 2), "z")[0] == "apply round 2 of a: y + z"
    assert talk.say(0, push(4, "b", 2), "y") == []
    assert talk.say(1, push(4, "b", 2), "z")[0] == "apply round 2 of b: y + z"
    assert talk.say(0, push(5, AB, 3), "v") == ["unite a b"]
    assert talk.say(1, push(5, AB, 3), "w")[0] == "apply round 3 of a+b: v + w"


def test_who_waits_for_a_lost_worker_fails():
    talk = begun(workers=3)
    talk.say(0, push(5, AB, 1, pull=True), "x")
    talk.say(0, fetch(6, "b", 1))
    lines = talk.read(talk.serving.lost(2, "killed"))
    assert [line[: line.index(", text")] for line in lines] == [
        f"0 < Failed(request_id={number}, error='WorkerLostError'" for number in (5, 6)
    ]
    assert "the bundle of 2 keys, 'a' ... 'b', round 1" in lines[0]
    assert "key 'b', round 1" in lines[1]
    assert all("workers 2 (last heard 0.0 s ago, lost: killed)" in line for line in lines)
    assert talk.read(talk.serving.lost(2, "killed")) == []


def test_and_so_does_who_would():
    talk = begun("bounded(0)")
    talk.serving.lost(1, "killed")
    lines = talk.say(0, push(5, AB, 1, pull=True), "x")
    assert lines[:3] == ["unite a b", "apply round 1 of a+b: x", "0 < Committed(request_id=5) when applied"]
    assert "WorkerLostError" in lines[3]


def test_a_newer_life_hears_nothing_of_what_the_older_one_asked():
    talk = begun("bounded(0)")
    talk.say(1, push(2, AB, 1), "x")
    talk.say(1, push(3, AB, 2, pull=True), "y")
    talk.say(0, push(4, "a", 1), "z")
    assert talk.say(1, Init(3, "a", 0, spec("bounded(0)", shape=(2,))), incarnation=2) == [
        "1 < Initialized(request_id=3, round=2)"
    ]
    assert talk.say(0, push(5, "a", 2), "z")[2:] == []
    assert talk.say(0, push(6, "b", 1), "z")[2:] == []
    assert talk.say(0, push(7, "b", 2), "z")[2:] == []
    assert talk.say(1, push(4, AB, 3), "w", incarnation=2)[:2] == ["unite a b", "apply round 3 of a+b: w"]


# --- why am I waiting? ------------------------------------------------------------------------------


def test_explain():
    talk = begun(workers=3)
    talk.say(1, push(2, AB, 1), "y")
    talk.say(0, push(5, AB, 1, pull=True), "x")
    talk.say(0, fetch(6, "b", 1))
    missing = "piece 0 on server 0, round 1: waits for workers 2 (last heard 0.0 s ago)"
    named = "the bundle of 2 keys, 'a' ... 'b'"
    assert f"{named}, {missing}" in talk.say(0, Explain(9, 5))[0]
    assert f"{named}, {missing}" in talk.say(1, Explain(9, 2))[0]
    assert f"key 'b', {missing}" in talk.say(0, Explain(9, 6))[0]
    talk.say(2, push(3, "a", 1), "z")
    assert f"key 'b', {missing}" in talk.say(0, Explain(9, 6))[0]
    assert "no such request" in talk.say(0, Explain(9, 5))[0]
