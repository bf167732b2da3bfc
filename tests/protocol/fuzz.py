"""Long fuzzing: ``python -m tests.protocol.fuzz --seconds 600``.

Three targets in turn: the decoder, the pure core of a server and that of a scheduler. What each may do with a mutated
message is to take it, or to answer with an error of ours. With ``--atheris`` the decoder is given to libFuzzer instead,
guided by coverage, if atheris is installed. A failure prints its seed.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import time

from kvstore import optim
from kvstore.errors import KVStoreError, ProtocolError
from kvstore.protocol.messages import Init, Message, Push
from kvstore.protocol.roster import Membership
from kvstore.protocol.serving import Serving
from kvstore.protocol.wire import Sender, decode, encode
from tests.protocol import mutations

WORKERS = 3


def decoded(frames: list[bytes]) -> tuple[Sender, list[tuple[Message, int]]] | None:
    """What the decoder takes, which it could have sent itself; None: it refused."""
    try:
        sender, rows = decode(frames[0], len(frames) - 1)
    except ProtocolError:
        return None
    again = decode(encode(sender, rows), len(frames) - 1)
    assert again == (sender, rows) or "nan" in repr(rows)
    return sender, rows


def fuzz(seed: int, steps: int) -> dict[str, int]:
    """One cluster's cores under mutated messages, of its own workers too. How many were taken and refused."""
    rng = random.Random(seed)
    serving = Serving(WORKERS, optim.from_wire)
    membership = Membership(7, WORKERS, 1)
    counts = {"taken": 0, "refused": 0}
    for step in range(steps):
        sender = Sender(7, 1, rng.randrange(-1, WORKERS + 1), rng.choice([1, 1, 1, 2]))
        frames = mutations.envelope(rng, sender)
        if rng.random() < 0.8:
            frames = mutations.mutated(rng, frames)
        found = decoded(frames)
        counts["refused" if found is None else "taken"] += 1
        if found is None:
            continue
        who, rows = found
        for row, announced in rows:
            payload = object() if announced and isinstance(row, Init | Push) else None
            for reply in serving.handle(who.rank, who.incarnation, row, payload, float(step)):
                repr(reply)
            for _, answer in membership.handle(rng.randrange(6), row, float(step)):
                encode(sender, [(answer, 0)])
        if rng.random() < 0.01:
            serving.lost(rng.randrange(WORKERS), "it was lost")
            membership.lost(rng.randrange(6))
    return counts


def guided(seconds: int) -> None:
    """The decoder under libFuzzer."""
    import atheris

    def one(data: bytes) -> None:
        decoded([data])

    atheris.Setup([sys.argv[0], f"-max_total_time={seconds}", "-max_len=65536"], atheris.instrument_func(one))
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0, help="the first; every 1,000 messages have the next")
    parser.add_argument("--atheris", action="store_true")
    options = parser.parse_args()
    if options.atheris:
        guided(options.seconds)
        return 0
    end, seed, total = time.monotonic() + options.seconds, options.seed, {"taken": 0, "refused": 0}
    early_kb = 0
    while time.monotonic() < end:
        try:
            for what, count in fuzz(seed, 1000).items():
                total[what] += count
        except (Exception, KVStoreError):
            print(f"seed {seed} failed", file=sys.stderr)
            raise
        seed += 1
        if seed == options.seed + 20:
            early_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"seeds {options.seed}..{seed - 1}: {total}, memory {early_kb >> 10} -> {peak_kb >> 10} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
