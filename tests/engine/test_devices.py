"""Ops on arrays of devices that do not exist: what comes before what, who waits, and what reaches the handle."""

from __future__ import annotations

import itertools
import json
import random
import threading
import time

import numpy as np
import pytest

import engine
from engine import landing
from engine.scheduler import ISSUED
from tests.engine.device_programs import Boom, mixed, with_streams
from tests.engine.queues import Wait
from tests.engine.simulated import Nowhere, Simulated

PROGRAMS = 10_000
LIMIT_S = 30


@pytest.mark.timeout(600)
@pytest.mark.parametrize("program", [mixed, with_streams])
def test_agrees_with_the_serial_engine_on_the_host(program, monkeypatch):
    monkeypatch.setattr(landing, "LOOK_S_MAX", landing.LOOK_S)  # with each look the devices do some work
    serial = engine.create("serial")
    for seed in range(PROGRAMS // 2):
        if seed % 25 == 0:
            devices = Simulated(seed)
            streams = engine.create("threaded", threads=3)
            streams.use(devices)
        got = program(streams, devices, seed)
        assert got == program(serial, Nowhere(), seed), f"seed {seed}"
        if seed % 25 == 24:
            streams.close()
    serial.close()


@pytest.mark.parametrize("program", [mixed, with_streams])
def test_the_serial_engine_waits_for_devices(program):
    serial, devices = engine.create("serial"), Simulated(1)
    with_devices = engine.create("serial")
    with_devices.use(devices)
    for seed in range(300):
        assert program(with_devices, devices, seed) == program(serial, Nowhere(), seed), f"seed {seed}"
    with_devices.close()
    serial.close()


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(lambda to, of: to == of == "lane", id="between lanes"),
        pytest.param(lambda to, of: (to, of) == ("lane", "caller"), id="what the caller did before"),
        pytest.param(lambda to, of: (to, of) == ("caller", "lane"), id="what the caller does after"),
    ],
)
def test_a_planted_missing_event_is_caught(kind):
    """The comparison can fail: each kind of event is needed."""
    serial = engine.create("serial")
    for seed in range(500):
        streams = engine.create("threaded", threads=3)

        def lose(stream, event, streams=streams):
            own = {track.stream for track in streams._streams.landing.tracks}
            to, of = ("lane" if one in own else "caller" for one in (stream, event.stream))
            return kind(to, of)

        devices = Simulated(seed, lose=lose)
        streams.use(devices)
        differs = with_streams(streams, devices, seed) != with_streams(serial, Nowhere(), seed)
        streams.close()
        if differs:
            break
    assert differs
    serial.close()


def in_pieces(devices, array, values, pause=lambda: None):
    """The function of an asynchronous op that fills the array from another thread, piece after piece."""

    def start(completion):
        def work():
            for value in values:
                pause()
                with completion.on():
                    fill(devices, array, value)()
            completion.set_result(None)

        threading.Thread(target=work).start()

    return start


@pytest.mark.parametrize("lost", [False, True])
def test_who_follows_an_op_comes_after_it(lost):
    """Also after its last piece; with a planted missing event it is seen that this can fail."""
    seen = set()
    for seed in range(200):
        runtime = engine.create("threaded", threads=1)
        devices = Simulated(seed, lose=lambda stream, event: lost and stream == devices.current(0))  # noqa: B023
        runtime.use(devices)
        array = devices.array(np.zeros(4), 0)
        handle = runtime.push_async(in_pieces(devices, array, [1, 2, 3]), writes=[array])
        handle.follow(LIMIT_S)
        fill(devices, array, 7)()  # on the caller's own stream
        devices.drain()
        seen.add(array.data[0])
        runtime.close()
    assert (seen == {7}) == (not lost)


@pytest.mark.parametrize("lent", [False, True])
def test_what_a_caller_enqueues_may_overtake_an_op_on_what_he_has_lent(lent):
    first = set()
    for seed in range(50):
        runtime, devices, order = engine.create("threaded", threads=1), Simulated(seed), []
        runtime.use(devices)
        array = devices.array(np.zeros(4), 0)
        handle = runtime.push(lambda: devices.enqueue(lambda: order.append("op")), writes=[array], lent=lent)  # noqa: B023
        devices.enqueue(lambda: order.append("caller"))  # noqa: B023
        devices.drain()
        handle.result(LIMIT_S)
        first.add(order[0])
        runtime.close()
    assert first == ({"op", "caller"} if lent else {"op"})


@pytest.fixture
def devices():
    return Simulated(3)


