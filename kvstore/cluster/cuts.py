"""Asks a cluster for a cut and reads it from all servers: the side of whoever makes a checkpoint.

That is a worker (:meth:`KVStore.save_checkpoint`) or a server's thread (:mod:`kvstore.cluster.periodic`). The
scheduler names the cut point, the workers mark it, and each server answers when it has copied its pieces.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np

from kvstore.arrays import Array, dtype_named
from kvstore.checkpoint.cut import CutSource, KeyRecord, Part
from kvstore.cluster.session import SCHEDULER, Session
from kvstore.errors import CheckpointError, DeadlineError, KVStoreError
from kvstore.protocol.messages import AskCut, CutPieces, EndCut, Named, PieceRecord, ReadCopy, ReadCut
from kvstore.protocol.pieces import Key

AHEAD_BYTES = 32 << 20  # of pieces that are asked for before the ones before have come
AHEAD = 256  # how many


class Cuts:
    """Cuts of the cluster that ``session`` is connected to."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def __repr__(self) -> str:
        return f"<Cuts of {self._session!r}>"

    def ask(self) -> tuple[int, Future[Any]]:
        """Ask for a cut: its number, and the scheduler's answer."""
        cut = secrets.randbits(62)
        return cut, self._session.ask(SCHEDULER, lambda i: AskCut(i, cut))

    def take(self, cut: int, named: Future[Any], timeout_s: float) -> CutSource:
        """Wait until all servers have taken it.

        Raises:
            CheckpointError: a worker did not reach its cut point in time, or something else was in the way.
            DeadlineError: the servers did not have it within ``timeout_s`` seconds.
        """
        end = time.monotonic() + timeout_s
        name = _result(named, end, "a cut: the scheduler has not named its point")
        assert isinstance(name, Named)
        servers = range(len(self._session.servers))
        try:
            pieces: dict[tuple[Key, int], tuple[PieceRecord, int]] = {}
            optimizer: dict[str, Any] = {}
            firsts = [self._session.ask(s, lambda i: ReadCut(i, cut, name.awaited, 0)) for s in servers]
            for server, first in enumerate(firsts):
                try:
                    reply = _result(first, end, f"a cut at cut point {name.at} of workers {list(name.awaited)}")
                except DeadlineError as error:
                    raise DeadlineError(f"{error}; {self._session.explain(server, cut)}") from error
                optimizer = self._collect(cut, name, server, reply, pieces, end)
            return _ClusterCut(self._session, cut, name.at, optimizer or None, pieces, end)
        except BaseException:
            end_cut(self._session, cut)
            raise

    def _collect(
        self,
        cut: int,
        name: Named,
        server: int,
        reply: Any,
        pieces: dict[tuple[Key, int], tuple[PieceRecord, int]],
        end: float,
    ) -> dict[str, Any]:
        """What a server has of the cut; its optimizer."""
        came = 0
        while True:
            assert isinstance(reply, CutPieces)
            came += len(reply.pieces)
            pieces.update(((piece.key, piece.piece), (piece, server)) for piece in reply.pieces)
            if came >= reply.total:
                return reply.optimizer
            more = partial(ReadCut, cut=cut, awaited=name.awaited, first=came)
            reply = _result(self._session.ask(server, more), end, "the rest of a cut")


class _ClusterCut(CutSource):
    """A cut whose pieces the servers keep until it is closed."""

    def __init__(
        self,
        session: Session,
        cut: int,
        at: int,
        optimizer: dict[str, Any] | None,
        pieces: dict[tuple[Key, int], tuple[PieceRecord, int]],
        end: float,
    ) -> None:
        self.at, self.optimizer = at, optimizer
        self._session = session
        self._cut = cut
        self._end = end
        self._pieces: dict[Key, list[tuple[PieceRecord, int]]] = {}  # by key, in order, each with its server
        for (key, _), found in sorted(pieces.items(), key=lambda item: (str(item[0][0]), item[0][1])):
            self._pieces.setdefault(key, []).append(found)
        self.records = [self._record(key, [piece for piece, _ in found]) for key, found in self._pieces.items()]

    def __repr__(self) -> str:
        return f"<Cut at cut point {self.at}: {len(self.records)} keys>"

    def _record(self, key: Key, pieces: list[PieceRecord]) -> KeyRecord:
        first = pieces[0]
        for piece in pieces:
            for what in ("spec", "version", "step", "rounds", "names", "dtypes"):
                if getattr(piece, what) != getattr(first, what):
                    raise CheckpointError(
                        f"key {key!r}: the pieces in the cut differ in their {what}: {getattr(first, what)} in the "
                        f"first, {getattr(piece, what)} in piece {piece.piece}"
                    )
        if [piece.piece for piece in pieces] != list(range(len(first.spec.cut))):
            raise CheckpointError(f"key {key!r}: the cut has {len(pieces)} of its {len(first.spec.cut)} pieces")
        states = dict(zip(first.names, first.dtypes, strict=True))
        return KeyRecord(key, first.spec, first.version, first.step, first.rounds, states)

    def parts(self) -> Iterator[Part]:
        waiting: deque[tuple[KeyRecord, PieceRecord, Future[Any]]] = deque()
        size = 0
        for record in self.records:
            for piece, server in self._pieces[record.key]:
                ask = partial(ReadCopy, cut=self._cut, key=piece.key, piece=piece.piece)
                waiting.append((record, piece, self._session.ask(server, ask, whole=True)))
                size += _nbytes(record, piece)
                while len(waiting) > AHEAD or (size > AHEAD_BYTES and len(waiting) > 1):
                    size -= _nbytes(*waiting[0][:2])
                    yield self._part(*waiting.popleft())
        while waiting:
            yield self._part(*waiting.popleft())

    def _part(self, record: KeyRecord, piece: PieceRecord, answer: Future[Any]) -> Part:
        outcome = _result(answer, self._end, f"key {record.key!r}, piece {piece.piece} of a cut")
        arrays: dict[str, Array] = {}
        for (name, dtype), frame in zip(record.arrays.items(), outcome.payload, strict=True):
            arrays[name] = np.frombuffer(frame, dtype_named(dtype))
        if any(array.size != record.spec.cut.size(piece.piece) for array in arrays.values()):
            raise CheckpointError(f"key {record.key!r}, piece {piece.piece}: came with a wrong number of elements")
        return Part(record, record.spec.cut.span(piece.piece)[0], arrays)

    def close(self) -> None:
        end_cut(self._session, self._cut)


def end_cut(session: Session, cut: int) -> None:
    """Tell all servers that the cut is not needed any more; nobody waits for their answers."""
    for server in range(len(session.servers)):
        with contextlib.suppress(KVStoreError):
            session.ask(server, lambda i: EndCut(i, cut))


def _nbytes(record: KeyRecord, piece: PieceRecord) -> int:
    items = record.spec.cut.size(piece.piece)
    return items * sum(dtype_named(dtype).itemsize for dtype in record.arrays.values())


def _result(answer: Future[Any], end: float, what: str) -> Any:
    try:
        return answer.result(max(0.0, min(end - time.monotonic(), 1e9)))
    except TimeoutError as error:
        if answer.done():
            raise
        raise DeadlineError(f"{what}: not done in time") from error
