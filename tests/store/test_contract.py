"""What every store does, whatever its type: one contract, run on a local store and on a cluster of one worker."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest

import engine
import kvstore
from kvstore import errors, optim
from tests.clusters import Cluster, at_once
from tests.store.conftest import GPUS
from tests.store.on_gpus import OnGpus

DTYPES = ["float16", "float32", "float64", "int8", "int32", "int64", "uint8", "bool", ml_dtypes.bfloat16]


PLACES = ["local", "cluster of 1 server", "cluster of 3 servers", "cluster of 2 servers through sockets", *GPUS]


@pytest.fixture(scope="module", params=PLACES)
def place(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make(place: str, simulated_cupy) -> Iterator[object]:
    """Makes a store; closes it and its cluster afterwards."""
    clusters: list[Cluster] = []
    stores: list[kvstore.KVStore] = []
    cupy = simulated_cupy(devices=GPUS[place], seed=5) if place in GPUS else None

    def create(**options: object) -> kvstore.KVStore:
        if place == "local":
            store = kvstore.create("local", timeout=30, **options)
        elif cupy is not None:
            store = OnGpus(kvstore.create(place.partition(",")[0], timeout=30, **options), cupy)
        else:
            clusters.append(Cluster(1, int(place.split()[2])))
            shared = "sockets" not in place
            address = clusters[-1].address
            store = kvstore.create("dist", address=address, timeout=30, shared_memory=shared, **options)
        stores.append(store)
        return store

    yield create
    for store in stores:
        store.close()
    for cluster in clusters:
        cluster.stop()


@pytest.fixture
def kv(make):  # type: ignore[no-untyped-def]
    return make()


def test_push_assigns_the_value_without_an_optimizer(kv):
    kv.init("w", np.zeros((2, 3), np.float32))
    gradient = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert kv.push("w", gradient).result() is None
    gradient[:] = -1  # the store has read it
    out = np.empty((2, 3), np.float32)
    assert kv.pull("w", out).result() is out
    np.testing.assert_array_equal(out, np.arange(6).reshape(2, 3))
    assert kv.pull("w").version == 1 or kv.pull("w").result() is not None


def test_init_value_is_pulled_and_not_aliased(kv):
    value = np.ones(4, np.float32)
    kv.init("w", value)
    value[:] = 7
    first = kv.pull("w").result()
    np.testing.assert_array_equal(first, 1)
    first[:] = 9
    np.testing.assert_array_equal(kv.pull("w").result(), 1)


def test_pushpull_in_place_and_into_out(kv):
    kv.init("w", np.zeros(5, np.float64))
    value = np.full(5, 2.0)
    assert kv.pushpull("w", value).result() is value
    out = np.empty(5)
    assert kv.pushpull("w", np.full(5, 3.0), out).result() is out
    np.testing.assert_array_equal(out, 3)


def test_pushpull_of_an_immutable_value_returns_a_new_array(kv):
    kv.init("w", np.zeros(2, np.float32))
    value = np.ones(2, np.float32)
    value.flags.writeable = False
    result = kv.pushpull("w", value).result()
    assert result is not value
    np.testing.assert_array_equal(result, 1)


def test_lists_of_keys_and_integer_keys(kv):
    keys = [3, -1, 2**40]
    kv.init(keys, [np.full(n + 1, n, np.float32) for n in range(3)])
    results = kv.pull(keys).result()
    assert [r.tolist() for r in results] == [[0], [1, 1], [2, 2, 2]]
    kv.push(keys, [np.full(n + 1, 10 + n, np.float32) for n in range(3)]).result()
    assert kv.pull(2**40).result().tolist() == [12, 12, 12]


def test_a_key_twice_in_one_push_is_one_push_of_the_sum(kv):
    kv.init("w", np.zeros(2, np.float32))
    kv.push(["w", "w"], [np.ones(2, np.float32), np.full(2, 2, np.float32)]).result()
    handle = kv.pull("w")
    assert handle.result().tolist() == [3, 3]
    assert handle.version == 1


def test_two_devices_are_summed_and_both_receive(make):
    kv = make(devices=2)
    kv.init("w", np.zeros(3, np.float32))
    outs = [np.empty(3, np.float32), np.empty(3, np.float32)]
    kv.pushpull("w", [np.full(3, 1, np.float32), np.full(3, 2, np.float32)], outs).result()
    assert [o.tolist() for o in outs] == [[3, 3, 3]] * 2
    assert kv.num_devices == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_shape_comes_back_exact(kv, dtype):
    for shape in [(), (0,), (7,), (3, 4, 5), (0, 3)]:
        key = f"of shape {shape}"
        value = (np.arange(int(np.prod(shape, dtype=int))).reshape(shape) % 100).astype(dtype)
        kv.init(key, value)
        result = kv.pull(key).result()
        assert result.dtype == np.dtype(dtype)
        assert result.shape == shape
        np.testing.assert_array_equal(result, value, key)
        np.testing.assert_array_equal(kv.pushpull(key, value.copy()).result(), value, key)


def test_arrays_of_every_layout(kv):
    base = np.arange(48, dtype=np.float32).reshape(6, 8)
    for name, value in {"strided": base[::2, ::3], "fortran": np.asfortranarray(base), "back": base[::-1]}.items():
        kv.init(name, np.zeros(value.shape, np.float32))
        kv.push(name, value).result()
        out = np.empty((value.shape[0] * 2, value.shape[1]), np.float32)[::2]
        np.testing.assert_array_equal(kv.pull(name, out).result(), value)
        fortran = np.empty(value.shape, np.float32, order="F")
        np.testing.assert_array_equal(kv.pull(name, fortran).result(), value)


def test_values_of_many_pieces(kv):
    value = np.random.default_rng(0).random(1_500_000)  # 12 MB
    kv.init("big", np.zeros_like(value))
    np.testing.assert_array_equal(kv.pushpull("big", value.copy()).result(), value)
    fortran = np.empty((1000, 1500), order="F")
    kv.init("matrix", value.reshape(1000, 1500))
    np.testing.assert_array_equal(kv.pull("matrix", fortran).result(), value.reshape(1000, 1500))


def test_optimizer_updates_and_hyperparameters_change_live(kv):
    kv.init("w", np.full(3, 10, np.float32))
    kv.set_optimizer(optim.SGD(lr=1.0))
    kv.set_optimizer(optim.SGD(lr=1.0))
    kv.push("w", np.ones(3, np.float32)).result()
    assert kv.pull("w").result().tolist() == [9, 9, 9]
    kv.set_hyperparameters(lr=0.5)
    kv.push("w", np.ones(3, np.float32))
    assert kv.pull("w").result().tolist() == [8.5, 8.5, 8.5]
    with pytest.raises(errors.OptimizerError):
        kv.set_optimizer(optim.SGD(lr=3.0))
    kv.set_optimizer(optim.SGD(lr=3.0), replace=True)
    kv.push("w", np.ones(3, np.float32))
    assert kv.pull("w").result().tolist() == [5.5, 5.5, 5.5]
    kv.set_hyperparameters(lr=optim.schedules.Step(4.0, size=100), momentum=np.float32(0))
    kv.push("w", np.ones(3, np.float32))
    assert kv.pull("w").result().tolist() == [1.5, 1.5, 1.5]


def test_an_optimizer_may_diverge(kv):
    """It overflows without a word, and so without an error where warnings are errors."""
    kv.init("w", np.zeros(3, np.float32))
    kv.set_optimizer(optim.SGD(lr=1e30))
    for _ in range(3):
        value = kv.pushpull("w", np.full(3, 3e38, np.float32)).result()
    assert np.isneginf(value).all()
    kv.push("w", np.full(3, np.nan, np.float32)).result()
    assert np.isnan(kv.pull("w").result()).all()


def test_an_optimizer_of_whole_tensors_set_after_init(kv):
    """Same result as on one piece, whatever the number of pieces and servers."""
    value = np.random.default_rng(1).standard_normal(700_000)
    gradient = np.random.default_rng(2).standard_normal(700_000)
    rule = optim.LARS(lr=0.1, momentum=0.9)
    expected, state = value.copy(), rule.create_state(value)
    rule.update(expected, [gradient], state, 1)
    kv.init("w", value)
    kv.set_optimizer(rule)
    np.testing.assert_array_equal(kv.pushpull("w", gradient.copy()).result(), expected)


def test_optimizer_states_are_saved_and_loaded(make, tmp_path):
    first = make()
    first.init(["a", "b"], [np.ones(3, np.float32), np.ones(700_000, np.float32)])
    first.set_optimizer(optim.SGD(lr=0.1, momentum=0.9))
    for _ in range(3):
        first.push(["a", "b"], [np.ones(3, np.float32), np.ones(700_000, np.float32)])
    values = first.pull(["a", "b"]).result()
    first.save_optimizer_states(tmp_path / "states")
    second = make()
    second.init(["a", "b"], values)
    second.set_optimizer(optim.SGD(lr=0.1, momentum=0.9))
    second.load_optimizer_states(tmp_path / "states")
    for kv in (first, second):
        kv.push(["a", "b"], [np.ones(3, np.float32), np.ones(700_000, np.float32)])
    for mine, theirs in zip(first.pull(["a", "b"]).result(), second.pull(["a", "b"]).result(), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_push_waits_for_the_engine_op_that_writes_the_gradient(kv):
    if isinstance(kv, OnGpus):
        pytest.skip("the op would have to write the array of the GPU")
    kv.init("w", np.zeros(3, np.float32))
    gradient = np.zeros(3, np.float32)
    gate: list[engine.Completion] = []
    engine.push_async(gate.append, writes=[gradient], inline=True)
    handle = kv.push("w", gradient)
    assert not handle.done()
    gradient[:] = 5
    gate[0].set_result(None)
    handle.result()
    assert kv.pull("w").result().tolist() == [5, 5, 5]


@pytest.mark.parametrize("shape", [(), (0,), (3, 4), (400, 500), (1200, 1500)])
def test_staging_and_view(kv, shape):
    kv.init("w", np.zeros(shape, np.float32))
    assert kv.view("w").shape == shape
    assert not kv.view("w").any()
    for round in (1, 2, 3):
        gradient = kv.staging("w")
        assert gradient.shape == shape
        assert gradient.dtype == np.float32
        gradient[...] = round
        value = kv.pushpull("w", gradient).result()
        np.testing.assert_array_equal(value, np.full(shape, round))
        assert value is kv.view("w")
        assert not value.flags.writeable
    kv.push("w", np.full(shape, 4, np.float32)).result()
    np.testing.assert_array_equal(value, np.full(shape, 3), "a view changed under its reader")
    np.testing.assert_array_equal(kv.pull("w", out=kvstore.IN_PLACE).result(), np.full(shape, 4))
    out = np.empty(shape, np.float32)
    kv.pushpull("w", kv.staging("w"), out=out).result()
    np.testing.assert_array_equal(out, kv.pull("w").result())


def test_the_view_of_an_updated_value(kv):
    kv.init("w", np.zeros(50_000, np.float32))
    kv.set_optimizer(optim.SGD(lr=1.0, momentum=0.5))
    previous, expected, momentum = kv.view("w"), 0.0, 0.0
    for _ in range(5):
        gradient = kv.staging("w")
        gradient[...] = 1
        value = kv.pushpull("w", gradient).result()
        np.testing.assert_array_equal(previous, np.float32(expected))
        momentum = 0.5 * momentum + 1
        expected -= momentum
        np.testing.assert_array_equal(value, np.float32(expected))
        previous = value


def test_the_engine_fills_staging(kv):
    kv.init("w", np.zeros(20_000, np.float32))
    gradient, release = kv.staging("w"), threading.Event()

    def fill():
        assert release.wait(30)
        gradient[...] = 7

    engine.default().push(fill, writes=[gradient])
    pushed = kv.pushpull("w", gradient)
    assert not pushed.done()
    release.set()
    np.testing.assert_array_equal(pushed.result(), 7)


def test_an_engine_op_that_reads_out_waits_for_the_pull(kv):
    if isinstance(kv, OnGpus):
        pytest.skip("the op would have to read the array of the GPU")
    kv.init("w", np.full(3, 4, np.float32))
    out = np.zeros(3, np.float32)
    kv.pull("w", out)
    assert engine.push(lambda: out.sum(), reads=[out]).result(30) == 12


def test_broadcast_and_trainer(kv):
    weights = {"a": np.ones(2, np.float32), "b": np.ones(3, np.float32)}
    trainer = kvstore.Trainer(weights, optim.SGD(lr=0.5), kv, scale=0.5)
    trainer.step({"b": np.ones(3, np.float32), "a": np.full(2, 2, np.float32)})
    assert weights["a"].tolist() == [0.5, 0.5]
    assert weights["b"].tolist() == [0.75] * 3
    assert kv.broadcast("c", np.full(2, 3, np.float32)).result().tolist() == [3, 3]


def test_trainer_scales_where_the_store_sends_from_and_leaves_the_callers_array_alone(kv):
    weights = {"a": np.ones(3, np.float32)}
    trainer = kvstore.Trainer(weights, optim.SGD(lr=1.0), kv, scale=0.25)
    gradient = np.full(3, 2, np.float32)
    trainer.step({"a": gradient})
    assert (gradient.tolist(), weights["a"].tolist()) == ([2.0] * 3, [0.5] * 3)
    staged = kv.staging("a")
    staged.fill(1)
    trainer.step({"a": staged})
    assert weights["a"].tolist() == [0.25] * 3
    with pytest.raises(errors.ShapeError, match=r"\(3,\).*\(4,\)"):
        trainer.push("a", np.ones(4, np.float32))


# --- bad use ------------------------------------------------------------------------------------------


def bad(kv, call, error, *parts):
    with pytest.raises(error) as caught:
        call()
    for part in parts:
        assert part in str(caught.value), caught.value
    kv.push("w", np.ones((2, 3), np.float32)).result()  # afterwards the store goes on working
    assert kv.pull("w").result().tolist() == [[1, 1, 1]] * 2


def test_bad_use_raises_its_own_error_and_changes_nothing(kv):
    good = np.ones((2, 3), np.float32)
    kv.init("w", good)
    read_only = good.copy()
    read_only.flags.writeable = False
    bad(kv, lambda: kv.push("v", good), errors.UnknownKeyError, "'v'", "initialised")
    bad(kv, lambda: kv.pull("v"), errors.UnknownKeyError, "'v'")
    bad(kv, lambda: kv.init("w", good), errors.DuplicateKeyError, "'w'")
    bad(kv, lambda: kv.init(["x", "y", "x"], [good] * 3), errors.DuplicateKeyError, "'x'", "2 times")
    bad(kv, lambda: kv.push("w", good[:1]), errors.ShapeError, "'w'", "(2, 3)", "(1, 3)")
    bad(kv, lambda: kv.push("w", good.astype(np.float64)), errors.DtypeError, "'w'", "float32", "float64")
    bad(kv, lambda: kv.pull("w", np.empty((2, 3))), errors.DtypeError, "'w'", "float32", "float64")
    bad(kv, lambda: kv.pull("w", read_only), errors.ReadOnlyError, "'w'")
    bad(kv, lambda: kv.init(5, good), errors.KeyKindError, "5")
    bad(kv, lambda: kv.init("", good), errors.KeyKindError, "''")
    bad(kv, lambda: kv.init("k" * 1025, good), errors.KeyKindError)
    bad(kv, lambda: kv.init(2.5, good), errors.KeyKindError, "2.5")
    bad(kv, lambda: kv.init("s", np.array(["a"])), errors.DtypeError, "'s'")
    bad(kv, lambda: kv.init("s", [1.0]), errors.DtypeError, "'s'")
    bad(kv, lambda: kv.push("w", [good, good]), errors.DeviceCountError, "'w'", "expected 1", "got 2")
    bad(kv, lambda: kv.push("w", good, device=0), errors.DeviceCountError, "devices=")
    bad(kv, lambda: kv.push(["w", "w"], [good]), errors.ShapeError)
    bad(kv, lambda: kv.set_optimizer("sgd"), errors.OptimizerError)
    bad(kv, lambda: kv.init("z", good, cluster_consistency="bounded"), errors.OptionError, "'bounded'")
    bad(kv, lambda: kv.set_hyperparameters(lr=1.0), errors.OptimizerError)
    bad(kv, lambda: kv.push("w", good, priority="high"), errors.OptionError, "priority", "'high'")
    bad(kv, lambda: kv.pull("w", priority=1.5), errors.OptionError, "1.5")
    bad(kv, lambda: kv.pushpull("w", good.copy(), priority=None), errors.OptionError, "None")
    bad(kv, lambda: kv.broadcast("z", good, priority="high"), errors.OptionError, "'high'")
    bad(kv, lambda: kv.broadcast("z", []), errors.DtypeError, "'z'")
    bad(kv, lambda: kv.init("z", np.ma.masked_array(good, good > 0)), errors.DtypeError, "'z'", "mask")
    for participants in ("ab", 0, [], [1], [-1], [True], [0.0]):
        bad(kv, lambda p=participants: kv.init("z", good, participants=p), errors.OptionError, repr(participants))
    bad(kv, lambda: kv.staging(["w"]), errors.KeyKindError, "one key")
    bad(kv, lambda: kv.view(["w"]), errors.KeyKindError, "one key")


def test_numbers_and_keys_of_numpy_are_as_good_as_pythons(make):
    kv = make(devices=np.int64(2))
    assert kv.num_devices == 2
    one = np.ones(2, np.float32)
    kv.init(np.str_("w"), one, participants=np.arange(1))
    kv.set_optimizer(optim.SGD(lr=np.float64(0.5), nesterov=np.bool_(False)))
    kv.set_optimizer(optim.SGD(lr=0.5))  # the same
    pushes = [kv.push("w", one, np.int32(3), device=np.int64(device)) for device in range(2)]
    assert [push.result() for push in pushes] == [None, None]
    assert kv.pull("w", priority=2**70).result().tolist() == [0, 0]


def test_waits_may_last_for_ever(make):
    kv = make()
    kv.timeout = math.inf
    kv.init("w", np.zeros(1, np.float32))
    kv.set_optimizer(optim.Adam())
    kv.push("w", np.ones(1, np.float32)).result(math.inf)
    kv.barrier()
    kv.barrier(math.inf)


def test_stores_and_handles_are_not_copied(kv):
    kv.init("w", np.zeros(1, np.float32))
    handle = kv.pull("w")
    for thing in (kv, handle):
        with pytest.raises(TypeError, match="copied or pickled"):
            copy.copy(thing)
    handle.result()


def test_keys_that_are_initialised_at_the_same_time_twice(kv):
    value = np.ones(3, np.float32)
    gate = threading.Barrier(4)
    raised = []

    def init() -> None:
        gate.wait(10)
        for number in range(20):
            try:
                kv.init(f"w{number}", value)
            except errors.DuplicateKeyError as error:
                raised.append(error)

    at_once(*[init] * 4)
    assert len(raised) == 3 * 20
    assert kv.pull("w19").result().tolist() == [1, 1, 1]


def test_a_list_call_is_checked_whole_before_anything_is_sent(kv):
    good = np.ones(2, np.float32)
    kv.init(["a", "b"], [np.zeros(2, np.float32)] * 2)
    with pytest.raises(errors.ShapeError):
        kv.push(["a", "b"], [good, np.ones(3, np.float32)])
    assert kv.pull("a").result().tolist() == [0, 0]


def test_a_closed_store_is_an_error_and_closing_twice_is_not(kv):
    kv.init("w", np.zeros(1, np.float32))
    kv.close()
    kv.close()
    one = np.zeros(1, np.float32)
    for call in (
        lambda: kv.init("v", one), lambda: kv.push("w", one), lambda: kv.pull("w"), lambda: kv.pushpull("w", one),
        lambda: kv.broadcast("v", one), lambda: kv.staging("w"), lambda: kv.view("w"), kv.barrier,
        lambda: kv.set_optimizer(optim.SGD()), lambda: kv.set_updater(print), lambda: kv.set_hyperparameters(lr=1),
        lambda: kv.save_optimizer_states("s"), lambda: kv.load_optimizer_states("s"),
    ):  # fmt: skip
        with pytest.raises(errors.ClosedError):
            call()


def test_unknown_types_and_options():
    with pytest.raises(errors.OptionError, match="'distributed'"):
        kvstore.create("distributed")
    with pytest.raises(errors.OptionError, match=r"bounded\(-1\)"):
        kvstore.create("local", device_consistency="bounded(-1)")
    for devices in (0, True, 1.5, "2"):
        with pytest.raises(errors.DeviceCountError, match=repr(devices)):
            kvstore.create("local", devices=devices)
    for options in (
        {"timeout": "5"},
        {"timeout": math.nan},
        {"connect_timeout": "5"},
        {"rank": 0},
        {"address": "tcp://a:1"},
    ):
        with pytest.raises(errors.OptionError):
            kvstore.create("local", **options)
    for staleness in (-1, 1.5, "1", True):
        with pytest.raises(errors.OptionError, match=repr(staleness)):
            kvstore.Bounded(staleness)


def test_updater_of_a_local_store():
    with kvstore.create("local", timeout=30) as kv:
        kv.init("w", np.zeros((2, 2), np.float32))
        seen = []

        def updater(key, merged, stored):
            seen.append((key, merged.shape))
            stored += 2 * merged

        kv.set_updater(updater)
        kv.push("w", np.ones((2, 2), np.float32)).result()
        assert kv.pull("w").result().tolist() == [[2, 2]] * 2
        assert seen == [("w", (2, 2))]

        def broken(key, merged, stored):
            raise RuntimeError("no such luck")

        kv.set_updater(broken)
        with pytest.raises(errors.UpdateError, match=r"'w'.*no such luck"):
            kv.push("w", np.ones((2, 2), np.float32)).result()


def test_an_updater_and_an_optimizer_are_not_both_in_effect():
    one = np.ones(1, np.float32)
    with kvstore.create("local", timeout=30) as kv:
        kv.init("w", np.zeros(1, np.float32))
        kv.set_optimizer(optim.Accumulate())
        kv.set_updater(lambda key, merged, stored: np.add(stored, 10 * merged, out=stored))
        assert kv.pushpull("w", one.copy()).result().tolist() == [10]
        with pytest.raises(errors.OptimizerError):
            kv.set_hyperparameters(lr=1)
        with pytest.raises(errors.OptimizerError, match=r"an updater.*replace=True"):
            kv.set_optimizer(optim.SGD(lr=1.0))
        kv.set_optimizer(optim.SGD(lr=1.0), replace=True)
        assert kv.pushpull("w", one.copy()).result().tolist() == [9]


def test_an_interrupt_in_the_middle_of_a_call_leaves_nothing_to_wait_for():
    """Small updates run in the caller's thread, and there Ctrl-C finds them."""

    def interrupted(key, merged, stored):
        raise KeyboardInterrupt

    kv = kvstore.create("local", timeout=30)
    kv.init(["w", "v"], [np.zeros(1, np.float32)] * 2)
    kv.set_updater(interrupted)
    for key, call in (("w", kv.push), ("v", kv.pushpull)):
        with pytest.raises(KeyboardInterrupt):
            call(key, np.ones(1, np.float32))
    kv.close()


