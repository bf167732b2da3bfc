"""``kvstore bench micro`` and ``python -m bench``: measures kvstore, its peers and the machine."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvstore.bench import report
from kvstore.bench.cases import Group, System
from kvstore.bench.driver import SAMPLE_S, Driver
from kvstore.bench.statistic import Rows
from kvstore.bench.suites import BY_NAME, SUITES, Options, Step
from kvstore.bench.systems import Interpreters, find_interpreters
from kvstore.errors import OptionError

NO_PEER = "not measured: no Python given that has it, or no source checkout; see bench/README.md"


def measure(chosen: dict[str, list[Step]], driver: Driver, rows: Rows, advance: Callable[[], None]) -> None:
    """Append the rows of these suites as they come; ``advance`` is called after each step."""
    try:
        for suite, steps in chosen.items():
            for number, step in enumerate(steps):
                if isinstance(step, Group):
                    rows += driver.measure(suite, step)
                else:
                    driver.tell(suite)
                    rows += [{"suite": suite, **row} for row in step(driver)]
                driver.keep(_systems(steps[number + 1 :]))
                advance()
    finally:
        driver.keep(set())


def _systems(steps: list[Step]) -> set[System]:
    return {case.system for step in steps if isinstance(step, Group) for case in step.cases.values()}


def run(
    suites: tuple[str, ...],
    repeats: int,
    max_bytes: int,
    quick: bool,
    json_path: str | None,
    plot: str | None,
    trace: str | None,
    peers: str,
    mxnet_python: str | None,
    torch_python: str | None,
) -> None:
    """What the command line does.

    Raises:
        KVStoreError: nothing could be measured as asked.
    """
    chosen = list(suites) or [suite for suite in SUITES if suite not in BY_NAME]
    unknown = [suite for suite in chosen if suite not in SUITES]
    if unknown:
        raise OptionError(f"expected suites among {', '.join(SUITES)}; got {', '.join(unknown)}")
    if plot is not None and "sizes" not in chosen:
        raise OptionError("--plot: expected the suite sizes among those that run")
    steps = {suite: SUITES[suite](Options(max_bytes, quick, trace)) for suite in chosen}
    console = Console(stderr=True)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that everything is ended
    found = Interpreters() if peers == "none" else find_interpreters(mxnet_python, torch_python)
    if peers != "none":
        for name in ("mxnet", "gloo"):
            click.echo(f"{name}: {found.of.get(name, NO_PEER)}", err=True)
    bar = Progress(
        BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"), console=console
    )
    driver = Driver(found, repeats, SAMPLE_S / 20 if quick else SAMPLE_S)
    rows: Rows = []
    try:
        with bar:
            task = bar.add_task("", total=sum(map(len, steps.values())))
            driver.tell = lambda text: bar.update(task, description=text)
            measure(steps, driver, rows, lambda: bar.advance(task))
    finally:  # also what was measured until an interruption
        report.show(rows)
        if json_path is not None:
            report.save(rows, json_path, versions=driver.versions, repeats=repeats, suites=chosen, quick=quick)
    for one in rows:
        for where in [one, *one.get("beside", {}).values()]:
            if "error" in where:
                click.echo(f"{one['suite']}: {one['case']}: {where['error']}", err=True)
    if plot is not None:
        report.plot(rows, plot)
