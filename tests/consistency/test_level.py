"""Level and its models against the oracle, on random schedules; and each line of the table by itself."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore import consistency
from kvstore.consistency import Answer, Bounded, Eventual, Level, Pull, Sequential, Update, parse
from kvstore.errors import OptionError
from tests.consistency.oracle import Oracle

MODELS = ["sequential", "bounded(0)", "bounded(1)", "bounded(3)", "eventual"]
NAMES = pytest.mark.parametrize("names", [(0, 1, 2), (3, 7, 40)], ids=["devices", "workers"])


class Schedule:
    """A random run of a Level beside the oracle; every step is compared."""

    def __init__(self, model: str, names: tuple[int, ...], rng: random.Random) -> None:
        self.level = Level(parse(model), names)
        bound = int(model[8:-1]) if model.startswith("bounded") else 0
        self.oracle = Oracle(model.split("(")[0], bound, names)
        self.rng = rng
        self.names = names
        self.updates: list[list[tuple[int, int]]] = []
        self.waiting: dict[int, tuple[int, int]] = {}
        self.tickets = 0
        self.largest_staleness = 0

    def step(self) -> None:
        here = [p for p in self.names if p not in self.oracle.gone()]
        what = self.rng.random()
        if what < 0.5 and here:
            p = self.rng.choice(here)
            if parse(str(self.level.model)).pull_before_next_push and any(q == p for q, _ in self.waiting.values()):
                return  # its pull comes first
            self.oracle.history.append(("push", p))
            self.compare(*self.level.push(p))
        elif what < 0.53 and here:
            p = self.rng.choice(here)
            if any(q == p for q, _ in self.waiting.values()):
                return  # it leaves when its pulls are answered
            self.oracle.history.append(("leave", p))
            self.compare(*self.level.leave(p))
        else:
            self.pull(self.rng.choice((*self.names, 99)))

    def pull(self, p: int) -> None:
        own = self.oracle.rounds().get(p, 0)
        self.tickets += 1
        answer = self.level.pull(Pull(self.tickets, ((p, own),)))
        may = self.oracle.may_answer(p, own)
        assert (answer is not None) == may, (self.oracle, p, own)
        self.waiting[self.tickets] = (p, own)
        if answer is not None:
            self.answered(answer)

    def compare(self, updates: list[Update], answers: list[Answer]) -> None:
        self.updates += [list(update.contributions) for update in updates]
        assert self.updates == self.oracle.updates()  # neither early nor late, and in this order
        assert self.level.version == len(self.updates)
        assert all(update.round == max(n for _, n in update.contributions) for update in updates)
        now = {ticket for ticket, (p, own) in self.waiting.items() if self.oracle.may_answer(p, own)}
        assert {answer.ticket for answer in answers} == now  # neither early nor late
        for answer in answers:
            self.answered(answer)
        for p in self.names:
            for n in range(1, self.oracle.rounds()[p] + 1):
                assert self.level.in_effect(p, n) == ((p, n) in self.oracle.held())

    def answered(self, answer: Answer) -> None:
        p, own = self.waiting.pop(answer.ticket)
        value = {push for update in self.updates for push in update}
        assert answer.version == len(self.updates)
        assert answer.staleness == self.oracle.staleness(p, own)
        self.largest_staleness = max(self.largest_staleness, answer.staleness)
        if p not in self.names:
            return
        assert {(p, n) for n in range(1, own + 1)} <= value  # it reads its own writes
        model = self.level.model
        if isinstance(model, Bounded):
            assert answer.staleness <= model.staleness
            for q in self.names:
                last = self.oracle.last_round(q)
                upto = own - model.staleness if last is None else min(last, own - model.staleness)
                assert {(q, n) for n in range(1, upto + 1)} <= value
        if isinstance(model, Sequential) and p not in self.oracle.gone():
            assert len(self.updates) == own  # right after its own last round: all read the same


@NAMES
@pytest.mark.parametrize("model", MODELS)
def test_random_schedules(model, names):
    for seed in range(40):
        rng = random.Random(f"{model} {seed}")
        schedule = Schedule(model, names[: rng.randint(1, len(names))], rng)
        for _ in range(40):
            schedule.step()


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(MODELS), st.integers(1, 4), st.randoms(use_true_random=False), st.integers(1, 40))
def test_any_schedule(model, participants, rng, steps):
    schedule = Schedule(model, tuple(range(participants)), rng)
    for _ in range(steps):
        schedule.step()


@pytest.mark.parametrize("model", ["bounded(1)", "bounded(3)"])
def test_the_bound_is_reached(model):
    largest = 0
    for seed in range(40):
        schedule = Schedule(model, (0, 1, 2), random.Random(seed))
        for _ in range(60):
            schedule.step()
        largest = max(largest, schedule.largest_staleness)
    assert largest == parse(model).staleness  # and never above, as each answer was checked


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=30))
def test_sequential_participants_read_the_same_values(order):
    level, seen = Level(Sequential(), (0, 1, 2)), {}
    applied: list[Update] = []
    waiting: dict[int, int] = {}
    for p in order:
        if p in waiting:
            continue
        updates, answers = level.push(p)
        applied += updates
        own = level.rounds[p]
        for answer in answers:
            seen.setdefault(waiting.pop(answer.ticket), set()).add(tuple(applied))
        answer = level.pull(Pull(p, ((p, own),)))
        if answer is None:
            waiting[p] = own
        else:
            seen.setdefault(own, set()).add(tuple(applied))
    assert all(len(values) == 1 for values in seen.values())


# --- line by line -----------------------------------------------------------------------------------


@NAMES
def test_sequential(names):
    a, b, c = names
    level = Level(Sequential(), names)
    assert level.push(c) == ([], [])
    assert level.push(a) == ([], [])
    assert level.pull(Pull("pull", ((a, 1),))) is None
    assert level.blockers(level.waiting["pull"]) == [b]
    assert level.push(b) == ([Update(1, ((a, 1), (b, 1), (c, 1)))], [Answer("pull", 1, 0)])


@NAMES
def test_bounded_blocks_pulls_and_never_pushes(names):
    a, b, c = names
    level = Level(Bounded(1), names)
    for n in (1, 2, 3):
        assert level.push(a)[0] == [Update(n, ((a, n),))]
    assert level.pull(Pull("pull", ((a, 3),))) is None
    assert level.push(b)[1] == level.push(b)[1] == level.push(c)[1] == []
    assert level.blockers(level.waiting["pull"]) == [c]
    assert level.push(c)[1] == [Answer("pull", 7, 1)]


@NAMES
def test_eventual_answers_at_once(names):
    level = Level(Eventual(), names)
    level.push(names[0])
    assert level.pull(Pull("pull", ((names[0], 1),))) == Answer("pull", 1, 1)


def test_a_pull_that_comes_before_its_push_waits_for_it():
    for model in MODELS:
        level = Level(parse(model), (0,))
        assert level.pull(Pull("pull", ((0, 1),))) is None, model
        assert level.push(0) == ([Update(1, ((0, 1),))], [Answer("pull", 1, 0)])


def test_a_pull_for_several_waits_for_each():
    level = Level(Bounded(0), (0, 1))
    level.push(0)
    assert level.pull(Pull("pull", ((0, 1), (1, 1)))) is None
    assert level.push(1)[1] == [Answer("pull", 2, 0)]


def test_one_who_leaves_counts_up_to_its_last_round():
    level = Level(Sequential(), (0, 1))
    level.push(0), level.push(1), level.push(0)
    assert level.leave(1) == ([Update(2, ((0, 2),))], [])
    assert level.leave(1) == ([], [])
    assert level.leave(99) == ([], [])
    assert level.members_of(1) == [0, 1]
    assert level.members_of(2) == [0]


def test_leaving_wakes_bounded_pulls():
    level = Level(Bounded(0), (0, 1))
    level.push(0)
    assert level.pull(Pull("pull", ((0, 1),))) is None
    assert level.leave(1) == ([], [Answer("pull", 1, 0)])


def test_nobody_is_behind_when_all_have_left():
    level = Level(Bounded(0), (0, 1))
    level.push(0)
    level.leave(1), level.leave(0)
    assert level.pull(Pull("pull", ((0, 1),))) == Answer("pull", 1, 0)


def test_others_may_pull_at_any_time_and_push_never():
    level = Level(Sequential(), (0, 1))
    assert level.pull(Pull("pull", ((5, 0),))) == Answer("pull", 0, 0)
    with pytest.raises(KeyError):
        level.push(5)


def test_a_level_without_participants_has_no_rounds():
    level = Level(Sequential(), ())
    assert level.slowest() == 0
    assert level.leave(0) == ([], [])


@pytest.mark.parametrize("text", MODELS)
def test_a_name_and_back(text):
    assert str(parse(text)) == text
    assert parse(parse(text)) == parse(text)


def test_spaces_do_not_count():
    assert parse(" bounded( 4 ) ") == Bounded(4)


@pytest.mark.parametrize(
    "text",
    ["", "Sequential", "bounded", "bounded()", "bounded(-1)", "bounded(1.5)", "bounded(x)", "bounded(1", "bounded(1)x",
     "sequential()", "bounded(1234567890)", None, 3, b"eventual", ["eventual"]],
)  # fmt: skip
def test_other_names_are_refused(text):
    with pytest.raises(OptionError, match="expected 'sequential', 'bounded") as caught:
        parse(text)
    assert repr(text) in str(caught.value)


def test_participants_of():
    assert consistency.participants_of(None, range(3)) == (0, 1, 2)
    assert consistency.participants_of([2, 0, 2], range(3)) == (0, 2)
    assert consistency.participants_of([], range(3)) == ()


@pytest.mark.parametrize("model", MODELS)
def test_the_only_participant_need_not_be_asked(model):
    general, alone = Level(parse(model), (0,)), Level(parse(model), (0,))
    for number in range(1, 4):
        updates, _ = general.push(0)
        alone.push_alone()
        assert [update.contributions for update in updates] == [((0, number),)]
        assert (alone.rounds, alone.closed, alone.version) == (general.rounds, general.closed, general.version)
        assert general.pull(Pull("mine", ((0, number),))) == Answer("mine", alone.version, 0)


# --- pushes that are counted together -----------------------------------------------------------------


def state(level: Level) -> tuple[object, ...]:
    return level.rounds, level.away, level.closed, level.version, level.waiting


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("participants", [1, 2, 3])
def test_rounds_counted_together_are_as_counted_one_by_one(model, participants):
    together, one_by_one = (Level(parse(model), range(participants)) for _ in range(2))
    for rounds in (1, 3, 0, 2):
        assert together.in_step
        together.push_together(rounds)
        for _ in range(rounds):
            for p in random.Random(rounds).sample(range(participants), participants):
                one_by_one.push(p)
        assert state(together) == state(one_by_one)
        assert together.same_history(one_by_one)
        for p in (*range(participants), 99):
            pull = Pull("pull", ((p, one_by_one.rounds.get(p, 0)),))
            assert together.pull(pull) == one_by_one.pull(pull)
    for p in range(participants):  # and both go on alike
        assert together.push(p) == one_by_one.push(p)


@pytest.mark.parametrize("model", MODELS)
def test_in_step(model):
    level = Level(parse(model), (0, 1))
    level.push(0)
    assert not level.in_step
    level.push(1)
    assert level.in_step
    level.waiting["pull"] = Pull("pull", ((0, 2),))
    assert not level.in_step


@given(st.sampled_from(MODELS), st.integers(1, 4), st.randoms(use_true_random=False), st.integers(0, 30))
def test_a_copy_goes_its_own_way(model, participants, rng, steps):
    schedule = Schedule(model, tuple(range(participants)), rng)
    for _ in range(steps):
        schedule.step()
    level = schedule.level
    copied = level.copy()
    assert state(copied)[:-1] == state(level)[:-1]
    assert copied.waiting == {}  # the pulls stay behind
    assert copied.same_history(level)
    here = [p for p in level.participants if level.is_here(p)]
    if here:
        before = state(level.copy())
        answered = copied.push(here[0])
        assert state(level)[:-1] == before[:-1]
        assert not copied.same_history(level)
        waiting = dict(level.waiting)
        level.waiting.clear()
        assert level.push(here[0]) == answered
        assert copied.same_history(level)
        level.waiting.update(waiting)
        copied.leave(here[0])
        assert not copied.same_history(level)


def test_other_models_have_other_histories():
    levels = [Level(parse(model), (0, 1)) for model in MODELS]
    assert [[one.same_history(other) for other in levels] for one in levels] == [
        [one is other for other in levels] for one in levels
    ]
