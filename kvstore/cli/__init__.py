"""The command line: ``kvstore run``, ``scheduler``, ``server``, ``drain``, ``status``, ``checkpoint`` and so on.

Commands import what they need when they run, so that ``--help`` is quick. A failure is one line on
stderr and a non-zero code.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import click

from kvstore.cli.checkpoint import checkpoint
from kvstore.errors import KVStoreError

_KEYS = click.option(
    "--keys",
    type=click.Path(file_okay=False),
    help="The directory of its keys, for a protected cluster (or KVSTORE_KEYS).",
)
_REPLICATION = click.option(
    "--replication",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Servers beside its own that keep each value: so many may die at once.",
)
_HEARTBEAT = click.option(
    "--heartbeat",
    type=click.FloatRange(0, min_open=True),
    help="Seconds without a sign of life after which a member is lost (or KVSTORE_HEARTBEAT, else 3).",
)


class _Commands(click.Group):
    """Turns the package's errors into one line."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KVStoreError as error:
            click.echo(f"kvstore: {error}", err=True)
            ctx.exit(1)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="kvstore")
def main() -> None:
    """A two-level key-value store that keeps a model's parameters in step."""


main.add_command(checkpoint)


def _checkpoint_options(command: Any) -> Any:
    """The options of a server that concern checkpoints."""
    for option in (
        click.option("--restore", type=click.Path(), help="Begin with this checkpoint, or the newest there."),
        click.option("--checkpoint-keep", type=click.IntRange(1), help="How many checkpoints are kept; else all."),
        click.option("--checkpoint-every", type=float, default=60.0, show_default=True, help="Seconds between them."),
        click.option("--checkpoint-dir", type=click.Path(), help="Write checkpoints of the whole cluster there."),
    ):
        command = option(command)
    return command


@main.command(context_settings={"ignore_unknown_options": True})
@click.option("-w", "--workers", type=int, default=1, show_default=True, help="Worker processes.")
@click.option("-s", "--servers", type=int, default=1, show_default=True, help="Server processes.")
@_REPLICATION
@click.option("--grace", type=float, default=5.0, show_default=True, help="Seconds to end in before the kill.")
@_checkpoint_options
@_KEYS
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def run(
    workers: int,
    servers: int,
    replication: int,
    grace: float,
    keys: str | None,
    command: tuple[str, ...],
    **checkpoints: Any,
) -> None:
    """Run a whole cluster on this machine: COMMAND once per worker, with a scheduler and servers.

    Children's output is copied line by line with a prefix. When one fails, all are stopped and its code
    is returned.

    Example: kvstore run -w 2 -s 1 -- python train.py
    """
    for what, count in (("--workers", workers), ("--servers", servers)):
        if count < 1:
            raise click.UsageError(f"{what} {count}: a cluster needs at least 1 of them")
    if not command:
        raise click.UsageError("expected a command for the workers, e.g. kvstore run -w 2 -- python train.py")
    from kvstore.cli.launch import run_cluster

    _check_every(checkpoints["checkpoint_every"])
    sys.exit(run_cluster(workers, servers, replication, list(command), grace, checkpoints, keys))


@main.command()
@click.option(
    "--bind", default="tcp://127.0.0.1:9091", show_default=True, help="Where to listen; port * is any free one."
)
@click.option("--advertise", help="The address others reach it by, if another.")
@click.option("-w", "--workers", type=int, help="Workers of the cluster (or KVSTORE_NUM_WORKERS).")
@click.option("-s", "--servers", type=int, help="Servers of the cluster (or KVSTORE_NUM_SERVERS, else 1).")
@click.option("--journal", type=click.Path(dir_okay=False), help="A file from which a restarted one goes on.")
@_REPLICATION
@_HEARTBEAT
@_KEYS
def scheduler(
    bind: str,
    advertise: str | None,
    workers: int | None,
    servers: int | None,
    journal: str | None,
    replication: int,
    heartbeat: float | None,
    keys: str | None,
) -> None:
    """Run the scheduler of a cluster until SIGINT or SIGTERM."""
    from kvstore import environment
    from kvstore.cli.daemon import serve
    from kvstore.cluster.scheduler import Scheduler
    from kvstore.transport.network import HEARTBEAT_S

    around = environment.read()
    workers = around.num_workers if workers is None else workers
    servers = (1 if around.num_servers is None else around.num_servers) if servers is None else servers
    if workers is None:
        raise click.UsageError("expected --workers or KVSTORE_NUM_WORKERS")
    limit = heartbeat or around.heartbeat or HEARTBEAT_S
    one = Scheduler(
        bind,
        workers,
        servers,
        advertise=advertise,
        journal=journal,
        heartbeat=limit,
        replication=replication,
        network=_network(keys),
    )
    click.echo(f"scheduler at {one.address}")
    sys.exit(serve(one))


