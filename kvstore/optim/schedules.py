"""Learning rates that change with the number of updates. Pure data; the first update is step 1."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from kvstore import plain
from kvstore.errors import OptimizerError


@dataclass(frozen=True)
class Schedule:
    """Root of the schedules. ``warmup`` steps grow linearly from ``base / warmup`` to ``base``."""

    name: ClassVar[str]
    base: float
    warmup: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = plain.unboxed(getattr(self, field.name))
            object.__setattr__(self, field.name, value)
            numbers = value if isinstance(value, tuple) else (value,)
            if not all(type(n) in (int, float) and math.isfinite(n) and n >= 0 for n in numbers):
                raise OptimizerError(f"schedule {self.name}: {field.name}: expected finite numbers >= 0, got {value!r}")

    def at(self, step: int) -> float:
        """The learning rate of update ``step``, counted from 1."""
        if step <= self.warmup:
            return self.base * step / self.warmup
        return self._after(step - self.warmup - 1)

    def _after(self, done: int) -> float:
        """The rate when ``done`` updates have followed the warm-up."""
        return self.base

    def to_wire(self) -> dict[str, Any]:
        """Its name and numbers."""
        numbers = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"schedule": self.name, **{k: list(v) if isinstance(v, tuple) else v for k, v in numbers.items()}}


@dataclass(frozen=True)
class Constant(Schedule):
    """``base``, always (after the warm-up)."""

    name: ClassVar[str] = "constant"


@dataclass(frozen=True)
class Step(Schedule):
    """Multiplied by ``gamma`` every ``size`` updates."""

    name: ClassVar[str] = "step"
    size: int = 1
    gamma: float = 0.1

    def _after(self, done: int) -> float:
        return self.base * self.gamma ** (done // max(1, self.size))


@dataclass(frozen=True)
class MultiStep(Schedule):
    """Multiplied by ``gamma`` at each of ``milestones``."""

    name: ClassVar[str] = "multistep"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1

    def _after(self, done: int) -> float:
        return self.base * self.gamma ** sum(done >= milestone for milestone in self.milestones)


@dataclass(frozen=True)
class Exponential(Schedule):
    """Multiplied by ``gamma`` at every update."""

    name: ClassVar[str] = "exponential"
    gamma: float = 0.999

    def _after(self, done: int) -> float:
        return self.base * self.gamma**done


@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine from ``base`` to ``final`` over ``total`` updates (Loshchilov and Hutter 2017, eq. 5)."""

    name: ClassVar[str] = "cosine"
    total: int = 1
    final: float = 0.0

    def _after(self, done: int) -> float:
        share = min(1.0, done / max(1, self.total))
        return self.final + (self.base - self.final) * (1 + math.cos(math.pi * share)) / 2


@dataclass(frozen=True)
class Polynomial(Schedule):
    """From ``base`` to ``final`` over ``total`` updates as a power of what is left."""

    name: ClassVar[str] = "polynomial"
    total: int = 1
    power: float = 1.0
    final: float = 0.0

    def _after(self, done: int) -> float:
        left = 1 - min(1.0, done / max(1, self.total))
        return float(self.final + (self.base - self.final) * left**self.power)


SCHEDULES: dict[str, type[Schedule]] = {
    kind.name: kind for kind in (Constant, Step, MultiStep, Exponential, Cosine, Polynomial)
}


def from_wire(described: dict[str, Any]) -> Schedule:
    """The schedule that :meth:`Schedule.to_wire` described. Raises OptimizerError."""
    numbers = dict(described)
    name = numbers.pop("schedule", None)
    kind = SCHEDULES.get(name) if isinstance(name, str) else None
    if kind is None:
        raise OptimizerError(f"a schedule: expected one of {', '.join(SCHEDULES)}; got {name!r}")
    try:
        return kind(**numbers)
    except TypeError as error:
        known = ", ".join(field.name for field in fields(kind))
        raise OptimizerError(f"schedule {name}: expected {known}; got {', '.join(map(str, numbers))}") from error
