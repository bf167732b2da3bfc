"""A cut is exactly the pushes before the markers: conversations, and random schedules against an oracle."""

from __future__ import annotations

import random

import pytest

from kvstore.protocol.actions import Apply, LoseCut, TakeCut, Unite
from kvstore.protocol.cutting import HOLD_S
from kvstore.protocol.messages import Admit, Bind, Freeze, Init, Leave, Mark, Push, SetOptimizer
from kvstore.protocol.pieces import bundle_id
from kvstore.protocol.serving import Serving
from tests.protocol.conversation import Rule, spec

MODELS = ["sequential", "bounded(0)", "bounded(2)", "eventual"]


class Talk:
    """A server core whose values are the sets of the pushes that have been applied."""

    def __init__(self, keys: dict[str, str], workers: int) -> None:
        self.serving = Serving(workers, Rule.parse, "server 0")
        self.applied: dict[str, set[tuple[int, int]]] = {key: set() for key in keys}
        self.cuts: dict[int, dict[str, set[tuple[int, int]]]] = {}
        self.versions: dict[int, dict[str, int]] = {}
        self.lost: dict[int, str] = {}
        self.now = 0.0
        for key, model in keys.items():
            for rank in range(workers):
                self.say(rank, Init(0, key, 0, spec(model)), "0" if rank == 0 else None)

    def say(self, rank, message, payload=None, incarnation=1):
        return self.do(self.serving.handle(rank, incarnation, message, payload, self.now))

    def push(self, rank, key, round):
        return self.say(rank, Push(round, key, 0, round, False, True), (rank, round))

    def do(self, actions):
        for action in actions:
            if isinstance(action, Apply):
                key = action.piece[0]
                members = self.serving.binding.bundles[key].keys if isinstance(key, bytes) else (key,)
                for member in members:
                    self.applied[member].update(action.payloads)
            elif isinstance(action, TakeCut):
                records = [record for _, parts in action.places for record, _ in parts]
                self.cuts[action.cut] = {record.key: set(self.applied[record.key]) for record in records}
                self.versions[action.cut] = {record.key: record.version for record in records}
            elif isinstance(action, LoseCut):
                self.lost[action.cut] = str(action.error)
        return actions


def expected(key, model, marks):
    """The dumb oracle: all pushes up to the markers; under sequential, the rounds that all have marked."""
    rounds = [mark.get(key, 0) for mark in marks]
    if model == "sequential":
        rounds = [min(rounds)] * len(rounds)
    return {(rank, n) for rank, last in enumerate(rounds) for n in range(1, last + 1)}


def test_later_pushes_wait_until_all_markers_are_here():
    talk = Talk({"w": "eventual"}, 2)
    talk.push(0, "w", 1)
    talk.say(0, Mark(5, 9, (0, 1), {"w": 1}))
    accepted = talk.push(0, "w", 2)
    assert [str(action.message) for action in accepted] == ["Accepted(request_id=2)"]
    assert talk.applied["w"] == {(0, 1)}
    talk.push(1, "w", 1)
    assert talk.cuts == {}
    talk.say(1, Mark(5, 9, (0, 1), {"w": 1}))
    assert talk.cuts == {9: {"w": {(0, 1), (1, 1)}}}
    assert talk.applied["w"] == {(0, 1), (1, 1), (0, 2)}  # what was held back has gone on


def test_a_push_that_belongs_to_the_cut_and_comes_after_the_marker_is_waited_for():
    talk = Talk({"w": "eventual"}, 1)
    talk.say(0, Mark(5, 9, (0,), {"w": 1}))
    assert talk.cuts == {}
    talk.push(0, "w", 1)
    assert talk.cuts == {9: {"w": {(0, 1)}}}


def test_a_held_push_that_is_asked_about_is_accepted_and_counted_once():
    talk = Talk({"w": "eventual"}, 2)
    talk.say(0, Mark(5, 9, (0, 1), {"w": 0}))
    talk.push(0, "w", 1)
    again = talk.say(0, Push(1, "w", 0, 1, False, True))  # without its payload: what became of it?
    assert [str(action.message) for action in again] == ["Accepted(request_id=1)"]
    talk.push(0, "w", 1)
    actions = talk.say(1, Mark(5, 9, (0, 1), {"w": 0}))
    assert [type(action) for action in actions].count(Apply) == 1
    assert talk.serving.pieces["w", 0].level.rounds == {0: 1, 1: 0}


