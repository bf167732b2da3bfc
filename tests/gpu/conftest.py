"""The tests here run on the simulated CuPy, and once more on a GPU, where there is one; the run says which."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from kvstore.arrays.gpu import missing
from tests.gpu import simulated
from tests.kernels import on_cpu

HERE = Path(__file__).parent
MISSING = missing()
SIMULATED_DTYPES = ("bool", "int16", "float32", "bfloat16", "complex128")  # one for each size of element


def pytest_collection_modifyitems(config, items):
    """Of the kernels' contract the simulated CuPy, which is slow, does a part: the arithmetic has a test of its own."""
    left = [item for item in items if _is_simulated(item) and not _is_wanted(item.callspec.params)]
    if left:
        config.hook.pytest_deselected(items=left)
        gone = set(left)
        items[:] = [item for item in items if item not in gone]


def _is_simulated(item):
    return HERE in item.path.parents and hasattr(item, "callspec") and item.callspec.params.get("cupy") == "simulated"


def _is_wanted(parameters):
    names = [np.dtype(parameters[name]).name for name in ("dtype", "pushed") if name in parameters]
    return parameters.get("form") != "current stream" and all(name in SIMULATED_DTYPES for name in names)


def pytest_report_header():
    if MISSING:
        return f"GPU: none, but a simulated one. {MISSING}"
    import cupy

    return f"GPU: {cupy.cuda.runtime.getDeviceProperties(0)['name'].decode()}, CuPy {cupy.__version__}"


@pytest.fixture(params=["simulated"] if MISSING else ["simulated", "gpu"])
def cupy(request) -> Iterator[ModuleType]:
    """The module; ``cupy.kvstore_simulated`` is there on the simulated one."""
    if request.param == "gpu":
        import cupy

        yield cupy
        return
    if not on_cpu.COMPILER:
        pytest.skip("there is no g++ for the simulated CuPy's kernels")
    with simulated.install(devices=2, seed=1):
        import cupy

        yield cupy
