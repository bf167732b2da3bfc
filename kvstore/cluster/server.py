"""A server as a running process: its place in the cluster, its lifetime, and the shards that it has.

What a shard does is said in :mod:`kvstore.cluster.shard`. All shards of a process live in one loop and share an engine.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import engine
from kvstore import kernels, optim
from kvstore.checkpoint.restoring import Restoring
from kvstore.cluster.address import reachable
from kvstore.cluster.near import Neighbourhood
from kvstore.cluster.session import SCHEDULER, Session
from kvstore.cluster.shard import Shard
from kvstore.errors import FencedError, KVStoreError, OptionError
from kvstore.protocol.messages import (
    NOBODY,
    Departed,
    Drain,
    Explain,
    HandedOver,
    InStep,
    Joined,
    Message,
    Placement,
    ReadPlacement,
    Replica,
    Standby,
)
from kvstore.protocol.messages import Shard as Placed
from kvstore.protocol.serving import Serving
from kvstore.transport.network import HEARTBEAT_S, Network
from kvstore.transport.zeromq import NETWORK

log = logging.getLogger(__name__)

IO_THREADS = 2  # one copies what comes from or goes to all workers at 4-5 GB/s
JOIN_TIMEOUT_S = 300.0
DRAIN_S = 30.0  # how long a server may take to hand over its shards
ASK_S = 5.0  # how often the scheduler is asked for the placement
ALIVE_S = 1.0  # how long the scheduler may take to say that it is there, before it is asked to arrange that
KERNELS_S = 5.0  # more than the first start on a machine needs to compile what the first round needs


class Server:
    """One server of a cluster.

    Args:
        address: the scheduler's.
        bind: where to listen; port ``*`` lets the system choose.
        advertise: the address that workers reach it by, if another than the bound one.
        rank: its number among the servers; None: any.
        neighbourhood: memory for values that workers of this host read in place; None: none is shared.
        restore: a checkpoint; new keys that it has begin with what it says.
        network: how others are reached, and reach it.
        runtime: the engine; None: the process's default.
        heartbeat: seconds after which a scheduler that shows no life is taken for gone, and connected anew.
    """

    def __init__(
        self,
        address: str,
        *,
        bind: str = "tcp://127.0.0.1:*",
        advertise: str | None = None,
        rank: int | None = None,
        neighbourhood: Neighbourhood | None = None,
        restore: Restoring | None = None,
        network: Network = NETWORK,
        runtime: engine.Engine | None = None,
        heartbeat: float = HEARTBEAT_S,
    ) -> None:
        self._heartbeat = heartbeat
        self._scheduler = reachable(address)
        self._wanted = NOBODY if rank is None else rank
        self._bind, self._advertise = bind, advertise
        self._engine = runtime or engine.default()
        self._network = network
        self._restore = restore
        self._neighbourhood = neighbourhood or Neighbourhood(0)
        self._reactor = network.loop("kvstore-server", self._tick, io_threads=IO_THREADS)
        try:
            self._own: Shard | None = self._listen()  # for the shard of this server's number, whose address is known
        except OptionError:
            self._reactor.abandon()
            raise
        assert self._own is not None
        self.address = self._own.address
        self.shards: dict[int, Shard] = {}  # by number
        self._session: Session | None = None
        self._gone: dict[int, Departed] = {}  # workers that are lost or have left
        self._moving: set[tuple[int, int]] = set()  # shards that are handed over, and the epoch
        self._asked: Future[Any] | None = None
        self._asked_at = 0.0
        self._refused: KVStoreError | None = None
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
        session = Session(
            self._scheduler, "server", self._changed, self._placed, network=self._network, heartbeat=self._heartbeat
        )
        self._session = session
        try:
            session.register(self._wanted, self.address, connect_timeout, JOIN_TIMEOUT_S)
            session.ask(SCHEDULER, ReadPlacement).result(JOIN_TIMEOUT_S)
        except BaseException:
            self.stop()
            raise
        kernels.wait(KERNELS_S)
        self._reactor.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until :meth:`stop` was called; False when ``timeout`` seconds passed first.

        Raises:
            FencedError: another server has taken over what this one had: it has stopped by itself.
        """
        stopped = self._stopped.wait(timeout)
        if self._refused is not None:
            raise self._refused
        return stopped

    def drain(self, timeout: float = DRAIN_S) -> None:
        """Hand over all shards to other servers, as far as there are any; then :meth:`stop`.

        Without an answer within ``timeout`` seconds it stops nevertheless.
        """
        session = self._session
        if session is not None and self.shards:
            with contextlib.suppress(KVStoreError, TimeoutError):
                session.ask(SCHEDULER, lambda i: Explain(i, 0)).result(min(timeout, ALIVE_S))
                rank = session.sender.rank
                session.ask(SCHEDULER, lambda i: Drain(i, rank)).result(timeout)
        self.stop()

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

    # --- on the session's thread ----------------------------------------------------------------

    def _changed(self, change: Departed | Joined) -> None:
        self._reactor.post(lambda: self._take_change(change))

    def _placed(self, placement: Placement) -> None:
        self._reactor.post(lambda: self._place(placement))

    # --- in the loop ----------------------------------------------------------------------------

    def _take_change(self, change: Departed | Joined) -> None:
        """A member is gone, or a worker has joined."""
        if isinstance(change, Joined):
            self._gone.pop(change.rank, None)
        elif self._gone.get(change.rank) == change:
            return  # a reminder
        elif change.role == "worker":
            self._gone[change.rank] = change
        for shard in self.shards.values():
            shard.changed(change)

    def _place(self, placement: Placement) -> None:
        """Have those shards which the scheduler says."""
        assert self._session is not None
        me = self._session.sender.rank
        for number, placed in enumerate(placement.shards):
            chain = [placed.primary, *(replica.server for replica in placed.replicas)]
            if me not in chain:
                self._give_up(number)
                continue
            place = chain.index(me)
            if place:
                self._follow(number, placed.replicas[place - 1])
            else:
                self._lead(number, placed)
            self._replicate(number, placed.replicas[place] if placed.replicas[place:] else None)
            if not place:
                self._hand_over(number, placed)

    def _lead(self, number: int, placed: Placed) -> None:
        """It is this server's shard as primary."""
        shard = self.shards.get(number)
        if shard is None:
            self._have(number, placed.epoch, follow=False)
        elif shard.is_replica:
            log.info("shard %d: this server takes over, in epoch %d", number, placed.epoch)
            shard.take_over(placed.epoch)

    def _follow(self, number: int, replica: Replica) -> None:
        """It is this server's shard as replica."""
        shard = self.shards.get(number)
        if shard is not None and replica.in_step:  # then it goes on from what it has
            if not shard.is_replica:
                shard.step_down(self._core(shard), replica.epoch)
            elif shard.epoch != replica.epoch:
                shard.follow(replica.epoch)
            return
        if shard is None or not shard.is_replica or shard.epoch != replica.epoch:
            self._give_up(number)
            shard = self._have(number, replica.epoch, follow=True)
        self._tell(partial(Standby, shard=number, epoch=replica.epoch, address=shard.address))

    def _replicate(self, number: int, following: Replica | None) -> None:
        """Pass on the shard's log to this one."""
        shard = self.shards[number]
        if following is None or not following.address:
            if shard.replicated_in:
                log.warning("shard %d: the replica after this server is gone; here it goes on without one", number)
            shard.stop_replicating()
        elif shard.replicated_in != following.epoch:
            in_step = partial(InStep, shard=number, epoch=following.epoch)
            new = not following.in_step
            shard.replicate(following.epoch, following.address, lambda: self._tell(in_step), new=new)

    def _hand_over(self, number: int, placed: Placed) -> None:
        """Let another server be primary, if that is to be."""
        shard = self.shards[number]
        if not placed.moving:
            shard.go_on(self._gone.values())
        elif (number, placed.epoch) not in self._moving:
            self._moving.add((number, placed.epoch))
            shard.hand_over(lambda: self._tell(partial(HandedOver, shard=number, epoch=placed.epoch)))

    def _have(self, number: int, epoch: int, *, follow: bool) -> Shard:
        """A shard of this number, empty: it is new, or has a log to follow."""
        assert self._session is not None
        if number == self._session.sender.rank and self._own is not None:
            shard, self._own = self._own, None
        else:
            shard = self._listen()
        core = self._core(shard, None if follow else self._restore)
        shard.serve(self._session, core, epoch, self._step_back, follow=follow)
        self.shards[number] = shard
        return shard

    def _core(self, shard: Shard, restore: Restoring | None = None) -> Serving:
        assert self._session is not None
        name = f"server {self._session.sender.rank} at {shard.address}"
        if restore is None:
            return Serving(self._session.num_workers, optim.from_wire, name)
        core = Serving(self._session.num_workers, optim.from_wire, name, restore.piece)
        restore.begin(core.settings)
        return core

    def _give_up(self, number: int) -> None:
        shard = self.shards.pop(number, None)
        if shard is not None:
            shard.close()

    def _listen(self) -> Shard:
        return Shard(self._network, self._reactor, self._engine, self._neighbourhood, self._bind, self._advertise)

    def _tell(self, make: Callable[[int], Message]) -> None:
        """Tell the scheduler; it is sent until it has been answered."""
        assert self._session is not None
        with contextlib.suppress(KVStoreError):  # this server is about to stop
            self._session.ask(SCHEDULER, make)

    def _step_back(self, error: KVStoreError) -> None:
        """Another server has what this one had, and nobody told it: it was stopped, or cut off."""
        if self._refused is None:
            self._refused = FencedError(f"server at {self.address} steps back: {error}")
            log.warning("%s", self._refused)
            for shard in self.shards.values():
                shard.close()
            self._reactor.aside(self.stop)

    def _tick(self, now: float) -> None:
        for shard in self.shards.values():
            shard.tick(now)
        if self._session is not None and now >= self._asked_at + ASK_S and (self._asked is None or self._asked.done()):
            self._asked_at = now  # a change is told once, and may have been missed
            with contextlib.suppress(KVStoreError):
                self._asked = self._session.ask(SCHEDULER, ReadPlacement)
                self._asked.add_done_callback(self._answered)

    def _answered(self, asked: Future[Any]) -> None:
        error = asked.exception()
        if isinstance(error, FencedError):
            self._reactor.post(lambda: self._step_back(error))
