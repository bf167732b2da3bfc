"""The machine that the simulated CuPy runs on: its devices' memory, streams and events, and the host's pinned memory.

It does what CUDA's runtime does, with numbers for pointers, streams and events. Addresses are real ones of this
process, and each device has a range of its own. Only one lock is taken here, and no function of others is called with
it but host functions, which have a thread of their own.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import itertools
import mmap
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from tests.engine.queues import PATIENCE_S, Item, Mark, Queue, Queues, Wait

HOST = -1
PAGEABLE, PINNED = "pageable", "pinned"
INVALID_VALUE, OUT_OF_MEMORY, INVALID_DEVICE, INVALID_HANDLE, NOT_READY = 1, 2, 101, 400, 600
ILLEGAL_ADDRESS, PEER_ENABLED, PEER_NOT_ENABLED = 700, 704, 705
HOST_REGISTERED, HOST_NOT_REGISTERED, PEER_UNSUPPORTED = 712, 713, 217
NAMES = {
    INVALID_VALUE: "cudaErrorInvalidValue: invalid argument",
    OUT_OF_MEMORY: "cudaErrorMemoryAllocation: out of memory",
    INVALID_DEVICE: "cudaErrorInvalidDevice: invalid device ordinal",
    INVALID_HANDLE: "cudaErrorInvalidResourceHandle: invalid resource handle",
    NOT_READY: "cudaErrorNotReady: device not ready",
    ILLEGAL_ADDRESS: "cudaErrorIllegalAddress: an illegal memory access was encountered",
    PEER_ENABLED: "cudaErrorPeerAccessAlreadyEnabled: peer access is already enabled",
    PEER_NOT_ENABLED: "cudaErrorPeerAccessNotEnabled: peer access has not been enabled",
    HOST_REGISTERED: "cudaErrorHostMemoryAlreadyRegistered: part or all of the memory range is already mapped",
    HOST_NOT_REGISTERED: "cudaErrorHostMemoryNotRegistered: pointer does not correspond to a registered memory region",
    PEER_UNSUPPORTED: "cudaErrorPeerAccessUnsupported: peer access is not supported between these two devices",
}
LEGACY, PER_THREAD = 1, 2  # streams' numbers, beside 0
UNIT = 512  # bytes: what is allocated is a multiple, and begins at one
GARBAGE = 0xA5
ARENA = 2 << 30  # addresses of a device, and of pinned memory; only what is used takes memory


class Failure(Exception):
    """A call that CUDA answers with an error.

    Args:
        status: CUDA's number.
        why: what the simulation knows of it.
    """

    def __init__(self, status: int, why: str) -> None:
        super().__init__(status, why)
        self.status, self.why = status, why


class Arena:
    """A range of addresses, and which parts of it are in use."""

    def __init__(self, size: int) -> None:
        self.memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
        self.bytes = np.frombuffer(self.memory, np.uint8)
        self.start = self.bytes.ctypes.data
        self.end = self.start + size
        self.used: dict[int, int] = {}  # size by address
        self.order: list[int] = []  # the addresses, sorted
        self.free = [(self.start, size)]
        self.bytes_in_use = self.bytes_max = 0

    def __contains__(self, address: int) -> bool:
        return self.start <= address < self.end

    def allocate(self, size: int) -> int:
        size = max(UNIT, -(-size // UNIT) * UNIT)
        for at, (start, room) in enumerate(self.free):
            if room >= size:
                self.free[at : at + 1] = [(start + size, room - size)] if room > size else []
                self.used[start] = size
                bisect.insort(self.order, start)
                self.bytes_in_use += size
                self.bytes_max = max(self.bytes_max, self.bytes_in_use)
                self.scribble(start, size)
                return start
        raise Failure(OUT_OF_MEMORY, f"{size} bytes, {self.bytes_in_use} in use")

    def release(self, address: int) -> None:
        size = self.used.pop(address, None)
        if size is None:
            raise Failure(INVALID_VALUE, f"nothing was allocated at {address:#x}")
        self.order.remove(address)
        self.bytes_in_use -= size
        self.scribble(address, size)
        bisect.insort(self.free, (address, size))
        merged: list[tuple[int, int]] = []
        for start, room in self.free:
            if merged and sum(merged[-1]) == start:
                merged[-1] = merged[-1][0], merged[-1][1] + room
            else:
                merged.append((start, room))
        self.free = merged

    def scribble(self, address: int, size: int) -> None:
        self.bytes[address - self.start : address - self.start + size] = GARBAGE

    def allocated(self, address: int, size: int) -> bool:
        """Is all of it in use, as one allocation?"""
        at = bisect.bisect_right(self.order, address) - 1
        return at >= 0 and address + size <= self.order[at] + self.used[self.order[at]]

    def array(self, address: int, shape: tuple[int, ...], strides: tuple[int, ...] | None, dtype: Any) -> np.ndarray:
        if 0 in shape:
            return np.empty(shape, dtype)
        return np.ndarray(shape, dtype, self.memory, address - self.start, strides)


class Stream(Queue):
    """Of a device. ``blocking``: it and the null stream wait for each other."""

    number = 0
    blocking = True
    gone = False

    def __repr__(self) -> str:
        return f"<stream {self.number:#x} of device {self.device}: {len(self.items)} queued>"


class Event:
    def __init__(self, number: int, device: int, timed: bool) -> None:
        self.number, self.device, self.timed = number, device, timed
        self.mark: TimedMark | None = None

    def __repr__(self) -> str:
        return f"<event {self.number:#x} of device {self.device}, {'done' if self.done else 'not done'}>"

    @property
    def done(self) -> bool:
        return self.mark is None or self.mark.happened


class TimedMark(Mark):
    """``at``: how many pieces of work had been done."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine, self.at = machine, 0

    def run(self, queue: Queue) -> bool:
        self.at = self.machine.done
        return super().run(queue)


