"""Single conversations with a server, as transcripts."""

from __future__ import annotations

import pytest

from kvstore.protocol.messages import (
    Barrier,
    Drop,
    Explain,
    Fetch,
    Freeze,
    Init,
    Leave,
    Push,
    ReadState,
    SetHyperparameters,
    SetOptimizer,
    WriteState,
)
from kvstore.protocol.settings import KEPT
from tests.protocol.conversation import Conversation, spec


def push(request_id, round, pull=False, acknowledge=False):
    return Push(request_id, "w", 0, round, pull, acknowledge)


def begun(model="sequential", workers=2, **described) -> Conversation:
    """A conversation in which all workers have initialised ``w``."""
    talk = Conversation(workers)
    for rank in range(workers):
        talk.say(rank, Init(0, "w", 0, spec(model, **described)), "w0" if rank == 0 else None)
    return talk


# --- init -------------------------------------------------------------------------------------------


def test_init_by_rank_0_first():
    talk = Conversation()
    assert talk.say(0, Init(1, "w", 0, spec()), "w0") == [
        "create ('w', 0) = w0",
        "0 < Initialized(request_id=1, round=0)",
    ]
    assert talk.say(1, Init(7, "w", 0, spec())) == ["1 < Initialized(request_id=7, round=0)"]


def test_init_by_others_first_waits_for_rank_0_and_nobody_else():
    talk = Conversation(workers=3)
    assert talk.say(2, Init(7, "w", 0, spec())) == []
    assert talk.say(0, Init(1, "w", 0, spec()), "w0") == [
        "create ('w', 0) = w0",
        "0 < Initialized(request_id=1, round=0)",
        "2 < Initialized(request_id=7, round=0)",
    ]


def test_init_again_answers_with_the_senders_rounds_and_changes_nothing():
    talk = begun("eventual")
    talk.say(1, push(3, 1), "a")
    talk.say(1, push(4, 2), "b")
    assert talk.say(1, Init(9, "w", 0, spec("eventual"))) == ["1 < Initialized(request_id=9, round=2)"]
    assert talk.say(0, Init(9, "w", 0, spec("eventual")), "another") == ["0 < Initialized(request_id=9, round=0)"]


@pytest.mark.parametrize("early", [True, False])
def test_a_disagreement_shows_both_sides(early):
    talk = Conversation()
    mine, theirs = spec(shape=(4,)), spec("bounded(2)", shape=(2, 2))
    lines = talk.say(1, Init(7, "w", 0, theirs)) if early else []
    lines += talk.say(0, Init(1, "w", 0, mine), "w0")
    lines += [] if early else talk.say(1, Init(7, "w", 0, theirs))
    assert lines[:2] == ["create ('w', 0) = w0", "0 < Initialized(request_id=1, round=0)"]
    assert "DisagreementError" in lines[2]
    assert "shape (4,)" in lines[2]
    assert "cluster level sequential" in lines[2]
    assert "worker 1: shape (2, 2)" in lines[2]
    assert "cluster level bounded(2)" in lines[2]


def test_init_without_a_value_or_with_strange_members():
    talk = Conversation()
    assert talk.say(0, Init(1, "w", 0, spec())) == ["0 < Missing(request_id=1)"]
    assert "among workers [0, 1], got [0, 2]" in talk.say(0, Init(2, "w", 0, spec(participants=(2, 0))), "w0")[0]
    assert "OptionError" in talk.say(0, Init(3, "w", 0, spec("sometimes")), "w0")[0]
    assert talk.serving.pieces == {}


def test_init_fails_when_rank_0_is_gone():
    talk = Conversation()
    talk.say(1, Init(7, "w", 0, spec()))
    (line,) = talk.read(talk.serving.lost(0, "its connection ended"))
    assert "1 < Failed(request_id=7, error='WorkerLostError'" in line
    assert "workers 0 (never heard of, lost: its connection ended)" in line
    assert "WorkerLostError" in talk.say(1, Init(8, "w", 0, spec()))[0]


def test_when_rank_0_leaves_the_next_one_is_the_first():
    talk = Conversation(workers=3)
    talk.say(1, Init(7, "w", 0, spec()))
    talk.say(2, Init(8, "w", 0, spec()))
    assert talk.say(0, Leave(2, "")) == ["0 < Done(request_id=2)", "1 < Missing(request_id=7)"]
    assert talk.say(1, Init(7, "w", 0, spec()), "w1") == [
        "create ('w', 0) = w1",
        "1 < Initialized(request_id=7, round=0)",
        "2 < Initialized(request_id=8, round=0)",
    ]


