"""Numbers as users give them: Python's or NumPy's, told from what only looks like one.

What it refuses to know: what the number is for, and so what is wrong with another one.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np


def whole(value: Any) -> int | None:
    """The int that ``value`` is; None if it is none, as True and 1.0 are not."""
    if type(value) is int:
        return value
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def unboxed(value: Any) -> Any:
    """``value``, with what is NumPy's in it made Python's: numbers, booleans, lists."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list | tuple):
        return tuple(map(unboxed, value))
    return value
