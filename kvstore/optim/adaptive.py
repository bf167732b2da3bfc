"""Optimizers with a rate per element."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvstore import kernels
from kvstore.arrays import Array
from kvstore.kernels import Change
from kvstore.optim.base import Optimizer, State
from kvstore.optim.schedules import Schedule


@dataclass(frozen=True, kw_only=True)
class Adam(Optimizer):
    """Adam (Kingma and Ba 2015, algorithm 1); AMSGrad (Reddi et al. 2018). Decay is added to the gradient."""

    name: ClassVar[str] = "adam"
    lr: float | Schedule = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False

    def _state_names(self) -> tuple[str, ...]:
        return ("mean", "square", "square_max") if self.amsgrad else ("mean", "square")

    def _decays(self, lr: float) -> tuple[float, float]:
        """What of the weights is added to the gradient, and what the weights are multiplied by."""
        return self.weight_decay, 1.0

    def _step(self, change: Change, state: State, lr: float, step: int) -> None:
        first, second = self.betas
        rate, root = lr / (1 - first**step), math.sqrt(1 - second**step)
        states = (state["mean"], state["square"], state.get("square_max"))
        kernels.adam(change, states, rate, root, first, second, self.eps, *self._decays(lr))


@dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2)."""

    name: ClassVar[str] = "adamw"
    weight_decay: float = 1e-2

    def _decays(self, lr: float) -> tuple[float, float]:
        return 0.0, 1 - lr * self.weight_decay


@dataclass(frozen=True, kw_only=True)
class Adagrad(Optimizer):
    """Adagrad (Duchi et al. 2011)."""

    name: ClassVar[str] = "adagrad"
    lr: float | Schedule = 1e-2
    lr_decay: float = 0.0
    weight_decay: float = 0.0
    initial_accumulator_value: float = 0.0
    eps: float = 1e-10

    def _state_names(self) -> tuple[str, ...]:
        return ("sum",)

    def _first_state(self, weights: Array, state: State) -> None:
        state["sum"] += self.initial_accumulator_value

    def _step(self, change: Change, state: State, lr: float, step: int) -> None:
        rate = lr / (1 + (step - 1) * self.lr_decay)
        kernels.adagrad(change, (state["sum"],), rate, self.eps, self.weight_decay)


@dataclass(frozen=True, kw_only=True)
class RMSProp(Optimizer):
    """RMSProp (Tieleman and Hinton 2012, lecture 6.5), as in PyTorch."""

    name: ClassVar[str] = "rmsprop"
    lr: float | Schedule = 1e-2
    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    centered: bool = False

    def _state_names(self) -> tuple[str, ...]:
        return ("square", *(["momentum"] if self.momentum else []), *(["mean"] if self.centered else []))

    def _step(self, change: Change, state: State, lr: float, step: int) -> None:
        states = (state["square"], state.get("momentum"), state.get("mean"))
        kernels.rmsprop(change, states, lr, self.alpha, self.eps, self.weight_decay, self.momentum)


@dataclass(frozen=True, kw_only=True)
class Adadelta(Optimizer):
    """Adadelta (Zeiler 2012, algorithm 1)."""

    name: ClassVar[str] = "adadelta"
    lr: float | Schedule = 1.0
    rho: float = 0.9
    eps: float = 1e-6
    weight_decay: float = 0.0

    def _state_names(self) -> tuple[str, ...]:
        return ("square", "delta")

    def _step(self, change: Change, state: State, lr: float, step: int) -> None:
        kernels.adadelta(change, (state["square"], state["delta"]), lr, self.rho, self.eps, self.weight_decay)


@dataclass(frozen=True, kw_only=True)
class FTRL(Optimizer):
    """FTRL-Proximal (McMahan et al. 2013, algorithm 1): weights that ``l1`` keeps at zero stay exactly zero.

    ``z`` begins so that the initial weights are the solution they would be without any gradient.
    """

    name: ClassVar[str] = "ftrl"
    lr: float | Schedule = 0.1
    beta: float = 1.0
    l1: float = 0.01
    l2: float = 0.0

    def _state_names(self) -> tuple[str, ...]:
        return ("z", "n")

    def _first_state(self, weights: Array, state: State) -> None:
        lr = self.lr.at(1) if isinstance(self.lr, Schedule) else self.lr
        state["z"] -= weights * (self.beta / lr + self.l2) + np.sign(weights) * self.l1

    def _step(self, change: Change, state: State, lr: float, step: int) -> None:
        kernels.ftrl(change, (state["z"], state["n"]), lr, self.beta, self.l1, self.l2)
