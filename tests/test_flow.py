"""One pushpull visits the files in the order in which the tour of ``kvstore/__init__.py`` names them."""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path

import numpy as np

import kvstore
from tests.clusters import cluster

ROOT = Path(kvstore.__file__).parent.parent
TOUR = [
    "kvstore/trainer.py",
    "kvstore/store.py",
    "kvstore/consistency.py",
    "engine/",
    "kvstore/comm/",
    "kvstore/cluster/client.py",
    "kvstore/protocol/requesting.py",
    "kvstore/protocol/wire.py",
    "kvstore/transport/",
    "kvstore/cluster/shard.py",
    "kvstore/protocol/serving.py",
    "kvstore/consistency.py",
    "kvstore/cluster/work.py",
    "kvstore/stored.py",
    "kvstore/optim/",
    "kvstore/comm/",
]


def test_the_tour_names_files_that_exist():
    named = re.findall(r"``([a-z_]+(?:/[a-z_]*)?(?:\.py|/))``", kvstore.__doc__ or "")
    assert len(named) >= 12
    for path in named:
        assert (ROOT / path).exists() or (ROOT / "kvstore" / path).exists(), path


def test_a_pushpull_takes_the_tour():
    visited: list[str] = []

    def trace(frame, event, arg):
        file = frame.f_code.co_filename
        if file.startswith(str(ROOT)):
            path = str(Path(file).relative_to(ROOT))
            if not visited or visited[-1] != path:
                visited.append(path)

    threading.setprofile(trace)  # for all threads that start from here on
    try:
        with cluster(workers=1, servers=1) as c, kvstore.create("dist", address=c.address, timeout=30) as kv:
            weights = {"w": np.ones(8, np.float32)}
            trainer = kvstore.Trainer(weights, kvstore.optim.SGD(lr=0.1), kv)
            trainer.step({"w": np.ones(8, np.float32)})
            visited.clear()
            sys.setprofile(trace)
            try:
                trainer.step({"w": np.ones(8, np.float32)})
            finally:
                sys.setprofile(None)
            assert abs(weights["w"][0] - 0.8) < 1e-6
            took = list(visited)
    finally:
        threading.setprofile(None)

    rest = iter(took)
    for stop in TOUR:
        assert any(path.startswith(stop) for path in rest), f"{stop} does not follow; visited {took}"
