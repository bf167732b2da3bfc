"""Plain steps: SGD, and sums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from kvstore import kernels
from kvstore.arrays import Array
from kvstore.errors import OptimizerError
from kvstore.kernels import Change
from kvstore.optim.base import Optimizer, State
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

    def _step(self, change: Change, state: State, lr: float, step: int) -> None:
        gain, begin = 1 - self.dampening, float(step == 1)
        kernels.sgd(
            change, (state.get("momentum"),), lr, self.weight_decay, self.momentum, gain, float(self.nesterov), begin
        )


@dataclass(frozen=True, kw_only=True)
class Accumulate(Optimizer):
    """``value += merged``, in the value's own dtype; takes every dtype, to clip only floating point."""

    name: ClassVar[str] = "accumulate"
    lr: float | Schedule = 1.0

    def check_dtype(self, dtype: np.dtype[Any]) -> None:
        if self.clip_gradient is not None or self.clip_norm is not None:
            super().check_dtype(dtype)

    def create_state(self, value: Array) -> State:
        return {}

    def _step(self, change: Change, state: State, lr: float, step: int) -> None:
        kernels.accumulate(change, ())
