"""A server's copies of its pieces as a cut has them, until whoever asked for the cut has read them.

A value is not copied but lent: the next update goes to other memory (:meth:`kvstore.stored.Stored.lend`). The
optimizer's state is changed in place, so it is copied, by an op on the piece like any other. What the cut consists of
is decided in :mod:`kvstore.protocol.cutting`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

import engine
from kvstore.arrays import Array
from kvstore.errors import CheckpointError, to_wire
from kvstore.handle import when_ended
from kvstore.protocol.actions import TakeCut
from kvstore.protocol.messages import (
    PIECES_MAX,
    Copied,
    CutPieces,
    Done,
    EndCut,
    Failed,
    Message,
    PieceRecord,
    ReadCopy,
    ReadCut,
)
from kvstore.protocol.pieces import Key, PieceId, Span
from kvstore.stored import Stored

UNREAD_S = 120.0  # copies that nobody has asked for so long are dropped: their reader is gone

Answer = Callable[[bytes, Message, Sequence[Any]], None]


@dataclass(eq=False)
class _Taken:
    """One cut: what has been copied, and who waits for the rest."""

    optimizer: dict[str, Any] = field(default_factory=dict)
    records: list[PieceRecord] = field(default_factory=list)
    copies: dict[tuple[Key, int], list[Array]] = field(default_factory=dict)  # the value, then the state
    lent: list[Stored] = field(default_factory=list)
    left: int = 0  # ops that have not ended
    begun: bool = False
    error: BaseException | None = None
    waiting: list[tuple[bytes, ReadCut]] = field(default_factory=list)
    touched: float = field(default_factory=time.monotonic)

    @property
    def ended(self) -> bool:
        return self.error is not None or (self.begun and not self.left)


class Copies:
    """The copies of one server. Its methods are called in the server's loop.

    Args:
        post: runs something in the loop.
        answer: sends a reply to a connection.
    """

    def __init__(self, runtime: engine.Engine, post: Callable[[Callable[[], None]], None], answer: Answer) -> None:
        self._engine = runtime
        self._post = post
        self._answer = answer
        self._taken: dict[int, _Taken] = {}

    def __repr__(self) -> str:
        return f"<Copies: { ({cut: len(taken.copies) for cut, taken in self._taken.items()}) }>"

    # --- from the core ------------------------------------------------------------------------

    def take(self, action: TakeCut, stored: dict[PieceId, Stored]) -> None:
        """Copy the pieces, each after what was to be done on it before."""
        taken = self._taken.setdefault(action.cut, _Taken())
        taken.begun, taken.left = True, len(action.places)
        taken.optimizer = {} if action.rule is None else action.rule.to_wire()
        for piece, parts in action.places:
            self._copy(taken, stored[piece], parts)
        self._answer_waiting(taken)

    def lose(self, cut: int, error: BaseException) -> None:
        """There will be no such cut."""
        taken = self._taken.setdefault(cut, _Taken())
        taken.error = error
        self._answer_waiting(taken)

    def _copy(self, taken: _Taken, stored: Stored, parts: Sequence[tuple[PieceRecord, Span | None]]) -> None:
        rows: list[tuple[PieceRecord, list[Array]]] = []

        def copy() -> None:
            value = stored.lend(taken).reshape(-1)
            state = {name: array.reshape(-1).copy() for name, array in stored.state.items()}
            names, dtypes = tuple(state), tuple(array.dtype.name for array in state.values())
            for record, span in parts:
                elements = slice(None) if span is None else slice(*span)
                arrays = [value[elements], *(array[elements] for array in state.values())]
                rows.append((replace(record, names=names, dtypes=dtypes), arrays))

        def over(error: BaseException | None) -> None:
            taken.lent.append(stored)
            for record, arrays in rows:
                taken.records.append(record)
                taken.copies[record.key, record.piece] = arrays
            taken.left -= 1
            taken.error = taken.error or error
            self._answer_waiting(taken)

        handle = self._engine.push(copy, reads=[stored.var], name="copy for a cut", inline=True)
        when_ended(handle, lambda error: self._post(lambda: over(error)))

    # --- from readers -------------------------------------------------------------------------

    def read(self, peer: bytes, message: ReadCut) -> None:
        """Answer with what the cut has, once it has been taken."""
        taken = self._taken.setdefault(message.cut, _Taken())
        taken.waiting = [(who, asked) for who, asked in taken.waiting if asked.request_id != message.request_id]
        taken.waiting.append((peer, message))
        self._answer_waiting(taken)

    def read_copy(self, peer: bytes, message: ReadCopy) -> None:
        """Send a piece."""
        taken = self._taken.get(message.cut)
        arrays = None if taken is None else taken.copies.get((message.key, message.piece))
        if taken is None or arrays is None:
            error = CheckpointError(f"key {message.key!r}, piece {message.piece}: this cut has none such, or is over")
            self._answer(peer, Failed(message.request_id, *to_wire(error)), ())
            return
        taken.touched = time.monotonic()
        frames = [np.ascontiguousarray(array).view(np.uint8) for array in arrays]
        self._answer(peer, Copied(message.request_id), frames)

    def end(self, peer: bytes, message: EndCut) -> None:
        """Nobody reads the cut any more."""
        self._drop(message.cut)
        self._answer(peer, Done(message.request_id), ())

    def tick(self, now: float) -> None:
        """Drop what nobody reads."""
        for cut, taken in list(self._taken.items()):
            if not taken.waiting and now - taken.touched > UNREAD_S:
                self._drop(cut)

    def _drop(self, cut: int) -> None:
        taken = self._taken.pop(cut, None)
        if taken is not None:
            taken.copies.clear()
            for stored in taken.lent:
                stored.give_back(taken)

    def _answer_waiting(self, taken: _Taken) -> None:
        taken.touched = time.monotonic()
        if not taken.ended:
            return
        waiting, taken.waiting = taken.waiting, []
        for peer, asked in waiting:
            if taken.error is not None:
                self._answer(peer, Failed(asked.request_id, *to_wire(taken.error)), ())
            else:
                some = tuple(taken.records[asked.first : asked.first + PIECES_MAX])
                self._answer(peer, CutPieces(asked.request_id, len(taken.records), taken.optimizer, some), ())
