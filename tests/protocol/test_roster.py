"""The scheduler's core: who has left, who may come back when it has been started again, and who waits for it."""

from __future__ import annotations

import pytest

from kvstore.cluster.journal import Journal
from kvstore.errors import OptionError
from kvstore.protocol.messages import (
    Barrier,
    Departed,
    Done,
    Failed,
    InStep,
    Leave,
    Placement,
    ReadPlacement,
    Register,
    Roster,
    Standby,
)
from kvstore.protocol.roster import Actions, Membership


def register(role: str, rank: int, token: int, incarnation: int = 0) -> Register:
    return Register(1, role, rank, f"tcp://{role}{token}", "host", 1, token, incarnation, "fail" * (role == "worker"))


def begun(replication: int = 1) -> Membership:
    """Two workers with the tokens 0 and 1, two servers with 10 and 11; the peers have their names."""
    one = Membership(7, 2, 2, replication=replication)
    for rank in range(2):
        one.handle(f"worker{rank}", register("worker", rank, rank), 0.0)
        one.handle(f"server{rank}", register("server", rank, 10 + rank), 0.0)
    assert one.started
    return one


def restarted(one: Membership) -> Membership:
    """As a scheduler that was killed now is when it begins anew."""
    journal = Journal(":memory:")
    journal.write(one)
    other = journal.recover(lambda: Membership(8, 2, 2, replication=one.replication), 100.0)
    journal.close()
    assert not other.has_news
    return other


def told(actions: Actions, peer: str) -> list[str]:
    return [type(message).__name__ for who, message in actions if who == peer]


def test_members_come_back_and_are_told_who_has_which_shard():
    one = begun()
    one.handle("server1", Standby(2, 0, one.placing.shards[0].epoch, "tcp://standby"), 1.0)
    other = restarted(one)
    assert (other.cluster, other.epoch, other.placing.shards) == (7, one.epoch, one.placing.shards)
    assert [row["state"] for row in other.report(100.0)["servers"]] == ["away", "away"]
    actions = other.handle("again", register("server", 1, 11, incarnation=1), 101.0)
    assert (Placement(0, one.epoch, tuple(one.placing.shards))) in [message for _, message in actions]
    assert [row["state"] for row in other.report(101.0)["servers"]] == ["away", "here"]
    assert one.placing.shards == other.placing.shards


def test_who_does_not_come_back_is_replaced_by_its_replica_and_by_the_newcomer_that_waits():
    one = begun()
    for number, shard in enumerate(list(one.placing.shards)):
        one.handle(f"server{shard.primary}", InStep(2, number, shard.epoch), 1.0)
    other = restarted(one)
    other.handle("again1", register("server", 1, 11, incarnation=1), 101.0)
    assert other.handle("new", register("server", 0, 99), 101.0) == []
    assert other.handle("any", register("server", -1, 98), 101.0) == []
    actions = other.absent(110.0)
    assert [shard.primary for shard in other.placing.shards] == [1, 1]
    assert told(actions, "new") == ["Roster", "Placement"]
    assert told(actions, "any") == ["Failed"]
    assert other.epoch > one.epoch


def test_only_as_long_as_somebody_may_come_back_a_newcomer_waits():
    other = restarted(begun())
    for rank in range(2):
        other.handle(f"again{rank}", register("server", rank, 10 + rank, incarnation=1), 101.0)
    assert told(other.handle("new", register("server", 0, 99), 102.0), "new") == ["Failed"]


def test_what_overtakes_a_registration_is_said_again():
    other = restarted(begun())
    for message in (Standby(2, 0, 2, "tcp://x"), InStep(2, 0, 2), ReadPlacement(2), Barrier(2, 1), Leave(2, "")):
        assert other.handle("again", message, 101.0) == []


def test_who_left_is_heard_when_it_says_so_again():
    one = begun()
    one.handle("worker0", Leave(2, ""), 1.0)
    other = restarted(one)
    (peer, answer), *_ = other.handle("again", register("worker", 0, 0, incarnation=1), 101.0)
    assert (peer, type(answer)) == ("again", Roster)
    assert ("again", Done(3)) in other.handle("again", Leave(3, ""), 101.0)
    other.absent(110.0)
    assert (other.members["worker", 0].state, other.members["worker", 1].state) == ("left", "lost")


def test_who_leaves_is_told_that_a_shard_is_lost():
    one = begun(replication=0)
    one.handle("worker0", Leave(2, ""), 1.0)
    one.lost("server1")
    assert told(one.handle("worker0", ReadPlacement(3), 2.0), "worker0") == ["Placement", "Departed"]


def test_a_server_that_is_lost_before_all_have_come_takes_no_shard_with_it():
    one = Membership(7, 1, 2, replication=1)
    for rank in range(2):
        one.handle(f"server{rank}", register("server", rank, 10 + rank), 0.0)
    one.lost("server1")
    one.handle("new", register("server", 1, 12), 1.0)
    actions = one.handle("worker0", register("worker", 0, 0), 2.0)
    roster = next(message for peer, message in actions if peer == "worker0")
    assert isinstance(roster, Roster)
    assert roster.servers == ("tcp://server10", "tcp://server12")


@pytest.mark.parametrize(("workers", "servers", "replication"), [(3, 2, 1), (2, 3, 1), (2, 2, 0)])
def test_a_journal_of_another_cluster_is_refused(workers: int, servers: int, replication: int):
    journal = Journal(":memory:")
    journal.write(begun())
    with pytest.raises(OptionError, match="2 workers and 2 servers with replication 1"):
        journal.recover(lambda: Membership(8, workers, servers, replication=replication), 0.0)
    journal.close()


def test_a_file_that_is_no_journal_is_refused(tmp_path):
    path = tmp_path / "journal"
    path.write_bytes(b"something else" * 100)
    with pytest.raises(OptionError, match="journal"):
        Journal(path)


def test_a_stranger_is_refused():
    (peer, answer), *_ = begun().handle("stranger", Done(1), 0.0)
    assert (peer, type(answer)) == ("stranger", Failed)


def departed(actions: Actions) -> list[tuple[int, bool, bool]]:
    """Of whom a server is told that it is gone: rank, does it stay, is it lost."""
    said = [message for peer, message in actions if peer == "server0" and isinstance(message, Departed)]
    return [(one.rank, one.stays, bool(one.reason)) for one in said]


def test_who_leaves_the_rounds_stays_although_it_says_so_twice():
    one = begun()
    assert departed(one.handle("worker1", Leave(2, "", True), 1.0)) == [(1, True, False)]
    assert departed(one.handle("worker1", Leave(2, "", True), 1.0)) == []
    assert one.members["worker", 1].state == "apart"


def test_everybody_is_reminded_of_who_has_left_and_who_is_lost():
    one = begun()
    one.handle("worker0", Leave(2, "", True), 1.0)
    one.lost("worker1")
    assert departed(one.reminders()) == [(0, True, False), (1, False, True)]
