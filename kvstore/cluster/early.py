"""What comes to a shard before it serves: kept for a while, within bounds for each peer and for all.

Workers that hear of a takeover before the new primary does are early by some milliseconds. What is not kept they send
again, as they do with all that has no answer. What the messages say is not looked at here.
"""

from __future__ import annotations

from kvstore.transport.network import Frames

PEER_MAX = 1024  # envelopes of one peer
PEER_BYTES_MAX = 64 << 20
ALL_MAX = 8192
ALL_BYTES_MAX = 256 << 20


class Early:
    """Envelopes, in the order in which they came."""

    def __init__(self) -> None:
        self._kept: list[tuple[bytes, Frames]] = []
        self._sizes: dict[bytes, tuple[int, int]] = {}  # by peer: envelopes, bytes
        self._nbytes = 0

    def __repr__(self) -> str:
        return f"<Early: {len(self._kept)} envelopes of {len(self._sizes)} peers, {self._nbytes} bytes>"

    def keep(self, peer: bytes, frames: Frames) -> bool:
        """Keep it for :meth:`take`, if there is room; is it kept?"""
        size = sum(len(frame) for frame in frames)
        count, nbytes = self._sizes.get(peer, (0, 0))
        if count >= PEER_MAX or nbytes + size > PEER_BYTES_MAX:
            return False
        if len(self._kept) >= ALL_MAX or self._nbytes + size > ALL_BYTES_MAX:
            return False
        self._kept.append((peer, frames))
        self._sizes[peer] = count + 1, nbytes + size
        self._nbytes += size
        return True

    def take(self) -> list[tuple[bytes, Frames]]:
        """All that was kept, which is not any more."""
        kept, self._kept, self._nbytes = self._kept, [], 0
        self._sizes.clear()
        return kept
