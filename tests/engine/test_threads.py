"""Which thread runs what: a ready op always finds one, and small ops do not wake more than they need."""

from __future__ import annotations

import concurrent.futures
import contextlib
import random
import threading
from collections.abc import Iterator

import pytest

import engine

LIMIT_S = 30


@pytest.fixture
def threaded() -> Iterator[engine.Engine]:
    one = engine.create("threaded", threads=2)
    yield one
    one.validate()
    one.close()


def run_many_short_ops(runtime: engine.Engine) -> None:
    """After these the engine expects short ops, and would rather not wake a second thread."""
    for _ in range(200):
        runtime.push(lambda: None)
    runtime.wait_all(LIMIT_S)


def test_an_op_that_blocks_after_many_short_ones_holds_nobody_up(threaded):
    for _ in range(20):
        run_many_short_ops(threaded)
        gate, opened = threading.Event(), threading.Event()
        threaded.push(lambda gate=gate, opened=opened: opened.set() if gate.wait(LIMIT_S) else None)
        threaded.push(gate.set)
        assert opened.wait(LIMIT_S)  # which, unlike a handle, does not help


def test_many_ops_behind_a_blocked_thread(threaded):
    run_many_short_ops(threaded)
    gate, running = threading.Event(), threading.Event()
    blocked = threaded.push(lambda: (running.set(), gate.wait(LIMIT_S)))
    assert running.wait(LIMIT_S)
    handles = [threaded.push(lambda: None) for _ in range(500)]
    assert not concurrent.futures.wait(handles, LIMIT_S).not_done
    assert not blocked.done()
    gate.set()


def test_no_more_ops_at_once_than_threads_even_if_one_waits_for_all():
    one = engine.create("threaded", threads=2)
    lock, now, most = threading.Lock(), [0], [0]

    def work():
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        threading.Event().wait(0.0005)
        with lock:
            now[0] -= 1

    for _ in range(10):
        for _ in range(20):
            one.push(work)
        one.wait_all(LIMIT_S)
    assert most[0] <= 2
    one.close()


def test_an_interrupt_reaches_the_thread_that_waits_and_leaves_the_engine_whole(threaded):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        threaded.push(interrupt, inline=True)
    with threaded.bulk():  # so that no other thread is awake
        handle, behind = threaded.push(interrupt), threaded.push(lambda: 1)
        with pytest.raises(KeyboardInterrupt):
            threaded._help(None)
    assert behind.result(LIMIT_S) == 1
    assert isinstance(handle.exception(0), KeyboardInterrupt)
    in_a_thread_of_its_own = threaded.push(interrupt)
    assert not concurrent.futures.wait([in_a_thread_of_its_own], LIMIT_S).not_done
    assert threaded.push(lambda: 2).result(LIMIT_S) == 2


# --- bulk ---------------------------------------------------------------------------------------


def test_a_bulk_runs_when_it_ends_without_anybody_waiting(threaded):
    for _ in range(50):
        ended = threading.Event()
        with threaded.bulk():
            for _ in range(20):
                threaded.push(lambda: None)
            threaded.push(ended.set)
        assert ended.wait(LIMIT_S)


@pytest.mark.parametrize("kind", ["threaded", "serial"])
def test_a_wait_within_a_bulk_is_as_good_as_any(kind):
    one = engine.create(kind)
    var, gate = engine.Var(), threading.Event()
    with one.bulk():
        assert one.push(lambda: 1).result(LIMIT_S) == 1
        one.push(lambda: None, writes=[var])
        behind = one.push(lambda: 2, reads=[var])
        assert behind.result(LIMIT_S) == 2
        one.push(lambda: None, writes=[var])
        one.wait(var, timeout=LIMIT_S)
        handles = [one.push(lambda: None, writes=[var]) for _ in range(5)]
        assert not concurrent.futures.wait(handles, LIMIT_S).not_done
        handle = one.push(gate.set, writes=[var])
        threading.Thread(target=handle.exception, args=(LIMIT_S,)).start()  # another thread's wait
        assert handle.result(LIMIT_S) is None
        with one.bulk():
            one.push(lambda: None, writes=[var])
        assert one.push(lambda: 3, inline=True).result(0) == 3
        one.push(lambda: None, writes=[var])
        one.wait_all(LIMIT_S)
        assert not one.pending(var)
    one.validate()
    one.close()


def test_a_bulk_that_raises_has_pushed_what_it_has_pushed(threaded):
    ended = threading.Event()
    with contextlib.suppress(ValueError), threaded.bulk():
        threaded.push(ended.set)
        raise ValueError
    assert ended.wait(LIMIT_S)


def test_other_threads_are_no_part_of_a_bulk(threaded):
    ended = threading.Event()
    with threaded.bulk():
        threaded.push(lambda: None)
        other = threading.Thread(target=threaded.push, args=(ended.set,))
        other.start()
        assert ended.wait(LIMIT_S)
        other.join(LIMIT_S)


# --- liveness -----------------------------------------------------------------------------------


@pytest.mark.timeout(300)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_random_ops_all_end_though_nobody_helps(threads):
    """Bulks, lanes, pushes and waits within ops, ops that end later: whatever is pushed ends by itself."""
    one = engine.create("threaded", threads=threads)
    rng = random.Random(threads)
    for _ in range(400):
        left, lock, ended = [0], threading.Lock(), threading.Event()
        vars_ = [engine.Var() for _ in range(3)]
        events = [threading.Event() for _ in range(threads - 1)]  # that many ops may block until another sets theirs

        def count(_: object, left=left, lock=lock, ended=ended) -> None:
            with lock:
                left[0] -= 1
                if not left[0]:
                    ended.set()

        def push(work, lock=lock, left=left, count=count, vars_=vars_, is_async=False):
            with lock:
                left[0] += 1
            chosen = rng.sample(vars_, rng.randrange(2))
            options = {"lane": rng.choice([None, None, "other"]), "priority": rng.randrange(2)}
            how = one.push_async if is_async else one.push
            how(work, **{rng.choice(["reads", "writes"]): chosen}, **options).add_done_callback(count)

        with lock:
            left[0] += 1
        for _ in range(rng.randrange(1, 4)):
            block = one.bulk() if rng.random() < 0.5 else None
            if block is not None:
                block.__enter__()
            for _ in range(rng.randrange(1, 12)):
                choice = rng.random()
                if choice < 0.1:
                    push(lambda c: threading.Thread(target=c.set_result, args=(1,)).start(), is_async=True)
                elif choice < 0.2:
                    push(lambda: one.push(lambda: None, lane="other").result(LIMIT_S))
                elif choice < 0.25:
                    push(lambda: sum(range(20_000)))
                else:
                    push(lambda: None)
            if block is not None:
                block.__exit__(None, None, None)
        for event in events:
            with lock:
                left[0] += 2
            one.push(lambda event=event: event.wait(LIMIT_S)).add_done_callback(count)
        for event in events:
            one.push(event.set).add_done_callback(count)
        count(None)
        assert ended.wait(LIMIT_S)
        one.validate()
    one.close()
