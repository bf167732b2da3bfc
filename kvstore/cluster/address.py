"""Addresses that others can reach."""

from __future__ import annotations

import re
import socket

from kvstore.errors import OptionError

_FORM = re.compile(r"tcp://(?P<host>\[[0-9a-fA-F:.%a-z]+\]|[^:/\s]+)(?::(?P<port>\d{1,5}|\*))?")


PORT_MAX = 65535


def reachable(address: str) -> str:
    """``address``, which one can connect to. Raises OptionError for another."""
    if split(address)[1] in ("", "*", "0"):
        raise OptionError(f"an address: expected tcp://host:port with the port to connect to, got {address!r}")
    return address


def advertised(bound: str, advertise: str | None) -> str:
    """The address to tell others: ``advertise`` (its port may be left out), else the bound one.

    A socket bound to every interface is advertised under this host's name.

    Raises:
        OptionError: not of the form tcp://host:port.
    """
    own = split(bound)
    if advertise is not None:
        host, port = split(advertise if advertise.startswith("tcp://") else f"tcp://{advertise}")
        return f"tcp://{host}:{port or own[1]}"
    host = own[0]
    if host in ("0.0.0.0", "[::]", "*"):
        host = socket.gethostname()
    return f"tcp://{host}:{own[1]}"


def split(address: str) -> tuple[str, str]:
    """Host and port (maybe empty) of an address. Raises OptionError for another form."""
    match = _FORM.fullmatch(address) if isinstance(address, str) else None
    if match is None or int((match["port"] or "0").replace("*", "0")) > PORT_MAX:
        raise OptionError(f"an address: expected tcp://host:port, got {address!r}")
    return match["host"], match["port"] or ""
