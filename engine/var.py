"""A var: the thing that ops read and write, whatever it stands for."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.scheduler import Op


class Var:
    """A name for some state. Reads of it share, a write is alone, in the order of submission.

    Args:
        name: for errors and traces.

    Everything but the name belongs to the scheduler.
    """

    __slots__ = ("__weakref__", "name", "poison", "queue", "readers", "writer")

    def __init__(self, name: str | None = None) -> None:
        self.name = name
        self.readers: set[Op] = set()
        self.writer: Op | None = None
        self.queue: deque[Op] = deque()  # in program order
        self.poison: BaseException | None = None

    def __repr__(self) -> str:
        held = f"written by {self.writer.name}" if self.writer else f"{len(self.readers)} readers"
        poison = ", poisoned" if self.poison is not None else ""
        return f"<Var {self.name or hex(id(self))}: {held}, {len(self.queue)} queued{poison}>"

    @property
    def idle(self) -> bool:
        """Nothing holds it and nothing waits for it."""
        return self.writer is None and not self.readers and not self.queue
