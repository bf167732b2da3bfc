"""Values go from any memory to any: right, complete when it is said, and read only as long as it is said."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import engine
import kvstore
from kvstore.arrays import HOST, copy_to, empty, gpu, memory_of, to_host
from kvstore.delivery import Delivery, apart

LIMIT_S = 30
PLACES = ["host", "pinned", "first", "second"]
SIZES = [0, 7, 100_000, 1_300_000]  # float32: none, small, one block, two blocks


def array(place, values):
    """The values in that memory, complete."""
    if place == "host":
        return np.array(values)
    if place == "pinned":
        pinned = gpu.pinned(values.nbytes).view(values.dtype)
        pinned[...] = values
        return pinned
    made = empty(
        values.shape, values.dtype, (0 if place == "first" else 1) % gpu.module().cuda.runtime.getDeviceCount()
    )
    with made.device:
        copy_to(values, made)
        gpu.module().cuda.get_current_stream().synchronize()
    return made


@pytest.fixture
def runtime(cupy):
    one = engine.create("threaded")
    one.use(gpu.devices())
    yield one
    one.wait_all(LIMIT_S)
    one.validate()
    one.close()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("places", [["host"], ["pinned", "host"], ["first"], ["first", "second"], PLACES])
@pytest.mark.parametrize("source", PLACES)
def test_from_any_memory_to_any(runtime, source, places, size):
    values = np.arange(size, dtype=np.float32)
    outs = [array(place, np.zeros_like(values)) for place in places]
    ended, errors, over = threading.Event(), [], []

    def write(delivery):
        for begin, end in ((0, size // 3), (size // 3, size)):
            part = array(source, values[begin:end])

            def overwrite(part=part):
                over.append(part.size)
                if memory_of(part) == HOST:
                    part[...] = -1

            delivery.write(part, begin, overwrite, pinned=source == "pinned")
        delivery.end()

    def tell(error):
        errors.append(error)
        ended.set()

    Delivery(runtime, *apart(outs), 0, write, tell)
    assert ended.wait(LIMIT_S)
    assert errors == [None]
    assert sorted(over) == sorted([size // 3, size - size // 3])
    for out in outs:
        np.testing.assert_array_equal(to_host(out), values)


@pytest.mark.parametrize("places", [["host"], ["first"], ["first", "host"]])
@pytest.mark.parametrize("when", ["begin", "end"])
def test_an_error_ends_it_once(runtime, places, when):
    outs = [array(place, np.zeros(10, np.float32)) for place in places]
    ended, errors = threading.Event(), []

    def begin(delivery):
        if when == "begin":
            raise ValueError("planted")
        delivery.end(ValueError("planted"))

    def tell(error):
        errors.append(error)
        ended.set()

    Delivery(runtime, *apart(outs), 0, begin, tell)
    assert ended.wait(LIMIT_S)
    runtime.wait_all(LIMIT_S)
    assert [str(error) for error in errors] == ["planted"]
    with pytest.raises(ValueError, match="planted"):
        runtime.wait(outs[0], timeout=LIMIT_S)


@pytest.mark.parametrize("late", [False, True])
def test_what_gets_no_stream_ends_it(runtime, monkeypatch, late):
    outs = [array(place, np.zeros(10, np.float32)) for place in ("first", "host")]
    ended, errors, before = threading.Event(), [], []

    def tell(error):
        errors.append(error)
        ended.set()

    def no_stream(op):
        raise MemoryError("no stream")

    if late:  # the host's op has begun by then
        runtime.push_async(before.append, writes=outs[:1], inline=True)
    else:
        monkeypatch.setattr(runtime._streams_in_use, "_enter", no_stream)
    Delivery(runtime, *apart(outs), 0, lambda delivery: pytest.fail("there is nothing to begin"), tell)
    if late:
        monkeypatch.setattr(runtime._streams_in_use, "_enter", no_stream)
        before[0].set_result(None)
    assert ended.wait(LIMIT_S)
    monkeypatch.undo()
    assert [str(error) for error in errors] == ["no stream"]
    for out in outs:
        with pytest.raises(MemoryError, match="no stream"):
            runtime.wait(out, timeout=LIMIT_S)


@pytest.mark.parametrize("type", ["local", "device"])
@pytest.mark.parametrize("size", [7, 100_000])
def test_a_pull_that_waits_for_other_devices(cupy, type, size):
    with kvstore.create(type, devices=2, device_consistency="bounded(0)", timeout=LIMIT_S) as kv:
        kv.init("w", array("first", np.zeros(size, np.float32)))
        kv.set_optimizer(kvstore.optim.Accumulate())
        kv.push("w", array("first", np.full(size, 1, np.float32)), device=0)
        outs = [array(place, np.zeros(size, np.float32)) for place in PLACES]
        pulls = [kv.pull("w", out=out, device=0) for out in outs]
        kv.push("w", array("second", np.full(size, 2, np.float32)), device=1)
        for pull in pulls:
            assert (to_host(pull.result()) == 3).all()
