"""Mutated messages into the decoder and the pure cores; the long version is ``python -m tests.protocol.fuzz``."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from kvstore import consistency, optim
from kvstore.errors import LimitError, ProtocolError
from kvstore.protocol import binding, bundles, messages, replicating, serving, workers
from kvstore.protocol.actions import Reply
from kvstore.protocol.messages import Admit, Bind, Entry, Failed, Fetch, Freeze, Init, Leave, Message, Push, Spec
from kvstore.protocol.pieces import bundle_id
from kvstore.protocol.serving import Serving
from kvstore.protocol.wire import FORMS, Sender, decode
from tests.protocol import mutations
from tests.protocol.fuzz import decoded, fuzz

SPEC = Spec((10,), "float32", 10, "sequential", "sequential", None)


@pytest.mark.parametrize("number", sorted(FORMS), ids=lambda n: FORMS[n][0].__name__)
def test_the_decoder_takes_or_refuses(number):
    rng = random.Random(number)
    taken = 0
    for _ in range(200):
        frames = mutations.envelope(rng, Sender(7, 1, 0, 1), number)
        assert decoded(frames) is not None, "a message without a mistake was refused"
        taken += decoded(mutations.mutated(rng, frames)) is not None
    assert 0 < taken < 200  # or the mutations are too gentle, or too rough


@pytest.mark.parametrize("seed", range(5))
def test_the_cores_take_or_refuse(seed):
    counts = fuzz(seed, 1000)
    assert min(counts.values()) > 100


def test_libfuzzer():
    pytest.importorskip("atheris")
    command = [sys.executable, "-m", "tests.protocol.fuzz", "--atheris", "--seconds", "10"]
    assert subprocess.run(command, timeout=100).returncode == 0


def test_many_small_lists_in_a_large_header_are_refused_before_they_are_all_made():
    header = b"\x96\x01\x07\x01\x00\x01\xdd" + (4 << 20).to_bytes(4, "big") + b"\x90" * (4 << 20)
    with pytest.raises(ProtocolError):
        decode(header, 0)


def errors_of(actions) -> list[str]:
    return [a.message.error for a in actions if isinstance(a, Reply) and isinstance(a.message, Failed)]


class TestLimits:
    """What a worker may make a server hold."""

    def ask(self, core: Serving, rank: int, message: Message, payload: object = None) -> list[str]:
        return errors_of(core.handle(rank, 1, message, payload, 0.0))

    @pytest.fixture
    def core(self) -> Serving:
        core = Serving(2, optim.from_wire)
        assert not self.ask(core, 0, Init(1, "w", 0, SPEC), object())
        return core

    @pytest.mark.parametrize("rank", [-1, 2, 1 << 30])
    def test_strangers_leave_nothing_behind(self, core, rank):
        assert self.ask(core, rank, Push(1, "w", 0, 1, False, False), object()) == ["ProtocolError"]
        assert rank not in {*core.workers.heard, *core.workers.incarnations, *core.workers.known}

    def test_pushes_that_are_not_merged_yet(self, core):
        rounds = range(1, serving.AHEAD_MAX + 2)
        told = [self.ask(core, 0, Push(n, "w", 0, n, False, False), object()) for n in rounds]
        assert told == [[]] * serving.AHEAD_MAX + [[LimitError.__name__]]
        assert len(core.pieces["w", 0].held) == serving.AHEAD_MAX
        told = [self.ask(core, 1, Push(n, "w", 0, n, False, False), object()) for n in rounds]
        assert told == [[]] * serving.AHEAD_MAX + [[]]  # round by round they are merged, and there is room again
        assert not self.ask(core, 0, Push(99, "w", 0, serving.AHEAD_MAX + 1, False, False), object())

    def test_pulls_that_wait(self, core, monkeypatch):
        monkeypatch.setattr(serving, "PARKED_MAX", 20)
        told = [self.ask(core, 0, Fetch(n, "w", 0, 5)) for n in range(100)]
        waiting = len(core.pieces["w", 0].level.waiting)
        assert told.count([LimitError.__name__]) == 100 - waiting
        assert waiting <= 20
        assert not self.ask(core, 1, Fetch(1, "w", 0, 5))  # which is not the other worker's fault

    def test_pulls_that_are_answered_are_not_counted_for_ever(self, core, monkeypatch):
        monkeypatch.setattr(serving, "PARKED_MAX", 20)
        for n in range(1, 100):
            assert not self.ask(core, 0, Push(2 * n, "w", 0, n, True, False), object())  # waits for the other
            assert not self.ask(core, 1, Push(2 * n, "w", 0, n, True, False), object())

    def test_pieces_and_early_inits(self, core, monkeypatch):
        monkeypatch.setattr(serving, "PIECES_MAX", 5)
        told = [self.ask(core, 0, Init(n, n, 0, SPEC), object()) for n in range(10)]
        assert told == [[]] * 4 + [[LimitError.__name__]] * 6
        told = [self.ask(core, 1, Init(n, f"{n}", 0, SPEC)) for n in range(10)]
        assert told == [[]] * 5 + [[LimitError.__name__]] * 5

    def test_keys_in_bundles(self, core, monkeypatch):
        monkeypatch.setattr(binding, "BUNDLED_MAX", 5)
        self.ask(core, 0, Init(1, "v", 0, SPEC), object())
        for keys, told in (("wv", []), ("vw", []), ("w", []), ("v", ["LimitError"])):
            assert self.ask(core, 0, Bind(1, bundle_id(tuple(keys)), tuple(keys))) == told

    def test_what_waits_while_somebody_joins_is_kept_once(self, core):
        self.ask(core, 2, Freeze(1))
        for _ in range(50):  # as a worker does that has no answer
            assert core.handle(0, 1, Push(5, "w", 0, 1, False, False), object(), 0.0) == []
        assert len(core.workers.resumed()) == 0  # it is not the time yet
        self.ask(core, 2, Admit(2, {"w": 0}))
        assert (core.pieces["w", 0].accepted, len(core.pieces["w", 0].held)) == ({0: 1, 1: 0, 2: 0}, 1)

    def test_a_new_life_replaces_what_an_old_one_had_waiting(self, core):
        self.ask(core, 2, Freeze(1))
        core.handle(0, 1, Push(5, "w", 0, 1, False, False), "old", 0.0)
        core.handle(0, 2, Push(5, "w", 0, 1, False, False), "new", 0.0)
        self.ask(core, 2, Admit(2, {"w": 0}))
        assert core.pieces["w", 0].held == {(0, 1): "new"}

    def test_first_values_are_asked_for_when_it_is_their_turn(self, core):
        self.ask(core, 2, Freeze(1))
        assert core.handle(0, 1, Init(5, "x", 0, SPEC), object(), 0.0) == []
        told = core.handle(2, 1, Admit(2, {"w": 0}), None, 0.0)
        assert [type(action.message).__name__ for action in told] == ["Done", "Missing"]
        assert not self.ask(core, 0, Init(5, "x", 0, SPEC), object())
        assert ("x", 0) in core.pieces

    def test_how_many_and_how_much_of_a_worker_waits(self, core, monkeypatch):
        monkeypatch.setattr(workers, "WAITING_MAX", 5)
        monkeypatch.setattr(workers, "WAITING_ITEMS_MAX", 3 * SPEC.cut.items)
        for key in "abcdefgh":
            self.ask(core, 0, Init(1, key, 0, SPEC), object())
        self.ask(core, 2, Freeze(1))
        for n, key in enumerate("abcdefgh"):
            self.ask(core, 0, Push(n, key, 0, 1, False, False), object())
            self.ask(core, 1, Init(n, f"new {key}", 0, SPEC), object())
        assert core.handle(1, 1, Push(9, "a", 0, 1, False, False), object(), 0.0) == []  # there is no room
        told = core.handle(2, 1, Admit(2, dict.fromkeys("wabcdefgh", 0)), None, 0.0)
        assert [key for key in "abcdefgh" if core.pieces[key, 0].held] == ["a", "b", "c"]
        assert len(core._early) == 5 and len(told) == 1
        self.ask(core, 0, Push(7, "h", 0, 1, False, False), object())  # it is sent again
        assert core.pieces["h", 0].held

    def test_a_new_life_has_the_room_of_the_one_before(self, core, monkeypatch):
        monkeypatch.setattr(workers, "WAITING_MAX", 1)
        self.ask(core, 2, Freeze(1))
        core.handle(0, 1, Push(5, "w", 0, 1, False, False), "old", 0.0)
        core.handle(0, 2, Push(5, "w", 0, 1, False, False), "new", 0.0)
        self.ask(core, 2, Admit(2, {"w": 0}))
        assert core.pieces["w", 0].held == {(0, 1): "new"}

    def test_an_unknown_key_is_refused_although_somebody_joins(self, core):
        self.ask(core, 2, Freeze(1))
        assert self.ask(core, 0, Push(1, "nobody's", 0, 1, False, False), object()) == ["UnknownKeyError"]
        assert self.ask(core, 0, Push(1, b"x" * 16, 0, 1, False, False), object()) == ["UnknownKeyError"]

    def test_entries_of_a_log_that_come_long_before_their_turn(self):
        replica = replicating.Replica(1, 0)
        for number in range(2, 3 * replicating.EARLY_MAX):
            assert replica.take(Entry(number, 1, 1, 0, 1, Leave(0, "")), object()) == []
        assert len(replica._early) == replicating.EARLY_MAX - 1
        assert len(replica.take(Entry(1, 1, 1, 0, 1, Leave(0, "")), object())) == replicating.EARLY_MAX

    def test_every_limit_is_in_the_document(self):
        from pathlib import Path

        document = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
        for module in (messages, bundles, serving, workers, consistency):
            for name, value in vars(module).items():
                if name.endswith("_MAX"):
                    assert f"| {name} | {value} |" in document
