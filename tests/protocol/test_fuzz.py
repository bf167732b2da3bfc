"""Mutated messages into the decoder and the pure cores; the long version is ``python -m tests.protocol.fuzz``."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from kvstore import consistency, optim
from kvstore.errors import LimitError, ProtocolError
from kvstore.protocol import binding, bundles, messages, serving
from kvstore.protocol.actions import Reply
from kvstore.protocol.messages import Bind, Failed, Fetch, Init, Message, Push, Spec
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

    def test_every_limit_is_in_the_document(self):
        from pathlib import Path

        document = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
        for module in (messages, bundles, serving, consistency):
            for name, value in vars(module).items():
                if name.endswith("_MAX"):
                    assert f"| {name} | {value} |" in document
