"""Memory that processes of one host share: who may read it, who may not, and that nothing stays."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import kvstore
from kvstore import comm
from kvstore.cluster import client, exchange
from kvstore.cluster.near import Arena, Neighbourhood
from kvstore.cluster.replies import Replies
from kvstore.cluster.shard import Shard
from kvstore.errors import SharedMemoryError
from kvstore.kernels import nontemporal
from kvstore.protocol.messages import Value
from kvstore.protocol.wire import decode
from kvstore.stored import Stored
from kvstore.transport.shared import Segment
from kvstore.transport.zeromq import Endpoint
from tests.clusters import Cluster, cluster

LIMIT_S = 60
LARGE = 300_000  # float32: more than one page, less than one piece
PIECES = 2_000_000  # float32: several pieces


def open_segments() -> int:
    """Segments that this process has open."""
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            continue
    return sum("memfd:kvstore-" in link for link in links)


# --- segments -----------------------------------------------------------------------------------------


def test_another_process_reads_what_its_owner_writes():
    segment = Segment.create(1 << 20)
    array = np.frombuffer(segment.view(4096, 4000), np.float32)
    array[:] = np.arange(1000)
    code = (
        "import sys, numpy as np; from kvstore.transport.shared import Segment;"
        "array = np.frombuffer(Segment.open(sys.argv[1]).view(4096, 4000), np.float32);"
        "print(int(array.sum()), array.flags.writeable)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, segment.address],
        capture_output=True, text=True, timeout=LIMIT_S, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert run.stdout.split() == ["499500", "False"], run.stderr


def test_what_is_no_segment_is_refused(tmp_path):
    segment = Segment.create(8192)
    pid, fd, token = segment.address.split(".")
    with (tmp_path / "file").open("w+b") as file:
        for address in (
            "", "x", "1.2", "../../etc/passwd", f"{pid}.{fd}.{token}0", f"{pid}.{fd}.{'0' * 16}",
            f"{pid}.{file.fileno()}.{token}", f"{pid}.999999.{token}", f"999999999.{fd}.{token}", f"{pid}.0.{token}",
        ):  # fmt: skip
            with pytest.raises(SharedMemoryError):
                Segment.open(address)
    for offset, nbytes in ((8000, 193), (-1, 4), (0, 8193), (1 << 40, 1)):
        with pytest.raises(SharedMemoryError, match=r"within 0\.\.8192"):
            Segment.open(segment.address).view(offset, nbytes)


def test_memory_that_could_shrink_under_the_reader_is_refused():
    fd = os.memfd_create("kvstore-0123456789abcdef")
    try:
        os.ftruncate(fd, 4096)
        with pytest.raises(SharedMemoryError, match="sealed"):
            Segment.open(f"{os.getpid()}.{fd}.0123456789abcdef")
    finally:
        os.close(fd)


def test_a_segment_ends_with_its_last_view():
    gc.collect()
    before = open_segments()
    view = Segment.create(1 << 16).view(0, 10)
    assert open_segments() == before + 2  # the descriptor that its address names, and the mapping's own
    del view
    gc.collect()
    assert open_segments() == before


def test_an_arena_stays_within_its_limit_and_uses_memory_again():
    arena = Arena(1 << 20)
    first = arena.allocate(600_000)
    assert first is not None
    assert arena.allocate(600_000) is None
    arena.free(first)
    again = arena.allocate(600_000)
    assert again is not None
    assert again.place() == first.place()


# --- stores -------------------------------------------------------------------------------------------


def gradients_of(rank: int) -> list:
    """Of one value in several pieces, one in a piece of two dimensions, and one that travels in messages."""
    rng = np.random.default_rng(rank)
    return [rng.random(shape, np.float32) for shape in ((PIECES,), (LARGE // 1000, 1000), (1000,))]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("cached_bytes", [0, 1 << 30], ids=["large", "cached"])
def test_values_of_more_than_caches_keep_are_copied_past_them(cached_bytes, shared, monkeypatch):
    copies = []

    def copy(source, target):
        copies.append(target.nbytes)
        np.copyto(target, source)

    monkeypatch.setattr(nontemporal, "copy", copy)
    monkeypatch.setattr(client, "CACHED_BYTES", cached_bytes)
    with cluster(2) as running:

        def work(kv):
            mine = gradients_of(kv.rank)
            keys = [f"key {number}" for number in range(len(mine))]
            kv.init(keys, mine)
            one_by_one = [kv.pushpull(key, g, np.zeros_like(g)).result() for key, g in zip(keys, mine, strict=True)]
            return one_by_one + kv.pushpull(keys, mine, [np.zeros_like(g) for g in mine]).result()

        results = running.run(work, shared_memory=shared)
    expected = [sum(both) for both in zip(gradients_of(0), gradients_of(1), strict=True)] * 2
    for mine in results:
        for value, right in zip(mine, expected, strict=True):
            np.testing.assert_array_equal(value, right)
    times = 0 if cached_bytes else 4 * (1 + shared)  # two rounds of two workers, which stage what is shared
    assert copies.count(4 * LARGE) == times
    assert sum(copies) == times * 4 * (LARGE + PIECES)


@pytest.mark.parametrize("crowded", [True, False])
def test_a_thread_more_copies_pieces_only_where_there_may_be_a_core_for_it(crowded, monkeypatch):
    threads: set[str] = set()
    broadcast = comm.broadcast

    def broadcast_and_tell(source, outs, start=0, **options):
        threads.add(threading.current_thread().name)
        broadcast(source, outs, start, **options)

    monkeypatch.setattr(comm, "broadcast", broadcast_and_tell)
    monkeypatch.setattr(exchange, "CROWDED", crowded)
    with cluster(1) as running:

        def work(kv):
            value = np.arange(PIECES, dtype=np.float32)
            kv.init("w", value)
            return [np.array_equal(kv.pushpull("w", value, np.zeros_like(value)).result(), value) for _ in range(3)]

        assert running.run(work) == [[True] * 3]
    assert any(name.startswith("engine") for name in threads) is not crowded


@pytest.mark.parametrize("shared", [True, False])
def test_values_of_near_workers_do_not_travel(shared):
    with cluster(2) as running:

        def work(kv):
            kv.init("w", np.zeros(PIECES, np.float32))
            for _ in range(5):
                gradient = np.full(PIECES, kv.rank + 1, np.float32)
                kv.pushpull("w", gradient).result()
                np.testing.assert_array_equal(gradient, 3)
            return set(kv._home._remotes["w"].near)

        assert running.run(work, shared_memory=shared) == [{shared}, {shared}]


def test_staging_and_view_are_the_memory_itself():
    with cluster(2) as running:

        def work(kv):
            kv.init("w", np.zeros((2, PIECES // 2), np.float32))
            seen = set()
            for round in range(6):
                gradient = kv.staging("w")
                assert gradient.shape == (2, PIECES // 2)
                assert kv.staging("w") is gradient
                gradient[...] = round + kv.rank
                value = kv.pushpull("w", gradient).result()
                np.testing.assert_array_equal(value, 2 * round + 1)
                assert value is kv.view("w")
                assert not value.flags.writeable
                with pytest.raises(ValueError, match="read-only"):
                    value[0] = 1
                seen.add(value.__array_interface__["data"][0])
            return len(seen)

        assert running.run(work) == [2, 2]  # two versions take turns: one is read while the next is summed


@pytest.mark.parametrize("staged", [True, False])
def test_the_replies_to_what_is_read_in_place_travel_together(staged, monkeypatch):
    """The other pieces are merged after the first one's reply: when the server has sent it, or had its chance to."""
    sent: list[int] = []
    may_merge = threading.Event()
    assign, post, send = Stored.assign, Replies.post, Endpoint.send

    def send_and_tell(endpoint, peer, frames, on_sent=()):
        _, messages = decode(frames[0], len(frames) - 1)
        if values := sum(isinstance(message, Value) for message, _ in messages):
            sent.append(values)
            may_merge.set()
        return send(endpoint, peer, frames, on_sent)

    def post_and_tell(replies, *args, **options):
        post(replies, *args, **options)
        if staged:  # a flush that follows would be posted between these two
            replies._loop.post(lambda: replies._loop.post(may_merge.set))

    def assign_in_time(stored, *args, **options):
        if stored.var.name != "'w'[0]":
            assert may_merge.wait(LIMIT_S)
        assign(stored, *args, **options)

    with cluster(1) as running:

        def work(kv):
            kv.init("w", np.zeros(PIECES, np.float32))
            monkeypatch.setattr(Endpoint, "send", send_and_tell)
            monkeypatch.setattr(Replies, "post", post_and_tell)
            monkeypatch.setattr(Stored, "assign", assign_in_time)
            monkeypatch.setattr(Shard, "tick", lambda shard, now: None)  # which flushes, too
            gradient = kv.staging("w") if staged else np.empty(PIECES, np.float32)
            gradient[:] = 1
            assert kv.pushpull("w", gradient).result(LIMIT_S)[-1] == 1
            return len(kv._home._remotes["w"].owners)

        [pieces] = running.run(work)
    assert sum(sent) == pieces > 1
    assert (len(sent) == 1) == staged


