"""A piece as its server counts it: what is known of it, its array excepted. Pure."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

from kvstore.consistency import Level
from kvstore.errors import LimitError
from kvstore.protocol.messages import Spec
from kvstore.protocol.pieces import PieceId


@dataclass(slots=True)
class Piece:
    """What the server knows of one piece, its array excepted."""

    spec: Spec
    level: Level
    accepted: dict[int, int] = field(default_factory=dict)  # rank -> last accepted round
    held: dict[tuple[int, int], object] = field(default_factory=dict)  # payloads before their turn
    samples: dict[tuple[int, int], int] = field(default_factory=dict)  # in these, if its rounds are of so many
    commits: dict[tuple[int, int], int] = field(default_factory=dict)  # (rank, round) -> request
    generation: int = 0  # of the optimizer that the state is of; 0: of none
    steps: int = 0  # updates by it
    written: tuple[tuple[str, ...], tuple[str, ...]] | None = None  # names and dtypes, if a worker wrote the state

    def count_update(self, generation: int) -> None:
        """One more update by the optimizer of this generation."""
        if generation != self.generation:
            self.generation, self.steps, self.written = generation, 0, None
        self.steps += 1

    @property
    def quiet(self) -> bool:
        """Does nothing wait for another push?"""
        return not (self.held or self.commits or self.level.waiting)

    def same_history(self, other: Piece) -> bool:
        """Has it seen the same pushes as ``other``, in the same order?"""
        return (
            self.accepted == other.accepted
            and (self.generation, self.steps, self.written) == (other.generation, other.steps, other.written)
            and self.level.same_history(other.level)
        )


class Ticket(NamedTuple):
    """A pull, as the cluster level is asked it."""

    rank: int
    request_id: int
    near: bool
    piece: PieceId
    whole: bool


def ticket_of(ticket: Hashable) -> Ticket:
    """The cluster level's tickets are tickets."""
    assert isinstance(ticket, Ticket)
    return ticket


def check_room(holder: str, what: str, count: int, limit: int) -> None:
    """Raises LimitError when there is no room for one more."""
    if count >= limit:
        raise LimitError(f"{holder} holds {count} {what}: expected at most {limit}")
