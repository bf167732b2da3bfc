"""Arrays of GPUs in a cluster: the same bits as arrays of the host, by as few copies as can be, each in its time.

Whatever is planted to go wrong is seen: by wrong values, or by what the simulated machine has counted.
"""

from __future__ import annotations

import contextlib
import gc
import random
import threading
import time
from collections import Counter
from functools import partial

import ml_dtypes
import numpy as np
import pytest

import engine
import kvstore
from kvstore import comm
from kvstore.arrays import gpu
from kvstore.cluster import client, near
from kvstore.cluster.exchange import Exchange
from kvstore.delivery import Delivery
from kvstore.testing import Cluster as Laboratory
from tests.cluster.test_broken_rounds import fail_merge
from tests.cluster.test_priority import THREADS, merges_after_urgent
from tests.clusters import cluster
from tests.gpu import simulated

ROUNDS = 3
LIMIT_S = 30
PARTS = 1_300_000  # float32: two parts, if each is a piece
SIZES = [1, 1000, 300_000, PARTS]  # float32: tiny, small, one piece, and that
BOTH = pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "sockets"])
DTYPES = [np.float16, ml_dtypes.bfloat16, np.float64, np.int8, np.int64, np.complex64]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(client, "CHUNK_BYTES", 1)


def values(rank, round, device, shape, dtype=np.float32):
    rng = np.random.default_rng([rank, round, device])
    if np.dtype(dtype).kind in "iu":
        return rng.integers(-100, 100, shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)


class Host:
    """Arrays in host memory."""

    def array(self, values, device):
        return np.array(values)

    def numpy(self, array):
        return np.array(array)

    def overwrite(self, array):
        array[...] = 0


class Gpus:
    """Arrays on so many GPUs in turn, one in ``every`` in host memory; elements lie ``step`` apart."""

    def __init__(self, cupy, count=None, step=1, every=0):
        self.cupy, self.step, self.every = cupy, step, every
        self.count = count or cupy.cuda.runtime.getDeviceCount()
        self.made = 0

    def array(self, values, device):
        self.made += 1
        if self.every and self.made % self.every == 0:
            return np.array(values)
        with self.cupy.cuda.Device(device % self.count):
            base = self.cupy.empty((*values.shape[:-1], values.shape[-1] * self.step), values.dtype)
            view = base[..., :: self.step]
            view[...] = self.cupy.asarray(values)
            return view

    def numpy(self, array):
        if isinstance(array, np.ndarray):
            return np.array(array)
        with array.device:
            return self.cupy.asnumpy(array)

    def overwrite(self, array):
        if isinstance(array, np.ndarray):
            array[...] = 0
        else:
            with array.device:
                array[...] = 0


def train(kv, place, devices, shape, dtype, optimizer):
    """What a worker sees in some rounds, as arrays of the host."""
    first = place.array(values(7, 7, 7, shape, dtype), kv.rank)
    seen = [place.numpy(kv.broadcast("w", first).result())]
    if optimizer is not None:
        kv.set_optimizer(optimizer)
    for round in range(ROUNDS):
        given = [place.array(values(kv.rank, round, d, shape, dtype), d) for d in range(devices)]
        one = given if devices > 1 else given[0]
        if round % 3 == 0:
            kv.pushpull("w", one, priority=round).result()
            outs = given
        else:
            outs = [place.array(np.zeros(shape, dtype), d) for d in range(devices)]
            out = outs if devices > 1 else outs[0]
            if round % 3 == 1:
                kv.push("w", one, priority=round)
                for array in given:  # it has been read
                    place.overwrite(array)
                kv.pull("w", out=out).result()
            else:
                kv.pushpull("w", one, out=out).result()
        seen += [place.numpy(array) for array in outs]
    kv.barrier()
    new = kv.pull("w").result()
    assert type(new) is type(first)
    return [*seen, place.numpy(new)]


def both(place, devices=1, shape=(1000,), dtype=np.float32, optimizer=None, servers=1, **options):
    """Run it with arrays of the host, and with the others: are they the same?"""
    results = []
    for one in (Host(), place):
        with cluster(2, servers) as running:
            work = partial(train, place=one, devices=devices, shape=shape, dtype=dtype, optimizer=optimizer)
            results.append(running.run(work, **options))
    for expected, got in zip(*results, strict=True):
        for one, other in zip(expected, got, strict=True):
            np.testing.assert_array_equal(one, other)


