"""The benchmark: every suite of ours runs, says what it should, and leaves nothing behind. Speed is not looked at."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from kvstore.bench.cases import Group, Line
from kvstore.bench.micro import Driver
from kvstore.bench.report import cells, curves, number
from kvstore.bench.statistic import row, summary
from kvstore.bench.suites import SUITES, Options, size_name
from kvstore.bench.systems import Interpreters
from tests.cli.test_run import descendants, gone

LIMIT_S = 100
ROOT = Path(__file__).parent.parent.parent
ROWS = {
    "sizes": "pushpull, tcp, 64 KB",
    "keys": "pushpull, 100 keys of 100 floats",
    "scale": "2 workers, 2 servers, shared memory, 64 KB",
    "consistency": "bounded(2), 64 KB",
    "optimizers": "Adam, 1 MB",
    "models": "mlp, 2 servers",
    "local": "mlp, 4 devices, SGD momentum",
    "kernels": "SGD momentum, 64 elements",
    "memory": "private memory of the server, 1 MB, tcp",
    "start": "first round, 1 MB, shared memory",
}
ONCE = ("kernels", "memory", "start")  # repeats of these cost seconds each, and do the same again
WITHOUT_LIMIT = ("processes started", "steady round", "shared segments")


@pytest.mark.parametrize("suite", ROWS)
def test_a_suite_runs_and_says_what_it_measured(suite, tmp_path, monkeypatch):
    mark = f"KVSTORE_TEST_MARK=bench-{os.getpid()}-{suite}"
    monkeypatch.setenv(*mark.split("="))
    json_file, plot = tmp_path / "rows.json", tmp_path / "plot.png"
    repeats = 1 if suite in ONCE else 2
    command = [sys.executable, "-m", "bench", suite, "--quick", "--repeats", str(repeats), "--max-bytes", "65536"]
    command += ["--peers", "none", "--json", str(json_file)]
    if suite == "sizes":
        command += ["--plot", str(plot)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert gone(mark), "a process is left"
    said = json.loads(json_file.read_text())
    assert said["machine"]["cores"] == os.cpu_count()
    assert said["repeats"] == repeats
    assert ROWS[suite] in [one["case"] for one in said["rows"]]
    for one in said["rows"]:
        assert "error" not in one, one
        assert one["suite"] == suite
        assert 0 <= one["low"] <= one["median"] <= one["high"]
        if not one["case"].startswith(WITHOUT_LIMIT):
            assert one["limit"] > 0, one
        assert not {"MXNet", "gloo"} & set(one["beside"])
        assert one["case"] in done.stdout
    assert plot.exists() == (suite == "sizes")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_process(number, monkeypatch):
    mark = f"KVSTORE_TEST_MARK=bench-{os.getpid()}-{number}"
    monkeypatch.setenv(*mark.split("="))
    command = [sys.executable, "-m", "bench", "sizes", "--repeats", "1000", "--peers", "none"]
    with tempfile.TemporaryDirectory() as short:  # the path of a socket has to be; a killed run leaves files in it
        monkeypatch.setenv("TMPDIR", short)
        _interrupt(command, number, mark)


def _interrupt(command: list[str], number: int, mark: str) -> None:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    try:
        end = time.monotonic() + LIMIT_S
        while not any(b"kvstore.bench.worker" in command_of(pid) for pid in descendants(mark)):
            assert time.monotonic() < end
            time.sleep(0.02)  # between looks
        process.send_signal(number)
        assert process.wait(LIMIT_S) != 0
    finally:
        process.kill()
        process.communicate(timeout=LIMIT_S)
    assert gone(mark), descendants(mark)


def command_of(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def test_both_commands_are_the_same():
    first, second = (
        subprocess.run(
            [sys.executable, "-m", *which, "nonsense"], capture_output=True, text=True, timeout=LIMIT_S, cwd=ROOT
        )
        for which in (["bench"], ["kvstore", "bench", "micro"])
    )
    assert first.returncode == second.returncode == 1
    assert first.stderr == second.stderr
    assert "expected suites among sizes, keys" in first.stderr


def test_a_plot_needs_the_sizes():
    done = subprocess.run(
        [sys.executable, "-m", "bench", "keys", "--plot", "x.png"],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        cwd=ROOT,
    )
    assert done.returncode == 1
    assert "--plot" in done.stderr


def test_a_peer_that_does_not_start_costs_its_column_only(tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such store >&2\nexit 3\n")
    broken.chmod(0o755)
    driver = Driver(Interpreters({"mxnet": str(broken)}), repeats=1, sample_s=0.01)
    whole = SUITES["sizes"](Options(max_bytes=4, quick=True))[0]
    wanted = ("pushpull", "MXNet", "gloo", "bare pyzmq", "copy")  # the other lines need a cluster more
    group = Group({name: whole.cases[name] for name in wanted}, whole.lines[:1])
    try:
        rows = {one["case"]: one for one in driver.measure("sizes", group)}
    finally:
        driver.keep(set())
    pushpull = rows["pushpull, 4 B"]
    assert pushpull["median"] > 0
    assert "no such store" in pushpull["beside"]["MXNet"]["error"]
    assert "gloo" not in pushpull["beside"]
    assert "failed" in cells(pushpull, ["MXNet"])


def test_figures_of_a_row():
    assert summary([3, 1, 2]) == {"median": 2, "low": 1, "high": 3, "samples": [3, 1, 2]}
    line = Line("a case", "own", "limit", "the limit", {"MXNet": "other", "gloo": "broken"}, {"bytes": 4})
    samples = {"own": [1.0, 2.0, 4.0], "limit": [0.5, 0.5, 0.7], "other": [2.0, 2.0, 16.0]}
    made = row("sizes", line, samples, {"broken": "it fell over"})
    assert made == {
        "suite": "sizes",
        "case": "a case",
        "unit": "ms",
        "bytes": 4,
        "median": 2.0,
        "low": 1.0,
        "high": 4.0,
        "samples": [1.0, 2.0, 4.0],
        "limit": 0.5,
        "limit_name": "the limit",
        "beside": {
            "MXNet": {"median": 2.0, "low": 2.0, "high": 16.0, "samples": [2.0, 2.0, 16.0], "ratio": 2.0},
            "gloo": {"error": "it fell over"},
        },
    }
    assert cells(made, ["gloo", "MXNet", "copy"]) == [
        *("a case", "ms", "2.00", "1.00-4.00", "0.500 (the limit)", "4.00", "failed", "2.00 (2.00x)", "")
    ]


def test_a_row_that_failed():
    made = row("sizes", Line("a case", "own"), {}, {"own": "why\nmore"})
    assert made["error"] == "why\nmore"
    assert cells(made, [])[:2] == ["a case", "failed"]


def test_a_ratio_to_nothing_is_none():
    made = row("memory", Line("a case", "own", beside={"MXNet": "other"}), {"own": [0.0], "other": [0.0]}, {})
    assert made["beside"]["MXNet"]["ratio"] is None
    assert cells(made, ["MXNet"])[-1] == "0.00000"


def test_curves():
    row_of = {"case": "", "suite": "sizes", "unit": "ms", "low": 1, "high": 1}
    rows = [
        {**row_of, "curve": "pushpull", "bytes": size, "median": size / 2, "limit": 1, "limit_name": "bare pyzmq"}
        | {"beside": {"gloo": {"median": 3}, "MXNet": {"error": "x"}}}
        for size in (4, 8)
    ]
    rows += [{**row_of, "curve": "pushpull, tcp", "bytes": 4, "error": "x"}, {**row_of, "median": 1}]
    assert curves(rows) == {"pushpull": [(4, 2), (8, 4)], "bare pyzmq": [(4, 1), (8, 1)], "gloo": [(4, 3), (8, 3)]}


@pytest.mark.parametrize(
    ("value", "text"), [(0.00012, "0.00012"), (0.0123, "0.0123"), (0.5, "0.500"), (1.234, "1.23"), (1234.5, "1,234")]
)
def test_numbers(value, text):
    assert number(value) == text


@pytest.mark.parametrize(("size", "text"), [(4, "4 B"), (65536, "64 KB"), (1 << 20, "1 MB"), (1 << 30, "1 GB")])
def test_size_names(size, text):
    assert size_name(size) == text


def test_max_bytes():
    assert Options(max_bytes=1 << 20).sizes == [4, 1024, 65536, 1 << 20]
    assert Options(max_bytes=1 << 30).sizes[-1] == 1 << 30
    assert Options(max_bytes=5, quick=True).some(10, 20) == [10]
