"""The manifest of a checkpoint: what it holds and which file has it, as JSON with a line per key.

What is written here a person may read; what is read here is checked field by field, and nothing is believed that
the checksum at the end does not confirm.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvstore.arrays import dtype_named
from kvstore.checkpoint.cut import VALUE, KeyRecord
from kvstore.checkpoint.tensors import Tensor
from kvstore.errors import CheckpointError, KVStoreError
from kvstore.protocol import wire
from kvstore.protocol.messages import Spec
from kvstore.protocol.pieces import Key

FORMAT = "kvstore checkpoint 1"
NAME = "manifest.json"

_FILE = re.compile(r"(values|states)-\d{5}\.safetensors")


@dataclass(frozen=True, slots=True)
class Where:
    """Where an array lies."""

    file: str
    tensor: str
    crc32: int


@dataclass(frozen=True, slots=True)
class Stored:
    """A key in a checkpoint."""

    record: KeyRecord
    where: dict[str, Where]  # by name, :data:`VALUE` for the value

    def tensor(self, name: str) -> Tensor:
        """What the file has to hold for this array."""
        return Tensor(self.where[name].tensor, self.record.arrays[name], self.record.spec.shape)


@dataclass(frozen=True, slots=True)
class File:
    """A file of the checkpoint."""

    nbytes: int
    header_crc32: int


@dataclass(slots=True)
class Manifest:
    """All that is to be known of a checkpoint, but for the tensors."""

    created: str  # ISO 8601
    at: int  # the cut point, as the cluster counted
    optimizer: dict[str, Any] | None
    keys: dict[Key, Stored] = field(default_factory=dict)
    files: dict[str, File] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<Manifest of {self.created}: {len(self.keys)} keys in {len(self.files)} files>"

    def dump(self) -> str:
        """As text."""
        head: list[tuple[str, Any]] = [
            ("format", FORMAT), ("created", self.created), ("cut_point", self.at), ("optimizer", self.optimizer)
        ]  # fmt: skip
        keys = [_key_row(stored) for stored in self.keys.values()]
        files = {
            name: {"bytes": file.nbytes, "header_crc32": _hex(file.header_crc32)} for name, file in self.files.items()
        }
        crc = _checksum({**dict(head), "keys": keys, "files": files})
        lines = [f"  {json.dumps(name)}: {json.dumps(value)}," for name, value in head]
        lines += ['  "keys": [', ",\n".join(f"    {json.dumps(row)}" for row in keys), "  ],"]
        rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in files.items())
        lines += ['  "files": {', rows, "  },", f'  "checksum": {json.dumps(crc)}']
        return "\n".join(["{", *lines, "}", ""])


def load(text: str, where: str) -> Manifest:
    """What :meth:`Manifest.dump` wrote. ``where`` names it in errors.

    Raises:
        CheckpointError: it is something else, or damaged.
    """
    try:
        content = json.loads(text)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise CheckpointError(f"{where}: expected a manifest of format {FORMAT!r}")
        if content.pop("checksum", None) != _checksum(content):
            raise CheckpointError(f"{where}: it is damaged (the checksum differs)")
        files = {
            _file(name): File(_whole(row["bytes"]), int(row["header_crc32"], 16))
            for name, row in content["files"].items()
        }
        keys = [_stored(row) for row in content["keys"]]
        optimizer = content["optimizer"]
        if optimizer is not None and not isinstance(optimizer, dict):
            raise ValueError("an optimizer")
        for stored in keys:
            for place in stored.where.values():
                if place.file not in files:
                    raise ValueError(f"a file {place.file}")
        return Manifest(
            str(content["created"]),
            _whole(content["cut_point"]),
            optimizer,
            {stored.record.key: stored for stored in keys},
            files,
        )
    except (ValueError, KeyError, TypeError, AttributeError, KVStoreError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{where}: expected a manifest; {type(error).__name__}: {error}") from error


def tensor_name(key: Key, state: str = VALUE) -> str:
    """Under which name a file has this array: the key's, and for the optimizer's with its name behind a slash."""
    name = str(key)
    if name == "__metadata__":  # which the format keeps for itself
        name = "__metadata__ (a key)"
    return name if state == VALUE else f"{name}/{state}"


def _key_row(stored: Stored) -> dict[str, Any]:
    record, spec = stored.record, stored.record.spec

    def place(name: str) -> dict[str, Any]:
        where = stored.where[name]
        return {"file": where.file, "tensor": where.tensor, "crc32": _hex(where.crc32)}

    return {
        "key": record.key,
        "shape": list(spec.shape),
        "dtype": spec.dtype,
        "version": record.version,
        "step": record.step,
        "rounds": {str(rank): round for rank, round in record.rounds.items()},
        "device_consistency": spec.device_model,
        "cluster_consistency": spec.cluster_model,
        "participants": None if spec.participants is None else list(spec.participants),
        "piece_items": spec.piece_items,
        "value": place(VALUE),
        "state": {name: {"dtype": dtype, **place(name)} for name, dtype in record.states.items()},
    }


def _stored(row: Mapping[str, Any]) -> Stored:
    participants = row["participants"]
    shape = _wholes(row["shape"])
    spec = Spec(
        shape,
        str(row["dtype"]),
        max(1, _whole(row["piece_items"])),
        str(row["device_consistency"]),
        str(row["cluster_consistency"]),
        None if participants is None else _wholes(participants),
    )
    states = {str(name): str(state["dtype"]) for name, state in row["state"].items()}
    record = KeyRecord(
        wire.key(row["key"]),
        spec,
        _whole(row["version"]),
        _whole(row["step"]),
        {int(rank): _whole(round) for rank, round in row["rounds"].items()},
        states,
    )
    for dtype in record.arrays.values():
        dtype_named(dtype)
    where = {VALUE: _where(row["value"]), **{name: _where(row["state"][name]) for name in states}}
    return Stored(record, where)


def _where(row: Mapping[str, Any]) -> Where:
    return Where(_file(row["file"]), str(row["tensor"]), int(row["crc32"], 16))


def _file(name: Any) -> str:
    if not isinstance(name, str) or _FILE.fullmatch(name) is None:
        raise ValueError(f"a file of this checkpoint, not {name!r}")
    return name


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"a whole number, not {value!r}")
    return value


def _wholes(values: Sequence[Any]) -> tuple[int, ...]:
    return tuple(_whole(value) for value in values)


def _hex(crc: int) -> str:
    return f"{crc:08x}"


def _checksum(content: Mapping[str, Any]) -> str:
    return _hex(zlib.crc32(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()))
