"""What the device level sees of the place where values live: this process, or a cluster.

Two implementations, one contract test: :class:`kvstore.local.LocalHome` and
:class:`kvstore.cluster.client.ClusterHome`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import engine
from kvstore import comm
from kvstore.arrays import HOST, Array, memory_of
from kvstore.checkpoint.cut import CutSource
from kvstore.handle import Ended
from kvstore.optim import Optimizer
from kvstore.protocol.messages import Spec
from kvstore.protocol.pieces import Key
from kvstore.records import record

Reading = engine.Handle | None  # an engine op that is still reading what the caller gave
Updater = Callable[[Key, Array, Array], object]

BLAMED_MAX = 4  # a key that has ended so many bundles stays alone: it is never in the same list


@dataclass(eq=False, slots=True)
class Gradient:
    """What the device level pushes as one round: the sum of ``arrays``, folded left to right.

    The arrays are the caller's: they have been read when the call of the home returns, or the op that it
    returns has ended; or, if an engine op still has to write one of them, by an op that waits for that one.
    """

    arrays: list[Array]
    priority: int
    lent: bool = False  # the caller leaves the arrays alone until the operation has ended
    outs: Sequence[Array] | None = None  # pushpull: to where the source will be asked to deliver
    samples: int | None = None  # that it is the sum over, if the key's rounds are of so many
    way: str = comm.AUTO  # in which what lies on several devices comes together

    @property
    def on_devices(self) -> bool:
        """Does some of it lie in the memory of a device?"""
        for array in self.arrays:  # noqa: SIM110  a generator costs more than the rest
            if memory_of(array) != HOST:
                return True
        return False

    @property
    def devices(self) -> set[int]:
        """The GPUs on which some of it lies."""
        return {memory_of(array) for array in self.arrays} - {HOST}

    @property
    def reads(self) -> list[Any]:
        """What an op that calls :meth:`write` reads."""
        return list(self.arrays)

    def summands(self) -> list[Array]:
        """The arrays whose sum it is, all of the value's shape."""
        return self.arrays

    def write(self, out: Array) -> None:
        """Write the sum to ``out``, which is flat."""
        arrays = self.summands()
        comm.merge(arrays, out.reshape(arrays[0].shape), self.way)

    def near(self) -> AbstractContextManager[list[Array]]:
        """Within the block, in an op of a device: arrays that its kernels can use, and that have the same sum."""
        return comm.near(self.arrays, self.way)

    def settled(self, runtime: engine.Engine) -> Gradient:
        """The same without memory of the host that the caller may overwrite before an op of a device has read it."""
        if all(memory_of(array) != HOST for array in self.arrays):
            return self
        return replace(self, arrays=[settled(array, runtime) for array in self.arrays])


def settled(array: Array, runtime: engine.Engine) -> Array:
    """A copy of what lies in host memory; but what an op has still to write is overwritten through the engine only."""
    return array.copy() if memory_of(array) == HOST and not runtime.pending(array) else array


@record
class Held:
    """A value that stays as it is until it is given back."""

    array: Array  # of the value's shape, read-only; where it lies
    version: int | None  # how many updates it has seen
    staleness: int | None  # of the cluster level; None where there is none
    give_back: Callable[[], None]
    pin: Callable[[], bool] = lambda: False  # make its memory such as GPUs copy from by themselves; is it, now?


class Source(ABC):
    """A value on its way."""

    version: int | None = None  # how many updates it has seen; known when it has come
    staleness: int | None = None  # of the cluster level; None where there is none

    @abstractmethod
    def deliver(self, outs: Sequence[Array], priority: int, ended: Ended) -> None:
        """Instead of :meth:`hold`: copy it into ``outs``, by engine ops that write them, then call ``ended``."""

    @abstractmethod
    def hold(self, ended: Callable[[Held | BaseException], None]) -> None:
        """Give it to ``ended`` when it has come, in memory of the home, where it can be without a copy."""


