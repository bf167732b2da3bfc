"""Workers that come and go change nothing that others may rely on; and bugs that are planted there are found."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvstore import KVStore
from kvstore.consistency import Level
from kvstore.errors import KVStoreError
from kvstore.protocol.roster import Membership
from kvstore.protocol.serving import Serving
from kvstore.protocol.workers import Workers
from kvstore.testing import Cluster
from tests.testing.membership import Plan, Run, Violation


@pytest.mark.parametrize("seed", range(40))
def test_workers_come_and_go(seed: int) -> None:
    Run(Plan.of(seed)).run()


@pytest.mark.parametrize("on_loss", ["wait", "continue"])
@pytest.mark.parametrize("model", ["sequential", "bounded(0)", "bounded(2)", "eventual"])
def test_every_model_under_every_policy(model: str, on_loss: str) -> None:
    for seed in range(100, 104):
        Run(Plan.of(seed, model, on_loss)).run()


def test_what_is_tested_does_happen() -> None:
    runs = [Run(Plan.of(seed)) for seed in range(60)]
    for run in runs:
        run.run()
    assert sum(run.joined for run in runs) > 2
    assert sum(run.returned for run in runs) > 5
    assert sum(run.fenced for run in runs) > 2


def found(seeds: range, model: str | None = None, on_loss: str | None = None) -> list[str]:
    """What the checkers say of these seeds."""
    said = []
    for seed in seeds:
        try:
            Run(Plan.of(seed, model, on_loss), limit_s=300.0).run()
        except (Violation, KVStoreError, AssertionError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def test_a_joiner_that_counts_one_round_too_early_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Level, "begun", property(lambda self: max(0, max(self.rounds.values(), default=0) - 1)))
    assert found(range(60), "sequential", "continue")


def test_a_joiner_that_freezes_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Serving, "_begins_something", lambda self, message: False)
    assert found(range(150), None, "continue")


def test_a_life_that_is_over_and_still_heard_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def hear(self: Workers, rank: int, incarnation: int, now: float) -> bool:
        known = self.incarnations.get(rank, incarnation)
        self.incarnations[rank] = max(known, incarnation)
        self.heard[rank] = now
        return incarnation > known

    monkeypatch.setattr(Workers, "hear", hear)
    monkeypatch.setattr(Workers, "is_over", lambda self, rank, incarnation: False)
    assert found(range(60), "eventual", "continue")


def test_a_lost_worker_of_whom_nobody_is_told_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Membership, "lost", lambda self, peer: [])
    assert found(range(20), "sequential", "continue")


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
