"""Random programs give on the threaded engine exactly what they give on the serial one."""

from __future__ import annotations

import contextlib
import random
import threading

import numpy as np
import pytest

import engine

PROGRAMS = 10_000
VIEWS = [slice(0, 8), slice(0, 4), slice(4, 8), slice(2, 6), slice(7, 8), slice(3, 3)]


class Boom(Exception):
    pass


def run(runtime: engine.Engine, seed: int) -> list[object]:
    """One program over arrays with overlapping views and vars with cells; everything it leaves behind."""
    rng = random.Random(seed)
    arrays = [np.arange(8, dtype=np.int64) + 10 * n for n in range(3)]
    cells = {engine.Var(f"v{n}"): [n] for n in range(3)}
    handles = []
    completers = []
    bulk = contextlib.ExitStack()
    for number in range(rng.randrange(2, 14)):
        if rng.random() < 0.15:
            bulk.enter_context(runtime.bulk())
        elif rng.random() < 0.15:
            bulk.close()
        pool = [array[view] for array in arrays for view in VIEWS] + list(cells)
        reads = rng.sample(pool, rng.randrange(0, 3))
        writes = rng.sample(pool, rng.randrange(0, 3))
        if rng.random() < 0.4:
            reads = [*reads, *writes]  # read, modify, write
        fails = rng.random() < 0.06
        modifies = [any(w is r for r in reads) for w in writes]

        def work(reads=reads, writes=writes, number=number, fails=fails, modifies=modifies):
            total = number + sum(cells[r][0] if isinstance(r, engine.Var) else int(r.sum()) for r in reads)
            if fails:
                raise Boom(number)
            for target, modify in zip(writes, modifies, strict=True):
                if isinstance(target, engine.Var):
                    cells[target][0] = (cells[target][0] * 3 if modify else 0) + total
                else:
                    target[...] = (target * 3 if modify else 0) + total
                    target %= 1_000_003
            return total

        options = {"priority": rng.randrange(3), "inline": rng.random() < 0.3, "name": f"op {number}"}
        if rng.random() < 0.15:

            def start(completion, work=work):
                def complete():
                    try:
                        completion.set_result(work())
                    except Boom as error:
                        completion.set_exception(error)

                if isinstance(runtime, engine.ThreadedEngine):
                    thread = threading.Thread(target=complete)
                    completers.append(thread)
                    thread.start()
                else:
                    complete()

            handles.append(runtime.push_async(start, reads, writes, **options))
        else:
            handles.append(runtime.push(work, reads, writes, **options))
    if rng.random() < 0.5:  # else the waits below are within a bulk
        bulk.close()
    outcome: list[object] = []
    for handle in handles:
        error = handle.exception(30)
        outcome.append(repr(error) if error else handle.result(30))
    for thread in completers:
        thread.join(30)
    for item in [*arrays, *cells]:
        try:
            runtime.wait(item, timeout=30)
            outcome.append(item.tolist() if isinstance(item, np.ndarray) else cells[item][0])
        except Boom as error:
            outcome.append(repr(error))
    bulk.close()
    runtime.validate()
    return outcome


@pytest.mark.timeout(300)
def test_threaded_agrees_with_serial():
    threaded, serial = engine.create("threaded", threads=3), engine.create("serial")
    for seed in range(PROGRAMS):
        assert run(threaded, seed) == run(serial, seed), f"seed {seed}"
    threaded.close()
    serial.close()


def test_a_planted_missing_dependency_is_caught():
    """The comparison can fail: without the conflict of views some program differs."""
    threaded, serial = engine.create("threaded", threads=3), engine.create("serial")
    found_one = []
    for runtime in (threaded, serial):
        memory = runtime._memory
        honest = memory.vars_of
        if runtime is threaded:
            memory.vars_of = lambda array, honest=honest: ([], [])  # type: ignore[method-assign]
    for seed in range(3000):
        try:
            if run(threaded, seed) != run(serial, seed):
                found_one.append(seed)
                break
        except AssertionError:
            found_one.append(seed)
            break
    assert found_one
    threaded.close()
