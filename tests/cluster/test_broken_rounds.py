"""A push that fails here before all of it has been sent: what it costs, and what the next calls say."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest

import kvstore
from kvstore import comm, optim
from kvstore.cluster import client
from kvstore.cluster.session import Session
from tests.clusters import cluster

ITEMS = 3 << 20  # float32: three pieces of 4 MB


def fail_merge(monkeypatch, error, *, after=0):
    """One merge raises ``error``: the one that comes after so many others."""
    merge, calls = comm.merge, []

    def merge_or_fail(arrays, out, *how, **options):
        calls.append(out)
        if len(calls) == after + 1:
            raise error
        merge(arrays, out, *how, **options)

    monkeypatch.setattr(comm, "merge", merge_or_fail)


@pytest.fixture
def in_parts(monkeypatch):
    """A gradient is staged and sent piece by piece."""
    monkeypatch.setattr(client, "CHUNK_BYTES", 4 << 20)
    monkeypatch.setattr(client, "CROWDED_CHUNK_BYTES", 4 << 20)


@pytest.mark.parametrize("shared", [False, True], ids=["sockets", "shared memory"])
@pytest.mark.parametrize("late", [False, True], ids=["at once", "as an op"])
def test_an_error_before_anything_is_sent_costs_that_push_only(monkeypatch, tmp_path, in_parts, shared, late):
    def work(kv):
        kv.init("w", np.zeros(ITEMS, np.float32))
        assert kv._home._remotes["w"].pieces == 3
        fail_merge(monkeypatch, MemoryError("no room"))
        ops_only = kv._engine.profile(tmp_path / "trace.json")  # while it is profiled, all is done by ops
        with ops_only if late else nullcontext():
            failed = kv.push("w", np.ones(ITEMS, np.float32))
            with pytest.raises(MemoryError, match="no room"):
                failed.result()
            return [float(kv.pushpull("w", np.full(ITEMS, r, np.float32)).result().max()) for r in (2, 3)]

    with cluster(1) as running:
        assert running.run(work, shared_memory=shared) == [[2.0, 3.0]]


@pytest.mark.parametrize("shared", [False, True], ids=["sockets", "shared memory"])
@pytest.mark.parametrize("error", [MemoryError("no room"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_an_error_when_a_part_has_been_sent_ends_the_rounds_of_that_key(monkeypatch, in_parts, shared, error):
    def work(kv):
        kv.init(["w", "other"], [np.zeros(ITEMS, np.float32)] * 2)
        ones = np.ones(ITEMS, np.float32)
        kv.push("w", ones).result()
        fail_merge(monkeypatch, error, after=1)
        with pytest.raises(type(error)):
            kv.push("w", ones).result()
        for call in (lambda: kv.push("w", ones), lambda: kv.pull("w"), lambda: kv.pushpull("w", ones.copy())):
            with pytest.raises(kvstore.BrokenRoundError, match="of round 2 this worker has sent a part only") as raised:
                call().result()
            assert raised.value.__cause__ is error
        return float(kv.pushpull("other", ones).result().max())

    with cluster(1) as running:
        assert running.run(work, shared_memory=shared) == [1.0]


@pytest.mark.parametrize("sent", [False, True], ids=["before it is sent", "when it has been sent"])
def test_an_interrupted_push_is_a_round_if_it_has_been_sent(monkeypatch, sent):
    def work(kv):
        kv.init("w", np.zeros(4, np.float32), cluster_consistency="eventual")
        kv.set_optimizer(optim.SGD(lr=1.0))
        session, submit = kv._home._session, Session.submit
        interrupts = [KeyboardInterrupt()]

        def submit_and_interrupt(self, requests, **how):
            if self is session and interrupts and not sent:
                raise interrupts.pop()
            submit(self, requests, **how)
            if self is session and interrupts:
                raise interrupts.pop()

        monkeypatch.setattr(Session, "submit", submit_and_interrupt)
        with pytest.raises(KeyboardInterrupt):
            kv.push("w", np.ones(4, np.float32))
        kv.push("w", np.full(4, 10, np.float32)).result()
        return float(kv.pull("w").result().min())

    with cluster(1) as running:
        assert running.run(work) == [-11.0 if sent else -10.0]
