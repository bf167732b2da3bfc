"""The scheduler's journal: what it has concluded, in an SQLite file, so that a restarted one goes on from there.

What this file decides: the form on disk, and when it is there (before :meth:`Journal.write` returns). What is worth
keeping is decided by :class:`kvstore.protocol.roster.Membership`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from kvstore.errors import OptionError, ProtocolError
from kvstore.protocol.messages import NOBODY
from kvstore.protocol.roster import Member, Membership
from kvstore.protocol.wire import Sender, decode, encode

FORM = 2  # of the tables; a file of another one is refused
_CLUSTER = ("cluster", "num_workers", "num_servers", "replication", "epoch", "on_loss", "started")
_MEMBER = tuple(f.name for f in fields(Member) if f.name not in ("peer", "request_id", "heard", "waiting"))


class Journal:
    """One scheduler's file; ``:memory:`` is none. Used by one thread at a time.

    There are two tables: ``members``, and ``cluster`` with one row, whose ``placement`` is what
    :meth:`kvstore.protocol.placement.Placing.records` told, in the form of the wire.

    Raises:
        OptionError: it cannot be opened, or is something else.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        try:
            self._database = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = FULL")
            (form,) = self._database.execute("PRAGMA user_version").fetchone()
            if form not in (0, FORM):
                raise OptionError(f"journal {self.path}: expected form {FORM}, it has form {form}")
            self._database.execute(f"CREATE TABLE IF NOT EXISTS cluster ({', '.join(_CLUSTER)}, placement)")
            self._database.execute(
                f"CREATE TABLE IF NOT EXISTS members ({', '.join(_MEMBER)}, PRIMARY KEY (role, rank))"
            )
            self._database.execute(f"PRAGMA user_version = {FORM}")
        except sqlite3.Error as error:
            raise self._unwritable(error) from error

    def __repr__(self) -> str:
        return f"<Journal {self.path}>"

    def recover(self, begin: Callable[[], Membership], now: float) -> Membership:
        """The membership that the journal tells of; from ``begin`` when it is empty.

        Raises:
            OptionError: it tells of a cluster of another size, or of what this version does not know.
        """
        new = begin()
        row = self._database.execute(f"SELECT {', '.join(_CLUSTER)}, placement FROM cluster").fetchone()
        if row is None:
            self.write(new)
            return new
        *row, placement = row
        known = dict(zip(_CLUSTER, row, strict=True))
        known["started"] = bool(known["started"])
        recovered = Membership(**known)
        if _size(recovered) != _size(new):
            raise OptionError(f"journal {self.path}: expected {_size(new)}; it tells of {_size(recovered)}")
        try:
            _, placed = decode(placement, 0)
        except ProtocolError as error:
            raise OptionError(f"journal {self.path}: expected a placement, {error}") from error
        rows = self._database.execute(f"SELECT {', '.join(_MEMBER)} FROM members ORDER BY role, rank")
        members = (Member(peer=None, request_id=0, heard=now, **dict(zip(_MEMBER, row, strict=True))) for row in rows)
        recovered.recover(members, [message for message, _ in placed])
        return recovered

    def write(self, membership: Membership) -> None:
        """Keep what has changed; it is on disk when this returns.

        Raises:
            OptionError: it is not: nobody must be told of it, and what is in memory is worth nothing any more.
        """
        members, placed = membership.records()
        sender = Sender(membership.cluster, membership.epoch, NOBODY, NOBODY)
        placement = encode(sender, [(message, 0) for message in placed])
        cluster = [*(getattr(membership, name) for name in _CLUSTER), placement]
        try:
            self._replace(cluster, members)
        except sqlite3.Error as error:
            if self._database.in_transaction:
                self._database.rollback()
            raise self._unwritable(error) from error

    def _replace(self, cluster: list[Any], members: list[Member]) -> None:
        self._database.execute("BEGIN")
        self._database.execute("DELETE FROM cluster")
        self._database.execute(f"INSERT INTO cluster VALUES ({', '.join('?' * len(cluster))})", cluster)
        self._database.executemany(
            f"INSERT OR REPLACE INTO members VALUES ({', '.join('?' * len(_MEMBER))})",
            [[getattr(member, name) for name in _MEMBER] for member in members],
        )
        self._database.execute("COMMIT")

    def _unwritable(self, error: sqlite3.Error) -> OptionError:
        return OptionError(f"journal {self.path}: expected a file that can be written, {error}")

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()


def _size(membership: Membership) -> str:
    return (
        f"a cluster of {membership.num_workers} workers and {membership.num_servers} servers "
        f"with replication {membership.replication}"
    )
