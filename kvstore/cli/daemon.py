"""Run a scheduler or a server in the foreground until it is told to stop; its process is ours to tune."""

from __future__ import annotations

import ctypes
import gc
import signal
import threading
from collections.abc import Callable
from typing import Protocol

import click

from kvstore.errors import ClosedError, KVStoreError

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # parameters of mallopt, in malloc.h


class Daemon(Protocol):
    """A scheduler or server."""

    def start(self) -> None: ...
    def wait(self, timeout: float | None = None) -> bool: ...
    def stop(self) -> None: ...


def keep_memory() -> None:
    """Let the allocator keep what is freed, so that the next piece is received into it; before any thread starts.

    glibc would give the memory of pieces back, and every page of the next one would be a page fault. One arena for
    all threads, because pieces are allocated by one and freed by another. Elsewhere nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 32 << 20)  # the largest that glibc takes
        mallopt(_TRIM_THRESHOLD, 1 << 30)
        mallopt(_ARENA_MAX, 1)


def serve(daemon: Daemon, beside: Daemon | None = None, on_term: Callable[[], None] | None = None) -> int:
    """Start ``daemon``, wait for SIGINT or SIGTERM, stop it and ``beside``; the exit code.

    Args:
        on_term: what to do on SIGTERM before it is stopped. A second signal ends the wait for it.
    """
    told: list[int] = []
    failed: list[KVStoreError] = []
    wake = threading.Event()

    def on_signal(number: int, frame: object) -> None:
        told.append(number)
        wake.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)

    def start() -> None:
        try:
            daemon.start()
            daemon.wait()
        except ClosedError:
            pass
        except KVStoreError as error:
            failed.append(error)
        wake.set()

    gc.freeze()  # what is there now stays: the collector need not look at it again and again
    thread = threading.Thread(target=start, name="kvstore-daemon", daemon=True)
    thread.start()
    wake.wait()
    if on_term is not None and told and told[0] == signal.SIGTERM:
        wake.clear()

        def leave() -> None:
            on_term()
            wake.set()

        threading.Thread(target=leave, name="kvstore-leave", daemon=True).start()
        wake.wait()
    daemon.stop()
    if beside is not None:
        beside.stop()
    thread.join(5)
    if failed:
        click.echo(f"kvstore: {failed[0]}", err=True)
        return 1
    return 130 if told and told[0] == signal.SIGINT else 0
