"""Handwritten digits: a network in NumPy, trained by any number of devices and workers.

    python examples/digits.py                                         # one process
    python examples/digits.py --devices 2                             # one process, two devices
    python examples/digits.py --devices 2 --array cupy                # one process, two devices on GPUs
    kvstore run -w 2 -s 1 -- python examples/digits.py --devices 2    # a cluster, two devices in each worker

It is the same program each time, and under the default consistency each time the same training: the
batch is divided over all devices of all workers, and their gradients are summed.

The loop in ``train`` never waits for a layer. It pushes the step's work to the engine, and the engine
runs each op as soon as what it reads is there: a layer's gradients travel while the layer before it is
still being differentiated, and the next forward pass begins with the first layer's new weights while
those of later layers are still on their way.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import threadpoolctl
from rich.progress import BarColumn, Progress, TextColumn
from sklearn.datasets import load_digits

import engine
import kvstore
from kvstore import environment

HELD_OUT = 360  # of the 1,797 images
CLASSES = 10
STEPS_IN_FLIGHT = 2


def load(dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Images and labels to train with, then those held out. An image is 64 pixels and a one, for the bias."""
    images, labels = load_digits(return_X_y=True)
    images = np.hstack([images / 16, np.ones((len(images), 1))]).astype(dtype)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order], labels[order]
    return images[HELD_OUT:], labels[HELD_OUT:], images[:HELD_OUT], labels[:HELD_OUT]


def place(array: str, device: int) -> tuple[ModuleType, int]:
    """The array library, and the GPU on which this device is; -1: it is on the host."""
    if array == "numpy":
        return np, -1
    import cupy

    return cupy, device % cupy.cuda.runtime.getDeviceCount()


def on_host(array: Any) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else array.get()


class Replica:
    """One device: its copy of the weights, and memory for one step, in the memory of the host or of a GPU.

    The last row of a layer's weights is the bias. Every method pushes ops to the engine and returns at once: on a
    GPU an op does no more than put work into a stream, and the engine sees to the order.
    """

    def __init__(
        self, widths: Sequence[int], images: int, dtype: str, seed: int, xp: ModuleType = np, gpu: int = -1
    ) -> None:
        self.xp = xp
        rng = np.random.default_rng(seed)
        weights = [np.vstack([rng.normal(0, np.sqrt(2 / m), (m, n)), np.zeros(n)]) for m, n in pairwise(widths)]
        with contextlib.nullcontext() if gpu < 0 else xp.cuda.Device(gpu):
            self.weights = [xp.asarray(w.astype(dtype)) for w in weights]
            self.grads = [xp.zeros_like(w) for w in self.weights]
            self.inputs = [xp.ones((images, n + 1), dtype) for n in widths[:-1]]  # the last column stays one
            self.deltas = [xp.zeros((images, n), dtype) for n in widths[1:]]  # the loss by each layer's output
            self.labels = xp.zeros(images, int)

    def load(self, images: np.ndarray, labels: np.ndarray) -> None:
        def op() -> None:
            self.inputs[0][:], self.labels[:] = self.xp.asarray(images), self.xp.asarray(labels)

        engine.push(op, writes=[self.inputs[0], self.labels], name="load")

    def forward(self, layer: int) -> None:
        x, w, y = self.inputs[layer], self.weights[layer], self.inputs[layer + 1]

        def op() -> None:
            self.xp.maximum(x @ w, 0, out=y[:, :-1])

        engine.push(op, reads=[x, w], writes=[y], name=f"forward {layer}")

    def loss(self, batch: int) -> engine.Handle:
        """The last layer and the cross-entropy of its softmax; the handle's result is this device's share.

        On a GPU that is an array there: to make it a number is to wait for it.
        """
        x, w, delta, labels, xp = self.inputs[-1], self.weights[-1], self.deltas[-1], self.labels, self.xp

        def op() -> Any:
            scores = x @ w
            scores -= scores.max(axis=1, keepdims=True)
            odds = xp.exp(scores)
            total = odds.sum(axis=1, keepdims=True)
            right = xp.arange(len(labels)), labels
            delta[:] = odds / total
            delta[right] -= 1
            delta[:] /= batch
            return (xp.log(total[:, 0]) - scores[right]).sum() / batch

        return engine.push(op, reads=[x, w, labels], writes=[delta], name="loss")

    def backward(self, layer: int) -> None:
        x, w, grad, delta = self.inputs[layer], self.weights[layer], self.grads[layer], self.deltas[layer]

        def gradient() -> None:
            self.xp.matmul(x.T, delta, out=grad)

        engine.push(gradient, reads=[x, delta], writes=[grad], name=f"gradient {layer}")
        if layer:
            before = self.deltas[layer - 1]

            def op() -> None:
                self.xp.multiply(delta @ w[:-1].T, x[:, :-1] > 0, out=before)

            engine.push(op, reads=[x, w, delta], writes=[before], name=f"backward {layer}")


def accuracy(weights: Sequence[np.ndarray], images: np.ndarray, labels: np.ndarray) -> float:
    x = images
    for w in weights[:-1]:
        x = np.hstack([np.maximum(x @ w, 0), np.ones_like(x[:, :1])])
    return float(np.mean((x @ weights[-1]).argmax(axis=1) == labels))


