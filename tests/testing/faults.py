"""How the faults of a plan are done to a simulated cluster, and when the next may come.

Servers may fail when every shard is in step on all the servers that it is to be on, and what happened before is over:
no more holders of a piece fail at once than the cluster is made to bear. Everything else may happen at any time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from kvstore.protocol.placement import Placing
from kvstore.testing import Cluster
from tests.testing.plans import FAULTS_S, Fault, Plan

LOOK_S = 0.05  # how often it is looked whether the next fault may come
NOTICED_S = 5.0  # until the scheduler knows of a fault, or of none
RETURNED_S = 15.0  # until a scheduler that was away knows who is there
STEPPED_BACK_S = 15.0  # so long after it was paused or cut off a server that lost its place has stepped back


class Faults:
    """The faults of one run.

    Args:
        start: starts a worker, again or for the first time.
    """

    def __init__(self, cluster: Cluster, plan: Plan, start: Callable[[int], None]) -> None:
        self.done: Counter[str] = Counter()
        self._cluster = cluster
        self._plan = plan
        self._start = start
        self._calm_at = 0.0  # nothing is wrong with any server from here on
        self._leaving: set[int] = set()  # servers that have been told to end

    def begin(self) -> None:
        """From here on things happen."""
        for fault in self._plan.faults:
            self._cluster.at(fault.at, lambda fault=fault: self._come(fault))  # type: ignore[misc]
        self._cluster.at(FAULTS_S, self._cluster.kind)

    @property
    def placing(self) -> Placing:
        """Which server has what, as the scheduler knows it."""
        placing: Placing = self._cluster.daemon("scheduler").membership.placing
        return placing

    def _come(self, fault: Fault) -> None:
        """Its time has come; does it happen?"""
        cluster = self._cluster
        if cluster.now > FAULTS_S:
            return
        if not self._may(fault):
            cluster.at(cluster.now + LOOK_S, lambda: self._come(fault))
            return
        for one in fault.each:
            if one.kind == "join" or all(cluster.alive(*member) for member in (one.who, *one.others)):
                self.done[f"{one.kind} of a {one.role}"] += 1
                getattr(self, f"_{one.kind}")(one)

    def _may(self, fault: Fault) -> bool:
        cluster = self._cluster
        if not self._plan.replication and fault.role == "server":
            return True
        if not cluster.alive("scheduler") or not cluster.daemon("scheduler").membership.started:
            return False
        if not fault.deadly:
            return True
        if fault.role == "scheduler":
            self._calm_at = max(self._calm_at, cluster.now + fault.seconds + RETURNED_S)
            return True
        calm = all(self.placing.settled(number) for number in range(self._plan.servers))
        if not calm or self._leaving or cluster.now < self._calm_at:
            return False
        self._calm_at = cluster.now + max(NOTICED_S, fault.seconds)
        return True

    def _later(self, seconds: float, what: Callable[[], None]) -> None:
        if seconds < float("inf"):
            self._cluster.at(self._cluster.now + seconds, what)

    def _crash(self, fault: Fault) -> None:
        self._cluster.crash(*fault.who)
        self._later(fault.seconds, lambda: self._restart(fault))

    def _drain(self, fault: Fault) -> None:
        self._cluster.drain(fault.rank)
        self._leaving.add(fault.rank)
        self._later(fault.seconds, lambda: self._begin_again(fault))

    def _join(self, fault: Fault) -> None:
        self._start(fault.rank)

    def _restart(self, fault: Fault) -> None:
        if fault.role == "worker":
            self._start(fault.rank)
            return
        if fault.role == "scheduler":
            self._cluster.restart("scheduler")
            return
        self._calm_at = max(self._calm_at, self._cluster.now + NOTICED_S)
        if self._cluster.alive(*fault.who):  # it lives, but its place is gone
            self._cluster.crash(*fault.who)
        self._cluster.restart(*fault.who)

    def _pause(self, fault: Fault) -> None:
        self._cluster.pause(*fault.who)
        self._later(fault.seconds, lambda: self._resume(fault))

    def _resume(self, fault: Fault) -> None:
        if self._cluster.alive(*fault.who):
            self._cluster.resume(*fault.who)
            self._look_after(fault)

    def _cut(self, fault: Fault) -> None:
        self._cluster.partition([fault.who], fault.others)
        self._later(fault.seconds, lambda: self._mend(fault))

    def _mend(self, fault: Fault) -> None:
        self._cluster.heal([fault.who], fault.others)
        self._look_after(fault)

    def _look_after(self, fault: Fault) -> None:
        if fault.deadly and fault.role == "server":
            self._later(STEPPED_BACK_S, lambda: self._begin_again(fault))

    def _begin_again(self, fault: Fault) -> None:
        """A server that lost its place has stepped back by now; its supervisor starts it again.

        Not while another is down: to take its shards back it becomes their replica, in the place of another.
        """
        cluster = self._cluster
        if cluster.now < self._calm_at or not cluster.alive("scheduler"):
            self._later(LOOK_S, lambda: self._begin_again(fault))
        elif fault.rank not in self.placing.servers:
            self._leaving.discard(fault.rank)
            self._restart(fault)
        elif fault.rank in self._leaving:
            self._later(LOOK_S, lambda: self._begin_again(fault))
