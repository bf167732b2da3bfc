"""How the arrays of one process's devices become one, and one becomes many."""

from kvstore.comm.host import broadcast, merge

__all__ = ["broadcast", "merge"]
