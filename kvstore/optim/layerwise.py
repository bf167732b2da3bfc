"""Optimizers whose rate depends on the norm of the whole tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from kvstore import kernels
from kvstore.kernels import Change
from kvstore.optim.base import Optimizer, State
from kvstore.optim.schedules import Schedule


@dataclass(frozen=True, kw_only=True)
class LARS(Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017, algorithm 1)."""

    name: ClassVar[str] = "lars"
    lr: float | Schedule = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0
    trust_coefficient: float = 1e-3
    eps: float = 1e-8

    @property
    def whole_tensor(self) -> bool:
        return True

    def _state_names(self) -> tuple[str, ...]:
        return ("momentum",)

    def _step(self, change: Change, state: State, lr: float, step: int) -> None:
        kernels.lars(
            change, (state["momentum"],), lr, self.trust_coefficient, self.eps, self.weight_decay, self.momentum
        )


@dataclass(frozen=True, kw_only=True)
class LAMB(Optimizer):
    """Layer-wise adaptive moments (You et al. 2020, algorithm 2, with bias correction and the identity as phi)."""

    name: ClassVar[str] = "lamb"
    lr: float | Schedule = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.01

    @property
    def whole_tensor(self) -> bool:
        return True

    def _state_names(self) -> tuple[str, ...]:
        return ("mean", "square")

    def _step(self, change: Change, state: State, lr: float, step: int) -> None:
        first, second = self.betas
        unbias, root = 1 - first**step, math.sqrt(1 - second**step)
        states = (state["mean"], state["square"])
        kernels.lamb(change, states, lr, unbias, root, first, second, self.eps, self.weight_decay)
