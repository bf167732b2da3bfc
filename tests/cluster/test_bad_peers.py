"""No server, a server of another protocol, strangers and garbage: an error for them, nothing lost for us."""

from __future__ import annotations

import os
import random
import socket

import numpy as np
import pytest
import zmq

import kvstore
from kvstore import errors
from kvstore.protocol import messages, wire
from tests.clusters import cluster


def test_nobody_at_the_address():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(errors.UnreachableError, match=f"tcp://127.0.0.1:{port}"):
        kvstore.create("dist", address=f"tcp://127.0.0.1:{port}", connect_timeout=0.3)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:1",
        "http://a:1",
        "ipc:///tmp/a",
        "tcp://",
        "",
        "tcp://a",
        "tcp://a:*",
        "tcp://a:0",
        "tcp://a:65536",
        5,
    ],
)
def test_ill_formed_addresses(address):
    with pytest.raises(errors.OptionError):
        kvstore.create("dist", address=address, connect_timeout=0.3)


def test_an_incomplete_cluster_says_who_is_missing():
    with cluster(workers=2) as c, pytest.raises(errors.DeadlineError, match="1 of 2 workers"):
        kvstore.create("dist", address=c.address, timeout=0.3)


def test_a_scheduler_of_another_protocol_version():
    context = zmq.Context()
    with context.socket(zmq.ROUTER) as router:
        port = router.bind_to_random_port("tcp://127.0.0.1")
        import threading

        def answer() -> None:
            peer, *_ = router.recv_multipart()
            router.send_multipart([peer, b"\x91\x63"])  # [99]

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(errors.ProtocolVersionError, match=rf"expected {messages.PROTOCOL}.*99"):
            kvstore.create("dist", address=f"tcp://127.0.0.1:{port}", connect_timeout=10)
        thread.join(10)
    context.term()


def test_garbage_costs_a_server_nothing():
    rng = random.Random(7)

    def work(kv: kvstore.KVStore) -> float:
        kv.init("w", np.zeros(100, np.float32))
        for _ in range(20):
            if kv.rank == 0:
                for server in c.servers:
                    host, port = server.address.removeprefix("tcp://").split(":")
                    with socket.create_connection((host, int(port))) as raw:
                        raw.sendall(rng.randbytes(200))
                    speak_zmq(server.address)
            value = kv.pushpull("w", np.ones(100, np.float32)).result()
        return float(value.sum())

    def speak_zmq(address: str) -> None:
        with context.socket(zmq.DEALER) as dealer:
            dealer.linger = 1000
            dealer.connect(address)
            for _ in range(5):
                dealer.send_multipart([rng.randbytes(rng.randrange(100)) for _ in range(rng.randrange(1, 4))])
            stranger = wire.Sender(1, 0, 0, 1)
            dealer.send_multipart(wire.envelope(stranger, [(messages.Push(1, "w", 0, 1, False, False), [b"123"])]))

    context = zmq.Context()
    with cluster(workers=2, servers=2) as c:
        assert c.run(work) == [200.0, 200.0]
    context.term()


@pytest.mark.parametrize("key", ["w", "unknown"])
def test_a_state_of_odd_size_is_refused(key):
    with cluster(workers=1) as c, kvstore.create("dist", address=c.address) as kv:
        kv.init("w", np.zeros(3, np.float32))
        session = kv._home._session
        answer = session.ask(
            0, lambda i: messages.WriteState(i, key, 0, 1, ("momentum",), ("float32",)), b"thirteen byte"
        )
        with pytest.raises(errors.ProtocolError, match=r"a frame of 13 bytes"):
            answer.result(30)


def test_an_oversized_frame_costs_its_sender_the_connection(monkeypatch):
    """Before it is read; and the server nothing."""
    monkeypatch.setattr("kvstore.cluster.shard.FRAME_BYTES_MAX", 1 << 20)
    context = zmq.Context()

    def work(kv: kvstore.KVStore) -> float:
        kv.init("w", np.zeros(100, np.float32))
        for address in (c.servers[0].address, c.address):
            with context.socket(zmq.DEALER) as dealer:
                dealer.linger = 0
                with dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED) as ended:
                    dealer.connect(address)
                    dealer.send(bytes(9 << 20))
                    assert ended.poll(30_000)
                    dealer.disable_monitor()
        return float(kv.pushpull("w", np.ones(100, np.float32)).result().sum())

    with cluster(workers=1, servers=1) as c:
        assert c.run(work) == [100.0]
    context.term()


def test_a_value_that_is_too_large_for_one_frame_is_refused(monkeypatch):
    monkeypatch.setattr("kvstore.cluster.client.FRAME_BYTES_MAX", 8 << 20)
    with cluster(workers=1, servers=1) as c, kvstore.create("dist", address=c.address, timeout=30) as kv:
        kv.set_optimizer(kvstore.optim.LARS())
        with pytest.raises(errors.ShapeError, match=r"'w'.*8388608 bytes.*\(3145728,\) of float32"):
            kv.init("w", np.zeros(3 << 20, np.float32))
        kv.init("v", np.zeros(2 << 20, np.float32))


def test_a_forked_child_may_not_use_the_store_but_create_its_own():
    with kvstore.create("local", timeout=30) as kv:
        kv.init("w", np.zeros(1, np.float32))
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                kv.close()  # which is the parent's business
                with kvstore.create("local", timeout=30) as own:
                    own.init("w", np.ones(1, np.float32))
                    assert own.pull("w").result().tolist() == [1]
                kv.pull("w")
            except errors.ClosedError:
                code = 7
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        assert kv.pull("w").result().tolist() == [0]
