"""A cluster's keys: files that a person can read.

A directory of keys holds::

    cluster.key           the cluster's public key
    cluster.key_secret    its secret: for schedulers and servers only
    allowed               who may connect: a name and a public key per line
    worker/               what the client "worker" needs, to be copied to where it runs
        cluster.key
        client.key_secret

Whoever has ``cluster.key_secret`` may serve, and may connect too. The key files have the form (ZPL) that other ZeroMQ
programs write and read. A client without its line in ``allowed`` is refused, and one whose line is taken out is cut
off.
"""

from __future__ import annotations

import logging
import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

import zmq
from zmq.auth.certs import load_certificate

from kvstore.errors import OptionError
from kvstore.transport.curve import Identity
from kvstore.transport.network import Network
from kvstore.transport.zeromq import NETWORK, ZeroMQ

log = logging.getLogger(__name__)

CLUSTER, CLUSTER_SECRET, CLIENT_SECRET, ALLOWED = "cluster.key", "cluster.key_secret", "client.key_secret", "allowed"
DEFAULT_CLIENT = "worker"
ALLOWED_BYTES_MAX = 16 << 20

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_KEY = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")  # 32 bytes as Z85
_HEADING = "# Who may connect: a name and a public key per line. Take a line out, and that client is cut off at once.\n"


class Keys:
    """The keys of one process: a cluster's, or one client's.

    Args:
        directory: as the module describes it, or a client's part of it.

    Raises:
        OptionError: a file is missing or not what it should be, or a secret can be read by other users.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.serves = (self.directory / CLUSTER_SECRET).exists()
        cluster = _read(self.directory / CLUSTER)[0]
        public, secret = _read_secret(self.directory / (CLUSTER_SECRET if self.serves else CLIENT_SECRET))
        self.identity = Identity(cluster, public, secret)
        self._stamp: tuple[int, ...] | None = None  # of the list that was read last
        self._allowed: Mapping[str, str] = {}

    def __repr__(self) -> str:
        return f"<Keys of {'a cluster' if self.serves else 'a client'} in {self.directory}>"

    def allowed(self) -> Mapping[str, str]:
        """The public keys that may connect, with their names: as the list says now.

        A list that cannot be read any more changes nothing, which is logged.

        Raises:
            OptionError: it could not be read the first time.
        """
        path = self.directory / ALLOWED
        stamp: tuple[int, ...]
        try:
            found = path.stat()
            stamp = (found.st_ino, found.st_size, found.st_mtime_ns)
        except OSError:
            stamp = ()
        if stamp != self._stamp:
            first, self._stamp = self._stamp is None, stamp
            try:
                clients = {key: name for name, key in read_allowed(path).items()}
                self._allowed = {**clients, self.identity.cluster: "the cluster itself"}
            except OptionError as error:
                if first:
                    raise
                log.error("%s; the keys that were allowed before still are", error)
        return self._allowed


def network(directory: str | os.PathLike[str] | None) -> Network:
    """The network as a process with these keys reaches it; None: without keys.

    Raises:
        OptionError: a file is missing or not what it should be, or a secret can be read by other users.
    """
    if directory is None:
        return NETWORK
    keys = Keys(directory)
    return ZeroMQ(keys.identity, keys.allowed if keys.serves else None)


# --- making them -----------------------------------------------------------------------------------


def make_cluster(directory: str | os.PathLike[str], clients: Iterable[str] = (DEFAULT_CLIENT,)) -> list[Path]:
    """Make a cluster's keys, and those of its first clients; the files written.

    Raises:
        OptionError: there are keys already, or the directory cannot be written.
    """
    place, clients = Path(directory), tuple(clients)
    for name in clients:
        _check_name(name)
    if any((place / name).exists() for name in (CLUSTER, CLUSTER_SECRET, ALLOWED)):
        raise OptionError(f"{place}: expected no keys there yet, which are never overwritten")
    public, secret = _pair()
    written = [
        _write(place / CLUSTER_SECRET, _certificate("the secret of a cluster; keep it", public, secret), 0o600),
        _write(place / CLUSTER, _certificate("a cluster's public key", public), 0o644),
        _write(place / ALLOWED, _HEADING, 0o644),
    ]
    return [*written, *(path for name in clients for path in add_client(place, name))]


def add_client(directory: str | os.PathLike[str], name: str) -> list[Path]:
    """Make a client's keys and allow them; the files written.

    Raises:
        OptionError: there is no cluster, or the client exists already.
    """
    place = Path(directory)
    _check_name(name)
    cluster, _ = _read(place / CLUSTER)
    allowed = read_allowed(place / ALLOWED)
    if name in allowed or (place / name).exists():
        raise OptionError(f"client {name} in {place}: expected a new name; keys are never overwritten")
    public, secret = _pair()
    written = [
        _write(place / name / CLIENT_SECRET, _certificate(f"the secret of client {name}", public, secret), 0o600),
        _write(place / name / CLUSTER, _certificate("a cluster's public key", cluster), 0o644),
    ]
    _write_allowed(place / ALLOWED, {**allowed, name: public})
    return written


def revoke(directory: str | os.PathLike[str], name: str) -> None:
    """Take a client from the list of those who may connect.

    Raises:
        OptionError: it is not on the list.
    """
    path = Path(directory) / ALLOWED
    allowed = read_allowed(path)
    if allowed.pop(name, None) is None:
        raise OptionError(f"{path}: expected a client among {', '.join(allowed) or 'nobody'}; got {name!r}")
    _write_allowed(path, allowed)


def read_allowed(path: Path) -> dict[str, str]:
    """The public keys on the list, by name.

    Raises:
        OptionError: it cannot be read, or a line is not a name and a key.
    """
    allowed: dict[str, str] = {}
    for number, line in enumerate(_text(path).splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2 or not _NAME.fullmatch(words[0]) or not _KEY.fullmatch(words[1]) or words[0] in allowed:
            raise OptionError(f"{path}, line {number}: expected a name, each once, and a public key; got {line[:80]!r}")
        allowed[words[0]] = words[1]
    return allowed


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name) or name in (ALLOWED, CLUSTER, CLUSTER_SECRET):
        raise OptionError(f"a client's name: expected 1-64 letters, digits, dots, dashes and underscores, got {name!r}")


def _pair() -> tuple[str, str]:
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def _certificate(what: str, public: str, secret: str | None = None) -> str:
    lines = [f"# kvstore: {what}", "curve", f'    public-key = "{public}"']
    if secret is not None:
        lines.append(f'    secret-key = "{secret}"')
    return "\n".join(lines) + "\n"


def _write(path: Path, text: str, mode: int) -> Path:
    """A new file with these permissions from its first moment on; an existing one is not touched."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
    except OSError as error:
        raise OptionError(f"{path}: expected to write a new file; {error.strerror}") from error
    return path


