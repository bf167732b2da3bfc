"""Optimizers whose rate depends on the norm of the whole tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvstore.optim.base import Array, Optimizer, State, norm
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

    def _step(self, w: Array, g: Array, state: State, lr: float, step: int) -> None:
        weights, slopes = norm(w), norm(g)
        trust = 1.0
        if weights > 0 and slopes > 0:
            trust = self.trust_coefficient * weights / (slopes + self.weight_decay * weights + self.eps)
        if self.weight_decay:
            g += self.weight_decay * w
        m = state["momentum"]
        m *= self.momentum
        m += lr * trust * g
        w -= m


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

    def _step(self, w: Array, g: Array, state: State, lr: float, step: int) -> None:
        first, second = self.betas
        mean, square = state["mean"], state["square"]
        mean *= first
        mean += (1 - first) * g
        square *= second
        square += (1 - second) * g * g
        u = (mean / (1 - first**step)) / (np.sqrt(square) / math.sqrt(1 - second**step) + self.eps)
        u += self.weight_decay * w
        weights, length = norm(w), norm(u)
        w -= lr * (weights / length if weights > 0 and length > 0 else 1.0) * u
