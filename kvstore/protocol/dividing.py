"""A request for a bundle that is not one piece any more, as so many requests for its keys. Pure.

A worker divides its open requests for a bundle when the server says that it is split, and when one of the keys is to
be pushed by itself while others would hold it up. From then on each key goes at its own pace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kvstore.errors import KVStoreError
from kvstore.protocol.messages import Committed, Fetch, Message, Place, Push, Value
from kvstore.protocol.pieces import Key, Span
from kvstore.protocol.requesting import CREDIT_FREE_BYTES, Answered, Outcome, Refused, Request


@dataclass(slots=True)
class Division:
    """The parts of a request for a bundle, and what has become of them.

    Args:
        request: a Push or Fetch. (One for a single key, that kept its place among those for its bundle, has one part.)
        members: the keys, and where each lies in the payload.
        next_id: a fresh request id.
    """

    request: Request
    members: Sequence[tuple[Key, Span]]
    next_id: Callable[[], int]
    parts: list[Request] = field(init=False)
    _replies: dict[int, Answered] = field(default_factory=dict)
    _left: int = field(init=False)
    _error: KVStoreError | None = None

    def __post_init__(self) -> None:
        self.parts = [self._part(key, span) for key, span in self.members]
        self._left = len(self.parts)

    def _part(self, key: Key, span: Span) -> Request:
        whole: Any = self.request
        payload = None if whole.payload is None else whole.payload[slice(*span)]
        nbytes = 0 if whole.frames is None else span[1] - span[0]
        message = self._message(key, span, nbytes)
        part = Request(
            whole.server, message, payload, nbytes, whole.priority, (key, 0),
            is_push=whole.is_push, is_pull=whole.is_pull,
        )  # fmt: skip
        part.accepted = whole.accepted
        return part

    def _message(self, key: Key, span: Span, nbytes: int) -> Message:
        message = self.request.message
        if isinstance(message, Fetch):
            return replace(message, request_id=self.next_id(), key=key, near=False, held=())
        assert isinstance(message, Push)
        place = message.place
        return replace(
            message,
            request_id=self.next_id(),
            key=key,
            acknowledge=nbytes > CREDIT_FREE_BYTES,
            near=False,
            held=(),
            place=None if place is None else Place(place.segment, place.offset + span[0]),
        )

    def conclude(self, outcome: Outcome) -> Outcome | None:
        """A part has its outcome; the whole request's, when all have."""
        self._left -= 1
        if isinstance(outcome, Answered):
            self._replies[outcome.request.request_id] = outcome
        else:
            self._error = self._error or outcome.error
        if self._left:
            return None
        request = self.request
        if self._error is not None:
            return Refused(request, self._error)
        if not request.is_pull:
            return Answered(request, Committed(request.request_id), None)
        answers = [self._replies[part.request_id] for part in self.parts]
        values = [answer.reply for answer in answers if isinstance(answer.reply, Value)]
        version, staleness = min(v.version for v in values), max(v.staleness for v in values)
        frames: list[Any] = [answer.payload for answer in answers]
        payload = [frame for some in frames for frame in some]
        return Answered(request, Value(request.request_id, version, staleness), payload)
