"""Parameters, optimizer and store behind one ``step``.

Gradients are pushed in the order in which they come; weights are fetched in the order in which
the next forward pass needs them, the order of ``params``: earlier ones have the higher priority.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from kvstore.arrays import HOST, Array, beside, callers, copy_to, empty_like, memory_of, view
from kvstore.errors import ShapeError, UnknownKeyError
from kvstore.handle import Handle
from kvstore.kernels import HALVES
from kvstore.optim import Optimizer
from kvstore.protocol.pieces import Key
from kvstore.store import KVStore
from kvstore.stored import multiply


class Trainer:
    """Keeps ``params`` in step through ``store``.

    >>> import numpy as np, kvstore
    >>> weights = {"w": np.ones(2, np.float32)}
    >>> with kvstore.create("local") as kv:
    ...     trainer = kvstore.Trainer(weights, kvstore.optim.SGD(lr=0.5), kv)
    ...     pulls = trainer.step({"w": np.ones(2, np.float32)})
    >>> weights["w"], pulls[0].version
    (array([0.5, 0.5], dtype=float32), 1)

    Args:
        params: by key, in the order of the forward pass: an array, or a list with one per device. They
            are initialised with rank 0's (first device's) values and then written in place.
        optimizer: runs where the values live.
        store: made by :func:`kvstore.create`.
        scale: what gradients are multiplied by before they are pushed; pushes are sums, so ``1 / (global batch)``
            gives a mean (with ``samples_per_round``, which is the global batch, whatever the number of workers). The
            caller's arrays are not changed; a gradient that was produced in ``store.staging(key)`` is scaled there,
            and nothing is copied.

    ``steps`` is how many steps this worker has made, and so the number of the next one. A worker that comes back or
    joins a running job begins where it, or the others, are; a step of which some keys have been pushed is completed
    first: then :meth:`step` pushes the gradients of the other keys only.

    Raises:
        as :meth:`KVStore.init` and :meth:`KVStore.set_optimizer`.
    """

    def __init__(self, params: Mapping[Key, Any], optimizer: Optimizer, store: KVStore, *, scale: float = 1.0) -> None:
        self.params = dict(params)
        self.store = store
        self.scale = scale
        self._priority = {key: len(self.params) - position for position, key in enumerate(self.params)}
        self._pulls: dict[Key, Handle] = {}
        self.steps = 0
        self._ahead: dict[Key, int] = {}  # keys that need no push in the next so many steps
        store.set_optimizer(optimizer)
        keys = list(self.params)
        store.init(keys, [v[0] if isinstance(v, list) else v for v in self.params.values()])
        store.pull(keys, list(self.params.values())).result()
        rounds = {key: store.rounds(key) for key in keys}
        self.steps = min(rounds.values(), default=0)
        self._ahead = {key: round - self.steps for key, round in rounds.items() if round > self.steps}

    def __repr__(self) -> str:
        return f"<Trainer: {len(self.params)} parameters in {self.store!r}>"

    def push(self, key: Key, gradient: Any, *, samples: int | None = None) -> Handle:
        """Push one gradient as soon as it is ready, and ask for the new weights; :meth:`step` waits for them.

        Args:
            samples: how many samples it is the sum over, for a store with ``samples_per_round``.
        """
        if key not in self.params:
            raise UnknownKeyError(f"key {key!r}: expected one of the trainer's parameters")
        if self._ahead.get(key) and key not in self._pulls:
            handle = self._pulls[key] = self.store.pull(key, self.params[key], self._priority[key])
            return handle
        with callers(gradient, self.params[key]):
            gradient = self._scaled(key, gradient)
            handle = self.store.pushpull(key, gradient, self.params[key], self._priority[key], samples=samples)
        self._pulls[key] = handle
        return handle

    def step(self, grads: Mapping[Key, Any] | None = None, *, samples: int | None = None) -> list[Handle]:
        """Push ``grads`` (in their order) and wait until every parameter holds its new weights; a cut point.

        Args:
            grads: gradients by key: an array, or a list with one per device. What :meth:`push` has
                taken already may be left out.
            samples: how many samples ``grads`` are the sum over, for a store with ``samples_per_round``: then the step
                is that of so many samples, whatever the number of workers and the size of their batches.

        Returns:
            The pulls' handles, with ``.version`` and ``.staleness``, in the order of the parameters.

        Raises:
            ShapeError: a parameter without a gradient.
        """
        for key, gradient in (grads or {}).items():
            self.push(key, gradient, samples=samples)
        missing = [key for key in self.params if key not in self._pulls]
        if missing:
            raise ShapeError(f"step: expected a gradient for every parameter, none came for {missing[:5]!r}")
        pulls, self._pulls = self._pulls, {}
        for key in self.params:
            pulls[key].result()
        self.steps += 1
        self._ahead = {key: left - 1 for key, left in self._ahead.items() if left > 1}
        self.store.cut_point()
        return [pulls[key] for key in self.params]

    def _scaled(self, key: Key, gradient: Any) -> Any:
        """The gradient times ``scale``; one device's is written where the store sends it from."""
        if self.scale == 1.0:
            return gradient
        what = f"gradient of key {key!r}"
        if isinstance(gradient, list | tuple):
            return [self._times(view(one, what)) for one in gradient]
        array = view(gradient, what)
        if memory_of(array) != HOST:
            return self._times(array)
        staged = self.store.staging(key)
        if (array.shape, array.dtype) != (staged.shape, staged.dtype):
            return array  # the store will say what is wrong with it
        return np.multiply(array, array.dtype.type(self.scale), out=staged)

    def _times(self, array: Array) -> Array:
        """A new array, ``scale`` times as large, in the same memory."""
        scale = array.dtype.type(self.scale)
        with beside(array):
            if memory_of(array) == HOST or array.dtype not in HALVES:
                scaled: Array = array * scale
                return scaled
            scaled = empty_like(array)
            copy_to(array, scaled)
            multiply(scaled, float(scale))
            return scaled

    def save_states(self, path: str | os.PathLike[str]) -> None:
        """Write the optimizer's states; one worker calls it, between two barriers."""
        self.store.save_optimizer_states(path)

    def load_states(self, path: str | os.PathLike[str]) -> None:
        """Read them again; one worker calls it, between two barriers."""
        self.store.load_optimizer_states(path)
