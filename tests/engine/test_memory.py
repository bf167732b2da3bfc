"""Which arrays overlap, against looking at every pair."""

from __future__ import annotations

import random

import numpy as np
import pytest
from numpy.lib.array_utils import byte_bounds

from engine.memory import Memory


def overlap(one, other):
    """Do they share bytes, and does ``one`` cover ``other``? An array counts from its first to its last byte."""
    (low, high), (other_low, other_high) = byte_bounds(one), byte_bounds(other)
    return low < other_high and other_low < high, low <= other_low and other_high <= high


@pytest.mark.parametrize("views", [0.0, 0.05, 0.5], ids=["whole arrays", "some views", "many views"])
@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_every_pair(seed, views):
    """Also when arrays come again, are views of others, and are freed."""
    choose = random.Random(seed)
    memory, known = Memory(), {}
    bases = [np.zeros(choose.choice([1, 50, 5000])) for _ in range(40)]
    for _ in range(600):
        position = choose.randrange(len(bases))
        if choose.random() < 0.1:  # freed; another may come to lie there
            known = {number: (a, v) for number, (a, v) in known.items() if not np.shares_memory(a, bases[position])}
            bases[position] = np.zeros(choose.choice([1, 50, 5000]))
        array = bases[position]
        if choose.random() < views:
            array = array[choose.randrange(array.size) :: choose.choice([1, 3])]
        memory.tidy()
        whole, part = memory.vars_of(array)
        own, now = whole[0], set(memory._vars.values())
        for other, var in known.values():
            if var in now and var is not own:
                shared, covered = overlap(array, other)
                assert (var in whole) == (shared and covered)
                assert (var in part) == (shared and not covered)
        assert memory.vars_of(array)[0][0] is own
        known[id(own)] = (array, own)
