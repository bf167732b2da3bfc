"""Kills processes in the middle of writing checkpoints. Run by test_directory.py in a process without threads.

Usage: python -m tests.checkpoint.kills DIRECTORY TIMES SEED
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

from kvstore.checkpoint import directory
from kvstore.checkpoint.reading import Checkpoint
from tests.checkpoint.cuts import count


def main(place: Path, times: int, seed: int) -> None:
    rng = random.Random(seed)
    begun = time.monotonic()
    directory.write(place, count(0))
    took = time.monotonic() - begun
    last, unfinished, moved = 0, 0, 0
    for number in range(1, times + 1):
        child = os.fork()
        if child == 0:
            directory.write(place, count(number), keep=3, shard_bytes=100_000)
            os._exit(0)
        time.sleep(rng.random() * 1.5 * took)  # the moment
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        unfinished += any(path.name.startswith(".writing") for path in place.iterdir())
        found = directory.checkpoints(place)
        assert found, "no checkpoint is left"
        for path in found:
            with Checkpoint(path) as one:
                assert one.verify() == [], path
        with Checkpoint(place) as newest:
            values = {float(newest.array(record.key)[0]) for record in newest.records}
            states = {float(newest.array(record.key, "m")[-1]) - 1 for record in newest.records}
            assert values == states and len(values) == 1, "a mixture"
            (value,) = values
        assert value in (last, number), (last, value, number)
        moved += value != last
        last = value
    directory.write(place, count(times + 1), keep=3)  # whatever was left behind, it goes on
    left = sorted(path.name for path in place.iterdir())
    assert left == [".lock", *(path.name for path in directory.checkpoints(place))] and len(left) <= 4, left
    print(f"{times} kills: {unfinished} in the middle of writing, {moved} after the rename")
    assert unfinished, "no kill came in the middle: nothing was tested"


main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