def test_an_error_nobody_looked_at_is_raised_by_the_next_call_on_that_key():
    with kvstore.create("local", timeout=30) as kv:
        kv.init(["w", "v"], [np.zeros(1, np.float32)] * 2)

        def broken(key, merged, stored):
            if key == "w":
                raise RuntimeError("no such luck")
            stored += merged

        kv.set_updater(broken)
        kv.push("w", np.ones(1, np.float32))
        kv.push("v", np.ones(1, np.float32)).result()  # other keys go on
        with pytest.raises(errors.UpdateError):
            kv.push("w", np.ones(1, np.float32))
        kv.set_updater(lambda key, merged, stored: None)


# --- checkpoints --------------------------------------------------------------------------------------


def test_a_checkpoint_is_what_was_pushed_before_it(kv, make, tmp_path):
    kv.set_optimizer(optim.SGD(lr=0.5, momentum=0.9))
    kv.init(["a", "b"], [np.zeros(3, np.float32), np.ones((2, 2), np.float32)])
    for _ in range(3):
        kv.push(["a", "b"], [np.ones(3, np.float32), np.ones((2, 2), np.float32)])
    snapshot = kv.snapshot().result()
    path = kv.save_checkpoint(tmp_path, keep=2).result()
    after = kv.pushpull("a", np.ones(3, np.float32)).result().copy()
    before = kv.load_checkpoint(tmp_path)
    assert before == path
    pull = kv.pull(["a", "b"])
    for value, key in zip(pull.result(), ("a", "b"), strict=True):
        np.testing.assert_array_equal(value, snapshot[key])
        assert value.shape == snapshot[key].shape
    np.testing.assert_array_equal(kv.pushpull("a", np.ones(3, np.float32)).result(), after)
    other = make()
    other.load_checkpoint(path)  # into a store that has no keys yet
    pulled = other.pull("a")
    np.testing.assert_array_equal(pulled.result(), snapshot["a"])
    assert pulled.version == 3
    np.testing.assert_array_equal(other.pushpull("a", np.ones(3, np.float32)).result(), after)