@pytest.fixture
def streams(devices):
    one = engine.create("threaded", threads=1)
    one.use(devices)
    yield one
    devices.frozen = False
    one.wait_all(LIMIT_S)
    one.validate()
    one.close()


def fill(devices, array, value):
    return lambda: devices.enqueue(lambda: array.data.fill(value))


def test_no_thread_waits_for_a_device(streams, devices):
    """While the devices stand still a thousand ops are issued, and the only thread of the lane is free."""
    devices.frozen = True
    arrays = [devices.array(np.zeros(4), n % 2) for n in range(6)]
    choose = random.Random(0)
    handles = []
    for _ in range(1000):
        one, other = choose.sample(arrays, 2)

        def add(one=one, other=other):
            devices.enqueue(lambda: one.data.__iadd__(other.data[0] + 1))

        handles.append(streams.push(add, reads=[one, other], writes=[one], lane=choose.choice([None, "copy"])))
        assert handles[-1].op.state == ISSUED
    host = np.zeros(1)
    behind = streams.push(lambda: host.fill(arrays[0].data[0]), reads=[arrays[0]], writes=[host])
    var = engine.Var()
    of_host = streams.push(lambda: 1, writes=[var])
    assert of_host.result(LIMIT_S) == 1
    assert not any(handle.done() for handle in handles)
    assert not behind.done()
    assert devices.synchronised == []
    devices.frozen = False
    streams.wait_all(LIMIT_S)
    assert devices.synchronised == []  # nor did anybody to complete them
    assert all(handle.done() for handle in handles)


def test_an_op_of_the_host_starts_when_what_it_reads_is_complete(streams, devices):
    devices.frozen = True
    array, cell, var = devices.array(np.zeros(4), 0), [0], engine.Var()

    def on_device():
        devices.enqueue(lambda: cell.__setitem__(0, 1))

    streams.push(on_device, reads=[array], writes=[var])
    on_host = streams.push(lambda: cell[0], reads=[var])
    assert not on_host.done()
    devices.frozen = False
    assert on_host.result(LIMIT_S) == 1
    assert devices.synchronised == []  # nobody has waited for the device itself


def test_who_waits_without_a_timeout_waits_for_the_event_himself(streams, devices):
    array = devices.array(np.zeros(4), 0)
    devices.diligence = 0.0
    streams.push(fill(devices, array, 1), writes=[array]).result()
    assert array.data[0] == 1
    assert set(devices.synchronised) <= {threading.current_thread().name}


def test_the_same_address_is_another_place_on_another_device_and_on_the_host(streams, devices):
    host = np.zeros(4)
    devices.start = host.__array_interface__["data"][0]
    devices.frozen = True
    first, second = (devices.array(np.zeros(4), device) for device in range(2))
    assert first.address == second.address == devices.start
    streams.push(fill(devices, first, 1), writes=[first])
    handle = streams.push(fill(devices, second, 2), writes=[second])
    assert handle.op.flight.after == []
    assert streams.pending(first) and streams.pending(second) and not streams.pending(host)
    streams.push(lambda: host.fill(3), writes=[host]).result(LIMIT_S)


def test_views_of_one_devices_memory_conflict(streams, devices):
    devices.frozen = True
    array = devices.array(np.zeros(8), 0)
    first = streams.push(fill(devices, array[:4], 1), writes=[array[:4]])
    assert streams.push(fill(devices, array[4:], 1), writes=[array[4:]]).op.flight.after == []
    assert streams.push(fill(devices, array[2:6], 1), writes=[array[2:6]]).op.flight.after[0] is first.op


def test_a_group_over_memories_stands_for_all_of_its_arrays(streams, devices):
    devices.frozen = True
    first, second = devices.array(np.zeros(8), 0), devices.array(np.zeros(8), 1)
    host, empty = np.zeros(8), devices.array(np.zeros(0), 1)
    group = engine.ArrayGroup([first[:4], second, host, empty, first[4:]])
    handle = streams.push(fill(devices, first, 1), writes=[group])
    assert handle.op.lane == "copy"
    assert sorted(handle.op.flight.callers) == [0, 1]
    assert len(handle.op.writes) == 3
    for one in (first[2:6], second, host[:1], group, engine.ArrayGroup([second[7:]])):
        assert streams.pending(one)
    assert not streams.pending(empty) and not streams.pending(np.zeros(8))
    assert streams.push(fill(devices, first, 1), reads=[group]).op.flight.after == [handle.op] * 3
    behind = streams.push(lambda: host.fill(2), writes=[host])
    with pytest.raises(engine.DeadlineError):
        behind.result(0.01)
    devices.frozen = False
    streams.wait(group, timeout=LIMIT_S)
    assert first.data[0] == 1 and host[0] == 2


