"""A processor of CUDA kernels that is none: their arithmetic by g++, on NumPy's memory, thread after thread."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from kvstore.kernels.cuda.launches import OPTIONS, Launches, source

COMPILER = shutil.which("g++")
CACHE = Path(__file__).parents[2] / ".pytest_cache" / "kernels"
SHIM = Path(__file__).with_name("on_cpu.cpp")
FLAGS = [*("-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared"), *("-Wall", "-Werror", "-Wno-unknown-pragmas")]
BLOCKS, THREADS = 3, 32  # few, so that threads come round more than once


@functools.cache
def build(code: str, options: tuple[str, ...] = OPTIONS) -> ctypes.CDLL:
    """The kernels of a source for CUDA, as a library, which is kept for the next time: to compile it takes long."""
    assert COMPILER is not None
    command = [COMPILER, *FLAGS, *[option for option in options if option.startswith("-D")]]
    name = hashlib.sha256("\0".join([code, SHIM.read_text(), *command]).encode()).hexdigest()[:20]
    CACHE.mkdir(parents=True, exist_ok=True)
    kept = CACHE / f"{name}.so"
    if not kept.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            (Path(folder) / "kernels.cu").write_text(code)
            built = Path(folder) / "kernels.so"
            subprocess.run([*command, "-I", folder, SHIM, "-o", built], check=True)
            built.replace(kept)
    return ctypes.CDLL(str(kept))


class OnCpu:
    def __init__(self) -> None:
        self.library = build(source())
        self.started: list[str] = []

    def blocks(self) -> int:
        return BLOCKS

    def start(self, kernel: str, blocks: int, work: bytes) -> None:
        self.started.append(kernel)
        aligned = np.frombuffer(work, np.uint64).copy()
        self.library.run(self.library[kernel], blocks, THREADS, ctypes.c_void_p(aligned.ctypes.data))

    def empty(self, shape, dtype):
        return np.empty(shape, dtype)

    def upload(self, array):
        return array.copy()

    def download(self, array):
        return array

    def address(self, array) -> int:
        return array.ctypes.data

    def copy(self, source, target) -> None:
        with np.errstate(all="ignore"):
            np.copyto(target, source, casting="unsafe")

    def as_bytes(self, array):
        first = (ctypes.c_uint8 * 1).from_address(array.ctypes.data)
        bytes_ = np.frombuffer(first, np.uint8)
        return np.lib.stride_tricks.as_strided(bytes_, (*array.shape, array.itemsize), (*array.strides, 1))

    def order(self, ids):
        return np.argsort(ids, kind="stable")

    def positions(self, mask):
        return np.flatnonzero(mask)

    def is_here(self, array) -> bool:
        return False


def launches() -> Launches:
    return Launches(OnCpu())
