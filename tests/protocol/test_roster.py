"""Who belongs to the cluster: single conversations with the scheduler's core."""

from __future__ import annotations

from typing import Any

from kvstore.protocol.messages import Departed, Leave, Register
from kvstore.protocol.roster import Membership


def cluster(workers: int = 2) -> Membership:
    """One server, which is peer 9, and workers, who are peers 0, 1, ..."""
    membership = Membership(7, workers, 1)
    membership.handle(9, Register(1, "server", 0, "tcp://h:1", "h", 1, 99, 0, ""), 0.0)
    for rank in range(workers):
        membership.handle(rank, Register(1, "worker", rank, "", "h", 1, rank, 0, "continue"), 0.0)
    assert membership.started
    return membership


def told(actions: list[tuple[Any, Any]]) -> list[Departed]:
    """What the server is told of who is gone."""
    return [message for peer, message in actions if peer == 9 and isinstance(message, Departed)]


def test_who_leaves_the_rounds_stays_although_it_says_so_twice():
    membership = cluster()
    assert [one.stays for one in told(membership.handle(1, Leave(2, "", True), 1.0))] == [True]
    assert told(membership.handle(1, Leave(2, "", True), 1.0)) == []
    assert membership.members["worker", 1].state == "apart"


def test_everybody_is_reminded_of_who_has_left_too():
    membership = cluster(3)
    membership.handle(0, Leave(2, "", True), 1.0)
    membership.handle(1, Leave(2, ""), 1.0)
    membership.lost(2)
    assert [(one.rank, one.stays, bool(one.reason)) for one in told(membership.reminders())] == [
        (0, True, False),
        (1, False, False),
        (2, False, True),
    ]
