"""The suite ``memory``: memory of each role over the value's size, and processor seconds per GB moved."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator

from kvstore.bench.cases import PEERS, Case, Line, Shapes, System
from kvstore.bench.driver import Driver
from kvstore.bench.statistic import Rows, row
from kvstore.bench.systems import Running, cpu_seconds, memory_bytes
from kvstore.errors import KVStoreError

LOOK_EVERY_S = 0.02
ROUNDS = 10
WHAT = {
    "worker": "private memory of a worker",
    "server": "private memory of the server",
    "shared": "shared segments, all roles",
}
OWN = {"worker": 2.0, "server": 1.0}  # values that a role holds in any case: gradient and result; the value


def measure(driver: Driver, shapes: Shapes, label: str, systems: dict[str, System], loop: System) -> Rows:
    """Rows per role: memory that was added by a value and its rounds, at the peak; and processor time."""
    samples: dict[str, list[float]] = {}
    errors: dict[str, str] = {}
    able = {name: system for name, system in systems.items() if driver.interpreters.has(system)} | {"loop": loop}
    for _ in range(driver.repeats):
        for name, system in able.items():
            try:
                figures = _once(driver, system, shapes)
                if name == "tcp":  # only there does the server keep pushes whose round is not complete
                    figures["late"] = _once(driver, system, shapes, "late")["server"]
                for what, figure in figures.items():
                    samples.setdefault(f"{name} {what}", []).append(figure)
            except KVStoreError as error:
                errors |= {f"{name} {what}": str(error) for what in (*WHAT, "late", "cpu")}
    for role, values in OWN.items():
        samples[f"values of a {role}"] = [values]
    rows: Rows = []
    for name in ("shared memory", "tcp"):
        for what, title in WHAT.items():
            beside = {peer: f"{peer} {what}" for peer in PEERS if peer in able}
            limit = f"values of a {what}" if what in OWN else None
            line = Line(f"{title}, {label}, {name}", f"{name} {what}", limit, "values it holds", beside)
            rows.append(row("memory", line, samples, errors, "x"))
        if name == "tcp":
            title = f"{WHAT['server']}, {label}, tcp, one worker late"
            line = Line(title, "tcp late", "values of a server", "values it holds")
            rows.append(row("memory", line, samples, errors, "x"))
        beside = {peer: f"{peer} cpu" for peer in PEERS if peer in able}
        line = Line(f"processor time per GB, {label}, {name}", f"{name} cpu", "loop cpu", "bare pyzmq", beside)
        rows.append(row("memory", line, samples, errors, "s"))
    return rows


def _once(driver: Driver, system: System, shapes: Shapes, operation: str = "pushpull") -> dict[str, float]:
    case = Case(system, operation, shapes)
    with driver.fresh(system) as running:
        driver.tell(f"memory: {system.kind}")
        with _peaks(running) as peaks:
            running.prepare("memory", case, "memory")
            running.rounds("memory", case, ROUNDS)
        servers = running.pids().get("server", [])
        before = cpu_seconds(servers)
        cpu_s = running.rounds("memory", case, ROUNDS).cpu_s
        cpu_s += cpu_seconds(servers) - before
    found = {what: peak / case.bytes for what, peak in peaks.items()}
    found["cpu"] = cpu_s / (ROUNDS * system.workers * 2 * case.bytes / 1e9)
    return found


def _look(pids: dict[str, list[int]]) -> dict[str, float]:
    """Bytes: private ones per process of a role, the largest; shared ones in all, each page once."""
    found = {"shared": 0.0}
    for role, ids in pids.items():
        seen = [memory_bytes(pid) for pid in ids]
        found[role] = max((one["private"] for one in seen), default=0)
        found["shared"] += math.fsum(one["shared"] for one in seen)
    return found


@contextlib.contextmanager
def _peaks(running: Running) -> Iterator[dict[str, float]]:
    """What was added at most during the block; looks again and again."""
    pids = running.pids()
    first = _look(pids)
    peaks = dict.fromkeys(first, 0.0)
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(LOOK_EVERY_S):
            for what, now in _look(pids).items():
                peaks[what] = max(peaks[what], now - first[what])

    thread = threading.Thread(target=watch, name="bench-memory")
    thread.start()
    try:
        yield peaks
    finally:
        stop.set()
        thread.join()
