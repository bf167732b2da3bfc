"""List calls of small keys with real sockets: whatever is moved together, the outcome is that of one by one."""

from __future__ import annotations

import random
import threading

import ml_dtypes
import numpy as np
import pytest

import kvstore
from kvstore import errors, optim
from kvstore.cluster import bundles
from kvstore.cluster.bundles import Bundles
from kvstore.lists import Lists
from tests.clusters import DEADLINE_S, at_once, cluster

MODELS = ["sequential", "bounded(0)", "bounded(2)", "eventual"]
F32 = np.float32


def in_bundles(kv, keys=None) -> int:
    """How many keys of the store are moved together with others."""
    return sum(kv._entries[key].bundle is not None for key in (kv._entries if keys is None else keys))


def names(count: int) -> list[str]:
    return [f"k{n}" for n in range(count)]


def zeros(keys, dtype=F32):
    return [np.zeros(3, dtype) for _ in keys]


def ones(keys, factor=1.0):
    return [np.full(3, factor, F32) for _ in keys]


@pytest.fixture
def one_by_one(monkeypatch):
    """Call it, and from then on no store makes bundles."""

    def off() -> None:
        monkeypatch.setattr(Lists, "for_push", lambda self, keys, entries, timeout_s: None)

    return off


@pytest.fixture
def binds(monkeypatch) -> list[tuple[object, ...]]:
    """The keys of every Bind that is sent."""
    sent = []
    bind = Bundles._bind

    def spy(self, keys, first):
        sent.append(keys)
        return bind(self, keys, first)

    monkeypatch.setattr(Bundles, "_bind", spy)
    return sent


# --- values -----------------------------------------------------------------------------------------


def test_every_dtype_and_shape_comes_back_exact():
    rng = np.random.default_rng(0)
    base = rng.standard_normal((6, 8)) * 50
    shapes = {
        "0-d": np.asarray(base[0, 0]),
        "one": base[0, :1],
        "empty": base[:0],
        "strided": base[::2, 1::3],
        "fortran": np.asfortranarray(base),
        "backwards": base[0, ::-1],
        "broadcast": np.broadcast_to(base[0], (2, 8)),
    }
    dtypes = ["float32", "float64", "float16", ml_dtypes.bfloat16, "int8", "uint16", "int64"]
    values = {f"{name} {np.dtype(d).name}": np.asarray(v, d) for d in dtypes for name, v in shapes.items()}
    for name in shapes:  # astype keeps no strides, so make sure of some
        values[f"{name} float64"] = shapes[name]

    def work(kv):
        keys = list(values)
        kv.init(keys, [np.zeros_like(v) for v in values.values()])
        nothing = [np.zeros_like(v) for v in values.values()]
        got = []
        for round in range(4):
            kv.push(keys, list(values.values()) if kv.rank == round % 2 else nothing).result()
            got.append(kv.pull(keys[::-1] if round == 1 else keys).result())
        got.append([kv.pull(key).result() for key in keys])
        outs = [np.zeros(v.shape, v.dtype, order="F") for v in values.values()]
        kv.pull(keys, outs).result()
        got.append(outs)
        return got, in_bundles(kv)

    with cluster(workers=2, servers=2) as c:
        for got, count in c.run(work):
            got[1].reverse()
            assert count > len(values) / 2
            for one in got:
                for (name, value), array in zip(values.items(), one, strict=True):
                    assert array.dtype == value.dtype, name
                    assert array.shape == value.shape, name
                    np.testing.assert_array_equal(array, value, err_msg=name)


def test_large_keys_travel_beside_the_bundle():
    def work(kv):
        keys = ["a", "large", "b", "cut", "c"]
        sizes = [3, 20_000, 5, 1_500_000, 7]
        kv.init(keys, [np.zeros(n, F32) for n in sizes])
        for n in range(1, 4):
            values = [np.full(size, n * 10.0**kv.rank, F32) for size in sizes]
            got = kv.pushpull(keys, values).result()
            assert all(out is value for out, value in zip(got, values, strict=True))
            for value in got:
                assert value.min() == value.max() == 11 * n
        return in_bundles(kv)

    with cluster(workers=2) as c:
        assert c.run(work) == [3, 3]


