"""Keys that travel together: many small values as one piece. Pure.

A training loop moves the same list of keys in every round. To count, merge and answer thousands of small keys one by
one costs far more than their bytes. So a worker *binds* such a list once, under an id that follows from the
keys (the key caching of Li et al., OSDI'14, section 5.1), and from then on names the id.

What a bundle is to the server depends on the keys' histories. As long as all of them have the same, the bundle is
*united*: one piece, the concatenation of the values, with one count of rounds. Once one of the keys is pushed by
itself the bundle is *split*, and its keys are counted one by one. Then the server says Divided to every request for the
bundle, and its worker asks for key by key (see :mod:`kvstore.protocol.dividing`), so that no key waits for another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from kvstore.protocol.messages import Spec
from kvstore.protocol.pieces import BundleId, Key, PieceId, Span

BUNDLES_MAX = 4096  # per server
BUNDLED_MAX = 1 << 22  # keys in all of them together

_T = TypeVar("_T")


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


def alike(
    items: Iterable[_T], kind: Callable[[_T], object], nbytes: Callable[[_T], int], bytes_max: int
) -> list[list[_T]]:
    """Those of one kind together, in their order, in lists of two or more that have no more bytes than that."""
    groups: dict[object, list[list[_T]]] = {}
    sizes: dict[object, int] = {}  # bytes in the last list of a group
    for item in items:
        this, more = kind(item), nbytes(item)
        lists = groups.setdefault(this, [[]])
        sizes[this] = sizes.get(this, 0) + more
        if sizes[this] > bytes_max:
            lists.append([])
            sizes[this] = more
        lists[-1].append(item)
    return [members for lists in groups.values() for members in lists if len(members) > 1]
