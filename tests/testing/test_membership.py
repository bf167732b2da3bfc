"""Workers that come and go change nothing that others may rely on; and bugs that are planted there are found."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvstore import KVStore
from kvstore.testing import Cluster


@pytest.mark.parametrize("loss", [0.0, 0.1])
def test_wait_takes_up_a_round_that_was_half_sent(loss: float) -> None:
    with Cluster(2, 2, seed=5, on_worker_loss="wait", loss=loss, delay_s=(0.001, 0.3)) as cluster:

        def program(kv: KVStore) -> Any:
            kv.init(["a", "b"], [np.zeros(1), np.zeros(1)])
            ones = np.ones(1)
            for step in range(min(kv.rounds("a"), kv.rounds("b")), 20):
                for key in ("a", "b"):
                    if kv.rounds(key) == step:
                        got = kv.pushpull(key, ones * (step + 1), np.empty(1)).result()
                        assert got[0] == 2 * (step + 1)
                cluster.sleep(0.1)
            return "done"

        cluster.at(3.0, lambda: cluster.crash("worker", 1))
        cluster.at(9.0, lambda: cluster.start_worker(1, program))
        assert cluster.run(program)[0] == "done"
        assert cluster.join()[1] == "done"
