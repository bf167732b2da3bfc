"""A worker's bundles: which of its keys travel together, and how they come and go.

What a bundle is to the servers is said in :mod:`kvstore.protocol.bundles`. Here it is a
:class:`~kvstore.cluster.exchange.Remote` of its own, with its own count of rounds and its own order of requests, which
its members' pulls join. A key that leaves takes over the count, once all that is on its way has come.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import engine
from kvstore.cluster.exchange import Remote
from kvstore.cluster.near import NEAR_BYTES
from kvstore.cluster.session import Session
from kvstore.errors import KVStoreError
from kvstore.handle import Ended
from kvstore.home import Gradient, Reading, Source
from kvstore.protocol.messages import Bind
from kvstore.protocol.pieces import PIECE_BYTES, Key, bundle_id

if TYPE_CHECKING:
    from kvstore.cluster.client import ClusterHome

BUNDLED_MAX = 4  # a key that has left its bundles so often stays alone: its lists are never the same


class RemoteBundle:
    """A bundle in the form that the device level uses; see :class:`kvstore.home.Bundle`."""

    def __init__(self, home: ClusterHome, whole: Remote, members: Sequence[Remote]) -> None:
        self.keys = tuple(_key(member) for member in members)
        self._home = home
        self._whole = whole
        self._members = members

    def __repr__(self) -> str:
        return f"<RemoteBundle of {len(self.keys)} keys, round {self._whole.round}>"

    def push(self, gradient: Gradient, ended: Ended) -> Reading:
        return self._home.push_remote(self._whole, gradient, ended)

    def pull(self, priority: int) -> Source:
        return self._home.pull_remote(self._whole, priority)

    def pushpull(self, gradient: Gradient, ended: Ended) -> tuple[Reading, Source]:
        return self._home.pushpull_remote(self._whole, gradient, ended)

    def explain(self) -> str:
        return self._home.explain_remote(self._whole)

    def dissolve(self) -> None:
        for member in self._members:
            member.bundle, member.former = None, self._whole


class Bundles:
    """Makes bundles with the servers, and lets keys go."""

    def __init__(self, home: ClusterHome, session: Session, runtime: engine.Engine) -> None:
        self._home = home
        self._session = session
        self._engine = runtime

    def make(self, remotes: Sequence[Remote], timeout_s: float) -> Iterator[RemoteBundle]:
        """Bundles of those that are small and alike, with nothing on their way; asks their servers."""
        groups: dict[object, list[list[Remote]]] = {}
        size: dict[object, int] = {}  # bytes in the last list of a group
        for remote in remotes:
            spec = remote.spec
            nbytes = remote.cut.items * remote.dtype.itemsize
            if nbytes >= NEAR_BYTES or not nbytes or remote.bundled >= BUNDLED_MAX:
                continue
            if remote.bundle is not None or not remote.quiet:
                continue
            alike = (remote.owners, spec.dtype, spec.device_model, spec.cluster_model, spec.participants, remote.round)
            lists = groups.setdefault(alike, [[]])
            size[alike] = size.get(alike, 0) + nbytes
            if size[alike] > PIECE_BYTES:
                lists.append([])
                size[alike] = nbytes
            lists[-1].append(remote)
        for lists in groups.values():
            for members in lists:
                if len(members) > 1 and (bundle := self._bind(members, timeout_s)) is not None:
                    yield bundle

    def _bind(self, members: list[Remote], timeout_s: float) -> RemoteBundle | None:
        """Tell the server; None when it does not want to, and then the keys travel alone."""
        first, keys = members[0], tuple(_key(member) for member in members)
        name = bundle_id(keys)
        try:
            self._session.ask(first.owners[0], lambda i: Bind(i, name, keys)).result(timeout_s)
        except (KVStoreError, TimeoutError):
            return None
        items = sum(member.cut.items for member in members)
        whole = self._home.remote(name, replace(first.spec, shape=(items,), piece_items=items), first.owners)
        whole.round = first.round
        for member in members:
            member.bundle = whole
            member.bundled += 1
        return RemoteBundle(self._home, whole, members)

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


def _key(remote: Remote) -> Key:
    assert not isinstance(remote.key, bytes)
    return remote.key
