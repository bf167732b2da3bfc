"""On which threads of a server values are worked on, and what sockets are told."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import zmq

from kvstore.cluster.work import AT_ONCE_BYTES
from kvstore.stored import Stored
from kvstore.transport.reactor import Reactor
from kvstore.transport.zeromq import LOOPBACK_SNDBUF, Connection, Endpoint
from tests.clusters import DEADLINE_S, cluster


@pytest.mark.parametrize("shared", [False, True], ids=["sockets", "shared memory"])
@pytest.mark.parametrize("nbytes", [AT_ONCE_BYTES, 2 * AT_ONCE_BYTES], ids=["small", "large"])
def test_what_came_alone_is_merged_where_it_came_unless_it_is_large(nbytes, shared, monkeypatch):
    threads: set[str] = set()
    assign = Stored.assign

    def assign_and_tell(stored, *args, **options):
        threads.add(threading.current_thread().name)
        assign(stored, *args, **options)

    monkeypatch.setattr(Stored, "assign", assign_and_tell)
    with cluster(2) as running:

        def work(kv):
            value = np.full(nbytes // 4, kv.rank + 1, np.float32)
            kv.init("w", value)
            return [float(kv.pushpull("w", value, np.empty_like(value)).result().sum()) for _ in range(3)]

        results = running.run(work, shared_memory=shared)
    assert results == [[3.0 * (nbytes // 4)] * 3] * 2
    small = nbytes <= AT_ONCE_BYTES
    assert ("kvstore-server" in threads) is small
    assert (threads == {"kvstore-server"}) is small


@pytest.mark.parametrize(
    ("address", "near"),
    [
        ("tcp://127.0.0.1:9", True),
        ("tcp://127.1.2.3:9", True),
        ("tcp://localhost:9", True),
        ("tcp://[::1]:9", True),
        ("tcp://192.0.2.1:9", False),
        ("tcp://127.example.org:9", False),
    ],
)
def test_the_send_buffer_is_short_on_loopback_only(address, near):
    reactor = Reactor("sockets")
    try:
        connection = Connection(reactor, address, lambda frames: None)
        assert (connection._socket.getsockopt(zmq.SNDBUF) == LOOPBACK_SNDBUF) is near
    finally:
        reactor.abandon()


@pytest.mark.parametrize(("address", "near"), [("tcp://127.0.0.1:*", True), ("tcp://0.0.0.0:*", False)])
def test_a_server_that_others_can_reach_leaves_the_send_buffer_to_the_kernel(address, near):
    reactor = Reactor("sockets")
    try:
        endpoint = Endpoint(reactor, lambda peer, frames: None, frame_bytes_max=1 << 20)
        endpoint.bind(address)
        assert (endpoint._socket.getsockopt(zmq.SNDBUF) == LOOPBACK_SNDBUF) is near
    finally:
        reactor.abandon()


def test_a_loop_that_an_error_has_ended_takes_nothing_more(monkeypatch):
    def fail(end):
        reactor._polling = True  # as when an error comes out of the sleep
        raise OSError("the descriptors are gone")

    reactor = Reactor("sockets")
    monkeypatch.setattr(reactor, "_turn", fail)
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    reactor.start()
    reactor.thread.join(DEADLINE_S)
    reactor.post(lambda: None)
    assert not reactor._posted
    reactor._nudge(reactor.future())
    reactor.stop()
