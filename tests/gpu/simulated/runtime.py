"""``cupy.cuda.runtime``: CUDA's calls, as CuPy hands them on, to the machine at hand."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from tests.gpu.simulated.machine import INVALID_VALUE, NAMES, PAGEABLE, PINNED, Failure, Machine

memcpyHostToHost, memcpyHostToDevice, memcpyDeviceToHost, memcpyDeviceToDevice, memcpyDefault = range(5)
memoryTypeUnregistered, memoryTypeHost, memoryTypeDevice, memoryTypeManaged = range(4)
streamDefault, streamNonBlocking = 0, 1
streamLegacy, streamPerThread = 1, 2
eventDefault, eventBlockingSync, eventDisableTiming, eventInterprocess = 0, 1, 2, 4
hostAllocDefault, hostAllocPortable, hostAllocMapped, hostAllocWriteCombined = 0, 1, 2, 4
is_hip = False

_REGISTER_READ_ONLY = 8  # CuPy has no names for these flags
MULTIPROCESSORS = 2
_OWN = {"annotations", "machine", "ask", "ensure_peer_access"}  # not CuPy's

_machine: list[Machine] = []  # the one at hand, if there is one


class CUDARuntimeError(RuntimeError):
    """``status``: CUDA's number. Its notes say what the simulation knows."""

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(NAMES.get(status, f"cudaError{status}"))


CUDARuntimeError.__module__ = "cupy_backends.cuda.api.runtime"


def machine() -> Machine:
    if not _machine:
        raise CUDARuntimeError(100)  # no device
    return _machine[0]


def ask(call: Callable[..., Any], *arguments: Any) -> Any:
    """What the machine answers."""
    try:
        return call(*arguments)
    except Failure as failure:
        error = CUDARuntimeError(failure.status)
        error.add_note(failure.why)
        raise error from None


def check_status(status: int) -> None:
    if status:
        raise CUDARuntimeError(status)


# --- devices ----------------------------------------------------------------------------------------


def getDeviceCount() -> int:
    return len(machine().devices)


def getDevice() -> int:
    return machine().here.device


def setDevice(device: int) -> None:
    ask(machine().choose, device)


def deviceSynchronize() -> None:
    ask(machine().finish_device, getDevice())


def deviceCanAccessPeer(device: int, peer: int) -> int:
    return int(ask(machine().reaches, device, peer))


def deviceEnablePeerAccess(peer: int) -> None:
    ask(machine().enable_peer, peer)


def deviceDisablePeerAccess(peer: int) -> None:
    ask(machine().disable_peer, peer)


def ensure_peer_access(device: int, peer: int) -> bool:
    """From kernels of the device to the peer's memory, as CuPy itself does it. False: it cannot be had."""
    one = machine()
    with one.lock:
        if device != peer and not one.reaches(device, peer):
            return False
        if device != peer:
            one.devices[device].peers.add(peer)
        return True


def getDeviceProperties(device: int) -> dict[str, Any]:
    if not 0 <= device < getDeviceCount():
        raise CUDARuntimeError(101)
    return {
        "name": b"simulated",
        "totalGlobalMem": machine().devices[device].arena.end - machine().devices[device].arena.start,
        "multiProcessorCount": MULTIPROCESSORS,
        "major": 9,
        "minor": 0,
        "pciBusID": device,
        "pciDeviceID": 0,
        "pciDomainID": 0,
        "unifiedAddressing": 1,
        "canMapHostMemory": 1,
        "warpSize": 32,
        "maxThreadsPerBlock": 1024,
    }


def deviceGetPCIBusId(device: int) -> str:
    return f"0000:{device:02X}:00.0"


def driverGetVersion() -> int:
    return 12080


def runtimeGetVersion() -> int:
    return 12080


# --- memory -----------------------------------------------------------------------------------------


def malloc(size: int) -> int:
    return int(ask(machine().allocate, size)) if size else 0


def free(address: int) -> None:
    if address:
        ask(machine().release, address)


def hostAlloc(size: int, flags: int) -> int:
    return int(ask(machine().allocate_host, size))


def freeHost(address: int) -> None:
    ask(machine().release_host, address)


def hostRegister(address: int, size: int, flags: int) -> None:
    ask(machine().register, address, size, bool(flags & _REGISTER_READ_ONLY))


def hostUnregister(address: int) -> None:
    ask(machine().unregister, address)


def memGetInfo() -> tuple[int, int]:
    arena = machine().devices[getDevice()].arena
    return arena.end - arena.start - arena.bytes_in_use, arena.end - arena.start


