"""How values are cut and spread: evenly in bytes, by names alone, and so that few keys move with another shard."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.bench.models import MODELS
from kvstore.protocol.pieces import (
    FEW,
    PAGE_BYTES,
    PIECE_BYTES,
    SHARE_BYTES,
    SMALL_PIECE_BYTES,
    WHOLE_BYTES,
    Cut,
    owner,
)

SHARDS = (2, 3, 4, 8)


def loads(sizes: dict[str, int], shards: int) -> list[int]:
    """Bytes on each shard, of values of so many float32."""
    held = [0] * shards
    for key, items in sizes.items():
        cut = Cut.of(items, 4, shards=shards)
        for piece in range(len(cut)):
            held[owner(key, piece, shards)] += 4 * cut.size(piece)
    return held


@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize(
    ("sizes", "most"),
    [
        ({key: math.prod(shape) for key, shape in MODELS["resnet50"]().items()}, 1.2),
        ({key: math.prod(shape) for key, shape in MODELS["bert-base"]().items()}, 1.05),
        ({f"key{i}": 100 for i in range(10_000)}, 1.05),
        ({"w": 16 << 20}, 1.001),
    ],
    ids=["resnet50", "bert-base", "10000 small keys", "64 MB"],
)
def test_no_shard_has_much_more_than_its_part(sizes: dict[str, int], most: float, shards: int) -> None:
    held = loads(sizes, shards)
    assert sum(held) == 4 * sum(sizes.values())
    assert max(held) <= most * sum(held) / shards


def test_one_shard_more_takes_its_part_and_nothing_else_moves() -> None:
    keys = [f"layer{i}.weight" for i in range(20_000)]
    for shards in range(1, 12):
        moved = [key for key in keys if owner(key, 0, shards) != owner(key, 0, shards + 1)]
        assert all(owner(key, 0, shards + 1) == shards for key in moved)
        expected = len(keys) / (shards + 1)
        assert abs(len(moved) - expected) < 5 * math.sqrt(expected)


@given(st.integers(0, 1 << 32), st.sampled_from([1, 2, 4, 8]), st.integers(1, 40))
def test_every_cut(items: int, itemsize: int, shards: int) -> None:
    cut = Cut.of(items, itemsize, shards=shards)
    nbytes = items * itemsize
    sizes = [cut.size(piece) for piece in {0, 1, len(cut) - 2, len(cut) - 1} if 0 <= piece < len(cut)]
    assert cut.span(len(cut) - 1)[1] == items
    assert max(sizes) * itemsize <= PIECE_BYTES
    if len(cut) > 1:
        assert min(sizes) > 0
        assert cut.piece_items * itemsize % PAGE_BYTES == 0
    if nbytes * shards <= WHOLE_BYTES and nbytes <= SMALL_PIECE_BYTES:
        assert len(cut) == 1
    elif nbytes >= SHARE_BYTES * shards:  # each shard gets one, but for what it costs to begin at a page
        assert len({owner("w", piece, shards) for piece in range(len(cut))}) >= shards - 1


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_pieces_grow_once_there_are_enough_to_overlap(shards: int) -> None:
    pieces = {
        mb: len(Cut.of(mb << 18, 4, shards=shards)) for mb in (4 * shards, 16 * shards, 64 * shards, 256 * shards)
    }
    assert list(pieces.values()) == [shards, 4 * shards, FEW * shards, 32 * shards]


def test_a_whole_value_is_one_piece() -> None:
    cut = Cut.of(100 << 20, 4, shards=4, whole=True)
    assert (len(cut), cut.span(0)) == (1, (0, 100 << 20))
    assert len(Cut.of(0, 4, shards=4)) == 1


def test_owners_are_the_same_in_every_process_and_version() -> None:
    """They are part of the protocol: another client has to find the same."""
    assert [owner("w", 0, n) for n in range(1, 9)] == [0, 0, 2, 2, 2, 5, 5, 7]
    assert [owner(-7, piece, 5) for piece in range(6)] == [0, 1, 2, 3, 4, 0]
