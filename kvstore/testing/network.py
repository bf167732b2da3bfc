"""A network that is slow, forgetful and breaks down: the simulated one behind the seam of the transport.

As with ZeroMQ, a connection makes itself anew when it breaks, nothing survives that, and a peer's other end is then
another peer. Unlike with ZeroMQ, single messages may be lost, repeated and overtake each other: more than TCP
would do, and just what the protocol has to bear with when connections break again and again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from kvstore.errors import OptionError
from kvstore.testing.world import Awaited, Process, Program, World
from kvstore.transport.network import BULK_HEARTBEAT_S, Frames

TICK_S = 0.5
RETRY_S = 0.1  # a connection without a peer tries again

T = TypeVar("T")


@dataclass(slots=True)
class Weather:
    """How bad the network is.

    Args:
        delay_s: the least and the most that a message takes; a delay drawn for each lets them overtake each other.
        loss, repetition: the share of messages that never come, or come twice.
    """

    delay_s: tuple[float, float] = (0.0001, 0.001)
    loss: float = 0.0
    repetition: float = 0.0

    def __post_init__(self) -> None:
        low, high = self.delay_s
        if not 0 <= low <= high < math.inf:
            raise OptionError(f"delay_s: expected 0 <= least <= most seconds, got {self.delay_s}")
        for name, share in (("loss", self.loss), ("repetition", self.repetition)):
            if not 0 <= share < 1:
                raise OptionError(f"{name}: expected a share of all messages, 0 <= {name} < 1, got {share}")


class Web:
    """What lies between processes: who listens where, who is connected, and what is cut off."""

    def __init__(self, world: World, weather: Weather) -> None:
        self.world = world
        self.weather = weather
        self.ports: dict[str, SimulatedPort] = {}
        self.links: list[SimulatedLink] = []
        self._cuts: set[frozenset[Process]] = set()
        self._silent: dict[SimulatedLink, float] = {}  # since when nothing passes
        self._next_port = 9000
        self._peers = 0

    def __repr__(self) -> str:
        return f"<Web: {len(self.ports)} ports, {len(self.links)} links, {len(self._cuts)} cuts>"

    def free_port(self) -> int:
        """A number that no port has had."""
        self._next_port += 1
        return self._next_port

    def next_peer(self) -> int:
        """A number that no peer has had."""
        self._peers += 1
        return self._peers

    def cut(self, one: Iterable[Process], other: Iterable[Process]) -> None:
        """Nothing passes between these processes, either way, until :meth:`mend` or :meth:`heal`."""
        self._cuts.update(_pairs(one, other))
        self.look_again()

    def mend(self, one: Iterable[Process], other: Iterable[Process]) -> None:
        """These reach each other again."""
        self._cuts.difference_update(_pairs(one, other))
        self.look_again()

    def heal(self) -> None:
        """Everybody reaches everybody."""
        self._cuts.clear()
        self.look_again()

    def reach(self, one: Process, other: Process) -> bool:
        """May a message pass?"""
        return frozenset((one, other)) not in self._cuts

    def look_again(self) -> None:
        """Something has been cut, paused or has gone on: what stays silent for the heartbeat's time is given up."""
        now = self.world.now
        self._silent = {link: self._silent.get(link, now) for link in self.links if not link.passes}
        for link, since in self._silent.items():
            if since == now and link.port is not None:
                heartbeat_s = min(link.heartbeat_s, link.port.heartbeat_s)
                self.world.later(heartbeat_s, lambda link=link: self._give_up(link, now))  # type: ignore[misc]

    def _give_up(self, link: SimulatedLink, since: float) -> None:
        if self._silent.get(link) == since:
            del self._silent[link]
            link.break_off()

    def carry(self, frames: Sequence[Any], deliver: Callable[[Frames], None]) -> None:
        """One message is on its way; ``deliver`` is called never, once or twice."""
        chance, weather = self.world.chance, self.weather
        copied = [bytes(memoryview(frame).cast("B")) if memoryview(frame).nbytes else b"" for frame in frames]
        for _ in range(1 + (chance.random() < weather.repetition)):
            delay = chance.uniform(*weather.delay_s)
            if chance.random() >= weather.loss:
                self.world.later(delay, lambda: deliver([memoryview(bytearray(frame)) for frame in copied]))


def _pairs(one: Iterable[Process], other: Iterable[Process]) -> set[frozenset[Process]]:
    others = list(other)
    return {frozenset((a, b)) for a in one for b in others if a is not b}