class Bar:
    """Progress: a live bar on a terminal, ten lines in all elsewhere."""

    def __init__(self, steps: int, batch: int, quiet: bool) -> None:
        self.steps, self.batch, self.quiet = steps, batch, quiet
        self.started = time.perf_counter()
        self.live: Progress | None = None
        if sys.stdout.isatty() and not quiet:
            self.live = Progress(BarColumn(), TextColumn("{task.percentage:3.0f}%  {task.description}"))
            self.live.add_task("", total=steps)
            self.live.start()

    def update(self, step: int, loss: float, staleness: int | tuple[int, int]) -> None:
        if self.quiet or (not self.live and step * 10 // self.steps == (step - 1) * 10 // self.steps):
            return
        rate = step * self.batch / (time.perf_counter() - self.started)
        text = f"loss {loss:.4f}  {rate:,.0f} samples/s  staleness {staleness}"
        if self.live:
            self.live.update(self.live.task_ids[0], completed=step, description=text)
        else:
            done = step * 20 // self.steps
            print(f"[{'#' * done}{'-' * (20 - done)}] {step:>4}/{self.steps}  {text}", flush=True)

    def stop(self) -> None:
        if self.live:
            self.live.stop()


def train(kv: kvstore.KVStore, args: argparse.Namespace) -> float:
    """Returns the accuracy on the held-out images."""
    images, labels, *held_out = load(args.dtype)
    parts = kv.num_workers * kv.num_devices
    if args.batch % parts:
        raise SystemExit(f"--batch {args.batch}: expected a multiple of {parts}, the devices of all workers")
    share = args.batch // parts

    widths = [64, *args.hidden, CLASSES]
    replicas = [
        Replica(widths, share, args.dtype, args.seed, *place(args.array, kv.rank * kv.num_devices + device))
        for device in range(kv.num_devices)
    ]
    layers = range(len(widths) - 1)
    keys = [f"layer {layer}" for layer in layers]
    weights = [[r.weights[layer] for r in replicas] for layer in layers]  # per layer, one array per device
    grads = [[r.grads[layer] for r in replicas] for layer in layers]

    kv.set_optimizer(kvstore.optim.SGD(lr=args.lr, momentum=args.momentum))
    kv.init(keys, replicas[0].weights)

    per_epoch = len(images) // args.batch
    steps = args.steps or args.epochs * per_epoch
    bar = Bar(steps, args.batch, args.quiet or kv.rank > 0)
    in_flight: deque[tuple[int, list[engine.Handle], list[kvstore.Handle]]] = deque()

    def finish_one() -> None:
        step, losses, exchanges = in_flight.popleft()
        for exchange in exchanges:
            exchange.result()
        loss = kv.num_workers * sum(float(handle.result()) for handle in losses)  # as far as this worker can tell
        bar.update(step, loss, max(exchange.staleness for exchange in exchanges))

    for step in range(steps):
        if step % per_epoch == 0:
            order = np.random.default_rng([args.seed, step]).permutation(len(images))  # alike in every worker
        batch = order[step % per_epoch * args.batch :][: args.batch]
        mine = batch[kv.rank * share * kv.num_devices :]
        losses = []
        for device, replica in enumerate(replicas):
            part = mine[device * share :][:share]
            replica.load(images[part], labels[part])
            for layer in layers[:-1]:
                replica.forward(layer)
            losses.append(replica.loss(args.batch))
        exchanges = []
        for layer in reversed(layers):
            for replica in replicas:
                replica.backward(layer)
            # The next forward pass needs the first layer's weights first: they may overtake.
            exchanges.append(kv.pushpull(keys[layer], grads[layer], out=weights[layer], priority=-layer))
        in_flight.append((step + 1, losses, exchanges))
        if len(in_flight) == STEPS_IN_FLIGHT:
            finish_one()
    while in_flight:
        finish_one()
    bar.stop()

    kv.barrier()  # now the values hold what every worker has pushed
    final = [on_host(w) for w in kv.pull(keys).result()]
    result = accuracy(final, *held_out)
    if kv.rank == 0:
        if args.save_weights:
            np.savez(args.save_weights, **dict(zip(keys, final, strict=True)))
        print(f"accuracy {result:.4f} on {HELD_OUT} held-out images", flush=True)
    return result


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--devices", type=int, default=1)
    option(
        "--array", choices=["numpy", "cupy"], default="numpy", help="cupy: devices are GPUs, several to one if need be"
    )
    option("--epochs", type=int, default=20)
    option("--steps", type=int, help="instead of --epochs")
    option("--batch", type=int, default=64, help="of all workers and devices together")
    option("--hidden", type=int, nargs="*", default=[128, 64], help="widths of the hidden layers")
    option("--lr", type=float, default=0.05)
    option("--momentum", type=float, default=0.9)
    option("--device-consistency", default="sequential", help="sequential, bounded(s) or eventual")
    option("--cluster-consistency", default="sequential", help="the same, among workers")
    option("--dtype", choices=["float32", "float64"], default="float32")
    option("--seed", type=int, default=1)
    option("--save-weights", metavar="FILE.npz")
    option("--quiet", action="store_true", help="print the accuracy alone")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> float:
    args = options(argv)
    where = {"type": "device"}
    if environment.read().address is not None:  # a worker of a cluster
        where = {"type": "dist", "cluster_consistency": args.cluster_consistency}
    with (
        threadpoolctl.threadpool_limits(1),  # the engine runs layers and devices in parallel, BLAS need not
        kvstore.create(devices=args.devices, device_consistency=args.device_consistency, **where) as kv,
    ):
        return train(kv, args)


if __name__ == "__main__":
    main()
