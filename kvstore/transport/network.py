"""What a process needs of a network: loops, connections to peers, endpoints that peers connect to.

There are two: ZeroMQ (:data:`kvstore.transport.zeromq.NETWORK`), and the simulated one of :mod:`kvstore.testing`,
which is slow, loses messages and breaks down on demand. Everything above this seam is the same with both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

HEARTBEAT_S = 3.0  # a peer that shows no sign of life for so long is lost
BULK_HEARTBEAT_S = 20.0  # the same where a sign of life may be behind megabytes on a slow link

Frames = list[Any]  # the first a header (bytes-like), then value buffers

T = TypeVar("T")


class Loop(Protocol):
    """What happens in one process, one thing after the other; see :class:`~kvstore.transport.reactor.Reactor`."""

    @property
    def is_here(self) -> bool:
        """Is the caller called from within the loop?"""

    def now(self) -> float:
        """Seconds on the clock by which this loop goes."""

    def future(self) -> Future[Any]:
        """A future that may be waited for while the loop brings about its result."""

    def start(self) -> None: ...
    def post(self, work: Callable[[], None]) -> None: ...
    def call(self, work: Callable[[], T], timeout_s: float = 30.0) -> T: ...
    def call_later(self, delay_s: float, work: Callable[[], None]) -> None: ...
    def drive(self, awaited: Future[Any], timeout_s: float) -> bool: ...
    def aside(self, work: Callable[[], None]) -> None: ...
    def stop(self, linger_s: float = 1.0) -> None: ...
    def abandon(self) -> None: ...


class Link(Protocol):
    """A connection to one peer, made by this side; see :class:`~kvstore.transport.zeromq.Connection`."""

    address: str
    refused: str
    suspicion: str

    def send(self, frames: Sequence[Any]) -> None: ...
    def shorten(self, offered: str) -> None: ...
    def close(self) -> None: ...


class Port(Protocol):
    """Where peers connect; see :class:`~kvstore.transport.zeromq.Endpoint`."""

    address: str
    on_disconnect: Callable[[], None] | None
    on_gone: Callable[[bytes], None] | None
    on_stuck: Callable[[bytes], None] | None

    def end(self, peer: bytes) -> None: ...
    def bind(self, address: str) -> str: ...
    def offer(self, peer: bytes) -> str: ...
    def send(self, peer: bytes, frames: Sequence[Any], on_sent: Sequence[Callable[[], None]] = ()) -> bool: ...
    def close(self) -> None: ...


class Network(Protocol):
    """How the processes of a cluster reach each other."""

    def loop(
        self,
        name: str,
        on_tick: Callable[[float], None] | None = None,
        busy: Callable[[], bool] = lambda: True,
        *,
        io_threads: int = 1,
    ) -> Any: ...

    def connect(
        self,
        loop: Any,
        address: str,
        on_receive: Callable[[Frames], None],
        on_lost: Callable[[], None] | None = None,
        heartbeat_s: float = BULK_HEARTBEAT_S,
    ) -> Link: ...

    def listen(
        self,
        loop: Any,
        on_receive: Callable[[bytes, Frames], None],
        *,
        frame_bytes_max: int,
        watch: bool = False,
        heartbeat_s: float = BULK_HEARTBEAT_S,
    ) -> Port: ...
