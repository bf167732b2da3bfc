"""The cluster as a home of values: cuts them into pieces, counts this worker's rounds, gathers the replies."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

import engine
from kvstore import comm, consistency
from kvstore.arrays import Array, dtype_named, memory_of, to_host
from kvstore.checkpoint.cut import CutSource
from kvstore.cluster.bundles import Bundles
from kvstore.cluster.cutpoints import CutPoints
from kvstore.cluster.cuts import Cuts
from kvstore.cluster.exchange import CROWDED, Arrivals, Exchange, Remote, key_of, near_pieces
from kvstore.cluster.session import SCHEDULER, Session
from kvstore.errors import DeadlineError, OptimizerError, ServerLostError, ShapeError
from kvstore.handle import Ended, when_ended
from kvstore.home import Gradient, Home, HomeBundle, Reading, Source
from kvstore.optim import Optimizer
from kvstore.protocol.messages import (
    FRAME_BYTES_MAX,
    PRIORITY_MAX,
    Barrier,
    Drop,
    Fetch,
    Init,
    Initialized,
    Leave,
    Mark,
    Message,
    Named,
    Push,
    ReadState,
    Restore,
    SetHyperparameters,
    SetOptimizer,
    Spec,
    State,
    WriteState,
)
from kvstore.protocol.pieces import BundleId, Cut, Key, owner
from kvstore.protocol.requesting import CREDIT_FREE_BYTES, Answered, Divide, Outcome, Request

CACHED_BYTES = 32 << 20  # of values in use: of more, next to nothing is in the caches when it is read again
CHUNK_BYTES = 8 << 20  # a large gradient is staged and sent in parts, so that the servers begin early
CROWDED_CHUNK_BYTES = 16 << 20  # where they would take their core from a worker that stages


class ClusterHome(Home):
    """Values on the servers of a cluster, seen from one worker."""

    def __init__(self, session: Session, runtime: engine.Engine) -> None:
        self.rank = session.sender.rank
        self._session = session
        self._engine = runtime
        self._servers = range(len(session.servers))
        self._remotes: dict[Key, Remote] = {}
        self._nbytes = 0  # of their values
        self._bundles = Bundles(self, session, runtime)
        self._joining: dict[Key, Remote] = {}  # init has not been answered
        self._barriers = 0
        self._turn = 0  # of the devices, to merge a part of a gradient
        self._cuts = Cuts(session)
        self._clock: Remote | None = None  # see CutPoints
        self._time_then = -1  # its round when it was last looked at
        self._cut_points = CutPoints(session, self._mark, self._coupled, self._time, session.came_later)
        session.on_halt = self._cut_points.halt

    def __repr__(self) -> str:
        servers = f"{len(self._servers)} servers, {len(self._session.near)} on this host"
        return f"<ClusterHome of worker {self.rank}: {len(self._remotes)} keys on {servers}>"

    @property
    def workers(self) -> Sequence[int]:
        """The ranks of those who take part now."""
        return sorted(self._session.workers)

    @property
    def _large(self) -> bool:
        """Are the values more than stays in the caches from one round to the next?"""
        return self._nbytes >= CACHED_BYTES

    @property
    def shards(self) -> int:
        """Over how many large values are spread."""
        return len(self._servers)

    # --- keys ---------------------------------------------------------------------------------

    def init(self, key: Key, spec: Spec, value: Array) -> Future[Any]:
        exists = self._session.future()
        known = self._remotes.get(key)
        if known is not None and known.spec == spec:  # by an earlier call, whose deadline passed too soon
            exists.set_result(None)
            return exists
        if spec.cut.size(0) * value.itemsize > FRAME_BYTES_MAX:
            raise ShapeError(
                f"key {key!r}: expected at most {FRAME_BYTES_MAX} bytes on one server, where an optimizer that needs "
                f"the whole tensor has it; got shape {spec.shape} of {spec.dtype}"
            )
        owners = tuple(owner(key, piece, len(self._servers)) for piece in range(len(spec.cut)))
        remote = self.remote(key, spec, owners)
        first = self.rank == min(self._session.workers, default=self.rank)
        value, given = to_host(value), value
        value = value.copy() if first and value is given else value  # the caller may overwrite it at once
        left = remote.pieces
        rounds: list[int] = []

        def one_ended(outcome: Outcome | Divide) -> None:
            nonlocal left
            assert not isinstance(outcome, Divide)
            left -= 1
            with remote.lock:
                remote.open.pop(outcome.request.request_id, None)
            if isinstance(outcome, Answered):
                assert isinstance(outcome.reply, Initialized)
                rounds.append(outcome.reply.round)
            elif not exists.done():
                exists.set_exception(outcome.error)
            if left:
                return
            self._joining.pop(key, None)
            if not exists.done():
                remote.round = min(rounds)
                if self._remotes.setdefault(key, remote) is remote:
                    self._nbytes += remote.cut.items * remote.dtype.itemsize
                self._take_as_clock(self._remotes[key])
                exists.set_result(None)

        requests = []
        for piece, server in enumerate(remote.owners):
            init = Init(self._session.next_id(), key, piece, spec)
            payload = _bytes(value, remote.cut, piece)
            requests.append(Request(server, init, payload, payload.nbytes, accepted=not first))
            remote.open[init.request_id] = server
        self._joining[key] = remote
        self._session.submit([(request, one_ended) for request in requests])
        return exists

    def bundle(self, keys: Sequence[Key], timeout_s: float) -> list[HomeBundle]:
        return self._bundles.make([self._remotes[key] for key in keys], timeout_s)

    def remote(self, key: Key | BundleId, spec: Spec, owners: tuple[int, ...]) -> Remote:
        """What is to be known of a key or bundle whose pieces lie on these servers."""
        dtype = dtype_named(spec.dtype)
        cut = spec.cut
        near = near_pieces(cut, owners, dtype.itemsize, self._session.near)
        arena = self._session.neighbourhood.arena if any(near) else None
        return Remote(
            key,
            spec,
            dtype,
            owners,
            near,
            consistency.parse(spec.cluster_model).pull_before_next_push,
            arena,
            engine.Var(f"order of {key!r}"),
        )

    def place_whole(self, key: Key, value: Array, timeout_s: float) -> None:
        """Move a key that was cut to one server, uncut; every worker calls it with the same value."""
        remote = self._remotes.pop(key)
        self._nbytes -= remote.cut.items * remote.dtype.itemsize
        self.barrier(timeout_s)
        if self.rank == min(self._session.workers, default=self.rank):
            self._ask_all(lambda i: Drop(i, key), timeout_s, f"dropping key {key!r}")
        self.barrier(timeout_s)
        moved = self.init(key, replace(remote.spec, piece_items=max(1, value.size)), value)
        self._session.answers(
            [(owner(key, 0, len(self._servers)), moved)], timeout_s, f"moving key {key!r} to one server"
        )

    # --- push and pull ------------------------------------------------------------------------

    def push(self, key: Key, gradient: Gradient, ended: Ended) -> Reading:
        return self.push_remote(self._remotes[key], gradient, ended)

    def pull(self, key: Key, priority: int) -> Source:
        return self.pull_remote(self._remotes[key], priority)

    def pushpull(self, key: Key, gradient: Gradient, ended: Ended) -> tuple[Reading, Source]:
        return self.pushpull_remote(self._remotes[key], gradient, ended)

    def gathering(self) -> AbstractContextManager[None]:
        near = bool(self._session.near)  # through sockets the rest is staged while the first is under way
        return self._session.gathering(_chunk_bytes(near)) if near else contextlib.nullcontext()

    def push_remote(self, remote: Remote, gradient: Gradient, ended: Ended) -> Reading:
        """:meth:`push` of a key or a bundle."""
        self._push(Exchange(self._session, remote, None, ended), gradient, None)
        return None

    def pull_remote(self, remote: Remote, priority: int) -> Source:
        """:meth:`pull` of a key or a bundle."""
        arrivals = Arrivals(remote, self._engine, self._session.neighbourhood, large=self._large)
        exchange = Exchange(self._session, remote, arrivals, None)
        counted = exchange.counted

        def submit() -> None:
            exchange.check_whole()
            requests = []
            for piece, server in enumerate(remote.owners):
                request_id = self._session.next_id()
                near, held = remote.hold(piece, request_id, pull=True)
                message = Fetch(request_id, remote.key, piece, counted.round, _clamped(priority), near, held)
                requests.append(Request(server, message, None, 0, priority, channels[piece], is_pull=True))
            exchange.submit(requests)

        channels = [remote.channel(piece) for piece in range(len(remote.owners))]
        self._bundles.take_over(remote)
        self._in_order(exchange, submit, [], "pull", 0, priority)
        return arrivals

    def pushpull_remote(self, remote: Remote, gradient: Gradient, ended: Ended) -> tuple[Reading, Source]:
        """:meth:`pushpull` of a key or a bundle."""
        arrivals = Arrivals(remote, self._engine, self._session.neighbourhood, large=self._large)
        exchange = Exchange(self._session, remote, arrivals, ended)
        exchange.whole = gradient.outs is None and remote.pieces > 1
        self._push(exchange, gradient, arrivals)
        return None, arrivals

    def staging(self, key: Key, timeout_s: float) -> Array:
        return self._remotes[key].staging.lend(timeout_s, f"staging of key {key!r}")

    def _push(self, exchange: Exchange, gradient: Gradient, arrivals: Arrivals | None) -> None:
        """Stage ``gradient`` and send it, in this key's order of calls. ``arrivals``: of the pull beside it, if any."""
        remote, arrays = exchange.remote, gradient.arrays
        self._bundles.take_over(remote)  # for which it may have to wait, and so what is pushed must be read before
        if gradient.on_devices:
            self._push_from_devices(exchange, gradient, arrivals is not None)
            return
        reads = gradient.reads
        unwritten: Gradient | None = gradient  # what is still to be written to what is sent
        flat: Array | None = None  # what is sent
        staging = remote.staging
        if len(arrays) == 1:
            exchange.slot = staging.lent(arrays[0])
            if exchange.slot is not None:
                flat = exchange.slot.array
            elif gradient.lent and not remote.is_near and arrays[0].flags.c_contiguous:
                flat = arrays[0].reshape(-1)
        if flat is not None:
            unwritten = None
        else:
            exchange.slot = slot = staging.take()
            flat = slot.array
        sent: Array = flat

        def submit() -> None:
            exchange.count()
            is_pull = arrivals is not None
            self._stage_and_send(exchange, unwritten, sent, is_pull, gradient.priority, gradient.samples)

        def begin() -> None:
            if arrivals is not None and gradient.outs and remote.pieces > 1:
                arrivals.begin(gradient.outs, gradient.priority)  # what comes while the rest is staged

        how = "push", sent.nbytes, gradient.priority, begin
        if unwritten is not None:
            if self._in_order(exchange, submit, reads, *how, if_free=True):
                return
            if not self._engine.pending(*reads):  # it will be sent later, but must be read now
                staged = engine.Var(f"staged {remote.key!r}")
                self._engine.push(
                    partial(gradient.write, flat), reads=reads, writes=[staged], name="stage", inline=True,
                    info={"key": remote.key, "bytes": flat.nbytes},
                )  # fmt: skip
                reads, unwritten = [staged], None
        self._in_order(exchange, submit, reads, *how)

    def _push_from_devices(self, exchange: Exchange, gradient: Gradient, pull: bool) -> None:
        """:meth:`_push` of what lies on devices: copied down part by part, each of which is sent when it is there.

        The copies are put into streams, so nobody waits for a device. Each part is merged by another device, for each
        has a bus of its own; a device's copies come one after another, so that the first is there first.
        """
        remote, runtime, cut = exchange.remote, self._engine, exchange.remote.cut
        exchange.slot = slot = remote.staging.take(pinned=True)
        gradient = gradient.settled(runtime)
        sources, flat, priority = _flat(gradient.arrays), slot.array, gradient.priority
        chains: dict[int, engine.Var] = {}  # of copies, by device
        try:
            with runtime.bulk():
                for some in _parts(cut, remote.dtype, CHUNK_BYTES) if sources else [range(remote.pieces)]:
                    start, stop = cut.span(some[0])[0], cut.span(some[-1])[1]
                    part, there = flat[start:stop], engine.Var(f"staged {remote.key!r}[{some[0]}]")
                    copy, reads, writes = partial(gradient.write, part), gradient.reads, [there]
                    if sources:
                        copy = partial(comm.merge, [source[start:stop] for source in sources], part, gradient.way)
                        self._turn += 1
                        reads = _from(reads, self._turn)
                        writes.append(chains.setdefault(memory_of(reads[0]), engine.Var(f"copies of {remote.key!r}")))
                    runtime.push(
                        copy, reads=reads, writes=writes, priority=priority, lane="copy", name="stage",
                        lent=gradient.lent, info={"key": remote.key, "bytes": part.nbytes, "piece": some[0]},
                    )  # fmt: skip
                    send = partial(self._send_part, exchange, flat, some, pull, priority, gradient.samples)
                    self._in_order(exchange, send, [there], "push", part.nbytes, priority, lane="network")
        except BaseException as error:
            exchange.give_up(error)
            raise

    def _send_part(
        self, exchange: Exchange, flat: Array, some: range, pull: bool, priority: int, samples: int | None
    ) -> None:
        """Send these pieces, unless something is amiss with those before."""
        if exchange.is_next(some[0]):
            if not some[0]:
                exchange.count()
            self._send(exchange, flat, some, pull, priority, samples)

    def _stage_and_send(
        self,
        exchange: Exchange,
        gradient: Gradient | None,
        flat: Array,
        pull: bool,
        priority: int,
        samples: int | None,
    ) -> None:
        """Send ``flat`` as the next round; before that, part by part, write the gradient to it, if there is one."""
        remote = exchange.remote
        cut, near = remote.cut, remote.is_near
        parts = [range(remote.pieces)]
        if gradient is not None and remote.pieces > 1:
            parts = _parts(cut, remote.dtype, _chunk_bytes(near))
        large = self._large and near  # else it is sent at once, from the caches
        sources: list[Array] = []
        if gradient is not None:
            if len(parts) > 1 or large:
                sources = _flat(gradient.arrays)
            if not sources:
                gradient.write(flat)
        for some in parts:
            if sources:
                start, stop = cut.span(some[0])[0], cut.span(some[-1])[1]
                comm.merge([source[start:stop] for source in sources], flat[start:stop], large=large)
            self._send(exchange, flat, some, pull, priority, samples)

    def _send(
        self, exchange: Exchange, flat: Array, some: range, pull: bool, priority: int, samples: int | None
    ) -> None:
        exchange.submit([self._push_request(exchange, flat, piece, pull, priority, samples) for piece in some])

    def _push_request(
        self, exchange: Exchange, flat: Array, piece: int, pull: bool, priority: int, samples: int | None
    ) -> Request:
        remote = exchange.remote
        request_id = self._session.next_id()
        near, held = remote.hold(piece, request_id, pull=pull)
        place = None
        region = exchange.slot.region if exchange.slot is not None else None
        if remote.near[piece] and region is not None:
            place = region.place(remote.cut.span(piece)[0] * remote.dtype.itemsize)
        payload = _bytes(flat, remote.cut, piece)
        nbytes = payload.nbytes if place is None else 0
        message = Push(
            request_id, remote.key, piece, remote.round, pull, nbytes > CREDIT_FREE_BYTES,
            _clamped(priority), near, held, place, samples, exchange.whole,
        )  # fmt: skip
        return Request(
            remote.owners[piece], message, payload, nbytes, priority, remote.channel(piece), is_push=True, is_pull=pull
        )

    def _in_order(
        self,
        exchange: Exchange,
        submit: Callable[[], None],
        reads: list[Any],
        name: str,
        nbytes: int,
        priority: int,
        before: Callable[[], None] | None = None,
        lane: str | None = None,
        if_free: bool = False,
    ) -> bool:
        """Run ``submit`` when ``reads`` are written, in this key's order of calls; ``before`` it, if that is now.

        ``if_free``: do nothing but return False, if something is in the way.
        """
        remote, runtime = exchange.remote, self._engine
        order = exchange.counted.order
        if runtime.free(order) and not (reads and runtime.uses_arrays()) and not runtime.profiling:
            # Nothing is in the way, and nobody else submits meanwhile: an op would cost a sixth of a small round.
            try:
                if before is not None:
                    before()
                submit()
            except BaseException as error:
                exchange.give_up(error)
                if not isinstance(error, Exception):  # Ctrl-C
                    raise
            return True

        def attempt() -> None:
            try:
                submit()
            except BaseException as error:
                exchange.give_up(error)  # before it is the turn of the next one in this order
                raise

        push = runtime.push_if_free if if_free else runtime.push
        handle = push(
            attempt, reads=reads, writes=[order], priority=priority, lane=lane, name=f"{name} {remote.key!r}",
            inline=True, info={"bytes": nbytes},
        )  # fmt: skip
        if handle is None:
            return False
        when_ended(handle, lambda error: None if error is None else exchange.give_up(error))
        return True

    # --- optimizer ----------------------------------------------------------------------------

    def _since(self) -> dict[Key, int]:
        """This worker's rounds, those included whose gradients are still being computed."""
        self._engine.wait(*{remote.latest.order for remote in self._remotes.values()})
        pushed = {key: remote.latest.round for key, remote in self._remotes.items()}
        return {key: round for key, round in pushed.items() if round}

    def set_optimizer(self, optimizer: Optimizer, replace: bool, timeout_s: float) -> None:
        described, since = optimizer.to_wire(), self._since()
        self._ask_all(lambda i: SetOptimizer(i, described, replace, since), timeout_s, "set_optimizer")

    def set_hyperparameters(self, changes: Mapping[str, Any], timeout_s: float) -> None:
        since = self._since()
        self._ask_all(lambda i: SetHyperparameters(i, dict(changes), since), timeout_s, "set_hyperparameters")

    def cut_keys(self) -> list[Key]:
        """The keys that lie in more than one piece."""
        return [key for key, remote in self._remotes.items() if remote.pieces > 1]

    def read_state(self, key: Key, timeout_s: float) -> tuple[int, dict[str, Array]]:
        remote = self._remotes[key]
        asked = [
            (server, self._session.ask(server, partial(ReadState, key=key, piece=piece), whole=True))
            for piece, server in enumerate(remote.owners)
        ]
        self._session.answers(asked, timeout_s, f"reading the optimizer's state of key {key!r}")
        states: dict[str, list[Array]] = {}
        step = 0
        for _, answer in asked:
            outcome = answer.result()
            assert isinstance(outcome.reply, State) and isinstance(outcome.payload, list)
            step = max(step, outcome.reply.step)
            for name, dtype, frame in zip(outcome.reply.names, outcome.reply.dtypes, outcome.payload, strict=True):
                states.setdefault(name, []).append(np.frombuffer(frame, dtype_named(dtype)))
        return step, {name: np.concatenate(parts) for name, parts in states.items()}

    def write_state(self, key: Key, step: int, state: dict[str, Array], timeout_s: float) -> None:
        remote = self._remotes[key]
        if any(array.size != remote.cut.items for array in state.values()):
            raise OptimizerError(f"key {key!r}: expected optimizer state of {remote.cut.items} elements per array")
        asked = []
        for piece, server in enumerate(remote.owners):
            start, stop = remote.cut.span(piece)
            frames = tuple(array[start:stop].view(np.uint8) for array in state.values())
            names, dtypes = tuple(state), tuple(array.dtype.name for array in state.values())
            make = partial(WriteState, key=key, piece=piece, step=step, names=names, dtypes=dtypes)
            asked.append((server, self._session.ask(server, make, frames)))
        self._session.answers(asked, timeout_s, f"writing the optimizer's state of key {key!r}")

    # --- the cluster --------------------------------------------------------------------------

    def barrier(self, timeout_s: float) -> None:
        with self._cut_points.resting():
            self.meet(timeout_s)

    def meet(self, timeout_s: float) -> None:
        """A barrier that is no cut point."""
        self._barriers += 1
        number = self._barriers
        waiting = self._session.ask(SCHEDULER, lambda i: Barrier(i, number))
        try:
            waiting.result(timeout_s)
        except TimeoutError as error:
            if waiting.done():
                raise
            why = self._session.explain(SCHEDULER, 0)
            raise DeadlineError(f"barrier: not passed after {timeout_s:g} s; {why}") from error

    # --- checkpoints --------------------------------------------------------------------------

    @property
    def writes_checkpoints(self) -> bool:
        return self.rank == min(self._session.workers, default=self.rank)

    def cut_point(self) -> None:
        self._cut_points.reach()

    def last_cut_point(self) -> None:
        self._cut_points.last()

    def ask_cut(self, timeout_s: float) -> Callable[[], CutSource]:
        cut, named = self._cuts.ask()
        self._cut_points.asks(cut, named)
        return partial(self._cuts.take, cut, named, timeout_s)

    def restore(
        self, key: Key, value: Array, version: int, step: int, state: dict[str, Array], timeout_s: float
    ) -> None:
        remote = self._remotes[key]
        names, dtypes = tuple(state), tuple(array.dtype.name for array in state.values())
        asked = []
        for piece, server in enumerate(remote.owners):
            start, stop = remote.cut.span(piece)
            frames = tuple(array[start:stop].view(np.uint8) for array in (value, *state.values()))
            make = partial(Restore, key=key, piece=piece, version=version, step=step, names=names, dtypes=dtypes)
            asked.append((server, self._session.ask(server, make, frames)))
        self._session.answers(asked, timeout_s, f"restoring key {key!r}")

    def _coupled(self) -> bool:
        return any(remote.spec.cluster_model != "eventual" for remote in list(self._remotes.values()))

    def _take_as_clock(self, remote: Remote) -> None:
        """The first by name of the keys that all workers push and wait for: the same in every worker."""
        if _may_be_clock(remote) and (self._clock is None or str(remote.key) <= str(self._clock.key)):
            self._clock = remote

    def _time(self) -> tuple[Key, int] | None:
        clock = self._clock
        if clock is None:
            return None
        if clock.latest.round == self._time_then:  # perhaps it is hardly ever pushed
            others = filter(_may_be_clock, list(self._remotes.values()))
            most = min(others, key=lambda remote: (-remote.latest.round, str(remote.key)), default=clock)
            if most.latest.round > clock.latest.round:
                self._clock = clock = most
        self._time_then = clock.latest.round
        return key_of(clock), self._time_then

    def _mark(self, named: Named) -> None:
        """Tell all servers which of this worker's pushes belong to a cut; later pushes are sent once they know."""
        latest = {key: remote.latest for key, remote in list(self._remotes.items())}
        orders = {one.order for one in latest.values()} | {self._remotes[key].order for key in latest}

        def start(completion: engine.Completion) -> None:
            left = len(self._servers)

            def told(outcome: Outcome | Divide) -> None:  # in the session's loop
                nonlocal left
                left -= 1
                if not left:
                    completion.set_result(None)

            rounds = {key: remote.round for key, remote in latest.items()}
            marks = [Mark(self._session.next_id(), named.cut, named.awaited, rounds) for _ in self._servers]
            self._session.submit(
                [(Request(s, mark, priority=PRIORITY_MAX), told) for s, mark in zip(self._servers, marks, strict=True)]
            )

        self._engine.push_async(start, writes=orders, name="cut point", inline=True)

    def drive(self, awaited: Future[Any], timeout_s: float) -> bool:
        return self._session.drive(awaited, timeout_s)

    def explain(self, key: Key) -> str:
        remote = self._remotes.get(key) or self._joining.get(key)
        if remote is None:
            return f"key {key!r}: nothing is open on the servers"
        return self.explain_remote(remote)

    def explain_remote(self, remote: Remote) -> str:
        """:meth:`explain` of a key or a bundle."""
        for one in (remote, remote.counted, *(member for member, _ in remote.members)):
            with one.lock:
                waiting = next(iter(one.open.items()), None)
            if waiting is not None:
                return self._session.explain(waiting[1], waiting[0])
        if not remote.counted.order.idle:
            return "it has not been sent: it waits for what this process still computes or copies"
        return "nothing is open on the servers"

    def dead_workers(self) -> list[int]:
        return sorted(self._session.lost_workers)

    def rounds(self, key: Key, timeout_s: float) -> int:
        remote = self._remotes[key]
        self._engine.wait(remote.latest.order, timeout=timeout_s)
        return remote.latest.round

    def leave(self, timeout_s: float) -> None:
        for member in (SCHEDULER, *self._servers):  # it first: should this process die now, it tells the servers
            self._session.ask_each([member], lambda i: Leave(i, "", True), timeout_s, "leave")

    def close(self, reason: str, timeout_s: float) -> None:
        try:
            for member in (SCHEDULER, *self._servers):
                with contextlib.suppress(ServerLostError):  # who is gone need not be told
                    self._session.ask_each([member], lambda i: Leave(i, reason), timeout_s, "leave")
        finally:
            self._session.close()

    def _ask_all(self, make: Callable[[int], Message], timeout_s: float, what: str) -> None:
        self._session.ask_each(self._servers, make, timeout_s, what)


