"""How a value is cut into pieces and which server owns each. Pure.

Every worker computes the same answer from the key, the value's description and the number of
servers; nobody has to be asked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

Key = str | int
BundleId = bytes  # of keys that travel together as one piece, see kvstore.protocol.bundles
PieceId = tuple[Key | BundleId, int]
Span = tuple[int, int]  # the first element, and the one after the last

PIECE_BYTES = 4 << 20
BUNDLE_ID_BYTES = 16


@dataclass(frozen=True, slots=True)
class Cut:
    """A flat value of ``items`` elements in pieces of ``piece_items`` (the last may be shorter)."""

    items: int
    piece_items: int

    @classmethod
    def of(cls, items: int, itemsize: int, *, whole: bool = False, piece_bytes: int = PIECE_BYTES) -> Cut:
        """Pieces of ``piece_bytes``; one piece if ``whole``. An empty value is one empty piece."""
        return cls(items, max(1, items) if whole else max(1, piece_bytes // itemsize))

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


def owner(key: Key, piece: int, num_servers: int) -> int:
    """The server of a piece: a stable hash of the key, then in turn, so that big values spread evenly."""
    digest = hashlib.blake2b(_bytes(key), digest_size=8).digest()
    return (int.from_bytes(digest, "big") + piece) % num_servers


def bundle_id(keys: Sequence[Key]) -> BundleId:
    """The name of these keys in this order, the same in every process."""
    digest = hashlib.blake2b(digest_size=BUNDLE_ID_BYTES)
    for key in keys:
        name = _bytes(key)
        digest.update(len(name).to_bytes(4, "big") + name)
    return digest.digest()


def _bytes(key: Key) -> bytes:
    return b"s" + key.encode() if isinstance(key, str) else b"i" + key.to_bytes(8, "big", signed=True)
