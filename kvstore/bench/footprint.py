"""The suite ``memory``: memory of each role over the value's size, and processor seconds per GB moved."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from dataclasses import replace

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
    "held": "what the server holds",  # privately, and of shared memory what is no worker's gradient
}
LATE = {"worker": "private memory of a worker", "server": "private memory of the server"}
OWN = {"worker": 2.0, "server": 1.0, "held": 1.0}  # values that a role has in any case: gradient and result; the value


def measure(
    driver: Driver, shapes: Shapes, label: str, systems: dict[str, System], loop: System, many_workers: int
) -> Rows:
    """Rows per role: memory that was added by a value and its rounds, at the peak; and processor time."""
    samples: dict[str, list[float]] = {}
    errors: dict[str, str] = {}
    able = {name: system for name, system in systems.items() if driver.interpreters.has(system)} | {"loop": loop}
    many = replace(systems["shared memory"], workers=many_workers)
    for _ in range(driver.repeats):
        for name, system in able.items():
            try:
                figures = _once(driver, system, shapes)
                if name == "tcp":  # only there does the server keep pushes whose round is not complete
                    figures |= {
                        f"late {what}": figure for what, figure in _once(driver, system, shapes, "late").items()
                    }
                if name == "shared memory":
                    figures["many"] = _once(driver, many, shapes)["held"]
                for what, figure in figures.items():
                    samples.setdefault(f"{name} {what}", []).append(figure)
            except KVStoreError as error:
                errors |= {
                    f"{name} {what}": str(error) for what in (*WHAT, *(f"late {w}" for w in LATE), "many", "cpu")
                }
    for role, values in OWN.items():
        samples[f"values of a {role}"] = [values]

    def line(title: str, subject: str, what: str) -> Line:
        beside = {peer: f"{peer} {what}" for peer in PEERS if peer in able and f"{peer} {what}" in samples}
        limit = f"values of a {what}" if what in OWN else None
        return Line(f"{title}, {label}, {subject}", f"{subject} {what}", limit, "values it has to hold", beside)

    lines = []
    for name in ("shared memory", "tcp"):
        lines += [line(title, name, what) for what, title in WHAT.items() if what != "shared" or name != "tcp"]
    for role, title in LATE.items():
        limit = f"values of a {role}"
        lines.append(
            Line(f"{title}, {label}, tcp, one worker late", f"tcp late {role}", limit, "values it has to hold")
        )
    title = f"what the server holds, {label}, shared memory, {many_workers} workers"
    lines.append(Line(title, "shared memory many", "values of a held", "values it has to hold"))
    rows = [row("memory", one, samples, errors, "x") for one in lines]
    for name in ("shared memory", "tcp"):
        beside = {peer: f"{peer} cpu" for peer in PEERS if peer in able}
        cpu = Line(f"processor time per GB, {label}, {name}", f"{name} cpu", "loop cpu", "bare pyzmq", beside)
        rows.append(row("memory", cpu, samples, errors, "s"))
    return rows


def measure_steady(
    driver: Driver, shapes: Shapes, label: str, systems: dict[str, System], rounds: tuple[int, int]
) -> Rows:
    """Rows per role: its memory after many rounds over that after some."""
    samples: dict[str, list[float]] = {"no growth": [1.0]}
    errors: dict[str, str] = {}
    for name, system in systems.items():
        try:
            for role, ratio in _steady(driver, Case(system, "pushpull", shapes), rounds).items():
                samples[f"{name} {role}"] = [ratio]
        except KVStoreError as error:
            errors |= {f"{name} {role}": str(error) for role in ("worker", "server", "shared")}
    title = f"after {rounds[1]:,} rounds over after {rounds[0]}, {label}"
    lines = [
        Line(f"{WHAT[role]}, {title}, {name}", f"{name} {role}", "no growth")
        for name in systems
        for role in ("worker", "server", "shared")
        if role != "shared" or name == "shared memory"
    ]
    return [row("memory", line, samples, errors, "x") for line in lines]


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
    found["held"] = found.get("server", 0.0) + max(0.0, found["shared"] - system.workers)
    found["cpu"] = cpu_s / (ROUNDS * system.workers * 2 * case.bytes / 1e9)
    return found


def _steady(driver: Driver, case: Case, rounds: tuple[int, int]) -> dict[str, float]:
    with driver.fresh(case.system) as running:
        driver.tell(f"memory: {rounds[1]} rounds of {case.system.kind}")
        running.prepare("memory", case, "memory")
        running.rounds("memory", case, rounds[0])
        before = _look(running.pids())
        running.rounds("memory", case, rounds[1] - rounds[0])
        after = _look(running.pids())
    return {role: after[role] / before[role] for role in before if before[role]}


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
