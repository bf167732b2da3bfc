"""Where a server's values lie when workers of its host read them in place.

The pieces of one key lie side by side, so that a worker that gets them all from one server sees the
value as one array. There are as many such rows as versions that are being read at one time, two as a rule.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from kvstore.arrays import Array, dtype_named
from kvstore.cluster.near import Arena, Region
from kvstore.protocol.messages import Place, Spec
from kvstore.protocol.pieces import BundleId, Key, PieceId


class SharedValues:
    """Rows of pieces in shared memory. Thread-safe.

    Args:
        arena: where rows are allocated.
        num_servers: over which the pieces of a key are spread in turn.
    """

    def __init__(self, arena: Arena, num_servers: int) -> None:
        self._arena = arena
        self._num_servers = num_servers
        self._rows: dict[Key | BundleId, list[Region]] = {}
        self._taken: dict[PieceId, int] = {}  # how many rows the piece has an array in
        self._places: dict[int, tuple[Array, Place]] = {}  # by id of the array
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<SharedValues: {sum(map(len, self._rows.values()))} rows of {len(self._rows)} keys>"

    def allocator(self, piece: PieceId, spec: Spec) -> Callable[[], Array | None]:
        """What gives the piece one array more, in the next row; None when there is no memory."""
        return lambda: self._allocate(piece, spec)

    def place(self, array: Array) -> Place | None:
        """Where an array of this memory lies; None for another."""
        found = self._places.get(id(array))
        return None if found is None else found[1]

    def _allocate(self, piece: PieceId, spec: Spec) -> Array | None:
        key, number = piece
        dtype = dtype_named(spec.dtype)
        cut = spec.cut
        first = number % self._num_servers
        offset = number // self._num_servers * cut.piece_items * dtype.itemsize
        with self._lock:
            rows = self._rows.setdefault(key, [])
            index = self._taken.get(piece, 0)
            if index == len(rows):
                items = sum(cut.size(own) for own in range(first, len(cut), self._num_servers))
                row = self._arena.allocate(items * dtype.itemsize)
                if row is None:
                    return None
                rows.append(row)
            self._taken[piece] = index + 1
            row = rows[index]
            array = row.array[offset : offset + cut.size(number) * dtype.itemsize].view(dtype)
            self._places[id(array)] = (array, row.place(offset))
            return array

    def forget(self, piece: PieceId) -> None:
        """The piece is no more."""
        with self._lock:
            if self._taken.pop(piece, 0) and not any(key == piece[0] for key, _ in self._taken):
                for row in self._rows.pop(piece[0]):
                    self._arena.free(row)
