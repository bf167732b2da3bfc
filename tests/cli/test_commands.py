"""``scheduler``, ``server``, ``status`` and the shape of all commands."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from click.testing import CliRunner

import kvstore
from kvstore import environment
from kvstore.arrays import gpu
from kvstore.cli import main
from kvstore.cluster.status import read_status
from kvstore.errors import OptionError
from tests.clusters import cluster

LIMIT_S = 30
KVSTORE = [sys.executable, "-m", "kvstore"]


@contextlib.contextmanager
def daemon(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running daemon and the address in its first line."""
    process = subprocess.Popen([*KVSTORE, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process, process.stdout.readline().split()[-1]
    finally:
        process.kill()
        process.communicate(timeout=LIMIT_S)


@pytest.mark.parametrize(
    "command", [[], ["run"], ["scheduler"], ["server"], ["status"], ["bench"], ["bench", "scaling"], ["bench", "micro"]]
)
def test_every_command_has_help(command):
    result = CliRunner().invoke(main, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_daemons_stop_cleanly(number):
    code = 0 if number == signal.SIGTERM else 130
    with (
        daemon("scheduler", "--bind", "tcp://127.0.0.1:*", "-w", "1", "-s", "1") as (scheduler, address),
        daemon("server", "--address", address) as (server, _),
    ):
        with kvstore.create("dist", address=address, timeout=LIMIT_S) as kv:
            kv.init("w", np.zeros(2, np.float32))
        server.send_signal(number)
        assert server.wait(LIMIT_S) == code, server.stderr.read()
        scheduler.send_signal(number)
        assert scheduler.wait(LIMIT_S) == code, scheduler.stderr.read()


def test_one_process_is_a_whole_service():
    with daemon("server", "--with-scheduler", "--address", "tcp://127.0.0.1:*", "-w", "1") as (server, address):
        with kvstore.create("dist", address=address, timeout=LIMIT_S) as kv:
            kv.init("w", np.full(2, 3, np.float32))
            assert kv.pull("w").result().tolist() == [3, 3]
        server.send_signal(signal.SIGTERM)
        assert server.wait(LIMIT_S) == 0


def test_a_terminated_server_is_an_error_for_its_workers():
    with (
        daemon("scheduler", "--bind", "tcp://127.0.0.1:*", "-w", "1", "-s", "1") as (_, address),
        daemon("server", "--address", address) as (server, _),
    ):
        kv = kvstore.create("dist", address=address, timeout=LIMIT_S)
        kv.init("w", np.zeros(2, np.float32))
        server.send_signal(signal.SIGTERM)
        server.wait(LIMIT_S)
        gone = kv.push("w", np.ones(2, np.float32))
        with pytest.raises(kvstore.ServerLostError, match="server 0"):
            gone.result()
        kv.close()


def test_ipv6():
    with daemon("server", "--with-scheduler", "--address", "tcp://[::1]:*", "--bind", "tcp://[::1]:*", "-w", "1") as (
        _,
        address,
    ):
        assert "[::1]" in address
        with kvstore.create("dist", address=address, timeout=LIMIT_S) as kv:
            kv.init("w", np.zeros(2, np.float32))


def test_status_shows_members_and_what_servers_hold():
    met = threading.Barrier(3)

    def work(kv):
        kv.init("w", np.zeros(1000, np.float32))
        met.wait(LIMIT_S)
        met.wait(LIMIT_S)

    with cluster(workers=2, servers=2) as c:
        thread = threading.Thread(target=c.run, args=(work,))
        thread.start()
        met.wait(LIMIT_S)
        result = CliRunner().invoke(main, ["status", "--address", c.address, "--json"])
        table = CliRunner().invoke(main, ["status", "--address", c.address])
        met.wait(LIMIT_S)
        thread.join(LIMIT_S)
    assert result.exit_code == 0
    report = json.loads(result.output)
    assert [row["state"] for row in report["workers"] + report["servers"]] == ["here"] * 4
    assert sum(row["bytes"] for row in report["servers"]) == 4000
    assert table.exit_code == 0
    assert "worker" in table.output
    assert report["gpus"] == gpu.described()
    assert f"GPUs of this machine: {report['gpus']}" in table.output


def test_status_of_a_cluster_that_is_not_complete():
    with (
        daemon("scheduler", "--bind", "tcp://127.0.0.1:*", "-w", "2", "-s", "1") as (_, address),
        daemon("server", "--address", address),
    ):
        end = time.monotonic() + LIMIT_S
        while not read_status(address)["servers"]:
            assert time.monotonic() < end
        shown = subprocess.run(
            [*KVSTORE, "status"],
            env={**os.environ, "KVSTORE_ADDRESS": address}, capture_output=True, text=True, timeout=LIMIT_S,
        )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert "0 of 2 workers, 1 of 1 servers" in shown.stdout
    assert "tcp://127.0.0.1:" in shown.stdout  # not cut to the width of some terminal
    assert "None" not in shown.stdout


def test_the_environment_of_an_older_cluster_will_do(monkeypatch):
    monkeypatch.setenv("DMLC_NUM_WORKER", "1")
    monkeypatch.setenv("DMLC_NUM_SERVER", "1")
    with daemon("scheduler", "--bind", "tcp://127.0.0.1:*") as (_, address):
        host, port = address.removeprefix("tcp://").split(":")
        monkeypatch.setenv("DMLC_PS_ROOT_URI", host)
        monkeypatch.setenv("DMLC_PS_ROOT_PORT", port)
        with daemon("server"), kvstore.create("dist", timeout=LIMIT_S) as kv:
            kv.init("w", np.zeros(2, np.float32))
        assert CliRunner().invoke(main, ["status"]).exit_code == 0
        monkeypatch.setenv("DMLC_ROLE", "server")
        with pytest.raises(OptionError, match="server, not a worker"):
            kvstore.create("dist")


@pytest.mark.parametrize(
    "arguments",
    [
        ["server", "--address", "tcp://127.0.0.1:9", "--bind", "tcp://127.0.0.1:70000"],
        ["scheduler", "--bind", "tcp://127.0.0.1:70000", "-w", "1"],
        ["bench", "scaling", "--consistency", "strict"],
        ["status", "--address", "tcp://127.0.0.1:9", "--timeout", "0.2"],
        ["server", "--address", "nonsense"],
        ["scheduler", "--bind", "tcp://256.0.0.1:1", "-w", "1"],
        ["scheduler", "--bind", "tcp://127.0.0.1:*", "-w", "0"],
    ],
    ids=str,
)
def test_failures_are_one_line_and_a_code(arguments):
    done = subprocess.run([*KVSTORE, *arguments], capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 1
    assert done.stderr.startswith("kvstore: ")
    assert len(done.stderr.splitlines()) == 1


def test_environment():
    read = environment.read
    assert read({}) == environment.Environment()
    ours = {"KVSTORE_ADDRESS": "tcp://a:1", "KVSTORE_RANK": "3", "DMLC_RANK": "4", "DMLC_ROLE": "worker"}
    assert read(ours) == environment.Environment("tcp://a:1", "worker", 3)
    theirs = {"DMLC_PS_ROOT_URI": "10.0.0.1", "DMLC_PS_ROOT_PORT": "9", "DMLC_NUM_WORKER": "2", "DMLC_NUM_SERVER": "1"}
    assert read(theirs) == environment.Environment("tcp://10.0.0.1:9", None, None, 2, 1)
    assert read({"DMLC_PS_ROOT_URI": "::1", "DMLC_PS_ROOT_PORT": "9"}).address == "tcp://[::1]:9"
    whole = environment.Environment("tcp://a:1", "server", 0, 2, 3)
    assert read(whole.variables()) == whole
    with pytest.raises(OptionError, match=r"KVSTORE_RANK.*'x'"):
        read({"KVSTORE_RANK": "x"})
    with pytest.raises(OptionError, match="KVSTORE_RANK"):
        read({"KVSTORE_RANK": "\N{SUPERSCRIPT TWO}"})
    with pytest.raises(OptionError, match=r"DMLC_ROLE.*'boss'"):
        read({"DMLC_ROLE": "boss"})
