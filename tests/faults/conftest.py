"""What the tests of faults share."""

from __future__ import annotations

import pytest

from tests.faults.processes import processes
from tests.faults.training import train


@pytest.fixture(scope="package")
def undisturbed() -> set[str]:
    """The bits that :func:`train` ends with when nothing happens."""
    with processes(3, 2) as running:
        weights, _ = train(running)
    assert len(weights) == 1
    return weights
