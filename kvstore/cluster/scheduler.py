"""The scheduler as a running process: a socket and a journal around :class:`kvstore.protocol.roster.Membership`."""

from __future__ import annotations

import logging
import math
import secrets
import threading
from pathlib import Path

from kvstore.cluster.address import advertised, split
from kvstore.cluster.journal import Journal
from kvstore.errors import OptionError, ProtocolError, to_wire
from kvstore.protocol.messages import HEADER_BYTES_MAX, NOBODY, Done, Failed, Message, Register
from kvstore.protocol.roster import Actions, Membership
from kvstore.protocol.wire import Sender, decode, envelope
from kvstore.transport.network import HEARTBEAT_S, Frames, Network
from kvstore.transport.zeromq import NETWORK

log = logging.getLogger(__name__)

GRACE = 1 / 6  # of the heartbeat's deadline: so long a connection that ended may take to come back
RETURN_S = 10.0  # so long the members may take to come back to a scheduler that was restarted, or stopped for a while

REMIND_S = 5.0  # so often everybody is told again who is lost

_ANYBODY_THERE = Done(0)  # answers no request: it is sent to see whether it can be


class Scheduler:
    """Keeps the roster and the barriers of one cluster.

    Args:
        bind: ``tcp://interface:port``; port ``*`` lets the system choose.
        num_workers, num_servers: how many the cluster is started with; at least one each.
        advertise: the address that others reach it by, if another than the bound one.
        journal: a file, or what it is open as; a scheduler that is started again with it goes on where the former one
            ended.
        heartbeat: seconds after which a member that shows no life is lost.
        network: how it is reached.
        replication: on how many servers beside its primary a shard is kept.

    Raises:
        OptionError: an address that cannot be bound, a wrong number, or a file that is no journal of such a cluster.
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
        journal: str | Path | Journal | None = None,
        heartbeat: float = HEARTBEAT_S,
    ) -> None:
        if num_workers < 1 or num_servers < 1:
            raise OptionError(
                f"a cluster: expected at least 1 worker and 1 server, got {num_workers} and {num_servers}"
            )
        self._replication = replication
        self._heartbeat_s = heartbeat
        self._grace_s = heartbeat * GRACE
        self._ticked_at = math.inf
        self._patient_until = 0.0  # until then nobody is lost
        self._unreachable: dict[bytes, float] = {}  # peer -> since when
        self._stopped = threading.Event()
        self._failure: OptionError | None = None
        self._journal = journal if isinstance(journal, Journal | None) else Journal(journal)
        self._reactor = network.loop("kvstore-scheduler", self._tick)
        try:
            self._endpoint = network.listen(
                self._reactor, self._receive, frame_bytes_max=HEADER_BYTES_MAX, watch=True, heartbeat_s=heartbeat
            )
            self._endpoint.on_disconnect = self._look_soon
            self.membership = self._begin(num_workers, num_servers)
            split(bind)  # for ZeroMQ port 70000 is port 4464
            self.address = advertised(self._endpoint.bind(bind), advertise)
        except OptionError:
            self._reactor.abandon()
            raise

    def __repr__(self) -> str:
        return f"<Scheduler at {self.address}: {len(self.membership.members)} members>"

    def _begin(self, num_workers: int, num_servers: int) -> Membership:
        def new() -> Membership:
            return Membership(secrets.randbits(62) | 1, num_workers, num_servers, replication=self._replication)

        if self._journal is None:
            return new()
        membership = self._journal.recover(new, self._reactor.now())
        if membership.members:
            log.warning("%s: going on with %d members", self._journal, len(membership.members))
            self._reactor.call_later(RETURN_S, lambda: self._send(membership.absent(self._reactor.now())))
        return membership

    def start(self) -> None:
        """Start to answer."""
        self._reactor.call_later(REMIND_S, self._remind)
        self._reactor.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until :meth:`stop` was called; False when ``timeout`` seconds passed first.

        Raises:
            OptionError: the journal cannot be written any more: it has stopped by itself.
        """
        stopped = self._stopped.wait(timeout)
        if self._failure is not None:
            raise self._failure
        return stopped

    def stop(self) -> None:
        """Stop answering. Safe from any thread and from a signal handler, more than once."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        self._reactor.stop(linger_s=0.2)
        if self._journal is not None:
            self._journal.close()

    # --- within the reactor's loop ----------------------------------------------------------------

    def _receive(self, peer: bytes, frames: Frames) -> None:
        try:
            _, messages = decode(frames[0], len(frames) - 1)
        except ProtocolError as error:
            self._send([(peer, Failed(0, *to_wire(error)))])
            return
        for message, _ in messages:
            if isinstance(message, Register):
                self._make_room(message)
            self._send(self.membership.handle(peer, message, self._reactor.now()))

    def _make_room(self, newcomer: Register) -> None:
        """Somebody wants that very rank: if whoever has it cannot be reached, its time is over."""
        former = self.membership.members.get((newcomer.role, newcomer.rank))
        if former is None or not former.connected or former.token == newcomer.token:
            return
        if not self._send_one(former.peer, _ANYBODY_THERE):
            self._send(self.membership.lost(former.peer))

    def _send(self, actions: Actions) -> None:
        if self._failure is not None:
            return
        if self._journal is not None and self.membership.has_news:
            try:
                self._journal.write(self.membership)
            except OptionError as error:
                log.error("%s", error)
                self._failure = error
                self._reactor.aside(self.stop)
                return
        for peer, message in actions:
            self._send_one(peer, message)

    def _send_one(self, peer: bytes, message: Message) -> bool:
        sender = Sender(self.membership.cluster, self.membership.epoch, NOBODY, NOBODY)
        return self._endpoint.send(peer, envelope(sender, [(message, ())]))

    def _tick(self, now: float) -> None:
        if (
            now > self._ticked_at + self._heartbeat_s
        ):  # this process was stopped: that the others fell silent is its own doing
            log.warning("%r: it was stopped for %.1f s; everybody may come back", self, now - self._ticked_at)
            self._patient_until = now + RETURN_S
        self._ticked_at = now
        self._send(self.membership.tick(now))

    def _remind(self) -> None:
        self._reactor.call_later(REMIND_S, self._remind)
        self._send(self.membership.reminders())

    def _look_soon(self) -> None:
        """A connection has ended: if it is not renewed soon, its member is lost."""
        self._reactor.call_later(self._grace_s / 2, self._look)

    def _look(self) -> None:
        """Who cannot be reached is lost, if that was so before."""
        now = self._reactor.now()
        peers = [member.peer for member in self.membership.connected]
        unreachable = [peer for peer in peers if not self._send_one(peer, _ANYBODY_THERE)]
        since = self._unreachable
        self._unreachable = {peer: since.get(peer, now) for peer in unreachable}
        for peer in unreachable:
            if now >= max(self._unreachable[peer] + self._grace_s / 2, self._patient_until):
                del self._unreachable[peer]
                self._send(self.membership.lost(peer))
        if self._unreachable:
            self._reactor.call_later(self._grace_s / 2, self._look)
