"""Which cut point a cut gets."""

from __future__ import annotations

from kvstore.protocol.messages import AskCut, Failed, Halt, Named, Passed
from kvstore.protocol.naming import AGAIN_S, ANSWER_S, PLACE_S, Naming

WORKERS = {0: "peer 0", 1: "peer 1"}


def asked(*answers: tuple[int, int, bool]):
    naming = Naming()
    halts = naming.ask("asker", AskCut(3, 77), WORKERS, 0.0)
    assert halts == [("peer 0", Halt(0, 77)), ("peer 1", Halt(0, 77))]
    sends = []
    for rank, count, coupled in answers:
        sends += naming.passed(f"peer {rank}", rank, Passed(rank + 10, 77, count, coupled), 0.0)
    return naming, sends


def test_coupled_workers_get_a_number_that_none_has_passed():
    _, sends = asked((0, 5, True), (1, 4, False))
    named = [(peer, message.at, message.awaited) for peer, message in sends]
    assert named == [("peer 0", 6, (0, 1)), ("peer 1", 6, (0, 1)), ("asker", 6, (0, 1))]


def test_workers_that_wait_for_nobody_get_their_own_next():
    _, sends = asked((0, 1000, False), (1, 4, False))
    assert [(peer, message.at) for peer, message in sends[:2]] == [("peer 0", 1001), ("peer 1", 5)]


def test_coupled_workers_that_do_not_pass_the_same_cut_points_are_refused_before_anybody_waits():
    _, sends = asked((0, 1000, True), (1, 4, True))
    assert [peer for peer, _ in sends] == ["peer 0", "peer 1", "asker"]
    assert all(isinstance(message, Failed) and "{0: 1000, 1: 4}" in message.text for _, message in sends)


def test_without_workers_it_has_a_name_at_once():
    assert Naming().ask("asker", AskCut(3, 77), {}, 0.0) == [("asker", Named(3, 77, 1, ()))]


def test_a_worker_that_leaves_is_not_waited_for():
    naming, sends = asked((0, 5, True))
    assert sends == []
    assert [(peer, message.awaited) for peer, message in naming.gone(1)] == [("peer 0", (0,)), ("asker", (0,))]


def test_who_does_not_answer_is_asked_again_and_then_named_in_the_error():
    naming, _ = asked((0, 5, True))
    assert naming.tick(WORKERS, AGAIN_S / 2, lambda rank: 0.0) == []
    assert naming.tick(WORKERS, AGAIN_S * 2, lambda rank: 0.0) == [("peer 1", Halt(0, 77))]
    sends = naming.tick(WORKERS, ANSWER_S + 1, lambda rank: 2.0)
    assert [peer for peer, _ in sends] == ["peer 0", "asker"]
    assert all(
        isinstance(message, Failed) and "workers 1 (last heard 4.0 s ago)" in message.text for _, message in sends
    )
    (late,) = naming.passed("peer 1", 1, Passed(11, 77, 5, True), 9.0)
    assert isinstance(late[1], Failed)


# --- workers that came later ------------------------------------------------------------------------


def say(naming: Naming, *answers: Passed, now: float = 0.0):
    """The workers answer, by rank; for each at which of its cut points it is to mark the cut."""
    sends = []
    for rank, answer in enumerate(answers):
        sends += naming.passed(f"peer {rank}", rank, answer, now)
    return [message.at if isinstance(message, Named) else message.text for _, message in sends]


def passed(count: int, history: str, *, joined: bool = False, clock: str = "w", barrier: bool = False) -> Passed:
    """``history``: the rounds at the latest cut points, with a B behind it if it is a barrier; the last are ``count``'s
    and, if it is in one now, the ``barrier`` after it."""
    points = history.split()
    first = count + barrier - len(points) + 1
    said = tuple((first + i, int(point.rstrip("B")), int(point.endswith("B"))) for i, point in enumerate(points))
    return Passed(1, 77, count, True, joined, clock, said)


def asked_of(workers: int) -> Naming:
    naming = Naming()
    naming.ask("asker", AskCut(3, 77), {rank: f"peer {rank}" for rank in range(workers)}, 0.0)
    return naming


def test_a_joiner_marks_the_same_cut_point_by_its_own_number():
    named = say(asked_of(3), passed(9, "6 7 8 9"), passed(10, "7 8 9 10"), passed(2, "8 9", joined=True))
    assert named == [11, 11, 4, 11]


def test_barriers_tell_cut_points_of_one_round_apart():
    others = passed(9, "7 8 8B 9")
    assert say(asked_of(2), others, passed(1, "8B", joined=True)) == [10, 3, 10]
    assert say(asked_of(2), others, passed(1, "8", joined=True)) == [10, 4, 10]
    assert say(asked_of(2), passed(9, "8 9 9B", barrier=True), passed(0, "9B", joined=True, barrier=True)) == [
        10,
        1,
        10,
    ]


def test_as_long_as_it_is_not_clear_all_go_on_and_are_asked_again():
    naming = asked_of(2)
    assert say(naming, passed(9, "8 9"), passed(0, "", joined=True)) == [0, 0]
    assert naming.tick(WORKERS, AGAIN_S / 2, lambda rank: 0.0) == []
    assert naming.tick(WORKERS, AGAIN_S * 2, lambda rank: 0.0) == [("peer 0", Halt(0, 77)), ("peer 1", Halt(0, 77))]
    assert say(naming, passed(12, "11 12"), passed(2, "11 12", joined=True), now=1.0) == [13, 3, 13]


def test_what_could_be_two_things_is_not_clear():
    assert say(asked_of(2), passed(9, "8 8 9"), passed(1, "8", joined=True)) == [0, 0]  # which of the two?
    assert say(asked_of(2), passed(9, "8 8 9"), passed(2, "8 9", joined=True)) == [10, 3, 10]
    assert say(asked_of(2), passed(9, "8 9"), passed(2, "8 9", joined=True, clock="x")) == [0, 0]


def test_who_is_never_where_others_are_ends_it_with_an_error():
    naming, now = asked_of(2), 0.0
    while (said := say(naming, passed(9, "8 9"), passed(1, "", joined=True), now=now)) == [0, 0]:
        now += AGAIN_S * 2
        naming.tick(WORKERS, now, lambda rank: 0.0)
    assert len(said) == 3 and all("workers [1] came later" in text for text in said)
    assert PLACE_S < now < PLACE_S + 2


def test_when_all_who_began_are_gone_the_first_of_the_others_counts():
    named = say(asked_of(2), passed(5, "20 21 22", joined=True), passed(3, "20 21 22", joined=True))
    assert named == [6, 4, 6]


def test_who_comes_while_it_is_not_clear_belongs_to_the_cut_too():
    naming = asked_of(2)
    say(naming, passed(9, "8 9"), passed(0, "", joined=True))
    workers = {0: "peer 0", 1: "peer 1", 2: "peer 2"}
    assert len(naming.tick(workers, AGAIN_S * 2, lambda rank: 0.0)) == 3
    said = say(naming, passed(9, "8 9"), passed(1, "9", joined=True), passed(2, "8 9", joined=True), now=1.0)
    assert said == [10, 2, 3, 10]
