"""Seeds of the simulation, and bugs planted to see that it would find them."""

from __future__ import annotations

import pytest

from kvstore.protocol.messages import Accepted, Committed, Fetch, Push
from kvstore.protocol.serving import Apply, Reply, ReplyAfter, ReplyValue, Serving
from tests.protocol.simulation import MODELS, Simulation, Violation


def test_random_clusters(request: pytest.FixtureRequest):
    for seed in range(request.config.getoption("--simulation-seeds")):
        Simulation(seed).run()


@pytest.mark.parametrize("model", MODELS)
def test_each_model(model):
    for seed in range(10):
        simulation = Simulation(1000 + seed, model).run()
        assert all(worker.done for worker in simulation.workers)


class DoubleApply(Serving):
    """Takes a repeated push for a new one."""

    def _push(self, rank, message, payload):
        piece = self.pieces.get((message.key, message.piece))
        if piece is not None and payload is not None and message.round == piece.accepted.get(rank):
            return [*super()._push(rank, message, payload), Apply((message.key, message.piece), 0, (payload,), None, 0)]
        return super()._push(rank, message, payload)


class LostAck(Serving):
    """Never says that a push is committed."""

    def handle(self, *args):
        return [a for a in super().handle(*args) if not (type(a) is ReplyAfter and type(a.message) is Committed)]


class EarlyReply(Serving):
    """Answers a push before its round has closed."""

    def _push(self, rank, message, payload):
        actions = super()._push(rank, message, payload)
        if message.pull and not any(type(a) in (ReplyValue, Reply) for a in actions):
            actions.append(ReplyValue(rank, message.request_id, (message.key, message.piece), message.round, 0))
        return actions


class StaleRead(Serving):
    """Answers pulls without looking at the rounds."""

    def _fetch(self, rank, message: Fetch, payload):
        return [ReplyValue(rank, message.request_id, (message.key, message.piece), 0, 0)]


class LostPush(Serving):
    """Accepts some pushes and forgets them."""

    def _push(self, rank, message: Push, payload):
        piece = self.pieces.get((message.key, message.piece))
        if piece is not None and message.round == 2 and piece.accepted.get(rank) == 1:
            piece.accepted[rank] = 2
            return [Reply(rank, Accepted(message.request_id)), Reply(rank, Committed(message.request_id))]
        return super()._push(rank, message, payload)


@pytest.mark.parametrize("bug", [DoubleApply, LostAck, EarlyReply, StaleRead, LostPush])
def test_a_planted_bug_is_caught(bug):
    with pytest.raises(Violation, match="seed"):
        for seed in range(100):
            Simulation(seed, serving=bug).run()


def test_a_seed_replays():
    first, second = Simulation(5).run(), Simulation(5).run()
    assert first.count == second.count
    assert first.now == second.now