def pointerGetAttributes(address: int) -> SimpleNamespace:
    memory = machine().memory_of(address)
    if memory == PAGEABLE:
        return SimpleNamespace(type=memoryTypeUnregistered, device=-2, devicePointer=0, hostPointer=0)
    if memory == PINNED:
        return SimpleNamespace(type=memoryTypeHost, device=0, devicePointer=address, hostPointer=address)
    return SimpleNamespace(type=memoryTypeDevice, device=memory, devicePointer=address, hostPointer=0)


def pointerGetMemoryType(address: int) -> int:
    return int(pointerGetAttributes(address).type)


def memcpyAsync(dst: int, src: int, size: int, kind: int, stream: int) -> None:
    if size:
        _check_kind(dst, src, kind)
    ask(machine().copy, dst, src, size, stream)


def memcpy(dst: int, src: int, size: int, kind: int) -> None:
    memcpyAsync(dst, src, size, kind, 0)
    memories = [machine().memory_of(address) for address in (dst, src)]
    if not all(isinstance(memory, int) for memory in memories):  # else CUDA does not wait either
        streamSynchronize(0)


def memcpyPeerAsync(dst: int, dst_device: int, src: int, src_device: int, size: int, stream: int) -> None:
    if size and (machine().memory_of(dst), machine().memory_of(src)) != (dst_device, src_device):
        raise CUDARuntimeError(INVALID_VALUE)
    ask(machine().copy, dst, src, size, stream)


def memcpyPeer(dst: int, dst_device: int, src: int, src_device: int, size: int) -> None:
    memcpyPeerAsync(dst, dst_device, src, src_device, size, 0)


def _check_kind(dst: int, src: int, kind: int) -> None:
    """A wrong one is undefined behaviour; here it is refused."""
    there = [isinstance(machine().memory_of(address), int) for address in (dst, src)]
    if kind != memcpyDefault and there != [kind in (1, 3), kind in (2, 3)]:
        raise CUDARuntimeError(INVALID_VALUE)


def memsetAsync(address: int, value: int, size: int, stream: int) -> None:
    if not size:
        return
    arena = machine().arena_of(address)
    if arena is None:
        raise CUDARuntimeError(INVALID_VALUE)
    target = arena.bytes[address - arena.start : address - arena.start + size]
    ask(machine().launch, "memset", stream, lambda: target.fill(value), [(address, size)])


def memset(address: int, value: int, size: int) -> None:
    memsetAsync(address, value, size, 0)


# --- streams and events -----------------------------------------------------------------------------


def streamCreateWithFlags(flags: int) -> int:
    return int(ask(machine().new_stream, not flags & streamNonBlocking))


def streamCreate() -> int:
    return streamCreateWithFlags(streamDefault)


def streamCreateWithPriority(flags: int, priority: int) -> int:
    return streamCreateWithFlags(flags)


def streamDestroy(stream: int) -> None:
    ask(machine().end_stream, stream)


def streamGetFlags(stream: int) -> int:
    return int(not ask(machine().stream_of, stream).blocking)


def streamGetPriority(stream: int) -> int:
    return 0


def streamSynchronize(stream: int) -> None:
    ask(lambda: machine().finish_stream(machine().stream_of(stream)))


def streamQuery(stream: int) -> int:
    return int(ask(machine().query_stream, stream))


def streamWaitEvent(stream: int, event: int, flags: int = 0) -> None:
    ask(machine().wait, stream, event)


def streamIsCapturing(stream: int) -> bool:
    return False


def launchHostFunc(stream: int, callback: Callable[[Any], Any], arg: Any) -> None:
    ask(machine().call_host, stream, lambda: callback(arg))


def eventCreateWithFlags(flags: int) -> int:
    return int(ask(machine().new_event, not flags & eventDisableTiming))


def eventCreate() -> int:
    return eventCreateWithFlags(eventDefault)


def eventDestroy(event: int) -> None:
    ask(machine().end_event, event)


def eventQuery(event: int) -> int:
    """As CuPy has it: the status itself, an error as well."""
    return int(ask(machine().query_event, event))


def eventRecord(event: int, stream: int) -> None:
    ask(machine().record, event, stream)


def eventSynchronize(event: int) -> None:
    ask(machine().finish_event, event)


def eventElapsedTime(start: int, end: int) -> float:
    return float(ask(machine().elapsed, start, end))


EXPORTED = [name for name in dir() if name[0].islower() and name not in _OWN] + ["CUDARuntimeError"]
