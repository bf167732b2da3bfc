"""Headers: what goes in comes out, and nothing that a peer sends raises anything but ProtocolError."""

from __future__ import annotations

import hashlib
import math
import random
from pathlib import Path

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.errors import KVStoreError, ProtocolError, ProtocolVersionError, from_wire, to_wire
from kvstore.protocol import bundles, messages, wire
from kvstore.protocol.messages import PROTOCOL, Bind, Done, Failed, Fetch, PieceRecord, Place, Push, Spec, Value
from kvstore.protocol.pieces import BUNDLE_ID_BYTES, bundle_id
from kvstore.protocol.wire import FORMS, Sender, decode, encode

SENDER = Sender(7, 1, 0, 1)

natural = st.integers(0, (1 << 63) - 1)
rank = st.integers(-1, (1 << 31) - 1)
text = st.text(max_size=40)
key = st.one_of(st.text(min_size=1, max_size=40), st.integers(-(1 << 63), (1 << 63) - 1))
plain = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(1 << 63), (1 << 63) - 1), st.floats(allow_nan=False), text),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(text, inner, max_size=3)),
    max_leaves=4,
)
described = st.dictionaries(text, plain, max_size=3).filter(lambda d: _depth(d) <= 4)
spec = st.builds(
    Spec,
    st.lists(st.integers(0, 1000), max_size=4).map(tuple),
    text,
    st.integers(1, (1 << 63) - 1),
    text,
    text,
    st.one_of(st.none(), st.lists(natural, max_size=4).map(tuple)),
    st.one_of(st.none(), st.integers(1, messages.SAMPLES_MAX)),
)
texts = st.lists(text, max_size=4).map(tuple)
place = st.builds(Place, text, natural)
bundle = st.binary(min_size=BUNDLE_ID_BYTES, max_size=BUNDLE_ID_BYTES)
replicas = st.lists(st.builds(messages.Replica, natural, natural, text, st.booleans()), max_size=3).map(tuple)
piece_record = st.builds(
    PieceRecord, key, natural, spec, natural, natural, st.dictionaries(natural, natural, max_size=3), texts, texts
)
FIELDS = {
    wire.key: key,
    wire._bundle: bundle,
    wire._target: st.one_of(key, bundle),
    wire._key_list: st.lists(key, max_size=4).map(tuple),
    wire._natural: natural,
    wire._rank: rank,
    wire._flag: st.booleans(),
    wire._text: text,
    wire._name: text,
    wire._model: text,
    wire._described: described,
    wire._report: described,
    wire._since: st.dictionaries(key, natural, max_size=3),
    wire._spec: spec,
    wire._name_list: texts,
    wire._rank_list: st.lists(natural, max_size=4).map(tuple),
    wire._address_list: texts,
    wire._priority: st.integers(-messages.PRIORITY_MAX, messages.PRIORITY_MAX),
    wire._held: st.lists(natural, max_size=4).map(tuple),
    wire._rank_list: st.lists(natural, max_size=4).map(tuple),
    wire._pieces: st.lists(piece_record, max_size=3).map(tuple),
    wire._place: place,
    wire._maybe_key: st.one_of(st.none(), key),
    wire._history: st.lists(st.tuples(natural, natural, natural), max_size=3).map(tuple),
    wire._maybe_place: st.one_of(st.none(), place),
    wire._maybe_natural: st.one_of(st.none(), natural),
    wire._maybe_samples: st.one_of(st.none(), st.integers(0, messages.SAMPLES_MAX)),
    wire._shard_list: st.lists(st.builds(messages.Shard, natural, rank, text, replicas, st.booleans()), max_size=3).map(
        tuple
    ),
    wire._pairs: st.lists(st.tuples(natural, natural), max_size=3).map(tuple),
    wire._absences: st.lists(st.tuples(natural, natural, natural), max_size=3).map(tuple),
    wire._reasons: st.lists(st.tuples(natural, text), max_size=3).map(tuple),
    wire._logged: st.deferred(lambda: st.sampled_from(LOGGED_KINDS).flatmap(of_kind)),
}
LOGGED_KINDS = [number for number, form in FORMS.items() if issubclass(form[0], wire.LOGGED)]


