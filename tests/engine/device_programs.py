"""Random programs over arrays of the host and of devices; ``machine`` says how arrays are made and work is enqueued."""

from __future__ import annotations

import contextlib
import random
import threading

import numpy as np

import engine
from tests.engine.simulated import Array

VIEWS = [slice(0, 8), slice(0, 4), slice(4, 8), slice(2, 6), slice(7, 8)]
LIMIT_S = 60
PRIME = 1_000_003


class Boom(Exception):
    pass


def values(item):
    """What one can compute with, behind an array of the simulation."""
    return item.data if isinstance(item, Array) else item


def single(items):
    """The arrays, in place of groups."""
    return [values(one) for item in items for one in (item.arrays if isinstance(item, engine.ArrayGroup) else [item])]


def mix(number, sources, targets, modify):
    total = number + sum(source.sum() for source in single(sources))
    for array in single(targets):
        array[...] = ((array * 3 if modify else 0) + total) % PRIME


def mixed(runtime, machine, seed):
    """Ops of the host and of two devices, synchronous or not, with errors of the host and of the device, and waits."""
    rng = random.Random(seed)
    host = [np.arange(8, dtype=np.int64) + 10 * n for n in range(2)]
    device = [machine.array(np.arange(8, dtype=np.int64) + 100 * n, n % 2) for n in range(4)]
    cells = [np.array([n], np.int64) for n in range(2)]
    variables = [engine.Var(f"v{n}") for n in range(2)]
    cell_of = dict(zip(variables, cells, strict=True))
    handles, outcome, completers, groups = [], [], [], []
    bulk = contextlib.ExitStack()

    def data(items):
        return [cell_of.get(item, item) if isinstance(item, engine.Var) else item for item in items]

    for number in range(rng.randrange(2, 14)):
        if rng.random() < 0.15:
            bulk.enter_context(runtime.bulk())
        elif rng.random() < 0.15:
            bulk.close()
        pool = [((array, view), n < 4) for n, array in enumerate((*device, *host)) for view in VIEWS]
        pool += [(variable, False) for variable in variables]
        groups = [group for group in groups if rng.random() < 0.8]
        if len(groups) < 2:  # of one memory each: errors are shared as far as that
            together = rng.choice([device[::2], device[1::2], host])
            views = [array[view] for array in together for view in VIEWS]
            group = engine.ArrayGroup(rng.sample(views, rng.randrange(4)))
            groups.append((group, together is not host and len(group.arrays) > 0))
        pool += groups * 3
        picked = [(viewed(item), there) for item, there in rng.sample(pool, rng.randrange(0, 5))]
        cut = rng.randrange(len(picked) + 1)
        reads, writes = [item for item, _ in picked[:cut]], [item for item, _ in picked[cut:]]
        modify = rng.random() < 0.4
        if modify:
            reads += writes
        on_device = any(there for _, there in picked)
        luck = rng.random()

        def work(number=number, reads=reads, writes=writes, modify=modify, fails=luck < 0.05):
            if fails:
                raise Boom(number)
            mix(number, data(reads), data(writes), modify)

        def op(work=work, on_device=on_device, number=number, fails=0.05 < luck < 0.1):
            if fails:
                raise Boom(number)
            machine.enqueue(work) if on_device else work()
            return number

        options = {"priority": rng.randrange(3), "inline": rng.random() < 0.3, "name": f"op {number}"}
        options["lane"] = rng.choice([None, None, "other"])
        if rng.random() < 0.15:

            def start(completion, op=op):
                def complete():
                    with completion.on():
                        try:
                            completion.set_result(op())
                        except Boom as error:
                            completion.set_exception(error)

                if isinstance(runtime, engine.ThreadedEngine):
                    completers.append(threading.Thread(target=complete))
                    completers[-1].start()
                else:
                    complete()

            handles.append(runtime.push_async(start, reads, writes, **options))
        else:
            handles.append(runtime.push(op, reads, writes, **options))
        if rng.random() < 0.1:
            chosen = rng.choice(handles)
            outcome.append(chosen.exception(rng.choice([None, LIMIT_S])) is not None)
        if rng.random() < 0.1:
            outcome.append(waited(runtime, rng.choice((*device, *host))))
    if rng.random() < 0.5:
        bulk.close()
    outcome += [handle.exception(LIMIT_S) is not None or handle.result() for handle in handles]
    for thread in completers:
        thread.join(LIMIT_S)
    outcome += [waited(runtime, item) for item in (*device, *host)]
    outcome += [waited(runtime, variable, cell) for variable, cell in cell_of.items()]
    bulk.close()
    runtime.wait_all(LIMIT_S)
    for memory in (device[::2], device[1::2], host):  # or the errors would pile up
        runtime.push(lambda: None, writes=[engine.ArrayGroup(memory)]).result()
    assert not runtime.uses_arrays()
    runtime.validate()
    return outcome


