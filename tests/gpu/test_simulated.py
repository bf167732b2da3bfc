"""The simulated CuPy itself: it is as unkind as a GPU may be, and no more; and it computes what NumPy does."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import engine
from kvstore import kernels
from kvstore.arrays import foreign, gpu
from kvstore.kernels import reference
from kvstore.kernels.cuda import launches
from tests.engine import queues
from tests.engine.device_programs import with_streams
from tests.engine.simulated import Nowhere
from tests.gpu import simulated
from tests.gpu.simulated import others
from tests.gpu.simulated.machine import GARBAGE
from tests.gpu.test_engine import OnCupy
from tests.kernels import on_cpu

SEEDS = range(12)
LIMIT_S = 30


def outcomes(conversation):
    """What it gives, by all the seeds."""
    found = set()
    for seed in SEEDS:
        with simulated.install(devices=2, seed=seed) as machine:
            import cupy

            found.add(conversation(cupy, machine))
    return found


# --- order ------------------------------------------------------------------------------------------


def test_streams_know_no_order_but_that_of_events():
    def without(cupy, machine, event=False):
        first, second = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
        with first:
            array = cupy.zeros(4)
            array += 1
            done = first.record()
        if event:
            second.wait_event(done)
        with second:
            array *= 10
        cupy.cuda.runtime.deviceSynchronize()
        return float(array[0])

    assert outcomes(without) > {10.0}
    assert outcomes(lambda *both: without(*both, event=True)) == {10.0}


@pytest.mark.parametrize("non_blocking", [True, False])
def test_the_null_stream_and_blocking_streams_wait_for_each_other(non_blocking):
    def conversation(cupy, machine):
        array = cupy.zeros(4)
        with cupy.cuda.Stream(non_blocking=non_blocking):
            array += 1
        array *= 10
        with cupy.cuda.Stream(non_blocking=non_blocking):
            array += 1
        cupy.cuda.runtime.deviceSynchronize()
        return float(array[0])

    found = outcomes(conversation)
    assert (len(found) > 1) if non_blocking else (found == {11.0})


def test_an_event_counts_as_it_was_recorded_last_before_the_wait(simulated_cupy):
    cupy = simulated_cupy()
    event, stream = cupy.cuda.Event(), cupy.cuda.Stream(non_blocking=True)
    assert event.done  # never recorded
    with cupy.machine.standstill():
        event.record()
        assert not event.done
        stream.wait_event(event)
        with stream:
            array = cupy.ones(4)
        event.record(stream)
        assert not event.done and not stream.done
    assert array.get(stream=stream).tolist() == [1] * 4
    event.synchronize()
    assert event.done


def test_what_cuda_refuses_between_devices(simulated_cupy):
    cupy = simulated_cupy()
    event, stream = cupy.cuda.Event(), cupy.cuda.Stream()
    here, other = cupy.cuda.Event(disable_timing=True), cupy.zeros(4)
    with cupy.cuda.Device(1):
        with pytest.raises(RuntimeError, match="does not match with the current device"), stream:
            pass
        with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="InvalidResourceHandle"):
            event.record()
        there = cupy.cuda.Stream()
        there.wait_event(event)
        event.synchronize()
        array = cupy.zeros(4)
        array.data.copy_from_device_async(other.data, 32, stream)  # copies may go into any stream
    event.record()
    here.record()
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="InvalidResourceHandle"):
        cupy.cuda.get_elapsed_time(event, here)


def test_a_host_function_has_a_thread_of_its_own_and_its_stream_waits(simulated_cupy):
    cupy = simulated_cupy()
    go, called = threading.Event(), []
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        array = cupy.zeros(4)
        stream.launch_host_func(lambda arg: (go.wait(LIMIT_S), called.append((arg, threading.get_ident()))), 7)
        array += 1
    assert cupy.ones(4).tolist() == [1] * 4  # other streams go on
    assert not stream.done
    go.set()
    stream.synchronize()
    assert called[0][0] == 7 and called[0][1] != threading.get_ident()
    assert array.tolist() == [1] * 4


# --- memory of the host -----------------------------------------------------------------------------


def pinned(cupy, size):
    return np.frombuffer(cupy.cuda.alloc_pinned_memory(size), np.uint8, size)


def test_a_copy_up_has_read_pageable_memory_but_not_pinned_memory():
    def conversation(cupy, machine, source):
        source[:] = 1
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            array = cupy.empty(8, np.uint8)
            array.set(source)
        source[:] = 2
        stream.synchronize()
        return int(array[0])

    assert outcomes(lambda cupy, machine: conversation(cupy, machine, np.empty(8, np.uint8))) == {1}
    assert outcomes(lambda cupy, machine: conversation(cupy, machine, pinned(cupy, 8))) == {1, 2}


def test_asarray_reads_pageable_memory_at_once_and_pinned_memory_later():
    def conversation(cupy, machine, source):
        source[:] = 1
        array = cupy.asarray(source)
        source[:] = 2
        return int(array[0])

    assert outcomes(lambda cupy, machine: conversation(cupy, machine, np.empty(8, np.uint8))) == {1}
    assert outcomes(lambda cupy, machine: conversation(cupy, machine, pinned(cupy, 8))) == {1, 2}


def test_a_copy_down_is_complete_in_pageable_memory_but_not_in_pinned_memory():
    def conversation(cupy, machine, target):
        target[:] = 0
        cupy.ones(8, np.uint8).get(out=target, blocking=False)
        return int(target[0])

    assert outcomes(lambda cupy, machine: conversation(cupy, machine, np.empty(8, np.uint8))) == {1}
    assert outcomes(lambda cupy, machine: conversation(cupy, machine, pinned(cupy, 8))) == {0, 1}


def test_pinned_memory_that_is_let_go_early_is_overwritten():
    def conversation(cupy, machine):
        with cupy.cuda.Stream(non_blocking=True) as stream:
            array = cupy.empty(600, np.uint8)
            source = pinned(cupy, 600)
            source[:] = 1
            array.set(source)
            del source
            stream.synchronize()
            return int(array[0])

    assert outcomes(conversation) == {1, GARBAGE}


def test_registered_memory_is_pinned_until_it_is_no_longer(simulated_cupy):
    cupy = simulated_cupy(seed=5)
    runtime = cupy.cuda.runtime
    memory = np.ones(100, np.uint8)
    runtime.hostRegister(memory.ctypes.data, 60, 0)
    assert runtime.pointerGetAttributes(memory.ctypes.data + 59).type == runtime.memoryTypeHost
    for start, size in ((0, 60), (40, 60), (59, 1)):
        with pytest.raises(runtime.CUDARuntimeError, match="AlreadyRegistered"):
            runtime.hostRegister(memory.ctypes.data + start, size, 0)
    with cupy.machine.standstill():
        array = cupy.empty(60, np.uint8)
        array.set(memory[:60])
    assert cupy.machine.copies == {(-1, 0, "pinned"): 1}
    assert array.tolist() == [1] * 60
    with pytest.raises(runtime.CUDARuntimeError, match="NotRegistered"):
        runtime.hostUnregister(memory.ctypes.data + 1)
    runtime.hostUnregister(memory.ctypes.data)
    array.set(memory[:60])
    assert cupy.machine.copies[-1, 0, "pageable"] == 1


def test_devices_do_not_write_what_is_registered_to_be_read(simulated_cupy):
    cupy = simulated_cupy()
    memory = np.ones(100, np.uint8)
    cupy.cuda.runtime.hostRegister(memory.ctypes.data, 100, 8)
    array = cupy.asarray(memory)
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="IllegalAddress"):
        array.get(out=memory)


def test_a_copy_fails_that_finds_its_memory_no_longer_registered(simulated_cupy):
    cupy = simulated_cupy()
    memory = np.ones(100, np.uint8)
    array = cupy.empty(100, np.uint8)
    cupy.cuda.runtime.hostRegister(memory.ctypes.data, 100, 0)
    with cupy.machine.standstill():
        array.set(memory)
        cupy.cuda.runtime.hostUnregister(memory.ctypes.data)
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="IllegalAddress") as raised:
        cupy.cuda.runtime.deviceSynchronize()
    assert "not pinned (any more)" in raised.value.__notes__[0]


# --- memory of devices ------------------------------------------------------------------------------


def test_freed_memory_is_given_anew_on_its_stream_and_overwritten(simulated_cupy):
    cupy = simulated_cupy()
    pool, stream = cupy.get_default_memory_pool(), cupy.cuda.Stream(non_blocking=True)
    array = cupy.ones(1000, np.uint8)
    before = array.data.ptr
    assert (pool.used_bytes(), pool.total_bytes()) == (1024, 1024)
    del array
    assert (pool.used_bytes(), pool.total_bytes(), pool.n_free_blocks()) == (0, 1024, 1)
    with stream:
        assert cupy.empty(1000, np.uint8).data.ptr != before
    again = cupy.empty(500, np.uint8)
    assert again.data.ptr == before
    assert again.tolist() == [GARBAGE] * 500
    other = cupy.empty(500, np.uint8)
    assert other.data.ptr == before + 512
    del again, other
    assert cupy.empty(1000, np.uint8).data.ptr == before
    assert cupy.machine.devices[0].arena.bytes_max == 2048


def test_memory_freed_while_another_stream_uses_it_is_found_overwritten():
    def conversation(cupy, machine, event=False):
        stream = cupy.cuda.Stream(non_blocking=True)
        array = cupy.ones(8, np.uint8)
        stream.wait_event(cupy.cuda.get_current_stream().record())
        with stream:
            total = array.sum()
        if event:
            cupy.cuda.get_current_stream().wait_event(stream.record())
        del array
        cupy.empty(8, np.uint8)  # another's
        stream.synchronize()
        return int(total)

    assert outcomes(conversation) == {8, 8 * GARBAGE}
    assert outcomes(lambda *both: conversation(*both, event=True)) == {8}


def test_temporary_arrays_may_be_let_go_at_once(simulated_cupy):
    for seed in SEEDS:
        cupy = simulated_cupy(seed=seed)
        array = cupy.arange(8)
        assert ((array + 1) * (array + 2) + (array * 3)).tolist() == [(k + 1) * (k + 2) + 3 * k for k in range(8)]


def test_no_more_memory_than_there_is(simulated_cupy):
    cupy = simulated_cupy(memory_bytes=4096)
    arrays = [cupy.empty(2048, np.uint8) for _ in range(2)]
    with pytest.raises(cupy.cuda.memory.OutOfMemoryError):
        cupy.empty(1, np.uint8)
    arrays.pop()
    cupy.empty(2048, np.uint8)
    with cupy.cuda.Device(1):
        cupy.empty(4096, np.uint8)  # the other device has its own
    cupy.get_default_memory_pool().set_limit(1024)
    cupy.get_default_memory_pool().free_all_blocks()
    with pytest.raises(cupy.cuda.memory.OutOfMemoryError):
        cupy.empty(2048, np.uint8)


# --- peers ------------------------------------------------------------------------------------------


def test_a_kernel_reaches_a_peers_memory_only_with_peer_access(simulated_cupy):
    cupy = simulated_cupy()
    with cupy.cuda.Device(1):
        there = cupy.full(100, 2, np.float32)
        there.device.synchronize()
    here, out = cupy.ones(100, np.float32), cupy.empty(100, np.float32)
    cupy.cuda.runtime.deviceEnablePeerAccess(1)
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="AlreadyEnabled"):
        cupy.cuda.runtime.deviceEnablePeerAccess(1)
    kernels.merge([here, there], out)
    assert out.tolist() == [3] * 100
    cupy.cuda.runtime.deviceDisablePeerAccess(1)
    kernels.merge([here, there], out)
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="IllegalAddress") as raised:
        out.get()
    assert "merge_f4" in raised.value.__notes__[0] and "no peer access" in raised.value.__notes__[0]
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="IllegalAddress"):  # and ever after
        cupy.zeros(4)
    event = engine.Cuda(cupy).record(engine.Cuda(cupy).current(1))
    while not engine.Cuda(cupy).done(event):  # the other device goes on
        pass


def test_a_kernel_reaches_no_peers_memory_by_a_table_either(simulated_cupy):
    cupy = simulated_cupy()
    with cupy.cuda.Device(1):
        there = cupy.full(100, 2, np.float32)
        there.device.synchronize()
    arrays = [cupy.ones(100, np.float32) for _ in range(launches.NEAR)]
    out = cupy.empty(100, np.float32)
    kernels.merge([*arrays, out], out)
    cupy.cuda.get_current_stream().synchronize()
    kernels.merge([*arrays, there], out)
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="IllegalAddress"):
        out.get()


def test_cupys_own_kernels_enable_peer_access_with_a_warning(simulated_cupy):
    cupy = simulated_cupy()
    there = cupy.ones(100)
    there.device.synchronize()
    with cupy.cuda.Device(1):
        with pytest.warns(cupy._util.PerformanceWarning, match="Peer access has been activated"):
            assert (there + 1).tolist() == [2] * 100
        assert cupy.asarray(there).device.id == 1  # a copy, which needs none
    assert cupy.machine.copies[0, 1, ""] == 1


def test_devices_that_cannot_reach_each_other(simulated_cupy):
    cupy = simulated_cupy(peers=lambda one, other: False)
    there = cupy.ones(100)
    there.device.synchronize()
    assert cupy.cuda.runtime.deviceCanAccessPeer(1, 0) == 0
    with cupy.cuda.Device(1):
        with pytest.raises(ValueError, match="Peer access is unavailable"):
            there + 1
        with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="Unsupported"):
            cupy.cuda.runtime.deviceEnablePeerAccess(0)
        assert cupy.asarray(there).tolist() == [1] * 100


# --- NCCL -------------------------------------------------------------------------------------------


def nccl_sum(cupy, values, root=None):
    """Of one array per device."""
    nccl = cupy.cuda.nccl
    kind = getattr(nccl, f"NCCL_{values[0].dtype.name.upper()}")
    sends, receives = [], []
    for device, value in enumerate(values):
        with cupy.cuda.Device(device):
            sends.append(cupy.asarray(value))
            receives.append(cupy.zeros_like(sends[-1]))
    communicators = nccl.NcclCommunicator.initAll(len(values))
    nccl.groupStart()
    for one, send, receive in zip(communicators, sends, receives, strict=True):
        if root is None:
            one.allReduce(send.data.ptr, receive.data.ptr, send.size, kind, nccl.NCCL_SUM, 0)
        else:
            one.reduce(send.data.ptr, receive.data.ptr, send.size, kind, nccl.NCCL_SUM, root, 0)
    nccl.groupEnd()
    return [receive.get() for receive in receives]


@pytest.mark.parametrize("root", [None, 0, 2])
def test_nccl_sums(simulated_cupy, root):
    cupy = simulated_cupy(devices=3)
    values = [np.arange(100, dtype=np.int64) + 1000 * k for k in range(3)]
    for device, got in enumerate(nccl_sum(cupy, values, root)):
        assert got.tolist() == (sum(values).tolist() if root in (None, device) else [0] * 100)


def test_nccl_adds_in_an_order_of_its_own_and_in_the_arrays_type(simulated_cupy):
    cupy = simulated_cupy(devices=4)
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        values = [rng.standard_normal(1000).astype(dtype) for _ in range(4)]
        left_to_right = np.empty(1000, dtype)
        reference.merge(values, left_to_right)
        got = nccl_sum(cupy, values)[0]
        assert got.dtype == dtype and (got != left_to_right).any()
        assert np.allclose(got.astype(float), left_to_right.astype(float), atol=0.1)


def test_a_thread_that_serves_several_ranks_outside_a_group_is_lost(simulated_cupy, monkeypatch):
    cupy = simulated_cupy()
    monkeypatch.setattr(simulated.nccl, "PATIENCE_S", 0.01)
    array = cupy.zeros(4, np.float32)
    one = cupy.cuda.nccl.NcclCommunicator.initAll(2)[0]
    with pytest.raises(simulated.Lost, match="outside a group"):
        one.allReduce(array.data.ptr, array.data.ptr, 4, cupy.cuda.nccl.NCCL_FLOAT32, cupy.cuda.nccl.NCCL_SUM, 0)
    cupy.machine.forget()


# --- what is reported -------------------------------------------------------------------------------


def test_to_wait_for_what_never_comes_is_an_error(simulated_cupy, monkeypatch):
    cupy = simulated_cupy()
    array = cupy.zeros(4)
    with cupy.machine.standstill(), pytest.raises(simulated.Lost):
        array.get()
    monkeypatch.setattr(queues, "PATIENCE_S", 0.01)
    with cupy.machine.standstill(may_wait=True), pytest.raises(simulated.Lost):
        array.get()


def test_an_error_that_nobody_was_told_is_raised_at_the_end():
    def wrong():
        with simulated.install():
            import cupy

            memory = cupy.cuda.Memory(512)
            cupy.ndarray(4, np.uint8, cupy.cuda.MemoryPointer(memory, 600)).fill(1)

    with pytest.raises(simulated.Failure, match="not allocated"):
        wrong()


def test_what_has_been_done_is_counted(simulated_cupy):
    cupy = simulated_cupy()
    array = cupy.asarray(np.ones(1000, np.float32))
    array += 1
    array.get(out=np.empty(1000, np.float32))
    with cupy.cuda.Device(1):
        cupy.asarray(array)
    machine = cupy.machine
    assert machine.launches == {"cupy_add": 1}
    assert machine.copied_bytes == {(-1, 0, "pinned"): 4000, (0, -1, "pageable"): 4000, (0, 1, ""): 4000}
    assert set(machine.synchronised) == {threading.current_thread().name}


def test_nothing_is_left_behind():
    before = {name: module for name, module in sys.modules.items() if name.startswith(("cupy", "kvstore"))}
    assert gpu.missing() is None or "simulated" not in sys.modules
    reason = gpu.missing()
    with simulated.install():
        import cupy

        assert cupy.kvstore_simulated
        assert gpu.missing() is None
        assert gpu.module() is cupy
        if on_cpu.COMPILER:
            array = cupy.zeros(4)
            kernels.merge([array, array], array)
        engine.default().use(gpu.devices())
    assert {name: module for name, module in sys.modules.items() if name.startswith(("cupy", "kvstore"))} == before
    assert gpu.missing() == reason


# --- arrays -----------------------------------------------------------------------------------------


def test_arrays_are_not_read_by_accident(simulated_cupy):
    cupy = simulated_cupy()
    array = cupy.zeros(4)
    with pytest.raises(TypeError, match="Implicit conversion"):
        np.asarray(array)
    with pytest.raises(TypeError):
        memoryview(array)
    with pytest.raises(TypeError):
        array + np.zeros(4)
    with pytest.raises(TypeError):
        np.zeros(4) + array
    with pytest.raises((BufferError, RuntimeError)):
        np.from_dlpack(array)
    assert not hasattr(array, "__array_interface__")


def test_numpys_functions_give_arrays_of_the_device(simulated_cupy):
    cupy = simulated_cupy()
    one, other = cupy.arange(6.0), cupy.ones(6)
    for made, expected in (
        (np.add(one, other), np.arange(6.0) + 1),
        (np.concatenate([one, other]), np.concatenate([np.arange(6.0), np.ones(6)])),
        (np.zeros_like(one), np.zeros(6)),
        (cupy.zeros_like(one, np.int8), np.zeros(6)),
        (np.full_like(one, 7), np.full(6, 7.0)),
        (np.sum(one), np.float64(15)),
        (np.add.reduce(one), np.float64(15)),
    ):
        assert isinstance(made, cupy.ndarray)
        assert made.tolist() == expected.tolist()
    assert np.add(one, other, out=other) is other
    assert cupy.get_array_module(one) is cupy and cupy.get_array_module(np.zeros(3)) is np


@pytest.mark.parametrize("dtype", ["float32", "int8", "uint64", "bool", "complex64", ml_dtypes.bfloat16])
def test_dlpack_takes_arrays_in_and_out(simulated_cupy, dtype):
    cupy = simulated_cupy()
    with cupy.cuda.Device(1):
        array = cupy.zeros((4, 6), dtype)
        array[1:3, ::2] = 1

    class Tensor:  # of another library
        def __dlpack__(self, stream=None):
            self.stream = stream
            return array.__dlpack__(stream=stream)

        def __dlpack_device__(self):
            return array.__dlpack_device__()

    tensor = Tensor()
    for seen in (cupy.from_dlpack(tensor), cupy.from_dlpack(array[1:, ::2]), cupy.from_dlpack(array.T)):
        assert seen.device.id == 1
        assert seen.dtype == array.dtype
    assert tensor.stream == cupy.cuda.runtime.streamLegacy
    assert cupy.from_dlpack(array[1:, ::2]).tolist() == array[1:, ::2].tolist()
    with cupy.cuda.Device(1):
        seen = cupy.from_dlpack(tensor)
        seen[...] = 0
    assert array.tolist() == cupy.zeros((4, 6), dtype).tolist()
    with pytest.raises(TypeError, match="CPU arrays"):
        cupy.from_dlpack(np.zeros(3))


def test_a_consumers_stream_waits_for_the_producers():
    def conversation(cupy, machine, stream=None):
        mine, theirs = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
        with mine:
            array = cupy.zeros(4)
            array += 1
            array.__dlpack__(stream=theirs.ptr if stream is None else stream)
        with theirs:
            array *= 10
        cupy.cuda.runtime.deviceSynchronize()
        return float(array[0])

    assert outcomes(conversation) == {10}
    assert len(outcomes(lambda *both: conversation(*both, stream=-1))) > 1


@pytest.mark.parametrize("version", ["13.6.0", "14.0.0"])
def test_tensors_of_pytorch_are_seen_in_the_order_of_its_streams(version):
    found = set()
    for seed in SEEDS:
        with simulated.install(seed=seed, version=version), others.torch() as torch:
            import cupy

            with torch.cuda.stream(torch.cuda.Stream(1)):
                tensor = torch.Tensor(np.zeros(8), device=1).fill_(3)
                with foreign.callers([tensor]), cupy.cuda.Device(1):
                    found.add(foreign.imported(tensor, "a tensor").get().tolist() == [3] * 8)
    assert found == {True}


def test_tensors_are_seen_too_early_without_the_order_of_the_streams():
    def conversation(cupy, machine):
        with others.torch() as torch, torch.cuda.stream(torch.cuda.Stream()):
            tensor = torch.Tensor(np.zeros(8)).fill_(3)
            return cupy.asarray(tensor.own).tolist() == [3] * 8  # past DLPack

    assert outcomes(conversation) == {True, False}


def test_arrays_of_jax_are_complete_for_the_stream_that_asks():
    def conversation(cupy, machine):
        array = others.JaxArray(np.arange(8), device=1)
        assert foreign.is_immutable(array)
        with cupy.cuda.Device(1), cupy.cuda.Stream(non_blocking=True):
            return foreign.imported(array, "an array").get().tolist() == list(range(8))

    assert outcomes(conversation) == {True}


def test_an_array_of_another_library_by_its_interface(simulated_cupy):
    cupy = simulated_cupy()
    own = cupy.arange(12, dtype=np.int32).reshape(3, 4)
    foreign = SimpleNamespace(__cuda_array_interface__=own[:, 1:].__cuda_array_interface__)
    seen = cupy.asarray(foreign)
    assert (seen.data.ptr, seen.device.id, seen.strides) == (own.data.ptr + 4, 0, (16, 4))
    assert cupy.asnumpy(foreign).tolist() == [[1, 2, 3], [5, 6, 7], [9, 10, 11]]


def test_views_and_arithmetic_agree_with_numpy(simulated_cupy):
    """Random programs over one array and its views, on several streams of one device, ordered by events."""
    for seed in range(100):
        cupy = simulated_cupy(seed=seed) if seed % 20 == 0 else sys.modules["cupy"]
        rng = np.random.default_rng(seed)
        plain = rng.integers(0, 100, (4, 6, 5)).astype(rng.choice(["int64", "float32", "float64"]))
        array = cupy.asarray(plain)
        before = cupy.cuda.get_current_stream().record()
        for _ in range(10):
            key, value = view(rng), int(rng.integers(1, 5))
            with cupy.cuda.Stream(non_blocking=True) as stream:
                stream.wait_event(before)
                step = rng.integers(8)
                for numbers in (plain, array):
                    seen = numbers[key]
                    assert np.shape(seen) == plain[key].shape
                    if step == 0:
                        seen += value
                    elif step == 1:
                        numbers[key] = seen * value % 97
                    elif step == 2:
                        numbers[key] = value
                    elif step == 3:
                        numbers.reshape(-1)[:40:3] -= value
                    elif step == 4:
                        numbers.T[1:3, ::2] = value
                    elif step == 5:
                        numbers[key] = (seen > value) | (seen == 3)
                    elif step == 6:
                        numbers[...] = numbers + numbers.sum(axis=int(value) % 3, keepdims=True) % 7
                    else:
                        numbers[key] = seen.copy().max() if seen.size else 0
                before = stream.record()
        cupy.cuda.get_current_stream().wait_event(before)
        assert array.get().tolist() == plain.tolist(), f"seed {seed}"
        assert array.get().dtype == plain.dtype


def view(rng):
    """Of three dimensions."""
    parts = []
    for length in (4, 6, 5):
        start, stop = sorted(rng.integers(0, length + 1, 2))
        parts.append(slice(int(start), int(stop), int(rng.choice([1, 2]))))
    return tuple(parts)


def test_threads_work_side_by_side(simulated_cupy):
    cupy = simulated_cupy(seed=4)
    found = []

    def work(number):
        with cupy.cuda.Device(number % 2), cupy.cuda.Stream(non_blocking=True):
            total = cupy.zeros(50)
            for step in range(50):
                total += cupy.asarray(np.full(50, step))
            found.append(total.get().tolist() == [1225] * 50)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert found == [True] * 6


@pytest.mark.parametrize("version", ["13.6.0", "14.0.0"])
def test_what_differs_between_releases(simulated_cupy, version):
    cupy = simulated_cupy(version=version)
    assert cupy.__version__ == version
    stream = cupy.cuda.Stream(non_blocking=True)
    array = cupy.zeros(4, ml_dtypes.bfloat16)
    foreign = SimpleNamespace(__cuda_stream__=lambda: (0, stream.ptr))
    if version < "14":
        assert not hasattr(cupy.cuda.Stream, "from_external")
        assert cupy.cuda.ExternalStream(stream.ptr) == stream
        with pytest.raises(KeyError):
            array += 1
    else:
        with cupy.cuda.Stream.from_external(foreign) as own:
            assert own == stream and own.device_id == -1
            array += 1
        assert array.get(stream=stream).tolist() == [1] * 4
        with pytest.warns(DeprecationWarning, match="Stream.from_external"):
            cupy.cuda.ExternalStream(stream.ptr)


# --- with the engine --------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["wait", "record"])
def test_a_planted_missing_event_of_the_engine_is_caught(lost):
    """Its programs on simulated CuPy can fail."""
    serial = engine.create("serial")
    for seed in range(200):
        with simulated.install(seed=seed):
            import cupy

            devices = engine.Cuda(cupy)
            if lost == "wait":
                devices.wait = lambda stream, event: None
            else:
                devices.record = lambda stream, timed=False: cupy.cuda.Event()
            streams = engine.create("threaded", threads=3)
            streams.use(devices)
            try:
                differs = with_streams(streams, OnCupy(cupy), seed) != with_streams(serial, Nowhere(), seed)
            finally:
                streams.close()
        if differs:
            break
    assert differs
    serial.close()
