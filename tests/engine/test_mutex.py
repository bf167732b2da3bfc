"""The engine's lock: one thread at a time, and none is forgotten."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import pytest

from engine.mutex import Mutex

LIMIT_S = 30
THREADS = 6
TURNS = 2000


@pytest.fixture(autouse=True)
def threads_switch_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def together(work) -> None:
    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
        assert not thread.is_alive()


def test_one_thread_at_a_time_and_again_and_again():
    mutex, inside, total = Mutex(), [0], [0]

    def work(_):
        for _ in range(TURNS):
            with mutex, mutex:  # reentrant
                inside[0] += 1
                assert inside[0] == 1
                before = total[0]
                sum(range(5))
                total[0] = before + 1
                inside[0] -= 1

    together(work)
    assert total[0] == THREADS * TURNS
    assert not mutex.waiting


def test_a_condition_of_it():
    mutex, turn = Mutex(), [0]
    changed = mutex.condition()

    def work(number):
        for _ in range(50):
            with changed, mutex:  # wait gives up both holds
                assert changed.wait_for(lambda: turn[0] % THREADS == number, LIMIT_S)
                turn[0] += 1
                changed.notify_all()

    together(work)
    assert turn[0] == 50 * THREADS


def test_who_is_told_and_interrupted_passes_the_word_on():
    mutex, tries = Mutex(), []
    behind = threading.Lock()
    behind.acquire()

    def interrupted(blocking):
        tries.append(blocking)
        if len(tries) == 1:
            return False
        mutex.tell_one()
        mutex.waiting.append(behind)
        raise KeyboardInterrupt

    mutex.attempt = interrupted
    with pytest.raises(KeyboardInterrupt):
        mutex.acquire()
    assert behind.acquire(blocking=False)
    assert not mutex.waiting
