"""A value on its way into the arrays that it was asked for in.

What this file decides: by which engine ops those arrays are written, and from when on. Arrays of the host are written
by an op of the host, which begins when nothing else uses them and copies at once. Arrays of devices are written by an
op of a device, which puts the copies into its stream and ends when the device has made them. Where the value comes from
is not known here.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import engine
from kvstore import comm
from kvstore.arrays import HOST, Array, gpu, memory_of, to_host
from kvstore.handle import Ended, last_of, when_ended
from kvstore.home import Held

UNPINNED_BYTES = 64 << 10  # up to this size CUDA itself puts by what it is to copy
BLOCK_BYTES = 4 << 20  # of pinned memory


def _nothing() -> None:
    pass


class Target(NamedTuple):
    """Some of a value's outs: those of the host, or those of devices."""

    writes: Sequence[Any]  # what an op on them writes: arrays, or a group
    copy: Callable[[Array, int, bool], None]  # a flat source to them, from this element on; see `large` below
    is_cut: bool = True  # may it be given to them in blocks?


def apart(outs: Sequence[Array]) -> tuple[Target | None, Target | None]:
    """Arrays of one shape, in any memory, as targets: those of the host, and those of devices."""
    on_devices = [out for out in outs if memory_of(out) != HOST]
    on_host = [out for out in outs if memory_of(out) == HOST] if on_devices else outs
    return _target(on_host) if on_host or not on_devices else None, _target(on_devices) if on_devices else None


def _target(outs: Sequence[Array]) -> Target:
    return Target(outs, lambda source, start, large: comm.broadcast(source, outs, start, large=large))


def let_go(held: Held | BaseException) -> None:
    """Nobody wants the value that has come."""
    if isinstance(held, Held):
        held.give_back()


class Delivery:
    """One value's, all of it or piece by piece. Thread-safe.

    Args:
        on_host, on_devices: where it goes; one of them at least.
        begin: called with this when they may be written.
        ended: called once, when they have been, by devices too.
        unwanted: called in place of ``begin`` when that will never be.
    """

    def __init__(
        self,
        runtime: engine.Engine,
        on_host: Target | None,
        on_devices: Target | None,
        priority: int,
        begin: Callable[[Delivery], None],
        ended: Ended,
        unwanted: Callable[[], None] = _nothing,
    ) -> None:
        self._begin = begin
        self._tell = ended
        self._unwanted = unwanted
        self._begun: list[tuple[engine.Completion, Target, bool]] = []  # and whether it is on devices
        self._error: BaseException | None = None  # of an op that has ended before all had begun
        self._read: deque[_Read] = deque()  # by devices, as they go on
        self._lock = threading.Lock()
        targets = [(target, target is on_devices) for target in (on_devices, on_host) if target is not None]
        self._to_begin = len(targets)
        one_over = last_of(len(targets), self._ended)
        for target, is_there in targets:
            op = runtime.push_async(
                partial(self._one_began, target, is_there), writes=target.writes, priority=priority,
                lane="copy" if is_there else None, name="pull", inline=True, lent=True,
            )  # fmt: skip
            when_ended(op, partial(self._one_ended, one_over))

    def __repr__(self) -> str:
        return f"<Delivery: {self._to_begin} ops have to begin, {len(self._read)} copies under way>"

    def write(
        self,
        source: Array,
        start: int = 0,
        over: Callable[[], None] = _nothing,
        *,
        pinned: bool = False,
        large: bool = False,
    ) -> None:
        """Write the flat ``source`` to the targets, from element ``start`` on in C order.

        A device copies from its own or pinned memory while this thread goes on; other memory is copied to such before.

        Args:
            over: called when nobody reads ``source`` any more, which is held until then.
            pinned: it is.
            large: it is among more than stays in the host's caches.
        """
        pinned = pinned or source.nbytes <= UNPINNED_BYTES or memory_of(source) != HOST
        over_later = False
        try:
            for completion, target, is_there in self._begun:
                if not is_there:
                    target.copy(to_host(source), start, large)
                elif pinned:
                    over_later = True
                    self._write_up(completion, target, source, start, over)
                else:
                    for at, block in _blocks(source, BLOCK_BYTES if target.is_cut else source.nbytes):
                        self._write_up(completion, target, _pinned_copy(block), start + at, _nothing)
        finally:
            if not over_later:
                over()

    def write_held(self, held: Held | BaseException) -> None:
        """Write what has come, which is all, and give it back; or end with the error."""
        if not isinstance(held, Held):
            self.end(held)
            return
        try:
            pinned = any(is_there for *_, is_there in self._begun) and held.pin()
            self.write(held.array.reshape(-1), over=held.give_back, pinned=pinned)
        except Exception as error:
            self.end(error)
        else:
            self.end()

    def _write_up(
        self, completion: engine.Completion, target: Target, source: Array, start: int, over: Callable[[], None]
    ) -> None:
        mark = _never
        try:
            with completion.on():
                target.copy(source, start, False)
                mark = gpu.mark()
        finally:
            self._hold(source, mark, over)

    def end(self, error: BaseException | None = None) -> None:
        """All has been written that will be."""
        for completion, *_ in self._begun:
            if error is None:
                completion.set_result(None)
            else:
                completion.set_exception(error)

    def _one_began(self, target: Target, is_there: bool, completion: engine.Completion) -> None:
        with self._lock:
            failed = self._error
            if failed is None:
                # The host's first, which are copied at once: from then on only a device reads.
                self._begun.insert(len(self._begun) if is_there else 0, (completion, target, is_there))
                self._to_begin -= 1
                if self._to_begin:
                    return
        if failed is not None:
            completion.set_exception(failed)
            return
        try:
            self._begin(self)
        except BaseException as error:
            self.end(error)
            raise

    def _one_ended(self, over: Ended, error: BaseException | None) -> None:
        """One of the ops has. If it has never begun, the other shall not wait for it, nor anybody for the value."""
        waiting: list[tuple[engine.Completion, Target, bool]] = []
        with self._lock:
            begins_never = error is not None and self._error is None and self._to_begin > 0
            if begins_never:
                self._error = error
                waiting, self._begun = self._begun, []
        if error is not None and begins_never:
            self._unwanted()
            for completion, *_ in waiting:
                completion.set_exception(error)
        over(error)

    def _ended(self, error: BaseException | None) -> None:
        with self._lock:
            read, self._read = self._read, deque()
        for one in read:
            one.over()
        self._tell(error)

    def _hold(self, source: Array, mark: Callable[[], bool], over: Callable[[], None]) -> None:
        """Until a device has come to the mark; and let go of what is held in vain."""
        read = []
        with self._lock:
            self._read.append(_Read(source, mark, over))
            while self._read and _is_over(self._read[0]):
                read.append(self._read.popleft())
        for one in read:
            one.over()


class _Read(NamedTuple):
    """What a device has been told to copy."""

    source: Array
    mark: Callable[[], bool]  # has it?
    over: Callable[[], None]


def _blocks(source: Array, nbytes: int) -> Iterator[tuple[int, Array]]:
    """The source in blocks of so many bytes, and where each begins."""
    items = max(1, nbytes // source.itemsize)
    for at in range(0, source.size, items):
        yield at, source[at : at + items]


def _pinned_copy(source: Array) -> Array:
    copied = gpu.pinned(source.nbytes)
    np.copyto(copied, source.view(np.uint8))
    return copied.view(source.dtype)


def _never() -> bool:
    """The mark behind what may have been begun: the op's end will tell."""
    return False


def _is_over(read: _Read) -> bool:
    try:
        return read.mark()
    except Exception:  # the device failed, which the op tells
        return False
