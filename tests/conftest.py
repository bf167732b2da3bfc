"""Every test leaves the process as it found it: no thread, no child, no shared-memory segment more."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import simulated
from tests.kernels import on_cpu

PATIENCE_S = 10.0
SHARED_MEMORY = Path("/dev/shm")
OURS = ("kvstore", "engine")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--simulation-seeds", type=int, default=20, help="seeds for the simulation of a cluster")


def pytest_configure(config: pytest.Config) -> None:
    """Tests start hundreds of processes: they keep the bytecode of our modules for each other."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def threads() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name.startswith(OURS)}


def segments() -> set[str]:
    return {path.name for path in SHARED_MEMORY.glob("kvstore*")} if SHARED_MEMORY.is_dir() else set()


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()) if os.path.isdir("/proc") else set()


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    before = threads(), segments(), children()
    yield
    end = time.monotonic() + PATIENCE_S
    while True:
        left = [now - then for now, then in zip((threads(), segments(), children()), before, strict=True)]
        if not any(left):
            return
        if time.monotonic() > end:
            pytest.fail(f"left behind: threads {left[0]}, segments {left[1]}, children {left[2]}")
        gc.collect()
        time.sleep(0.01)  # between looks


@pytest.fixture
def simulated_cupy() -> Iterator[Callable[..., Any]]:
    """``simulated_cupy(devices=2, seed=0)``: a CuPy until the test ends; see :mod:`tests.gpu.simulated`."""
    if not on_cpu.COMPILER:
        pytest.skip("there is no g++ for the simulated CuPy's kernels")
    with contextlib.ExitStack() as installed:

        def install(**options: Any) -> Any:
            installed.enter_context(simulated.install(**options))
            import cupy

            return cupy

        yield install
