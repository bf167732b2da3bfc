"""The cluster level with real sockets: agreement of workers, the models, their nine combinations."""

from __future__ import annotations

import gc
import itertools
import threading
import time

import numpy as np
import pytest

import kvstore
from kvstore import errors, optim
from tests.clusters import DEADLINE_S, at_once, cluster

ONE = np.ones(1, np.float32)
MODELS = ["sequential", "bounded(1)", "eventual"]


def test_sequential_workers_read_the_same_values_every_round():
    def work(kv):
        kv.init("w", np.zeros(3, np.float64))
        return [kv.pushpull("w", np.full(3, 10.0**kv.rank * n)).result().tolist() for n in range(1, 6)]

    with cluster(workers=3, servers=2) as c:
        results = c.run(work)
    assert results[0] == results[1] == results[2] == [[111.0 * n] * 3 for n in range(1, 6)]


def test_rank_zero_alone_gives_the_first_value():
    def work(kv):
        kv.init(["w", "v"] if kv.rank else ["v", "w"], [np.full(2, kv.rank, np.float32)] * 2)
        return kv.pull(["w", "v"]).result()

    with cluster(workers=2, servers=2) as c:
        for result in c.run(work):
            assert [r.tolist() for r in result] == [[0, 0], [0, 0]]


def test_an_init_that_was_too_early_says_why_and_may_be_made_again():
    """By then the first one may have been answered after all."""
    tried, exists = threading.Event(), threading.Event()

    def work(kv):
        value = np.full(3, kv.rank, np.float32)
        if kv.rank == 0:
            tried.wait(30)
            kv.init("w", value)
            exists.set()
        else:
            kv.timeout = 0.1
            for _ in range(2):
                with pytest.raises(errors.DeadlineError, match=r"'w'.*init waits for that of worker 0.*workers 0"):
                    kv.init("w", value)
            tried.set()
            exists.wait(30)
            kv.timeout = 30
            kv.init("w", value)
            with pytest.raises(errors.DuplicateKeyError):
                kv.init("w", value)
        for _ in range(3):
            result = kv.pushpull("w", np.ones(3, np.float32)).result()
        return result.tolist()

    with cluster(workers=2, servers=1) as c:
        assert c.run(work) == [[2, 2, 2]] * 2


def test_every_value_comes_back_exact_from_three_servers():
    import ml_dtypes

    rng = np.random.default_rng(0)
    base = rng.standard_normal((64, 48))
    values = {
        "hundred MB": rng.standard_normal(25_000_000).astype(np.float32),
        "scalar": np.float32(3),
        "empty": np.zeros((0, 4), np.float32),
        "0-d": np.array(2.5),
        "strided": base[::3, 1::2],
        "fortran": np.asfortranarray(base),
        **{
            np.dtype(dtype).name: (base * 50).astype(dtype)
            for dtype in ("float16", ml_dtypes.bfloat16, "float64", "int32", "int64")
        },
        "uint8": np.abs(base * 50).astype(np.uint8),
    }

    def work(kv):
        keys = list(values)
        kv.init(keys, [np.zeros_like(v) for v in values.values()])
        zeros = [np.zeros_like(v) for v in values.values()]
        kv.push(keys, list(values.values()) if kv.rank == 1 else zeros).result()
        return kv.pull(keys).result()

    with cluster(workers=2, servers=3) as c:
        for result in c.run(work):
            for (name, value), got in zip(values.items(), result, strict=True):
                assert got.dtype == np.asarray(value).dtype, name
                np.testing.assert_array_equal(got, value, err_msg=name)


@pytest.mark.parametrize(("device_model", "cluster_model"), list(itertools.product(MODELS, MODELS)))
def test_all_nine_combinations_lose_nothing(device_model, cluster_model):
    """Every push of every device is in the value in the end, exactly once; staleness keeps its bound."""
    rounds = 12

    def work(kv):
        kv.init("w", np.zeros(2))
        kv.set_optimizer(optim.Accumulate())

        def device(d):
            seen = []
            for _ in range(rounds):
                kv.push("w", np.ones(2), device=d)
                handle = kv.pull("w", device=d)
                value = handle.result()
                seen.append((value[0], handle.staleness))
            return seen

        seen = at_once(*(lambda d=d: device(d) for d in range(2)))
        kv.barrier()
        return seen, kv.pull("w").result().tolist()

    with cluster(workers=2, servers=2) as c:
        results = c.run(work, devices=2, device_consistency=device_model, cluster_consistency=cluster_model)
    for seen, final in results:
        assert final == [4.0 * rounds] * 2
        for one_device in seen:
            values = [value for value, _ in one_device]
            assert values == sorted(values)
            for n, (value, (device_staleness, cluster_staleness)) in enumerate(one_device, 1):
                assert value >= n  # its own pushes
                if device_model == "sequential":
                    assert device_staleness == 0
                if device_model == "bounded(1)":
                    assert device_staleness <= 1
                if cluster_model == "sequential":
                    assert cluster_staleness == 0
                    if device_model == "sequential":
                        assert value == 4 * n
                if cluster_model == "bounded(1)":
                    assert cluster_staleness <= 1


