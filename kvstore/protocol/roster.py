"""The scheduler's conclusions: who belongs to the cluster, and who is awaited at a barrier. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kvstore.errors import DisagreementError, FencedError, KVStoreError, ProtocolError, WorkerLostError, to_wire
from kvstore.protocol.messages import (
    Barrier,
    Departed,
    Done,
    Drain,
    Explain,
    Explanation,
    Failed,
    HandedOver,
    InStep,
    Leave,
    Message,
    Placement,
    ReadPlacement,
    ReadStatus,
    Register,
    Roster,
    Standby,
    Status,
)
from kvstore.protocol.placement import Placing

Peer = Any  # how the shell addresses a connection; opaque here


@dataclass(slots=True)
class Member:
    """A worker or a server, as the scheduler knows it."""

    role: str
    rank: int
    peer: Peer
    request_id: int
    address: str
    host: str
    pid: int
    token: int
    incarnation: int = 1
    state: str = "here"  # here, left, lost
    heard: float = 0.0
    barriers: int = 0  # how many it has passed
    waiting: Barrier | None = None


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
    replication: int = 0
    placing: Placing = field(init=False)
    drains: list[tuple[Peer, Drain]] = field(default_factory=list)  # not answered yet

    def __post_init__(self) -> None:
        self.placing = Placing(self.num_servers, self.replication)

    def handle(self, peer: Peer, message: Message, now: float) -> list[tuple[Peer, Message]]:
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
            if member is not None and isinstance(message, Leave):
                return [(peer, Done(message.request_id)), *self._depart(member, message.reason)]
            if isinstance(message, Drain):
                return self._drain(peer, message)
            if member is not None and member.role == "server" and isinstance(message, Standby | InStep | HandedOver):
                return [(peer, Done(message.request_id)), *self._told(member.rank, message)]
            if isinstance(message, ReadPlacement):
                if member is None or member.state != "here":
                    raise FencedError("the scheduler does not count the sender among its members any more")
                return [(peer, Placement(message.request_id, self.epoch, tuple(self.placing.shards)))]
            if isinstance(message, Explain):
                return [(peer, Explanation(message.request_id, self._explain(now)))]
            raise ProtocolError(f"the scheduler does not take {type(message).__name__} from a stranger")
        except KVStoreError as error:
            return [(peer, Failed(message.request_id, *to_wire(error)))]

    def lost(self, peer: Peer) -> list[tuple[Peer, Message]]:
        """The connection ended and did not come back."""
        member = self._member_of(peer)
        if member is None or member.state != "here":
            return []
        return self._depart(member, f"its connection ended (pid {member.pid} on {member.host})")

    def here(self, role: str) -> list[Member]:
        """Who of that role is in the cluster now, by rank."""
        return sorted((m for m in self.members.values() if m.role == role and m.state == "here"), key=lambda m: m.rank)

    def report(self, now: float) -> dict[str, Any]:
        """What ``kvstore status`` shows."""
        everybody = sorted(self.members.values(), key=lambda m: m.rank)

        def row(member: Member) -> dict[str, Any]:
            return {
                "rank": member.rank,
                "address": member.address,
                "host": member.host,
                "pid": member.pid,
                "state": member.state,
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
            "workers": [row(m) for m in everybody if m.role == "worker"],
            "servers": [held(m) for m in everybody if m.role == "server"],
            "shards": [
                {"primary": shard.primary, "address": shard.address, "replica": shard.replica, "in_step": shard.in_step}
                for shard in self.placing.shards
            ],
        }

    def _member_of(self, peer: Peer) -> Member | None:
        return next((m for m in self.members.values() if m.peer == peer), None)

    def _register(self, peer: Peer, message: Register, now: float) -> list[tuple[Peer, Message]]:
        size = {"worker": self.num_workers, "server": self.num_servers}.get(message.role)
        if size is None:
            raise ProtocolError(f"register: expected role 'worker' or 'server', got {message.role!r}")
        known = next((m for m in self.members.values() if m.token == message.token), None)
        if known is not None:  # the same process asks again: its connection was renewed
            known.peer = peer
            return self._welcome([known]) if self._complete() else []
        taken = {m.rank for m in self.members.values() if m.role == message.role and m.state == "here"}
        awaited = [r for r in range(size) if message.role == "server" and self.placing.awaits(r)]
        complete = self._complete_once(message.role, size) and len(taken) + self._departed(message.role) >= size
        if complete and not awaited:
            raise DisagreementError(
                f"the cluster is complete: it was started for {size} {message.role}s and has had them all"
            )
        rank = message.rank
        if rank < 0:
            rank = next(r for r in awaited or range(size + 1) if r not in taken)
        if rank >= size or rank in taken or (complete and rank not in awaited):
            raise DisagreementError(
                f"register as {message.role} {rank}: expected a free rank below {size}, taken: {sorted(taken)}"
            )
        self.members[message.role, rank] = Member(
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
        if message.role == "server":
            self.placing.arrived(rank, message.address)
        if complete:
            return [*self._welcome([self.members["server", rank]]), *self._placed()]
        return self._welcome(list(self.members.values())) if self._complete() else []

    def _departed(self, role: str) -> int:
        return sum(m.role == role and m.state != "here" for m in self.members.values())

    def _complete_once(self, role: str, size: int) -> bool:
        return sum(m.role == role for m in self.members.values()) >= size

    def _complete(self) -> bool:
        return self._complete_once("worker", self.num_workers) and self.placing.begun

    def _welcome(self, whom: list[Member]) -> list[tuple[Peer, Message]]:
        placement = Placement(0, self.epoch, tuple(self.placing.shards))
        servers = tuple(shard.address for shard in placement.shards)
        here = [m for m in whom if m.state == "here"]
        welcome: list[tuple[Peer, Message]] = [
            (m.peer, Roster(m.request_id, m.rank, m.incarnation, self.num_workers, servers)) for m in here
        ]
        return [*welcome, *((m.peer, placement) for m in here)]

    # --- shards -------------------------------------------------------------------------------

    def _placed(self) -> list[tuple[Peer, Message]]:
        """The placement has changed: tell everybody; and those who asked for a drain that has ended."""
        self.epoch += 1
        placement = Placement(0, self.epoch, tuple(self.placing.shards))
        actions: list[tuple[Peer, Message]] = [
            (m.peer, placement) for m in self.members.values() if m.state == "here" and self._complete()
        ]
        return actions + self._drained()

    def _told(self, rank: int, message: Standby | InStep | HandedOver) -> list[tuple[Peer, Message]]:
        placing = self.placing
        match message:
            case Standby(_, number, epoch, address):
                changed = placing.standby(rank, number, epoch, address)
            case InStep(_, number, epoch):
                changed = placing.in_step(rank, number, epoch)
            case HandedOver(_, number, epoch):
                changed = placing.handed_over(rank, number, epoch)
        return self._placed() if changed else []

    def _drain(self, peer: Peer, message: Drain) -> list[tuple[Peer, Message]]:
        if message.rank not in self.placing.servers:
            raise DisagreementError(
                f"drain: expected a server that is here, among {sorted(self.placing.servers)}, got {message.rank}"
            )
        self.drains.append((peer, message))
        return self._placed() if self.placing.drain(message.rank) else self._drained()

    def _drained(self) -> list[tuple[Peer, Message]]:
        """Answer those whose drain has ended."""
        over = [asked for asked in self.drains if self.placing.drained(asked[1].rank)]
        self.drains = [asked for asked in self.drains if asked not in over]
        return [(peer, Done(message.request_id)) for peer, message in over]

    def _barrier(self, member: Member, message: Barrier) -> list[tuple[Peer, Message]]:
        if message.number <= member.barriers:
            return [(member.peer, Done(message.request_id))]
        lost = [m for m in self.members.values() if m.role == "worker" and m.state == "lost"]
        if lost:
            raise WorkerLostError(f"barrier: worker {lost[0].rank} is lost")
        member.waiting = message
        return self._open_barrier()

    def _open_barrier(self) -> list[tuple[Peer, Message]]:
        awaited = self.here("worker")
        if not awaited or any(m.waiting is None for m in awaited):
            return []
        actions: list[tuple[Peer, Message]] = []
        for member in awaited:
            assert member.waiting is not None
            member.barriers = member.waiting.number
            actions.append((member.peer, Done(member.waiting.request_id)))
            member.waiting = None
        return actions

    def _depart(self, member: Member, reason: str) -> list[tuple[Peer, Message]]:
        if member.state != "here":
            return []
        member.state = "lost" if reason else "left"
        member.waiting = None
        notices = [Departed(0, member.role, member.rank, reason)]
        actions: list[tuple[Peer, Message]] = []
        if member.role == "server" and self.placing.begun:  # what matters to the others are its shards
            known = self.placing.lost()
            if self.placing.gone(member.rank):
                actions = self._placed()
            notices = [Departed(0, "server", number, reason) for number in self.placing.lost() if number not in known]
        elif member.role == "server":
            self.placing.gone(member.rank)
        others = [m for m in self.members.values() if m.state == "here" and m is not member]
        actions = [*((m.peer, notice) for notice in notices for m in others), *actions]
        if reason and member.role == "worker":
            error = WorkerLostError(f"barrier: worker {member.rank} is lost: {reason}")
            for waiter in self.here("worker"):
                if waiter.waiting is not None:
                    actions.append((waiter.peer, Failed(waiter.waiting.request_id, *to_wire(error))))
                    waiter.waiting = None
            return actions
        return actions + self._open_barrier()

    def _explain(self, now: float) -> str:
        if not self._complete():
            have = {role: len(self.here(role)) for role in ("worker", "server")}
            return (
                f"the cluster has {have['worker']} of {self.num_workers} workers "
                f"and {have['server']} of {self.num_servers} servers"
            )
        absent = [f"{m.rank} (last heard {now - m.heard:.1f} s ago)" for m in self.here("worker") if m.waiting is None]
        return f"the barrier waits for workers {', '.join(absent) or 'nobody'}"
