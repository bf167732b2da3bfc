"""Arrays that are being written, as long as nobody else comes near any array; see :meth:`engine.Engine.claim`."""

from __future__ import annotations

from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.base import Engine
    from engine.scheduler import Op


class Claim:
    """What is to be told when the arrays have been written. Thread-safe."""

    __slots__ = ("_engine", "arrays", "caller", "caller_at", "name", "op")

    def __init__(self, engine: Engine, arrays: tuple[Any, ...], name: str, frame: FrameType) -> None:
        self._engine = engine
        self.arrays = arrays
        self.name = name
        self.caller, self.caller_at = frame.f_code, frame.f_lasti
        self.op: Op | None = None  # that it has been made

    def __repr__(self) -> str:
        return f"<Claim {self.name} of {len(self.arrays)} arrays: {self.op or 'not an op'}>"

    def end(self, error: BaseException | None = None) -> None:
        """They have been written, or carry this error. The first call counts."""
        self._engine._end_claim(self, error)
