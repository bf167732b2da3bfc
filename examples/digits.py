"""Train a multi-layer perceptron on handwritten digits through the store, with NumPy alone.

One process, one process with several devices, or a cluster; the program is the same::

    python examples/digits.py
    python examples/digits.py --devices 2
    kvstore run -w 2 -s 1 -- python examples/digits.py --devices 2

Every layer's forward and backward pass is an op of the engine, which knows what it reads and writes.
So a layer's gradient travels while the layer before it is still computing, and the next forward
pass of a layer starts as soon as its own weights have arrived. The global batch is the same however
many workers and devices share it.
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import pairwise

import numpy as np
from sklearn.datasets import load_digits

import engine
import kvstore
from kvstore import environment

HELD_OUT = 360  # of the 1,797 images


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--steps", type=int, help="stop after so many steps")
    parser.add_argument("--batch", type=int, default=64, help="images per step, over all workers and devices")
    parser.add_argument("--hidden", type=int, nargs="*", default=[128, 64])
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--device-consistency", default="sequential")
    parser.add_argument("--cluster-consistency", default="sequential")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-weights", help="write the final weights to this .npz file (rank 0)")
    return parser.parse_args()


def images(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training and held-out images (n x 64, float32 in 0..1) with their digits."""
    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    pixels, digits = (data.data[order] / 16).astype(np.float32), data.target[order]
    return pixels[HELD_OUT:], digits[HELD_OUT:], pixels[:HELD_OUT], digits[:HELD_OUT]


