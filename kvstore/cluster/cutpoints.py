"""A worker's cut points: how many it has passed, and at which it marks a cut.

The scheduler asks (Halt) how many have been passed; until it has named the cut point at which a cut is to be marked, no
further one is passed, see :mod:`kvstore.protocol.naming`. What marking means is the caller's business.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from kvstore.cluster.session import SCHEDULER, Session
from kvstore.protocol.messages import HISTORY_MAX, Halt, Named, Passed
from kvstore.protocol.naming import ANSWER_S
from kvstore.protocol.pieces import Key
from kvstore.protocol.requesting import Answered, Divide, Outcome, Request

log = logging.getLogger(__name__)

STEP, BARRIER = 0, 1  # kinds of cut points
HALT_S = 2 * ANSWER_S  # how long a worker waits at its cut point to be told more


class CutPoints:
    """The count of one worker.

    Args:
        mark: sends the marker of a cut to all servers, ahead of all later pushes; does not wait.
        coupled: may this worker have to wait for other workers' pushes?
        clock: a key by whose rounds workers that wait for each other can tell where they are, with this worker's.
        joined: did this worker come to a running job?
    """

    def __init__(
        self,
        session: Session,
        mark: Callable[[Named], None],
        coupled: Callable[[], bool],
        clock: Callable[[], tuple[Key, int] | None],
        joined: bool,
    ) -> None:
        self.passed = 0
        self._clock = clock
        self._joined = joined
        self._timed: Key | None = None  # the clock that the history is of
        self._history: deque[tuple[int, int, int]] = deque(maxlen=HISTORY_MAX - 1)  # see Passed
        self._session = session
        self._mark = mark
        self._coupled = coupled
        self._halted: dict[int, float] = {}  # cuts that have no name yet, and since when
        self._answered: set[int] = set()  # of these, where the scheduler has been told how many have been passed
        self._named: dict[int, Named] = {}  # cuts that are to be marked
        self._resting = 0  # calls that are at their cut point, and will pass it when they end
        self._last = False  # there will be no more cut points
        self._changed = threading.Condition()

    def __repr__(self) -> str:
        return f"<CutPoints: {self.passed} passed, to mark {sorted(named.at for named in self._named.values())}>"

    def reach(self) -> None:
        """This is a cut point."""
        self._pass(STEP)

    @contextmanager
    def resting(self) -> Iterator[None]:
        """What runs meanwhile is one cut point: it pushes nothing, and waits for others perhaps."""
        with self._changed:
            self._resting += 1
        self._mark_due()
        try:
            yield
        finally:
            self._pass(BARRIER)

    def _pass(self, kind: int) -> None:
        """Go on from a cut point, once all cuts have names that may be marked here."""
        with self._changed:
            while (wait := self._halt_left()) > 0:
                self._changed.wait(wait)
            self._history.extend(self._next(kind))
            self.passed += 1
            self._resting -= kind == BARRIER
        self._mark_due()

    def _next(self, kind: int) -> list[tuple[int, int, int]]:
        """The next cut point, as the history has it."""
        clock = self._clock()
        if clock is None:
            return []
        if clock[0] != self._timed:
            self._timed = clock[0]
            self._history.clear()
        return [(self.passed + 1, clock[1], kind)]

    def last(self) -> None:
        """Nothing more will be pushed: from now on every cut is marked at once."""
        with self._changed:
            self._last = True
        self._mark_due()

    def asks(self, cut: int, named: Future[Any]) -> None:
        """This worker itself asks for a cut: the next cut point is one at which it may be marked."""
        with self._changed:
            self._halted[cut] = time.monotonic()
        named.add_done_callback(lambda _: self._go_on(cut))

    def halt(self, message: Halt) -> None:
        """The scheduler asks; in the session's loop."""
        with self._changed:
            if message.cut in self._answered or message.cut in self._named:
                return
            self._answered.add(message.cut)
            self._halted.setdefault(message.cut, time.monotonic())
            count = self.passed
            here = self._next(BARRIER) if self._resting else []
            history = (*self._history, *here)
        passed = Passed(
            self._session.next_id(), message.cut, count, self._coupled(), self._joined, self._timed, history
        )
        self._session.submit([(Request(SCHEDULER, passed), lambda outcome: self._told(message.cut, outcome))])

    def _told(self, cut: int, outcome: Outcome | Divide) -> None:
        with self._changed:
            self._answered.discard(cut)
            if isinstance(outcome, Answered) and isinstance(outcome.reply, Named):
                at = outcome.reply.at
                if not at:
                    if self._resting:  # others come to this cut point, and may say more: it stays the next one
                        self._halted[cut] = time.monotonic()
                        return
                elif at > self.passed or self._last:
                    self._named[cut] = outcome.reply
                else:  # it waited no longer for the name, and a marker now would be wrong
                    log.warning("a cut at cut point %d: %d have been passed; it will fail", at, self.passed)
        self._go_on(cut)
        self._mark_due()

    def _go_on(self, cut: int) -> None:
        """The cut has a name here, or will have none."""
        with self._changed:
            if cut not in self._answered:
                self._halted.pop(cut, None)
                self._changed.notify_all()

    def _halt_left(self) -> float:
        """Seconds that have to be waited yet for the names of cuts."""
        since = min(self._halted.values(), default=None)
        if since is None:
            return 0.0
        left = since + HALT_S - time.monotonic()
        if left <= 0:
            log.warning("a cut point: the scheduler has named no cut for %g s; going on", HALT_S)
            self._halted.clear()
        return left

    def _mark_due(self) -> None:
        """Mark the cuts whose point is here."""
        with self._changed:
            here = self.passed + bool(self._resting)
            due = [named for named in self._named.values() if self._last or named.at <= here]
            for named in due:
                del self._named[named.cut]
        for named in due:
            self._mark(named)
