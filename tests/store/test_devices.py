"""The device level: one device's own pushes and pulls, under each model."""

from __future__ import annotations

import numpy as np
import pytest

import kvstore
from kvstore import errors, optim

ONE = np.ones(1, np.float32)


@pytest.fixture
def store(create):
    def make(model: str, devices: int = 2) -> kvstore.KVStore:
        kv = create(devices=devices, device_consistency=model)
        kv.init("w", np.zeros(1, np.float32))
        kv.set_optimizer(optim.Accumulate())
        return kv

    return make


def test_sequential_takes_effect_when_every_device_has_pushed(store):
    with store("sequential") as kv:
        first = kv.push("w", ONE, device=0)
        early = kv.pull("w", device=0)
        assert not first.done()
        assert not early.done()
        assert kv.pull("w", device=1).result().tolist() == [0]  # right after its own last round: none
        kv.push("w", 2 * ONE, device=1)
        assert early.result().tolist() == [3]
        assert first.result() is None
        assert early.staleness == 0


def test_bounded_blocks_the_pulls_of_who_is_too_far_ahead(store):
    with store("bounded(2)") as kv:
        for _ in range(2):
            kv.push("w", ONE, device=0).result()  # pushes are never blocked
        ahead = kv.pull("w", device=0)
        assert ahead.result().tolist() == [2]
        assert ahead.staleness == 2
        kv.push("w", ONE, device=0)
        blocked = kv.pull("w", device=0)
        assert not blocked.done()
        assert kv.pull("w", device=1).result().tolist() == [3]
        kv.push("w", ONE, device=1)
        assert blocked.result().tolist() == [4]
        assert blocked.staleness == 2


def test_bounded_by_zero_is_not_sequential(store):
    with store("bounded(0)") as kv:
        kv.push("w", ONE, device=0)
        waits = kv.pull("w", device=0)
        assert not waits.done()
        kv.push("w", ONE, device=1)
        kv.push("w", ONE, device=1)
        assert waits.result().tolist() == [2]  # answered the moment the other's round came
        assert kv.pull("w", device=0).result().tolist() == [3]  # newer pushes are visible


def test_eventual_answers_at_once_with_the_pushers_own_writes(store):
    with store("eventual") as kv:
        for n in range(5):
            kv.push("w", ONE, device=0)
            pull = kv.pull("w", device=0)
            assert pull.result().tolist() == [n + 1]
            assert pull.staleness == n + 1


def test_a_deadline_says_which_device_is_awaited(store):
    with store("sequential", devices=3) as kv:
        handle = kv.push("w", ONE, device=1)
        with pytest.raises(errors.DeadlineError, match=r"'w'.*round 1.*devices \[0, 2\]") as caught:
            handle.result(0.01)
        assert isinstance(caught.value, TimeoutError)
        kv.push("w", ONE, device=0)
        kv.push("w", ONE, device=2)
        handle.result()


def test_a_key_may_have_its_own_model(create):
    with create(devices=2) as kv:
        kv.init("a", np.zeros(1, np.float32), device_consistency="eventual")
        kv.push("a", 5 * ONE, device=1).result()
        assert kv.pull("a", device=1).result().tolist() == [5]


def test_the_pushed_array_may_be_overwritten_while_the_round_waits(store):
    with store("sequential") as kv:
        gradient = ONE.copy()
        kv.push("w", gradient, device=0)
        gradient[:] = 100
        kv.push("w", ONE, device=1).result()
        assert kv.pull("w").result().tolist() == [2]
