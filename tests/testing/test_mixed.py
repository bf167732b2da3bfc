"""Whole clusters to which everything happens that may; each kind of fault alone, too. The long run: docs/testing.md."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.testing.mixed import Run, main
from tests.testing.plans import MODELS, PROFILES, Plan

SEEDS = {"mixed": 40, "network": 25, "workers": 25, "servers": 25}
MUST_HAPPEN = {
    "mixed": (
        "crash of a worker", "crash of a server", "crash of a scheduler", "drain of a server", "join of a worker",
        "cut of a server", "worker back", "worker fenced", "replica compared",
    ),
    "network": ("pause of a server", "pause of a worker", "cut of a worker"),
    "workers": ("crash of a worker", "join of a worker", "worker back", "worker fenced"),
    "servers": ("crash of a server", "pause of a server", "cut of a server", "replica compared"),
}  # fmt: skip


@pytest.mark.parametrize("profile", PROFILES)
def test_faults_change_nothing_that_may_be_relied_on(profile: str) -> None:
    done: Counter[str] = Counter()
    for seed in range(SEEDS[profile]):
        run = Run(Plan.of(seed, profile))
        run.run()
        done += run.done
    assert not set(MUST_HAPPEN[profile]) - set(done)


@pytest.mark.parametrize("on_loss", ["wait", "continue"])
@pytest.mark.parametrize("model", MODELS)
def test_every_model_under_every_policy(model: str, on_loss: str) -> None:
    for seed in range(100, 104):
        Run(Plan.of(seed, "mixed", model, on_loss)).run()


def test_a_seed_replays() -> None:
    runs = [Run(Plan.of(5)), Run(Plan.of(5)), Run(Plan.of(6))]
    for run in runs:
        run.run()
    assert runs[0].trace == runs[1].trace != runs[2].trace


def test_the_command_says_what_it_has_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "2", "--only", "network"]) == 0
    assert "2 seeds, 0 failed" in capsys.readouterr().out
