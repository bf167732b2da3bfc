"""The cluster as a home of values: cuts them into pieces, counts this worker's rounds, gathers the replies."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

import engine
from kvstore import consistency
from kvstore.arrays import Array, dtype_named
from kvstore.cluster.session import SCHEDULER, Session
from kvstore.errors import DeadlineError, DuplicateKeyError, KVStoreError, OptimizerError, ServerLostError
from kvstore.home import Home, Parts, Source
from kvstore.optim import Optimizer
from kvstore.protocol.messages import (
    Barrier,
    Drop,
    Fetch,
    Init,
    Initialized,
    Leave,
    Message,
    Push,
    ReadState,
    SetHyperparameters,
    SetOptimizer,
    Spec,
    State,
    Value,
    WriteState,
)
from kvstore.protocol.pieces import Cut, Key, owner
from kvstore.protocol.requesting import CREDIT_FREE_BYTES, Answered, Outcome, Request

INLINE_BYTES = 64 << 10


@dataclass(slots=True)
class _Remote:
    """A key, as this worker sees it in the cluster."""

    spec: Spec
    cut: Cut
    dtype: np.dtype[Any]
    pulls_first: bool
    order: engine.Var  # ops that hand requests of this key to the session
    round: int = 0  # pushes handed over
    open: dict[int, int] = field(default_factory=dict)  # request id -> server
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(slots=True)
class _Pulled:
    """The replies to one pull, piece by piece."""

    parts: Parts
    version: int
    staleness: int


class ClusterHome(Home):
    """Values on the servers of a cluster, seen from one worker."""

    def __init__(self, session: Session, runtime: engine.Engine) -> None:
        self.rank = session.sender.rank
        self.num_workers = session.num_workers
        self._session = session
        self._engine = runtime
        self._servers = range(len(session.servers))
        self._remotes: dict[Key, _Remote] = {}
        self._barriers = 0

    def __repr__(self) -> str:
        return f"<ClusterHome of worker {self.rank}: {len(self._remotes)} keys on {len(self._servers)} servers>"

    # --- keys ---------------------------------------------------------------------------------

    def init(self, key: Key, spec: Spec, value: Array) -> Future[Any]:
        if key in self._remotes:
            raise DuplicateKeyError(f"init of key {key!r}: expected a new key, it exists")
        model = consistency.parse(spec.cluster_model)
        dtype = dtype_named(spec.dtype)
        cut = Cut(value.size, spec.piece_items)
        remote = _Remote(spec, cut, dtype, model.pull_before_next_push, engine.Var(f"order of {key!r}"))
        value = value if self.rank else value.copy()  # the caller may overwrite it at once
        requests = [
            Request(
                owner(key, piece, len(self._servers)),
                Init(self._session.next_id(), key, piece, spec),
                None if self.rank else _bytes(value, cut, piece),
                0 if self.rank else cut.size(piece) * dtype.itemsize,
            )
            for piece in range(len(cut))
        ]
        exists: Future[Any] = Future()

        def created(replies: list[Message]) -> None:
            remote.round = min(reply.round for reply in replies if isinstance(reply, Initialized))
            self._remotes[key] = remote
            exists.set_result(None)

        self._hand_over(remote, requests, lambda outcomes: created([o.reply for o in outcomes]), exists.set_exception)
        return exists

    def place_whole(self, key: Key, value: Array, timeout_s: float) -> None:
        """Move a key that was cut to one server, uncut; every worker calls it with the same value."""
        remote = self._remotes.pop(key)
        self.barrier(timeout_s)
        if self.rank == 0:
            for server in self._servers:
                self._wait([self._session.ask(server, lambda i: Drop(i, key))], timeout_s, "drop")
        self.barrier(timeout_s)
        whole = Spec(**{**{f: getattr(remote.spec, f) for f in Spec.__slots__}, "piece_items": max(1, value.size)})
        self._wait([self.init(key, whole, value)], timeout_s, "init")

    # --- push and pull ------------------------------------------------------------------------

    def push(self, key: Key, staged: Array, var: engine.Var, priority: int) -> Future[Any]:
        committed: Future[Any] = Future()
        self._push(key, staged, var, priority, False, lambda _: committed.set_result(None), committed.set_exception)
        return committed

    def pull(self, key: Key, priority: int) -> Source:
        remote = self._remotes[key]
        source, arrived, failed = self._expect(remote)

        def submit() -> None:
            requests = []
            for piece in range(len(remote.cut)):
                message = Fetch(self._session.next_id(), key, piece, remote.round)
                requests.append(self._request(remote, key, piece, message, None, priority, is_pull=True))
            self._hand_over(remote, requests, arrived, failed)

        self._in_order(remote, submit, [], failed, f"pull {key!r}", 0, priority)
        return source

    def pushpull(self, key: Key, staged: Array, var: engine.Var, priority: int) -> tuple[Future[Any], Source]:
        source, arrived, failed = self._expect(self._remotes[key])
        done: Future[Any] = Future()

        def both(outcomes: list[Answered]) -> None:
            done.set_result(None)
            arrived(outcomes)

        def neither(error: BaseException) -> None:
            done.set_exception(error)
            failed(error)

        self._push(key, staged, var, priority, True, both, neither)
        return done, source

    def _push(
        self,
        key: Key,
        staged: Array,
        var: engine.Var,
        priority: int,
        pull: bool,
        arrived: Callable[[list[Answered]], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        remote = self._remotes[key]

        def submit() -> None:
            remote.round += 1
            requests = []
            for piece in range(len(remote.cut)):
                payload = _bytes(staged, remote.cut, piece)
                message = Push(
                    self._session.next_id(), key, piece, remote.round, pull, payload.nbytes > CREDIT_FREE_BYTES
                )
                requests.append(
                    self._request(remote, key, piece, message, payload, priority, is_push=True, is_pull=pull)
                )
            self._hand_over(remote, requests, arrived, failed)

        self._in_order(remote, submit, [var], failed, f"push {key!r}", staged.nbytes, priority)

    def _in_order(
        self,
        remote: _Remote,
        submit: Callable[[], None],
        reads: list[engine.Var],
        failed: Callable[[BaseException], None],
        name: str,
        nbytes: int,
        priority: int,
    ) -> None:
        """Run ``submit`` when ``reads`` are written, in this key's order of calls."""
        handle = self._engine.push(
            submit,
            reads=reads,
            writes=[remote.order],
            priority=priority,
            name=name,
            inline=True,
            info={"bytes": nbytes},
        )

        def ended(done: Future[Any]) -> None:
            error = done.exception()
            if error is not None:
                failed(error)

        handle.add_done_callback(ended)

    def _expect(
        self, remote: _Remote
    ) -> tuple[Source, Callable[[list[Answered]], None], Callable[[BaseException], None]]:
        """A source that fills when the replies arrive."""
        var = engine.Var("reply")
        box: list[_Pulled] = []
        completion: list[engine.Completion] = []
        self._engine.push_async(completion.append, writes=[var], name="await reply", inline=True)

        def arrived(outcomes: list[Answered]) -> None:
            box.append(_gather(outcomes, remote))
            completion[0].set_result(None)

        source = Source(
            var, lambda: box[0].parts, lambda: box[0].parts, lambda: box[0].version, lambda: box[0].staleness
        )
        return source, arrived, lambda error: completion[0].set_exception(error)

    def _request(
        self,
        remote: _Remote,
        key: Key,
        piece: int,
        message: Message,
        payload: Array | None,
        priority: int,
        *,
        is_push: bool = False,
        is_pull: bool = False,
    ) -> Request:
        return Request(
            owner(key, piece, len(self._servers)),
            message,
            payload,
            0 if payload is None else payload.nbytes,
            priority,
            (key, piece),
            is_push,
            is_pull,
        )

    def _hand_over(
        self,
        remote: _Remote,
        requests: list[Request],
        arrived: Callable[[list[Answered]], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        """Submit the pieces of one operation; exactly one of the callbacks runs when all have ended."""
        answers: list[Answered] = []
        errors: list[KVStoreError] = []

        def one_ended(outcome: Outcome) -> None:  # on the session's thread, one at a time
            with remote.lock:
                remote.open.pop(outcome.request.request_id, None)
            if isinstance(outcome, Answered):
                answers.append(outcome)
            else:
                errors.append(outcome.error)
            if len(answers) + len(errors) == len(requests):
                if errors:
                    failed(errors[0])
                else:
                    arrived(answers)

        with remote.lock:
            for request in requests:
                remote.open[request.request_id] = request.server
        self._session.submit([(request, one_ended) for request in requests], pulls_first=remote.pulls_first)

    # --- optimizer ----------------------------------------------------------------------------

    def _since(self) -> dict[Key, int]:
        """This worker's rounds, those included whose gradients are still being computed."""
        self._engine.wait(*(remote.order for remote in self._remotes.values()))
        return {key: remote.round for key, remote in self._remotes.items() if remote.round}

    def set_optimizer(self, optimizer: Optimizer, replace: bool, timeout_s: float) -> None:
        described, since = optimizer.to_wire(), self._since()
        self._ask_all(lambda i: SetOptimizer(i, described, replace, since), timeout_s, "set_optimizer")

    def set_hyperparameters(self, changes: Mapping[str, Any], timeout_s: float) -> None:
        since = self._since()
        self._ask_all(lambda i: SetHyperparameters(i, dict(changes), since), timeout_s, "set_hyperparameters")

    def cut_keys(self) -> list[Key]:
        """The keys that lie in more than one piece."""
        return [key for key, remote in self._remotes.items() if len(remote.cut) > 1]

    def read_state(self, key: Key, timeout_s: float) -> tuple[int, dict[str, Array]]:
        remote = self._remotes[key]
        requests = [
            Request(owner(key, piece, len(self._servers)), ReadState(self._session.next_id(), key, piece))
            for piece in range(len(remote.cut))
        ]
        whole: Future[tuple[int, dict[str, Array]]] = Future()

        def arrived(outcomes: list[Answered]) -> None:
            outcomes.sort(key=lambda o: requests.index(o.request))
            states: dict[str, list[Array]] = {}
            step = 0
            for outcome in outcomes:
                reply = outcome.reply
                assert isinstance(reply, State) and isinstance(outcome.payload, list)
                step = max(step, reply.step)
                for name, dtype, frame in zip(reply.names, reply.dtypes, outcome.payload, strict=True):
                    states.setdefault(name, []).append(np.frombuffer(frame, dtype_named(dtype)))
            whole.set_result((step, {name: np.concatenate(parts) for name, parts in states.items()}))

        self._hand_over(remote, requests, arrived, whole.set_exception)
        self._wait([whole], timeout_s, f"reading the optimizer's state of key {key!r}")
        return whole.result()

    def write_state(self, key: Key, step: int, state: dict[str, Array], timeout_s: float) -> None:
        remote = self._remotes[key]
        if any(array.size != remote.cut.items for array in state.values()):
            raise OptimizerError(f"key {key!r}: expected optimizer state of {remote.cut.items} elements per array")
        asked = []
        for piece in range(len(remote.cut)):
            start, stop = remote.cut.span(piece)
            frames = tuple(array[start:stop].view(np.uint8) for array in state.values())
            names, dtypes = tuple(state), tuple(array.dtype.name for array in state.values())
            make = partial(WriteState, key=key, piece=piece, step=step, names=names, dtypes=dtypes)
            asked.append(self._session.ask(owner(key, piece, len(self._servers)), make, frames))
        self._wait(asked, timeout_s, f"writing the optimizer's state of key {key!r}")

    # --- the cluster --------------------------------------------------------------------------

    def barrier(self, timeout_s: float) -> None:
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

    def explain(self, key: Key) -> str:
        remote = self._remotes.get(key)
        if remote is None:
            return f"key {key!r}: its init has not been answered"
        with remote.lock:
            waiting = list(remote.open.items())[:1]
        return self._session.explain(waiting[0][1], waiting[0][0]) if waiting else "nothing is open on the servers"

    def explain_init(self, key: Key) -> str:
        """Why an init has not returned: asks the server of the key's first piece."""
        return self._session.explain(owner(key, 0, len(self._servers)), 0)

    def dead_workers(self) -> list[int]:
        return sorted({gone.rank for gone in self._session.departed if gone.role == "worker" and gone.reason})

    def close(self, reason: str, timeout_s: float) -> None:
        try:
            for member in (*self._servers, SCHEDULER):
                with contextlib.suppress(ServerLostError):  # who is gone need not be told
                    self._wait([self._session.ask(member, lambda i: Leave(i, reason))], timeout_s, "leave")
        finally:
            self._session.close()

    def _ask_all(self, make: Callable[[int], Message], timeout_s: float, what: str) -> None:
        self._wait([self._session.ask(server, make) for server in self._servers], timeout_s, what)

    def _wait(self, asked: list[Future[Any]], timeout_s: float, what: str) -> None:
        for server, answer in enumerate(asked):
            try:
                answer.result(timeout_s)
            except TimeoutError as error:
                if answer.done():
                    raise
                raise DeadlineError(f"{what}: request {server} has no answer after {timeout_s:g} s") from error


def _bytes(flat: Array, cut: Cut, piece: int) -> Array:
    start, stop = cut.span(piece)
    return flat[start:stop].view(np.uint8)


def _gather(outcomes: list[Answered], remote: _Remote) -> _Pulled:
    parts: Parts = []
    versions, staleness = [], []
    for outcome in outcomes:
        reply, piece = outcome.reply, outcome.request.channel[1]  # type: ignore[index]
        assert isinstance(reply, Value) and isinstance(outcome.payload, list)
        parts.append((remote.cut.span(piece)[0], np.frombuffer(outcome.payload[0], remote.dtype)))
        versions.append(reply.version)
        staleness.append(reply.staleness)
    return _Pulled(parts, min(versions), max(staleness))
