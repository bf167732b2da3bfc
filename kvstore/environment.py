"""The one module that reads the environment.

``KVSTORE_*`` come first; the ``DMLC_*`` names of clusters that ran ps-lite or MXNet are fallbacks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from kvstore.errors import OptionError


@dataclass(frozen=True, slots=True)
class Environment:
    """What the environment says; None where it says nothing."""

    address: str | None = None
    role: str | None = None
    rank: int | None = None
    num_workers: int | None = None
    num_servers: int | None = None
    shared_memory: bool | None = None
    shared_memory_bytes: int | None = None
    on_worker_loss: str | None = None
    heartbeat: float | None = None

    def variables(self) -> dict[str, str]:
        """The environment that says this; for child processes."""
        values = {
            "KVSTORE_ADDRESS": self.address,
            "KVSTORE_ROLE": self.role,
            "KVSTORE_RANK": self.rank,
            "KVSTORE_NUM_WORKERS": self.num_workers,
            "KVSTORE_NUM_SERVERS": self.num_servers,
            "KVSTORE_SHARED_MEMORY": None if self.shared_memory is None else int(self.shared_memory),
            "KVSTORE_SHARED_MEMORY_BYTES": self.shared_memory_bytes,
            "KVSTORE_ON_WORKER_LOSS": self.on_worker_loss,
            "KVSTORE_HEARTBEAT": self.heartbeat,
        }
        return {name: str(value) for name, value in values.items() if value is not None}


def inherited() -> dict[str, str]:
    """The whole environment of this process, for children that get it and more."""
    return dict(os.environ)


def read(environ: Mapping[str, str] | None = None) -> Environment:
    """Read the environment.

    Raises:
        OptionError: a variable that is not what it should be; names the variable.
    """
    environ = os.environ if environ is None else environ

    def text(*names: str) -> tuple[str, str] | None:
        return next(((name, environ[name]) for name in names if environ.get(name)), None)

    def number(*names: str) -> int | None:
        found = text(*names)
        if found is None:
            return None
        if not (found[1].isascii() and found[1].isdigit()):
            raise OptionError(f"{found[0]}: expected a whole number, got {found[1]!r}")
        return int(found[1])

    def seconds(name: str) -> float | None:
        found = text(name)
        if found is None:
            return None
        try:
            value = float(found[1])
        except ValueError:
            value = 0.0
        if not 0 < value < 1e6:
            raise OptionError(f"{name}: expected a number of seconds > 0, got {found[1]!r}")
        return value

    address = text("KVSTORE_ADDRESS")
    if address is None:
        host, port = text("DMLC_PS_ROOT_URI"), number("DMLC_PS_ROOT_PORT")
        if host is not None and port is not None:
            bracketed = f"[{host[1]}]" if ":" in host[1] else host[1]
            address = ("DMLC_PS_ROOT_URI", f"tcp://{bracketed}:{port}")
    role = text("KVSTORE_ROLE", "DMLC_ROLE")
    if role is not None and role[1] not in ("worker", "server", "scheduler"):
        raise OptionError(f"{role[0]}: expected worker, server or scheduler, got {role[1]!r}")
    shared = number("KVSTORE_SHARED_MEMORY")
    on_loss = text("KVSTORE_ON_WORKER_LOSS")
    return Environment(
        address[1] if address else None,
        role[1] if role else None,
        number("KVSTORE_RANK", "DMLC_RANK", "DMLC_WORKER_ID"),
        number("KVSTORE_NUM_WORKERS", "DMLC_NUM_WORKER"),
        number("KVSTORE_NUM_SERVERS", "DMLC_NUM_SERVER"),
        None if shared is None else bool(shared),
        number("KVSTORE_SHARED_MEMORY_BYTES"),
        on_loss[1] if on_loss else None,
        seconds("KVSTORE_HEARTBEAT"),
    )
