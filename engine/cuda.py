"""CUDA devices as the engine sees them, through CuPy.

CuPy itself is brought by the caller, who has arrays of it: this file imports no library of arrays, and costs nothing
where there is none. Arrays of other libraries are known by ``__cuda_array_interface__`` (PyTorch, Numba).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from engine.groups import Range

NOT_READY = 600  # cudaErrorNotReady


class CudaStream(NamedTuple):
    """A stream and its device; the null stream, which is one for each device, does not know its own."""

    device: int
    stream: Any


class Cuda:
    """The CUDA devices of this process; for :meth:`engine.Engine.use`. Thread-safe.

    Args:
        cupy: the module.
    """

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self._cuda = cupy.cuda

    def __repr__(self) -> str:
        return f"<Cuda: CuPy {self._cupy.__version__}>"

    def device_of(self, array: Any) -> int | None:
        """The number of the device whose memory the array is in; None: in none."""
        if isinstance(array, self._cupy.ndarray):
            return int(array.device.id)
        interface = getattr(array, "__cuda_array_interface__", None)
        if interface is None:
            return None
        address = interface["data"][0]
        return int(self._cuda.runtime.pointerGetAttributes(address).device) if address else 0

    def range_of(self, array: Any) -> Range:
        """The addresses of its first byte and the one after the last."""
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
        while isinstance(array, self._cupy.ndarray) and array.base is not None:
            array = array.base
        return array

    def stream(self, device: int) -> CudaStream:
        """A new stream, which does not wait for the null stream either."""
        with self._at(device):
            return CudaStream(device, self._cuda.Stream(non_blocking=True))

    def current(self, device: int) -> CudaStream:
        """The stream that CuPy's calls in this thread use on the device."""
        with self._at(device):
            return CudaStream(device, self._cuda.get_current_stream())

    @contextmanager
    def on(self, stream: CudaStream) -> Iterator[None]:
        """Within the block, CuPy's calls in this thread use the stream, on its device.

        Behind it they use the one before. CuPy's own block (``with stream.stream:``) would go back to the one of the
        block around it, and forget what ``use`` has made current since.
        """
        with self._at(stream.device):
            before = self._cuda.get_current_stream()
            stream.stream.use()
            try:
                yield
            finally:
                with self._at(stream.device):
                    before.use()

    def record(self, stream: CudaStream, timed: bool = False) -> Any:
        """A mark behind what has been enqueued on the stream so far."""
        with self._at(stream.device):
            event = self._cuda.Event(block=True, disable_timing=not timed)
            event.record(stream.stream)
            return event

    def wait(self, stream: CudaStream, event: Any) -> None:
        """What will be enqueued on the stream starts when the event, of any device, has come to pass."""
        with self._at(stream.device):
            stream.stream.wait_event(event)

    def done(self, event: Any) -> bool:
        """Has it come to pass? Raises CUDARuntimeError if the device failed."""
        status = self._cuda.runtime.eventQuery(event.ptr)
        if status not in (0, NOT_READY):  # CuPy's own ``Event.done`` only says that it is not
            self._cuda.runtime.check_status(status)
        return bool(status == 0)

    def synchronise(self, event: Any) -> None:
        """Block this thread, without the GIL, until it has come to pass; raises like :meth:`done`."""
        event.synchronize()

    def elapsed_ms(self, first: Any, second: Any) -> float:
        """Milliseconds between two timed events of one device that have come to pass."""
        return float(self._cuda.get_elapsed_time(first, second))

    def _at(self, device: int) -> Any:
        """Within the block, the device is the current one."""
        return self._cuda.Device(device)