def _may_be_clock(remote: Remote) -> bool:
    """Does every worker push it, and wait for the others' pushes?"""
    return remote.spec.cluster_model != "eventual" and remote.spec.participants is None


def _clamped(priority: int) -> int:
    return max(-PRIORITY_MAX, min(PRIORITY_MAX, priority))


def _chunk_bytes(near: bool) -> int:
    return CROWDED_CHUNK_BYTES if CROWDED and near else CHUNK_BYTES


def _parts(cut: Cut, dtype: np.dtype[Any], chunk_bytes: int) -> list[range]:
    """The pieces of a value, in parts of about so many bytes."""
    pieces, some = len(cut), max(1, chunk_bytes // max(1, cut.piece_items * dtype.itemsize))
    return [range(begin, min(pieces, begin + some)) for begin in range(0, pieces, some)]


def _flat(arrays: Sequence[Array]) -> list[Array]:
    """The same memory, flat; nothing if that of one of them is not in one run."""
    return [array.reshape(-1) for array in arrays] if all(array.flags.c_contiguous for array in arrays) else []


def _from(items: list[Any], turn: int) -> list[Any]:
    """The same, beginning with another one each turn."""
    first = turn % len(items)
    return items[first:] + items[:first]


def _bytes(flat: Array, cut: Cut, piece: int) -> Array:
    start, stop = cut.span(piece)
    return flat[start:stop].view(np.uint8)