# --- the same bits ------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("devices", [1, 3])
def test_the_same_bits_as_on_the_host(cupy, size, shared, devices):
    both(Gpus(cupy), devices, (size,), servers=1 + (size > 10_000), shared_memory=shared)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_of_every_kind(cupy, dtype):
    both(Gpus(cupy), 4, (300, 123), dtype)


@BOTH
@pytest.mark.parametrize("optimizer", [kvstore.optim.SGD(lr=0.1, momentum=0.9), kvstore.optim.LAMB(lr=0.1)], ids=repr)
def test_servers_with_an_optimizer(cupy, optimizer, shared):
    both(Gpus(cupy), 2, (1200, 1000), optimizer=optimizer, servers=2, shared_memory=shared)


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("shape", [(7, 3), (500, 2401)])
def test_arrays_that_are_not_in_one_run(cupy, devices, shape):
    both(Gpus(cupy, step=2), devices, shape)


@BOTH
@pytest.mark.parametrize("size", [1000, PARTS])
def test_some_devices_are_the_host(cupy, shared, size):
    both(Gpus(cupy, every=3), 4, (size,), shared_memory=shared)


def test_on_one_gpu_several_devices(cupy):
    both(Gpus(cupy, 1), 4, (PARTS,))


@pytest.mark.parametrize("level", ["device_consistency", "cluster_consistency"])
@pytest.mark.parametrize("model", ["sequential", "bounded(1)", "eventual"])
def test_every_model_counts_every_push(cupy, level, model):
    place, size = Gpus(cupy), 40_000

    def work(kv):
        kv.init("w", np.zeros(size, np.int64))
        kv.set_optimizer(kvstore.optim.Accumulate())
        seen = [0]
        for _ in range(5):
            for device in (0, 1):
                kv.push("w", place.array(np.ones(size, np.int64), device), device=device)
            for device in (1, 0):
                out = place.array(np.zeros(size, np.int64), device)
                read = place.numpy(kv.pull("w", out=out, device=device).result())
                assert read.min() == read.max() >= seen[-1]
                seen.append(read[0])
        kv.barrier()
        outs = [place.array(np.zeros(size, np.int64), device) for device in (0, 1)]
        return [int(place.numpy(out)[-1]) for out in kv.pull("w", out=outs).result()]

    with cluster(2, 2) as running:
        assert running.run(work, devices=2, **{level: model}) == [[20, 20], [20, 20]]


def test_what_is_pulled_in_place_stays_with_the_host(cupy):
    place = Gpus(cupy)

    def work(kv):
        kv.init("w", np.zeros(PARTS, np.float32))
        kv.push("w", place.array(np.ones(PARTS, np.float32), kv.rank))
        view = kv.pull("w", out=kvstore.IN_PLACE).result()
        staged = kv.staging("w")
        staged[...] = 3
        out = kv.pushpull("w", staged, out=place.array(np.zeros(PARTS, np.float32), kv.rank)).result()
        return isinstance(view, np.ndarray), float(view.max()), float(place.numpy(out).min())

    with cluster(2) as running:
        assert running.run(work) == [(True, 2, 6), (True, 2, 6)]


KEYS = {"tiny": 1, "small": 5, "some": 100, "near": 9000, "piece": 300_000, "two pieces": 1_100_000}