def initial_weights(sizes: list[int], seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    weights = {}
    for layer, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        scale = np.sqrt(2 / fan_in)
        weights[f"w{layer}"] = (rng.standard_normal((fan_in, fan_out)) * scale).astype(np.float32)
        weights[f"b{layer}"] = np.zeros(fan_out, np.float32)
    return weights


class Replica:
    """One device's copy of the network: its weights, gradients and activations, and the ops on them."""

    def __init__(self, weights: dict[str, np.ndarray], batch: int, share: int) -> None:
        self.weights = {key: value.copy() for key, value in weights.items()}
        self.gradients = {key: np.zeros_like(value) for key, value in weights.items()}
        self.layers = len(weights) // 2
        widths = [weights["w0"].shape[0]] + [weights[f"b{layer}"].size for layer in range(self.layers)]
        self.activations = [np.zeros((share, width), np.float32) for width in widths]
        self.errors = [np.zeros((share, width), np.float32) for width in widths]
        self.digits = np.zeros(share, np.int64)
        self.loss = np.zeros(1)
        self.batch = batch

    def load(self, pixels: np.ndarray, digits: np.ndarray) -> None:
        """An op that brings in this device's share of the next batch."""

        def copy() -> None:
            self.activations[0][:] = pixels
            self.digits[:] = digits

        engine.push(copy, writes=[self.activations[0], self.digits], name="load")

    def forward(self, layer: int) -> None:
        w, b = self.weights[f"w{layer}"], self.weights[f"b{layer}"]
        x, y = self.activations[layer], self.activations[layer + 1]

        def compute() -> None:
            np.matmul(x, w, out=y)
            np.add(y, b, out=y)
            if layer < self.layers - 1:
                np.maximum(y, 0, out=y)

        engine.push(compute, reads=[x, w, b], writes=[y], name=f"forward {layer}")

    def softmax(self) -> None:
        """The loss, and its gradient by the last layer's output, as a mean over the global batch."""
        y, e = self.activations[-1], self.errors[-1]

        def compute() -> None:
            p = np.exp(y - y.max(axis=1, keepdims=True))
            p /= p.sum(axis=1, keepdims=True)
            rows = np.arange(len(p))
            self.loss[0] = -np.log(p[rows, self.digits] + 1e-9).mean()
            p[rows, self.digits] -= 1
            e[:] = p / self.batch

        engine.push(compute, reads=[y, self.digits], writes=[e, self.loss], name="softmax")

    def backward(self, layer: int) -> None:
        w, gw, gb = self.weights[f"w{layer}"], self.gradients[f"w{layer}"], self.gradients[f"b{layer}"]
        x, e, before = self.activations[layer], self.errors[layer + 1], self.errors[layer]

        def compute() -> None:
            np.matmul(x.T, e, out=gw)
            np.sum(e, axis=0, out=gb)
            if layer:
                np.matmul(e, w.T, out=before)
                np.multiply(before, x > 0, out=before)

        engine.push(compute, reads=[x, e, w], writes=[gw, gb, before], name=f"backward {layer}")


def accuracy(weights: dict[str, np.ndarray], pixels: np.ndarray, digits: np.ndarray) -> float:
    layers = len(weights) // 2
    for layer in range(layers):
        pixels = pixels @ weights[f"w{layer}"] + weights[f"b{layer}"]
        if layer < layers - 1:
            pixels = np.maximum(pixels, 0)
    return float((pixels.argmax(axis=1) == digits).mean())


class Progress:
    """A bar that redraws itself on a terminal and prints a line now and then elsewhere."""

    def __init__(self, total: int) -> None:
        self.total, self.live = total, sys.stdout.isatty()
        self.started = self.shown = time.monotonic()

    def show(self, step: int, loss: float, samples: int, staleness: object) -> None:
        now = time.monotonic()
        if step < self.total and now - self.shown < (0.1 if self.live else 1.0):
            return
        self.shown = now
        bar = "#" * (20 * step // self.total)
        line = (
            f"[{bar:<20}] step {step}/{self.total}  loss {loss:.4f}  "
            f"{samples / (now - self.started):,.0f} samples/s  staleness {staleness}"
        )
        print(
            f"\r{line}" if self.live else line,
            end="" if self.live and step < self.total else "\n",
            flush=True,
        )


def train(kv: kvstore.KVStore, args: argparse.Namespace) -> float:
    train_x, train_y, test_x, test_y = images(args.seed)
    parts = kv.num_workers * args.devices
    if args.batch % parts:
        raise SystemExit(f"--batch {args.batch}: expected a multiple of {parts}, workers times devices")
    share = args.batch // parts
    weights = initial_weights([64, *args.hidden, 10], args.seed)
    replicas = [Replica(weights, args.batch, share) for _ in range(args.devices)]
    layers = range(replicas[0].layers)
    keys = list(weights)
    kv.set_optimizer(kvstore.optim.SGD(lr=args.lr, momentum=args.momentum))
    kv.init(keys, list(weights.values()))
    for key in keys:
        kv.pull(key, out=[r.weights[key] for r in replicas]).result()

    steps_per_epoch = len(train_x) // args.batch
    steps = args.steps or args.epochs * steps_per_epoch
    progress = Progress(steps)
    for step in range(steps):
        epoch, position = divmod(step, steps_per_epoch)
        order = np.random.default_rng((args.seed, epoch)).permutation(len(train_x))
        batch = order[position * args.batch : (position + 1) * args.batch]
        for d, replica in enumerate(replicas):
            part = kv.rank * args.devices + d
            mine = batch[part * share : (part + 1) * share]
            replica.load(train_x[mine], train_y[mine])
            for layer in layers:
                replica.forward(layer)
            replica.softmax()
        pulls = []
        for layer in reversed(layers):
            for replica in replicas:
                replica.backward(layer)
            for key in (f"w{layer}", f"b{layer}"):  # these ops wait for the gradients by themselves
                first_needed = len(layers) - layer
                kv.push(key, [r.gradients[key] for r in replicas], priority=first_needed)
                pulls.append(kv.pull(key, out=[r.weights[key] for r in replicas], priority=first_needed))
        engine.wait(*(r.loss for r in replicas))
        loss = sum(float(r.loss[0]) for r in replicas) / len(replicas)
        pulls[-1].result()
        progress.show(step + 1, loss, (step + 1) * args.batch, pulls[-1].staleness)

    kv.barrier()
    final = {key: kv.pull(key).result() for key in keys}
    if args.save_weights and kv.rank == 0:
        np.savez(args.save_weights, **final)
    return accuracy(final, test_x, test_y)


def main() -> None:
    args = parse()
    kind = "local" if environment.read().address is None else "dist"
    options = {"cluster_consistency": args.cluster_consistency} if kind == "dist" else {}
    with kvstore.create(kind, devices=args.devices, device_consistency=args.device_consistency, **options) as kv:
        reached = train(kv, args)
        print(f"accuracy {reached:.4f} on {HELD_OUT} held-out images", flush=True)


if __name__ == "__main__":
    main()
