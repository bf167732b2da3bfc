"""The serial engine: every op runs at its push, in the thread that pushes. The oracle of the others."""

from __future__ import annotations

from engine.base import Engine
from engine.scheduler import RUNNING, Op


class SerialEngine(Engine):
    """Runs ops in program order; one behind an asynchronous op runs when that is complete."""

    def _dispatch(self, op: Op) -> None:
        if op.handle is not None:
            self._ready.append(op)

    def __init__(self) -> None:
        super().__init__()
        self._ready: list[Op] = []

    def _submitted(self, op: Op) -> None:
        self._drain()

    def _finish(self, op: Op, result: object, error: BaseException | None) -> None:
        super()._finish(op, result, error)
        self._drain()

    def _drain(self) -> None:
        while True:
            with self._lock:
                ready = [op for op in self._ready if op.state != RUNNING]
                op = next((o for o in ready if self._claim(o)), None)
                self._ready = [o for o in ready if o is not op and o.state == "ready"]
            if op is None:
                return
            self._run(op)
