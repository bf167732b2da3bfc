"""What every engine does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import CancelledError, wait

import numpy as np
import pytest

import engine

LIMIT_S = 30


@pytest.fixture(params=["threaded", "serial"])
def runtime(request: pytest.FixtureRequest) -> Iterator[engine.Engine]:
    one = engine.create(request.param)
    yield one
    one.validate()
    one.close()


@pytest.fixture
def threaded() -> Iterator[engine.Engine]:
    one = engine.create("threaded", threads=2)
    yield one
    one.validate()
    one.close()


def test_program_order_per_var(runtime):
    var, seen = engine.Var("v"), []
    handles = [runtime.push(lambda n=n: seen.append(n), writes=[var], priority=n) for n in range(50)]
    for handle in handles:
        handle.result(LIMIT_S)
    assert seen == list(range(50))


def test_result_and_error_reach_the_handle_with_the_site(runtime):
    assert runtime.push(lambda: 42).result(LIMIT_S) == 42
    handle = runtime.push(lambda: 1 / 0, name="divide")
    with pytest.raises(ZeroDivisionError) as caught:
        handle.result(LIMIT_S)
    assert any("divide" in note and "test_contract.py" in note for note in caught.value.__notes__)


def test_errors_travel_with_the_data_until_the_next_full_write(runtime):
    array = np.zeros(4)
    runtime.push(lambda: 1 / 0, writes=[array])
    assert isinstance(runtime.push(lambda: None, reads=[array]).exception(LIMIT_S), ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        runtime.wait(array, timeout=LIMIT_S)
    other = np.zeros(4)
    assert runtime.push(lambda: None, reads=[array], writes=[other]).exception(LIMIT_S)
    with pytest.raises(ZeroDivisionError):
        runtime.wait(other[1:], timeout=LIMIT_S)
    runtime.push(lambda: array[:2].fill(1), writes=[array[:2]])  # not a full write
    with pytest.raises(ZeroDivisionError):
        runtime.wait(array, timeout=LIMIT_S)
    runtime.push(lambda: array.fill(1), writes=[array]).result(LIMIT_S)
    runtime.wait(array, timeout=LIMIT_S)
    with pytest.raises(ZeroDivisionError):  # the others who shared the error still have it
        runtime.wait(other, timeout=LIMIT_S)


@pytest.mark.parametrize("seen_before", [False, True])
def test_an_error_stays_with_the_bytes_that_the_op_would_have_written(runtime, seen_before):
    array = np.zeros(8)
    if seen_before:
        runtime.push(lambda: None, reads=[array[4:]])
    runtime.push(lambda: 1 / 0, writes=[array[2:6]])
    with pytest.raises(ZeroDivisionError):
        runtime.wait(array[4:], timeout=LIMIT_S)
    runtime.wait(array[6:], timeout=LIMIT_S)
    runtime.push(lambda: array[2:6].fill(1), writes=[array[2:6]])
    runtime.wait(array[4:], timeout=LIMIT_S)


def test_async_ops_end_when_completed(runtime):
    var, completions = engine.Var(), []
    handle = runtime.push_async(completions.append, writes=[var], inline=True)
    behind = runtime.push(lambda: "behind", reads=[var])
    assert not handle.done()
    assert not behind.done()
    assert runtime.pending(var)
    completions[0].set_result("done")
    assert handle.result(LIMIT_S) == "done"
    assert behind.result(LIMIT_S) == "behind"
    assert not runtime.pending(var)
    completions[0].set_result("again")  # ignored


def test_bad_arguments_are_refused_before_anything_is_submitted(runtime):
    for call in (
        lambda: runtime.push(3),
        lambda: runtime.push(print, reads=[object()]),
        lambda: runtime.push(print, writes=engine.Var()),
        lambda: runtime.push(print, lane=3),
    ):
        with pytest.raises(engine.ArgumentError):
            call()
    runtime.wait_all(timeout=LIMIT_S)


def test_inline_runs_in_the_calling_thread_when_nothing_is_in_the_way(runtime):
    here = threading.get_ident()
    assert runtime.push(threading.get_ident, inline=True).result(0) == here


def test_a_var_is_free_while_nothing_uses_it_and_no_error_marks_it(runtime):
    idle, used, marked = engine.Var("idle"), engine.Var("used"), engine.Var("marked")
    begun: list[engine.Completion] = []
    runtime.push_async(begun.append, reads=[used], inline=True)
    failing = runtime.push(lambda: 1 / 0, writes=[marked])
    assert isinstance(failing.exception(LIMIT_S), ZeroDivisionError)
    assert runtime.free(idle)
    assert not runtime.free(idle, used)
    assert not runtime.free(marked)
    begun[0].set_result(None)
    assert runtime.free(idle, used)


def test_reads_share_and_disjoint_ops_overlap(threaded):
    meet = threading.Barrier(2)
    var = engine.Var()
    first = threaded.push(lambda: meet.wait(LIMIT_S), reads=[var])
    threaded.push(lambda: meet.wait(LIMIT_S), reads=[var]).result(LIMIT_S)
    first.result(LIMIT_S)


def test_ready_ops_start_by_priority_then_age():
    one = engine.create("threaded", threads=1)
    running, gate, seen = threading.Event(), threading.Event(), []
    one.push(lambda: (running.set(), gate.wait(LIMIT_S)))
    assert running.wait(LIMIT_S)
    handles = [one.push(lambda n=n, p=p: seen.append((p, n)), priority=p) for n, p in enumerate([0, 5, 1, 5])]
    gate.set()
    assert not wait(handles, LIMIT_S).not_done  # which does not help, unlike the handles' own
    assert seen == [(5, 1), (5, 3), (1, 2), (0, 0)]
    one.close()


def test_a_waiter_runs_a_ready_op_itself(threaded):
    gate = threading.Event()
    blocked = [threaded.push(lambda: gate.wait(LIMIT_S)) for _ in range(2)]  # every thread is busy
    assert threaded.push(threading.get_ident).result(LIMIT_S) == threading.get_ident()
    gate.set()
    for handle in blocked:
        handle.result(LIMIT_S)


def test_a_wait_inside_an_op_on_what_it_blocks_is_an_error(threaded):
    var, started = engine.Var(), threading.Event()
    inner = []

    def outer():
        started.wait(LIMIT_S)
        inner[0].result(LIMIT_S)

    handle = threaded.push(outer, writes=[var])
    inner.append(threaded.push(lambda: None, reads=[var]))
    started.set()
    with pytest.raises(engine.DeadlockError):
        handle.result(LIMIT_S)


def test_other_waits_inside_ops_lend_the_thread(threaded):
    def nested(depth):
        if depth:
            threaded.push(lambda: nested(depth - 1)).result(LIMIT_S)
        return depth

    gate = threading.Event()

    def wait_for_another():
        return threaded.push(lambda: gate.wait(LIMIT_S), lane="other").result(LIMIT_S)

    waiting = [threaded.push(wait_for_another) for _ in range(4)]
    opener = threaded.push(gate.set)
    opener.result(LIMIT_S)
    assert all(handle.result(LIMIT_S) for handle in waiting)
    assert threaded.push(lambda: nested(20)).result(LIMIT_S) == 20


def test_cancel_poisons_what_would_have_been_written(threaded):
    var, gate = engine.Var(), threading.Event()
    threaded.push(lambda: gate.wait(LIMIT_S), writes=[var])
    handle = threaded.push(lambda: None, writes=[var])
    assert handle.cancel()
    gate.set()
    threaded.wait_all(LIMIT_S)
    assert handle.cancelled()
    with pytest.raises(CancelledError):
        threaded.wait(var, timeout=LIMIT_S)


def test_deadlines(threaded):
    var, completions = engine.Var(), []
    handle = threaded.push_async(completions.append, writes=[var], deadline=0.01, name="slow")
    with pytest.raises(engine.DeadlineError, match="slow"):
        handle.result(LIMIT_S)
    threaded.wait_all(LIMIT_S)
    with pytest.raises(engine.DeadlineError):
        threaded.wait(var, timeout=LIMIT_S)
    gate = threading.Event()
    held = threaded.push(lambda: gate.wait(LIMIT_S), writes=[var], name="holder")
    behind = threaded.push(lambda: None, reads=[var], name="behind")
    with pytest.raises(engine.DeadlineError, match=r"behind.*holder"):
        behind.result(0.01)
    gate.set()
    held.result(LIMIT_S)
    behind.result(LIMIT_S)


def test_threads_end_with_the_last_user_and_start_again():
    one = engine.create("threaded", threads=2)

    def threads():
        return [t for t in threading.enumerate() if t.name.startswith("engine-")]

    before = set(threads())
    one.retain()
    var = engine.Var()
    one.push_async(lambda c: threading.Thread(target=c.set_result, args=(1,)).start(), writes=[var])
    one.wait(var, timeout=LIMIT_S)
    one.release()
    for thread in set(threads()) - before:
        thread.join(LIMIT_S)
    assert set(threads()) <= before
    handle = one.push(lambda: 5)
    assert handle.result(LIMIT_S) == 5
    one.close()


def test_profile_writes_a_trace(runtime, tmp_path):
    with runtime.profile(tmp_path / "trace.json"):
        runtime.push(lambda: None, name="named", info={"key": "w"}).result(LIMIT_S)
        runtime.wait_all(LIMIT_S)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [e["name"] for e in events] == ["named"]
    assert events[0]["args"]["key"] == "w"


def test_an_inherited_engine_raises_in_a_forked_child(threaded):
    threaded.push(lambda: None).result(LIMIT_S)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            threaded.push(lambda: None)
        except engine.ForkedError:
            code = 7 if engine.create("serial").push(lambda: 1).result(1) == 1 else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_exit_with_pending_ops_does_not_hang():
    program = (
        "import engine, threading\n"
        "gate = threading.Event()\n"
        "engine.push(lambda: gate.wait(600))\n"
        "engine.push_async(lambda c: None)\n"
        "print('leaving')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=LIMIT_S)
    assert (done.returncode, done.stdout) == (0, "leaving\n"), done.stderr


def test_memory_that_is_freed_forgets_its_error(threaded):
    array = np.zeros(1000)
    assert threaded.push(lambda: 1 / 0, writes=[array]).exception(LIMIT_S)
    del array
    for _ in range(200):
        threaded.wait(np.zeros(1000), timeout=LIMIT_S)


# --- groups of arrays -----------------------------------------------------------------------------


def test_a_group_stands_for_all_its_arrays(runtime):
    buffer = np.zeros(100)
    inside = [buffer[0:10], buffer[20:30:2], buffer[30:40], np.zeros((3, 4)), np.zeros(0)]
    outside = [buffer[10:20], buffer[40:], np.zeros(3), inside[3][:, :0]]
    group = engine.ArrayGroup(inside)
    overlapping = [buffer[5:15], buffer[21:22], buffer, buffer[39:40], inside[3][1], inside[3].T]
    others = [engine.ArrayGroup([one, np.zeros(4)]) for one in (*overlapping[:2], buffer[25:35])]
    completions = []
    assert not runtime.uses_arrays()
    runtime.push_async(completions.append, writes=[group], inline=True)
    readers = []
    try:
        for one in outside:
            assert not runtime.pending(one)
            runtime.push(lambda: None, writes=[one]).result(LIMIT_S)
        readers += [runtime.push(lambda: None, reads=[one]) for one in (*overlapping, *others, group)]
        assert all(runtime.pending(one) for one in (*inside[:4], *overlapping, *others, group))
        assert [handle for handle in readers if handle.done()] == []
        assert runtime.uses_arrays()
    finally:
        completions[0].set_result(None)
    for handle in readers:
        handle.result(LIMIT_S)
    runtime.wait_all(timeout=LIMIT_S)
    assert not runtime.uses_arrays()


def test_reads_of_a_group_share_and_writes_wait(runtime):
    arrays = [np.zeros(4), np.zeros(4)]
    group, completions = engine.ArrayGroup(arrays), []
    runtime.push_async(completions.append, reads=[group], inline=True)
    assert runtime.push(lambda: 1, reads=[arrays[0]], inline=True).result(LIMIT_S) == 1
    assert runtime.push(lambda: 2, reads=[group], inline=True).result(LIMIT_S) == 2
    behind = runtime.push(lambda: 3, writes=[arrays[1]])
    assert not behind.done()
    completions[0].set_result(None)
    assert behind.result(LIMIT_S) == 3


def test_an_empty_group_is_nothing(runtime):
    for group in (engine.ArrayGroup([]), engine.ArrayGroup([np.zeros(0)])):
        assert runtime.push(lambda: 1, reads=[group], writes=[group]).result(LIMIT_S) == 1
        runtime.wait(group, timeout=LIMIT_S)
        assert not runtime.pending(group)


def test_only_arrays_are_grouped():
    for strange in ([1.0], "text", [[np.zeros(2)]], [engine.Var()], [engine.ArrayGroup([])]):
        with pytest.raises(engine.ArgumentError, match="a group: expected arrays"):
            engine.ArrayGroup(strange)


@pytest.mark.parametrize("seen_before", [False, True])
def test_the_error_of_a_group_stays_until_all_of_it_is_written(runtime, seen_before):
    buffer, alone = np.zeros(30), np.zeros(5)
    parts = [buffer[:10], buffer[10:20], alone]
    group = engine.ArrayGroup(parts)
    if seen_before:
        runtime.push(lambda: None, reads=[buffer[5:15]])
    runtime.push(lambda: 1 / 0, writes=[group])
    runtime.wait(buffer[20:], timeout=LIMIT_S)

    def all_fail():
        for one in (group, *parts, buffer[5:15], buffer, engine.ArrayGroup([alone[:1]])):
            with pytest.raises(ZeroDivisionError):
                runtime.wait(one, timeout=LIMIT_S)

    all_fail()
    assert runtime.uses_arrays()
    for one in (alone, buffer, engine.ArrayGroup(parts[:2])):
        runtime.push(lambda: None, writes=[one]).result(LIMIT_S)
        all_fail()
    runtime.push(lambda: None, writes=[engine.ArrayGroup([alone, buffer])]).result(LIMIT_S)
    for one in (group, *parts, buffer):
        runtime.wait(one, timeout=LIMIT_S)
    assert not runtime.uses_arrays()


def test_the_same_group_heals_itself_and_arrays_within_it(runtime):
    arrays = [np.zeros(4) for _ in range(3)]
    group = engine.ArrayGroup(arrays)
    runtime.push(lambda: 1 / 0, writes=[arrays[1]])
    with pytest.raises(ZeroDivisionError):
        runtime.wait(group, timeout=LIMIT_S)
    runtime.push(lambda: 1 / 0, writes=[group])
    runtime.push(lambda: None, writes=[group]).result(LIMIT_S)
    for one in (group, *arrays):
        runtime.wait(one, timeout=LIMIT_S)


def test_the_error_of_a_group_keeps_no_memory(threaded):
    array, kept = np.zeros(1000), np.zeros(1000)
    gone = weakref.ref(array)
    group = engine.ArrayGroup([array, kept])
    assert threaded.push(lambda: 1 / 0, writes=[group]).exception(LIMIT_S)
    del array, group
    for _ in range(200):
        threaded.wait(np.zeros(1000), timeout=LIMIT_S)  # which may get the memory, and has no error
    assert gone() is None
    assert threaded.push(lambda: None, reads=[kept]).exception(LIMIT_S)
    assert threaded.uses_arrays()
    del kept
    assert not threaded.uses_arrays()


def test_one_op_may_hold_any_number_of_arrays(runtime):
    buffer = np.zeros(1000)
    cells = [buffer[i : i + 1] for i in range(len(buffer))]
    completions = []
    runtime.push_async(completions.append, writes=cells, inline=True)
    readers = [runtime.push(lambda: None, reads=[cell]) for cell in cells]
    try:
        assert [number for number, handle in enumerate(readers) if handle.done()] == []
        assert all(runtime.pending(cell) for cell in cells)
    finally:
        completions[0].set_result(None)
    for handle in readers:
        handle.result(LIMIT_S)


def test_push_if_free_submits_all_or_nothing(runtime):
    array, other = np.zeros(4), np.zeros(4)
    begun = []
    blocking = runtime.push_async(begun.append, writes=[array])
    while not begun:
        runtime.wait(other)
    assert runtime.push_if_free(lambda: 1, writes=[array[1:]]) is None
    assert runtime.push_if_free(lambda: 1, reads=[array], writes=[other]) is None
    handle = runtime.push_if_free(lambda: 2, writes=[other], inline=True)
    assert handle is not None
    assert handle.done()
    begun[0].set_result(None)
    blocking.result(LIMIT_S)
    reading = runtime.push_async(begun.append, reads=[array])
    while len(begun) < 2:
        runtime.wait(other)
    assert runtime.push_if_free(lambda: 3, writes=[array]) is None
    free = runtime.push_if_free(lambda: 4, reads=[array])
    assert free is not None
    assert free.result(LIMIT_S) == 4
    begun[1].set_result(None)
    reading.result(LIMIT_S)
