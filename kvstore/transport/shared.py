"""Memory that processes of one host share.

A segment is an anonymous file (Linux ``memfd_create``), sealed against shrinking. It has no name in the file
system: the kernel frees it with the last process that has it open, so nothing outlives its processes,
``kill -9`` included, and the size of /dev/shm does not matter. Another process of the same user opens it
through ``/proc`` by the address that its owner tells, and maps it read-only: every byte has one writer, the
process that made the segment.

An address names the owner's process and descriptor and 64 random bits, which are also in the segment's own
name. Who can open it has thereby shown that it is on the owner's host.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import secrets
import sys
import weakref

from kvstore.errors import SharedMemoryError

AVAILABLE = sys.platform == "linux" and hasattr(os, "memfd_create")


class _Mapped(mmap.mmap):
    """The memory of a segment, mapped as long as there is any view of it.

    A weak reference tells of its end when something else may lie at its addresses already; an attribute goes before.
    """

    companion: object = None


_ADDRESS = re.compile(r"(?P<pid>[1-9]\d{0,9})\.(?P<fd>\d{1,9})\.(?P<token>[0-9a-f]{16})")


class Segment:
    """Mapped memory: one's own and writable (:meth:`create`), or another process's and read-only (:meth:`open`).

    The mapping ends with the last view of its memory.
    """

    def __init__(self, address: str, mapped: _Mapped) -> None:
        self.address = address
        self.size = len(mapped)
        self._mapped = mapped

    def __repr__(self) -> str:
        return f"<Segment {self.address}: {self.size} bytes>"

    @property
    def companion(self) -> object:
        """Something that is held as long as the memory is mapped, and let go right before that ends."""
        return self._mapped.companion

    @companion.setter
    def companion(self, companion: object) -> None:
        self._mapped.companion = companion

    @classmethod
    def create(cls, size: int) -> Segment:
        """New memory of ``size`` bytes, reserved as :meth:`reserve` says.

        Raises:
            SharedMemoryError: the system has none.
        """
        token = secrets.token_hex(8)
        try:
            fd = os.memfd_create(f"kvstore-{token}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                os.ftruncate(fd, size)
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
                mapped = _Mapped(fd, size)
            except BaseException:
                os.close(fd)
                raise
        except OSError as error:
            raise SharedMemoryError(f"shared memory: expected {size} bytes, the system says: {error}") from error
        segment = cls(f"{os.getpid()}.{fd}.{token}", mapped)
        weakref.finalize(mapped, os.close, fd).atexit = False
        return segment

    @classmethod
    def open(cls, address: str) -> Segment:
        """The segment at ``address``, read-only.

        Raises:
            SharedMemoryError: it is not on this host, or not ours to open, or not a segment.
        """
        match = _ADDRESS.fullmatch(address)
        if match is None:
            raise SharedMemoryError(f"a segment's address: expected pid.fd.token, got {address[:64]!r}")
        try:
            fd = os.open(f"/proc/{match['pid']}/fd/{match['fd']}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                if os.readlink(f"/proc/self/fd/{fd}") != f"/memfd:kvstore-{match['token']} (deleted)":
                    raise SharedMemoryError(f"segment {address}: expected a segment of that name, found another file")
                if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                    raise SharedMemoryError(f"segment {address}: expected memory that is sealed against shrinking")
                mapped = _Mapped(fd, 0, prot=mmap.PROT_READ)
            finally:
                os.close(fd)
        except (OSError, ValueError) as error:
            raise SharedMemoryError(f"segment {address}: expected one of a process on this host; {error}") from error
        return cls(address, mapped)

    def reserve(self, offset: int, nbytes: int) -> None:
        """Make sure that these bytes exist, so that writing them cannot fail later.

        Raises:
            SharedMemoryError: the system has no more memory to give.
        """
        fd = int(self.address.split(".")[1])
        try:
            os.posix_fallocate(fd, offset, nbytes)
        except OSError as error:
            raise SharedMemoryError(f"shared memory: expected {nbytes} bytes more, the system says: {error}") from error

    def view(self, offset: int, nbytes: int) -> memoryview:
        """These bytes.

        Raises:
            SharedMemoryError: they are not all within the segment.
        """
        if not 0 <= offset <= offset + nbytes <= self.size:
            raise SharedMemoryError(
                f"segment {self.address}: expected bytes within 0..{self.size}, got {offset}..{offset + nbytes}"
            )
        return memoryview(self._mapped)[offset : offset + nbytes]