def _write_allowed(path: Path, allowed: Mapping[str, str]) -> None:
    """Replace the list in one step, so that nobody reads half of it."""
    width = max(map(len, allowed), default=0)
    lines = [f"{name:{width}}  {key}\n" for name, key in allowed.items()]
    new = path.with_name(f"{path.name}.{os.getpid()}")
    _write(new, _HEADING + "".join(lines), 0o644)
    new.replace(path)


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > ALLOWED_BYTES_MAX:
            raise OptionError(f"{path}: expected at most {ALLOWED_BYTES_MAX} bytes")
        return path.read_text()
    except OSError as error:
        raise OptionError(f"{path}: expected a file (kvstore keygen makes it); {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise OptionError(f"{path}: expected a text") from error


def _read(path: Path) -> tuple[str, str | None]:
    _text(path)
    try:
        public, secret = load_certificate(path)
    except ValueError:
        public, secret = b"", None
    found = public.decode(), None if secret is None else secret.decode()
    if any(key is not None and not _KEY.fullmatch(key) for key in found):
        raise OptionError(f"{path}: expected a key of 40 characters, as kvstore keygen writes it")
    return found


def _read_secret(path: Path) -> tuple[str, str]:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise OptionError(f"{path}: expected a secret key (kvstore keygen makes it); {error.strerror}") from error
    if mode & 0o077:
        raise OptionError(f"{path}: expected a file that only its owner can read, its mode is {mode:o}; chmod 600 it")
    public, secret = _read(path)
    if secret is None:
        raise OptionError(f"{path}: expected a secret key, found only a public one")
    return public, secret
