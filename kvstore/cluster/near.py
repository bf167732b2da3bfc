"""Memory that workers and servers of one host share: where own bytes lie, and how those of others are seen.

A process writes into its own arena and tells others the place; they map it and read. What may be
overwritten when is not decided here: see :mod:`kvstore.stored` for values and
:mod:`kvstore.cluster.staging` for gradients.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from kvstore.arrays import Array, gpu
from kvstore.errors import SharedMemoryError
from kvstore.protocol.messages import Place
from kvstore.transport.shared import AVAILABLE, Segment

log = logging.getLogger(__name__)

NEAR_BYTES = 32 << 10  # smaller pieces travel in messages: that costs less than to keep track of them
ALIGNMENT = 4096
CHUNK_BYTES = 64 << 20
MAPPINGS_MAX = 256  # segments of one peer that are kept mapped


@dataclass(frozen=True, slots=True)
class Region:
    """Some bytes of an own segment."""

    segment: Segment
    offset: int
    array: Array  # uint8

    def place(self, start: int = 0) -> Place:
        """Where byte ``start`` of the region is, in words that others understand."""
        return Place(self.segment.address, self.offset + start)


FAILED = object()  # a segment's companion, if it could not be registered


class Pinning:
    """Registers segments with the driver of the GPUs, which then copy from and to them while the host goes on.

    What cannot be registered is copied all the same, more slowly. Thread-safe.
    """

    def __init__(self) -> None:
        self._warned = False
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<Pinning: {'not always possible' if self._warned else 'no failure so far'}>"

    def pin(self, segment: Segment, *, own: bool) -> bool:
        """Register a segment, ``own`` or another's, for as long as it is mapped. Is it, now or since before?"""
        with self._lock:
            if segment.companion is None:
                registered = self._registered(segment, own)
                segment.companion = FAILED if registered is None else registered
            return segment.companion is not FAILED

    def _registered(self, segment: Segment, own: bool) -> Array | None:
        """The segment's memory as an array; None: it could not be registered."""
        memory = _alias(segment)
        with contextlib.suppress(SharedMemoryError):
            if own:
                segment.reserve(0, segment.size)  # all of it will be there from now on
            if gpu.pin(memory, read_only=not own):
                return memory
        if not self._warned:
            log.warning("%r cannot be registered with the GPUs' driver; copies from and to it are slower", segment)
            self._warned = True
        return None


def _alias(segment: Segment) -> Array:
    """The segment's memory, by an array that does not keep it."""
    start = np.frombuffer(segment.view(0, segment.size), np.uint8).ctypes.data
    return np.frombuffer(memoryview((ctypes.c_uint8 * segment.size).from_address(start)), np.uint8)


