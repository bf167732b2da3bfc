"""What a daemon's process is told about itself."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PIECES = 50
PIECE = 4 << 20

RECEIVE = f"""
import resource, sys
from kvstore.cli.daemon import keep_memory

if sys.argv[1] == "keep":
    keep_memory()

def receive():
    return [bytearray({PIECE}) for _ in range(4)]  # more than glibc keeps by itself

receive()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({PIECES // 4}):
    receive()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    command = [sys.executable, "-c", RECEIVE, how]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="another allocator than glibc's")
def test_pieces_are_received_into_memory_that_is_there():
    """A page fault for every page of every piece otherwise."""
    pages = PIECES * PIECE // os.sysconf("SC_PAGE_SIZE")
    assert faults("keep") < pages / 100
    assert faults("leave") > pages / 2
