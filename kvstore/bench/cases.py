"""What can be measured: systems that stay up, cases they run, and the lines of the table made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Shapes = tuple[tuple[int, ...], ...]
PEERS: tuple[str, ...] = ("MXNet", "gloo")


@dataclass(frozen=True, slots=True)
class System:
    """A set of processes. ``kind``: kvstore, kvstore local, mxnet, mxnet local, gloo, pyzmq, numpy."""

    kind: str
    workers: int = 2
    servers: int = 1
    optimizer: str = "none"  # none, sgd, adam
    tcp: bool = False  # kvstore: without shared memory
    type: str = ""  # mxnet's name of its store
    devices: int = 0  # of a store of one process

    @property
    def peer(self) -> str:
        """Whose interpreter runs it: mxnet, gloo, or "" for ours."""
        return self.kind.split()[0] if self.kind.startswith(("mxnet", "gloo")) else ""


@dataclass(frozen=True, slots=True)
class Case:
    """One thing that one system does, again and again."""

    system: System
    operation: str
    shapes: Shapes
    consistency: str | None = None
    spinning: bool = False  # while another thread of each caller spins in pure Python

    @property
    def bytes(self) -> int:
        return sum(4 * math.prod(shape) for shape in self.shapes)

    def about(self) -> dict[str, Any]:
        """What stands in the JSON of it."""
        system = self.system
        return {
            "system": system.kind,
            "operation": self.operation,
            "bytes": self.bytes,
            "keys": len(self.shapes),
            "workers": system.workers,
            "servers": system.servers,
            "devices": system.devices,
            "optimizer": system.optimizer,
            "shared_memory": not system.tcp,
            "consistency": self.consistency,
            "spinning": self.spinning,
        }

    def request(self, group: str) -> dict[str, Any]:
        """What a member is told of it; ``keys`` is the same for cases of a group that may share their keys."""
        return {
            "keys": f"{group} {self.bytes} {self.consistency}",
            "operation": self.operation,
            "shapes": self.shapes,
            "consistency": self.consistency,
            "devices": self.system.devices,
        }


class Rounds(NamedTuple):
    """What some rounds took."""

    times: list[float]  # seconds of each round: the slowest worker's
    cpu_s: float = 0.0  # processor time of all workers within the rounds


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table; names are those of the group's cases."""

    case: str
    subject: str
    limit: str | None = None
    limit_name: str = ""  # its name in the table, if another
    beside: Mapping[str, str] = field(default_factory=dict)  # column of the table -> case
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Group:
    """Cases that are measured interleaved: one repeat of each, then again."""

    cases: dict[str, Case]
    lines: list[Line]
