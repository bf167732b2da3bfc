"""From a checkpoint to plain arrays in one file, and back: safetensors, and NumPy's npz."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from kvstore.arrays import Array, dtype_named, view
from kvstore.checkpoint import directory
from kvstore.checkpoint.cut import VALUE, CutSource, KeyRecord, Part
from kvstore.checkpoint.manifest import tensor_name
from kvstore.checkpoint.reading import Checkpoint
from kvstore.checkpoint.tensors import NAMES, Tensor, TensorFile
from kvstore.errors import CheckpointError, KVStoreError, OptionError
from kvstore.protocol import wire
from kvstore.protocol.messages import Spec
from kvstore.protocol.pieces import Cut, Key


class _Given(CutSource):
    """Values that come from elsewhere, as a cut in which nothing has been pushed."""

    def __init__(self, values: Mapping[Key, Array]) -> None:
        self._values = values
        self.records = [
            KeyRecord(key, _spec(value), version=0, step=0, rounds={}, states={}) for key, value in values.items()
        ]

    def parts(self) -> Iterator[Part]:
        for record in self.records:
            yield Part(record, 0, {VALUE: self._values[record.key].reshape(-1)})

    def close(self) -> None:
        return


def _spec(value: Array) -> Spec:
    cut = Cut.of(value.size, value.dtype.itemsize)
    return Spec(value.shape, value.dtype.name, cut.piece_items, "sequential", "sequential", None)


def to_safetensors(checkpoint: Checkpoint, target: str | os.PathLike[str]) -> None:
    """Write the values of a checkpoint to one safetensors file, under the keys' names.

    Raises:
        CheckpointError: the checkpoint is damaged, or the file cannot be written.
    """
    place = Path(target)
    unfinished = place.with_name(f".{place.name}.{os.getpid()}")
    tensors = [Tensor(tensor_name(r.key), r.spec.dtype, r.spec.shape) for r in checkpoint.records]
    try:
        try:
            file = TensorFile(unfinished, tensors)
            try:
                for record, tensor in zip(checkpoint.records, tensors, strict=True):
                    file.append(tensor.name, checkpoint.array(record.key))
            finally:
                file.close()
            unfinished.replace(place)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{place}: cannot be written: {error}") from error


def from_file(source: str | os.PathLike[str], target: str | os.PathLike[str], *, int_keys: bool = False) -> Path:
    """Write the arrays of a safetensors or npz file as a checkpoint, the newest of the directory ``target``.

    Args:
        int_keys: the names are whole numbers, and so are the keys.

    Raises:
        CheckpointError: it is no such file, or has something that no store can hold.
        OptionError: a name that is no key.
    """
    arrays = _npz(Path(source)) if Path(source).suffix == ".npz" else _safetensors(Path(source))
    values: dict[Key, Array] = {}
    for name, array in arrays.items():
        try:
            key = wire.key(int(name) if int_keys else name)
        except ValueError:
            kind = "a whole number" if int_keys else "a key"
            raise OptionError(f"{source}: expected every name to be {kind}, got {name!r}") from None
        values[key] = np.ascontiguousarray(view(array, f"array {name!r}"))
    return directory.write(target, _Given(values))


def _npz(source: Path) -> dict[str, Array]:
    try:
        with np.load(source, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{source}: expected an npz file: {error}") from error


def _safetensors(source: Path) -> dict[str, Array]:
    try:
        with safe_open(source, framework="numpy") as file:
            names = list(file.keys())
        data: Array = np.memmap(source, np.uint8, "r")
        length = int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8 : 8 + length].tobytes())
        return {name: _tensor(source, name, header[name], data[8 + length :]) for name in names}
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, KVStoreError):
            raise
        raise CheckpointError(f"{source}: expected a safetensors file: {error}") from error


def _tensor(source: Path, name: str, entry: Mapping[str, object], data: Array) -> Array:
    dtype, shape, offsets = NAMES.get(str(entry["dtype"])), entry["shape"], entry["data_offsets"]
    assert isinstance(shape, list) and isinstance(offsets, list)
    if dtype is None:
        raise CheckpointError(f"{source}: tensor {name!r} is {entry['dtype']}, which no store holds")
    return data[offsets[0] : offsets[1]].view(dtype_named(dtype)).reshape(shape)
