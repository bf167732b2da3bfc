"""The vocabulary of the cluster: its messages, and how large what they name may be. Pure.

Their form on the wire is in :mod:`kvstore.protocol.wire`.
"""

from __future__ import annotations

import math
from typing import Any

from kvstore.protocol.pieces import BundleId, Cut, Key
from kvstore.records import record

PROTOCOL = 1
HEADER_BYTES_MAX = 8 << 20
MESSAGES_MAX = 1 << 16
FRAMES_MAX = 1 << 16
FRAME_BYTES_MAX = 1 << 32
KEY_BYTES_MAX = 1024
NDIM_MAX = 64
TEXT_BYTES_MAX = 1 << 16
NAME_BYTES_MAX = 256
MODEL_BYTES_MAX = 64
ITEMS_MAX = 1 << 48
PARTICIPANTS_MAX = 1 << 16
CONTAINERS_MAX = 1 << 19
REPORT_DEPTH_MAX = 4
PRIORITY_MAX = (1 << 31) - 1
HELD_MAX = 1024
BUNDLE_KEYS_MAX = 1 << 20
PIECES_MAX = 1024  # of a cut in one message
SAMPLES_MAX = 1 << 40  # of a round, and of a push
HISTORY_MAX = 64  # cut points of a worker in one message

SMALL_HEADER_BYTES = 64 << 10  # up to this size its lists and maps need not be counted

NOBODY = -1  # rank and incarnation of a sender that has none (yet)


@record
class Message:
    """Root of all messages. A reply carries the ``request_id`` of its request."""

    request_id: int


# --- worker to server ---------------------------------------------------------------------------


@record
class Spec:
    """All that worker and server must agree on about a key."""

    shape: tuple[int, ...]
    dtype: str
    piece_items: int
    device_model: str
    cluster_model: str
    participants: tuple[int, ...] | None  # None: every worker
    samples_per_round: int | None = None  # None: a round's sum is what it is, however many samples are in it

    @property
    def cut(self) -> Cut:
        """The value's pieces."""
        return Cut(math.prod(self.shape), self.piece_items)

    def __str__(self) -> str:
        who = "every worker" if self.participants is None else f"workers {list(self.participants)}"
        samples = "" if self.samples_per_round is None else f", {self.samples_per_round} samples per round"
        return (
            f"shape {self.shape}, dtype {self.dtype}, pieces of {self.piece_items} elements, "
            f"device level {self.device_model}, cluster level {self.cluster_model}, participants: {who}{samples}"
        )


@record
class Place:
    """Bytes in memory that processes of one host share: a segment's address, and the first byte there."""

    segment: str
    offset: int


@record
class Init(Message):
    """Create a piece. The first worker's carries the value; the others check and wait for it.

    Who is the first, the smallest rank that takes part, the server decides: it says Missing if the value did not come.
    """

    key: Key
    piece: int
    spec: Spec


@record
class Bind(Message):
    """These keys of the server, in this order, will be pushed and pulled together under the id of the bundle."""

    bundle: BundleId
    keys: tuple[Key, ...]


@record
class Push(Message):
    """A worker's ``round``-th push of a piece, in a frame or at a place; without either it asks what became of it."""

    key: Key | BundleId
    piece: int
    round: int
    pull: bool  # answer with the value that a pull right after this push would get
    acknowledge: bool  # say Accepted if it has to wait
    priority: int = 0  # larger is merged and answered sooner
    near: bool = False  # the value asked for may stay where it is: answer with its place
    held: tuple[int, ...] = ()  # earlier requests for this piece whose places are still being read
    place: Place | None = None
    samples: int | None = None  # that it holds, if the key's rounds are of so many samples
    whole: bool = False  # the value is read once all its pieces are there: their replies may wait for one another


@record
class Fetch(Message):
    """A pull of a piece, made after the worker's ``round``-th push of the key."""

    key: Key | BundleId
    piece: int
    round: int
    priority: int = 0
    near: bool = False
    held: tuple[int, ...] = ()


