"""What a server that is started with a checkpoint takes from it.

Every server reads the elements of its own pieces when they are initialised, so that neither the number of servers nor
the way in which values are cut has to be that of the servers that wrote it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from kvstore import optim
from kvstore.arrays import Array
from kvstore.checkpoint.cut import VALUE
from kvstore.checkpoint.reading import Checkpoint
from kvstore.errors import DisagreementError
from kvstore.protocol.messages import Spec
from kvstore.protocol.pieces import PieceId
from kvstore.protocol.settings import Settings


@dataclass(frozen=True, slots=True)
class RestoredPiece:
    """A piece as the checkpoint has it."""

    version: int
    step: int
    value: Array
    state: dict[str, Array]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the arrays of the state."""
        return tuple(self.state)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Of these arrays."""
        return tuple(array.dtype.name for array in self.state.values())


class Restoring:
    """A checkpoint that a server begins with.

    Raises:
        CheckpointError: there is none, or its manifest is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._checkpoint = Checkpoint(path)
        self._optimizer = None if self._checkpoint.optimizer is None else optim.from_wire(self._checkpoint.optimizer)

    def __repr__(self) -> str:
        return f"<Restoring {self._checkpoint!r}>"

    def begin(self, settings: Settings) -> None:
        """The optimizer is that of the checkpoint; workers that set an equal one change nothing."""
        if self._optimizer is not None:
            settings.set(self._optimizer, {}, replace=True, by=-1)

    def piece(self, piece_id: PieceId, spec: Spec) -> RestoredPiece | None:
        """What the checkpoint has of a new piece; None: nothing.

        Raises:
            DisagreementError: of another shape or dtype.
            CheckpointError: it is damaged.
        """
        key, number = piece_id
        stored = None if isinstance(key, bytes) else self._checkpoint.manifest.keys.get(key)
        if stored is None or isinstance(key, bytes):
            return None
        record = stored.record
        if (record.spec.shape, record.spec.dtype) != (spec.shape, spec.dtype):
            raise DisagreementError(
                f"key {key!r}: the checkpoint {self._checkpoint.path} has {record.spec.dtype} of shape "
                f"{record.spec.shape}, the worker {spec.dtype} of shape {spec.shape}"
            )
        elements = slice(*spec.cut.span(number))
        state = {name: self._checkpoint.array(key, name)[elements].copy() for name in record.states}
        value = self._checkpoint.array(key, VALUE)[elements].copy()
        return RestoredPiece(record.version, record.step, value, state)
