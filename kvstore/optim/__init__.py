"""Optimizers: pure data that says how a merged gradient changes a stored value.

They travel as a name and numbers (:meth:`Optimizer.to_wire`, :func:`from_wire`), never as code.
Keywords, defaults and formulas are PyTorch's where PyTorch has them; see docs/optimizers.md.
"""

from kvstore.optim import schedules
from kvstore.optim.adaptive import FTRL, Adadelta, Adagrad, Adam, AdamW, RMSProp
from kvstore.optim.base import Optimizer
from kvstore.optim.descent import SGD, Accumulate
from kvstore.optim.layerwise import LAMB, LARS
from kvstore.optim.wire import OPTIMIZERS, from_wire

__all__ = [
    "FTRL",
    "LAMB",
    "LARS",
    "OPTIMIZERS",
    "SGD",
    "Accumulate",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Optimizer",
    "RMSProp",
    "from_wire",
    "schedules",
]
