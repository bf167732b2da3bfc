"""A clock that jumps, and threads that take turns: the same seed, the same run.

Programs are written as they would be for real: they call and wait. Each is a thread of its own, but only one
thread runs at any time, and it runs until it waits. Then the next event of the agenda is due, however far ahead:
the clock jumps there. So hours pass in seconds, and nothing depends on the speed of the machine.

This is simulation as in Zhou et al., "FoundationDB", SIGMOD 2021, section 4, with threads for its coroutines.
"""

from __future__ import annotations

import heapq
import random
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Crashed(BaseException):
    """Raised in a program whose process has been made to crash, where it waits. Not to be caught."""


class Process:
    """Something that lives, may be stopped for a while, and dies: what happens in it is told here first."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.alive = True
        self.paused = False
        self.programs: list[Program] = []
        self.on_end: list[Callable[[], None]] = []  # told when the process has died
        self._delayed: list[Callable[[], None]] = []  # due while it was paused

    def __repr__(self) -> str:
        state = "dead" if not self.alive else "paused" if self.paused else "alive"
        return f"<Process {self.name}: {state}>"

    def later(self, delay_s: float, event: Callable[[], None]) -> None:
        """Call ``event`` in so many seconds, unless the process has died; later if it is paused then."""
        self.world.later(delay_s, lambda: self._now(event))

    def _now(self, event: Callable[[], None]) -> None:
        if self.paused:
            self._delayed.append(event)
        elif self.alive:
            event()

    def pause(self) -> None:
        """Nothing happens in it until :meth:`resume`."""
        self.paused = True

    def resume(self) -> None:
        """Go on; what was due meanwhile happens now."""
        self.paused = False
        delayed, self._delayed = self._delayed, []
        for event in delayed:
            self.later(0.0, event)

    def end(self) -> None:
        """It dies, as by ``kill -9``."""
        if not self.alive:
            return
        self.alive = self.paused = False
        self._delayed.clear()
        for tell in self.on_end:
            tell()
        for program in self.programs:
            program.unwind()


class Program:
    """A thread that runs while the world waits for it, and waits while the world goes on."""

    def __init__(self, process: Process, work: Callable[[], Any]) -> None:
        self.process = process
        self.outcome: Future[Any] = Future()
        self._work = work
        self._go = threading.Semaphore(0)
        self._back = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name=process.name, daemon=True)
        process.programs.append(self)

    def __repr__(self) -> str:
        return f"<Program of {self.process.name}: {'over' if self.outcome.done() else 'waits'}>"

    def start(self) -> None:
        """Run until it waits for the first time."""
        self.process.world.running[self._thread] = self
        self._thread.start()
        self._back.acquire()

    def go_on(self) -> None:
        """Run until it waits again."""
        if not self.outcome.done():
            self._go.release()
            self._back.acquire()

    def unwind(self) -> None:
        """Its process has died."""
        if self._thread.ident is not None and threading.current_thread() is not self._thread:
            self.go_on()

    def step_back(self) -> None:
        """From within: let the world go on."""
        self._back.release()
        self._go.acquire()
        if not self.process.alive:
            raise Crashed(self.process.name)

    def _run(self) -> None:
        try:
            self.outcome.set_result(self._work())
        except BaseException as error:
            self.outcome.set_exception(error)
        finally:
            del self.process.world.running[self._thread]
            self._back.release()


class World:
    """The clock, the agenda, and one source of chance."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.chance = random.Random(seed)
        self.now = 0.0
        self.running: dict[threading.Thread, Program] = {}  # programs by their threads
        self.trace: list[str] = []
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def __repr__(self) -> str:
        return f"<World of seed {self.seed} at {self.now:.3f} s>"

    def note(self, what: str) -> None:
        """Write it into the trace, with the time."""
        self.trace.append(f"{self.now:10.4f} {what}")

    def later(self, delay_s: float, event: Callable[[], None]) -> None:
        """Call ``event`` in so many seconds."""
        self._count += 1
        heapq.heappush(self._agenda, (self.now + max(0.0, delay_s), self._count, event))

    def run(self, until: Callable[[], bool], limit_s: float) -> bool:
        """Let the world go on until then; False: so many seconds have passed before."""
        end = self.now + limit_s
        while not until():
            if not self._agenda or self._agenda[0][0] > end:
                self.now = max(self.now, end) if limit_s < 1e9 else self.now
                return False
            at, _, event = heapq.heappop(self._agenda)
            self.now = max(self.now, at)
            event()
        return True

    def wait(self, awaited: Future[Any], timeout_s: float | None) -> bool:
        """Let the world go on until ``awaited`` is done; False when the time is over first.

        Raises:
            Crashed: the caller's process has been made to crash.
        """
        program = self.running.get(threading.current_thread())
        if program is not None and not program.process.alive:
            raise Crashed(program.process.name)
        if Future.done(awaited):
            return True
        limit_s = 1e12 if timeout_s is None else timeout_s
        if program is None:
            return self.run(awaited.done, limit_s)
        self._resume_when(program, awaited, limit_s)
        return awaited.done()

    def sleep(self, seconds: float) -> None:
        """For programs: time passes."""
        self.wait(Future(), seconds)

    def _resume_when(self, program: Program, awaited: Future[Any], limit_s: float) -> None:
        waiting = [True]

        def resume() -> None:
            if waiting[0]:
                waiting[0] = False
                program.go_on()

        awaited.add_done_callback(lambda _: program.process.later(0.0, resume))
        program.process.later(limit_s, resume)
        program.step_back()
        waiting[0] = False


class Awaited(Future[Any]):
    """A future of the simulated world: who waits for it lets the world go on."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def result(self, timeout: float | None = None) -> Any:
        """The result; raises TimeoutError after ``timeout`` seconds of the simulated clock."""
        self._world.wait(self, timeout)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The error or None; waits like :meth:`result`."""
        self._world.wait(self, timeout)
        return super().exception(0)
