"""Malformed messages against real daemons while two train; the long version is ``python -m tests.cluster.flood``."""

from __future__ import annotations

from tests.cluster import flood


def test_malformed_messages_cost_a_running_cluster_nothing():
    outcome = flood.run(3000, seed=1)
    assert outcome.weights == [outcome.expected] * flood.WORKERS
    assert not outcome.errors
    assert outcome.rounds > 10


def test_every_message_of_a_flood_is_malformed_or_a_stranger_s():
    rows = [
        b"\x96\x01\x07\x01\x00\x01\x90",
        b"\x96\x01\x07\x01\x05\x01\x90",
        b"\x96\x01\x08\x01\x00\x01\x90",
        b"nonsense",
    ]
    assert [flood.harmless([row], 7) for row in rows] == [False, True, True, True]