def test_one_who_does_not_wait_goes_on(kv, tmp_path):
    kv.init("w", np.zeros(3, np.float32))
    kv.push("w", np.ones(3, np.float32))
    handle, values = kv.save_checkpoint(tmp_path, wait=False), kv.snapshot(wait=False)
    kv.cut_point()
    kv.push("w", np.full(3, 2, np.float32)).result()
    assert set(values.result()["w"]) == {1.0}
    assert handle.result().parent == tmp_path
    kv.load_checkpoint(tmp_path)
    assert set(kv.pull("w").result()) == {1.0}


def test_loading_what_does_not_fit_changes_nothing(kv, make, tmp_path):
    kv.init("w", np.zeros(3, np.float32))
    kv.save_checkpoint(tmp_path)
    other = make()
    other.init(["w", "more"], [np.ones(4, np.float32), np.ones(2)])
    with pytest.raises(errors.CheckpointError, match=r"it lacks \['more'\]"):
        other.load_checkpoint(tmp_path)
    third = make()
    third.init("w", np.ones(4, np.float32))
    with pytest.raises(errors.ShapeError, match=r"expected shape \(4,\), got \(3,\)"):
        third.load_checkpoint(tmp_path)
    assert set(third.pull("w").result()) == {1.0}
    with pytest.raises(errors.CheckpointError, match="there is none"):
        third.load_checkpoint(tmp_path / "absent")
    with pytest.raises(errors.OptionError, match="keep"):
        third.save_checkpoint(tmp_path, keep=0)


