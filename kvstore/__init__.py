"""kvstore: a two-level key-value store that keeps a model's parameters in step.

One ``pushpull``, file by file:

1. ``trainer.py``: a gradient is ready; its parameter's new weights will be needed.
2. ``store.py`` and ``operations.py``: check the call (``entries.py``), and take its keys one by one or together.
3. ``devices.py``: the device level; ``consistency.py`` says which devices' pushes are one update.
4. ``engine/``: orders the work against everything else which touches the same arrays.
5. ``cluster/client.py``: counts this worker's round and cuts it into pieces.
6. ``comm/``: the devices' arrays become one, in memory that a server on this host reads (``cluster/staging.py``).
7. ``protocol/requesting.py``: which piece goes when: order, priority, credit (in ``cluster/session.py``).
8. ``protocol/wire.py``: message to header and frames.
9. ``transport/``: the frames travel.
10. ``cluster/shard.py``: frames to message, on the server that owns the piece.
11. ``protocol/serving.py``: new, a repeat, or refused?
12. ``consistency.py``: the cluster level's rule: merge, apply, park, answer.
13. ``cluster/work.py``, ``stored.py``, ``optim/`` and ``kernels/``: the update, as an op of the server's engine.
14. back the same way; ``delivery.py`` and ``comm/`` copy the new weights to the devices.
15. ``handle.py``: who waits goes on, soon (``promptness.py``) even beside threads of pure Python.

In a ``local`` store ``local.py`` stands in for 6 to 12, and ``places.py`` says in which memory a value lies; what that
is, of the host or of GPUs, ``arrays/`` knows. The small keys of a list call take the same way together, as one value:
``lists.py``, ``cluster/bundles.py`` (``together.py`` in a local store) and ``protocol/binding.py``.
"""

from kvstore import errors, optim
from kvstore.consistency import Bounded, Eventual, Sequential
from kvstore.create import create
from kvstore.entries import IN_PLACE
from kvstore.errors import *  # noqa: F403
from kvstore.errors import KVStoreError
from kvstore.handle import Handle
from kvstore.store import KVStore
from kvstore.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "IN_PLACE",
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
