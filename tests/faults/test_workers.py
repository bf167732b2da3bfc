"""Workers as real processes that are killed, stopped, come back, join and leave."""

from __future__ import annotations

import json
import signal
import time

import numpy as np
import pytest

from tests.faults.processes import Process, processes

HEARTBEAT_S = 3.0  # the default
SLACK_S = 2.0  # of a loaded machine, on top of a deadline

STEADY = """
with kvstore.create("dist", timeout=50) as kv:
    kv.init("w", np.zeros(4, np.float32))
    kv.init("v", np.zeros(3_000_000, np.float32))  # in several pieces
    begun = min(kv.rounds("w"), kv.rounds("v"))
    say("begun", kv.rank, begun)
    for step in range(begun, {steps}):
        value = np.full(4, 10.0 ** kv.rank * (step + 1), np.float32)
        try:
            w = kv.pushpull("w", value).result() if kv.rounds("w") == step else kv.pull("w").result()
            if kv.rounds("v") == step:
                kv.pushpull("v", np.full(3_000_000, value[0], np.float32)).result()
        except kvstore.KVStoreError as error:
            say("error", type(error).__name__, str(error).replace(chr(10), " "))
            break
        say("step", step, float(w[0]), kv.num_workers)
        time.sleep({pause})
    say("dead", kv.dead_workers())
"""


def steady(steps: int = 1000, pause: float = 0.05) -> str:
    return STEADY.format(steps=steps, pause=pause)


def seconds(process: Process, begins: str) -> tuple[float, str]:
    """How long it takes until such a line comes."""
    began = time.monotonic()
    line = process.line(begins)
    return time.monotonic() - began, line


@pytest.mark.parametrize(("number", "limit_s"), [(signal.SIGKILL, 1.0), (signal.SIGSTOP, HEARTBEAT_S)])
def test_by_default_the_others_fail_and_say_why(number, limit_s):
    with processes(workers=2) as cluster:
        one, other = (cluster.worker(steady(), rank) for rank in range(2))
        other.line("step 3 ")
        other.signal(number)
        took_s, line = seconds(one, "error WorkerLostError")
        assert took_s < limit_s + SLACK_S
        assert "waits for workers 1 (last heard" in line
        assert "round" in line
        assert "its connection ended" in line
        assert one.line("dead") == "dead [1]"


def test_a_worker_that_is_busy_in_python_is_not_taken_for_dead():
    busy = """
with kvstore.create("dist", timeout=50) as kv:
    kv.init("w", np.zeros(4, np.float32))
    kv.pushpull("w", np.ones(4, np.float32)).result()
    say("spins")
    end = time.monotonic() + 2.5
    while time.monotonic() < end:
        sum(range(3_000_000))  # long within one bytecode, with the GIL
    import ctypes
    ctypes.PyDLL(None).usleep(2_500_000)  # in C for longer than the deadline, with the GIL
    kv.pushpull("w", np.ones(4, np.float32)).result()
    say("done", kv.dead_workers())
"""
    patient = """
with kvstore.create("dist", timeout=50) as kv:
    kv.init("w", np.zeros(4, np.float32))
    for _ in range(2):
        kv.pushpull("w", np.ones(4, np.float32)).result()
    say("done", kv.dead_workers())
"""
    with processes(workers=2, KVSTORE_HEARTBEAT="1") as cluster:
        workers = [cluster.worker(busy, 0), cluster.worker(patient, 1)]
        for worker in workers:
            assert worker.line("done") == "done []"


def test_continue_goes_on_without_the_lost_worker():
    with processes(workers=3, servers=2, KVSTORE_ON_WORKER_LOSS="continue") as cluster:
        workers = [cluster.worker(steady(), rank) for rank in range(3)]
        workers[0].line("step 3 ")
        workers[0].kill()  # and so there is another first worker
        workers[1].line("step 10 ")
        while not (line := workers[1].line("step ")).endswith(" 2"):
            pass
        step = int(line.split()[1])
        assert float(line.split()[2]) == (step + 1) * 110
        workers[2].line(f"step {step} {(step + 1) * 110.0} 2")