def test_init_fails_when_all_have_left():
    talk = Conversation()
    talk.say(1, Leave(7, ""))
    talk.say(0, Leave(2, ""))
    assert "all have left" in talk.say(1, Init(8, "w", 0, spec()), "w1")[0]


# --- push and pull ----------------------------------------------------------------------------------


def test_a_sequential_round():
    talk = begun()
    assert talk.say(1, push(3, 1), "b") == []
    assert talk.say(0, push(5, 1, pull=True, acknowledge=True), "a") == [
        "apply round 1: a + b",  # by rank, whoever came first
        "1 < Committed(request_id=3) when applied",
        "0 < value(5) version 1 staleness 0",
    ]


def test_who_has_to_wait_is_told_that_it_is_accepted():
    talk = begun()
    assert talk.say(0, push(5, 1, acknowledge=True), "a") == ["0 < Accepted(request_id=5)"]
    assert talk.say(1, push(5, 1, acknowledge=True), "b") == [
        "apply round 1: a + b",
        "0 < Committed(request_id=5) when applied",
        "1 < Committed(request_id=5) when applied",
    ]


def test_bounded_commits_at_once_and_holds_up_the_pull():
    talk = begun("bounded(0)")
    assert talk.say(0, push(5, 1, pull=True, acknowledge=True), "a") == [
        "apply round 1: a",
        "0 < Committed(request_id=5) when applied",
    ]
    assert talk.say(1, push(3, 1), "b") == [
        "apply round 1: b",
        "1 < Committed(request_id=3) when applied",
        "0 < value(5) version 2 staleness 0",
    ]


def test_eventual_answers_at_once():
    talk = begun("eventual")
    assert talk.say(0, push(5, 1, pull=True), "a") == ["apply round 1: a", "0 < value(5) version 1 staleness 1"]
    assert talk.say(0, Fetch(6, "w", 0, 1)) == ["0 < value(6) version 1 staleness 1"]


def test_a_pull_that_overtakes_its_push_waits():
    talk = begun("eventual")
    assert talk.say(0, Fetch(6, "w", 0, 1)) == []
    assert talk.say(0, push(5, 1), "a")[-1] == "0 < value(6) version 1 staleness 1"


def test_a_repeat_is_answered_and_has_no_effect():
    talk = begun("eventual")
    talk.say(0, push(5, 1), "a")
    for payload in ("a", None):
        assert talk.say(0, push(5, 1), payload) == ["0 < Committed(request_id=5) when applied"]
    assert talk.serving.pieces["w", 0].level.version == 1


def test_a_repeat_of_what_still_waits():
    talk = begun()
    talk.say(0, push(5, 1, pull=True, acknowledge=True), "a")
    for payload in ("a", None):
        assert talk.say(0, push(5, 1, pull=True, acknowledge=True), payload) == ["0 < Accepted(request_id=5)"]
    lines = talk.say(1, push(3, 1), "b")
    assert lines.count("0 < value(5) version 1 staleness 0") == 1


def test_an_older_push_is_acknowledged():
    talk = begun("eventual")
    talk.say(0, push(5, 1), "a")
    talk.say(0, push(6, 2), "b")
    assert talk.say(0, push(5, 1), "a") == ["0 < Committed(request_id=5) when applied"]


def test_a_gap_waits():
    talk = begun("eventual")
    assert talk.say(0, push(6, 2), "b") == []
    talk.say(0, push(5, 1), "a")
    assert talk.say(0, push(6, 2), "b")[0] == "apply round 2: b"


def test_asking_for_a_push_that_never_came():
    talk = begun()
    assert talk.say(0, push(5, 1, acknowledge=True)) == ["0 < Missing(request_id=5)"]


def test_unknown_keys_and_strangers():
    talk = begun(workers=3, participants=(0, 1))
    assert "UnknownKeyError" in talk.say(0, Push(1, "v", 0, 1, False, False), "a")[0]
    assert "UnknownKeyError" in talk.say(0, Fetch(1, "w", 1, 0))[0]
    assert "expected a participant, one of [0, 1]" in talk.say(2, push(1, 1), "a")[0]
    assert talk.say(2, Fetch(2, "w", 0, 0)) == ["2 < value(2) version 0 staleness 0"]
    assert "ProtocolError" in talk.say(0, Barrier(3, 1))[0]
    assert "ProtocolError" in talk.say(-1, Fetch(4, "w", 0, 0))[0]