def _depth(value) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0) if isinstance(value, dict | list) else 0


def of_kind(number: int) -> st.SearchStrategy:
    kind, checks = FORMS[number]
    return st.builds(kind, natural, *(FIELDS[check] for check in checks))


any_message = st.sampled_from(sorted(FORMS)).flatmap(of_kind)
sender = st.builds(Sender, natural, natural, rank, rank)
batch = st.lists(st.tuples(any_message, st.integers(0, 5)), max_size=5)


@pytest.mark.parametrize("number", sorted(FORMS), ids=lambda n: FORMS[n][0].__name__)
def test_every_kind_comes_back_as_it_went(number):
    @settings(max_examples=25, deadline=None)
    @given(sender, of_kind(number), st.integers(0, 3))
    def check(who, message, frames):
        assert decode(encode(who, [(message, frames)]), frames) == (who, [(message, frames)])

    check()


@settings(max_examples=50, deadline=None)
@given(sender, batch)
def test_messages_travel_together_in_their_order(who, rows):
    assert decode(encode(who, rows), sum(n for _, n in rows)) == (who, rows)


def test_the_kinds_are_all_there():
    kinds = [form[0] for form in FORMS.values()]
    assert len(set(kinds)) == len(kinds)
    defined = [k for k in vars(messages).values() if isinstance(k, type) and issubclass(k, messages.Message)]
    assert set(defined) == {messages.Message, *kinds}


def mutated(value, rng: random.Random):
    """``value`` with one thing in it changed to something that may not fit."""
    odd = [None, True, -1, 1 << 63, 1.5, math.inf, "", "x" * 70_000, b"raw", [], [[]], {}, {"a": {}}, {1: 2}, 0, 255]
    if isinstance(value, list) and value and rng.random() < 0.85:
        changed, at = list(value), rng.randrange(len(value))
        what = rng.random()
        if what < 0.1:
            del changed[at]
        elif what < 0.2:
            changed.insert(at, rng.choice(odd))
        else:
            changed[at] = mutated(changed[at], rng)
        return changed
    return rng.choice(odd)


def only_a_protocol_error(header: bytes, frames: int) -> None:
    try:
        who, rows = decode(header, frames)
    except ProtocolError:
        return
    # what is accepted can be sent on
    assert decode(encode(who, rows), frames) == (who, rows) or "nan" in repr(rows)


@settings(max_examples=300, deadline=None)
@given(sender, batch, st.integers(0, 1 << 30), st.integers(0, 4))
def test_mutated_headers(who, rows, seed, times):
    rng = random.Random(seed)
    fields = msgpack.unpackb(encode(who, rows), strict_map_key=False)
    for _ in range(times + 1):
        fields = mutated(fields, rng)
    only_a_protocol_error(msgpack.packb(fields), sum(n for _, n in rows))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes(header):
    only_a_protocol_error(header, 0)


@settings(max_examples=300, deadline=None)
@given(sender, batch, st.integers(0, 1 << 30))
def test_damaged_bytes(who, rows, seed):
    rng = random.Random(seed)
    header = bytearray(encode(who, rows))
    for _ in range(rng.randint(1, 3)):
        header[rng.randrange(len(header))] = rng.randrange(256)
    only_a_protocol_error(bytes(header[: rng.randint(0, len(header))] if rng.random() < 0.3 else header), 0)


def packed(*rows, version=PROTOCOL, cluster=7, rank=0) -> bytes:
    return msgpack.packb([version, cluster, 1, rank, 1, list(rows)])


def test_another_version_is_named_with_ours():
    with pytest.raises(ProtocolVersionError, match=f"expected {PROTOCOL}, the peer speaks 99"):
        decode(packed(version=99), 0)


