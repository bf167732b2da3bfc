"""The suite ``start``: how long a system takes to be up, and its first round beside the steady one."""

from __future__ import annotations

import statistics
import time

from kvstore.bench.cases import PEERS, Case, Line, Shapes, System
from kvstore.bench.driver import Driver
from kvstore.bench.statistic import Rows, row
from kvstore.errors import KVStoreError

STEADY_AFTER = 3
STEADY = 5


def measure(driver: Driver, shapes: Shapes, label: str, systems: dict[str, System]) -> Rows:
    """Rows for starting, the first round, and the steady round; each repeat starts every system anew."""
    samples: dict[str, list[float]] = {}
    errors: dict[str, str] = {}
    able = {name: system for name, system in systems.items() if driver.interpreters.has(system)}
    for _ in range(driver.repeats):
        for name, system in able.items():
            case = Case(system, "buckets" if system.kind == "gloo" and len(shapes) > 1 else "pushpull", shapes)
            begin = time.perf_counter()
            try:
                with driver.fresh(system) as running:
                    took = {"up": time.perf_counter() - begin}
                    driver.tell(f"start: {name}")
                    running.prepare("first", case, "start")
                    took["first"] = running.rounds("first", case, 1).times[0] * 1e3
                    running.check("first")
                    steady = running.rounds("first", case, STEADY_AFTER + STEADY).times[STEADY_AFTER:]
                    took["steady"] = statistics.median(steady) * 1e3
            except KVStoreError as error:
                errors |= {f"{name} {what}": str(error) for what in ("up", "first", "steady")}
                continue
            for what, figure in took.items():
                samples.setdefault(f"{name} {what}", []).append(figure)
    rows: Rows = []
    for name in ("shared memory", "tcp"):
        for what, title, unit in (
            ("up", "processes started and connected", "s"),
            ("first", f"first round, {label}", "ms"),
            ("steady", f"steady round, {label}", "ms"),
        ):
            beside = {peer: f"{peer} {what}" for peer in PEERS if peer in able}
            line = Line(
                f"{title}, {name}",
                f"{name} {what}",
                f"{name} steady" if what == "first" else None,
                "steady round",
                beside,
            )
            rows.append(row("start", line, samples, errors, unit))
    return rows
