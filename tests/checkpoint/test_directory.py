"""Checkpoints on the disk: what goes in comes out, whole or not at all, and damage is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from kvstore.checkpoint import directory, manifest
from kvstore.checkpoint.convert import from_file, to_safetensors
from kvstore.checkpoint.cut import values
from kvstore.checkpoint.reading import Checkpoint
from kvstore.errors import CheckpointError, DeadlineError, DtypeError, OptionError
from tests.checkpoint.cuts import MadeCut, count, of_every_dtype

ROOT = Path(__file__).parents[2]


def write(place: Path, numbers, **options) -> list[Path]:
    return [directory.write(place, count(number, keys=2, items=10), **options) for number in numbers]


@pytest.mark.parametrize("shard_bytes", [1, 100, 1 << 30])
def test_every_dtype_comes_back_with_all_that_is_known_of_it(tmp_path, shard_bytes):
    given = of_every_dtype()
    states = {"float32": {"m": np.arange(8, dtype=np.float64), "v": np.ones(8, np.float32)}}
    made = MadeCut(given, states)
    path = directory.write(tmp_path / "not" / "there", made, shard_bytes=shard_bytes)
    with Checkpoint(path) as one:
        assert one.records == made.records
        assert (one.optimizer, one.at) == (made.optimizer, 7)
        assert one.verify() == []
        for key, value in values(one).items():
            assert value.shape == given[key].shape and value.dtype == given[key].dtype
            assert value.tobytes() == given[key].tobytes(), key
        for name, array in states["float32"].items():
            np.testing.assert_array_equal(one.array("float32", name), array)
        files = sorted(file.name for file in path.iterdir())
    assert files == sorted([*one.manifest.files, "manifest.json"])
    assert len(files) == (3 if shard_bytes == 1 << 30 else len(files)) and len(files) >= 3


def test_the_files_are_safetensors_and_the_manifest_is_json_with_a_line_per_key(tmp_path):
    path = directory.write(tmp_path, count(5, keys=3, items=4))
    loaded = load_file(path / "values-00001.safetensors")
    assert sorted(loaded) == ["key 0", "key 1", "key 2"] and set(loaded["key 1"]) == {5.0}
    assert set(load_file(path / "states-00001.safetensors")) == {f"key {i}/m" for i in range(3)}
    text = (path / "manifest.json").read_text()
    content = json.loads(text)
    assert [row["key"] for row in content["keys"]] == ["key 0", "key 1", "key 2"]
    assert sum('"key": "key' in line for line in text.splitlines()) == 3
    assert content["keys"][0]["rounds"] == {"0": 4, "2": 5} and content["optimizer"] == {"name": "sgd", "lr": 0.5}


def test_names_sort_and_the_last_n_are_kept(tmp_path):
    paths = write(tmp_path, range(4))
    assert directory.checkpoints(tmp_path) == paths == sorted(paths)
    (newest,) = write(tmp_path, [9], keep=2)
    assert directory.checkpoints(tmp_path) == [paths[-1], newest]
    assert directory.find(tmp_path) == newest and directory.find(paths[-1]) == paths[-1]
    assert sorted(os.listdir(tmp_path)) == [".lock", paths[-1].name, newest.name]


def test_a_cut_that_fails_leaves_what_was_there(tmp_path):
    (path,) = write(tmp_path, [1])
    short = count(2, keys=2, items=10)
    short.records.append(MadeCut({"absent": np.ones(3)}).records[0])
    short.parts = lambda: iter(list(count(2, keys=2, items=10).parts()))  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match="3 elements have not come"):
        directory.write(tmp_path, short)
    assert sorted(os.listdir(tmp_path)) == [".lock", path.name]


def test_what_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        directory.write(tmp_path / "file", count(1))


def test_one_process_writes_at_a_time(tmp_path):
    held, go = threading.Event(), threading.Event()

    def slowly() -> None:
        slow = count(1, keys=2, items=10)
        parts = list(slow.parts())

        def wait():
            held.set()
            go.wait(30)
            return iter(parts)

        slow.parts = wait  # type: ignore[method-assign]
        directory.write(tmp_path, slow)

    writer = threading.Thread(target=slowly)
    writer.start()
    held.wait(30)
    with pytest.raises(DeadlineError, match="another process has been writing"):
        directory.write(tmp_path, count(2), timeout_s=0.1)
    go.set()
    writer.join(30)
    assert len(directory.checkpoints(tmp_path)) == 1


def test_nothing_there(tmp_path):
    for place in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match="there is none"):
            Checkpoint(place)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def test_a_flipped_byte_anywhere_in_the_files_is_found_and_refused(tmp_path):
    path = directory.write(tmp_path, count(3, keys=2, items=6))
    for file in path.glob("*.safetensors"):
        for at in range(file.stat().st_size):
            flip(file, at)
            with Checkpoint(path) as one:
                damaged = one.verify()
                assert damaged and all(str(file) in str(error) for error in damaged), (file, at)
                with pytest.raises(CheckpointError, match="damaged"):
                    list(one.parts())
            flip(file, at)
    with Checkpoint(path) as one:
        assert one.verify() == []


def test_damage_names_the_file_and_the_tensor(tmp_path):
    path = directory.write(tmp_path, count(3, keys=2, items=6))
    flip(path / "states-00001.safetensors", -1)
    with Checkpoint(path) as one:
        (error,) = one.verify()
        assert "states-00001.safetensors: tensor 'key 1/m' is damaged" in str(error)
        one.array("key 0", "m")
        with pytest.raises(CheckpointError, match="tensor 'key 1/m' is damaged"):
            one.state("key 1")


def test_a_flipped_byte_in_the_manifest_is_refused_unless_it_says_the_same(tmp_path):
    path = directory.write(tmp_path, count(3, keys=1, items=6))
    file = path / "manifest.json"
    said = json.loads(file.read_text())
    for at in range(file.stat().st_size):
        flip(file, at)
        try:
            assert json.loads(file.read_bytes()) == said  # a blank that is another blank
            Checkpoint(path)
        except (ValueError, AssertionError):
            with pytest.raises(CheckpointError):
                Checkpoint(path)
        flip(file, at)


@pytest.mark.parametrize("change", ["shorter", "longer", "gone"])
def test_a_file_of_another_size_is_refused(tmp_path, change):
    path = directory.write(tmp_path, count(3, keys=1, items=6))
    file = path / "values-00001.safetensors"
    data = file.read_bytes()
    file.unlink() if change == "gone" else file.write_bytes(data[:-1] if change == "shorter" else data + b"x")
    with Checkpoint(path) as one:
        (error,) = one.verify()
        assert "values-00001.safetensors" in str(error)


def test_a_manifest_cannot_name_files_elsewhere(tmp_path):
    path = directory.write(tmp_path, count(3, keys=1, items=6))
    text = (path / "manifest.json").read_text().replace("values-00001.safetensors", "../secret")
    content = json.loads(text)
    del content["checksum"]
    content["checksum"] = manifest._checksum(content)
    with pytest.raises(CheckpointError, match=r"a file of this checkpoint, not '\.\./secret'"):
        manifest.load(json.dumps(content), "manifest")


def test_kill_9_at_random_moments_never_leaves_an_unreadable_directory(tmp_path):
    command = [sys.executable, "-m", "tests.checkpoint.kills", str(tmp_path), "50", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# --- conversion ---------------------------------------------------------------------------------------


def test_to_safetensors_has_the_values_under_the_keys_names(tmp_path):
    path = directory.write(tmp_path / "checkpoints", count(5, keys=3, items=4))
    to_safetensors(Checkpoint(path), tmp_path / "plain.safetensors")
    loaded = load_file(tmp_path / "plain.safetensors")
    assert sorted(loaded) == ["key 0", "key 1", "key 2"] and set(loaded["key 2"]) == {5.0}
    assert sorted(os.listdir(tmp_path)) == ["checkpoints", "plain.safetensors"]


def test_there_and_back_through_safetensors(tmp_path):
    given = {name: value for name, value in of_every_dtype().items() if name not in ("complex64", "complex128")}
    del given["__metadata__"]
    first = directory.write(tmp_path / "first", MadeCut(given))
    to_safetensors(Checkpoint(first), tmp_path / "plain.safetensors")
    second = from_file(tmp_path / "plain.safetensors", tmp_path / "second")
    back = values(Checkpoint(second))
    assert set(back) == set(given)
    assert all(back[key].tobytes() == given[key].tobytes() and back[key].dtype == given[key].dtype for key in given)


def test_from_npz_with_whole_numbers_as_keys(tmp_path):
    np.savez(tmp_path / "weights.npz", **{"7": np.arange(6).reshape(2, 3), "-1": np.ones(2, np.float32)})
    back = values(Checkpoint(from_file(tmp_path / "weights.npz", tmp_path / "to", int_keys=True)))
    np.testing.assert_array_equal(back[7], np.arange(6).reshape(2, 3))
    assert set(back) == {7, -1}
    np.savez(tmp_path / "names.npz", w=np.ones(2))
    with pytest.raises(OptionError, match="a whole number, got 'w'"):
        from_file(tmp_path / "names.npz", tmp_path / "to", int_keys=True)


def test_files_that_are_something_else_are_refused(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"no zip")
    (tmp_path / "x.safetensors").write_bytes(b"no tensors at all")
    np.savez(tmp_path / "texts.npz", w=np.array(["a"]))
    for name, error in (("x.npz", CheckpointError), ("x.safetensors", CheckpointError), ("texts.npz", DtypeError)):
        with pytest.raises(error):
            from_file(tmp_path / name, tmp_path / "to")
    assert not (tmp_path / "to").exists()
