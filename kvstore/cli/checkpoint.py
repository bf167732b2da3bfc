"""``kvstore checkpoint``: look at checkpoints, verify them, and turn them into plain files and back."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

WIDTH = 1000  # where no terminal says: nothing is cut off in a pipe


@click.group()
def checkpoint() -> None:
    """Look at checkpoints, verify and convert them.

    A PATH is a checkpoint, or a directory of checkpoints, whose newest is meant.
    """


@checkpoint.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(path: Path, as_json: bool) -> None:
    """Show what a checkpoint holds, and which others lie beside it."""
    from kvstore.checkpoint import directory
    from kvstore.checkpoint.reading import Checkpoint

    one = Checkpoint(path)
    manifest = one.manifest
    rows: list[dict[str, Any]] = [
        {
            "key": record.key,
            "shape": list(record.spec.shape),
            "dtype": record.spec.dtype,
            "consistency": record.spec.cluster_model,
            "version": record.version,
            "rounds": record.rounds,
            "state": list(record.states),
            "bytes": sum(stored.tensor(name).nbytes for name in record.arrays),
            "file": stored.where[""].file,
        }
        for stored in manifest.keys.values()
        for record in (stored.record,)
    ]
    beside = [other.name for other in directory.checkpoints(one.path.parent)]
    if as_json:
        about = {"path": str(one.path), "created": manifest.created, "cut_point": manifest.at}
        click.echo(json.dumps({**about, "optimizer": manifest.optimizer, "keys": rows, "beside": beside}, indent=2))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    nbytes = sum(file.nbytes for file in manifest.files.values())
    click.echo(f"{one.path}, {manifest.created}, cut point {manifest.at}: {len(rows)} keys, {nbytes:,} bytes")
    table = Table()
    columns = ("key", "shape", "dtype", "consistency", "version", "rounds", "state", "bytes", "file")
    for column in columns:
        table.add_column(column, no_wrap=True)
    for row in rows:
        shape = "x".join(map(str, row["shape"])) or "scalar"
        rounds = " ".join(f"{rank}:{n}" for rank, n in row["rounds"].items())
        cells = (repr(row["key"]), shape, row["dtype"], row["consistency"], row["version"], rounds)
        rest = (" ".join(row["state"]), f"{row['bytes']:,}", row["file"])
        table.add_row(*(Text(str(cell)) for cell in (*cells, *rest)))
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(table)
    console.print(f"optimizer: {json.dumps(manifest.optimizer)}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"in this directory: {', '.join(beside)}", markup=False, highlight=False, soft_wrap=True)


@checkpoint.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--all", "every", is_flag=True, help="All checkpoints of the directory, not only the newest.")
def verify(path: Path, every: bool) -> None:
    """Look at every byte; the exit code is 1 if any is not as it was written."""
    from rich.console import Console

    from kvstore.checkpoint import directory
    from kvstore.checkpoint.reading import Checkpoint

    console = Console(stderr=False, highlight=False, soft_wrap=True)
    bad = 0
    for place in (directory.checkpoints(path) if every else []) or [directory.find(path)]:
        with Checkpoint(place) as one, console.status(str(place)):
            damaged = one.verify()
        for error in damaged:
            click.echo(f"kvstore: {error}", err=True)
        bad += bool(damaged)
        if not damaged:
            console.print(f"{place}: {len(one.records)} keys, whole", markup=False)
    sys.exit(1 if bad else 0)


@checkpoint.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--int-keys", is_flag=True, help="Names in a file are whole numbers, and so are the keys.")
def convert(source: Path, target: Path, int_keys: bool) -> None:
    """From a checkpoint to one safetensors file with its values, or from a safetensors or npz file to a checkpoint.

    \b
    kvstore checkpoint convert checkpoints/ weights.safetensors
    kvstore checkpoint convert weights.npz checkpoints/
    """
    from kvstore.checkpoint.convert import from_file, to_safetensors
    from kvstore.checkpoint.reading import Checkpoint

    if source.is_file():
        click.echo(from_file(source, target, int_keys=int_keys))
        return
    if target.suffix != ".safetensors":
        raise click.UsageError(f"{target}: expected a name that ends in .safetensors")
    to_safetensors(Checkpoint(source), target)
    click.echo(target)
