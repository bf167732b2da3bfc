"""Keys that travel together: many small values as one piece. Pure.

A training loop moves the same list of keys in every round. To count, merge and answer thousands of small keys one by
one costs far more than their bytes. So a worker *binds* such a list once, under an id that follows from the
keys (the key caching of Li et al., OSDI'14, section 5.1), and from then on names the id.

What a bundle is to the server depends on the keys' histories. As long as all of them have the same, the bundle is
*united*: one piece, the concatenation of the values, with one count of rounds. Once one of the keys is pushed by
itself the bundle is *split*: its keys are counted one by one, and a :class:`Gathering` makes one reply of theirs.
Nobody outside the server can tell the difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from kvstore.protocol.messages import Spec
from kvstore.protocol.pieces import BundleId, Key, PieceId, Span

BUNDLES_MAX = 4096  # per server


@dataclass(slots=True)
class Bundle:
    """The pieces that a worker's list names, and where each lies in their concatenation."""

    id: BundleId
    members: tuple[PieceId, ...]
    spans: tuple[Span, ...]
    spec: Spec  # of the concatenation
    united: bool = False

    @property
    def piece(self) -> PieceId:
        """The united piece."""
        return self.id, 0

    @property
    def keys(self) -> tuple[Key, ...]:
        """Of its members."""
        return tuple([key for key, _ in self.members if not isinstance(key, bytes)])

    def __iter__(self) -> Iterator[tuple[PieceId, Span]]:
        return zip(self.members, self.spans, strict=True)

    def __str__(self) -> str:
        return f"{len(self.members)} keys, {self.members[0][0]!r} ... {self.members[-1][0]!r}"


@dataclass(frozen=True, slots=True)
class Part:
    """Some elements of a payload."""

    payload: object
    span: Span

    @classmethod
    def of(cls, payload: object, span: Span) -> Part | None:
        """Nothing of nothing."""
        return None if payload is None else cls(payload, span)


@dataclass(slots=True)
class Gathering:
    """One request for a split bundle: what its members have answered so far.

    Args:
        round: of the sender, for whom the values are.
        pull: does it ask for them?
    """

    bundle: Bundle
    round: int
    pull: bool
    values: set[PieceId] = field(default_factory=set)  # members whose values may be had
    commits: set[PieceId] = field(default_factory=set)  # members whose pushes are committed
    told: bool = False  # that all are committed
    failed: bool = False

    @property
    def complete(self) -> bool:
        """May the values of all members be had?"""
        return len(self.values) == len(self.bundle.members)

    @property
    def committed(self) -> bool:
        """Are the pushes of all members committed? Who may read the value after one knows that it is."""
        return len(self.commits | self.values) == len(self.bundle.members)


Request = tuple[int, int]  # the worker's rank and its request id


class Gatherings:
    """The open requests for split bundles."""

    def __init__(self) -> None:
        self._open: dict[Request, Gathering] = {}
        self._changed: dict[Request, None] = {}

    def __bool__(self) -> bool:
        """Has one of them a new answer?"""
        return bool(self._changed)

    def __repr__(self) -> str:
        return f"<Gatherings: {len(self._open)} open>"

    def begin(self, request: Request, bundle: Bundle, round: int, *, pull: bool) -> None:
        """From here on what the members answer to this request is gathered."""
        self._open[request] = Gathering(bundle, round, pull)

    def change(self, request: Request) -> Gathering | None:
        """The gathering for a request that has an answer; None if it is no request for a split bundle."""
        gathering = self._open.get(request)
        if gathering is not None:
            self._changed[request] = None
        return gathering

    def changed(self) -> Iterator[tuple[Request, Gathering]]:
        """Those with new answers, each once."""
        changed, self._changed = self._changed, {}
        return ((request, self._open[request]) for request in changed if request in self._open)

    def end(self, request: Request) -> None:
        """It has its last answer."""
        self._open.pop(request, None)

    def of(self, bundle: Bundle) -> list[Request]:
        """The requests for this bundle."""
        return [request for request, gathering in self._open.items() if gathering.bundle is bundle]

    def gone(self, rank: int) -> None:
        """The worker waits for nothing any more."""
        for request in [request for request in self._open if request[0] == rank]:
            del self._open[request]