def program(kv, place, seed, devices):
    """Random pushes and pulls, alone and in lists, that are waited for now and then; what the worker sees."""
    chance = random.Random(seed)
    for key, size in KEYS.items():
        kv.init(key, values(1, 2, 3, (size,)))
    if chance.random() < 0.5:
        kv.set_optimizer(kvstore.optim.SGD(lr=0.1, momentum=0.9))
    seen, pending = [], []

    def given(step, key):
        return [place.array(values(kv.rank, step, d, (KEYS[key],)), d) for d in range(devices)]

    def outs(key):
        return [place.array(np.zeros(KEYS[key], np.float32), d) for d in range(devices)]

    def of(arrays):
        return arrays if devices > 1 else arrays[0]

    for step in range(14):
        key, priority = chance.choice(list(KEYS)), chance.randint(-2, 2)
        what = chance.choice(["push", "pull", "pushpull", "in place", "list", "list", "wait"])
        if what == "wait":
            for handle, arrays in pending:
                handle.result()
                seen += [place.numpy(array) for array in arrays]
            pending.clear()
        elif what == "list":
            lists = [given(step, one) for one in list(KEYS)[:5]]
            handle = kv.pushpull(list(KEYS)[:5], [of(one) for one in lists], priority=priority)
            pending.append((handle, [array for one in lists for array in one]))
        elif what == "pull":
            arrays = outs(key)
            pending.append((kv.pull(key, out=of(arrays), priority=priority), arrays))
        elif what == "in place":
            arrays = given(step, key)
            pending.append((kv.pushpull(key, of(arrays), priority=priority), arrays))
        else:
            pushed, arrays = given(step, key), outs(key)
            if what == "push":
                pending.append((kv.push(key, of(pushed), priority=priority), []))
            else:
                pending.append((kv.pushpull(key, of(pushed), out=of(arrays), priority=priority), arrays))
            for array in pushed:
                place.overwrite(array)
    for handle, arrays in pending:
        handle.result()
        seen += [place.numpy(array) for array in arrays]
    kv.barrier()
    return seen


