"""Merge and broadcast where arrays lie in the memory of GPUs, of several perhaps, and of the host.

Called within an op of the engine: everything is enqueued, in the order of the current stream; work on other devices
branches off it and comes back to it. The sum is folded left to right, so that its bits are those of the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvstore import kernels
from kvstore.arrays import HOST, Array, copy_to, empty, memory_of
from kvstore.arrays.gpu import Fork, current_device, is_reachable

DIRECT, COPY = "direct", "copy"  # kernels read what peers hold, or it is copied before


def merge(arrays: Sequence[Array], out: Array, how: str = DIRECT) -> None:
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
        near = _brought(arrays, target, how)
        if memory_of(out) == HOST:
            total = empty(out.shape, out.dtype, target)
            kernels.merge(near, total)
            copy_to(total, out)
        else:
            kernels.merge(near, out)


def _brought(arrays: Sequence[Array], target: int, how: str) -> list[Array]:
    """The arrays where kernels of the target device can use them."""
    near, copies = list(arrays), []
    for position, array in enumerate(arrays):
        if not _is_near(array, target, how):
            near[position] = empty(array.shape, array.dtype, target)
            copies.append((array, near[position]))
    with Fork() as fork:
        for array, room in copies:
            with fork.on(target if memory_of(array) == HOST else memory_of(array)):  # each device sends on its own
                copy_to(array, room)
    return near


def _is_near(array: Array, target: int, how: str) -> bool:
    memory = memory_of(array)
    if memory in (target, HOST):
        return memory == target
    return how == DIRECT and array.flags.c_contiguous and is_reachable(array, target)


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


def blocks(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[slice, ...]]:
    """The elements ``start`` to ``stop``, counted in C order, as blocks of an array of that shape, in this order."""
    if start >= stop:
        return
    if not shape:
        yield ()
        return
    row = 1
    for length in shape[1:]:
        row *= length
    first, last = -(-start // row), stop // row  # the rows that are in it whole
    if first > last:  # it is within one row
        yield from _within(shape, last, start - last * row, stop - last * row)
        return
    if start < first * row:
        yield from _within(shape, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield (slice(first, last), *[slice(None)] * (len(shape) - 1))
    if last * row < stop:
        yield from _within(shape, last, 0, stop - last * row)


def _within(shape: tuple[int, ...], row: int, start: int, stop: int) -> Iterator[tuple[slice, ...]]:
    for index in blocks(shape[1:], start, stop):
        yield (slice(row, row + 1), *index)
