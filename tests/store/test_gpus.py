"""Stores with arrays of GPUs, on the simulated CuPy: streams, memories, ways to sum, and what must not go unnoticed."""

from __future__ import annotations

import re
import threading
import weakref

import ml_dtypes
import numpy as np
import pytest

import engine
import kvstore
from kvstore import errors, optim, places
from kvstore.arrays import copies, gpu
from kvstore.home import Gradient
from kvstore.placing import Placing
from kvstore.stored import Stored
from tests.gpu import simulated
from tests.gpu.simulated import others
from tests.store.gpu_programs import run

TYPES = ["local", "device"]


def on(cupy, device, array):
    """The array on that GPU."""
    with cupy.cuda.Device(device):
        return cupy.asarray(array)


# --- the same as without ------------------------------------------------------------------------------


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("seed", range(6))
def test_random_programs_end_as_on_the_host(type, seed):
    run(seed, type)


@pytest.mark.parametrize("way", ["direct", "copy", "tree", "nccl"])
@pytest.mark.parametrize("seed", range(100, 102))
def test_random_programs_with_each_way_to_sum(way, seed):
    run(seed, "device", 20, way)


PLANTED = {
    "a branch begins too early": lambda patch: patch.setattr(copies.Fork, "_branch_off", lambda *_: None),
    "a branch is not waited for": lambda patch: patch.setattr(copies.Fork, "join", lambda self: None),
    "a value is lent, and changed": lambda patch: patch.setattr(Stored, "lend", lambda self, reader: self.value),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_planted_errors_are_caught(planted, monkeypatch):
    def some() -> None:
        for seed in range(300):  # one in fifteen meets the rarest of them
            run(seed, "device", 15, "copy")

    PLANTED[planted](monkeypatch)
    with pytest.raises((AssertionError, simulated.machine.Failure)):
        some()


def moved_while_it_is_copied(seed: int) -> bool:
    """A value goes to another GPU, and who gets its memory writes to it: has a pull before that come right?"""
    with simulated.install(devices=2, seed=seed):
        import cupy

        first, second = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
        with kvstore.create("device", timeout=30) as kv:
            with first:
                kv.init("w", cupy.full(1000, 7, np.float32))
            engine.wait_all(30)  # then nobody but the store holds the memory
            with second:
                pulled = kv.pull("w", cupy.zeros(1000, np.float32))
                kv.push("w", on(cupy, 1, np.ones(1000, np.float32)))
            with first:
                others_ = [cupy.full(1000, -1, np.float32) for _ in range(3)]
            right = (pulled.result().get() == 7).all() and (kv.pull("w").result().get() == 1).all()
            return bool(right and len(others_) == 3)


def test_memory_that_a_value_leaves_is_kept_until_it_has_been_read(monkeypatch):
    assert {moved_while_it_is_copied(seed) for seed in range(20)} == {True}
    monkeypatch.setattr(Stored, "shed", lambda self: self._shed.clear())
    assert {moved_while_it_is_copied(seed) for seed in range(20)} == {True, False}


# --- streams ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type", TYPES)
def test_nobody_waits_for_a_gpu(type, simulated_cupy):
    cupy = simulated_cupy(devices=2)
    with kvstore.create(type, devices=2, timeout=30) as kv:
        keys, shapes = ["a", "b", "c"], [3, 5, 50_000]
        kv.init(keys, [np.zeros(n, np.float32) for n in shapes])
        kv.set_optimizer(optim.SGD(lr=1.0, momentum=0.9))

        def arrays(number):
            return [[on(cupy, device, np.full(n, number, np.float32)) for device in range(2)] for n in shapes]

        kv.pushpull(keys, arrays(1)).result()
        ones, outs = arrays(1), arrays(0)
        with cupy.machine.standstill():
            handles = [kv.push(keys, ones), kv.pushpull(keys, ones, outs), kv.push("c", ones[2]), kv.pull("b")]
            assert not any(handle.done() for handle in handles)
        assert handles[3].result().tolist() == handles[1].result()[1][0].tolist()


@pytest.mark.parametrize("type", TYPES)
def test_what_is_pushed_may_be_overwritten_in_the_order_of_the_stream(type, simulated_cupy):
    cupy = simulated_cupy(devices=1, seed=3)
    with kvstore.create(type, timeout=30) as kv, cupy.cuda.Stream(non_blocking=True):
        kv.init("w", cupy.zeros(1000, np.float32))
        kv.set_optimizer(optim.Accumulate())
        gradient = cupy.zeros(1000, np.float32)
        for n in range(20):
            gradient.fill(n)
            kv.push("w", gradient)
            gradient.fill(-1)
        assert set(kv.pull("w").result().get()) == {sum(range(20))}


@pytest.mark.parametrize("type", TYPES)
def test_a_device_that_waits_for_others_may_go_on(type, simulated_cupy):
    """What it has pushed is kept on its GPU until the round is complete."""
    cupy = simulated_cupy(devices=2, seed=4)
    with kvstore.create(type, devices=2, timeout=30) as kv:
        kv.init("w", on(cupy, 0, np.zeros(1000, np.float32)))
        mine, theirs = on(cupy, 0, np.full(1000, 2, np.float32)), on(cupy, 1, np.full(1000, 3, np.float32))
        out = on(cupy, 1, np.zeros(1000, np.float32))
        before = dict(cupy.machine.copies)
        first = kv.push("w", mine, device=0)
        mine.fill(-1)
        early = kv.pull("w", out, device=0)
        assert not first.done()
        assert not early.done()
        assert {pair[:2] for pair in cupy.machine.copies if cupy.machine.copies[pair] > before.get(pair, 0)} <= {(0, 0)}
        kv.push("w", theirs, device=1)
        assert set(early.result().get()) == {5}
        assert early.result() is out


def test_a_store_is_used_from_threads_with_streams_of_their_own(simulated_cupy):
    cupy = simulated_cupy(devices=2, seed=5)
    with kvstore.create("device", timeout=30) as kv:
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            kv.init("w", cupy.full(1000, 2, np.float32))
        seen = []

        def work():
            with cupy.cuda.Stream(non_blocking=True):
                seen.append(kv.pull("w").result().get())

        thread = threading.Thread(target=work)
        thread.start()
        thread.join(30)
        assert set(seen[0]) == {2}


# --- PyTorch and JAX ----------------------------------------------------------------------------------


class Watching:
    """The addresses of what has been pushed and asked for in a store."""

    def __init__(self, monkeypatch) -> None:
        self.pushed: list[int] = []
        self.outs: list[int] = []
        prepared = places.Places.prepared

        def look(self_, value, gradient: Gradient) -> Gradient:
            self.pushed += [array.data.ptr for array in gradient.arrays]
            self.outs += [array.data.ptr for array in gradient.outs or ()]
            return prepared(self_, value, gradient)

        monkeypatch.setattr(places.Places, "prepared", look)


@pytest.mark.parametrize("seed", range(5))
def test_tensors_of_pytorch_in_the_order_of_its_streams_and_without_a_copy(seed, monkeypatch, simulated_cupy):
    simulated_cupy(devices=2, seed=seed)
    with others.torch() as torch, kvstore.create("device", devices=2, timeout=30) as kv:
        watching = Watching(monkeypatch)
        streams = [torch.cuda.Stream(device) for device in range(2)]
        with torch.cuda.stream(streams[0]), torch.cuda.stream(streams[1]):
            grads = [torch.Tensor(np.zeros(1000, np.float32), device) for device in range(2)]
            kv.init("w", grads[0])
            kv.set_optimizer(optim.Accumulate())
            for n in range(1, 6):
                for grad in grads:
                    grad.fill_(n)
                kv.push("w", grads)
                for grad in grads:
                    grad.fill_(-1)
            outs = [grad.fill_(1) for grad in grads]
            result = kv.pushpull("w", grads).result()
            assert result is grads
            for out in outs:
                out.add_(1)
                assert set(out.numpy()) == {2 * sum(range(1, 6)) + 2 + 1}
        addresses = {grad.own.data.ptr for grad in grads}
        assert set(watching.pushed) == set(watching.outs) == addresses


def test_pytorchs_and_cupys_arrays_in_one_call(simulated_cupy):
    cupy = simulated_cupy(devices=1, seed=2)
    with others.torch() as torch, kvstore.create("device", devices=2, timeout=30) as kv:
        kv.init("w", cupy.zeros(1000, np.float32))
        kv.set_optimizer(optim.Accumulate())
        with torch.cuda.stream(torch.cuda.Stream()), cupy.cuda.Stream(non_blocking=True):
            tensor, array = torch.Tensor(np.zeros(1000, np.float32)), cupy.zeros(1000, np.float32)
            for n in range(10):
                tensor.fill_(n)
                array.fill(10 * n)
                kv.push("w", [tensor, array])
                tensor.fill_(-1)
                array.fill(-1)
            assert set(kv.pull("w").result().get()) == {11 * sum(range(10))}


@pytest.mark.parametrize("type", TYPES)
def test_arrays_of_jax_are_answered_with_new_ones(type, monkeypatch, simulated_cupy):
    cupy = simulated_cupy(devices=2, seed=6)
    with kvstore.create(type, timeout=30) as kv:
        watching = Watching(monkeypatch)
        kv.init("w", np.zeros(1000, np.float32))
        gradient = others.JaxArray(np.arange(1000, dtype=np.float32), device=1)
        result = kv.pushpull("w", gradient).result()
        assert isinstance(result, cupy.ndarray)
        assert result.device.id == 1
        assert result.tolist() == list(range(1000))
        assert gradient._own.data.ptr in watching.pushed
        with pytest.raises(errors.ReadOnlyError, match="JaxArray"):
            kv.pull("w", gradient)


def test_a_tensor_that_requires_a_gradient_is_refused_with_its_own_words(simulated_cupy):
    simulated_cupy()
    with others.torch() as torch, kvstore.create("device", timeout=30) as kv:
        tensor = torch.Tensor(np.zeros(3, np.float32))
        kv.init("w", tensor)
        tensor.requires_grad = True
        with pytest.raises(errors.DtypeError, match=r"tensor\.detach\(\)"):
            kv.push("w", tensor)


# --- where things lie ---------------------------------------------------------------------------------


def test_values_are_spread_by_bytes(simulated_cupy):
    cupy = simulated_cupy(devices=3)
    with kvstore.create("device", devices=3, timeout=30) as kv:
        sizes = {"a": 100, "b": 90, "c": 80, "d": 30, "e": 20, "f": 10}
        kv.init(list(sizes), [on(cupy, 0, np.zeros(1000 * n, np.float32)) for n in sizes.values()])
        kv.push("f", [on(cupy, device, np.zeros(10_000, np.float32)) for device in range(3)]).result()
        for key in ("a", "d", "e", "c", "b"):
            arrays = [on(cupy, device, np.full(1000 * sizes[key], device, np.float32)) for device in range(3)]
            kv.push(key, arrays).result()
        where = {key: value.own.value.device.id for key, value in kv._home._values.items()}
        loads = [sum(sizes[key] for key, device in where.items() if device == one) for one in range(3)]
        assert loads == [110, 110, 110]
        assert [set(kv.pull(key).result().get()) for key in ("a", "f")] == [{3.0}, {0.0}]


def test_placing_against_the_best_that_can_be():
    rng = np.random.default_rng(1)
    for _ in range(50):
        devices, sizes = int(rng.integers(2, 4)), rng.integers(1, 50, rng.integers(1, 8)).tolist()
        placing, waiting = Placing(), {f"k{number}": size for number, size in enumerate(sizes)}
        places = {}
        for key in rng.permutation(list(waiting)).tolist():
            left = {name: size for name, size in waiting.items() if name not in places}
            places[key] = placing.place(key, range(devices), left)
        fullest = max(sum(waiting[key] for key in places if places[key] == device) for device in range(devices))
        best = min(
            max(
                sum(size for n, size in enumerate(sizes) if code // devices**n % devices == device)
                for device in range(devices)
            )
            for code in range(devices ** len(sizes))
        )
        assert fullest <= best * (4 / 3 - 1 / (3 * devices)) + 1e-9  # Graham's bound


def test_a_value_goes_where_it_is_pushed_from():
    placing = Placing()
    waiting = {"a": 5, "b": 3, "c": 2}
    assert placing.place("a", {0, 1}, waiting) == 0
    assert placing.place("b", {2, 3}, {"b": 3, "c": 2}) == 2  # not where it was to be
    assert placing.place("c", {0, 1}, {"c": 2}) == 1


@pytest.mark.parametrize("type", TYPES)
def test_arrays_in_any_memories(type, simulated_cupy):
    cupy = simulated_cupy(devices=2, seed=8)
    with kvstore.create(type, devices=3, timeout=30) as kv:
        keys = ["a", "b", "large"]
        kv.init(keys, [np.zeros(n, np.float32) for n in (3, 4, 60_000)])
        for n in range(1, 6):
            arrays = [
                [
                    on(cupy, 1, np.full(size, n, np.float32)),
                    np.full(size, 10 * n, np.float32),
                    on(cupy, 0, np.full(size, n, np.float32)),
                ]
                for size in (3, 4, 60_000)
            ]
            outs = [
                [np.zeros(size, np.float32), *(on(cupy, 0, np.zeros(size, np.float32)) for _ in range(2))]
                for size in (3, 4, 60_000)
            ]
            handle = kv.pushpull(keys, arrays, outs)
            for some in arrays:
                some[1][:] = -1  # the host's has been read
            for some in handle.result():
                assert [set(np.asarray(out.get() if n else out)) for n, out in zip((0, 1, 1), some, strict=True)] == [
                    {12.0 * n}
                ] * 3


def test_pinned_host_memory_that_is_pushed_to_a_value_on_a_gpu(simulated_cupy):
    cupy = simulated_cupy(devices=1, seed=9)
    with kvstore.create("device", timeout=30) as kv:
        kv.init("w", cupy.zeros(1000, np.float32))
        kv.push("w", cupy.ones(1000, np.float32)).result()
        kv.set_optimizer(optim.Accumulate())
        mine = gpu.pinned(4000).view(np.float32)
        for n in range(10):
            mine[:] = n
            kv.push("w", mine)
            mine[:] = -1
        assert set(kv.pull("w", mine).result()) == {1 + sum(range(10))}


def test_a_view_of_a_value_on_a_gpu(simulated_cupy):
    cupy = simulated_cupy(devices=1)
    with kvstore.create("device", timeout=30) as kv:
        kv.init("w", cupy.full(1000, 1, np.float32))
        view = kv.view("w")
        assert isinstance(view, cupy.ndarray)
        for n in range(2, 5):
            kv.push("w", cupy.full(1000, n, np.float32)).result()
        assert set(view.get()) == {1}
        assert set(kv.pull("w", kvstore.IN_PLACE).result().get()) == {4}


def test_what_is_kept_in_files_is_numpys(tmp_path, simulated_cupy):
    cupy = simulated_cupy(devices=2)
    first, gradients = np.ones(1000, np.float32), [on(cupy, device, np.ones(1000, np.float32)) for device in range(2)]
    stores = [kvstore.create("device", timeout=30), kvstore.create("local", timeout=30)]
    for kv in stores:
        kv.init("w", on(cupy, 1, first))
        kv.set_optimizer(optim.Adam(lr=0.1))
        kv.push("w", gradients).result()
    (kv, plain) = stores
    assert isinstance(kv.snapshot().result()["w"], np.ndarray)
    kv.save_checkpoint(tmp_path / "checkpoints").result()
    kv.save_optimizer_states(tmp_path / "states")
    after = kv.pushpull("w", gradients, on(cupy, 1, first)).result().get()
    plain.load_checkpoint(tmp_path / "checkpoints")
    np.testing.assert_array_equal(plain.pushpull("w", gradients, np.empty_like(first)).result(), after)
    kv.load_checkpoint(tmp_path / "checkpoints")
    kv.load_optimizer_states(tmp_path / "states")
    np.testing.assert_array_equal(kv.pushpull("w", gradients, on(cupy, 1, first)).result().get(), after)
    for one in stores:
        one.close()


def test_an_updater_gets_arrays_of_the_gpu(simulated_cupy):
    cupy = simulated_cupy(devices=2)
    seen = []

    def updater(key, merged, stored):
        seen.append((type(merged), type(stored), merged.device.id, stored.device.id))
        stored += 2 * merged

    with kvstore.create("device", devices=2, timeout=30) as kv:
        kv.init("w", np.zeros(10, np.float32))
        kv.set_updater(updater)
        arrays = [on(cupy, device, np.ones(10, np.float32)) for device in range(2)]
        for _ in range(3):
            kv.pushpull("w", arrays, arrays[1]).result()
            for array in arrays:
                with array.device:
                    array.fill(1)
        assert set(kv.pull("w").result()) == {12}
        assert set(seen) == {(cupy.ndarray, cupy.ndarray, 0, 0)}

        def broken(key, merged, stored):
            raise RuntimeError("no such luck")

        kv.set_updater(broken)
        with pytest.raises(errors.UpdateError, match=r"'w'.*no such luck"):
            kv.push("w", arrays).result()


# --- memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["direct", "copy", "tree", "nccl"])
def test_memory_does_not_grow(way, simulated_cupy, request):
    cupy = simulated_cupy(devices=2, memory_bytes=64 << 20)
    rounds = 10_000 if request.config.getoption("--simulation-seeds") >= 1000 else 60
    pool, size = cupy.get_default_memory_pool(), 100_000
    with kvstore.create("device", devices=2, timeout=60, device_merge=way) as kv:
        keys = ["a", "b", "large"]
        sizes = [10, 20, size]
        kv.init(keys, [np.zeros(n, np.float32) for n in sizes])
        kv.set_optimizer(optim.SGD(lr=0.1, momentum=0.9))
        grads = [[on(cupy, device, np.ones(n, np.float32)) for device in range(2)] for n in sizes]
        outs = [[on(cupy, device, np.ones(n, np.float32)) for device in range(2)] for n in sizes]

        def used() -> int:
            total = 0
            for device in range(2):
                with cupy.cuda.Device(device):
                    cupy.cuda.runtime.deviceSynchronize()
                    total += pool.used_bytes()
            return total

        mine = used()
        for _ in range(10):
            kv.pushpull(keys, grads, outs).result()
        settled = used()
        for number in range(rounds):
            kv.push(keys, grads)
            kv.pull(keys, outs)
            kv.pushpull("large", grads[2], outs[2], priority=number).result()
            if number % 16 == 0:
                kv.pull("large").result()
        kv.barrier()
        kv.pull(keys, outs).result()
        assert used() <= settled + 4096
        assert settled - mine <= 2.1 * 4 * size  # the value and its momentum


def test_nothing_of_a_store_is_left(simulated_cupy):
    cupy = simulated_cupy(devices=1)
    pool = cupy.get_default_memory_pool()
    kv = kvstore.create("device", timeout=30)
    kv.init("w", cupy.zeros(100_000, np.float32))
    kv.push("w", cupy.ones(100_000, np.float32)).result()
    gone = weakref.ref(kv._home)
    assert pool.used_bytes() >= 400_000
    kv.close()
    del kv
    assert gone() is None or not gone()._values
    assert pool.used_bytes() < 400_000


# --- without ------------------------------------------------------------------------------------------


def test_those_who_have_numpy_only_never_import_cupy(monkeypatch):
    monkeypatch.setattr(gpu, "missing", lambda: pytest.fail("CuPy was asked for"))
    monkeypatch.setattr(gpu, "module", lambda: pytest.fail("CuPy was asked for"))
    with kvstore.create("device", devices=2, timeout=30) as kv:
        kv.init(["a", "b"], [np.zeros(3), np.zeros(4)])
        kv.set_optimizer(optim.SGD(lr=1.0))
        values = [[np.ones(3), np.ones(3)], [np.ones(4), np.ones(4)]]
        kv.pushpull(["a", "b"], values).result()
        assert kv.pull("a").result().tolist() == [-2] * 3
        assert "host memory" in repr(kv)


def test_a_store_says_where_its_arrays_are(monkeypatch, simulated_cupy):
    if gpu.unlikely():
        with kvstore.create("device") as kv:
            assert f"(host memory: {gpu.unlikely()})" in repr(kv)
    cupy = simulated_cupy(devices=2)
    assert re.fullmatch("0: .+, 1: .+", gpu.described())
    with kvstore.create("device", timeout=30) as kv:
        assert "(host memory)" in repr(kv)
        kv.init("w", np.zeros(3))
        kv.pull("w", on(cupy, 1, np.zeros(3))).result()
        assert "(GPU 1)" in repr(kv)
        kv.pull("w", on(cupy, 0, np.zeros(3))).result()
        assert "(GPUs 0, 1)" in repr(kv)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_trainer_with_a_scale(dtype, simulated_cupy):
    cupy = simulated_cupy(devices=2, seed=3)
    rng = np.random.default_rng(0)
    first, gradients = np.ones(100).astype(dtype), [rng.standard_normal(100).astype(dtype) for _ in range(2)]
    with kvstore.create("local", timeout=30) as plain, kvstore.create("device", timeout=30) as kv:
        weights = {"w": [first.copy(), first.copy()], "b": [first.copy(), first.copy()]}
        there = {key: [on(cupy, device, first) for device in range(2)] for key in weights}
        trainers = [
            kvstore.Trainer(params, optim.SGD(lr=0.5, momentum=0.9), store, scale=1 / 3)
            for params, store in ((weights, plain), (there, kv))
        ]
        for _ in range(3):
            trainers[0].step(dict.fromkeys(weights, gradients))
            trainers[1].step({key: [on(cupy, device, g) for device, g in enumerate(gradients)] for key in weights})
        for key in weights:
            for mine, theirs in zip(there[key], weights[key], strict=True):
                assert mine.get().tobytes() == theirs.tobytes()


def test_without_nccl_its_type_says_so_when_it_is_needed(monkeypatch, simulated_cupy):
    cupy = simulated_cupy(devices=2)
    monkeypatch.setattr(gpu, "nccl", lambda: None)
    with kvstore.create("nccl", devices=2, timeout=30) as kv:
        kv.init("w", np.zeros(10, np.float32))
        near = [on(cupy, 0, np.ones(10, np.float32)) for _ in range(2)]
        assert set(kv.pushpull("w", near).result()[1].get()) == {2}  # one GPU needs none
        with pytest.raises(errors.OptionError, match="nvidia-nccl"):
            kv.push("w", [on(cupy, device, np.ones(10, np.float32)) for device in range(2)]).result()


def test_ways_that_there_are_not():
    with pytest.raises(errors.OptionError, match="expected one of auto, direct, copy, tree, nccl; got 'ring'"):
        kvstore.create("device", device_merge="ring")