# --- rounds of so many samples ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16, "float32", "float64"])
@pytest.mark.parametrize("optimizer", [None, optim.SGD(lr=0.5, momentum=0.9, clip_norm=3.0), optim.Adam(lr=0.1)])
def test_an_update_is_that_of_as_many_samples_as_a_round_has(make, dtype, optimizer):
    plain, sampled = make(), make(samples_per_round=64)
    first, gradients = np.linspace(-1, 1, 1000).astype(dtype), np.linspace(1, 2, 1000).astype(dtype)
    for kv in (plain, sampled):
        if optimizer is not None:
            kv.set_optimizer(optimizer)
        kv.init("w", first)
    for samples in (64, 16, 64):
        whole = (gradients.astype(np.float64) * (64 / samples)).astype(dtype)
        plain.push("w", whole).result()
        sampled.push("w", gradients, samples=samples).result()
    a, b = plain.pull("w").result(), sampled.pull("w").result()
    assert a.tobytes() == b.tobytes() or np.allclose(a.astype(float), b.astype(float), rtol=1e-2)
    if dtype == "float64":
        np.testing.assert_allclose(a, b, rtol=1e-12)


@pytest.mark.parametrize("rule", [None, optim.SGD(lr=0.1, momentum=0.9), optim.LAMB(lr=0.1)])
def test_as_many_samples_as_asked_for_give_the_very_same_bits(make, rule):
    results = []
    for options, said in (({}, {}), ({"samples_per_round": 48}, {"samples": 48})):
        kv = make(**options)
        if rule is not None:
            kv.set_optimizer(rule)
        kv.init(["v", "w"], [np.linspace(0, 1, 77, dtype=np.float32)] * 2)
        for n in range(5):
            kv.push(["v", "w"], [np.linspace(n, 1, 77, dtype=np.float32)] * 2, **said).result()
        results.append([value.tobytes() for value in kv.pull(["v", "w"]).result()])
    assert results[0] == results[1]


