"""Minutes of training with a fault every few seconds, in real processes: nothing is lost, and no memory grows.

Workers push in rounds, sequentially; each adds 1 to an element of its own per round. So after round n every element
is n, or a push has been lost or doubled, and the worker that reads it says so. What may happen: a worker is killed
and comes back (policy ``wait``), a worker is stopped and goes on, the scheduler is killed and comes back from its
journal; with replication a server is killed and comes back, or is stopped for longer than its deadline.

``python -m tests.faults.soak --minutes 20 --replication 1``; the seed decides the faults, not their moments.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from kvstore.cluster.status import read_status
from tests.faults.processes import Processes

BODY = """
KEYS, ITEMS = ["a", "b", "c"], {items}
kv = kvstore.create("dist", on_worker_loss="wait", timeout=120)
kv.set_optimizer(kvstore.optim.SGD(lr=1.0))
size = kv.num_workers * ITEMS
kv.init(KEYS, [np.zeros(size, np.float32) for _ in KEYS])
gradient = np.zeros(size, np.float32)
gradient[kv.rank * ITEMS : (kv.rank + 1) * ITEMS] = -1
done = min(kv.rounds(key) for key in KEYS)
say("begins", done)
while True:
    slowest = time.monotonic()
    behind = [key for key in KEYS if kv.rounds(key) == done]
    for value in kv.pushpull(behind, [gradient] * len(behind), [np.empty_like(gradient) for _ in behind]).result():
        if not (value == done + 1).all():
            say("wrong", done + 1, sorted(set(value.tolist())))
            sys.exit(3)
    done += 1
    say("round", done, round(time.monotonic() - slowest, 3))
    with open({stop!r}) as file:
        if done >= int(file.read() or 10**12):
            break
    time.sleep({pause})
say("total", done)
kv.close()
"""


class Soak:
    """One run."""

    def __init__(self, workers: int, servers: int, replication: int, seed: int, items: int, folder: Path) -> None:
        self.rng = random.Random(seed)
        self.workers, self.servers, self.replication = workers, servers, replication
        self.stop_file = folder / "stop"
        self.stop_file.write_text("")
        extra = ["--replication", str(replication)] if replication else []
        self.cluster = Processes(workers, servers, folder, *extra)
        self.body = BODY.format(items=items, stop=str(self.stop_file), pause=0.02)
        self.running = {rank: self.cluster.worker(self.body, rank) for rank in range(workers)}
        self.faults: dict[str, int] = {}
        self.memory: dict[str, list[int]] = {}

    def round(self, rank: int) -> int:
        """The last one that this worker has told of."""
        child = self.running[rank]
        with child._news:
            child.lines += child._came
            child._came.clear()
        told = [line for line in child.lines if line.startswith(("round", "begins"))]
        child.lines = [line for line in child.lines if not line.startswith("round")] + told[-1:]
        return int(told[-1].split()[1]) if told else 0

    def fault(self) -> None:
        """One of those that may happen, and its end."""
        kinds: list[tuple[str, Callable[[], None]]] = [
            ("worker killed", self._kill_worker),
            ("worker stopped for a moment", self._stop_worker),
            ("scheduler killed", self._kill_scheduler),
        ]
        if self.replication:
            kinds += [("server killed", self._kill_server), ("server stopped", self._stop_server)]
        name, do = self.rng.choice(kinds)
        self.faults[name] = self.faults.get(name, 0) + 1
        do()

    def _kill_worker(self) -> None:
        rank = self.rng.randrange(self.workers)
        self.running[rank].kill()
        self.running[rank] = self.cluster.worker(self.body, rank)

    def _stop_worker(self) -> None:
        child = self.running[self.rng.randrange(self.workers)]
        child.signal(signal.SIGSTOP)
        time.sleep(self.rng.uniform(0.1, 1.0))
        child.signal(signal.SIGCONT)

    def _kill_scheduler(self) -> None:
        self.cluster.scheduler.kill()
        time.sleep(self.rng.uniform(0.0, 2.0))
        self.cluster.start_scheduler()

    def _kill_server(self) -> None:
        number = self.rng.randrange(self.servers)
        self.cluster.servers[number].kill()
        time.sleep(self.rng.uniform(0.0, 2.0))
        self.cluster.server(number)

    def _stop_server(self) -> None:
        """For longer than its deadline: it steps back when it goes on, and is started anew."""
        number = self.rng.randrange(self.servers)
        child = self.cluster.servers[number]
        child.signal(signal.SIGSTOP)
        time.sleep(6.0)
        child.signal(signal.SIGCONT)
        assert child.ends() != 0
        self.cluster.server(number)

    def whole(self) -> bool:
        """Is every shard at home, with a replica in step?"""
        shards = read_status(self.cluster.address)["shards"]
        return all(shard["primary"] == n and shard["settled"] for n, shard in enumerate(shards))

    def measure(self) -> None:
        """Private memory of everybody who is alive, in KiB."""
        for child in self.cluster.children:
            if child.popen.poll() is None:
                status = Path(f"/proc/{child.popen.pid}/status").read_text()
                held = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))
                self.memory.setdefault(f"{child.name} ({child.popen.pid})", []).append(held)

    def run(self, minutes: float, every_s: float) -> int:
        """The exit code."""
        began = time.monotonic()
        try:
            while any(self.round(rank) < 5 for rank in self.running):
                time.sleep(0.2)
                self._check(began)
            while time.monotonic() - began < 60 * minutes:
                self.fault()
                reached, since = {rank: self.round(rank) for rank in self.running}, time.monotonic()
                time.sleep(self.rng.uniform(0.5, 1.5) * every_s)
                while any(self.round(rank) <= reached[rank] for rank in self.running):  # everybody goes on
                    time.sleep(0.1)
                    self._check(since)
                while self.replication and not self.whole():  # or else the next fault might take the last holder
                    time.sleep(0.2)
                    self._check(since)
                self.measure()
            last = max(self.round(rank) for rank in self.running) + 100
            self.stop_file.write_text(str(last))
            totals = [int(child.line("total", 300.0).split()[1]) for child in self.running.values()]
            codes = [child.ends() for child in self.running.values()]
            self.report(totals, time.monotonic() - began)
            return 0 if not any(codes) and len(set(totals)) == 1 else 1
        finally:
            self.cluster.stop()

    def _check(self, since: float) -> None:
        for rank, child in self.running.items():
            if child.popen.poll() is not None or time.monotonic() - since > 150:
                others = {c.name: [*c.lines, *c._came][-8:] for c in self.cluster.children if c is not child}
                raise AssertionError(
                    f"worker {rank} has ended or hangs: {[*child.lines, *child._came][-30:]}\nothers: {others}"
                )

    def report(self, totals: list[int], seconds: float) -> None:
        """What has happened."""
        print(f"{seconds / 60:.1f} minutes, rounds by worker {totals}, every value right in every round")
        print("faults:", ", ".join(f"{count} times {name}" for name, count in sorted(self.faults.items())))
        print(
            "private memory in MiB, of those who lived for at least ten looks: after the first three, at most, at last"
        )
        for name, held in self.memory.items():
            if len(held) >= 10:
                print(f"  {name}: {held[3] >> 10}, {max(held) >> 10}, {held[-1] >> 10}")


def main() -> int:
    """From the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--every", type=float, default=4.0, help="seconds between faults")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--replication", type=int, default=0)
    parser.add_argument("--items", type=int, default=20_000, help="of each of the three keys, per worker")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(options.workers, options.servers, options.replication, options.seed, options.items, Path(folder))
        return soak.run(options.minutes, options.every)


if __name__ == "__main__":
    sys.exit(main())
