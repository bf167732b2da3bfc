"""Whole clusters under faults give the right values, and bugs that are planted in them are found."""

from __future__ import annotations

from typing import Any

import pytest

from kvstore.consistency import Bounded, Sequential
from kvstore.errors import DeadlineError
from kvstore.protocol.actions import Action
from kvstore.protocol.messages import Committed, Push
from kvstore.protocol.serving import Serving
from kvstore.stored import Stored
from tests.testing.faults import Plan, Run, Violation


@pytest.mark.parametrize("seed", range(60))
def test_faults_change_no_value(seed: int) -> None:
    Run(Plan.of(seed)).run()


def found(model: str, seeds: range = range(30)) -> list[str]:
    """What the checkers say of these seeds."""
    said = []
    for seed in seeds:
        plan = Plan.of(seed, model)
        plan.loss = plan.repetition = 0.1
        try:
            Run(plan, limit_s=400.0).run()
        except (Violation, DeadlineError) as error:
            said.append(str(error))
    return said


def test_a_push_that_is_applied_twice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = Serving.handle

    def forgetful(
        self: Serving, rank: int, incarnation: int, message: Any, payload: object, now: float
    ) -> list[Action]:
        if isinstance(message, Push) and payload is not None and (message.key, message.piece) in self.pieces:
            piece = self.pieces[message.key, message.piece]
            piece.accepted[rank] = piece.level.rounds[rank] = min(message.round - 1, piece.level.rounds[rank])
        return handle(self, rank, incarnation, message, payload, now)

    assert found("eventual") == []
    monkeypatch.setattr(Serving, "handle", forgetful)
    assert any("more than once" in what for what in found("eventual"))


def test_an_acknowledgement_that_is_lost_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = Serving.handle

    def silent(self: Serving, *arguments: Any) -> list[Action]:
        actions = handle(self, *arguments)
        return [one for one in actions if not isinstance(getattr(one, "message", None), Committed)]

    monkeypatch.setattr(Serving, "handle", silent)
    assert any("not over" in what or "not done" in what for what in found("sequential", range(6)))


def test_a_reply_that_comes_too_early_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sequential, "answers", lambda self, level, participant, own: True)
    assert any("expected" in what or "own pushes" in what for what in found("sequential"))


def test_a_stale_read_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bounded, "answers", lambda self, level, participant, own: level.rounds[participant] >= own)
    assert any("rounds of everybody" in what for what in found("bounded(0)"))


def test_a_value_of_yesterday_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    lend, before = Stored.lend, {}

    def late(self: Stored, reader: Any) -> Any:
        now = lend(self, reader)
        value, before[self] = before.get(self, now), now.copy()
        return value

    monkeypatch.setattr(Stored, "lend", late)
    assert any("own pushes are not in it" in what or "once" in what for what in found("eventual"))
