"""What all optimizers share: checks, clipping, float32 masters of half-precision values.

The arithmetic is in :mod:`kvstore.kernels`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import numpy as np

from kvstore import kernels, plain
from kvstore.arrays import Array, empty, empty_like, memory_of
from kvstore.errors import DtypeError, OptimizerError
from kvstore.kernels import HALVES, Change
from kvstore.optim import schedules
from kvstore.optim.schedules import Schedule

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
        weights = value
        if value.dtype in HALVES:
            weights = empty(value.shape, np.dtype(np.float32), memory_of(value))
            kernels.cast(value, weights)
        state = {name: empty_like(weights) for name in self._state_names()}
        for array in state.values():
            array.fill(0)
        if weights is not value:
            state["master"] = weights
        self._first_state(weights, state)
        return state

    def update(
        self,
        value: Array,
        pushes: Sequence[Array],
        state: State,
        step: int,
        target: Array | None = None,
        factor: float = 1.0,
    ) -> None:
        """Change ``value`` and ``state`` in place, by the sum of the pushes: in one pass, without a temporary.

        Args:
            value: an array of any shape.
            pushes: at least one, of its shape and dtype; they are not changed.
            state: what :meth:`create_state` made, after the earlier updates.
            step: the number of this update of the value, from 1.
            target: where the new value goes, if not into ``value``, which then stays as it is.
            factor: the sum is multiplied by it before anything else.
        """
        target = value if target is None else target
        master = state.get("master")
        lr = float(self.lr.at(step) if isinstance(self.lr, Schedule) else self.lr)
        scale = factor
        clip = math.inf if self.clip_gradient is None else self.clip_gradient
        if self.clip_norm is not None:
            norm = float(kernels.norm(pushes))  # which, where it is a GPU's, the thread waits for
            scale *= min(1.0, self.clip_norm / (norm * factor + 1e-6))
        if master is None:
            self._step(Change(value, target, pushes, scale, clip), state, lr, step)
        else:
            self._step(Change(master, master, pushes, scale, clip), state, lr, step)
            kernels.cast(master, target)

    def _state_names(self) -> tuple[str, ...]:
        """Names of the arrays like the value that begin as zeros."""
        return ()

    def _first_state(self, weights: Array, state: State) -> None:
        """Change what does not begin as zeros."""

    @abstractmethod
    def _step(self, change: Change, state: State, lr: float, step: int) -> None:
        """Call the kernel that makes the change, with the numbers of this step."""

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