class SimulatedLoop:
    """The loop of one simulated process; see :class:`kvstore.transport.network.Loop`."""

    def __init__(self, process: Process, on_tick: Callable[[float], None] | None) -> None:
        self.process = process
        self._on_tick = on_tick
        self._depth = 0
        self._started = False
        self._stopped = False
        self._early: list[Callable[[], None]] = []  # due before the start
        self.at_end: list[Callable[[], None]] = []
        if on_tick is not None:
            self.call_later(TICK_S, self._tick)

    def __repr__(self) -> str:
        return f"<SimulatedLoop of {self.process.name}>"

    @property
    def is_here(self) -> bool:
        return self._depth > 0

    def now(self) -> float:
        return self.process.world.now

    def future(self) -> Future[Any]:
        return Awaited(self.process.world)

    def start(self) -> None:
        self._started = True
        early, self._early = self._early, []
        for work in early:
            self.post(work)

    def post(self, work: Callable[[], None]) -> None:
        if not self._stopped:
            self.process.later(0.0, lambda: self.do(work))

    def call(self, work: Callable[[], T], timeout_s: float = 30.0) -> T:
        outcome = self.future()

        def run() -> None:
            try:
                outcome.set_result(work())
            except Exception as error:
                outcome.set_exception(error)

        self.post(run)
        result: T = outcome.result(timeout_s)
        return result

    def call_later(self, delay_s: float, work: Callable[[], None]) -> None:
        self.process.later(delay_s, lambda: self.do(work))

    def drive(self, awaited: Future[Any], timeout_s: float) -> bool:
        self.process.world.wait(awaited, timeout_s)
        return True

    def aside(self, work: Callable[[], None]) -> None:
        self.process.later(0.0, Program(self.process, work).start)

    def stop(self, linger_s: float = 1.0) -> None:
        if not self._stopped:
            self.process.later(0.001, self.abandon)  # what was posted before is still done

    def abandon(self) -> None:
        self._stopped = True
        for end in self.at_end:
            end()

    def do(self, work: Callable[[], None]) -> None:
        """Within the loop, once it has started and unless it has stopped."""
        if self._stopped:
            return
        if not self._started:
            self._early.append(work)
            return
        self._depth += 1
        try:
            work()
        finally:
            self._depth -= 1

    def _tick(self) -> None:
        assert self._on_tick is not None
        self.call_later(TICK_S, self._tick)
        self._on_tick(self.now())


class SimulatedPort:
    """Where links end; see :class:`kvstore.transport.network.Port`."""

    def __init__(
        self, web: Web, loop: SimulatedLoop, on_receive: Callable[[bytes, Frames], None], heartbeat_s: float
    ) -> None:
        self.address = ""
        self.heartbeat_s = heartbeat_s
        self.on_disconnect: Callable[[], None] | None = None
        self.on_gone: Callable[[bytes], None] | None = None
        self.on_stuck: Callable[[bytes], None] | None = None
        self.process = loop.process
        self.loop = loop
        self._web = web
        self._receive = on_receive
        self._peers: dict[bytes, SimulatedLink] = {}
        loop.at_end.append(self.close)
        loop.process.on_end.append(self.close)

    def __repr__(self) -> str:
        return f"<SimulatedPort at {self.address}>"

    def bind(self, address: str) -> str:
        """Listen there; port ``*`` is any. Raises OptionError when somebody does already."""
        host, _, port = address.rpartition(":")
        address = f"{host}:{self._web.free_port() if port in ('*', '0') else port}"
        if address in self._web.ports:
            raise OptionError(f"bind: expected a free address, got {address!r}")
        self.address = address
        self._web.ports[address] = self
        return address

    def end(self, peer: bytes) -> None:
        """End the link of this peer."""
        link = self._peers.get(peer)
        if link is not None:
            link.break_off()

    def offer(self, peer: bytes) -> str:
        """There is no shorter way."""
        return ""

    def send(self, peer: bytes, frames: Sequence[Any], on_sent: Sequence[Callable[[], None]] = ()) -> bool:
        """One message to a peer; False when its link is gone."""
        link = self._peers.get(peer)
        for tell in on_sent:
            self.loop.post(tell)
        if link is None:
            return False
        self._web.carry(frames, lambda came: link.take(peer, came))
        return True

    def join(self, peer: bytes, link: SimulatedLink) -> None:
        """A link ends here from now on."""
        self._peers[peer] = link

    def leave(self, peer: bytes) -> None:
        """Its link is gone."""
        if self._peers.pop(peer, None) is None:
            return
        if self.on_disconnect is not None:
            self.loop.post(self.on_disconnect)
        if self.on_gone is not None:
            tell = self.on_gone
            self.loop.post(lambda: tell(peer))

    def take(self, peer: bytes, frames: Frames) -> None:
        """A message has come."""
        if peer in self._peers:
            self.process.later(0.0, lambda: self.loop.do(lambda: self._receive(peer, frames)))

    def close(self) -> None:
        """All links end."""
        if self._web.ports.get(self.address) is self:
            del self._web.ports[self.address]
        for link in list(self._peers.values()):
            link.break_off()


