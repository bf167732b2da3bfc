"""Rounds of so many samples while the number of workers changes: the weights are those of one process alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import kvstore
from kvstore import KVStore, Trainer, optim
from kvstore.testing import Cluster

PER_ROUND = 24
KEYS = ("w", "b", "x")
FIRST = {key: np.linspace(-1, 1, size) for key, size in zip(KEYS, (7, 1, 3000), strict=True)}


def gradient(key: str, weight: np.ndarray, sample: int) -> np.ndarray:
    """Of the loss that this one sample makes."""
    target = np.cos(np.arange(weight.size) + sample)
    return weight - target


def batch_gradients(weights: dict[str, np.ndarray], batch: list[int]) -> dict[str, np.ndarray]:
    return {key: sum((gradient(key, weights[key], n) for n in batch), np.zeros_like(weights[key])) for key in KEYS}


def optimizer() -> optim.Optimizer:
    return optim.SGD(lr=0.2, momentum=0.5, weight_decay=0.01)


class Record:
    """Which samples each round had, as the workers tell."""

    def __init__(self) -> None:
        self.rounds: dict[int, list[int]] = {}

    def worker(self, until: Callable[[], bool], cluster: Cluster, size: int) -> Callable[[KVStore], Any]:
        """A program that steps with a batch of its own size, smaller now and then, until it is told to leave."""

        def program(kv: KVStore) -> Any:
            weights = {key: np.array(value) for key, value in FIRST.items()}
            trainer = Trainer(weights, optimizer(), kv, scale=1 / PER_ROUND)
            while not until():
                step = trainer.steps
                count = 0 if (step + kv.rank) % 7 == 3 else size - step % 2
                batch = [1000 * kv.rank + step * 10 + n for n in range(count)]
                grads = batch_gradients(weights, batch)
                self.rounds.setdefault(step, []).extend(batch)
                trainer.step(grads, samples=count)
                cluster.sleep(0.05)
            kv.leave()
            return trainer.steps

        return program

    def alone(self, steps: int) -> dict[str, np.ndarray]:
        """What one process makes of the same samples."""
        weights = {key: np.array(value) for key, value in FIRST.items()}
        with kvstore.create("local") as kv:
            trainer = Trainer(weights, optimizer(), kv)
            for step in range(steps):
                batch = self.rounds[step]
                if not batch:
                    continue  # nothing to learn from
                grads = batch_gradients(weights, batch)
                trainer.step({key: grad / len(batch) for key, grad in grads.items()})
        return weights


@pytest.mark.parametrize("seed", range(3))
def test_two_workers_then_four_then_one(seed: int) -> None:
    record = Record()
    with Cluster(2, 2, seed=seed, on_worker_loss="continue", replication=1, samples_per_round=PER_ROUND) as cluster:
        final: dict[str, np.ndarray] = {}
        steps = 0

        def last(kv: KVStore) -> Any:
            nonlocal steps
            steps = record.worker(lambda: cluster.now > 14, cluster, 6)(kv)
            for key in KEYS:
                final[key] = kv.pull(key).result()
            return kv.num_workers

        for rank, size in ((2, 4), (3, 1)):
            late = record.worker(lambda: cluster.now > 9, cluster, size)
            cluster.at(3.0 + rank / 7, lambda rank=rank, late=late: cluster.start_worker(rank, late))  # type: ignore[misc]
        cluster.at(6.0, lambda: cluster.crash("server", 1))
        cluster.run([last, record.worker(lambda: cluster.now > 10, cluster, 3)])
    sizes = {len(batch) for batch in record.rounds.values()}
    assert len(sizes) > 5, sizes  # so that it mattered
    assert max(sizes) > 9 and min(sizes) == 0
    expected = record.alone(steps)
    for key in KEYS:
        np.testing.assert_allclose(final[key], expected[key], rtol=1e-9, atol=1e-12)
        assert not np.allclose(final[key], FIRST[key])


def test_a_worker_that_is_lost_takes_its_samples_along() -> None:
    with Cluster(3, 1, seed=4, on_worker_loss="continue", samples_per_round=12) as cluster:

        def program(kv: KVStore) -> Any:
            kv.init("w", np.zeros(2))
            first = kv.pushpull("w", np.ones(2), samples=4).result()
            if kv.rank == 2:
                cluster.crash("worker", 2)
            return [list(first), list(kv.pushpull("w", np.ones(2), samples=3).result())]

        assert cluster.run(program) == [[[3.0] * 2, [4.0] * 2]] * 2 + [None]
