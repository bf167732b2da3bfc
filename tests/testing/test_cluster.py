"""The failure laboratory: what it promises to its users."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import kvstore
from kvstore import KVStore
from kvstore.errors import DeadlineError, OptionError, ServerLostError, WorkerLostError
from kvstore.testing import Cluster

ROUNDS = 8


def train(kv: KVStore) -> list[float]:
    """Sequential rounds of rank + 1; every value that was seen."""
    kv.set_optimizer(kvstore.optim.SGD(lr=1.0))
    kv.init(["a", "b"], [np.zeros(3, np.float32), np.zeros((2, 2), np.float32)])
    seen = []
    for _ in range(ROUNDS):
        a, _ = kv.pushpull(["a", "b"], [np.full(3, kv.rank + 1, np.float32), np.ones((2, 2), np.float32)]).result()
        seen.append(float(a[0]))
    kv.barrier()
    return seen


EXPECTED = [-3.0 * round for round in range(1, ROUNDS + 1)]  # of two workers


@pytest.mark.parametrize("seed", range(6))
def test_a_bad_network_changes_no_number(seed: int) -> None:
    with Cluster(2, 2, seed=seed, loss=0.1, repetition=0.2, delay_s=(0.001, 0.4)) as cluster:
        assert cluster.run(train) == [EXPECTED, EXPECTED]


def test_the_same_seed_gives_the_same_run() -> None:
    def once(seed: int) -> float:
        with Cluster(2, 2, seed=seed, loss=0.1, repetition=0.1, delay_s=(0.001, 0.1)) as cluster:
            cluster.run(train)
            return cluster.now

    assert once(3) == once(3)
    assert once(3) != once(4)


def test_hours_pass_in_no_time() -> None:
    with Cluster(1, 1) as cluster:
        cluster.run(lambda kv: cluster.sleep(5000.0), limit_s=6000.0)
        assert 5000 < cluster.now < 5100


def test_a_crashed_worker_is_found_and_named() -> None:
    with Cluster(2, 1, seed=1) as cluster:

        def program(kv: KVStore) -> str:
            kv.init("w", np.zeros(2))
            if kv.rank == 1:
                cluster.at(cluster.now + 1, lambda: cluster.crash("worker", 1))
                cluster.sleep(1000)
            with pytest.raises(WorkerLostError, match="workers 1"):
                kv.pushpull("w", np.ones(2)).result()
            return "told"

        assert cluster.run(program) == ["told", None]
        assert cluster.now < 20


def test_a_deadline_passes_on_the_simulated_clock() -> None:
    with Cluster(2, 1, seed=1) as cluster:

        def program(kv: KVStore) -> None:
            kv.init("w", np.zeros(2))
            kv.barrier()
            if kv.rank == 0:
                began = cluster.now
                with pytest.raises(DeadlineError, match="waits for workers 1"):
                    kv.push("w", np.ones(2)).result(timeout=50)
                assert 50 <= cluster.now - began < 60
            cluster.sleep(100)
            kv.push("w", np.ones(2)).result()

        cluster.run(program)


def test_a_partition_delays_and_heals() -> None:
    with Cluster(2, 1, seed=5) as cluster:
        cluster.at(2.0, lambda: cluster.partition([("worker", 0)], [("server", 0)]))
        cluster.at(60.0, cluster.heal)

        def program(kv: KVStore) -> list[float]:
            kv.init("w", np.zeros(1))
            values = []
            for _ in range(5):
                cluster.sleep(1)
                values.append(float(kv.pushpull("w", np.ones(1)).result()[0]))
            return values

        assert cluster.run(program) == [[2.0] * 5] * 2
        assert cluster.now > 60
        assert any("partition" in line for line in cluster.trace)


def test_an_error_in_a_program_is_raised_with_the_seed() -> None:
    def program(kv: KVStore) -> None:
        if kv.rank == 0:
            raise ZeroDivisionError("of the user's")
        kv.barrier()

    with Cluster(2, 1, seed=77) as cluster, pytest.raises(ZeroDivisionError) as caught:
        cluster.run(program)
    assert any("seed 77" in note for note in caught.value.__notes__)


def test_a_program_that_never_ends_is_told_of() -> None:
    with Cluster(1, 1) as cluster, pytest.raises(DeadlineError, match="not over after 30 s"):
        cluster.run(lambda kv: cluster.sleep(1e6), limit_s=30)


def test_wrong_arguments() -> None:
    with pytest.raises(OptionError, match="loss"):
        Cluster(loss=1.5)
    with pytest.raises(OptionError, match="delay_s"):
        Cluster(delay_s=(2.0, 1.0))
    with Cluster(2, 1) as cluster:
        with pytest.raises(OptionError, match="one program or 2"):
            cluster.run([lambda kv: None])
        with pytest.raises(OptionError, match="alive"):
            cluster.restart("scheduler")
        with pytest.raises(OptionError, match="server 7"):
            cluster.crash("server", 7)


def test_a_lost_server_is_told_of_without_replication() -> None:
    with Cluster(1, 1, seed=2) as cluster:
        cluster.at(2.0, lambda: cluster.crash("server", 0))

        def program(kv: KVStore) -> None:
            kv.init("w", np.zeros(1))
            cluster.sleep(5)
            with pytest.raises(ServerLostError, match="server 0"):
                kv.pushpull("w", np.ones(1)).result()

        cluster.run(program)


def test_a_scheduler_that_cannot_write_its_journal_tells_nobody_and_ends() -> None:
    with Cluster(2, 1) as cluster:
        scheduler: Any = cluster._daemons["scheduler", 0]
        scheduler._journal._database.execute("PRAGMA query_only = 1")
        with pytest.raises(DeadlineError):
            cluster.run(lambda kv: None, limit_s=30.0)
        with pytest.raises(OptionError, match="readonly"):
            scheduler.wait(0.0)


def test_the_fixture_makes_clusters_and_ends_them(simulated_cluster: Callable[..., Cluster]) -> None:
    cluster = simulated_cluster(workers=2, servers=1, seed=11)
    assert cluster.run(train) == [EXPECTED, EXPECTED]
