"""Which optimizer is in effect for which round of a key. Pure.

A change made live takes effect from one round per key, the same at every piece: it says for every key after which
round. So earlier settings are kept as long as a round that is under them may still come.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kvstore.errors import OptimizerError
from kvstore.protocol.pieces import Key

KEPT = 8  # settings, before it is looked whether the oldest are over


class Rule(Protocol):
    """An optimizer, as far as the protocol looks into it."""

    @property
    def whole_tensor(self) -> bool:
        """Must it see every tensor by itself?"""

    def with_hyperparameters(self, **changes: Any) -> Rule: ...
    def to_wire(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Setting:
    """An optimizer, and for each key the round after which it is in effect (0 where not named)."""

    since: dict[Key, int]
    rule: Rule
    generation: int  # another generation than before: the optimizer's state begins anew
    asked: Rule  # the rule as it was set, before its numbers were changed


class Settings:
    """The optimizers of a server, in the order in which they were set."""

    def __init__(self) -> None:
        self._settings: list[Setting] = []

    def __repr__(self) -> str:
        return f"<Settings: {self._settings}>"

    def __len__(self) -> int:
        return len(self._settings)

    def __iter__(self) -> Iterator[Setting]:
        return iter(self._settings)

    def restore(self, setting: Setting) -> None:
        """As another server had it, after those restored before."""
        self._settings.append(setting)

    @property
    def generation(self) -> int:
        """The latest; 0 without an optimizer."""
        return self._settings[-1].generation if self._settings else 0

    @property
    def latest(self) -> Rule | None:
        """The rule that was set last; None without an optimizer."""
        return self._settings[-1].rule if self._settings else None

    def set(self, rule: Rule, since: dict[Key, int], *, replace: bool, by: int) -> None:
        """The optimizer from here on; one that equals what is set, or was before its numbers changed, changes nothing.

        Raises:
            OptimizerError: another one is set, and ``replace`` is not given; ``by`` is the worker who asked.
        """
        if not self._settings:
            self._settings.append(Setting(since, rule, 1, rule))
        elif rule not in (self._settings[-1].rule, self._settings[-1].asked):  # a joiner asks for what was set first
            if not replace:
                raise OptimizerError(
                    f"set_optimizer by worker {by}: expected the one that is set, {self._settings[-1].rule}, "
                    f"got {rule}; replace=True replaces it"
                )
            self._settings.append(Setting(since, rule, self.generation + 1, rule))

    def change(self, changes: dict[str, Any], since: dict[Key, int]) -> None:
        """Change numbers of the optimizer, from here on.

        Raises:
            OptimizerError: there is none, or it does not have such numbers.
        """
        if not self._settings:
            raise OptimizerError("set_hyperparameters: expected an optimizer, none is set")
        current = self._settings[-1].rule
        rule = current.with_hyperparameters(**changes)
        if rule != current:
            self._settings.append(Setting(since, rule, self.generation, self._settings[-1].asked))

    def at(self, key: Key, round: int) -> tuple[Rule | None, int]:
        """The rule for this round of the key, and its generation; None: pushes are assigned."""
        for setting in reversed(self._settings):
            if round > setting.since.get(key, 0):
                return setting.rule, setting.generation
        return None, 0

    def treat_alike(self, keys: Sequence[Key], done: int) -> bool:
        """Will every setting that may still take effect treat these keys alike, and not tensor by tensor?

        Args:
            done: no update of them will be of a round up to this one.
        """
        for setting in reversed(self._settings):
            begins = {max(done, setting.since.get(key, 0)) for key in keys}
            if setting.rule.whole_tensor or len(begins) > 1:
                return False
            if done in begins:
                break  # the settings before this one are over
        return True

    def forget(self, done: Iterable[tuple[Key, int]]) -> None:
        """Now and then, forget the settings that are over.

        Args:
            done: for every key, a round up to which no update will be.
        """
        if len(self._settings) <= KEPT:
            return
        rounds = list(done)
        while len(self._settings) > 1:
            since = self._settings[1].since
            if any(round < since.get(key, 0) for key, round in rounds):
                return
            del self._settings[0]
