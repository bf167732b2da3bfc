"""The arithmetic on arrays, by name: leaves that decide nothing.

Every name has a plain form in ``reference.py``, the oracle, which says what it does; ``compiled.py`` is what is called,
and uses Numba's machine code (``jitted.py``) as soon as that is there (``loader.py``). CuPy's arrays go to the form
in ``cuda/`` (``dispatch.py``). Every form of the names passes the same test, tests/kernels/test_contract.py.
"""

from kvstore.kernels.compiled import (
    accumulate,
    adadelta,
    adagrad,
    adam,
    allreduce,
    broadcast,
    cast,
    concatenate,
    deduplicate,
    ftrl,
    gather,
    lamb,
    lars,
    merge,
    merge_many,
    norm,
    prepare,
    rmsprop,
    scatter_add,
    sgd,
    split,
    wait,
)
from kvstore.kernels.reference import HALVES, Change

NAMES = (
    *(
        "merge",
        "allreduce",
        "merge_many",
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
    *("cast", "broadcast", "concatenate", "split", "gather", "scatter_add", "deduplicate"),
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
    "concatenate",
    "deduplicate",
    "ftrl",
    "gather",
    "lamb",
    "lars",
    "merge",
    "merge_many",
    "norm",
    "prepare",
    "rmsprop",
    "scatter_add",
    "sgd",
    "split",
    "wait",
]
