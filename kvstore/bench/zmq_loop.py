"""The limit of the transport: a bare pyzmq loop that moves the same bytes and does nothing with them.

Clients send their bytes without copies, in pieces as those of a value of ours; the server sends each piece back to all
once it has come from all. ``python -m kvstore.bench.zmq_loop server|client ...``; started by
:mod:`kvstore.bench.systems`.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from kvstore.bench.apart.member import Member, Round
from kvstore.protocol.pieces import Cut

TIMEOUT_MS = 60_000


def serve(where: str, clients: int) -> None:
    """Answer until ended; ``where`` is a file that gets the address."""
    router: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
    router.set_hwm(0)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    waiting: dict[bytes, list[tuple[Any, Any]]] = defaultdict(list)
    Path(where).write_text(f"tcp://127.0.0.1:{port}")
    while True:
        identity, piece, payload = router.recv_multipart(copy=False)
        waiting[piece.bytes].append((identity, payload))
        if len(waiting[piece.bytes]) == clients:
            for to, back in waiting.pop(piece.bytes):
                router.send_multipart([to, piece, back], copy=False)


def client_round(dealer: zmq.Socket[bytes], case: dict[str, Any]) -> Round:
    """All bytes there and back."""
    total = sum(4 * int(np.prod(shape)) for shape in case["shapes"])
    data = np.ones(total, np.uint8)
    cut = Cut.of(total, 1)
    pieces = [data.data[slice(*cut.span(piece))] for piece in range(len(cut))]
    received: list[int] = []

    def once() -> None:
        for number, piece in enumerate(pieces):
            dealer.send(number.to_bytes(4, "little"), zmq.SNDMORE)
            dealer.send(zmq.Frame(piece, copy=False), copy=False)
        received.clear()
        for _ in pieces:
            received.append(len(dealer.recv_multipart(copy=False)[1]))

    def check() -> None:
        if sum(received) != total:
            raise ValueError(f"expected {total} bytes back, got {sum(received)}")

    return Round(lambda: data.fill(1), once, check)


def join(control: str, barrier: str, workers: int, rank: int, address: str) -> None:
    """Be a client."""
    dealer: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    dealer.set_hwm(0)
    dealer.rcvtimeo = TIMEOUT_MS
    dealer.linger = 0
    dealer.connect(address)
    Member(control, barrier, rank, workers).serve(lambda case: client_round(dealer, case), version=zmq.__version__)
    dealer.close()


if __name__ == "__main__":
    if sys.argv[1] == "server":
        serve(sys.argv[2], int(sys.argv[3]))
    else:
        join(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), sys.argv[6])
