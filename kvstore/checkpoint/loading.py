"""Brings a store to what a checkpoint has: keys, values, optimizer, its states, versions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvstore import optim
from kvstore.checkpoint.reading import Checkpoint
from kvstore.errors import CheckpointError, DtypeError, ShapeError

if TYPE_CHECKING:
    from kvstore.store import KVStore


def load(store: KVStore, path: str | os.PathLike[str]) -> Path:
    """See :meth:`kvstore.KVStore.load_checkpoint`."""
    checkpoint = Checkpoint(path)
    entries = store._entries
    missing = [key for key in entries if key not in checkpoint.manifest.keys]
    if missing:
        raise CheckpointError(f"{checkpoint.path}: expected every key of this store, it lacks {missing[:5]!r}")
    for record in checkpoint.records:
        entry = entries.get(record.key)
        if entry is None:
            continue
        if entry.shape != record.spec.shape:
            raise ShapeError(f"load of key {record.key!r}: expected shape {entry.shape}, got {record.spec.shape}")
        if entry.dtype.name != record.spec.dtype:
            raise DtypeError(f"load of key {record.key!r}: expected dtype {entry.dtype.name}, got {record.spec.dtype}")
    if checkpoint.optimizer is not None:
        store.set_optimizer(optim.from_wire(checkpoint.optimizer), replace=True)
    for record in checkpoint.records:
        if record.key not in entries:
            spec = record.spec
            value = np.asarray(checkpoint.array(record.key)).reshape(spec.shape)
            there: dict[str, Any] = {"cluster_consistency": spec.cluster_model, "participants": spec.participants}
            in_cluster = store.type.startswith("dist")
            store.init(record.key, value, device_consistency=spec.device_model, **(there if in_cluster else {}))
    store.barrier()  # nobody pushes any more what was pushed before
    store._take(checkpoint)
    store.barrier()
    return checkpoint.path