class SimulatedLink:
    """A connection to one address, made anew as often as it breaks; see :class:`kvstore.transport.network.Link`."""

    def __init__(
        self,
        web: Web,
        loop: SimulatedLoop,
        address: str,
        on_receive: Callable[[Frames], None],
        on_lost: Callable[[], None] | None,
        heartbeat_s: float,
    ) -> None:
        self.address = address
        self.heartbeat_s = heartbeat_s
        self.process = loop.process
        self.port: SimulatedPort | None = None
        self._loop = loop
        self._web = web
        self._receive = on_receive
        self._on_lost = on_lost
        self._peer = b""
        self._unsent: list[Sequence[Any]] = []  # until there is a peer
        self._closed = False
        web.links.append(self)
        loop.at_end.append(self.close)
        loop.process.on_end.append(self.close)
        self._connect()

    def __repr__(self) -> str:
        return f"<SimulatedLink of {self.process.name} to {self.address}>"

    refused = suspicion = ""  # there are no keys

    def shorten(self, offered: str) -> None:
        """There is no shorter way."""

    @property
    def passes(self) -> bool:
        """Do messages, or would they if it were connected?"""
        port = self.port
        if port is None:
            return True
        return not (self.process.paused or port.process.paused) and self._web.reach(self.process, port.process)

    def send(self, frames: Sequence[Any]) -> None:
        """One message, now or when the connection is there."""
        if self.port is None:
            self._unsent.append([bytes(memoryview(frame).cast("B")) if len(frame) else b"" for frame in frames])
        else:
            port, peer = self.port, self._peer
            self._web.carry(frames, lambda came: self._arrive(port, peer, came))

    def _arrive(self, port: SimulatedPort, peer: bytes, frames: Frames) -> None:
        if self._web.reach(self.process, port.process):
            port.take(peer, frames)

    def take(self, peer: bytes, frames: Frames) -> None:
        """A message has come back."""
        port = self.port
        if port is not None and peer == self._peer and self._web.reach(self.process, port.process):
            self.process.later(0.0, lambda: self._loop.do(lambda: self._receive(frames)))

    def break_off(self) -> None:
        """The connection ends, for both sides."""
        port, self.port = self.port, None
        if port is not None:
            port.leave(self._peer)
        if self._closed:
            return
        if port is not None and self._on_lost is not None:
            self._loop.post(self._on_lost)
        self.process.later(RETRY_S, self._connect)

    def close(self) -> None:
        """For good."""
        self._closed = True
        self.break_off()
        if self in self._web.links:
            self._web.links.remove(self)

    def _connect(self) -> None:
        if self._closed or self.port is not None:
            return
        port = self._web.ports.get(self.address)
        if port is None or port.process.paused or not self._web.reach(self.process, port.process):
            self.process.later(RETRY_S, self._connect)
            return
        self.port, self._peer = port, b"%d" % self._web.next_peer()
        port.join(self._peer, self)
        unsent, self._unsent = self._unsent, []
        for frames in unsent:
            self.send(frames)


class SimulatedNetwork:
    """The network as one process sees it; see :class:`kvstore.transport.network.Network`."""

    def __init__(self, web: Web, process: Process) -> None:
        self._web = web
        self._process = process

    def __repr__(self) -> str:
        return f"<SimulatedNetwork of {self._process.name}>"

    def loop(
        self,
        name: str,
        on_tick: Callable[[float], None] | None = None,
        busy: Callable[[], bool] = lambda: True,
        *,
        io_threads: int = 1,
    ) -> SimulatedLoop:
        return SimulatedLoop(self._process, on_tick)

    def connect(
        self,
        loop: Any,
        address: str,
        on_receive: Callable[[Frames], None],
        on_lost: Callable[[], None] | None = None,
        heartbeat_s: float = BULK_HEARTBEAT_S,
    ) -> SimulatedLink:
        return SimulatedLink(self._web, loop, address, on_receive, on_lost, heartbeat_s)

    def listen(
        self,
        loop: Any,
        on_receive: Callable[[bytes, Frames], None],
        *,
        frame_bytes_max: int,
        watch: bool = False,
        heartbeat_s: float = BULK_HEARTBEAT_S,
    ) -> SimulatedPort:
        return SimulatedPort(self._web, loop, on_receive, heartbeat_s)
