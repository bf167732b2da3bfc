"""The scheduler's journal: what it has concluded, in an SQLite file, so that a restarted one goes on from there.

What this file decides: the form on disk, and when it is there (before :meth:`Journal.write` returns). What is worth
keeping is decided by :class:`kvstore.protocol.roster.Membership`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from kvstore.errors import OptionError
from kvstore.protocol.roster import Member, Membership

FORM = 1  # of the tables; a file of another one is refused
_CLUSTER = ("cluster", "num_workers", "num_servers", "epoch", "on_loss", "started")
_MEMBER = tuple(f.name for f in fields(Member) if f.name not in ("peer", "request_id", "heard", "waiting"))


class Journal:
    """One scheduler's file. Used by one thread at a time.

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
            self._database.execute(f"CREATE TABLE IF NOT EXISTS cluster ({', '.join(_CLUSTER)})")
            self._database.execute(
                f"CREATE TABLE IF NOT EXISTS members ({', '.join(_MEMBER)}, PRIMARY KEY (role, rank))"
            )
            self._database.execute(f"PRAGMA user_version = {FORM}")
        except sqlite3.Error as error:
            raise OptionError(f"journal {self.path}: expected a file that can be written, {error}") from error

    def __repr__(self) -> str:
        return f"<Journal {self.path}>"

    def recover(self, begin: Callable[[], Membership]) -> Membership:
        """The membership that the journal tells of; from ``begin`` when it is empty.

        Raises:
            OptionError: it tells of a cluster of another size.
        """
        new = begin()
        row = self._database.execute(f"SELECT {', '.join(_CLUSTER)} FROM cluster").fetchone()
        if row is None:
            self.write(new)
            return new
        known = dict(zip(_CLUSTER, row, strict=True))
        if (known["num_workers"], known["num_servers"]) != (new.num_workers, new.num_servers):
            raise OptionError(
                f"journal {self.path}: expected a cluster of {new.num_workers} workers and {new.num_servers} servers, "
                f"it tells of {known['num_workers']} and {known['num_servers']}"
            )
        known["started"] = bool(known["started"])
        recovered = Membership(**known)
        rows = self._database.execute(f"SELECT {', '.join(_MEMBER)} FROM members ORDER BY role, rank")
        recovered.recover(Member(peer=None, request_id=0, **dict(zip(_MEMBER, row, strict=True))) for row in rows)
        return recovered

    def write(self, membership: Membership) -> None:
        """Keep what has changed; it is on disk when this returns."""
        members = membership.records()
        cluster = [getattr(membership, name) for name in _CLUSTER]
        self._database.execute("BEGIN")
        self._database.execute("DELETE FROM cluster")
        self._database.execute(f"INSERT INTO cluster VALUES ({', '.join('?' * len(_CLUSTER))})", cluster)
        self._database.executemany(
            f"INSERT OR REPLACE INTO members VALUES ({', '.join('?' * len(_MEMBER))})",
            [[getattr(member, name) for name in _MEMBER] for member in members],
        )
        self._database.execute("COMMIT")

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()