@record
class SetOptimizer(Message):
    """In effect for a key from the round after ``since[key]`` (0 where not named)."""

    optimizer: dict[str, Any]
    replace: bool
    since: dict[Key, int]


@record
class SetHyperparameters(Message):
    """Change named numbers of the optimizer, from the round after ``since[key]``."""

    changes: dict[str, Any]
    since: dict[Key, int]


@record
class Drop(Message):
    """Forget a key on this server (before it is initialised anew in another cut)."""

    key: Key


@record
class ReadState(Message):
    """Ask for the optimizer's state of a piece."""

    key: Key
    piece: int


@record
class WriteState(Message):
    """Replace the optimizer's state of a piece: one frame per array."""

    key: Key
    piece: int
    step: int
    names: tuple[str, ...]
    dtypes: tuple[str, ...]


@record
class Restore(Message):
    """Replace a piece by what a checkpoint has: its value in a frame, then one frame per array of the state."""

    key: Key
    piece: int
    version: int
    step: int
    names: tuple[str, ...]
    dtypes: tuple[str, ...]


@record
class Mark(Message):
    """The sender's marker of a cut: its pushes up to ``rounds[key]`` belong to it. ``awaited``: whose markers do."""

    cut: int
    awaited: tuple[int, ...]
    rounds: dict[Key, int]


@record
class ReadCut(Message):
    """What pieces does the cut have, from the ``first`` on? Answered when it has been taken."""

    cut: int
    awaited: tuple[int, ...]
    first: int


@record
class ReadCopy(Message):
    """Send a piece as the cut has it."""

    cut: int
    key: Key
    piece: int


@record
class EndCut(Message):
    """The cut is not needed any more."""

    cut: int


@record
class Meet(Message):
    """Are we on one host? ``probe`` is a place in the sender's memory."""

    probe: Place


@record
class Explain(Message):
    """Why has my request ``about`` no answer yet?"""

    about: int


@record
class Leave(Message):
    """The sender leaves the rounds: in order when ``reason`` is empty, else because it failed.

    ``stays``: it remains in the cluster and may pull; else it is gone.
    """

    reason: str
    stays: bool = False


@record
class Freeze(Message):
    """The sender wants to join: say which rounds have begun, and let none begin until it has, or is gone."""


@record
class Admit(Message):
    """The sender joins each of these keys from the round after this one, and those that will be created."""

    rounds: dict[Key, int]


# --- server to worker ---------------------------------------------------------------------------


@record
class Initialized(Message):
    """The piece exists; ``round`` is the sender's last accepted push of it."""

    round: int


@record
class Accepted(Message):
    """The server has the piece; it waits for its round."""


@record
class Committed(Message):
    """The push is merged and applied."""


@record
class Value(Message):
    """The piece's value: one frame, or a place that stays as it is until the worker no longer holds it."""

    version: int
    staleness: int
    place: Place | None = None


@record
class State(Message):
    """The optimizer's state of a piece: one frame per name."""

    step: int
    names: tuple[str, ...]
    dtypes: tuple[str, ...]


@record
class Missing(Message):
    """The push asked about never came: send it with its frame."""


@record
class Divided(Message):
    """The bundle is not one piece now: its keys have to be asked for one by one. ``taken``: its push is here."""

    taken: bool


@record
class Met(Message):
    """The answer to :class:`Meet`: if the server could read the worker's memory, a place in its own, and a line
    (see :mod:`kvstore.transport.lines`) that the worker may open; "" for none.
    """

    probe: Place | None
    line: str


@record
class Done(Message):
    """The request has been carried out."""


@record
class Explanation(Message):
    """The answer to :class:`Explain`."""

    text: str


@record
class Failed(Message):
    """The request failed: a class name of :mod:`kvstore.errors` and its message."""

    error: str
    text: str