def test_drop():
    talk = begun()
    assert talk.say(0, Drop(1, "w")) == ["forget w", "0 < Done(request_id=1)"]
    assert talk.say(0, Drop(2, "w")) == ["0 < Done(request_id=2)"]
    assert talk.say(0, Init(3, "w", 0, spec("eventual")), "new")[0] == "create ('w', 0) = new"


# --- optimizer --------------------------------------------------------------------------------------

SGD, ADAM = {"name": "sgd"}, {"name": "adam"}


def test_an_optimizer_is_in_effect_from_the_round_after_since():
    talk = begun(workers=1)
    assert talk.say(0, SetOptimizer(1, SGD, False, {"w": 1})) == ["0 < Done(request_id=1)"]
    assert talk.say(0, push(2, 1), "a")[0] == "apply round 1: a"
    assert talk.say(0, push(3, 2), "b")[0] == "apply round 2: b by sgd lr=0.1 #1"
    assert talk.say(0, SetHyperparameters(4, {"lr": 0.5}, {"w": 3})) == ["0 < Done(request_id=4)"]
    assert talk.say(0, push(5, 3), "c")[0] == "apply round 3: c by sgd lr=0.1 #1"
    assert talk.say(0, push(6, 4), "d")[0] == "apply round 4: d by sgd lr=0.5 #1"
    assert talk.say(0, SetOptimizer(7, ADAM, True, {"w": 4})) == ["0 < Done(request_id=7)"]
    assert talk.say(0, push(8, 5), "e")[0] == "apply round 5: e by adam lr=0.1 #2"


def test_set_optimizer_twice():
    talk = begun()
    assert talk.say(0, SetOptimizer(1, SGD, False, {})) == ["0 < Done(request_id=1)"]
    assert talk.say(1, SetOptimizer(1, SGD, False, {})) == ["1 < Done(request_id=1)"]
    assert len(talk.serving.settings) == 1
    (line,) = talk.say(1, SetOptimizer(2, ADAM, False, {}))
    assert "OptimizerError" in line
    assert "sgd" in line
    assert "adam" in line
    assert len(talk.serving.settings) == 1


def test_wrong_optimizers():
    talk = begun()
    assert "OptimizerError" in talk.say(0, SetHyperparameters(1, {"lr": 1}, {}))[0]
    assert "OptimizerError" in talk.say(0, SetOptimizer(2, {}, False, {}))[0]


def test_the_optimizers_state():
    talk = begun()
    assert talk.say(0, ReadState(1, "w", 0)) == ["0 < state(1)"]
    write = WriteState(2, "w", 0, 3, ("m",), ("float32",))
    assert talk.say(0, write, "state") == ["store state state, then 0 < Done(2)"]
    assert "UnknownKeyError" in talk.say(0, ReadState(3, "v", 0))[0]
    assert "UnknownKeyError" in talk.say(0, WriteState(4, "v", 0, 3, (), ()))[0]


# --- members ----------------------------------------------------------------------------------------


def test_who_leaves_is_waited_for_no_longer():
    talk = begun()
    talk.say(0, push(5, 1, pull=True), "a")
    assert talk.say(1, Leave(9, "")) == [
        "1 < Done(request_id=9)",
        "apply round 1: a",
        "0 < value(5) version 1 staleness 0",
    ]
    assert talk.say(1, Leave(9, "")) == ["1 < Done(request_id=9)"]
    assert "it has left" in talk.say(1, push(3, 1), "b")[0]
    assert talk.say(0, Init(6, "v", 0, spec()), "v0")[0] == "create ('v', 0) = v0"
    assert talk.say(0, Push(7, "v", 0, 1, False, False), "x")[0] == "apply round 1 of v: x"  # alone there, too


def test_who_waits_for_a_lost_worker_fails():
    talk = begun()
    talk.say(0, push(5, 1, pull=True, acknowledge=True), "a")
    lines = talk.read(talk.serving.lost(1, "its connection ended (pid 7 on host)"))
    assert lines == [
        "0 < Failed(request_id=5, error='WorkerLostError', text=\"key 'w', round 1: waits for workers 1 "
        '(last heard 0.0 s ago, lost: its connection ended (pid 7 on host))")'
    ]


