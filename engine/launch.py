"""An op's way through a device: where it is, and what it and others wait for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from engine.devices import Event, Stream
from engine.handle import Completion
from engine.scheduler import Flight, Op

if TYPE_CHECKING:
    from engine.device_time import Timing


class Track:
    """A stream of a lane, and the ops that are issued on it."""

    __slots__ = ("device", "lane", "number", "ops", "stream")

    def __init__(self, device: int, lane: str, number: int, stream: Stream) -> None:
        self.device = device
        self.lane = lane
        self.number = number  # of the lane's streams on the device, from 1
        self.stream = stream
        self.ops: deque[Op] = deque()  # in the order of the stream

    def __repr__(self) -> str:
        return f"<Track {self.name}: {len(self.ops)} ops>"

    @property
    def name(self) -> str:
        """For people."""
        return f"device {self.device}, {self.lane} {self.number}"


class Launch(Flight):
    """What is known of an op of a device beside its order."""

    __slots__ = (
        *("before", "callers", "device", "error_at_issue", "event", "followers", "in_block", "issued_at", "result"),
        *("timing", "track"),
    )

    def __init__(self, device: int, in_block: bool) -> None:
        self.after: list[Op] = []  # as in Flight, whose constructor would be one more call
        self.inputs: list[Op] = []
        self.error: BaseException | None = None
        self.device = device  # whose stream does the work
        self.callers: dict[int, Stream] = {}  # the current streams of the thread that pushed, by device
        self.in_block = in_block  # of Engine.bulk: they are met when it begins and ends
        self.before: list[Event] = []  # recorded on them
        self.track: Track | None = None
        self.event: Event = None  # behind its work; None: it is complete, or there is no telling
        self.issued_at = 0.0  # seconds, if there is a profile
        self.timing: Timing | None = None
        self.followers: list[Callable[[], None]] | None = None  # to be told that it is issued
        self.result: Any = None
        self.error_at_issue: BaseException | None = None

    def __repr__(self) -> str:
        return f"<Launch on device {self.device}, {self.track}>"


class Issue(Completion):
    """Of an asynchronous op of a device: its work is what is in its stream when one of these is called."""

    __slots__ = ()

    def on(self) -> AbstractContextManager[Any]:
        """Within the block, the op's stream is this thread's current one."""
        return self._engine._streams_in_use.devices.on(self._op.flight.track.stream)

    def set_result(self, result: Any) -> None:
        """The op's work is in its stream."""
        self._engine._streams_in_use.issue(self._op, result, None)

    def set_exception(self, error: BaseException) -> None:
        """The op has failed."""
        self._engine._streams_in_use.issue(self._op, None, error)


def in_flight(ops: Iterable[Op]) -> list[tuple[Track, Event]]:
    """What there is to be waited for, and where it is, so that issued ops are complete."""
    found: list[tuple[Track, Event]] = []
    for op in ops:
        event = op.flight.event  # another thread may be about to complete it
        if event is not None:
            found.append((op.flight.track, event))
        else:  # it is complete, or recording an event failed
            found += in_flight(op.flight.after)
    return found
