"""CUDA devices as the engine sees them, through CuPy.

CuPy itself is brought by the caller, who has arrays of it: this file imports no library of arrays, and costs nothing
where there is none. Arrays of other libraries are known by ``__cuda_array_interface__`` (PyTorch, Numba).
"""

from __future__ import annotations

import threading
from collections import defaultdict
from contextlib import AbstractContextManager
from typing import Any

from engine.groups import Range

NOT_READY = 600  # cudaErrorNotReady
OF_EVERY_DEVICE = 2  # up to here handles stand for the default streams of whichever device is the current one


class CudaStream:
    """A stream of CuPy and its device; the null stream, which is one for each device, does not know its own."""

    __slots__ = ("anywhere", "device", "ptr", "stream")

    def __init__(self, device: int, stream: Any) -> None:
        self.device = device
        self.stream = stream
        self.ptr: int = stream.ptr
        self.anywhere = self.ptr > OF_EVERY_DEVICE  # it is the same one whichever device is the current one

    def __repr__(self) -> str:
        return f"<CudaStream {self.ptr:#x} of device {self.device}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CudaStream) and self.ptr == other.ptr and self.device == other.device

    def __hash__(self) -> int:
        return hash((self.device, self.ptr))


class CudaEvent:
    """An event of CuPy, on loan: to make one takes longer than all that is done with it."""

    __slots__ = ("_lender", "event", "ptr")

    def __init__(self, event: Any, lender: list[Any]) -> None:
        self.event = event
        self.ptr: int = event.ptr
        self._lender = lender

    def __repr__(self) -> str:
        return f"<CudaEvent {self.ptr:#x}>"

    def __del__(self) -> None:
        self._lender.append(self.event)  # who waits for it has looked at it when he was told to


class _On:
    """A block in which a stream is the current one.

    Behind it the one before is. CuPy's own block (``with stream:``) would go back to the one of the block around it,
    and forget what ``use`` has made current since.
    """

    __slots__ = ("_before", "_cuda", "_device", "_stream")

    def __init__(self, cuda: Any, stream: CudaStream, device: Any) -> None:
        self._cuda = cuda
        self._stream = stream
        self._device = device  # of CuPy; None: there is no other
        self._before: Any = None

    def __enter__(self) -> None:
        if self._device is not None:
            self._device.__enter__()
        self._before = self._cuda.get_current_stream()
        self._stream.stream.use()

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if self._device is None:
            self._before.use()
            return
        try:
            with self._cuda.Device(self._stream.device):  # the block may have left another one current
                self._before.use()
        finally:
            self._device.__exit__(None, None, None)


class _Here(threading.local):
    """The streams that this thread has last been found to use, by device."""

    def __init__(self) -> None:
        self.current: dict[int, CudaStream] = {}


class Cuda:
    """The CUDA devices of this process; for :meth:`engine.Engine.use`. Thread-safe.

    Args:
        cupy: the module.
    """

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self._cuda = cupy.cuda
        self._runtime = cupy.cuda.runtime
        self._ndarray = cupy.ndarray
        self._here = _Here()
        self._events: dict[int, list[Any]] = defaultdict(list)  # by device: untimed ones that nobody uses
        self._timed: dict[int, list[Any]] = defaultdict(list)
        self._count: int | None = None

    def __repr__(self) -> str:
        return f"<Cuda: CuPy {self._cupy.__version__}>"

    def device_of(self, array: Any) -> int | None:
        """The number of the device whose memory the array is in; None: in none."""
        if isinstance(array, self._ndarray):
            device: int = array.data.device_id
            return device
        interface = getattr(array, "__cuda_array_interface__", None)
        if interface is None:
            return None
        address = interface["data"][0]
        return int(self._runtime.pointerGetAttributes(address).device) if address else 0

    def range_of(self, array: Any) -> Range:
        """The addresses of its first byte and the one after the last."""
        if isinstance(array, self._ndarray) and array.flags.forc:  # as a rule
            first: int = array.data.ptr
            return first, first + array.nbytes
        interface = array.__cuda_array_interface__
        shape, strides = interface["shape"], interface.get("strides")
        start = int(interface["data"][0])
        item = int(interface["typestr"][2:])
        if 0 in shape:
            return start, start
        if strides is None:
            size = item
            for length in shape:
                size *= length
            return start, start + size
        spans = [(length - 1) * stride for length, stride in zip(shape, strides, strict=True)]
        return start + sum(s for s in spans if s < 0), start + sum(s for s in spans if s > 0) + item

    def owner_of(self, array: Any) -> Any:
        """The array that it is a view of: CuPy's objects of memory cannot be watched."""
        while isinstance(array, self._ndarray) and array.base is not None:
            array = array.base
        return array

    def stream(self, device: int) -> CudaStream:
        """A new stream, which does not wait for the null stream either."""
        with self._at(device):
            return CudaStream(device, self._cuda.Stream(non_blocking=True))

    def current(self, device: int) -> CudaStream:
        """The stream that CuPy's calls in this thread use on the device."""
        stream = self._cuda.get_current_stream(device)
        known = self._here.current.get(device)
        if known is None or known.stream is not stream:
            known = self._here.current[device] = CudaStream(device, stream)
            known.anywhere = known.anywhere or self._is_alone()
        return known

    def on(self, stream: CudaStream) -> AbstractContextManager[None]:
        """Within the block, CuPy's calls in this thread use the stream, on its device."""
        return _On(self._cuda, stream, None if self._is_alone() else self._cuda.Device(stream.device))

    def record(self, stream: CudaStream, timed: bool = False) -> CudaEvent:
        """A mark behind what has been enqueued on the stream so far."""
        unused = (self._timed if timed else self._events)[stream.device]
        try:
            event = unused.pop()
        except IndexError:
            with self._at(stream.device):
                event = self._cuda.Event(block=True, disable_timing=not timed)
        if stream.anywhere:
            self._runtime.eventRecord(event.ptr, stream.ptr)
        else:
            with self._at(stream.device):
                self._runtime.eventRecord(event.ptr, stream.ptr)
        return CudaEvent(event, unused)

    def wait(self, stream: CudaStream, event: CudaEvent) -> None:
        """What will be enqueued on the stream starts when the event, of any device, has come to pass."""
        if stream.anywhere:
            self._runtime.streamWaitEvent(stream.ptr, event.ptr)
        else:
            with self._at(stream.device):
                self._runtime.streamWaitEvent(stream.ptr, event.ptr)

    def done(self, event: CudaEvent) -> bool:
        """Has it come to pass? Raises CUDARuntimeError if the device failed."""
        status = self._runtime.eventQuery(event.ptr)
        if status not in (0, NOT_READY):  # CuPy's own ``Event.done`` only says that it is not
            self._runtime.check_status(status)
        return bool(status == 0)

    def synchronise(self, event: CudaEvent) -> None:
        """Block this thread, without the GIL, until it has come to pass; raises like :meth:`done`."""
        self._runtime.eventSynchronize(event.ptr)

    def elapsed_ms(self, first: CudaEvent, second: CudaEvent) -> float:
        """Milliseconds between two timed events of one device that have come to pass."""
        return float(self._runtime.eventElapsedTime(first.ptr, second.ptr))

    def _at(self, device: int) -> AbstractContextManager[Any]:
        """Within the block, the device is the current one."""
        device_: AbstractContextManager[Any] = self._cuda.Device(device)
        return device_

    def _is_alone(self) -> bool:
        """Is there but one device, which is always the current one?"""
        if self._count is None:
            self._count = self._runtime.getDeviceCount()
        return self._count == 1
