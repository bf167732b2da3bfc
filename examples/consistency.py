"""The same training under every pair of consistency models, with a slow device and a slow worker.

    python examples/consistency.py

Starts a cluster of two workers with two devices each for each of the nine pairs of a device level and a
cluster level. The second device of every worker and the second worker as a whole stumble now and then,
as devices do that share a machine, or a network that others use. ``sequential`` waits for every
stumble; ``bounded(2)`` lets the others run two rounds ahead, so that a stumble can be made up for;
``eventual`` waits for nobody, and its gradients are of older weights.

Each device is a thread that trains at its own pace: it pushes with ``device=i`` and pulls under the
device level's rule for it. Under a sequential cluster level every worker has to make equally many
pushes of a key, so the number of steps is fixed, and a device's samples per second are those of its own
time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import threadpoolctl
from digits import CLASSES, Replica, accuracy, load
from rich.console import Console
from rich.table import Table

import kvstore

MODELS = ("sequential", "bounded(2)", "eventual")
WORKERS, DEVICES = 2, 2
WIDTHS = (64, 64, CLASSES)
SHARE = 16  # images per device and step
COMPUTE_S = 0.004  # emulated: a device that computes leaves the CPU to others
STUMBLE_S, STUMBLES = 0.025, 0.2  # how long, how often


def train_device(kv: kvstore.KVStore, device: int, steps: int) -> dict[str, list[float]]:
    """One device's steps, in a thread of its own."""
    images, labels, *_ = load("float32")
    replica = Replica(WIDTHS, SHARE, "float32", seed=0)
    rng = np.random.default_rng([kv.rank, device])
    layers = range(len(WIDTHS) - 1)
    seen = []
    start = time.perf_counter()
    for _ in range(steps):
        part = rng.integers(len(images), size=SHARE)
        replica.load(images[part], labels[part])
        for layer in layers[:-1]:
            replica.forward(layer)
        replica.loss(SHARE * WORKERS * DEVICES).result()
        slow = (device == DEVICES - 1) + (kv.rank == WORKERS - 1)
        time.sleep(COMPUTE_S + STUMBLE_S * np.count_nonzero(rng.random(slow) < STUMBLES))
        pulls = []
        for layer in reversed(layers):
            replica.backward(layer)
            kv.push(layer, replica.grads[layer], device=device, priority=-layer)
            pulls.append(kv.pull(layer, out=replica.weights[layer], device=device, priority=-layer))
        for pull in pulls:
            pull.result()
        seen.append([max(level) for level in zip(*(pull.staleness for pull in pulls), strict=True)])
    return {"rate": steps * SHARE / (time.perf_counter() - start), "staleness": seen}


def work(device_consistency: str, cluster_consistency: str, steps: int) -> None:
    """One worker; prints what its devices saw as a line of JSON."""
    with (
        threadpoolctl.threadpool_limits(1),
        kvstore.create(
            "dist",
            devices=DEVICES,
            device_consistency=device_consistency,
            cluster_consistency=cluster_consistency,
        ) as kv,
    ):
        kv.set_optimizer(kvstore.optim.SGD(lr=0.05, momentum=0.9))
        weights = Replica(WIDTHS, SHARE, "float32", seed=0).weights
        keys = list(range(len(weights)))
        kv.init(keys, weights)
        kv.barrier()
        with ThreadPoolExecutor(DEVICES) as devices:
            results = list(devices.map(lambda device: train_device(kv, device, steps), range(DEVICES)))
        kv.barrier()
        reached = accuracy(kv.pull(keys).result(), *load("float32")[2:])
        print(json.dumps({"accuracy": reached, "devices": results}), flush=True)


def measure(device_consistency: str, cluster_consistency: str, steps: int) -> list[str]:
    """Run one cluster; the cells of its row."""
    me = [sys.executable, __file__, "--worker", device_consistency, cluster_consistency, "--steps", str(steps)]
    run = [sys.executable, "-m", "kvstore", "run", "-w", str(WORKERS), "-s", "1", "--", *me]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise SystemExit(f"{device_consistency}/{cluster_consistency}: {done.stderr}")
    said = [json.loads(line[line.index("{") :]) for line in done.stdout.splitlines() if "{" in line]
    devices = [device for worker in said for device in worker["devices"]]
    staleness = np.array([device["staleness"] for device in devices])  # devices x steps x levels
    mean, largest = staleness.mean(axis=(0, 1)), staleness.max(axis=(0, 1))
    return [
        f"{sum(device['rate'] for device in devices):,.0f}",
        *(f"{mean[level]:.2f}, {largest[level]}" for level in (0, 1)),
        f"{said[0]['accuracy']:.4f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="of each device")
    parser.add_argument("--worker", nargs=2, metavar=("DEVICE", "CLUSTER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(*args.worker, args.steps)
        return
    table = Table(title=f"{WORKERS} workers x {DEVICES} devices; staleness in rounds: mean, largest")
    for column in ("device level", "cluster level"):
        table.add_column(column)
    for column in ("samples/s", "staleness, devices", "staleness, cluster", "accuracy"):
        table.add_column(column, justify="right")
    console = Console()
    with console.status("") as status:
        for pair in product(MODELS, MODELS):
            status.update(" / ".join(pair))
            table.add_row(*pair, *measure(*pair, args.steps))
    console.print(table)


if __name__ == "__main__":
    main()
