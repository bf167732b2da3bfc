"""Where the values of a store of one process lie, and by which ops of the engine they come there.

In host memory, or, if the store keeps values on GPUs, on one of those that push a value: :mod:`kvstore.placing` says on
which. Ops on a value on a GPU are ops of that GPU. What they do is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np

import engine
from kvstore import comm
from kvstore.arrays import HOST, Array, copy_to, empty, empty_like, gpu, memory_of, to_host
from kvstore.home import Gradient
from kvstore.placing import Placing
from kvstore.protocol.messages import Spec
from kvstore.protocol.pieces import Key
from kvstore.stored import Stored
from kvstore.together import Value


class Places:
    """The places of one store's values. Calls for one value come one after another.

    Args:
        lock: of the store's values.
        on_gpus: values that are pushed from GPUs live there.
        unplaced: the bytes of the values that no GPU has pushed yet; called with the lock held.
    """

    def __init__(
        self,
        runtime: engine.Engine,
        lock: AbstractContextManager[Any],
        *,
        on_gpus: bool,
        unplaced: Callable[[], Mapping[Key, int]],
    ) -> None:
        self._engine = runtime
        self._placing = Placing() if on_gpus else None
        self._unplaced = unplaced
        self._lock = lock

    def __repr__(self) -> str:
        return f"<Places: {self._placing or 'the host'}>"

    def first(self, key: Key, spec: Spec, value: Array) -> Value:
        """A new key, with a copy of the value."""
        memory = memory_of(value)
        if memory == HOST:
            return Value(key, spec, Stored(value.copy(), repr(key)))
        if self._placing is None:
            return Value(key, spec, Stored(to_host(value), repr(key)))
        first = Value(key, spec, Stored(empty_like(value), repr(key)), memory)
        first.own.names = [first.own.var, _mark(memory)]
        copy = partial(copy_to, value, first.own.value)
        self._engine.push(copy, reads=[value], writes=first.own.names, name="init")
        return first

    def prepared(self, value: Value, gradient: Gradient) -> Gradient:
        """The gradient as an op on the value can read it, which from here on lies where that can best be."""
        if self._engine.devices is None:
            return gradient
        if not value.placed and gradient.on_devices:
            self._place(value, gradient)
        return gradient if value.memory == HOST else gradient.settled(self._engine)

    def fit(self, value: Value, gradient: Gradient, outs: Sequence[Array]) -> bool:
        """Can one op add the gradient to the value, and copy that to ``outs``? On the host, if all is there."""
        if self._engine.devices is None or value.memory != HOST:
            return True
        return not gradient.on_devices and comm.in_host_memory(*outs)

    def room(self, value: Value, gradient: Gradient) -> Array:
        """Memory for the sum of the gradient: where the value is, or where it can be copied from."""
        shape, dtype = value.spec.shape, value.own.value.dtype
        if not gradient.on_devices:
            return empty(shape, dtype)
        return _pinned(shape, dtype) if value.memory == HOST else empty(shape, dtype, value.memory)

    def _place(self, value: Value, gradient: Gradient) -> None:
        """From here on the value lies on a GPU that pushes it, or in memory of the host from which GPUs copy."""
        stored = value.own
        if self._placing is None:
            value.placed = True
            room = partial(_pinned, stored.value.shape, stored.value.dtype)
            self._engine.push(lambda: stored.move(room(), room), reads=[stored.var], writes=[stored.var], name="place")
            return
        with self._lock:
            device = self._placing.place(value.key, gradient.devices, self._unplaced())
            target = None if device == value.memory else empty(stored.value.shape, stored.value.dtype, device)
            value.placed = True
        if target is None:
            return

        def move() -> list[Array]:
            stored.move(target)
            return stored.shed()

        former, stored.names, value.memory = stored.names, [stored.var, _mark(device)], device
        self._engine.push(move, reads=former, writes=stored.names, name="place")


def _mark(device: int) -> Array:
    """An array without bytes, by which the engine knows whose device an op is on: it is in nobody's way."""
    return empty(0, np.dtype(np.uint8), device)


def _pinned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    return gpu.pinned(math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)
