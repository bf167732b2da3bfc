"""Three workers that train sequentially for so many rounds, as real processes, and the bits that they end with."""

from __future__ import annotations

from collections.abc import Callable

from tests.faults.processes import Process, Processes

TRAIN = """
kv = kvstore.create("dist", timeout=60)
keys = [f"key{i}" for i in range(8)]
shapes = [(3,), (40, 10), (100, 1000)] + [(5,)] * 5
kv.init(keys, [np.zeros(shape, np.float32) for shape in shapes])
kv.set_optimizer(kvstore.optim.Adam(lr=0.01))
pause, last, round = 0.0, time.monotonic(), 0
say("trains")
until = ROUNDS
while round < until:
    round += 1
    pushes = [np.full(shape, (kv.rank + 1) * 0.1 * ((round + i) % 7 - 3), np.float32) for i, shape in enumerate(shapes)]
    values = kv.pushpull(keys, pushes).result()
    pause, last = max(pause, time.monotonic() - last), time.monotonic()
    if round % 50 == 0:
        say("round", round)
    time.sleep(0.01)
say("pause", f"{pause:.2f}")
import hashlib
say("weights", hashlib.sha256(b"".join(value.tobytes() for value in values)).hexdigest())
kv.close()
"""
ROUNDS = 300


def start(running: Processes) -> list[Process]:
    """They have made 50 rounds when this returns."""
    workers = [running.worker(TRAIN.replace("ROUNDS", str(ROUNDS)), rank) for rank in range(3)]
    for worker in workers:
        worker.line("round 50")
    return workers


def train(running: Processes, fault: Callable[[], object] = lambda: None) -> tuple[set[str], float]:
    """What :func:`ends` says when there was this fault in between."""
    workers = start(running)
    fault()
    return ends(workers)


def ends(workers: list[Process]) -> tuple[set[str], float]:
    """The digests of the workers' weights, and the longest round in seconds."""
    pauses = [float(worker.line("pause").split()[1]) for worker in workers]
    weights = {worker.line("weights").split()[1] for worker in workers}
    assert [worker.ends() for worker in workers] == [0, 0, 0]
    return weights, max(pauses)