@record
class Frozen(Message):
    """The answer to :class:`Freeze`: for each key the largest round that anybody has begun on this server."""

    rounds: dict[Key, int]


@record
class PieceRecord:
    """A piece in a cut, but for its bytes."""

    key: Key
    piece: int
    spec: Spec
    version: int
    step: int  # updates by the optimizer
    rounds: dict[int, int]  # by rank: pushes in the cut
    names: tuple[str, ...] = ()  # of the arrays of the optimizer's state
    dtypes: tuple[str, ...] = ()


@record
class CutPieces(Message):
    """The answer to :class:`ReadCut`: some of the cut's ``total`` pieces."""

    total: int
    optimizer: dict[str, Any]  # empty: none
    pieces: tuple[PieceRecord, ...]


@record
class Copied(Message):
    """The answer to :class:`ReadCopy`: a frame with the value, and one per array of the optimizer's state."""


# --- with the scheduler -------------------------------------------------------------------------

ON_LOSS = ("fail", "wait", "continue")  # what is to happen when a worker is lost


@record
class Register(Message):
    """A worker or server presents itself. ``rank`` -1: any. ``address``: a server's own.

    ``token`` is drawn at random by the sender: the same one again is the same member again.
    ``incarnation`` is what it was told when it registered before, 0 the first time. ``on_loss``: a worker's policy
    for workers that are lost, one of :data:`ON_LOSS`.
    """

    role: str
    rank: int
    address: str
    host: str
    pid: int
    token: int
    incarnation: int = 0
    on_loss: str = ""


@record
class Roster(Message):
    """The answer to :class:`Register` once everybody is here."""

    rank: int
    incarnation: int
    num_workers: int  # that the cluster was started with
    servers: tuple[str, ...]
    workers: tuple[int, ...] = ()  # the ranks that take part now
    joins: bool = False  # the worker is new to a running job: it has to be admitted by the servers, then Enter


@record
class Barrier(Message):
    """The sender's ``number``-th barrier."""

    number: int


@record
class Departed(Message):
    """From the scheduler to all: a member is gone (or, with ``stays``, a worker only left the rounds).

    In order when ``reason`` is empty; else ``on_loss`` says what is to become of the rounds of a worker.
    """

    role: str
    rank: int
    reason: str
    incarnation: int = 1
    on_loss: str = "fail"
    stays: bool = False


@record
class Joined(Message):
    """From the scheduler to all: this worker takes part now, or is back."""

    rank: int
    incarnation: int


@record
class Enter(Message):
    """The sender has been admitted by all servers."""


@record
class AskCut(Message):
    """Let all workers mark a cut, which the asker has given this number, at a cut point to come."""

    cut: int


@record
class Halt(Message):
    """From the scheduler to workers: say how many cut points you have passed, and pass none until you are told more."""

    cut: int


@record
class Passed(Message):
    """A worker has passed ``count`` cut points. ``coupled``: it may have to wait for others' pushes.

    ``joined``: it counts from when it came to a running job. Where that was its ``history`` tells: of its latest cut
    points, also of the one at which it waits for others, the number, its round of the key ``clock`` there, and
    whether it was a barrier (1) or not (0).
    """

    cut: int
    count: int
    coupled: bool
    joined: bool = False
    clock: Key | None = None
    history: tuple[tuple[int, int, int], ...] = ()


@record
class Named(Message):
    """The answer to :class:`Passed` and :class:`AskCut`: at which cut point these workers mark the cut.

    ``at`` is a number as the receiver counts, for who asked as those count who were here from the beginning. 0: go on,
    you will be asked again.
    """

    cut: int
    at: int
    awaited: tuple[int, ...]


@record
class ReadStatus(Message):
    """Ask a scheduler or server about itself."""


@record
class Status(Message):
    """The answer to :class:`ReadStatus`."""

    report: dict[str, Any]


@record
class Replica:
    """A server that follows a shard's log, as it gets it from the one before it."""

    epoch: int  # in which it was appointed to follow that one
    server: int
    address: str  # where the log may be sent; "" as long as it has not said
    in_step: bool  # it has all that anybody was told of: it may take over


