"""Who has which shard: what follows when servers are lost, come back, and drain."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from kvstore.protocol.messages import Shard
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
            before = shard.primary
            for replica in shard.replicas:
                changed |= one.standby(replica.server, number, replica.epoch, f"tcp://s{replica.server}/{number}")
                changed |= one.in_step(before, number, replica.epoch)
                before = replica.server
            if one.shards[number].moving:
                changed |= one.handed_over(shard.primary, number, one.shards[number].epoch)


def who(one: Placing) -> str:
    """The chain of each shard; in brackets who is not in step."""

    def chain(shard: Shard) -> str:
        rest = (str(r.server) if r.in_step else f"({r.server})" for r in shard.replicas)
        return "+".join([str(shard.primary), *rest])

    return " ".join(map(chain, one.shards))


def test_the_replica_is_the_next_server():
    assert who(placing(3)) == "0+1 1+2 2+0"
    assert who(placing(2)) == "0+1 1+0"
    assert who(placing(3, replication=0)) == "0 1 2"
    assert who(placing(4, replication=2)) == "0+1+2 1+2+3 2+3+0 3+0+1"


def test_a_lost_server():
    one = placing(3)
    assert one.gone(1)
    assert who(one) == "0+(2) 2+(0) 2+0"
    settle(one)
    assert all(map(one.settled, range(3)))
    assert one.gone(2)
    assert who(one) == "0 0 0"
    assert not any(map(one.settled, range(3)))
    assert not one.lost()


def test_the_others_go_on_from_what_they_have():
    one = placing(4, replication=2)
    epochs = [replica.epoch for replica in one.shards[0].replicas]
    one.gone(1)  # in the middle of shard 0: server 0 sends to server 2 from here on
    assert who(one) == "0+2+(3) 2+3+(0) 2+3+0 3+0+(2)"
    assert one.shards[0].replicas[0].epoch > epochs[1]
    one = placing(4, replication=2)
    one.gone(0)  # the primary of shard 0: server 2 goes on to get the log from server 1
    assert who(one) == "1+2+(3) 1+2+3 2+3+(1) 3+1+(2)"
    assert one.shards[0].replicas[0].epoch == epochs[1]


def test_two_lost_at_once():
    one = placing(4, replication=2)
    one.gone(0)
    one.gone(1)  # before anything else was in step
    assert not one.lost()
    assert who(one) == "2+(3) 2+3 2+3 3+(2)"


def test_who_catches_up_from_a_lost_one_begins_anew():
    one = placing(4, replication=2)
    one.gone(1)
    one.standby(3, 0, one.shards[0].replicas[1].epoch, "tcp://s3/0")
    epoch = one.shards[0].replicas[1].epoch
    one.gone(2)  # from which server 3 gets what it does not have
    newcomer = one.shards[0].replicas[0]
    assert (newcomer.server, newcomer.in_step, newcomer.address) == (3, False, "")
    assert newcomer.epoch > epoch
    assert not one.in_step(2, 0, epoch)


def test_the_shards_of_lost_servers_are_shared_out():
    one = placing(6)
    for lost in (1, 2, 3):
        one.gone(lost)
        settle(one)
    assert not one.lost()
    assert [shard.primary for shard in one.shards] == [0, 4, 5, 0, 4, 5]


def test_a_server_returns_and_takes_its_shard_back():
    one = placing(2)
    one.gone(1)
    assert who(one) == "0 0"
    assert one.awaits(1)
    assert one.arrived(1, "tcp://new")
    assert who(one) == "0+(1) 0+(1)"
    settle(one)
    assert who(one) == "0+1 1+0"
    assert one.shards[1].address == "tcp://s1/1"


def test_a_shard_that_moves_keeps_its_holders():
    """At every moment it has as many in step as before, and who hands over is a replica then."""
    one = placing(3)
    one.gone(1)
    settle(one)
    assert who(one).split()[1] == "2+0"
    one.arrived(1, "tcp://new")
    seen = []
    while not one.settled(1):
        shard = one.shards[1]
        seen.append(who(one).split()[1])
        if shard.moving:
            assert one.handed_over(2, 1, shard.epoch)
            continue
        one.standby(1, 1, shard.replicas[-1].epoch, "tcp://s1/1")
        assert one.in_step(0, 1, shard.replicas[-1].epoch)
    assert [*seen, who(one).split()[1]] == ["2+0+(1)", "2+0+1", "1+2"]


def test_all_have_a_new_epoch_when_the_order_changes():
    """Else one that does not know yet who comes after it would take more, and say so."""
    one = placing(4, replication=2)
    one.gone(0)
    settle(one)
    before = one.shards[0]
    one.arrived(0, "tcp://new")
    settle(one)
    assert who(one).split()[0] == "0+1+2"
    assert all(replica.epoch > before.epoch for replica in one.shards[0].replicas)


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
    assert all(replica.server != 1 for shard in one.shards for replica in shard.replicas)


def test_a_drain_with_nobody_to_take_over_is_over_at_once():
    one = placing(1, replication=0)
    one.drain(0)
    assert one.drained(0)


def test_words_about_an_older_epoch_are_ignored():
    one = placing(2)
    old = one.shards[0]
    one.gone(1)
    one.arrived(1, "tcp://new")
    assert not one.in_step(0, 0, old.replicas[0].epoch)
    assert not one.standby(1, 0, old.replicas[0].epoch, "tcp://old")
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
    """With no more losses at a time than replicas no shard is ever lost, and in the end all are at home and in step."""
    for seed in range(200):
        chance = random.Random(seed)
        servers = chance.randint(2, 5)
        one = placing(servers, chance.randint(1, servers - 1))
        for _ in range(10):
            rank = chance.choice(sorted(one.servers))
            if len(one.servers) == servers and chance.random() < 0.7:
                for lost in chance.sample(range(servers), chance.randint(1, one.replication)):
                    one.gone(lost)
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
            primaries = Counter(shard.primary for shard in one.shards)
            assert max(primaries.values()) <= -(-servers // len(one.servers))
            for shard in one.shards:
                chain = [shard.primary, *(replica.server for replica in shard.replicas)]
                assert len(set(chain)) == len(chain)
                assert one.servers.keys() >= set(chain)
                assert len(chain) == min(1 + one.replication, len(one.servers))
        for rank in range(servers):
            if one.awaits(rank):
                one.arrived(rank, f"tcp://last{rank}")
        settle(one)
        assert all(map(one.settled, range(servers)))
        assert all(shard.primary == n for n, shard in enumerate(one.shards))
