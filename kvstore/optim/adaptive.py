"""Optimizers with a rate per element."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvstore.optim.base import Array, Optimizer, State
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

    def _decay(self, w: Array, g: Array, lr: float) -> None:
        if self.weight_decay:
            g += self.weight_decay * w

    def _step(self, w: Array, g: Array, state: State, lr: float, step: int) -> None:
        self._decay(w, g, lr)
        first, second = self.betas
        mean, square = state["mean"], state["square"]
        mean *= first
        mean += (1 - first) * g
        square *= second
        g *= g
        g *= 1 - second
        square += g
        if self.amsgrad:
            square = np.maximum(state["square_max"], square, out=state["square_max"])
        np.sqrt(square, out=g)
        g /= math.sqrt(1 - second**step)
        g += self.eps
        np.divide(mean, g, out=g)
        g *= lr / (1 - first**step)
        w -= g


@dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2)."""

    name: ClassVar[str] = "adamw"
    weight_decay: float = 1e-2

    def _decay(self, w: Array, g: Array, lr: float) -> None:
        w *= 1 - lr * self.weight_decay


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

    def _step(self, w: Array, g: Array, state: State, lr: float, step: int) -> None:
        if self.weight_decay:
            g += self.weight_decay * w
        state["sum"] += g * g
        w -= lr / (1 + (step - 1) * self.lr_decay) * g / (np.sqrt(state["sum"]) + self.eps)


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

    def _step(self, w: Array, g: Array, state: State, lr: float, step: int) -> None:
        if self.weight_decay:
            g += self.weight_decay * w
        square = state["square"]
        square *= self.alpha
        square += (1 - self.alpha) * g * g
        if self.centered:
            mean = state["mean"]
            mean += (1 - self.alpha) * (g - mean)
            square = square - mean * mean
        g /= np.sqrt(square) + self.eps
        if self.momentum:
            state["momentum"] *= self.momentum
            state["momentum"] += g
            g = state["momentum"]
        w -= lr * g


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

    def _step(self, w: Array, g: Array, state: State, lr: float, step: int) -> None:
        if self.weight_decay:
            g += self.weight_decay * w
        square, delta = state["square"], state["delta"]
        square *= self.rho
        square += (1 - self.rho) * g * g
        g *= np.sqrt(delta + self.eps) / np.sqrt(square + self.eps)
        delta *= self.rho
        delta += (1 - self.rho) * g * g
        w -= lr * g


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

    def _step(self, w: Array, g: Array, state: State, lr: float, step: int) -> None:
        z, n = state["z"], state["n"]
        before = np.sqrt(n)
        n += g * g
        after = np.sqrt(n)
        z += g - (after - before) / lr * w
        shrunk = np.sign(z) * np.maximum(np.abs(z) - self.l1, 0)
        w[...] = -shrunk / ((self.beta + after) / lr + self.l2)
