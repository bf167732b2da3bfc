"""``cupy.cuda.nccl``: collective operations, one call per rank, each in a stream of its device.

They are done when every rank's stream has come to it. Sums are made as a ring makes them: in the arrays' own type, each
part of the array begun by another rank. Outside a group a call waits for the other ranks' calls, so one thread that
serves several ranks without a group never comes back; here it is Lost after :data:`PATIENCE_S`.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from tests.engine.queues import Item, Lost, Queue
from tests.gpu.simulated import runtime
from tests.gpu.simulated.machine import Machine, Task
from tests.gpu.simulated.runtime import machine

available = True
PATIENCE_S = 5.0

NCCL_SUM, NCCL_PROD, NCCL_MAX, NCCL_MIN, NCCL_AVG = range(5)
NCCL_INT8 = NCCL_CHAR = 0
NCCL_UINT8 = 1
NCCL_INT32 = NCCL_INT = 2
NCCL_UINT32, NCCL_INT64, NCCL_UINT64 = 3, 4, 5
NCCL_FLOAT16 = NCCL_HALF = 6
NCCL_FLOAT32 = NCCL_FLOAT = 7
NCCL_FLOAT64 = NCCL_DOUBLE = 8
NCCL_BFLOAT16 = 9
_DTYPES = [np.dtype(one) for one in ("i1", "u1", "i4", "u4", "i8", "u8", "f2", "f4", "f8", ml_dtypes.bfloat16)]
_OPERATIONS = [np.add, np.multiply, np.maximum, np.minimum]
_UNIQUE_ID_BYTES = 128

_INVALID_ARGUMENT, _INVALID_USAGE = 4, 5
_ERRORS = {_INVALID_ARGUMENT: "NCCL_ERROR_INVALID_ARGUMENT", _INVALID_USAGE: "NCCL_ERROR_INVALID_USAGE"}


class NcclError(RuntimeError):
    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(f"{_ERRORS[status]}: simulated")


class _Clique:
    """The ranks of one communicator, and the operations that not all of them have called yet, by number."""

    def __init__(self, size: int) -> None:
        self.machine: Machine = machine()
        self.devices: dict[int, int] = {}
        self.size = size
        self.operations: dict[int, Operation] = {}


_cliques: dict[bytes, _Clique] = {}
_ids = itertools.count()


def get_version() -> int:
    return 22603


def get_build_version() -> int:
    return 22603


def get_unique_id() -> Any:
    own = next(_ids).to_bytes(_UNIQUE_ID_BYTES, "big")
    return own if machine().version >= "14" else tuple(own)


# --- groups -----------------------------------------------------------------------------------------


class _Group(threading.local):
    depth = 0

    def __init__(self) -> None:
        self.calls: list[Operation] = []


_group = _Group()


def groupStart() -> None:
    _group.depth += 1


def groupEnd() -> None:
    if not _group.depth:
        raise NcclError(_INVALID_USAGE)
    _group.depth -= 1
    if not _group.depth:
        calls, _group.calls = _group.calls, []
        _finish(calls)


def _finish(calls: list[Operation]) -> None:
    """Until the other ranks have called, too."""
    one = machine()
    end = time.monotonic() + PATIENCE_S
    with one.lock:
        while not all(call.complete for call in calls):
            one.changed.wait(0.05)
            if time.monotonic() > end:
                raise Lost(f"a call of NCCL outside a group waits for other ranks: {calls}")


# --- operations -------------------------------------------------------------------------------------


class Operation:
    """A collective one. ``work(sends, receives)`` does it, on the addresses that the ranks gave."""

    def __init__(self, clique: _Clique, kind: tuple[Any, ...], work: Callable[[list[int], list[int]], Any]) -> None:
        self.clique, self.kind, self.work = clique, kind, work
        self.parts: dict[int, Part] = {}
        self.arrived: dict[int, Queue] = {}

    def __repr__(self) -> str:
        return f"<{self.kind[0]}: ranks {sorted(self.parts)} of {self.clique.size} have called>"

    @property
    def complete(self) -> bool:
        return len(self.parts) == self.clique.size

    def arrive(self, rank: int, queue: Queue) -> bool:
        """False: not all are there. Else it is done, in all their streams."""
        self.arrived[rank] = queue
        if len(self.arrived) < self.clique.size:
            return False
        parts = [self.parts[one] for one in range(self.clique.size)]
        for part in parts:  # each is a kernel of its device, and fails with it
            part.task.run(self.arrived[part.rank])
        if all(self.clique.machine.devices[device].error is None for device in self.clique.devices.values()):
            self.work([part.send for part in parts], [part.receive for part in parts])
        for other, there in self.arrived.items():
            if other != rank:
                self.clique.machine.leave(there)
        return True


class Part(Item):
    """What one rank has of it in its stream."""

    def __init__(
        self, operation: Operation, rank: int, send: int, receive: int, touches: list[tuple[int, int]]
    ) -> None:
        self.operation, self.rank, self.send, self.receive = operation, rank, send, receive
        self.task = Task(operation.clique.machine, f"NCCL's {operation.kind[0]}", lambda: None, touches)

    def __repr__(self) -> str:
        return f"<{self.operation!r} of rank {self.rank}>"

    def able(self) -> bool:
        return self.rank not in self.operation.arrived

    def run(self, queue: Queue) -> bool:
        return self.operation.arrive(self.rank, queue)


class NcclCommunicator:
    def __init__(self, ndev: int, commId: Any, rank: int, config: Any = None) -> None:
        commId = bytes(commId)
        if len(commId) != _UNIQUE_ID_BYTES:
            raise ValueError(f"commId length {len(commId)} != {_UNIQUE_ID_BYTES}.")
        one = machine()
        with one.lock:
            self._join(_cliques.setdefault(commId, _Clique(ndev)), rank, runtime.getDevice())
            one.changed.notify_all()
            end = time.monotonic() + PATIENCE_S
            while len(self._clique.devices) < ndev:
                one.changed.wait(0.05)
                if time.monotonic() > end:
                    raise Lost(f"rank {rank} of a communicator waits for others: {self._clique.devices}")
            _cliques.pop(commId, None)

    def _join(self, clique: _Clique, rank: int, device: int) -> None:
        if rank in clique.devices or device in clique.devices.values() or not 0 <= rank < clique.size:
            raise NcclError(_INVALID_USAGE)
        self._clique, self._rank, self._called = clique, rank, 0
        clique.devices[rank] = device

    @staticmethod
    def initAll(devices: int | list[int]) -> list[NcclCommunicator]:
        numbers = list(range(devices)) if isinstance(devices, int) else devices
        clique = _Clique(len(numbers))
        made = []
        for rank, device in enumerate(numbers):
            communicator = NcclCommunicator.__new__(NcclCommunicator)
            communicator._join(clique, rank, device)
            made.append(communicator)
        return made

    def destroy(self) -> None:
        pass

    abort = destroy

    def check_async_error(self) -> None:
        pass

    def device_id(self) -> int:
        return self._clique.devices[self._rank]

    def rank_id(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._clique.size

    def allReduce(self, sendbuf: int, recvbuf: int, count: int, datatype: int, op: int, stream: int) -> None:
        def work(sends: list[int], receives: list[int]) -> None:
            total = _reduced(sends, count, datatype, op)
            for receive in receives:
                _write(receive, total)

        self._call(("allReduce", count, datatype, op), work, sendbuf, recvbuf, count, stream, True)

    def reduce(self, sendbuf: int, recvbuf: int, count: int, datatype: int, op: int, root: int, stream: int) -> None:
        def work(sends: list[int], receives: list[int]) -> None:
            _write(receives[root], _reduced(sends, count, datatype, op))

        self._call(("reduce", count, datatype, op, root), work, sendbuf, recvbuf, count, stream, root == self._rank)

    def broadcast(self, sendbuff: int, recvbuff: int, count: int, datatype: int, root: int, stream: int) -> None:
        def work(sends: list[int], receives: list[int]) -> None:
            value = _seen(sends[root], count, datatype).copy()
            for receive in receives:
                _write(receive, value)

        send = sendbuff if root == self._rank else recvbuff
        self._call(("broadcast", count, datatype, root), work, send, recvbuff, count, stream, True)

    def bcast(self, buff: int, count: int, datatype: int, root: int, stream: int) -> None:
        self.broadcast(buff, buff, count, datatype, root, stream)

    def _call(self, kind: Any, work: Any, send: int, receive: int, count: int, stream: int, receives: bool) -> None:
        one = self._clique.machine
        with one.lock:
            operation = self._clique.operations.setdefault(self._called, Operation(self._clique, kind, work))
            if operation.kind != kind:
                raise NcclError(_INVALID_ARGUMENT)
            size = count * _DTYPES[kind[2]].itemsize
            touches = [(send, size)] + [(receive, size)] * receives if size else []
            part = operation.parts[self._rank] = Part(operation, self._rank, send, receive, touches)
            one.launches[f"nccl_{kind[0]}"] += 1
            before, one.here.device = one.here.device, self.device_id()
            try:
                there = runtime.ask(one.stream_of, stream)
                if there.device != self.device_id():
                    raise NcclError(_INVALID_USAGE)
                runtime.ask(one.enqueue, there, part)
            finally:
                one.here.device = before
            if operation.complete:
                del self._clique.operations[self._called]
            self._called += 1
        if _group.depth:
            _group.calls.append(operation)
        else:
            _finish([operation])


def _seen(address: int, count: int, datatype: int) -> Any:
    arena = machine().arena_of(address)
    assert arena is not None
    return arena.array(address, (count,), None, _DTYPES[datatype])


def _write(address: int, value: Any) -> None:
    arena = machine().arena_of(address)
    if arena is not None:
        arena.array(address, value.shape, None, value.dtype)[...] = value


def _reduced(addresses: list[int], count: int, datatype: int, op: int) -> Any:
    """Part by part; each goes round from another rank on."""
    values = [_seen(address, count, datatype) for address in addresses] if count else []
    total = np.empty(count, _DTYPES[datatype])
    ranks = len(addresses)
    cuts = [count * part // ranks for part in range(ranks + 1)]
    for part in range(ranks):
        span = slice(cuts[part], cuts[part + 1])
        ring = [values[(part + 1 + step) % ranks][span] for step in range(ranks)] if count else []
        if ring:
            sum_ = ring[0].copy()
            for value in ring[1:]:
                sum_ = _OPERATIONS[op if op != NCCL_AVG else NCCL_SUM](sum_, value).astype(total.dtype)
            total[span] = sum_ / ranks if op == NCCL_AVG else sum_
    return total
