"""Plain steps: SGD, and sums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from kvstore.errors import OptimizerError
from kvstore.optim.base import Array, Optimizer, State
from kvstore.optim.schedules import Schedule


@dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """Stochastic gradient descent as in PyTorch; momentum by Polyak, or Nesterov (Sutskever et al. 2013)."""

    name: ClassVar[str] = "sgd"
    lr: float | Schedule = 1e-3
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and (self.momentum <= 0 or self.dampening != 0):
            raise OptimizerError("optimizer sgd: nesterov: expected momentum > 0 and dampening 0")

    def _state_names(self) -> tuple[str, ...]:
        return ("momentum",) if self.momentum else ()

    def _step(self, w: Array, g: Array, state: State, lr: float, step: int) -> None:
        if self.weight_decay:
            g += self.weight_decay * w
        if self.momentum:
            m = state["momentum"]
            if step == 1:
                m[...] = g
            else:
                m *= self.momentum
                m += g if self.dampening == 0 else (1 - self.dampening) * g
            g = g + self.momentum * m if self.nesterov else m
        w -= lr * g


@dataclass(frozen=True, kw_only=True)
class Accumulate(Optimizer):
    """``value += merged``, in the value's own dtype; takes every dtype."""

    name: ClassVar[str] = "accumulate"
    lr: float | Schedule = 1.0

    def check_dtype(self, dtype: np.dtype[Any]) -> None:
        return

    def create_state(self, value: Array) -> State:
        return {}

    def update(self, value: Array, gradient: Array, state: State, step: int) -> None:
        with np.errstate(all="ignore"):
            value += gradient

    def _step(self, w: Array, g: Array, state: State, lr: float, step: int) -> None:
        w += g
