"""A protected cluster: who has an allowed key trains, all others are refused, and training goes on."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zmq
from zmq.auth.certs import load_certificate

import kvstore
from kvstore.cluster import keys as key_files
from kvstore.cluster.keys import Keys, network
from kvstore.cluster.scheduler import Scheduler
from kvstore.cluster.server import Server
from kvstore.cluster.status import read_status
from kvstore.errors import AuthenticationError, OptionError, UnreachableError
from tests.clusters import Cluster, cluster

LIMIT_S = 30.0


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The keys of a cluster with the clients "worker" and "mallory"."""
    key_files.make_cluster(tmp_path / "keys", ["worker", "mallory"])
    return tmp_path / "keys"


@contextlib.contextmanager
def protected(place: Path, workers: int = 2, servers: int = 1) -> Iterator[Cluster]:
    with cluster(workers, servers, keys=place) as running:
        yield running


def refused(address: str, keys: Path | None, timeout_s: float = 5.0) -> str:
    """What a worker with these keys is told."""
    with pytest.raises(AuthenticationError) as caught:
        kvstore.create("dist", address=address, connect_timeout=timeout_s, keys=keys)
    assert isinstance(caught.value, UnreachableError)
    return str(caught.value)


# --- files -----------------------------------------------------------------------------------------


def test_a_person_can_read_the_files_and_only_their_owner_the_secrets(place):
    secrets = [place / "cluster.key_secret", place / "worker" / "client.key_secret"]
    assert {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()} == {
        "allowed", "cluster.key", "cluster.key_secret",
        "worker/cluster.key", "worker/client.key_secret", "mallory/cluster.key", "mallory/client.key_secret",
    }  # fmt: skip
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in secrets)
    assert place.stat().st_mode & 0o077 == 0
    allowed = key_files.read_allowed(place / "allowed")
    assert list(allowed) == ["worker", "mallory"]
    public, secret = load_certificate(secrets[1])  # other ZeroMQ programs can read them too
    assert public.decode() == allowed["worker"]
    assert zmq.curve_public(secret) == public
    assert (place / "worker" / "cluster.key").read_text() == (place / "cluster.key").read_text()
    assert secret.decode() not in repr(Keys(place / "worker").identity)


def test_nothing_is_overwritten(place):
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    with pytest.raises(OptionError, match="never overwritten"):
        key_files.make_cluster(place)
    with pytest.raises(OptionError, match="never overwritten"):
        key_files.add_client(place, "worker")
    assert before == {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_secret_that_others_can_read_is_refused(place, mode):
    (place / "worker" / "client.key_secret").chmod(mode)
    with pytest.raises(OptionError, match=rf"only its owner.*mode is {mode:o}"):
        Keys(place / "worker")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "allowed", "cluster.key", "x" * 65, "-c", "ä"])
def test_names_that_are_none(place, name):
    with pytest.raises(OptionError, match="a client's name"):
        key_files.add_client(place, name)


@pytest.mark.parametrize(
    ("file", "text", "what"),
    [
        ("cluster.key", "", "40 characters"),
        ("cluster.key", 'public-key = "short"', "40 characters"),
        ("cluster.key_secret", f'public-key = "{"a" * 40}"', "only a public one"),
        ("cluster.key", None, "keygen"),
    ],
)
def test_files_that_are_not_what_they_should_be(place, file, text, what):
    if text is None:
        (place / file).unlink()
    else:
        (place / file).write_text(text)
    with pytest.raises(OptionError, match=what):
        Keys(place)


@pytest.mark.parametrize("line", ["worker", "worker short", f"a {'a' * 40} more", f"x {'a' * 40}\nx {'b' * 40}", "\0"])
def test_a_list_that_is_none(place, line):
    (place / "allowed").write_text(line)
    with pytest.raises(OptionError, match="line"):
        Scheduler("tcp://127.0.0.1:*", 1, 1, network=network(place))


def test_a_list_that_becomes_unreadable_changes_nothing(place, caplog):
    keys = Keys(place)
    before = keys.allowed()
    assert len(before) == 3
    (place / "allowed").write_text("half a li")
    assert keys.allowed() == before
    (place / "allowed").unlink()
    assert keys.allowed() == before
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 2
    (place / "allowed").write_text("# nobody\n")
    assert list(keys.allowed().values()) == ["the cluster itself"]


def test_a_client_s_keys_do_not_make_a_server(place):
    own = network(place / "worker")
    with pytest.raises(OptionError, match=r"cluster.key_secret.*a client"):
        Scheduler("tcp://127.0.0.1:*", 1, 1, network=own)
    with pytest.raises(OptionError, match=r"cluster.key_secret.*a client"):
        Server("tcp://127.0.0.1:1", network=own)


# --- a running cluster -----------------------------------------------------------------------------


def ones(kv: kvstore.KVStore) -> float:
    kv.init("w", np.zeros(1000, np.float32))
    for _ in range(5):
        value = kv.pushpull("w", np.ones(1000, np.float32)).result()
    return float(value[0])


def test_a_protected_cluster_trains(place):
    with protected(place, servers=2) as c:
        assert c.run(ones, keys=place / "worker", shared_memory=False) == [2.0, 2.0]
        assert read_status(c.address, network=network(place / "mallory"))["num_servers"] == 2


def test_the_environment_may_name_the_keys(place, monkeypatch):
    monkeypatch.setenv("KVSTORE_KEYS", str(place / "worker"))
    with protected(place, workers=1) as c:
        assert c.run(ones) == [1.0]


