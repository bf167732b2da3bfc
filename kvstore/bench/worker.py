"""One worker of kvstore under measurement; started by :mod:`kvstore.bench.systems`."""

from __future__ import annotations

import math
import sys
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

import kvstore
from kvstore import environment
from kvstore.arrays import Array
from kvstore.bench.apart.member import Member, Round

OPTIMIZERS: dict[str, Callable[[], kvstore.optim.Optimizer]] = {
    "sgd": lambda: kvstore.optim.SGD(lr=1e-3, momentum=0.9),
    "adam": lambda: kvstore.optim.Adam(lr=1e-4),
}

COMPUTE_S_PER_BYTE = 0.4e-9  # of the forward pass, and of the backward pass: less than a round takes by TCP
LATE_S = 0.3  # how much later than the others the last worker comes to a round of the operation "late"


def staged_round(kv: kvstore.KVStore, key: str) -> Array:
    """Push what was produced in the store's memory, and read the result there: no copy on the caller's side."""
    value: Array = kv.pushpull(key, kv.staging(key)).result()
    return value


class Value:
    """Keys with the caller's arrays; cases that do different things with the same keys share them."""

    def __init__(self, kv: kvstore.KVStore, case: dict[str, Any]) -> None:
        shapes = [tuple(shape) for shape in case["shapes"]]
        self.keys = [f"{case['keys']} {number}" for number in range(len(shapes))]
        self.gradients = [np.zeros(shape, np.float32) for shape in shapes]
        self.outs = [np.zeros(shape, np.float32) for shape in shapes]
        kv.init(self.keys, self.outs, cluster_consistency=case.get("consistency"))

    def fill(self) -> None:
        for array in self.gradients:
            array.fill(1)


_values: weakref.WeakValueDictionary[str, Value] = weakref.WeakValueDictionary()


def cluster_round(kv: kvstore.KVStore, case: dict[str, Any], optimizer: str) -> Round:
    """A case of a cluster: every worker calls this with the same case."""
    value = _values.get(case["keys"])
    if value is None:
        value = _values[case["keys"]] = Value(kv, case)
    operation = case["operation"]
    if operation == "staged":
        return _staged(kv, value, optimizer)
    if operation in ("step", "step by priority"):
        return _step(kv, value, optimizer, by_priority=operation == "step by priority")
    outs = value.gradients if operation == "in place" else value.outs
    one = len(value.keys) == 1  # as a user would call it
    key, gradient, out = (value.keys[0], value.gradients[0], outs[0]) if one else (value.keys, value.gradients, outs)

    def once() -> None:
        if operation == "push":
            kv.push(key, gradient).result()
        elif operation == "pull":
            kv.pull(key, out).result()
        else:
            if operation == "late" and kv.rank == kv.num_workers - 1:
                time.sleep(LATE_S)
            kv.pushpull(key, gradient, out).result()

    def check() -> None:
        if operation in ("pushpull", "in place", "late"):
            same = case.get("consistency") in (None, "sequential")
            _check(outs, kv.num_workers if optimizer == "none" and same else None)

    return Round(value.fill, once, check)


def _staged(kv: kvstore.KVStore, value: Value, optimizer: str) -> Round:
    last: list[Array] = []

    def fill() -> None:
        for key in value.keys:
            kv.staging(key).fill(1)

    def once() -> None:
        last[:] = [staged_round(kv, key) for key in value.keys]

    return Round(fill, once, lambda: _check(last, kv.num_workers if optimizer == "none" else None))


def _step(kv: kvstore.KVStore, value: Value, optimizer: str, *, by_priority: bool) -> Round:
    """A training step with emulated compute: backward from the last key, then forward as the weights come."""
    keys, gradients, outs = value.keys, value.gradients, value.outs
    compute_s = COMPUTE_S_PER_BYTE * sum(array.nbytes for array in gradients) / len(keys)

    def once() -> None:
        handles = []
        for position in reversed(range(len(keys))):
            time.sleep(compute_s)
            priority = -position if by_priority else 0
            handles.append(kv.pushpull(keys[position], gradients[position], outs[position], priority))
        for handle in reversed(handles):
            handle.result()
            time.sleep(compute_s)

    def check() -> None:
        _check(outs, kv.num_workers if optimizer == "none" else None)

    return Round(value.fill, once, check)


def local_round(kv: kvstore.KVStore, case: dict[str, Any], optimizer: str) -> Round:
    """A case of one process with several devices."""
    shapes = [tuple(shape) for shape in case["shapes"]]
    keys = [f"{case['keys']} {number}" for number in range(len(shapes))]
    kv.init(keys, [np.zeros(shape, np.float32) for shape in shapes])
    gradients = [[np.empty(shape, np.float32) for _ in range(case["devices"])] for shape in shapes]
    outs = [[np.zeros(shape, np.float32) for _ in range(case["devices"])] for shape in shapes]

    def fill() -> None:
        for arrays in gradients:
            for array in arrays:
                array.fill(1)

    def check() -> None:
        _check([array for arrays in outs for array in arrays], case["devices"] if optimizer == "none" else None)

    return Round(fill, lambda: kv.pushpull(keys, gradients, outs).result(), check)


def _check(arrays: list[Array], expected: int | None) -> None:
    for array in arrays:
        first, last = (float(array.reshape(-1)[at]) for at in (0, -1))
        right = first == last == expected if expected is not None else math.isfinite(first) and first != 0 != last
        if not right:
            raise ValueError(f"wrong result: expected {expected}, got {first} ... {last}")


def main(control: str, barrier: str, workers: int, optimizer: str, devices: int) -> None:
    """Be a worker of the cluster that the environment names, or with ``devices`` a store of one process."""
    kv = kvstore.create("local", devices=devices) if devices else kvstore.create("dist")
    with kv:
        if optimizer != "none":
            kv.set_optimizer(OPTIMIZERS[optimizer]())
        make = local_round if devices else cluster_round
        member = Member(control, barrier, kv.rank, workers)
        member.serve(
            lambda case: make(kv, case, optimizer), version=kvstore.__version__, address=environment.read().address
        )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
