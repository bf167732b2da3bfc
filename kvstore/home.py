"""What the device level sees of the place where values live: this process, or a cluster.

Two implementations, one contract test: :class:`kvstore.local.LocalHome` and
:class:`kvstore.cluster.client.ClusterHome`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import engine
from kvstore.arrays import Array
from kvstore.optim import Optimizer
from kvstore.protocol.messages import Spec
from kvstore.protocol.pieces import Key

Parts = list[tuple[int, Array]]  # (first element, flat array): a value in one or more parts
Updater = Callable[[Key, Array, Array], object]


@dataclass(frozen=True, slots=True)
class Source:
    """A value on its way. An engine op that reads ``var`` may call ``parts``."""

    var: engine.Var
    parts: Callable[[], Parts]
    keep: Callable[[], Parts]  # like parts, but valid for ever
    version: Callable[[], int | None]  # None: the device level's own count is the version
    staleness: Callable[[], int | None]  # of the cluster level; None where there is none


class Home(Protocol):
    """Where values live. Calls for one key come in program order, from any thread."""

    rank: int
    num_workers: int

    def init(self, key: Key, spec: Spec, value: Array) -> Future[Any]:
        """Create the key; done when it exists. ``value`` is flat and stays unchanged until then."""

    def push(self, key: Key, staged: Array, var: engine.Var, priority: int) -> Future[Any]:
        """One push of ``staged`` (flat, taken over), which ops on ``var`` have written; done when committed."""

    def pull(self, key: Key, priority: int) -> Source:
        """The value after the pushes so far, as the home's consistency allows."""

    def pushpull(self, key: Key, staged: Array, var: engine.Var, priority: int) -> tuple[Future[Any], Source]:
        """A push and the pull right after it."""

    def set_optimizer(self, optimizer: Optimizer, replace: bool, timeout_s: float) -> None: ...

    def set_hyperparameters(self, changes: Mapping[str, Any], timeout_s: float) -> None: ...

    def read_state(self, key: Key, timeout_s: float) -> tuple[int, dict[str, Array]]:
        """The optimizer's updates of the key so far, and its state as flat arrays."""

    def write_state(self, key: Key, step: int, state: dict[str, Array], timeout_s: float) -> None: ...

    def barrier(self, timeout_s: float) -> None: ...

    def explain(self, key: Key) -> str:
        """What the open operations of ``key`` wait for."""

    def dead_workers(self) -> list[int]: ...

    def close(self, reason: str, timeout_s: float) -> None:
        """Leave: in order when ``reason`` is empty."""