def run_with_a_slow_worker(model: str, rounds: int = 8) -> list[int]:
    """The cluster staleness that a fast worker sees while worker 1 stands still until released."""
    slow_may_go = threading.Event()
    reasons: list[str] = []

    def work(kv):
        kv.init("w", np.zeros(1, np.float32))
        kv.barrier()
        if kv.rank == 1:
            assert slow_may_go.wait(DEADLINE_S)
            for _ in range(rounds):
                kv.pushpull("w", ONE.copy()).result()
            return []
        seen = []
        for _ in range(rounds):
            kv.push("w", ONE)
            handle = kv.pull("w")
            try:
                handle.result(0.3)
            except errors.DeadlineError as error:
                reasons.append(str(error))
                slow_may_go.set()
                handle.result()
            seen.append(handle.staleness[1])
        slow_may_go.set()
        return seen

    with cluster(workers=2, servers=1) as c:
        seen = c.run(work, cluster_consistency=model)[0]
    assert all("waits for workers 1" in reason for reason in reasons)
    return seen


def test_bounded_staleness_is_reached_and_never_exceeded():
    seen = run_with_a_slow_worker("bounded(3)")
    assert seen[:3] == [1, 2, 3]
    assert max(seen) == 3


def test_bounded_by_zero():
    assert set(run_with_a_slow_worker("bounded(0)")) == {0}


def test_eventual_runs_ahead():
    assert run_with_a_slow_worker("eventual") == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_key_overrides_the_models_and_names_its_participants():
    def work(kv):
        kv.init("all", np.zeros(1, np.float32))
        kv.init("mine", np.zeros(1, np.float32), participants=[1])
        kv.init("loose", np.zeros(1, np.float32), cluster_consistency="eventual")
        if kv.rank == 1:
            kv.push("mine", 7 * ONE).result()
            kv.push("loose", 3 * ONE).result()
        kv.barrier()
        if kv.rank == 0:
            with pytest.raises(errors.DisagreementError, match=r"'mine'.*participant"):
                kv.push("mine", ONE).result()
        return kv.pull(["mine", "loose"]).result()

    with cluster() as c:
        assert [[v.tolist() for v in r] for r in c.run(work)] == [[[7], [3]]] * 2


def test_workers_that_disagree_see_both_sides_and_go_on():
    def work(kv):
        kv.init("ok", np.zeros(1, np.float32))
        if kv.rank == 0:
            kv.init("w", np.zeros((2, 3), np.float32))
        else:
            with pytest.raises(errors.DisagreementError, match=r"(?s)'w'.*\(2, 3\).*\(3, 2\)"):
                kv.init("w", np.zeros((3, 2), np.float32))
            kv.init("w", np.zeros((2, 3), np.float32))
        return kv.pushpull("w", np.ones((2, 3), np.float32)).result().sum()

    with cluster() as c:
        assert c.run(work) == [12, 12]


def test_different_optimizers_are_an_error():
    def work(kv):
        kv.init("w", np.zeros(1, np.float32))
        try:
            kv.set_optimizer(optim.SGD(lr=0.1 * (1 + kv.rank)))
        except errors.OptimizerError:
            return "refused"
        return "set"

    with cluster() as c:
        assert sorted(c.run(work)) == ["refused", "set"]


def test_a_worker_leaves_and_the_others_go_on():
    def work(kv):
        kv.init("w", np.zeros(1, np.float32))
        for _ in range(3 if kv.rank == 0 else 6):
            value = kv.pushpull("w", ONE.copy()).result()
        return float(value[0])

    with cluster(workers=3) as c:
        assert c.run(work) == [3, 2, 2]


def test_a_worker_that_raises_ends_the_waits_of_the_others():
    def work(kv):
        kv.init("w", np.zeros(1, np.float32))
        if kv.rank == 1:
            raise RuntimeError("out of coffee")
        kv.pushpull("w", ONE.copy()).result()

    with cluster() as c, pytest.raises(RuntimeError, match="out of coffee"):
        c.run(work)
    reasons = []

    def observe(kv):
        try:
            work(kv)
        except errors.WorkerLostError as error:
            reasons.append(str(error))

    with cluster() as c, pytest.raises(RuntimeError):
        c.run(observe)
    assert "out of coffee" in reasons[0]
    assert "worker 1" in reasons[0]


def push_without_the_other(kv, value):
    """Once the other is lost: its last round, and one more."""
    while not kv.dead_workers():
        time.sleep(0.01)  # between looks
    while True:
        kv.push("w", value).result()


@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "sockets"])
def test_who_leaves_in_the_middle_ends_its_own_waits_too(shared):
    """What it has asked for fails, and its threads end."""
    handles: list[kvstore.Handle] = []

    def work(kv):
        value = np.ones(300_000, np.float32)
        kv.init("w", value)
        kv.barrier()
        if kv.rank == 1:
            handles.extend([kv.push("w", value), kv.pull("w"), kv.pushpull("w", value)])
            raise RuntimeError("out of coffee")
        with pytest.raises(errors.WorkerLostError, match="out of coffee"):
            push_without_the_other(kv, value)

    with cluster() as c, pytest.raises(RuntimeError, match="out of coffee"):
        c.run(work, shared_memory=shared)
    for handle in handles:
        assert isinstance(handle.exception(DEADLINE_S), errors.ClosedError | errors.FencedError)


