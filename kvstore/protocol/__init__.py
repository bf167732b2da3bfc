"""What the processes of a cluster say to each other, and what they conclude from it. Pure.

``messages`` is the vocabulary and its form on the wire, ``pieces`` the cutting of values,
``requesting`` the worker's side (order, credit, resends), ``serving`` the server's (repeats, gaps,
rounds) with ``bundles`` (keys that travel together), ``settings`` (which optimizer when) and ``leases`` (who
reads what in place), ``roster`` the scheduler's. Event in, actions out: no socket, thread, clock, environment
or array is touched here.
"""
