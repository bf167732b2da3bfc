"""Where there is a GPU, the contracts of stores, of their devices and of lists with arrays on it.

On the simulated one they run in ``tests/store``.
"""

from __future__ import annotations

import pytest

import kvstore
from tests.gpu.conftest import MISSING
from tests.store.on_gpus import OnGpus

if not MISSING:
    from tests.store.test_contract import *  # noqa: F403
    from tests.store.test_devices import *  # noqa: F403
    from tests.store.test_lists import *  # noqa: F403

    @pytest.fixture(scope="module", params=["local", "device"])
    def place(request):
        return request.param

    @pytest.fixture
    def create(place):
        import cupy

        return lambda **options: OnGpus(kvstore.create(place, timeout=30, **options), cupy)

    @pytest.fixture
    def make(create):
        stores = []

        def remember(**options):
            stores.append(create(**options))
            return stores[-1]

        yield remember
        for store in stores:
            store.close()
