"""Dataclasses that nobody changes, and that cost little to make.

``@dataclass(frozen=True)`` guards its fields at run time, and making one takes three to five times as long for it. A
small round makes some thirty of them. So here the type checker is the guard. Elsewhere, where few are made,
``@dataclass(frozen=True)`` it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def record(kind: type[T]) -> type[T]:
    """As ``@dataclass(frozen=True, slots=True)``, but only the type checker sees to it that nothing is assigned."""
    return dataclass(slots=True, unsafe_hash=True)(kind)