def test_a_push_says_the_samples_of_all_devices(make):
    kv = make(devices=2, samples_per_round=12)
    kv.init(["v", "w"], [np.zeros(3), np.zeros(3)])
    kv.push(["v", "w"], [[np.ones(3), np.ones(3)]] * 2, samples=6).result()
    assert [list(value) for value in kv.pull(["v", "w"]).result()] == [[4.0] * 3] * 2
    one, other = kv.push("v", np.ones(3), device=0, samples=1), kv.push("v", np.ones(3), device=1, samples=3)
    one.result(), other.result()
    assert list(kv.pull("v").result()) == [6.0] * 3
    out = [np.empty(3), np.empty(3)]
    kv.pushpull("w", [np.ones(3), np.ones(3)], out, samples=24).result()
    assert [list(each) for each in out] == [[1.0] * 3] * 2


def test_a_round_without_samples_changes_nothing_and_has_a_version(make):
    kv = make(samples_per_round=12)
    kv.set_optimizer(optim.SGD(lr=1.0, weight_decay=0.5))
    kv.init(["v", "w"], [np.ones(3), np.ones(3)])
    kv.push("w", np.zeros(3), samples=0).result()
    pulled = kv.pull("w")
    assert list(pulled.result()) == [1.0] * 3
    assert pulled.version == 1
    kv.push(["v", "w"], [np.ones(3), np.ones(3)], samples=12).result()
    assert [list(value) for value in kv.pull(["v", "w"]).result()] == [[-0.5] * 3] * 2
    assert kv.pull("w").result() is not None


