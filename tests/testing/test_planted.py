"""Bugs that are planted in the product are found by the simulation, each within some seeds."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from kvstore.cluster.journal import Journal
from kvstore.consistency import Bounded, Level, Sequential
from kvstore.protocol import replicating
from kvstore.protocol.actions import Action, ReplyValue
from kvstore.protocol.messages import Committed, Push
from kvstore.protocol.placement import Placing
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


def found(what: str, profile: str = "mixed", model: str | None = None, on_loss: str | None = None) -> None:
    """Fails unless ``what``, which may have alternatives, is said of one of the first seeds."""
    said = []
    for seed in range(SEEDS):
        try:
            Run(Plan.of(seed, profile, model, on_loss), limit_s=300.0).run()
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
            if re.search(what, said[-1]):
                return
    pytest.fail(f"the planted bug was not found; what was said: {said}")


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
    found("more than once", model="eventual")


def test_an_acknowledgement_that_is_lost(plant: Plant) -> None:
    handle = Serving.handle

    def silent(self: Serving, *arguments: Any) -> list[Action]:
        actions = handle(self, *arguments)
        return [one for one in actions if not isinstance(getattr(one, "message", None), Committed)]

    plant(Serving, "handle", silent)
    found("Deadline", model="sequential")


def test_a_reply_that_comes_too_early(plant: Plant) -> None:
    plant(Sequential, "answers", lambda self, level, participant, own: True)
    found("expected rounds|own pushes|something else", model="sequential")


def test_a_stale_read(plant: Plant) -> None:
    plant(Bounded, "answers", lambda self, level, participant, own: level.rounds.get(participant, own) >= own)
    found("expected rounds", model="bounded(0)")


def test_a_value_of_yesterday(plant: Plant) -> None:
    snapshot, before = Stored.snapshot, {}

    def late(self: Stored, elements: slice) -> bytes:
        now, asked = snapshot(self, elements), (self, elements.start, elements.stop)
        value, before[asked] = before.get(asked, now), now
        return value

    plant(Stored, "snapshot", late)
    found("own pushes|lost", model="eventual")


# --- workers --------------------------------------------------------------------------------------


def test_a_joiner_that_counts_one_round_too_early(plant: Plant) -> None:
    plant(Level, "begun", property(lambda self: max(0, max(self.rounds.values(), default=0) - 1)))
    found("Violation|Error", "workers", "sequential", "continue")


def test_a_joiner_that_freezes_nothing(plant: Plant) -> None:
    plant(Serving, "_begins_something", lambda self, message: False)
    found("Violation|Error", on_loss="continue")


def test_a_life_that_is_over_and_still_heard(plant: Plant) -> None:
    def hear(self: Workers, rank: int, incarnation: int, now: float) -> bool:
        known = self.incarnations.get(rank, incarnation)
        self.incarnations[rank] = max(known, incarnation)
        self.heard[rank] = now
        return incarnation > known

    plant(Workers, "hear", hear)
    plant(Workers, "is_over", lambda self, rank, incarnation: False)
    found("Violation|Error", "workers", "eventual", "continue")


def test_a_loss_that_nobody_is_told_of(plant: Plant) -> None:
    plant(Membership, "lost", lambda self, peer: [])
    found("Violation|Error", "workers", "sequential", "continue")


# --- servers --------------------------------------------------------------------------------------


def test_a_takeover_that_applies_a_push_again(plant: Plant) -> None:
    """The replica has the update, and does not know of which push it is."""
    right = replicating._update

    def forgets(serving: Any, message: Any, payload: object) -> Any:
        update = right(serving, message, payload)
        piece = serving.pieces[message.key, message.piece]
        for rank, round in message.contributions:
            piece.accepted[rank] = piece.level.rounds[rank] = round - 1
        return update

    plant(replicating, "_update", forgets)
    found("more than once", "servers", "eventual")


def test_a_reply_before_the_replica_has_it(plant: Plant) -> None:
    plant(Log, "may_tell", lambda self, number: True)
    found("Violation|Error", "servers")


def test_an_entry_that_is_not_sent_again(plant: Plant) -> None:
    plant(Log, "tick", lambda self, now: None)
    found("Deadline", "servers")


def test_a_value_that_the_replica_does_not_have(plant: Plant) -> None:
    """A primary that is cut off answers pulls with what will not survive."""
    right = Log._gate

    def gate(self: Log, action: Any) -> int:
        return 0 if isinstance(action, ReplyValue) else right(self, action)

    plant(Log, "_gate", gate)
    found("Violation", model="sequential")


# --- the scheduler --------------------------------------------------------------------------------


def test_a_journal_that_forgets_the_epoch(plant: Plant) -> None:
    """What the restarted scheduler says about shards looks old to everybody."""
    right = Journal.recover

    def forgets(self: Journal, *arguments: Any) -> Any:
        membership = right(self, *arguments)
        membership.epoch = 1
        return membership

    plant(Journal, "recover", forgets)
    found("Deadline")


def test_a_journal_that_forgets_the_placement(plant: Plant) -> None:
    """The restarted scheduler believes that every shard is where it was at the very beginning."""

    def forgets(self: Placing, records: Any, servers: dict[int, str]) -> None:
        for rank, address in servers.items():
            self.arrived(rank, address)

    plant(Placing, "recover", forgets)
    found("Violation|Error")


def test_a_journal_that_is_not_told_of_shards(plant: Plant) -> None:
    """It is written when members come and go only."""
    plant(Membership, "has_news", property(lambda self: bool(self._changed)))
    found("Violation|Error")
