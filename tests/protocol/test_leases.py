"""What a worker reads is lent to it, whatever the network does to the requests that say so."""

from __future__ import annotations

import random

import pytest

from kvstore.protocol.leases import HELD_MAX, Holding, Lending, Reader


@pytest.mark.parametrize("seed", range(200))
def test_what_is_read_is_lent(seed):
    """One piece, one worker, a network that delays, repeats and drops, but keeps pulls until they are answered."""
    rng = random.Random(seed)
    holding, lending = Holding(), Lending()
    lent: set[int] = set()
    unanswered: dict[int, tuple[int, ...]] = {}
    reading: set[int] = set()
    network: list[tuple[int, bool, tuple[int, ...]]] = []

    def hear(request_id, near, held):
        for reader in lending.heard("piece", 0, 1, request_id, held):
            lent.discard(reader.request_id)
        if near and request_id in unanswered and rng.random() < 0.7:  # else it waits for its round
            lending.lend("piece", Reader(0, 1, request_id))
            lent.add(request_id)
            if rng.random() < 0.8:  # else the answer is lost, and the request will come again
                del unanswered[request_id]
                reading.add(request_id)

    for request_id in range(1, 60):
        near, held = holding.request(request_id, pull=rng.random() < 0.7)
        if near:
            unanswered[request_id] = held
        network.append((request_id, near, held))
        for message in rng.sample(network, min(len(network), rng.randrange(4))):
            if rng.random() < 0.6:
                network.remove(message)
            hear(*message)
            assert reading <= lent, (seed, reading, lent)
        for again, earlier in list(unanswered.items()):
            if rng.random() < 0.2:
                hear(again, True, earlier)
        for done in list(reading):
            if rng.random() < 0.4:
                reading.remove(done)
                holding.over(done)
        assert reading <= lent, (seed, reading, lent)
    for pending in list(unanswered):
        holding.over(pending)
    hear(1000, False, holding.request(1000, pull=False)[1])
    assert lent == reading


def test_a_newer_life_of_a_rank_reads_nothing_of_the_older():
    lending = Lending()
    old = Reader(0, 1, 50)
    lending.lend("piece", old)
    assert lending.heard("other piece", 0, 2, 1, ()) == []
    assert lending.heard("piece", 1, 2, 1, ()) == []
    assert lending.heard("piece", 0, 2, 1, ()) == [old]


def test_who_is_gone_reads_nothing():
    lending = Lending()
    lending.lend("a", Reader(0, 1, 5))
    lending.lend("b", Reader(0, 1, 6))
    lending.lend("a", Reader(1, 1, 5))
    assert sorted(map(str, lending.gone(0, 1))) == sorted(map(str, [("a", Reader(0, 1, 5)), ("b", Reader(0, 1, 6))]))
    assert lending.gone(0, 1) == []
    assert lending.gone(1, 1) == [("a", Reader(1, 1, 5))]


def test_a_worker_holds_no_more_than_a_request_can_list():
    holding = Holding()
    assert all(holding.request(request_id, pull=True)[0] for request_id in range(HELD_MAX))
    near, held = holding.request(HELD_MAX, pull=True)
    assert not near
    assert len(held) == HELD_MAX
