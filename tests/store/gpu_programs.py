"""Random programs on stores with arrays of GPUs, and the same on plain stores: nobody can tell them apart."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

import kvstore
from kvstore import optim
from tests.gpu import simulated
from tests.store.on_gpus import OnGpus

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int32]
OPTIMIZERS = [None, None, optim.SGD(lr=0.5, momentum=0.9), optim.Adam(lr=0.1), optim.Accumulate()]


def run(seed: int, type: str, steps: int = 30, way: str | None = None) -> None:
    """One program.

    Raises:
        AssertionError: the results are not the same, to the bit; or nearly, if sums have another order.
    """
    rng = np.random.default_rng(seed)
    gpus, devices = int(rng.integers(1, 3)), int(rng.choice([1, 2, 4]))
    peers = bool(rng.integers(2))
    with (
        simulated.install(devices=gpus, seed=seed, peers=lambda one, other: peers),
        kvstore.create("local", devices=devices, timeout=30) as plain,
    ):
        import cupy

        with OnGpus(kvstore.create(type, devices=devices, timeout=30, device_merge=way), cupy, seed) as kv:
            Program(rng, kv, plain, devices, exact=way not in ("tree", "nccl")).run(steps)


class Program:
    def __init__(self, rng: Any, kv: Any, plain: Any, devices: int, exact: bool) -> None:
        self.rng, self.both, self.devices, self.exact = rng, (kv, plain), devices, exact
        self.keys = [f"k{number}" for number in range(rng.integers(2, 7))]
        self.dtype = np.dtype(DTYPES[rng.integers(len(DTYPES))])
        self.shapes = {
            key: tuple(rng.integers(0 if rng.integers(8) == 0 else 1, 9, rng.integers(0, 3))) for key in self.keys
        }
        if rng.integers(3) == 0:
            self.shapes[self.keys[0]] = (70_000,)
        for one in self.both:
            one.init(self.keys, [np.zeros(self.shapes[key], self.dtype) for key in self.keys])
        optimizer = OPTIMIZERS[rng.integers(len(OPTIMIZERS))]
        if optimizer is not None and (self.dtype.kind in "fV" or isinstance(optimizer, optim.Accumulate)):
            for one in self.both:
                one.set_optimizer(optimizer)

    def run(self, steps: int) -> None:
        waiting: list[tuple[Any, Any]] = []
        for _ in range(steps):
            pair = self.step()
            waiting.append(pair)
            if self.rng.integers(4) == 0:
                self.compare(waiting)
        self.compare(waiting)
        kv, plain = self.both
        for key in self.keys:
            self.same(kv.pull(key).result(), plain.pull(key).result())
        mine, theirs = (one.snapshot().result() for one in self.both)
        for key in self.keys:
            self.same(mine[key], theirs[key])

    def compare(self, waiting: list[tuple[Any, Any]]) -> None:
        for mine, theirs in waiting:
            self.same(mine.result(), theirs.result())
            assert mine.version == theirs.version
        waiting.clear()

    def same(self, mine: Any, theirs: Any) -> None:
        """Are they?"""
        if isinstance(theirs, list):
            for one, other in zip(mine, theirs, strict=True):
                self.same(one, other)
        elif theirs is not None:
            assert mine.dtype == theirs.dtype
            if self.exact:
                assert np.ascontiguousarray(mine).tobytes() == np.ascontiguousarray(theirs).tobytes()
            else:
                wide, near = np.float64, NEAR[mine.itemsize]
                np.testing.assert_allclose(mine.astype(wide), theirs.astype(wide), near, 100 * near)

    def step(self) -> tuple[Any, Any]:
        keys = self.some_keys()
        what = self.rng.choice(["push", "push", "pull", "pushpull", "pushpull", "one by one"])
        many = len(keys) > 1
        of_calls = []
        if what == "one by one":  # each device by itself
            values = self.values(keys[0])
            arrays = values if isinstance(values, list) else [values]
            handles = [
                [one.push(keys[0], array.copy(), device=device) for device, array in enumerate(arrays)]
                for one in self.both
            ]
            return handles[0][-1], handles[1][-1]
        layout, with_out, in_place = self.rng.integers(3), self.rng.integers(3) > 0, self.rng.integers(2)
        given = [self.values(key) for key in keys]
        for one in self.both:
            values = [copies(value) for value in given]
            outs = [self.outs(key, layout) for key in keys] if with_out else None
            if what == "pushpull" and in_place:
                outs = None
            first = values if many else values[0]
            out = outs if many or outs is None else outs[0]
            name = keys if many else keys[0]
            if what == "push":
                of_calls.append(one.push(name, first))
            elif what == "pull":
                of_calls.append(one.pull(name, out))
            else:
                of_calls.append(one.pushpull(name, first, out))
        return of_calls[0], of_calls[1]

    def some_keys(self) -> list[str]:
        match self.rng.integers(3):
            case 0:
                return self.keys
            case 1:
                return [self.keys[self.rng.integers(len(self.keys))]]
            case _:
                return sorted(self.rng.choice(self.keys, self.rng.integers(1, len(self.keys) + 1), replace=False))

    def values(self, key: str) -> Any:
        arrays = [self.array(self.shapes[key]) for _ in range(self.devices)]
        return arrays if self.devices > 1 else arrays[0]

    def array(self, shape: tuple[int, ...]) -> np.ndarray:
        numbers = (self.rng.standard_normal(shape) * 8).astype(np.float32)
        array = np.asarray(numbers).astype(self.dtype)
        if array.ndim and self.rng.integers(4) == 0:  # with holes
            wide = np.zeros((*shape[:-1], 2 * shape[-1]), self.dtype)
            wide[..., ::2] = array
            return wide[..., ::2]
        return array

    def outs(self, key: str, layout: int) -> Any:
        shape = self.shapes[key]

        def one() -> np.ndarray:
            if layout == 1 and shape:
                return np.zeros((*shape[:-1], 2 * shape[-1]), self.dtype)[..., ::2]
            return np.zeros(shape, self.dtype, order="F" if layout == 2 else "C")

        return [one() for _ in range(self.devices)] if self.devices > 1 else one()


NEAR = {2: 0.05, 4: 1e-4, 8: 1e-10}  # by bytes of an element


def copies(value: Any) -> Any:
    """Copies that keep their layout."""
    if isinstance(value, list):
        return [copies(one) for one in value]
    if value.flags.c_contiguous:
        return value.copy()
    wide = np.zeros((*value.shape[:-1], 2 * value.shape[-1]), value.dtype)
    wide[..., ::2] = value
    return wide[..., ::2]
