"""Checkpoints of running clusters: exact, consistent under load, restored onto other numbers of servers and workers."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import kvstore
from kvstore import errors, optim
from kvstore.checkpoint.cut import values
from kvstore.checkpoint.reading import Checkpoint
from kvstore.cluster import keys as key_files
from kvstore.cluster.keys import network
from kvstore.cluster.periodic import Periodic
from tests.clusters import cluster

MODELS = ["sequential", "bounded(1)", "eventual"]
BIG = 1_500_000  # elements: in two pieces of float32, on two servers


def keys_of(small: int = 12) -> dict[str, int]:
    return {**{f"small {i}": 3 for i in range(small)}, "big": BIG}


def training(steps: int, keys: dict[str, int], until: threading.Event | None = None, pace_s: float = 0.0):
    """As each worker: every step adds one to every element of every key, in a list call and one by one."""

    def work(kv: kvstore.KVStore) -> int:
        kv.set_optimizer(optim.SGD(lr=1.0, momentum=0.5))
        for key, items in keys.items():
            kv.init(key, np.zeros(items, np.float32))
        gradients = {key: np.full(items, -1, np.float32) for key, items in keys.items()}
        names = list(keys)
        done = 0
        while done < steps or (until is not None and not until.is_set()):
            if done % 3:
                kv.pushpull(names, [gradients[key] for key in names], [np.empty_like(gradients[key]) for key in names])
            else:
                for key in names:
                    kv.push(key, gradients[key], priority=done % 2)
            kv.cut_point()
            done += 1
            if done % 5 == 0:
                kv.pull(names).result()
            if pace_s and kv.rank == 0:
                time.sleep(pace_s)  # an uneven worker
        return done

    return work


@pytest.mark.parametrize("model", MODELS)
def test_a_cut_under_load_is_one_number_of_rounds_over_all_keys_and_servers(tmp_path, model):
    """Momentum makes values and states tell how often they were updated."""
    keys, enough = keys_of(), threading.Event()

    def work(kv: kvstore.KVStore):
        if kv.rank == 0:
            threading.Thread(target=checkpoints, args=(kv,), name="test-saver").start()
        return training(4, keys, enough, 0.002)(kv)

    paths: list[Path] = []
    failures: list[BaseException] = []

    def checkpoints(kv: kvstore.KVStore) -> None:
        try:
            for _ in range(4):
                paths.append(kv.save_checkpoint(tmp_path, wait=False).result(40))
            snapshots.append(kv.snapshot(wait=False).result(40))
        except BaseException as error:
            failures.append(error)
        finally:
            enough.set()

    snapshots: list[dict] = []
    with cluster(3, 3) as running:
        running.run(work, cluster_consistency=model, device_consistency="sequential")
    assert not failures
    assert len(paths) == 4 and len(snapshots) == 1
    seen = []
    for path in paths:
        with Checkpoint(path) as one:
            assert one.verify() == []
            rounds = {tuple(sorted(record.rounds.items())) for record in one.records}
            assert len(rounds) == 1, "some keys are further than others"
            counts = dict(rounds.pop())
            updates = min(counts.values()) if model == "sequential" else sum(counts.values())
            per_update = 3 if model == "sequential" else 1  # pushes of one worker, or the sum of three
            value = momentum = np.float32(0)
            for _ in range(updates):
                momentum = np.float32(0.5) * momentum - np.float32(per_update)
                value = value - momentum
            for record in one.records:
                assert (record.version, record.step) == (updates, updates)
                assert set(one.array(record.key)) == {value}, (record.key, updates)
                (state,) = record.states
                assert set(one.array(record.key, state)) == {momentum}
            if model == "sequential":
                assert len(set(counts.values())) == 1
            seen.append(updates)
    assert seen == sorted(seen) and seen[-1] > 0
    assert len({float(value[0]) for value in snapshots[0].values()}) == 1


@pytest.mark.parametrize("how", ["load after init", "load before init", "servers that restore"])
@pytest.mark.parametrize("servers", [1, 4])
def test_it_restores_onto_other_numbers_of_servers_and_workers(tmp_path, servers, how):
    keys = keys_of(4)
    values_of = {key: np.arange(items, dtype=np.float32) / items for key, items in keys.items()}
    values_of["half"] = np.arange(7).astype(ml_dtypes.bfloat16)
    rule = optim.Adam(lr=optim.schedules.Step(0.1, size=2))

    def first(kv):
        kv.set_optimizer(rule)
        for key, value in values_of.items():
            kv.init(key, value)
        kv.init("never pushed", np.ones(3, np.float32))
        for step in range(3):
            for key, value in values_of.items():
                kv.push(key, (value * (step + 1 + kv.rank)).astype(value.dtype))
        path = kv.save_checkpoint(tmp_path).result()
        more = {}
        for key, value in values_of.items():  # what comes after, to be repeated from the checkpoint
            more[key] = kv.pushpull(key, value, np.empty_like(value)).result()
        more["never pushed"] = kv.pushpull("never pushed", np.ones(3, np.float32)).result()
        return path, more

    with cluster(3, 3) as running:
        (path, after), *others = running.run(first)
    assert [one[0] for one in others] == [None, None]

    def second(kv):
        if how != "load before init":
            kv.set_optimizer(rule)
            for key, value in values_of.items():
                kv.init(key, np.full_like(value, 77))
            kv.init("never pushed", np.zeros(3, np.float32))
        if how != "servers that restore":
            assert kv.load_checkpoint(tmp_path) == path
        pull = kv.pull("big")
        pull.result()
        assert pull.version == 3
        again = {}
        for key, value in values_of.items():
            merged = value.copy() if kv.rank else np.zeros_like(value)  # the sum of three, by two workers
            for _ in range(2 if kv.rank else 0):
                merged = merged + value
            again[key] = kv.pushpull(key, merged, np.empty_like(value)).result()
        ones = np.full(3, 3 if kv.rank else 0, np.float32)
        again["never pushed"] = kv.pushpull("never pushed", ones).result()
        return again

    restore = path if how == "servers that restore" else None
    with cluster(2, servers, restore) as running:
        for again in running.run(second):
            for key in again:
                np.testing.assert_allclose(
                    again[key].astype(np.float32), after[key].astype(np.float32), rtol=1e-6, err_msg=key
                )
    with cluster(1, servers, path) as running:
        saved = running.run(lambda kv: (kv.load_checkpoint(path), kv.save_checkpoint(tmp_path / "again").result())[1])[
            0
        ]
    before, now = Checkpoint(path), Checkpoint(saved)
    assert before.optimizer == now.optimizer == rule.to_wire()
    for record in before.records:
        same = now.manifest.keys[record.key].record
        assert (same.version, same.step, same.states) == (record.version, record.step, record.states)
        for name in record.arrays:
            assert before.array(record.key, name).tobytes() == now.array(record.key, name).tobytes()


def test_a_flipped_byte_is_refused_by_load_and_by_servers(tmp_path):
    with cluster(1, 1) as running:
        (path,) = running.run(
            lambda kv: (kv.init("w", np.ones(5, np.float32)), kv.save_checkpoint(tmp_path).result())[1:]
        )[0]
    file = path / "values-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)

    def load(kv):
        with pytest.raises(errors.CheckpointError, match=r"values-00001\.safetensors: tensor 'w' is damaged"):
            kv.load_checkpoint(tmp_path)

    def init(kv):
        with pytest.raises(errors.CheckpointError, match=r"values-00001\.safetensors: tensor 'w' is damaged"):
            kv.init("w", np.ones(5, np.float32))

    with cluster(1, 1) as running:
        running.run(load)
    with cluster(1, 1, path) as running:
        running.run(init)


def test_a_worker_that_passes_no_cut_point_is_named_and_training_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("kvstore.protocol.cutting.HOLD_S", 0.5)
    gone_on = threading.Event()

    def work(kv):
        kv.init("w", np.zeros(2, np.float32), cluster_consistency="eventual")
        kv.barrier()
        if kv.rank == 0:
            handle = kv.save_checkpoint(tmp_path, wait=False)
            while not handle.done():  # the first cut points may come before it is known here that a cut is wanted
                kv.cut_point()
                kv.push("w", np.ones(2, np.float32)).result()
            with pytest.raises(errors.CheckpointError, match=r"waits for workers 1 \(last heard .* cut point"):
                handle.result()
            gone_on.set()
        else:
            assert gone_on.wait(40)
        kv.barrier()
        return kv.pull("w").result()[0]

    with cluster(2, 1) as running:
        assert running.run(work) == [1.0, 1.0]
    assert list(tmp_path.iterdir()) == []


def test_a_cut_that_nobody_marks_ends_with_the_deadline_and_says_why(tmp_path):
    def work(kv):
        kv.init("w", np.zeros(2, np.float32))
        for handle in (kv.save_checkpoint(tmp_path, wait=False), kv.snapshot(wait=False)):
            with pytest.raises(errors.DeadlineError, match=r"waits for workers 0 \(last heard .* cut point"):
                handle.result()
        kv.push("w", np.ones(2, np.float32)).result()

    with cluster(1, 2) as running:
        running.run(work, timeout=1.0)


def test_who_leaves_or_is_lost_is_not_waited_for(tmp_path):
    left = threading.Event()

    def work(kv):
        kv.init("w", np.zeros(2, np.float32), cluster_consistency="eventual")
        kv.barrier()
        if kv.rank == 1:
            kv.push("w", np.full(2, 5, np.float32)).result()
            kv.close()
            left.set()
            return None
        assert left.wait(40)
        handle = kv.save_checkpoint(tmp_path, wait=False)
        kv.cut_point()
        return handle.result()

    with cluster(2, 2) as running:
        path, _ = running.run(work)
    assert set(Checkpoint(path).array("w")) == {5.0}


def test_close_waits_for_the_checkpoint_that_was_asked_for(tmp_path):
    def work(kv):
        kv.init("w", np.ones(2, np.float32))
        kv.save_checkpoint(tmp_path, wait=False)

    with cluster(1, 2) as running:
        running.run(work)
    assert set(Checkpoint(tmp_path).array("w")) == {1.0}


def test_trainers_steps_are_cut_points(tmp_path):
    def work(kv):
        weights = {"a": np.zeros(3, np.float32), "b": np.zeros((2, 2), np.float32)}
        trainer = kvstore.Trainer(weights, optim.SGD(lr=1.0), kv)
        handle = kv.save_checkpoint(tmp_path, wait=False) if kv.rank == 1 else None
        for _ in range(6):
            trainer.step({key: np.full_like(value, -1) for key, value in weights.items()})
        kv.barrier()
        return None if handle is None else handle.result()

    with cluster(2, 2) as running:
        _, path = running.run(work)
    with Checkpoint(path) as one:
        assert len({float(value.flat[0]) for value in values(one).values()}) == 1
        assert 1 <= one.at <= 7


@pytest.mark.parametrize("protected", [False, True], ids=["open", "protected"])
def test_periodic_checkpoints_by_a_server(tmp_path, tmp_path_factory, protected):
    keys, enough = keys_of(3), threading.Event()
    place = None
    if protected:
        place = tmp_path_factory.mktemp("cluster") / "keys"
        key_files.make_cluster(place)
    with cluster(2, 2, keys=place) as running:
        periodic = Periodic(running.address, tmp_path, 0.05, 2, network(place))
        periodic.start()

        def watch():
            end = time.monotonic() + 40
            while time.monotonic() < end:
                found = [path.name for path in tmp_path.glob("checkpoint-*")]
                if any(name >= "checkpoint-000000000004" for name in found):
                    break
                time.sleep(0.01)
            enough.set()

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            running.run(training(3, keys, enough), keys=None if place is None else place / key_files.DEFAULT_CLIENT)
        finally:
            periodic.stop()
            watcher.join()
    names = [path.name for path in sorted(tmp_path.glob("checkpoint-*"))]
    assert 1 <= len(names) <= 2 and names[-1] >= "checkpoint-000000000004"
    with Checkpoint(tmp_path) as one:
        assert one.verify() == [] and len({tuple(record.rounds.items()) for record in one.records}) == 1


# --- workers that come later --------------------------------------------------------------------------


def test_cuts_under_load_while_a_worker_joins(tmp_path):
    """Every update adds 12 to every value, whoever is there: so all values of a cut are alike, or it is none."""
    keys = {f"k{i}": size for i, size in enumerate((1, 5, 700_000))}
    frozen = "a part of the model that is not trained"
    over, joined = threading.Event(), threading.Event()

    def train(kv: kvstore.KVStore, look=lambda: None) -> list[int]:
        weights = {key: np.zeros(size) for key, size in keys.items()}
        kv.init(frozen, np.zeros(4))
        trainer = kvstore.Trainer(weights, optim.SGD(lr=1.0), kv)
        steps = []
        while not over.is_set():
            trainer.step({key: np.full(size, -6.0) for key, size in keys.items()}, samples=6)
            assert all(abs(weights[key][0] - 12 * trainer.steps) < 1e-6 for key in keys)
            steps.append(trainer.steps)
            if trainer.steps % 5 == 4:
                kv.cut_point()  # by no means one for each step
            look()
        kv.leave()
        return steps

    def work(kv: kvstore.KVStore) -> list[int]:
        if kv.rank == 0:
            asker = threading.Thread(target=ask, args=(kv,), name="test-asker")
            asker.start()
        steps = train(kv)
        if kv.rank == 0:
            asker.join()
        return steps

    versions: list[int] = []
    failures: list[BaseException] = []

    def ask(kv: kvstore.KVStore) -> None:
        try:
            for _ in range(4):
                values = kv.snapshot(wait=False).result(20)
                assert not values.pop(frozen).any()
                (each,) = {round(float(values[key][0]), 6) for key in keys}
                assert all(np.allclose(value, each) for value in values.values())
                versions.append(round(each / 12))
                joined.wait(20) if len(versions) == 2 else None
            checkpoint = Checkpoint(kv.save_checkpoint(tmp_path, wait=False).result(20))
            (version,) = {record.version for record in checkpoint.records if record.key != frozen}
            versions.append(version)
        except BaseException as error:
            failures.append(error)
        finally:
            over.set()

    def late(address: str) -> list[int]:
        with kvstore.create("dist", address=address, timeout=40, samples_per_round=12) as kv:
            return train(kv, joined.set)

    with cluster(2, 3) as running, ThreadPoolExecutor(2) as pool:
        first = pool.submit(running.run, work, timeout=40, samples_per_round=12)
        while len(versions) < 2 and not failures:
            time.sleep(0.01)
        newcomer = pool.submit(late, running.address)
        steps = [*first.result(60), newcomer.result(60)]
    assert not failures, failures
    assert versions == sorted(versions) and versions[-1] >= steps[2][0]
    assert steps[2][0] > 1  # it came later, and its steps are numbered as those of the others
    assert abs(steps[2][-1] - steps[0][-1]) <= 1


def test_a_checkpoint_of_all_right_after_one_has_joined(tmp_path):
    both = threading.Barrier(3, timeout=30)

    def work(kv: kvstore.KVStore) -> str | None:
        kv.init(["a", "b", "0: never pushed"], [np.zeros(3)] * 3)
        for _ in range(3):
            kv.pushpull(["a", "b"], [np.ones(3), np.ones(3)]).result()
            kv.cut_point()
        both.wait()  # it comes
        both.wait()  # it is there
        return kv.save_checkpoint(tmp_path).result(20)

    def late(address: str) -> None:
        both.wait()
        with kvstore.create("dist", address=address, timeout=40) as kv:
            kv.init(["a", "b", "0: never pushed"], [np.zeros(3)] * 3)
            both.wait()
            kv.save_checkpoint(tmp_path).result(20)

    with cluster(2, 2) as running, ThreadPoolExecutor(2) as pool:
        first, newcomer = pool.submit(running.run, work, timeout=40), pool.submit(late, running.address)
        newcomer.result(60)
        (path,) = {path for path in first.result(60) if path}
    assert [record.version for record in Checkpoint(path).records] == [0, 3, 3]
