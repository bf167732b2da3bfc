"""A whole cluster in one process, on a simulated network and clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from engine.handle import Handle
from engine.serial import SerialEngine
from kvstore.cluster.journal import Journal
from kvstore.cluster.scheduler import Scheduler
from kvstore.cluster.server import Server
from kvstore.create import create_on
from kvstore.errors import DeadlineError, OptionError
from kvstore.store import KVStore
from kvstore.testing.network import SimulatedNetwork, Weather, Web
from kvstore.testing.world import Crashed, Process, Program, World
from kvstore.transport.network import HEARTBEAT_S

HOST = "tcp://10.0.0.1"
PATIENCE_S = 300.0  # where a real process would not wait so long for an answer: here many are lost
Member = tuple[str, int]  # a role and a rank


class _Engine(SerialEngine):
    """Runs ops one by one; who waits for one lets the world go on."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def _await(self, handle: Handle, timeout: float | None) -> None:
        if not self._world.wait(handle, timeout):
            super()._await(handle, 0.0)  # which says what it waits for

    def wait_all(self, timeout: float | None = None) -> None:
        for op in list(self._scheduler.pending.values()):
            self._await(op.handle, timeout)
        super().wait_all(timeout)


class Cluster:
    """A scheduler, servers and workers: the production code on a simulated network, in turns on one clock.

    Everything follows from the seed: the same program fails in the same way again.

    >>> import numpy as np
    >>> from kvstore.testing import Cluster
    >>> def program(kv):
    ...     kv.init("w", np.zeros(2))
    ...     return kv.pushpull("w", np.ones(2)).result()
    >>> with Cluster(workers=2, servers=1, seed=7, loss=0.1) as cluster:
    ...     cluster.run(program)
    [array([2., 2.]), array([2., 2.])]

    Args:
        workers, servers: how many.
        seed: of all chance.
        replication: on how many servers beside its primary a shard is kept.
        delay_s, loss, repetition: of the network; see :class:`kvstore.testing.Weather`.
        heartbeat_s: after so long without a sign of life a member is lost.
        excused: errors that end a worker's program as a crash would: :meth:`run` does not raise them.
        options: of :func:`kvstore.create`, for every worker.
    """

    def __init__(
        self,
        workers: int = 2,
        servers: int = 1,
        *,
        seed: int = 0,
        delay_s: tuple[float, float] = (0.0001, 0.001),
        loss: float = 0.0,
        repetition: float = 0.0,
        heartbeat_s: float = HEARTBEAT_S,
        replication: int = 0,
        excused: tuple[type[Exception], ...] = (),
        **options: Any,
    ) -> None:
        self.world = World(seed)
        self.web = Web(self.world, Weather(delay_s, loss, repetition))
        self.workers = workers
        self.servers = servers
        self._replication = replication
        self._excused: tuple[type[BaseException], ...] = (Crashed, *excused)
        self._journal = Journal(":memory:")  # which outlives the schedulers that write it
        self._options = {"heartbeat": heartbeat_s, **options}
        self._heartbeat_s = heartbeat_s
        self._processes: dict[Member, Process] = {}
        self._outcomes: dict[Member, Future[Any]] = {}
        self._errors: list[Exception] = []  # of programs, the earliest first: a later one may follow from it
        self._over: list[Future[Any]] = []  # outcomes, the earliest first
        self._daemons: dict[Member, Scheduler | Server] = {}
        self.address = f"{HOST}:{self.web.free_port()}"
        self._start_scheduler()
        for rank in range(servers):
            self._start_server(rank)

    def __repr__(self) -> str:
        return f"<Cluster of seed {self.world.seed}: {self.workers} workers, {self.servers} servers, {self.now:.3f} s>"

    @property
    def now(self) -> float:
        """Seconds on the simulated clock."""
        return self.world.now

    @property
    def trace(self) -> list[str]:
        """What was done to the cluster, and when."""
        return self.world.trace

    # --- programs -----------------------------------------------------------------------------

    def run(
        self, program: Callable[[KVStore], Any] | Sequence[Callable[[KVStore], Any]], limit_s: float = 3600.0
    ) -> list[Any]:
        """Run a program in every worker, or to each its own, until all are over.

        Args:
            program: called with the worker's store, which is closed when it returns.
            limit_s: on the simulated clock.

        Returns:
            What the programs return, by rank; None of one that was made to crash.

        Raises:
            DeadlineError: not all are over after ``limit_s``.
            Exception: the first that a program raised, with the seed noted.
        """
        programs = [program] * self.workers if callable(program) else list(program)
        if len(programs) != self.workers:
            raise OptionError(f"run: expected one program or {self.workers}, one per worker; got {len(programs)}")
        for rank, one in enumerate(programs):
            self.start_worker(rank, one)
        return self.join(limit_s)

    def start_worker(self, rank: int, program: Callable[[KVStore], Any], **options: Any) -> None:
        """Begin to run ``program`` as this worker, perhaps one that has crashed; :meth:`join` waits for it."""
        process = self._process("worker", rank)

        def work() -> Any:
            with self._store(process, rank, options) as kv:
                try:
                    return program(kv)
                except Exception as error:
                    self._errors.append(error)
                    raise

        self._outcomes["worker", rank] = self._begin(process, work)

    def join(self, limit_s: float = 3600.0) -> list[Any]:
        """Wait until all programs are over; see :meth:`run`."""
        over = self.world.run(lambda: all(outcome.done() for outcome in self._outcomes.values()), limit_s)
        errors = [*self._errors, *(outcome.exception() for outcome in self._over)]
        for error in errors:
            if error is not None and not isinstance(error, self._excused):
                error.add_note(f"in a simulated cluster of seed {self.world.seed}, at {self.now:.3f} s")
                raise error
        if not over:
            raise DeadlineError(f"seed {self.world.seed}: programs are not over after {limit_s:g} s of simulated time")
        outcomes = [self._outcomes[member] for member in sorted(self._outcomes)]
        return [None if outcome.exception() is not None else outcome.result() for outcome in outcomes]

    def sleep(self, seconds: float) -> None:
        """For programs: let time pass."""
        self.world.sleep(seconds)

    # --- faults -------------------------------------------------------------------------------

    def at(self, seconds: float, fault: Callable[[], None]) -> None:
        """Do this when the clock shows so many seconds."""
        self.world.later(seconds - self.now, fault)

    def crash(self, role: str, rank: int = 0) -> None:
        """End this process as ``kill -9`` would: nothing of it is left, and its connections break."""
        self.world.note(f"crash of {role} {rank}")
        process = self._alive(role, rank)
        process.end()

    def restart(self, role: str, rank: int = 0) -> None:
        """Start a scheduler or server that has crashed; a worker comes back by :meth:`start_worker`.

        The scheduler goes on from its journal, which is on disk when it says anything, so nothing of it is lost.
        """
        self.world.note(f"restart of {role} {rank}")
        if (role, rank) in self._processes and self._processes[role, rank].alive:
            raise OptionError(f"restart: expected a {role} that has crashed, {role} {rank} is alive")
        if role == "scheduler":
            self._start_scheduler()
        elif role == "server":
            self._start_server(rank)
        else:
            raise OptionError(f"restart: expected a scheduler or server, got {role!r}")

    def pause(self, role: str, rank: int = 0) -> None:
        """Stop this process as ``kill -STOP`` would."""
        self.world.note(f"pause of {role} {rank}")
        self._alive(role, rank).pause()
        self.web.look_again()

    def resume(self, role: str, rank: int = 0) -> None:
        """Let a process that was paused go on, as ``kill -CONT`` would."""
        self.world.note(f"{role} {rank} goes on")
        self._alive(role, rank).resume()
        self.web.look_again()

    def partition(self, one: Sequence[Member], other: Sequence[Member]) -> None:
        """Nothing passes between these members, such as ``("server", 1)``, until :meth:`heal`."""
        self.world.note(f"partition between {list(one)} and {list(other)}")
        self.web.cut([self._processes[m] for m in one], [self._processes[m] for m in other])

    def drain(self, rank: int) -> None:
        """Tell this server to hand over its shards and end, as ``kill`` would."""
        self.world.note(f"server {rank} is told to end")
        process, server = self._alive("server", rank), self.daemon("server", rank)
        self._begin(process, server.drain)

    def heal(self, one: Sequence[Member] = (), other: Sequence[Member] = ()) -> None:
        """The network is whole again; or only between these members."""
        if not one:
            self.world.note("the network is whole again")
            self.web.heal()
            return
        self.world.note(f"no partition between {list(one)} and {list(other)} any more")
        self.web.mend([self._processes[m] for m in one], [self._processes[m] for m in other])

    def kind(self) -> None:
        """From now on no message is lost or repeated."""
        self.web.weather.loss = self.web.weather.repetition = 0.0

    # --- looking in ---------------------------------------------------------------------------

    def alive(self, role: str, rank: int = 0) -> bool:
        """Is there such a process, paused or not?"""
        process = self._processes.get((role, rank))
        return process is not None and process.alive

    def daemon(self, role: str, rank: int = 0) -> Any:
        """The latest :class:`Scheduler` or :class:`Server` of this rank, for tests that look inside."""
        return self._daemons[role, rank]

    # --- life ---------------------------------------------------------------------------------

    def close(self) -> None:
        """End all processes."""
        for process in list(self._processes.values()):
            process.end()
        self._journal.close()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            error.add_note(f"seed {self.world.seed}; faults: {'; '.join(self.trace) or 'none'}")
        self.close()

    def _alive(self, role: str, rank: int) -> Process:
        process = self._processes.get((role, rank))
        if process is None or not process.alive:
            raise OptionError(f"expected a {role} {rank} that is alive, there is none")
        return process

    def _process(self, role: str, rank: int) -> Process:
        known = self._processes.get((role, rank))
        if known is not None and known.alive:
            known.end()
        process = self._processes[role, rank] = Process(self.world, f"{role} {rank}")
        return process

    def _begin(self, process: Process, work: Callable[[], Any]) -> Future[Any]:
        program = Program(process, work)
        program.outcome.add_done_callback(self._over.append)
        process.later(0.0, program.start)
        return program.outcome

    def _start_scheduler(self) -> None:
        process = self._process("scheduler", 0)
        network = SimulatedNetwork(self.web, process)
        scheduler = Scheduler(
            self.address, self.workers, self.servers, network=network, heartbeat=self._heartbeat_s,
            replication=self._replication, journal=self._journal,
        )  # fmt: skip
        self._daemons["scheduler", 0] = scheduler
        scheduler.start()

    def _start_server(self, rank: int) -> None:
        process = self._process("server", rank)
        network = SimulatedNetwork(self.web, process)
        server = Server(
            self.address,
            bind=f"{HOST}:*",
            rank=rank,
            network=network,
            runtime=_Engine(self.world),
            heartbeat=self._heartbeat_s,
        )
        self._daemons["server", rank] = server
        self._begin(process, lambda: server.start(connect_timeout=PATIENCE_S))

    @contextmanager
    def _store(self, process: Process, rank: int, options: dict[str, Any]) -> Iterator[KVStore]:
        network = SimulatedNetwork(self.web, process)
        chosen = {"shared_memory": False, "connect_timeout": PATIENCE_S, **self._options, **options}
        with create_on(network, _Engine(self.world), "dist", address=self.address, rank=rank, **chosen) as kv:
            yield kv
