"""The tests here run twice: on the simulated CuPy, and on a GPU, where there is one; the run says whether and which."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest

from kvstore.arrays.gpu import missing
from tests.gpu import simulated

MISSING = missing()


def pytest_report_header():
    if MISSING:
        return f"GPU: none, but a simulated one. {MISSING}"
    import cupy

    return f"GPU: {cupy.cuda.runtime.getDeviceProperties(0)['name'].decode()}, CuPy {cupy.__version__}"


@pytest.fixture(params=["simulated", pytest.param("gpu", marks=pytest.mark.skipif(bool(MISSING), reason=str(MISSING)))])
def cupy(request) -> Iterator[ModuleType]:
    """The module; ``cupy.kvstore_simulated`` is there on the simulated one."""
    if request.param == "gpu":
        import cupy

        yield cupy
        return
    with simulated.install(devices=2, seed=1):
        import cupy

        yield cupy
