"""Merge and broadcast where arrays lie in the memory of GPUs, of several perhaps, and of the host.

Called within an op of the engine: everything is enqueued, in the order of the current stream; work on other devices
branches off it and comes back to it. The arrays of several devices come together in one of several :data:`WAYS`. With
``direct`` kernels read what peers hold, with ``copy`` it is copied first, and ``auto`` is the quicker of these. They
fold left to right, and give the bits that the host gives; ``tree`` and ``nccl`` have orders of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from kvstore import kernels
from kvstore.arrays import HOST, Array, copy_to, empty, memory_of
from kvstore.arrays.copies import Fork
from kvstore.arrays.gpu import current_device, is_reachable
from kvstore.comm import measured, nccl, tree
from kvstore.comm.blocks import blocks

AUTO, DIRECT, COPY, TREE, NCCL = WAYS = ("auto", "direct", "copy", "tree", "nccl")


def merge(arrays: Sequence[Array], out: Array, way: str = AUTO) -> None:
    """``out`` = the sum of ``arrays``, which lie in any memories, at least one of all in a GPU's.

    It is made on the device of ``out``. If that is in host memory: on the current device if an array is there, else on
    that of the first array that is on one.
    """
    if out.size == 0:
        return
    target = memory_of(out)
    if target == HOST:
        devices = [memory for memory in map(memory_of, arrays) if memory != HOST]
        here = current_device()
        target = here if here in devices else devices[0]
    with Fork() as fork, fork.on(target):
        if len(arrays) == 1:
            copy_to(arrays[0], out)
            return
        with near(arrays, way) as some:
            if memory_of(out) != HOST:
                kernels.merge(some, out)
                return
            total = some[0] if len(some) == 1 else empty(out.shape, out.dtype, target)
            if len(some) > 1:
                kernels.merge(some, total)
            copy_to(total, out)


@contextmanager
def near(arrays: Sequence[Array], way: str = AUTO) -> Iterator[list[Array]]:
    """Within the block: arrays that kernels of the current device can use, and that have the sum of ``arrays``."""
    target, memories = current_device(), set(map(memory_of, arrays))
    if memories == {target}:
        yield list(arrays)
    elif target in memories and (summed := _in_another_order(way, arrays, memories)) is not None:
        with Fork() as fork:
            yield [summed(_partial(arrays, target, fork), target, fork)]
    else:
        yield _brought(arrays, target, _chosen(arrays, target) if way == AUTO else way)


def _in_another_order(way: str, arrays: Sequence[Array], memories: set[int]) -> Callable[..., Array] | None:
    """What makes the sum of one array per device, if that is not to be done by folding."""
    if len(memories - {HOST}) > 1:
        if way == TREE:
            return tree.summed
        if way == NCCL and nccl.takes(arrays[0].dtype):
            return nccl.summed
    return None


def _chosen(arrays: Sequence[Array], target: int) -> str:
    def sum_up(way: str) -> None:
        kernels.merge(_brought(arrays, target, way), empty(arrays[0].shape, arrays[0].dtype, target))

    return measured.quicker(arrays, target, sum_up)


def _brought(arrays: Sequence[Array], target: int, way: str) -> list[Array]:
    """The arrays where kernels of the target device can use them."""
    some, copies = list(arrays), []
    for position, array in enumerate(arrays):
        memory = memory_of(array)
        if memory != target and (way != DIRECT or memory == HOST or not is_reachable(array, target)):
            some[position] = empty(array.shape, array.dtype, target)
            copies.append((array, some[position]))
    if copies:
        with Fork() as fork:
            for array, room in copies:
                with fork.on(target if memory_of(array) == HOST else memory_of(array)):  # each device sends on its own
                    copy_to(array, room)
    return some


def _partial(arrays: Sequence[Array], target: int, fork: Fork) -> dict[int, Array]:
    """The sums of each device's own arrays; those of the host count as the target's."""
    own: dict[int, list[Array]] = {}
    for array in arrays:
        memory = memory_of(array)
        own.setdefault(target if memory == HOST else memory, []).append(array)
    for device, some in own.items():
        with fork.on(device):
            if len(some) > 1 or not some[0].flags.c_contiguous:
                total = empty(some[0].shape, some[0].dtype, device)
                merge(some, total, COPY)
                own[device] = [total]
    return {device: some[0] for device, some in own.items()}


def broadcast(source: Array, outs: Sequence[Array], start: int = 0) -> None:
    """Copy the flat ``source`` into each of ``outs``, all of one shape, from element ``start`` on in C order.

    A memory gets it once, and what more there is of it there is copied within.
    """
    if source.size == 0:
        return
    whole = bool(outs) and source.size == outs[0].size
    by_memory: dict[int, list[Array]] = {}
    for out in outs:
        by_memory.setdefault(memory_of(out), []).append(out)
    own = memory_of(source)
    with Fork() as fork:
        for memory, some in by_memory.items():
            if memory == HOST:
                for out in some:
                    _write(source, out, start)
            else:
                with fork.on(memory):
                    _spread(source, some, start, whole, memory == own)


def _spread(source: Array, outs: list[Array], start: int, whole: bool, is_here: bool) -> None:
    """:func:`broadcast` to arrays on the current device."""
    stop = start + source.size
    runs = [out.reshape(-1)[start:stop] for out in outs if out.flags.c_contiguous]
    apart = [out for out in outs if not out.flags.c_contiguous]
    if not is_here:
        first = runs.pop(0) if runs else empty(source.shape, source.dtype, memory_of(outs[0]))
        copy_to(source, first)
        source = first
    if runs:
        kernels.broadcast(source, runs)
    if whole and apart:
        kernels.broadcast(source.reshape(apart[0].shape), apart)
    else:
        for out in apart:
            _write(source, out, start)


def _write(source: Array, out: Array, start: int) -> None:
    """The flat ``source``, into ``out`` from element ``start`` on, block by block."""
    at = 0
    for index in blocks(out.shape, start, start + source.size):
        block = out[index]
        copy_to(source[at : at + block.size].reshape(block.shape), block)
        at += block.size


@contextmanager
def packed(lists: Sequence[Sequence[Array]], way: str = AUTO) -> Iterator[list[Array]]:
    """:func:`near` of what each list has, one array behind the other: it becomes one array where it lies."""
    with Fork() as fork:
        some = [_concatenated(arrays, fork) for arrays in lists]
        fork.join()
        with near(some, way) as summands:
            yield summands


def _concatenated(arrays: Sequence[Array], fork: Fork) -> Array:
    memory, dtype, size = memory_of(arrays[0]), arrays[0].dtype, sum(array.size for array in arrays)
    if memory != HOST and all(memory_of(array) == memory for array in arrays):
        with fork.on(memory):
            out = empty(size, dtype, memory)
            kernels.concatenate(arrays, out)
    else:
        out = empty(size, dtype, current_device())
        start = 0
        for array in arrays:
            copy_to(array, out[start : start + array.size].reshape(array.shape))
            start += array.size
    return out


def split(source: Array, spans: Sequence[slice], outs: Sequence[Sequence[Array]]) -> None:
    """Copy each of these parts of the flat ``source``, which together are all of it, into each of its own arrays.

    A memory gets it once; one array of every part on a device, and they are written at once.
    """
    layers: dict[tuple[int, int], list[tuple[slice, Array]]] = {}  # by memory, and which array it is of its part there
    for span, some in zip(spans, outs, strict=True):
        count: dict[int, int] = {}
        for out in some:
            memory = memory_of(out)
            count[memory] = count.get(memory, 0) + 1
            layers.setdefault((memory, count[memory]), []).append((span, out))
    there = {memory_of(source): source}
    with Fork() as fork:
        for (memory, _), layer in layers.items():
            with fork.on(current_device() if memory == HOST else memory):
                if memory == HOST or len(layer) < len(outs):
                    for span, out in layer:
                        copy_to(source[span].reshape(out.shape), out)
                    continue
                if memory not in there:
                    there[memory] = empty(source.shape, source.dtype, memory)
                    copy_to(source, there[memory])
                kernels.split(there[memory], [out for _, out in layer])
