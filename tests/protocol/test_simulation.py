"""Clusters with a bad network keep their promises; and the checkers see it when they do not."""

from __future__ import annotations

from collections import Counter

import pytest

from kvstore import consistency
from kvstore.protocol.actions import Apply, ReplyAfter, ReplyValue
from kvstore.protocol.binding import Binding
from kvstore.protocol.counted import Piece
from kvstore.protocol.requesting import Divide, Requesting
from kvstore.protocol.serving import Serving
from tests.protocol.simulation import MODELS, Simulation, Violation


def test_random_clusters(request: pytest.FixtureRequest):
    for seed in range(request.config.getoption("--simulation-seeds")):
        Simulation(seed).run()


@pytest.mark.parametrize("model", MODELS)
def test_every_model(model):
    for seed in range(1000, 1004):
        Simulation(seed, model).run()


def test_a_seed_replays_exactly():
    one, two = Simulation(12), Simulation(12)
    one.run()
    two.run()
    assert one.trace == two.trace
    assert one.pulled == two.pulled


# --- planted bugs: each must be found within some seeds -------------------------------------------

SEEDS = range(100)


def found(model: str | None = None, **planted) -> str:
    """The first violation within :data:`SEEDS`."""
    for seed in SEEDS:
        try:
            Simulation(seed, model, **planted).run()
        except (Violation, KeyError) as violation:
            text = f"{violation} --seed {seed}" if isinstance(violation, KeyError) else str(violation)
            break
    else:
        pytest.fail("the planted bug was not found")
    assert f"--seed {seed}" in text
    return text


class AppliesRepeats(Serving):
    def _push(self, rank, message, payload):
        piece = self.pieces.get((message.key, message.piece))
        repeated = piece is not None and payload is not None and message.round <= piece.accepted.get(rank, 0)
        actions = super()._push(rank, message, payload)
        again = Apply((message.key, message.piece), message.round, (payload,), None, 0)
        return [again, *actions] if repeated else actions


@pytest.mark.parametrize("model", ["sequential", "bounded(1)", "eventual"])
def test_finds_a_push_applied_twice(model):
    text = found(model, serving=AppliesRepeats)
    assert any(word in text for word in ("too often", "updates", "expected", "staleness"))


class ForgetsAPush(Serving):
    def _push(self, rank, message, payload):
        actions = super()._push(rank, message, payload)
        return [a for a in actions if not (isinstance(a, Apply) and a.round == 2)]


@pytest.mark.parametrize("model", ["sequential", "bounded(1)", "eventual"])
def test_finds_a_lost_push(model):
    assert found(model, serving=ForgetsAPush)


class NeverResends(Requesting):
    def tick(self, now):
        pass


def test_finds_a_lost_reply_that_nobody_asks_for_again():
    assert "no progress" in found(requesting=NeverResends)


def test_finds_a_commit_that_nobody_is_told():
    def silent(actions):
        return [a for a in actions if not isinstance(a, ReplyAfter)]

    assert "no progress" in found(performed=silent)


class IgnoresCredit(Requesting):
    def __init__(self, credit_bytes, resend_s):
        super().__init__(credit_bytes * 4, resend_s)


def test_finds_too_many_bytes_on_the_way():
    assert "bytes in flight" in found(requesting=IgnoresCredit)


def test_finds_that_waiting_for_credit_holds_up_resends(monkeypatch):
    right = Requesting._next

    def head_only(self, server):
        costly = self._costly.get(server)
        if costly and costly[0][2].request_id in self.open and self._needs_credit(costly[0][2]):
            used = self.in_flight.get(server, 0)
            if used and used + costly[0][2].nbytes > self.credit_bytes:
                return None
        return right(self, server)

    monkeypatch.setattr(Requesting, "_next", head_only)
    assert "no progress" in found()


class SendsTooSoon(Requesting):
    def _release(self, channel):
        while channel.queue:
            request = channel.queue.popleft()
            channel.pulling += request.is_pull
            self._enqueue(request)


def test_finds_a_round_that_overtakes_by_priority():
    assert "sent Push" in found(requesting=SendsTooSoon)


def test_finds_a_reply_that_is_too_early(monkeypatch):
    monkeypatch.setattr(consistency.Sequential, "answers", lambda self, level, participant, own: True)
    assert "pull by worker" in found("sequential")


def test_finds_a_value_that_is_too_stale(monkeypatch):
    monkeypatch.setattr(consistency.Bounded, "answers", consistency.Eventual.answers)
    assert "staleness" in found("bounded(1)")


def test_finds_an_old_value():
    class Forgetful(Simulation):
        """Answers pulls with the value before the last update, and says so in the version."""

        def _answer(self, rank, message, payload):
            if type(message).__name__ == "Value" and message.version > 1:
                message = type(message)(message.request_id, message.version - 1, message.staleness)
                payload = tuple(value[:-1] for value in payload)
            super()._answer(rank, message, payload)

    def first(model):
        for seed in SEEDS:
            try:
                Forgetful(seed, model).run()
            except Violation as violation:
                return str(violation)
        return ""

    assert "misses" in first("eventual")
    assert "misses" in first("bounded(0)")
    assert "expected" in first("sequential")


def test_finds_a_wrong_staleness(monkeypatch):
    right = consistency.Level.answer

    def wrong(self, pull):
        answer = right(self, pull)
        return consistency.Answer(answer.ticket, answer.version, answer.staleness + 1)

    monkeypatch.setattr(consistency.Level, "answer", wrong)
    assert "staleness" in found("eventual")


@pytest.mark.parametrize("model", ["sequential", "bounded(0)", "eventual"])
def test_finds_a_reply_that_runs_ahead_of_its_update(model):
    def values_first(actions):
        return sorted(actions, key=lambda action: not isinstance(action, ReplyValue))

    assert found(model, performed=values_first)


# --- planted bugs in bundles ----------------------------------------------------------------------


def test_bundles_are_united_and_split():
    moves: Counter[str] = Counter()
    divided = 0
    for seed in SEEDS:
        simulation = Simulation(seed)
        simulation.run()
        moves += simulation.moves
        divided += simulation.divided
    assert moves["Unite"] > len(SEEDS) / 4
    assert moves["Split"] > len(SEEDS) / 6
    assert divided > len(SEEDS) / 6


@pytest.mark.parametrize("what", ["held", "accepted"])  # parked commits and pulls come back with a resend
def test_finds_what_a_split_forgets(monkeypatch, what):
    right = Binding.split

    def split(self, bundle):
        right(self, bundle)
        for piece_id in bundle.members[1:]:
            setattr(self._pieces[piece_id], what, {})

    monkeypatch.setattr(Binding, "split", split)
    assert found()


def test_finds_keys_united_that_are_not_alike(monkeypatch):
    monkeypatch.setattr(Piece, "same_history", lambda self, other: True)
    assert found()


def test_finds_requests_that_are_divided_in_another_order(monkeypatch):
    right = Requesting.divide
    monkeypatch.setattr(Requesting, "divide", lambda self, name: Divide(right(self, name).requests[::-1]))
    assert found()


def test_finds_another_order_of_merging():
    def backwards(actions):
        return [
            Apply(a.piece, a.round, a.payloads[::-1], a.rule, a.generation) if isinstance(a, Apply) else a
            for a in actions
        ]

    assert found("sequential", performed=backwards)
