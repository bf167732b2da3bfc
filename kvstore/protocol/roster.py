"""The scheduler's conclusions: who belongs to the cluster, and who is awaited at a barrier. Pure.

What this file decides: which rank and which life a process gets, whether a worker that comes to a running job returns
under a lost rank or joins anew, who is told of it, and when a barrier opens. What a change means for the rounds
of a key is decided by the servers, which server has what in :mod:`kvstore.protocol.placement`.

What must outlive the scheduler is in :class:`Member`, but for ``peer``, ``request_id``, ``heard`` and ``waiting``, and
in :class:`Placing`: :meth:`Membership.records` says what has to be kept before the actions are performed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from kvstore.errors import DisagreementError, FencedError, KVStoreError, ProtocolError, WorkerLostError, to_wire
from kvstore.protocol.messages import (
    NOBODY,
    ON_LOSS,
    AskCut,
    Barrier,
    Departed,
    Done,
    Drain,
    Enter,
    Explain,
    Explanation,
    Failed,
    HandedOver,
    InStep,
    Joined,
    Leave,
    Message,
    Passed,
    Placement,
    ReadPlacement,
    ReadStatus,
    Register,
    Roster,
    Standby,
    Status,
)
from kvstore.protocol.naming import Naming
from kvstore.protocol.placement import Placing

Peer = Any  # how the shell addresses a connection; opaque here
Actions = list[tuple[Peer, Message]]
_OF_MEMBERS = Barrier | Enter | Leave | Passed | Standby | InStep | HandedOver | ReadPlacement  # only they say these


@dataclass(slots=True)
class Member:
    """A worker or a server, as the scheduler knows it.

    ``state``: ``here``; ``joining`` until the servers have admitted it; ``apart``: it left the rounds and stays to
    pull; ``left`` or ``lost``.
    """

    role: str
    rank: int
    peer: Peer
    request_id: int
    address: str
    host: str
    pid: int
    token: int
    incarnation: int = 1
    state: str = "here"
    reason: str = ""  # why it is gone; "" if it left in order
    heard: float = 0.0
    barriers: int = 0  # how many it has passed
    waiting: Barrier | None = None

    @property
    def gone(self) -> bool:
        return self.state in ("left", "lost")

    @property
    def connected(self) -> bool:
        """Can something be sent to it?"""
        return self.peer is not None and not self.gone


@dataclass(slots=True)
class Membership:
    """The pure core of the scheduler.

    Actions are (peer, message) pairs, to be sent in their order.
    """

    cluster: int
    num_workers: int
    num_servers: int
    epoch: int = 1
    members: dict[tuple[str, int], Member] = field(default_factory=dict)
    on_loss: str = ""  # the workers' policy; the first of them says it
    started: bool = False  # all that it was started with have come
    replication: int = 0
    placing: Placing = field(init=False)
    drains: list[tuple[Peer, Drain]] = field(default_factory=list)  # not answered yet
    _changed: dict[tuple[str, int], None] = field(default_factory=dict)
    _kept: list[Message] = field(default_factory=list)  # what was told of the placement
    _newcomers: dict[int, tuple[Peer, Register]] = field(default_factory=dict)  # by token: see _may_return
    naming: Naming = field(default_factory=Naming)  # of cut points

    def __post_init__(self) -> None:
        self.placing = Placing(self.num_servers, self.replication)

    def handle(self, peer: Peer, message: Message, now: float) -> Actions:
        """One message of a connection."""
        member = self._member_of(peer)
        if member is not None:
            member.heard = now
        try:
            if isinstance(message, Register):
                return self._register(peer, message, now)
            if isinstance(message, ReadStatus):
                return [(peer, Status(message.request_id, self.report(now)))]
            if member is not None and isinstance(message, Barrier):
                return self._barrier(member, message)
            if member is not None and isinstance(message, Enter):
                return [(peer, Done(message.request_id)), *self._enter(member)]
            if member is not None and isinstance(message, Leave):
                return [(peer, Done(message.request_id)), *self._depart(member, message.reason, stays=message.stays)]
            if isinstance(message, AskCut):
                return self.naming.ask(peer, message, self._workers_here(), now)
            if member is not None and isinstance(message, Passed):
                return self.naming.passed(peer, member.rank, message, now)
            if isinstance(message, Drain):
                return self._drain(peer, message)
            if member is not None and member.role == "server" and isinstance(message, Standby | InStep | HandedOver):
                return [(peer, Done(message.request_id)), *self._told(member.rank, message)]
            if member is not None and isinstance(message, ReadPlacement):
                lost = [(peer, notice) for notice in self._lost_shards()]  # who leaves is told of them no other way
                return [(peer, self._placement(message.request_id)), *lost]
            if isinstance(message, Explain):
                return [(peer, Explanation(message.request_id, self._explain(now)))]
            if member is None and isinstance(message, _OF_MEMBERS):
                return []  # it has overtaken a Register, and will be sent again
            raise ProtocolError(f"the scheduler does not take {type(message).__name__} from a stranger")
        except KVStoreError as error:
            return [(peer, Failed(message.request_id, *to_wire(error)))]

    def lost(self, peer: Peer) -> Actions:
        """The connection ended and did not come back."""
        member = self._member_of(peer)
        if member is None or not member.connected:
            return []
        return self._depart(member, f"its connection ended (pid {member.pid} on {member.host})")

    def tick(self, now: float) -> list[tuple[Peer, Message]]:
        """Called now and then: nobody's answer is awaited for ever."""
        return self.naming.tick(self._workers_here(), now, lambda rank: self.members["worker", rank].heard)

    def _workers_here(self) -> dict[int, Peer]:
        return {member.rank: member.peer for member in self.here("worker") if member.connected}

    def recover(self, members: Iterable[Member], placed: list[Message]) -> None:
        """Take over what :meth:`records` told an earlier scheduler's journal."""
        self.members = {(member.role, member.rank): member for member in members}
        servers = {m.rank: m.address for m in self.members.values() if m.role == "server" and not m.gone}
        self.placing.recover(placed, servers)
        self._kept = placed

    def absent(self, now: float) -> Actions:
        """Whoever has not come back to a scheduler that recovered is lost; those who want its rank may have it."""
        actions: Actions = []
        for member in [m for m in self.members.values() if self._away(m)]:
            actions += self._depart(member, f"it did not come back to the scheduler (pid {member.pid})")
        newcomers, self._newcomers = self._newcomers, {}
        for peer, message in newcomers.values():
            actions += self.handle(peer, message, now)
        return actions

    @property
    def has_news(self) -> bool:
        """Has anything changed that :meth:`records` would tell?"""
        return bool(self._changed) or self._kept != self.placing.records()

    def reminders(self) -> Actions:
        """Who is gone, once more: that message may have been lost, too, with a connection."""
        return [action for notice in [*self._departed(), *self._lost_shards()] for action in self._tell(notice)]

    def _departed(self, besides: Member | None = None) -> list[Departed]:
        """What is said of the workers that take part no more."""
        workers = [m for m in self.members.values() if m.role == "worker" and m is not besides]
        return [self._notice(m) for m in workers if m.gone or m.state == "apart"]

    def _lost_shards(self) -> list[Departed]:
        """What is said of shards that nobody has any more: as if the server of that number were lost."""
        return [replace(self._notice(self.members["server", n]), rank=n) for n in self.placing.lost()]

    def records(self) -> tuple[list[Member], list[Message]]:
        """The members that have changed since the last call, and what is to be kept of the placement."""
        changed, self._changed = self._changed, {}
        self._kept = self.placing.records()
        return [self.members[key] for key in changed], self._kept

    def here(self, role: str) -> list[Member]:
        """Who of that role is in the cluster now and takes part, by rank."""
        return sorted((m for m in self.members.values() if m.role == role and m.state == "here"), key=lambda m: m.rank)

    @property
    def connected(self) -> list[Member]:
        """Who can be sent something."""
        return [member for member in self.members.values() if member.connected]

    def report(self, now: float) -> dict[str, Any]:
        """What ``kvstore status`` shows."""
        everybody = sorted(self.members.values(), key=lambda m: m.rank)

        def row(member: Member) -> dict[str, Any]:
            return {
                "rank": member.rank,
                "address": member.address,
                "host": member.host,
                "pid": member.pid,
                "state": "away" if self._away(member) else member.state,
                "incarnation": member.incarnation,
                "heard_s": round(now - member.heard, 3),
            }

        def held(member: Member) -> dict[str, Any]:
            primary, replica = self.placing.of(member.rank)
            return {**row(member), "primary": primary, "replica": replica}

        return {
            "cluster": f"{self.cluster:016x}",
            "epoch": self.epoch,
            "num_workers": self.num_workers,
            "num_servers": self.num_servers,
            "on_worker_loss": self.on_loss,
            "workers": [row(m) for m in everybody if m.role == "worker"],
            "servers": [held(m) for m in everybody if m.role == "server"],
            "shards": [
                {
                    "primary": shard.primary,
                    "address": shard.address,
                    "replicas": [replica.server for replica in shard.replicas],
                    "settled": self.placing.settled(number),
                }
                for number, shard in enumerate(self.placing.shards)
            ],
        }

    def _member_of(self, peer: Peer) -> Member | None:
        return next((m for m in self.members.values() if m.peer == peer), None)

    def _keep(self, member: Member) -> None:
        """It has changed."""
        self._changed[member.role, member.rank] = None

    def _tell(self, message: Message, besides: Member | None = None) -> Actions:
        """Everybody is told, but for one perhaps."""
        return [(m.peer, message) for m in self.connected if m is not besides]

    # --- coming -------------------------------------------------------------------------------

    def _register(self, peer: Peer, message: Register, now: float) -> Actions:
        size = {"worker": self.num_workers, "server": self.num_servers}.get(message.role)
        if size is None:
            raise ProtocolError(f"register: expected role 'worker' or 'server', got {message.role!r}")
        known = next((m for m in self.members.values() if m.token == message.token), None)
        if known is not None:  # the same process asks again: its connection was renewed
            return self._renew(known, peer, message, now)
        if message.incarnation:
            if (message.role, message.rank) in self.members:
                raise FencedError(f"{message.role} {message.rank}: a newer one took over this rank")
            raise ProtocolError(
                f"{message.role} {message.rank}: not known here; was the scheduler restarted without its journal?"
            )
        if message.role == "worker":
            self._agree(message)
        if self._may_return(message.role, message.rank):
            self._newcomers[message.token] = peer, message
            return []
        if not self.started:
            return self._found(peer, message, size, now)
        if message.role != "worker":
            return self._replace(peer, message, now)
        return self._come(peer, message, now)

    def _may_return(self, role: str, rank: int) -> bool:
        """May whoever has that rank come back yet to a scheduler that recovered? Until then newcomers wait."""
        return any(m.role == role and rank in (NOBODY, m.rank) and self._away(m) for m in self.members.values())

    @staticmethod
    def _away(member: Member) -> bool:
        """Has it not come back yet to a scheduler that recovered?"""
        return member.peer is None and not member.gone

    def _agree(self, message: Register) -> None:
        """All workers name the same policy."""
        if message.on_loss not in ON_LOSS:
            raise ProtocolError(
                f"register: expected on_worker_loss among {', '.join(ON_LOSS)}; got {message.on_loss!r}"
            )
        if self.on_loss and self.on_loss != message.on_loss:
            raise DisagreementError(
                f"on_worker_loss: expected {self.on_loss!r}, which the workers of this cluster have said, "
                f"got {message.on_loss!r}"
            )
        self.on_loss = message.on_loss

    def _found(self, peer: Peer, message: Register, size: int, now: float) -> Actions:
        """One of those that the cluster starts with."""
        taken = {m.rank for m in self.members.values() if m.role == message.role and not m.gone}
        rank = message.rank if message.rank >= 0 else next(r for r in range(size + 1) if r not in taken)
        if rank >= size or rank in taken:
            raise DisagreementError(
                f"register as {message.role} {message.rank}: expected a free rank below {size}, until the cluster is "
                f"complete; taken: {sorted(taken)}"
            )
        self._add(peer, message, rank, now)
        if message.role == "server":
            self.placing.arrived(rank, message.address)
        self.started = all(
            len(self.here(r)) >= n for r, n in (("worker", self.num_workers), ("server", self.num_servers))
        )
        if not self.started:
            return []
        return [*(self._welcome(m) for m in self.connected), *self._tell(self._placement(0))]

    def _come(self, peer: Peer, message: Register, now: float) -> Actions:
        """A worker comes to a running job: under the rank of one who is awaited, or as one who joins."""
        workers = {m.rank: m for m in self.members.values() if m.role == "worker"}
        lost = sorted(rank for rank, m in workers.items() if m.state == "lost")
        if lost and self.on_loss == "fail":
            raise WorkerLostError(f"register: worker {lost[0]} is lost, and on_worker_loss is 'fail'")
        rank = message.rank
        if rank < 0:
            free = (r for r in count() if r not in workers or workers[r].gone)
            rank = lost[0] if lost else next(free)
        former = workers.get(rank)
        if former is not None and not former.gone:
            raise DisagreementError(f"register as worker {rank}: expected a free rank, it is taken")
        member = self._add(peer, message, rank, now)
        told = (peer, self._placement(0))
        if former is not None:
            member.incarnation = former.incarnation + 1
            if former.state == "lost" and self.on_loss == "wait":
                return [self._welcome(member), told, *self._tell(Joined(0, rank, member.incarnation), member)]
        member.state = "joining"
        return [self._welcome(member), told]

    def _add(self, peer: Peer, message: Register, rank: int, now: float) -> Member:
        member = Member(
            message.role,
            rank,
            peer,
            message.request_id,
            message.address,
            message.host,
            message.pid,
            message.token,
            heard=now,
        )
        self.members[message.role, rank] = member
        self._keep(member)
        return member

    def _renew(self, member: Member, peer: Peer, message: Register, now: float) -> Actions:
        """A process is back on another connection: the network or the scheduler was away, or it was stopped itself."""
        if member.state == "lost" and (member.role != "worker" or self.on_loss != "wait"):
            raise FencedError(f"{member.role} {member.rank}: it was taken for lost, the others go on without it")
        if member.state == "left" and member.reason:
            raise FencedError(f"{member.role} {member.rank}: it was taken for lost before it took part")
        member.peer, member.request_id, member.heard = peer, message.request_id, now
        if member.state == "left":  # it does not know that it was heard, and will say so again
            return [self._welcome(member)]
        if not self.started:
            return []
        actions: Actions = [self._welcome(member), (peer, self._placement(0))]
        actions += [(peer, notice) for notice in self._departed(member)]
        actions += [(peer, notice) for notice in self._lost_shards()]
        if member.state == "lost":  # nobody has taken over meanwhile
            member.state, member.reason = "here", ""
            self._keep(member)
            actions += self._tell(Joined(0, member.rank, member.incarnation), member)
        return actions

    def _welcome(self, member: Member) -> tuple[Peer, Message]:
        servers = tuple(shard.address for shard in self.placing.shards)
        workers = tuple(m.rank for m in self.members.values() if m.role == "worker" and self._counts(m))
        roster = Roster(
            member.request_id,
            member.rank,
            member.incarnation,
            self.num_workers,
            servers,
            tuple(sorted(workers)),
            member.state == "joining",
        )
        return member.peer, roster

    def _counts(self, member: Member) -> bool:
        """Do rounds and barriers wait for it?"""
        return member.state == "here" or (member.state == "lost" and self.on_loss == "wait")

    def _enter(self, member: Member) -> Actions:
        if member.state != "joining":
            return []
        member.state = "here"
        self._keep(member)
        return self._tell(Joined(0, member.rank, member.incarnation), member)

    # --- shards -------------------------------------------------------------------------------

    def _replace(self, peer: Peer, message: Register, now: float) -> Actions:
        """A server comes in the place of one that is gone, if others have its shard."""
        awaited = [rank for rank in range(self.num_servers) if self.placing.awaits(rank)]
        if not awaited or message.rank not in (-1, *awaited):
            raise DisagreementError(
                f"register as server {message.rank}: the cluster is complete; expected one of {awaited}, whose servers "
                "are gone and whose values others have"
            )
        rank = awaited[0] if message.rank < 0 else message.rank
        former = self.members["server", rank]
        member = self._add(peer, message, rank, now)
        member.incarnation = former.incarnation + 1
        self.placing.arrived(rank, message.address)
        return [self._welcome(member), *self._placed()]

    def _placement(self, request_id: int) -> Placement:
        return Placement(request_id, self.epoch, tuple(self.placing.shards))

    def _placed(self) -> Actions:
        """The placement has changed: tell everybody; and those who asked for a drain that has ended."""
        self.epoch += 1
        return (self._tell(self._placement(0)) if self.started else []) + self._drained()

    def _told(self, rank: int, message: Standby | InStep | HandedOver) -> Actions:
        placing = self.placing
        match message:
            case Standby(_, number, epoch, address):
                changed = placing.standby(rank, number, epoch, address)
            case InStep(_, number, epoch):
                changed = placing.in_step(rank, number, epoch)
            case HandedOver(_, number, epoch):
                changed = placing.handed_over(rank, number, epoch)
        return self._placed() if changed else []

    def _drain(self, peer: Peer, message: Drain) -> Actions:
        if message.rank not in self.placing.servers:
            raise DisagreementError(
                f"drain: expected a server that is here, among {sorted(self.placing.servers)}, got {message.rank}"
            )
        self.drains.append((peer, message))
        return self._placed() if self.placing.drain(message.rank) else self._drained()

    def _drained(self) -> Actions:
        """Answer those whose drain has ended."""
        over = [asked for asked in self.drains if self.placing.drained(asked[1].rank)]
        self.drains = [asked for asked in self.drains if asked not in over]
        return [(peer, Done(message.request_id)) for peer, message in over]

    def _server_gone(self, member: Member) -> Actions:
        """What matters to the others are its shards: which have moved, and which are lost."""
        known = self.placing.lost()
        if not self.placing.gone(member.rank):
            return []
        lost = [number for number in self.placing.lost() if number not in known]
        notices = [action for n in lost for action in self._tell(replace(self._notice(member), rank=n), member)]
        return notices + self._placed()

    # --- barriers -----------------------------------------------------------------------------

    def _barrier(self, member: Member, message: Barrier) -> Actions:
        if message.number <= member.barriers:
            return [(member.peer, Done(message.request_id))]
        lost = [m for m in self.members.values() if m.role == "worker" and m.state == "lost"]
        if lost and self.on_loss == "fail":
            raise WorkerLostError(f"barrier: worker {lost[0].rank} is lost")
        member.waiting = message
        return self._open_barrier()

    def _open_barrier(self) -> Actions:
        """If all who are awaited have come, they may go on, and with them who left the rounds and waits too."""
        workers = [m for m in self.members.values() if m.role == "worker"]
        if any(self._counts(m) and m.waiting is None for m in workers):
            return []
        actions: Actions = []
        for member in workers:
            if member.waiting is not None:
                member.barriers = member.waiting.number
                self._keep(member)
                actions.append((member.peer, Done(member.waiting.request_id)))
                member.waiting = None
        return actions

    # --- going --------------------------------------------------------------------------------

    def _depart(self, member: Member, reason: str, *, stays: bool = False) -> Actions:
        if member.gone or (stays and member.state == "apart"):
            return []
        counted = member.role != "worker" or member.state == "here"
        member.reason = reason
        if not counted:  # it is no member of any round yet, or any more: nobody has to wait for it, or fail
            member.state = "left"
        else:
            member.state = "lost" if reason else "apart" if stays else "left"
        self._keep(member)
        if not member.connected:
            member.waiting = None
        if member.role == "server" and self.started:
            return self._server_gone(member)
        if member.role == "server":
            self.placing.gone(member.rank)
            self.placing.shards.clear()  # of which nobody knows yet
        actions = self._tell(self._notice(member), member)
        if member.role == "worker":
            actions += self.naming.gone(member.rank)
        if counted and reason and member.role == "worker" and self.on_loss == "fail":
            error = WorkerLostError(f"barrier: worker {member.rank} is lost: {reason}")
            for waiter in self.members.values():
                if waiter.waiting is not None:
                    actions.append((waiter.peer, Failed(waiter.waiting.request_id, *to_wire(error))))
                    waiter.waiting = None
            return actions
        return actions + self._open_barrier()

    def _notice(self, member: Member) -> Departed:
        on_loss = self.on_loss or "fail" if member.state == "lost" else "continue"
        stays = member.state == "apart"
        return Departed(0, member.role, member.rank, member.reason, member.incarnation, on_loss, stays)

    def _explain(self, now: float) -> str:
        if not self.started:
            have = {role: len(self.here(role)) for role in ("worker", "server")}
            return (
                f"the cluster has {have['worker']} of {self.num_workers} workers "
                f"and {have['server']} of {self.num_servers} servers"
            )
        absent = [
            f"{m.rank} ({'lost, ' if m.state == 'lost' else ''}last heard {now - m.heard:.1f} s ago)"
            for m in sorted(self.members.values(), key=lambda m: m.rank)
            if m.role == "worker" and self._counts(m) and m.waiting is None
        ]
        return f"the barrier waits for workers {', '.join(absent) or 'nobody'}"
