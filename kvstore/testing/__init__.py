"""The failure laboratory: a whole cluster in one process, on a simulated network and clock, for your own tests.

:class:`Cluster` runs the production scheduler, servers and stores. Only the sockets and the clock are simulated,
and the threads take turns, so that a seed decides everything: which messages are late, lost or come twice, and what
happens while a process is down. See docs/testing.md.
"""

from kvstore.testing.cluster import Cluster
from kvstore.testing.network import Weather
from kvstore.testing.world import Crashed

__all__ = ["Cluster", "Crashed", "Weather"]
