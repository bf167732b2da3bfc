"""A server of real processes is killed, stopped, started again and drained while three workers train."""

from __future__ import annotations

import signal
import time

import pytest

from tests.faults.processes import LIMIT_S, processes
from tests.faults.training import TRAIN, train


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
        worker.line("round 50")
        running.servers[0].kill()
        assert worker.ends(LIMIT_S) == 1
        worker.line("kvstore.errors.ServerLostError: server 0 is gone")
