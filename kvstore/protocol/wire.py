"""The form of messages on the wire, and the checks of what comes from there. Pure.

An **envelope** is one ZeroMQ message: a header frame and the raw value frames. The header is a
msgpack list ``[protocol, cluster, epoch, rank, incarnation, messages]``, each message a list
``[kind, request_id, fields..., frames]`` where ``frames`` says how many of the value frames that
follow are its own, in order. docs/protocol.md says the same for those who write another client.

Everything a peer sends is checked here against :data:`FORMS` before anything else sees it; what does not fit
raises :class:`~kvstore.errors.ProtocolError`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from operator import attrgetter
from typing import Any

import msgpack

from kvstore.errors import ProtocolError, ProtocolVersionError
from kvstore.protocol.messages import (
    BUNDLE_KEYS_MAX,
    CONTAINERS_MAX,
    FRAMES_MAX,
    HEADER_BYTES_MAX,
    HELD_MAX,
    HISTORY_MAX,
    ITEMS_MAX,
    KEY_BYTES_MAX,
    MESSAGES_MAX,
    MODEL_BYTES_MAX,
    NAME_BYTES_MAX,
    NDIM_MAX,
    NOBODY,
    PARTICIPANTS_MAX,
    PIECES_MAX,
    PRIORITY_MAX,
    PROTOCOL,
    REPORT_DEPTH_MAX,
    SAMPLES_MAX,
    SMALL_HEADER_BYTES,
    TEXT_BYTES_MAX,
    Accepted,
    Admit,
    Arrived,
    AskCut,
    Barrier,
    Bind,
    Committed,
    Copied,
    CutPieces,
    Departed,
    Divided,
    Done,
    Drain,
    Drop,
    EndCut,
    Enter,
    Entry,
    Explain,
    Explanation,
    Failed,
    Fetch,
    Freeze,
    Frozen,
    Halt,
    HandedOver,
    Init,
    Initialized,
    InStep,
    Joined,
    Leave,
    Mark,
    Meet,
    Message,
    Met,
    Missing,
    Named,
    Passed,
    PieceRecord,
    Place,
    Placement,
    Push,
    ReadCopy,
    ReadCut,
    ReadPlacement,
    ReadState,
    ReadStatus,
    Register,
    Replica,
    Restore,
    RestorePiece,
    RestoreSetting,
    RestoreWorkers,
    Roster,
    SetHyperparameters,
    SetOptimizer,
    Shard,
    Spec,
    SplitBundle,
    Standby,
    State,
    Status,
    Taken,
    UniteBundle,
    Updated,
    Value,
    WriteState,
)
from kvstore.protocol.pieces import BUNDLE_ID_BYTES, BundleId, Key
from kvstore.records import record

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


def _maybe_natural(value: Any) -> int | None:
    return None if value is None else _natural(value)


def _maybe_samples(value: Any) -> int | None:
    samples = _maybe_natural(value)
    if samples is not None and samples > SAMPLES_MAX:
        raise ValueError(f"at most {SAMPLES_MAX} samples")
    return samples


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError("a boolean")
    return value


def _string(what: str, limit: int) -> Check:
    def checked(value: Any) -> str:
        if type(value) is not str or len(value) > limit:
            raise ValueError(f"{what} of at most {limit} characters")
        return value

    return checked


_text = _string("a text", TEXT_BYTES_MAX)
_name = _string("a name", NAME_BYTES_MAX)
_model = _string("a model or dtype", MODEL_BYTES_MAX)


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


def _maybe_key(value: Any) -> Key | None:
    return None if value is None else key(value)


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


def _listed(what: str, make: Callable[..., Any], *checks: Check) -> Check:
    """A list of just these, each checked, of which ``make`` makes what they stand for."""

    def checked(value: Any) -> Any:
        if not isinstance(value, list | tuple) or len(value) != len(checks):
            raise ValueError(what)
        return make(*[check(field) for check, field in zip(checks, value, strict=True)])

    return checked


def _tuple(*fields: Any) -> tuple[Any, ...]:
    return fields


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
    if not isinstance(value, list | tuple) or len(value) != 7:
        raise ValueError("shape, dtype, piece items, two models, participants and samples per round")
    shape, dtype, piece_items, device_model, cluster_model, participants, samples_per_round = value
    shape = _many(_natural, NDIM_MAX)(shape)
    if math.prod(shape) > ITEMS_MAX or _natural(piece_items) == 0 or samples_per_round == 0:
        raise ValueError("a value that fits")
    return Spec(
        shape,
        _model(dtype),
        piece_items,
        _model(device_model),
        _model(cluster_model),
        None if participants is None else _many(_natural, PARTICIPANTS_MAX)(participants),
        _maybe_samples(samples_per_round),
    )


def _rounds(value: Any) -> dict[int, int]:
    if type(value) is not dict or len(value) > 1 << 20:
        raise ValueError("a map of ranks to rounds")
    return {_natural(rank): _natural(round) for rank, round in value.items()}


def _logged(value: Any) -> Message:
    """The message of an entry: written as any other, without the number of its frames."""
    if not isinstance(value, list) or len(value) < 2:
        raise ValueError("a message that may be in a log")
    message, _ = _decode_one([*value, 0])
    if not isinstance(message, LOGGED):
        raise ValueError("a message that may be in a log")
    return message


_name_list = _many(_model, 64)
_pair = _listed("a pair of whole numbers", _tuple, _natural, _natural)
_absence = _listed("a rank, and the first and last round of its absence", _tuple, _natural, _natural, _natural)
_missed = _listed("a rank and a reason", _tuple, _natural, _text)
_piece_record = _listed(
    "a piece of a cut", PieceRecord, key, _natural, _spec, _natural, _natural, _rounds, _name_list, _name_list
)
_replica = _listed("epoch, server, address and a boolean", Replica, _natural, _natural, _text, _flag)
_shard = _listed(
    "epoch, primary, address, replicas and a boolean", Shard, _natural, _rank, _text, _many(_replica, 1 << 16), _flag
)
_shard_list = _many(_shard, 1 << 16)
_pairs = _many(_pair, 1 << 20)
_cut_point = _listed("a cut point's number, round and kind", _tuple, _natural, _natural, _natural)
_history = _many(_cut_point, HISTORY_MAX)
_absences = _many(_absence, 1 << 20)
_reasons = _many(_missed, 1 << 20)
_rank_list = _many(_natural, PARTICIPANTS_MAX)
_pieces = _many(_piece_record, PIECES_MAX)
_address_list = _many(_name, 1 << 16)
_key_list = _many(key, BUNDLE_KEYS_MAX)
_held = _many(_natural, HELD_MAX)

FORMS: dict[int, tuple[type[Message], tuple[Check, ...]]] = {
    1: (Init, (key, _natural, _spec)),
    2: (
        Push,
        (_target, _natural, _natural, _flag, _flag, _priority, _flag, _held, _maybe_place, _maybe_samples, _flag),
    ),
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
    80: (AskCut, (_natural,)),
    81: (Halt, (_natural,)),
    82: (Passed, (_natural, _natural, _flag, _flag, _maybe_key, _history)),
    83: (Named, (_natural, _natural, _rank_list)),
    96: (Entry, (_natural, _natural, _rank, _rank, _logged)),
    97: (Taken, (_natural,)),
    98: (Updated, (_target, _natural, _natural, _pairs, _maybe_natural)),
    99: (UniteBundle, (_bundle,)),
    100: (SplitBundle, (_bundle,)),
    101: (
        RestorePiece,
        (
            *(key, _natural, _spec, _natural, _natural, _pairs, _absences),
            *(_natural, _natural, _flag, _name_list, _name_list),
        ),
    ),
    102: (RestoreSetting, (_described, _since, _natural, _described)),
    103: (RestoreWorkers, (_rank_list, _rank_list, _pairs, _pairs, _reasons, _rank_list, _rank_list)),
    104: (Arrived, ()),
}
LOGGED = (
    Init, Bind, Drop, SetOptimizer, SetHyperparameters, WriteState, Restore, Leave, Freeze, Admit, Departed,
    Updated, UniteBundle, SplitBundle, RestorePiece, RestoreSetting, RestoreWorkers, Arrived,
)  # fmt: skip
_KINDS = {form[0]: kind for kind, form in FORMS.items()}


def _fields_of(kind: type[Message]) -> Callable[[Message], Iterable[Any]]:
    """What reads all fields of such a message but the first."""
    names = tuple(kind.__dataclass_fields__)[1:]
    if len(names) < 2:  # of one, attrgetter gives no tuple
        return lambda message: [getattr(message, name) for name in names]
    return attrgetter(*names)


_FIELDS = {form[0]: _fields_of(form[0]) for form in FORMS.values()}


@record
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
    return [_KINDS[kind], message.request_id, *_FIELDS[kind](message)]


def _as_list(part: Any) -> list[Any]:
    """A field that is no plain value, as it is written."""
    if isinstance(part, Message):
        return _row(part)
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
        sender = _sender(*fields[1:5])
        messages = [_decode_one(row) for row in fields[5]]
    except (ValueError, TypeError) as error:
        raise ProtocolError(f"a header field: expected {error}") from error
    expected = sum([count for _, count in messages])
    if frames > FRAMES_MAX or expected != frames:
        raise ProtocolError(f"value frames: the header announces {expected}, {frames} came")
    return sender, messages


@lru_cache(1024, typed=True)
def _sender(cluster: Any, epoch: Any, rank: Any, incarnation: Any) -> Sender:
    return Sender(_natural(cluster), _natural(epoch), _rank(rank), _rank(incarnation))


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
    return [header, *[frame for _, payload in messages for frame in payload]]


def paired(messages: Iterable[tuple[Message, int]], frames: Sequence[Any]) -> Iterator[tuple[Message, Any]]:
    """The messages that :func:`decode` gave, each with its own of the ``frames``, of which the first is the header."""
    position = 1
    for message, count in messages:
        yield message, frames[position : position + count]
        position += count
