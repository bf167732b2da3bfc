"""The work on a shard's pieces: their values and optimizers' states, and the engine ops that change them.

What is to be done, and in which order, has been decided by the core. Small work is done at once on the server's own
thread, larger work by the engine's pool, so that the socket is free for what is urgent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

import engine
from kvstore import kernels
from kvstore.arrays import Array, dtype_named
from kvstore.checkpoint.restoring import RestoredPiece
from kvstore.cluster.stream import Mark
from kvstore.protocol.actions import Apply, Create, StoreState
from kvstore.protocol.bundles import Bundle, Part
from kvstore.protocol.pieces import PieceId, Span
from kvstore.protocol.serving import Serving
from kvstore.stored import Stored
from kvstore.transport.network import Loop

INLINE_BYTES = 64 << 10  # up to this much, work is done on the thread of the socket: a hand-over costs more
AT_ONCE_BYTES = 1 << 20  # the same for what came through the socket and lies in this core's caches, or came alone


class Work:
    """The values of one shard. Within the loop.

    Args:
        runtime: does what is large.
        on_logged: called when the payload of an entry of the log is there: it may be sent.
    """

    def __init__(self, serving: Serving, loop: Loop, runtime: engine.Engine, on_logged: Callable[[], None]) -> None:
        self.serving = serving
        self._loop = loop
        self._engine = runtime
        self._on_logged = on_logged
        self.stored: dict[PieceId, Stored] = {}
        self.alone = False  # is this what follows from a push or pull that came as an envelope of its own?

    def __repr__(self) -> str:
        return f"<Work on {len(self.stored)} pieces>"

    def create(self, action: Create, mark: Mark | None) -> None:
        """A new piece."""
        piece, value = action.piece, action.payload
        if isinstance(action.restored, RestoredPiece):
            value = action.restored.value
        assert isinstance(value, np.ndarray)
        stored = self.stored[piece] = Stored(value, f"{piece[0]!r}[{piece[1]}]")
        if isinstance(action.restored, RestoredPiece):
            stored.restore(action.restored.state, action.restored.step, self.serving.pieces[piece].generation)
        if mark is not None:  # a restored piece is copied afterwards, with its state
            self._complete(mark, [value.copy()])

    def store_state(self, action: StoreState, mark: Mark | None) -> None:
        """A worker writes an optimizer's state, and a value perhaps."""
        message = action.message
        value, state = action.payload if isinstance(action.payload, tuple) else (None, action.payload)
        assert isinstance(state, dict)
        stored = self.stored[message.key, message.piece]
        if mark is not None:
            values = [] if value is None else [value.copy()]
            self._complete(mark, [*values, *(array.copy() for array in state.values())])
        self._engine.push(
            lambda: stored.restore(state, message.step, action.generation, value),
            reads=[stored.var], writes=[stored.var], name="write state",
        )  # fmt: skip

    def apply(self, action: Apply, priority: int, mark: Mark | None) -> None:
        """Pushes take effect, as one update."""
        if not action.payloads:
            if mark is not None:
                self._complete(mark, [])
            return
        stored = self.stored[action.piece]
        pushes = [_elements(payload) for payload in action.payloads]
        rule: Any = action.rule
        far = True
        for push in pushes:
            far = far and push.flags.writeable  # what lies in another process's memory is not
        reads: tuple[engine.Var, ...]
        work: Callable[[], None]
        if mark is not None:
            name, reads = "merge, log, update", (stored.var,)
            work = partial(self._update_and_log, stored, pushes, action, mark)
        elif rule is None:
            name, reads, work = "merge", (), partial(stored.assign, pushes, owned=True, factor=action.factor)
        else:
            name, reads = "merge+update", (stored.var,)
            work = partial(stored.update, pushes, rule, action.generation, action.factor)
        self.do(stored, work, name, priority, reads, (stored.var,), action, far=far)

    def _update_and_log(self, stored: Stored, pushes: list[Array], action: Apply, mark: Mark) -> None:
        """An update whose merged payload goes to the replica; it gives the same bits as one without."""
        rule: Any = action.rule
        if rule is None:
            stored.assign(pushes, owned=True, factor=action.factor)
            value = stored.lend(mark)
            self._complete(mark, [value])
            self._loop.post(lambda: mark.when_taken(lambda: stored.give_back(mark)))
            return
        merged = pushes[0]
        if len(pushes) > 1:
            merged = merged if merged.flags.writeable else np.empty_like(merged)
            kernels.merge(pushes, merged)
        elif mark.passed and not merged.flags.writeable:
            merged = merged.copy()  # nobody waits for the replica: the worker may soon write there again
        self._complete(mark, [merged])
        stored.update([merged], rule, action.generation, action.factor)

    def forget(self, piece: PieceId) -> None:
        """The piece is no more."""
        self.stored.pop(piece, None)

    def unite(self, bundle: Bundle) -> None:
        """The bundle becomes one piece."""
        parts = [self.stored.pop(piece) for piece in bundle.members]
        whole = self.stored.get(bundle.piece)  # it has been united before: its memory may still be read
        if whole is None:
            value = np.empty(bundle.spec.shape, dtype_named(bundle.spec.dtype))
            whole = self.stored[bundle.piece] = Stored(value, str(bundle))
        reads = [part.var for part in parts]
        self._engine.push(lambda: whole.unite(parts), reads=reads, writes=[whole.var], name="unite", inline=True)

    def split(self, bundle: Bundle) -> None:
        """The bundle's members become pieces of their own."""
        whole = self.stored[bundle.piece]
        empty: Array = np.empty(0, whole.value.dtype)
        parts = [(Stored(empty, repr(piece)), slice(*span)) for piece, span in bundle]
        self.stored.update(zip(bundle.members, (part for part, _ in parts), strict=True))
        writes = [whole.var, *(part.var for part, _ in parts)]
        self._engine.push(lambda: whole.split(parts), reads=[whole.var], writes=writes, name="split", inline=True)

    def copy(self, piece: PieceId, span: Span | None, mark: Mark) -> None:
        """What a new replica is to begin with."""
        stored = self.stored[piece]
        elements = slice(None) if span is None else slice(*span)

        def copy() -> None:
            arrays = [array.reshape(-1)[elements].copy() for array in (stored.value, *stored.state.values())]
            names, dtypes = tuple(stored.state), tuple(array.dtype.name for array in arrays[1:])
            self._complete(mark, arrays, names=names, dtypes=dtypes)

        self._engine.push(copy, reads=[stored.var], name="copy", inline=True)

    def _complete(self, mark: Mark, arrays: Sequence[Array], **fields: Any) -> None:
        """The payload of an entry of the log; from any thread."""
        frames = tuple(array.reshape(-1).view(np.uint8) for array in arrays)
        if self._loop.is_here:
            mark.complete(frames, **fields)
            return

        def complete() -> None:
            mark.complete(frames, **fields)
            self._on_logged()

        self._loop.post(complete)

    def do(
        self,
        stored: Stored,
        work: Callable[[], None],
        name: str,
        priority: int,
        reads: tuple[engine.Var, ...],
        writes: tuple[engine.Var, ...],
        about: Apply | None = None,
        far: bool = False,
    ) -> engine.Handle | None:
        """Do this after what was to be done on the piece before: as an op, or at once and then there is no handle.

        ``far``: it concerns no shared memory. Small work is done at once if the piece is free, and it stays so:
        no other thread submits ops on it.
        """
        inline = stored.value.nbytes <= (AT_ONCE_BYTES if far or self.alone else INLINE_BYTES)
        if inline and self._engine.free(stored.var):
            try:
                work()
                return None
            except Exception as raised:
                work = partial(_raise, raised)  # so that those hear of it who would hear of an op's error
        info = None
        if about is not None:
            info = {"key": about.piece[0], "bytes": stored.value.nbytes, "round": about.round}
        return self._engine.push(work, reads, writes, priority, name=name, inline=inline, info=info)


def _elements(payload: object) -> Array:
    """A payload as the array it is, or is a part of."""
    if isinstance(payload, Part):
        return _elements(payload.payload).reshape(-1)[slice(*payload.span)]
    assert isinstance(payload, np.ndarray)
    return payload


def _raise(error: Exception) -> None:
    raise error