Touches = Iterable[tuple[int, int]] | Callable[[], Iterable[tuple[int, int]]]


class Task(Item):
    """Work of a device: a kernel or a copy.

    ``touches``: (address, bytes) of the memory that it reads or writes; or what gives it, when the work begins.
    """

    def __init__(self, machine: Machine, name: str, work: Callable[[], Any], touches: Touches) -> None:
        self.machine, self.name, self.work = machine, name, work
        self.touches = touches if callable(touches) else tuple(touches)
        self.copies = False  # the first is written

    def __repr__(self) -> str:
        return f"<{self.name}>"

    def run(self, queue: Queue) -> bool:
        self.machine.done += 1
        device = self.machine.devices[queue.device]
        if device.error is None:
            for at, (address, size) in enumerate(self.touches() if callable(self.touches) else self.touches):
                why = self.machine.forbidden(queue.device, address, size, self.copies, self.copies and at == 0)
                if why:
                    device.fail(ILLEGAL_ADDRESS, f"{self.name} on {queue!r}: {why}")
                    return True
            try:
                self.work()
            except Failure as failure:
                device.fail(failure.status, f"{self.name}: {failure.why}")
            except Exception as error:
                device.fail(ILLEGAL_ADDRESS, f"{self.name}: {error!r}")
        return True


class HostCall(Item):
    """A function that CUDA calls on a thread of its own; the stream goes on when it has returned."""

    def __init__(self, machine: Machine, function: Callable[[], Any]) -> None:
        self.machine, self.function, self.begun = machine, function, False

    def able(self) -> bool:
        return not self.begun

    def run(self, queue: Queue) -> bool:
        self.begun = True
        self.machine.call(self.function, queue)
        return False


class Device:
    """``error``: the first one, which every later call meets as well."""

    def __init__(self, number: int, null: Stream, size: int) -> None:
        self.number, self.null, self.arena = number, null, Arena(size)
        self.streams: list[Stream] = []  # which wait for the null stream
        self.peers: set[int] = set()  # whose memory its kernels may touch
        self.error: Failure | None = None
        self.told = False

    def __repr__(self) -> str:
        return f"<device {self.number}: {self.arena.bytes_in_use} bytes in use, error {self.error}>"

    def fail(self, status: int, why: str) -> None:
        self.error = self.error or Failure(status, why)