def test_two_devices_and_results_in_place():
    def work(kv):
        keys = names(5)
        kv.init(keys, zeros(keys))
        for n in range(1, 4):
            values = [[np.full(3, n * (kv.rank + 1), F32), np.full(3, 10 * n, F32)] for _ in keys]
            handle = kv.pushpull(keys, values)
            assert handle.result() == values  # the same lists
            assert handle.version == n
            assert handle.staleness == (0, 0)
            assert all((array == 23 * n).all() for pair in values for array in pair)
        assert kv.pull(keys).result()[4].tolist() == [69] * 3
        return in_bundles(kv)

    with cluster(workers=2) as c:
        assert c.run(work, devices=2) == [5, 5]


def test_a_push_that_ends_a_bundle_has_been_read_when_it_returns():
    """While a round of the bundle waits for another worker, so that it cannot be sent yet."""
    keys = names(4)
    gone_on = threading.Event()

    def work(kv):
        kv.init(keys, zeros(keys))
        kv.pushpull(keys, ones(keys)).result()
        assert in_bundles(kv) == len(keys)
        if kv.rank == 1:
            assert gone_on.wait(DEADLINE_S)
        together = kv.pushpull(keys, ones(keys))
        alone = np.full(3, 7, F32)
        kv.push(keys[0], alone)
        alone[...] = 0
        gone_on.set()
        together.result()
        return kv.pull(keys[0]).result().tolist()

    with cluster(2) as c:
        assert c.run(work) == [[14.0] * 3] * 2


# --- the same as one by one -------------------------------------------------------------------------


def sequential_program(kv, seed: int, waits: bool) -> list[bytes]:
    """Rounds in which every worker pushes every key once, each in its own way; all that it reads."""
    common, own = random.Random(seed), random.Random(f"{seed} {kv.rank}")
    numbers = np.random.default_rng([seed, kv.rank])
    keys = names(7)
    shapes = {key: common.choice([(), (1,), (4,), (2, 3)]) for key in keys}
    dtype = common.choice([F32, np.float16, ml_dtypes.bfloat16, np.float64])
    kv.init(keys, [np.full(shapes[key], 0.5, dtype) for key in keys])
    devices = kv.num_devices
    read: list[tuple[kvstore.Handle, object]] = []

    def gradient(key):
        arrays = [numbers.standard_normal(shapes[key]).astype(dtype) for _ in range(devices)]
        return arrays if devices > 1 else np.asarray(arrays[0])

    at = dict.fromkeys(keys, 0)
    for round in range(12):
        if round == common.randrange(12):
            kv.set_optimizer(common.choice([optim.Adam(lr=0.1), optim.SGD(lr=0.5, momentum=0.9)]), replace=True)
        left = list(keys)
        if own.random() < 0.5:
            own.shuffle(left)
        while left:
            size = own.choice([1, 2, len(left), len(left)])
            some, left = left[:size], left[size:]
            what = own.choice(["push", "pushpull", "pushpull"])
            # By key a generator of its own: what is pushed must not depend on the order of a worker's calls.
            values = []
            for key in some:
                numbers = np.random.default_rng([seed, kv.rank, keys.index(key), at[key]])
                at[key] += 1
                values.append(gradient(key))
            single = len(some) == 1 and own.random() < 0.7
            call = kv.push if what == "push" else kv.pushpull
            handle = call(some[0], values[0]) if single else call(some, values)
            if what == "pushpull":
                read.append(((round, tuple(some)), handle))
            while own.random() < 0.3:
                some = own.sample(keys[: own.choice([2, 7])], own.choice([1, 2]))
                rounds = tuple(at[key] for key in some)
                read.append((("pull", tuple(some), rounds), kv.pull(some)))
        if waits:
            kv.wait_for_commits()
    kv.barrier()
    seen = {}
    for where, handle in read:
        result = handle.result()
        listed = result if isinstance(result, list) else [result]
        flat = [array for some in listed for array in (some if isinstance(some, list) else [some])]
        seen.setdefault(where, []).append([np.asarray(a).tobytes() for a in flat])
        assert handle.staleness in ((0, 0), None)
    seen["end"] = [value.tobytes() for value in kv.pull(keys).result()]
    seen["states"] = {key: [a.tobytes() for a in kv._home.read_state(key, 60)[1].values()] for key in keys}
    return seen


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("waits", [False, True])
def test_sequential_programs_have_the_same_bits(one_by_one, devices, waits):
    def run(seed):
        with cluster(workers=2 + seed % 2, servers=1 + seed % 3) as c:
            return c.run(lambda kv: sequential_program(kv, seed, waits), devices=devices)

    seeds = range(6)
    together = [run(seed) for seed in seeds]
    one_by_one()
    assert together == [run(seed) for seed in seeds]