@record
class Shard:
    """Which servers have one shard: a chain. No ``primary`` (-1): it is lost; no ``replicas``: its primary is alone."""

    epoch: int  # in which the chain became what it is
    primary: int
    address: str
    replicas: tuple[Replica, ...]  # the first of them takes over
    moving: bool  # one of them is to take over now: the primary hands over

    @property
    def in_step(self) -> bool:
        """Has it replicas, which may all take over?"""
        return bool(self.replicas) and all(replica.in_step for replica in self.replicas)


@record
class Placement(Message):
    """From the scheduler to all, whenever it changes: who has which shard, by number."""

    epoch: int
    shards: tuple[Shard, ...]


@record
class ReadPlacement(Message):
    """Ask the scheduler for the placement, which may have been missed."""


@record
class Standby(Message):
    """From a replica to the scheduler: the shard's log of this epoch may be sent to this address."""

    shard: int
    epoch: int
    address: str


@record
class InStep(Message):
    """From a server to the scheduler: nothing is told any more that the replica after it has not, and all behind."""

    shard: int
    epoch: int


@record
class HandedOver(Message):
    """From a primary to the scheduler: its replicas have everything, and it takes in nothing more."""

    shard: int
    epoch: int


@record
class Drain(Message):
    """To the scheduler, from anybody: this server's shards are to go to others. Answered when it has none."""

    rank: int


# --- from a server to the replica after it ----------------------------------------------------------------


@record
class Entry(Message):
    """The log's entry of this number (its ``request_id``): what a worker, or nobody (-1), has brought about.

    ``first``: the number of the first entry that a new replica gets.
    """

    epoch: int
    first: int
    rank: int
    incarnation: int
    message: Message


@record
class Taken(Message):
    """All entries up to this number (its ``request_id``) have been taken, by the replicas behind the sender, too."""

    epoch: int


@record
class Updated(Message):
    """In an entry: these pushes (rank, round) have taken effect as one update.

    Its frame is their sum, or without an optimizer the value that they make. ``samples`` are in them, if the key's
    rounds are of so many; of 0 there is no frame, for they change nothing.
    """

    key: Key | BundleId
    piece: int
    round: int
    contributions: tuple[tuple[int, int], ...]
    samples: int | None = None


@record
class UniteBundle(Message):
    """In an entry: from here on the bundle is one piece."""

    bundle: BundleId


@record
class SplitBundle(Message):
    """In an entry: from here on its members are counted one by one."""

    bundle: BundleId


@record
class RestorePiece(Message):
    """In an entry: a piece as it is. Its frames are the value, and one per name of the optimizer's state."""

    key: Key
    piece: int
    spec: Spec
    closed: int
    version: int
    rounds: tuple[tuple[int, int], ...]  # (rank, round) in effect
    away: tuple[tuple[int, int, int], ...]  # (rank, first, last) rounds of which it is not a member
    generation: int
    step: int
    written: bool  # a worker wrote the state
    names: tuple[str, ...]
    dtypes: tuple[str, ...]


@record
class RestoreSetting(Message):
    """In an entry: one of the optimizers that were set, in their order."""

    optimizer: dict[str, Any]
    since: dict[Key, int]
    generation: int
    asked: dict[str, Any]  # the one that was set, before its numbers were changed


@record
class RestoreWorkers(Message):
    """In an entry: what the primary knows of the workers, see :class:`kvstore.protocol.workers.Workers`."""

    members: tuple[int, ...]
    known: tuple[int, ...]
    incarnations: tuple[tuple[int, int], ...]
    admitted: tuple[tuple[int, int], ...]
    missed: tuple[tuple[int, str], ...]
    hopeless: tuple[int, ...]
    joining: tuple[int, ...]


@record
class Arrived(Message):
    """In an entry: the rank's messages are of this incarnation."""