def test_a_stopped_worker_that_the_others_went_on_without_is_fenced():
    with processes(workers=2, KVSTORE_ON_WORKER_LOSS="continue") as cluster:
        one, other = (cluster.worker(steady(), rank) for rank in range(2))
        other.line("step 3 ")
        other.signal(signal.SIGSTOP)
        while not one.line("step ").endswith(" 1"):
            pass
        other.signal(signal.SIGCONT)
        assert "FencedError" in other.line("error")
        line = one.line("step ")
        step = int(line.split()[1])
        assert float(line.split()[2]) == step + 1  # nothing of the other one


@pytest.mark.parametrize("servers", [1, 2])
def test_wait_waits_until_the_worker_is_back_under_its_rank(servers):
    with processes(workers=2, servers=servers, KVSTORE_ON_WORKER_LOSS="wait") as cluster:
        one, other = (cluster.worker(steady(20), rank) for rank in range(2))
        other.line("step 5 ")
        other.kill()
        again = cluster.worker(steady(20), 1)
        assert int(again.line("begun 1").split()[2]) >= 6
        for process in (one, again):
            assert process.line("step 19 ") == "step 19 220.0 2"
            assert process.line("dead") == "dead []"
        for line in one.lines:
            if line.startswith("step"):
                _, step, value, workers = line.split()
                assert (float(value), workers) == ((int(step) + 1) * 11, "2")  # every round with both


def test_wait_has_its_deadline_and_says_who_is_missing():
    short = steady().replace("timeout=50", "timeout=3")
    with processes(workers=2, KVSTORE_ON_WORKER_LOSS="wait") as cluster:
        one, other = cluster.worker(short, 0), cluster.worker(steady(), 1)
        other.line("step 3 ")
        other.kill()
        line = one.line("error DeadlineError")
        assert "waits for workers 1 (last heard" in line
        assert "lost: its connection ended" in line


def test_wait_takes_a_stopped_worker_back():
    with processes(workers=2, KVSTORE_ON_WORKER_LOSS="wait", KVSTORE_HEARTBEAT="1") as cluster:
        one, other = (cluster.worker(steady(20), rank) for rank in range(2))
        other.line("step 5 ")
        other.signal(signal.SIGSTOP)
        time.sleep(2.5)  # longer than the deadline
        other.signal(signal.SIGCONT)
        for process in (one, other):
            assert process.line("step 19 ") == "step 19 220.0 2"
            assert process.line("dead") == "dead []"


def test_wait_fences_a_stopped_worker_that_was_replaced():
    with processes(workers=2, KVSTORE_ON_WORKER_LOSS="wait", KVSTORE_HEARTBEAT="1") as cluster:
        one, other = (cluster.worker(steady(20), rank) for rank in range(2))
        other.line("step 5 ")
        other.signal(signal.SIGSTOP)
        again = None
        while again is None:
            again = cluster.worker(steady(20), 1)
            try:
                again.line("begun 1", 10.0)
            except AssertionError:  # the rank was not free yet
                again = None
        other.signal(signal.SIGCONT)
        assert "FencedError" in other.line("error")
        assert again.line("step 19 ") == "step 19 220.0 2"
        assert one.line("step 19 ") == "step 19 220.0 2"


def test_workers_must_agree_what_to_do():
    with processes(workers=2) as cluster:
        try_ = """
try:
    with kvstore.create("dist", on_worker_loss="{}", timeout=20) as kv:
        say("in")
except kvstore.KVStoreError as error:
    say("error", error)
"""
        one = cluster.worker(try_.format("wait"), 0)
        time.sleep(1.5)
        line = cluster.worker(try_.format("continue"), 1).line("error")
        assert "'wait'" in line
        assert "'continue'" in line
        cluster.worker(try_.format("wait"), 1).line("in")
        one.line("in")


# --- joining and leaving --------------------------------------------------------------------------