@pytest.mark.parametrize("model", MODELS[1:])
@pytest.mark.parametrize("waits", [False, True])
def test_at_once_programs_lose_nothing(model, waits):
    """Sums only grow, contain the own pushes, keep the bound, and are complete in the end."""
    rounds, keys = 40, names(6)

    def work(kv):
        own = random.Random(f"{model} {waits} {kv.rank}")
        kv.init(keys, zeros(keys))
        kv.set_optimizer(optim.Accumulate())
        pushed = dict.fromkeys(keys, 0)
        read = []
        while left := [key for key in keys if pushed[key] < rounds]:
            some = own.choice([keys, keys, keys[::-1], own.sample(keys, 3), [own.choice(keys)]])
            if any(key not in left for key in some):
                some = [left[0]]
            what = own.choice(["push", "pull", "pushpull"])
            if what != "pull":
                for key in some:
                    pushed[key] += 1
            at = [pushed[key] for key in some]
            if what == "push":
                kv.push(some, ones(some))
            else:
                handle = kv.pull(some) if what == "pull" else kv.pushpull(some, ones(some))
                read.append((some, at, handle))
                if waits and own.random() < 0.2 and model == "eventual":
                    handle.result()
        kv.barrier()
        last = dict.fromkeys(keys, 0.0)
        for some, at, handle in read:
            for key, n, value in zip(some, at, handle.result(), strict=True):
                assert value.min() == value.max()
                assert value[0] >= n
                assert value[0] >= last[key]
                last[key] = value[0]
            assert handle.version <= min(last[key] for key in some)
            if model != "eventual":
                assert handle.staleness[1] <= int(model[8])
        return [value.tolist() for value in kv.pull(keys).result()]

    with cluster(workers=3, servers=2) as c:
        for result in c.run(work, cluster_consistency=model):
            assert result == [[3.0 * rounds] * 3] * len(keys)


@pytest.mark.parametrize("model", MODELS)
def test_threads_push_single_keys_while_another_pushes_the_list(model):
    rounds, keys = 30, names(8)

    def work(kv):
        kv.init(keys, zeros(keys))
        kv.set_optimizer(optim.Accumulate())

        def lists():
            for n in range(rounds):
                handle = kv.push(keys, ones(keys))
                if n % 3 == 0:
                    handle.result()

        def singles(key):
            for _ in range(rounds):
                kv.push(key, np.ones(3, F32))
            kv.pull(key).result()

        def pulls():
            for _ in range(rounds):
                kv.pull(keys).result()

        at_once(lists, lists, pulls, *(lambda key=key: singles(key) for key in keys[:3]))
        kv.barrier()
        return [value[0] for value in kv.pull(keys).result()]

    for _ in range(3):
        with cluster(workers=2) as c:
            for result in c.run(work, cluster_consistency=model):
                assert result == [2 * 3 * rounds] * 3 + [2 * 2 * rounds] * 5


