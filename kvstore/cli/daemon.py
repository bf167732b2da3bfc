"""Run a scheduler or a server in the foreground until it is told to stop."""

from __future__ import annotations

import gc
import signal
import threading
from typing import Protocol

import click

from kvstore.errors import ClosedError, KVStoreError


class Daemon(Protocol):
    """A scheduler or server."""

    def start(self) -> None: ...
    def wait(self, timeout: float | None = None) -> bool: ...
    def stop(self) -> None: ...


def serve(daemon: Daemon, beside: Daemon | None = None) -> int:
    """Start ``daemon``, wait for SIGINT or SIGTERM, stop it and ``beside``; the exit code."""
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
    daemon.stop()
    if beside is not None:
        beside.stop()
    thread.join(5)
    if failed:
        click.echo(f"kvstore: {failed[0]}", err=True)
        return 1
    return 130 if told and told[0] == signal.SIGINT else 0
