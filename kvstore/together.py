"""Small keys of a local store that are moved together: their values lie in one array as long as that lasts.

A bundle is to the home one more :class:`Value`: pushed, updated and read as one. What its keys have of their own waits
until they leave, and then gets its part. :mod:`kvstore.lists` decides which keys of a list call are moved so.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from kvstore.arrays import HOST, Array, empty
from kvstore.handle import Ended
from kvstore.home import BLAMED_MAX, Gradient, HomeBundle, Reading, Source
from kvstore.protocol.bundles import alike
from kvstore.protocol.messages import Spec
from kvstore.protocol.pieces import SMALL_PIECE_BYTES, Key
from kvstore.stored import Stored

if TYPE_CHECKING:
    from kvstore.local import LocalHome

MEMBER_BYTES = 64 << 10  # larger values are not worth two more copies

_ALL = slice(None)
_numbers = itertools.count()


@dataclass(eq=False, slots=True)
class Value:
    """A key's value and where it is, or a bundle's."""

    key: Key
    spec: Spec
    own: Stored  # what its pushes change; a key is in no bundle when it is pushed by itself
    memory: int = HOST  # where it is, or will be when an op has moved it
    placed: bool = False  # there for good, as far as GPUs are concerned
    rounds: int = 0  # pushes
    version: int = 0  # updates: those before the pushes that are counted here too
    staging: Array | None = None
    whole: Value | None = None  # the bundle's, within which it lies for the time being
    elements: slice = field(default_factory=lambda: _ALL)  # which of the bundle's it is then
    blamed: int = 0

    @property
    def seen(self) -> tuple[int, int]:
        """Its rounds and its version, those within a bundle included."""
        more = 0 if self.whole is None else self.whole.rounds
        return self.rounds + more, self.version + more

    @property
    def place(self) -> tuple[Stored, slice]:
        """In what it is stored, and which of the elements there it is."""
        return (self.own, _ALL) if self.whole is None else (self.whole.own, self.elements)


class LocalBundle(HomeBundle):
    """See :class:`kvstore.home.HomeBundle`."""

    divided = False  # nobody but this store could move its keys by themselves

    def __init__(self, values: Sequence[Value], home: LocalHome) -> None:
        self._home = home
        self._values = {value.key: value for value in values}
        self._whole: Value | None = None  # while it is in force
        self.keys = tuple(self._values)

    def __repr__(self) -> str:
        return f"<LocalBundle of {len(self.keys)} keys>"

    def begin(self) -> bool:
        values = list(self._values.values())
        items = sum(value.own.value.size for value in values)
        name = f"bundle {next(_numbers)}"
        spec = replace(values[0].spec, shape=(items,), piece_items=items)
        memory, first = values[0].memory, values[0].own
        whole = Value(name, spec, Stored(empty(items, first.value.dtype, memory), name), memory)
        whole.own.names = [whole.own.var, *first.names[1:]]
        whole.version = min(value.version for value in values)
        if not self._home.unite(values, whole):
            return False
        self._whole = whole
        return True

    def let_go(self, key: Key, *, blamed: bool) -> None:
        if self._whole is not None:
            values, whole, self._whole = list(self._values.values()), self._whole, None
            self._home.split(values, whole)
        self._values[key].blamed += blamed

    def push(self, gradient: Gradient, ended: Ended) -> Reading:
        return self._home.push_value(self._in_force, gradient, ended)

    def pull(self, priority: int) -> Source:
        return self._home.pull_value(self._in_force, priority)

    def pushpull(self, gradient: Gradient, ended: Ended) -> tuple[Reading, Source]:
        return self._home.pushpull_value(self._in_force, gradient, ended)

    def explain(self) -> str:
        return self._home.explain(self._in_force.key)

    @property
    def _in_force(self) -> Value:
        assert self._whole is not None, self
        return self._whole


def bundles_of(values: Iterable[Value], home: LocalHome) -> list[HomeBundle]:
    """Bundles of those that are small, and alike: an optimizer's next update is the same for all of a bundle."""
    groups = alike(filter(_joins, values), _kind, _nbytes, SMALL_PIECE_BYTES)
    return [LocalBundle(members, home) for members in groups]


def _joins(value: Value) -> bool:
    """May it be moved together with others, from here on?"""
    return 0 < _nbytes(value) <= MEMBER_BYTES and value.whole is None and value.blamed < BLAMED_MAX


def _kind(value: Value) -> tuple[object, int, int]:
    return value.own.value.dtype, value.rounds, value.memory


def _nbytes(value: Value) -> int:
    return value.own.value.nbytes