def test_what_travels_cannot_be_read(place):
    """A man in the middle sees neither a value nor a key's name; without keys he sees both."""
    secret = np.frombuffer(b"attack at dawn! " * 64, np.uint8)
    for keys, readable in ((place, False), (None, True)):
        scheduler = Scheduler("tcp://127.0.0.1:*", 1, 1, network=network(keys))
        server = Server(scheduler.address, network=network(keys))
        scheduler.start()
        with listening(server) as heard:
            starting = threading.Thread(target=server.start)
            starting.start()
            own = place / "worker" if keys else None
            with kvstore.create("dist", address=scheduler.address, keys=own, shared_memory=False) as kv:
                kv.init("the name", secret)
            starting.join(LIMIT_S)
            server.stop()
            scheduler.stop()
        assert (b"attack at dawn" in heard) == (b"the name" in heard) == readable, keys


@contextlib.contextmanager
def listening(server: Server) -> Iterator[bytearray]:
    """What passes on the way to the server, which is advertised under the address of a proxy."""
    import socket

    heard = bytearray()
    host, port = server.address.removeprefix("tcp://").split(":")
    listener = socket.create_server(("127.0.0.1", 0))
    ends = [listener]

    def copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                heard.extend(data)
                target.sendall(data)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection((host, int(port)))
                ends.extend((near, far))
                for pair in ((near, far), (far, near)):
                    threads.append(threading.Thread(target=copy, args=pair))
                    threads[-1].start()

    threads = [threading.Thread(target=accept)]
    threads[0].start()
    server.address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
    try:
        yield heard
    finally:
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        for thread in threads:
            thread.join(LIMIT_S)


def test_strangers_are_refused_while_others_train(place, tmp_path, caplog):
    key_files.make_cluster(tmp_path / "others")
    unknown = tmp_path / "unknown"
    key_files.make_cluster(unknown)
    (unknown / "worker" / "cluster.key").write_text((place / "cluster.key").read_text())  # the right cluster
    with protected(place) as c:
        told: list[str] = []

        def work(kv: kvstore.KVStore) -> float:
            kv.init("w", np.zeros(10, np.float32))
            for step in range(6):
                if kv.rank == 0 and step < 3:
                    keys = (None, unknown / "worker", tmp_path / "others" / "worker")[step]
                    told.append(refused(c.address, keys, 3.0))
                value = kv.pushpull("w", np.ones(10, np.float32)).result()
            return float(value[0])

        assert c.run(work, keys=place / "worker") == [2.0, 2.0]
        assert "protected by keys" in told[0]
        assert "unknown to it or was revoked" in told[1]
        assert "another cluster's keys" in told[2]
        with pytest.raises(AuthenticationError, match="protected by keys"):
            read_status(c.address)
    refusals = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert len(refusals) == 2  # one line for each kind and key, however often they tried
    assert sum("not on the list" in line for line in refusals) == 1


def test_keys_where_the_cluster_has_none(place):
    with cluster(1, 1) as c:
        assert "not protected" in refused(c.address, place / "worker")


def pull_for_ever(kv: kvstore.KVStore) -> None:
    while True:
        kv.pull("w").result()


def test_a_revoked_client_is_cut_off_and_stays_out(place):
    """Worker 2 is revoked in the middle; the keys that it takes no part in go on."""
    revoked = threading.Event()

    def honest(kv: kvstore.KVStore) -> float:
        kv.init("w", np.zeros(10, np.float32), participants=[0, 1])
        for step in range(20):
            if step == 10:
                assert revoked.wait(LIMIT_S)
            value = kv.pushpull("w", np.ones(10, np.float32)).result()
        return float(value[0])

    with protected(place, workers=3) as c:
        results: list[float] = []

        def worker(rank: int) -> None:
            with kvstore.create("dist", address=c.address, rank=rank, keys=place / "worker", timeout=LIMIT_S) as kv:
                results.append(honest(kv))

        threads = [threading.Thread(target=worker, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        kv = kvstore.create("dist", address=c.address, rank=2, keys=place / "mallory", timeout=LIMIT_S)
        kv.init("w", np.zeros(10, np.float32), participants=[0, 1])
        kv.pull("w").result()
        key_files.revoke(place, "mallory")
        with pytest.raises(AuthenticationError, match="revoked"):  # though it had a connection
            pull_for_ever(kv)
        revoked.set()
        assert "revoked" in refused(c.address, place / "mallory")
        for thread in threads:
            thread.join(LIMIT_S)
        assert results == [2.0, 2.0]
        with contextlib.suppress(kvstore.KVStoreError):
            kv.close()


def test_a_client_may_be_added_while_the_cluster_runs(place):
    with protected(place, workers=1) as c:
        key_files.add_client(place, "late")
        end = threading.Event()
        for _ in range(
            40
        ):  # it is read within a second, and not by all in one moment: it may be registered, then refused
            with contextlib.suppress(AuthenticationError):
                late = {"keys": place / "late", "connect_timeout": 5, "on_worker_loss": "continue"}
                assert c.run(ones, **late) == [1.0]
                break
            end.wait(0.1)
        else:
            pytest.fail("refused to the end")


@pytest.mark.parametrize("bind", ["tcp://0.0.0.0:*", "tcp://[::]:*"])
def test_an_open_door_is_said_aloud_in_one_line(bind, caplog, place):
    if "[" in bind and not os.path.exists("/proc/net/if_inet6"):
        pytest.skip("no IPv6 here")
    Scheduler(bind, 1, 1).stop()
    (line,) = [record.getMessage() for record in caplog.records]
    assert bind in line and "keygen" in line and "\n" not in line
    caplog.clear()
    Scheduler(bind, 1, 1, network=network(place)).stop()
    Scheduler("tcp://127.0.0.1:*", 1, 1).stop()
    assert not caplog.records
