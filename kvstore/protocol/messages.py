"""The vocabulary of the cluster and its form on the wire. Pure.

An **envelope** is one ZeroMQ message: a header frame and the raw value frames. The header is a
msgpack list ``[protocol, cluster, epoch, rank, incarnation, messages]``, each message a list
``[kind, request_id, fields..., frames]`` where ``frames`` says how many of the value frames that
follow are its own, in order. docs/protocol.md says the same for those who write another client.

Everything a peer sends is checked here against :data:`FORMS` before anything else sees it; what does not fit
raises :class:`~kvstore.errors.ProtocolError`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

from kvstore.errors import ProtocolError, ProtocolVersionError
from kvstore.protocol.pieces import BUNDLE_ID_BYTES, BundleId, Cut, Key

PROTOCOL = 1
HEADER_BYTES_MAX = 8 << 20
MESSAGES_MAX = 1 << 16
FRAMES_MAX = 1 << 16
FRAME_BYTES_MAX = 1 << 32
KEY_BYTES_MAX = 1024
NDIM_MAX = 64
TEXT_BYTES_MAX = 1 << 16
NAME_BYTES_MAX = 256
MODEL_BYTES_MAX = 64
ITEMS_MAX = 1 << 48
PARTICIPANTS_MAX = 1 << 16
CONTAINERS_MAX = 1 << 19
REPORT_DEPTH_MAX = 4
PRIORITY_MAX = (1 << 31) - 1
HELD_MAX = 1024
BUNDLE_KEYS_MAX = 1 << 20
PIECES_MAX = 1024  # of a cut in one message

SMALL_HEADER_BYTES = 64 << 10  # up to this size its lists and maps need not be counted

NOBODY = -1  # rank and incarnation of a sender that has none (yet)


@dataclass(frozen=True, slots=True)
class Message:
    """Root of all messages. A reply carries the ``request_id`` of its request."""

    request_id: int


# --- worker to server ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spec:
    """All that worker and server must agree on about a key."""

    shape: tuple[int, ...]
    dtype: str
    piece_items: int
    device_model: str
    cluster_model: str
    participants: tuple[int, ...] | None  # None: every worker

    @property
    def cut(self) -> Cut:
        """The value's pieces."""
        return Cut(math.prod(self.shape), self.piece_items)

    def __str__(self) -> str:
        who = "every worker" if self.participants is None else f"workers {list(self.participants)}"
        return (
            f"shape {self.shape}, dtype {self.dtype}, pieces of {self.piece_items} elements, "
            f"device level {self.device_model}, cluster level {self.cluster_model}, participants: {who}"
        )


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes in memory that processes of one host share: a segment's address, and the first byte there."""

    segment: str
    offset: int


@dataclass(frozen=True, slots=True)
class Init(Message):
    """Create a piece. The first worker's carries the value; the others check and wait for it.

    Who is the first, the smallest rank that takes part, the server decides: it says Missing if the value did not come.
    """

    key: Key
    piece: int
    spec: Spec


@dataclass(frozen=True, slots=True)
class Bind(Message):
    """These keys of the server, in this order, will be pushed and pulled together under the id of the bundle."""

    bundle: BundleId
    keys: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class Push(Message):
    """A worker's ``round``-th push of a piece, in a frame or at a place; without either it asks what became of it."""

    key: Key | BundleId
    piece: int
    round: int
    pull: bool  # answer with the value that a pull right after this push would get
    acknowledge: bool  # say Accepted if it has to wait
    priority: int = 0  # larger is merged and answered sooner
    near: bool = False  # the value asked for may stay where it is: answer with its place
    held: tuple[int, ...] = ()  # earlier requests for this piece whose places are still being read
    place: Place | None = None


