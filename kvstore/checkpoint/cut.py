"""A cut of a store, as those see it who write it to a file or want it as arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from kvstore.arrays import Array, dtype_named
from kvstore.protocol.messages import Spec
from kvstore.protocol.pieces import Key

VALUE = ""  # the name of the value among the arrays of a key; the others are the optimizer's


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key in a cut, but for its bytes."""

    key: Key
    spec: Spec
    version: int  # updates that the value has seen
    step: int  # of these, updates by the optimizer that the state is of
    rounds: dict[int, int]  # by rank: its pushes that are in the cut
    states: dict[str, str]  # the optimizer's arrays, each of the value's shape: dtype by name

    @property
    def arrays(self) -> dict[str, str]:
        """All its arrays: dtype by name."""
        return {VALUE: self.spec.dtype, **self.states}


@dataclass(frozen=True, slots=True)
class Part:
    """Some elements of all arrays of a key."""

    record: KeyRecord
    start: int  # the first element
    arrays: dict[str, Array]  # flat, by name


class CutSource(ABC):
    """A cut that has been taken. It stays as it is until it is closed."""

    at: int = 0  # the cut point, as the cluster counts
    optimizer: dict[str, Any] | None = None  # its name and numbers
    records: list[KeyRecord]

    @abstractmethod
    def parts(self) -> Iterator[Part]:
        """All of it: key by key, in the order of :attr:`records`, from the first element to the last."""

    @abstractmethod
    def close(self) -> None:
        """It is not read any more."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def values(cut: CutSource) -> dict[Key, Array]:
    """The values of a cut, by key."""
    whole = {r.key: np.empty(r.spec.cut.items, dtype_named(r.spec.dtype)) for r in cut.records}
    for part in cut.parts():
        value = part.arrays[VALUE]
        whole[part.record.key][part.start : part.start + value.size] = value
    return {r.key: whole[r.key].reshape(r.spec.shape) for r in cut.records}
