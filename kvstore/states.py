"""Optimizer states in a file: safetensors, with the keys and steps in its metadata."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from kvstore.arrays import Array
from kvstore.errors import OptimizerError
from kvstore.protocol.pieces import Key

_FORMAT = "kvstore optimizer states 1"

States = dict[Key, tuple[int, dict[str, Array]]]  # key -> (updates so far, flat arrays by name)


def save(path: str | os.PathLike[str], states: States) -> None:
    """Write ``states`` to ``path``; a crash in the middle leaves what was there."""
    tensors: dict[str, Array] = {}
    index = []
    for key, (step, arrays) in states.items():
        names = {}
        for name, array in arrays.items():
            names[name] = str(len(tensors))
            tensors[names[name]] = array.reshape(-1)
        index.append([key, step, names])
    target = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    try:
        save_file(tensors, temporary, {"format": _FORMAT, "index": json.dumps(index)})
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def load(path: str | os.PathLike[str]) -> States:
    """Read what :func:`save` wrote. Raises OptimizerError when the file is something else."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise OptimizerError(
                    f"optimizer states: expected a file of format {_FORMAT!r}, got {metadata.get('format')!r}"
                )
            index = json.loads(metadata["index"])
            return {
                key: (step, {name: file.get_tensor(tensor) for name, tensor in names.items()})
                for key, step, names in index
            }
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, OptimizerError):
            raise
        raise OptimizerError(f"optimizer states: expected a file that save_optimizer_states wrote; {error}") from error
