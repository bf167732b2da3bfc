"""Which server has which shard, as the scheduler decides it. Pure.

There are as many shards as the cluster has servers, and shard n is at home on server n. A shard has a *primary*, which
answers for it, and with replication a *replica*: the next live server after the primary, by rank. What follows from a
change is decided in one place, :meth:`Placing._settle`:

- a lost primary's replica becomes primary, if it was in step; else the shard is lost;
- a shard whose primary is not where it should be (its home has come back; its primary drains) gets the server where it
  should be as its replica, and is handed over when that is in step;
- a shard without a replica, when it is to have one, gets one; a shard with nobody left to have it stays alone.

Every appointment has a new epoch. What a server says about an older one is ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from kvstore.errors import OptionError
from kvstore.protocol.messages import NOBODY, Drain, Message, Placement, Shard


@dataclass(slots=True)
class Placing:
    """The shards of a cluster.

    Args:
        replication: on how many servers beside its primary a shard is kept: 0 or 1.

    Raises:
        OptionError: another number, or more servers than there are.
    """

    num_servers: int
    replication: int = 0
    epoch: int = 1
    shards: list[Shard] = field(default_factory=list)  # by number; none before everybody has come
    servers: dict[int, str] = field(default_factory=dict)  # those that are here, with the address of their own shard
    draining: set[int] = field(default_factory=set)
    alone: set[int] = field(default_factory=set)  # shards that should have a replica, and nobody is there to be it

    def __post_init__(self) -> None:
        if self.replication not in (0, 1):
            raise OptionError(f"replication: expected 0 or 1, got {self.replication!r}")
        if self.replication >= self.num_servers:
            raise OptionError(
                f"replication {self.replication}: expected more servers than that, got {self.num_servers}"
            )

    @property
    def begun(self) -> bool:
        """Has everybody come?"""
        return bool(self.shards)

    def awaits(self, rank: int) -> bool:
        """May a server take this rank, whose server is gone? Only if another one has its shard."""
        return self.begun and rank not in self.servers and self.shards[rank].primary != NOBODY

    def arrived(self, rank: int, address: str) -> bool:
        """A server is here. True when the placement has changed, as for all that follow."""
        self.servers[rank] = address
        if self.begun:
            return self._settle()
        if len(self.servers) < self.num_servers:
            return False
        self.shards = [Shard(self.epoch, n, self.servers[n], NOBODY, "", False, False) for n in range(self.num_servers)]
        self._settle()
        return True

    def gone(self, rank: int) -> bool:
        """A server has left or is lost."""
        self.servers.pop(rank, None)
        self.draining.discard(rank)
        return self._settle()

    def drain(self, rank: int) -> bool:
        """A server is to hand over what it has."""
        self.draining.add(rank)
        return self._settle()

    def drained(self, rank: int) -> bool:
        """Has it nothing any more, or nobody to hand it over to?"""
        return all(shard.primary != rank or self._home(number) == rank for number, shard in enumerate(self.shards))

    def standby(self, rank: int, number: int, epoch: int, address: str) -> bool:
        """A replica says where its log may be sent."""
        shard = self._current(number, epoch)
        if shard is None or shard.replica != rank or shard.replica_address == address:
            return False
        self.shards[number] = replace(shard, replica_address=address)
        return True

    def in_step(self, rank: int, number: int, epoch: int) -> bool:
        """A primary says that its replica may take over."""
        shard = self._current(number, epoch)
        if shard is None or shard.primary != rank or shard.in_step:
            return False
        self.shards[number] = replace(shard, in_step=True)
        self._settle()
        return True

    def handed_over(self, rank: int, number: int, epoch: int) -> bool:
        """A primary says that its replica has everything, and that it takes in nothing more."""
        shard = self._current(number, epoch)
        if shard is None or shard.primary != rank or not shard.moving:
            return False
        self._promote(number)
        self._settle()
        return True

    def lost(self) -> list[int]:
        """The shards that nobody has any more."""
        return [number for number, shard in enumerate(self.shards) if shard.primary == NOBODY]

    def of(self, rank: int) -> tuple[list[int], list[int]]:
        """The shards that a server has as primary, and as replica."""
        return (
            [number for number, shard in enumerate(self.shards) if shard.primary == rank],
            [number for number, shard in enumerate(self.shards) if shard.replica == rank],
        )

    def records(self) -> list[Message]:
        """All that :meth:`recover` needs to go on from here, but for who is here; as messages, so that it can be kept
        in their form.
        """
        return [Placement(0, self.epoch, tuple(self.shards)), *(Drain(0, rank) for rank in sorted(self.draining))]

    def recover(self, records: Iterable[Message], servers: Mapping[int, str]) -> None:
        """Be what :meth:`records` told of, with these servers here. Nothing has changed: it was settled then."""
        self.servers = dict(servers)
        for message in records:
            match message:
                case Placement(_, epoch, shards):
                    self.epoch, self.shards = epoch, list(shards)
                case Drain(_, rank):
                    self.draining.add(rank)

    # --- decisions ------------------------------------------------------------------------------

    def _settle(self) -> bool:
        before = list(self.shards)
        self.alone.clear()
        for number in range(len(self.shards)):
            if self.shards[number].primary not in self.servers:
                self._promote(number)
            shard = self.shards[number]
            if shard.primary == NOBODY:
                continue
            home = self._home(number)
            if home != shard.primary:
                wanted = home
            elif not self.replication:
                wanted = NOBODY
            elif shard.replica in self.servers and shard.replica not in self.draining:
                wanted = shard.replica
            else:
                wanted = self._next(shard.primary)
                if wanted == NOBODY:
                    self.alone.add(number)
            if wanted != shard.replica:
                self._appoint(number, shard.primary, shard.address, wanted)
            elif shard.in_step and home != shard.primary and not shard.moving:
                self.shards[number] = replace(shard, moving=True)
        return self.shards != before

    def _home(self, number: int) -> int:
        """Where the shard should be: at home, else where it is, else with whoever is next."""
        primary = self.shards[number].primary
        for rank in (number, primary):
            if rank in self.servers and rank not in self.draining:
                return rank
        following = self._next(primary)
        return primary if following == NOBODY else following

    def _next(self, rank: int) -> int:
        """The next server on the ring after this one, but for itself and those that drain."""
        for step in range(1, self.num_servers):
            following = (rank + step) % self.num_servers
            if following in self.servers and following not in self.draining:
                return following
        return NOBODY

    def _promote(self, number: int) -> None:
        """The replica becomes primary, if it may."""
        shard = self.shards[number]
        may = shard.in_step and shard.replica in self.servers
        if may or shard.primary != NOBODY:
            primary, address = (shard.replica, shard.replica_address) if may else (NOBODY, "")
            self._appoint(number, primary, address, NOBODY)

    def _appoint(self, number: int, primary: int, address: str, replica: int) -> None:
        self.epoch += 1
        self.shards[number] = Shard(self.epoch, primary, address, replica, "", False, False)

    def _current(self, number: int, epoch: int) -> Shard | None:
        """The shard, if it is of this epoch."""
        shard = self.shards[number] if 0 <= number < len(self.shards) else None
        return shard if shard is not None and shard.epoch == epoch else None
