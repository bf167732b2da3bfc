"""An urgent key overtakes a large one that is under way: on the way to the server, in it, and on the way back."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import pytest

import engine
from kvstore.cluster.outbox import BATCH_BYTES, WINDOW_BYTES, Outbox
from kvstore.cluster.work import Work
from kvstore.protocol.messages import Done, Push
from kvstore.protocol.pieces import PIECE_BYTES
from kvstore.protocol.requesting import CREDIT_BYTES
from kvstore.stored import Stored
from tests.clusters import cluster

LIMIT_S = 20
LARGE = 256 << 20
IN_TIME = 2 * PIECE_BYTES
THREADS = 2  # of the server's engine, on any machine: each may have begun a piece


@dataclass
class Frame:
    nbytes: int


def merges_after_urgent(monkeypatch) -> list[str]:
    """No merge of the key ``large`` begins before the server has got a push of ``urgent``; the merges, in order."""
    monkeypatch.setattr(engine, "_default", engine.create(threads=THREADS))
    merged: list[str] = []
    urgent_is_there = threading.Event()
    assign, apply = Stored.assign, Work.apply

    def assign_when_urgent_is_there(stored, *args, **options):
        if stored.var.name.startswith("'large'"):
            assert urgent_is_there.wait(LIMIT_S)
        merged.append(stored.var.name)
        assign(stored, *args, **options)

    def apply_and_tell(work, action, *args):
        apply(work, action, *args)
        if action.piece[0] == "urgent":
            urgent_is_there.set()

    monkeypatch.setattr(Stored, "assign", assign_when_urgent_is_there)
    monkeypatch.setattr(Work, "apply", apply_and_tell)
    return merged


@pytest.mark.parametrize("shared", [False, True], ids=["sockets", "shared memory"])
def test_an_urgent_key_overtakes_256_megabytes(shared, monkeypatch):
    """Merges wait until the server has got the urgent push; then it comes after those that had begun, no later."""
    merged = merges_after_urgent(monkeypatch)
    with cluster(1) as running:

        def work(kv):
            large, urgent = np.ones(LARGE // 4, np.float32), np.ones(15_000, np.float32)  # needs no credit
            kv.init(["large", "urgent"], [large, urgent])
            slow = kv.pushpull("large", large, priority=0)
            kv.pushpull("urgent", urgent, priority=1).result()
            slow.result()

        running.run(work, shared_memory=shared)
    assert merged.index("'urgent'[0]") <= THREADS


def test_credit_and_window_are_two_pieces():
    assert CREDIT_BYTES == WINDOW_BYTES == IN_TIME


def test_an_urgent_reply_goes_before_the_large_ones_that_wait():
    outbox = Outbox()
    for number in range(8):
        outbox.put(Done(number), (Frame(PIECE_BYTES),), 0, lambda: None)
    first = list(outbox.batches())
    assert [batch.messages[0][0].request_id for batch in first] == [0, 1]
    outbox.put(Done(100), (Frame(8),), priority=1)
    outbox.put(Done(101), (Frame(PIECE_BYTES),), priority=1, on_sent=lambda: None)
    assert [message.request_id for batch in outbox.batches() for message, _ in batch.messages] == [100]
    for tell in first[0].on_sent:
        tell()
    assert [message.request_id for batch in outbox.batches() for message, _ in batch.messages] == [101]
    assert outbox.in_flight == 2 * PIECE_BYTES


def test_small_replies_travel_together():
    outbox = Outbox()
    for number in range(1000):
        outbox.put(Done(number), (Frame(1000),))
    batches = list(outbox.batches())
    assert [message.request_id for batch in batches for message, _ in batch.messages] == list(range(1000))
    assert len(batches) == -(-1000 * 1000 // BATCH_BYTES)
    assert all(batch.nbytes <= BATCH_BYTES for batch in batches)


def test_the_priority_travels():
    assert Push(1, "w", 0, 1, True, False, priority=-5).priority == -5
