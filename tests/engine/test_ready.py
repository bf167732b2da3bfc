"""Which ready op starts next, against sorting them all."""

from __future__ import annotations

import random

import pytest

from engine.ready import Ready
from engine.scheduler import READY, RUNNING, Op


@pytest.mark.parametrize("seed", range(20))
def test_agrees_with_sorting_them_all(seed):
    choose = random.Random(seed)
    ready, known, sequence = Ready(), [], 0
    for _ in range(500):
        luck = choose.random()
        if luck < 0.5:
            op = Op("op", (), (), choose.choice([0, 0, 0, 1, -2]))
            sequence += 1
            op.sequence = sequence if choose.random() < 0.7 else -sequence
            op.state = READY
            ready.add(op)
            known.append(op)
        elif luck < 0.6 and known:  # a thread that waits for it takes it
            known.pop(choose.randrange(len(known))).state = RUNNING
            ready.started()
        else:
            known.sort(key=lambda op: (-op.priority, op.sequence))
            expected = known.pop(0) if known else None
            assert ready.take() is expected
            assert expected is not None or ready.count == 0
        assert ready.count >= len(known)
