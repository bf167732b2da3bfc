"""What all optimizers share: checks, clipping, float32 masters of half-precision values, blocks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from kvstore import plain
from kvstore.errors import DtypeError, OptimizerError
from kvstore.kernels.reference import BLOCK, HALVES
from kvstore.optim import schedules
from kvstore.optim.schedules import Schedule

Array = npt.NDArray[Any]
State = dict[str, Array]


@dataclass(frozen=True, kw_only=True)
class Optimizer(ABC):
    """How a merged gradient changes a stored value. Frozen; equal when all numbers are.

    Args:
        lr: the learning rate: a number, or a :class:`kvstore.optim.schedules.Schedule`.
        clip_gradient: gradients are clipped to ``[-clip_gradient, clip_gradient]``; None: not.
        clip_norm: gradients whose norm over the whole tensor is larger are scaled down to it; None: not.

    Raises:
        OptimizerError: a number that is out of range or no number.
    """

    name: ClassVar[str]
    lr: float | Schedule
    clip_gradient: float | None = None
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = plain.unboxed(getattr(self, field.name))
            object.__setattr__(self, field.name, value)
            self._check(field.name, value, field.default)

    def _check(self, name: str, value: Any, default: Any) -> None:
        def refuse(expected: str) -> None:
            raise OptimizerError(f"optimizer {self.name}: {name}: expected {expected}, got {value!r}")

        def is_number(one: Any) -> bool:
            return type(one) in (int, float) and math.isfinite(one)

        if name == "lr" and isinstance(value, Schedule):
            return
        if name == "betas":
            if not (isinstance(value, tuple) and len(value) == 2 and all(is_number(b) and 0 <= b < 1 for b in value)):
                refuse("two numbers in [0, 1)")
        elif isinstance(default, bool):
            if type(value) is not bool:
                refuse("True or False")
        elif name in ("clip_gradient", "clip_norm"):
            if value is not None and not (is_number(value) and value > 0):
                refuse("None or a number > 0")
        elif name in ("rho", "alpha"):
            if not (is_number(value) and 0 <= value <= 1):
                refuse("a number in [0, 1]")
        elif not (is_number(value) and (value >= 0 or name == "dampening")):
            refuse("a finite number >= 0")

    @property
    def whole_tensor(self) -> bool:
        """Must it see the whole tensor, because it uses a norm?"""
        return self.clip_norm is not None

    def check_dtype(self, dtype: np.dtype[Any]) -> None:
        """Raises DtypeError for values that it cannot update: all but real floating point."""
        if not (np.issubdtype(dtype, np.floating) or np.dtype(dtype) in HALVES):
            raise DtypeError(f"optimizer {self.name}: expected a floating-point dtype, got {np.dtype(dtype).name}")

    def create_state(self, value: Array) -> State:
        """Fresh state for ``value``; for half precision with ``master``, the weights in float32."""
        weights = value.astype(np.float32) if value.dtype in HALVES else value
        state = {name: np.zeros(weights.shape, weights.dtype) for name in self._state_names()}
        if weights is not value:
            state["master"] = weights
        self._first_state(weights, state)
        return state

    def update(self, value: Array, gradient: Array, state: State, step: int) -> None:
        """Change ``value`` and ``state`` in place.

        Args:
            value, gradient: of one shape and dtype; the gradient is not changed.
            state: what :meth:`create_state` made, after the earlier updates.
            step: the number of this update of the value, from 1.
        """
        weights = state.get("master", value)
        lr = self.lr.at(step) if isinstance(self.lr, Schedule) else self.lr
        flat, slopes = weights.reshape(-1), gradient.reshape(-1)
        states = {name: array.reshape(-1) for name, array in state.items() if name != "master"}
        scale = self._norm_scale(slopes)
        block = max(1, flat.size) if self.whole_tensor else BLOCK
        with np.errstate(all="ignore"):  # what diverges shows in the values
            for start in range(0, flat.size, block):
                part = slice(start, start + block)
                g = slopes[part].astype(flat.dtype)
                if scale != 1.0:
                    g *= flat.dtype.type(scale)
                if self.clip_gradient is not None:
                    np.clip(g, -self.clip_gradient, self.clip_gradient, out=g)
                self._step(flat[part], g, {name: array[part] for name, array in states.items()}, float(lr), step)
            if weights is not value:
                value[...] = weights.astype(value.dtype)

    def _norm_scale(self, gradient: Array) -> float:
        if self.clip_norm is None:
            return 1.0
        return min(1.0, self.clip_norm / (norm(gradient) + 1e-6))

    def _state_names(self) -> tuple[str, ...]:
        """Names of the arrays like the value that begin as zeros."""
        return ()

    def _first_state(self, weights: Array, state: State) -> None:
        """Change what does not begin as zeros."""

    @abstractmethod
    def _step(self, w: Array, g: Array, state: State, lr: float, step: int) -> None:
        """One block: change ``w`` and ``state``; ``g`` is scratch."""

    def with_hyperparameters(self, **changes: Any) -> Optimizer:
        """The same optimizer with other numbers. Raises OptimizerError for names it has not."""
        known = [field.name for field in fields(self)]
        for name in changes:
            if name not in known:
                raise OptimizerError(f"optimizer {self.name}: expected a name among {', '.join(known)}; got {name!r}")
        described: dict[str, Any] = {
            name: schedules.from_wire(value) if isinstance(value, dict) else value for name, value in changes.items()
        }
        return replace(self, **described)

    def to_wire(self) -> dict[str, Any]:
        """Its name and numbers, nothing else."""
        described: dict[str, Any] = {"name": self.name}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Schedule):
                value = value.to_wire()
            described[field.name] = list(value) if isinstance(value, tuple) else value
        return described


def norm(array: Array) -> float:
    """The Euclidean norm, summed in float64."""
    return float(np.sqrt(np.sum(np.square(array.astype(np.float64)))))
