"""Rows of figures as a table, as JSON and as a plot."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import kvstore
from kvstore.bench.cases import PEERS
from kvstore.bench.statistic import Rows
from kvstore.errors import KVStoreError

COMPARED = (*PEERS, "gloo, each tensor", "MXNet local", "MXNet device", "pushpull")  # whose ratio is of interest


def machine() -> dict[str, Any]:
    """What the figures hold for."""
    model = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "kvstore": kvstore.__version__,
    }


def number(value: float) -> str:
    """Three digits, two of small ones; never in exponents."""
    if value >= 100:
        return f"{value:,.0f}"
    digits = 1 if value >= 10 else 2 if value >= 1 else 3 if value >= 0.1 else 4 if value >= 0.01 else 5
    return f"{value:.{digits}f}"


def cells(row: Mapping[str, Any], columns: list[str]) -> list[str]:
    """One line of the table."""
    if "error" in row:
        return [row["case"], "failed", *[""] * (4 + len(columns))]
    limit = times = ""
    if row.get("limit"):
        limit = f"{number(row['limit'])} ({row.get('limit_name', '')})"
        times = f"{row['median'] / row['limit']:.2f}"
    texts = [row["case"], row["unit"], number(row["median"]), f"{number(row['low'])}-{number(row['high'])}"]
    texts += [limit, times]
    for column in columns:
        other = row.get("beside", {}).get(column)
        if other is None:
            texts.append("")
        elif "error" in other:
            texts.append("failed")
        else:
            ratio = f" ({other['ratio']:.2f}x)" if column in COMPARED and other["ratio"] is not None else ""
            texts.append(number(other["median"]) + ratio)
    return texts


def show(rows: Rows) -> None:
    """A table per suite on stdout, as wide as it needs to be."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console.width = 200
    for suite in dict.fromkeys(row["suite"] for row in rows):
        mine = [row for row in rows if row["suite"] == suite]
        columns = list(dict.fromkeys(column for row in mine for column in row.get("beside", {})))
        table = Table(title=suite, title_justify="left")
        table.add_column("case")
        table.add_column("unit")
        for column in ("median", "low-high", "limit", "x limit", *columns):
            table.add_column(column, justify="right")
        for row in mine:
            table.add_row(*cells(row, columns))
        console.print(table)


def save(rows: Rows, path: str, **about: Any) -> None:
    """Everything as JSON."""
    Path(path).write_text(json.dumps({"machine": machine(), **about, "rows": rows}, indent=2) + "\n")


def curves(rows: Rows) -> dict[str, list[tuple[int, float]]]:
    """(bytes, ms) by name: every row that belongs to a curve, and what was measured beside the first one."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if "curve" not in row or "error" in row:
            continue
        found.setdefault(row["curve"], []).append((row["bytes"], row["median"]))
        if row["curve"] == "pushpull":
            if "limit" in row:
                found.setdefault(row["limit_name"], []).append((row["bytes"], row["limit"]))
            for column, other in row["beside"].items():
                if "median" in other:
                    found.setdefault(column, []).append((row["bytes"], other["median"]))
    return found


def plot(rows: Rows, path: str) -> None:
    """Latency and throughput over the size, as a PNG.

    Raises:
        KVStoreError: matplotlib is not installed, or the suite ``sizes`` was not run.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise KVStoreError("--plot: expected matplotlib; install kvstore[examples]") from error
    found = curves(rows)
    if not found:
        raise KVStoreError("--plot: expected the suite sizes among those that run")
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    latency, throughput = figure.subplots(1, 2)
    for name, points in found.items():
        sizes, times = zip(*points, strict=True)
        style = "--" if name in ("copy", "bare pyzmq") else "-"
        latency.plot(sizes, times, "o" + style, label=name, markersize=4)
        throughput.plot(sizes, [s / t / 1e6 for s, t in points], "o" + style, label=name, markersize=4)
    latency.set(xscale="log", yscale="log", xlabel="bytes", ylabel="ms per round", title="latency")
    throughput.set(
        xscale="log", yscale="log", xlabel="bytes", ylabel="value GB/s", title="throughput per worker, one way"
    )
    for axes in (latency, throughput):
        axes.grid(alpha=0.3)
    latency.legend(fontsize="small")
    figure.savefig(path, dpi=120)
