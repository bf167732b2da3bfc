"""Starts the processes of a system, tells its workers what to do, and ends them.

kvstore's clusters are started by ``kvstore run``, as users start theirs. MXNet and gloo run in their own
interpreters, by the scripts in ``bench/peers`` of a source checkout.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import kvstore
from kvstore import environment
from kvstore.bench.apart import member
from kvstore.bench.cases import Case, Rounds, System
from kvstore.bench.limits import Numpy
from kvstore.cli.supervisor import Ended, Supervisor
from kvstore.errors import KVStoreError

START_TIMEOUT_S = 120.0
REQUEST_TIMEOUT_S = 300.0
GRACE_S = 3.0
ROOT = Path(kvstore.__file__).parent.parent
SCRIPTS = ROOT / "bench" / "peers"


class BenchError(KVStoreError):
    """A system under measurement failed; carries the end of what it printed."""


@dataclass(frozen=True, slots=True)
class Interpreters:
    """Where the peers are installed."""

    of: dict[str, str] = field(default_factory=dict)  # mxnet, gloo -> its Python

    def has(self, system: System) -> bool:
        return not system.peer or (system.peer in self.of and SCRIPTS.is_dir())


def find_interpreters(mxnet: str | None, torch: str | None) -> Interpreters:
    """The peers that can be measured; this interpreter is asked when none is named."""
    if not SCRIPTS.is_dir():
        return Interpreters()
    found = {}
    for name, module, python in (("mxnet", "mxnet", mxnet), ("gloo", "torch", torch)):
        if python:
            found[name] = python
        elif importlib.util.find_spec(module) is not None:
            found[name] = sys.executable
    return Interpreters(found)


class Running(Protocol):
    """A system that is up."""

    version: str

    def prepare(self, name: str, case: Case, group: str) -> None: ...

    def rounds(self, name: str, case: Case, count: int) -> Rounds: ...

    def check(self, name: str) -> None: ...

    def drop(self, name: str) -> None: ...

    def pids(self) -> dict[str, list[int]]:
        """The processes by role."""

    def close(self) -> None: ...


def start(system: System, interpreters: Interpreters) -> Running:
    """Start a system; returns when all its workers are ready.

    Raises:
        BenchError: it did not come up.
    """
    return Numpy() if system.kind == "numpy" else Processes(system, interpreters)


class Processes:
    """A system of worker processes, each a :class:`kvstore.bench.apart.member.Member`, and others."""

    def __init__(self, system: System, interpreters: Interpreters) -> None:
        self.system = system
        self.version = ""
        self._interpreters = interpreters
        self._members: list[tuple[socket.socket, IO[str]]] = []
        self._pids: dict[str, list[int]] = {}
        self._directory = tempfile.TemporaryDirectory(prefix="kvstore-bench-")
        where = Path(self._directory.name)
        self._control, self._barrier = str(where / "control"), str(where / "barrier")
        Path(self._barrier).write_bytes(bytes(member.BARRIER_BYTES))
        self._log = (where / "log").open("w+")
        self._supervisor = Supervisor(self._log)
        try:
            with socket.socket(socket.AF_UNIX) as listening:
                listening.bind(self._control)
                listening.listen(system.workers)
                self._start()
                hellos = self._accept(listening)
            self.version = hellos[0].get("version", "")
            self._pids["worker"] = [hello["pid"] for hello in hellos]
            if system.kind == "kvstore":
                from kvstore.cluster.status import read_status

                self._pids["server"] = [one["pid"] for one in read_status(hellos[0]["address"])["servers"]]
        except BaseException:
            self.close()
            raise

    # --- start --------------------------------------------------------------------------------

    def _start(self) -> None:
        system, control, barrier = self.system, self._control, self._barrier
        ours = [sys.executable, "-m"]
        if system.kind == "kvstore":
            run = [*ours, "kvstore", "run", "-w", str(system.workers), "-s", str(system.servers), "--"]
            worker = [*ours, "kvstore.bench.worker", control, barrier, str(system.workers), system.optimizer, "0"]
            self._spawn("run", [*run, *worker], KVSTORE_SHARED_MEMORY="0" if system.tcp else "1")
        elif system.kind == "kvstore local":
            arguments = [control, barrier, "1", system.optimizer, str(system.devices)]
            self._spawn("worker", [*ours, "kvstore.bench.worker", *arguments])
        elif system.kind == "pyzmq":
            self._start_pyzmq([*ours, "kvstore.bench.zmq_loop"])
        elif system.kind == "mxnet":
            self._start_mxnet()
        elif system.kind == "mxnet local":
            self._spawn("worker", self._script("local_mxnet.py", control, barrier, system.type, system.optimizer))
        else:
            rendezvous = str(Path(self._directory.name) / "rendezvous")
            for rank in range(system.workers):
                arguments = [control, barrier, str(rank), str(system.workers), rendezvous]
                around = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}  # the latter as torchrun sets it
                self._spawn(f"worker {rank}", self._script("gloo_worker.py", *arguments), **around)

    def _start_pyzmq(self, program: list[str]) -> None:
        where = Path(self._directory.name) / "address"
        self._spawn("server", [*program, "server", str(where), str(self.system.workers)])
        end = time.monotonic() + START_TIMEOUT_S
        while not (where.exists() and where.read_text()):
            self._still_alive(end)
            time.sleep(0.01)
        for rank in range(self.system.workers):
            arguments = [self._control, self._barrier, str(self.system.workers), str(rank), where.read_text()]
            self._spawn(f"worker {rank}", [*program, "client", *arguments])

    def _start_mxnet(self) -> None:
        system = self.system
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        around = {
            "DMLC_PS_ROOT_URI": "127.0.0.1",
            "DMLC_PS_ROOT_PORT": str(port),
            "DMLC_NODE_HOST": "127.0.0.1",
            "DMLC_NUM_WORKER": str(system.workers),
            "DMLC_NUM_SERVER": str(system.servers),
            "OMP_NUM_THREADS": "1",  # never slower on two cores, up to 30 % faster with many small keys
        }
        serve = [self._interpreters.of["mxnet"], "-c", "import mxnet"]  # blocks by MXNet's design, until the end
        self._spawn("scheduler", serve, **around, DMLC_ROLE="scheduler")
        for number in range(system.servers):
            self._spawn(f"server {number}", serve, **around, DMLC_ROLE="server")
        for rank in range(system.workers):
            arguments = [self._control, self._barrier, str(rank), str(system.workers), system.type, system.optimizer]
            self._spawn(f"worker {rank}", self._script("mxnet_worker.py", *arguments), **around, DMLC_ROLE="worker")

    def _script(self, name: str, *arguments: str) -> list[str]:
        return [self._interpreters.of[self.system.peer], str(SCRIPTS / name), *arguments]

    def _spawn(self, name: str, command: list[str], **more: str) -> None:
        """Our own package from here; of a peer's interpreter only what it may import."""
        path = str(Path(member.__file__).parent if self.system.peer else ROOT)
        child = self._supervisor.start(name, command, {**environment.inherited(), "PYTHONPATH": path, **more})
        if name.startswith("server"):
            self._pids.setdefault("server", []).append(child.process.pid)

    def _accept(self, listening: socket.socket) -> list[dict[str, Any]]:
        hellos = []
        listening.settimeout(0.2)
        end = time.monotonic() + START_TIMEOUT_S
        while len(self._members) < self.system.workers:
            try:
                connection, _ = listening.accept()
            except TimeoutError:
                self._still_alive(end)
                continue
            connection.settimeout(REQUEST_TIMEOUT_S)
            self._members.append((connection, connection.makefile("rw")))
            hellos.append(self._answer(self._members[-1][1]))
        return hellos

    def _still_alive(self, end: float) -> None:
        with contextlib.suppress(queue.Empty):
            event = self._supervisor.events.get_nowait()
            name = event.child.name if isinstance(event, Ended) else str(event)
            raise self._failed(f"{name} ended while the system was starting")
        if time.monotonic() > end:
            raise self._failed(f"not up after {START_TIMEOUT_S:g} s")

    def _failed(self, why: str) -> BenchError:
        self._log.flush()
        said = Path(self._log.name).read_text().strip().splitlines()[-5:]
        return BenchError(f"{self.system.kind}: {why}" + "".join(f"\n  {line}" for line in said))

    # --- requests -----------------------------------------------------------------------------

    def _ask(self, **request: Any) -> list[dict[str, Any]]:
        """The answers of all members.

        Raises:
            BenchError: one failed, ended, or did not answer in time.
        """
        line = json.dumps(request) + "\n"
        try:
            for _, stream in self._members:
                stream.write(line)
                stream.flush()
        except OSError as error:
            raise self._failed(f"a worker is gone: {error}") from error
        answers = [self._answer(stream) for _, stream in self._members]
        errors = [answer["error"] for answer in answers if "error" in answer]
        if errors:
            raise self._failed(errors[0])
        return answers

    def _answer(self, stream: IO[str]) -> dict[str, Any]:
        try:
            line = stream.readline()
        except OSError as error:
            raise self._failed(f"a worker did not answer: {error}") from error
        if not line:
            raise self._failed("a worker has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def prepare(self, name: str, case: Case, group: str) -> None:
        self._ask(do="prepare", name=name, case=case.request(group))

    def rounds(self, name: str, case: Case, count: int) -> Rounds:
        answers = self._ask(do="rounds", name=name, count=count, spinning=case.spinning)
        times = [max(times) for times in zip(*(answer["times"] for answer in answers), strict=True)]
        return Rounds(times, sum(answer["cpu_s"] for answer in answers))

    def check(self, name: str) -> None:
        self._ask(do="check", name=name)

    def drop(self, name: str) -> None:
        self._ask(do="drop", name=name)

    def pids(self) -> dict[str, list[int]]:
        return {role: self._pids[role] for role in ("worker", "server") if role in self._pids}

    # --- end ----------------------------------------------------------------------------------

    def close(self) -> None:
        """Ask the workers to leave, wait a little, end what is left."""
        for connection, stream in self._members:
            with contextlib.suppress(OSError, ValueError):
                connection.settimeout(GRACE_S)
                stream.write('{"do": "quit"}\n')
                stream.flush()
        leaving = [c for c in self._supervisor.children if self.system.kind != "pyzmq" or c.name != "server"]
        end = time.monotonic() + (GRACE_S if self._members else 0)
        while time.monotonic() < end and any(child.process.poll() is None for child in leaving):
            time.sleep(0.02)
        self._supervisor.stop(self._supervisor.children, GRACE_S)
        for connection, stream in self._members:
            with contextlib.suppress(OSError):
                stream.close()
            connection.close()
        self._log.close()
        self._directory.cleanup()


def cpu_seconds(pids: list[int]) -> float:
    """Seconds of processor time these processes have used so far."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def available_bytes() -> int:
    """Memory that can be had without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def memory_bytes(pid: int) -> dict[str, int]:
    """A process's proportional share of memory: ``private`` (heap and files), ``shared`` (shared segments)."""
    said = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split(":")
        said[name] = int(value.split()[0]) * 1024
    return {"private": said["Pss"] - said["Pss_Shmem"], "shared": said["Pss_Shmem"]}
