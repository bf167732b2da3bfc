"""Who still reads what: places in a server's memory that workers were answered with. Pure.

A worker never says that it has finished. Each request says which earlier ones of its piece the worker still
holds; all others are over. So nothing more has to arrive than what is sent anyway, and what is sent twice or late
does no harm: it speaks only of requests that were made before it.
"""

from __future__ import annotations

from typing import NamedTuple

from kvstore.protocol.messages import HELD_MAX
from kvstore.protocol.pieces import PieceId


class Reader(NamedTuple):
    """A worker that reads the place by which one of its requests was answered."""

    rank: int
    incarnation: int
    request_id: int


class Holding:
    """The worker's side, of one piece: requests whose places it reads, or will when they are answered."""

    def __init__(self) -> None:
        self._held: set[int] = set()

    def __repr__(self) -> str:
        return f"<Holding {sorted(self._held)}>"

    def request(self, request_id: int, *, pull: bool) -> tuple[bool, tuple[int, ...]]:
        """May this new request be answered with a place (only a ``pull`` may), and which earlier ones are held?"""
        earlier = tuple(self._held)
        near = pull and len(earlier) < HELD_MAX
        if near:
            self._held.add(request_id)
        return near, earlier

    def over(self, request_id: int) -> None:
        """The place is not read any more, or there was none; the next request will say so."""
        self._held.discard(request_id)


class Lending:
    """The server's side, of all its pieces."""

    def __init__(self) -> None:
        self._readers: dict[tuple[PieceId, int], list[Reader]] = {}  # by piece and rank

    def __repr__(self) -> str:
        return f"<Lending: {sum(map(len, self._readers.values()))} places>"

    def lend(self, piece: PieceId, reader: Reader) -> None:
        """``reader`` is answered with a place."""
        self._readers.setdefault((piece, reader.rank), []).append(reader)

    def count(self, piece: PieceId, rank: int) -> int:
        """How many places of the piece the worker reads."""
        return len(self._readers.get((piece, rank), ()))

    def heard(
        self, piece: PieceId, rank: int, incarnation: int, request_id: int, held: tuple[int, ...]
    ) -> list[Reader]:
        """A request for the piece has come. Returns the readers that have finished."""
        readers = self._readers.get((piece, rank))
        if not readers:
            return []
        made = (incarnation, request_id)
        over = [r for r in readers if (r.incarnation, r.request_id) < made and r.request_id not in held]
        if over:
            self._readers[piece, rank] = [reader for reader in readers if reader not in over]
        return over

    def gone(self, rank: int, incarnation: int) -> list[tuple[PieceId, Reader]]:
        """The worker has left or is lost, in that life. Returns its readers until then, all of which have finished."""
        over: list[tuple[PieceId, Reader]] = []
        for key in [key for key in self._readers if key[1] == rank]:
            readers = self._readers.pop(key)
            over += [(key[0], reader) for reader in readers if reader.incarnation <= incarnation]
            alive = [reader for reader in readers if reader.incarnation > incarnation]
            if alive:
                self._readers[key] = alive
        return over