class HomeBundle(Protocol):
    """Keys whose values are moved as one: their concatenation, flat, in the order of ``keys``.

    It is in force from :meth:`begin` on. Its keys may still be pulled by themselves; to be pushed by themselves they
    have to be let go first. Calls for one of its keys are calls for it: they come one after another.
    """

    keys: tuple[Key, ...]

    @property
    def divided(self) -> bool:
        """Since it began, have others moved some of its keys by themselves? Then it had better be given up."""

    def begin(self) -> bool:
        """From here on its keys are moved together. False, with nothing done, if one of them is on its way."""

    def push(self, gradient: Gradient, ended: Ended) -> Reading:
        """As :meth:`Home.push`."""

    def pull(self, priority: int) -> Source:
        """As :meth:`Home.pull`."""

    def pushpull(self, gradient: Gradient, ended: Ended) -> tuple[Reading, Source]:
        """As :meth:`Home.pushpull`."""

    def explain(self) -> str:
        """As :meth:`Home.explain`."""

    def let_go(self, key: Key, *, blamed: bool) -> None:
        """The key is moved by itself again; called for all of them, and then the bundle is not used any more.

        Args:
            blamed: it is this key's fault. After :data:`BLAMED_MAX` times it will be in no bundle any more.
        """


class Home(Protocol):
    """Where values live. Calls for one key come in program order, from any thread."""

    rank: int

    @property
    def workers(self) -> Sequence[int]:
        """The ranks of those who take part now."""

    @property
    def shards(self) -> int:
        """Over how many large values are spread."""

    def init(self, key: Key, spec: Spec, value: Array) -> Future[Any]:
        """Create the key; done when it exists. ``value`` is flat and stays unchanged until then."""

    def push(self, key: Key, gradient: Gradient, ended: Ended) -> Reading:
        """One push; ``ended`` when it is committed."""

    def pull(self, key: Key, priority: int) -> Source:
        """The value after the pushes so far, as the home's consistency allows."""

    def pushpull(self, key: Key, gradient: Gradient, ended: Ended) -> tuple[Reading, Source]:
        """A push and the pull right after it."""

    def gathering(self) -> AbstractContextManager[None]:
        """This thread's pushes and pulls within the block belong together: each may wait for more to go with it."""

    def bundle(self, keys: Sequence[Key], timeout_s: float) -> list[HomeBundle]:
        """Those of ``keys`` that could be moved together, because it pays; may ask whoever has to agree."""

    def staging(self, key: Key, timeout_s: float) -> Array:
        """Memory for the caller to fill; pushed as the only array of a gradient it is not copied again.

        Raises:
            DeadlineError: all of it was on its way, for so long.
        """

    def set_optimizer(self, optimizer: Optimizer, replace: bool, timeout_s: float) -> None: ...

    def set_hyperparameters(self, changes: Mapping[str, Any], timeout_s: float) -> None: ...

    def read_state(self, key: Key, timeout_s: float) -> tuple[int, dict[str, Array]]:
        """The optimizer's updates of the key so far, and its state as flat arrays."""

    def write_state(self, key: Key, step: int, state: dict[str, Array], timeout_s: float) -> None: ...

    def barrier(self, timeout_s: float) -> None: ...

    def restore(
        self, key: Key, value: Array, version: int, step: int, state: dict[str, Array], timeout_s: float
    ) -> None:
        """Replace a value (flat) and the optimizer's state of it by what a checkpoint has."""

    def meet(self, timeout_s: float) -> None:
        """A barrier that is no cut point."""

    @property
    def writes_checkpoints(self) -> bool:
        """Of the workers that ask for one together, is it this one that writes it?"""

    def cut_point(self) -> None:
        """All pushes before belong to the cuts that are taken here, later ones do not."""

    def last_cut_point(self) -> None:
        """Nothing more will be pushed."""

    def ask_cut(self, timeout_s: float) -> Callable[[], CutSource]:
        """Ask for a cut, at a cut point to come; what is returned waits until it has been taken."""

    def drive(self, awaited: Future[Any], timeout_s: float) -> bool:
        """The caller is about to wait for this: let its thread do what has to be done, as far as it can."""

    def explain(self, key: Key) -> str:
        """What the open operations of ``key`` wait for."""

    def dead_workers(self) -> list[int]: ...

    def rounds(self, key: Key, timeout_s: float) -> int:
        """The pushes of the key by this worker, those of its earlier lives included."""

    def leave(self, timeout_s: float) -> None:
        """Take part in no further round; all pushes are committed."""

    def close(self, reason: str, timeout_s: float) -> None:
        """Leave: in order when ``reason`` is empty."""