@pytest.mark.parametrize("seed", range(16))
def test_random_programs(cupy, seed, monkeypatch):
    chance = random.Random(seed)
    monkeypatch.setattr(client, "CHUNK_BYTES", chance.choice([1, 8 << 20]))
    devices, shared, servers = chance.choice([1, 2, 4]), chance.random() < 0.5, chance.choice([1, 2])
    place = Gpus(cupy, None, step=chance.choice([1, 1, 2]), every=chance.choice([0, 0, 3]))
    results = []
    for one in (Host(), place):
        with cluster(2, servers) as running:
            work = partial(program, place=one, seed=seed, devices=devices)
            results.append(running.run(work, shared_memory=shared))
    for expected, got in zip(*results, strict=True):
        for one, other in zip(expected, got, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("seed", range(10))
def test_lists_of_small_arrays_in_all_memories(seed):
    """Some of the host, the others of two GPUs with their elements apart."""
    keys, devices = ["a", "b", "c"], 2

    def work(kv, place):
        kv.init(keys, [values(1, 2, 3, (5,))] * 3)
        seen = []
        for round in range(4):
            given = [[place.array(values(kv.rank, round, d, (5,)), d) for d in range(devices)] for _ in keys]
            kv.pushpull(keys, given).result()
            seen += [place.numpy(array) for some in given for array in some]
        return seen

    with simulated.install(devices=2, seed=seed):
        import cupy

        results = []
        for place in (Host(), Gpus(cupy, step=2, every=3)):
            with cluster(1) as running:
                results.append(running.run(partial(work, place=place))[0])
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


# --- what is copied, and when -------------------------------------------------------------------------


def count_copies(cupy, shared, devices, size):
    """By (from, to, how the host's memory was), the bytes that two workers' pushpulls copy, over those of one value.

    No thread waits for a device meanwhile, but to copy to memory that is not pinned.
    """
    place, machine, copied, waited = Gpus(cupy), cupy.machine, Counter(), Counter()

    def work(kv):
        kv.init("w", np.zeros(size, np.float32))
        outs = [place.array(np.zeros(size, np.float32), d) for d in range(devices)]
        given = [place.array(np.ones(size, np.float32), d) for d in range(devices)]
        for _ in range(4):  # what is measured, or registered, once
            kv.pushpull("w", given, out=outs).result()
        kv._home.meet(LIMIT_S)
        if kv.rank == 0:
            copied.subtract(machine.copied_bytes)
            waited.subtract(machine.synchronised)
        kv._home.meet(LIMIT_S)
        for _ in range(ROUNDS):
            kv.pushpull("w", given, out=outs).result()
        kv._home.meet(LIMIT_S)
        if kv.rank == 0:
            copied.update(machine.copied_bytes)
            waited.update(machine.synchronised)
        kv._home.meet(LIMIT_S)

    with cluster(2) as running:
        running.run(work, shared_memory=shared, devices=devices)
    assert not any(waited.values()) or any(how == "pageable" for *_, how in copied)
    return {way: nbytes / (2 * ROUNDS * size * 4) for way, nbytes in copied.items() if nbytes}


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("size", [300_000, PARTS])
def test_a_co_located_server_costs_no_other_copy(cupy, devices, size, monkeypatch):
    """One copy down of what the devices have merged, one up to each GPU; all by memory that is pinned where it is."""
    if not hasattr(cupy, "machine"):
        pytest.skip("counted by the simulated machine")
    monkeypatch.setattr(gpu, "pinned", None)  # is not needed
    copied = count_copies(cupy, True, devices, size)
    host = simulated.HOST
    assert {how for one, other, how in copied if host in (one, other)} == {"pinned"}
    assert sum(times for (_, to, _), times in copied.items() if to == host) == 1
    for device in range(min(devices, 2)):
        assert copied[host, device, "pinned"] == 1


@pytest.mark.parametrize("devices", [1, 4])
def test_over_a_socket_all_goes_by_pinned_memory_too(cupy, devices):
    if not hasattr(cupy, "machine"):
        pytest.skip("counted by the simulated machine")
    copied = count_copies(cupy, False, devices, PARTS)
    assert {how for one, other, how in copied if simulated.HOST in (one, other)} == {"pinned"}
    assert sum(times for (_, to, _), times in copied.items() if to == simulated.HOST) == 1


@BOTH
def test_what_is_moved_together_goes_by_pinned_memory_too(cupy, shared):
    """And no thread waits for a device."""
    if not hasattr(cupy, "machine"):
        pytest.skip("counted by the simulated machine")
    place, machine, keys = Gpus(cupy), cupy.machine, list(range(30))
    pageable, waited = [], []

    def work(kv):
        kv.init(keys, [np.zeros(3000, np.float32)] * len(keys))
        given = [place.array(np.ones(3000, np.float32), 0) for _ in keys]
        outs = [place.array(np.zeros(3000, np.float32), 0) for _ in keys]
        for round in range(6):
            kv._home.meet(LIMIT_S)
            if round in (2, 5) and kv.rank == 0:  # by then keys are in bundles
                pageable.append({way: n for way, n in machine.copies.items() if way[2] == "pageable"})
                waited.append(dict(machine.synchronised))
            kv._home.meet(LIMIT_S)
            kv.pushpull(keys, given, out=outs).result()
        assert all((place.numpy(out) == 2).all() for out in outs)
        return all(kv._entries[key].bundle is not None for key in keys)

    with cluster(2) as running:
        assert running.run(work, shared_memory=shared) == [True, True]
    assert pageable[0] == pageable[1]
    assert waited[0] == waited[1]


@pytest.mark.parametrize("lacking", ["arena", "mappings"])
def test_memory_that_is_not_registered_is_seen(cupy, lacking, monkeypatch):
    if not hasattr(cupy, "machine"):
        pytest.skip("counted by the simulated machine")
    blocks, pinned = [], gpu.pinned
    monkeypatch.setattr(gpu, "pinned", lambda nbytes: blocks.append(nbytes) or pinned(nbytes))
    monkeypatch.setattr(near.Arena if lacking == "arena" else near.Neighbourhood, "pin", lambda *_: False)
    copied = count_copies(cupy, True, 1, 300_000)
    if lacking == "arena":
        assert copied[0, simulated.HOST, "pageable"] == 1
    else:
        assert blocks


def test_memory_that_cannot_be_pinned_costs_time_only(cupy, monkeypatch, caplog):
    monkeypatch.setattr(gpu, "pin", lambda memory, read_only=False: False)
    both(Gpus(cupy), 2, (PARTS,))
    assert sum("cannot be registered" in record.message for record in caplog.records) == 2  # once per worker


@pytest.mark.parametrize("planted", [False, True])
def test_a_part_is_sent_while_the_next_one_is_copied(cupy, monkeypatch, planted):
    """The device copies no part before the one ahead of it has been sent. Planted: all are sent when all are copied."""
    parts, size = 5, 5 << 20  # a piece each
    sent = [threading.Event() for _ in range(parts)]
    in_time: list[bool] = []
    merge, submit, in_order = comm.merge, Exchange.submit, client.ClusterHome._in_order
    held_up: list[tuple] = []

    def merge_behind(arrays, out, *how, **options):
        number = len(in_time)
        in_time.append(True)
        if number:
            cupy.cuda.get_current_stream().launch_host_func(wait_for, number)
        merge(arrays, out, *how, **options)

    def wait_for(number):
        in_time[number] = sent[number - 1].wait(0.3 if planted else LIMIT_S)

    def submit_and_tell(exchange, requests):
        submit(exchange, requests)
        sent[requests[0].message.piece].set()

    def in_order_at_last(home, exchange, send, reads, *more, lane):
        held_up.append((exchange, send, reads, *more))
        if len(held_up) == parts:
            everything = [one for _, _, reads, *_ in held_up for one in reads]
            for exchange, send, _, *rest in held_up:
                in_order(home, exchange, send, everything, *rest)

    monkeypatch.setattr(comm, "merge", merge_behind)
    monkeypatch.setattr(Exchange, "submit", submit_and_tell)
    if planted:
        monkeypatch.setattr(client.ClusterHome, "_in_order", in_order_at_last)

    def work(kv):
        kv.init("w", np.zeros(size, np.float32))
        kv.push("w", Gpus(cupy).array(np.ones(size, np.float32), 0)).result()

    with cluster(1) as running:
        running.run(work)
    assert len(in_time) == parts
    assert all(in_time) == (not planted)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_caller_whose_arrays_are_lent_does_not_wait_for_copies(cupy, monkeypatch, in_place):
    """With the copy held up, what he enqueues next is done: for a pushpull in place, but not for a push."""
    merge, go_on = comm.merge, threading.Event()

    def merge_later(arrays, out, *how, **options):
        cupy.cuda.get_current_stream().launch_host_func(lambda _: go_on.wait(LIMIT_S), None)
        merge(arrays, out, *how, **options)

    def work(kv):
        kv.init("w", np.zeros(PARTS, np.float32))
        given = Gpus(cupy).array(np.ones(PARTS, np.float32), 0)
        monkeypatch.setattr(comm, "merge", merge_later)
        handle = kv.pushpull("w", given) if in_place else kv.push("w", given)
        stream = cupy.cuda.get_current_stream()
        try:
            cupy.zeros(10).fill(1)
            end = time.monotonic() + LIMIT_S
            while in_place and not stream.done and time.monotonic() < end:
                pass
            return [stream.done for _ in range(100)][-1]
        finally:
            go_on.set()
            handle.result()

    with cluster(1) as running:
        assert running.run(work) == [in_place]


@BOTH
def test_an_urgent_key_overtakes_a_large_one(cupy, monkeypatch, shared):
    """As on the host: no merge begins before the urgent push is there, and then it comes after those under way."""
    merged = merges_after_urgent(monkeypatch)
    place = Gpus(cupy)

    def work(kv):
        kv.init(["large", "urgent"], [np.ones(16 << 20, np.float32), np.ones(15_000, np.float32)])
        slow = kv.pushpull("large", place.array(np.ones(16 << 20, np.float32), 0), priority=0)
        kv.pushpull("urgent", place.array(np.ones(15_000, np.float32), 0), priority=1).result()
        slow.result()

    with cluster(1) as running:
        running.run(work, shared_memory=shared)
    assert merged.index("'urgent'[0]") <= THREADS


# --- what must not be early ---------------------------------------------------------------------------


@contextlib.contextmanager
def standstill(cupy):
    """Within the block no device does anything."""
    if not hasattr(cupy, "machine"):
        pytest.skip("no device can be made to stand still but a simulated one")
    with cupy.machine.standstill():
        yield


def wait_until(condition, limit_s=LIMIT_S):
    end = time.monotonic() + limit_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)
    return condition()


