"""MXNet's `local` or `device` store with several devices in one process, in MXNet's own interpreter.

python local_mxnet.py CONTROL BARRIER TYPE OPTIMIZER
"""

import sys

import mxnet as mx
from member import Member, Round
from mxnet_worker import optimizer_called


def make(kv, optimizer, case):
    shapes = [tuple(shape) for shape in case["shapes"]]
    keys = [f"{case['keys']} {number}" for number in range(len(shapes))]
    devices = [mx.cpu(number) for number in range(case["devices"])]
    gradients = [[mx.nd.ones(shape, ctx=device) for device in devices] for shape in shapes]
    outs = [[mx.nd.zeros(shape, ctx=device) for device in devices] for shape in shapes]
    for key, shape in zip(keys, shapes, strict=True):
        kv.init(key, mx.nd.zeros(shape))
    mx.nd.waitall()

    def fill():
        for arrays in gradients:
            for array in arrays:
                array[:] = 1
        mx.nd.waitall()

    def once():
        for position, (key, values, results) in enumerate(zip(keys, gradients, outs, strict=True)):
            kv.push(key, values, priority=-position)
            kv.pull(key, results, priority=-position)
        mx.nd.waitall()

    def check():
        for arrays in outs:
            first = float(arrays[-1].reshape(-1)[0].asscalar())
            if first != len(devices) if optimizer == "none" else first == 0:
                raise ValueError(f"wrong result: {first}")

    return Round(fill, once, check)


def main(control, barrier, store, optimizer):
    kv = mx.kv.create(store)
    if optimizer != "none":
        kv.set_optimizer(optimizer_called(optimizer))
    Member(control, barrier, 0, 1).serve(lambda case: make(kv, optimizer, case), version=mx.__version__)


if __name__ == "__main__":
    main(*sys.argv[1:])
