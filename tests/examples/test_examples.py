"""The examples as users start them: processes of their own, warnings as errors."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests import clusters

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PYTHON = [sys.executable, "-W", "error"]
DEADLINE_S = 100


def run(*command: str) -> str:
    """What the command prints; it has to succeed."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("KVSTORE_", "DMLC_"))}
    paths = os.pathsep.join([str(ROOT), *filter(None, [inherited.get("PYTHONPATH")])])
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        cwd=ROOT,
        env={**inherited, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def example(name: str) -> ModuleType:
    """One of them in this process."""
    specification = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def cluster(workers: int, servers: int, *command: str) -> str:
    return run(*PYTHON, "-m", "kvstore", "run", "-w", str(workers), "-s", str(servers), "--", *command)


def digits(*options: str) -> list[str]:
    return [*PYTHON, str(EXAMPLES / "digits.py"), *options]


def accuracy(output: str) -> float:
    found = re.findall(r"accuracy (\d\.\d+) on 360 held-out images", output)
    assert len(found) == 1, output
    return float(found[0])


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """The weights after fifty steps of one process with one device."""
    file = tmp_path_factory.mktemp("digits") / "weights.npz"
    run(*digits("--steps", "50", "--dtype", "float64", "--quiet", "--save-weights", str(file)))
    return dict(np.load(file))


def agrees(file: Path, reference: dict[str, np.ndarray]) -> None:
    weights = dict(np.load(file))
    assert weights.keys() == reference.keys()
    for key, value in reference.items():
        np.testing.assert_allclose(weights[key], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("devices", ["1", "2"])
def test_digits_in_one_process_learns(devices: str) -> None:
    output = run(*digits("--devices", devices))
    assert accuracy(output) >= 0.96
    assert "440/440" in output
    assert "staleness 0" in output


def test_digits_draws_lines_only_when_not_quiet() -> None:
    assert len(run(*digits("--steps", "20")).splitlines()) == 11
    assert len(run(*digits("--steps", "20", "--quiet")).splitlines()) == 1


def test_digits_of_two_devices_is_the_training_of_one(tmp_path: Path, reference: dict[str, np.ndarray]) -> None:
    file = tmp_path / "weights.npz"
    run(*digits("--steps", "50", "--dtype", "float64", "--quiet", "--devices", "2", "--save-weights", str(file)))
    agrees(file, reference)


@pytest.mark.parametrize(("workers", "servers", "devices"), [(2, 1, "2"), (2, 2, "1"), (4, 1, "1")])
def test_digits_of_a_cluster_is_the_training_of_one(
    workers: int, servers: int, devices: str, tmp_path: Path, reference: dict[str, np.ndarray]
) -> None:
    file = tmp_path / "weights.npz"
    options = ("--steps", "50", "--dtype", "float64", "--quiet", "--devices", devices, "--save-weights", str(file))
    cluster(workers, servers, *digits(*options))
    agrees(file, reference)


def test_digits_of_a_cluster_in_float32_repeats_its_bits(tmp_path: Path) -> None:
    def trained(name: str, *options: str, workers: int) -> dict[str, np.ndarray]:
        file = tmp_path / name
        command = digits("--steps", "50", "--quiet", *options, "--save-weights", str(file))
        run(*command) if workers == 1 else cluster(workers, 1, *command)
        return dict(np.load(file))

    alone = trained("alone.npz", workers=1)
    first, second = (trained(f"{run}.npz", "--devices", "2", workers=2) for run in (1, 2))
    for key, value in alone.items():
        np.testing.assert_allclose(first[key], value, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(first[key], second[key])


@pytest.mark.parametrize(("device", "between"), [("bounded(2)", "bounded(3)"), ("eventual", "eventual")])
def test_digits_learns_with_stale_weights(device: str, between: str) -> None:
    options = ("--devices", "2", "--device-consistency", device, "--cluster-consistency", between, "--momentum", "0.5")
    assert accuracy(cluster(2, 1, *digits(*options))) >= 0.95


@pytest.mark.parametrize("workers", ["1", "2"])
def test_convolution_learns(workers: str) -> None:
    command = [*PYTHON, str(EXAMPLES / "convolution.py"), "--epochs", "4"]
    assert accuracy(run(*command) if workers == "1" else cluster(2, 1, *command)) >= 0.93


def test_digits_on_gpus_is_the_training_of_the_host(
    simulated_cupy: Callable[..., Any], tmp_path: Path, reference: dict[str, np.ndarray]
) -> None:
    simulated_cupy(devices=2, seed=1)
    program, file = example("digits"), tmp_path / "weights.npz"
    arguments = ["--array", "cupy", "--steps", "50", "--dtype", "float64", "--quiet", "--save-weights", str(file)]
    for devices in ("1", "2", "4"):
        program.main([*arguments, "--devices", devices])
        agrees(file, reference)
    with clusters.cluster(2) as running:  # two workers, a GPU of each for each
        running.run(lambda kv: program.train(kv, program.options([*arguments, "--devices", "2"])), devices=2)
    agrees(file, reference)


def test_convolution_on_a_gpu_is_the_training_of_the_host(simulated_cupy: Callable[..., Any]) -> None:
    program, arguments = example("convolution"), ["--epochs", "1", "--quiet", "--dtype", "float64"]
    there = [*arguments, "--array", "cupy"]
    expected = program.main(arguments)
    simulated_cupy(devices=1, seed=2)
    assert program.main(there) == expected
    with clusters.cluster(2) as running:  # both workers on one GPU
        assert running.run(lambda kv: program.work(kv, program.options(there))) == [expected] * 2


def test_digits_refuses_a_batch_that_cannot_be_divided() -> None:
    done = subprocess.run(
        digits("--devices", "3"),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1
    assert "multiple of 3" in done.stderr


@pytest.mark.parametrize(
    ("device", "between", "largest"),
    [
        ("sequential", "sequential", (0, 0)),
        ("bounded(2)", "bounded(2)", (2, 2)),
        ("eventual", "sequential", (None, 0)),
    ],
)
def test_consistency_stays_within_its_bounds(device: str, between: str, largest: tuple[int | None, int]) -> None:
    worker = [*PYTHON, str(EXAMPLES / "consistency.py"), "--worker", device, between, "--steps", "30"]
    lines = [line for line in cluster(2, 1, *worker).splitlines() if "{" in line]
    results = [json.loads(line[line.index("{") :]) for line in lines]
    assert len(results) == 2
    assert results[0]["accuracy"] == results[1]["accuracy"]  # after the barrier all read the same values
    for result in results:
        for one in result["devices"]:
            assert len(one["staleness"]) == 30
            for level in (0, 1):
                if largest[level] is not None:
                    assert max(step[level] for step in one["staleness"]) <= largest[level]


def test_scaling_measures_clusters() -> None:
    command = ["bench", "scaling", "--workers", "1,2", "--steps", "3", "--compute-ms", "20", "--json"]
    rows = json.loads(run(*PYTHON, "-m", "kvstore", *command))
    assert [row["workers"] for row in rows] == [1, 2]
    assert rows[0]["efficiency"] == 1
    assert all(row["step_ms"] >= row["compute_ms"] == 20 for row in rows)