@main.command()
@click.option("--address", help="The scheduler's address (or KVSTORE_ADDRESS).")
@click.option("--bind", default="tcp://127.0.0.1:*", show_default=True, help="Where to listen; port * is any free one.")
@click.option("--advertise", help="The address that workers reach it by, if another.")
@click.option("--with-scheduler", is_flag=True, help="Be the scheduler too, bound at --address: a whole service.")
@click.option("-w", "--workers", type=int, help="With --with-scheduler: workers of the cluster.")
@click.option("--journal", type=click.Path(dir_okay=False), help="With --with-scheduler: the scheduler's journal.")
@_HEARTBEAT
@_checkpoint_options
@_KEYS
def server(
    address: str | None,
    bind: str,
    advertise: str | None,
    with_scheduler: bool,
    workers: int | None,
    journal: str | None,
    heartbeat: float | None,
    restore: str | None,
    checkpoint_dir: str | None,
    checkpoint_every: float,
    checkpoint_keep: int | None,
    keys: str | None,
) -> None:
    """Run a server until SIGINT or SIGTERM.

    One server with --checkpoint-dir is enough: it writes the keys of all of them. All of them need --restore.
    """
    from kvstore import environment
    from kvstore.checkpoint.restoring import Restoring
    from kvstore.cli.daemon import keep_memory, serve
    from kvstore.cluster.near import Neighbourhood
    from kvstore.cluster.periodic import Periodic
    from kvstore.cluster.scheduler import Scheduler
    from kvstore.cluster.server import Server
    from kvstore.transport.network import HEARTBEAT_S

    _check_every(checkpoint_every)
    restoring = None if restore is None else Restoring(restore)
    if with_scheduler != (workers is not None):
        raise click.UsageError("--with-scheduler and --workers belong together")
    if journal is not None and not with_scheduler:
        raise click.UsageError("--journal is the scheduler's: it needs --with-scheduler")
    keep_memory()
    around = environment.read()
    address = address or around.address
    limit = heartbeat or around.heartbeat or HEARTBEAT_S
    beside, network = None, _network(keys)
    if with_scheduler:
        at = address or "tcp://127.0.0.1:9091"
        beside = Scheduler(at, workers or 0, 1, journal=journal, heartbeat=limit, network=network)
        beside.start()
        address = beside.address
        click.echo(f"scheduler at {address}")
    if address is None:
        raise click.UsageError("expected --address or KVSTORE_ADDRESS, the scheduler's address")
    neighbourhood = Neighbourhood(0 if around.shared_memory is False else around.shared_memory_bytes)
    rank = around.rank if around.role == "server" else None
    one = Server(
        address,
        bind=bind,
        advertise=advertise,
        rank=rank,
        neighbourhood=neighbourhood,
        heartbeat=limit,
        restore=restoring,
        network=network,
    )
    click.echo(f"server at {one.address}")
    if checkpoint_dir is None:
        sys.exit(serve(one, beside, one.drain))
    periodic = Periodic(address, checkpoint_dir, checkpoint_every, checkpoint_keep, network)
    periodic.start()
    try:
        sys.exit(serve(one, beside, one.drain))
    finally:
        periodic.stop()


def _check_every(seconds: float) -> None:
    if not seconds > 0:
        raise click.UsageError(f"--checkpoint-every {seconds:g}: expected seconds > 0")


@main.command()
@click.option("--address", help="The scheduler's (or KVSTORE_ADDRESS).")
@click.option("--timeout", type=float, default=60.0, show_default=True, help="Seconds to wait until it is done.")
@_KEYS
@click.argument("rank", type=int)
def drain(address: str | None, timeout: float, keys: str | None, rank: int) -> None:
    """Hand over all that server RANK has to the other servers. It goes on running, and may be stopped then."""
    from kvstore.cluster.status import drain

    address = _address(address)
    drain(address, rank, timeout, _network(keys))


