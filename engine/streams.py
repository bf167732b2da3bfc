"""How ops reach devices: on which stream, after which others, and how the host learns that they are complete.

An op of a device runs on the host only to enqueue its work. Before that its stream is told to wait for the
events of the ops it follows and of the streams of whoever pushed it; behind it an event is recorded. So nobody
waits: not the thread that pushes, nor one of the lane's. As long as there are events that have not come to pass,
one thread looks at them now and then; who waits for a handle without a timeout waits for its event himself.

This file knows nothing of any library of arrays (see :mod:`engine.devices`), nor of what may run when
(:mod:`engine.scheduler`).
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from time import perf_counter
from typing import TYPE_CHECKING, Any

from engine.device_time import DeviceTime
from engine.devices import Devices, Event, Stream
from engine.handle import Completion
from engine.scheduler import DONE, RUNNING, Flight, Op
from engine.trace import Trace

if TYPE_CHECKING:
    from engine.base import Engine

WIDTH = 4  # streams of a lane on one device: ops that do not follow each other can overlap
COPIES = "copy"  # the lane of ops that touch more than one memory, unless they name another
LOOK_S = 50e-6  # between two looks at what is on its way, at first
LOOK_S_MAX = 1e-3  # and when nothing has come of many
IDLE_S = 30.0  # the thread that looks ends after so long without anything to look at


class Launch(Flight):
    """An op's way through a device."""

    def __init__(self, device: int, callers: dict[int, Stream]) -> None:
        super().__init__()
        self.device = device  # whose stream does the work
        self.callers = callers  # the current streams of the thread that pushed, by device
        self.before: list[Event] = []  # recorded on them
        self.is_open = False  # ends when its function's completion is told, rather than when the function returns
        self.stream: Stream = None
        self.event: Event = None  # behind its work; None: there is no telling
        self.began: Event = None  # before it, if it is timed
        self.time: DeviceTime | None = None  # then, whose axis it is on
        self.issued_at = 0.0
        self.started_at = 0.0  # by the device, if ``device_ms`` is known
        self.device_ms: float | None = None  # how long the device worked on it, if that is known
        self.followers: list[Callable[[], None]] = []  # to be told that it is issued
        self.result: Any = None
        self.error_at_issue: BaseException | None = None

    def __repr__(self) -> str:
        return f"<Launch on device {self.device}, stream {self.stream!r}>"


class Issue(Completion):
    """Of an asynchronous op of a device: its work is what is in its stream when one of these is called."""

    __slots__ = ()

    def on(self) -> contextlib.AbstractContextManager[Any]:
        """Within the block, the op's stream is this thread's current one."""
        return self._engine._streams_in_use.devices.on(self._op.flight.stream)

    def set_result(self, result: Any) -> None:
        """The op's work is in its stream."""
        self._engine._streams_in_use.issue(self._op, result, None)

    def set_exception(self, error: BaseException) -> None:
        """The op has failed."""
        self._engine._streams_in_use.issue(self._op, None, error)


class _Block(threading.local):
    """What this thread's block of :meth:`Engine.bulk` has had to do with devices."""

    def __init__(self) -> None:
        self.marks: dict[Stream, Event] = {}  # of the caller's streams, as they were first met
        self.ends: dict[tuple[Stream, Stream], Event] = {}  # by the caller's stream and the lane's: behind the last op


