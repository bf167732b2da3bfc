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
from typing import NamedTuple

import numpy as np

import engine
from kvstore import comm
from kvstore.arrays import HOST, Array, gpu, memory_of
from kvstore.handle import Ended, all_ended

UNPINNED_BYTES = 64 << 10  # up to this size CUDA itself puts by what it is to copy
BLOCK_BYTES = 4 << 20  # of pinned memory


def _nothing() -> None:
    pass


class Delivery:
    """One value's, all of it or piece by piece. Thread-safe.

    Args:
        outs: of one shape, in any memory.
        begin: called with this when they may be written.
        ended: called once, when they have been, by devices too.
    """

    def __init__(
        self,
        runtime: engine.Engine,
        outs: Sequence[Array],
        priority: int,
        begin: Callable[[Delivery], None],
        ended: Ended,
    ) -> None:
        self._parts: list[tuple[engine.Completion, Sequence[Array]]] = []
        self._begin = begin
        self._tell = ended
        self._read: deque[_Read] = deque()  # by devices, as they go on
        self._lock = threading.Lock()
        self._on_devices = [out for out in outs if memory_of(out) != HOST]
        on_host = [out for out in outs if memory_of(out) == HOST] if self._on_devices else outs
        groups = [(some, lane) for some, lane in ((self._on_devices, "copy"), (on_host, None)) if some or some is outs]
        self._to_begin = len(groups)
        ops = [
            runtime.push_async(
                partial(self._begun, some), writes=some, priority=priority, lane=lane, name="pull", inline=True,
                lent=True,
            )
            for some, lane in groups
        ]  # fmt: skip
        all_ended(ops, self._ended)

    def __repr__(self) -> str:
        return f"<Delivery: {self._to_begin} ops have to begin, {len(self._read)} copies under way>"

    @property
    def by_devices(self) -> int:
        """How many of the arrays are written by devices? They had better read pinned memory."""
        return len(self._on_devices)

    def write(
        self,
        source: Array,
        start: int = 0,
        over: Callable[[], None] = _nothing,
        *,
        pinned: bool = False,
        large: bool = False,
    ) -> None:
        """Write the flat ``source``, of the host, to the arrays, from element ``start`` on in C order.

        A device copies from pinned memory while this thread goes on; what is not ``pinned`` is copied there before.

        Args:
            over: called when nobody reads ``source`` any more, which is held until then.
            large: it is among more than stays in the caches.
        """
        pinned = pinned or source.nbytes <= UNPINNED_BYTES
        over_later = False
        try:
            for completion, outs in self._parts:
                if outs is not self._on_devices:
                    comm.broadcast(source, outs, start, large=large)
                elif pinned:
                    over_later = True
                    self._write_up(completion, source, start, over)
                else:
                    for at, block in _blocks(source):
                        self._write_up(completion, _pinned_copy(block), start + at, _nothing)
        finally:
            if not over_later:
                over()

    def _write_up(self, completion: engine.Completion, source: Array, start: int, over: Callable[[], None]) -> None:
        mark = _never
        try:
            with completion.on():
                comm.broadcast(source, self._on_devices, start)
                mark = gpu.mark()
        finally:
            self._hold(source, mark, over)

    def end(self, error: BaseException | None = None) -> None:
        """All has been written that will be."""
        for completion, _ in self._parts:
            if error is None:
                completion.set_result(None)
            else:
                completion.set_exception(error)

    def _begun(self, outs: Sequence[Array], completion: engine.Completion) -> None:
        with self._lock:
            self._parts.append((completion, outs))
            self._to_begin -= 1
            if self._to_begin:
                return
        try:
            self._begin(self)
        except BaseException as error:
            self.end(error)
            raise

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


def _blocks(source: Array) -> Iterator[tuple[int, Array]]:
    """The source in blocks, and where each begins."""
    items = max(1, BLOCK_BYTES // source.itemsize)
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
