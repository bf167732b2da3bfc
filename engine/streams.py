"""How ops reach devices: on which stream, and after which others.

An op of a device runs on the host only to enqueue its work. Before that its stream is told to wait for the
events of the ops it follows and of the streams of whoever pushed it; behind it an event is recorded. So nobody
waits: not the thread that pushes, nor one of the lane's.

This file knows nothing of any library of arrays (see :mod:`engine.devices`), nor of what may run when
(:mod:`engine.scheduler`), nor of how the host learns that the work is done (:mod:`engine.landing`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Any

from engine.device_time import DeviceTime
from engine.devices import Devices, Event, Stream
from engine.landing import Landing
from engine.launch import Issue, Launch, Track, in_flight
from engine.operands import Place
from engine.scheduler import RUNNING, Op
from engine.trace import Trace

if TYPE_CHECKING:
    from engine.core import Core

WIDTH = 4  # streams of a lane on one device: ops that do not follow each other can overlap
COPIES = "copy"  # the lane of ops that touch more than one memory, unless they name another


class _Block(threading.local):
    """What this thread's block of :meth:`Engine.bulk` has had to do with devices."""

    def __init__(self) -> None:
        self.ends: dict[tuple[Stream, Track], Event] = {}  # by the caller's stream and the lane's: behind the last op


class _Lane:
    """The streams of a lane on one device."""

    __slots__ = ("tracks", "turn")

    def __init__(self) -> None:
        self.tracks: list[Track] = []
        self.turn = 0  # ops that had none to follow


class Streams:
    """The streams of an engine's lanes. Thread-safe; state changes under the engine's lock."""

    def __init__(self, engine: Core, devices: Devices) -> None:
        self._engine = engine
        self.devices = devices
        self.landing = Landing(engine)
        self.time: DeviceTime | None = None  # while there is a profile
        self._lanes: dict[tuple[int, str], _Lane] = {}
        self._making = threading.Lock()
        self._nowhere = Track(-1, "none", 0, None)  # for ops that got no stream
        self.landing.tracks.append(self._nowhere)
        self._block = _Block()

    def __repr__(self) -> str:
        return f"<Streams: {self.landing.tracks}>"

    # --- before an op is submitted ----------------------------------------------------------------

    def launch_for(self, places: list[Place]) -> tuple[Launch | None, str | None]:
        """How an op on what is there would go to a device, and its lane if the caller names none; else (None, None).

        It runs on the first of the devices. What the thread has enqueued on its own streams of all of them comes
        before it.
        """
        memories = self._engine._operands.memories(places)
        here, devices = self._engine._here, self.devices
        launch: Launch | None = None
        for device in memories:
            if device is not None:
                if launch is None:
                    launch = Launch(device, here.bulks > 0 and not here.ops)
                stream = launch.callers[device] = devices.current(device)
                launch.before.append(devices.record(stream))
        return launch, COPIES if launch is not None and len(memories) > 1 else None

    # --- issuing ----------------------------------------------------------------------------------

    def run(self, op: Op, fn: Callable[..., Any], error: BaseException | None) -> None:
        """Have ``fn`` enqueue the work of an op on a stream; with an error that the op has met it is not called."""
        result = None
        if error is None:
            try:
                with self.devices.on(self._enter(op)):
                    if op.is_async:
                        fn(Issue(self._engine, op))
                        return
                    result = fn()
            except BaseException as raised:
                self._engine._blame(raised, op)
                error = raised
        self.issue(op, result, error)

    def _enter(self, op: Op) -> Stream:
        """Choose a stream for the op and have it wait for what comes before."""
        launch: Launch = op.flight
        before = in_flight(launch.after)
        track = launch.track = self._track_for(launch.device, op.lane, before)
        stream = track.stream
        for other, event in before:
            if other is not track:
                self.devices.wait(stream, event)
        for event in launch.before:
            self.devices.wait(stream, event)
        launch.before = []
        if self.time is not None:
            with contextlib.suppress(Exception):  # the work is to be done all the same
                launch.timing = self.time.begin(launch.device, stream)
        return stream

    def _track_for(self, device: int, lane: str, before: list[tuple[Track, Event]]) -> Track:
        """One on which the op comes after others anyway, else each of the lane's in turn."""
        for track, _ in reversed(before):
            if track.device == device and track.lane == lane:
                return track
        there = self._lanes.get((device, lane))
        if there is None or len(there.tracks) < WIDTH:
            return self._another(device, lane)
        there.turn += 1
        return there.tracks[there.turn % WIDTH]

    def _another(self, device: int, lane: str) -> Track:
        with self._making:
            there = self._lanes.setdefault((device, lane), _Lane())
            if len(there.tracks) == WIDTH:  # another thread has been quicker
                return there.tracks[-1]
            track = Track(device, lane, len(there.tracks) + 1, self.devices.stream(device))
            with self._engine._lock:
                self.landing.tracks.append(track)
            there.tracks.append(track)
            return track

    def issue(self, op: Op, result: Any, error: BaseException | None) -> None:
        """The op's work is in its stream, or ``error`` has kept it from that. The first call counts."""
        engine, launch = self._engine, op.flight
        event = None
        try:
            stream = self._enter(op) if launch.track is None else launch.track.stream  # else it was never called
            event = self.devices.record(stream, launch.timing is not None)
        except Exception as raised:
            error = raised if error is None else error
            launch.track = launch.track or self._nowhere
        lock = engine._lock  # as `with` does, in less time
        if not lock.attempt(False):
            lock.wait()
        try:
            if op.state != RUNNING:
                return
            if op.given_up is not None:
                error = op.given_up
            launch.event, launch.result, launch.error_at_issue = event, result, error
            if engine._trace is not None:
                launch.issued_at = perf_counter()
            for ready in engine._scheduler.issue(op, error):
                engine._dispatch(ready)
            self.landing.expect(op)
            followers, launch.followers = launch.followers, None
        finally:
            lock.leave()
            if lock.waiting:
                lock.tell_one()
        if followers is not None:
            for tell in followers:
                tell()
        if not engine._watches_devices:
            self.landing.synchronise(op)

    # --- the caller's own streams -----------------------------------------------------------------

    def join(self, launch: Launch) -> None:
        """What the thread at hand enqueues after its push, or after the bulk, is to come after the op."""
        event, track = launch.event, launch.track
        if event is None or track is None:
            return
        for stream in launch.callers.values():
            if stream != track.stream:
                if launch.in_block:
                    self._block.ends[stream, track] = event
                else:
                    self.devices.wait(stream, event)

    def follow(self, op: Op) -> None:
        """What the thread at hand enqueues from now on is to come after an op that is issued."""
        for track, event in in_flight([op]):
            for device in op.flight.callers:
                stream = self.devices.current(device)
                if stream != track.stream:
                    self.devices.wait(stream, event)

    def end_block(self) -> None:
        """A block of :meth:`Engine.bulk` is over."""
        block = self._block
        ends, block.ends = block.ends, {}
        for (stream, _), event in ends.items():
            self.devices.wait(stream, event)

    # --- the trace --------------------------------------------------------------------------------

    def trace(self, op: Op, trace: Trace) -> None:
        """Show when an op that is complete was issued, and, if it was timed, when the device worked on it."""
        launch: Launch = op.flight
        if launch.issued_at:
            trace.add(op, op.started_at, launch.issued_at, what="issue ")
        timing = launch.timing
        if timing is not None and timing.ms is not None and launch.track is not None:
            trace.add(op, timing.started_at, timing.started_at + timing.ms / 1e3, stream=launch.track.name)
