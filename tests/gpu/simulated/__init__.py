"""A CuPy for machines without a GPU: its interface, on memory of the host, and devices as unkind as they may be.

::

    with simulated.install(devices=2, seed=7) as machine:
        import cupy
        ...
    def test_it(simulated_cupy): cupy = simulated_cupy(devices=2)   # the fixture, in tests/conftest.py

What ``import cupy`` gives in between is marked ``kvstore_simulated``, and ``cupy.machine`` is the :class:`Machine`:
what has been launched, copied and waited for can be read there (``launches``, ``copies``, ``copied_bytes``,
``synchronised``, ``devices[0].arena.bytes_max``), and ``with machine.standstill():`` stops all devices, so that it is
an error to wait for one. As with CUDA:

* A kernel or copy is done when its stream comes to it: lazily, in random, seeded order as far as streams and events
  allow. The null stream and blocking streams of its device wait for each other, those made with
  ``non_blocking=True`` do not.
* A copy from pageable memory has read it when the call returns, one to it has been done. Pinned memory (allocated or
  registered) is read and written when the copy's turn comes, and a copy that then finds it no longer pinned fails.
* Freed memory is given anew to who asks on the same stream, and what was in it is overwritten; freed pinned memory
  at once.
* A kernel that touches memory of a peer without peer access fails, and with it every later call on that device.
  CuPy's own kernels enable it, with a PerformanceWarning.
* Waiting for what never comes raises :class:`Lost`.

``machine`` is CUDA's part; ``runtime`` and ``cuda`` are ``cupy.cuda``; ``array`` and ``functions`` are the arrays;
``compiled`` runs CUDA sources; ``others`` has arrays as PyTorch's and JAX's. The kernels are done by the thread that
happens to call, under one lock.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np

import engine
from tests.engine.queues import Lost
from tests.gpu.simulated import array, cuda, dlpack, functions, nccl, runtime
from tests.gpu.simulated.compiled import RawModule
from tests.gpu.simulated.machine import HOST, Failure, Machine

__all__ = ["HOST", "Failure", "Lost", "Machine", "install"]

ROOTS = ("cupy", "cupyx", "cupy_backends")
HOLDERS = ("kvstore.kernels.cuda.gpu",)  # modules that hold what they have made of CuPy
CACHES = ("kvstore.arrays", "kvstore.comm", "kvstore.kernels.cuda")  # functions that do


@contextmanager
def install(
    devices: int = 2,
    seed: int = 0,
    peers: Callable[[int, int], bool] = lambda one, other: True,
    memory_bytes: int = 1 << 30,
    version: str = "14.0.0",
) -> Iterator[Machine]:
    """Within the block ``import cupy`` gives the simulated one, on a new machine.

    Args:
        devices: how many GPUs.
        seed: of what happens when.
        peers: ``peers(one, other)``: can one reach the other's memory?
        memory_bytes: of each device.
        version: of CuPy; 13 knows no bfloat16 and wraps foreign streams otherwise.

    Raises:
        Failure: at the end, if work of a device failed and nobody was told.
    """
    machine = Machine(devices, seed, peers, memory_bytes, version)
    before = _taken_out()
    runtime._machine[:] = [machine]
    sys.modules.update(_modules(machine))
    failed = True
    try:
        yield machine
        failed = False
    finally:
        try:
            engine.close()
            with contextlib.suppress(*[Exception] * failed):  # else the first error would be hidden
                machine.close()
        finally:
            cuda._watcher.forget()
            dlpack.sweep()
            _taken_out()
            runtime._machine.clear()
            _put_back(before)


def _taken_out() -> dict[str, ModuleType]:
    """Take the modules of CuPy, and what has been made of them, out of ``sys.modules``."""
    engine.close()
    names = [name for name in sys.modules if name.partition(".")[0] in ROOTS or name in HOLDERS]
    for name in HOLDERS:
        parent, _, own = name.rpartition(".")
        if own in vars(sys.modules.get(parent, ModuleType(parent))):
            delattr(sys.modules[parent], own)
    for name, module in list(sys.modules.items()):
        if name.startswith(CACHES):
            for value in list(vars(module).values()):
                if callable(getattr(value, "cache_clear", None)):
                    value.cache_clear()
    return {name: sys.modules.pop(name) for name in names}


def _put_back(modules: dict[str, ModuleType]) -> None:
    sys.modules.update(modules)
    for name in HOLDERS:
        if name in modules:
            parent, _, own = name.rpartition(".")
            setattr(sys.modules[parent], own, modules[name])


def _modules(machine: Machine) -> dict[str, ModuleType]:
    """The modules by name."""
    cupy = _module("cupy", functions.MODULE, ndarray=array.ndarray, RawModule=RawModule, __version__=machine.version)
    vars(cupy).update(kvstore_simulated=True, machine=machine, ufunc=functions.ufunc)
    for name in (
        *("bool_", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32"),
        *("float64", "complex64", "complex128", "dtype", "newaxis", "inf", "nan", "pi", "result_type", "can_cast"),
        *("promote_types", "iinfo", "finfo", "integer", "floating", "generic", "broadcast_shapes"),
    ):
        setattr(cupy, name, getattr(np, name))
    parts: dict[str, dict[str, Any]] = {
        "cupy.cuda": {name: getattr(cuda, name) for name in cuda.NAMES},
        "cupy.cuda.runtime": {name: getattr(runtime, name) for name in runtime.EXPORTED},
        "cupy.cuda.nccl": {name: value for name, value in vars(nccl).items() if name[0] != "_"},
        "cupy.cuda.device": {"Device": cuda.Device},
        "cupy.cuda.stream": {"Stream": cuda.Stream, "Event": cuda.Event},
        "cupy.cuda.memory": {"OutOfMemoryError": cuda.OutOfMemoryError, "MemoryPointer": cuda.MemoryPointer},
        "cupy.cuda.pinned_memory": {"PinnedMemoryPointer": cuda.PinnedMemoryPointer},
        "cupy._util": {"PerformanceWarning": array.PerformanceWarning},
        "cupy.random": {"default_rng": functions.Generator},
        "cupyx": {"empty_pinned": functions.empty_pinned, "zeros_pinned": functions.zeros_pinned},
    }
    modules = {"cupy": cupy}
    for name, values in parts.items():
        modules[name] = _module(name, values)
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(modules[parent], own, modules[name])
    return modules


def _module(name: str, *values: dict[str, Any], **more: Any) -> ModuleType:
    module = ModuleType(name, "Simulated, see tests/gpu/simulated.")
    module.__path__ = []  # type: ignore[attr-defined]
    for each in (*values, more):
        vars(module).update(each)
    return module


array._operators()
