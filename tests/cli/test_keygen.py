"""``kvstore keygen``, and a protected cluster of real processes."""

from __future__ import annotations

import subprocess
import sys

import pytest

LIMIT_S = 60
KVSTORE = [sys.executable, "-m", "kvstore"]
TRAIN = """
import sys, numpy as np, kvstore
with kvstore.create("dist", connect_timeout=10, keys=sys.argv[1] if len(sys.argv) > 1 else None) as kv:
    kv.init("w", np.zeros(10, np.float32))
    print(kv.pushpull("w", np.ones(10, np.float32)).result()[0])
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*KVSTORE, *arguments], capture_output=True, text=True, timeout=LIMIT_S)


@pytest.fixture
def keys(tmp_path) -> str:
    place = str(tmp_path / "keys")
    done = run("keygen", place, "--client", "alice", "--client", "bob")
    assert done.returncode == 0 and f"{place}/alice/client.key_secret" in done.stdout.splitlines()
    return place


def test_a_protected_cluster_of_processes(keys):
    done = run("run", "-w", "2", "--keys", keys, "--", sys.executable, "-c", TRAIN, f"{keys}/alice")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines())[-2:] == ["worker 0 | 2.0", "worker 1 | 2.0"]


def test_who_is_revoked_is_refused(keys):
    assert run("keygen", keys, "--revoke", "bob").returncode == 0
    done = run("run", "-w", "1", "--keys", keys, "--", sys.executable, "-c", TRAIN, f"{keys}/bob")
    assert done.returncode != 0
    assert "AuthenticationError" in done.stderr and "revoked" in done.stderr
    assert done.stderr.count("refused a peer") == 1


@pytest.mark.parametrize("arguments", [(), ("--client", "alice"), ("--revoke", "carol"), ("--client", "a/b")], ids=str)
def test_failures_are_one_line(keys, arguments):
    done = run("keygen", keys, *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("kvstore: ") and done.stderr.count("\n") == 1