@BOTH
@pytest.mark.parametrize("planted", [False, True])
def test_a_part_is_sent_when_it_has_been_copied(cupy, monkeypatch, shared, planted):
    """Planted: sent at once."""
    in_order = client.ClusterHome._in_order
    if planted:
        monkeypatch.setattr(
            client.ClusterHome, "_in_order",
            lambda self, exchange, send, reads, *more, **lane: in_order(self, exchange, send, [], *more, **lane),
        )  # fmt: skip

    def work(kv):
        kv.init("w", np.zeros(PARTS, np.float32))
        given = Gpus(cupy).array(np.ones(PARTS, np.float32), 0)
        with standstill(cupy):
            pushed = kv.push("w", given)
            early = wait_until(pushed.done, LIMIT_S if planted else 0.1)
            if not planted:
                with pytest.raises(kvstore.DeadlineError, match="this process still computes or copies"):
                    pushed.result(0.1)
        pushed.result()
        return early, bool((kv.pull("w", out=np.empty(PARTS, np.float32)).result() == 1).all())

    with cluster(1) as running:
        assert running.run(work, shared_memory=shared) == [(planted, not planted)]


@BOTH
@pytest.mark.parametrize("planted", [False, True])
def test_what_a_device_has_not_read_is_not_given_back(cupy, monkeypatch, shared, planted):
    """Values come in several rounds while the device stands still. Planted: given back, or let go of, at once."""
    size, rounds, written = 20_000, 8, []
    hold = Delivery._hold

    def hold_or_not(delivery, source, mark, over):
        hold(delivery, source, (lambda: True) if planted else mark, over)
        written.append(source.nbytes)

    monkeypatch.setattr(Delivery, "_hold", hold_or_not)

    def work(kv):
        place = Gpus(cupy)
        kv.init("w", np.zeros(size, np.float32))
        outs = [place.array(np.zeros(size, np.float32), 0) for _ in range(rounds)]
        with standstill(cupy) if kv.rank == 0 else contextlib.nullcontext():
            kv._home.meet(LIMIT_S)
            pulls = []
            for round, out in enumerate(outs):
                kv.push("w", np.full(size, 10 * round + kv.rank, np.float32)).result()
                pulls.append(kv.pull("w", out=out))
            assert wait_until(lambda: sum(written) == 2 * rounds * size * 4)
            kv._home.meet(LIMIT_S)
        for pull in pulls:
            pull.result()
        return [float(place.numpy(out).min()) for out in outs]

    with cluster(2) as running:
        seen = running.run(work, shared_memory=shared)
    right = [20 * round + 1 for round in range(rounds)]
    assert (seen == [right, right]) == (not planted)


