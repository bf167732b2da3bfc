"""Measures groups of cases, interleaved.

A group's cases are measured one after the other, once per repeat, while all their systems stay up, so that
a slow minute of the machine falls on all of them; each time in another order, for what ran before leaves its traces.
One sample is the median of some rounds.
"""

from __future__ import annotations

import contextlib
import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from kvstore.bench.cases import Case, Group, System
from kvstore.bench.statistic import Rows, row
from kvstore.bench.systems import BenchError, Interpreters, Running, available_bytes, start
from kvstore.errors import KVStoreError

SAMPLE_S = 0.3
ROUNDS = (3, 300)  # of a sample: at least, at most
WARM_UP = 3
MEMORY_OF_A_CASE = 8  # values per worker that must fit into memory before a case is tried
SPARE_BYTES = 2 << 30
LARGE_BYTES = 64 << 20


@dataclass
class Driver:
    """Keeps the systems of a suite running, measures its groups."""

    interpreters: Interpreters
    repeats: int
    sample_s: float = SAMPLE_S
    tell: Callable[[str], None] = lambda text: None  # what is being done, for the progress bar
    versions: dict[str, str] = field(default_factory=dict)
    _running: dict[System, Running] = field(default_factory=dict)
    _broken: dict[System, str] = field(default_factory=dict)
    _groups: int = 0

    def system(self, system: System) -> Running:
        """The running system, started if need be.

        Raises:
            BenchError: it does not start, or has failed before.
        """
        if system in self._broken:
            raise BenchError(self._broken[system])
        if system not in self._running:
            self.tell(f"starting {system.kind}")
            try:
                self._running[system] = start(system, self.interpreters)
            except KVStoreError as error:
                self._broken[system] = str(error)
                raise
            self.versions[system.kind.split()[0]] = self._running[system].version
        return self._running[system]

    def measure(self, suite: str, group: Group) -> Rows:
        """The rows of a group."""
        self._groups += 1
        samples: dict[str, list[float]] = {}
        errors: dict[str, str] = {}
        counts: dict[str, int] = {}
        systems: dict[str, Running] = {}
        for name, case in group.cases.items():
            if not self.interpreters.has(case.system):
                continue
            with self._errors_of(name, case, errors):
                _check_memory(MEMORY_OF_A_CASE * case.system.workers * case.bytes)
                running = systems[name] = self.system(case.system)
                self.tell(f"{suite}: preparing {name}")
                running.prepare(name, case, f"group{self._groups}")
                times = running.rounds(name, case, WARM_UP).times
                running.check(name)
                counts[name] = self._count(min(times))
        chance = random.Random(self._groups)
        for _ in range(self.repeats):
            for name in chance.sample(list(counts), len(counts)):
                case = group.cases[name]
                if name in errors:
                    continue
                if self._running.get(case.system) is not systems[name]:
                    errors[name] = "its system had to be ended: another case failed"
                    continue
                with self._errors_of(name, case, errors):
                    self.tell(f"{suite}: {name}")
                    _check_memory(0)
                    times = systems[name].rounds(name, case, counts[name]).times
                    samples.setdefault(name, []).append(statistics.median(times) * 1e3)
        for name in counts:
            case = group.cases[name]
            if self._running.get(case.system) is systems[name]:
                with self._errors_of(name, case, errors):
                    systems[name].drop(name)
        self.keep({system for system in self._running if system not in _large(group)})
        return [
            group.cases[line.subject].about()
            | row(suite, line, {name: s for name, s in samples.items() if name not in errors}, errors)
            for line in group.lines
            if self.interpreters.has(group.cases[line.subject].system)
        ]

    def _count(self, round_s: float) -> int:
        return max(ROUNDS[0], min(ROUNDS[1], round(self.sample_s / (round_s + 1e-3))))

    @contextlib.contextmanager
    def _errors_of(self, name: str, case: Case, errors: dict[str, str]) -> Iterator[None]:
        """A system that fails is ended; its workers may not agree any more on what they have done."""
        try:
            yield
        except KVStoreError as error:
            errors[name] = str(error)
            broken = self._running.pop(case.system, None)
            if broken is not None:
                broken.close()

    def keep(self, systems: set[System]) -> None:
        """End the systems that are not among these."""
        for system in [s for s in self._running if s not in systems]:
            self._running.pop(system).close()

    @contextlib.contextmanager
    def fresh(self, system: System) -> Iterator[Running]:
        """A system of one's own, for as long as the block lasts."""
        self.tell(f"starting {system.kind}")
        running = start(system, self.interpreters)
        try:
            self.versions[system.kind.split()[0]] = running.version
            yield running
        finally:
            running.close()


def _check_memory(needed: int) -> None:
    """The machine is not to run out of memory: it may be used by others.

    Raises:
        BenchError: less than ``needed`` bytes and some to spare are free.
    """
    free = available_bytes()
    if free < needed + SPARE_BYTES:
        raise BenchError(
            f"skipped: {(needed + SPARE_BYTES) / 1e9:.1f} GB of free memory needed, {free / 1e9:.1f} there"
        )


def _large(group: Group) -> set[System]:
    """Systems that are ended after the group, because a store keeps its keys for ever."""
    return {case.system for case in group.cases.values() if case.bytes >= LARGE_BYTES}
