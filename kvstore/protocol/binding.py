"""A server's bundles: which keys may be moved together, and which are counted as one piece now. Pure.

What this file decides: whether a worker's list can be bound, and from when to when its keys have one history. What a
bundle is, is said in :mod:`kvstore.protocol.bundles`; what its pushes and pulls mean is decided in
:mod:`kvstore.protocol.serving`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from kvstore.errors import ProtocolError, UnknownKeyError
from kvstore.protocol.actions import Action, Forget, Reply, Split, Unite
from kvstore.protocol.bundles import BUNDLED_MAX, BUNDLES_MAX, Bundle, Part
from kvstore.protocol.counted import Piece, check_room, ticket_of
from kvstore.protocol.messages import Bind, Divided
from kvstore.protocol.pieces import BundleId, Key, PieceId, Span, bundle_id
from kvstore.protocol.settings import Settings


class Binding:
    """The bundles of one server.

    Args:
        pieces: of the server: those of united bundles come and go here, their members stay.
        settings: the optimizers in effect.
        name: how the server calls itself in messages.
    """

    def __init__(self, pieces: dict[PieceId, Piece], settings: Settings, name: str) -> None:
        self.bundles: dict[BundleId, Bundle] = {}
        self.united: dict[PieceId, tuple[Bundle, Span]] = {}  # by member: its bundle, and where it lies in that
        self.moved: list[Action] = []  # Unite and Split: they come before what else is concluded from a message
        self._pieces = pieces
        self._settings = settings
        self._name = name

    def __repr__(self) -> str:
        united = sum(bundle.united for bundle in self.bundles.values())
        return f"<Binding: {len(self.bundles)} bundles, {united} of them united>"

    # --- what there is ------------------------------------------------------------------------

    def find(self, key: BundleId, number: int) -> Bundle:
        """The bundle that a push or pull names. Raises UnknownKeyError."""
        bundle = self.bundles.get(key)
        if bundle is None or number:
            raise UnknownKeyError(f"a bundle: expected one that was bound, {self._name} has none such")
        return bundle

    def place_of(self, piece_id: PieceId) -> tuple[PieceId, Span | None]:
        """Where the piece's value is: its own, or in a united bundle's."""
        if piece_id not in self.united:
            return piece_id, None
        bundle, span = self.united[piece_id]
        return bundle.piece, span

    def key_of(self, piece_id: PieceId) -> Key:
        """The piece's key, or the first of a bundle, which stands for them all."""
        key = piece_id[0]
        return self.key_of(self.bundles[key].members[0]) if isinstance(key, bytes) else key

    def called(self, piece_id: PieceId) -> str:
        """The piece's name in messages."""
        key = piece_id[0]
        return f"the bundle of {self.bundles[key]}" if isinstance(key, bytes) else f"key {key!r}"

    def take_moved(self) -> list[Action]:
        """What came of :meth:`unite` and :meth:`split` since the last time."""
        moved, self.moved = self.moved, []
        return moved

    # --- binding, uniting, splitting ----------------------------------------------------------

    def bind(self, message: Bind) -> None:
        """These keys may from here on be moved together. Raises ProtocolError, LimitError or UnknownKeyError."""
        members = tuple((key, 0) for key in message.keys)
        if message.bundle != bundle_id(message.keys):
            raise ProtocolError("bind: expected the id that follows from the keys, got another")
        if message.bundle in self.bundles:
            return
        bound = sum(len(bundle.members) for bundle in self.bundles.values())
        check_room(self._name, "keys in bundles", bound + len(members), BUNDLED_MAX + 1)
        if len(self.bundles) >= BUNDLES_MAX or len(set(members)) < max(1, len(members)):
            raise ProtocolError(f"bind: expected at most {BUNDLES_MAX} bundles, of at least one key, each key once")
        unknown = [key for key, _ in members if (key, 0) not in self._pieces]
        if unknown:
            raise UnknownKeyError(f"key {unknown[0]!r}: expected an initialised key, {self._name} has none such")
        specs = [self._pieces[piece_id].spec for piece_id in members]
        alike = {(spec.dtype, spec.cluster_model, spec.participants, spec.samples_per_round) for spec in specs}
        if len(alike) > 1 or any(len(spec.cut) > 1 for spec in specs):
            raise ProtocolError("bind: expected keys of one dtype, model and set of participants, each in one piece")
        spans, end = [], 0
        for spec in specs:
            spans.append((end, end + spec.cut.items))
            end += spec.cut.items
        whole = replace(specs[0], shape=(end,), piece_items=max(1, end))
        self.bundles[message.bundle] = Bundle(message.bundle, members, tuple(spans), whole)

    def pushed(self, bundle: Bundle, rank: int, round: int) -> bool:
        """It is pushed: is it one piece from this push on, as far as its members' histories allow it?"""
        pieces = [self._pieces[piece_id] for piece_id in bundle.members]
        first = pieces[0]
        if rank not in first.level.rounds or round != first.accepted.get(rank, 0) + 1:
            return False  # it is a repeat, or comes too early
        if any(piece_id in self.united for piece_id in bundle.members):
            return False
        if not all(piece.quiet and piece.same_history(first) for piece in pieces):
            return False
        if not self._settings.treat_alike(bundle.keys, first.level.slowest()):
            return False
        self.unite(bundle)
        return True

    def unite(self, bundle: Bundle) -> None:
        """Count the bundle as one piece from here on; its members' histories are the same."""
        pieces = [self._pieces[piece_id] for piece_id in bundle.members]
        first = pieces[0]
        whole = Piece(bundle.spec, first.level, first.accepted)
        whole.generation, whole.steps, whole.written = first.generation, first.steps, first.written
        for piece in pieces:
            piece.level, piece.accepted = whole.level, whole.accepted
            piece.held, piece.samples, piece.commits = whole.held, whole.samples, whole.commits
        self.united.update((piece_id, (bundle, span)) for piece_id, span in bundle)
        self._pieces[bundle.piece] = whole
        bundle.united = True
        self.moved.append(Unite(bundle))

    def part(self, piece_id: PieceId) -> None:
        """From here on the piece is counted by itself."""
        if piece_id in self.united:
            self.split(self.united[piece_id][0])

    def split(self, bundle: Bundle) -> None:
        """Count the bundle's members one by one, from where they are. Who waits for it has to ask one by one, too."""
        whole = self._pieces.pop(bundle.piece)
        bundle.united = False
        for piece_id, span in bundle:
            del self.united[piece_id]
            piece = self._pieces[piece_id]
            piece.level, piece.accepted, piece.commits = whole.level.copy(), dict(whole.accepted), {}
            piece.held = {pushed: Part(payload, span) for pushed, payload in whole.held.items()}
            piece.samples = dict(whole.samples)
            piece.generation, piece.steps, piece.written = whole.generation, whole.steps, whole.written
        divided = {(rank, request_id): None for (rank, _), request_id in whole.commits.items()}
        for pull in whole.level.waiting.values():
            ticket = ticket_of(pull.ticket)
            if ticket.piece == bundle.piece:
                divided[ticket.rank, ticket.request_id] = None
            else:
                self._pieces[ticket.piece].level.waiting[ticket] = pull
        self.moved.append(Split(bundle))
        self.moved += [Reply(rank, Divided(request_id, True)) for rank, request_id in divided]

    def settings_changed(self) -> None:
        """Split the bundles whose members will be updated in different ways."""
        for bundle in self.bundles.values():
            if bundle.united:
                done = self._pieces[bundle.piece].level.slowest()
                if not self._settings.treat_alike(bundle.keys, done):
                    self.split(bundle)

    def drop(self, piece_ids: Collection[PieceId]) -> list[Action]:
        """These pieces will be no more, and no bundle that they are in."""
        for piece_id in piece_ids:
            self.part(piece_id)
        gone = [bundle for bundle in self.bundles.values() if not set(bundle.members).isdisjoint(piece_ids)]
        for bundle in gone:
            del self.bundles[bundle.id]
        return [Forget(bundle.piece) for bundle in gone]
