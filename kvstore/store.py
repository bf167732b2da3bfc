"""The store that users hold: all of its methods, and what they check of the store itself.

What a push or a pull consists of is decided by :mod:`kvstore.operations`, whether keys and arrays are right by
:mod:`kvstore.entries`, and where the values are by the home.
"""

from __future__ import annotations

import atexit
import math
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import numpy as np

import engine
from kvstore import comm, consistency, plain, states
from kvstore.arrays import Array, callers, flat, memory_of
from kvstore.checkpoint.loading import load
from kvstore.checkpoint.reading import Checkpoint
from kvstore.checkpoint.saving import Saving, checked_keep
from kvstore.consistency import Model
from kvstore.devices import Entry
from kvstore.entries import IN_PLACE, Entries, Keys, as_many
from kvstore.errors import (
    ClosedError,
    DeadlineError,
    DtypeError,
    DuplicateKeyError,
    KVStoreError,
    OptimizerError,
    OptionError,
)
from kvstore.handle import Handle
from kvstore.home import Home, Updater
from kvstore.kernels import HALVES
from kvstore.local import LocalHome
from kvstore.operations import Operations
from kvstore.optim import Optimizer
from kvstore.protocol.messages import SAMPLES_MAX, Spec
from kvstore.protocol.pieces import Cut, Key
from kvstore.protocol.sampling import check_model

_stores: weakref.WeakSet[KVStore] = weakref.WeakSet()