@dataclass(frozen=True, slots=True)
class Fetch(Message):
    """A pull of a piece, made after the worker's ``round``-th push of the key."""

    key: Key | BundleId
    piece: int
    round: int
    priority: int = 0
    near: bool = False
    held: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SetOptimizer(Message):
    """In effect for a key from the round after ``since[key]`` (0 where not named)."""

    optimizer: dict[str, Any]
    replace: bool
    since: dict[Key, int]


@dataclass(frozen=True, slots=True)
class SetHyperparameters(Message):
    """Change named numbers of the optimizer, from the round after ``since[key]``."""

    changes: dict[str, Any]
    since: dict[Key, int]


@dataclass(frozen=True, slots=True)
class Drop(Message):
    """Forget a key on this server (before it is initialised anew in another cut)."""

    key: Key


@dataclass(frozen=True, slots=True)
class ReadState(Message):
    """Ask for the optimizer's state of a piece."""

    key: Key
    piece: int


@dataclass(frozen=True, slots=True)
class WriteState(Message):
    """Replace the optimizer's state of a piece: one frame per array."""

    key: Key
    piece: int
    step: int
    names: tuple[str, ...]
    dtypes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Restore(Message):
    """Replace a piece by what a checkpoint has: its value in a frame, then one frame per array of the state."""

    key: Key
    piece: int
    version: int
    step: int
    names: tuple[str, ...]
    dtypes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Mark(Message):
    """The sender's marker of a cut: its pushes up to ``rounds[key]`` belong to it. ``awaited``: whose markers do."""

    cut: int
    awaited: tuple[int, ...]
    rounds: dict[Key, int]


@dataclass(frozen=True, slots=True)
class ReadCut(Message):
    """What pieces does the cut have, from the ``first`` on? Answered when it has been taken."""

    cut: int
    awaited: tuple[int, ...]
    first: int


@dataclass(frozen=True, slots=True)
class ReadCopy(Message):
    """Send a piece as the cut has it."""

    cut: int
    key: Key
    piece: int


@dataclass(frozen=True, slots=True)
class EndCut(Message):
    """The cut is not needed any more."""

    cut: int


@dataclass(frozen=True, slots=True)
class Meet(Message):
    """Are we on one host? ``probe`` is a place in the sender's memory."""

    probe: Place


@dataclass(frozen=True, slots=True)
class Explain(Message):
    """Why has my request ``about`` no answer yet?"""

    about: int


@dataclass(frozen=True, slots=True)
class Leave(Message):
    """The sender leaves the rounds: in order when ``reason`` is empty, else because it failed.

    ``stays``: it remains in the cluster and may pull; else it is gone.
    """

    reason: str
    stays: bool = False


@dataclass(frozen=True, slots=True)
class Freeze(Message):
    """The sender wants to join: say which rounds have begun, and let none begin until it has, or is gone."""


@dataclass(frozen=True, slots=True)
class Admit(Message):
    """The sender joins each of these keys from the round after this one, and those that will be created."""

    rounds: dict[Key, int]


# --- server to worker ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Initialized(Message):
    """The piece exists; ``round`` is the sender's last accepted push of it."""

    round: int


@dataclass(frozen=True, slots=True)
class Accepted(Message):
    """The server has the piece; it waits for its round."""


@dataclass(frozen=True, slots=True)
class Committed(Message):
    """The push is merged and applied."""


@dataclass(frozen=True, slots=True)
class Value(Message):
    """The piece's value: one frame, or a place that stays as it is until the worker no longer holds it."""

    version: int
    staleness: int
    place: Place | None = None


@dataclass(frozen=True, slots=True)
class State(Message):
    """The optimizer's state of a piece: one frame per name."""

    step: int
    names: tuple[str, ...]
    dtypes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Missing(Message):
    """The push asked about never came: send it with its frame."""


@dataclass(frozen=True, slots=True)
class Divided(Message):
    """The bundle is not one piece now: its keys have to be asked for one by one. ``taken``: its push is here."""

    taken: bool