# --- errors and memory --------------------------------------------------------------------------------


def test_an_error_before_anything_is_sent_costs_that_push_only(cupy, monkeypatch):
    place = Gpus(cupy)

    def work(kv):
        kv.init("w", np.zeros(PARTS, np.float32))
        given = place.array(np.ones(PARTS, np.float32), 0)
        fail_merge(monkeypatch, MemoryError("no room to merge"))
        failed = kv.pushpull("w", given, out=place.array(np.zeros(PARTS, np.float32), 0))
        with pytest.raises(MemoryError, match="no room"):
            failed.result()
        out = kv.pushpull("w", given, out=place.array(np.zeros(PARTS, np.float32), 0)).result()
        staging = kv._home._remotes["w"].staging
        return float(place.numpy(out).min()), [slot.busy for slot in staging._own]

    with cluster(1) as running:
        assert running.run(work) == [(1, [False])]


def test_an_error_when_a_part_has_been_sent_ends_the_rounds_of_that_key(cupy, monkeypatch):
    place = Gpus(cupy)

    def work(kv):
        kv.init(["w", "other"], [np.zeros(PARTS, np.float32)] * 2)
        assert kv._home._remotes["w"].pieces == 2
        given = place.array(np.ones(PARTS, np.float32), 0)
        fail_merge(monkeypatch, MemoryError("no room to merge"), after=1)
        calls = [kv.push("w", given), kv.push("w", given), kv.pull("w", out=given.copy())]
        with pytest.raises(MemoryError, match="no room"):
            calls[0].result()
        for call in calls[1:]:  # which may have waited behind the first
            with pytest.raises(kvstore.BrokenRoundError, match="of round 1 this worker has sent a part only"):
                call.result()
        return float(place.numpy(kv.pushpull("other", given).result()).min())

    with cluster(1) as running:
        assert running.run(work) == [1]


def test_an_error_of_the_device_reaches_the_handle():
    with simulated.install(devices=1, seed=1) as machine:
        import cupy

        place = Gpus(cupy)

        def work(kv):
            kv.init(["up", "down"], [np.zeros(PARTS, np.float32)] * 2)
            out = place.array(np.zeros(PARTS, np.float32), 0)
            given = place.array(np.ones(PARTS, np.float32), 0)
            with machine.standstill():
                handles = [kv.push("down", given), kv.pull("up", out=out)]
                machine.devices[0].fail(700, "planted")
            for handle in handles:
                assert "IllegalAddress" in str(handle.exception(LIMIT_S))
            assert not any(slot.busy for slot in kv._home._remotes["down"].staging._own)
            return kv.pull("up", out=np.ones(PARTS, np.float32)).result().max()

        with cluster(1) as running:
            assert running.run(work) == [0]


