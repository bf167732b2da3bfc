"""What a running cluster says about itself."""

from __future__ import annotations

import contextlib
from typing import Any

from kvstore.cluster.session import SCHEDULER, Session
from kvstore.errors import KVStoreError, UnreachableError
from kvstore.protocol.messages import Drain, ReadStatus, Status
from kvstore.transport.network import Network
from kvstore.transport.zeromq import NETWORK


def drain(address: str, rank: int, timeout: float, network: Network = NETWORK) -> None:
    """Have all that server ``rank`` has handed over to other servers, as far as there are any.

    Raises:
        UnreachableError: not done within ``timeout`` seconds.
        DisagreementError: there is no such server.
    """
    session = Session(address, "observer", network=network)
    try:
        session.ask(SCHEDULER, lambda i: Drain(i, rank)).result(timeout)
    except TimeoutError as error:
        raise UnreachableError(f"drain of server {rank}: not done after {timeout:g} s") from error
    finally:
        session.close(linger_s=0)


def read_status(address: str, timeout: float = 5.0, network: Network = NETWORK) -> dict[str, Any]:
    """Ask the scheduler at ``address``, and each server it knows, about themselves.

    Returns:
        The scheduler's report: cluster, epoch, num_workers, num_servers and the lists ``workers`` and
        ``servers``; servers also have ``keys`` and ``bytes`` (None when one does not answer, as none
        does before the cluster is complete).

    Raises:
        UnreachableError: no scheduler answered within ``timeout`` seconds.
        AuthenticationError: it and this process do not accept each other's keys.
    """
    session = Session(address, "observer", network=network)
    try:
        try:
            reply = session.ask(SCHEDULER, ReadStatus).result(timeout)
        except TimeoutError as error:
            raise session.no_answer(timeout) from error
        assert isinstance(reply, Status)
        report = reply.report
        for server in report["servers"]:
            server.update(keys=None, bytes=None)
        if len(report["workers"]) < report["num_workers"] or len(report["servers"]) < report["num_servers"]:
            return report
        rows = {server["rank"]: server for server in report["servers"]}
        session.servers = tuple(shard["address"] or "tcp://127.0.0.1:1" for shard in report["shards"])  # lost: nobody
        session.connect_servers()
        asked = [session.ask(number, ReadStatus) for number in range(len(session.servers))]
        for shard, answer in zip(report["shards"], asked, strict=True):
            server = rows.get(shard["primary"])
            if server is None:
                continue
            with contextlib.suppress(TimeoutError, KVStoreError):
                own = answer.result(timeout if server["state"] == "here" else 0.1)
                if isinstance(own, Status):
                    for what in ("keys", "bytes"):
                        server[what] = (server[what] or 0) + own.report[what]
        return report
    finally:
        session.close(linger_s=0)
