"""List calls of a local store: small keys are moved together, and nobody can tell."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import kvstore
from kvstore import errors, optim


def in_bundles(kv, keys) -> int:
    return sum(kv._entries[key].bundle is not None for key in keys)


def keys_of(kv, count=6, size=5):
    keys = [f"k{number}" for number in range(count)]
    kv.init(keys, [np.full((size, number + 1), number, np.float32) for number in range(count)])
    return keys


def gradients(rng, count=6, size=5, devices=1):
    def one(number):
        return rng.integers(-8, 8, (size, number + 1)).astype(np.float32)

    return [[one(n) for _ in range(devices)] if devices > 1 else one(n) for n in range(count)]


class OneByOne:
    """The same store, told one key at a time."""

    def __init__(self, kv):
        self.kv = kv

    def __getattr__(self, name):
        def call(keys, *lists):
            if not isinstance(keys, list):
                return getattr(self.kv, name)(keys, *lists)
            return [getattr(self.kv, name)(key, *row) for key, *row in zip(keys, *lists, strict=True)]

        return call


OPTIMIZERS = [None, optim.SGD(lr=0.5, momentum=0.9), optim.Adam(lr=0.1), optim.LAMB(lr=0.1)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
@pytest.mark.parametrize("devices", [1, 3])
def test_random_programs_end_as_one_by_one(request, create, optimizer, devices):
    """Lists, parts of lists and single keys, pushed and pulled in any order; every case has a program of its own."""
    rng = np.random.default_rng(list(request.node.name.encode()))
    with create(devices=devices) as kv, kvstore.create("local", devices=devices) as plain:
        keys = keys_of(kv)
        keys_of(plain)
        one_by_one, together = OneByOne(plain), 0
        if optimizer is not None:
            kv.set_optimizer(optimizer)
            plain.set_optimizer(optimizer)
        for _ in range(40):
            values = gradients(rng, devices=devices)
            match rng.integers(8):
                case 0 | 1 | 2:
                    kv.push(keys, values)
                    one_by_one.push(keys, values)
                case 3 | 4:
                    mine, theirs = ([np.empty((5, n + 1), np.float32) for n in range(6)] for _ in range(2))
                    handle, others = kv.pushpull(keys, values, mine), one_by_one.pushpull(keys, values, theirs)
                    for got, other in zip(handle.result(), others, strict=True):
                        np.testing.assert_array_equal(got, other.result())
                    assert handle.version == min(other.version for other in others)
                case 5:
                    kv.push(keys[1], values[1])
                    plain.push(keys[1], values[1])
                case 6:
                    some = sorted(rng.choice(6, 3, replace=False))
                    kv.push([keys[n] for n in some], [values[n] for n in some])
                    one_by_one.push([keys[n] for n in some], [values[n] for n in some])
                case _:
                    got, expected = kv.pull(keys[2]), plain.pull(keys[2])
                    np.testing.assert_array_equal(got.result(), expected.result())
                    assert got.version == expected.version
            together += in_bundles(kv, keys)
            assert kv.rounds(keys[0]) == plain.rounds(keys[0])
        for key in keys:
            np.testing.assert_array_equal(kv.pull(key).result(), plain.pull(key).result())
        assert (together > 0) == (optimizer is None or not optimizer.whole_tensor)


def test_large_keys_and_keys_of_another_type_are_not_in_it(create):
    with create() as kv:
        keys = ["a", "b", "large", "half", "other half"]
        arrays = [np.ones(3, np.float32), np.ones(2, np.float32), np.ones(1 << 20, np.float32)]
        arrays += [np.ones(4, np.float16), np.ones(1, np.float16)]
        kv.init(keys, arrays)
        kv.push(keys, arrays)
        bundles = [kv._entries[key].bundle for key in keys]
        assert bundles[0] is bundles[1] is not None
        assert bundles[2] is None
        assert bundles[3] is bundles[4] not in (None, bundles[0])


def test_states_snapshots_and_checkpoints_see_each_key(create, tmp_path):
    rng = np.random.default_rng(0)
    with create() as kv:
        keys = keys_of(kv)
        kv.set_optimizer(optim.Adam(lr=0.1))
        for _ in range(3):
            kv.push(keys, gradients(rng))
        assert in_bundles(kv, keys) == 6
        values = kv.snapshot().result()
        kv.save_optimizer_states(tmp_path / "states")
        kv.save_checkpoint(tmp_path / "checkpoints").result()
        assert in_bundles(kv, keys) == 6  # to look is not to touch
        more = gradients(rng)
        kv.push(keys, more)
        expected = {key: kv.pull(key).result() for key in keys}
        kv.load_checkpoint(tmp_path / "checkpoints")
        for key in keys:
            pulled = kv.pull(key)
            np.testing.assert_array_equal(pulled.result(), values[key])
            assert pulled.version == 3
        kv.push(keys, more)
        for key in keys:
            pulled = kv.pull(key)
            np.testing.assert_array_equal(pulled.result(), expected[key])
            assert pulled.version == 4
        assert in_bundles(kv, keys) == 6  # again
        kv.load_optimizer_states(tmp_path / "states")
        kv.push(keys, more)
        pulled = kv.pull(keys)
        pulled.result()
        assert pulled.version == 5


def test_an_updater_sees_each_key_by_itself(create):
    seen = set()

    def updater(key, merged, stored):
        seen.add((key, merged.shape))
        stored += merged

    with create() as kv:
        keys = keys_of(kv)
        values = gradients(np.random.default_rng(1))
        kv.push(keys, values)
        assert in_bundles(kv, keys) == 6
        kv.set_updater(updater)
        kv.push(keys, values)
        pulled = kv.pull(keys).result()
        assert in_bundles(kv, keys) == 0
        assert seen == {(key, value.shape) for key, value in zip(keys, values, strict=True)}
        for mine, value in zip(pulled, values, strict=True):
            np.testing.assert_array_equal(mine, value + value)


def test_a_failed_key_does_not_spoil_others(create):
    with create() as kv:
        keys = keys_of(kv)

        def updater(key, merged, stored):
            if key == "k1":
                raise ValueError("no")
            stored += merged

        kv.set_updater(updater)
        with pytest.raises(errors.UpdateError):
            kv.push(keys, gradients(np.random.default_rng(1))).result()
        kv.set_optimizer(optim.SGD(lr=1.0), replace=True)
        values = gradients(np.random.default_rng(2))
        others = [key for key in keys if key != "k1"]
        before = kv.pull(others).result()
        kv.push(others, [value for key, value in zip(keys, values, strict=True) if key != "k1"]).result()
        after = kv.pull(others).result()
        assert any((one != other).any() for one, other in zip(before, after, strict=True))
        with pytest.raises(errors.KVStoreError):
            kv.push(keys, values).result()


def test_from_several_threads(create):
    """One moves the list, others one key each; every push counts once."""
    with create() as kv:
        keys = keys_of(kv)
        kv.set_updater(lambda key, merged, stored: np.add(stored, merged, out=stored))
        kv.set_optimizer(optim.SGD(lr=1.0), replace=True)
        ones = [np.ones((5, n + 1), np.float32) for n in range(6)]
        start = threading.Barrier(3)

        def lists():
            start.wait(30)
            for _ in range(50):
                kv.push(keys, ones)

        def single(number):
            start.wait(30)
            for _ in range(50):
                kv.push(keys[number], ones[number])
                kv.pull(keys[number]).result(30)

        threads = [threading.Thread(target=lists)] + [threading.Thread(target=single, args=(n,)) for n in (0, 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        for number, value in enumerate(kv.pull(keys).result(30)):
            pushes = 100 if number in (0, 3) else 50
            np.testing.assert_array_equal(value, np.full((5, number + 1), number - pushes, np.float32))
            assert kv.rounds(keys[number]) == pushes


def test_what_is_pushed_may_be_overwritten_at_once(create):
    with create() as kv:
        keys = keys_of(kv)
        kv.set_optimizer(optim.SGD(lr=1.0))
        values = [np.ones((5, n + 1), np.float32) for n in range(6)]
        before = kv.pull(keys).result()
        for _ in range(20):
            kv.push(keys, values)
            for value in values:
                value += 1
        total = sum(range(1, 21))
        for one, other in zip(before, kv.pull(keys).result(), strict=True):
            np.testing.assert_array_equal(other, one - total)
