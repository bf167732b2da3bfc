"""Malformed messages against a running server and scheduler: ``python -m tests.cluster.flood --messages 100000``.

Two workers train meanwhile. At the end their weights must be right, and the daemons' memory as it was.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zmq

import kvstore
from kvstore.cluster.status import read_status
from kvstore.errors import ProtocolError
from kvstore.protocol.messages import Admit, Freeze, ReadCut
from kvstore.protocol.wire import Sender, decode
from tests.protocol import mutations

WORKERS = 2
LIMIT_S = 600.0
CONNECTION_MESSAGES = 500  # then a connection ends, and another comes
SAMPLES = 10  # of the daemons' memory


@dataclass(frozen=True)
class Outcome:
    """What a flood did: the daemons' memory after each tenth of it, in KiB, and what training came to."""

    sent: int
    seconds: float
    server_kb: list[int]
    scheduler_kb: list[int]
    rounds: int
    weights: list[float]
    errors: str  # what the daemons said on stderr

    @property
    def expected(self) -> float:
        return -float(WORKERS * self.rounds)


@contextlib.contextmanager
def daemon(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """A daemon, its address and what it says on stderr until it ends."""
    process = subprocess.Popen(
        [sys.executable, "-m", "kvstore", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(process.stderr or ()))
    reader.start()
    try:
        yield process, process.stdout.readline().split()[-1], said
        assert process.poll() is None, f"it ended with {process.returncode}"
    finally:
        process.terminate()
        process.wait(LIMIT_S)
        reader.join(LIMIT_S)
        process.stdout.close()
        process.stderr.close()


def train(address: str, rank: int, over: threading.Event, rounds: list[int]) -> float:
    """Rounds until ``over``, which both workers learn in the same round; the weight at the end."""
    with kvstore.create("dist", address=address, rank=rank, timeout=60) as kv:
        kv.init("w", np.zeros(5000, np.float32))
        kv.init("over", np.zeros(1, np.float32))
        kv.set_optimizer(kvstore.optim.SGD(lr=1.0))
        gradient, weights, before = np.ones(5000, np.float32), np.empty(5000, np.float32), np.float32(0)
        while True:
            kv.pushpull("w", gradient, out=weights).result()
            rounds[rank] += 1
            told = kv.pushpull("over", np.full(1, over.is_set(), np.float32), out=np.empty(1, np.float32)).result()
            if told[0] != before:
                assert (weights == weights[0]).all()
                return float(weights[0])


def harmless(frames: list[bytes], cluster: int) -> bool:
    """Would it not pass for a worker's own? Without keys, whoever knows the cluster's number is believed."""
    try:
        sender, rows = decode(frames[0], len(frames) - 1)
    except ProtocolError:
        return True
    if any(isinstance(row, ReadCut) for row, _ in rows):
        return False
    joins = any(isinstance(row, Freeze | Admit) for row, _ in rows)
    return sender.cluster != cluster or sender.rank < 0 or (sender.rank >= WORKERS and not joins)


def flood(targets: list[str], cluster: int, count: int, seed: int) -> Iterator[int]:
    """Send so many messages; yields how many there have been."""
    rng = random.Random(seed)
    context = zmq.Context()
    sent = 0
    while sent < count:
        target = rng.choice(targets)
        with contextlib.suppress(OSError), socket.create_connection(target.removeprefix("tcp://").split(":"), 5) as raw:
            raw.sendall(rng.randbytes(200))
        reads = rng.random() < 0.7
        with context.socket(zmq.DEALER) as dealer:
            dealer.linger = 5000
            dealer.sndtimeo = 10_000
            dealer.connect(target)
            for _ in range(min(CONNECTION_MESSAGES, count - sent)):
                sender = Sender(
                    rng.choice([0, 1, cluster, cluster]), 1, rng.choice([-1, 0, 1, 2, 3]), rng.randrange(-1, 3)
                )
                frames = mutations.mutated(rng, mutations.envelope(rng, sender))
                while not harmless(frames, cluster):
                    frames = mutations.mutated(rng, frames)
                dealer.send_multipart(frames)
                sent += 1
                with contextlib.suppress(zmq.Again):
                    while reads:
                        dealer.recv_multipart(zmq.NOBLOCK)
        yield sent
    context.term()


def resident_kb(process: subprocess.Popen[str]) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


def run(count: int, seed: int = 0) -> Outcome:
    """A cluster of real daemons under ``count`` malformed messages."""
    over, rounds = threading.Event(), [0] * WORKERS
    with (
        daemon("scheduler", "--bind", "tcp://127.0.0.1:*", "-w", str(WORKERS), "-s", "1") as (scheduler, address, said),
        daemon("server", "--address", address) as (server, server_address, server_said),
        ThreadPoolExecutor(WORKERS) as pool,
    ):
        training = [pool.submit(train, address, rank, over, rounds) for rank in range(WORKERS)]
        try:
            while min(rounds) < 10 and not any(one.done() for one in training):
                threading.Event().wait(0.05)
            cluster = int(read_status(address)["cluster"], 16)
            begun, server_kb, scheduler_kb = time.monotonic(), [], []
            for sent in flood([server_address, server_address, address], cluster, count, seed):
                if sent * SAMPLES >= count * (len(server_kb) + 1):
                    server_kb.append(resident_kb(server))
                    scheduler_kb.append(resident_kb(scheduler))
            seconds = time.monotonic() - begun
        finally:
            over.set()
        weights = [one.result(LIMIT_S) for one in training]
    assert rounds[0] == rounds[1]
    return Outcome(count, seconds, server_kb, scheduler_kb, rounds[0], weights, "".join(said + server_said))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    outcome = run(options.messages, options.seed)
    print(outcome)
    return 0 if outcome.weights == [outcome.expected] * WORKERS and not outcome.errors else 1


if __name__ == "__main__":
    sys.exit(main())
