"""What ops read and write: from arrays, groups and vars to the vars that order them, memory by memory.

Nothing is known here of when an op runs, or who runs it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from engine.devices import DeviceMemory, Devices
from engine.groups import ArrayGroup
from engine.memory import Memory
from engine.scheduler import Op
from engine.var import Var

Place = int | None | Var | ArrayGroup  # of an array the device in whose memory it is, None for the host; else the item

_NO_ARRAYS = Var, ArrayGroup


class Operands:
    """The memories of the host and of devices, and what is in use of them. Under the engine's lock."""

    def __init__(self) -> None:
        self.devices: Devices | None = None
        self._memories: dict[int | None, Memory] = {None: Memory()}  # by device; None is the host
        self._ops = 0  # unfinished, on arrays
        self._scarred = False  # may an array carry an error?

    def __repr__(self) -> str:
        return f"<Operands: {self._ops} ops on arrays, {self._memories}>"

    def places(self, items: Iterable[Any]) -> list[Place]:
        """Where each of the items is; without the lock, like :meth:`memories`."""
        devices = self.devices
        found: list[Place] = []
        last: Any = None
        place: Place = None
        for item in items:
            if item is not last:  # else it is read and written
                last = item
                place = item if isinstance(item, _NO_ARRAYS) else None if devices is None else devices.device_of(item)
            found.append(place)
        return found

    def memories(self, places: list[Place]) -> Collection[int | None]:
        """The devices in whose memories that is, each once and in order; None is the host."""
        if places and type(places[0]) is int and places.count(places[0]) == len(places):
            return (places[0],)  # as a rule
        found: dict[int | None, None] = {}
        for place in places:
            if place is None or type(place) is int:
                found[place] = None
            elif isinstance(place, ArrayGroup):
                found.update(dict.fromkeys(place.parts(self.devices)))
        return found

    def op(self, name: str, reads: tuple[Any, ...], writes: tuple[Any, ...], priority: int, places: list[Place]) -> Op:
        """An op on items some of which are no vars; it keeps them until :meth:`ended`.

        Args:
            name, reads, writes, priority: of the op.
            places: of the writes, then the reads.

        Raises:
            ArgumentError: one is not an array either.
        """
        items = writes + reads
        vars_: list[Var] = []
        last = var = None
        for item, place in zip(items, places, strict=True):
            if item is not last:
                last, var = item, self._only_var_of(item, place)
            if var is None:
                op = self._op_in_general(name, reads, writes, priority)
                break
            vars_.append(var)
        else:
            op = Op(name, tuple(vars_[len(writes) :]), tuple(vars_[: len(writes)]), priority)
        op.holds = items
        return op

    def _only_var_of(self, item: Any, place: Place) -> Var | None:
        """The var that is all there is to an item, as a rule; else None."""
        if place is item:
            return item if isinstance(item, Var) else None
        memory = self._memories.get(place)  # type: ignore[arg-type]
        return None if memory is None else memory.only_var_of(item)

    def _op_in_general(self, name: str, reads: tuple[Any, ...], writes: tuple[Any, ...], priority: int) -> Op:
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
