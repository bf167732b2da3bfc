"""Every wait has a deadline: all public calls against servers that have stopped answering, on the simulated clock."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvstore
from kvstore import KVStore
from kvstore.errors import DeadlineError
from kvstore.testing import Cluster

TIMEOUT_S = 20.0
SLACK_S = 10.0  # for asking why

VALUE = np.ones(4, np.float32)

CALLS: dict[str, Callable[[KVStore, Path], Any]] = {
    "init": lambda kv, _: kv.init("new", VALUE),
    "push": lambda kv, _: kv.push("w", VALUE).result(),
    "pull": lambda kv, _: kv.pull("w").result(),
    "pushpull": lambda kv, _: kv.pushpull("w", VALUE.copy()).result(),
    "broadcast": lambda kv, _: kv.broadcast("new", VALUE).result(),
    "view": lambda kv, _: kv.view("fresh"),
    "set_optimizer": lambda kv, _: kv.set_optimizer(kvstore.optim.SGD(lr=0.2), replace=True),
    "set_hyperparameters": lambda kv, _: kv.set_hyperparameters(lr=0.3),
    "barrier": lambda kv, _: (kv.push("w", VALUE), kv.barrier()),
    "save_optimizer_states": lambda kv, path: kv.save_optimizer_states(path / "states"),
    "load_optimizer_states": lambda kv, path: kv.load_optimizer_states(path / "saved"),
    "wait_for_commits": lambda kv, _: (kv.push("w", VALUE), kv.wait_for_commits()),
    "leave": lambda kv, _: (kv.push("w", VALUE), kv.leave()),
    "close": lambda kv, _: (kv.push("w", VALUE), kv.close()),
}
NO_WAIT = {"dead_workers", "rounds", "set_updater"}
TESTED_ELSEWHERE = {"staging"}  # its wait is on the real clock: tests/cluster/test_shared_memory.py


def test_all_calls_are_listed() -> None:
    public = {name for name, member in vars(KVStore).items() if callable(member) and not name.startswith("_")}
    assert public == set(CALLS) | NO_WAIT | TESTED_ELSEWHERE


@pytest.mark.parametrize("lost", ["server", "scheduler"])
@pytest.mark.parametrize("call", CALLS)
def test_a_call_ends_when_its_deadline_passes(call: str, lost: str, tmp_path: Path) -> None:
    if lost == "scheduler" and call != "barrier":
        pytest.skip("it does not need the scheduler")
    with Cluster(1, 1, seed=3, heartbeat_s=5e5, timeout=TIMEOUT_S) as cluster:

        def program(kv: KVStore) -> None:
            kv.set_optimizer(kvstore.optim.SGD(lr=0.1, momentum=0.9))
            kv.init(["w", "fresh"], [VALUE, VALUE])
            kv.pushpull("w", VALUE.copy()).result()
            kv.save_optimizer_states(tmp_path / "saved")
            cluster.pause(lost)
            began = cluster.now
            with pytest.raises(DeadlineError) as caught:
                CALLS[call](kv, tmp_path)
            waited = cluster.now - began
            assert TIMEOUT_S <= waited <= TIMEOUT_S + SLACK_S
            assert "does not answer" in str(caught.value)
            raise StopIteration  # leaves without waiting

        with pytest.raises((StopIteration, RuntimeError)):
            cluster.run(program)
