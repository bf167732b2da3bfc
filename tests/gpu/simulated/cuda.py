"""``cupy.cuda``: devices, streams, events and memory, as CuPy's classes show them."""

from __future__ import annotations

import ctypes
import functools
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from tests.gpu.simulated import runtime
from tests.gpu.simulated.machine import OUT_OF_MEMORY, UNIT, Machine, Task
from tests.gpu.simulated.runtime import machine


class _Here(threading.local):
    """What this thread has chosen, on the machine at hand."""

    def __init__(self) -> None:
        self.machine: Machine | None = None
        self.devices: list[int] = []
        self.current: list[Any] = []
        self.stacks: list[list[Any]] = []
        self.entered: list[int] = []

    def look(self) -> _Here:
        one = machine()
        if self.machine is not one:
            self.machine, self.devices, self.entered = one, [], []
            self.current = [Stream.null for _ in one.devices]
            self.stacks = [[Stream.null] for _ in one.devices]
        return self


_here = _Here()


class Device:
    def __init__(self, device: Any = None) -> None:
        self.id = runtime.getDevice() if device is None else int(device)

    def __int__(self) -> int:
        return self.id

    def __repr__(self) -> str:
        return f"<CUDA Device {self.id}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __enter__(self) -> Device:
        _here.look().devices.append(runtime.getDevice())
        runtime.setDevice(self.id)
        return self

    def __exit__(self, *_: object) -> None:
        runtime.setDevice(_here.look().devices.pop())

    def use(self) -> Device:
        runtime.setDevice(self.id)
        return self

    def synchronize(self) -> None:
        with self:
            runtime.deviceSynchronize()

    @property
    def attributes(self) -> dict[str, int]:
        return {"MultiProcessorCount": runtime.MULTIPROCESSORS, "PageableMemoryAccess": 0, "MaxThreadsPerBlock": 1024}

    @property
    def compute_capability(self) -> str:
        return "90"

    @property
    def mem_info(self) -> tuple[int, int]:
        with self:
            return runtime.memGetInfo()

    @property
    def pci_bus_id(self) -> str:
        return runtime.deviceGetPCIBusId(self.id)


# --- streams and events -----------------------------------------------------------------------------


def get_current_stream(device_id: int = -1) -> Any:
    return _here.look().current[runtime.getDevice() if device_id == -1 else device_id]


class Event:
    ptr = 0

    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False) -> None:
        self.ptr = runtime.eventCreateWithFlags(disable_timing * runtime.eventDisableTiming)
        self._machine = machine()

    def __del__(self) -> None:
        if self.ptr:
            self._machine.end_event(self.ptr)

    @property
    def done(self) -> bool:
        return runtime.eventQuery(self.ptr) == 0

    def record(self, stream: Any = None) -> None:
        runtime.eventRecord(self.ptr, (get_current_stream() if stream is None else stream).ptr)

    def synchronize(self) -> None:
        runtime.eventSynchronize(self.ptr)


def get_elapsed_time(start_event: Event, end_event: Event) -> float:
    return runtime.eventElapsedTime(start_event.ptr, end_event.ptr)


