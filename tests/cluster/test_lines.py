"""The short way between processes of one host: what it carries, and what is left to ZeroMQ."""

from __future__ import annotations

import socket
import threading

import numpy as np
import pytest

from kvstore.transport import lines
from kvstore.transport.lines import ALIGNMENT, PACKET_BYTES_MAX, Line, connect
from kvstore.transport.reactor import Reactor
from kvstore.transport.zeromq import Connection, Endpoint
from tests.clusters import DEADLINE_S, cluster


@pytest.fixture
def ends():
    pair = [Line(end) for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)]
    yield pair
    for end in pair:
        end.close()


@pytest.mark.parametrize("sizes", [[5], [0], [7, 4], [9, 1, 0, 3, 65536], [1] * 64])
def test_a_line_carries_frames_as_they_are_and_value_frames_aligned(ends, sizes):
    frames = [bytes([number]) * size for number, size in enumerate(sizes)]
    here, there = ends
    assert here.send(frames)
    got = there.receive()
    assert [bytes(frame) for frame in got] == frames
    assert there.receive() is None
    for frame in got[1:]:
        if len(frame):
            assert np.frombuffer(frame, np.uint8).ctypes.data % ALIGNMENT == 0


def test_a_line_takes_no_more_than_fits(ends):
    here, there = ends
    assert not here.send([b"header", bytes(PACKET_BYTES_MAX)])
    assert not here.send([b"header"] * 65)
    sent = 0
    while here.send([b"header", bytes(1000)]):
        sent += 1
    assert sent > 0
    for _ in range(sent):
        assert len(there.receive()[1]) == 1000
    assert there.receive() is None
    assert here.send([b"header"])


@pytest.mark.parametrize(
    "packet",
    [b"x", bytes(16), b"\1\0\0\0\4\0\0\0" + bytes(8), b"\xff" * 64, b"\2\0\0\0\1\0\0\0\xff\xff\xff\xff" + bytes(100)],
)
def test_what_is_no_packet_ends_the_line(ends, packet):
    here, there = ends
    here._socket.send(packet)
    with pytest.raises(ConnectionError):
        there.receive()


def test_the_other_end_gone_ends_the_line(ends):
    here, there = ends
    there.close()
    assert not here.send([b"header"])
    with pytest.raises(ConnectionError):
        here.receive()


class Echo:
    """An endpoint that sends back what it receives, a connection to it, and what that one got."""

    def __init__(self) -> None:
        self.reactors = [Reactor("server"), Reactor("worker")]
        self.endpoint = Endpoint(self.reactors[0], self._answer, frame_bytes_max=1 << 20)
        address = self.endpoint.bind("tcp://127.0.0.1:*")
        self.came = threading.Semaphore(0)
        self.got: list[list[bytes]] = []
        self.ways: list[int] = []
        self.peers: list[bytes] = []
        self.connection = Connection(self.reactors[1], address, self._take)
        for reactor in self.reactors:
            reactor.start()

    def _answer(self, peer, frames):
        self.peers.append(peer)
        self.endpoint.send(peer, frames)

    def _take(self, frames):
        self.got.append([bytes(frame) for frame in frames])
        self.came.release()

    def ask(self, *frames: bytes) -> list[bytes]:
        self.reactors[1].call(lambda: self.connection.send(frames))
        assert self.came.acquire(timeout=DEADLINE_S)
        self.reactors[0].call(lambda: None)  # it has done with its answer
        return self.got[-1]

    def shorten(self) -> None:
        offered = self.reactors[0].call(lambda: self.endpoint.offer(self.peers[-1]))
        self.reactors[1].call(lambda: self.connection.shorten(offered))

    def stop(self) -> None:
        for reactor in self.reactors:
            reactor.stop()


@pytest.fixture
def echo():
    running = Echo()
    yield running
    running.stop()


def test_large_messages_and_those_after_the_end_of_a_line_go_by_zeromq(echo, monkeypatch):
    assert echo.ask(b"first") == [b"first"]
    echo.shorten()
    by_line = []
    send = Line.send
    monkeypatch.setattr(Line, "send", lambda line, frames: by_line.append(send(line, frames)) or by_line[-1])
    assert echo.ask(b"small", b"value") == [b"small", b"value"]
    assert by_line == [True, True]
    assert echo.ask(b"large", bytes(200_000)) == [b"large", bytes(200_000)]
    assert by_line == [True, True, False, False]
    peer = echo.peers[-1]
    assert echo.peers == [peer] * 3
    echo.reactors[0].call(lambda: echo.endpoint._lines.end(peer))
    assert echo.ask(b"after") == [b"after"]
    assert echo.ask(b"and again") == [b"and again"]
    echo.reactors[1].call(lambda: None)  # after what the connection's end of the line had to tell
    assert echo.connection._line is None


def test_a_line_is_for_the_peer_it_was_offered_to_and_for_one_use(echo):
    echo.ask(b"first")
    offered = echo.reactors[0].call(lambda: echo.endpoint.offer(echo.peers[-1]))
    name, _, ticket = offered.partition("/")
    stranger = connect(f"{name}/{'0' * len(ticket)}")
    assert stranger is not None
    stranger._socket.settimeout(DEADLINE_S)
    assert stranger._socket.recv(100) == b""
    stranger.close()
    echo.reactors[1].call(lambda: echo.connection.shorten(offered))
    assert echo.ask(b"by line") == [b"by line"]
    again = connect(offered)
    assert again is not None
    again._socket.settimeout(DEADLINE_S)
    assert again._socket.recv(100) == b""
    again.close()
    assert echo.ask(b"still by line") == [b"still by line"]
    assert connect("nobody-is-there/0") is None


def test_those_who_open_lines_and_say_nothing_are_few(echo):
    echo.ask(b"first")
    offered = echo.reactors[0].call(lambda: echo.endpoint.offer(echo.peers[-1]))
    name = offered.partition("/")[0]
    silent = []
    for _ in range(lines.WAITING_MAX + 3):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.settimeout(DEADLINE_S)
        sock.connect(f"\0{name}")
        silent.append(sock)
        echo.reactors[0].call(lambda: None)
    assert [sock.recv(100) for sock in silent[:2]] == [b"", b""]
    for sock in silent:
        sock.close()
    echo.reactors[1].call(lambda: echo.connection.shorten(offered))
    assert echo.ask(b"by line") == [b"by line"]


@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "sockets"])
def test_a_worker_takes_the_short_way_to_a_server_of_its_host(shared):
    with cluster(2, 2) as running:

        def work(kv):
            value = np.full(3, kv.rank + 1.0, np.float32)
            keys = [f"k{i}" for i in range(8)]
            kv.init(keys, [value] * 8)
            for key in keys:
                assert kv.pushpull(key, value, np.empty_like(value)).result().tolist() == [3.0] * 3
            connections = kv._home._session._connections
            return sum(connection._line is not None for connection in connections.values())

        assert running.run(work, shared_memory=shared) == [2 if shared else 0] * 2
        for server in running.servers:
            for shard in server.shards.values():
                assert len(shard._endpoint._lines._lines) == 0 or shared
