"""Bugs that are planted in the product are found by the simulation, each within some seeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvstore.consistency import Bounded, Level, Sequential
from kvstore.protocol import replicating
from kvstore.protocol.actions import Action, ReplyValue
from kvstore.protocol.messages import Committed, Push
from kvstore.protocol.replicating import Log
from kvstore.protocol.roster import Membership
from kvstore.protocol.serving import Serving
from kvstore.protocol.workers import Workers
from kvstore.stored import Stored
from tests.testing.mixed import Run
from tests.testing.plans import Plan

SEEDS = 80
Plant = Callable[[object, str, Any], None]


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
    return monkeypatch.setattr


def found(profile: str = "mixed", model: str | None = None, on_loss: str | None = None) -> str:
    """What is said of the first seed that fails."""
    for seed in range(SEEDS):
        try:
            Run(Plan.of(seed, profile, model, on_loss), limit_s=300.0).run()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    pytest.fail("the planted bug was not found")


# --- pushes and pulls -----------------------------------------------------------------------------


def test_a_push_that_is_applied_twice(plant: Plant) -> None:
    handle = Serving.handle

    def forgetful(
        self: Serving, rank: int, incarnation: int, message: Any, payload: object, now: float
    ) -> list[Action]:
        if isinstance(message, Push) and payload is not None and (message.key, message.piece) in self.pieces:
            piece = self.pieces[message.key, message.piece]
            if rank in piece.level.rounds:
                piece.accepted[rank] = piece.level.rounds[rank] = min(message.round - 1, piece.level.rounds[rank])
        return handle(self, rank, incarnation, message, payload, now)

    plant(Serving, "handle", forgetful)
    assert "more than once" in found(model="eventual")


def test_an_acknowledgement_that_is_lost(plant: Plant) -> None:
    handle = Serving.handle

    def silent(self: Serving, *arguments: Any) -> list[Action]:
        actions = handle(self, *arguments)
        return [one for one in actions if not isinstance(getattr(one, "message", None), Committed)]

    plant(Serving, "handle", silent)
    assert "Deadline" in found(model="sequential")


def test_a_reply_that_comes_too_early(plant: Plant) -> None:
    plant(Sequential, "answers", lambda self, level, participant, own: True)
    said = found(model="sequential")
    assert "expected rounds" in said or "own pushes" in said or "something else" in said


def test_a_stale_read(plant: Plant) -> None:
    plant(Bounded, "answers", lambda self, level, participant, own: level.rounds.get(participant, own) >= own)
    assert "expected rounds" in found(model="bounded(0)")


def test_a_value_of_yesterday(plant: Plant) -> None:
    lend, before = Stored.lend, {}

    def late(self: Stored, reader: Any) -> Any:
        now = lend(self, reader)
        value, before[self] = before.get(self, now), now.copy()
        return value

    plant(Stored, "lend", late)
    assert "Violation" in found(model="eventual")


# --- workers --------------------------------------------------------------------------------------


def test_a_joiner_that_counts_one_round_too_early(plant: Plant) -> None:
    plant(Level, "begun", property(lambda self: max(0, max(self.rounds.values(), default=0) - 1)))
    assert found("workers", "sequential", "continue")


def test_a_joiner_that_freezes_nothing(plant: Plant) -> None:
    plant(Serving, "_begins_something", lambda self, message: False)
    assert found(on_loss="continue")


def test_a_life_that_is_over_and_still_heard(plant: Plant) -> None:
    def hear(self: Workers, rank: int, incarnation: int, now: float) -> bool:
        known = self.incarnations.get(rank, incarnation)
        self.incarnations[rank] = max(known, incarnation)
        self.heard[rank] = now
        return incarnation > known

    plant(Workers, "hear", hear)
    plant(Workers, "is_over", lambda self, rank, incarnation: False)
    assert found("workers", "eventual", "continue")


def test_a_loss_that_nobody_is_told_of(plant: Plant) -> None:
    plant(Membership, "lost", lambda self, peer: [])
    assert found("workers", "sequential", "continue")


# --- servers --------------------------------------------------------------------------------------


def test_a_takeover_that_applies_a_push_again(plant: Plant) -> None:
    right = replicating._update

    def forgets(serving: Any, message: Any, payload: object) -> Any:
        piece = serving.pieces[message.key, message.piece]
        accepted = dict(piece.accepted)
        update = right(serving, message, payload)
        piece.accepted.clear()
        piece.accepted.update(accepted)
        return update

    plant(replicating, "_update", forgets)
    assert "more than once" in found("servers", "eventual")


def test_a_reply_before_the_replica_has_it(plant: Plant) -> None:
    plant(Log, "may_tell", lambda self, number: True)
    assert found("servers")


def test_an_entry_that_is_not_sent_again(plant: Plant) -> None:
    plant(Log, "tick", lambda self, now: None)
    assert "Deadline" in found("servers")


def test_a_value_that_the_replica_does_not_have(plant: Plant) -> None:
    """A primary that is cut off answers pulls with what will not survive."""
    right = Log._gate

    def gate(self: Log, action: Any) -> int:
        return 0 if isinstance(action, ReplyValue) else right(self, action)

    plant(Log, "_gate", gate)
    assert found("servers")
