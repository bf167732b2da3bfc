"""Workers that come and go while something else happens: what must not depend on chance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvstore import KVStore
from kvstore.protocol.messages import Message
from kvstore.protocol.serving import Serving
from kvstore.testing import Cluster


@pytest.mark.parametrize("loss", [0.0, 0.1])
def test_wait_takes_up_a_round_that_was_half_sent(loss: float) -> None:
    with Cluster(2, 2, seed=5, on_worker_loss="wait", loss=loss, delay_s=(0.001, 0.3)) as cluster:

        def program(kv: KVStore) -> Any:
            kv.init(["a", "b"], [np.zeros(1), np.zeros(1)])
            ones = np.ones(1)
            for step in range(min(kv.rounds("a"), kv.rounds("b")), 20):
                for key in ("a", "b"):
                    if kv.rounds(key) == step:
                        got = kv.pushpull(key, ones * (step + 1), np.empty(1)).result()
                        assert got[0] == 2 * (step + 1)
                cluster.sleep(0.1)
            return "done"

        cluster.at(3.0, lambda: cluster.crash("worker", 1))
        cluster.at(9.0, lambda: cluster.start_worker(1, program))
        assert cluster.run(program)[0] == "done"
        assert cluster.join()[1] == "done"


def test_a_scheduler_that_was_stopped_takes_nobody_for_lost() -> None:
    """All connections to it have ended meanwhile, and one takes longer to come back than it may if it ends alone."""
    with Cluster(2, 1, seed=4, on_worker_loss="continue") as cluster:
        cluster.at(5.0, lambda: cluster.pause("scheduler"))
        cluster.at(12.0, lambda: cluster.partition([("worker", 1)], [("scheduler", 0)]))
        cluster.at(15.0, lambda: cluster.resume("scheduler"))
        cluster.at(17.0, cluster.heal)

        def program(kv: KVStore) -> list[int]:
            kv.init("w", np.zeros(1))
            for _ in range(20):
                kv.pushpull("w", np.ones(1)).result()
                cluster.sleep(1.0)
            return kv.dead_workers()

        assert cluster.run(program) == [[], []]


def test_a_joiner_finds_a_shard_that_has_moved_though_nobody_told_it() -> None:
    with Cluster(1, 2, seed=1, on_worker_loss="continue", replication=1) as cluster:

        def program(kv: KVStore) -> list[float]:
            keys = [f"k{n}" for n in range(8)]  # some on either server
            kv.init(keys, [np.zeros(1)] * len(keys))
            cluster.sleep(30.0)
            return [float(value[0]) for value in kv.pull(keys).result()]

        cluster.at(8.0, lambda: cluster.start_worker(1, program))
        cluster.at(10.0, lambda: cluster.partition([("worker", 1)], [("scheduler", 0)]))
        cluster.at(10.1, lambda: cluster.crash("server", 0))
        cluster.at(12.9, cluster.heal)
        assert cluster.run(program) == [[0.0] * 8] * 2


def test_no_life_takes_what_is_answered_to_an_earlier_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer may be held back until a replica has it, and then goes to the rank's latest connection."""
    handle = Serving.handle
    asked: dict[int, set[int]] = {}

    def listen(self: Serving, rank: int, incarnation: int, message: Message, payload: object, now: float) -> list[Any]:
        if rank == 1:
            asked.setdefault(incarnation, set()).add(message.request_id)
        return handle(self, rank, incarnation, message, payload, now)

    with Cluster(2, 1, on_worker_loss="wait") as cluster:

        def program(kv: KVStore) -> None:
            kv.init("w", np.zeros(1))
            for _ in range(kv.rounds("w"), 5):
                kv.pushpull("w", np.ones(1)).result()
                cluster.sleep(1.0)

        monkeypatch.setattr(Serving, "handle", listen)
        cluster.at(2.5, lambda: cluster.crash("worker", 1))
        cluster.at(3.0, lambda: cluster.start_worker(1, program))
        cluster.run(program)
    assert len(asked) == 2
    assert not asked[1] & asked[2]
