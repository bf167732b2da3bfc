"""Sums made pair by pair: half as many devices go on each time, those first that reach each other's memory.

Another order of summation than left to right, so that the last bits may differ; 16-bit floating point goes from device
to device in float32, and is rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from kvstore import kernels
from kvstore.arrays import Array, copy_to, empty, empty_like
from kvstore.arrays.copies import Fork
from kvstore.arrays.gpu import peers
from kvstore.kernels import HALVES

Round = list[tuple[int, int]]  # of pairs: who sends, who adds what it gets to its own


def summed(partial: Mapping[int, Array], root: int, fork: Fork) -> Array:
    """The sum of one array per device, on ``root``, the device of the stream at hand; the fork is joined."""
    dtype = partial[root].dtype
    sums = {device: _wide(array, device, fork) for device, array in partial.items()}
    for pairs in rounds(list(sums), root, lambda one, other: other in peers(one)):
        for sender, to in pairs:
            fork.meet(to, sender)
            with fork.on(to):
                room = empty_like(sums[to])
                copy_to(sums[sender], room)
                kernels.merge([sums[to], room], room)
                sums[to] = room
            fork.meet(sender, to)  # where the memory that was read may be given anew
    fork.join()
    total = sums[root]
    if total.dtype != dtype:
        total, wide = empty(total.shape, dtype, root), total
        kernels.cast(wide, total)
    return total


def _wide(array: Array, device: int, fork: Fork) -> Array:
    with fork.on(device):
        if array.dtype not in HALVES:
            return array
        wide = empty(array.shape, np.dtype(np.float32), device)
        kernels.cast(array, wide)
        return wide


def rounds(devices: Sequence[int], root: int, linked: Callable[[int, int], bool]) -> list[Round]:
    """Rounds of pairs after which ``root`` has the sum of all.

    Args:
        devices: each once, ``root`` among them.
        linked: can the first reach the memory of the second? Such pairs are made first.
    """
    left, made = sorted(devices), []
    while len(left) > 1:
        pairs: Round = []
        free = list(left)
        for wanted in (True, False):
            for to in list(free):
                mate = next((one for one in free if one != to and linked(to, one) is wanted), None)
                if to in free and mate is not None:
                    free.remove(to)
                    free.remove(mate)
                    pairs.append((to, mate) if mate == root else (mate, to))
        made.append(pairs)
        left = sorted(set(left) - {sender for sender, _ in pairs})
    return made
