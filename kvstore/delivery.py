"""A value on its way into the arrays that it was asked for in.

What this file decides: by which engine ops those arrays are written, and from when on. Arrays of the host are written
by an op of the host, which begins when nothing else uses them and copies at once. Arrays of devices are written by an
op of a device, which puts the copies into its stream and ends when the device has made them. Where the value comes from
is not known here.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import engine
from kvstore import comm
from kvstore.arrays import HOST, Array, gpu, memory_of
from kvstore.handle import Ended, when_ended


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
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._on_devices = [out for out in outs if memory_of(out) != HOST]
        on_host = [out for out in outs if memory_of(out) == HOST] if self._on_devices else outs
        groups = [(some, lane) for some, lane in ((self._on_devices, "copy"), (on_host, None)) if some or some is outs]
        self._to_begin = self._to_end = len(groups)
        for some, lane in groups:
            op = runtime.push_async(
                partial(self._begun, some), writes=some, priority=priority, lane=lane, name="pull", inline=True
            )
            when_ended(op, self._ended)

    def __repr__(self) -> str:
        return f"<Delivery: {self._to_begin} ops have to begin, {self._to_end} to end>"

    @property
    def by_devices(self) -> bool:
        """Is anything written by a device? Then what is read had better be pinned."""
        return bool(self._on_devices)

    def write(self, source: Array, start: int = 0, over: Callable[[], None] = lambda: None) -> None:
        """Write the flat ``source`` to the arrays, from element ``start`` on in C order.

        Args:
            over: called when nobody reads ``source`` any more, which is held until then.
        """
        mark = _never if self._on_devices else None
        try:
            for completion, outs in self._parts:
                with completion.on():
                    comm.broadcast(source, outs, start)
                    if outs is self._on_devices:
                        mark = gpu.mark()
        finally:
            if mark is None:
                over()
            else:
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
            self._error = self._error or error
            self._to_end -= 1
            if self._to_end:
                return
            read, self._read = self._read, deque()
        for one in read:
            one.over()
        self._tell(self._error)

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


def _never() -> bool:
    """The mark behind what may have been begun: the op's end will tell."""
    return False


def _is_over(read: _Read) -> bool:
    try:
        return read.mark()
    except Exception:  # the device failed, which the op tells
        return False
