"""Messages as they are, and the same with something wrong in them: structure-aware, from a seed.

A mutation keeps most of a message as it was, so that it gets past the first checks and tries the later ones.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import msgpack

from kvstore.protocol import wire
from kvstore.protocol.messages import Bind, Drop, Message, PieceRecord, Place, Replica, Shard, Spec
from kvstore.protocol.pieces import bundle_id
from kvstore.protocol.wire import FORMS, Sender

KEYS = ("w", "v", "a name", "ä" * 10, 7)
DTYPES = ("float32", "bfloat16", "int8")
OPTIMIZERS: tuple[dict[str, Any], ...] = (
    {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.0},
    {"name": "adam", "lr": 0.001},
    {"name": "sgd"},
)
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2, 255, 1 << 31, (1 << 63) - 1, 1 << 63, -(1 << 63), 1.5, math.inf, math.nan, "", "x", "\0",
    "é" * 600, "x" * 70_000, b"", b"raw", b"x" * 16, [], [[]], [0] * 2000, {}, {"a": {}}, {1: 2}, [[[[[[[]]]]]]],
    {"name": "sgd", "lr": "fast"}, msgpack.ExtType(5, b"ext"), msgpack.Timestamp(1, 2), "eval", "bounded(9)", "float32",
)  # fmt: skip


def _spec(rng: random.Random) -> Spec:
    shape = rng.choice([(10,), (2, 3), (), (0,), (300,)])
    whole = max(1, math.prod(shape))
    people = rng.choice([None, None, (0, 1), (1,)])
    model = rng.choice(["sequential", "bounded(2)", "eventual"])
    samples = rng.choice([None, None, 8])
    return Spec(shape, rng.choice(DTYPES), rng.choice([whole, 4]), "sequential", model, people, samples)


def _piece(rng: random.Random) -> PieceRecord:
    rounds = {rank: rng.randrange(9) for rank in range(rng.randrange(3))}
    return PieceRecord(rng.choice(KEYS), rng.randrange(3), _spec(rng), 3, 2, rounds, ("momentum",), ("float32",))


def _shard(rng: random.Random) -> Shard:
    replicas = tuple(Replica(rng.randrange(9), n, "tcp://127.0.0.1:9", True) for n in range(rng.randrange(3)))
    return Shard(rng.randrange(9), rng.randrange(-1, 3), "tcp://127.0.0.1:9", replicas, False)


_VALUES: dict[Any, Any] = {
    wire._natural: lambda rng: rng.choice([0, 1, 2, 3, rng.randrange(1 << 20)]),
    wire._rank: lambda rng: rng.randrange(-1, 4),
    wire._priority: lambda rng: rng.randrange(-9, 9),
    wire._flag: lambda rng: rng.random() < 0.5,
    wire._text: lambda rng: rng.choice(["", "worker", "server", "tcp://127.0.0.1:9", "float32", "why not"]),
    wire._name: lambda rng: rng.choice(["", "worker", "server", "tcp://127.0.0.1:9", "node"]),
    wire._model: lambda rng: rng.choice([*DTYPES, "sequential"]),
    wire.key: lambda rng: rng.choice(KEYS),
    wire._bundle: lambda rng: bundle_id(KEYS[:2]),
    wire._target: lambda rng: rng.choice([*KEYS, bundle_id(KEYS[:2])]),
    wire._key_list: lambda rng: KEYS[: rng.randrange(1, 5)],
    wire._described: lambda rng: dict(rng.choice(OPTIMIZERS)),
    wire._report: lambda rng: {"keys": 3, "workers": [{"rank": 0, "host": "a"}]},
    wire._since: lambda rng: {key: rng.randrange(5) for key in KEYS[: rng.randrange(4)]},
    wire._spec: _spec,
    wire._name_list: lambda rng: tuple(rng.sample(["momentum", "mean", "float32"], rng.randrange(3))),
    wire._address_list: lambda rng: ("tcp://127.0.0.1:9", "tcp://[::1]:9"),
    wire._rank_list: lambda rng: tuple(range(rng.randrange(4))),
    wire._pieces: lambda rng: tuple(_piece(rng) for _ in range(rng.randrange(3))),
    wire._pairs: lambda rng: tuple((rank, rng.randrange(9)) for rank in range(rng.randrange(3))),
    wire._absences: lambda rng: tuple((rank, 2, rng.randrange(2, 9)) for rank in range(rng.randrange(3))),
    wire._reasons: lambda rng: tuple((rank, "it is gone") for rank in range(rng.randrange(3))),
    wire._shard_list: lambda rng: tuple(_shard(rng) for _ in range(rng.randrange(3))),
    wire._logged: lambda rng: rng.choice([Bind(0, bundle_id(KEYS[:2]), KEYS[:2]), Drop(0, rng.choice(KEYS))]),
    wire._held: lambda rng: tuple(range(rng.randrange(4))),
    wire._place: lambda rng: Place(f"{rng.randrange(1, 1 << 20)}.9.{'0' * 16}", rng.randrange(99)),
    wire._maybe_natural: lambda rng: None if rng.random() < 0.7 else rng.randrange(9),
    wire._maybe_samples: lambda rng: None if rng.random() < 0.7 else rng.randrange(99),
    wire._maybe_key: lambda rng: rng.choice([None, *KEYS]),
    wire._history: lambda rng: tuple((n, 2, rng.randrange(2)) for n in range(rng.randrange(3))),
    wire._maybe_place: lambda rng: None if rng.random() < 0.7 else _VALUES[wire._place](rng),
}  # fmt: skip


def message(rng: random.Random, number: int | None = None) -> Message:
    """A message that could be: of this kind, or of any."""
    kind, checks = FORMS[rng.choice(sorted(FORMS)) if number is None else number]
    return kind(rng.randrange(1, 1 << 16), *(_VALUES[check](rng) for check in checks))


def envelope(rng: random.Random, sender: Sender, number: int | None = None) -> list[bytes]:
    """An envelope with a message or some, and frames of about the right size."""
    rows = [message(rng, number) for _ in range(rng.choice([1, 1, 1, 2, 5]))]
    return [bytes(f) for f in wire.envelope(sender, [(row, _frames(rng, row)) for row in rows])]


def _frames(rng: random.Random, row: Message) -> Sequence[bytes]:
    if rng.random() < 0.5:
        return ()
    return [rng.randbytes(rng.choice([0, 1, 8, 10, 20, 40, 1200])) for _ in range(rng.choice([1, 1, 1, 2]))]


def mutated(rng: random.Random, frames: Sequence[bytes]) -> list[bytes]:
    """The envelope with something wrong: in its structure, its bytes or its frames."""
    header, *payload = frames
    what = rng.random()
    if what < 0.7:
        fields = msgpack.unpackb(header, strict_map_key=False)
        for _ in range(rng.choice([1, 1, 2, 4])):
            fields = _changed(rng, fields)
        try:
            header = msgpack.packb(fields)
        except (ValueError, OverflowError, TypeError, RecursionError):
            header = rng.randbytes(30)
    elif what < 0.9:
        damaged = bytearray(header)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        header = bytes(damaged[: rng.randint(1, len(damaged))] if rng.random() < 0.3 else damaged)
    elif what < 0.95 and payload:
        payload[rng.randrange(len(payload))] = rng.randbytes(rng.randrange(50))
    else:
        payload += [rng.randbytes(rng.randrange(50))] * rng.choice([1, 2, 70])
    return [header, *payload]


def _changed(rng: random.Random, value: Any) -> Any:
    """``value`` with one thing in it changed."""
    if isinstance(value, list) and value and rng.random() < 0.9:
        changed, at = list(value), rng.randrange(len(value))
        what = rng.random()
        if what < 0.08:
            del changed[at]
        elif what < 0.16:
            changed.insert(at, rng.choice(ODD))
        elif what < 0.2:
            changed += [changed[at]] * rng.choice([1, 300])
        else:
            changed[at] = _changed(rng, changed[at])
        return changed
    if isinstance(value, dict) and value and rng.random() < 0.8:
        name = rng.choice(list(value))
        return {**value, rng.choice([name, "x", 5]): _changed(rng, value[name])}
    if type(value) is int and rng.random() < 0.5:
        return value + rng.choice([-1, 1, 2, 1000])
    return rng.choice(ODD)
