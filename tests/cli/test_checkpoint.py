"""``kvstore checkpoint``, and the options of ``run`` and ``server`` that concern checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

from kvstore.checkpoint import directory
from kvstore.checkpoint.reading import Checkpoint
from kvstore.cli import main
from tests.checkpoint.cuts import MadeCut, count

LIMIT_S = 60


def call(*arguments: object):
    return CliRunner().invoke(main, ["checkpoint", *map(str, arguments)])


def damage(path: Path) -> None:
    file = path / "values-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("command", [[], ["inspect"], ["verify"], ["convert"]])
def test_every_command_has_help(command):
    result = call(*command, "--help")
    assert result.exit_code == 0 and "Usage" in result.output


def test_inspect_shows_what_there_is_and_reads_no_markup(tmp_path):
    values = {"[red]w[/red]": np.ones((2, 3), np.float32), "b": np.ones(4)}
    states = {"b": {"momentum": np.zeros(4)}}
    path = directory.write(tmp_path, MadeCut(values, states))
    result = call("inspect", tmp_path)
    assert result.exit_code == 0, result.output
    for said in (str(path), "'[red]w[/red]'", "2x3", "float32", "bounded(2)", "0:4 2:5", "momentum", '"name": "sgd"'):
        assert said in result.output, said
    report = json.loads(call("inspect", path, "--json").output)
    assert [row["key"] for row in report["keys"]] == ["[red]w[/red]", "b"]
    assert report["cut_point"] == 7 and report["beside"] == [path.name]


def test_verify_finds_damage_in_the_newest_or_in_all(tmp_path):
    old = directory.write(tmp_path, count(1, keys=2, items=5))
    new = directory.write(tmp_path, count(2, keys=2, items=5))
    damage(old)
    result = call("verify", tmp_path)
    assert result.exit_code == 0 and f"{new}: 2 keys, whole" in result.output
    result = call("verify", "--all", tmp_path)
    assert result.exit_code == 1
    assert "values-00001.safetensors: tensor 'key 1' is damaged" in result.output


def test_convert_both_ways(tmp_path):
    directory.write(tmp_path / "from", count(1, keys=2, items=5))
    plain = tmp_path / "plain.safetensors"
    assert call("convert", tmp_path / "from", plain).exit_code == 0
    assert set(load_file(plain)) == {"key 0", "key 1"}
    result = call("convert", plain, tmp_path / "to")
    assert result.exit_code == 0
    with Checkpoint(result.output.strip()) as one:
        assert set(one.array("key 1")) == {1.0}
    assert call("convert", tmp_path / "from", tmp_path / "plain.txt").exit_code == 2


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_nothing_there_is_one_line_and_a_code(tmp_path, command):
    result = call(command, tmp_path / "absent")
    assert result.exit_code == 1
    assert result.output.startswith("kvstore: ") and result.output.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--checkpoint-every", "0"], ["--checkpoint-keep", "0"]])
def test_wrong_options(arguments):
    assert CliRunner().invoke(main, ["server", *arguments]).exit_code == 2


TRAIN = """
import sys
from pathlib import Path
import numpy as np, kvstore
with kvstore.create("dist", timeout=40) as kv:
    weights = {"a": np.zeros(3, np.float32), "b": np.zeros(5, np.float32)}
    trainer = kvstore.Trainer(weights, kvstore.optim.SGD(lr=1.0), kv)
    if kv.rank == 0:
        print("began at", int(weights["a"][0]), flush=True)
    stop = Path(sys.argv[1], "stop")
    while not stop.exists():
        for _ in range(10):
            trainer.step({key: np.full_like(value, -0.5) for key, value in weights.items()})
        kv.barrier()
        if kv.rank == 0 and len(list(stop.parent.glob("checkpoint-*"))) >= 2:
            stop.touch()
        kv.barrier()  # so that all see the same
"""


def run(place: Path, *options: str) -> str:
    command = [
        sys.executable,
        "-m",
        "kvstore",
        "run",
        "-w",
        "2",
        *options,
        "--",
        sys.executable,
        "-c",
        TRAIN,
        str(place),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_run_writes_checkpoints_and_begins_with_one(tmp_path):
    said = run(
        tmp_path, "-s", "2", "--checkpoint-dir", str(tmp_path), "--checkpoint-every", "0.3", "--checkpoint-keep", "3"
    )
    assert "began at 0" in said
    with Checkpoint(tmp_path) as one:
        (value,) = {float(v) for key in ("a", "b") for v in one.array(key)}
        assert value == one.manifest.keys["a"].record.version > 0
    (tmp_path / "stop").unlink()
    said = run(tmp_path, "-s", "3", "--restore", str(tmp_path))
    assert f"began at {int(value)}" in said
