"""Every error this package raises, in one tree.

The first level below the root answers *whose fault it is*::

    KVStoreError
    ├── CallerError                the call itself was wrong; nothing was sent, nothing changed
    │   ├── UnknownKeyError        (KeyError)    the key was never initialised
    │   ├── DuplicateKeyError      (ValueError)  a key initialised twice
    │   ├── KeyKindError           (TypeError)   str and int keys mixed, or no valid key at all
    │   ├── ShapeError             (ValueError)  another shape than the key has
    │   ├── DtypeError             (TypeError)   another dtype than the key has, or one we cannot hold
    │   ├── DeviceCountError       (ValueError)  a wrong number of devices
    │   ├── ReadOnlyError          (ValueError)  an ``out`` that cannot be written
    │   ├── OptionError            (ValueError)  an unknown or ill-formed option, model or address
    │   ├── OptimizerError         (ValueError)  an unknown optimizer or hyperparameter, or a second one
    │   ├── BrokenRoundError       (RuntimeError) an earlier push of the key failed half-way: its rounds are over here
    │   └── ClosedError            (RuntimeError) the store is closed or belongs to another process, or left
    ├── PeerError                  another process of the cluster is at fault, or has failed
    │   ├── DisagreementError      workers (or worker and server) differ; shows both sides
    │   ├── UpdateError            an optimizer or updater raised while applying an update
    │   ├── WorkerLostError        a worker that others wait for is gone
    │   ├── ServerLostError        a server is gone, or forgot what it held
    │   ├── SharedMemoryError      memory to be shared with a process of this host cannot be had or mapped
    │   ├── CheckpointError        a checkpoint that is damaged or does not fit, or a cut that nobody could take
    │   ├── LimitError             a peer was asked to hold more than it may
    │   ├── FencedError            this worker was replaced by a newer one of the same rank
    │   └── ProtocolError          what came is not our protocol
    │       └── ProtocolVersionError   it is, in another version
    └── NetworkError               nobody is known to be at fault
        ├── UnreachableError       (ConnectionError) nothing answers at the address
        │   └── AuthenticationError    it answers, but it and this process do not accept each other's keys
        └── DeadlineError          (TimeoutError)    a deadline passed; the operation stays pending

Errors cross the wire as (class name, message); :func:`from_wire` looks the name up in this
tree and nowhere else, so a peer cannot name any other class.
"""

from __future__ import annotations


class KVStoreError(Exception):
    """Root of the tree."""

    def __str__(self) -> str:  # KeyError would show the repr of its message
        return Exception.__str__(self) if len(self.args) != 1 else str(self.args[0])


class CallerError(KVStoreError):
    """The call was wrong."""


class UnknownKeyError(CallerError, KeyError):
    """The key was never initialised."""


class DuplicateKeyError(CallerError, ValueError):
    """The key was initialised already by this store object, or twice in one call."""


class KeyKindError(CallerError, TypeError):
    """A key of the wrong kind: keys are all ``str`` or all int64 within a store."""


class ShapeError(CallerError, ValueError):
    """An array of another shape than the key's."""


class DtypeError(CallerError, TypeError):
    """An array of another dtype than the key's, or of a dtype that no store holds."""


class DeviceCountError(CallerError, ValueError):
    """Another number of devices than the store has, or a device that it has not."""


class ReadOnlyError(CallerError, ValueError):
    """An ``out`` array that cannot be written."""


class OptionError(CallerError, ValueError):
    """An unknown or ill-formed option, consistency model or address."""


class OptimizerError(CallerError, ValueError):
    """An unknown optimizer or hyperparameter, or a second, different optimizer."""


class BrokenRoundError(CallerError, RuntimeError):
    """An earlier push of the key failed when some of it had been sent: this worker has no part in its rounds any more.

    The servers wait for the rest of that round. Close the store: the others go on without this worker then.
    """


class ClosedError(CallerError, RuntimeError):
    """The store is closed, was inherited through fork, or pushes after it has left the rounds."""


class PeerError(KVStoreError):
    """Another process of the cluster is at fault, or has failed."""


class DisagreementError(PeerError):
    """Two sides describe the same thing differently."""


class UpdateError(PeerError):
    """An optimizer or updater raised while it applied an update."""


class WorkerLostError(PeerError):
    """A worker that others wait for is gone."""


class ServerLostError(PeerError):
    """A server is gone, or does not hold what it should."""


class SharedMemoryError(PeerError):
    """Memory to be shared with another process of this host cannot be had, or cannot be mapped."""


class CheckpointError(PeerError):
    """A checkpoint is damaged, missing or of something else; or a cut was not taken."""


class LimitError(PeerError):
    """A peer was asked to hold more than it may."""


class FencedError(PeerError):
    """A newer worker took over this worker's rank."""


class ProtocolError(PeerError):
    """What came is not a message of our protocol."""


class ProtocolVersionError(ProtocolError):
    """The peer speaks another version of the protocol."""


class NetworkError(KVStoreError):
    """Nobody is known to be at fault."""


class UnreachableError(NetworkError, ConnectionError):
    """Nothing answers at the address."""


class AuthenticationError(UnreachableError):
    """Something answers at the address, but it and this process do not accept each other's keys."""


class DeadlineError(NetworkError, TimeoutError):
    """A deadline passed; the operation stays pending."""


def _tree(root: type[KVStoreError]) -> dict[str, type[KVStoreError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


_BY_NAME = _tree(KVStoreError)


def to_wire(error: BaseException) -> tuple[str, str]:
    """Name and message of ``error``; a foreign exception becomes an :class:`UpdateError`."""
    if isinstance(error, KVStoreError):
        return type(error).__name__, str(error)
    return UpdateError.__name__, f"{type(error).__name__}: {error}"


def from_wire(name: str, message: str) -> KVStoreError:
    """The error that :func:`to_wire` described; an unknown name becomes a plain :class:`PeerError`."""
    return _BY_NAME.get(name, PeerError)(message)