def test_a_close_that_is_interrupted_closes_all_the_same():
    def work(kv):
        kv.init("w", np.zeros(1, np.float32))
        if kv.rank == 0:
            with pytest.raises(errors.WorkerLostError, match=r"workers? 1.*KeyboardInterrupt"):
                push_without_the_other(kv, ONE)
            return None
        left = kv.push("w", ONE)

        def interrupted(timeout=None):
            raise KeyboardInterrupt

        kv.wait_for_commits = interrupted
        with pytest.raises(KeyboardInterrupt):
            kv.close()
        return left.exception(DEADLINE_S)

    with cluster() as c:
        ended = c.run(work)[1]  # by whatever came first: its own end, the servers' word that it is gone, or the commit
        assert ended is None or isinstance(ended, errors.ClosedError | errors.FencedError)


def test_barrier_names_who_is_missing():
    released = threading.Event()

    def work(kv):
        if kv.rank == 1:
            assert released.wait(DEADLINE_S)
            return kv.barrier()
        with pytest.raises(errors.DeadlineError, match="workers 1"):
            kv.barrier(timeout=0.2)
        released.set()
        return None

    with cluster() as c:
        c.run(work)


def test_two_stores_in_one_process_side_by_side():
    with cluster(workers=1) as one, cluster(workers=1, servers=2) as two:
        stores = [
            kvstore.create("local", timeout=30),
            kvstore.create("dist", address=one.address, timeout=30),
            kvstore.create("dist", address=two.address, timeout=30),
        ]
        for n, kv in enumerate(stores):
            kv.init("w", np.full(2, n, np.float32))
        for n, kv in enumerate(stores):
            kv.push("w", np.full(2, 10 + n, np.float32))
        assert [kv.pull("w").result()[0] for kv in stores] == [10, 11, 12]
        for kv in stores:
            kv.close()


def test_hyperparameters_take_effect_from_one_round_at_every_piece():
    def work(kv):
        kv.init("w", np.zeros(1_500_000))
        kv.set_optimizer(optim.SGD(lr=1.0))
        seen = []
        for n in range(4):
            if n == 2:
                kv.set_hyperparameters(lr=10.0)
            value = kv.pushpull("w", np.ones(1_500_000)).result()
            assert value.min() == value.max()
            seen.append(-value[0])
        return seen

    with cluster(servers=3) as c:
        assert c.run(work) == [[2, 4, 24, 44]] * 2


def test_sequential_bits_do_not_depend_on_the_number_of_servers():
    def work(kv):
        rng = np.random.default_rng(kv.rank)
        kv.init("w", np.zeros(1_100_000, np.float32))
        kv.set_optimizer(optim.Adam(lr=0.01))
        for _ in range(3):
            value = kv.pushpull("w", rng.standard_normal(1_100_000).astype(np.float32)).result()
        return value

    results = []
    for servers in (1, 3):
        with cluster(workers=3, servers=servers) as c:
            results += c.run(work)
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


def test_an_update_that_fails_is_told_to_those_who_wait_for_it_and_to_those_who_ask_later(monkeypatch):
    """Also for a value so small that the server updates it without an engine op."""
    broken = threading.Event()
    update = optim.SGD.update

    def maybe(self, *arguments):
        if broken.is_set():
            raise RuntimeError("the update broke")
        update(self, *arguments)

    monkeypatch.setattr(optim.SGD, "update", maybe)

    def work(kv):
        kv.init("w", ONE)
        kv.set_optimizer(optim.SGD(lr=0.5))
        kv.barrier()
        broken.set()
        with pytest.raises(kvstore.KVStoreError, match="the update broke"):
            kv.pushpull("w", ONE, np.empty(1, np.float32)).result()
        with pytest.raises(kvstore.KVStoreError, match="the update broke"):
            kv.pull("w").result()
        kv.barrier()

    with cluster(workers=2, servers=1) as c:
        c.run(work)


@pytest.mark.parametrize("shared", [False, True], ids=["sockets", "shared memory"])
@pytest.mark.parametrize("size", [1, 30_000])
def test_a_round_leaves_nothing_to_the_collector(shared, size):
    def work(kv):
        gradient, out = np.ones(size, np.float32), np.empty(size, np.float32)
        kv.init("w", out)

        def rounds(count):
            for _ in range(count):
                kv.pushpull("w", gradient, out).result()
                kv.push("w", gradient).result()
                kv.pull("w", out).result()

        rounds(20)
        gc.collect()
        gc.disable()
        try:
            rounds(50)
            return gc.collect()
        finally:
            gc.enable()

    with cluster(1) as running:
        (unreachable,) = running.run(work, shared_memory=shared)
    assert unreachable < 50  # other threads may leave a few
