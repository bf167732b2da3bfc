"""A server core to talk with, whose side of the conversation reads as lines of text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kvstore.errors import OptimizerError
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
from kvstore.protocol.messages import Message, Spec
from kvstore.protocol.pieces import PieceId, Span
from kvstore.protocol.serving import Serving


@dataclass(frozen=True)
class Rule:
    """An optimizer that is only its numbers."""

    name: str
    lr: float = 0.1

    @property
    def whole_tensor(self) -> bool:
        return self.name == "lars"

    def with_hyperparameters(self, **changes: Any) -> Rule:
        return Rule(self.name, **{"lr": self.lr, **changes})

    def to_wire(self) -> dict[str, Any]:
        return {"name": self.name, "lr": self.lr}

    @classmethod
    def parse(cls, described: dict[str, Any]) -> Rule:
        if "name" not in described:
            raise OptimizerError("expected a name")
        return cls(**described)


def spec(model: str = "sequential", participants: tuple[int, ...] | None = None, shape: tuple[int, ...] = (4,)) -> Spec:
    return Spec(shape, "float32", 4, "sequential", model, participants)


@dataclass
class Conversation:
    """``say`` returns what the server does, one line per action."""

    workers: int = 2
    now: float = 0.0
    serving: Serving = field(init=False)

    def __post_init__(self) -> None:
        self.serving = Serving(self.workers, Rule.parse, "server 0")

    def say(self, rank: int, message: Message, payload: object = None, incarnation: int = 1) -> list[str]:
        return self.read(self.serving.handle(rank, incarnation, message, payload, self.now))

    def read(self, actions: list[Action]) -> list[str]:
        return [self._line(action) for action in actions]

    def _line(self, action: Action) -> str:
        match action:
            case Create(piece, _, payload):
                return f"create {piece} = {payload}"
            case Apply(piece, round, payloads, rule, generation):
                how = "" if rule is None else f" by {rule.name} lr={rule.lr:g} #{generation}"  # type: ignore[attr-defined]
                which = "" if piece == self.only else f" of {self._name(piece)}"
                return f"apply round {round}{which}: {' + '.join(map(_payload, payloads))}{how}"
            case Reply(rank, message):
                return f"{rank} < {message}"
            case ReplyAfter(rank, message, _):
                return f"{rank} < {message} when applied"
            case ReplyValue(rank, request_id, piece, version, staleness, _, span):
                which = "" if piece == self.only else f" of {self._name(piece, span)}"
                return f"{rank} < value({request_id}){which} version {version} staleness {staleness}"
            case SendState(rank, request_id, piece, span):
                which = "" if piece == self.only else f" of {self._name(piece, span)}"
                return f"{rank} < state({request_id}){which}"
            case StoreState(rank, message, payload, _):
                return f"store state {payload}, then {rank} < Done({message.request_id})"
            case Forget(piece):
                return f"forget {self._name(piece)}"
            case Unite(bundle):
                return f"unite {' '.join(map(str, bundle.keys))}"
            case Split(bundle):
                return f"split {' '.join(map(str, bundle.keys))}"
        raise AssertionError(action)

    @property
    def only(self) -> PieceId | None:
        """The piece that need not be named, if there is but one."""
        return next(iter(self.serving.pieces)) if len(self.serving.pieces) == 1 else None

    def _name(self, piece: PieceId, span: Span | None = None) -> str:
        key = piece[0]
        bundle = self.serving.binding.bundles.get(key) if isinstance(key, bytes) else None
        name = "+".join(map(str, bundle.keys)) if bundle is not None else "a bundle" if isinstance(key, bytes) else key
        return f"{name}" if span is None else f"{name}[{span[0]}:{span[1]}]"


def _payload(payload: object) -> str:
    return (
        f"{_payload(payload.payload)}[{payload.span[0]}:{payload.span[1]}]"
        if isinstance(payload, Part)
        else str(payload)
    )