def test_a_view_stays_as_it_is_until_the_next_pull_in_place():
    with cluster(2) as running:

        def work(kv):
            kv.init("w", np.zeros(LARGE, np.float32))
            view = kv.view("w")
            for _ in range(4):
                kv.push("w", np.ones(LARGE, np.float32)).result()
            kv.barrier()
            assert not view.any()
            copied = kv.pull("w").result()
            assert not view.any()
            latest = kv.view("w")  # a copy was pulled since, so this looks again
            np.testing.assert_array_equal(latest, copied)
            np.testing.assert_array_equal(latest, 2)

        running.run(work)


def test_both_staging_arrays_may_be_on_their_way():
    with cluster(2) as running:

        def work(kv):
            kv.init("w", np.zeros(LARGE, np.float32))
            kv.barrier()
            if kv.rank == 1:
                kv.barrier()
                for round in (1, 2):
                    kv.push("w", np.full(LARGE, 10 * round, np.float32))
                return None
            pushes = []
            for round in (1, 2):
                gradient = kv.staging("w")
                gradient[...] = round
                pushes.append(kv.push("w", gradient))
            with pytest.raises(kvstore.errors.DeadlineError, match="both of its arrays are on their way"):
                kv.staging("w", timeout=0.05)
            kv._home.barrier(LIMIT_S)  # not the store's: that waits for the pushes
            for push in pushes:
                push.result()
            assert kv.staging("w", timeout=LIMIT_S).shape == (LARGE,)
            return kv.pull("w").result()[0]

        assert running.run(work)[0] == 22


