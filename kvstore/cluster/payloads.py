"""What the frames of a message are: arrays of the dtype and size that the message and its key ask for.

Whatever a peer sends is compared here with what it should be, before the core or the kernels see it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from kvstore.arrays import Array, dtype_named
from kvstore.cluster.near import Neighbourhood
from kvstore.errors import ProtocolError
from kvstore.protocol.messages import (
    NOBODY,
    Init,
    Message,
    Push,
    Restore,
    RestorePiece,
    Spec,
    Updated,
    WriteState,
)
from kvstore.protocol.serving import Serving
from kvstore.transport.network import Frames


def checked(serving: Serving, neighbourhood: Neighbourhood, rank: int, message: Message, payload: Frames) -> Any:
    """The frames of a message of this rank as arrays of the right dtype and size; ProtocolError otherwise."""
    if isinstance(message, Init):
        kind, nbytes = _form(message.spec, message.piece)
        return _one_frame(message, nbytes, kind, payload)
    if isinstance(message, Push | Updated):
        spec = serving.spec_of(message.key, message.piece)
        if spec is None:
            return None
        kind, nbytes = _form(spec, message.piece)
        if isinstance(message, Push) and message.place is not None:
            return neighbourhood.array(rank, message.place, nbytes).view(kind)
        return _one_frame(message, nbytes, kind, payload)
    if isinstance(message, RestorePiece):
        kind, nbytes = _form(message.spec, message.piece)
        if rank != NOBODY or not payload or len(payload[0]) != nbytes:
            raise ProtocolError(f"a log's piece of key {message.key!r}: expected a first frame of {nbytes} bytes")
        return np.frombuffer(payload[0], kind), _state(message.spec, message, payload[1:])
    if isinstance(message, WriteState):
        return _state(serving.spec_of(message.key, message.piece), message, payload)
    if isinstance(message, Restore):
        spec = serving.spec_of(message.key, message.piece)
        if spec is None:
            return None
        kind, nbytes = _form(spec, message.piece)
        if not payload or len(payload[0]) != nbytes:
            raise ProtocolError(f"restore of key {message.key!r}: expected a first frame of {nbytes} bytes")
        return np.frombuffer(payload[0], kind).copy(), _state(spec, message, payload[1:])
    if payload:
        raise ProtocolError(f"{type(message).__name__}: expected no value frame, got {len(payload)}")
    return None


def _one_frame(message: Init | Push | Updated, expected: int, dtype: np.dtype[Any], payload: Frames) -> Array | None:
    if not payload:
        return None
    if len(payload) != 1 or len(payload[0]) != expected:
        raise ProtocolError(
            f"{type(message).__name__.lower()} of key {message.key!r}, piece {message.piece}: expected one frame "
            f"of {expected} bytes, got {[len(frame) for frame in payload]}"
        )
    array: Array = np.frombuffer(payload[0], dtype)
    return array


@lru_cache(maxsize=65536)
def _form(spec: Spec, number: int) -> tuple[np.dtype[Any], int]:
    """The dtype of a piece and its size in bytes; -1 if there is no such piece."""
    kind, cut = dtype_named(spec.dtype), spec.cut
    return kind, cut.size(number) * kind.itemsize if number < len(cut) else -1


def _state(spec: Spec | None, message: WriteState | Restore | RestorePiece, frames: Frames) -> dict[str, Array]:
    """The arrays of an optimizer's state, by name."""
    if not len(frames) == len(message.names) == len(message.dtypes):
        raise ProtocolError(f"optimizer state of key {message.key!r}: expected one frame and dtype per name")
    state = {}
    for name, dtype, frame in zip(message.names, message.dtypes, frames, strict=True):
        kind = dtype_named(dtype)
        items, rest = divmod(len(frame), kind.itemsize)
        if rest or (spec is not None and items != spec.cut.size(message.piece)):
            raise ProtocolError(f"optimizer state of key {message.key!r}: a frame of {len(frame)} bytes")
        state[name] = np.frombuffer(frame, kind).copy()
    return state
