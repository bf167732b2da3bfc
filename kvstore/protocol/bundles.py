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
from kvstore.protocol.pieces import BundleId, PieceId, Span

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
    """One request for a split bundle: what its members have answered so far."""

    bundle: Bundle
    pull: bool
    values: set[PieceId] = field(default_factory=set)
    commits: set[PieceId] = field(default_factory=set)
    version: int | None = None  # the smallest
    staleness: int = 0  # the largest
    committed: bool = False  # and told so
    failed: bool = False  # and told so

    def value(self, piece: PieceId, version: int, staleness: int) -> bool:
        """A member has its value. Have all?"""
        self.values.add(piece)
        self.version = version if self.version is None else min(self.version, version)
        self.staleness = max(self.staleness, staleness)
        return self._all(self.values)

    def commit(self, piece: PieceId) -> bool:
        """A member's push is committed. Is it time to say so: are all, now?"""
        self.commits.add(piece)
        if self.committed or not self._all(self.commits | self.values):
            return False
        self.committed = True
        return True

    def _all(self, pieces: set[PieceId]) -> bool:
        return len(pieces) == len(self.bundle.members) and not self.failed


Request = tuple[int, int]  # the worker's rank and its request id


class Gatherings:
    """The open requests for split bundles."""

    def __init__(self) -> None:
        self._open: dict[Request, Gathering] = {}

    def __bool__(self) -> bool:
        return bool(self._open)

    def __repr__(self) -> str:
        return f"<Gatherings: {len(self._open)} open>"

    def begin(self, request: Request, bundle: Bundle, *, pull: bool) -> None:
        """From here on what the members answer to this request is gathered."""
        self._open[request] = Gathering(bundle, pull)

    def end(self, request: Request) -> None:
        """It has its last answer."""
        self._open.pop(request, None)

    def get(self, request: Request) -> Gathering | None:
        return self._open.get(request)

    def gone(self, rank: int) -> None:
        """The worker waits for nothing any more."""
        for request in [request for request in self._open if request[0] == rank]:
            del self._open[request]
