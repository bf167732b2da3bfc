"""Every error of the engine, in one tree."""

from __future__ import annotations


class EngineError(Exception):
    """Root of the tree."""


class ArgumentError(EngineError, TypeError):
    """A call with arguments that cannot be an op; nothing was submitted."""


class DeadlineError(EngineError, TimeoutError):
    """A wait, or an op, took longer than it may."""


class DeadlockError(EngineError, RuntimeError):
    """An op would wait for something that waits for that op."""


class ForkedError(EngineError, RuntimeError):
    """The engine was inherited through fork; its threads stayed with the parent."""


class ClosedError(EngineError, RuntimeError):
    """The engine is closed."""
