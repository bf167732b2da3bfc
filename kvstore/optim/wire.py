"""From a name and numbers to an optimizer: a table, and nothing that a peer could extend."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from kvstore.errors import OptimizerError
from kvstore.optim import schedules
from kvstore.optim.adaptive import FTRL, Adadelta, Adagrad, Adam, AdamW, RMSProp
from kvstore.optim.base import Optimizer
from kvstore.optim.descent import SGD, Accumulate
from kvstore.optim.layerwise import LAMB, LARS

OPTIMIZERS: dict[str, type[Optimizer]] = {
    kind.name: kind for kind in (SGD, Adam, AdamW, Adagrad, RMSProp, Adadelta, FTRL, LARS, LAMB, Accumulate)
}


def from_wire(described: dict[str, Any]) -> Optimizer:
    """The optimizer that :meth:`Optimizer.to_wire` described.

    Raises:
        OptimizerError: an unknown name, an unknown or missing field, or a value out of range.
    """
    if not isinstance(described, dict):
        raise OptimizerError(f"an optimizer: expected a name and numbers, got {type(described).__name__}")
    numbers = dict(described)
    name = numbers.pop("name", None)
    kind = OPTIMIZERS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise OptimizerError(f"an optimizer: expected one of {', '.join(OPTIMIZERS)}; got {name!r}")
    if isinstance(numbers.get("lr"), dict):
        numbers["lr"] = schedules.from_wire(numbers["lr"])
    known = {field.name for field in fields(kind)}
    unknown = [field for field in numbers if field not in known]
    if unknown:
        raise OptimizerError(f"optimizer {name}: expected fields among {', '.join(sorted(known))}; got {unknown[0]!r}")
    return kind(**numbers)
