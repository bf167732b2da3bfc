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


def run(runtime: engine.Engine, seed: int, *, grouped: bool = False) -> list[object]:
    """One program over arrays with overlapping views and vars with cells; everything it leaves behind.

    Args:
        grouped: some of the reads and writes are groups. Who reads two of them with errors may get either.
    """
    rng = random.Random(seed)
    arrays = [np.arange(8, dtype=np.int64) + 10 * n for n in range(3)]
    cells = {engine.Var(f"v{n}"): [n] for n in range(3)}
    handles = []
    completers = []
    groups = []
    bulk = contextlib.ExitStack()
    for number in range(rng.randrange(2, 14)):
        if rng.random() < 0.15:
            bulk.enter_context(runtime.bulk())
        elif rng.random() < 0.15:
            bulk.close()
        views = [array[view] for array in arrays for view in VIEWS]
        groups = [group for group in groups if rng.random() < 0.8]
        if grouped:
            groups += [engine.ArrayGroup(rng.sample(views, rng.randrange(0, 5))) for _ in range(2 - len(groups))]
        pool = [*views, *cells, *(groups * 3)]
        reads = rng.sample(pool, rng.randrange(0, 3))
        writes = rng.sample(pool, rng.randrange(0, 3))
        if rng.random() < 0.4:
            reads = [*reads, *writes]  # read, modify, write
        fails = rng.random() < 0.06
        modifies = [any(w is r for r in reads) for w in writes]

        def work(reads=reads, writes=writes, number=number, fails=fails, modifies=modifies):
            total = number + sum(cells[r][0] if isinstance(r, engine.Var) else _sum(r) for r in reads)
            if fails:
                raise Boom(number)
            for target, modify in zip(writes, modifies, strict=True):
                if isinstance(target, engine.Var):
                    cells[target][0] = (cells[target][0] * 3 if modify else 0) + total
                else:
                    for array in _arrays(target):
                        array[...] = (array * 3 if modify else 0) + total
                        array %= 1_000_003
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
        outcome.append((grouped or repr(error)) if error else handle.result(30))
    for thread in completers:
        thread.join(30)
    for item in [*arrays, *cells, *groups]:
        try:
            runtime.wait(item, timeout=30)
            outcome.append(cells[item][0] if isinstance(item, engine.Var) else [a.tolist() for a in _arrays(item)])
        except Boom as error:
            outcome.append(grouped or repr(error))
    bulk.close()
    runtime.push(lambda: None, writes=[engine.ArrayGroup(arrays)]).result(30)  # heals all, or errors would pile up
    assert not runtime.uses_arrays()
    runtime.validate()
    return outcome


def _arrays(item: object) -> tuple[np.ndarray, ...]:
    return item.arrays if isinstance(item, engine.ArrayGroup) else (item,)


def _sum(item: object) -> int:
    return sum(int(array.sum()) for array in _arrays(item))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("grouped", [False, True])
def test_threaded_agrees_with_serial(grouped):
    threaded, serial = engine.create("threaded", threads=3), engine.create("serial")
    for seed in range(PROGRAMS // 2):
        assert run(threaded, seed, grouped=grouped) == run(serial, seed, grouped=grouped), f"seed {seed}"
    threaded.close()
    serial.close()


def test_a_planted_missing_dependency_is_caught():
    """The comparison can fail: without the conflict of views some program differs."""
    threaded, serial = engine.create("threaded", threads=3), engine.create("serial")
    found_one = []
    for runtime in (threaded, serial):
        memory = runtime._operands._memories[None]
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
