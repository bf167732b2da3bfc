"""Requests of a list call: sent together, but not later than need be."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from kvstore.cluster import client
from kvstore.protocol.messages import Push
from kvstore.protocol.wire import decode
from kvstore.transport.zeromq import Connection
from tests.clusters import cluster

KEYS = 20
NBYTES = 64 << 10  # of each: it is moved by itself
DEADLINE_S = 20.0


@pytest.fixture
def sent(monkeypatch):
    """How many pushes were in each message."""
    counts: list[int] = []
    send = Connection.send

    def send_and_tell(connection, frames):
        _, messages = decode(frames[0], len(frames) - 1)
        if pushes := sum(isinstance(message, Push) for message, _ in messages):
            counts.append(pushes)
        send(connection, frames)

    monkeypatch.setattr(Connection, "send", send_and_tell)
    return counts


def values() -> dict:
    return {f"key {number}": np.full(NBYTES // 4, number, np.float32) for number in range(KEYS)}


@pytest.mark.parametrize("at_a_time", [1, 5, 100])
def test_a_list_is_sent_in_parts(at_a_time, sent, monkeypatch):
    monkeypatch.setattr(client, "_chunk_bytes", lambda near: at_a_time * NBYTES)
    with cluster(1) as running:

        def work(kv):
            mine = values()
            kv.init(list(mine), list(mine.values()))
            return [array[0] for array in kv.pushpull(list(mine), list(mine.values())).result()]

        assert running.run(work) == [list(range(KEYS))]
    assert sum(sent) == KEYS
    assert len(sent) <= KEYS // at_a_time + 1  # the loop takes all that is there when it comes to it


def test_what_another_thread_sends_meanwhile_takes_the_rest_with_it():
    with cluster(1) as running:

        def work(kv):
            mine = values()
            kv.init(list(mine), list(mine.values()))
            session = kv._home._session
            results = []
            with session.gathering(1 << 30):
                first = kv.push("key 1", mine["key 1"])
                with pytest.raises(TimeoutError):
                    first.result(timeout=0.05)  # it waits for more

                def other():
                    results.append(kv.pushpull("key 1", 2 * mine["key 1"]).result(DEADLINE_S)[0])

                thread = threading.Thread(target=other)
                thread.start()
                thread.join(DEADLINE_S)
                first.result(DEADLINE_S)
            return results

        assert running.run(work) == [[2.0]]


def test_an_error_within_the_block_leaves_nothing_behind():
    with cluster(1) as running:

        def work(kv):
            kv.init("a", np.zeros(NBYTES, np.float32))
            handles = []

            def push_and_fail():
                with kv._home.gathering():
                    handles.append(kv.push("a", np.ones(NBYTES, np.float32)))
                    raise ZeroDivisionError

            with pytest.raises(ZeroDivisionError):
                push_and_fail()
            handles[0].result(DEADLINE_S)
            return float(kv.pull("a").result()[0])

        assert running.run(work) == [1.0]
