"""List calls: the small keys among many that a store moves together, as one value.

What this file decides: which keys of a list form a bundle, when a bundle ends, and how the caller's arrays become the
bundle's value and back. Which keys can be moved together the home says (:meth:`kvstore.home.Home.bundle`).

At the device level a bundle's keys are in step: in every round every device pushes each of them once, and all of it
takes effect at once, whatever the model. So the rounds are counted once for all, and each key catches up when it
leaves.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np

import engine
from kvstore import comm
from kvstore.arrays import HOST, Array, memory_of
from kvstore.consistency import Sequential
from kvstore.delivery import Delivery, Target, let_go
from kvstore.devices import Entry, translated
from kvstore.handle import Ended, Handle
from kvstore.home import Gradient, Held, Home, HomeBundle, Reading, Source, settled
from kvstore.protocol.pieces import Key

PLANS_MAX = 64
TRIES = 8  # to make bundles for one list; after these only now and then

Arrays = Array | list[Array]  # of one key: an array, or one for each of several devices

_T = TypeVar("_T")


class EntryBundle:
    """Keys of one store that are moved together until one of them is pushed by itself."""

    def __init__(self, entries: Sequence[Entry], moved: HomeBundle, runtime: engine.Engine, way: str) -> None:
        self.entries = tuple(entries)
        self._begun = False
        self.rounds = 0  # that the entries have to catch up with
        self.lock = threading.RLock()  # held while a round is counted and handed over
        self._moved = moved
        self._engine = runtime
        self._way = way
        self._shapes = [entry.shape for entry in entries]
        self._plain = all(len(shape) == 1 for shape in self._shapes)
        sizes = [math.prod(shape) for shape in self._shapes]
        ends = accumulate(sizes)
        self._spans = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
        self._read: engine.ArrayGroup | None = None  # the arrays that were read last, if they are to be named
        self._written: engine.ArrayGroup | None = None  # those that were written last
        self._views: tuple[Array, list[Array]] | None = None  # of the value that was read last, by key

    def __repr__(self) -> str:
        return f"<EntryBundle of {len(self.entries)} keys: {self.rounds} rounds, {'alive' if self.alive else 'over'}>"

    @property
    def alive(self) -> bool:
        """Are its keys moved together?"""
        return self._begun and not self._moved.divided

    # --- beginning and end ------------------------------------------------------------------------

    def begin(self) -> None:
        """From here on its keys are moved together, if nobody has begun to move one of them by itself."""
        with ExitStack() as stack:
            for entry in self.entries:
                stack.enter_context(entry.lock)
            if all(map(_can_join, self.entries)) and self._moved.begin():
                self._begun = True
                for entry in self.entries:
                    entry.bundle = self

    def dissolve(self, blamed: Collection[Entry]) -> None:
        """From here on its keys are moved by themselves, because these are."""
        with self.lock:
            if not self._begun:
                return
            self._begun, blamed = False, set(blamed)
            self._read = self._written = self._views = None
            for entry in self.entries:
                with entry.lock:
                    entry.bundle = None
                    self._moved.let_go(entry.key, blamed=entry in blamed)
                    assert entry.level is not None  # or it could not have joined
                    entry.level.push_together(self.rounds)

    # --- moving it --------------------------------------------------------------------------------

    def push(self, arrays: list[Arrays], priority: int, ended: Ended, samples: int | None) -> Reading:
        """One round: ``arrays`` has for each key what the devices push, of so many samples."""
        self.rounds += 1
        return self._moved.push(self._gradient(arrays, priority, samples), ended)

    def pull(self, outs: list[Arrays], result: list[Any], priority: int, handle: Handle) -> None:
        """Copy every key's value to each of its ``outs``; then the handle's result is ``result``."""
        self._deliver(self._moved.pull(priority), outs, result, priority, handle)

    def pushpull(
        self,
        arrays: list[Arrays],
        ended: Ended,
        outs: list[Arrays],
        result: list[Any],
        priority: int,
        handle: Handle,
        samples: int | None,
    ) -> Reading:
        """A push and the pull right after it."""
        self.rounds += 1
        reading, source = self._moved.pushpull(self._gradient(arrays, priority, samples), ended)
        self._deliver(source, outs, result, priority, handle)
        return reading

    def explain(self) -> str:
        """What the open operations wait for."""
        return self._moved.explain()

    # --- arrays -----------------------------------------------------------------------------------

    def _gradient(self, arrays: list[Arrays], priority: int, samples: int | None) -> Gradient:
        memories = {HOST} if self._engine.devices is None else set(map(memory_of, _flat(arrays)))
        reads: list[Any] = []
        if memories != {HOST} or self._engine.uses_arrays():
            self._read = _group(self._read, arrays)
            reads.append(self._read)
        return _Concatenated(arrays, self._spans, priority, reads, samples, memories, self._way)

    def _parts(self, value: Array) -> list[Array]:
        """The keys' values within the bundle's."""
        known = self._views
        if known is None or known[0].ctypes.data != value.ctypes.data:
            parts = [value[span] for span in self._spans]
            if not self._plain:
                parts = [part.reshape(shape) for part, shape in zip(parts, self._shapes, strict=True)]
            known = self._views = value, parts
        return known[1]

    def _deliver(self, source: Source, outs: list[Arrays], result: list[Any], priority: int, handle: Handle) -> None:
        for entry in self.entries:
            if entry.view is not None:
                entry.view_is_latest = False

        def begin(delivery: Delivery) -> None:
            source.hold(lambda held: come(delivery, held))

        def come(delivery: Delivery, held: Held | BaseException) -> None:
            if isinstance(held, Held):
                handle.version = held.version
                handle.staleness = 0 if held.staleness is None else (0, held.staleness)
            delivery.write_held(held)

        def done(error: BaseException | None) -> None:
            handle.finish(result, translated(error, f"{len(self.entries)} keys, {self.entries[0].key!r} ..."))

        Delivery(self._engine, *self._targets(outs), priority, begin, done, lambda: source.hold(let_go))

    def _targets(self, outs: list[Arrays]) -> tuple[Target | None, Target | None]:
        """As :func:`kvstore.delivery.apart`, of the keys' arrays."""
        there = {HOST} if self._engine.devices is None else set(map(memory_of, _flat(outs)))
        if there == {HOST} or HOST not in there:
            self._written = _group(self._written, outs)
            target = self._target(outs, self._written)
            return (target, None) if HOST in there else (None, target)
        parts = [_those(outs, on_host) for on_host in (True, False)]
        on_host, on_devices = [self._target(some, engine.ArrayGroup(_flat(some))) for some in parts]
        return on_host, on_devices

    def _target(self, outs: list[Arrays], group: engine.ArrayGroup) -> Target:
        return Target([group], lambda value, start, large: self._copy(value, outs), is_cut=False)

    def _copy(self, value: Array, outs: list[Arrays]) -> None:
        """The bundle's value to the keys' arrays."""
        if self._engine.devices is None or comm.in_host_memory(value, *_flat(outs)):
            for part, out in zip(self._parts(value), outs, strict=True):
                for target in out if isinstance(out, list) else (out,):
                    np.copyto(target, part)
        else:
            comm.split(value, self._spans, [out if isinstance(out, list) else [out] for out in outs])