def test_the_error_of_a_group_marks_its_memory_on_the_device(streams, devices):
    arrays = [devices.array(np.zeros(8), 0) for _ in range(3)]
    for array in arrays[:2]:  # the group itself is gone
        failed = streams.push(lambda: 1 / 0, writes=[engine.ArrayGroup([array[:4], arrays[2]])])
        assert isinstance(failed.exception(LIMIT_S), ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        streams.wait(arrays[0][3:], timeout=LIMIT_S)
    streams.wait(arrays[0][4:], timeout=LIMIT_S)
    assert streams.uses_arrays()
    assert streams.claim([np.zeros(2)], "write") is None
    streams.push(lambda: None, writes=[engine.ArrayGroup(arrays)]).result(LIMIT_S)
    assert not streams.uses_arrays()
    assert streams.claim([arrays[0]], "write") is None  # of a device
    assert streams.claim([engine.ArrayGroup(arrays)], "write") is None


def test_a_group_of_another_engines_devices_is_refused(devices):
    group = engine.ArrayGroup([devices.array(np.zeros(8), 0)])
    runtime = engine.create("threaded")
    for use in (runtime.pending, runtime.wait, lambda group: runtime.push(lambda: None, writes=[group])):
        with pytest.raises(engine.ArgumentError, match="devices in use"):
            use(group)
    runtime.wait_all(LIMIT_S)


def test_independent_ops_of_a_bulk_can_overlap(streams, devices):
    arrays = [devices.array(np.zeros(4), 0) for _ in range(100)]
    devices.frozen = True
    with streams.bulk():
        handles = [streams.push(fill(devices, array, 1), writes=[array]) for array in arrays]
    used = {handle.op.flight.track.stream for handle in handles}
    assert len(used) > 1
    caller = devices.current(0)
    for stream in used:
        waits = [item.mark for item in stream.items if isinstance(item, Wait)]
        assert {event.stream for event in waits} <= {caller}  # not for each other
    waits = [isinstance(item, Wait) for item in caller.items]
    assert any(waits)
    assert waits == sorted(waits)  # he not for one of them before the next has been pushed


def test_an_error_of_the_device_reaches_the_handle_and_who_reads(streams, devices):
    array, other, host = devices.array(np.zeros(4), 0), devices.array(np.zeros(4), 1), np.zeros(4)
    devices.frozen = True

    def fails():
        raise Boom("on the device")

    first = streams.push(lambda: devices.enqueue(fails), writes=[array], name="first")
    second = streams.push(fill(devices, other, 1), reads=[array], writes=[other])
    third = streams.push(lambda: host.fill(1), reads=[other], writes=[host])
    healed = streams.push(fill(devices, array, 2), writes=[array])
    devices.frozen = False
    for handle in (first, second, third):
        error = handle.exception(LIMIT_S)
        assert isinstance(error, Boom)
        assert any("first" in note for note in error.__notes__)
    healed.result(LIMIT_S)
    streams.wait(array, timeout=LIMIT_S)
    with pytest.raises(Boom):
        streams.wait(host, timeout=LIMIT_S)
    streams.push(fill(devices, other, 1), writes=[other]).result(LIMIT_S)
    streams.push(lambda: None, writes=[host]).result(LIMIT_S)
    assert not streams.uses_arrays()


def test_an_op_whose_function_fails_ends_after_what_it_follows(streams, devices):
    array = devices.array(np.zeros(4), 0)
    devices.frozen = True
    streams.push(fill(devices, array, 1), writes=[array])
    failed = streams.push(lambda: 1 / 0, reads=[array], writes=[array])
    assert not failed.done()  # else a later op could start too early
    devices.frozen = False
    assert isinstance(failed.exception(LIMIT_S), ZeroDivisionError)
    streams.push(fill(devices, array, 2), writes=[array]).result(LIMIT_S)


def test_arrays_are_kept_until_the_device_is_done(streams, devices):
    devices.frozen = True
    array = devices.array(np.zeros(4), 0)
    handle = streams.push(lambda: None, writes=[array])
    assert handle.op.holds == (array,)
    devices.frozen = False
    handle.result(LIMIT_S)
    streams.wait_all(LIMIT_S)
    assert handle.op.holds is None


def test_push_if_free_takes_what_can_be_issued(streams, devices):
    devices.frozen = True
    array, begun, go = devices.array(np.zeros(4), 0), threading.Event(), threading.Event()
    streams.push(fill(devices, array, 1), writes=[array])
    assert streams.push_if_free(fill(devices, array, 2), writes=[array]) is not None
    var = engine.Var()
    streams.push(lambda: (begun.set(), go.wait(LIMIT_S)), writes=[var])
    assert begun.wait(LIMIT_S)
    assert streams.push_if_free(fill(devices, array, 3), reads=[var], writes=[array]) is None
    go.set()


def test_a_deadline_passes_on_the_device(streams, devices):
    devices.frozen = True
    array = devices.array(np.zeros(4), 0)
    handle = streams.push(fill(devices, array, 1), writes=[array], deadline=0.01)
    with pytest.raises(engine.DeadlineError):
        handle.result(LIMIT_S)
    assert streams.pending(array)  # the device does not know
    devices.frozen = False
    with pytest.raises(engine.DeadlineError):
        streams.wait(array, timeout=LIMIT_S)
    streams.push(fill(devices, array, 2), writes=[array]).result(LIMIT_S)


def test_to_follow_waits_for_the_issue_and_not_for_the_device(streams, devices):
    devices.frozen = True
    array, go = devices.array(np.zeros(4), 0), threading.Event()
    handle = streams.push_async(in_pieces(devices, array, [1], lambda: go.wait(LIMIT_S)), writes=[array])
    with pytest.raises(engine.DeadlineError, match="pushed at"):
        handle.follow(0.01)
    behind = streams.push(fill(devices, array, 2), writes=[array])
    go.set()
    behind.follow(LIMIT_S)
    assert not behind.done()
    assert devices.current(0).items[-1].mark is behind.op.flight.event
    assert devices.synchronised == []


def test_to_follow_raises_no_error_and_returns_for_what_was_given_up(streams, devices):
    array, var, go = devices.array(np.zeros(4), 0), engine.Var(), threading.Event()
    streams.push(lambda: go.wait(LIMIT_S), writes=[var])
    given_up = streams.push(fill(devices, array, 1), reads=[var], writes=[array])
    timer = threading.Timer(0.01, given_up.cancel)
    timer.start()
    given_up.follow(LIMIT_S)
    assert given_up.cancelled()
    go.set()
    failed = streams.push(lambda: 1 / 0, writes=[array])
    failed.follow(LIMIT_S)
    assert isinstance(failed.exception(LIMIT_S), ZeroDivisionError)
    failed.follow(LIMIT_S)  # complete by now
    streams.push(lambda: None, writes=[array]).result(LIMIT_S)


def test_to_follow_runs_what_is_ready_and_refuses_what_can_never_come(streams, devices):
    array, var = devices.array(np.zeros(4), 0), engine.Var()

    def in_an_op():
        own = streams.push(fill(devices, array, 1), reads=[var], writes=[array])
        with pytest.raises(engine.DeadlockError):
            own.follow(LIMIT_S)

    streams.push(in_an_op, writes=[var]).result(LIMIT_S)
    with streams.bulk():
        streams.push(lambda: None, writes=[var])
        streams.push(fill(devices, array, 2), reads=[var], writes=[array]).follow(LIMIT_S)
    streams.wait_all(LIMIT_S)
    assert array.data[0] == 2


def test_callbacks_and_waits_of_concurrent_futures_learn_of_it(streams, devices):
    array, told = devices.array(np.zeros(4), 0), threading.Event()
    handle = streams.push(fill(devices, array, 1), writes=[array])
    handle.add_done_callback(lambda _: told.set())
    assert told.wait(LIMIT_S)
    assert handle.done()


def test_a_copy_has_a_lane_of_its_own(streams, devices):
    first, second, host = devices.array(np.ones(4), 0), devices.array(np.zeros(4), 1), np.zeros(4)

    def copy(source, target):
        return lambda: devices.enqueue(lambda: np.copyto(target, source))

    across = streams.push(copy(first.data, second.data), reads=[first], writes=[second])
    down = streams.push(copy(second.data, host), reads=[second], writes=[host])
    within = streams.push(fill(devices, first, 1), writes=[first])
    assert [handle.op.lane for handle in (across, down, within)] == ["copy", "copy", "cpu"]
    streams.wait(host, timeout=LIMIT_S)
    assert host[0] == 1


def test_an_engine_uses_one_kind_of_devices(streams, devices):
    streams.use(devices)
    with pytest.raises(engine.ArgumentError):
        streams.use(Simulated(4))


def test_an_array_of_a_device_that_is_not_used_is_refused(devices):
    with engine.create("threaded").bulk(), pytest.raises(engine.ArgumentError):
        engine.create("threaded").push(lambda: None, writes=[devices.array(np.zeros(4), 0)])


# --- device time ----------------------------------------------------------------------------------


def working(devices, seconds):
    """The function of an op that keeps the device busy for some of its time."""

    def work():
        devices.worked_s += seconds

    return lambda: devices.enqueue(work)


def traced(path):
    """The rows of a trace by name (else thread), each with its spans in order."""
    events = json.loads(path.read_text())["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    rows = {}
    for event in sorted((one for one in events if one["ph"] == "X"), key=lambda one: one["ts"]):
        rows.setdefault(names.get(event["tid"], event["tid"]), []).append(event)
    return rows


def test_the_trace_shows_when_devices_worked(streams, devices, tmp_path):
    arrays = [devices.array(np.zeros(4), device) for device in (0, 1)]
    with streams.profile(tmp_path / "trace.json"):
        start_us = time.perf_counter() * 1e6
        first = streams.push(working(devices, 7.0), writes=[arrays[0]], name="first", info={"key": "w"})
        across = streams.push(working(devices, 3.0), reads=[arrays[0]], writes=[arrays[1]], name="across")
        streams.push(lambda: None, writes=[engine.Var()], name="on the host")
        streams.wait_all(LIMIT_S)
        end_us = (time.perf_counter() + devices.worked_s) * 1e6
    rows = traced(tmp_path / "trace.json")
    (one,) = rows.pop("device 0, cpu 1")
    (other,) = rows.pop("device 1, copy 1")
    assert (one["name"], other["name"]) == ("first", "across")
    assert one["args"]["key"] == "w"
    assert "test_devices.py" in one["args"]["site"]
    real_us = end_us - start_us - 10e6  # in which clocks were compared, too, which may be wrong by as much
    assert one["dur"] >= 7e6 and other["dur"] >= 3e6
    assert start_us - real_us <= one["ts"]
    assert one["ts"] + one["dur"] <= other["ts"] + real_us  # though the devices' clocks differ by hours
    assert other["ts"] + other["dur"] <= end_us + real_us
    on_threads = [event["name"] for row in rows.values() for event in row]
    assert sorted(on_threads) == ["issue across", "issue first", "on the host"]
    assert first.device_ms == pytest.approx(one["dur"] / 1e3, rel=1e-5)
    assert across.device_ms == pytest.approx(other["dur"] / 1e3, rel=1e-5)


def test_without_a_profile_nothing_is_timed(streams, devices, tmp_path):
    array, host = devices.array(np.zeros(4), 0), np.zeros(4)
    before = streams.push(working(devices, 1.0), writes=[array])
    before.result(LIMIT_S)
    devices.frozen = True
    waiting = streams.push(working(devices, 1.0), writes=[array])
    streams.start_profile()
    devices.frozen = False
    timed = streams.push(working(devices, 1.0), writes=[array])
    on_host = streams.push(lambda: None, reads=[host])
    streams.wait_all(LIMIT_S)
    streams.stop_profile(tmp_path / "trace.json")
    after = streams.push(working(devices, 1.0), writes=[array])
    streams.wait_all(LIMIT_S)
    assert devices.timed == 3  # one is known to the host, too
    assert timed.device_ms >= 1e3
    assert [handle.device_ms for handle in (before, waiting, on_host, after)] == [None] * 4
    assert sum(map(len, traced(tmp_path / "trace.json").values())) == 3  # one issued, on a device and on the host


def test_device_time_stays_exact_in_a_long_profile(streams, devices, tmp_path):
    array = devices.array(np.zeros(4), 1)
    with streams.profile(tmp_path / "trace.json"):
        for _ in range(300):
            streams.push(working(devices, 997.3), writes=[array]).result(LIMIT_S)
    rows = traced(tmp_path / "trace.json")
    spans = [span for name in rows if str(name).startswith("device") for span in rows[name]]
    for span, following in itertools.pairwise(sorted(spans, key=lambda one: one["ts"])):
        assert span["ts"] + span["dur"] <= following["ts"] + 200  # of 3e11 us


def test_work_whose_time_cannot_be_told_is_done_all_the_same(streams, devices, tmp_path, monkeypatch):
    def fails(*_):
        raise Boom("no time")

    monkeypatch.setattr(devices, "elapsed_ms", fails)
    array = devices.array(np.zeros(4), 0)
    with streams.profile(tmp_path / "trace.json"):
        handle = streams.push(fill(devices, array, 1), writes=[array])
        handle.result(LIMIT_S)
    assert array.data[0] == 1
    assert handle.device_ms is None
