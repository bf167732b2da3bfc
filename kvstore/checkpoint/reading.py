"""A checkpoint on the disk, read key by key; whatever is read has been compared with its checksum."""

from __future__ import annotations

import os
from collections.abc import Iterator

from kvstore.arrays import Array
from kvstore.checkpoint import directory, manifest
from kvstore.checkpoint.cut import VALUE, CutSource, Part
from kvstore.checkpoint.manifest import Stored
from kvstore.checkpoint.tensors import TensorReader
from kvstore.errors import CheckpointError
from kvstore.protocol.pieces import Key


class Checkpoint(CutSource):
    """A checkpoint as the cut that it is of.

    Args:
        path: of a checkpoint, or of a directory of checkpoints, whose newest is meant.

    Raises:
        CheckpointError: there is none, or its manifest is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = directory.find(path)
        at = self.path / manifest.NAME
        try:
            text = at.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{at}: cannot be read: {error}") from error
        self.manifest = manifest.load(text, str(at))
        self.at, self.optimizer = self.manifest.at, self.manifest.optimizer
        self.records = [stored.record for stored in self.manifest.keys.values()]
        self._files: dict[str, TensorReader] = {}

    def __repr__(self) -> str:
        return f"<Checkpoint {self.path}: {len(self.records)} keys>"

    def array(self, key: Key, name: str = VALUE) -> Array:
        """The value of a key, or an array of its optimizer's state: flat, read-only, still in the file.

        Raises:
            CheckpointError: it is damaged; says which file and which tensor.
        """
        stored = self.manifest.keys[key]
        at = stored.where[name]
        return self._file(at.file).read(stored.tensor(name), at.crc32)

    def state(self, key: Key) -> dict[str, Array]:
        """The optimizer's state of a key, as :meth:`array` has it."""
        return {name: self.array(key, name) for name in self.manifest.keys[key].record.states}

    def parts(self) -> Iterator[Part]:
        for record in self.records:
            yield Part(record, 0, {name: self.array(record.key, name) for name in record.arrays})

    def verify(self) -> list[CheckpointError]:
        """Look at every byte; what is damaged."""
        damaged: list[CheckpointError] = []
        for name in self.manifest.files:
            try:
                self._file(name)
            except CheckpointError as error:
                damaged.append(error)
        for stored in self.manifest.keys.values():
            damaged += self._damaged(stored)
        return damaged

    def _damaged(self, stored: Stored) -> Iterator[CheckpointError]:
        for name, at in stored.where.items():
            if at.file not in self._files:
                continue  # which was said
            try:
                self.array(stored.record.key, name)
            except CheckpointError as error:
                yield error

    def close(self) -> None:
        self._files.clear()

    def _file(self, name: str) -> TensorReader:
        reader = self._files.get(name)
        if reader is None:
            said = self.manifest.files[name]
            reader = self._files[name] = TensorReader(self.path / name, said.nbytes, said.header_crc32)
        return reader
