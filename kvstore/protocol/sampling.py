"""Rounds of so many samples: what a sum is multiplied by, when others are in it than its round stands for. Pure.

With ``samples_per_round=N`` every update is that of a sum over N samples, whoever took part: each push says how many
samples it holds, and the sum of a round's pushes is multiplied by N / (the samples in them).

What it refuses to know: which pushes these are (:mod:`kvstore.consistency`), and where sums are made and multiplied.
"""

from __future__ import annotations

from kvstore.consistency import Model
from kvstore.errors import OptionError


def factor(samples_per_round: int, samples: int) -> float:
    """What a sum over ``samples`` samples, at least one, is multiplied by: from whole numbers, so the same everywhere.

    It is exactly 1.0 when they are as many.
    """
    return samples_per_round / samples


def check_model(samples_per_round: int | None, model: Model, where: str) -> None:
    """Raises OptionError for a model under which an update is not the sum of a whole round."""
    if samples_per_round is not None and model.updates_per_round(2) > 1:
        raise OptionError(
            f"{where}: expected a model that merges the pushes of a round into one update, as sequential does, because "
            f"of samples_per_round={samples_per_round}; got {model}, where each push is an update by itself"
        )
