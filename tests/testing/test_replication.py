"""Servers that crash, are stopped, drained and replaced under replication: the numbers stay the same, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import kvstore
from kvstore import KVStore
from kvstore.errors import OptionError, ServerLostError
from kvstore.testing import Cluster


def train(kv: KVStore, rounds: int = 25) -> list[Any]:
    """Sequential rounds of an optimizer with state, and of bundles."""
    keys = [f"key{i}" for i in range(6)]
    kv.init(keys, [np.zeros(5, np.float32) for _ in keys])
    kv.init("half", np.zeros(5, np.float16))
    kv.set_optimizer(kvstore.optim.SGD(lr=0.1, momentum=0.9))
    for round in range(rounds):
        pushes = [np.full(5, 0.1 * (kv.rank + 1) * (round + 1) + i, np.float32) for i in range(len(keys))]
        values = kv.pushpull(keys, pushes).result()
        half = kv.pushpull("half", np.full(5, 0.01 * round + kv.rank, np.float16)).result()
    return [*values, half]


def undisturbed() -> list[Any]:
    with Cluster(3, 2, delay_s=(0.05, 0.1)) as cluster:
        return cluster.run(train)[0]


def same(one: list[Any], other: list[Any]) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))


def test_replication_alone_changes_no_bit() -> None:
    with Cluster(3, 2, replication=1, delay_s=(0.05, 0.1)) as cluster:
        assert all(same(values, undisturbed()) for values in cluster.run(train))


@pytest.mark.parametrize("server", [0, 1])
@pytest.mark.parametrize("returns", [False, True])
def test_a_crashed_server_changes_no_bit(server: int, returns: bool) -> None:
    with Cluster(3, 2, replication=1, delay_s=(0.05, 0.1)) as cluster:
        cluster.at(2.0, lambda: cluster.crash("server", server))
        if returns:
            cluster.at(4.0, lambda: cluster.restart("server", server))
        assert all(same(values, undisturbed()) for values in cluster.run(train))


@pytest.mark.parametrize("server_dies_at", [None, 1.9, 3.0, 6.0])
def test_a_crashed_scheduler_changes_no_bit(server_dies_at: float | None) -> None:
    """Alone, or with a server just before it, while it is away, or before all have come back to it."""
    with Cluster(3, 2, replication=1, delay_s=(0.05, 0.1)) as cluster:
        cluster.at(2.0, lambda: cluster.crash("scheduler"))
        cluster.at(4.0, lambda: cluster.restart("scheduler"))
        if server_dies_at is not None:
            cluster.at(server_dies_at, lambda: cluster.crash("server", 1))
            cluster.at(server_dies_at + 0.5, lambda: cluster.restart("server", 1))
        assert all(same(values, undisturbed()) for values in cluster.run(train))


def test_two_crash_at_once_and_come_back() -> None:
    with Cluster(3, 4, replication=2, delay_s=(0.05, 0.1)) as cluster:
        for server in (1, 2):
            cluster.at(2.0, lambda server=server: cluster.crash("server", server))
            cluster.at(4.0, lambda server=server: cluster.restart("server", server))
        assert all(same(values, undisturbed()) for values in cluster.run(train))


def test_a_server_that_was_stopped_steps_back() -> None:
    with Cluster(2, 2, replication=1, delay_s=(0.05, 0.1)) as cluster:
        old: Any = cluster._daemons["server", 0]
        cluster.at(2.0, lambda: cluster.pause("server", 0))
        cluster.at(9.0, lambda: cluster.resume("server", 0))
        expected = undisturbed_pair()
        assert all(same(values, expected) for values in cluster.run(lambda kv: train(kv, 60)))
        assert old._refused is not None
        assert "steps back" in str(old._refused)


def undisturbed_pair() -> list[Any]:
    with Cluster(2, 2, delay_s=(0.05, 0.1)) as cluster:
        return cluster.run(lambda kv: train(kv, 60))[0]


def test_a_server_is_drained() -> None:
    """With replication or without: its shards go to the other one, and it may leave."""
    for replication in (0, 1):
        with Cluster(3, 2, replication=replication, delay_s=(0.05, 0.1)) as cluster:
            server: Any = cluster._daemons["server", 1]
            process = cluster._processes["server", 1]
            cluster.at(3.0, lambda process=process, server=server: cluster._begin(process, server.drain))
            assert all(same(values, undisturbed()) for values in cluster.run(train))
            assert server._stopped.is_set()
            assert not server.shards or all(shard._closed for shard in server.shards.values())


def test_without_replication_a_crash_is_an_error() -> None:
    with Cluster(2, 2, delay_s=(0.05, 0.1)) as cluster:
        cluster.at(2.0, lambda: cluster.crash("server", 0))
        with pytest.raises(ServerLostError, match="server 0 is gone"):
            cluster.run(train)


@pytest.mark.parametrize(("servers", "replication"), [(1, 1), (2, 2), (2, -1)])
def test_what_cannot_be_is_refused(servers: int, replication: int) -> None:
    with pytest.raises(OptionError, match="replication"):
        Cluster(1, servers, replication=replication)