TRAIN = """
rng = np.random.default_rng(0)
true = rng.normal(size=8).astype(np.float32)

def batch(step, part, parts):  # the same batch of 64 whoever works on it
    rng = np.random.default_rng(step)
    x = rng.normal(size=(64, 8)).astype(np.float32)
    return x[part::parts], x[part::parts] @ true

with kvstore.create("dist", timeout=50) as kv:
    weights = {"w": np.zeros(8, np.float32), "b": np.zeros(1, np.float32)}
    trainer = kvstore.Trainer(weights, kvstore.optim.SGD(lr=0.05), kv, scale=1 / 64)
    say("begun", kv.rank, trainer.steps)
    while trainer.steps < int(told()):
        step = trainer.steps
        parts = kv.num_workers
        x, y = batch(step, kv.rank % parts, parts)
        error = x @ weights["w"] + weights["b"] - y
        trainer.step({"w": 2 * x.T @ error, "b": 2 * error.sum(keepdims=True)})
        say("step", step, kv.num_workers, float(np.square(weights["w"] - true).sum()))
    kv.leave()
    say("left", json.dumps(kv.pull("w").result().tolist()))
"""


def test_two_workers_become_four_and_then_one():
    program = "import json\n" + TRAIN
    losses: dict[int, float] = {}

    def go_on(some: list[Process], steps: range, workers: int) -> None:
        for step in steps:
            for process in some:
                process.tell("1000")
            for process in some:
                _, number, live, loss = process.line("step").split()
                assert (int(number), int(live)) == (step, workers)
                assert losses.setdefault(step, float(loss)) == float(loss)  # the same weights everywhere

    with processes(workers=2, servers=2) as cluster:
        workers = [cluster.worker(program, rank) for rank in range(2)]
        go_on(workers, range(10), 2)
        for _ in range(2):
            workers.append(cluster.worker(program))
            assert workers[-1].line("begun").split()[2] == "10"
        go_on(workers, range(10, 20), 4)
        for process in (workers.pop(0), workers.pop(0), workers.pop(1)):
            process.tell("0")
            process.line("left")
            assert process.ends() == 0
        go_on(workers, range(20, 40), 1)
        workers[0].tell("0")
        final = np.array(json.loads(workers[0].line("left").removeprefix("left ")))
        assert workers[0].ends() == 0
    assert sorted(losses) == list(range(40))
    assert all(losses[step + 1] < losses[step] for step in range(39))
    assert losses[39] < losses[0] / 20
    assert np.isfinite(final).all()


def test_a_worker_without_batches_leaves_and_stops_nobody():
    short = """
with kvstore.create("dist", timeout=50) as kv:
    kv.init("w", np.zeros(4, np.float32))
    for step in range(3 if kv.rank else 6):
        kv.pushpull("w", np.full(4, 10.0 ** kv.rank, np.float32)).result()
    if kv.rank:
        kv.leave()
        try:
            kv.push("w", np.ones(4, np.float32))
        except kvstore.ClosedError as error:
            say("refused", error)
    kv.barrier()
    say("end", float(kv.pull("w").result()[0]))
"""
    with processes(workers=2) as cluster:
        one, other = (cluster.worker(short, rank) for rank in range(2))
        assert "leave()" in other.line("refused")
        assert one.line("end") == other.line("end") == "end 1.0"
        assert (one.ends(), other.ends()) == (0, 0)


def test_who_was_lost_comes_back_as_a_joiner():
    with processes(workers=2, KVSTORE_ON_WORKER_LOSS="continue") as cluster:
        one, other = (cluster.worker(steady(), rank) for rank in range(2))
        other.line("step 3 ")
        other.kill()
        while not one.line("step ").endswith(" 1"):
            pass
        again = cluster.worker(steady(), 1)
        begun = int(again.line("begun 1").split()[2])
        first, second = again.line("step "), again.line("step ")
        alone = 1.0  # it may join between the two keys of the other's step: then that one's push of "w" was all
        assert first in [f"step {begun} {(begun + 1) * pushed} 2" for pushed in (11.0, alone)]
        assert second == f"step {begun + 1} {(begun + 2) * 11.0} 2"
