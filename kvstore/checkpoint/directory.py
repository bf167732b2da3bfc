"""A directory of checkpoints: each is there whole or not at all, the newest sorts last, older ones go.

A checkpoint is written to a hidden directory beside its place, brought to the disk and then renamed; its manifest is
written last. So a crash leaves what was there before, and nobody needs a link to the latest. One process writes at a
time (a file lock that the system gives back when the process dies); what a dead one left behind, the next removes.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from kvstore.arrays import dtype_named
from kvstore.checkpoint import manifest
from kvstore.checkpoint.cut import VALUE, CutSource, KeyRecord
from kvstore.checkpoint.manifest import File, Manifest, Stored, Where, tensor_name
from kvstore.checkpoint.tensors import Tensor, TensorFile
from kvstore.errors import CheckpointError, DeadlineError, KVStoreError

SHARD_BYTES = 1 << 30  # files do not become larger, but for a larger tensor
LOCK_AGAIN_S = 0.05

_NAME = re.compile(r"checkpoint-(\d{12})")
_UNFINISHED = (".writing-", ".removing-")


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in a directory, the oldest first; none if there is no such directory."""
    if not directory.is_dir():
        return []
    named = sorted(path for path in directory.iterdir() if _NAME.fullmatch(path.name))
    return [path for path in named if (path / manifest.NAME).is_file()]


def find(path: str | os.PathLike[str]) -> Path:
    """The checkpoint at ``path``, or the newest in this directory of checkpoints.

    Raises:
        CheckpointError: there is none.
    """
    place = Path(path)
    if (place / manifest.NAME).is_file():
        return place
    found = checkpoints(place)
    if not found:
        raise CheckpointError(f"{place}: expected a checkpoint or a directory of checkpoints, there is none")
    return found[-1]


def write(
    directory: str | os.PathLike[str],
    cut: CutSource,
    *,
    keep: int | None = None,
    timeout_s: float = math.inf,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a cut as the newest checkpoint of a directory, which is made if need be.

    Args:
        keep: of the checkpoints in the directory, how many are kept, this one included; None: all.
        timeout_s: how long another process may be writing there.

    Raises:
        CheckpointError: it could not be written; what was there is as it was.
        DeadlineError: another process was writing all the time.
    """
    place = Path(directory)
    try:
        place.mkdir(parents=True, exist_ok=True)
        with _alone(place, timeout_s):
            _clear(place)
            known = checkpoints(place)
            number = int(known[-1].name.split("-")[1]) + 1 if known else 1
            unfinished, whole = place / f".writing-{number:012d}", place / f"checkpoint-{number:012d}"
            unfinished.mkdir()
            try:
                _fill(unfinished, cut, shard_bytes)
                _sync(unfinished)
                unfinished.rename(whole)
            except BaseException:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise
            _sync(place)
            for old in [] if keep is None else [*known, whole][: -max(1, keep)]:
                removed = place / f".removing-{old.name}"
                old.rename(removed)
                shutil.rmtree(removed)
            return whole
    except KVStoreError:  # one of them is an OSError too
        raise
    except OSError as error:
        raise CheckpointError(f"a checkpoint in {place}: cannot be written: {error}") from error


@contextlib.contextmanager
def _alone(place: Path, timeout_s: float) -> Iterator[None]:
    """No other process writes there meanwhile."""
    lock = os.open(place / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        end = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise DeadlineError(f"{place}: another process has been writing for {timeout_s:g} s") from None
                time.sleep(LOCK_AGAIN_S)
        yield
    finally:
        os.close(lock)


def _clear(place: Path) -> None:
    """Remove what others left behind who died while they wrote."""
    for left in place.iterdir():
        if left.name.startswith(_UNFINISHED):
            shutil.rmtree(left)


def _fill(place: Path, cut: CutSource, shard_bytes: int) -> None:
    """Write the files of a cut, the manifest last."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    written = Manifest(created, cut.at, cut.optimizer)
    layout = _layout(cut.records, shard_bytes)
    for record in cut.records:
        if record.key in written.keys:
            raise CheckpointError(f"key {record.key!r}: the cut has it twice")
        where = {name: Where(layout[record.key, name], tensor_name(record.key, name), 0) for name in record.arrays}
        written.keys[record.key] = Stored(record, where)
    tensors: dict[str, list[Tensor]] = {}
    missing: dict[str, int] = {}  # elements by file
    for stored in written.keys.values():
        for name, at in stored.where.items():
            tensors.setdefault(at.file, []).append(stored.tensor(name))
            missing[at.file] = missing.get(at.file, 0) + stored.record.spec.cut.items
    files: dict[str, TensorFile] = {}
    crcs: dict[str, dict[str, int]] = {}

    def finish(name: str) -> None:
        file = files.pop(name)
        file.close()
        crcs[name] = file.crc
        written.files[name] = File(file.nbytes, file.header_crc)

    try:
        for part in cut.parts():
            for name, elements in part.arrays.items():
                at = written.keys[part.record.key].where[name]
                if at.file not in files:
                    files[at.file] = TensorFile(place / at.file, tensors[at.file])
                files[at.file].append(at.tensor, elements)
                missing[at.file] -= elements.size
        for name in tensors:
            if missing[name] or name not in files:
                raise CheckpointError(f"{name}: {missing[name]} elements have not come")
            finish(name)
    finally:
        for file in files.values():
            file.close(sync=False)
    for key, stored in written.keys.items():
        found = {name: replace(at, crc32=crcs[at.file][at.tensor]) for name, at in stored.where.items()}
        written.keys[key] = Stored(stored.record, found)
    with open(place / manifest.NAME, "x", encoding="utf-8") as text:
        text.write(written.dump())
        text.flush()
        os.fsync(text.fileno())


def _layout(records: Sequence[KeyRecord], shard_bytes: int) -> dict[tuple[object, str], str]:
    """Which file has which array: values and optimizer states apart, in files of about the same size."""
    layout: dict[tuple[object, str], str] = {}
    number, size = {"values": 1, "states": 1}, {"values": 0, "states": 0}
    for record in records:
        for name, dtype in record.arrays.items():
            kind = "values" if name == VALUE else "states"
            nbytes = record.spec.cut.items * dtype_named(dtype).itemsize
            if size[kind] and size[kind] + nbytes > shard_bytes:
                number[kind] += 1
                size[kind] = 0
            size[kind] += nbytes
            layout[record.key, name] = f"{kind}-{number[kind]:05d}.safetensors"
    return layout


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
