"""Who has which shard: what follows when servers are lost, come back, and drain."""

from __future__ import annotations

import random

import pytest

from kvstore.protocol.placement import Placing


def placing(servers: int, replication: int = 1) -> Placing:
    one = Placing(servers, replication)
    for rank in range(servers):
        one.arrived(rank, f"tcp://s{rank}")
    settle(one)
    return one


def settle(one: Placing) -> None:
    """All servers do what they are told, until nothing changes."""
    changed = True
    while changed:
        changed = False
        for number, shard in enumerate(list(one.shards)):
            if shard.replica >= 0:
                changed |= one.standby(shard.replica, number, shard.epoch, f"tcp://s{shard.replica}/{number}")
                changed |= one.in_step(shard.primary, number, shard.epoch)
            if one.shards[number].moving:
                changed |= one.handed_over(shard.primary, number, shard.epoch)


def who(one: Placing) -> str:
    return " ".join(f"{shard.primary}{'' if shard.replica < 0 else f'+{shard.replica}'}" for shard in one.shards)


def test_the_replica_is_the_next_server():
    assert who(placing(3)) == "0+1 1+2 2+0"
    assert who(placing(2)) == "0+1 1+0"
    assert who(placing(3, replication=0)) == "0 1 2"


def test_a_lost_server():
    one = placing(3)
    assert one.gone(1)
    assert who(one) == "0+2 2+0 2+0"
    settle(one)
    assert one.gone(2)
    assert who(one) == "0 0 0"
    assert one.alone == {0, 1, 2}
    assert not one.lost()


def test_a_server_returns_and_takes_its_shard_back():
    one = placing(2)
    one.gone(1)
    assert who(one) == "0 0"
    assert one.awaits(1)
    assert one.arrived(1, "tcp://new")
    assert who(one) == "0+1 0+1"
    settle(one)
    assert who(one) == "0+1 1+0"
    assert one.shards[1].address == "tcp://s1/1"


def test_a_replica_that_is_not_in_step_does_not_take_over():
    one = placing(3)
    one.gone(1)  # 2 has shard 1 now, and 0 is its new replica
    one.gone(2)
    assert one.lost() == [1, 2] or one.lost() == [1]


def test_without_replication_a_lost_server_is_not_replaced():
    one = placing(2, replication=0)
    assert one.gone(1)
    assert one.lost() == [1]
    assert not one.awaits(1)


@pytest.mark.parametrize("replication", [0, 1])
def test_drain(replication):
    one = placing(3, replication)
    one.drain(1)
    assert not one.drained(1)
    settle(one)
    assert one.drained(1)
    assert [shard.primary for shard in one.shards] == [0, 2, 2]
    assert all(shard.replica != 1 for shard in one.shards)


def test_a_drain_with_nobody_to_take_over_is_over_at_once():
    one = placing(1, replication=0)
    one.drain(0)
    assert one.drained(0)


def test_words_about_an_older_epoch_are_ignored():
    one = placing(2)
    old = one.shards[0]
    one.gone(1)
    one.arrived(1, "tcp://new")
    assert not one.in_step(0, 0, old.epoch)
    assert not one.standby(1, 0, old.epoch, "tcp://old")
    assert not one.handed_over(0, 0, old.epoch)


def recovered(one: Placing) -> Placing:
    """Another one that goes on from what this one would have kept."""
    other = Placing(one.num_servers, one.replication)
    other.recover(one.records(), one.servers)
    return other


def test_what_is_kept_is_all_that_decides():
    """A placing that is replaced at every step by one that goes on from its records decides the same."""
    for seed in range(200):
        chance = random.Random(seed)
        servers = chance.randint(2, 5)
        one = Placing(servers, chance.choice((0, 1)))
        other = recovered(one)
        for _ in range(60):
            rank, number = chance.randrange(servers), chance.randrange(servers)
            epoch = one.shards[number].epoch if one.begun else 1
            name, *arguments = chance.choice(
                [
                    ("arrived", rank, f"tcp://{rank}"),
                    ("arrived", rank, f"tcp://{rank}"),
                    ("gone", rank),
                    ("drain", rank),
                    ("standby", rank, number, epoch, f"tcp://{rank}/{number}"),
                    ("in_step", rank, number, epoch),
                    ("handed_over", rank, number, epoch),
                ]
            )
            if name in ("drain", "gone") and rank not in one.servers:
                continue
            assert getattr(other, name)(*arguments) == getattr(one, name)(*arguments)
            other = recovered(other)
            assert (other.shards, other.epoch, other.servers) == (one.shards, one.epoch, one.servers), seed
            assert other.draining == one.draining


def test_random_changes():
    """With one loss at a time no shard is ever lost, and in the end all are at home with a replica."""
    for seed in range(200):
        chance = random.Random(seed)
        servers = chance.randint(2, 5)
        one = placing(servers)
        for _ in range(10):
            rank = chance.choice(sorted(one.servers))
            if len(one.servers) == servers and chance.random() < 0.7:
                one.gone(rank)
            elif len(one.servers) == servers:
                one.drain(rank)
                settle(one)
                one.gone(rank)
            settle(one)
            back = next((r for r in range(servers) if one.awaits(r)), None)
            if back is not None and chance.random() < 0.8:
                one.arrived(back, f"tcp://again{back}")
                settle(one)
            assert not one.lost()
            assert all(shard.primary != shard.replica for shard in one.shards)
            assert all(shard.primary in one.servers for shard in one.shards)
        for rank in range(servers):
            if one.awaits(rank):
                one.arrived(rank, f"tcp://last{rank}")
        settle(one)
        assert all(shard.primary == n and shard.in_step for n, shard in enumerate(one.shards))
