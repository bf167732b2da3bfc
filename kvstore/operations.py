"""What a push, a pull or a pushpull consists of: one key after another, and the small ones of a list together.

What this file decides: the order of checks and of what follows from them for each key, and what the handles are that
the caller gets. Whether keys and arrays are right is decided by :mod:`kvstore.entries`, which keys of a list are moved
together by :mod:`kvstore.lists`, and what happens to a key by :mod:`kvstore.devices`, and by the home behind it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import engine
from kvstore.arrays import Array, callers
from kvstore.devices import Devices, Entry, Request
from kvstore.entries import IN_PLACE, ITSELF, Entries, Keys, Push, Target, as_many, own_out
from kvstore.errors import DuplicateKeyError
from kvstore.handle import Handle, countdown, gather
from kvstore.home import Home, Reading
from kvstore.lists import Arrays, EntryBundle, Lists, Plan, listed
from kvstore.protocol.pieces import Key

_T = TypeVar("_T")

_NOTHING: dict[int, list[Array]] = {}  # is pushed


class OperationHandle(Handle):
    """Of an operation on keys. What is only said when something is amiss is put into words then."""

    def __init__(
        self, operations: Operations, entries: Sequence[Entry], verb: str, explain: Callable[[], str] | None
    ) -> None:
        self.entries = entries
        self._verb = verb
        self._operations = operations
        self._timeout_s = operations.timeout_s
        self._drive = operations.drive
        self._explain = explain

    @property
    def what(self) -> str:
        first, last = self.entries[0].key, self.entries[-1].key
        if len(self.entries) == 1:
            return f"{self._verb} of key {first!r}"
        return f"{self._verb} of {len(self.entries)} keys, {first!r} ... {last!r}"

    def _has_ended(self) -> None:
        self._operations.ended(self)

    def why(self) -> str:
        return self._operations.explain(self.entries[0]) if self._explain is None else self._explain()


class Operations:
    """The pushes and pulls of one store. Thread-safe.

    Args:
        timeout_s: that a handle's wait may take when the caller does not say; it may be changed.
        way: of :data:`kvstore.comm.WAYS`, in which GPUs' arrays come together.
    """

    def __init__(self, home: Home, runtime: engine.Engine, entries: Entries, timeout_s: float, way: str) -> None:
        self.entries = entries
        self.timeout_s = timeout_s
        self._home = home
        self._engine = runtime
        self._level = Devices(home, runtime, way)
        self._lists = Lists(home, runtime, way)
        self.drive = home.drive
        self._pushes: set[Handle] = set()  # not committed yet
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<Operations: {len(self._pushes)} pushes not committed>"

    def one(
        self, what: str, key: Keys, value: Any, out: Any, priority: int, device: int | None, samples: int | None = None
    ) -> Handle:
        """Push, pull or both (``what`` says it: ``push``, ``pull`` or ``pushpull``), checked before anything is done.

        Args:
            value, out: None if it does not apply; ``out`` also for its default.
        """
        with callers(value, out):
            keys = self.entries.checked(key)
            if what == "pull":
                device = self.entries.device(device)
                entry, pushed = self.entries.known(keys)[0], _NOTHING
            else:
                if out is None and what == "pushpull":
                    out = own_out(self.entries.get(keys[0]), value)
                entry, pushed = self.entries.push(keys[0], value, device)
            target = None if what == "push" else self._target(entry, out, device, value, pushed)
            handle, reading = self._move(what, entry, pushed, target, priority, device, samples)
            _wait_for(reading)
        return handle

    def many(
        self,
        what: str,
        key: Keys,
        value: Any,
        out: Any,
        priority: int,
        device: int | None,
        samples: int | None = None,
    ) -> Handle:
        """:meth:`one` of a list of keys, with a list of values or outs; checked whole before anything is done."""
        at_once = self._engine.bulk if self._engine.devices is not None else nullcontext  # so that GPUs overlap them
        with callers(value, out), at_once():
            if device is None and (whole := self._together(what, key, value, out, priority, samples)) is not None:
                return whole
            keys = self.entries.checked(key)
            values = as_many(keys, value, "values")
            if what == "pull":
                device = self.entries.device(device)
                pushes: list[Push] = [(entry, _NOTHING) for entry in self.entries.known(keys)]
            else:
                if what == "pushpull" and len(set(keys)) != len(keys):
                    raise DuplicateKeyError("pushpull: expected each key once in a call")
                if what == "pushpull" and out is None:
                    out = [own_out(self.entries.get(k), v) for k, v in zip(keys, values, strict=True)]
                pushes = self.entries.pushes(keys, values, device)
            targets: Sequence[Target | None] = [None] * len(pushes)
            if what != "push":
                outs = as_many(keys, out, "outs")
                targets = [
                    self._target(entry, o, device, v, pushed)
                    for (entry, pushed), o, v in zip(pushes, outs, values, strict=True)
                ]
            handles = self._each(what, pushes, targets, priority, device, samples)
        return self._gathered(what, handles)

    def _target(self, entry: Entry, out: Any, device: int | None, value: Any, pushed: dict[int, list[Array]]) -> Target:
        if out is ITSELF:
            return [array for (array,) in pushed.values()], value
        return self.entries.target(entry, out, device)

    @property
    def uncommitted(self) -> list[Handle]:
        """The pushes that are not committed yet."""
        with self._lock:
            return list(self._pushes)

    def _each(
        self,
        what: str,
        pushes: Sequence[Push],
        targets: Sequence[Target | None],
        priority: int,
        device: int | None,
        samples: int | None,
    ) -> list[Handle]:
        """Key by key."""
        handles, all_reading = [], []
        with self._home.gathering():
            for (entry, pushed), target in zip(pushes, targets, strict=True):
                handle, reading = self._move(what, entry, pushed, target, priority, device, samples)
                handles.append(handle)
                all_reading += reading
        _wait_for(all_reading)
        return handles

    def _move(
        self,
        what: str,
        entry: Entry,
        pushed: dict[int, list[Array]],
        target: Target | None,
        priority: int,
        device: int | None,
        samples: int | None,
    ) -> tuple[Handle, list[Reading]]:
        """Push ``pushed``, if there is any, pull to ``target``, if there is one, or both."""
        handle = of_push = self._handle((entry,), what)
        reading: list[Reading] = []
        try:
            if target is None:
                ended = countdown(handle, len(pushed))
                reading = self._level.push(entry, pushed, priority, ended, samples)
            elif not pushed:
                self._level.pull(entry, Request(handle, *target, priority, device))
            else:
                of_push = self._handle((entry,), "push")
                of_push.observed = True  # the pull's handle fails with it
                request = Request(handle, *target, priority, device)
                ended = countdown(of_push, len(pushed))
                reading = self._level.pushpull(entry, pushed, ended, request, samples)
        except BaseException as error:
            _interrupted(error, of_push, handle)
            raise
        return handle, reading

    # --- list calls -------------------------------------------------------------------------------
    #
    # They make no tuple or list per key that lives longer than a moment: ten thousand of them make the garbage
    # collector look at everything.

    def _together(
        self, what: str, key: Keys, value: Any, out: Any, priority: int, samples: int | None
    ) -> Handle | None:
        """A list call some of whose keys are moved together: checked whole, then bundle by bundle, the rest one by one.

        Returns:
            None for any other call, with nothing done; also if another thread has just ended one of the bundles.
        """
        assert isinstance(key, list | tuple)
        if len(key) < 2:
            return None
        values = None if what == "pull" else as_many(key, value, "values")
        outs = None if out is None else as_many(key, out, "outs")
        plan = self._plan(key, values)
        if plan is None or (outs is not None and any(out is IN_PLACE for out in outs)):
            return None
        entries = plan.entries
        for entry in entries:
            self.entries.raise_unseen(entry)
        arrays: list[Arrays] = []
        targets: list[Arrays | None] = []
        results: list[Any] = []
        if values is not None:
            arrays = self.entries.arrays(entries, values)
            if outs is None and what == "pushpull":
                outs = [own_out(entry, value) for entry, value in zip(entries, values, strict=True)]
        if what != "push":
            targets, results = self._targets_of(entries, outs or [None] * len(entries), values, arrays)
        with plan.held() as alive:
            if not alive:
                return None
            parts = [
                self._move_bundle(
                    what, bundle, _at(some, arrays), _at(some, targets), _at(some, results), priority, samples
                )
                for bundle, some in plan.bundles
            ]
        positions, rest = [some for _, some in plan.bundles], plan.singles
        if rest:
            singles = self._one_by_one(
                what, _at(rest, entries), _at(rest, arrays), _at(rest, targets), _at(rest, results), priority, samples
            )
            parts.append(self._gathered(what, singles))
            positions.append(rest)
        return gather(f"{what} of {len(entries)} keys", self.timeout_s, parts, self._home.drive, positions)

    def _plan(self, keys: Sequence[Key], values: list[Any] | None) -> Plan | None:
        """How the keys of a list call are moved, if some of them together. ``values``: what is to be pushed."""
        listed = tuple(keys)
        if not {str, int}.issuperset(map(type, listed)):
            listed = tuple(self.entries.checked(keys))  # which NumPy's numbers and texts may be
        plan = self._lists.known(listed, pushed=values is not None)
        if plan is not None:
            return plan
        entries = [entry for entry in map(self.entries.get, listed) if entry is not None]
        if len(entries) < len(listed) or len(set(listed)) < len(listed):
            return None
        if values is None:
            return self._lists.for_pull(listed, entries)
        self.entries.arrays(entries, values)  # before bundles are made for a call that is wrong
        return self._lists.for_push(listed, entries, min(self.timeout_s, threading.TIMEOUT_MAX))

    def _targets_of(
        self, entries: Sequence[Entry], outs: list[Any], values: list[Any] | None, pushed: list[Arrays]
    ) -> tuple[list[Arrays | None], list[Any]]:
        """For each key where its value goes (None: in place), checked; and what the handle's result is."""
        targets: list[Arrays | None] = []
        results = []
        for position, (entry, out) in enumerate(zip(entries, outs, strict=True)):
            if out is ITSELF:
                assert values is not None
                targets.append(pushed[position])
                results.append(values[position])
                continue
            arrays, result = self.entries.target(entry, out, None)
            targets.append(arrays[0] if arrays is not None and len(arrays) == 1 else arrays)
            results.append(result)
        return targets, results

    def _move_bundle(
        self,
        what: str,
        bundle: EntryBundle,
        arrays: list[Arrays],
        targets: list[Arrays | None],
        results: list[Any],
        priority: int,
        samples: int | None,
    ) -> Handle:
        """Push, pull or both, the bundle's lock being held."""
        handle = self._handle(bundle.entries, what, bundle.explain)
        pushed, reading = handle, None
        outs = [target for target in targets if target is not None]  # a key of a bundle is never read in place
        try:
            if what == "push":
                reading = bundle.push(arrays, priority, countdown(handle, 1), samples)
            elif what == "pull":
                bundle.pull(outs, results, priority, handle)
            else:
                pushed = self._handle(bundle.entries, "push", bundle.explain)
                pushed.observed = True  # the pull's handle fails with it
                ended = countdown(pushed, 1)
                reading = bundle.pushpull(arrays, ended, outs, results, priority, handle, samples)
        except BaseException as error:
            _interrupted(error, pushed, handle)
            raise
        _wait_for([reading])
        return handle

    def _one_by_one(
        self,
        what: str,
        entries: list[Entry],
        arrays: list[Arrays],
        targets: list[Arrays | None],
        results: list[Any],
        priority: int,
        samples: int | None,
    ) -> list[Handle]:
        pushes: list[Push] = [
            (entry, {d: [array] for d, array in enumerate(listed(some))})
            for entry, some in zip(entries, arrays or [[]] * len(entries), strict=True)
        ]
        wanted: Sequence[Target | None] = [None] * len(entries)
        if what != "push":
            wanted = [(None if t is None else listed(t), result) for t, result in zip(targets, results, strict=True)]
        return self._each(what, pushes, wanted, priority, None, samples)

    # --- handles ------------------------------------------------------------------------------------

    def _handle(self, entries: Sequence[Entry], what: str, explain: Callable[[], str] | None = None) -> OperationHandle:
        handle = OperationHandle(self, entries, what, explain)
        if what == "push":
            with self._lock:
                self._pushes.add(handle)
        return handle

    def ended(self, handle: OperationHandle) -> None:
        """One of the handles has."""
        if handle in self._pushes:
            with self._lock:
                self._pushes.discard(handle)
        if handle.exception_now() is not None and not handle.observed:
            for entry in handle.entries:
                with entry.lock:
                    entry.failed.append(handle)

    def _gathered(self, what: str, handles: list[Handle]) -> Handle:
        return gather(f"{what} of {len(handles)} keys", self.timeout_s, handles, self._home.drive)

    def explain(self, entry: Entry) -> str:
        """Why an operation on this key is not done."""
        with entry.lock:
            level = entry.level
            if level is not None and (entry.held or level.waiting):
                needed = max(
                    [round for _, round in entry.held] + [own for p in level.waiting.values() for _, own in p.needs]
                )
                blockers = {d for p in level.waiting.values() for d in level.blockers(p)}
                blockers.update(d for _, round in entry.held for d in level.behind(round))
                if blockers:
                    return f"key {entry.key!r}, device round {needed}: waits for devices {sorted(blockers)}"
        return self._home.explain(entry.key)


def _at(positions: Sequence[int], items: Sequence[_T]) -> list[_T]:
    """The items at these positions; none if there are no items."""
    return [items[position] for position in positions] if items else []


def _interrupted(error: BaseException, *handles: Handle) -> None:
    """What stops a call in the middle, as Ctrl-C does, is its outcome, so that nobody waits for it in vain."""
    for handle in handles:
        handle.observed = True
        handle.finish(None, error)


def _wait_for(reading: Sequence[Reading]) -> None:
    """Until the caller's arrays have been read, or will be before what he does next; handles tell how it went."""
    for op in reading:
        if op is not None:
            op.follow()