class Here(threading.local):
    """What a thread has chosen."""

    def __init__(self) -> None:
        self.device = 0
        self.streams: dict[int, Stream] = {}  # those of the thread


class Machine(Queues):
    """Some devices and their host. Thread-safe.

    Args:
        devices: how many.
        seed: of what happens when.
        peers: ``peers(one, other)``: can kernels of one device reach the memory of the other?
        memory_bytes: of each device.
        version: of CuPy.

    Attributes:
        launches: kernels by name.
        copies: how many by (from, to, how the host's memory was: "pinned", "pageable" or ""), as memories are
            numbered, :data:`HOST` or a device.
        copied_bytes: the bytes of those.
        synchronised: how often each thread, by name, has waited for a device.
    """

    def __init__(
        self,
        devices: int = 2,
        seed: int = 0,
        peers: Callable[[int, int], bool] = lambda one, other: True,
        memory_bytes: int = ARENA,
        version: str = "14.0.0",
    ) -> None:
        super().__init__(seed)
        self.version = version
        self._numbers = itertools.count(0x10000, 16)
        self.can_reach = peers
        self.devices = [Device(number, self._stream(number), memory_bytes) for number in range(devices)]
        self.pinned = Arena(ARENA)
        self.registered: dict[int, int] = {}  # size by address
        self.read_only: set[int] = set()  # those of them that devices may not write
        self.streams: dict[int, Stream] = {}
        self.events: dict[int, Event] = {}
        self.here = Here()
        self.awaited = False  # may somebody wait while all stands still?
        self.haste = self.random.choice([0.5, 0.8, 0.95])  # how likely another piece of work is done at a look
        self.dropped: deque[int] = deque()  # memory to be freed with the next call: garbage is collected anywhere
        self.done = 0
        self.launches: Counter[str] = Counter()
        self.copies: Counter[tuple[int, int, str]] = Counter()
        self.copied_bytes: Counter[tuple[int, int, str]] = Counter()
        self.synchronised: Counter[str] = Counter()
        self._calls: list[tuple[Callable[[], Any], Queue]] = []
        self._caller: threading.Thread | None = None
        self._calling = 0
        self._open = True

    def __repr__(self) -> str:
        return f"<Machine: {len(self.devices)} devices, {sum(len(one.items) for one in self.busy)} pieces of work>"

    # --- memory -------------------------------------------------------------------------------------

    def memory_of(self, address: int) -> int | str:
        """A device's number, or how the host's memory there is: "pinned" or "pageable"."""
        for device in self.devices:
            if address in device.arena:
                return device.number
        if address in self.pinned:
            return PINNED
        return PINNED if self._registration(address) is not None else PAGEABLE

    def _registration(self, address: int) -> tuple[int, int] | None:
        with self.lock:
            for start, size in self.registered.items():
                if start <= address < start + size:
                    return start, size
            return None

    def arena_of(self, address: int) -> Arena | None:
        for arena in (*[device.arena for device in self.devices], self.pinned):
            if address in arena:
                return arena
        return None

    def forbidden(self, device: int, address: int, size: int, copies: bool, writes: bool) -> str | None:
        """Why work of a device may not touch this memory."""
        if not size:
            return None
        memory = self.memory_of(address)
        what = f"{size} bytes at {address:#x}"
        if memory == PAGEABLE:
            return f"{what} are host memory that is not pinned (any more)"
        if memory == PINNED:
            found = self._registration(address)
            whole = self.pinned.allocated(address, size) if found is None else address + size <= sum(found)
            if writes and found is not None and found[0] in self.read_only:
                return f"{what} are registered to be read only"
            return None if whole else f"{what} are not all pinned"
        assert isinstance(memory, int)
        if not self.devices[memory].arena.allocated(address, size):
            return f"{what} of device {memory} are not allocated"
        if memory != device and not copies and memory not in self.devices[device].peers:
            return f"{what} are of device {memory}, to which device {device} has no peer access"
        return None

    def allocate(self, size: int) -> int:
        with self.lock:
            self._sweep()
            return self._current().arena.allocate(size)

    def _sweep(self) -> None:
        while self.dropped:
            address = self.dropped.popleft()
            (self.release_host if address in self.pinned else self.release)(address)

    def release(self, address: int) -> None:
        memory = self.memory_of(address)
        if not isinstance(memory, int):
            raise Failure(INVALID_VALUE, f"{address:#x} is not a device's memory")
        self._finish(memory)
        with self.lock:
            self.devices[memory].arena.release(address)

    def allocate_host(self, size: int) -> int:
        with self.lock:
            self._sweep()
            return self.pinned.allocate(size)

    def release_host(self, address: int) -> None:
        with self.lock:
            self.pinned.release(address)

    def register(self, address: int, size: int, read_only: bool) -> None:
        with self.lock:
            if size <= 0 or self.memory_of(address) in range(len(self.devices)):
                raise Failure(INVALID_VALUE, f"{size} bytes at {address:#x}")
            for start, room in (*self.registered.items(), *self.pinned.used.items()):
                if address < start + room and start < address + size:
                    raise Failure(HOST_REGISTERED, f"{size} bytes at {address:#x}: {room} at {start:#x} are already")
            self.registered[address] = size
            if read_only:
                self.read_only.add(address)

    def unregister(self, address: int) -> None:
        with self.lock:
            if address not in self.registered:
                raise Failure(HOST_NOT_REGISTERED, f"{address:#x}")
            del self.registered[address]
            self.read_only.discard(address)

    def scribble(self, address: int, size: int) -> None:
        """Overwrite it, as somebody would to whom it belongs now."""
        with self.lock:
            arena = self.arena_of(address)
            if arena is not None:
                arena.scribble(address, size)

    # --- devices ------------------------------------------------------------------------------------

    def _current(self) -> Device:
        return self.devices[self.here.device]

    def choose(self, device: int) -> None:
        if not 0 <= device < len(self.devices):
            raise Failure(INVALID_DEVICE, f"device {device} of {len(self.devices)}")
        self.here.device = device

    def reaches(self, device: int, peer: int) -> bool:
        """Can kernels of the device touch the peer's memory?"""
        for one in (device, peer):
            if not 0 <= one < len(self.devices):
                raise Failure(INVALID_DEVICE, f"device {one}")
        return device != peer and self.can_reach(device, peer)

    def enable_peer(self, peer: int) -> None:
        with self.lock:
            device = self._current()
            if not self.reaches(device.number, peer):
                raise Failure(PEER_UNSUPPORTED, f"from {device.number} to {peer}")
            if peer in device.peers:
                raise Failure(PEER_ENABLED, f"from {device.number} to {peer}")
            device.peers.add(peer)

    def disable_peer(self, peer: int) -> None:
        with self.lock:
            if peer not in self._current().peers:
                raise Failure(PEER_NOT_ENABLED, f"to {peer}")
            self._current().peers.remove(peer)

    def check(self, device: int) -> None:
        """Raise the error that its work has met."""
        one = self.devices[device]
        if one.error is not None:
            one.told = True
            raise one.error

    # --- streams ------------------------------------------------------------------------------------

    def _stream(self, device: int, blocking: bool = True) -> Stream:
        stream: Stream = self.queue(device, Stream)
        stream.number, stream.blocking = next(self._numbers), blocking
        return stream

    def new_stream(self, blocking: bool) -> int:
        with self.lock:
            device = self._current()
            stream = self._stream(device.number, blocking)
            self.streams[stream.number] = stream
            if blocking:
                device.streams.append(stream)
            return stream.number

    def end_stream(self, number: int) -> None:
        """What is in it will be done."""
        with self.lock:
            stream = self.streams.pop(number, None)
            if stream is not None and stream.blocking:
                device = self.devices[stream.device]
                device.streams = [one for one in device.streams if one is not stream or one.items]

    def stream_of(self, number: int) -> Stream:
        """Raises Failure if there is none."""
        if number in (0, LEGACY):
            return self._current().null
        if number == PER_THREAD:
            device = self._current()
            if device.number not in self.here.streams:
                with self.lock:
                    self.here.streams[device.number] = self._stream(device.number)
                    device.streams.append(self.here.streams[device.number])
            return self.here.streams[device.number]
        stream = self.streams.get(number)
        if stream is None:
            raise Failure(INVALID_HANDLE, f"no stream {number:#x}")
        return stream

    def enqueue(self, stream: Stream, item: Item) -> None:
        with self.lock:
            self.check(stream.device)
            self._meet(stream)
            self.put(stream, item)

    def _meet(self, stream: Stream) -> None:
        """The null stream and the blocking ones of its device wait for each other."""
        device = self.devices[stream.device]
        others = device.streams if stream is device.null else [device.null] if stream.blocking else []
        for other in others:
            if other.items and other is not stream:
                mark = Mark()
                other.items.append(mark)
                stream.items.append(Wait(mark))
                self.busy[stream] = None

    def launch(self, name: str, number: int, work: Callable[[], Any], touches: Touches) -> None:
        """A kernel, on a stream of the current device."""
        with self.lock:
            stream = self.stream_of(number)
            if stream.device != self.here.device:
                raise Failure(INVALID_HANDLE, f"{name}: {stream!r} is not of the current device, {self.here.device}")
            self.launches[name] += 1
            self.enqueue(stream, Task(self, name, work, touches))

    def copy(self, target: int, source: int, size: int, number: int) -> None:
        """As cudaMemcpyAsync: what is not pinned has been read, or written, when this returns."""
        if not size:
            return
        with self.lock:
            stream = self.stream_of(number)
            to, of = self.memory_of(target), self.memory_of(source)
            kept = None
            written, taken = target, source
            if PAGEABLE in (to, of) and to != of:  # by way of memory of the driver's
                kept = (ctypes.c_char * size)()
                if of == PAGEABLE:
                    ctypes.memmove(kept, source, size)
                    taken = ctypes.addressof(kept)
                else:
                    written = ctypes.addressof(kept)
            here, there = (memory if isinstance(memory, int) else HOST for memory in (of, to))
            how = next((str(memory) for memory in (of, to) if memory == PAGEABLE), "")
            kind = here, there, how or (PINNED if HOST in (here, there) else "")
            self.copies[kind] += 1
            self.copied_bytes[kind] += size
            touches = [(a, size * (memory != PAGEABLE)) for a, memory in ((target, to), (source, of))]

            def work(kept: Any = kept) -> None:
                ctypes.memmove(written, taken, size)

            task = Task(self, f"copy of {size} bytes from {of} to {to}", work, touches)
            task.copies = True
            self.enqueue(stream, task)
        if to == PAGEABLE:
            self.finish_stream(stream)
            if kept is not None:
                ctypes.memmove(target, kept, size)

    def call_host(self, number: int, function: Callable[[], Any]) -> None:
        self.enqueue(self.stream_of(number), HostCall(self, function))

    def query_stream(self, number: int) -> int:
        with self.lock:
            stream = self.stream_of(number)
            self._look()
            return self._status(stream.device, not self._busy(stream))

    def _busy(self, stream: Stream) -> bool:
        device = self.devices[stream.device]
        return bool(stream.items) or (stream is device.null and any(one.items for one in device.streams))

    def _look(self) -> None:
        """Who looks again and again sees something happen."""
        while self.random.random() < self.haste and self.step():
            pass

    def _status(self, device: int, done: bool) -> int:
        error = self.devices[device].error
        if error is not None:
            self.devices[device].told = True
            return error.status
        return 0 if done else NOT_READY

    def finish_stream(self, stream: Stream) -> None:
        """Block until what is in it now is done."""
        self.synchronised[threading.current_thread().name] += 1
        with self.lock:
            if stream.items or stream is self.devices[stream.device].null:
                mark = Mark()
                self._meet(stream)
                self.put(stream, mark)
                self.until(lambda: mark.happened, repr(stream))
            self.check(stream.device)

    def finish_device(self, device: int) -> None:
        self.synchronised[threading.current_thread().name] += 1
        self._finish(device)
        self.check(device)

    def _finish(self, device: int) -> None:
        with self.lock:
            marks = []
            for stream in [stream for stream in self.busy if stream.device == device]:
                marks.append(Mark())
                self.put(stream, marks[-1])
            self.until(lambda: all(mark.happened for mark in marks), f"device {device}")

    # --- events -------------------------------------------------------------------------------------

    def new_event(self, timed: bool) -> int:
        with self.lock:
            event = Event(next(self._numbers), self.here.device, timed)
            self.events[event.number] = event
            return event.number

    def end_event(self, number: int) -> None:
        self.events.pop(number, None)

    def event_of(self, number: int) -> Event:
        event = self.events.get(number)
        if event is None:
            raise Failure(INVALID_HANDLE, f"no event {number:#x}")
        return event

    def record(self, number: int, stream_number: int) -> None:
        with self.lock:
            event, stream = self.event_of(number), self.stream_of(stream_number)
            if event.device != stream.device:
                raise Failure(INVALID_HANDLE, f"{event!r} recorded on {stream!r}")
            mark = event.mark = TimedMark(self)
            self.enqueue(stream, mark)

    def wait(self, stream_number: int, number: int) -> None:
        """What will be put into the stream comes after the event as it was recorded last."""
        with self.lock:
            stream, event = self.stream_of(stream_number), self.event_of(number)
            if event.mark is not None and not event.mark.happened:
                self.enqueue(stream, Wait(event.mark))

    def query_event(self, number: int) -> int:
        with self.lock:
            event = self.event_of(number)
            self._look()
            return self._status(event.device, event.done)

    def finish_event(self, number: int) -> None:
        self.synchronised[threading.current_thread().name] += 1
        with self.lock:
            event = self.event_of(number)
            mark = event.mark
            if mark is not None:
                self.until(lambda: mark.happened, repr(event))
            self.check(event.device)

    def elapsed(self, start: int, end: int) -> float:
        """In pieces of work, for want of time."""
        one, other = self.event_of(start), self.event_of(end)
        if not (one.timed and other.timed and one.mark and other.mark) or one.device != other.device:
            raise Failure(INVALID_HANDLE, f"{one!r}, {other!r}")
        if not (one.done and other.done):
            raise Failure(NOT_READY, f"{one!r}, {other!r}")
        return float(other.mark.at - one.mark.at)

    # --- calls of the host --------------------------------------------------------------------------

    def call(self, function: Callable[[], Any], queue: Queue) -> None:
        """Call it on the machine's own thread; then the queue goes on."""
        with self.lock:
            self._calls.append((function, queue))
            self._calling += 1
            if self._caller is None:
                self._caller = threading.Thread(target=self._serve, name="cuda-host-functions", daemon=True)
                self._caller.start()
            self.changed.notify_all()

    def _serve(self) -> None:
        while True:
            with self.lock:
                while not self._calls:
                    if not self._open:
                        return
                    self.changed.wait()
                function, queue = self._calls.pop(0)
            try:
                function()
            except Exception as error:
                self.devices[queue.device].fail(INVALID_VALUE, f"a host function: {error!r}")
            with self.lock:
                self._calling -= 1
                self.leave(queue)

    def expected(self) -> bool:
        return self.awaited if self.frozen else self._calling > 0

    @contextlib.contextmanager
    def standstill(self, *, may_wait: bool = False) -> Iterator[None]:
        """Within the block, no device does anything.

        Args:
            may_wait: who waits for one then waits for the end of the block; else that is an error at once.
        """
        with self.lock:
            self.frozen, self.awaited = True, may_wait
        try:
            yield
        finally:
            with self.lock:
                self.frozen = self.awaited = False
                self.changed.notify_all()

    def forget(self) -> None:
        """Give up all work that is queued."""
        with self.lock:
            for queue in self.busy:
                queue.items.clear()
            self.busy.clear()

    def close(self) -> None:
        """Do what is left, and end. Raises the error of a device that nobody has been told."""
        try:
            self.frozen = False
            self.drain()
        finally:
            with self.lock:
                self._open = False
                self.changed.notify_all()
            if self._caller is not None:
                self._caller.join(PATIENCE_S)
        for device in self.devices:
            if device.error is not None and not device.told:
                raise device.error
