"""One worker of MXNet's distributed store under measurement, in MXNet's own interpreter.

python mxnet_worker.py CONTROL BARRIER RANK WORKERS TYPE OPTIMIZER

MXNet's rank is decided by its scheduler; RANK only orders the start of rounds.
"""

import math
import sys
import weakref

import mxnet as mx
from member import Member, Round


def optimizer_called(name):
    if name == "sgd":
        return mx.optimizer.SGD(learning_rate=1e-3, momentum=0.9)
    return mx.optimizer.Adam(learning_rate=1e-4)


class Value:
    """Keys with the caller's arrays; cases that do different things with the same keys share them."""

    def __init__(self, kv, case):
        shapes = [tuple(shape) for shape in case["shapes"]]
        self.keys = [f"{case['keys']} {number}" for number in range(len(shapes))]
        self.gradients = [mx.nd.ones(shape) for shape in shapes]
        self.outs = [mx.nd.zeros(shape) for shape in shapes]
        for key, out in zip(self.keys, self.outs, strict=True):
            kv.init(key, out)
        mx.nd.waitall()


values = weakref.WeakValueDictionary()


def make(kv, optimizer, case):
    value = values.get(case["keys"])
    if value is None:
        value = values[case["keys"]] = Value(kv, case)
    operation = case["operation"]
    keys, gradients, outs = value.keys, value.gradients, value.outs
    key, gradient, out = (keys[0], gradients[0], outs[0]) if len(keys) == 1 else (keys, gradients, outs)

    def fill():  # every time: a pull of MXNet may overwrite the array that was pushed
        for array in value.gradients:
            array[:] = 1
        mx.nd.waitall()

    def once():
        if operation == "push":
            kv.push(key, gradient)
        elif operation == "pull":
            kv.pull(key, out=out)
        elif operation == "push, pull":
            kv.push(key, gradient)
            kv.pull(key, out=out)
        else:
            kv.pushpull(key, gradient, out=out)
        mx.nd.waitall()

    def check():
        if operation in ("push", "pull"):
            return
        for array in outs:
            first = float(array.reshape(-1)[0].asscalar())
            right = first == kv.num_workers if optimizer == "none" else math.isfinite(first) and first != 0
            if not right:
                raise ValueError(f"wrong result: {first}")

    return Round(fill, once, check)


def main(control, barrier, rank, workers, store, optimizer):
    kv = mx.kv.create(store)
    if optimizer != "none":
        kv.set_optimizer(optimizer_called(optimizer))
    member = Member(control, barrier, int(rank), int(workers))
    member.serve(lambda case: make(kv, optimizer, case), version=mx.__version__)


if __name__ == "__main__":
    main(*sys.argv[1:])