def viewed(item):
    """Of an array and a slice the view: few are chosen, and to make all of them first takes long."""
    return item[0][item[1]] if isinstance(item, tuple) else item


def waited(runtime, item, cell=None):
    try:
        runtime.wait(item)
    except Boom:
        return "error"
    return values(item if cell is None else cell).tolist()


def with_streams(runtime, machine, seed):
    """The caller works on the arrays, too, on streams of his own, before and after he has pushed ops on them."""
    rng = random.Random(seed)
    arrays = [machine.array(np.arange(8, dtype=np.int64) + 100 * n, n % 2) for n in range(4)]
    outcome, bulk = [], contextlib.ExitStack()
    late, completers = [], []  # what may not have been issued when its push returned

    def follow():
        for handle in late:
            handle.follow(rng.choice([None, LIMIT_S]))
        late.clear()

    with machine.callers(rng):
        for number in range(rng.randrange(2, 20)):
            views = [((array, view), n % 2) for n, array in enumerate(arrays) for view in VIEWS]
            luck = rng.random()
            if luck < 0.2:
                bulk.enter_context(runtime.bulk())
            elif luck < 0.4:
                bulk.close()
                follow()
                device = rng.randrange(2)
                chosen = rng.sample([view for view, where in views if where == device], rng.randrange(1, 4))
                picked = [viewed(one) for one in chosen]
                machine.enqueue(lambda n=number, p=picked: mix(n, p[1:], p[:1], False), device)
            elif luck < 0.45:
                item = rng.choice(arrays)
                runtime.push(lambda: None, reads=[item]).result()  # waits for the caller's work, too
                outcome.append(values(item).tolist())
            else:
                in_pieces = rng.random() < 0.15
                picked = [viewed(view) for view, _ in rng.sample(views, rng.randrange(1, 5))]
                cut, modify = rng.randrange(len(picked)), rng.random() < 0.5
                if rng.random() < 0.3:  # a group, as a rule over both devices
                    picked = [*picked[:cut], engine.ArrayGroup(picked[cut:])]
                reads, writes = picked[:cut], picked[cut:]
                reads += writes if modify else []

                def op(number=number, reads=reads, writes=writes, modify=modify):
                    machine.enqueue(lambda: mix(number, reads, writes, modify))

                def start(completion, op=op):
                    def complete():
                        with completion.on():
                            op()
                        completion.set_result(None)

                    completers.append(threading.Thread(target=complete))
                    completers[-1].start()

                push = runtime.push_async if in_pieces else runtime.push
                handle = push(start if in_pieces else op, reads, writes, lane=rng.choice([None, None, "other"]))
                if in_pieces or late:
                    late.append(handle)
        bulk.close()
        follow()
    for thread in completers:
        thread.join(LIMIT_S)
    runtime.wait_all(LIMIT_S)
    machine.drain()
    runtime.validate()
    return outcome + [values(array).tolist() for array in arrays]