class KVStore:
    """A store of values by key, kept in step across devices and, in a cluster, workers.

    Made by :func:`kvstore.create`. All methods are thread-safe. Every method takes one key with
    its value, or a list of keys with a list of values (:meth:`staging` and :meth:`view`: one); a list call
    is checked whole before anything is sent. A value is one array, or a list with one array per device.
    """

    def __init__(
        self,
        type: str,
        home: Home,
        runtime: engine.Engine,
        *,
        devices: int | None,
        device_model: Model,
        cluster_model: Model,
        timeout: float,
        samples_per_round: int | None = None,
        device_merge: str = comm.AUTO,
    ) -> None:
        self.type = type
        self.samples_per_round = samples_per_round
        self._home = home
        self._engine = runtime
        self._device_model = device_model
        self._cluster_model = cluster_model
        self._entries = Entries(runtime, devices)
        self._operations = Operations(home, runtime, self._entries, timeout, device_merge)
        self._initialising: set[Key] = set()
        self._optimizer: Optimizer | None = None
        self._saving = Saving()
        self._lock = threading.RLock()
        self._closed = False
        self._has_left = False
        self._pid = os.getpid()
        _stores.add(self)

    def __repr__(self) -> str:
        state, devices = "closed, " if self._closed else "", self._entries.devices or "?"
        levels = f"{self._device_model}/{self._cluster_model}" if self._in_cluster else f"{self._device_model}"
        return (
            f"<KVStore {self.type}: {state}rank {self.rank} of {self.num_workers}, devices {devices} "
            f"({self._entries.memories}), {levels}, {len(self._entries)} keys>"
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self!r} cannot be copied or pickled: every process creates its own store")

    # --- what it is ---------------------------------------------------------------------------

    @property
    def timeout(self) -> float:
        """Seconds that a wait may take when the call does not say."""
        return self._operations.timeout_s

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        self._operations.timeout_s = seconds

    @property
    def rank(self) -> int:
        """This worker's number, from 0."""
        return self._home.rank

    @property
    def num_workers(self) -> int:
        """How many workers take part now; it changes as they join, leave or are lost. 1 without a cluster."""
        return len(self._home.workers)

    @property
    def num_devices(self) -> int:
        """Devices of this worker; 1 as long as neither ``create`` nor a push has said."""
        return self._entries.num_devices

    @property
    def _in_cluster(self) -> bool:
        return not isinstance(self._home, LocalHome)

    def dead_workers(self) -> list[int]:
        """Ranks of the workers that are lost (not of those that left)."""
        return self._home.dead_workers()

    # --- init ---------------------------------------------------------------------------------

    def init(
        self,
        key: Keys,
        value: Any,
        *,
        device_consistency: str | Model | None = None,
        cluster_consistency: str | Model | None = None,
        participants: Sequence[int] | None = None,
    ) -> None:
        """Create keys. Every worker calls it; rank 0's value counts. Returns when they exist.

        Args:
            key: one key or a list.
            value: an array (any shape), or a list with one per key. It may be overwritten afterwards.
            device_consistency, cluster_consistency: other models for these keys than the store's.
            participants: ranks of the workers that push these keys; None: all. Others may pull.

        Raises:
            DuplicateKeyError: a key that this store has initialised, or twice in the call.
            DtypeError, KeyKindError, OptionError: as named.
            DisagreementError: the workers describe the key differently; nothing changes.
            DeadlineError: rank 0's init did not come within the store's timeout.
        """
        self._check_open()
        device_model = self._model(device_consistency, self._device_model)
        cluster_model = self._model(cluster_consistency, self._cluster_model)
        ranks = None if participants is None else self._ranks(participants)
        with callers(value):
            self._init(self._checked(key), key, value, device_model, cluster_model, ranks)

    def _init(
        self,
        keys: list[Key],
        key: Keys,
        value: Any,
        device_model: Model,
        cluster_model: Model,
        ranks: tuple[int, ...] | None,
    ) -> None:
        values = [value] if not isinstance(key, list | tuple) else as_many(keys, value, "values")
        arrays = [self._entries.array(v, f"init of key {k!r}") for k, v in zip(keys, values, strict=True)]
        if len(set(keys)) != len(keys):
            twice = next(k for k in keys if keys.count(k) > 1)
            raise DuplicateKeyError(
                f"init of key {twice!r}: expected each key once, it comes {keys.count(twice)} times"
            )
        for k, array in zip(keys, arrays, strict=True):
            if self._optimizer is not None:
                self._optimizer.check_dtype(array.dtype)
            self._check_samples_fit(k, array.dtype, device_model, cluster_model)
        if self._engine.uses_arrays():
            for array in arrays:
                self._engine.wait(array, timeout=self._limit(None))
        with self._being_initialised(keys):
            whole = self._optimizer is not None and self._optimizer.whole_tensor
            waiting = []
            for k, array in zip(keys, arrays, strict=True):
                cut = Cut.of(array.size, array.dtype.itemsize, shards=self._home.shards, whole=whole)
                spec = Spec(
                    array.shape, array.dtype.name, cut.piece_items, str(device_model), str(cluster_model), ranks,
                    self.samples_per_round,
                )  # fmt: skip
                waiting.append(self._home.init(k, spec, flat(array)))
            first_error: KVStoreError | None = None
            for k, array, created in zip(keys, arrays, waiting, strict=True):
                try:
                    self._created(k, created)
                except KVStoreError as error:
                    first_error = first_error or error
                    continue
                entry = Entry(k, array.shape, array.dtype, device_model, memory=memory_of(array))
                self._entries.add(entry)
            if first_error is not None:
                raise first_error

    def _check_samples_fit(self, key: Key, dtype: np.dtype[Any], device_model: Model, cluster_model: Model) -> None:
        """With samples_per_round: can the key's sums be multiplied, and is there one for each round?"""
        if self.samples_per_round is None:
            return
        check_model(self.samples_per_round, device_model, f"init of key {key!r}, device level")
        check_model(self.samples_per_round, cluster_model, f"init of key {key!r}, cluster level")
        if not (np.issubdtype(dtype, np.inexact) or dtype in HALVES):
            raise DtypeError(
                f"init of key {key!r}: expected a floating-point dtype, as sums are multiplied with samples_per_round; "
                f"got {dtype.name}"
            )

    @contextmanager
    def _being_initialised(self, keys: list[Key]) -> Iterator[None]:
        """Nobody else initialises these keys meanwhile, nor has done so."""
        with self._lock:
            for key in keys:
                if key in self._entries or key in self._initialising:
                    raise DuplicateKeyError(f"init of key {key!r}: expected a new key, this store has initialised it")
            self._initialising.update(keys)
        try:
            yield
        finally:
            with self._lock:
                self._initialising.difference_update(keys)

    def _created(self, key: Key, created: Future[Any]) -> None:
        """Wait until the home has the key."""
        try:
            created.result(self._limit(None))
        except TimeoutError as error:
            if created.done():
                raise
            raise DeadlineError(
                f"init of key {key!r}: not done after {self.timeout:g} s; {self._home.explain(key)}"
            ) from error

    def broadcast(self, key: Keys, value: Any, out: Any = None, priority: int = 0) -> Handle:
        """``init`` with rank 0's value, then ``pull`` it; once per key.

        Returns:
            A handle like that of :meth:`pull`; ``out`` defaults to a new array.
        """
        priority, many = _priority(priority), isinstance(key, list | tuple)
        values = as_many(self._checked(key), value, "values") if many else [value]
        firsts = [v[0] if isinstance(v, list) and v else v for v in values]
        self.init(key, firsts if many else firsts[0])
        return self.pull(key, out, priority)

    # --- push and pull ------------------------------------------------------------------------

    def push(
        self, key: Keys, value: Any, priority: int = 0, *, device: int | None = None, samples: int | None = None
    ) -> Handle:
        """Push gradients (or values). They have been read when this returns.

        Args:
            key: one key or a list; a key twice in one call is one push of the sum.
            value: an array, or a list with one per device; for a list of keys a list of those.
            priority: larger goes sooner; never reorders one key.
            device: this is one device's own push.
            samples: how many samples these arrays are the sum over, those of all devices together; needed in a store
                with ``samples_per_round``. 0 if this worker has none for this round.

        Returns:
            A handle that is done when the push is committed: merged and applied. Its result is None.

        Raises:
            UnknownKeyError, ShapeError, DtypeError, DeviceCountError: before anything is sent.
        """
        self._check_open()
        self._check_takes_part("push")
        samples = self._samples(samples, "push")
        start = self._operations.many if isinstance(key, list | tuple) else self._operations.one
        return start("push", key, value, None, _priority(priority), device, samples)

    def pull(self, key: Keys, out: Any = None, priority: int = 0, *, device: int | None = None) -> Handle:
        """Read values.

        Args:
            key: one key or a list.
            out: an array, or a list with one per device (of one key); None makes a new array;
                ``kvstore.IN_PLACE``: nothing is copied, the result is :meth:`view` of the key.
            device: this is one device's own pull, answered under the device level's rule for it.

        Returns:
            A handle whose result is ``out`` (or the new array; a list for a list of keys).

        Raises:
            UnknownKeyError, ShapeError, DtypeError, DeviceCountError, ReadOnlyError: at once.
        """
        self._check_open()
        start = self._operations.many if isinstance(key, list | tuple) else self._operations.one
        return start("pull", key, None, out, _priority(priority), device)

    def pushpull(
        self,
        key: Keys,
        value: Any,
        out: Any = None,
        priority: int = 0,
        *,
        device: int | None = None,
        samples: int | None = None,
    ) -> Handle:
        """A push and the pull right after it, as one exchange where possible.

        Args:
            out: as in :meth:`pull`; it defaults to ``value``, in place. An immutable value is answered
                with a new array, what :meth:`staging` gave with :meth:`view`. A value that is also out
                belongs to the store until the handle is done.
            samples: as in :meth:`push`.
        """
        self._check_open()
        self._check_takes_part("pushpull")
        samples = self._samples(samples, "pushpull")
        start = self._operations.many if isinstance(key, list | tuple) else self._operations.one
        return start("pushpull", key, value, out, _priority(priority), device, samples)

    # --- memory of the store's own ----------------------------------------------------------------

    def staging(self, key: Key, timeout: float | None = None) -> Array:
        """An array in the store's own memory: fill it, push it alone, and nothing is copied.

        With a server on this host it lies in memory that the server reads. It belongs to the store from
        its push until that push's handle is done. There are two per key, so that one can be filled
        while the other is on its way; until it is pushed, it is always the same one.

        Returns:
            An array of the key's shape and dtype; its content is arbitrary.

        Raises:
            UnknownKeyError, KeyKindError: as named.
            DeadlineError: both were on their way for ``timeout`` seconds (None: the store's).
        """
        entry = self._one(key, "staging")
        array = self._home.staging(entry.key, self._limit(timeout))
        with entry.alone():  # and so it stays as long as the caller has memory of its own
            if not any(array is lent for lent in entry.lent):
                entry.lent.append(array)
        return array

    def view(self, key: Key) -> Array:
        """The last value pulled, where it lies: with a server on this host in the server's memory.

        It costs nothing after a pull with ``out=kvstore.IN_PLACE`` or a pushpull of what :meth:`staging` gave;
        after another the value is pulled once more, now. It stays valid until the key is next pulled in place.

        Returns:
            A read-only array of the key's shape and dtype.

        Raises:
            UnknownKeyError, KeyKindError, DeadlineError: as named.
        """
        entry = self._one(key, "view")
        with entry.lock:
            held = entry.view if entry.view_is_latest else None
        if held is not None:
            return held.array
        array: Array = self.pull(key, out=IN_PLACE).result()
        return array

    # --- checks -------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"{self.type} store: it is closed")
        if self._pid != os.getpid():
            raise ClosedError(
                f"{self.type} store: it belongs to process {self._pid}, not to this forked one; create another"
            )

    def _check_takes_part(self, what: str) -> None:
        if self._has_left:
            raise ClosedError(f"{what}: this worker has left the rounds by leave(); it may still pull")

    def _ranks(self, participants: Sequence[int]) -> tuple[int, ...]:
        given = list(participants) if isinstance(participants, Iterable) else [None]
        ranks = {plain.whole(one) for one in given}
        if not ranks or not ranks <= set(self._home.workers):
            raise OptionError(
                f"participants: expected a list of ranks among {list(self._home.workers)}, got {participants!r}"
            )
        return tuple(sorted(rank for rank in ranks if rank is not None))

    def _samples(self, samples: int | None, what: str) -> int | None:
        """How many samples a push says that it holds, checked."""
        per_round = self.samples_per_round
        if per_round is None:
            if samples is not None:
                raise OptionError(
                    f"{what}: expected no samples, which are for stores with samples_per_round; got {samples!r}"
                )
            return None
        number = plain.whole(samples)
        if number is None or not 0 <= number <= SAMPLES_MAX:
            raise OptionError(
                f"{what}: expected samples, a whole number 0..{SAMPLES_MAX}, as this store has samples_per_round="
                f"{per_round}; got {samples!r}"
            )
        return number

    def _checked(self, key: Keys) -> list[Key]:
        self._check_open()
        return self._entries.checked(key)

    def _one(self, key: Key, what: str) -> Entry:
        self._check_open()
        return self._entries.one(key, what)

    def _model(self, chosen: str | Model | None, default: Model) -> Model:
        return default if chosen is None else consistency.parse(chosen)

    # --- optimizer ----------------------------------------------------------------------------

    def set_optimizer(self, optimizer: Optimizer, replace: bool = False) -> None:
        """From here on a push updates the value by ``optimizer`` instead of replacing it.

        Every worker calls it; it precedes the caller's later pushes on every server. The first call
        takes effect, an equal one changes nothing.

        Raises:
            OptimizerError: another optimizer is set already and ``replace`` is not given.
            DtypeError: a key has a dtype that it cannot update.
        """
        self._check_open()
        if not isinstance(optimizer, Optimizer):
            raise OptimizerError(f"set_optimizer: expected one of kvstore.optim, got {type(optimizer).__name__}")
        for entry in self._entries.now():
            optimizer.check_dtype(entry.dtype)
        if optimizer.whole_tensor:
            self._place_whole()
        self._home.set_optimizer(optimizer, replace, self._limit(None))
        self._optimizer = optimizer

    def _place_whole(self) -> None:
        """An optimizer that needs the norm of the whole tensor needs its keys uncut, and each by itself."""
        if isinstance(self._home, LocalHome):
            self._take_apart(self._home)
            return
        cut_keys: Callable[[], list[Key]] | None = getattr(self._home, "cut_keys", None)
        for key in cut_keys() if cut_keys is not None else []:
            value = self.pull(key).result()
            self._home.place_whole(key, value.reshape(-1), self._limit(None))  # type: ignore[attr-defined]
            if self._entries.devices is not None:
                self._entries[key].count(self._entries.devices)

    def set_updater(self, updater: Updater) -> None:
        """``updater(key, merged, stored)`` changes ``stored`` in place for every push, instead of an optimizer.

        Local stores only. It runs on an engine thread, keeps neither array, and its return value is ignored.

        Raises:
            OptimizerError: not a function; or in a cluster, where no code travels.
        """
        self._check_open()
        if not isinstance(self._home, LocalHome):
            raise OptimizerError("set_updater: expected a local store; in a cluster no code travels, use set_optimizer")
        if not callable(updater):
            raise OptimizerError(f"set_updater: expected a function, got {type(updater).__name__}")
        self._take_apart(self._home)
        self._home.set_updater(updater)
        self._optimizer = None

    def _take_apart(self, home: LocalHome) -> None:
        """From here on each key is moved by itself."""
        home.stop_bundling()
        for entry in self._entries.now():
            with entry.alone(blamed=False):
                pass

    def set_hyperparameters(self, **changes: Any) -> None:
        """Change numbers of the optimizer, live: for each key from the caller's next round on.

        Raises:
            OptimizerError: no optimizer is set, an unknown name or a value out of range.
        """
        self._check_open()
        if self._optimizer is None:
            raise OptimizerError("set_hyperparameters: expected an optimizer, this store has set none")
        changed = self._optimizer.with_hyperparameters(**changes)
        described = changed.to_wire()
        self._home.set_hyperparameters({name: described[name] for name in changes}, self._limit(None))
        self._optimizer = changed

    def save_optimizer_states(self, path: str | os.PathLike[str]) -> None:
        """Write the optimizer's state of every key to a safetensors file, atomically."""
        self._check_open()
        self.wait_for_commits()
        limit = self._limit(None)
        state = {entry.key: self._home.read_state(entry.key, limit) for entry in self._entries.now()}
        states.save(path, state)

    def load_optimizer_states(self, path: str | os.PathLike[str]) -> None:
        """Read what :meth:`save_optimizer_states` wrote; one worker calls it, between two barriers.

        Raises:
            OptimizerError: not such a file, or of other keys than this store's.
        """
        self._check_open()
        self.wait_for_commits()
        loaded = states.load(path)
        unknown = sorted(map(repr, set(loaded) - set(self._entries)))
        if unknown:
            raise OptimizerError(f"optimizer states: expected keys of this store, got {', '.join(unknown[:5])}")
        for key, (step, state) in loaded.items():
            items = math.prod(self._entries[key].shape)
            if any(array.size != items for array in state.values()):
                raise OptimizerError(f"optimizer state of key {key!r}: expected {items} elements per array")
            # In a cluster bundles stay: the servers take them apart for it.
            with nullcontext() if self._in_cluster else self._entries[key].alone(blamed=False):
                self._home.write_state(key, step, state, self._limit(None))

    # --- checkpoints ----------------------------------------------------------------------------

    def cut_point(self) -> None:
        """A point of the program at which checkpoints can be taken: pushes before it belong to them, later ones do not.

        The end of :meth:`Trainer.step` and :meth:`barrier` are cut points too. Every worker passes the same ones.
        It costs nothing, unless a checkpoint has just been asked for.
        """
        self._check_open()
        self._home.cut_point()

    def save_checkpoint(self, path: str | os.PathLike[str], *, keep: int | None = None, wait: bool = True) -> Handle:
        """Write all keys of all servers, as they are at one cut point, to a directory of checkpoints.

        Args:
            path: the directory; a new checkpoint in it gets the name that sorts last.
            keep: how many of the checkpoints there are kept, the new one included; None: all.
            wait: every worker calls this, as it calls :meth:`barrier`; it is a cut point, and returns when the
                checkpoint is whole. False: one worker calls it and goes on training; the checkpoint is taken at
                a cut point to come and written in the background.

        Returns:
            A handle whose result is the path of the checkpoint at the worker that writes it (the smallest rank
            that is here, or the caller if it does not wait), None at the others.

        Raises:
            CheckpointError: it cannot be written, or a worker has not reached its cut point; by the handle if
                ``wait`` is False.
        """
        self._check_open()
        keep, limit = checked_keep(keep), self._limit(None)
        if wait and not self._home.writes_checkpoints:
            handle = Handle("checkpoint", self.timeout)
            handle.finish(None)
        else:
            handle = self._saving.save(path, keep, self._home.ask_cut(limit), limit)
        return self._saved(handle) if wait else handle

    def snapshot(self, *, wait: bool = True) -> Handle:
        """The values of all keys at one cut point, as a checkpoint has them.

        Args:
            wait: as in :meth:`save_checkpoint`.

        Returns:
            A handle whose result is a dict with a new array by key.
        """
        self._check_open()
        limit = self._limit(None)
        handle = self._saving.snapshot(self._home.ask_cut(limit), limit)
        return self._saved(handle) if wait else handle

    def load_checkpoint(self, path: str | os.PathLike[str]) -> Path:
        """Become what a checkpoint has: values, optimizer, its states, versions. Every worker calls it.

        Args:
            path: a checkpoint, or a directory of checkpoints, whose newest is meant. Every worker must be able to
                read it. Keys that this store has not initialised are, with what the checkpoint says of them.

        Returns:
            The path of the checkpoint.

        Raises:
            CheckpointError: there is none, it is damaged (says which file and tensor), or lacks a key of this store.
            ShapeError, DtypeError: a key is different here.
        """
        self._check_open()
        self.wait_for_commits()
        return load(self, path)

    def _saved(self, handle: Handle) -> Handle:
        """Meet the others at this cut point, and again when what they asked for is there."""
        try:
            self.barrier()
            handle.result()
        finally:
            self._home.meet(self._limit(None))
        return handle

    def _take(self, checkpoint: Checkpoint) -> None:
        """All keys become what the checkpoint has; one worker brings it to the servers."""
        limit = self._limit(None)
        for record in checkpoint.records:
            entry = self._entries[record.key]
            with entry.alone(blamed=False):
                entry.view_is_latest = False
                if self._home.writes_checkpoints:
                    value, state = checkpoint.array(record.key), checkpoint.state(record.key)
                    self._home.restore(record.key, value, record.version, record.step, state, limit)

    # --- waiting and leaving --------------------------------------------------------------------

    def _limit(self, timeout: float | None) -> float:
        """The seconds that a wait may take, for ever included."""
        return min(self.timeout if timeout is None else timeout, threading.TIMEOUT_MAX)

    def wait_for_commits(self, timeout: float | None = None) -> None:
        """Wait until every push of this store so far is committed; raise the first error nobody has seen.

        Raises:
            DeadlineError: a push was not committed within ``timeout`` seconds; says why.
        """
        limit = self._limit(timeout)
        for push in self._operations.uncommitted:
            push.wait(limit)
        for entry in self._entries.now():
            self._entries.raise_unseen(entry)

    def barrier(self, timeout: float | None = None) -> None:
        """Wait for the commit of this worker's earlier pushes, then for every live worker.

        Raises:
            DeadlineError: naming the workers that did not come.
            KVStoreError: the error of an earlier operation that nobody looked at.
        """
        self._check_open()
        self.wait_for_commits(timeout)
        limit = self._limit(timeout)
        self._home.barrier(limit)

    def rounds(self, key: Key) -> int:
        """How often this worker has pushed the key, in its earlier lives too: where it goes on when it is back.

        Raises:
            UnknownKeyError, KeyKindError: as named.
        """
        return self._home.rounds(self._one(key, "rounds").key, self._limit(None))

    def leave(self, timeout: float | None = None) -> None:
        """Take part in no further round, because this worker has run out of batches for instance.

        Waits for the commit of this worker's pushes. Then the rounds and barriers of the others do not wait for it any
        more. It may still pull; its own barrier waits for the next one of the others. Leaving twice is fine.

        Raises:
            DeadlineError: a push was not committed, or nobody answered, within ``timeout`` seconds.
            KVStoreError: the error of an earlier operation that nobody looked at.
        """
        self._check_open()
        if self._has_left:
            return
        self._has_left = True
        self.wait_for_commits(timeout)
        self._home.leave(self._limit(timeout))

    def close(self) -> None:
        """Wait for commits, then leave the cluster. Closing twice is fine.

        Raises:
            KVStoreError: the error of an earlier operation that nobody looked at (the store is closed all the same).
        """
        if self._closed or self._pid != os.getpid():
            return
        try:
            self.wait_for_commits()
            self._home.last_cut_point()
            self._saving.wait(self._limit(None))
        except BaseException as error:
            committed = isinstance(error, KVStoreError) and not isinstance(error, DeadlineError)
            self._leave("" if committed else f"{type(error).__name__}: {error}")
            raise
        self._leave("")

    def _leave(self, reason: str) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        _stores.discard(self)
        try:
            self._home.close(reason, 5.0 if reason else self._limit(None))
        except KVStoreError:
            if not reason:
                raise
        finally:
            self._engine.release()

    def __enter__(self) -> KVStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._leave(f"worker {self.rank} failed: {type(error).__name__}: {error}")


def _priority(priority: int) -> int:
    number = plain.whole(priority)
    if number is None:
        raise OptionError(f"priority: expected a whole number, got {priority!r}")
    return number


@atexit.register
def _leave_all() -> None:
    """At interpreter exit stores leave without waiting."""
    for store in list(_stores):
        if store._pid == os.getpid():
            store._leave("its process ended without closing the store")
