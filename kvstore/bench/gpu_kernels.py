"""The suite ``gpu``, kernels: how near they come to the rate at which the device copies in its own memory.

Times are the device's own, of some calls one after the other, so that what the host needs to start them is hidden.
Kernel and copy are measured in turn. The copy is the limit for as many bytes as the kernel reads and writes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kvstore import kernels
from kvstore.arrays import Array, copy_to, gpu
from kvstore.bench.cases import Line
from kvstore.bench.kernel_cases import KERNEL_CASES, Call
from kvstore.bench.statistic import Rows, row

WARM_UP = 3
COLUMNS = 32  # of a row
TABLE = 4  # times as many rows as are added
MANY, SMALL = 1000, 1000  # arrays that become one, and elements of each
WANTED = {  # of the copy's rate, at least
    **dict.fromkeys(("merge of 4", "SGD", "SGD momentum", "Adam"), 0.85),
    **{name: 0.7 for name in KERNEL_CASES if "compress" in name},
}

Work = tuple[Call, float]  # a kernel, and how many bytes it reads and writes


def measure(elements: int, count: int, repeats: int, times: int) -> Rows:
    """One row per kernel, on arrays of so many float32, and on so many rows of a table; ``times`` calls per sample."""
    measured = functools.partial(_row, repeats, times)
    cupy, rng = gpu.module(), np.random.default_rng(0)
    most = max(case.arrays for case in KERNEL_CASES.values())
    memory = [cupy.asarray(np.abs(rng.standard_normal(elements, np.float32))) for _ in range(most)]
    size = f"{4 * elements / 1e6:.3g} MB"
    rows = []
    for name, case in KERNEL_CASES.items():
        work = case.make(kernels, memory), 4.0 * elements * (case.read + case.written)
        title = f"{name} x {size}" if name == "merge of 4" else f"{name}, {size}"
        rows.append(measured(title, work, memory, {}, WANTED.get(name)))
    norm = (lambda: kernels.norm(memory[:1])), 4.0 * elements
    rows.append(measured(f"norm, {size}", norm, memory, {}))
    return rows + _small(measured) + _table(count, measured)


def _small(measured: Callable[..., dict[str, Any]]) -> Rows:
    """Many small arrays at once."""
    cupy = gpu.module()
    arrays = [cupy.ones(SMALL, np.float32) for _ in range(MANY)]
    flats = [cupy.empty(MANY * SMALL, np.float32) for _ in range(2)]
    nbytes, size = 2.0 * flats[0].nbytes, f"{MANY:,} arrays of {SMALL * 4 / 1e3:g} KB"
    groups = [[array] * 4 for array in arrays]
    beside = {"CuPy": lambda: cupy.concatenate(arrays, out=flats[0])}
    return [
        measured(f"concatenate {size}", ((lambda: kernels.concatenate(arrays, flats[0])), nbytes), flats, beside),
        measured(f"split into {size}", ((lambda: kernels.split(flats[0], arrays)), nbytes), flats, {}),
        measured(f"sums of 4 of {size}", ((lambda: kernels.merge_many(groups, flats[0])), nbytes), flats, {}),
    ]


def _table(count: int, measured: Callable[..., dict[str, Any]]) -> Rows:
    """Rows in any order, beside what CuPy has for them."""
    cupy, rng = gpu.module(), np.random.default_rng(0)
    here = rng.integers(0, TABLE * count, count)
    table, ids = cupy.zeros((TABLE * count, COLUMNS), np.float32), cupy.asarray(here)
    some, other = cupy.ones((count, COLUMNS), np.float32), cupy.empty((count, COLUMNS), np.float32)
    size, nbytes = f"{count:,} rows of {COLUMNS}", float(some.nbytes)
    adds = (lambda: kernels.scatter_add(table, ids, some)), 3 * nbytes
    adds_here = (lambda: kernels.scatter_add(table, here, some)), 3 * nbytes
    gathers = (lambda: kernels.gather(table, ids, other)), 2 * nbytes
    sums = (lambda: kernels.deduplicate(ids, some)), 2 * nbytes
    flat = [some.reshape(-1), other.reshape(-1)]
    beside = {"cupyx.scatter_add": lambda: cupy.add.at(table, ids, some)}  # CuPy's two names for the same
    return [
        measured(f"scatter-add of {size}", adds, flat, beside),
        measured(f"scatter-add of {size}, ids in host memory", adds_here, flat, beside),
        measured(f"gather of {size}", gathers, flat, {"CuPy": lambda: cupy.take(table, ids, 0, other)}),
        measured(f"deduplicate {size}", sums, flat, {}),
    ]


def _row(
    repeats: int,
    times: int,
    title: str,
    work: Work,
    memory: Sequence[Array],
    beside: dict[str, Call],
    wanted: float | None = None,
) -> dict[str, Any]:
    """A kernel beside a copy from the first to the second array, as if of as many bytes."""
    kernel, nbytes = work
    calls = {"kernel": kernel, "copy": lambda: copy_to(memory[0], memory[1]), **beside}
    samples: dict[str, list[float]] = {what: [] for what in calls}
    for call in calls.values():
        device_ms(call, WARM_UP)
    for _ in range(repeats):
        for what, call in calls.items():
            samples[what].append(device_ms(call, times))
    share = nbytes / (2 * memory[0].nbytes)
    samples["copy"] = [share * sample for sample in samples["copy"]]
    more = {} if wanted is None else {"wanted": wanted}
    title += "" if wanted is None else f" (at most {math.ceil(100 / wanted) / 100:.2f} x)"
    line = Line(title, "kernel", "copy", beside={name: name for name in beside}, more=more)
    return row("gpu", line, samples, {})


def device_ms(call: Call, times: int) -> float:
    """Milliseconds of one of some calls, by the clock of the current device."""
    cuda = gpu.module().cuda
    begin, end = cuda.Event(), cuda.Event()
    begin.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    took: float = cuda.get_elapsed_time(begin, end)
    return took / times