@pytest.mark.parametrize("what", ["push", "pushpull"])
@pytest.mark.parametrize("model", MODELS)
def test_no_key_waits_for_another(model, what):
    """Worker 1 waits for two rounds of one key before it pushes the other; worker 0 has made all its calls."""
    keys = names(2)

    def work(kv):
        def move(key, value):
            return kv.push(key, value) if what == "push" else kv.pushpull(key, value)

        kv.init(keys, zeros(keys))
        kv.set_optimizer(optim.Accumulate())
        for _ in range(2):
            move(keys, ones(keys)).result()
        kv.barrier()
        if kv.rank == 0:
            handles = [move(keys, ones(keys)) for _ in range(3)]
            handles.append(move("k1", np.ones(3, F32)))
            handles.append(kv.pull(keys))
        else:
            handles = []
            for key, rounds in (("k0", 3), ("k1", 4)):
                for _ in range(rounds):
                    handles = [move(key, np.ones(3, F32)), kv.pull(key)]
                    for handle in handles:
                        handle.result()
        for handle in handles:
            handle.result()
        kv.barrier()
        return [value[0] for value in kv.pull(keys).result()]

    with cluster() as c:
        assert c.run(work, cluster_consistency=model) == [[10, 12]] * 2


def test_a_key_leaves_while_the_bundle_waits_for_another():
    """Worker 0 pushes a key by itself; worker 1 waits for that before it pushes the rest of the bundle."""
    keys = names(3)

    def work(kv):
        kv.init(keys, zeros(keys))
        kv.push(keys, ones(keys)).result()
        kv.barrier()
        if kv.rank == 0:
            kv.push(keys, ones(keys))
            kv.push("k0", np.ones(3, F32))
            return kv.pull(keys).result()[0][0]
        kv.push("k0", np.full(3, 2, F32))
        kv.push("k0", np.full(3, 3, F32)).result()
        got = kv.pull("k0").result()[0]
        kv.push(keys[1:], ones(keys[1:])).result()
        return got

    with cluster() as c:
        assert c.run(work) == [4, 4]


# --- which keys are together ------------------------------------------------------------------------


def test_a_list_and_a_part_of_it_come_to_terms(binds):
    def work(kv):
        keys = names(6)
        kv.init(keys, zeros(keys))
        for _ in range(8):
            kv.push(keys, ones(keys)).result()
            kv.push(keys[:3], ones(keys[:3])).result()
        return in_bundles(kv)

    with cluster(workers=1) as c:
        assert c.run(work) == [6]
    assert binds == [tuple(names(6)), tuple(names(3)), tuple(names(6)[3:])]


def test_one_restless_key_leaves_the_others_together(binds):
    def work(kv):
        keys = names(6)
        kv.init(keys, zeros(keys))
        for _ in range(12):
            kv.push(keys, ones(keys)).result()
            kv.push("k2", np.ones(3, F32)).result()
        return in_bundles(kv), kv.pull("k2").result()[0]

    with cluster(workers=1) as c:
        assert c.run(work) == [(5, 1.0)]
    assert len(binds) == 2  # the same bundle again is known, and then one without that key


def test_a_list_that_was_busy_at_first_is_bundled_later():
    def work(kv):
        keys = names(6)
        kv.init(keys, zeros(keys))
        for _ in range(50):
            kv.push("k0", np.ones(3, F32))
            kv.push(keys, ones(keys))
        kv.wait_for_commits()
        for _ in range(80):
            kv.push(keys, ones(keys)).result()
        return in_bundles(kv)

    with cluster(workers=1) as c:
        assert c.run(work)[0] >= 5  # who comes too late for a bundle stays alone


