"""Decisions, spoken: every route that a connection can get, how likely, and step by step why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from hbone.routing._inbound import route_inbound
from hbone.routing._outbound import Asking, Fork, in_words, plan_outbound
from hbone.routing._values import NoInboundRoute

if TYPE_CHECKING:
    from hbone.address import Authority, Endpoint, IPAddress
    from hbone.mesh import MeshSnapshot, Workload
    from hbone.routing._outbound import Plan
    from hbone.routing._values import InboundRoute, NoOutboundRoute, OutboundRoute, RoutingConfig

__all__ = ["InboundExplanation", "OutboundExplanation", "explain_inbound", "explain_outbound"]

_Outcome: TypeAlias = "tuple[float, OutboundRoute | NoOutboundRoute]"


@dataclass(frozen=True, slots=True, kw_only=True)
class OutboundExplanation:
    """Where a connection goes, or can go, and why."""

    steps: tuple[str, ...]
    """One fact a line. Where something is drawn, they follow the likeliest way."""
    outcome: OutboundRoute | NoOutboundRoute
    """The end of `steps`."""
    outcomes: tuple[tuple[float, OutboundRoute | NoOutboundRoute], ...]
    """Every way that it can go with its share of the connections, the likeliest first."""
    omitted: float = 0.0
    """The share of further ways, when there are too many to list."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InboundExplanation:
    """Where a tunnel ends at a workload, and why."""

    steps: tuple[str, ...]
    """One fact a line."""
    outcome: InboundRoute | NoInboundRoute


def explain_outbound(
    snapshot: MeshSnapshot,
    config: RoutingConfig,
    *,
    source: Workload,
    source_ip: IPAddress | None,
    target: Authority,
    limit: int = 100,
) -> OutboundExplanation:
    """`route_outbound`, with all that it can answer and its reasons.

    Args:
        snapshot: the mesh.
        config: what the node knows besides.
        source: the local workload that connects.
        source_ip: the address that it connects from.
        target: where it wants to go.
        limit: how many outcomes to list.
    """
    quiet = Asking(snapshot=snapshot, config=config, source=source)
    found: list[_Outcome] = []
    omitted = _collect(quiet, source_ip, plan_outbound(quiet, target), 1.0, found, limit)
    found.sort(key=lambda each: -each[0])

    steps: list[str] = []
    asking = Asking(snapshot=snapshot, config=config, source=source, note=steps.append)
    plan = plan_outbound(asking, target)
    while isinstance(plan, Fork):
        shares = plan.shares(asking.source, source_ip)
        index = shares.index(max(shares))
        plan.tell(asking, source_ip, index, steps.append)
        plan = plan.branch(asking, index)
    steps.append(in_words(plan))
    return OutboundExplanation(steps=tuple(steps), outcome=plan, outcomes=tuple(found), omitted=omitted)


def _collect(
    asking: Asking, source_ip: IPAddress | None, plan: Plan, share: float, found: list[_Outcome], limit: int
) -> float:
    """Add what a plan can end in; returns the share of what there was no room for."""
    if isinstance(plan, Fork):
        return sum(
            share * each
            if len(found) >= limit
            else _collect(asking, source_ip, plan.branch(asking, index), share * each, found, limit)
            for index, each in enumerate(plan.shares(asking.source, source_ip))
            if each
        )
    for index, (known_share, known) in enumerate(found):
        if known == plan:
            found[index] = (known_share + share, known)
            return 0.0
    found.append((share, plan))
    return 0.0


def explain_inbound(
    snapshot: MeshSnapshot,
    config: RoutingConfig,
    *,
    workload: Workload,
    dialled: Endpoint,
    authority: Authority,
    forwarded_host: str | None = None,
) -> InboundExplanation:
    """`route_inbound` with its reasons; the arguments are the same."""
    steps: list[str] = []
    outcome = route_inbound(
        snapshot,
        config,
        workload=workload,
        dialled=dialled,
        authority=authority,
        forwarded_host=forwarded_host,
        note=steps.append,
    )
    if isinstance(outcome, NoInboundRoute):
        steps.append(f"refused with status {outcome.status}: {outcome.reason}")
    return InboundExplanation(steps=tuple(steps), outcome=outcome)
