"""A server's part in a consistent cut: which pushes belong to it, and when the values are exactly these. Pure.

A worker's *marker* says for every key up to which round its pushes belong to the cut. From its marker on, the worker's
later pushes are held back here, as if the network had been slow, until the cut has been taken (the alignment of Chandy
and Lamport, ACM TOCS 1985, and of Carbone et al., arXiv 1506.08603). The cut is taken in the moment when all markers
are here and the pushes up to them are in effect: then every value contains those pushes and no others, whatever the
model. Proof: pushes up to the marker are in effect by the condition; a later push was either held back, or came
before the marker, and then the cut fails instead of being wrong. As nobody reads what was held back, no push in
the cut rests on a push outside of it.

Nobody waits for ever: a worker that is gone is excused (what it pushed until then belongs to the cut), and a cut whose
markers do not come within :data:`HOLD_S` after the first is given up; what was held back goes on.

What it refuses to know: values, how they are copied, who wants the cut.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from kvstore.consistency import Level
from kvstore.errors import CheckpointError
from kvstore.protocol.messages import Push
from kvstore.protocol.pieces import BundleId, Key, PieceId

HOLD_S = 60.0  # between the first marker of a cut and the last
OPEN_S = 1800.0  # from when a cut is asked for to its last marker: who asked for it may be gone
OVER_MAX = 256  # cuts that are remembered to be over


class Counted(Protocol):
    """A piece, as far as it is looked at here."""

    level: Level


Pieces = Mapping[PieceId, Counted]


@dataclass(slots=True)
class Cut:
    """One cut that has not been taken yet."""

    number: int
    awaited: frozenset[int]
    marks: dict[int, dict[Key, int]] = field(default_factory=dict)  # rank -> key -> last round that belongs to it
    excused: set[int] = field(default_factory=set)
    keys: list[tuple[Key, int]] | None = None  # its pieces: those there at the marker of the worker that makes keys
    unsettled: list[tuple[Key, int]] | None = None  # of these, from when all markers are here
    until: float = math.inf
    failure: CheckpointError | None = None

    @property
    def missing(self) -> list[int]:
        """Whose markers are awaited."""
        return sorted(self.awaited - set(self.marks) - self.excused)

    def holds_back(self, rank: int, key: Key, round: int, *, in_step: bool) -> bool:
        """Is this push later than the cut? ``key``: the first, of a bundle's, which are all in the same round.

        ``in_step``: its round takes effect when all have pushed it.
        """
        if rank in self.excused or rank not in self.awaited:
            # It came (back) after the cut had begun. In step with the others it goes no further than they do, and they
            # may need its push to come to their cut point.
            return not in_step
        return rank in self.marks and round > self.marks[rank].get(key, 0)

    def settled(self, piece_id: tuple[Key, int], level: Level) -> bool:
        """Are all pushes of the piece that belong to the cut in effect?"""
        return level.settled(
            {rank: self.marks[rank].get(piece_id[0], 0) for rank in level.rounds if rank in self.marks}
        )


@dataclass(frozen=True, slots=True)
class Held:
    """A push that waits until the cuts before it have been taken."""

    rank: int
    incarnation: int
    message: Push
    payload: object
    key: Key  # of the push, or the first of the bundle's
    in_step: bool  # see Cut.holds_back


class Cutting:
    """All cuts of one server that have not been taken, and the pushes that wait for them."""

    def __init__(self) -> None:
        self.open: dict[int, Cut] = {}
        self._held: dict[tuple[int, Key | BundleId, int], Held] = {}  # in the order in which they came
        self._over: deque[int] = deque(maxlen=OVER_MAX)

    def __repr__(self) -> str:
        waits = {cut.number: cut.missing for cut in self.open.values()}
        return f"<Cutting: waits for markers {waits}, holds {len(self._held)} pushes>"

    def begin(self, number: int, awaited: tuple[int, ...], here: Collection[int], now: float = 0.0) -> Cut | None:
        """The cut with this number, which may have begun; None if it is over. ``here``: workers that are not gone."""
        if number in self._over:
            return None
        cut = self.open.get(number)
        if cut is None:
            cut = self.open[number] = Cut(number, frozenset(awaited), until=now + OPEN_S)
            cut.excused.update(cut.awaited.difference(here))
        return cut

    def mark(self, cut: Cut, rank: int, rounds: dict[Key, int], pieces: Pieces, now: float) -> None:
        """A worker's marker: its pushes up to these rounds belong to the cut (of a key not named: those so far)."""
        if rank in cut.marks or rank not in cut.awaited or rank in cut.excused:
            return
        rounds = dict(rounds)
        mine = [(key, number) for key, number in pieces if not isinstance(key, bytes)]
        for key, number in mine:
            counted = pieces[key, number].level.rounds.get(rank, 0)
            if counted > rounds.setdefault(key, counted):
                cut.failure = CheckpointError(
                    f"key {key!r}: worker {rank} pushed while it passed its cut point: "
                    f"round {counted} came before the marker, which says {rounds[key]}"
                )
        cut.marks[rank] = rounds
        cut.until = min(cut.until, now + HOLD_S)
        if rank == min(cut.awaited - cut.excused):
            cut.keys = mine

    def hold_back(self, held: Held) -> bool:
        """Keep the push for later, if it comes after a cut that has not been taken."""
        name = (held.rank, held.message.key, held.message.piece)
        known = self._held.get(name)
        if known is not None and known.incarnation == held.incarnation and known.message.round <= held.message.round:
            return True  # the same again, or a question what became of it; a later one is a gap, and comes again
        if held.payload is None or not self._comes_later(held):
            return False
        self._held[name] = held
        return True

    def excuse(self, rank: int) -> None:
        """The worker is gone: no cut waits for its marker."""
        for cut in self.open.values():
            if rank in cut.awaited and rank not in cut.marks:
                cut.excused.add(rank)

    def due(self, pieces: Pieces) -> list[Cut]:
        """The cuts that are to be taken now, or have failed; they are over."""
        due = [cut for cut in self.open.values() if cut.failure is not None or self._settled(cut, pieces)]
        for cut in due:
            self.end(cut.number)
        return due

    def expire(self, now: float) -> list[Cut]:
        """The cuts whose markers have not come in time; they are over."""
        late = [cut for cut in self.open.values() if now > cut.until]
        for cut in late:
            self.end(cut.number)
        return late

    def end(self, number: int) -> None:
        """The cut is over, or not wanted any more."""
        self._over.append(number)
        self.open.pop(number, None)

    def released(self) -> list[Held]:
        """The pushes that wait for no cut any more, in their order."""
        released = {name: held for name, held in self._held.items() if not self._comes_later(held)}
        for name in released:
            del self._held[name]
        return list(released.values())

    def _comes_later(self, held: Held) -> bool:
        return any(
            cut.holds_back(held.rank, held.key, held.message.round, in_step=held.in_step) for cut in self.open.values()
        )

    def _settled(self, cut: Cut, pieces: Pieces) -> bool:
        if cut.missing:
            return False
        if cut.keys is None:
            cut.keys = [(key, number) for key, number in pieces if not isinstance(key, bytes)]
        if cut.unsettled is None:
            cut.unsettled = list(cut.keys)
        while cut.unsettled:  # what is settled stays so: later pushes are held back
            piece = pieces.get(cut.unsettled[-1])
            if piece is not None and not cut.settled(cut.unsettled[-1], piece.level):
                return False
            cut.unsettled.pop()
        return True