class Streams:
    """The streams of an engine's lanes, and what is in them. Thread-safe; state changes under the engine's lock."""

    def __init__(self, engine: Engine, devices: Devices) -> None:
        self._engine = engine
        self.devices = devices
        self._lanes: dict[tuple[int, str], list[Stream]] = {}
        self._next: dict[tuple[int, str], int] = {}
        self._making = threading.Lock()
        self._flying: dict[Stream, deque[Op]] = {}  # in the order of each stream
        self._block = _Block()
        self._changed = engine._lock.condition()
        self._watched = False  # there is a thread that looks
        self._asleep = False
        self.time: DeviceTime | None = None  # while there is a profile

    def __repr__(self) -> str:
        lanes = {f"{lane} on {device}": len(streams) for (device, lane), streams in self._lanes.items()}
        return f"<Streams: {lanes}, {sum(map(len, self._flying.values()))} ops issued>"

    # --- before an op is submitted ----------------------------------------------------------------

    def launch_for(self, reads: Iterable[Any], writes: Iterable[Any]) -> tuple[Launch | None, str | None]:
        """How an op on these would go to a device, and its lane if the caller names none; (None, None): it would not.

        It runs on the device of the first array it writes there, else reads there. What the thread has enqueued on
        its own streams of all the devices concerned comes before it.
        """
        memories = list(dict.fromkeys(self._engine._operands.places((*writes, *reads))))
        device = next((one for one in memories if one is not None), None)
        if device is None:
            return None, None
        callers = {one: self.devices.current(one) for one in memories if one is not None}
        launch = Launch(device, callers)
        marks = self._block.marks if self._in_block() else {}
        for stream in callers.values():
            if stream not in marks:
                marks[stream] = self.devices.record(stream)
            launch.before.append(marks[stream])
        return launch, COPIES if len(memories) > 1 else None

    # --- issuing ----------------------------------------------------------------------------------

    def wrap(self, op: Op, fn: Callable[..., Any], is_async: bool) -> None:
        """Make ``fn``, which enqueues the work of ``op``, the asynchronous function that the engine runs."""

        def start(completion: Completion) -> None:
            self._start(op, fn, Issue(self._engine, op) if is_async else None)

        op.fn, op.is_async = start, True
        op.flight.is_open = is_async

    def _start(self, op: Op, fn: Callable[..., Any], completion: Issue | None) -> None:
        with self._engine._lock:
            error = self._engine._scheduler.inputs_of(op)
        if error is not None:
            self.issue(op, None, error)
            return
        result = None
        try:
            self._enter(op)
            with self.devices.on(op.flight.stream):
                result = fn() if completion is None else fn(completion)
        except BaseException as raised:
            self._engine._blame(raised, op)
            error = raised
        if completion is None or error is not None:
            self.issue(op, result, error)

    def _enter(self, op: Op) -> None:
        """Choose a stream for the op and have it wait for what comes before."""
        launch: Launch = op.flight
        before = list(_launches(launch.after))
        launch.stream = self._stream_for(launch, op.lane, [one.stream for one in before])
        for one in before:
            if one.stream != launch.stream:
                self.devices.wait(launch.stream, one.event)
        for event in launch.before:
            self.devices.wait(launch.stream, event)
        if self.time is not None:
            self._begin_time(launch, self.time)

    def _begin_time(self, launch: Launch, axis: DeviceTime) -> None:
        with contextlib.suppress(Exception):  # the work is to be done all the same
            axis.begin(launch.device)
            launch.began = self.devices.record(launch.stream, timed=True)
            launch.time = axis

    def _stream_for(self, launch: Launch, lane: str, before: list[Stream]) -> Stream:
        """One on which the op comes after others anyway, else each of the lane's in turn."""
        place = launch.device, lane
        with self._making:
            streams = self._lanes.setdefault(place, [])
            for stream in reversed(before):
                if stream in streams:
                    return stream
            turn = self._next[place] = (self._next.get(place, -1) + 1) % WIDTH
            if turn == len(streams):
                streams.append(self.devices.stream(launch.device))
            return streams[turn]

    def issue(self, op: Op, result: Any, error: BaseException | None) -> None:
        """The op's work is in its stream, or ``error`` has kept it from that. The first call counts."""
        engine, launch = self._engine, op.flight
        event = None
        try:
            if launch.stream is None:  # it was given up, or is poisoned; it still comes after others
                self._enter(op)
            event = self.devices.record(launch.stream, timed=launch.began is not None)
        except Exception as raised:
            error = error or raised
        with engine._lock:
            if op.state != RUNNING:
                return
            launch.event, launch.result, launch.error_at_issue = event, result, op.given_up or error
            launch.issued_at = perf_counter()
            self._flying.setdefault(launch.stream, deque()).append(op)
            for ready in engine._scheduler.issue(op, launch.error_at_issue):
                engine._dispatch(ready)
            self._watch()
            followers, launch.followers = launch.followers, []
        for tell in followers:
            tell()
        engine._issued(op)

    def join(self, launch: Launch) -> None:
        """What the thread at hand enqueues after its push, or after the bulk, is to come after the op."""
        if launch.event is None:
            return
        ends = self._block.ends if self._in_block() else {}
        for stream in launch.callers.values():
            if stream != launch.stream:
                ends[stream, launch.stream] = launch.event
        if not self._in_block():
            self._meet(ends)

    def follow(self, op: Op) -> None:
        """What the thread at hand enqueues from now on is to come after an op that is issued."""
        for launch in list(_launches([op])):
            for device in op.flight.callers:
                stream = self.devices.current(device)
                if stream != launch.stream:
                    self.devices.wait(stream, launch.event)

    def _in_block(self) -> bool:
        """Are this thread's own streams to be looked at only when the bulk begins and ends? Not in an op."""
        here = self._engine._here
        return here.bulks > 0 and not here.ops

    def end_block(self) -> None:
        """A block of :meth:`Engine.bulk` is over."""
        block = self._block
        ends, block.ends, block.marks = block.ends, {}, {}
        self._meet(ends)

    def _meet(self, ends: dict[tuple[Stream, Stream], Event]) -> None:
        for (stream, _), event in ends.items():
            self.devices.wait(stream, event)

    # --- completing ---------------------------------------------------------------------------------

    def synchronise(self, op: Op) -> None:
        """Block until an op that is issued is complete, or nearly so: another thread may be about to say it."""
        event = op.flight.event
        if event is not None:
            with contextlib.suppress(Exception):  # the look meets it again
                self.devices.synchronise(event)
        self.look()

    def look(self) -> bool:
        """Complete the ops whose events have come to pass. Were there any?"""
        found = False
        while self._look_once():
            found = True
        if found:
            self._engine._landed()
        return found

    def _look_once(self) -> bool:
        """Look at the first op of each stream."""
        engine = self._engine
        with engine._lock:
            heads = [queue[0] for queue in self._flying.values()]
        ended = [(op, outcome) for op in heads if (outcome := self._outcome(op)) is not None]
        landed: list[tuple[Op, Any, BaseException | None]] = []
        with engine._lock:
            for op, (error,) in ended:
                launch: Launch = op.flight
                queue = self._flying.get(launch.stream)
                if not queue or queue[0] is not op or any(one.state != DONE for one in launch.after):
                    continue  # another thread has been quicker, or is about to complete what comes before
                queue.popleft()
                if not queue:
                    del self._flying[launch.stream]
                error = error or next((one.flight.error for one in launch.inputs if one.flight.error), None)
                result = launch.result if error is None else None
                landed.append((op, result, op.given_up or error))
                for ready in engine._end(op, result, error):
                    engine._dispatch(ready)
        for one in landed:
            engine._leave(*one)
        return bool(landed)

    def _outcome(self, op: Op) -> tuple[BaseException | None] | None:
        """The error that the op itself ended with, in a tuple; None: it has not ended."""
        launch: Launch = op.flight
        if launch.event is None:
            return (launch.error_at_issue,)
        try:
            if not self.devices.done(launch.event):
                return None
        except Exception as raised:
            if launch.error_at_issue is None:
                self._engine._blame(raised, op)
            return (launch.error_at_issue or raised,)
        if launch.time is not None and launch.device_ms is None:
            with contextlib.suppress(Exception):  # the work is done all the same
                launch.started_at = launch.time.at(launch.device, launch.began)
                launch.device_ms = self.devices.elapsed_ms(launch.began, launch.event)
        return (launch.error_at_issue,)

    def trace(self, op: Op, trace: Trace) -> None:
        """Show when an op that is complete was issued, and, if it was timed, when the device worked on it."""
        launch: Launch = op.flight
        trace.add(op, op.started_at, launch.issued_at, what="issue ")
        if launch.device_ms is not None:
            number = self._lanes[launch.device, op.lane].index(launch.stream) + 1
            name = f"device {launch.device}, {op.lane} {number}"
            trace.add(op, launch.started_at, launch.started_at + launch.device_ms / 1e3, stream=name)

    # --- the thread that looks --------------------------------------------------------------------

    def _watch(self) -> None:
        """See that a thread looks. Called with the engine's lock held."""
        if not self._engine._watches_devices:
            return
        if self._asleep:
            self._asleep = False
            self._changed.notify()
        elif not self._watched:
            with contextlib.suppress(RuntimeError):  # no thread is to be had; the next op tries again
                threading.Thread(target=self._serve, name="engine-devices", daemon=True).start()
                self._watched = True

    def retire(self) -> None:
        """Let the thread end when there is nothing to look at. Called with the engine's lock held."""
        self._changed.notify()

    def _serve(self) -> None:
        pause = LOOK_S
        while True:
            pause = LOOK_S if self.look() else min(2 * pause, LOOK_S_MAX)
            with self._engine._lock:
                if self._flying:
                    self._changed.wait(pause)
                elif self._engine._retiring or not self._sleep():
                    self._watched = False
                    return

    def _sleep(self) -> bool:
        """Until something has been issued. False: this thread is to end."""
        self._asleep = True
        self._changed.wait(IDLE_S)
        woken, self._asleep = not self._asleep, False
        return woken


def _launches(ops: Iterable[Op]) -> Iterator[Launch]:
    """Those whose events stand for all that is to be waited for."""
    for op in dict.fromkeys(ops):
        if op.flight.event is not None:
            yield op.flight
        else:  # recording one failed
            yield from _launches(op.flight.after)
