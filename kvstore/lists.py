"""List calls: the small keys among many that a store moves together, as one value.

What this file decides: which keys of a list form a bundle, when a bundle ends, and how the caller's arrays become the
bundle's value and back. Which keys can be moved together the home says (:meth:`kvstore.home.Home.bundle`).

At the device level a bundle's keys are in step: in every round every device pushes each of them once, and all of it
takes effect at once, whatever the model. So the rounds are counted once for all, and each key catches up when it
leaves.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

import engine
from kvstore import comm
from kvstore.arrays import Array
from kvstore.consistency import Sequential
from kvstore.devices import Entry
from kvstore.handle import Ended, Handle, when_ended
from kvstore.home import Bundle as HomeBundle
from kvstore.home import Gradient, Held, Home, Source
from kvstore.protocol.pieces import Key

PLANS_MAX = 64
TRIES = 8  # to make bundles for one list


class Bundle:
    """Keys of one store that are moved together until one of them is pushed by itself."""

    def __init__(self, entries: Sequence[Entry], moved: HomeBundle, runtime: engine.Engine, devices: int) -> None:
        self.entries = tuple(entries)
        self.alive = True
        self.rounds = 0  # that the entries have to catch up with
        self.lock = threading.RLock()  # held while a round is counted and handed over
        self._moved = moved
        self._engine = runtime
        self._devices = devices
        self._shapes = [entry.shape for entry in entries]
        self._plain = all(len(shape) == 1 for shape in self._shapes)
        sizes = [int(np.prod(shape)) for shape in self._shapes]
        ends = np.cumsum(sizes).tolist()
        self._spans = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
        self._group: engine.ArrayGroup | None = None  # of the arrays that were written last
        self._views: tuple[Array, list[Array]] | None = None  # of the value that was read last, by key

    def __repr__(self) -> str:
        return f"<Bundle of {len(self.entries)} keys: {self.rounds} rounds, {'alive' if self.alive else 'over'}>"

    # --- moving it --------------------------------------------------------------------------------

    def push(self, arrays: list[list[Array]], priority: int, ended: Ended) -> None:
        """One round: ``arrays`` has for each key one array per device, which are read now."""
        self.rounds += 1
        self._moved.push(self._gradient(arrays, priority), ended)

    def pull(self, outs: list[list[Array]], result: list[Any], priority: int, handle: Handle) -> None:
        """Copy every key's value to each of its ``outs``; then the handle's result is ``result``."""
        self._deliver(self._moved.pull(priority), outs, result, priority, handle)

    def pushpull(
        self,
        arrays: list[list[Array]],
        ended: Ended,
        outs: list[list[Array]],
        result: list[Any],
        priority: int,
        handle: Handle,
    ) -> None:
        """A push and the pull right after it."""
        self.rounds += 1
        _, source = self._moved.pushpull(self._gradient(arrays, priority), ended)
        self._deliver(source, outs, result, priority, handle)

    def explain(self) -> str:
        """What the open operations wait for."""
        return self._moved.explain()

    def dissolve(self) -> None:
        """From here on its keys are moved by themselves."""
        with self.lock:
            if not self.alive:
                return
            self.alive = False
            self._moved.dissolve()
            for entry in self.entries:
                with entry.lock:
                    entry.bundle = None
                    if self.rounds:
                        if entry.level is None:
                            entry.count(self._devices)
                        assert entry.level is not None
                        entry.level.push_together(self.rounds)

    # --- arrays -----------------------------------------------------------------------------------

    def _gradient(self, arrays: list[list[Array]], priority: int) -> Gradient:
        reads: list[Any] = []
        if self._engine.uses_arrays():
            reads.append(engine.ArrayGroup(array for some in arrays for array in some))
        return _Concatenated(arrays, self._spans, priority, reads)

    def _group_of(self, outs: list[list[Array]]) -> engine.ArrayGroup:
        """The outs as one thing to write; training loops pass the same ones in every round."""
        arrays = [array for some in outs for array in some]
        known = self._group
        if known is None or len(known.arrays) != len(arrays) or any(map(_is_other, known.arrays, arrays)):
            known = self._group = engine.ArrayGroup(arrays)
        return known

    def _parts(self, value: Array) -> list[Array]:
        """The keys' values within the bundle's."""
        known = self._views
        if known is None or known[0].ctypes.data != value.ctypes.data:
            parts = [value[span] for span in self._spans]
            if not self._plain:
                parts = [part.reshape(shape) for part, shape in zip(parts, self._shapes, strict=True)]
            known = self._views = value, parts
        return known[1]

    def _deliver(
        self, source: Source, outs: list[list[Array]], result: list[Any], priority: int, handle: Handle
    ) -> None:
        def start(completion: engine.Completion) -> None:
            def come(held: Held | BaseException) -> None:
                if isinstance(held, Held):
                    copy(held)
                    completion.set_result(None)
                else:
                    completion.set_exception(held)

            source.hold(come)

        def copy(held: Held) -> None:
            handle.version = held.version
            handle.staleness = 0 if held.staleness is None else (0, held.staleness)
            for part, targets in zip(self._parts(held.array), outs, strict=True):
                for target in targets:
                    np.copyto(target, part)
            held.give_back()

        writes = [self._group_of(outs)]
        delivered = self._engine.push_async(start, writes=writes, priority=priority, name="pull", inline=True)
        when_ended(delivered, lambda error: handle.finish(result, error))


class _Concatenated(Gradient):
    """The sums of many small arrays, one after another."""

    def __init__(self, arrays: list[list[Array]], spans: list[slice], priority: int, reads: list[Any]) -> None:
        super().__init__([], priority)
        self._parts = arrays
        self._spans = spans
        self._reads = reads

    @property
    def reads(self) -> list[Any]:
        return self._reads

    def write(self, out: Array) -> None:
        if len(self._parts[0]) == 1:
            np.concatenate([array.reshape(-1) for (array,) in self._parts], out=out)
            return
        for arrays, span in zip(self._parts, self._spans, strict=True):
            comm.merge(arrays, out[span].reshape(arrays[0].shape))


def _is_other(one: object, other: object) -> bool:
    return one is not other


@dataclass(frozen=True, slots=True)
class Plan:
    """How the keys of one list are moved: which together, and which one by one; by their positions in the list."""

    bundles: list[tuple[Bundle, list[int]]]
    singles: list[int]

    @property
    def alive(self) -> bool:
        """Do all of its bundles still exist?"""
        return all(bundle.alive for bundle, _ in self.bundles)

    @contextmanager
    def held(self) -> Iterator[bool]:
        """With the locks of all its bundles: are they alive?"""
        with ExitStack() as stack:
            for bundle in sorted((bundle for bundle, _ in self.bundles), key=id):
                stack.enter_context(bundle.lock)
            yield self.alive


class Lists:
    """The plans for one store's list calls. Thread-safe."""

    def __init__(self, home: Home, runtime: engine.Engine) -> None:
        self._home = home
        self._engine = runtime
        self._plans: dict[tuple[Key, ...], Plan] = {}
        self._fruitless: dict[tuple[Key, ...], int] = {}  # lists for which no bundle was to be had, and how often
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<Lists: {len(self._plans)} plans>"

    def known(self, keys: tuple[Key, ...]) -> Plan | None:
        """The plan for this list, if there is one."""
        plan = self._plans.get(keys)
        return plan if plan is not None and plan.alive else None

    def for_pull(self, keys: tuple[Key, ...], entries: Sequence[Entry]) -> Plan | None:
        """A plan by the bundles that there are."""
        with self._lock:
            return self._remember(keys, entries)

    def for_push(self, keys: tuple[Key, ...], entries: Sequence[Entry], devices: int, timeout_s: float) -> Plan | None:
        """A plan by the bundles that there are and those that can be made, with the servers' consent.

        Args:
            entries: of the keys.
            devices: that push them.
        """
        with self._lock:
            if self._fruitless.get(keys, 0) >= TRIES:
                return None
            alone = {entry.key: entry for entry in entries if _can_join(entry, devices)}
            for made in self._home.bundle(list(alone), timeout_s):
                members = [alone[key] for key in made.keys]
                bundle = Bundle(members, made, self._engine, devices)
                for entry in members:
                    with entry.lock:
                        entry.bundle = bundle
            plan = self._remember(keys, entries)
            if plan is None:
                while len(self._fruitless) >= PLANS_MAX:
                    self._fruitless.pop(next(iter(self._fruitless)))  # the oldest
                self._fruitless[keys] = self._fruitless.get(keys, 0) + 1
            return plan

    def _remember(self, keys: tuple[Key, ...], entries: Sequence[Entry]) -> Plan | None:
        """The plan by the bundles that exist and that the list names whole."""
        positions: dict[Bundle, list[int]] = {}
        for position, entry in enumerate(entries):
            if isinstance(entry.bundle, Bundle):
                positions.setdefault(entry.bundle, []).append(position)
        bundles = []
        for bundle, some in positions.items():
            if len(some) == len(bundle.entries):
                place = {entries[position].key: position for position in some}
                bundles.append((bundle, [place[entry.key] for entry in bundle.entries]))
        if not bundles:
            return None
        while len(self._plans) >= PLANS_MAX:
            self._plans.pop(next(iter(self._plans)))  # the oldest
        together = {position for _, some in bundles for position in some}
        plan = self._plans[keys] = Plan(bundles, [p for p in range(len(keys)) if p not in together])
        return plan


def _can_join(entry: Entry, devices: int) -> bool:
    """May the key be moved together with others, from here on?"""
    if entry.bundle is not None or entry.lent:
        return False
    if entry.level is not None and not entry.level.in_step:
        return False
    return devices == 1 or isinstance(entry.device_model, Sequential)