def test_sequential_with_uneven_markers_is_the_last_round_of_all():
    talk = Talk({"w": "sequential"}, 2)
    for rank in (0, 1):
        talk.push(rank, "w", 1)
    talk.push(0, "w", 2)
    talk.say(0, Mark(5, 9, (0, 1), {"w": 2}))
    talk.say(1, Mark(5, 9, (0, 1), {"w": 1}))
    assert talk.cuts == {9: {"w": {(0, 1), (1, 1)}}}
    talk.push(1, "w", 2)
    assert (1, 2) in talk.applied["w"]


@pytest.mark.parametrize("how", ["leave", "fail", "wait", "continue"])
def test_who_is_gone_is_not_waited_for(how):
    talk = Talk({"w": "eventual"}, 2)
    talk.push(1, "w", 1)
    talk.say(0, Mark(5, 9, (0, 1), {"w": 0}))
    talk.push(0, "w", 1)
    if how == "leave":
        talk.say(1, Leave(6, ""))
    else:
        talk.do(talk.serving.lost(1, "it died", how))
    assert talk.cuts == {9: {"w": {(1, 1)}}}
    assert (0, 1) in talk.applied["w"]


def test_a_cut_of_nobody_is_taken_at_once():
    talk = Talk({"w": "sequential"}, 1)
    talk.do(talk.serving.open_cut(9, (), 0.0))
    assert talk.cuts == {9: {"w": set()}}


def test_a_late_marker_ends_the_cut_and_says_who():
    talk = Talk({"w": "eventual"}, 2)
    talk.say(0, Mark(5, 9, (0, 1), {"w": 0}))
    talk.push(0, "w", 1)
    assert talk.do(talk.serving.expire_cuts(HOLD_S)) == []
    talk.now = HOLD_S + 1
    talk.do(talk.serving.expire_cuts(talk.now))
    assert "waits for workers 1" in talk.lost[9] and "have not reached their cut point" in talk.lost[9]
    assert talk.applied["w"] == {(0, 1)}
    talk.say(1, Mark(5, 9, (0, 1), {"w": 0}))  # too late: it begins nothing anew
    assert not talk.serving.cutting.open and talk.cuts == {}


def test_pushes_beside_the_cut_point_fail_the_cut_instead_of_being_in_it():
    talk = Talk({"w": "eventual"}, 1)
    talk.push(0, "w", 1)
    talk.push(0, "w", 2)
    talk.say(0, Mark(5, 9, (0,), {"w": 1}))
    assert talk.cuts == {} and "pushed while it passed its cut point" in talk.lost[9]


def test_keys_made_after_rank_0s_marker_are_not_in_the_cut():
    talk = Talk({"w": "eventual"}, 2)
    talk.say(0, Mark(5, 9, (0, 1), {}))
    talk.applied["new"] = set()
    talk.say(0, Init(7, "new", 0, spec("eventual")), "0")
    talk.say(1, Mark(5, 9, (0, 1), {}))
    assert talk.cuts == {9: {"w": set()}}


def test_a_cut_that_is_not_wanted_any_more_holds_nothing_back():
    talk = Talk({"w": "eventual"}, 2)
    talk.say(0, Mark(5, 9, (0, 1), {"w": 0}))
    talk.push(0, "w", 1)
    talk.do(talk.serving.end_cut(9, 0.0))
    assert talk.applied["w"] == {(0, 1)}


def test_a_bundle_is_cut_as_its_keys():
    talk = Talk({"a": "eventual", "b": "eventual"}, 2)
    keys, name = ("a", "b"), bundle_id(("a", "b"))
    talk.say(0, Bind(1, name, keys))
    assert any(isinstance(action, Unite) for action in talk.push(0, name, 1))
    talk.say(0, Mark(5, 9, (0, 1), {"a": 1, "b": 1}))
    talk.push(0, name, 2)
    assert talk.applied == {"a": {(0, 1)}, "b": {(0, 1)}}
    talk.push(1, "b", 1)  # which divides it
    talk.say(1, Mark(5, 9, (0, 1), {"a": 0, "b": 1}))
    assert talk.cuts == {9: {"a": {(0, 1)}, "b": {(0, 1), (1, 1)}}}


def test_updates_of_a_bundle_are_counted_for_its_keys():
    talk = Talk({"a": "eventual", "b": "eventual"}, 1)
    talk.say(0, SetOptimizer(1, {"name": "sgd"}, False, {}))
    keys, name = ("a", "b"), bundle_id(("a", "b"))
    talk.say(0, Bind(1, name, keys))
    talk.push(0, name, 1)
    (taken,) = [one for one in talk.say(0, Mark(5, 9, (0,), {"a": 1, "b": 1})) if isinstance(one, TakeCut)]
    ((place, parts),) = taken.places
    assert place == (name, 0)
    assert [(record.key, record.version, record.step, span) for record, span in parts] == [
        ("a", 1, 1, (0, 4)),
        ("b", 1, 1, (4, 8)),
    ]


