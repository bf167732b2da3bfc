"""What comes before a shard serves is kept, but no more of it than there is room for."""

from __future__ import annotations

from kvstore.cluster import early
from kvstore.cluster.early import Early


def test_everything_comes_back_in_its_order_and_once():
    kept = Early()
    for n in range(5):
        assert kept.keep(b"ab"[n % 2 : n % 2 + 1], [b"header", b"%d" % n])
    assert [frames[1] for _, frames in kept.take()] == [b"0", b"1", b"2", b"3", b"4"]
    assert kept.take() == []


def test_one_peer_takes_no_others_room(monkeypatch):
    monkeypatch.setattr(early, "PEER_MAX", 3)
    monkeypatch.setattr(early, "PEER_BYTES_MAX", 100)
    kept = Early()
    assert [kept.keep(b"a", [b"1234"]) for _ in range(5)] == [True] * 3 + [False] * 2
    assert [kept.keep(b"b", [b"x" * 40, b"x" * 9]) for _ in range(5)] == [True] * 2 + [False] * 3
    assert kept.keep(b"c", [b"1234"])
    assert len(kept.take()) == 6
    assert kept.keep(b"a", [b"1234"])  # there is room again


def test_many_peers_are_bounded_together(monkeypatch):
    monkeypatch.setattr(early, "ALL_MAX", 10)
    kept = Early()
    assert sum(kept.keep(b"%d" % n, [b"1234"]) for n in range(50)) == 10
    monkeypatch.setattr(early, "ALL_BYTES_MAX", 100)
    kept = Early()
    assert sum(kept.keep(b"%d" % n, [b"x" * 30]) for n in range(50)) == 3
