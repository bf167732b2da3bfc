"""The arithmetic on arrays, by name: leaves that decide nothing.

Every name has a plain form in ``reference.py``, the oracle, which says what it does; ``compiled.py`` is what is called,
and uses Numba's machine code (``jitted.py``) as soon as that is there (``loader.py``). Another form of the same
names, for another kind of memory, has to pass the same test, tests/kernels/test_contract.py.
"""

from kvstore.kernels.compiled import (
    accumulate,
    adadelta,
    adagrad,
    adam,
    allreduce,
    broadcast,
    cast,
    ftrl,
    gather,
    lamb,
    lars,
    merge,
    norm,
    prepare,
    rmsprop,
    scatter_add,
    sgd,
    wait,
)
from kvstore.kernels.reference import HALVES, Change

NAMES = (
    *(
        "merge",
        "allreduce",
        "norm",
        "accumulate",
        "sgd",
        "adam",
        "adagrad",
        "rmsprop",
        "adadelta",
        "ftrl",
        "lars",
        "lamb",
    ),
    *("cast", "broadcast", "gather", "scatter_add"),
)

__all__ = [
    "HALVES",
    "NAMES",
    "Change",
    "accumulate",
    "adadelta",
    "adagrad",
    "adam",
    "allreduce",
    "broadcast",
    "cast",
    "ftrl",
    "gather",
    "lamb",
    "lars",
    "merge",
    "norm",
    "prepare",
    "rmsprop",
    "scatter_add",
    "sgd",
    "wait",
]
