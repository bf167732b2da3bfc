"""Ranges of elements as blocks of an array: against counting them one by one."""

from __future__ import annotations

import random

import numpy as np

from kvstore.comm.blocks import blocks


def test_blocks_hold_the_elements_in_their_order():
    rng = random.Random(5)
    for _ in range(500):
        shape = tuple(rng.randint(1, 5) for _ in range(rng.randint(0, 4)))
        array = np.arange(int(np.prod(shape))).reshape(shape)
        start, stop = sorted(rng.choices(range(array.size + 1), k=2))
        some = list(blocks(shape, start, stop))
        assert [item for index in some for item in array[index].ravel()] == list(range(start, stop))
        assert len(some) <= max(1, 2 * len(shape) - 1)