def test_a_bundle_that_ends_now_and_then_is_made_again(tmp_path):
    """Every now and then the states are loaded, by which the server splits the bundle."""

    def work(kv):
        keys = names(6)
        kv.init(keys, zeros(keys))
        kv.set_optimizer(optim.SGD(lr=1.0, momentum=0.5))
        together = []
        for n in range(60):
            kv.push(keys, ones(keys)).result()
            together.append(in_bundles(kv))
            if n % 4 == 0:
                kv.save_optimizer_states(tmp_path / "states")
                kv.load_optimizer_states(tmp_path / "states")
        return together

    with cluster(workers=1) as c:
        assert c.run(work) == [[6] * 60]
        assert all(bundle.united for bundle in c.servers[0].shards[0].serving.binding.bundles.values())


def test_lists_of_strange_keys():
    def work(kv):
        keys = [1, 2, 3]
        kv.init(keys, zeros(keys))
        kv.push(keys, ones(keys)).result()
        for strange in ([True, 2, 3], [1.0, 2, 3], [1, "2", 3], [1, [2], 3], [1, None, 3]):
            with pytest.raises(errors.KeyKindError):
                kv.push(strange, ones(keys))
            with pytest.raises(errors.KeyKindError):
                kv.pull(strange)
        with pytest.raises(errors.UnknownKeyError):
            kv.push([1, 2, 4], ones(keys))
        got = kv.pushpull(list(np.arange(1, 4)), ones(keys, 5)).result()
        assert in_bundles(kv) == 3
        kv.push((1, 2, 1), ones(keys, 2)).result()
        return [value[0] for value in (*got, *kv.pull(keys).result())]

    with cluster(workers=1) as c:
        assert c.run(work) == [[5, 5, 5, 4, 2, 5]]


def test_keys_of_different_kinds_are_in_different_bundles():
    def work(kv):
        keys = names(12)
        kv.init(keys[:3], zeros(keys[:3]))
        kv.init(keys[3:6], zeros(keys[3:6]), cluster_consistency="eventual")
        kv.init(keys[6:9], zeros(keys[6:9], np.float64))
        kv.init(keys[9:], zeros(keys[9:]), participants=[0])
        mine = keys if kv.rank == 0 else keys[:9]
        values = [np.ones(3, np.float64 if key in keys[6:9] else F32) for key in mine]
        for _ in range(2):
            kv.push(mine, values).result()
        kv.barrier()
        count = len({id(kv._entries[key].bundle) for key in mine})
        return count, [value[0] for value in kv.pull(keys).result()]

    with cluster(workers=2) as c:
        for count, got in c.run(work):
            assert got == [2] * 3 + [1] * 3 + [2] * 3 + [1] * 3
            assert count in (3, 4)


def test_a_server_that_refuses_is_asked_no_more(monkeypatch, binds):
    monkeypatch.setattr("kvstore.protocol.binding.BUNDLES_MAX", 1)

    def work(kv):
        keys = names(6)
        kv.init(keys, zeros(keys))
        for _ in range(300):
            kv.push(keys[:3], ones(keys[:3])).result()
            kv.push(keys[3:], ones(keys[3:], 2)).result()
        return in_bundles(kv), [value[0] for value in kv.pull(keys).result()]

    with cluster(workers=1) as c:
        assert c.run(work) == [(3, [1, 1, 1, 2, 2, 2])]
    assert len(binds) < 20


# --- wrong calls and failures -----------------------------------------------------------------------


