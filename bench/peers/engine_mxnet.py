"""MXNet's engine as it is used from Python, by tiny imperative operators, in MXNet's own interpreter.

Reads the name of a pattern per line; answers each with the microseconds per operator.
"""

import sys
import time

import mxnet as mx

OPS = 10_000
WAITS = 2_000
BULK = 50
READERS = 8

a = mx.nd.zeros(1)
many = [mx.nd.zeros(1) for _ in range(64)]


def chain():
    for _ in range(OPS):
        a.__iadd__(1)
    return OPS


def independent():
    for number in range(OPS):
        many[number % len(many)].__iadd__(1)
    return OPS


def fan():
    rounds = OPS // (1 + READERS)
    for _ in range(rounds):
        a.__iadd__(1)
        for reader in range(READERS):
            a.copyto(many[reader])
    return rounds * (1 + READERS)


def bulk():
    for _ in range(OPS // BULK):
        with mx.engine.bulk(BULK):
            for number in range(BULK):
                many[number].__iadd__(1)
        mx.nd.waitall()
    return OPS


def op_and_wait():
    for _ in range(WAITS):
        a.__iadd__(1)
        a.wait_to_read()
    return WAITS


PATTERNS = {
    "chain": chain,
    "independent": independent,
    "1 writer, 8 readers": fan,
    "bulk of 50": bulk,
    "op and wait": op_and_wait,
}

print(mx.__version__, flush=True)
for pattern in PATTERNS.values():
    pattern()
for line in sys.stdin:
    mx.nd.waitall()
    start = time.perf_counter()
    ops = PATTERNS[line.strip()]()
    mx.nd.waitall()
    print((time.perf_counter() - start) / ops * 1e6, flush=True)
