"""The device level: what this process's devices push becomes rounds, and what they pull is answered.

What this file decides: which engine ops and which calls of the home an operation consists of. When a push
takes effect and when a pull may be answered among the devices is asked of :mod:`kvstore.consistency`;
where the values live is behind :class:`kvstore.home.Home`.

Per key there is a lock, held while the level counts and the calls that follow from it are made, so that
the home sees them in the level's order.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

import engine
from kvstore import comm
from kvstore.arrays import HOST, Array, empty, memory_of
from kvstore.consistency import Answer, Level, Model, Pull, Update
from kvstore.delivery import Delivery, apart, let_go
from kvstore.errors import CallerError, KVStoreError
from kvstore.handle import Ended, Handle
from kvstore.home import Gradient, Held, Home, Reading, Source
from kvstore.protocol.pieces import Key
from kvstore.records import record

INLINE_BYTES = 64 << 10

_Step = tuple[list[Update], list[Answer]]  # what one push at the level leads to


@dataclass(eq=False, slots=True)
class _Contribution:
    """What one device pushed in one round."""

    arrays: list[Array]  # of the caller until staged; several when the key came twice in the call
    priority: int
    ended: Ended  # to be told when the push is committed or failed
    samples: int | None  # that it holds, if the key's rounds are of so many


AT_ONCE = Answer(None, 0, 0)  # to a pull of the only device, which waits for nobody


@record
class Request:
    """A pull: who wants the value, and where."""

    handle: Handle
    outs: list[Array] | None  # where to copy it; None: it stays in place and becomes the entry's view
    result: Any  # of the handle; in place: the view
    priority: int
    device: int | None  # whose pull it is; None: all devices'


class Dissolvable(Protocol):
    """What an entry knows of the bundle that it is in: :class:`kvstore.lists.EntryBundle`."""

    def dissolve(self, blamed: Collection[Entry]) -> None:
        """From here on its keys are moved by themselves, because these are."""


@dataclass(eq=False, slots=True)
class Entry:
    """One key, as the device level sees it."""

    key: Key
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    device_model: Model
    level: Level | None = None  # from when the number of devices is known
    held: dict[tuple[int, int], _Contribution] = field(default_factory=dict)
    view: Held | None = None  # the last value that was pulled in place
    view_is_latest: bool = False  # no other was pulled since
    lent: list[Array] = field(default_factory=list)  # the home's memory that the caller fills
    failed: list[Handle] = field(default_factory=list)
    memory: int = HOST  # in which it was initialised, and is pulled into new arrays
    bundle: Dissolvable | None = None  # that moves it together with other keys
    lock: threading.RLock = field(default_factory=threading.RLock)

    def alone(self, *, blamed: bool = True) -> _Alone:
        """``with entry.alone():`` holds the lock, and the key is in no bundle: it is ``blamed`` for the end of it."""
        return _Alone(self, (self,) if blamed else ())

    def count(self, devices: int) -> None:
        """From now on the rounds of so many devices are counted, from 0."""
        self.level = Level(self.device_model, range(devices))

    @property
    def single(self) -> bool:
        """Is there one device only? Then it waits for nobody."""
        return self.level is None or len(self.level.participants) == 1

    def answer(self, ticket: Hashable, device: int | None) -> Answer | None:
        """What the device level says to a pull: when it must wait, None, and the ticket is answered later."""
        assert self.level is not None  # else there is one device only, which is answered AT_ONCE
        rounds = self.level.rounds
        needs = tuple(rounds.items()) if device is None else ((device, rounds[device]),)
        return self.level.pull(Pull(ticket, needs))

    def show(self, held: Held) -> Array:
        """This is the value to be viewed from now on."""
        with self.lock:
            previous, self.view, self.view_is_latest = self.view, held, True
        if previous is not None:
            previous.give_back()
        return held.array


class _Alone:
    """What :meth:`Entry.alone` returns."""

    __slots__ = ("_blamed", "_entry")

    def __init__(self, entry: Entry, blamed: Collection[Entry]) -> None:
        self._entry, self._blamed = entry, blamed

    def __enter__(self) -> None:
        entry = self._entry
        entry.lock.acquire()
        while (bundle := entry.bundle) is not None:
            entry.lock.release()
            bundle.dissolve(self._blamed)  # without the lock: it takes those of all its keys
            entry.lock.acquire()

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._entry.lock.release()


class _Delayed(Source):
    """A value that the device level does not let the caller have yet. Also the ticket of its pull."""

    def __init__(self, key: Key, priority: int, runtime: engine.Engine) -> None:
        self.priority = priority
        self.answer: Answer | None = None
        self._key = key
        self._engine = runtime
        self._held: Held | BaseException | None = None
        self._wanted: Callable[[Held | BaseException], None] | None = None
        self._lock = threading.Lock()

    def answered(self, answer: Answer, source: Source) -> None:
        """The level has decided: this is the value."""
        self.answer = answer
        source.hold(self._come)

    def _come(self, held: Held | BaseException) -> None:
        if isinstance(held, Held):
            self.version, self.staleness = held.version, held.staleness
        with self._lock:
            self._held, wanted = held, self._wanted
        if wanted is not None:
            wanted(held)

    def hold(self, ended: Callable[[Held | BaseException], None]) -> None:
        with self._lock:
            self._wanted, held = ended, self._held
        if held is not None:
            ended(held)

    def deliver(self, outs: Sequence[Array], priority: int, ended: Ended) -> None:
        def begin(delivery: Delivery) -> None:
            self.hold(lambda held: write(delivery, held))

        def write(delivery: Delivery, held: Held | BaseException) -> None:
            if not isinstance(held, Held) or held.array.nbytes * len(outs) <= INLINE_BYTES:
                delivery.write_held(held)
            else:
                info = {"key": self._key}
                self._engine.push(lambda: delivery.write_held(held), priority=priority, name="deliver", info=info)

        Delivery(self._engine, *apart(outs), priority, begin, ended, lambda: self.hold(let_go))


class _Answering:
    """A pull whose value is on its way: told when it is there, it ends the handle."""

    __slots__ = ("_answer", "_entry", "_request", "_source")

    def __init__(self, entry: Entry, request: Request, source: Source, answer: Answer | _Delayed | None) -> None:
        self._entry, self._request, self._source, self._answer = entry, request, source, answer

    def delivered(self, error: BaseException | None) -> None:
        """To where it was to be copied."""
        self._end(error, self._request.result)

    def come(self, held: Held | BaseException) -> None:
        """It stays where it is."""
        if isinstance(held, Held):
            self._end(None, self._entry.show(held))
        else:
            self._end(held, None)

    def _end(self, error: BaseException | None, result: Any) -> None:
        handle = self._request.handle
        if error is None:
            answer = self._answer
            if isinstance(answer, _Delayed):
                answer = answer.answer
            assert answer is not None
            handle.version = self._source.version
            behind = self._source.staleness
            handle.staleness = answer.staleness if behind is None else (answer.staleness, behind)
            handle.finish(result)
        else:
            handle.finish(result, translated(error, f"key {self._entry.key!r}"))


class Devices:
    """The devices' side of a store: turns pushes and pulls into calls of its home.

    Args:
        way: in which what lies on several devices comes together, of :data:`kvstore.comm.WAYS`.
    """

    def __init__(self, home: Home, runtime: engine.Engine, way: str) -> None:
        self._home = home
        self._engine = runtime
        self._way = way

    def __repr__(self) -> str:
        return f"<Devices of {self._home!r}>"

    def push(
        self,
        entry: Entry,
        per_device: dict[int, list[Array]],
        priority: int,
        ended: Ended,
        samples: int | None = None,
    ) -> list[Reading]:
        """One push of each of these devices. ``ended`` is called with the outcome of each.

        Args:
            per_device: by device the arrays whose sum it pushes.
            samples: that all of them hold together, if the key's rounds are of so many.

        Returns:
            The ops after which these arrays have been read.
        """
        with entry.alone():
            if entry.single:
                return [self._home.push(entry.key, self._counted(entry, per_device, priority, samples), ended)]
            return self._perform(entry, *self._count(entry, per_device, priority, ended, samples))

    def pull(self, entry: Entry, request: Request) -> None:
        """Answer the request once the device level allows it."""
        with entry.lock:
            if entry.single:
                self._deliver(entry, request, self._home.pull(entry.key, request.priority), AT_ONCE)
                return
            delayed = _Delayed(entry.key, request.priority, self._engine)
            answer = entry.answer(delayed, request.device)
            if answer is None:
                self._deliver(entry, request, delayed, delayed)
            else:
                self._deliver(entry, request, self._home.pull(entry.key, request.priority), answer)

    def pushpull(
        self,
        entry: Entry,
        per_device: dict[int, list[Array]],
        ended: Ended,
        request: Request,
        samples: int | None = None,
    ) -> list[Reading]:
        """A push and the pull right after it, as one exchange with the home where the level answers at once."""
        with entry.alone():
            if entry.single:
                gradient = self._counted(entry, per_device, request.priority, samples)
                return self._exchange(entry, gradient, ended, request, AT_ONCE)
            contributions, steps = self._count(entry, per_device, request.priority, ended, samples)
            updates = [update for some, _ in steps for update in some]
            answered_others = any(answers for _, answers in steps)
            ticket = object()
            answer = entry.answer(ticket, request.device)
            if answer is not None and len(updates) == 1 and not answered_others:
                gradient, parts = self._merged(entry, updates[0])
                self._stage_leftovers(entry, contributions)
                return self._exchange(entry, gradient, _all(parts), request, answer)
            if entry.level is not None:
                entry.level.waiting.pop(ticket, None)
            all_reading = self._perform(entry, contributions, steps)
            self.pull(entry, request)
            return all_reading

    def _exchange(
        self, entry: Entry, gradient: Gradient, ended: Ended, request: Request, answer: Answer | None
    ) -> list[Reading]:
        outs = gradient.outs = request.outs
        if outs is not None and len(outs) == len(gradient.arrays):
            gradient.lent = all(map(operator.is_, outs, gradient.arrays))
        reading, source = self._home.pushpull(entry.key, gradient, ended)
        self._deliver(entry, request, source, answer)
        return [reading]

    # --- pushes -------------------------------------------------------------------------------

    def _counted(
        self, entry: Entry, per_device: dict[int, list[Array]], priority: int, samples: int | None
    ) -> Gradient:
        """The push of the only device, counted."""
        assert entry.level is not None  # the number of devices is known from the first push on
        entry.level.push_alone()
        (arrays,) = per_device.values()
        return Gradient(arrays, priority, samples=samples, way=self._way)

    def _count(
        self,
        entry: Entry,
        per_device: dict[int, list[Array]],
        priority: int,
        ended: Ended,
        samples: int | None,
    ) -> tuple[list[_Contribution], list[_Step]]:
        """Count the pushes; what follows from each is to be performed in this order."""
        level = entry.level
        assert level is not None  # the number of devices is known from the first push on
        contributions, steps = [], []
        for device, arrays in per_device.items():
            contribution = _Contribution(arrays, priority, ended, samples)
            samples = samples and 0  # the first one's are those of all
            entry.held[device, level.rounds[device] + 1] = contribution
            contributions.append(contribution)
            steps.append(level.push(device))
        return contributions, steps

    def _perform(self, entry: Entry, contributions: list[_Contribution], steps: list[_Step]) -> list[Reading]:
        reading: list[Reading] = []
        for updates, answers in steps:
            for update in updates:
                gradient, parts = self._merged(entry, update)
                reading.append(self._home.push(entry.key, gradient, _all(parts)))
            for answer in answers:
                delayed = answer.ticket
                assert isinstance(delayed, _Delayed)
                delayed.answered(answer, self._home.pull(entry.key, delayed.priority))
        self._stage_leftovers(entry, contributions)
        return reading

    def _merged(self, entry: Entry, update: Update) -> tuple[Gradient, list[_Contribution]]:
        """What the home is to be pushed for this update, and whose pushes it consists of."""
        parts = [entry.held.pop(contribution) for contribution in update.contributions]
        arrays = [array for part in parts for array in part.arrays]
        stated = [part.samples for part in parts if part.samples is not None]
        samples = sum(stated) if stated else None
        return Gradient(arrays, max([part.priority for part in parts]), samples=samples, way=self._way), parts

    def _stage_leftovers(self, entry: Entry, contributions: list[_Contribution]) -> None:
        """Copy what has to wait for other devices, because the caller may overwrite it."""
        if not entry.held:
            return
        waiting = set(map(id, entry.held.values()))
        for contribution in contributions:
            if id(contribution) in waiting:
                arrays = contribution.arrays
                staged = empty(entry.shape, entry.dtype, memory_of(arrays[0]))
                self._engine.push(
                    lambda arrays=arrays, staged=staged: comm.merge(arrays, staged),  # type: ignore[misc]
                    reads=arrays, writes=[staged], name="stage", inline=True,
                    info={"key": entry.key, "bytes": staged.nbytes},
                )  # fmt: skip
                contribution.arrays = [staged]

    # --- pulls --------------------------------------------------------------------------------

    def _deliver(self, entry: Entry, request: Request, source: Source, answer: Answer | _Delayed | None) -> None:
        """When the source's value has come to where it was asked for, the request's handle is done."""
        answering = _Answering(entry, request, source, answer)
        if request.outs is None:
            source.hold(answering.come)
        else:
            entry.view_is_latest = False
            source.deliver(request.outs, request.priority, answering.delivered)


def _all(parts: list[_Contribution]) -> Ended:
    """What tells everybody whose pushes these are."""
    if len(parts) == 1:
        return parts[0].ended

    def ended(error: BaseException | None) -> None:
        for part in parts:
            part.ended(error)

    return ended


def translated(error: BaseException | None, what: str) -> BaseException | None:
    """Errors of the engine's own, in this package's words."""
    if isinstance(error, engine.EngineError) and not isinstance(error, KVStoreError):
        wrapped = CallerError(f"{what}: {error}")
        wrapped.__cause__ = error
        return wrapped
    return error
