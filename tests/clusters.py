"""A whole cluster inside the test's process: real sockets on loopback, every member on its own threads."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import kvstore
from kvstore.checkpoint.restoring import Restoring
from kvstore.cluster.keys import network
from kvstore.cluster.near import Neighbourhood
from kvstore.cluster.scheduler import Scheduler
from kvstore.cluster.server import Server

DEADLINE_S = 60.0


class Cluster:
    """A running scheduler with its servers; :meth:`run` runs a function as each of the workers.

    Args:
        restore: a checkpoint that the servers begin with.
        keys: the directory of the cluster's keys.
        replication: how many replicas a shard has.
    """

    def __init__(
        self,
        workers: int,
        servers: int,
        restore: Path | None = None,
        keys: Path | None = None,
        replication: int = 0,
    ) -> None:
        self.workers = workers
        self.scheduler = Scheduler(
            "tcp://127.0.0.1:*", workers, servers, replication=replication, network=network(keys)
        )
        self.scheduler.start()
        self.servers = [
            Server(
                self.address,
                neighbourhood=Neighbourhood(),
                network=network(keys),
                restore=None if restore is None else Restoring(restore),
            )
            for _ in range(servers)
        ]
        self._starting = [threading.Thread(target=self._start, args=(server,)) for server in self.servers]
        for thread in self._starting:
            thread.start()

    @property
    def address(self) -> str:
        return self.scheduler.address

    @staticmethod
    def _start(server: Server) -> None:
        with contextlib.suppress(kvstore.errors.ClosedError):  # stopped before the cluster was complete
            server.start()

    def run(self, work: Callable[[kvstore.KVStore], Any], **options: Any) -> list[Any]:
        """The results of ``work(store)`` in every worker, by rank; raises the first error."""
        options.setdefault("timeout", DEADLINE_S)

        def worker(rank: int) -> Any:
            with kvstore.create("dist", address=self.address, rank=rank, **options) as store:
                return work(store)

        with ThreadPoolExecutor(self.workers) as pool:
            running = [pool.submit(worker, rank) for rank in range(self.workers)]
            errors = [future.exception(DEADLINE_S) for future in running]
        for error in sorted(filter(None, errors), key=lambda e: isinstance(e, kvstore.WorkerLostError)):
            raise error
        return [future.result() for future in running]

    def stop(self) -> None:
        for server in self.servers:
            server.stop()
        self.scheduler.stop()
        for thread in self._starting:
            thread.join(DEADLINE_S)


@contextlib.contextmanager
def cluster(
    workers: int = 2,
    servers: int = 1,
    restore: Path | None = None,
    keys: Path | None = None,
    replication: int = 0,
) -> Iterator[Cluster]:
    running = Cluster(workers, servers, restore, keys, replication)
    try:
        yield running
    finally:
        running.stop()


def at_once(*jobs: Callable[[], Any]) -> list[Any]:
    """Run ``jobs`` on a thread each; their results."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result(DEADLINE_S) for future in [pool.submit(job) for job in jobs]]
