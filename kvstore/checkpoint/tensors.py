"""Safetensors files, written in parts as they come and read with a look at every byte.

The format (https://huggingface.co/docs/safetensors): eight bytes with the length of a JSON header, the header with
dtype, shape and offsets of each tensor, then the tensors. The library writes whole tensors from memory only; here they
come in pieces, from several servers.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvstore.arrays import Array, dtype_named
from kvstore.errors import CheckpointError

ALIGNMENT = 64  # of the first tensor
HEADER_BYTES_MAX = 100_000_000  # as in the library

TYPES = {
    "bool": "BOOL",
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"F{bits}" for bits in (16, 32, 64)},
    "bfloat16": "BF16",
}
NAMES = {code: name for name, code in TYPES.items()}


@dataclass(frozen=True, slots=True)
class Tensor:
    """What a file is to hold under a name."""

    name: str
    dtype: str  # NumPy's name
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * dtype_named(self.dtype).itemsize

    def header(self, start: int) -> dict[str, Any]:
        """Its entry in the file's header. What the format has no dtype for are bytes there."""
        code, shape = TYPES.get(self.dtype), list(self.shape)
        if code is None:
            code, shape = "U8", [self.nbytes]
        return {"dtype": code, "shape": shape, "data_offsets": [start, start + self.nbytes]}


class TensorFile:
    """A new file of tensors, each of which is written from its first byte to its last.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, tensors: Sequence[Tensor]) -> None:
        header: dict[str, Any] = {}
        start = 0
        for tensor in tensors:
            header[tensor.name] = tensor.header(start)
            start += tensor.nbytes
        packed = json.dumps(header, separators=(",", ":")).encode()
        packed += b" " * (-(8 + len(packed)) % ALIGNMENT)
        begin = len(packed).to_bytes(8, "little") + packed
        self.name = path.name
        self.nbytes = len(begin) + start
        self.header_crc = zlib.crc32(begin)
        self.crc = {tensor.name: 0 for tensor in tensors}
        self._at = {name: len(begin) + entry["data_offsets"][0] for name, entry in header.items()}
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._write(begin, 0)

    def __repr__(self) -> str:
        return f"<TensorFile {self.name}: {len(self.crc)} tensors, {self.nbytes} bytes>"

    def append(self, name: str, elements: Array) -> None:
        """The next elements of a tensor."""
        data = np.ascontiguousarray(elements).reshape(-1).view(np.uint8).data
        self.crc[name] = zlib.crc32(data, self.crc[name])
        self._write(data, self._at[name])
        self._at[name] += data.nbytes

    def close(self, *, sync: bool = True) -> None:
        """It is complete. ``sync``: and on the disk when this returns."""
        try:
            if sync:
                os.fsync(self._fd)
        finally:
            os.close(self._fd)

    def _write(self, data: bytes | memoryview, at: int) -> None:
        view = memoryview(data)
        while view.nbytes:
            count = os.pwrite(self._fd, view, at)
            view, at = view[count:], at + count


class TensorReader:
    """A file of tensors, mapped; what is read is compared with its checksum first.

    Args:
        nbytes, header_crc: what the manifest says of it.

    Raises:
        CheckpointError: it is missing, of another size, or its header is damaged.
    """

    def __init__(self, path: Path, nbytes: int, header_crc: int) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            if size != nbytes:
                raise CheckpointError(f"{path}: expected {nbytes} bytes, it has {size}")
            self._bytes: Array = np.memmap(path, np.uint8, "r")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        length = int.from_bytes(self._bytes[:8].tobytes(), "little")
        if not 0 < length <= min(HEADER_BYTES_MAX, nbytes - 8):
            raise CheckpointError(f"{path}: its header is damaged")
        begin = self._bytes[: 8 + length].tobytes()
        if zlib.crc32(begin) != header_crc:
            raise CheckpointError(f"{path}: its header is damaged (the checksum differs)")
        self._data = self._bytes[8 + length :]
        self._header: dict[str, Any] = json.loads(begin[8:])
        self._checked: set[str] = set()

    def __repr__(self) -> str:
        return f"<TensorReader {self.path.name}: {len(self._header)} tensors>"

    def read(self, tensor: Tensor, crc: int) -> Array:
        """The tensor, flat, read-only and in the file; it has been compared with its checksum.

        Raises:
            CheckpointError: it is missing, damaged, or of another dtype or size.
        """
        entry = self._header.get(tensor.name)
        if not isinstance(entry, dict):
            raise CheckpointError(f"{self.path}: expected a tensor {tensor.name!r}, it has none")
        start = entry["data_offsets"][0]
        if entry != tensor.header(start):
            raise CheckpointError(f"{self.path}: tensor {tensor.name!r} is not {tensor.dtype} of shape {tensor.shape}")
        data = self._data[start : start + tensor.nbytes]
        if tensor.name not in self._checked:
            if data.nbytes != tensor.nbytes or zlib.crc32(data.data) != crc:
                raise CheckpointError(f"{self.path}: tensor {tensor.name!r} is damaged (the checksum differs)")
            self._checked.add(tensor.name)
        return data.view(dtype_named(tensor.dtype))
