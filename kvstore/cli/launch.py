"""``kvstore run``: a whole cluster on this machine, as long as its workers run."""

from __future__ import annotations

import queue
import signal
import sys
from collections.abc import Mapping
from typing import Any

import click

from kvstore import environment
from kvstore.cli.supervisor import Ended, Supervisor
from kvstore.environment import Environment

START_TIMEOUT_S = 60.0


def run_cluster(
    workers: int,
    servers: int,
    replication: int,
    command: list[str],
    grace_s: float,
    checkpoints: Mapping[str, Any] | None = None,
    keys: str | None = None,
) -> int:
    """Run ``command`` as each worker; the exit code of the first that fails, else 0.

    Args:
        checkpoints: options of ``kvstore server``; all but ``restore`` are for the first server only.
        keys: the directory of the cluster's keys, for all of them.
    """
    supervisor = Supervisor()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda n, _: supervisor.events.put(n))
    try:
        return _run(supervisor, workers, servers, replication, command, grace_s, checkpoints or {}, keys)
    finally:
        schedulers, servers_left = (
            [child for child in supervisor.children if child.name.startswith(role)] for role in ("scheduler", "server")
        )
        workers_left = [child for child in supervisor.children if child not in (*schedulers, *servers_left)]
        supervisor.stop(workers_left, grace_s)
        supervisor.stop(servers_left, grace_s, signal.SIGINT)  # nobody is left to hand anything over to
        supervisor.stop(schedulers, grace_s, signal.SIGINT)  # last: a server that leaves waits for its answer
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(
    supervisor: Supervisor,
    workers: int,
    servers: int,
    replication: int,
    command: list[str],
    grace_s: float,
    checkpoints: Mapping[str, Any],
    keys: str | None,
) -> int:
    inherited = {**environment.inherited(), **Environment(keys=keys).variables()}
    own = [sys.executable, "-m", "kvstore"]
    first_line: queue.Queue[str] = queue.Queue()
    supervisor.start(
        "scheduler",
        [
            *own,
            "scheduler",
            "--bind",
            "tcp://127.0.0.1:*",
            "-w",
            str(workers),
            "-s",
            str(servers),
            "--replication",
            str(replication),
        ],
        inherited,
        first_line,
    )
    try:
        address = first_line.get(timeout=START_TIMEOUT_S).removeprefix("scheduler at ")
    except queue.Empty:
        address = ""
    if not address.startswith("tcp://"):
        click.echo("kvstore run: the scheduler did not start", err=True)
        return 1

    def around(role: str, rank: int) -> dict[str, str]:
        said = Environment(address, role, rank, workers, servers).variables()
        return {**inherited, "PYTHONUNBUFFERED": "1", **said}

    for rank in range(servers):
        options = [*own, "server", "--address", address, *_options(checkpoints, first=rank == 0)]
        supervisor.start(f"server {rank}", options, around("server", rank))
    running = set()
    for rank in range(workers):
        try:
            running.add(supervisor.start(f"worker {rank}", command, around("worker", rank)))
        except OSError as error:
            click.echo(f"kvstore run: worker {rank}: cannot start {command[0]!r}: {error.strerror}", err=True)
            return 127
    while running:
        event = supervisor.events.get()
        if not isinstance(event, Ended):
            click.echo(f"kvstore run: {_name(event)}: stopping everything", err=True)
            supervisor.stop([child for child in supervisor.children if child in running], grace_s, event)
            return 128 + event
        child, code = event.child, event.code
        if code == 0 and child in running:
            running.discard(child)
            continue
        if replication and child.name.startswith("server"):
            click.echo(f"kvstore run: {child.name} is gone: another server goes on in its place", err=True)
            continue
        how = f"ended with code {code}" if code >= 0 else f"was ended by {_name(-code)}"
        click.echo(f"kvstore run: {child.name} {how}: stopping everything", err=True)
        return code if code > 0 else 128 - code if code < 0 else 1
    return 0


def _options(checkpoints: Mapping[str, Any], *, first: bool) -> list[str]:
    """The options of a server that concern checkpoints."""
    wanted = {name: value for name, value in checkpoints.items() if value is not None and (first or name == "restore")}
    return [word for name, value in wanted.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
