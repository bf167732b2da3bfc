"""These tests need a GPU: without CuPy, a driver or a device they are skipped."""

from __future__ import annotations

from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def cupy() -> ModuleType:
    module = pytest.importorskip("cupy")
    try:
        count = module.cuda.runtime.getDeviceCount()
    except module.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"no GPU: {error}")
    if not count:
        pytest.skip("no GPU")
    return module
