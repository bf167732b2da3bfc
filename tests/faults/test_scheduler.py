"""The scheduler's death: the data path goes on, a restarted one takes up the roster and the barriers."""

from __future__ import annotations

import time

import pytest

from kvstore.cluster.status import read_status
from tests.faults.processes import Processes, processes
from tests.faults.test_workers import steady
from tests.faults.training import ends, start


def test_a_killed_scheduler_goes_on_from_its_journal():
    with processes(workers=2, servers=2, KVSTORE_ON_WORKER_LOSS="continue") as cluster:
        one, other = (cluster.worker(steady(), rank) for rank in range(2))
        other.line("step 3 ")
        cluster.scheduler.kill()
        step = int(other.line("step ").split()[1])
        other.line(f"step {step + 10} ", 10.0)  # nobody waits for it
        cluster.start_scheduler()
        joined = cluster.worker(steady())  # it knows the cluster
        joined.line("begun 2")
        joined.line("step ")
        other.kill()  # and notices who is lost
        while not one.line("step ").endswith(" 2"):
            pass


@pytest.mark.parametrize("away", [False, True])
def test_a_restarted_scheduler_has_a_server_replaced(away: bool, undisturbed: set[str]) -> None:
    """The server is killed when all have come back to the scheduler, or while it is away."""
    with processes(3, 2, replication=1) as cluster:
        workers = start(cluster)
        cluster.scheduler.kill()
        for worker in workers:
            worker.line("round 100")  # nobody waits for it
        if away:
            cluster.servers[0].kill()
        cluster.start_scheduler()
        if not away:
            back(cluster)
            cluster.servers[0].kill()
        weights, pause = ends(workers)
        print(
            f"longest round with a server killed {'before' if away else 'after'} the scheduler was back: {pause:.2f} s"
        )
        assert weights == undisturbed


def back(cluster: Processes) -> None:
    """Wait until all members have come back."""
    while any(
        member["state"] == "away" for role in ("workers", "servers") for member in read_status(cluster.address)[role]
    ):
        time.sleep(0.05)


def test_a_barrier_survives_the_scheduler():
    waits = """
with kvstore.create("dist", timeout=50) as kv:
    kv.init("w", np.zeros(4, np.float32))
    kv.barrier()
    say("waits")
    if kv.rank:
        told()
    kv.barrier()
    say("passed")
"""
    with processes(workers=2) as cluster:
        one, other = (cluster.worker(waits, rank) for rank in range(2))
        one.line("waits")
        other.line("waits")
        time.sleep(0.5)  # so that the first is waiting
        cluster.scheduler.kill()
        cluster.start_scheduler()
        other.tell()
        one.line("passed")
        other.line("passed")
        assert (one.ends(), other.ends()) == (0, 0)


def test_who_does_not_come_back_to_a_restarted_scheduler_is_lost():
    with processes(workers=2, KVSTORE_ON_WORKER_LOSS="continue") as cluster:
        one, other = (cluster.worker(steady(), rank) for rank in range(2))
        other.line("step 3 ")
        cluster.scheduler.kill()
        other.kill()
        cluster.start_scheduler()
        while not one.line("step ", 30.0).endswith(" 1"):
            pass


def test_a_barrier_says_that_the_scheduler_does_not_answer():
    waits = """
kv = kvstore.create("dist", timeout=50)
say("in")
told()
try:
    kv.barrier(timeout=1)
except kvstore.KVStoreError as error:
    say("error", type(error).__name__, error)
"""
    with processes(workers=1) as cluster:
        one = cluster.worker(waits, 0)
        one.line("in")
        cluster.scheduler.kill()
        one.tell()
        line = one.line("error DeadlineError")
        assert "the scheduler does not answer (last heard" in line
