"""What the workers of a simulation do, and how a value tells which pushes it contains.

A value has an element for every piece, worker and round. A push adds, by SGD, to its own element of every piece a
number that tells its life: ``SIGN ** (life - 1)``. So every value that is ever read says, piece by piece, which pushes
of which life are in it, and how often.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np

import kvstore
from kvstore import KVStore
from kvstore.protocol.pieces import Cut
from tests.testing.plans import LIVES, RANKS, Plan

SIGN = 16.0


@dataclass(slots=True)
class Life:
    """One process of a rank."""

    rank: int
    number: int
    first: dict[str, int] = field(default_factory=dict)  # by key its first round
    pushed: dict[str, int] = field(default_factory=dict)  # by key its last round that was handed over
    committed: dict[str, int] = field(default_factory=dict)  # by key its last round of which it has been told so
    ended: bool = False  # in order


@dataclass(slots=True)
class Seen:
    """One value that a worker read."""

    life: Life
    key: str
    own: int  # its rounds of the key before
    lives: Any  # (pieces, RANKS, rounds): by push the life that made it; 0: it is not there, -1: it is not one push
    sure: list[tuple[Life, int]] | None = None  # for one that is read at the end: what each life had committed before

    @property
    def final(self) -> bool:
        return self.sure is not None


def lives_in(value: Any) -> Any:
    """What :class:`Seen` keeps of a value."""
    lives = np.full(value.shape, -1)
    lives[value == 0] = 0
    for number in range(1, LIVES + 1):
        lives[value == SIGN ** (number - 1)] = number
    return lives


@contextmanager
def cut_as(plan: Plan) -> Iterator[None]:
    """Stores cut the values of this plan into its number of pieces."""
    with mock.patch.object(Cut, "of", lambda items, itemsize, **_: Cut(items, RANKS * plan.rounds)):
        yield


def train(
    plan: Plan,
    kv: KVStore,
    life: Life,
    lives: list[Life],
    sleep: Callable[[float], None],
    look: Callable[[Seen], None],
) -> None:
    """The rounds of one life: push, pull, compute, perhaps leave; then a barrier, and a look at everything.

    Args:
        lives: all so far.
        sleep: how it computes for some seconds.
        look: what is done with a value that was read.
    """
    rng = random.Random(f"{plan.seed} {life.rank} {life.number}")
    shape = (plan.pieces, RANKS, plan.rounds)
    kv.set_optimizer(kvstore.optim.SGD(lr=1.0))
    kv.init(plan.keys, [np.zeros(shape, np.float32) for _ in plan.keys])
    life.first.update({key: kv.rounds(key) + 1 for key in plan.keys})
    last = plan.leaves.get(life.rank, plan.rounds) if life.number == 1 else plan.rounds
    for step in range(min(life.first.values()) - 1, last):
        sleep(rng.choice((0.0, 0.5, 4.0)))
        due = [key for key in plan.keys if kv.rounds(key) == step]
        for keys in [due] if plan.together and due else [[key] for key in due]:
            _step(plan, kv, life, keys, step + 1, rng, look)
    if last < plan.rounds:
        kv.leave()
    kv.wait_for_commits()
    life.committed.update(life.pushed)
    kv.barrier()
    for key in plan.keys:
        sure = [(one, one.committed[key]) for one in lives if key in one.committed]
        look(Seen(life, key, life.pushed.get(key, 0), lives_in(kv.pull(key).result()), sure))
    life.ended = True


def _step(
    plan: Plan, kv: KVStore, life: Life, keys: list[str], round: int, rng: random.Random, look: Callable[[Seen], None]
) -> None:
    gradient = np.zeros((plan.pieces, RANKS, plan.rounds), np.float32)
    gradient[:, life.rank, round - 1] = -(SIGN ** (life.number - 1))
    life.pushed.update(dict.fromkeys(keys, round))
    gradients, values = [gradient] * len(keys), []
    how = rng.choice(("push", "pushpull", "push and pull", "push and go on"))
    if how == "pushpull":
        values = kv.pushpull(keys, gradients, [np.empty_like(gradient) for _ in keys]).result()
    else:
        pushed = kv.push(keys, gradients)
        if how == "push and pull":
            values = kv.pull(keys).result()
        elif how == "push":
            pushed.result()
    if how in ("push", "pushpull"):
        life.committed.update(dict.fromkeys(keys, round))
    for key, value in zip(keys, values, strict=False):
        look(Seen(life, key, round, lives_in(value)))
