"""A worker's bundles: which of its keys travel together, and how they come and go.

What a bundle is to the servers is said in :mod:`kvstore.protocol.bundles`. Here it is a
:class:`~kvstore.cluster.exchange.Remote` of its own, with its own count of rounds and its own order of requests, which
its members' pulls join. A key that leaves takes over the count, once all that is on its way has come.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import engine
from kvstore.cluster.exchange import Remote
from kvstore.cluster.near import NEAR_BYTES
from kvstore.cluster.session import Session
from kvstore.errors import KVStoreError
from kvstore.handle import Ended
from kvstore.home import Bundle, Gradient, Reading, Source
from kvstore.protocol.messages import Bind
from kvstore.protocol.pieces import PIECE_BYTES, Key, bundle_id

if TYPE_CHECKING:
    from kvstore.cluster.client import ClusterHome

BLAMED_MAX = 4  # a key that has ended so many bundles stays alone: it is never in the same list


class RemoteBundle:
    """A bundle in the form that the device level uses; see :class:`kvstore.home.Bundle`."""

    def __init__(self, home: ClusterHome, whole: Remote, members: Sequence[Remote]) -> None:
        self._home = home
        self._whole = whole
        self._members = {_key(member): member for member in members}
        self.keys = tuple(self._members)

    def __repr__(self) -> str:
        return f"<RemoteBundle of {len(self.keys)} keys, round {self._whole.round}>"

    def begin(self) -> bool:
        members = self._members.values()
        rounds = {member.latest.round for member in members}
        if len(rounds) > 1 or not self._whole.quiet or not all(map(_joins, members)):
            return False
        (self._whole.round,) = rounds
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

    def make(self, remotes: Sequence[Remote], timeout_s: float) -> list[Bundle]:
        """Bundles of those that are small and alike, with nothing on their way, to which their servers have agreed.

        Nobody is asked from within the session's loop, where a wait for the answer would be in vain.
        """
        if not self._session.may_wait:
            return []
        groups = {
            tuple(map(_key, members)): members
            for members in _alike([remote for remote in remotes if _joins(remote)])
            if len(members) > 1
        }
        asked = {keys: self._bind(keys, members[0]) for keys, members in groups.items() if keys not in self._wholes}
        for keys, answer in asked.items():
            if _agreed(answer, timeout_s):
                self._wholes[keys] = self._whole(keys, groups[keys])
        return [
            RemoteBundle(self._home, self._wholes[keys], members)
            for keys, members in groups.items()
            if keys in self._wholes
        ]

    def _bind(self, keys: tuple[Key, ...], first: Remote) -> Future[Any]:
        return self._session.ask(first.owners[0], lambda i: Bind(i, bundle_id(keys), keys))

    def _whole(self, keys: tuple[Key, ...], members: list[Remote]) -> Remote:
        items = sum(member.cut.items for member in members)
        spec = replace(members[0].spec, shape=(items,), piece_items=items)
        return self._home.remote(bundle_id(keys), spec, members[0].owners)

    def take_over(self, remote: Remote) -> None:
        """Before its first request after it left a bundle: go on from there, when everything of the bundle has come."""
        former = remote.former
        if former is None:
            return
        remote.former = None

        def start(completion: engine.Completion) -> None:
            def quiet() -> None:
                remote.round = former.round
                completion.set_result(None)

            former.when_quiet(quiet)

        self._engine.push_async(start, reads=[former.order], writes=[remote.order], name="leave bundle", inline=True)


def _joins(remote: Remote) -> bool:
    """May it be moved together with others, from here on?"""
    nbytes = remote.cut.items * remote.dtype.itemsize
    return 0 < nbytes < NEAR_BYTES and remote.bundle is None and remote.blamed < BLAMED_MAX and remote.quiet


def _alike(remotes: Iterable[Remote]) -> Iterator[list[Remote]]:
    """Those that one server can take as one piece, which is no larger than others."""
    groups: dict[object, list[list[Remote]]] = {}
    size: dict[object, int] = {}  # bytes in the last list of a group
    for remote in remotes:
        spec, nbytes = remote.spec, remote.cut.items * remote.dtype.itemsize
        kind = (remote.owners, spec.dtype, spec.cluster_model, spec.participants, remote.latest.round)
        lists = groups.setdefault(kind, [[]])
        size[kind] = size.get(kind, 0) + nbytes
        if size[kind] > PIECE_BYTES:
            lists.append([])
            size[kind] = nbytes
        lists[-1].append(remote)
    return (members for lists in groups.values() for members in lists)


def _agreed(answer: Future[Any], timeout_s: float) -> bool:
    """Has the server agreed? If it does not want to, the keys travel alone."""
    try:
        answer.result(timeout_s)
    except (KVStoreError, TimeoutError):
        return False
    return True


def _key(remote: Remote) -> Key:
    assert not isinstance(remote.key, bytes)
    return remote.key
