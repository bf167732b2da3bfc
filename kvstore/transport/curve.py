"""Who may connect: CURVE keys on ZeroMQ sockets.

Every connection of a protected cluster is encrypted and both ends are authenticated: the one that connects knows
the cluster's public key beforehand, and the one that accepts asks its :class:`Gate` about the key of the other. Where
keys are kept and how the list of allowed ones comes about is not known here.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import zmq
from zmq.auth.base import Authenticator

from kvstore.transport.reactor import Reactor

log = logging.getLogger(__name__)

DOMAIN = "kvstore"
LOOK_S = 0.5  # how often it is looked whether the list of allowed keys has changed
NOTED_MAX = 1024  # refused keys that are remembered, so that each is logged once


@dataclass(frozen=True, slots=True)
class Identity:
    """A process's own pair of keys, and its cluster's public key; each as 40 characters of Z85."""

    cluster: str
    public: str
    secret: str = field(repr=False)


def protect_connection(socket: zmq.Socket[bytes], own: Identity) -> None:
    """Let a socket that will connect prove who it is, and demand that the other end has the cluster's key."""
    socket.setsockopt(zmq.CURVE_SERVERKEY, own.cluster.encode())
    socket.setsockopt(zmq.CURVE_PUBLICKEY, own.public.encode())
    socket.setsockopt(zmq.CURVE_SECRETKEY, own.secret.encode())


class Gate:
    """Lets allowed keys in. One per reactor, for all its endpoints; within the reactor's loop.

    Args:
        allowed: the keys that may connect now, each with its name; it is asked again and again.
    """

    def __init__(self, reactor: Reactor, own: Identity, allowed: Callable[[], Mapping[str, str]]) -> None:
        self.on_change: list[Callable[[], None]] = []  # called when a key that was allowed no longer is
        self._own = own
        self._read = allowed
        self._reactor = reactor
        self._allowed = dict(allowed())
        self._noted: set[str] = set()
        self._authenticator = Authenticator(reactor.context)
        self._authenticator.configure_curve_callback(DOMAIN, self)
        self._authenticator.start()
        reactor.add(self._authenticator.zap_socket, self._judge)
        reactor.call_later(LOOK_S, self._look)

    def __repr__(self) -> str:
        return f"<Gate: {len(self._allowed)} keys allowed, {len(self._noted)} refused>"

    def protect(self, socket: zmq.Socket[bytes]) -> None:
        """Let a socket that will accept connections ask this gate about each."""
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._own.secret.encode())
        socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN.encode())

    def admits(self, key: str) -> bool:
        """May a peer with this public key speak?"""
        return key in self._allowed

    def note(self, what: str) -> None:
        """Log that something was refused, once."""
        if what not in self._noted and len(self._noted) < NOTED_MAX:
            self._noted.add(what)
            log.warning("refused %s; this is said once", what)

    def callback(self, domain: str, key: bytes) -> bool:
        """The question of the authenticator: may this key connect?"""
        allowed = self.admits(key.decode())
        if not allowed:
            self.note(f"a peer whose key is not on the list of allowed keys: {key.decode()}")
        return allowed

    def _judge(self) -> None:
        with contextlib.suppress(StopIteration):  # a coroutine that waits for nothing
            self._authenticator.handle_zap_message(self._authenticator.zap_socket.recv_multipart()).send(None)

    def _look(self) -> None:
        self._reactor.call_later(LOOK_S, self._look)
        before, self._allowed = self._allowed, dict(self._read())
        revoked = [name for key, name in before.items() if key not in self._allowed]
        self._noted -= self._allowed.keys()
        if revoked:
            log.warning("no longer allowed: %s", ", ".join(revoked))
            for tell in self.on_change:
                tell()
