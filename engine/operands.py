"""What ops read and write: from arrays, groups and vars to the vars that order them, memory by memory.

Nothing is known here of when an op runs, or who runs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from engine.devices import DeviceMemory, Devices
from engine.groups import ArrayGroup
from engine.memory import Memory
from engine.scheduler import Op
from engine.var import Var


class Operands:
    """The memories of the host and of devices, and what is in use of them. Not thread-safe, but for ``places``."""

    def __init__(self) -> None:
        self.devices: Devices | None = None
        self._memories: dict[int | None, Memory] = {None: Memory()}  # by device; None is the host
        self._ops = 0  # unfinished, on arrays
        self._scarred = False  # may an array carry an error?

    def __repr__(self) -> str:
        return f"<Operands: {self._ops} ops on arrays, {self._memories}>"

    def places(self, items: Iterable[Any]) -> Iterator[int | None]:
        """Where the arrays among the items are, in their order: numbers of devices, None for the host."""
        devices = self.devices
        for item in items:
            if isinstance(item, ArrayGroup):
                yield from item.parts(devices)
            elif not isinstance(item, Var):
                yield None if devices is None else devices.device_of(item)

    def op(self, name: str, reads: tuple[Any, ...], writes: tuple[Any, ...], priority: int) -> Op:
        """An op on items some of which are no vars; it keeps them until :meth:`ended`.

        Raises:
            ArgumentError: one is not an array either.
        """
        self.tidy()
        read_vars: list[Var] = []
        for item in reads:
            _, whole, part = self._lookup(item)
            read_vars += whole + part
        write_vars: list[Var] = []
        poisons: list[Var] = []
        heals: list[Var] = []
        for item in writes:
            own, whole, part = self._lookup(item)
            write_vars += whole + part
            poisons += own
            heals += whole
        op = Op(name, tuple(read_vars), tuple(write_vars), priority)
        op.poisons, op.heals = poisons, heals
        op.holds = (reads, writes)
        return op

    def begun(self) -> None:
        """Such an op is submitted."""
        self._ops += 1

    def ended(self, error: BaseException | None) -> None:
        """Such an op has ended."""
        self._ops -= 1
        self._scarred = self._scarred or error is not None

    def vars_of(self, item: Any) -> list[Var]:
        """Of all that the item overlaps."""
        _, whole, part = self._lookup(item)
        return whole + part

    def _lookup(self, item: Any) -> tuple[list[Var], list[Var], list[Var]]:
        """Its own vars, one for each memory in which it has bytes; with these, those it covers whole; those in part."""
        if isinstance(item, Var):
            return [item], [item], []
        if not isinstance(item, ArrayGroup):
            whole, part = self._memory(None if self.devices is None else self.devices.device_of(item)).vars_of(item)
            return whole[:1], whole, part
        own, whole, part = [], [], []
        for device, some in item.parts(self.devices).items():
            its_whole, its_part = self._memory(device).vars_of(some)
            own += its_whole[:1]
            whole += its_whole
            part += its_part
        return own, whole, part

    def _memory(self, device: int | None) -> Memory:
        memory = self._memories.get(device)
        if memory is None:
            assert self.devices is not None
            memory = self._memories[device] = DeviceMemory(self.devices)
        return memory

    def tidy(self) -> None:
        """Forget what is not in use; see :meth:`Memory.tidy`."""
        for memory in self._memories.values():
            memory.tidy()

    def in_use(self) -> bool:
        """Is there an unfinished op on arrays, or an array that carries an error?"""
        if self._scarred and not self._ops:
            self.tidy()
            self._scarred = any(memory.in_use() for memory in self._memories.values())
        return self._ops > 0 or self._scarred
