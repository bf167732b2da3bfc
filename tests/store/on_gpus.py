"""A store that is given what a test has in host memory as arrays of (simulated) GPUs, and the test sees no difference.

Device ``i`` of a call works on GPU ``i`` modulo their number, on a stream of its caller's own. An array has the layout
of the test's. As soon as the store says that it has read one, it is overwritten there, in the order of that stream.
"""

from __future__ import annotations

import random
from concurrent.futures import Future
from typing import Any

import numpy as np

import kvstore
from kvstore.entries import IN_PLACE
from tests.gpu.mirror import Mirror


class OnGpus:
    def __init__(self, store: kvstore.KVStore, cupy: Any, seed: int = 0, streams: int = 2) -> None:
        self._store = store
        self._cupy = cupy
        self._gpus = cupy.cuda.runtime.getDeviceCount()
        self._random = random.Random(seed)
        self._streams: list[list[Any]] = []
        for gpu in range(self._gpus):
            with cupy.cuda.Device(gpu):
                own = [cupy.cuda.Stream(non_blocking=True) for _ in range(streams)]
            self._streams.append([cupy.cuda.Stream.null, *own])
        self._lent: list[np.ndarray] = []
        self._views: dict[int, tuple[Any, np.ndarray]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
        else:
            setattr(self._store, name, value)

    def __enter__(self) -> OnGpus:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._store.__exit__(*exception)

    def __copy__(self) -> Any:
        return self._store.__reduce__()

    # --- calls --------------------------------------------------------------------------------------

    def init(self, key: Any, value: Any, **options: Any) -> None:
        call = Call(self, key)
        self._store.init(key, call.there(value), **options)
        call.overwrite()

    def push(self, key: Any, value: Any, *more: Any, **options: Any) -> Seen:
        call = Call(self, key, options.get("device"))
        handle = self._store.push(key, call.there(value), *more, **options)
        call.overwrite()
        return Seen(handle, call)

    def pull(self, key: Any, out: Any = None, *more: Any, **options: Any) -> Seen:
        call = Call(self, key, options.get("device"))
        return Seen(self._store.pull(key, call.there(out), *more, **options), call)

    def pushpull(self, key: Any, value: Any, out: Any = None, *more: Any, **options: Any) -> Seen:
        call = Call(self, key, options.get("device"))
        value = call.there(value)
        handle = self._store.pushpull(key, value, call.there(out), *more, **options)
        return Seen(handle, call)

    def broadcast(self, key: Any, value: Any, out: Any = None, *more: Any, **options: Any) -> Seen:
        call = Call(self, key)
        value = call.there(value)
        return Seen(self._store.broadcast(key, value, call.there(out), *more, **options), call)

    def staging(self, key: Any) -> np.ndarray:
        array = self._store.staging(key)
        self._lent.append(array)
        return array

    def view(self, key: Any) -> Any:
        return self.viewed(self._store.view(key))

    # --- arrays -------------------------------------------------------------------------------------

    def mirror(self, array: np.ndarray, device: int) -> tuple[Any, Mirror]:
        """The same on a GPU, made on the stream that is current there."""
        with self._cupy.cuda.Device(device % self._gpus):
            mirror = Mirror([array], self._cupy)
            return mirror.of(array), mirror

    def choose_streams(self) -> None:
        """Other streams are the current ones from here on."""
        for gpu, streams in enumerate(self._streams):
            with self._cupy.cuda.Device(gpu):
                self._random.choice(streams).use()

    def viewed(self, there: Any) -> Any:
        """What the store has given to look at."""
        if isinstance(there, np.ndarray):
            return there
        known = self._views.get(id(there))
        if known is None:
            known = self._views[id(there)] = there, there.get()
            known[1].flags.writeable = False
        return known[1]


class Call:
    """The arrays of one call, here and there."""

    def __init__(self, store: OnGpus, key: Any, device: int | None = None) -> None:
        self.store = store
        self._many = isinstance(key, list | tuple)
        store.choose_streams()
        self._device = device
        self.is_in_place = False
        self._pairs: list[tuple[np.ndarray, Any, Any]] = []

    def there(self, value: Any) -> Any:
        if self._many and isinstance(value, list | tuple):
            return [self._of_key(one) for one in value]
        return self._of_key(value)

    def _of_key(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [self._one(one, device) for device, one in enumerate(value)]
        return self._one(value, self._device or 0)

    def _one(self, array: Any, device: int) -> Any:
        if array is IN_PLACE or any(array is lent for lent in self.store._lent):
            self.is_in_place = True
            return array
        if type(array) is not np.ndarray or array.dtype.kind in "US" or not array.flags.writeable:
            return array  # what is no array for a GPU, or read-only, which none of CuPy's is
        known = next((there for here, there, _ in self._pairs if here is array), None)
        if known is not None:
            return known
        there, mirror = self.store.mirror(array, device)
        self._pairs.append((array, there, mirror))
        return there

    def overwrite(self) -> None:
        """The store has read it."""
        for _, there, mirror in self._pairs:
            with there.device:
                mirror.scribble()

    def here(self, result: Any) -> Any:
        """The result as the test expects it."""
        if isinstance(result, list | tuple):
            return [self.here(one) for one in result]
        for array, there, mirror in self._pairs:
            if result is there:
                with there.device:
                    mirror.bring_back()
                return array
        if result is None or isinstance(result, np.ndarray):
            return result
        return self.store.viewed(result) if self.is_in_place else result.get()


class Seen(Future):
    """The handle, as the test knows it."""

    def __init__(self, handle: kvstore.Handle, call: Call) -> None:
        super().__init__()
        self._handle, self._call = handle, call
        self._seen: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def __copy__(self) -> Any:
        return self._handle.__reduce__()

    def done(self) -> bool:
        return self._handle.done()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        return self._handle.exception(timeout)

    def result(self, timeout: float | None = None) -> Any:
        result = self._handle.result(timeout)
        if not self._seen:
            self._seen.append(self._call.here(result))
        return self._seen[0]


__all__ = ["IN_PLACE", "OnGpus"]
