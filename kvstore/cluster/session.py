"""A process's conversations with the scheduler and the servers: sockets around :class:`Requesting`.

Workers use it to reach everybody, servers to register. Requests may be submitted from any thread;
their ``on_outcome`` runs in the session's loop, on its own thread or one that waits, and must be quick.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

from kvstore.cluster.address import reachable
from kvstore.cluster.near import Neighbourhood
from kvstore.errors import (
    AuthenticationError,
    ClosedError,
    DeadlineError,
    FencedError,
    KVStoreError,
    ProtocolError,
    ServerLostError,
    UnreachableError,
)
from kvstore.protocol.messages import (
    NOBODY,
    PRIORITY_MAX,
    Admit,
    Departed,
    Done,
    Enter,
    Explain,
    Explanation,
    Fetch,
    Freeze,
    Frozen,
    Halt,
    Joined,
    Leave,
    Meet,
    Message,
    Met,
    Placement,
    Push,
    ReadPlacement,
    Register,
    Roster,
)
from kvstore.protocol.pieces import Key
from kvstore.protocol.requesting import CREDIT_FREE_BYTES, Answered, Divide, Outcome, Refused, Request, Requesting
from kvstore.protocol.wire import Sender, decode, envelope, paired
from kvstore.transport.network import HEARTBEAT_S, Frames, Link, Network
from kvstore.transport.zeromq import NETWORK

log = logging.getLogger(__name__)

SCHEDULER = -1  # its number among the servers
BATCH_BYTES = 256 << 10  # small messages to one server travel together up to this size
MEET_S = 10.0  # how long a server may take to say whether it is on this host
MEET_AGAIN_S = 1.0  # the same while a round waits
IDS_PER_LIFE = 1 << 32
EXPLAIN_S = 2.0  # how long a deadline's error may wait for the answer to "why"

OnOutcome = Callable[[Outcome | Divide], None]


class Session:
    """One member's conversations.

    An ``on_outcome`` that is told Divide has to submit other requests instead.

    Args:
        address: the scheduler's.
        role: ``worker`` or ``server``; ``observer`` registers nowhere.
        on_change: called on the session's thread for every member that is gone, and every worker that joined.
        on_placement: called there whenever shards have changed their servers. A worker needs none: it follows them.
        neighbourhood: this process's memory that others on its host may read.
        network: how the others are reached.
        on_loss: a worker's policy for workers that are lost.
        heartbeat: seconds after which a scheduler that shows no life is taken for gone, and connected anew.
    """

    def __init__(
        self,
        address: str,
        role: str,
        on_change: Callable[[Departed | Joined], None] | None = None,
        on_placement: Callable[[Placement], None] | None = None,
        neighbourhood: Neighbourhood | None = None,
        *,
        network: Network = NETWORK,
        on_loss: str = "",
        heartbeat: float = HEARTBEAT_S,
    ) -> None:
        self.address = reachable(address)
        self.role = role
        self.sender = Sender(0, 0, NOBODY, NOBODY)
        self.num_workers = 0  # that the cluster was started with
        self.workers: set[int] = set()  # who takes part now
        self.lost_workers: set[int] = set()
        self._lives: dict[int, int] = {}  # of workers that have joined since
        self.joins = False  # new to a running job: `join` is to be called
        self.came_later = False  # to a running job, new or back
        self.servers: tuple[str, ...] = ()
        self.departed: list[Departed] = []  # servers
        self.neighbourhood = neighbourhood or Neighbourhood(0)
        self.near: set[int] = set()  # servers whose memory can be mapped here, and the other way round
        self._on_change = on_change
        self._on_placement = on_placement
        self._placed = 0  # the epoch of the placement
        self._leaving = False
        self._meeting: dict[int, int] = {}  # shards that have moved, while it is found out whether they are near
        self._strange: set[int] = set()  # those that turned out to be far
        self._on_loss = on_loss
        self._heartbeat_s = heartbeat
        self._own_address = ""
        self._token = secrets.randbits(62)
        self.on_halt: Callable[[Halt], None] | None = None  # called in the loop
        self._requests = Requesting()
        self._unanswered: dict[int, tuple[Request, OnOutcome]] = {}
        self._connections: dict[int, Link] = {}
        self._heard_at: dict[int, float] = {}
        self._ids = 0
        self._lock = threading.Lock()
        self._inbox: list[tuple[Request, bool]] = []
        self._announced = False  # the loop will look into it
        self._gathering: dict[int, tuple[int, int]] = {}  # threads that do: up to how many bytes, and what they have
        self._closed: KVStoreError | None = None
        self._network = network
        self._reactor = network.loop(f"kvstore-{role}", self._tick, lambda: bool(self._requests.open))
        try:
            self._connections[SCHEDULER] = self._connect_scheduler()
        except KVStoreError:
            self._reactor.abandon()
            raise
        self._reactor.start()

    def __repr__(self) -> str:
        return f"<Session {self.role} {self.sender.rank} at {self.address}: {self._requests}>"

    def register(self, rank: int, own_address: str, connect_timeout: float, timeout: float) -> None:
        """Join the cluster; returns when all its workers and servers have.

        Raises:
            UnreachableError: no scheduler answered within ``connect_timeout`` seconds.
            DeadlineError: the cluster was not complete within ``timeout`` seconds.
            AuthenticationError: the scheduler and this process do not accept each other's keys.
            PeerError: the scheduler refused.
        """
        self._own_address = own_address
        hello = self.ask(SCHEDULER, lambda i: Explain(i, 0))
        joined = self.ask(SCHEDULER, lambda i: self._registration(i, rank, 0))
        try:
            hello.result(connect_timeout)
        except TimeoutError as error:
            raise self.no_answer(connect_timeout) from error
        try:
            roster = joined.result(timeout)
        except TimeoutError as error:
            why = self.explain(SCHEDULER, 0)
            raise DeadlineError(
                f"joining the cluster at {self.address}: not complete after {timeout:g} s; {why}"
            ) from error
        assert isinstance(roster, Roster)
        self.num_workers, self.servers = roster.num_workers, self.servers or roster.servers
        self.joins = roster.joins
        self.came_later = roster.joins or roster.incarnation > 1

    def no_answer(self, waited_s: float) -> UnreachableError:
        """The scheduler has said nothing for so long, and why that may be."""
        said = f"scheduler at {self.address}: expected an answer within {waited_s:g} s, none came"
        suspicion = self._connections[SCHEDULER].suspicion
        return AuthenticationError(f"{said}: {suspicion}") if suspicion else UnreachableError(said)

    def _registration(self, request_id: int, rank: int, incarnation: int) -> Register:
        host, pid = socket.gethostname(), os.getpid()
        return Register(
            request_id, self.role, rank, self._own_address, host, pid, self._token, incarnation, self._on_loss
        )

    def join(self, timeout_s: float) -> None:
        """Enter a running job: take part in every key from one round after the largest that anybody has begun.

        Raises:
            DeadlineError: a server did not answer within ``timeout_s`` seconds.
        """
        servers = range(len(self.servers))
        frozen = self.ask_each(servers, Freeze, timeout_s, "joining")
        rounds: dict[Key, int] = {}
        for answer in frozen:
            assert isinstance(answer, Frozen)
            for key, round in answer.rounds.items():
                rounds[key] = max(rounds.get(key, 0), round)
        self.ask_each(servers, lambda i: Admit(i, rounds), timeout_s, "joining")
        self.ask_each([SCHEDULER], Enter, timeout_s, "joining")
        self.joins = False
        self.workers.add(self.sender.rank)

    def ask_each(self, whom: Sequence[int], make: Callable[[int], Message], timeout_s: float, what: str) -> list[Any]:
        """The same question to each of these; their answers, as :meth:`answers` gives them."""
        return self.answers([(server, self.ask(server, make)) for server in whom], timeout_s, what)

    def answers(self, asked: Iterable[tuple[int, Future[Any]]], timeout_s: float, what: str) -> list[Any]:
        """What these servers have answered, in their order.

        Raises:
            DeadlineError: one did not within ``timeout_s`` seconds; says why.
            KVStoreError: what one has refused.
        """
        answers = []
        for server, answer in asked:
            try:
                answers.append(answer.result(timeout_s))
            except TimeoutError as error:
                if answer.done():
                    raise
                why = self.explain(server, 0)
                raise DeadlineError(f"{what}: no answer after {timeout_s:g} s; {why}") from error
        return answers

    def connect_servers(self) -> None:
        """Connect to all servers of the roster."""

        def connect() -> None:
            for number in range(len(self.servers)):
                self._connect(number)

        self._reactor.call(connect)
        self._meet_servers()

    def _connect(self, number: int) -> None:
        old = self._connections.get(number)
        if old is not None:
            old.close()
        self._connections[number] = self._network.connect(
            self._reactor, self.servers[number], lambda frames: self._receive(number, frames)
        )

    def _meet_servers(self) -> None:
        """Find out which servers are on this host."""
        probe = self.neighbourhood.probe()
        if probe is None:
            return
        asked = [self.ask(server, lambda i: Meet(i, probe)) for server in range(len(self.servers))]
        for server, answer in enumerate(asked):
            with contextlib.suppress(KVStoreError, TimeoutError):
                met = answer.result(MEET_S)
                if isinstance(met, Met) and self.neighbourhood.reaches(server, met.probe):
                    self.near.add(server)
                    self._reactor.call(partial(self._connections[server].shorten, met.line))

    def future(self) -> Future[Any]:
        """A future that answers will settle."""
        one: Future[Any] = self._reactor.future()
        return one

    def drive(self, awaited: Future[Any], timeout_s: float) -> bool:
        """While this thread waits for ``awaited``, let it work the sockets, if no other does; has it waited?"""
        waited: bool = self._reactor.drive(awaited, timeout_s)
        return waited

    @property
    def may_wait(self) -> bool:
        """May the calling thread wait for an answer, or does it work in the loop that would bring it?"""
        return not self._reactor.is_here

    def next_id(self) -> int:
        """A fresh request id."""
        with self._lock:
            self._ids += 1
            return self._ids

    def submit(
        self, requests: Sequence[tuple[Request, OnOutcome]], *, pulls_first: bool = False, nbytes: int | None = None
    ) -> None:
        """Send these when their turn comes. Thread-safe.

        Args:
            nbytes: of their payloads; they need not be sent at once, see :meth:`gathering`.

        Raises:
            ClosedError or the error that ended the session.
        """
        with self._lock:
            if self._closed is not None:
                raise self._closed
            for request, on_outcome in requests:
                self._unanswered[request.request_id] = request, on_outcome
                self._inbox.append((request, pulls_first))
                request.taken = True
            if nbytes is not None and self._gathering and self._gathers(nbytes):
                return
            announced, self._announced = self._announced, True
        if not announced:
            self._reactor.post(self._take_inbox)

    @contextlib.contextmanager
    def gathering(self, nbytes: int) -> Iterator[None]:
        """What this thread submits meanwhile is sent together, whenever there are so many bytes.

        For each time the loop's thread is woken it may take the core from this one.
        """
        me = threading.get_ident()
        with self._lock:
            self._gathering[me] = nbytes, 0
        try:
            yield
        finally:
            with self._lock:
                del self._gathering[me]
                announced, self._announced = self._announced, True
            if not announced:
                self._reactor.post(self._take_inbox)

    def _gathers(self, nbytes: int) -> bool:
        """Does the calling thread wait for more than these bytes? With the lock held."""
        me = threading.get_ident()
        limit, gathered = self._gathering.get(me, (0, 0))
        gathered += nbytes
        if gathered < limit:
            self._gathering[me] = limit, gathered
            return True
        if limit:
            self._gathering[me] = limit, 0
        return False

    def divide(self, channel: Hashable, patience_s: float) -> None:
        """After so many seconds, withdraw the requests of a channel that are still open, to be divided."""

        def divide() -> None:
            self._settle(self._requests.divide(channel))

        self._reactor.post(lambda: self._reactor.call_later(patience_s, divide))

    def forget(self, channel: Hashable) -> None:
        """Nothing more will be submitted to this channel, which was divided perhaps."""
        self._reactor.post(lambda: self._requests.forget(channel))

    def ask(
        self, server: int, make: Callable[[int], Message], payload: object = None, *, whole: bool = False
    ) -> Future[Any]:
        """One request outside any channel; the future's result is the reply, with its payload if ``whole``."""
        answer = self.future()

        def settle(outcome: Outcome | Divide) -> None:
            if isinstance(outcome, Answered):
                answer.set_result(outcome if whole else outcome.reply)
            elif isinstance(outcome, Refused):
                answer.set_exception(outcome.error)

        self.submit([(Request(server, make(self.next_id()), payload), settle)])
        return answer

    def explain(self, server: int, about: int) -> str:
        """Ask ``server`` why the request ``about`` has no answer yet."""
        where = "the scheduler" if server == SCHEDULER else f"server {server} at {self.servers[server]}"
        try:
            reply = self.ask(server, lambda i: Explain(i, about)).result(EXPLAIN_S)
        except (TimeoutError, KVStoreError):
            heard = self._heard_at.get(server)
            ago = "never heard of" if heard is None else f"last heard {self._reactor.now() - heard:.1f} s ago"
            return f"{where} does not answer ({ago})"
        return reply.text if isinstance(reply, Explanation) else str(reply)

    def leave(self) -> None:
        """Tell the scheduler that this member leaves in order, then :meth:`close`."""
        self._leaving = True
        with contextlib.suppress(KVStoreError, TimeoutError):
            self.ask(SCHEDULER, lambda i: Leave(i, "")).result(1.0)
        self.close()

    def close(self, linger_s: float = 1.0) -> None:
        """End the conversations; what is open fails."""
        self._fail_all(ClosedError("the store is closed"))
        self._reactor.stop(linger_s)
        self.neighbourhood.close()

    # --- within the reactor's loop ----------------------------------------------------------------

    def _connect_scheduler(self) -> Link:
        """A connection that is replaced when it ends, so that Register is the first thing that the next one brings."""
        line: Link = self._network.connect(
            self._reactor,
            self.address,
            lambda frames: self._receive(SCHEDULER, frames),
            lambda: self._reactor.post(lambda: self._reconnect(line)),
            self._heartbeat_s,
        )
        return line

    def _reconnect(self, ended: Link) -> None:
        if self._connections[SCHEDULER] is not ended or self._closed is not None:
            return
        ended.close()
        self._connections[SCHEDULER] = self._connect_scheduler()
        if self.sender.incarnation != NOBODY:  # and so it is a member, which that connection must be told first
            registration = self._registration(self.next_id(), self.sender.rank, self.sender.incarnation)
            again = Request(SCHEDULER, registration, priority=PRIORITY_MAX)
            with self._lock:
                self._unanswered[again.request_id] = again, self._renewed
            self._requests.submit(again)
        self._requests.resend(SCHEDULER)
        self._pump()

    def _renewed(self, outcome: Outcome | Divide) -> None:
        """The scheduler's answer to a member that is back."""
        if isinstance(outcome, Refused):
            if isinstance(outcome.error, FencedError):
                self._fail_all(outcome.error)
            elif self._closed is None:
                log.warning("%r: the scheduler does not take it back: %s", self, outcome.error)
        else:
            self._requests.resend(SCHEDULER)  # it knows now whose they are

    def _take_inbox(self) -> None:
        with self._lock:
            inbox, self._inbox = self._inbox, []
            self._announced = False
        for request, pulls_first in inbox:
            gone = self._server_gone(request.server)
            if request.server in self._strange:
                self._send_frames(request)
            if gone is not None:
                self._settle(Refused(request, gone))
            else:
                divided = self._requests.submit(request, pulls_first=pulls_first)
                if divided is not None:
                    self._settle(divided)
        self._pump()

    def _pump(self) -> None:
        now, stirred = self._reactor.now(), self._requests.stirred
        while stirred:
            server = stirred.pop()
            if server in self._meeting:
                continue
            connection = self._connections[server]
            batch: list[tuple[Message, Sequence[Any]]] = []
            size = 0
            for message, payload in self._requests.outgoing(server, now):
                frames = () if payload is None else payload if isinstance(payload, tuple) else (payload,)
                nbytes = sum([memoryview(frame).nbytes for frame in frames])
                if batch and (size + nbytes > BATCH_BYTES or len(batch) >= 4096):
                    connection.send(envelope(self.sender, batch))
                    batch, size = [], 0
                batch.append((message, frames))
                size += nbytes + 64
            if batch:
                connection.send(envelope(self.sender, batch))

    def _receive(self, server: int, frames: Frames) -> None:
        try:
            sender, messages = decode(frames[0], len(frames) - 1)
        except ProtocolError as error:
            who = "scheduler" if server == SCHEDULER else f"server {server}"
            failure = type(error)(f"{who} at {self._connections[server].address}: {error}")
            for outcome in self._requests.abandon(server, failure):
                self._settle(outcome)
            return
        self._heard_at[server] = self._reactor.now()
        if server == SCHEDULER and self.sender.cluster in (0, sender.cluster):
            self.sender = Sender(sender.cluster, sender.epoch, self.sender.rank, self.sender.incarnation)
        for message, payload in paired(messages, frames):
            if isinstance(message, Departed):
                self._take_departed(message)
                continue
            if isinstance(message, Joined):
                self._lives[message.rank] = message.incarnation
                self.workers.add(message.rank)
                self.lost_workers.discard(message.rank)
                if self._on_change is not None:
                    self._on_change(message)
                continue
            if isinstance(message, Placement):
                self._take_placement(message)  # which may also be the answer to a question
            if isinstance(message, Met) and self._meeting.get(server) == message.request_id:
                near = self.neighbourhood.reaches(server, message.probe)
                if near:
                    self._connections[server].shorten(message.line)
                self._moved(server, near)
                continue
            if isinstance(message, Roster):  # a member from here on: should the connection end now, it says so
                self.sender = Sender(self.sender.cluster, self.sender.epoch, message.rank, message.incarnation)
                self.workers = set(message.workers)
                with self._lock:  # what a server still answers to an earlier life must not look like an answer to this
                    self._ids = max(self._ids, (message.incarnation - 1) * IDS_PER_LIFE)
            if isinstance(message, Halt):
                if self.on_halt is not None:
                    self.on_halt(message)
                continue
            if server == SCHEDULER and isinstance(message, Done) and self._is_behind(sender.epoch):
                self._ask_placement()
                continue  # it says so again
            concluded = self._requests.reply(message, payload)
            if concluded is not None:
                self._settle(concluded)
        self._pump()

    def _take_departed(self, message: Departed) -> None:
        if message.role == "worker":
            if message.incarnation < self._lives.get(message.rank, 0):
                return  # which is known
            if message.reason:
                self.lost_workers.add(message.rank)
            if message.on_loss == "continue" or not message.reason:
                self.workers.discard(message.rank)
        elif message not in self.departed:
            self.departed.append(message)
            error = ServerLostError(f"server {message.rank} is gone: {message.reason or 'it was stopped'}")
            for outcome in self._requests.abandon(message.rank, error):
                self._settle(outcome)
        if self._on_change is not None:
            self._on_change(message)

    # --- shards that move -------------------------------------------------------------------------

    def _take_placement(self, message: Placement) -> None:
        """Some shards have other servers now: go on with those."""
        if message.epoch <= self._placed:
            return
        self._placed = message.epoch
        before, self.servers = self.servers, tuple([shard.address for shard in message.shards])
        if self._on_placement is not None:
            self._on_placement(message)
        for number, shard in enumerate(message.shards):
            if number in self._connections and shard.address and shard.address != before[number]:
                log.info("shard %d is now on server %d at %s", number, shard.primary, shard.address)
                self._connect(number)
                self._meet_again(number)
        self._pump()

    def _meet_again(self, number: int) -> None:
        """Before anything else is sent: may memory be shared with the new server?"""
        probe = self.neighbourhood.probe()
        if probe is None:
            self._moved(number, near=False)
            return
        meeting = self._meeting[number] = self.next_id()
        self._connections[number].send(envelope(self.sender, [(Meet(meeting, probe), ())]))

        def give_up() -> None:
            if self._meeting.get(number) == meeting:
                self._moved(number, near=False)

        self._reactor.call_later(MEET_AGAIN_S, give_up)

    def _moved(self, number: int, near: bool) -> None:
        """Everything that is open is sent again, in a form that the new server can read."""
        self._meeting.pop(number, None)
        if near:
            self.near.add(number)
            self._strange.discard(number)
        else:
            self.near.discard(number)
            self._strange.add(number)
            self._requests.change(number, self._send_frames)
        self._requests.restart(number)
        self._requests.stirred.add(number)
        self._pump()

    @staticmethod
    def _send_frames(request: Request) -> None:
        """Its server does not see this process's memory."""
        message = request.message
        if isinstance(message, Fetch) and message.near:
            request.message = replace(message, near=False)
        elif isinstance(message, Push) and (message.near or message.place is not None):
            request.nbytes = memoryview(request.payload).nbytes  # type: ignore[arg-type]
            acknowledge = request.nbytes > CREDIT_FREE_BYTES
            request.message = replace(message, near=False, place=None, acknowledge=acknowledge)

    def _server_gone(self, server: int) -> KVStoreError | None:
        """Why there is no sense in asking this server."""
        connection = self._connections.get(server)
        if connection is not None and connection.refused:
            name = "scheduler" if server == SCHEDULER else f"server {server}"
            return AuthenticationError(f"{name} at {connection.address}: {connection.refused}")
        for gone in self.departed:
            if gone.rank == server:
                return ServerLostError(f"server {server} is gone: {gone.reason or 'it was stopped'}")
        return None

    def _settle(self, outcome: Outcome | Divide) -> None:
        if isinstance(outcome, Divide) and len(outcome.requests) != 1:
            for request in outcome.requests:
                self._settle(Divide((request,)))
            return
        request = outcome.requests[0] if isinstance(outcome, Divide) else outcome.request
        with self._lock:
            asked = self._unanswered.pop(request.request_id, None)
        if asked is not None:
            self._tell(asked[1], outcome)

    def _tell(self, on_outcome: OnOutcome, outcome: Outcome | Divide) -> None:
        try:
            on_outcome(outcome)
        except Exception:
            log.exception("%r: a completion failed", self)

    def _tick(self, now: float) -> None:
        for server, connection in self._connections.items():
            if connection.refused and (error := self._server_gone(server)) is not None:
                for outcome in self._requests.abandon(server, error):
                    self._settle(outcome)
        registered = self.sender.incarnation != NOBODY
        if self._requests.tick(now) and registered:  # perhaps its server is another, and we were not told
            self._ask_placement()
        self._pump()

    def _is_behind(self, epoch: int) -> bool:
        """May a barrier have opened after commits on servers that are not known here? Who leaves need not know them."""
        return 0 < self._placed < epoch and not self._leaving

    def _ask_placement(self) -> None:
        self._connections[SCHEDULER].send(envelope(self.sender, [(ReadPlacement(self.next_id()), ())]))

    def _fail_all(self, error: KVStoreError) -> None:
        with self._lock:
            if self._closed is not None:
                return
            self._closed = error
            unanswered = list(self._unanswered.values())
            self._unanswered.clear()
        for request, on_outcome in unanswered:
            self._tell(on_outcome, Refused(request, error))