def test_trainer_steps_by_samples(make):
    kv = make(samples_per_round=4)
    weights = {"w": np.zeros(3), "b": np.zeros(1)}
    trainer = kvstore.Trainer(weights, optim.SGD(lr=1.0), kv, scale=1 / 4)
    trainer.step({"w": np.ones(3), "b": np.ones(1)}, samples=1)
    trainer.push("b", np.ones(1), samples=4)
    trainer.step({"w": np.ones(3)}, samples=2)
    assert list(weights["w"]) == [-1.5] * 3
    assert list(weights["b"]) == [-1.25]


def test_bad_use_of_samples_raises_and_changes_nothing(make):
    kv = make(samples_per_round=8)
    kv.init("w", np.zeros(3))
    for samples in (None, -1, 1.0, True, 1 << 41):
        with pytest.raises(errors.OptionError, match="expected samples, a whole number"):
            kv.push("w", np.ones(3), samples=samples)
        with pytest.raises(errors.OptionError, match="expected samples, a whole number"):
            kv.pushpull("w", np.ones(3), samples=samples)
    with pytest.raises(errors.DtypeError, match="floating-point"):
        kv.init("n", np.zeros(3, np.int64))
    with pytest.raises(errors.OptionError, match="eventual"):
        kv.init("e", np.zeros(3), device_consistency="eventual")
    assert list(kv.pull("w").result()) == [0.0] * 3
    plain = make()
    plain.init("w", np.zeros(3))
    with pytest.raises(errors.OptionError, match="no samples"):
        plain.push("w", np.ones(3), samples=8)
    for options in ({"samples_per_round": 0}, {"samples_per_round": "8"}, {"samples_per_round": 1 << 41}):
        with pytest.raises(errors.OptionError, match="samples_per_round"):
            kvstore.create("local", **options)
    with pytest.raises(errors.OptionError, match="bounded"):
        kvstore.create("local", device_consistency="bounded(1)", samples_per_round=8)
    with pytest.raises(errors.OptionError, match="eventual"):
        kvstore.create("dist_async", address="tcp://127.0.0.1:1", samples_per_round=8)


def test_an_updater_sees_the_sum_of_as_many_samples():
    with kvstore.create("local", samples_per_round=8) as kv:
        kv.set_updater(lambda key, merged, stored: stored.__iadd__(merged))
        kv.init("w", np.zeros(3))
        given = np.ones(3)
        kv.push("w", given, samples=2).result()
        assert list(kv.pull("w").result()) == [4.0] * 3
        assert list(given) == [1.0] * 3