def test_a_wrong_list_call_sends_nothing():
    def work(kv):
        keys = names(4)
        kv.init(keys, zeros(keys))
        for _ in range(2):  # before and after there are bundles
            for wrong, error in (
                (np.ones(4, F32), errors.ShapeError),
                (np.ones(3), errors.DtypeError),
                ([np.ones(3, F32)] * 2, errors.DeviceCountError),
                ("x", errors.KVStoreError),
            ):
                values = ones(keys)
                values[2] = wrong
                for call in (kv.push, kv.pushpull):
                    with pytest.raises(error):
                        call(keys, values)
                if not isinstance(wrong, list):  # before the first push it says how many devices there are
                    with pytest.raises(errors.KVStoreError):
                        kv.pull(keys, values)
            with pytest.raises(errors.ShapeError):
                kv.push(keys, ones(keys)[:3])
            frozen = np.zeros(3, F32)
            frozen.flags.writeable = False
            with pytest.raises(errors.ReadOnlyError):
                kv.pull(keys, [*ones(keys)[:3], frozen])
            with pytest.raises(errors.ReadOnlyError):
                kv.pushpull(keys, ones(keys), [*ones(keys)[:3], frozen])
            assert kv.pull("k0").version in (None, 0, 1)
            kv.push(keys, ones(keys)).result()
            assert [kv.pull(key).result()[0] for key in keys] == [1] * 4
        handle = kv.pull(keys)
        handle.result()
        return handle.version, in_bundles(kv)

    with cluster(workers=1) as c:
        assert c.run(work) == [(2, 4)]


def test_a_wrong_first_call_says_nothing_of_devices():
    def work(kv):
        keys = names(3)
        kv.init(keys, zeros(keys))
        with pytest.raises(errors.ShapeError):
            kv.push(keys, [[np.ones(3, F32)] * 2, [np.ones(4, F32)] * 2, [np.ones(3, F32)] * 2])
        for _ in range(2):
            kv.push(keys, ones(keys)).result()
        return kv.num_devices, in_bundles(kv)

    with cluster(workers=1) as c:
        assert c.run(work) == [(1, 3)]


def test_an_error_nobody_looked_at():
    def work(kv):
        keys = names(3)
        kv.init(keys, zeros(keys), participants=[0])
        if kv.rank == 1:
            for _ in range(2):
                push = kv.push(keys, ones(keys))
                push.wait()
                with pytest.raises(errors.DisagreementError, match="worker 1: expected a participant"):
                    kv.pull(keys)
                kv.pull(keys).result()  # once
                kv.push(keys, ones(keys)).exception()
                kv.pull("k1").result()
            kv.push(keys, ones(keys))
            with pytest.raises(errors.DisagreementError):
                kv.barrier()
        kv.barrier()

    with cluster() as c:
        c.run(work)


def test_a_worker_that_is_lost_ends_the_waits_for_it():
    def work(kv):
        keys = names(4)
        kv.init(keys, zeros(keys))
        for _ in range(2):
            kv.pushpull(keys, ones(keys)).result()
        if kv.rank == 1:
            kv.push("k1", np.ones(3, F32))
            raise RuntimeError("out of coffee")
        assert in_bundles(kv) == 4
        with pytest.raises(errors.WorkerLostError, match="out of coffee"):
            kv.pushpull(keys, ones(keys)).result()
        with pytest.raises(errors.WorkerLostError):
            kv.push(keys, ones(keys)).result()
        return "waited for nobody"

    with cluster() as c, pytest.raises(RuntimeError, match="out of coffee"):
        c.run(work)


def test_why_a_bundle_waits():
    released = threading.Event()

    def work(kv):
        keys = names(4)
        kv.init(keys, zeros(keys))
        kv.pushpull(keys, ones(keys)).result()
        if kv.rank == 1:
            assert released.wait(DEADLINE_S)
            return kv.pushpull(keys, ones(keys)).result()[0].tolist()
        handle = kv.pushpull(keys, ones(keys))
        with pytest.raises(errors.DeadlineError, match=r"pushpull of 4 keys.*'k\d' \.\.\. 'k\d'.*waits for workers 1"):
            handle.result(0.2)
        with pytest.raises(errors.DeadlineError, match="waits for workers 1"):
            kv.pull("k0").result(0.2)
        released.set()
        return handle.result()[0].tolist()

    with cluster() as c:
        assert c.run(work) == [[2, 2, 2]] * 2


