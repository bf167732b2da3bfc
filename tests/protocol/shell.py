"""What a server's process adds to the core, with symbols in the place of numbers.

A payload is a tuple with one symbol per element; an element's value is the tuple of its updates, each the tuple of
what was merged into it, in order. So whatever is lost, done twice, out of turn or by the wrong rule stays visible for
ever. A first value is given as such a value. Its actions follow :mod:`kvstore.cluster.shard`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvstore.protocol.actions import (
    Action,
    Apply,
    Create,
    Forget,
    Reply,
    ReplyAfter,
    ReplyValue,
    SendState,
    Split,
    StoreState,
    Unite,
)
from kvstore.protocol.bundles import Part
from kvstore.protocol.messages import Done, Message, State, Value
from kvstore.protocol.pieces import PieceId, Span

Elements = tuple[Any, ...]


@dataclass(slots=True)
class Stored:
    """A piece: for each element its updates, and what the optimizer keeps of them."""

    value: Elements
    generation: int = 0
    step: int = 0
    state: Elements | None = None  # for each element what has gone into its state

    def update(self, payloads: Sequence[Elements], rule: Any, generation: int) -> None:
        """One update: an element's is what was merged, and by which rule as its how-manieth."""
        if rule is not None:
            if generation != self.generation:
                self.generation, self.step, self.state = generation, 0, ((),) * len(self.value)
            self.step += 1
            assert self.state is not None
            how = (rule.name, rule.lr, generation, self.step)
            self.state = tuple((*kept, *how) for kept in self.state)
        merged = list(zip(*payloads, strict=True))
        if rule is not None and rule.whole_tensor:
            merged = [(*new, tuple(merged)) for new in merged]  # which stands for a norm
        if rule is not None and self.state is not None:
            merged = [(*new, kept) for new, kept in zip(merged, self.state, strict=True)]
        self.value = tuple((*old, new) for old, new in zip(self.value, merged, strict=True))

    def part(self, span: Span | None) -> Stored:
        some = slice(None) if span is None else slice(*span)
        return Stored(self.value[some], self.generation, self.step, None if self.state is None else self.state[some])


@dataclass(slots=True)
class Shell:
    """The pieces of one server. :meth:`perform` does what an action says and returns what is sent for it."""

    stored: dict[PieceId, Stored] = field(default_factory=dict)

    def perform(self, action: Action) -> tuple[int, Message, Any] | None:
        """The rank, the message and its value frame, if the action is a reply."""
        match action:
            case Create(piece, _, payload):
                assert piece not in self.stored
                self.stored[piece] = Stored(_elements(payload))
            case Apply(piece, _, payloads, rule, generation):
                self.stored[piece].update([_elements(payload) for payload in payloads], rule, generation)
            case Unite(bundle):
                parts = [self.stored.pop(piece) for piece in bundle.members]
                first = parts[0]
                for part in parts:  # or their histories were not the same
                    assert (part.generation, part.step) == (first.generation, first.step)
                    assert (part.state is None) == (first.state is None)
                value = tuple(element for part in parts for element in part.value)
                state = None if first.state is None else tuple(e for part in parts for e in part.state or ())
                self.stored[bundle.piece] = Stored(value, first.generation, first.step, state)
            case Split(bundle):
                whole = self.stored.pop(bundle.piece)
                for piece, span in bundle:
                    self.stored[piece] = whole.part(span)
            case Forget(piece):
                self.stored.pop(piece, None)
            case StoreState(rank, message, payload, generation):
                stored = self.stored[message.key, message.piece]
                stored.generation, stored.step = generation, message.step
                stored.state = tuple((one,) for one in _elements(payload))
                return rank, Done(message.request_id), None
            case SendState(rank, request_id, piece, span):
                stored = self.stored[piece].part(span)
                return rank, State(request_id, stored.step, (), ()), stored.state
            case Reply(rank, message):
                return rank, message, None
            case ReplyAfter(rank, message, piece):
                assert piece in self.stored
                return rank, message, None
            case ReplyValue(rank, request_id, piece, version, staleness, _, span):
                return rank, Value(request_id, version, staleness), self.stored[piece].part(span).value
        return None


def _elements(payload: Any) -> Elements:
    if isinstance(payload, Part):
        return _elements(payload.payload)[slice(*payload.span)]
    assert isinstance(payload, tuple)
    return payload
