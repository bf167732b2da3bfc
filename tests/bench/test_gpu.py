"""The suite for GPUs: all of it runs, on the simulated CuPy, and says what it should. Without a GPU it says why not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import engine
from kvstore.arrays.gpu import missing
from kvstore.bench.driver import Driver
from kvstore.bench.suites import SUITES, Options
from kvstore.bench.systems import Interpreters

ROOT = Path(__file__).parent.parent.parent
LIMIT_S = 60
CASES = [
    *("merge of 4 x 0.0164 MB (at most 1.18 x)", "SGD, 0.0164 MB (at most 1.18 x)", "Adam, 0.0164 MB (at most 1.18 x)"),
    *(f"compress to {name}, 0.0164 MB (at most 1.43 x)" for name in ("2bit", "1bit", "int8")),
    *("concatenate 1,000 arrays of 4 KB", "scatter-add of 64 rows of 32"),
    "staging of 0.0164 MB (at most 1.11 x)",
    *("pushpull of mlp, 3 MB", "pushpull of mlp, 3 MB, SGD momentum"),
    *("op on an empty kernel (at most 15 us)", "100 independent norms of 0.00273 MB"),
]


def test_it_runs_and_says_what_it_measured(simulated_cupy, tmp_path):
    simulated_cupy(devices=1)
    driver, trace = Driver(Interpreters(), repeats=2), tmp_path / "trace.json"
    rows = [one for step in SUITES["gpu"](Options(quick=True, trace=str(trace))) for one in step(driver)]
    engine.close()
    assert driver.versions["gpu"] == "simulated"
    assert set(CASES) <= {one["case"] for one in rows}
    for one in rows:
        assert "error" not in one, one
        assert 0 <= one["low"] <= one["median"] <= one["high"]
        assert one["limit"] > 0, one
    assert any(one["beside"].get("cupyx.scatter_add") for one in rows)
    events = json.loads(trace.read_text())["traceEvents"]
    rows_of_streams = Counter(event["tid"] for event in events if event["name"] == "norm")
    assert sum(rows_of_streams.values()) == 100
    assert len(rows_of_streams) > 1


@pytest.mark.skipif(missing() is None, reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_a_line():
    command = [sys.executable, "-m", "bench", "gpu", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, cwd=ROOT)
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.startswith("kvstore: gpu: expected a GPU: CuPy ")
    assert done.stderr.count("\n") == 1