def test_another_version_may_look_otherwise():
    with pytest.raises(ProtocolVersionError):
        decode(msgpack.packb([2, "anything"]), 3)


@pytest.mark.parametrize(
    ("header", "frames", "what"),
    [
        (b"", 0, "msgpack"),
        (b"\x93\x01", 0, "msgpack"),
        (msgpack.packb({"protocol": 1}), 0, "begins with the protocol version"),
        (msgpack.packb([True, 7, 1, 0, 1, []]), 0, "begins with the protocol version"),
        (msgpack.packb([1, 7, 1, 0, 1]), 0, "expected .protocol, cluster"),
        (packed(rank=-2), 0, "a rank"),
        (packed(cluster=-1), 0, "a whole number"),
        (packed([127, 1, 0]), 0, "a known kind"),
        (packed([38, 1]), 0, "a known kind"),
        (packed([38, 1, 0, 0]), 0, "0 fields in a Done"),
        (packed([38, -1, 0]), 0, "a whole number"),
        (packed([38, 1, 1]), 0, "the header announces 1, 0 came"),
        (packed([38, 1, 0]), 2, "the header announces 0, 2 came"),
        (packed([3, 1, "", 0, 0, 0, False, [], 0]), 0, "a str of 1-1024"),
        (packed([3, 1, "k" * 1025, 0, 0, 0, False, [], 0]), 0, "a str of 1-1024"),
        (packed([3, 1, "ä" * 600, 0, 0, 0, False, [], 0]), 0, "a str of 1-1024"),
        (packed([3, 1, 1 << 63, 0, 0, 0, False, [], 0]), 0, "an int64"),
        (packed([3, 1, True, 0, 0, 0, False, [], 0]), 0, "an int64"),
        (packed([1, 1, "k", 0, [[1] * 65, "f", 1, "", "", None, None], 0]), 0, "at most 64"),
        (packed([1, 1, "k", 0, [[1 << 62, 4], "f", 1, "", "", None, None], 0]), 0, "a value that fits"),
        (packed([1, 1, "k", 0, [[1], "f", 0, "", "", None, None], 0]), 0, "a value that fits"),
        (packed([1, 1, "k", 0, [[1], "f", 1, "", "", None, 0], 0]), 0, "a value that fits"),
        (packed([1, 1, "k", 0, [[1], "f", 1, "", "", None, 1 << 41], 0]), 0, "samples"),
        (packed([10, 1, "x" * 65_537, False, 0]), 0, "at most 65536"),
        (packed([3, 1, "k", 0, 0, 1 << 31, False, [], 0]), 0, "a priority"),
        (packed([3, 1, "k", 0, 0, 0, False, [1] * 1025, 0]), 0, "at most 1024"),
        (packed([11, 1, ["1.2." + "0" * 64, 0], 0]), 0, "a segment's address"),
        (packed([11, 1, ["1.2.3", -1], 0]), 0, "a whole number"),
        (packed([11, 1, None, 0]), 0, "a segment's address"),
        (packed([3, 1, b"x" * 15, 0, 0, 0, False, [], 0]), 0, "a bundle's id of 16 bytes"),
        (
            packed([2, 1, b"x" * 17, 0, 1, False, False, 0, False, [], None, None, False, 0]),
            0,
            "a bundle's id of 16 bytes",
        ),
        (packed([1, 1, b"x" * 16, 0, [[1], "f", 1, "", "", None, None], 0]), 0, "a str of 1-1024"),
        (packed([7, 1, b"x" * 16, 0, 0]), 0, "a str of 1-1024"),
        (packed([12, 1, "x" * 16, ["a"], 0]), 0, "a bundle's id of 16 bytes"),
        (packed([12, 1, b"x" * 16, [b"x" * 16], 0]), 0, "a str of 1-1024"),
        (packed([12, 1, b"x" * 16, "ab", 0]), 0, "a list of at most"),
        (b"\x91" * 5000, 0, "msgpack"),
        (bytes(messages.HEADER_BYTES_MAX + 1), 0, "at most"),
        (packed(*[[38, 1, 0]] * (messages.MESSAGES_MAX + 1)), 0, "expected .protocol"),
        (packed([38, 1, messages.FRAMES_MAX + 1]), messages.FRAMES_MAX + 1, "value frames"),
    ],
)
def test_what_does_not_fit(header, frames, what):
    with pytest.raises(ProtocolError, match=what):
        decode(header, frames)


