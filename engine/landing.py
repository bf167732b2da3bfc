"""How the host learns that ops of devices are complete.

Nobody waits for a device to find out. As long as there are events that have not come to pass, one thread looks at them
now and then; who waits for a handle without a timeout waits for its event himself.
"""

from __future__ import annotations

import contextlib
import threading
from itertools import islice
from typing import TYPE_CHECKING, Any

from engine.launch import Launch, Track
from engine.scheduler import DONE, Op

if TYPE_CHECKING:
    from engine.core import Core

LOOK_S = 50e-6  # between two looks at what is on its way, at first
LOOK_S_MAX = 1e-3  # and when nothing has come of many
IDLE_S = 30.0  # the thread that looks ends after so long without anything to look at
MANY = 64  # ops of a stream that are looked at together


class Landing:
    """Completes the ops on some tracks. Thread-safe; state changes under the engine's lock."""

    def __init__(self, engine: Core) -> None:
        self._engine = engine
        self.tracks: list[Track] = []
        self._changed = engine._lock.condition()
        self._watched = False  # there is a thread that looks
        self._asleep = False

    def __repr__(self) -> str:
        return f"<Landing: {sum(len(track.ops) for track in self.tracks)} ops issued>"

    def expect(self, op: Op) -> None:
        """The op is issued. Called with the engine's lock held."""
        op.flight.track.ops.append(op)
        if not self._engine._watches_devices:
            return
        if self._asleep:
            self._asleep = False
            self._changed.notify()
        elif not self._watched:
            with contextlib.suppress(RuntimeError):  # no thread is to be had; the next op tries again
                threading.Thread(target=self._serve, name="engine-devices", daemon=True).start()
                self._watched = True

    def synchronise(self, op: Op) -> None:
        """Block until an op that is issued is complete, or nearly so: another thread may be about to say it."""
        event = op.flight.event
        if event is not None:
            with contextlib.suppress(Exception):  # the look meets it again
                self._engine._streams_in_use.devices.synchronise(event)
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
        engine = self._engine
        with engine._lock:
            queues = [list(islice(track.ops, MANY)) for track in self.tracks if track.ops]
        ended: list[tuple[int, Op, BaseException | None]] = []
        for ops in queues:
            for op in ops:
                outcome = self._outcome(op)
                if outcome is None:
                    break
                ended.append((op.sequence, op, outcome[0]))
        if not ended:
            return False
        if len(queues) > 1:
            ended.sort()  # what they come after has been pushed before
        landed: list[tuple[Op, Any, BaseException | None]] = []
        with engine._lock:
            for _, op, error in ended:
                launch: Launch = op.flight
                assert launch.track is not None
                there = launch.track.ops
                if not there or there[0] is not op:
                    continue  # another thread has been quicker, or one before it is not complete
                for one in launch.after:
                    if one.state != DONE:
                        break
                else:
                    there.popleft()
                    for one in launch.inputs:
                        error = one.flight.error if error is None else error
                    result = launch.result if error is None else None
                    for ready in engine._end(op, result, error):
                        engine._dispatch(ready)
                    launch.event = None  # which may be one of few
                    landed.append((op, result, op.given_up or error))
        for op, result, error in landed:
            engine._leave(op, result, error)
        return bool(landed)

    def _outcome(self, op: Op) -> tuple[BaseException | None] | None:
        """The error that the op itself ended with, in a tuple; None: it has not ended."""
        launch: Launch = op.flight
        event = launch.event
        if event is None:
            return (launch.error_at_issue,)
        try:
            if not self._engine._streams_in_use.devices.done(event):
                return None
        except Exception as raised:
            if launch.error_at_issue is None:
                self._engine._blame(raised, op)
            return (launch.error_at_issue or raised,)
        if launch.timing is not None:
            launch.timing.end(event)
        return (launch.error_at_issue,)

    # --- the thread that looks --------------------------------------------------------------------

    def retire(self) -> None:
        """Let the thread end when there is nothing to look at. Called with the engine's lock held."""
        self._changed.notify()

    def _serve(self) -> None:
        pause = LOOK_S
        while True:
            pause = LOOK_S if self.look() else min(2 * pause, LOOK_S_MAX)
            with self._engine._lock:
                if any(track.ops for track in self.tracks):
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