@main.command()
@click.option("--address", help="The scheduler's (or KVSTORE_ADDRESS).")
@click.option("--timeout", type=float, default=5.0, show_default=True, help="Seconds to wait for an answer.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_KEYS
def status(address: str | None, timeout: float, as_json: bool, keys: str | None) -> None:
    """Show the members of a cluster, what the servers hold, and which GPUs this machine has."""
    from kvstore.arrays import gpu
    from kvstore.cluster.status import read_status

    address = _address(address)
    report = read_status(address, timeout, _network(keys))
    report["gpus"] = gpu.described()
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    came = ", ".join(f"{len(report[what])} of {report[f'num_{what}']} {what}" for what in ("workers", "servers"))
    table = Table(title=f"cluster {report['cluster']}, epoch {report['epoch']}: {came} have come")
    columns = ("role", "rank", "state", "host", "pid", "last heard", "address", "primary of", "replica of")
    for column in (*columns, "keys", "bytes"):
        table.add_column(column, no_wrap=True)
    for role in ("worker", "server"):
        for row in report[f"{role}s"]:
            heard = f"{row['heard_s']:.1f} s ago"
            cells = (role, row["rank"], row["state"], row["host"], row["pid"], heard, row["address"])
            shards = (" ".join(map(str, row.get(what, ()))) for what in ("primary", "replica"))
            held = ("" if row.get(what) is None else f"{row[what]:,}" for what in ("keys", "bytes"))
            table.add_row(*map(str, cells), *shards, *held)
    console = Console()
    console.print(table, width=None if console.is_terminal else max(console.width, console.measure(table).maximum))
    click.echo(f"GPUs of this machine: {report['gpus']}")


@main.command()
@click.argument("directory", type=click.Path(file_okay=False))
@click.option("--client", "clients", multiple=True, metavar="NAME", help="Make keys for this client; may be repeated.")
@click.option("--revoke", metavar="NAME", help="Take this client from the list of those who may connect.")
def keygen(directory: str, clients: tuple[str, ...], revoke: str | None) -> None:
    """Make the keys of a cluster in DIRECTORY, add a client to them or revoke one.

    Schedulers and servers are given DIRECTORY as --keys; a client is given DIRECTORY/NAME, which can be copied to
    where it runs. The first client is called "worker" if no other name is given. Nothing is ever overwritten.
    """
    from kvstore.cluster import keys

    if revoke is not None:
        if clients:
            raise click.UsageError("--revoke and --client do not belong together")
        keys.revoke(directory, revoke)
        click.echo(f"{revoke} is no longer allowed; servers that run cut it off within a second")
        return
    if clients and os.path.exists(os.path.join(directory, keys.CLUSTER)):
        written = [path for name in clients for path in keys.add_client(directory, name)]
    else:
        written = keys.make_cluster(directory, clients or (keys.DEFAULT_CLIENT,))
    for path in written:
        click.echo(path)


def _address(given: str | None) -> str:
    """The scheduler's: as given, or as the environment says."""
    from kvstore import environment

    address = given or environment.read().address
    if address is None:
        raise click.UsageError("expected --address or KVSTORE_ADDRESS, the scheduler's address")
    return address


def _network(directory: str | None) -> Any:
    """The network for who has the keys in a directory, or where the environment says."""
    from kvstore import environment
    from kvstore.cluster.keys import network

    return network(directory or environment.read().keys)


@main.group()
def bench() -> None:
    """Measure."""


@bench.command()
@click.option("--workers", default="1,2,4", show_default=True, help="Numbers of workers to compare.")
@click.option("-s", "--servers", type=click.IntRange(1), default=1, show_default=True)
@click.option("--model", type=click.Choice(["mlp", "resnet50", "bert-base"]), default="mlp", show_default=True)
@click.option(
    "--compute-ms", type=click.FloatRange(0), default=50.0, show_default=True, help="Emulated compute per step."
)
@click.option("--steps", type=click.IntRange(1), default=20, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True, help="Samples per worker and step.")
@click.option("--consistency", default="sequential", show_default=True, help="Of the cluster level.")
@click.option("--plot", type=click.Path(dir_okay=False), help="Write a PNG.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def scaling(workers: str, as_json: bool, plot: str | None, **options: Any) -> None:
    """Samples per second and efficiency with 1, 2, 4 ... workers on this machine."""
    try:
        counts = [int(one) for one in workers.split(",")]
    except ValueError:
        raise click.UsageError(f"--workers: expected numbers such as 1,2,4, got {workers!r}") from None
    if not counts or min(counts) < 1:
        raise click.UsageError(f"--workers: expected numbers >= 1, got {workers!r}")
    from kvstore import consistency
    from kvstore.bench.scaling import measure, show

    consistency.parse(options["consistency"])
    rows = measure(counts, **options)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    else:
        show(rows, plot)


@bench.command()
@click.argument("suites", nargs=-1)
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Samples of each case.")
@click.option("--max-bytes", type=int, default=256 << 20, show_default=True, help="Largest value, up to 1 GB.")
@click.option("--quick", is_flag=True, help="Tiny sizes and short samples: does it all run?")
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Write everything there as JSON.")
@click.option("--plot", type=click.Path(dir_okay=False), help="Write a PNG: latency and throughput over size.")
@click.option("--trace", type=click.Path(dir_okay=False), help="gpu: write there how independent ops overlap.")
@click.option("--peers", type=click.Choice(["auto", "none"]), default="auto", show_default=True)
@click.option(
    "--mxnet-python", envvar="KVSTORE_BENCH_MXNET", help="The Python that has MXNet (or KVSTORE_BENCH_MXNET)."
)
@click.option(
    "--torch-python", envvar="KVSTORE_BENCH_TORCH", help="The Python that has torch (or KVSTORE_BENCH_TORCH)."
)
def micro(**options: Any) -> None:
    """Push, pull and pushpull beside the machine's limits, MXNet and gloo, measured interleaved.

    SUITES are among sizes, keys, scale, consistency, optimizers, models, staging, priority, local, engine, kernels,
    memory, start and gpu; none named: all but gpu.

    Example: kvstore bench micro sizes --max-bytes 1000000 --json sizes.json
    """
    from kvstore.bench.micro import run

    run(**options)