def test_the_largest_keys_fit():
    for name in ("k" * 1024, "ä" * 512, -(1 << 63), (1 << 63) - 1):
        message = messages.Fetch(1, name, 0, 0)
        assert decode(encode(SENDER, [(message, 0)]), 0)[1] == [(message, 0)]


def test_an_envelope_is_the_header_and_then_the_frames_of_each_message():
    push, done = Push(1, "w", 0, 1, True, False), Done(2)
    header, *frames = wire.envelope(SENDER, [(push, [b"abcd"]), (done, []), (push, [b"x", b"y"])])
    assert frames == [b"abcd", b"x", b"y"]
    assert decode(header, 3)[1] == [(push, 1), (done, 0), (push, 2)]


@pytest.mark.parametrize("kind", ["KeyError", "OptionError", "os.system"])
def test_an_error_is_one_of_ours_or_none(kind):
    error = from_wire(kind, "text")
    assert isinstance(error, KVStoreError)
    assert str(error) == "text"


def test_errors_cross_the_wire_by_name():
    name, said = to_wire(ProtocolVersionError("expected 1"))
    failed = decode(encode(SENDER, [(Failed(1, name, said), 0)]), 0)[1][0][0]
    assert type(from_wire(failed.error, failed.text)) is ProtocolVersionError
    assert to_wire(ZeroDivisionError("x")) == ("UpdateError", "ZeroDivisionError: x")


def test_the_document_names_every_kind_with_its_number():
    document = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
    for number, (kind, _) in FORMS.items():
        fields = ", ".join(name for name in kind.__dataclass_fields__ if name != "request_id")
        assert f"| {number} | {kind.__name__} | {fields} |" in document, (number, kind.__name__, fields)
    limits = [(name, value) for name, value in vars(messages).items() if name.endswith("_MAX")]
    limits += [("BUNDLE_ID_BYTES", BUNDLE_ID_BYTES), ("BUNDLES_MAX", bundles.BUNDLES_MAX)]
    for name, value in [("PROTOCOL", PROTOCOL), *limits]:
        assert f"| {name} | {value} |" in document


def test_the_id_of_a_bundle_is_as_the_document_says():
    keys = ("a", "b", -5)
    digest = hashlib.blake2b(digest_size=16)
    for name in (b"sa", b"sb", b"i" + (-5).to_bytes(8, "big", signed=True)):
        digest.update(len(name).to_bytes(4, "big"))
        digest.update(name)
    assert bundle_id(keys) == digest.digest()
    document = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
    assert f"`{digest.hexdigest()}`" in document
    different = [keys, keys[::-1], keys[:2], ("ab", -5), (1, 2), ("1", "2"), (12,), ("1", 2)]
    assert len({bundle_id(some) for some in different}) == len(different)


def test_a_bundle_may_stand_where_a_key_does():
    name = bundle_id(("a", "b"))
    rows = [(Bind(1, name, ("a", "b")), 0), (Push(2, name, 0, 1, True, False), 1), (Fetch(3, name, 0, 1), 0)]
    assert decode(encode(SENDER, rows), 1)[1] == rows


def test_the_document_s_example_in_bytes():
    document = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
    example = Push(5, "w", 0, 1, True, False)
    assert encode(Sender(7, 1, 0, 1), [(example, 1)]).hex(" ") in document
    assert encode(Sender(7, 1, 0, 1), [(Value(5, 1, 0), 1)]).hex(" ") in document