class _Concatenated(Gradient):
    """The sums of many small arrays, one after another."""

    def __init__(
        self,
        arrays: list[Arrays],
        spans: list[slice],
        priority: int,
        reads: list[Any],
        samples: int | None,
        memories: set[int],
        way: str,
    ) -> None:
        super().__init__([], priority, samples=samples, way=way)
        self._parts = arrays
        self._spans = spans
        self._reads = reads
        self._memories = memories

    @property
    def on_devices(self) -> bool:
        return self._memories != {HOST}

    @property
    def devices(self) -> set[int]:
        return self._memories - {HOST}

    @property
    def reads(self) -> list[Any]:
        return self._reads

    def summands(self) -> list[Array]:
        return [np.concatenate([array.reshape(-1) for array in arrays]) for arrays in _by_device(self._parts)]

    def write(self, out: Array) -> None:
        if self.on_devices:
            with self.near() as summands:
                comm.merge(summands, out)
        elif not isinstance(self._parts[0], list):
            np.concatenate([array.reshape(-1) for array in _flat(self._parts)], out=out)
        else:
            super().write(out)

    def near(self) -> AbstractContextManager[list[Array]]:
        return comm.packed(_by_device(self._parts), self.way)

    def settled(self, runtime: engine.Engine) -> Gradient:
        if HOST not in self._memories:
            return self
        parts: list[Arrays] = [
            [settled(array, runtime) for array in some] if isinstance(some, list) else settled(some, runtime)
            for some in self._parts
        ]
        return _Concatenated(parts, self._spans, self.priority, self._reads, self.samples, self._memories, self.way)


def _group(known: engine.ArrayGroup | None, arrays: list[Arrays]) -> engine.ArrayGroup:
    """The arrays as one thing to read or write; training loops pass the same ones in every round."""
    flat = _flat(arrays)
    if known is None or len(known.arrays) != len(flat) or any(map(_is_other, known.arrays, flat)):
        return engine.ArrayGroup(flat)
    return known


def _by_device(arrays: list[Arrays]) -> list[list[Array]]:
    """For each device its arrays, in the order of the keys."""
    if not isinstance(arrays[0], list):
        return [_flat(arrays)]
    return [list(some) for some in zip(*arrays, strict=True)]


def listed(arrays: Arrays) -> list[Array]:
    """Those of one key, of however many devices."""
    return arrays if isinstance(arrays, list) else [arrays]


def _flat(arrays: list[Arrays]) -> list[Array]:
    flat: list[Array] = []
    for some in arrays:
        if isinstance(some, list):
            flat += some
        else:
            flat.append(some)
    return flat


def _those(arrays: list[Arrays], on_host: bool) -> list[Arrays]:
    """For each key those of its arrays that lie in the memory of the host, or those that do not."""
    return [[array for array in listed(some) if (memory_of(array) == HOST) is on_host] for some in arrays]