@dataclass(frozen=True, slots=True)
class Met(Message):
    """The answer to :class:`Meet`: if the server could read the worker's memory, a place in its own, and a line
    (see :mod:`kvstore.transport.lines`) that the worker may open; "" for none.
    """

    probe: Place | None
    line: str


@dataclass(frozen=True, slots=True)
class Done(Message):
    """The request has been carried out."""


@dataclass(frozen=True, slots=True)
class Explanation(Message):
    """The answer to :class:`Explain`."""

    text: str


@dataclass(frozen=True, slots=True)
class Failed(Message):
    """The request failed: a class name of :mod:`kvstore.errors` and its message."""

    error: str
    text: str


@dataclass(frozen=True, slots=True)
class Frozen(Message):
    """The answer to :class:`Freeze`: for each key the largest round that anybody has begun on this server."""

    rounds: dict[Key, int]


@dataclass(frozen=True, slots=True)
class PieceRecord:
    """A piece in a cut, but for its bytes."""

    key: Key
    piece: int
    spec: Spec
    version: int
    step: int  # updates by the optimizer
    rounds: dict[int, int]  # by rank: pushes in the cut
    names: tuple[str, ...] = ()  # of the arrays of the optimizer's state
    dtypes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CutPieces(Message):
    """The answer to :class:`ReadCut`: some of the cut's ``total`` pieces."""

    total: int
    optimizer: dict[str, Any]  # empty: none
    pieces: tuple[PieceRecord, ...]


@dataclass(frozen=True, slots=True)
class Copied(Message):
    """The answer to :class:`ReadCopy`: a frame with the value, and one per array of the optimizer's state."""


# --- with the scheduler -------------------------------------------------------------------------

ON_LOSS = ("fail", "wait", "continue")  # what is to happen when a worker is lost


@dataclass(frozen=True, slots=True)
class Register(Message):
    """A worker or server presents itself. ``rank`` -1: any. ``address``: a server's own.

    ``token`` is drawn at random by the sender: the same one again is the same member again.
    ``incarnation`` is what it was told when it registered before, 0 the first time. ``on_loss``: a worker's policy
    for workers that are lost, one of :data:`ON_LOSS`.
    """

    role: str
    rank: int
    address: str
    host: str
    pid: int
    token: int
    incarnation: int = 0
    on_loss: str = ""


@dataclass(frozen=True, slots=True)
class Roster(Message):
    """The answer to :class:`Register` once everybody is here."""

    rank: int
    incarnation: int
    num_workers: int  # that the cluster was started with
    servers: tuple[str, ...]
    workers: tuple[int, ...] = ()  # the ranks that take part now
    joins: bool = False  # the worker is new to a running job: it has to be admitted by the servers, then Enter


@dataclass(frozen=True, slots=True)
class Barrier(Message):
    """The sender's ``number``-th barrier."""

    number: int


@dataclass(frozen=True, slots=True)
class Departed(Message):
    """From the scheduler to all: a member is gone (or, with ``stays``, a worker only left the rounds).

    In order when ``reason`` is empty; else ``on_loss`` says what is to become of the rounds of a worker.
    """

    role: str
    rank: int
    reason: str
    incarnation: int = 1
    on_loss: str = "fail"
    stays: bool = False


@dataclass(frozen=True, slots=True)
class Joined(Message):
    """From the scheduler to all: this worker takes part now, or is back."""

    rank: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class Enter(Message):
    """The sender has been admitted by all servers."""


@dataclass(frozen=True, slots=True)
class AskCut(Message):
    """Let all workers mark a cut, which the asker has given this number, at a cut point to come."""

    cut: int


@dataclass(frozen=True, slots=True)
class Halt(Message):
    """From the scheduler to workers: say how many cut points you have passed, and pass none until you are told more."""

    cut: int


@dataclass(frozen=True, slots=True)
class Passed(Message):
    """A worker has passed ``count`` cut points. ``coupled``: it may have to wait for others' pushes."""

    cut: int
    count: int
    coupled: bool


