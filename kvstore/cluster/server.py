"""A server as a running process: its place in the cluster, its lifetime, and the shards that it has.

What a shard does is said in :mod:`kvstore.cluster.shard`. All shards of a process live in one loop and share an engine.
"""

from __future__ import annotations

import threading

import engine
from kvstore import kernels, optim
from kvstore.cluster.address import reachable
from kvstore.cluster.near import Neighbourhood
from kvstore.cluster.session import Session
from kvstore.cluster.shard import Shard
from kvstore.errors import OptionError
from kvstore.protocol.messages import NOBODY, Departed
from kvstore.protocol.serving import Serving
from kvstore.transport.network import Network
from kvstore.transport.zeromq import NETWORK

IO_THREADS = 2  # one copies what comes from or goes to all workers at 4-5 GB/s
JOIN_TIMEOUT_S = 300.0
KERNELS_S = 5.0  # more than the first start on a machine needs to compile what the first round needs


class Server:
    """One server of a cluster.

    Args:
        address: the scheduler's.
        bind: where to listen; port ``*`` lets the system choose.
        advertise: the address that workers reach it by, if another than the bound one.
        rank: its number among the servers; None: any.
        neighbourhood: memory for values that workers of this host read in place; None: none is shared.
        network: how others are reached, and reach it.
        runtime: the engine; None: the process's default.
    """

    def __init__(
        self,
        address: str,
        *,
        bind: str = "tcp://127.0.0.1:*",
        advertise: str | None = None,
        rank: int | None = None,
        neighbourhood: Neighbourhood | None = None,
        network: Network = NETWORK,
        runtime: engine.Engine | None = None,
    ) -> None:
        self._scheduler = reachable(address)
        self._wanted = NOBODY if rank is None else rank
        self._engine = runtime or engine.default()
        self._neighbourhood = neighbourhood or Neighbourhood(0)
        self._network = network
        self._reactor = network.loop("kvstore-server", io_threads=IO_THREADS)
        try:
            self._own = Shard(network, self._reactor, self._engine, self._neighbourhood, bind, advertise)
        except OptionError:
            self._reactor.abandon()
            raise
        self.address = self._own.address
        self.shards: dict[int, Shard] = {}  # by number
        self._session: Session | None = None
        self._stopped = threading.Event()
        self._retained = False

    def __repr__(self) -> str:
        return f"<Server at {self.address}: {self.shards}>"

    def start(self, connect_timeout: float = 30.0) -> None:
        """Join the cluster and start to answer.

        Raises:
            UnreachableError: no scheduler at the address.
            PeerError: the scheduler refused.
        """
        kernels.prepare()
        self._engine.retain()
        self._retained = True
        session = Session(self._scheduler, "server", self._departed, network=self._network)
        self._session = session
        try:
            session.register(self._wanted, self.address, connect_timeout, JOIN_TIMEOUT_S)
        except BaseException:
            self.stop()
            raise
        name = f"server {session.sender.rank} at {self.address}"
        self._own.serve(session, Serving(session.num_workers, optim.from_wire, name))
        self.shards[session.sender.rank] = self._own
        kernels.wait(KERNELS_S)
        self._reactor.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until :meth:`stop` was called; False when ``timeout`` seconds passed first."""
        return self._stopped.wait(timeout)

    def stop(self) -> None:
        """Stop answering. Safe from any thread, more than once."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        if self._session is not None:
            self._session.leave()
        self._reactor.stop(linger_s=0.2)
        self._neighbourhood.close()
        if self._retained:
            self._engine.release()

    def _departed(self, gone: Departed) -> None:
        def tell() -> None:
            for shard in self.shards.values():
                shard.departed(gone)

        if gone.role == "worker":
            self._reactor.post(tell)
