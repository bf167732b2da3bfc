"""Which op may run when. Pure: no thread, no lock, no clock.

Per var there is a FIFO of reads and writes. A read holds the var together with the reads beside
it, a write holds it alone. :meth:`Scheduler.submit` says whether the op may run at once,
:meth:`Scheduler.complete` which ops may run now. What an op does, and on what thread, is unknown here.

An op of a device ends twice: it is *issued* when its work is in a stream, and complete when the device has done it. One
that is issued is no longer in the way of other ops of devices, which have to be told to the device to come after it
(:attr:`Flight.after`); the host's ops wait until it is complete.

The order is the one of program order per var, so the outcome is that of serial execution (the
argument is that of MXNet's engine: Chen et al. 2015, arXiv 1512.01274, section 3.2).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from types import CodeType
from typing import Any

from engine.var import Var

FEW = 8
WAITING, READY, RUNNING, ISSUED, DONE = "waiting", "ready", "running", "issued", "done"


class Flight:
    """What the order of work on devices needs to know of an op there; what runs it hangs more on it."""

    __slots__ = ("after", "error", "inputs")

    def __init__(self) -> None:
        self.after: list[Op] = []  # ops that were issued before it and that its work must follow
        self.inputs: list[Op] = []  # those of them, direct or not, whose error would be its own
        self.error: BaseException | None = None  # that it ended with


class Op:
    """A unit of work with what it reads and writes; what runs it hangs more on it."""

    __slots__ = (
        *("caller", "caller_at", "flight", "fn", "given_up", "handle", "heals", "holds", "info", "interrupt"),
        *("is_async", "lane", "missing", "name", "poisons", "priority", "reads", "sequence", "started_at", "state"),
        *("thread", "watched", "writes"),
    )

    def __init__(self, name: str, reads: tuple[Var, ...], writes: tuple[Var, ...], priority: int = 0) -> None:
        self.name = name
        self.writes = writes if len(writes) < 2 else _once(writes)
        self.reads = reads if len(reads) < 2 else _once(reads)
        self.poisons: Iterable[Var] = self.writes  # those that carry its error
        self.heals: Iterable[Var] = self.writes  # those that are whole again after it
        self.priority = priority
        self.sequence = 0
        self.missing = 0  # vars that it does not hold yet
        self.state = WAITING
        self.flight: Any = None  # a Flight, if its work is done by a device
        self.fn: Any = None
        self.handle: Any = None
        self.holds: Any = None  # arrays, kept alive until the op ends
        self.info: dict[str, Any] | None = None
        self.lane = "cpu"
        self.caller: CodeType | None = None  # the code that pushed it, and at which instruction
        self.caller_at = 0
        self.started_at = 0.0
        self.thread = 0  # that ran it; 0: none
        self.is_async = False
        self.watched = False  # somebody is to be told that it has ended
        self.interrupt: BaseException | None = None  # raised by it, but meant for its thread: KeyboardInterrupt
        self.given_up: BaseException | None = None  # by whoever settles the handle: a deadline, a cancellation

    def __repr__(self) -> str:
        return f"<Op {self.sequence} {self.name}: {self.state}, pushed at {self.site or '?'}>"

    @property
    def site(self) -> str:
        """Where it was pushed, as ``file:line``; made when asked for, which is seldom."""
        if self.caller is None:
            return ""
        line = next((line for low, high, line in self.caller.co_lines() if low <= self.caller_at < high), None)
        return f"{self.caller.co_filename}:{line}"


def _once(vars_: Iterable[Var]) -> Collection[Var]:
    """Each of them once, in their order; looking one up in many takes no longer than in few."""
    found = dict.fromkeys(vars_)
    return found if len(found) > FEW else tuple(found)


class Scheduler:
    """The queues of all vars. Not thread-safe."""

    def __init__(self) -> None:
        self.pending: dict[int, Op] = {}  # submitted and not complete, by sequence
        self._submitted = 0
        self._suspects: dict[Var, list[Op]] = {}  # ops that are issued, whose error the var would carry

    def __repr__(self) -> str:
        return f"<Scheduler: {self._submitted} submitted, {len(self.pending)} pending>"

    def free(self, op: Op) -> bool:
        """Could an op that has not been submitted run at once?"""
        for var in op.writes:
            if not var.idle and (var.queue or not self._passes(op, var, True)):
                return False
        for var in op.reads:
            if (var.writer is not None or var.queue) and (var.queue or not self._passes(op, var, False)):
                return False
        return True

    def submit(self, op: Op) -> bool:
        """Take an op; True if it may run now."""
        op.sequence = self._submitted = self._submitted + 1
        self.pending[op.sequence] = op
        missing = 0
        writes, of_host = op.writes, op.flight is None  # which can follow nothing
        for var in writes:
            if (var.writer is not None or var.readers or var.queue) and (
                of_host or var.queue or not self._follow(op, var, True)
            ):
                var.queue.append(op)
                missing += 1
            else:
                var.writer = op
        for var in op.reads:
            if var in writes:
                continue
            if (var.writer is not None or var.queue) and (of_host or var.queue or not self._follow(op, var, False)):
                var.queue.append(op)
                missing += 1
            else:
                var.readers.add(op)
        op.missing = missing
        if missing:
            return False
        op.state = READY
        if self._suspects and not of_host:
            self._note_inputs(op)
        return True

    @staticmethod
    def _passes(op: Op, var: Var, writes: bool) -> bool:
        """Is everything that is in the way of the op at this var in a stream, where the op can follow it?"""
        if op.flight is None or (var.writer is not None and var.writer.state != ISSUED):
            return False
        if writes:
            for reader in var.readers:  # loops, since a generator costs more
                if reader.state != ISSUED:
                    return False
        return True

    def _follow(self, op: Op, var: Var, writes: bool) -> bool:
        """Let the op take a var that others hold, if it can follow them."""
        if not self._passes(op, var, writes):
            return False
        if var.writer is not None:
            op.flight.after.append(var.writer)
        if writes and var.readers:
            op.flight.after.extend(var.readers)
            var.readers.clear()
        return True

    def poison_of(self, op: Op) -> BaseException | None:
        """The error that came to the op through what it reads."""
        for var in op.reads:
            if var.poison is not None:
                return var.poison
        return None

    def _note_inputs(self, op: Op) -> None:
        """Note whose errors would be the op's: it is ready, so nobody else writes what it reads before it has."""
        inputs = op.flight.inputs
        for var in op.reads:
            if var in self._suspects:
                inputs += self._suspects[var]

    def issue(self, op: Op, error: BaseException | None) -> list[Op]:
        """The op's work is in a stream, or ``error`` has kept it from that.

        What it writes carries the error, or is whole again as far as is known: :meth:`complete` has the last word.

        Returns:
            The ops that may run now.
        """
        op.state = ISSUED
        suspects = self._suspects
        if error is None and op.heals is op.poisons:  # as a rule
            for var in op.heals:
                var.poison = None
                suspects[var] = [op]
        else:
            for var in op.heals if error is None else op.poisons:
                var.poison = error
                suspects.pop(var, None)
            if error is None:
                for var in op.poisons:
                    suspects.setdefault(var, []).append(op)
        ready: list[Op] = []
        for var in (*op.writes, *op.reads):
            if var.queue:
                self._advance(var, ready)
        return ready

    def _land(self, op: Op, error: BaseException | None) -> None:
        """An op that was issued is complete: only vars that no later op has written whole can carry its error."""
        flight: Flight = op.flight
        flight.error, flight.after, flight.inputs = error, [], []
        op.heals, carriers = (), []
        for var in op.poisons:
            suspects = self._suspects.get(var, [])
            if op in suspects:
                carriers.append(var)
                suspects.remove(op)
                if not suspects:
                    del self._suspects[var]
        op.poisons = carriers

    def complete(self, op: Op, error: BaseException | None) -> list[Op]:
        """The op has ended; what it writes carries ``error`` (None: is whole again).

        Returns:
            The ops that may run now.
        """
        if op.state == ISSUED:
            self._land(op, error)
        op.state = DONE
        del self.pending[op.sequence]
        ready: list[Op] = []
        for var in op.heals if error is None else op.poisons:
            var.poison = error
        for var in op.writes:
            if var.writer is op:  # else one that follows it on a device has taken its place
                var.writer = None
            if var.queue:
                self._advance(var, ready)
        for var in op.reads:
            readers = var.readers
            if op in readers:
                readers.discard(op)
                if var.queue and (not readers or var.queue[0].flight is not None):
                    self._advance(var, ready)
        return ready

    def _advance(self, var: Var, ready: list[Op]) -> None:
        queue = var.queue
        while queue:
            op = queue[0]
            writes = var in op.writes
            if (var.writer is not None or (writes and var.readers)) and (
                op.flight is None or not self._follow(op, var, writes)
            ):
                return
            queue.popleft()
            if writes:
                var.writer = op
            else:
                var.readers.add(op)
            op.missing -= 1
            if not op.missing:
                op.state = READY
                if self._suspects and op.flight is not None:
                    self._note_inputs(op)
                ready.append(op)

    def blockers(self, op: Op) -> set[Op]:
        """The ops that ``op`` waits for, directly."""
        found: set[Op] = set()
        if op.state != WAITING:
            return found
        for var in {*op.reads, *op.writes}:
            ahead: list[Op] = []
            for queued in var.queue:
                if queued is op:
                    found.update(ahead)
                    found.update(var.readers)
                    if var.writer is not None:
                        found.add(var.writer)
                    break
                ahead.append(queued)
        found.discard(op)
        return found

    def waits_for(self, op: Op, target: Op) -> bool:
        """Does ``op`` wait for ``target``, directly or through others?"""
        seen: set[Op] = set()
        front = [op]
        while front:
            one = front.pop()
            if one is target:
                return True
            if one not in seen:
                seen.add(one)
                front.extend(self.blockers(one))
        return False

    def validate(self) -> None:
        """Assert what must hold between any two calls."""
        for op in self.pending.values():
            assert (op.missing == 0) == (op.state != WAITING), op
            if op.state == ISSUED:  # others may have followed it
                continue
            held = 0
            for var in op.writes:
                assert var.writer is op or op in var.queue, (op, var)
                held += var.writer is op
            for var in op.reads:
                if var not in op.writes:
                    assert op in var.readers or op in var.queue, (op, var)
                    held += op in var.readers
                assert not var.readers or var.writer is None or var.writer.state == ISSUED, var
            assert held + op.missing == len({*op.reads, *op.writes}), op
        for suspects in self._suspects.values():
            assert all(suspect.state == ISSUED for suspect in suspects), suspects
