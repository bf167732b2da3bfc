"""How a job scales: the same step with 1, 2, 4 ... workers on this machine.

Compute is emulated: a worker sleeps, as one does that waits for a GPU, so what is measured is what the
store adds to it, and how much of its work it hides behind the compute. The sleep is spread over the
parameters in backward order, by size, and each gradient is pushed when its share of the sleep is over.

``python -m kvstore.bench.scaling`` with arguments is one worker; :func:`measure` starts it.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np

import kvstore
from kvstore.bench.models import MODELS
from kvstore.errors import KVStoreError

WARM_UP = 3
BAR_WIDTH = 16
RUN_TIMEOUT_S = 600


def measure(
    counts: list[int],
    *,
    servers: int,
    model: str,
    compute_ms: float,
    steps: int,
    batch: int,
    consistency: str,
) -> list[dict[str, Any]]:
    """One row per number of workers: step_ms (median), samples_per_s, efficiency against one worker's.

    Raises:
        KVStoreError: a run failed; carries what it said.
    """
    rows: list[dict[str, Any]] = []
    for count in counts:
        worker = [sys.executable, "-m", "kvstore.bench.scaling", model, str(compute_ms), str(steps), consistency]
        cluster = [sys.executable, "-m", "kvstore", "run", "-w", str(count), "-s", str(servers), "--", *worker]
        done = subprocess.run(cluster, capture_output=True, text=True, timeout=RUN_TIMEOUT_S)
        if done.returncode:
            raise KVStoreError(f"scaling with {count} workers failed: {done.stderr.strip()[-500:]}")
        prefix = "worker 0 | "
        said = [line.removeprefix(prefix) for line in done.stdout.splitlines() if line.startswith(prefix + "{")]
        result = json.loads(said[-1])
        rate = count * batch / result["step_ms"] * 1000
        single = rows[0]["samples_per_s"] / rows[0]["workers"] if rows else rate / count
        rows.append(
            {"workers": count, "samples_per_s": rate, "efficiency": rate / count / single, "servers": servers, **result}
        )
    return rows


def show(rows: list[dict[str, Any]], plot: str | None = None) -> None:
    """A table and a plot of it, as text, and as a PNG when ``plot`` names a file."""
    from rich.console import Console
    from rich.table import Table

    first = rows[0]
    table = Table(
        title=f"{first['model']}: {first['megabytes']:.1f} MB in {first['keys']} keys, {first['servers']} servers, "
        f"{first['compute_ms']:g} ms of compute"
    )
    for column in ("workers", "samples/s", "ideal", "efficiency", "step ms"):
        table.add_column(column, justify="right")
    table.add_column("", no_wrap=True, min_width=BAR_WIDTH)
    single = first["samples_per_s"] / first["workers"]
    top = single * rows[-1]["workers"]
    for row in rows:
        bar = "█" * max(1, round(BAR_WIDTH * row["samples_per_s"] / top))
        ideal = single * row["workers"]
        table.add_row(
            str(row["workers"]),
            f"{row['samples_per_s']:,.0f}",
            f"{ideal:,.0f}",
            f"{row['efficiency']:.0%}",
            f"{row['step_ms']:.1f}",
            bar,
        )
    Console().print(table)
    if plot is not None:
        _plot(rows, single, plot)


def _plot(rows: list[dict[str, Any]], single: float, path: str) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise KVStoreError("--plot: expected matplotlib; install kvstore[examples]") from error
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    counts = [row["workers"] for row in rows]
    axes.plot(counts, [row["samples_per_s"] for row in rows], "o-", label="measured")
    axes.plot(counts, [single * count for count in counts], "--", label="ideal")
    axes.set(
        xlabel="workers", ylabel="samples/s", title=f"{rows[0]['model']}, {rows[0]['compute_ms']:g} ms compute per step"
    )
    axes.legend()
    figure.savefig(path, dpi=120)


def work(model: str, compute_ms: float, steps: int, consistency: str) -> dict[str, Any]:
    """One worker's part; its figures."""
    shapes = MODELS[model]()
    keys = list(shapes)
    values = {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}
    total = sum(math.prod(shape) for shape in shapes.values())
    pauses = {key: compute_ms / 1000 * math.prod(shape) / total for key, shape in shapes.items()}
    times = []
    with kvstore.create("dist", cluster_consistency=consistency) as kv:
        kv.set_optimizer(kvstore.optim.SGD(lr=0.1, momentum=0.9))
        kv.init(keys, list(values.values()))
        gradients = {key: np.full(shape, 1e-3, np.float32) for key, shape in shapes.items()}
        for _ in range(WARM_UP + steps):
            kv.barrier()
            start = time.perf_counter()
            owed = 0.0
            handles = []
            for position, key in reversed(list(enumerate(keys))):
                owed += pauses[key]
                if owed > 1e-3 or position == 0:
                    time.sleep(owed)
                    owed = 0.0
                handles.append(kv.pushpull(key, gradients[key], values[key], priority=-position))
            for handle in handles:
                handle.result()
            times.append((time.perf_counter() - start) * 1000)
        return {
            "model": model,
            "keys": len(keys),
            "megabytes": total * 4 / 1e6,
            "compute_ms": compute_ms,
            "step_ms": statistics.median(times[WARM_UP:]),
            "step_ms_min": min(times[WARM_UP:]),
            "step_ms_max": max(times[WARM_UP:]),
        }


if __name__ == "__main__":
    name, milliseconds, count, rule = sys.argv[1:]
    print(json.dumps(work(name, float(milliseconds), int(count), rule)), flush=True)
