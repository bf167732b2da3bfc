"""Parameter lists of known models: as many tensors and parameters as published."""

from __future__ import annotations

import math

import pytest

from kvstore.bench.models import MODELS


@pytest.mark.parametrize(
    ("model", "tensors", "parameters"),
    [("resnet50", 161, 25_557_032), ("bert-base", 199, 109_482_240), ("mlp", 6, 669_706)],
)
def test_totals(model: str, tensors: int, parameters: int) -> None:
    shapes = MODELS[model]()
    assert len(shapes) == tensors
    assert sum(map(math.prod, shapes.values())) == parameters
