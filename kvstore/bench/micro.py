"""``kvstore bench micro`` and ``python -m bench``: measures kvstore, its peers and the machine, interleaved.

A group's cases are measured one after the other, once per repeat, while all their systems stay up, so that
a slow minute of the machine falls on all of them. One sample is the median of some rounds.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvstore.bench import report
from kvstore.bench.cases import Case, Group, System
from kvstore.bench.statistic import row
from kvstore.bench.suites import SUITES, Options
from kvstore.bench.systems import BenchError, Interpreters, Running, find_interpreters, start
from kvstore.errors import OptionError

SAMPLE_S = 0.3
ROUNDS = (3, 300)  # of a sample: at least, at most
WARM_UP = 3


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
    _prepared: int = 0

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
            except BenchError as error:
                self._broken[system] = str(error)
                raise
            self.versions[system.kind.split()[0]] = self._running[system].version
        return self._running[system]

    def measure(self, suite: str, group: Group) -> list[dict[str, Any]]:
        """The rows of a group."""
        samples: dict[str, list[float]] = {}
        errors: dict[str, str] = {}
        counts: dict[str, int] = {}
        names: dict[str, str] = {}
        for name, case in group.cases.items():
            if not self.interpreters.has(case.system):
                continue
            with self._errors_of(name, case, errors):
                running = self.system(case.system)
                self.tell(f"{suite}: preparing {name}")
                self._prepared += 1
                names[name] = f"case{self._prepared}"
                running.prepare(names[name], case)
                times = running.rounds(names[name], case, WARM_UP)
                running.check(names[name])
                counts[name] = self._count(min(times))
        for _ in range(self.repeats):
            for name, count in counts.items():
                if name in errors:
                    continue
                case = group.cases[name]
                with self._errors_of(name, case, errors):
                    self.tell(f"{suite}: {name}")
                    times = self.system(case.system).rounds(names[name], case, count)
                    samples.setdefault(name, []).append(statistics.median(times) * 1e3)
        for name in names:
            case = group.cases[name]
            if case.system in self._running:
                with self._errors_of(name, case, errors):
                    self._running[case.system].drop(names[name])
        return [
            row(suite, line, {name: s for name, s in samples.items() if name not in errors}, errors)
            for line in group.lines
            if self.interpreters.has(group.cases[line.subject].system)
        ]

    def _count(self, round_s: float) -> int:
        return max(ROUNDS[0], min(ROUNDS[1], round(self.sample_s / (round_s + 1e-3))))

    @contextlib.contextmanager
    def _errors_of(self, name: str, case: Case, errors: dict[str, str]) -> Iterator[None]:
        """A system that fails is ended, and everything that needs it fails with the same words."""
        try:
            yield
        except BenchError as error:
            errors[name] = str(error)
            self._broken[case.system] = str(error)
            broken = self._running.pop(case.system, None)
            if broken is not None:
                broken.close()

    def keep(self, systems: set[System]) -> None:
        """End the systems that are not among these."""
        for system in [s for s in self._running if s not in systems]:
            self._running.pop(system).close()


def measure(
    chosen: list[str], options: Options, driver: Driver, advance: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """The rows of the suites ``chosen``, in their order; ``advance`` is called ``total`` times."""
    rows = []
    try:
        for suite in chosen:
            groups = SUITES[suite](options)
            for number, group in enumerate(groups):
                rows += driver.measure(suite, group)
                driver.keep({case.system for later in groups[number + 1 :] for case in later.cases.values()})
                advance()
            driver.keep(set())
    finally:
        driver.keep(set())
    return rows


def total(chosen: list[str], options: Options) -> int:
    """Steps of the progress bar."""
    return sum(len(SUITES[suite](options)) for suite in chosen)


def run(
    suites: tuple[str, ...],
    repeats: int,
    max_bytes: int,
    quick: bool,
    json_path: str | None,
    plot: str | None,
    peers: str,
    mxnet_python: str | None,
    torch_python: str | None,
) -> None:
    """What the command line does.

    Raises:
        KVStoreError: nothing could be measured as asked.
    """
    chosen = list(suites or SUITES)
    unknown = [suite for suite in chosen if suite not in SUITES]
    if unknown:
        raise OptionError(f"expected suites among {', '.join(SUITES)}; got {', '.join(unknown)}")
    if plot is not None and "sizes" not in chosen:
        raise OptionError("--plot: expected the suite sizes among those that run")
    options = Options(max_bytes, quick)
    console = Console(stderr=True)
    found = Interpreters() if peers == "none" else find_interpreters(mxnet_python, torch_python)
    if peers != "none":
        for name in ("mxnet", "gloo"):
            console.print(f"{name}: {found.of.get(name, 'not found; see bench/README.md')}", highlight=False)
    bar = Progress(
        BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"), console=console
    )
    with bar:
        task = bar.add_task("", total=total(chosen, options))
        driver = Driver(
            found,
            repeats,
            SAMPLE_S / 20 if quick else SAMPLE_S,
            tell=lambda text: bar.update(task, description=text),
        )
        rows = measure(chosen, options, driver, lambda: bar.advance(task))
    report.show(rows)
    for one in rows:
        for where in [one, *one.get("beside", {}).values()]:
            if "error" in where:
                console.print(f"{one['suite']}: {one['case']}: {where['error']}", markup=False, highlight=False)
    if json_path is not None:
        report.save(rows, json_path, versions=driver.versions, repeats=repeats, suites=chosen, quick=quick)
    if plot is not None:
        report.plot(rows, plot)
