"""The stores of one process, whose arrays are the host's or GPUs': they do the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import kvstore
from tests.store.on_gpus import OnGpus

GPUS = {"local, arrays on 2 GPUs": 2, "device, arrays on 1 GPU": 1, "device, arrays on 2 GPUs": 2}


@pytest.fixture(params=["local", *GPUS])
def create(request: pytest.FixtureRequest, simulated_cupy: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """``create(**options)``: a store, which is given arrays of the host, and sees them on GPUs."""
    if request.param == "local":
        yield lambda **options: kvstore.create("local", timeout=30, **options)
        return
    cupy = simulated_cupy(devices=GPUS[request.param], seed=11)

    def on_gpus(**options: Any) -> OnGpus:
        return OnGpus(kvstore.create(request.param.partition(",")[0], timeout=30, **options), cupy)

    yield on_gpus