def test_an_interrupted_push_costs_that_push_only(cupy, monkeypatch):
    place = Gpus(cupy)

    def work(kv):
        kv.init("w", np.zeros(PARTS, np.float32))
        given = place.array(np.ones(PARTS, np.float32), 0)
        fail_merge(monkeypatch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            kv.pushpull("w", given)
        return float(place.numpy(kv.pushpull("w", given).result()).min())

    with cluster(1) as running:
        assert running.run(work) == [1]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("fault", ["loss", "crash of a server", "crash of a worker"])
def test_faults_of_the_cluster(fault, seed):
    """On a simulated network: no push is lost or counted twice, and what is open ends."""
    size, rounds = 100_000, 20
    pause = 0.3 if "server" in fault else 0.01  # before they crash they have to be in step
    options = {
        "loss": {"loss": 0.1, "repetition": 0.1},
        "crash of a server": {"replication": 1, "delay_s": (0.001, 0.01)},
        "crash of a worker": {"on_worker_loss": "continue"},
    }[fault]
    with simulated.install(devices=2, seed=seed):
        import cupy

        def program(kv):
            place, pending = Gpus(cupy), []
            kv.init("w", np.zeros(size, np.float32))
            if fault != "loss" and kv.rank == 0:
                member = ("server", seed % 2) if "server" in fault else ("worker", 1)
                running.at(running.now + (8 + seed) * pause, lambda: running.crash(*member))
            for round in range(rounds):
                out = place.array(np.zeros(size, np.float32), round)
                pending.append(
                    (round, out, kv.pushpull("w", place.array(np.full(size, round + 1, np.float32), 1), out=out))
                )
                running.sleep(pause)
            for round, out, handle in pending:
                handle.result()
                read = place.numpy(out)
                assert read.min() == read.max(), round
                if fault != "crash of a worker":
                    assert read[0] == 2 * (round + 1)
                else:
                    assert read[0] in (round + 1, 2 * (round + 1))

        with Laboratory(workers=2, servers=2, seed=seed, **options) as running:
            running.run(program)


def test_a_server_that_is_lost_leaves_nothing_behind(cupy):
    place = Gpus(cupy)
    with cluster(1) as running:

        def work(kv):
            kv.init("w", np.zeros(PARTS, np.float32))
            given = place.array(np.ones(PARTS, np.float32), 0)
            kv.pushpull("w", given).result()
            handles = []
            with pytest.raises(kvstore.ServerLostError):  # noqa: PT012
                for round in range(1000):
                    handles.append(kv.pushpull("w", given, out=place.array(np.zeros(PARTS, np.float32), 0)))
                    if round == 2:
                        running.servers[0].stop()
            for handle in handles:
                error = handle.exception(LIMIT_S)
                assert error is None or isinstance(error, kvstore.ServerLostError), error
            assert not any(slot.busy for slot in kv._home._remotes["w"].staging._own)
            engine.default().wait_all(LIMIT_S)
            kv._leave("the test is over")

        running.run(work)


@BOTH
def test_nothing_grows_over_rounds(cupy, shared):
    if not hasattr(cupy, "machine"):
        pytest.skip("counted by the simulated machine")
    place, machine, size = Gpus(cupy), cupy.machine, 100_000
    used: list[dict[str, int]] = []

    def look():
        gc.collect()
        used.append(
            {
                "devices": sum(device.arena.bytes_in_use for device in machine.devices),
                "pinned": machine.pinned.bytes_in_use,
                "registered": sum(machine.registered.values()),
                "streams": len(machine.streams),
            }
        )

    def work(kv):
        kv.init("w", np.zeros(size, np.float32))
        given = [place.array(np.ones(size, np.float32), d) for d in range(3)]
        outs = [place.array(np.zeros(size, np.float32), d) for d in range(3)]
        for _ in range(2):
            for _ in range(40):
                kv.pushpull("w", given, out=outs).result()
            kv._home.meet(LIMIT_S)
            if kv.rank == 0:
                look()
            kv._home.meet(LIMIT_S)

    with cluster(2) as running:
        running.run(work, shared_memory=shared, devices=3)
    before, after = used
    assert after["registered"] == before["registered"]
    for what in ("devices", "pinned"):  # pools are as large as their busiest moment, which may come late
        assert after[what] <= before[what] + 8 * 4 * size
    assert after["streams"] <= before["streams"] + 1