def test_a_list_push_from_a_callback_waits_for_nothing():
    done = threading.Event()
    outcome = []

    def work(kv):
        keys = names(4)
        kv.init(keys, zeros(keys))

        def then(_):
            outcome.append(kv.push(keys, ones(keys)))
            done.set()

        kv.push("k0", np.ones(3, F32)).add_done_callback(then)
        assert done.wait(DEADLINE_S / 2)
        outcome[0].result()
        kv.push(keys, ones(keys)).result()
        return in_bundles(kv)

    with cluster(workers=1) as c:
        assert c.run(work) == [3]  # the others have as many rounds


# --- memory of the store's own ----------------------------------------------------------------------


def test_view_and_staging_of_a_key_in_a_bundle():
    def work(kv):
        keys = names(4)
        kv.init(keys, zeros(keys))
        kv.push(keys, ones(keys)).result()
        assert kv.view("k1").tolist() == [1] * 3
        assert in_bundles(kv) == 4
        kv.push(keys, ones(keys, 2)).result()
        assert kv.view("k1").tolist() == [1] * 3  # the last value pulled
        kv.pull(keys).result()
        assert kv.view("k1").tolist() == [2] * 3
        kv.pushpull(keys, ones(keys, 3)).result()
        assert kv.view("k1").tolist() == [3] * 3
        staged = kv.staging("k1")
        assert in_bundles(kv) == 0
        staged[:] = 4
        values = ones(keys, 4)
        values[1] = staged
        got = kv.pushpull(keys, values).result()
        assert got[1] is not staged
        assert [value[0] for value in got] == [4] * 4
        kv.pushpull(keys, ones(keys, 5)).result()
        assert in_bundles(kv) == 3
        in_place = kv.pull(keys, [kvstore.IN_PLACE] * 4).result()
        return [value.tolist() for value in in_place]

    with cluster(workers=1) as c:
        assert c.run(work) == [[[5] * 3] * 4]


def test_a_large_bundle_is_read_in_place_and_split_again():
    """It lies in memory that worker and server share, before and after its keys have been by themselves."""
    keys = names(40)

    def work(kv):
        kv.init(keys, [np.zeros(1000, F32) for _ in keys])
        total = 0
        for n in range(1, 13):
            if n % 4 == 0:
                kv.pushpull("k7", np.full(1000, n, F32)).result()
                kv.push([key for key in keys if key != "k7"], [np.full(1000, n, F32) for _ in keys[1:]])
            else:
                kv.pushpull(keys, [np.full(1000, n, F32) for _ in keys]).result()
            total = 2 * n
            got = kv.pull(keys).result()
            assert all(value.min() == value.max() == total for value in got), n
        return in_bundles(kv)

    with cluster(workers=2) as c:
        assert c.run(work) == [39, 39]


# --- optimizer --------------------------------------------------------------------------------------


def training(kv, tmp_path=None) -> dict[str, object]:
    """Lists and single keys, optimizers and numbers that change in between."""
    keys, numbers = names(5), np.random.default_rng(kv.rank)
    seen, bundled = [], []

    def gradients():
        return [numbers.standard_normal((2, 3)).astype(F32) for _ in keys]

    kv.init(keys, [np.ones((2, 3), F32) for _ in keys])
    for n in range(16):
        if n == 2:
            kv.set_optimizer(optim.Adam(lr=0.1))
        if n == 5:
            kv.set_hyperparameters(lr=0.2)
        if n == 7:
            kv.set_optimizer(optim.LARS(lr=0.1), replace=True)
        if n == 10:
            kv.set_optimizer(optim.AdamW(lr=0.1), replace=True)
        if n == 12:
            kv.barrier()
            path = tmp_path / f"states of {kv.rank}"
            kv.save_optimizer_states(path)
            kv.barrier()
            kv.pushpull(keys, gradients()).result()
            kv.barrier()
            if kv.rank == 0:
                kv.load_optimizer_states(path)
            kv.barrier()
        if n == 14:
            kv.set_hyperparameters(clip_norm=0.5)
        bundled.append(in_bundles(kv))
        if n % 4 == 3:
            for key, gradient in zip(keys, gradients(), strict=True):
                kv.push(key, gradient)
            seen.append(kv.pull(keys).result())
        else:
            seen.append(kv.pushpull(keys, gradients()).result())
    kv.barrier()
    states = {key: kv._home.read_state(key, 60) for key in keys}
    return {
        "seen": [[value.tobytes() for value in one] for one in seen],
        "states": {key: (step, [a.tobytes() for a in state.values()]) for key, (step, state) in states.items()},
        "bundled": bundled,
    }