def test_a_new_life_of_a_worker_is_held_back_and_forgets_what_the_old_one_had_held():
    talk = Talk({"w": "eventual"}, 2)
    talk.say(0, Mark(5, 9, (0, 1), {"w": 0}))
    talk.push(0, "w", 1)
    talk.say(0, Push(1, "w", 0, 1, False, True), (0, 1), incarnation=2)
    talk.say(1, Mark(5, 9, (0, 1), {"w": 0}))
    assert talk.cuts == {9: {"w": set()}}
    assert talk.serving.pieces["w", 0].level.rounds == {0: 1, 1: 0}


@pytest.mark.parametrize("how", ["joins", "returns"])
def test_who_comes_during_the_cut_takes_part_in_its_rounds_and_no_later_ones(how):
    talk = Talk({"a": "sequential", "b": "sequential"}, 2)
    late = 2 if how == "joins" else 1
    if how == "returns":
        talk.do(talk.serving.lost(1, "it died", "wait"))
    talk.do(talk.serving.open_cut(9, (0,) if how == "joins" else (0, 1), 0.0))
    if how == "joins":
        talk.say(1, Leave(4, ""))
        talk.say(late, Freeze(1))
        talk.say(late, Admit(2, {"a": 0, "b": 0}))
    here = {"a": {(0, 1), (late, 1)}, "b": {(0, 1), (late, 1)}}
    talk.push(late, "b", 1)
    talk.push(0, "a", 1)
    talk.push(0, "b", 1)  # has taken effect: so it can come to its cut point, but for a
    talk.say(0, Mark(5, 9, (0, 1), {"a": 1, "b": 1}))
    assert talk.cuts == {}  # b is complete, a waits for who came
    talk.push(late, "a", 1)
    assert talk.cuts == {9: here}
    assert talk.versions == {9: {"a": 1, "b": 1}}


@pytest.mark.parametrize("seed", range(150))
def test_random_schedules_against_the_oracle(seed):
    """Messages of a worker may overtake each other, as those of different pieces do; cuts may overlap."""
    rng = random.Random(seed)
    workers = rng.randint(1, 3)
    keys = {f"k{i}": rng.choice(MODELS) for i in range(rng.randint(1, 4))}
    talk = Talk(keys, workers)
    steps, marks_at = rng.randint(2, 6), sorted(rng.sample(range(6), rng.randint(1, 3)))
    awaited = tuple(range(workers))
    marks: dict[int, list[dict[str, int]]] = {at: [] for at in marks_at}
    ways: list[list[list[tuple]]] = []
    for _ in range(workers):
        rounds = dict.fromkeys(keys, 0)
        phases: list[list[tuple]] = []  # in order; within one, in any order
        for step in range(max(steps, marks_at[-1] + 1)):
            pushes = []
            for key in keys:
                rounds[key] += 1
                pushes.append(("push", key, rounds[key]))
            phases.append(pushes)
            if step in marks:
                marks[step].append(dict(rounds))
                phases.append([("mark", step, dict(rounds))])
        ways.append(phases)
    open_marks = [[] for _ in range(workers)]
    while any(ways) or any(open_marks):
        rank = rng.randrange(workers)
        if open_marks[rank] and (not ways[rank] or rng.random() < 0.5):
            phase, later = open_marks[rank], True
        elif ways[rank]:
            phase, later = ways[rank][0], False
        else:
            continue
        kind, what, value = phase.pop(rng.randrange(len(phase)))
        if kind == "push":
            talk.push(rank, what, value)
            if rng.random() < 0.2:
                talk.push(rank, what, value)
        else:
            talk.say(rank, Mark(0, what, awaited, value))
        if not later and not phase:
            ways[rank].pop(0)
        elif not later and len(ways[rank]) > 1 and ways[rank][1][0][0] == "mark" and rng.random() < 0.5:
            open_marks[rank] += ways[rank].pop(1)  # the marker overtakes pushes that belong to the cut
            while open_marks[rank]:
                _, at, given = open_marks[rank].pop()
                talk.say(rank, Mark(0, at, awaited, given))
    last = max(steps, marks_at[-1] + 1)
    for _ in range(last):  # what was a gap is sent again, as a worker does
        for n in range(1, last + 1):
            for key in keys:
                for rank in range(workers):
                    talk.push(rank, key, n)
    assert not talk.serving.cutting.open and not talk.lost
    for at, given in marks.items():
        for key, model in keys.items():
            assert talk.cuts[at][key] == expected(key, model, given), (at, key, model)
    for key in keys:  # nothing was lost on the way
        assert talk.applied[key] == {(rank, n) for rank in range(workers) for n in range(1, last + 1)}
