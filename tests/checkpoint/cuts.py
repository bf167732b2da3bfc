"""Cuts made by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from kvstore.checkpoint.cut import VALUE, CutSource, KeyRecord, Part
from kvstore.protocol.messages import Spec

ALL = ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32"]
ALL += ["float64", "complex64", "complex128"]


class MadeCut(CutSource):
    """Values (and states, by key) that are given, in parts of ``piece_items`` elements."""

    def __init__(self, values: Mapping[Any, Any], states: Mapping[Any, dict[str, Any]] | None = None, piece_items=3):
        self.values, self.states = values, states or {}
        self.optimizer = {"name": "sgd", "lr": 0.5} if states else None
        self.at = 7
        self.closed = False
        self.records = []
        for key, value in values.items():
            spec = Spec(value.shape, value.dtype.name, piece_items, "sequential", "bounded(2)", (0, 2))
            dtypes = {name: array.dtype.name for name, array in self.states.get(key, {}).items()}
            self.records.append(KeyRecord(key, spec, 9, 4, {0: 4, 2: 5}, dtypes))

    def parts(self) -> Iterator[Part]:
        for record in self.records:
            arrays = {VALUE: self.values[record.key], **self.states.get(record.key, {})}
            for piece in range(len(record.spec.cut)):
                start, stop = record.spec.cut.span(piece)
                yield Part(record, start, {name: array.reshape(-1)[start:stop] for name, array in arrays.items()})

    def close(self) -> None:
        self.closed = True


def of_every_dtype() -> dict[str, Any]:
    """A value of every dtype and several shapes."""
    rng = np.random.default_rng(1)
    values: dict[str, Any] = {name: (rng.random((2, 4)) * 100).astype(name) for name in ALL}
    values["bfloat16"] = rng.random(5).astype(ml_dtypes.bfloat16)
    values["scalar"], values["empty"] = np.array(3.5), np.empty((0, 3), np.float32)
    values["__metadata__"], values["a/b ü\n"] = np.ones(2, np.float32), np.zeros(1, np.int8)
    return values


def count(number: int, keys: int = 20, items: int = 4096) -> MadeCut:
    """A cut in which every element of every value and state is ``number``."""
    filled = {f"key {i}": np.full(items, number, np.float32) for i in range(keys)}
    return MadeCut(filled, {key: {"m": array + 1} for key, array in filled.items()}, math.ceil(items / 3))
