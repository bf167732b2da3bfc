"""Where one value lives: what of its former memory is kept."""

from __future__ import annotations

import weakref

import numpy as np

from kvstore.stored import Stored


def test_a_value_that_pushes_have_replaced_is_not_kept():
    """Its memory came with the pushes, and more comes with the next: to keep it would double a server's memory."""
    stored = Stored(np.zeros(8, np.float32), "w")
    former = []
    for _ in range(3):
        former.append(weakref.ref(stored.value))
        stored.lend("a reply on its way")
        stored.assign([np.ones(8, np.float32), np.ones(8, np.float32)], owned=True)
    assert [value() for value in former] == [None] * 3
    assert stored.value.tolist() == [2] * 8


def test_what_is_lent_stays_as_it_is_when_pushes_replace_it():
    stored = Stored(np.zeros(8, np.float32), "w")
    stored.assign([np.full(8, 1, np.float32)], owned=True)
    lent = stored.lend("a reply on its way")
    stored.assign([np.full(8, 2, np.float32)], owned=True)
    stored.give_back("a reply on its way")
    assert lent.tolist() == [1] * 8
    assert stored.value.tolist() == [2] * 8
