"""``kvstore run``: what it prints, what it returns, and that nothing outlives it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

LIMIT_S = 60
SECONDS_TO_END = 15  # far above what it takes, far below any deadline of the store
KVSTORE = [sys.executable, "-m", "kvstore"]

TRAIN = """
import os, sys
import numpy as np, kvstore
with kvstore.create("dist", timeout=60) as kv:
    kv.init("w", np.zeros(4, np.float32))
    {body}
"""
STEP = "kv.pushpull('w', np.ones(4, np.float32)).result()"


def worker(body: str) -> list[str]:
    return ["--", sys.executable, "-c", TRAIN.format(body=body)]


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*KVSTORE, "run", *arguments], capture_output=True, text=True, timeout=LIMIT_S, **options)


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A launched cluster; killed at the end if it should still be there."""
    process = subprocess.Popen([*KVSTORE, "run", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=LIMIT_S)


def wait_for_line(process: subprocess.Popen[str], text: str) -> None:
    for line in process.stdout:
        if text in line:
            return
    pytest.fail(f"no line with {text!r}: {process.stderr.read()}")


def descendants(mark: str) -> list[int]:
    """Processes that carry ``mark`` in their command line or environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z" and mark.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
    return found


def gone(mark: str) -> bool:
    end = time.monotonic() + SECONDS_TO_END
    while descendants(mark):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)  # between looks
    return True


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """An environment variable by which all processes of the test are known; none may be left."""
    text = f"KVSTORE_TEST_MARK={os.getpid()}-{request.node.name}"
    monkeypatch.setenv(*text.split("="))
    yield text
    assert gone(text), descendants(text)


def test_output_has_prefixes_and_whole_lines(mark):
    body = "print('hello [bold]' + 'x' * 300); print('oops', file=sys.stderr)"
    done = run("-w", "2", "-s", "2", *worker(f"{STEP}; {body}"))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for rank in range(2):
        assert f"worker {rank} | hello [bold]" + "x" * 300 in lines
        assert f"worker {rank} | oops" in done.stderr.splitlines()
    assert any(line.startswith("scheduler | scheduler at tcp://127.0.0.1:") for line in lines)
    assert any(line.startswith("server 1 | server at tcp://") for line in lines)


def test_ranks_and_sizes_reach_the_workers(mark):
    said = "kv.rank == int(os.environ['KVSTORE_RANK']), kv.num_workers, os.environ['KVSTORE_NUM_SERVERS']"
    body = f"print({said}); kv.barrier()"  # so that nobody has left before
    done = run("-w", "2", "-s", "2", *worker(body))
    assert done.stdout.count("True 2 2") == 2


def test_the_servers_of_the_output_are_the_servers_of_the_errors(mark):
    done = run("-w", "1", "-s", "3", *worker("print('servers', *kv._home._session.servers)"))
    (said,) = [line for line in done.stdout.splitlines() if line.startswith("worker 0 | servers ")]
    for number, address in enumerate(said.split()[4:]):
        assert f"server {number} | server at {address}" in done.stdout.splitlines()


def test_a_worker_that_raises_stops_everything_and_gives_its_code(mark):
    begin = time.monotonic()
    done = run("-w", "3", *worker(f"{STEP}; kv.rank == 1 and sys.exit(7); [{STEP} for _ in range(10**9)]"))
    assert time.monotonic() - begin < LIMIT_S
    assert done.returncode in (1, 7)  # 1: another worker ended first, because it was told that worker 1 is lost
    assert "stopping everything" in done.stderr
    alone = run("-w", "1", *worker("raise RuntimeError('out of coffee')"))
    assert alone.returncode == 1
    assert "worker 0 | RuntimeError: out of coffee" in alone.stderr
    assert "kvstore run: worker 0 ended with code 1" in alone.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_everything_within_seconds(mark, number, code):
    with running("-w", "2", *worker(f"print('ready'); [{STEP} for _ in range(10**9)]")) as process:
        wait_for_line(process, "ready")
        process.send_signal(number)
        assert process.wait(SECONDS_TO_END) == code
        assert signal.Signals(number).name in process.stderr.read()


def test_a_killed_launcher_leaves_no_orphan(mark):
    with running("-w", "2", *worker(f"print('ready'); [{STEP} for _ in range(10**9)]")) as process:
        wait_for_line(process, "ready")
        process.kill()
        assert gone(mark)


@pytest.mark.parametrize("role", ["worker", "server", "scheduler"])
def test_a_killed_member_stops_everything_with_a_reason(mark, role):
    body = f"print('ready'); [{STEP} for _ in range(10**9)]"
    with running("-w", "2", *worker(body)) as process:
        wait_for_line(process, "ready")
        wait_for_line(process, "ready")
        marks = {"worker": "KVSTORE_RANK=1", "server": "KVSTORE_ROLE=server", "scheduler": ""}
        victims = [pid for pid in descendants(mark) if pid != process.pid]
        for pid in victims:
            environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if (role == "scheduler" and b"scheduler" in command) or (
                role != "scheduler" and marks[role].encode() in environ
            ):
                os.kill(pid, signal.SIGKILL)
                break
        else:
            pytest.fail(f"no {role} among {victims}")
        assert process.wait(SECONDS_TO_END) != 0
        assert "stopping everything" in process.stderr.read()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--servers", "0", "--", "true"], "--servers 0"),
        (["-w", "0", "--", "true"], "--workers 0"),
        (["-w", "1"], "expected a command"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_reason(arguments, reason):
    done = run(*arguments)
    assert done.returncode == 2
    assert reason in done.stderr


def test_a_command_that_does_not_exist(mark):
    done = run("-w", "1", "--", "/no/such/program")
    assert done.returncode == 127
    assert "/no/such/program" in done.stderr
