"""A server of real processes is killed, stopped, started again and drained while three workers train."""

from __future__ import annotations

import signal
import time

import pytest

from tests.faults.processes import LIMIT_S, Processes, processes

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
    if round == 50:
        say("half")
    time.sleep(0.01)
say("pause", f"{pause:.2f}")
import hashlib
say("weights", hashlib.sha256(b"".join(value.tobytes() for value in values)).hexdigest())
kv.close()
"""
ROUNDS = 300


def train(running: Processes, fault: object = None, rounds: int = ROUNDS) -> tuple[set[str], float]:
    """The digests of the workers' weights, and the longest round in seconds."""
    workers = [running.worker(TRAIN.replace("ROUNDS", str(rounds)), rank) for rank in range(3)]
    for worker in workers:
        worker.line("half")
    if callable(fault):
        fault()
    pauses = [float(worker.line("pause").split()[1]) for worker in workers]
    weights = {worker.line("weights").split()[1] for worker in workers}
    assert [worker.ends() for worker in workers] == [0, 0, 0]
    return weights, max(pauses)


@pytest.fixture(scope="module")
def undisturbed() -> set[str]:
    with processes(3, 2) as running:
        weights, _ = train(running)
    assert len(weights) == 1
    return weights


@pytest.mark.parametrize("server", [0, 1])
def test_a_killed_server_changes_no_bit(server: int, undisturbed: set[str]) -> None:
    with processes(3, 2, replication=1) as running:
        weights, pause = train(running, running.servers[server].kill)
        print(f"pause after kill -9 of server {server}: {pause:.2f} s")
        assert weights == undisturbed


def test_a_killed_server_returns(undisturbed: set[str]) -> None:
    with processes(3, 2, replication=1) as running:

        def replace() -> None:
            running.servers[1].kill()
            time.sleep(2.0)
            running.server(1)

        weights, _ = train(running, replace)
        assert weights == undisturbed


def test_a_stopped_server_steps_back(undisturbed: set[str]) -> None:
    with processes(3, 2, replication=1) as running:
        old = running.servers[0]
        weights, pause = train(running, lambda: old.signal(signal.SIGSTOP))
        print(f"pause after kill -STOP of a server: {pause:.2f} s")
        assert weights == undisturbed
        old.signal(signal.SIGCONT)
        old.line("kvstore: server at")
        assert old.ends() == 1


@pytest.mark.parametrize("replication", [0, 1])
def test_sigterm_drains(replication: int, undisturbed: set[str]) -> None:
    with processes(3, 2, replication=replication) as running:
        leaving = running.servers[1]

        def terminate() -> None:
            leaving.signal(signal.SIGTERM)
            assert leaving.ends() == 0

        weights, pause = train(running, terminate)
        print(f"pause while a server is drained: {pause:.2f} s")
        assert weights == undisturbed


def test_without_replication_a_killed_server_is_an_error() -> None:
    with processes(1, 2) as running:
        worker = running.worker(TRAIN.replace("ROUNDS", "100000"), 0)
        worker.line("half")
        running.servers[0].kill()
        assert worker.ends(LIMIT_S) == 1
        worker.line("kvstore.errors.ServerLostError: server 0 is gone")