@pytest.mark.parametrize("model", ["bounded(1)", "eventual"])
def test_other_models_read_in_place_too(model):
    with cluster(2) as running:

        def work(kv):
            kv.init("w", np.zeros(PIECES, np.int64))
            kv.set_optimizer(kvstore.optim.Accumulate())
            last = 0
            for _ in range(10):
                value = kv.pushpull("w", np.ones(PIECES, np.int64), out=kvstore.IN_PLACE).result()
                assert value.min() == value[0] >= last + 1, "an update was written under its reader"
                assert value.max() <= 20
                last = value[0]
            kv.barrier()
            return int(kv.pull("w").result()[0])

        assert running.run(work) == [20, 20]


def test_without_memory_to_share_values_travel(caplog):
    with cluster(1) as running:
        running.servers[0]._neighbourhood.arena.limit_bytes = running.servers[0]._neighbourhood.arena.used_bytes

        def work(kv):
            arena = kv._home._session.neighbourhood.arena
            arena.limit_bytes = arena.used_bytes
            kv.init("w", np.zeros(PIECES, np.float32))
            for round in range(3):
                value = kv.pushpull("w", np.full(PIECES, round, np.float32), out=kvstore.IN_PLACE).result()
                np.testing.assert_array_equal(value, round)

        running.run(work)
    assert sum("travel through sockets" in record.message for record in caplog.records) == 2  # once per process


def test_a_worker_that_is_killed_leaves_nothing_and_its_memory_stays_readable():
    program = (
        "import numpy as np, kvstore, os, sys\n"
        "kv = kvstore.create('dist')\n"
        "kv.init('w', np.zeros(2_000_000, np.float32))\n"
        "kv.push('w', np.ones(2_000_000, np.float32))\n"
        "print('pushed', flush=True)\n"
        "sys.stdin.read()\n"
    )
    running = Cluster(1, 1)
    environment = {**os.environ, "KVSTORE_ADDRESS": running.address, "PYTHONPATH": str(Path(__file__).parents[2])}
    worker = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "pushed\n"
        worker.send_signal(signal.SIGKILL)
        worker.wait(LIMIT_S)
        end = time.monotonic() + LIMIT_S
        mappings = running.servers[0]._neighbourhood._mappings
        while mappings and time.monotonic() < end:
            time.sleep(0.01)
        assert not mappings
    finally:
        worker.kill()
        worker.communicate(timeout=LIMIT_S)
        running.stop()


def test_an_unreachable_place_costs_the_server_nothing():
    with cluster(1) as running:

        def work(kv):
            kv.init("w", np.zeros(LARGE, np.float32))
            kv.push("w", np.ones(LARGE, np.float32)).result()
            segment = kv._home._remotes["w"].staging._own[0].region.segment
            honest, segment.address = segment.address, f"{os.getpid()}.0.{'0' * 16}"
            failed = kv.push("w", np.ones(LARGE, np.float32))
            with pytest.raises(SharedMemoryError, match="segment"):
                failed.result()
            segment.address = honest
            kv.init("v", np.zeros(LARGE, np.float32))
            kv.push("v", np.ones(LARGE, np.float32)).result()
            return kv.pull("v").result()[0]

        assert running.run(work) == [1]
    assert Neighbourhood(0).probe() is None


def test_closed_stores_let_go_of_their_memory():
    def work(kv):
        kv.init("w", np.zeros(PIECES, np.float32))
        kv.pushpull("w", kv.staging("w")).result()

    def use():
        with cluster(1) as running:
            running.run(work)

    gc.collect()
    before = open_segments()
    use()
    gc.collect()
    assert open_segments() == before
