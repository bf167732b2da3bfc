"""A value on its way into the arrays that it was asked for in.

What this file decides: by which engine ops those arrays are written, and from when on. Arrays of the host are written
by an op of the host, which begins when nothing else uses them and copies at once. Arrays of devices are written by an
op of a device, which puts the copies into its stream and ends when the device has made them. Where the value comes from
is not known here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial

import engine
from kvstore import comm
from kvstore.arrays import HOST, Array, memory_of
from kvstore.handle import Ended, when_ended


class Delivery:
    """One value's, all of it or piece by piece. Thread-safe.

    Args:
        outs: of one shape, in any memory.
        begin: called with this when they may be written.
        ended: called once, when they have been, by devices too; what was written may be overwritten from then on.
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
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        on_devices = [out for out in outs if memory_of(out) != HOST]
        on_host = [out for out in outs if memory_of(out) == HOST] if on_devices else outs
        groups = [(some, lane) for some, lane in ((on_devices, "copy"), (on_host, None)) if some]
        self.on_devices = bool(on_devices)
        self._to_begin = self._to_end = len(groups)
        for some, lane in groups:
            op = runtime.push_async(
                partial(self._begun, some), writes=some, priority=priority, lane=lane, name="pull", inline=True
            )
            when_ended(op, self._ended)

    def __repr__(self) -> str:
        return f"<Delivery: {self._to_begin} ops have to begin, {self._to_end} to end>"

    def write(self, source: Array, start: int = 0) -> None:
        """Write the flat ``source`` to the arrays, from element ``start`` on in C order."""
        for completion, outs in self._parts:
            with completion.on():
                comm.broadcast(source, outs, start)

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
        self._tell(self._error)