class _BaseStream:
    def __init__(self, ptr: int, device_id: int) -> None:
        self.ptr, self.device_id = ptr, device_id

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.ptr} (device {self.device_id})>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BaseStream) and self.ptr == other.ptr

    def __hash__(self) -> int:
        return self.ptr

    def _check(self) -> int:
        device = runtime.getDevice()
        if self.device_id not in (-1, device):
            raise RuntimeError(
                f"The device that the stream is created on ({self.device_id}) does not match with the current device "
                f"({device})"
            )
        return device

    def __enter__(self) -> Any:
        device, here = self._check(), _here.look()
        here.stacks[device].append(self)
        here.entered.append(device)
        here.current[device] = self
        return self

    def __exit__(self, *_: object) -> None:
        here = _here.look()
        stack = here.stacks[here.entered.pop()]
        stack.pop()
        before = stack[-1]
        # As CuPy: the null stream comes back on the device that is the current one then.
        here.current[runtime.getDevice() if before.device_id == -1 else before.device_id] = before

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.ptr

    def use(self) -> Any:
        _here.look().current[self._check()] = self
        return self

    @property
    def done(self) -> bool:
        return runtime.streamQuery(self.ptr) == 0

    @property
    def is_non_blocking(self) -> bool:
        return bool(runtime.streamGetFlags(self.ptr))

    @property
    def priority(self) -> int:
        return 0

    def synchronize(self) -> None:
        runtime.streamSynchronize(self.ptr)

    def record(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        runtime.eventRecord(event.ptr, self.ptr)
        return event

    def wait_event(self, event: Event) -> None:
        runtime.streamWaitEvent(self.ptr, event.ptr)

    def launch_host_func(self, callback: Callable[[Any], Any], arg: Any) -> None:
        runtime.launchHostFunc(self.ptr, callback, arg)

    def is_capturing(self) -> bool:
        return False


class _since_14:
    """A class method that CuPy 13 does not have."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __get__(self, stream: Any, kind: type) -> Any:
        if machine().version < "14":
            raise AttributeError(self._function.__name__)
        return functools.partial(self._function, kind)


class Stream(_BaseStream):
    null: Any = None
    ptds: Any = None

    def __init__(
        self, null: bool = False, non_blocking: bool = False, ptds: bool = False, priority: int | None = None
    ) -> None:
        self._machine: Machine | None = None
        if null or ptds:
            super().__init__(0 if null else runtime.streamPerThread, -1)
        else:
            flags = runtime.streamNonBlocking if non_blocking else runtime.streamDefault
            super().__init__(runtime.streamCreateWithFlags(flags), runtime.getDevice())
            self._machine = machine()

    def __del__(self) -> None:
        one = getattr(self, "_machine", None)
        if one is not None:
            one.end_stream(self.ptr)

    @_since_14
    def from_external(cls, obj: Any) -> Any:
        version, ptr = obj.__cuda_stream__()
        if version != 0 or not isinstance(ptr, int):
            raise TypeError(f"__cuda_stream__() must return (0, int), got ({version}, {type(ptr).__name__})")
        stream = cls.__new__(cls)
        _BaseStream.__init__(stream, ptr, -1)
        stream._foreign_stream_ref = obj
        return stream


Stream.null, Stream.ptds = Stream(null=True), Stream(ptds=True)


class ExternalStream(_BaseStream):
    def __init__(self, ptr: int, device_id: int = -1) -> None:
        if machine().version >= "14":
            warnings.warn(
                "ExternalStream is deprecated. Use Stream.from_external() instead",
                DeprecationWarning,
                stacklevel=2,
            )
        super().__init__(ptr, device_id)


# --- memory of devices ------------------------------------------------------------------------------


class BaseMemory:
    """Some bytes of a device."""

    identity = "Memory"

    def __init__(self, ptr: int, size: int, device_id: int) -> None:
        self.ptr, self.size, self.device_id = ptr, size, device_id

    def __int__(self) -> int:
        return self.ptr

    @property
    def device(self) -> Device:
        return Device(self.device_id)


class Memory(BaseMemory):
    """Memory that CUDA has given, and gets back with the last reference."""

    def __init__(self, size: int) -> None:
        super().__init__(runtime.malloc(size), size, runtime.getDevice())
        self._machine = machine()

    def __del__(self) -> None:
        if getattr(self, "ptr", 0):
            self._machine.dropped.append(self.ptr)


class UnownedMemory(BaseMemory):
    """Somebody else's, who is kept alive."""

    identity = "UnownedMemory"

    def __init__(self, ptr: int, size: int, owner: Any, device_id: int = -1) -> None:
        if device_id < 0:
            device_id = runtime.pointerGetAttributes(ptr).device if ptr else runtime.getDevice()
        super().__init__(ptr, size, device_id)
        self._owner = owner


class DLPackMemory(UnownedMemory):
    """That of a tensor that came through DLPack."""


class MemoryPointer:
    __slots__ = ("device_id", "mem", "ptr")  # no weak references, as in CuPy

    def __init__(self, mem: BaseMemory, offset: int) -> None:
        assert mem.ptr or not offset
        self.mem, self.ptr, self.device_id = mem, mem.ptr + offset, mem.device_id

    def __int__(self) -> int:
        return self.ptr

    def __repr__(self) -> str:
        return f"<MemoryPointer {self.ptr:#x} device={self.device_id}>"

    @property
    def device(self) -> Device:
        return Device(self.device_id)

    def __add__(self, offset: int) -> MemoryPointer:
        return MemoryPointer(self.mem, self.ptr - self.mem.ptr + offset)

    __radd__ = __add__

    def __sub__(self, offset: int) -> MemoryPointer:
        return self + -offset

    def copy_from_device_async(self, src: MemoryPointer, size: int, stream: Any = None) -> None:
        if size:
            runtime.ensure_peer_access(src.device_id, self.device_id)
            runtime.memcpyAsync(self.ptr, src.ptr, size, runtime.memcpyDefault, _number(stream))

    def copy_from_device(self, src: MemoryPointer, size: int) -> None:
        if size:
            runtime.ensure_peer_access(src.device_id, self.device_id)
            runtime.memcpy(self.ptr, src.ptr, size, runtime.memcpyDefault)

    def copy_from_host_async(self, mem: Any, size: int, stream: Any = None) -> None:
        if size:
            runtime.memcpyAsync(self.ptr, _address(mem), size, runtime.memcpyHostToDevice, _number(stream))

    def copy_from_host(self, mem: Any, size: int) -> None:
        if size:
            runtime.memcpy(self.ptr, _address(mem), size, runtime.memcpyHostToDevice)

    def copy_from_async(self, mem: Any, size: int, stream: Any = None) -> None:
        copy = self.copy_from_device_async if isinstance(mem, MemoryPointer) else self.copy_from_host_async
        copy(mem, size, stream)

    def copy_from(self, mem: Any, size: int) -> None:
        copy = self.copy_from_device if isinstance(mem, MemoryPointer) else self.copy_from_host
        copy(mem, size)

    def copy_to_host_async(self, mem: Any, size: int, stream: Any = None) -> None:
        if size:
            runtime.memcpyAsync(_address(mem), self.ptr, size, runtime.memcpyDeviceToHost, _number(stream))

    def copy_to_host(self, mem: Any, size: int) -> None:
        if size:
            runtime.memcpy(_address(mem), self.ptr, size, runtime.memcpyDeviceToHost)

    def memset_async(self, value: int, size: int, stream: Any = None) -> None:
        runtime.memsetAsync(self.ptr, value, size, _number(stream))

    def memset(self, value: int, size: int) -> None:
        runtime.memset(self.ptr, value, size)


def _number(stream: Any) -> int:
    number: int = (get_current_stream() if stream is None else stream).ptr
    return number


def _address(mem: Any) -> int:
    return mem if isinstance(mem, int) else mem.value


class _Chunk:
    """A part of what CUDA has given; the parts beside it."""

    def __init__(self, mem: Memory, offset: int, size: int, ident: int) -> None:
        self.mem, self.offset, self.size, self.ident = mem, offset, size, ident
        self.before: _Chunk | None = None
        self.after: _Chunk | None = None

    @property
    def ptr(self) -> int:
        return self.mem.ptr + self.offset


class PooledMemory(BaseMemory):
    """A chunk, which goes back to its stream's free ones with the last reference."""

    def __init__(self, chunk: _Chunk, pool: SingleDeviceMemoryPool) -> None:
        super().__init__(chunk.ptr, chunk.size, chunk.mem.device_id)
        self._chunk, self.pool = chunk, weakref.ref(pool)

    def free(self) -> None:
        pool = self.pool()
        if self.ptr and pool is not None:
            pool.freed.append(self._chunk)
        self.ptr = 0

    def __del__(self) -> None:
        if getattr(self, "ptr", 0):
            self.free()


class SingleDeviceMemoryPool:
    """Memory that has been freed stays here, for those who ask for some on the same stream.

    So it may be in use on another stream still: what it held is overwritten, on the stream on which it is given anew.
    """

    def __init__(self, device: int) -> None:
        self.device = device
        self._machine = machine()
        self._lock = self._machine.lock
        self.freed: deque[_Chunk] = deque()  # taken up with the next call: garbage is collected anywhere
        self._memories: set[Memory] = set()
        self.live: dict[int, int] = {}  # bytes of what has not been freed, by address
        self._free: dict[int, list[_Chunk]] = {}
        self._limit = 0
        self._total = self._used = 0
        self.used_max = 0

    def malloc(self, size: int) -> MemoryPointer:
        if not size:
            return MemoryPointer(Memory(0), 0)
        size = -(-size // UNIT) * UNIT
        ident = _number(None)
        with self._lock:
            self._take_up()
            free = self._free.setdefault(ident, [])
            fits = [chunk for chunk in free if chunk.size >= size]
            chunk = min(fits, key=lambda one: one.size, default=None)
            if chunk is not None:
                free.remove(chunk)
                self._split(chunk, size, free)
                self._scribble(chunk, ident)
            else:
                chunk = self._fresh(size, ident)
            self.live[chunk.ptr] = chunk.size
            self._used += chunk.size
            self.used_max = max(self.used_max, self._used)
        return MemoryPointer(PooledMemory(chunk, self), 0)

    def _fresh(self, size: int, ident: int) -> _Chunk:
        if self._limit and self._total + size > self._limit:
            self.free_all_blocks()
        if self._limit and self._total + size > self._limit:
            raise OutOfMemoryError(size, self._total, self._limit)
        try:
            memory = Memory(size)
        except runtime.CUDARuntimeError as error:
            if error.status != OUT_OF_MEMORY:
                raise
            self.free_all_blocks()
            try:
                memory = Memory(size)
            except runtime.CUDARuntimeError as error:
                if error.status != OUT_OF_MEMORY:
                    raise
                raise OutOfMemoryError(size, self._total, self._limit) from None
        self._total += size
        self._memories.add(memory)
        return _Chunk(memory, 0, size, ident)

    def _split(self, chunk: _Chunk, size: int, free: list[_Chunk]) -> None:
        if chunk.size > size:
            rest = _Chunk(chunk.mem, chunk.offset + size, chunk.size - size, chunk.ident)
            rest.before, rest.after = chunk, chunk.after
            if rest.after is not None:
                rest.after.before = rest
            chunk.after, chunk.size = rest, size
            free.append(rest)

    def _scribble(self, chunk: _Chunk, ident: int) -> None:
        """Now, if the stream is idle, else when its turn comes: what is in the stream may use it still."""
        one, address, size = self._machine, chunk.ptr, chunk.size
        with one.lock:
            stream = one.stream_of(ident)
            if stream.items:
                one.enqueue(stream, Task(one, "garbage", lambda: one.scribble(address, size), ()))
            else:
                one.scribble(address, size)

    def _take_up(self) -> None:
        while self.freed:
            chunk = self.freed.popleft()
            self._used -= chunk.size
            del self.live[chunk.ptr]
            free = self._free.setdefault(chunk.ident, [])
            while chunk.after is not None and chunk.after in free:
                free.remove(chunk.after)
                self._join(chunk)
            while chunk.before is not None and chunk.before in free:
                chunk = chunk.before
                free.remove(chunk)
                self._join(chunk)
            free.append(chunk)

    @staticmethod
    def _join(chunk: _Chunk) -> None:
        after = chunk.after
        assert after is not None
        chunk.size, chunk.after = chunk.size + after.size, after.after
        if chunk.after is not None:
            chunk.after.before = chunk

    def free_all_blocks(self, stream: Any = None) -> None:
        with self._lock:
            self._take_up()
            for ident in list(self._free) if stream is None else [stream.ptr]:
                for chunk in [one for one in self._free.get(ident, []) if one.before is None and one.after is None]:
                    self._free[ident].remove(chunk)
                    self._memories.discard(chunk.mem)
                    self._total -= chunk.size

    def set_limit(self, size: int | None = None, fraction: float | None = None) -> None:
        arena = self._machine.devices[self.device].arena
        self._limit = int(fraction * (arena.end - arena.start)) if fraction else size or 0

    def get_limit(self) -> int:
        return self._limit

    def n_free_blocks(self) -> int:
        with self._lock:
            self._take_up()
            return sum(map(len, self._free.values()))

    def used_bytes(self) -> int:
        with self._lock:
            self._take_up()
            return self._used

    def free_bytes(self) -> int:
        return self._total - self.used_bytes()

    def total_bytes(self) -> int:
        return self._total


class OutOfMemoryError(MemoryError):
    def __init__(self, size: int, total: int, limit: int = 0) -> None:
        super().__init__(f"Out of memory allocating {size:,} bytes (allocated so far: {total:,} bytes).")


class MemoryPool:
    """A pool for each device of the machine at hand."""

    def __init__(self, allocator: Any = None) -> None:
        self._pools: list[SingleDeviceMemoryPool] = []

    def device_pool(self, device: int | None = None) -> SingleDeviceMemoryPool:
        one = machine()
        with one.lock:
            if not self._pools or self._pools[0]._machine is not one:
                self._pools = [SingleDeviceMemoryPool(number) for number in range(len(one.devices))]
            return self._pools[runtime.getDevice() if device is None else device]

    def malloc(self, size: int) -> MemoryPointer:
        return self.device_pool().malloc(size)

    def free_all_blocks(self, stream: Any = None) -> None:
        self.device_pool().free_all_blocks(stream)

    def n_free_blocks(self) -> int:
        return self.device_pool().n_free_blocks()

    def used_bytes(self) -> int:
        return self.device_pool().used_bytes()

    def free_bytes(self) -> int:
        return self.device_pool().free_bytes()

    def total_bytes(self) -> int:
        return self.device_pool().total_bytes()

    def set_limit(self, size: int | None = None, fraction: float | None = None) -> None:
        self.device_pool().set_limit(size, fraction)

    def get_limit(self) -> int:
        return self.device_pool().get_limit()


_pool = MemoryPool()
_allocator: list[Callable[[int], MemoryPointer]] = [_pool.malloc]


def alloc(size: int) -> MemoryPointer:
    return _allocator[0](size)


def _malloc(size: int) -> MemoryPointer:
    return MemoryPointer(Memory(size), 0)


def set_allocator(allocator: Callable[[int], MemoryPointer] | None = None) -> None:
    _allocator[0] = allocator or _malloc


def get_allocator() -> Callable[[int], MemoryPointer]:
    return _allocator[0]


# --- pinned memory ----------------------------------------------------------------------------------


class PinnedMemory:
    def __init__(self, size: int, flags: int = 0) -> None:
        self.size, self.ptr = size, 0
        self._machine = machine()
        if size:
            self.ptr = runtime.hostAlloc(size, flags)

    def __int__(self) -> int:
        return self.ptr

    def __del__(self) -> None:
        if getattr(self, "ptr", 0):
            self._machine.dropped.append(self.ptr)


class PinnedMemoryPointer:
    """A buffer of bytes; it keeps its memory alive."""

    mem: Any
    ptr: int

    def __new__(cls, mem: Any, offset: int) -> PinnedMemoryPointer:
        ptr, length = mem.ptr + offset, mem.size - offset
        pointer = _buffer(length).from_address(ptr) if ptr else _buffer(0)()
        pointer.mem, pointer.ptr = mem, ptr
        return pointer

    def __init__(self, mem: Any, offset: int) -> None:
        pass

    def __int__(self) -> int:
        return self.ptr

    def __add__(self, offset: int) -> PinnedMemoryPointer:
        return PinnedMemoryPointer(self.mem, self.ptr - self.mem.ptr + offset)

    def size(self) -> int:
        return int(self.mem.size - (self.ptr - self.mem.ptr))


_BUFFERS: dict[int, Any] = {}


def _buffer(length: int) -> Any:
    """Python 3.11 gives a buffer only to what has been made one in C."""
    if length not in _BUFFERS:
        _BUFFERS[length] = type("PinnedMemoryPointer", (PinnedMemoryPointer, ctypes.c_uint8 * length), {})
    return _BUFFERS[length]


class PooledPinnedMemory(PinnedMemory):
    def __init__(self, mem: PinnedMemory, pool: Any) -> None:
        self.ptr, self.size, self.mem, self.pool = mem.ptr, mem.size, mem, pool

    def free(self) -> None:
        pool = self.pool()
        if self.ptr and pool is not None:
            pool.free(self.mem, self.size)
        self.ptr = self.size = 0

    __del__ = free


class PinnedMemoryPool:
    """Freed memory is there for whoever asks next, at once, whatever is under way: it is overwritten when freed."""

    def __init__(self, allocator: Callable[[int], PinnedMemoryPointer] | None = None) -> None:
        self._allocator = allocator or _malloc_pinned
        self._free: dict[int, list[PinnedMemory]] = {}
        self._machine: Machine | None = None

    def malloc(self, size: int) -> PinnedMemoryPointer:
        if not size:
            return PinnedMemoryPointer(PinnedMemory(0), 0)
        size = max(UNIT, 1 << (size - 1).bit_length())
        with machine().lock:
            if self._machine is not machine():
                self._machine, self._free = machine(), {}
            free = self._free.get(size)
            memory = free.pop() if free else self._allocator(size).mem
        return PinnedMemoryPointer(PooledPinnedMemory(memory, weakref.ref(self)), 0)

    def free(self, mem: PinnedMemory, size: int) -> None:
        with mem._machine.lock:
            mem._machine.scribble(mem.ptr, size)
            if mem._machine is self._machine:
                self._free.setdefault(size, []).append(mem)

    def free_all_blocks(self) -> None:
        _watcher.release()
        with machine().lock:
            self._free.clear()

    def n_free_blocks(self) -> int:
        return sum(map(len, self._free.values()))


def _malloc_pinned(size: int) -> PinnedMemoryPointer:
    return PinnedMemoryPointer(PinnedMemory(size, runtime.hostAllocPortable), 0)


class _Watcher:
    """Keeps memory until the copy from it is done."""

    def __init__(self) -> None:
        self._held: list[tuple[Event, Any]] = []

    def add(self, event: Event, held: Any) -> None:
        self.release()
        if not event.done:
            self._held.append((event, held))

    def release(self) -> None:
        with machine().lock:
            while self._held and (self._held[0][0]._machine is not machine() or self._held[0][0].done):
                del self._held[0]

    def forget(self) -> None:
        self._held.clear()


_watcher = _Watcher()
_pinned_pool = PinnedMemoryPool()
_pinned_allocator: list[Callable[[int], PinnedMemoryPointer]] = [_pinned_pool.malloc]


def alloc_pinned_memory(size: int) -> PinnedMemoryPointer:
    _watcher.release()
    return _pinned_allocator[0](size)


def set_pinned_memory_allocator(allocator: Callable[[int], PinnedMemoryPointer] | None = None) -> None:
    _pinned_allocator[0] = allocator or _malloc_pinned


def is_available() -> bool:
    return bool(runtime._machine)


NAMES = [
    *("Device", "Event", "Stream", "ExternalStream", "get_current_stream", "get_elapsed_time"),
    *("BaseMemory", "Memory", "UnownedMemory", "MemoryPointer", "MemoryPool", "alloc"),
    *("set_allocator", "get_allocator", "PinnedMemory", "PinnedMemoryPointer", "PinnedMemoryPool"),
    *("alloc_pinned_memory", "set_pinned_memory_allocator", "is_available"),
]
