"""What a server knows of its workers: their lives, who takes part in new keys, who is missed, who is joining. Pure.

What this file decides: whether a message comes from a life that is over, and what a joining worker makes wait. What
that means for the rounds of a key is decided by :mod:`kvstore.consistency`, and done by
:mod:`kvstore.protocol.serving`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvstore.errors import FencedError
from kvstore.protocol.messages import Init, Message, Push, RestoreWorkers
from kvstore.protocol.pieces import BundleId, Key

WAITING_MAX = 1 << 17  # pushes and inits of one worker that wait while somebody joins
WAITING_ITEMS_MAX = 1 << 26  # elements in these pushes


@dataclass(frozen=True, slots=True)
class Waiting:
    """A push or an init that is handled when nobody is joining any more."""

    rank: int
    incarnation: int
    message: Push | Init
    payload: object
    items: int  # elements of it that lie in this server's memory

    @property
    def name(self) -> tuple[int, type[Message], Key | BundleId, int]:
        """What of it is kept only once."""
        return self.rank, type(self.message), self.message.key, self.message.piece


class Workers:
    """The workers of a cluster, as one server sees them.

    Args:
        founders: ranks 0 .. founders-1 take part from the beginning.
    """

    def __init__(self, founders: int) -> None:
        self.members = set(range(founders))  # who takes part in keys that are created now and do not choose
        self.known = set(range(founders))  # who has ever taken part
        self.incarnations: dict[int, int] = {}  # the life of each that may speak
        self.heard: dict[int, float] = {}
        self.missed: dict[int, str] = {}  # lost workers whose pushes others wait for -> why they are lost
        self.hopeless: set[int] = set()  # those of them that will not come back
        self.joining: set[int] = set()
        self._admitted: dict[int, int] = {}  # by rank the life that has joined
        self._waiting: dict[tuple[int, type[Message], Key | BundleId, int], Waiting] = {}  # in the order of coming
        self._held: dict[int, tuple[int, int]] = {}  # by rank: how many of these, and their elements

    def __repr__(self) -> str:
        return f"<Workers {sorted(self.members)}: missed {self.missed}, joining {sorted(self.joining)}>"

    @property
    def first(self) -> int | None:
        """Whose value creates a key."""
        return min(self.members, default=None)

    def hear(self, rank: int, incarnation: int, now: float) -> bool:
        """A message has come. Is it the first of a new life of this rank?

        Raises:
            FencedError: that life is over.
        """
        known = self.incarnations.get(rank, incarnation)
        if incarnation < known:
            raise FencedError(f"rank {rank}: this worker was taken for lost, or a newer one took over its rank")
        self.incarnations[rank] = incarnation
        self.heard[rank] = now
        if rank in self.missed and (incarnation > known or rank not in self.hopeless):
            self.found(rank)
        return incarnation > known

    def is_over(self, rank: int, incarnation: int) -> bool:
        """Has a later life of this rank been heard of?"""
        return incarnation < self.incarnations.get(rank, incarnation)

    def fence(self, rank: int, incarnation: int) -> None:
        """Nothing of this life is taken any more."""
        self.incarnations[rank] = max(self.incarnations.get(rank, 0), incarnation + 1)

    def miss(self, rank: int, reason: str, *, hopeless: bool) -> None:
        """The worker is lost, and others wait for its pushes."""
        self.missed[rank] = reason
        if hopeless:
            self.hopeless.add(rank)

    def found(self, rank: int) -> None:
        """It is back."""
        self.missed.pop(rank, None)
        self.hopeless.discard(rank)

    def leaves(self, rank: int) -> None:
        """It takes part in no key that is created from now on."""
        self.members.discard(rank)

    # --- on another server --------------------------------------------------------------------

    def described(self) -> RestoreWorkers:
        """All that another server has to know."""
        return RestoreWorkers(
            0,
            tuple(sorted(self.members)),
            tuple(sorted(self.known)),
            tuple(self.incarnations.items()),
            tuple(self._admitted.items()),
            tuple(self.missed.items()),
            tuple(sorted(self.hopeless)),
            tuple(sorted(self.joining)),
        )

    def restore(self, other: RestoreWorkers) -> None:
        """As another server has :meth:`described`."""
        self.members, self.known, self.hopeless = set(other.members), set(other.known), set(other.hopeless)
        self.incarnations, self._admitted = dict(other.incarnations), dict(other.admitted)
        self.missed, self.joining = dict(other.missed), set(other.joining)

    # --- joining ------------------------------------------------------------------------------

    def begin_to_join(self, rank: int) -> None:
        """From now on no round begins."""
        self.joining.add(rank)

    def is_admitted(self, rank: int, incarnation: int) -> bool:
        return self._admitted.get(rank) == incarnation

    def admit(self, rank: int, incarnation: int) -> None:
        """It takes part."""
        self._admitted[rank] = incarnation
        self.members.add(rank)
        self.known.add(rank)
        self.joining.discard(rank)

    def give_up(self, rank: int) -> None:
        """It will not join, if it was about to."""
        self.joining.discard(rank)

    def hold(self, waiting: Waiting) -> None:
        """Handle this later, unless it is known, or its worker has too much that waits: it will send it again."""
        known = self._waiting.get(waiting.name)
        if known is not None and known.incarnation == waiting.incarnation:
            return  # the same again: a worker's next push comes when this one has taken effect
        count, items = self._held.get(waiting.rank, (0, 0))
        if known is not None:  # of a life that is over
            count, items = count - 1, items - known.items
        if count >= WAITING_MAX or items + waiting.items > WAITING_ITEMS_MAX:
            return
        self._held[waiting.rank] = count + 1, items + waiting.items
        self._waiting.pop(waiting.name, None)
        self._waiting[waiting.name] = waiting

    def resumed(self) -> list[Waiting]:
        """What can be handled now, in the order in which it came: all if nobody is joining, else nothing."""
        if self.joining:
            return []
        waiting = list(self._waiting.values())
        self._waiting.clear()
        self._held.clear()
        return waiting

    # --- in words -----------------------------------------------------------------------------

    def missing(self, ranks: Iterable[int], now: float) -> str:
        """Who they are, and when each was last heard."""

        def described(rank: int) -> str:
            heard = f"last heard {now - self.heard[rank]:.1f} s ago" if rank in self.heard else "never heard of"
            return f"{rank} ({heard}{', lost: ' + self.missed[rank] if rank in self.missed else ''})"

        return f"waits for workers {', '.join(map(described, ranks)) or 'nobody'}"