def test_optimizers_and_their_states_are_as_one_by_one(one_by_one, tmp_path):
    results = []
    for off in (False, True):
        if off:
            one_by_one()
        with cluster(workers=2, servers=1) as c:
            results.append(c.run(lambda kv: training(kv, tmp_path)))
    together, alone = results
    assert all(one.pop("bundled").count(5) > 8 for one in together)
    assert not any(any(one.pop("bundled")) for one in alone)
    assert together == alone


def test_the_state_of_one_key_is_replaced(tmp_path):
    def work(kv):
        keys = names(3)
        kv.init(keys, zeros(keys))
        kv.set_optimizer(optim.SGD(lr=1.0, momentum=0.5))
        kv.push(keys, ones(keys)).result()
        kv.save_optimizer_states(tmp_path / "one")
        for _ in range(3):
            kv.push(keys, ones(keys)).result()
        step, state = kv._home.read_state("k1", 60)
        assert step == 4
        kv._home.write_state("k1", 1, {name: np.zeros_like(array) for name, array in state.items()}, 60)
        kv.push(keys, ones(keys)).result()
        steps = [kv._home.read_state(key, 60)[0] for key in keys]
        kv.load_optimizer_states(tmp_path / "one")
        kv.push(keys, ones(keys)).result()
        kv.push(keys, ones(keys)).result()
        return steps, [kv._home.read_state(key, 60)[0] for key in keys], [v[0] for v in kv.pull(keys).result()]

    with cluster(workers=1) as c:
        ((before, after, values),) = c.run(work)
        assert c.servers[0].shards[0].serving.binding.bundles
        assert all(bundle.united for bundle in c.servers[0].shards[0].serving.binding.bundles.values())
    assert before == [5, 2, 5]
    assert after == [3, 3, 3]
    momenta = [1.0, 1.5, 1.75, 1.875, 1.9375]
    restored = [1.5, 1.75]
    assert values == [
        -sum(momenta + restored),
        -sum([*momenta[:4], 1.0, *restored]),
        -sum(momenta + restored),
    ]


def test_the_server_counts_a_bundle_as_one_piece():
    def work(kv):
        keys = names(50)
        kv.init(keys, zeros(keys))
        for _ in range(3):
            kv.pushpull(keys, ones(keys)).result()
        kv.barrier()

    with cluster(workers=2) as c:
        c.run(work)
        shard = c.servers[0].shards[0]
        assert len(shard._work.stored) == 1
        assert [len(bundle.members) for bundle in shard.serving.binding.bundles.values()] == [50]
        assert shard.report() == {"keys": 50, "bytes": 600}


def test_groups_of_keys_fit_into_a_piece(monkeypatch, binds):
    monkeypatch.setattr(bundles, "SMALL_PIECE_BYTES", 40)

    def work(kv):
        keys = names(10)  # 12 bytes each
        kv.init(keys, zeros(keys))
        return [value[0] for _ in range(2) for value in kv.pushpull(keys, ones(keys)).result()]

    with cluster(workers=1) as c:
        assert c.run(work) == [[1] * 20]
    assert [len(keys) for keys in binds] == [3, 3, 3]
