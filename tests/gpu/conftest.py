"""Everything here needs a GPU: without one it is skipped, and says why; with one the run says which."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from kvstore.arrays.gpu import missing

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    here = [item for item in items if HERE in item.path.parents]
    if here and (reason := missing()):
        for item in here:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_report_header():
    if reason := missing():
        return f"GPU: none. {reason}"
    import cupy

    return f"GPU: {cupy.cuda.runtime.getDeviceProperties(0)['name'].decode()}, CuPy {cupy.__version__}"


@pytest.fixture(scope="session")
def cupy() -> ModuleType:
    import cupy

    return cupy
