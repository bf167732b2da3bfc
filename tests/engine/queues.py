"""Streams that do not exist: queues of work, and nothing but their order and events decides what is done when.

Work is done lazily, some of it whenever anybody calls, by a random choice among the streams whose first piece can be
done. Whatever a program forgets to order will sooner or later happen in the wrong order. What the work is, and whose,
is not known here: :mod:`tests.engine.simulated` makes devices of it for the engine, :mod:`tests.gpu.simulated` CuPy's.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

PATIENCE_S = 20.0  # how long a wait may see nothing happen


class Lost(Exception):
    """The host waits for something that never comes."""


class Queue:
    """A stream: one piece of work after another."""

    def __init__(self, name: str, speed: int, device: int) -> None:
        self.name, self.speed, self.device = name, speed, device
        self.items: deque[Item] = deque()

    def __repr__(self) -> str:
        return f"<{self.name} of {self.device}: {len(self.items)} queued>"


class Item:
    """A piece of work. It leaves its queue when :meth:`run` says that it is over."""

    def able(self) -> bool:
        """Can it be begun?"""
        return True

    def run(self, queue: Queue) -> bool:
        """Do it. False: it is still going on, and what is behind it has to wait."""
        raise NotImplementedError


class Mark(Item):
    """An event: it comes to pass when what is before it is done."""

    def __init__(self) -> None:
        self.happened = False

    def run(self, queue: Queue) -> bool:
        self.happened = True
        return True


class Wait(Item):
    """What is behind it comes after a mark of another stream."""

    def __init__(self, mark: Mark) -> None:
        self.mark = mark

    def able(self) -> bool:
        return self.mark.happened

    def run(self, queue: Queue) -> bool:
        return True


class Queues:
    """Some streams, and the dice that move them.

    Args:
        seed: of the choices. (With several threads the order of their calls counts as well.)
    """

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.busy: dict[Queue, None] = {}  # those that have work
        self.diligence = self.random.choice([0.05, 0.2, 1.0])  # how likely a piece of work is done at a call
        self.frozen = False  # nothing is done
        self.made = 0

    def queue(self, device: int, kind: type[Any] = Queue) -> Any:
        """A new stream, of ``kind``."""
        with self.lock:
            self.made += 1
            return kind(f"stream {self.made}", self.random.choice([1, 5, 25]), device)

    def put(self, queue: Queue, item: Item) -> None:
        with self.lock:
            queue.items.append(item)
            self.busy[queue] = None
            self.changed.notify_all()
            self.advance()

    def advance(self) -> None:
        """Do some of the work, or none."""
        while not self.frozen and self.random.random() < self.diligence * 0.7 and self.step():
            pass

    def step(self) -> bool:
        """Do one piece of work. False: nothing can be done now."""
        with self.lock:
            able = [queue for queue in self.busy if queue.items[0].able()]
            if not able or self.frozen:
                return False
            queue = able[0]
            if len(able) > 1:
                queue = self.random.choices(able, [one.speed for one in able])[0]
            if queue.items[0].run(queue):
                self.leave(queue)
            return True

    def leave(self, queue: Queue) -> None:
        """Its first piece of work is over."""
        queue.items.popleft()
        if not queue.items:
            del self.busy[queue]
        self.changed.notify_all()

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Work until it holds. Raises Lost if nothing can be done any more and nobody else brings anything."""
        end = time.monotonic() + PATIENCE_S
        with self.lock:
            while not condition():
                if self.step():
                    end = time.monotonic() + PATIENCE_S
                elif not self.expected() or time.monotonic() > end:
                    raise Lost(f"{what}: {list(self.busy)}")
                else:
                    self.changed.wait(0.05)

    def expected(self) -> bool:
        """Can work become able by what other threads do?"""
        return self.frozen

    def drain(self) -> None:
        """Do all there is."""
        self.until(lambda: not self.busy, "draining")
