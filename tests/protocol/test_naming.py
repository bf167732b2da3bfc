"""Which cut point a cut gets."""

from __future__ import annotations

from kvstore.protocol.messages import AskCut, Failed, Halt, Named, Passed
from kvstore.protocol.naming import AGAIN_S, ANSWER_S, Naming

WORKERS = {0: "peer 0", 1: "peer 1"}


def asked(*answers: tuple[int, int, bool]):
    naming = Naming()
    halts = naming.ask("asker", AskCut(3, 77), WORKERS, 0.0)
    assert halts == [("peer 0", Halt(0, 77)), ("peer 1", Halt(0, 77))]
    sends = []
    for rank, count, coupled in answers:
        sends += naming.passed(f"peer {rank}", rank, Passed(rank + 10, 77, count, coupled))
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
    (late,) = naming.passed("peer 1", 1, Passed(11, 77, 5, True))
    assert isinstance(late[1], Failed)
