"""kvstore: a two-level key-value store that keeps a model's parameters in step.

One ``pushpull``, file by file:

1. ``trainer.py``: a gradient is ready; its parameter's new weights will be needed.
2. ``store.py``: checks the call, names its work with what it reads and writes.
3. ``engine/``: orders that work against everything else which touches the same arrays.
4. ``consistency.py``: the device level's rule: which devices' pushes are one update.
5. ``comm/``: those devices' arrays become one.
6. ``cluster/client.py``: cuts it into pieces and counts this worker's round.
7. ``protocol/requesting.py``: which piece goes when: order, priority, credit (in ``cluster/session.py``).
8. ``protocol/messages.py``: message to header and frames.
9. ``transport/``: the frames travel.
10. ``cluster/server.py``: frames to message, on the server that owns the piece.
11. ``protocol/serving.py``: new, a repeat, or refused?
12. ``consistency.py``: the cluster level's rule: merge, apply, park, answer.
13. ``stored.py`` and ``optim/``: the update, as an op of the server's engine.
14. back the same way; ``comm/`` copies the new weights to the devices.

In a ``local`` store ``local.py`` stands in for 6 to 12.
"""

from kvstore import errors, optim
from kvstore.consistency import Bounded, Eventual, Sequential
from kvstore.create import create
from kvstore.errors import *  # noqa: F403
from kvstore.errors import KVStoreError
from kvstore.handle import Handle
from kvstore.store import KVStore
from kvstore.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "Bounded",
    "Eventual",
    "Handle",
    "KVStore",
    "KVStoreError",
    "Sequential",
    "Trainer",
    "create",
    "errors",
    "optim",
]