def test_and_so_does_who_would():
    talk = begun("bounded(0)")
    talk.serving.lost(1, "killed")
    lines = talk.say(0, push(5, 1, pull=True), "a")
    assert lines[:2] == ["apply round 1: a", "0 < Committed(request_id=5) when applied"]
    assert "WorkerLostError" in lines[2]


def test_what_follows_when_a_worker_leaves_with_a_reason_the_scheduler_says():
    talk = begun()
    talk.say(0, push(5, 1), "a")
    assert talk.say(1, Leave(9, "ValueError: nan")) == ["1 < Done(request_id=9)"]
    assert "ValueError: nan" in talk.read(talk.serving.lost(1, "ValueError: nan"))[0]


def test_rounds_that_the_lost_worker_is_in_already_are_kept():
    talk = begun()
    talk.say(1, push(3, 1), "b")
    assert talk.read(talk.serving.lost(1, "killed")) == []
    assert talk.say(0, push(5, 1), "a")[0] == "apply round 1: a + b"


def test_a_newer_incarnation_fences_the_older_one_and_goes_on():
    talk = begun("eventual")
    talk.say(1, push(3, 1), "b")
    assert talk.say(1, Init(1, "w", 0, spec("eventual")), incarnation=2) == ["1 < Initialized(request_id=1, round=1)"]
    assert "FencedError" in talk.say(1, push(4, 2), "c", incarnation=1)[0]
    assert talk.say(1, push(2, 2), "d", incarnation=2)[0] == "apply round 2: d"


def test_a_new_life_is_told_what_took_effect_and_its_push_again_changes_nothing():
    talk = begun()
    talk.say(1, push(3, 1), "b")
    assert talk.say(1, Init(1, "w", 0, spec()), incarnation=2) == ["1 < Initialized(request_id=1, round=0)"]
    assert talk.say(1, push(2, 1), "d", incarnation=2) == []
    assert talk.say(0, push(5, 1), "a")[0] == "apply round 1: a + b"


def test_a_joining_life_ends_the_one_before():
    """This server may not have been told of its loss."""
    talk = begun()
    talk.say(0, push(5, 1), "a")
    assert talk.say(1, Freeze(1), incarnation=2) == [
        "apply round 1: a",
        "0 < Committed(request_id=5) when applied",
        "1 < Frozen(request_id=1, rounds={'w': 1})",
    ]


def test_settings_that_are_over_are_forgotten():
    talk = begun()
    talk.say(0, SetOptimizer(1, SGD, False, {}))
    for round in range(1, 40):
        talk.say(0, push(2 * round, round), "a")
        talk.say(1, push(2 * round, round), "b")
        talk.say(0, SetHyperparameters(2 * round + 1, {"lr": round}, {"w": round}))
        assert len(talk.serving.settings) <= KEPT + 1
    talk.say(0, push(900, 40), "a")
    assert talk.say(1, push(900, 40), "b")[0] == "apply round 40: a + b by sgd lr=39 #1"


# --- why am I waiting? ------------------------------------------------------------------------------


def test_explain():
    talk = begun(workers=3)
    talk.now = 4.0
    talk.say(1, push(3, 1), "b")
    talk.now = 10.0
    talk.say(0, push(5, 1, pull=True), "a")
    talk.say(0, Fetch(6, "w", 0, 1))
    talk.say(1, Init(8, "v", 0, spec()))
    talk.now = 12.5
    why = "key 'w', piece 0 on server 0, round 1: waits for workers 2 (last heard 12.5 s ago)"
    assert talk.say(0, Explain(9, 5)) == [f'0 < Explanation(request_id=9, text="{why}")']
    assert talk.say(0, Explain(9, 6)) == [f'0 < Explanation(request_id=9, text="{why}")']
    assert why in talk.say(1, Explain(9, 3))[0]
    (line,) = talk.say(1, Explain(9, 8))
    assert "key 'v': its init waits for that of worker 0; waits for workers 0 (last heard" in line
    assert "no such request waiting" in talk.say(0, Explain(9, 77))[0]


def test_a_worker_that_was_never_heard_of():
    talk = Conversation(2)
    talk.say(0, Init(0, "w", 0, spec()), "w0")
    talk.say(0, push(5, 1), "a")
    assert "1 (never heard of)" in talk.say(0, Explain(6, 5))[0]
