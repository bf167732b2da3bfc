"""The cluster level: the worker's client, the servers and the scheduler. Thin shells around ``protocol/``."""