@dataclass(frozen=True, slots=True)
class Named(Message):
    """The answer to :class:`Passed` and :class:`AskCut`: at which cut point these workers mark the cut."""

    cut: int
    at: int
    awaited: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ReadStatus(Message):
    """Ask a scheduler or server about itself."""


@dataclass(frozen=True, slots=True)
class Status(Message):
    """The answer to :class:`ReadStatus`."""

    report: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Shard:
    """Which servers have one shard. No ``primary`` (-1): it is lost; no ``replica`` (-1): its primary is alone."""

    epoch: int  # in which the two were appointed
    primary: int
    address: str
    replica: int
    replica_address: str  # "" as long as it has not said where
    in_step: bool  # the replica has all that is committed: it may take over
    moving: bool  # the replica is to take over now: the primary hands over


@dataclass(frozen=True, slots=True)
class Placement(Message):
    """From the scheduler to all, whenever it changes: who has which shard, by number."""

    epoch: int
    shards: tuple[Shard, ...]


@dataclass(frozen=True, slots=True)
class ReadPlacement(Message):
    """Ask the scheduler for the placement, which may have been missed."""


@dataclass(frozen=True, slots=True)
class Standby(Message):
    """From a replica to the scheduler: the shard's log of this epoch may be sent to this address."""

    shard: int
    epoch: int
    address: str


@dataclass(frozen=True, slots=True)
class InStep(Message):
    """From a primary to the scheduler: nothing is committed any more that its replica has not."""

    shard: int
    epoch: int


@dataclass(frozen=True, slots=True)
class HandedOver(Message):
    """From a primary to the scheduler: its replica has everything, and it takes in nothing more."""

    shard: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Drain(Message):
    """To the scheduler, from anybody: this server's shards are to go to others. Answered when it has none."""

    rank: int


# --- from a primary to its replica ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entry(Message):
    """The log's entry of this number (its ``request_id``): what a worker, or nobody (-1), has brought about."""

    epoch: int
    rank: int
    incarnation: int
    message: Message


@dataclass(frozen=True, slots=True)
class Taken(Message):
    """All entries up to this number (its ``request_id``) have been taken."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Updated(Message):
    """In an entry: these pushes (rank, round) have taken effect as one update. Its frame is their sum."""

    key: Key | BundleId
    piece: int
    round: int
    contributions: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class UniteBundle(Message):
    """In an entry: from here on the bundle is one piece."""

    bundle: BundleId


@dataclass(frozen=True, slots=True)
class SplitBundle(Message):
    """In an entry: from here on its members are counted one by one."""

    bundle: BundleId


@dataclass(frozen=True, slots=True)
class RestorePiece(Message):
    """In an entry: a piece as it is. Its frames are the value, and one per name of the optimizer's state."""

    key: Key
    piece: int
    spec: Spec
    closed: int
    version: int
    rounds: tuple[tuple[int, int], ...]  # (rank, round) in effect
    away: tuple[tuple[int, int, int], ...]  # (rank, first, last) rounds of which it is not a member
    generation: int
    step: int
    written: bool  # a worker wrote the state
    names: tuple[str, ...]
    dtypes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RestoreSetting(Message):
    """In an entry: one of the optimizers that were set, in their order."""

    optimizer: dict[str, Any]
    since: dict[Key, int]
    generation: int
    asked: dict[str, Any]  # the one that was set, before its numbers were changed


@dataclass(frozen=True, slots=True)
class RestoreWorkers(Message):
    """In an entry: what the primary knows of the workers, see :class:`kvstore.protocol.workers.Workers`."""

    members: tuple[int, ...]
    known: tuple[int, ...]
    incarnations: tuple[tuple[int, int], ...]
    admitted: tuple[tuple[int, int], ...]
    missed: tuple[tuple[int, str], ...]
    hopeless: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Arrived(Message):
    """In an entry: the rank's messages are of this incarnation."""


# --- form on the wire ---------------------------------------------------------------------------