class Arena:
    """Own memory for others to read. Thread-safe.

    Args:
        limit_bytes: it never holds more.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.pinning = Pinning()
        self.used_bytes = 0
        self._segments: list[Segment] = []
        self._end = 0  # of what is taken of the last segment
        self._free: dict[int, list[Region]] = {}  # by size
        self._lock = threading.Lock()
        self._warned = False

    def __repr__(self) -> str:
        return f"<Arena: {self.used_bytes} bytes in {len(self._segments)} segments, at most {self.limit_bytes}>"

    def allocate(self, nbytes: int) -> Region | None:
        """Fresh memory (its content is arbitrary); None when there is none, which is logged once."""
        size = max(ALIGNMENT, -(-nbytes // ALIGNMENT) * ALIGNMENT)
        with self._lock:
            free = self._free.get(size)
            if free:
                return free.pop()
            try:
                return self._take(size)
            except SharedMemoryError as error:
                if not self._warned:
                    log.warning("%s; values travel through sockets instead", error)
                    self._warned = True
                return None

    def free(self, region: Region) -> None:
        """Give back what :meth:`allocate` gave."""
        with self._lock:
            self._free.setdefault(region.array.nbytes, []).append(region)

    def pin(self, region: Region) -> None:
        """GPUs are to copy to it: see :class:`Pinning`."""
        self.pinning.pin(region.segment, own=True)

    def close(self) -> None:
        """Let go of the memory; there will be no more."""
        with self._lock:
            self.limit_bytes = 0
            self._segments.clear()
            self._free.clear()

    def _take(self, size: int) -> Region:
        if self.used_bytes + size > self.limit_bytes:
            raise SharedMemoryError(
                f"shared memory: expected at most {self.limit_bytes} bytes in use, needed {size} more"
            )
        if not self._segments or self._end + size > self._segments[-1].size:
            self._segments.append(Segment.create(max(size, CHUNK_BYTES)))
            self._end = 0
        segment, offset = self._segments[-1], self._end
        segment.reserve(offset, size)
        self._end += size
        self.used_bytes += size
        return Region(segment, offset, np.frombuffer(segment.view(offset, size), np.uint8))


class Mappings:
    """The segments of other processes, mapped on first use and kept. Thread-safe."""

    def __init__(self) -> None:
        self._segments: OrderedDict[str, Segment] = OrderedDict()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<Mappings: {len(self._segments)} segments>"

    def array(self, place: Place, nbytes: int) -> Array:
        """The bytes at ``place``, read-only.

        Raises:
            SharedMemoryError: they cannot be mapped here.
        """
        return np.frombuffer(self.segment(place).view(place.offset, nbytes), np.uint8)

    def segment(self, place: Place) -> Segment:
        """That of the place. Raises SharedMemoryError."""
        with self._lock:
            segment = self._segments.get(place.segment)
            if segment is None:
                segment = self._segments[place.segment] = Segment.open(place.segment)
                if len(self._segments) > MAPPINGS_MAX:
                    self._segments.popitem(last=False)
            return segment


class Neighbourhood:
    """This process's part in shared memory: its own arena, and what it maps of each peer.

    Args:
        limit_bytes: the most it will offer; 0 switches shared memory off, None is half of the machine's memory.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        if limit_bytes is None:
            limit_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        self.arena = Arena(limit_bytes if AVAILABLE else 0)
        self._mappings: dict[int, Mappings] = {}  # by peer: a rank, or a server's number
        self._probe: Region | None = self.arena.allocate(ALIGNMENT) if self.enabled else None

    def __repr__(self) -> str:
        return f"<Neighbourhood: {self.arena!r}>"

    @property
    def enabled(self) -> bool:
        """May memory be shared at all?"""
        return self.arena.limit_bytes > 0

    def probe(self) -> Place | None:
        """A place by which a peer can find out whether it is on this host."""
        return self._probe.place() if self._probe is not None else None

    def reaches(self, peer: int, probe: Place | None) -> bool:
        """Can the memory of the peer with this probe be mapped here?"""
        if not self.enabled or probe is None:
            return False
        try:
            self.array(peer, probe, 1)
        except SharedMemoryError:
            return False
        return True

    def array(self, peer: int, place: Place, nbytes: int) -> Array:
        """Bytes of ``peer``, read-only. Raises SharedMemoryError when they cannot be mapped."""
        return self._mapped_of(peer).array(place, nbytes)

    def pin(self, peer: int, place: Place) -> bool:
        """GPUs are to copy from this place of ``peer``: see :class:`Pinning`."""
        try:
            segment = self._mapped_of(peer).segment(place)
        except SharedMemoryError:  # it is not mapped any more
            return False
        return self.arena.pinning.pin(segment, own=False)

    def _mapped_of(self, peer: int) -> Mappings:
        mappings = self._mappings.get(peer)
        return self._mappings.setdefault(peer, Mappings()) if mappings is None else mappings

    def close(self) -> None:
        """Let go of all memory; what is still being viewed stays until that ends."""
        self.arena.close()
        self._probe = None
        self._mappings.clear()

    def forget(self, peer: int) -> None:
        """The peer is gone: unmap its memory once nothing reads it any more."""
        self._mappings.pop(peer, None)
