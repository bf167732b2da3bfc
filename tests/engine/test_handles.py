"""A handle is a concurrent.futures.Future, though it makes what a wait for it needs only when that is asked for."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Iterator

import pytest

import engine

LIMIT_S = 30


@pytest.fixture(params=["threaded", "serial"])
def runtime(request: pytest.FixtureRequest) -> Iterator[engine.Engine]:
    one = engine.create(request.param)
    yield one
    one.validate()
    one.close()


def begun(runtime: engine.Engine) -> tuple[engine.Handle, engine.Completion]:
    """An op that ends when the test says so."""
    completions: list[engine.Completion] = []
    handle = runtime.push_async(completions.append, inline=True)
    return handle, completions[0]


def test_a_handle_nobody_watches_makes_no_condition(runtime):
    handle = runtime.push(lambda: 3, inline=True)
    assert isinstance(handle, concurrent.futures.Future)
    assert handle.done()
    assert not handle.running()
    assert handle.result(0) == 3
    assert handle.exception(0) is None
    failed = runtime.push(lambda: 1 / 0, inline=True)
    assert isinstance(failed.exception(0), ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        failed.result(0)
    assert failed._watched is None
    assert not handle.cancel()
    assert not handle.cancelled()


def test_callbacks_run_once_in_order_whether_added_before_or_after(runtime):
    handle, completion = begun(runtime)
    seen = []
    handle.add_done_callback(lambda h: seen.append(("first", h.result(0))))
    handle.add_done_callback(lambda h: seen.append(("second", h.result(0))))
    assert seen == []
    completion.set_result(7)
    assert seen == [("first", 7), ("second", 7)]
    handle.add_done_callback(lambda h: seen.append(("late", h.result(0))))
    assert seen[2:] == [("late", 7)]
    unwatched = runtime.push(lambda: 8, inline=True)
    unwatched.add_done_callback(lambda h: seen.append(("late", h.result(0))))
    assert seen[3:] == [("late", 8)]


def test_the_waits_of_concurrent_futures(runtime):
    done = runtime.push(lambda: 1, inline=True)
    (first, end_first), (second, end_second) = begun(runtime), begun(runtime)
    assert concurrent.futures.wait([done, first], LIMIT_S, concurrent.futures.FIRST_COMPLETED).done == {done}
    threading.Thread(target=end_first.set_exception, args=(ValueError(),)).start()
    outcome = concurrent.futures.wait([first, second], LIMIT_S, concurrent.futures.FIRST_EXCEPTION)
    assert outcome.done == {first}
    assert outcome.not_done == {second}
    threading.Thread(target=end_second.set_result, args=(2,)).start()
    assert set(concurrent.futures.as_completed([done, first, second], LIMIT_S)) == {done, first, second}
    assert second.result(0) == 2


def test_a_coroutine_may_await_a_handle(runtime):
    async def main() -> object:
        handle, completion = begun(runtime)
        waiting = asyncio.wrap_future(handle)
        completion.set_result("here")
        return await asyncio.wait_for(waiting, LIMIT_S)

    assert asyncio.run(main()) == "here"


def test_a_cancelled_handle_wakes_who_waits_for_it(runtime):
    var = engine.Var()
    completions: list[engine.Completion] = []
    runtime.push_async(completions.append, writes=[var], inline=True)
    handle = runtime.push(lambda: None, writes=[var])
    waiting, seen = threading.Event(), []

    def wait():
        waiting.set()
        seen.append(concurrent.futures.wait([handle], LIMIT_S).done)

    thread = threading.Thread(target=wait)
    thread.start()
    assert waiting.wait(LIMIT_S)
    assert handle.cancel()
    thread.join(LIMIT_S)
    assert seen == [{handle}]
    completions[0].set_result(None)
    runtime.wait_all(LIMIT_S)
    with pytest.raises(concurrent.futures.CancelledError):
        handle.result(LIMIT_S)


def test_any_number_of_threads_may_wait_for_one_handle(runtime):
    for number in range(100):
        handle, completion = begun(runtime)
        together = threading.Barrier(5)
        seen: list[object] = []

        def wait(how, handle=handle, together=together, seen=seen):
            together.wait(LIMIT_S)
            how(handle, seen)

        ways = (
            lambda handle, seen: seen.append(handle.result(LIMIT_S)),
            lambda handle, seen: seen.append(concurrent.futures.wait([handle], LIMIT_S).done.pop().result(0)),
            lambda handle, seen: handle.add_done_callback(lambda h: seen.append(h.result(0))),
            lambda handle, seen: handle.exception(LIMIT_S) or seen.append(handle.result(0)),
        )
        threads = [threading.Thread(target=wait, args=(way,)) for way in ways]
        for thread in threads:
            thread.start()
        together.wait(LIMIT_S)
        completion.set_result(number)
        for thread in threads:
            thread.join(LIMIT_S)
        assert seen == [number] * len(ways)


def test_to_follow_an_op_of_the_host_is_to_wait_for_it_whatever_its_outcome(runtime):
    handle, completion = begun(runtime)
    with completion.on(), pytest.raises(engine.DeadlineError):
        handle.follow(0.01)
    completion.set_exception(ValueError("seen by result, not by follow"))
    handle.follow(LIMIT_S)
    assert isinstance(handle.exception(LIMIT_S), ValueError)
    done = runtime.push(lambda: 3)
    done.follow()
    assert done.done()