Check = Callable[[Any], Any]  # returns the value in its Python form or raises ValueError


def _natural(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError("a whole number >= 0")
    return value


def _rank(value: Any) -> int:
    if type(value) is not int or not NOBODY <= value < 1 << 31:
        raise ValueError("a rank")
    return value


def _priority(value: Any) -> int:
    if type(value) is not int or abs(value) > PRIORITY_MAX:
        raise ValueError(f"a priority within +-{PRIORITY_MAX}")
    return value


def _place(value: Any) -> Place:
    if not isinstance(value, list | tuple) or len(value) != 2 or type(value[0]) is not str or len(value[0]) > 64:
        raise ValueError("a segment's address and an offset")
    return Place(value[0], _natural(value[1]))


def _maybe_place(value: Any) -> Place | None:
    return None if value is None else _place(value)


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError("a boolean")
    return value


def _text(value: Any) -> str:
    if type(value) is not str or len(value) > TEXT_BYTES_MAX:
        raise ValueError(f"a text of at most {TEXT_BYTES_MAX} characters")
    return value


def _name(value: Any) -> str:
    if type(value) is not str or len(value) > NAME_BYTES_MAX:
        raise ValueError(f"a name of at most {NAME_BYTES_MAX} characters")
    return value


def _model(value: Any) -> str:
    if type(value) is not str or len(value) > MODEL_BYTES_MAX:
        raise ValueError(f"a model or dtype of at most {MODEL_BYTES_MAX} characters")
    return value


def key(value: Any) -> Key:
    """A ``str`` of 1-1024 UTF-8 bytes, or an int64; anything else raises ValueError."""
    if type(value) is str and 1 <= len(value) <= KEY_BYTES_MAX:
        try:
            if value.isascii() or len(value.encode()) <= KEY_BYTES_MAX:
                return value
        except UnicodeEncodeError:
            pass
    elif type(value) is int and -(1 << 63) <= value < 1 << 63:
        return value
    raise ValueError(f"a str of 1-{KEY_BYTES_MAX} UTF-8 bytes or an int64")


def _bundle(value: Any) -> BundleId:
    if type(value) is not bytes or len(value) != BUNDLE_ID_BYTES:
        raise ValueError(f"a bundle's id of {BUNDLE_ID_BYTES} bytes")
    return value


def _target(value: Any) -> Key | BundleId:
    return _bundle(value) if type(value) is bytes else key(value)


def _many(check: Check, limit: int) -> Check:
    def checked(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple) or len(value) > limit:
            raise ValueError(f"a list of at most {limit} items")
        return tuple([check(item) for item in value]) if value else ()

    return checked


def _numbers(value: Any, depth: int = 4) -> Any:
    """A dict of plain values, as optimizers are described."""
    if value is None or type(value) in (bool, int, float) or (type(value) is str and len(value) <= 256):
        return value
    if depth and type(value) is list and len(value) <= 1024:
        return [_numbers(item, depth - 1) for item in value]
    if depth and type(value) is dict and len(value) <= 256 and all(type(k) is str for k in value):
        return {k: _numbers(item, depth - 1) for k, item in value.items()}
    raise ValueError("plain numbers, texts, lists and maps")


def _described(value: Any) -> dict[str, Any]:
    if type(value) is not dict:
        raise ValueError("a map")
    plain: dict[str, Any] = _numbers(value)
    return plain


def _report(value: Any) -> dict[str, Any]:
    if type(value) is not dict or not _is_flat(value, REPORT_DEPTH_MAX):
        raise ValueError(f"a map, at most {REPORT_DEPTH_MAX} deep")
    return value


def _is_flat(value: Any, depth: int) -> bool:
    inner = value.values() if type(value) is dict else value if type(value) is list else ()
    return depth > 0 and all(_is_flat(one, depth - 1) for one in inner) if inner else True


def _since(value: Any) -> dict[Key, int]:
    if type(value) is not dict or len(value) > 1 << 20:
        raise ValueError("a map of keys to rounds")
    return {key(name): _natural(round) for name, round in value.items()}


def _spec(value: Any) -> Spec:
    if not isinstance(value, list | tuple) or len(value) != 6:
        raise ValueError("shape, dtype, piece items, two models and participants")
    shape, dtype, piece_items, device_model, cluster_model, participants = value
    shape = _many(_natural, NDIM_MAX)(shape)
    if math.prod(shape) > ITEMS_MAX or _natural(piece_items) == 0:
        raise ValueError("a value that fits")
    return Spec(
        shape,
        _model(dtype),
        piece_items,
        _model(device_model),
        _model(cluster_model),
        None if participants is None else _many(_natural, PARTICIPANTS_MAX)(participants),
    )


def _rounds(value: Any) -> dict[int, int]:
    if type(value) is not dict or len(value) > 1 << 20:
        raise ValueError("a map of ranks to rounds")
    return {_natural(rank): _natural(round) for rank, round in value.items()}


def _piece_record(value: Any) -> PieceRecord:
    checks = (key, _natural, _spec, _natural, _natural, _rounds, _name_list, _name_list)
    if not isinstance(value, list | tuple) or len(value) != len(checks):
        raise ValueError("a piece of a cut")
    return PieceRecord(*[check(field) for check, field in zip(checks, value, strict=True)])


def _pair(value: Any) -> tuple[int, int]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError("a pair of whole numbers")
    return _natural(value[0]), _natural(value[1])


def _shard(value: Any) -> Shard:
    if not isinstance(value, list | tuple) or len(value) != 7:
        raise ValueError("epoch, primary, address, replica, its address, and two booleans")
    epoch, primary, address, replica, replica_address, in_step, moving = value
    return Shard(
        _natural(epoch), _rank(primary), _text(address), _rank(replica), _text(replica_address),
        _flag(in_step), _flag(moving),
    )  # fmt: skip


def _logged(value: Any) -> Message:
    """The message of an entry: written as any other, without the number of its frames."""
    if not isinstance(value, list) or len(value) < 2:
        raise ValueError("a message that may be in a log")
    message, _ = _decode_one([*value, 0])
    if not isinstance(message, LOGGED):
        raise ValueError("a message that may be in a log")
    return message


def _absence(value: Any) -> tuple[int, int, int]:
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise ValueError("a rank, and the first and last round of its absence")
    return _natural(value[0]), _natural(value[1]), _natural(value[2])


def _missed(value: Any) -> tuple[int, str]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError("a rank and a reason")
    return _natural(value[0]), _text(value[1])


_shard_list = _many(_shard, 1 << 16)
_pairs = _many(_pair, 1 << 20)
_absences = _many(_absence, 1 << 20)
_reasons = _many(_missed, 1 << 20)
_name_list = _many(_model, 64)
_rank_list = _many(_natural, PARTICIPANTS_MAX)
_pieces = _many(_piece_record, PIECES_MAX)
_address_list = _many(_name, 1 << 16)
_key_list = _many(key, BUNDLE_KEYS_MAX)
_held = _many(_natural, HELD_MAX)

FORMS: dict[int, tuple[type[Message], tuple[Check, ...]]] = {
    1: (Init, (key, _natural, _spec)),
    2: (Push, (_target, _natural, _natural, _flag, _flag, _priority, _flag, _held, _maybe_place)),
    3: (Fetch, (_target, _natural, _natural, _priority, _flag, _held)),
    4: (SetOptimizer, (_described, _flag, _since)),
    5: (SetHyperparameters, (_described, _since)),
    6: (Drop, (key,)),
    7: (ReadState, (key, _natural)),
    8: (WriteState, (key, _natural, _natural, _name_list, _name_list)),
    9: (Explain, (_natural,)),
    10: (Leave, (_text, _flag)),
    11: (Meet, (_place,)),
    12: (Bind, (_bundle, _key_list)),
    13: (Freeze, ()),
    14: (Admit, (_since,)),
    20: (Restore, (key, _natural, _natural, _natural, _name_list, _name_list)),
    21: (Mark, (_natural, _rank_list, _since)),
    22: (ReadCut, (_natural, _rank_list, _natural)),
    23: (ReadCopy, (_natural, key, _natural)),
    24: (EndCut, (_natural,)),
    32: (Initialized, (_natural,)),
    33: (Accepted, ()),
    34: (Committed, ()),
    35: (Value, (_natural, _natural, _maybe_place)),
    36: (State, (_natural, _name_list, _name_list)),
    37: (Missing, ()),
    38: (Done, ()),
    39: (Explanation, (_text,)),
    40: (Failed, (_name, _text)),
    41: (Met, (_maybe_place, _name)),
    42: (Divided, (_flag,)),
    43: (Frozen, (_since,)),
    52: (CutPieces, (_natural, _described, _pieces)),
    53: (Copied, ()),
    64: (Register, (_name, _rank, _name, _name, _natural, _natural, _natural, _name)),
    65: (Roster, (_natural, _natural, _natural, _address_list, _rank_list, _flag)),
    66: (Barrier, (_natural,)),
    67: (Departed, (_name, _natural, _text, _natural, _name, _flag)),
    68: (ReadStatus, ()),
    69: (Status, (_report,)),
    70: (Joined, (_natural, _natural)),
    71: (Enter, ()),
    72: (Placement, (_natural, _shard_list)),
    73: (Standby, (_natural, _natural, _text)),
    74: (InStep, (_natural, _natural)),
    75: (HandedOver, (_natural, _natural)),
    76: (Drain, (_natural,)),
    77: (ReadPlacement, ()),
    96: (Entry, (_natural, _rank, _rank, _logged)),
    97: (Taken, (_natural,)),
    98: (Updated, (_target, _natural, _natural, _pairs)),
    99: (UniteBundle, (_bundle,)),
    100: (SplitBundle, (_bundle,)),
    101: (
        RestorePiece,
        (
            key,
            _natural,
            _spec,
            _natural,
            _natural,
            _pairs,
            _absences,
            _natural,
            _natural,
            _flag,
            _name_list,
            _name_list,
        ),
    ),
    102: (RestoreSetting, (_described, _since, _natural, _described)),
    103: (RestoreWorkers, (_rank_list, _rank_list, _pairs, _pairs, _reasons, _rank_list)),
    104: (Arrived, ()),
    80: (AskCut, (_natural,)),
    81: (Halt, (_natural,)),
    82: (Passed, (_natural, _natural, _flag)),
    83: (Named, (_natural, _natural, _rank_list)),
}
LOGGED = (
    Init, Bind, Drop, SetOptimizer, SetHyperparameters, WriteState, Restore, Leave, Admit,
    Departed,
    Updated, UniteBundle, SplitBundle, RestorePiece, RestoreSetting, RestoreWorkers, Arrived,
)  # fmt: skip
_KINDS = {form[0]: kind for kind, form in FORMS.items()}
_FIELDS = {form[0]: tuple(form[0].__dataclass_fields__)[1:] for form in FORMS.values()}
_PARTS = {kind: tuple(kind.__dataclass_fields__) for kind in (Spec, Place, Shard)}  # written as lists of their fields


@dataclass(frozen=True, slots=True)
class Sender:
    """Who sends: the first fields of every header."""

    cluster: int  # 0: not known yet
    epoch: int
    rank: int
    incarnation: int


def encode(sender: Sender, messages: Iterable[tuple[Message, int]]) -> bytes:
    """The header frame for ``messages``, each with the number of its value frames."""
    rows = []
    for message, frames in messages:
        row = _row(message)
        row.append(frames)
        rows.append(row)
    header = [PROTOCOL, sender.cluster, sender.epoch, sender.rank, sender.incarnation, rows]
    packed: bytes = msgpack.packb(header, default=_as_list)
    return packed


def _row(message: Message) -> list[Any]:
    kind = type(message)
    row: list[Any] = [_KINDS[kind], message.request_id]
    for name in _FIELDS[kind]:
        field = getattr(message, name)
        parts = _PARTS.get(type(field))
        row.append(field if parts is None else [getattr(field, part) for part in parts])
    if kind is Entry:
        row[-1] = _row(row[-1])
    elif kind is Placement:
        row[-1] = [[getattr(shard, part) for part in _PARTS[Shard]] for shard in row[-1]]
    return row


def _as_list(part: Any) -> list[Any]:
    """A part of a field, as it is written."""
    return [getattr(part, name) for name in part.__dataclass_fields__]


def decode(header: bytes | memoryview, frames: int) -> tuple[Sender, list[tuple[Message, int]]]:
    """What :func:`encode` made; ``frames`` is the number of value frames that came with it.

    Raises:
        ProtocolVersionError: a header of another protocol version.
        ProtocolError: anything else that is not an envelope.
    """
    if len(header) > HEADER_BYTES_MAX:
        raise ProtocolError(f"a header: expected at most {HEADER_BYTES_MAX} bytes, got {len(header)}")
    try:
        fields = _unpacked(header)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise ProtocolError(f"a header: expected msgpack, got {len(header)} bytes that are not") from error
    if not isinstance(fields, list) or not fields or type(fields[0]) is not int:
        raise ProtocolError("a header: expected a list that begins with the protocol version")
    if fields[0] != PROTOCOL:
        raise ProtocolVersionError(f"protocol version: expected {PROTOCOL}, the peer speaks {fields[0]}")
    if len(fields) != 6 or not isinstance(fields[5], list) or len(fields[5]) > MESSAGES_MAX:
        raise ProtocolError("a header: expected [protocol, cluster, epoch, rank, incarnation, messages]")
    try:
        sender = Sender(_natural(fields[1]), _natural(fields[2]), _rank(fields[3]), _rank(fields[4]))
        messages = [_decode_one(row) for row in fields[5]]
    except (ValueError, TypeError) as error:
        raise ProtocolError(f"a header field: expected {error}") from error
    expected = sum(count for _, count in messages)
    if frames > FRAMES_MAX or expected != frames:
        raise ProtocolError(f"value frames: the header announces {expected}, {frames} came")
    return sender, messages


def _unpacked(header: bytes | memoryview) -> Any:
    if len(header) <= SMALL_HEADER_BYTES:
        return msgpack.unpackb(header, strict_map_key=False, use_list=True, ext_hook=_refuse)
    left = CONTAINERS_MAX  # an empty list is one byte there and fifty here

    def count(container: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"at most {CONTAINERS_MAX} lists and maps")
        return container

    return msgpack.unpackb(
        header, strict_map_key=False, use_list=True, ext_hook=_refuse, list_hook=count, object_hook=count
    )


def _refuse(code: int, data: bytes) -> None:
    raise ValueError("no extension types")


def _decode_one(row: Any) -> tuple[Message, int]:
    if not isinstance(row, list) or len(row) < 3 or type(row[0]) is not int or row[0] not in FORMS:
        raise ValueError("a message of a known kind")
    kind, checks = FORMS[row[0]]
    if len(row) != len(checks) + 3:
        raise ValueError(f"{len(checks)} fields in a {kind.__name__}")
    fields = [check(item) for check, item in zip(checks, row[2:-1], strict=True)]
    return kind(_natural(row[1]), *fields), _natural(row[-1])


def envelope(sender: Sender, messages: Sequence[tuple[Message, Sequence[Any]]]) -> list[Any]:
    """All frames of one ZeroMQ message: the header, then every message's value frames in order."""
    header = encode(sender, [(message, len(payload)) for message, payload in messages])
    return [header, *(frame for _, payload in messages for frame in payload)]
