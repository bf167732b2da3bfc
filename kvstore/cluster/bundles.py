"""A worker's bundles: which of its keys travel together, and how they come and go.

What a bundle is to the servers is said in :mod:`kvstore.protocol.bundles`. Here it is a
:class:`~kvstore.cluster.exchange.Remote` of its own, with its own count of rounds and its own order of requests, which
its members' pulls join. A key that leaves takes over the count. What was on its way together comes together, or is
divided: see :mod:`kvstore.protocol.dividing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import engine
from kvstore.cluster.exchange import Remote, key_of
from kvstore.cluster.near import NEAR_BYTES
from kvstore.cluster.session import Session
from kvstore.errors import KVStoreError
from kvstore.handle import Ended
from kvstore.home import BLAMED_MAX, Gradient, HomeBundle, Reading, Source
from kvstore.protocol.bundles import alike
from kvstore.protocol.messages import Bind
from kvstore.protocol.pieces import SMALL_PIECE_BYTES, Key, bundle_id

if TYPE_CHECKING:
    from kvstore.cluster.client import ClusterHome

PATIENCE_S = 0.05  # what is open is divided then: this costs as much as it would have without bundles


class RemoteBundle:
    """A bundle in the form that the device level uses; see :class:`kvstore.home.HomeBundle`."""

    def __init__(self, home: ClusterHome, bundles: Bundles, whole: Remote) -> None:
        self._home = home
        self._bundles = bundles
        self._whole = whole
        self._members = {key_of(member): member for member, _ in whole.members}
        self.keys = tuple(self._members)

    def __repr__(self) -> str:
        return f"<RemoteBundle of {len(self.keys)} keys, round {self._whole.round}>"

    @property
    def divided(self) -> bool:
        return self._whole.divided

    def begin(self) -> bool:
        members = self._members.values()
        rounds = {member.latest.round for member in members}
        if len(rounds) > 1 or not self._whole.quiet or not all(map(_joins, members)):
            return False
        self._bundles.begin(self._whole, rounds.pop())
        for member in members:
            member.bundle, member.former = self._whole, None
        return True

    def let_go(self, key: Key, *, blamed: bool) -> None:
        member = self._members[key]
        member.former, member.bundle = self._whole, None
        member.blamed += blamed

    def push(self, gradient: Gradient, ended: Ended) -> Reading:
        return self._home.push_remote(self._whole, gradient, ended)

    def pull(self, priority: int) -> Source:
        return self._home.pull_remote(self._whole, priority)

    def pushpull(self, gradient: Gradient, ended: Ended) -> tuple[Reading, Source]:
        return self._home.pushpull_remote(self._whole, gradient, ended)

    def explain(self) -> str:
        return self._home.explain_remote(self._whole)


class Bundles:
    """Makes bundles with the servers, and lets keys go."""

    def __init__(self, home: ClusterHome, session: Session, runtime: engine.Engine) -> None:
        self._home = home
        self._session = session
        self._engine = runtime
        self._wholes: dict[tuple[Key, ...], Remote] = {}  # the bundles that the servers know

    def __repr__(self) -> str:
        return f"<Bundles: {len(self._wholes)} known to the servers>"

    def make(self, remotes: Sequence[Remote], timeout_s: float) -> list[HomeBundle]:
        """Bundles of those that are small and alike, with nothing on their way, to which their servers have agreed.

        Nobody is asked from within the session's loop, where a wait for the answer would be in vain.
        """
        if not self._session.may_wait:
            return []
        groups = {
            tuple(map(key_of, members)): members
            for members in alike(filter(_joins, remotes), _kind, _nbytes, SMALL_PIECE_BYTES)
        }
        asked = {keys: self._bind(keys, members[0]) for keys, members in groups.items() if keys not in self._wholes}
        for keys, answer in asked.items():
            if _agreed(answer, timeout_s):
                self._wholes[keys] = self._whole(keys, groups[keys])
        return [RemoteBundle(self._home, self, self._wholes[keys]) for keys in groups if keys in self._wholes]

    def _bind(self, keys: tuple[Key, ...], first: Remote) -> Future[Any]:
        return self._session.ask(first.owners[0], lambda i: Bind(i, bundle_id(keys), keys))

    def _whole(self, keys: tuple[Key, ...], members: list[Remote]) -> Remote:
        items = sum(member.cut.items for member in members)
        spec = replace(members[0].spec, shape=(items,), piece_items=items)
        whole = self._home.remote(bundle_id(keys), spec, members[0].owners)
        bounds = accumulate((member.cut.items * member.dtype.itemsize for member in members), initial=0)
        whole.members = tuple(zip(members, pairwise(bounds), strict=True))
        return whole

    def begin(self, whole: Remote, round: int) -> None:
        """The bundle begins (again), with keys of which so many pushes have been made."""
        self._session.forget(whole.channel(0))
        whole.round, whole.divided, whole.impatient = round, False, False
        whole.times += 1  # another channel, so that nothing of before is in its way

    def take_over(self, remote: Remote) -> None:
        """Before its first request after it left a bundle: go on from there, when nothing of it is on its way together.

        Where this takes long, because another worker is slow with another key, what is open is divided.
        """
        former = remote.former
        if former is None:
            return
        remote.former, channel = None, former.channel(0)

        def start(completion: engine.Completion) -> None:
            def quiet() -> None:
                remote.round = former.round
                completion.set_result(None)

            former.when_quiet(quiet)
            if former.open and not former.impatient:
                former.impatient = True
                self._session.divide(channel, PATIENCE_S)

        self._engine.push_async(start, reads=[former.order], writes=[remote.order], name="leave bundle", inline=True)


def _joins(remote: Remote) -> bool:
    """May it be moved together with others, from here on?"""
    return 0 < _nbytes(remote) < NEAR_BYTES and remote.bundle is None and remote.blamed < BLAMED_MAX and remote.quiet


def _kind(remote: Remote) -> object:
    """What those have in common that a server can take as one piece."""
    spec = remote.spec
    return remote.owners, spec.dtype, spec.cluster_model, spec.participants, remote.latest.round


def _nbytes(remote: Remote) -> int:
    return remote.cut.items * remote.dtype.itemsize


def _agreed(answer: Future[Any], timeout_s: float) -> bool:
    """Has the server agreed? If it does not want to, the keys travel alone."""
    try:
        answer.result(timeout_s)
    except (KVStoreError, TimeoutError):
        return False
    return True
