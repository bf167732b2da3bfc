"""A server's thread that makes a checkpoint of the whole cluster now and then.

It asks like any other (:mod:`kvstore.cluster.cuts`), over a connection of its own, and reads the pieces of all servers:
so one server needs the directory, the others need not even see it. Where several have one directory, whoever
comes first writes, and the others see that it has been done.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path

from kvstore.checkpoint import directory
from kvstore.cluster.cuts import Cuts
from kvstore.cluster.session import SCHEDULER, Session
from kvstore.errors import KVStoreError, UnreachableError
from kvstore.protocol.messages import ReadStatus, Status
from kvstore.transport.network import Network
from kvstore.transport.zeromq import NETWORK

log = logging.getLogger(__name__)

CONNECT_S = 10.0
TAKE_S = 300.0  # for a cut to be taken and read


class Periodic:
    """Checkpoints every so many seconds.

    Args:
        address: the scheduler's.
        path: the directory of checkpoints.
        every_s: seconds from one to the next.
        keep: how many are kept; None: all.
        network: how the cluster is reached.
    """

    def __init__(
        self,
        address: str,
        path: str | os.PathLike[str],
        every_s: float,
        keep: int | None,
        network: Network = NETWORK,
    ) -> None:
        self._address = address
        self._network = network
        self._path = Path(path)
        self._every_s = every_s
        self._keep = keep
        self._session: Session | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvstore-checkpoints", daemon=True)

    def __repr__(self) -> str:
        return f"<Periodic: a checkpoint in {self._path} every {self._every_s:g} s>"

    def start(self) -> None:
        """Begin; the first checkpoint is due in ``every_s`` seconds."""
        self._thread.start()

    def stop(self) -> None:
        """No more checkpoints; one that is being written is given up. More than once is fine."""
        self._stopped.set()
        session = self._session
        if session is not None:
            session.close(linger_s=0)
        if self._thread.is_alive():
            self._thread.join(5)

    def _run(self) -> None:
        while not self._stopped.wait(self._every_s):
            try:
                written = self.make()
            except KVStoreError as error:
                if not self._stopped.is_set():
                    log.warning("no checkpoint this time: %s", error)
            else:
                if written is not None:
                    log.info("checkpoint %s", written)

    def make(self) -> Path | None:
        """Make one now; None if there is nothing to save, or another server has just made one.

        Raises:
            KVStoreError: as :meth:`Cuts.take` and :func:`directory.write`.
        """
        known = directory.checkpoints(self._path)
        if known and time.time() - known[-1].stat().st_mtime < self._every_s / 2:
            return None
        session = self._session = Session(self._address, "observer", network=self._network)
        try:
            try:
                reply = session.ask(SCHEDULER, ReadStatus).result(CONNECT_S)
            except TimeoutError as error:
                raise UnreachableError(f"scheduler at {self._address}: no answer within {CONNECT_S:g} s") from error
            assert isinstance(reply, Status)
            if not any(worker["state"] == "here" for worker in reply.report["workers"]):
                return None
            session.servers = tuple(server["address"] for server in reply.report["servers"])
            session.connect_servers()
            cuts = Cuts(session)
            with cuts.take(*cuts.ask(), TAKE_S) as cut:
                if not cut.records:
                    return None
                return directory.write(self._path, cut, keep=self._keep, timeout_s=TAKE_S)
        finally:
            self._session = None
            session.close(linger_s=1.0)
