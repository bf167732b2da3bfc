"""The pytest fixture of the failure laboratory; pytest finds it wherever kvstore is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from kvstore.testing.cluster import Cluster


@pytest.fixture
def simulated_cluster() -> Iterator[Callable[..., Cluster]]:
    """Makes :class:`kvstore.testing.Cluster` with the given arguments; all are ended after the test."""
    from kvstore.testing.cluster import Cluster

    with ExitStack() as ended:

        def make(*args: Any, **options: Any) -> Cluster:
            return ended.enter_context(Cluster(*args, **options))

        yield make
