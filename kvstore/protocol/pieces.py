"""How a value is cut into pieces and which shard owns each. Pure.

Every worker computes the same answer from the key, the value's size and the number of shards; nobody has to be asked,
and the order of calls does not matter.

So the bytes can be balanced only by what a single key says. A large value is cut so that every shard has an equal part
of it. What is too small for that lies on one shard, by a consistent hash of its key: there are many such keys, or they
are few bytes. Large is what would be much for one of so many shards: a round over two servers takes longer than over
one, unless there is enough to move.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from kvstore.records import record

Key = str | int
BundleId = bytes  # of keys that travel together as one piece, see kvstore.protocol.bundles
PieceId = tuple[Key | BundleId, int]
Span = tuple[int, int]  # the first element, and the one after the last

PIECE_BYTES = 8 << 20  # the most that a piece has
FEW = 8  # pieces of a value on each shard: more of them cost more than they gain, so that from there on they grow
SMALL_PIECE_BYTES = 4 << 20  # the most that a piece has before: one is merged while others travel
WHOLE_BYTES = 8 << 20  # divided by the number of shards: up to this size a value is not spread over them
SHARE_BYTES = 256 << 10  # a larger one is spread over as many shards as get so much of it, or over all
PAGE_BYTES = 4096  # pieces begin at a multiple of it, counted from the value's beginning
BUNDLE_ID_BYTES = 16


@record
class Cut:
    """A flat value of ``items`` elements in pieces of ``piece_items`` (the last may be shorter)."""

    items: int
    piece_items: int

    @classmethod
    def of(cls, items: int, itemsize: int, *, shards: int = 1, whole: bool = False) -> Cut:
        """As many pieces as shards, or a multiple, if the value is large; one if ``whole``. An empty value is one."""
        nbytes = items * itemsize
        pieces = max(-(-nbytes // PIECE_BYTES), min(FEW * shards, -(-nbytes // SMALL_PIECE_BYTES)))
        if nbytes * shards > WHOLE_BYTES:
            pieces = max(pieces, min(shards, nbytes // SHARE_BYTES))
        if whole or pieces <= 1:
            return cls(items, max(1, items))
        if pieces > shards:
            pieces = -(-pieces // shards) * shards
        page = max(1, PAGE_BYTES // itemsize)
        return cls(items, -(-items // (pieces * page)) * page)

    def __len__(self) -> int:
        return max(1, -(-self.items // self.piece_items))

    def span(self, piece: int) -> Span:
        """First element of ``piece`` and the one after its last."""
        start = piece * self.piece_items
        return start, min(self.items, start + self.piece_items)

    def size(self, piece: int) -> int:
        """How many elements ``piece`` has."""
        start, stop = self.span(piece)
        return stop - start


def owner(key: Key, piece: int, shards: int) -> int:
    """The shard of a piece: that of the key for the first, then in turn."""
    digest = hashlib.blake2b(_bytes(key), digest_size=8).digest()
    return (_jump(int.from_bytes(digest, "big"), shards) + piece) % shards


def _jump(number: int, shards: int) -> int:
    """A consistent hash (Lamping and Veach 2014, arXiv 1406.2294): with one shard more, only what comes to it moves."""
    shard, following = 0, 0
    while following < shards:
        shard = following
        number = (number * 2862933555777941757 + 1) & 0xFFFFFFFFFFFFFFFF
        following = int((shard + 1) * ((1 << 31) / ((number >> 33) + 1)))
    return shard


def bundle_id(keys: Sequence[Key]) -> BundleId:
    """The name of these keys in this order, the same in every process."""
    digest = hashlib.blake2b(digest_size=BUNDLE_ID_BYTES)
    for key in keys:
        name = _bytes(key)
        digest.update(len(name).to_bytes(4, "big") + name)
    return digest.digest()


def _bytes(key: Key) -> bytes:
    return b"s" + key.encode() if isinstance(key, str) else b"i" + key.to_bytes(8, "big", signed=True)
