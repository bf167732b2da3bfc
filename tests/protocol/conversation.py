"""A server core to talk with, whose side of the conversation reads as lines of text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kvstore.errors import OptimizerError
from kvstore.protocol.messages import Message, Spec
from kvstore.protocol.serving import (
    Action,
    Apply,
    Create,
    Forget,
    Reply,
    ReplyAfter,
    ReplyValue,
    SendState,
    Serving,
    StoreState,
)


@dataclass(frozen=True)
class Rule:
    """An optimizer that is only its numbers."""

    name: str
    lr: float = 0.1

    def with_hyperparameters(self, **changes: Any) -> Rule:
        return Rule(self.name, **{"lr": self.lr, **changes})

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
            case Apply(_, round, payloads, rule, generation):
                how = "" if rule is None else f" by {rule.name} lr={rule.lr:g} #{generation}"  # type: ignore[attr-defined]
                return f"apply round {round}: {' + '.join(map(str, payloads))}{how}"
            case Reply(rank, message):
                return f"{rank} < {message}"
            case ReplyAfter(rank, message, _):
                return f"{rank} < {message} when applied"
            case ReplyValue(rank, request_id, _, version, staleness):
                return f"{rank} < value({request_id}) version {version} staleness {staleness}"
            case SendState(rank, request_id, _):
                return f"{rank} < state({request_id})"
            case StoreState(rank, message, payload):
                return f"store state {payload}, then {rank} < Done({message.request_id})"
            case Forget(piece):
                return f"forget {piece}"
        raise AssertionError(action)
