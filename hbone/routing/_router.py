"""`route_outbound` for those who ask it thousands of times a second.

What does not change from one connection to the next is worked out once for each snapshot and kept in the snapshot's
memo, so that it is gone when the snapshot is. Clients that no decision can tell apart (same namespace, network, node,
cluster and locality) share it. What is left for a connection is two look-ups and a draw.

A mesh changes often and little. The one thing that takes long, to go through all endpoints of a service, is not done
again for a new snapshot in which they are the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

from hbone.routing._balance import KeptCandidates
from hbone.routing._outbound import Asking, Fork, plan_outbound

if TYPE_CHECKING:
    from collections.abc import Callable

    from hbone.address import Authority, IPAddress
    from hbone.mesh import Locality, MeshSnapshot, Workload
    from hbone.routing._outbound import Plan
    from hbone.routing._values import NoOutboundRoute, OutboundRoute, RoutingConfig

__all__ = ["Router"]

_MAX_PLANS: Final = 16_384
"""Plans kept of one snapshot: whoever connects to all ports of all addresses gets no more of our memory than this."""
_MAX_BRANCHES: Final = 1_000_000
"""Branches of all forks of these plans, with the candidates behind them: some 100 bytes each."""

_Likeness: TypeAlias = "tuple[str, str, str, str, Locality]"


@dataclass(slots=True)
class _Kept:
    """What is kept for clients that are alike."""

    plans: dict[Authority, Plan] = field(default_factory=dict)
    candidates: KeptCandidates = field(default_factory=KeptCandidates)


@dataclass(slots=True)
class _Memory:
    """What is kept of one snapshot."""

    by_uid: dict[str, tuple[Workload, _Kept]] = field(default_factory=dict)
    by_likeness: dict[_Likeness, _Kept] = field(default_factory=dict)
    plans: int = 0
    branches: int = 0

    def forget(self) -> None:
        for kept in self.by_likeness.values():
            kept.plans.clear()
            kept.candidates.clear()
        self.plans = self.branches = 0


class Router:
    """Decides where connections go, and remembers what it can.

    To be used by one thread.

    Args:
        config: what the node knows besides the mesh.
        random: draws a number from 0 up to 1, evenly.
    """

    def __init__(self, config: RoutingConfig, random: Callable[[], float]) -> None:
        self.config = config
        self._random = random
        self._latest: dict[_Likeness, KeptCandidates] = {}
        """Of the snapshot that was asked about last."""

    def outbound(
        self, snapshot: MeshSnapshot, source: Workload, source_ip: IPAddress | None, target: Authority
    ) -> OutboundRoute | NoOutboundRoute:
        """What `route_outbound` answers. The same route is the same object while the snapshot is the same."""
        memory = snapshot.memo.get(self)
        if not isinstance(memory, _Memory):
            memory = snapshot.memo[self] = self._memory(snapshot)
        known = memory.by_uid.get(source.uid)
        kept = known[1] if known is not None and known[0] is source else self._kept(memory, source)
        plan = kept.plans.get(target)
        if plan is None:
            plan = self._plan(memory, kept, snapshot, source, target)
        while isinstance(plan, Fork):
            index = plan.choose(source, source_ip, self._random)
            behind = plan.branches[index]
            if behind is None:
                asking = Asking(snapshot=snapshot, config=self.config, source=source, kept=kept.candidates)
                behind = plan.branch(asking, index)
            plan = behind
        return plan

    def _memory(self, snapshot: MeshSnapshot) -> _Memory:
        memory = _Memory()
        for likeness, candidates in self._latest.items():
            still_true = candidates.still_true(snapshot)
            if len(still_true):
                memory.by_likeness[likeness] = _Kept(candidates=still_true)
        self._latest = {likeness: kept.candidates for likeness, kept in memory.by_likeness.items()}
        return memory

    def _kept(self, memory: _Memory, source: Workload) -> _Kept:
        likeness = (source.namespace, source.network, source.node, source.cluster_id, source.locality)
        kept = memory.by_likeness.get(likeness)
        if kept is None:
            kept = memory.by_likeness[likeness] = _Kept()
            self._latest[likeness] = kept.candidates
        memory.by_uid[source.uid] = (source, kept)
        return kept

    def _plan(self, memory: _Memory, kept: _Kept, snapshot: MeshSnapshot, source: Workload, target: Authority) -> Plan:
        if memory.plans >= _MAX_PLANS or memory.branches >= _MAX_BRANCHES:
            memory.forget()
        asking = Asking(snapshot=snapshot, config=self.config, source=source, kept=kept.candidates)
        plan = kept.plans[target] = plan_outbound(asking, target)
        memory.plans += 1
        memory.branches += len(plan) if isinstance(plan, Fork) else 0
        return plan
