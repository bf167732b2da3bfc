"""Which servers have which shard, as the scheduler decides it. Pure.

There are as many shards as the cluster has servers, and shard n is at home on server n; without that, on the next one,
by rank, that has not got its part of the shards. The servers that have a shard are a chain: its *primary*, which
answers for it, then its *replicas*, each of which gets the log from the one before it (see
:mod:`kvstore.protocol.replicating`). What follows from a change is decided in one place, :meth:`Placing._settle`:

- who is gone is taken out of the chains. A lost primary's first replica becomes primary; without one the shard is lost;
- a shard should be at home, and its replicas on the next servers; those that drain are passed over. Who should have it
  comes to the chain's end, one at a time, and only when all before are in step;
- when all who should have it are in step, the primary hands over to the one who should be it, if that is another; then
  those leave the chain who should not have it. So a shard that moves never has fewer holders than before.

Whoever gets the log from another server than before has a new epoch, and so has every chain that changes. What a server
says about an older one is ignored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

from kvstore.errors import OptionError
from kvstore.protocol.messages import NOBODY, Drain, Message, Placement, Replica, Shard


@dataclass(slots=True)
class Placing:
    """The shards of a cluster.

    Args:
        replication: on how many servers beside its primary a shard is kept.

    Raises:
        OptionError: a negative number, or not fewer than there are servers.
    """

    num_servers: int
    replication: int = 0
    epoch: int = 1
    shards: list[Shard] = field(default_factory=list)  # by number; none before everybody has come
    servers: dict[int, str] = field(default_factory=dict)  # those that are here, with the address of their own shard
    draining: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        if not 0 <= self.replication < self.num_servers:
            raise OptionError(
                f"replication: expected at least 0 and less than the number of servers, which is {self.num_servers}, "
                f"got {self.replication!r}"
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
        self.shards = [Shard(self.epoch, n, self.servers[n], (), False) for n in range(self.num_servers)]
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
        return all(shard.primary != rank or self._wanted(number)[0] == rank for number, shard in enumerate(self.shards))

    def standby(self, rank: int, number: int, epoch: int, address: str) -> bool:
        """A replica says where its log may be sent."""
        return self._change(number, rank, epoch, lambda replica: replace(replica, address=address))

    def in_step(self, rank: int, number: int, epoch: int) -> bool:
        """A server says that the replica after it, which was appointed in this epoch, may take over."""
        chain = self._chain(number)
        for before, replica in pairwise(chain):
            if before.server == rank and replica.epoch == epoch:
                changed = self._change(number, replica.server, epoch, lambda replica: replace(replica, in_step=True))
                return self._settle() or changed
        return False

    def handed_over(self, rank: int, number: int, epoch: int) -> bool:
        """A primary says that its replicas have everything, and that it takes in nothing more."""
        chain = self._chain(number)
        if not chain or (chain[0].server, self.shards[number].epoch) != (rank, epoch) or not self.shards[number].moving:
            return False
        holders = {holder.server: holder for holder in chain}
        self._arrange(number, [holders[server] for server in self._wanted(number)], reordered=True)
        self._settle()
        return True

    def settled(self, number: int) -> bool:
        """Is the shard where it should be, with as many replicas in step as it should have?"""
        chain, wanted = self._chain(number), self._wanted(number)
        holders = {holder.server for holder in chain if holder.in_step}
        return len(wanted) > self.replication and holders == set(wanted) and chain[0].server == wanted[0]

    def lost(self) -> list[int]:
        """The shards that nobody has any more."""
        return [number for number, shard in enumerate(self.shards) if shard.primary == NOBODY]

    def of(self, rank: int) -> tuple[list[int], list[int]]:
        """The shards that a server has as primary, and as replica."""
        return (
            [number for number, shard in enumerate(self.shards) if shard.primary == rank],
            [n for n, shard in enumerate(self.shards) if any(replica.server == rank for replica in shard.replicas)],
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
        for number, shard in enumerate(before):
            if shard.primary != NOBODY:
                self._bury(number)
                self._improve(number)
        return self.shards != before

    def _bury(self, number: int) -> None:
        """Take those out of the chain who are gone."""
        chain = self._chain(number)
        here = [holder for holder in chain if holder.server in self.servers]
        if here != chain:
            self._arrange(number, here if here and here[0].in_step else [])

    def _improve(self, number: int) -> None:
        """One step to where the shard should be."""
        chain = self._chain(number)
        if not chain:
            return
        wanted = self._wanted(number)
        newcomers = [server for server in wanted if server not in [holder.server for holder in chain]]
        kept = [holder for holder in chain if holder.in_step or holder.server in wanted]
        surplus = [holder for holder in kept[1:] if holder.server not in wanted]
        moving = False
        if not all(holder.in_step for holder in kept):
            pass  # first it comes in step
        elif newcomers:
            kept.append(Replica(0, newcomers[0], "", False))
        elif kept[0].server != wanted[0]:
            moving = True
        elif surplus:
            kept = [holder for holder in kept if holder not in surplus]
        if kept != chain:
            self._arrange(number, kept)
        elif moving != self.shards[number].moving:
            self.epoch += 1
            self.shards[number] = replace(self.shards[number], epoch=self.epoch, moving=moving)

    def _wanted(self, number: int) -> list[int]:
        """Who should have the shard: its primary, then its replicas, as far as there is anybody."""
        homes = self._homes()
        home = homes[number] if homes else self.shards[number].primary
        following = [rank for rank in self._ring(home) if rank != home]
        return [home, *following[: self.replication]]

    def _homes(self) -> list[int]:
        """Where each shard is at home; nothing if nobody stays.

        Consistent hashing with bounded loads (Mirrokni et al. 2018): without its own server it goes to the next one
        that has not got its part yet. All shards are about equal in bytes, see :mod:`kvstore.protocol.pieces`.
        """
        staying = self._ring(0)
        homes = {number: number for number in staying}
        for number in range(self.num_servers if staying else 0):
            if number not in homes:
                most = -(-self.num_servers // len(staying))
                held = Counter(homes.values())
                homes[number] = next(rank for rank in self._ring(number) if held[rank] < most)
        return [home for _, home in sorted(homes.items())]

    def _ring(self, rank: int) -> list[int]:
        """The servers that are here and do not drain, from this one on."""
        around = [(rank + step) % self.num_servers for step in range(self.num_servers)]
        return [one for one in around if one in self.servers and one not in self.draining]

    def _chain(self, number: int) -> list[Replica]:
        """The shard's primary, as if it followed somebody, and its replicas; nobody if it is lost, or there is none."""
        if not 0 <= number < len(self.shards) or self.shards[number].primary == NOBODY:
            return []
        shard = self.shards[number]
        return [Replica(0, shard.primary, shard.address, True), *shard.replicas]

    def _arrange(self, number: int, chain: list[Replica], *, reordered: bool = False) -> None:
        """The shard has this chain from here on. Who was in step goes on from what it has, others begin anew.

        ``reordered``: some come before others that they came after. All have the same then, and nobody may take more
        before it knows who comes after it.
        """
        self.epoch += 1
        if not chain:
            self.shards[number] = Shard(self.epoch, NOBODY, "", (), False)
            return
        followed = {after.server: before.server for before, after in pairwise(self._chain(number))}
        replicas = []
        for before, replica in pairwise(chain):
            if reordered or followed.get(replica.server) != before.server:
                address = replica.address if replica.in_step else ""
                replica = replace(replica, epoch=self.epoch, address=address)
            replicas.append(replica)
        self.shards[number] = Shard(self.epoch, chain[0].server, chain[0].address, tuple(replicas), False)

    def _change(self, number: int, server: int, epoch: int, change: Callable[[Replica], Replica]) -> bool:
        """Something new is known of a replica, if it is of this epoch."""
        if not self._chain(number):
            return False
        shard = self.shards[number]
        replicas = tuple(change(r) if (r.server, r.epoch) == (server, epoch) else r for r in shard.replicas)
        changed = replicas != shard.replicas
        self.shards[number] = replace(shard, replicas=replicas)
        return changed
