"""Arrays of other libraries in the simulated devices' memory: PyTorch's tensors and JAX's arrays, as far as DLPack.

PyTorch has streams of its own, of which each thread has a current one for every device; JAX works on a stream that
nobody sees, and its arrays never change.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np

from tests.gpu.simulated import cuda, runtime
from tests.gpu.simulated.array import asarray, ndarray


@contextmanager
def on(device: int, own: Any) -> Iterator[None]:
    """Within the block CuPy works on the stream; behind it, nobody can tell."""
    with cuda.Device(device):
        before = cuda.get_current_stream()
        own.use()
        try:
            yield
        finally:
            before.use()


# --- PyTorch ----------------------------------------------------------------------------------------


class TorchStream:
    """``torch.cuda.Stream``: 0 is the default one."""

    def __init__(self, device: int = 0, *, default: bool = False) -> None:
        self.device = device
        with cuda.Device(device):
            self.own = cuda.Stream.null if default else cuda.Stream(non_blocking=True)

    @property
    def cuda_stream(self) -> int:
        number: int = self.own.ptr
        return number

    def synchronize(self) -> None:
        with cuda.Device(self.device):
            self.own.synchronize()


class _Current(threading.local):
    def __init__(self) -> None:
        self.streams: dict[int, TorchStream] = {}


_current = _Current()


def current_stream(device: int | None = None) -> TorchStream:
    device = runtime.getDevice() if device is None else device
    return _current.streams.get(device) or TorchStream(device, default=True)


@contextmanager
def stream(one: TorchStream) -> Iterator[None]:
    """``torch.cuda.stream``: within the block it is the thread's current one of its device."""
    before = _current.streams.get(one.device)
    _current.streams[one.device] = one
    try:
        yield
    finally:
        _current.streams.pop(one.device)
        if before is not None:
            _current.streams[one.device] = before


class Tensor:
    """A tensor; what is done with it is enqueued on PyTorch's current stream."""

    requires_grad = False

    def __init__(self, values: Any, device: int = 0) -> None:
        self.number = device
        with self._here():
            self.own = asarray(values)

    def _here(self) -> Any:
        return on(self.number, current_stream(self.number).own)

    def __dlpack__(self, *, stream: Any = -1, max_version: Any = None, dl_device: Any = None, copy: Any = None) -> Any:
        if self.requires_grad:
            raise BufferError("Can't export tensors that require gradient, use tensor.detach()")
        with self._here():
            # Its own rule: -1 is no order; None is the default stream, and so is 1.
            return self.own.__dlpack__(stream=stream, max_version=max_version, dl_device=dl_device, copy=copy)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.own.__dlpack_device__()

    @property
    def shape(self) -> tuple[int, ...]:
        shape: tuple[int, ...] = self.own.shape
        return shape

    def __getitem__(self, key: Any) -> Tensor:
        part = Tensor.__new__(Tensor)
        part.number, part.own = self.number, self.own[key]
        return part

    def fill_(self, value: Any) -> Tensor:
        with self._here():
            self.own.fill(value)
        return self

    def add_(self, value: Any) -> Tensor:
        with self._here():
            self.own += value
        return self

    def numpy(self) -> np.ndarray:
        """``tensor.cpu().numpy()``."""
        with self._here():
            host: np.ndarray = self.own.get()
            return host


Tensor.__module__ = "torch"


@contextmanager
def torch() -> Iterator[ModuleType]:
    """Within the block ``import torch`` gives so much of it."""
    module, part = ModuleType("torch"), ModuleType("torch.cuda")
    module.Tensor, module.cuda = Tensor, part  # type: ignore[attr-defined]
    part.is_initialized = part.is_available = lambda: True  # type: ignore[attr-defined]
    part.current_stream, part.stream, part.Stream = current_stream, stream, TorchStream  # type: ignore[attr-defined]
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "torch"}
    sys.modules.update({"torch": module, "torch.cuda": part})
    _current.streams.clear()
    try:
        yield module
    finally:
        _current.streams.clear()
        del sys.modules["torch"], sys.modules["torch.cuda"]
        sys.modules.update(before)


# --- JAX --------------------------------------------------------------------------------------------


class JaxArray:
    """An array of JAX, which its stream may still have to make."""

    def __init__(self, values: Any, device: int = 0) -> None:
        with cuda.Device(device):
            self._stream = cuda.Stream(non_blocking=True)
        with on(device, self._stream):
            self._own: ndarray = asarray(np.asarray(values)) + 0  # enqueued, like every other result
        self.number, self.shape, self.dtype = device, self._own.shape, self._own.dtype

    def __dlpack__(
        self, *, stream: Any = None, max_version: Any = None, dl_device: Any = None, copy: Any = None
    ) -> Any:
        with on(self.number, self._stream):
            return self._own.__dlpack__(stream=stream, max_version=max_version, dl_device=dl_device, copy=copy)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._own.__dlpack_device__()

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        with on(self.number, self._stream):
            host: np.ndarray = self._own.get()
            return host if dtype is None else host.astype(dtype)


JaxArray.__module__ = "jaxlib._jax"
