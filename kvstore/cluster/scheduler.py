"""The scheduler as a running process: a socket around :class:`kvstore.protocol.roster.Membership`."""

from __future__ import annotations

import logging
import secrets
import threading

from kvstore.cluster.address import advertised, split
from kvstore.errors import OptionError, ProtocolError, to_wire
from kvstore.protocol.messages import HEADER_BYTES_MAX, NOBODY, Failed, Message, Sender, decode, envelope
from kvstore.protocol.roster import Membership
from kvstore.transport.network import Frames, Network
from kvstore.transport.zeromq import NETWORK

log = logging.getLogger(__name__)

GRACE_S = 1.0  # a connection that ended may come back within this time


class Scheduler:
    """Keeps the roster and the barriers of one cluster.

    Args:
        bind: ``tcp://interface:port``; port ``*`` lets the system choose.
        num_workers, num_servers: how many the cluster has; at least one each.
        advertise: the address that others reach it by, if another than the bound one.
        network: how it is reached.
        replication: on how many servers beside its primary a shard is kept: 0 or 1.

    Raises:
        OptionError: an address that cannot be bound, or a wrong number.
    """

    def __init__(
        self,
        bind: str,
        num_workers: int,
        num_servers: int,
        *,
        advertise: str | None = None,
        network: Network = NETWORK,
        replication: int = 0,
    ) -> None:
        if num_workers < 1 or num_servers < 1:
            raise OptionError(
                f"a cluster: expected at least 1 worker and 1 server, got {num_workers} and {num_servers}"
            )
        self.membership = Membership(secrets.randbits(62) | 1, num_workers, num_servers, replication=replication)
        self._reactor = network.loop("kvstore-scheduler", self._tick)
        self._endpoint = network.listen(self._reactor, self._receive, frame_bytes_max=HEADER_BYTES_MAX, watch=True)
        self._endpoint.on_disconnect = self._disconnected
        try:
            split(bind)  # for ZeroMQ port 70000 is port 4464
            self.address = advertised(self._endpoint.bind(bind), advertise)
        except OptionError:
            self._reactor.abandon()
            raise
        self._peers: dict[int, bytes] = {}  # fd -> peer
        self._ended: dict[bytes, float] = {}  # peer -> when its connection ended
        self._stopped = threading.Event()

    def __repr__(self) -> str:
        return f"<Scheduler at {self.address}: {len(self.membership.members)} members>"

    def start(self) -> None:
        """Start to answer."""
        self._reactor.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until :meth:`stop` was called; False when ``timeout`` seconds passed first."""
        return self._stopped.wait(timeout)

    def stop(self) -> None:
        """Stop answering. Safe from any thread and from a signal handler, more than once."""
        self._stopped.set()
        self._reactor.stop(linger_s=0.2)

    def _receive(self, peer: bytes, frames: Frames, fd: int) -> None:
        sender = Sender(self.membership.cluster, self.membership.epoch, NOBODY, NOBODY)
        self._peers[fd] = peer
        try:
            _, messages = decode(frames[0], len(frames) - 1)
        except ProtocolError as error:
            self._endpoint.send(peer, envelope(sender, [(Failed(0, *to_wire(error)), ())]))
            return
        for message, _ in messages:
            self._send(self.membership.handle(peer, message, self._reactor.now()))

    def _send(self, actions: list[tuple[bytes, Message]]) -> None:
        sender = Sender(self.membership.cluster, self.membership.epoch, NOBODY, NOBODY)
        for peer, message in actions:
            self._endpoint.send(peer, envelope(sender, [(message, ())]))

    def _disconnected(self, fd: int) -> None:
        peer = self._peers.pop(fd, None)
        if peer is not None:
            self._ended[peer] = self._reactor.now()

    def _tick(self, now: float) -> None:
        for peer, ended in list(self._ended.items()):
            if now - ended >= GRACE_S:
                del self._ended[peer]
                self._send(self.membership.lost(peer))
