"""What a server's core concludes: its actions. Pure.

What they mean is said here, when they follow is decided in :mod:`kvstore.protocol.serving`. The caller performs them in
their order, those on one piece one after another.
"""

from __future__ import annotations

from typing import Protocol

from kvstore.errors import KVStoreError, to_wire
from kvstore.protocol.bundles import Bundle
from kvstore.protocol.messages import Failed, Message, PieceRecord, Restore, Spec, WriteState
from kvstore.protocol.pieces import PieceId, Span
from kvstore.protocol.settings import Rule
from kvstore.records import record


class Restored(Protocol):
    """A piece in a checkpoint, but for its arrays."""

    @property
    def version(self) -> int: ...
    @property
    def step(self) -> int: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def dtypes(self) -> tuple[str, ...]: ...


@record
class Create:
    """Store this payload as the first value of the piece; or what a checkpoint has of it."""

    piece: PieceId
    spec: Spec
    payload: object
    restored: Restored | None = None


@record
class Apply:
    """Merge these payloads in this order and apply them to the piece as one update; without any, change nothing."""

    piece: PieceId
    round: int
    payloads: tuple[object, ...]
    rule: Rule | None  # None: assign
    generation: int  # another generation than before: the optimizer's state begins anew
    contributions: tuple[tuple[int, int], ...] = ()  # the pushes (rank, round) that the payloads are of
    samples: int | None = None  # in them, if the key's rounds are of so many
    factor: float = 1.0  # what their sum is multiplied by for that


@record
class Reply:
    """Send this message now."""

    rank: int
    message: Message


@record
class ReplyAfter:
    """Send this message when all earlier actions on the piece are done; or their failure."""

    rank: int
    message: Message
    piece: PieceId


@record
class ReplyValue:
    """Send the piece's value (or these elements of it) as the earlier actions leave it; or their failure."""

    rank: int
    request_id: int
    piece: PieceId
    version: int
    staleness: int
    near: bool = False  # it may stay where it is: send its place
    span: Span | None = None
    whole: bool = False  # it may wait for other pieces of the key that are asked for in the same way


@record
class SendState:
    """Send the optimizer's state of the piece (or of these elements of it)."""

    rank: int
    request_id: int
    piece: PieceId
    span: Span | None = None


@record
class StoreState:
    """Replace the optimizer's state of the piece (for Restore: the value too), then say Done."""

    rank: int
    message: WriteState | Restore
    payload: object
    generation: int  # of the optimizer whose state it is


@record
class Forget:
    """Free the piece."""

    piece: PieceId


@record
class Unite:
    """From here on the bundle is one piece, with the values and optimizer states of its members, which are no more."""

    bundle: Bundle


@record
class Split:
    """From here on the bundle's members are pieces, each with its part of the value and of the optimizer's state."""

    bundle: Bundle


@record
class TakeCut:
    """Copy these pieces as the earlier actions leave them: each with what is to be recorded of it, or of its parts."""

    cut: int
    rule: Rule | None  # the latest optimizer
    places: tuple[tuple[PieceId, tuple[tuple[PieceRecord, Span | None], ...]], ...]


@record
class LoseCut:
    """The cut will not be taken: tell who asks for it."""

    cut: int
    error: KVStoreError


Action = (
    Create
    | Apply
    | Reply
    | ReplyAfter
    | ReplyValue
    | SendState
    | StoreState
    | Forget
    | Unite
    | Split
    | TakeCut
    | LoseCut
)


def failure(rank: int, message: Message, error: KVStoreError) -> Reply:
    """The request failed."""
    return Reply(rank, Failed(message.request_id, *to_wire(error)))
