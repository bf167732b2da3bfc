"""A small convolutional network for handwritten digits, in NumPy or, on a GPU, in CuPy, behind a Trainer.

    python examples/convolution.py                                              # one process
    python examples/convolution.py --array cupy                                 # the same on a GPU
    kvstore run -w 2 -s 1 -- python examples/convolution.py --array cupy        # two workers, on one GPU if need be

The arrays are the program's own, and so are the streams that it works on: the store takes the gradients from where
they are, and writes the new weights there. The gradients of a layer are pushed as soon as they have been enqueued: what
the servers and the network do with them goes on while the layers before it are differentiated.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

import kvstore
from kvstore import environment

HELD_OUT = 360  # of the 1,797 images
CLASSES = 10
SIZE = 3  # of a kernel


def load(dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Images of 8 x 8 pixels with one channel, and labels, in an order that is the same everywhere."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    return (images[order] / 16).astype(dtype).reshape(-1, 8, 8, 1), labels[order]


def first_weights(channels: Sequence[int], dtype: str, seed: int) -> dict[str, np.ndarray]:
    """By name, in the order of the forward pass."""
    rng = np.random.default_rng(seed)
    weights: dict[str, np.ndarray] = {}
    edge, before = 8, 1
    for number, after in enumerate(channels):
        shape = (SIZE, SIZE, before, after)
        weights[f"conv {number}"] = rng.normal(0, np.sqrt(2 / (SIZE * SIZE * before)), shape)
        weights[f"conv {number} bias"] = np.zeros(after)
        edge, before = edge - SIZE + 1, after
    inputs = edge * edge * before
    weights["dense"] = rng.normal(0, np.sqrt(1 / inputs), (inputs, CLASSES))
    weights["dense bias"] = np.zeros(CLASSES)
    return {name: weight.astype(dtype) for name, weight in weights.items()}


def windows(x: Any) -> Iterator[tuple[int, int, Any]]:
    """What each element of a kernel sees of the images."""
    rows, columns = x.shape[1] - SIZE + 1, x.shape[2] - SIZE + 1
    for i in range(SIZE):
        for j in range(SIZE):
            yield i, j, x[:, i : i + rows, j : j + columns]


class Network:
    """Its weights, by name, and the two passes through it."""

    def __init__(self, xp: ModuleType, weights: dict[str, Any]) -> None:
        self.xp, self.weights = xp, weights
        self.convolutions = sum(name.startswith("conv") for name in weights) // 2

    def forward(self, images: Any) -> tuple[list[Any], Any]:
        """What goes into each layer, and the scores."""
        inputs = [images]
        for number in range(self.convolutions):
            kernel = self.weights[f"conv {number}"]
            y = sum(seen @ kernel[i, j] for i, j, seen in windows(inputs[-1])) + self.weights[f"conv {number} bias"]
            inputs.append(self.xp.maximum(y, 0))
        inputs.append(inputs.pop().reshape(len(images), -1))
        return inputs, inputs[-1] @ self.weights["dense"] + self.weights["dense bias"]

    def backward(self, inputs: list[Any], delta: Any) -> Iterator[tuple[str, Any]]:
        """The gradients, as they come: of the last layer first. ``delta``: the loss by the scores.

        A layer's weights may be written from when its gradient is out of hand.
        """
        gradient, bias, delta = inputs[-1].T @ delta, delta.sum(axis=0), delta @ self.weights["dense"].T
        yield "dense", gradient
        yield "dense bias", bias
        for number in reversed(range(self.convolutions)):
            x, kernel = inputs[number], self.weights[f"conv {number}"]
            y = inputs[number + 1]
            delta = (delta * (y.reshape(delta.shape) > 0)).reshape(len(x), *(n - SIZE + 1 for n in x.shape[1:3]), -1)
            flat, gradient, before = delta.reshape(-1, kernel.shape[3]), self.xp.empty_like(kernel), None
            for i, j, seen in windows(x):
                gradient[i, j] = seen.reshape(-1, kernel.shape[2]).T @ flat
            if number:
                before = self.xp.zeros_like(x)
                for i, j, part in windows(before):
                    part += delta @ kernel[i, j].T
            yield f"conv {number}", gradient
            yield f"conv {number} bias", flat.sum(axis=0)
            delta = before

    def loss_by_scores(self, scores: Any, labels: Any) -> tuple[Any, Any]:
        """The cross-entropy of the softmax, summed, and what it changes by each score."""
        scores = scores - scores.max(axis=1, keepdims=True)
        odds = self.xp.exp(scores)
        total = odds.sum(axis=1, keepdims=True)
        right = labels[:, None] == self.xp.arange(CLASSES)
        return (self.xp.log(total[:, 0]) - (scores * right).sum(axis=1)).sum(), odds / total - right


def train(kv: kvstore.KVStore, xp: ModuleType, args: argparse.Namespace) -> float:
    """Returns the accuracy on the held-out images."""
    images, labels = (xp.asarray(array) for array in load(args.dtype))
    weights = {name: xp.asarray(w) for name, w in first_weights(args.channels, args.dtype, args.seed).items()}
    network = Network(xp, weights)
    rule = kvstore.optim.SGD(lr=args.lr, momentum=0.9)
    trainer = kvstore.Trainer(weights, rule, kv, scale=1 / args.batch)
    share = args.batch // kv.num_workers

    per_epoch = (len(images) - HELD_OUT) // args.batch
    for epoch in range(args.epochs):
        order = HELD_OUT + np.random.default_rng([args.seed, epoch]).permutation(per_epoch * args.batch)
        losses = []
        for start in range(0, len(order), args.batch):
            mine = xp.asarray(order[start + kv.rank * share :][:share])
            inputs, scores = network.forward(images[mine])
            loss, delta = network.loss_by_scores(scores, labels[mine])
            losses.append(loss)
            for name, gradient in network.backward(inputs, delta.astype(args.dtype)):
                trainer.push(name, gradient)
            trainer.step()  # what has been pushed; the next forward pass has the new weights
        if kv.rank == 0 and not args.quiet:
            print(f"epoch {epoch + 1}: loss {float(sum(losses)) / (len(losses) * share):.4f}", flush=True)

    kv.barrier()
    _, scores = network.forward(images[:HELD_OUT])
    accuracy = float((scores.argmax(axis=1) == labels[:HELD_OUT]).mean())
    if kv.rank == 0:
        print(f"accuracy {accuracy:.4f} on {HELD_OUT} held-out images", flush=True)
    return accuracy


def work(kv: kvstore.KVStore, args: argparse.Namespace) -> float:
    """What a worker does, on a GPU of its own as far as there are enough."""
    if args.batch % kv.num_workers:
        raise SystemExit(f"--batch {args.batch}: expected a multiple of the {kv.num_workers} workers")
    if args.array == "numpy":
        return train(kv, np, args)
    import cupy

    with cupy.cuda.Device(kv.rank % cupy.cuda.runtime.getDeviceCount()):
        return train(kv, cupy, args)


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--array", choices=["numpy", "cupy"], default="numpy")
    option("--epochs", type=int, default=6)
    option("--batch", type=int, default=48, help="of all workers together")
    option("--channels", type=int, nargs="*", default=[8, 16], help="of the convolutions")
    option("--lr", type=float, default=0.05)
    option("--dtype", choices=["float32", "float64"], default="float32")
    option("--seed", type=int, default=1)
    option("--quiet", action="store_true", help="print the accuracy alone")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> float:
    args = options(argv)
    with kvstore.create("device" if environment.read().address is None else "dist") as kv:
        return work(kv, args)


if __name__ == "__main__":
    main()
