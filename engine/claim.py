"""Arrays that are being written, as long as nobody else comes near any array; see :meth:`engine.Engine.claim`."""

from __future__ import annotations

from time import perf_counter
from types import FrameType
from typing import TYPE_CHECKING, Any

from engine.handle import Handle
from engine.scheduler import RUNNING, Op

if TYPE_CHECKING:
    from engine.core import Core


class Claim:
    """What is to be told when the arrays have been written. Thread-safe."""

    __slots__ = ("_caller", "_caller_at", "_engine", "arrays", "name", "op")

    def __init__(self, engine: Core, arrays: tuple[Any, ...], name: str, frame: FrameType) -> None:
        self._engine = engine
        self.arrays = arrays
        self.name = name
        self._caller, self._caller_at = frame.f_code, frame.f_lasti
        self.op: Op | None = None  # that it has been made

    def __repr__(self) -> str:
        return f"<Claim {self.name} of {len(self.arrays)} arrays: {self.op or 'not an op'}>"

    def end(self, error: BaseException | None = None) -> None:
        """They have been written, or carry this error. The first call counts."""
        engine = self._engine
        with engine._lock:
            if engine._claimed is self:
                if error is None:
                    engine._claimed = None
                else:
                    self.become_op()  # for the arrays carry the error
        if self.op is not None:
            engine._finish(self.op, None, error)

    def become_op(self) -> None:
        """Somebody comes near arrays: from here on it is an op. Called with the engine's lock held."""
        engine = self._engine
        engine._claimed = None
        op = self.op = engine._operands.op(self.name, (), self.arrays, 0, engine._operands.places(self.arrays))
        op.caller, op.caller_at = self._caller, self._caller_at
        op.handle = Handle(engine, op)
        op.is_async = True
        engine._operands.begun()
        free = engine._scheduler.submit(op)
        assert free, op  # no op used an array when it was made, and whichever did later came by here
        op.state = RUNNING
        op.started_at = perf_counter()