def _is_other(one: object, other: object) -> bool:
    return one is not other


@dataclass(frozen=True, slots=True)
class Plan:
    """How the keys of one list are moved: which together, and which one by one; by their positions in the list."""

    entries: tuple[Entry, ...]
    bundles: list[tuple[EntryBundle, list[int]]]
    singles: list[int]

    @property
    def alive(self) -> bool:
        """Do all of its bundles still exist?"""
        return all(bundle.alive for bundle, _ in self.bundles)

    @property
    def is_latest(self) -> bool:
        """Is this how they are in bundles now?"""
        return self.alive and all(self.entries[position].bundle is None for position in self.singles)

    @contextmanager
    def held(self) -> Iterator[bool]:
        """With the locks of all its bundles: are they alive?"""
        with ExitStack() as stack:
            for bundle in sorted((bundle for bundle, _ in self.bundles), key=id):
                stack.enter_context(bundle.lock)
            yield self.alive


class Lists:
    """The plans for one store's list calls. Thread-safe."""

    def __init__(self, home: Home, runtime: engine.Engine, way: str) -> None:
        self._home = home
        self._engine = runtime
        self._way = way
        self._plans: dict[tuple[Key, ...], Plan] = {}
        self._tried: dict[tuple[Key, ...], int] = {}  # by list, how often since its bundles lasted
        self._making = threading.Lock()  # held while bundles are made
        self._lock = threading.Lock()  # held while plans are looked at

    def __repr__(self) -> str:
        return f"<Lists: {len(self._plans)} plans>"

    def known(self, keys: tuple[Key, ...], *, pushed: bool) -> Plan | None:
        """The plan for this list, if there is one that need not be made better by a push."""
        with self._lock:
            plan = self._plans.get(keys)
            if plan is None or not plan.is_latest:
                return None
            if pushed and len(plan.singles) > 1:
                return None if self._is_due(keys) else plan
            self._tried.pop(keys, None)  # its bundles have lasted
            return plan

    def for_pull(self, keys: tuple[Key, ...], entries: Sequence[Entry]) -> Plan | None:
        """A plan by the bundles that there are; None if it would be to move all keys one by one."""
        plan = _plan_of(entries)
        if not plan.bundles:
            return None
        with self._lock:
            _put(self._plans, keys, plan)
        return plan

    def for_push(self, keys: tuple[Key, ...], entries: Sequence[Entry], timeout_s: float) -> Plan | None:
        """A plan by the bundles that there are and those that can be made, with the servers' consent.

        Args:
            entries: of the keys; how many devices push them is known.
        """
        with self._making:
            for bundle, some in _bundles_of(entries).items():
                if not bundle.alive:
                    bundle.dissolve(())
                elif len(some) < len(bundle.entries):
                    bundle.dissolve([entries[position] for position in some])
            with self._lock:
                plan = self._plans.get(keys)
                due = self._is_due(keys) if plan is None or not plan.is_latest else True
            if due:
                alone = {entry.key: entry for entry in entries if _can_join(entry)}
                for made in self._home.bundle(list(alone), timeout_s):
                    EntryBundle([alone[key] for key in made.keys], made, self._engine, self._way).begin()
        return self.for_pull(keys, entries)

    def _is_due(self, keys: tuple[Key, ...]) -> bool:
        """Shall bundles be made for this list now? Not every time, if there are none to be had."""
        tried = self._tried.get(keys, 0) + 1
        _put(self._tried, keys, tried)
        return tried <= TRIES or tried & (tried - 1) == 0


def _bundles_of(entries: Sequence[Entry]) -> dict[EntryBundle, list[int]]:
    """The bundles that these are in, and at which positions."""
    positions: dict[EntryBundle, list[int]] = {}
    for position, entry in enumerate(entries):
        if isinstance(entry.bundle, EntryBundle):
            positions.setdefault(entry.bundle, []).append(position)
    return positions


def _plan_of(entries: Sequence[Entry]) -> Plan:
    """The plan by those bundles whose keys are all here."""
    bundles = []
    for bundle, some in _bundles_of(entries).items():
        if bundle.alive and len(some) == len(bundle.entries):
            place = {entries[position].key: position for position in some}
            bundles.append((bundle, [place[entry.key] for entry in bundle.entries]))
    together = {position for _, some in bundles for position in some}
    return Plan(tuple(entries), bundles, [p for p in range(len(entries)) if p not in together])


def _put(latest: dict[tuple[Key, ...], _T], keys: tuple[Key, ...], item: _T) -> None:
    """Keep it, but only for the lists that came last."""
    latest.pop(keys, None)
    while len(latest) >= PLANS_MAX:
        latest.pop(next(iter(latest)))
    latest[keys] = item


def _can_join(entry: Entry) -> bool:
    """May the key be moved together with others, from here on?"""
    level = entry.level
    if entry.bundle is not None or entry.lent or level is None or not level.in_step:
        return False
    return len(level.participants) == 1 or isinstance(entry.device_model, Sequential)
