"""The decisions at all places that a connection passes, one after the other.

The client's node decides by `hbone.routing`. Then, for each way that a connection may take, the node before the next
hop decides, by routing again and by policy. It is a node that finds its workloads by address, as shared nodes do.

A waypoint goes on as itself: what it does is worked out as for any client, but that it does not send connections for
its own service to itself. A gateway passes the inner tunnel on as it is, so the far end sees who the client is, and
the gateway's address. Both choose as they like, so ways behind them have no shares.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from hbone.address import Authority, Endpoint
from hbone.explain._values import Arrival, ConnectionExplanation, Outcome, Way, identity_of
from hbone.mesh import NetworkAddress, TunnelProtocol
from hbone.protocol import Forwarded
from hbone.rbac import Flow, explain_verdict
from hbone.routing import (
    NoInboundRoute,
    NoOutboundRoute,
    OutboundProtocol,
    OutboundRoute,
    RouteType,
    destination_service,
    explain_inbound,
    explain_outbound,
)

if TYPE_CHECKING:
    from hbone.address import IPAddress
    from hbone.identity import SpiffeIdentity
    from hbone.mesh import MeshSnapshot, Service, Workload
    from hbone.routing import RoutingConfig

__all__ = ["explain_connection", "explain_plain_connection"]

#: Endpoints that are proposed instead of a service.
_PROPOSED: Final = 3


def explain_connection(
    snapshot: MeshSnapshot,
    config: RoutingConfig,
    *,
    source: Workload,
    source_ip: IPAddress,
    target: Authority,
    resolved: IPAddress | None = None,
    limit: int = 100,
) -> ConnectionExplanation:
    """What becomes of a connection that the node of its client carries.

    Args:
        snapshot: the mesh, as all nodes see it.
        config: what the client's node knows besides. Other nodes are taken to be in the network of their workloads,
            and otherwise alike.
        source: the client.
        source_ip: the address that it connects from.
        target: where it wants to go.
        resolved: what DNS would say, for a name that the mesh leaves to it; without it such a way ends there.
        limit: how many ways to look at.
    """
    asking = _Asking(snapshot=snapshot, config=config, resolved=resolved, limit=limit)
    return _carried(asking, source, source_ip, target)


def explain_plain_connection(
    snapshot: MeshSnapshot,
    config: RoutingConfig,
    *,
    source_ip: IPAddress,
    target: Authority,
    source: Workload | None = None,
    resolved: IPAddress | None = None,
) -> ConnectionExplanation:
    """What becomes of a connection in plain text, that only the node of its destination sees.

    Args:
        snapshot: the mesh.
        config: what that node knows besides.
        source_ip: the address that it comes from.
        target: where it goes: the address of a workload. Services are for nodes to translate, and it passes none.
        source: whose it is, if that is a workload of the mesh.
        resolved: what DNS would say, for a name.
    """
    steps = ["it comes in plain text, past the node of its client, and proves no identity"]
    ip = target.ip
    if ip is None and resolved is not None:
        steps.append(f"DNS says that {target.host} is {resolved}")
        ip = resolved
    way = _plain_way(snapshot, config, source_ip, target, ip)
    return ConnectionExplanation(
        source=source,
        source_ip=source_ip,
        target=target,
        network=config.network,
        plain=True,
        steps=tuple(steps),
        ways=(way,),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asking:
    """What all steps of an explanation need."""

    snapshot: MeshSnapshot
    config: RoutingConfig
    resolved: IPAddress | None
    limit: int
    behind_waypoint: bool = False
    """Whether a waypoint has sent it on: it is not followed through another one."""


# ------------------------------------------------------------------------------------------------- at the client's node


def _carried(asking: _Asking, source: Workload, source_ip: IPAddress, target: Authority) -> ConnectionExplanation:
    snapshot, config, limit = asking.snapshot, asking.config, asking.limit
    said = explain_outbound(snapshot, config, source=source, source_ip=source_ip, target=target, limit=limit)
    steps = list(said.steps)
    if asking.resolved is not None and _is_left_to_dns(said.outcome):
        # The node looks at the address again: it may be one of the mesh.
        steps.append(f"DNS says that {target.host} is {asking.resolved}")
        address = Endpoint(asking.resolved, target.port).authority
        said = explain_outbound(snapshot, config, source=source, source_ip=source_ip, target=address, limit=limit)
        steps += said.steps
    inner = replace(asking, limit=max(1, limit // max(1, len(said.outcomes))))
    return ConnectionExplanation(
        source=source,
        source_ip=source_ip,
        target=target,
        network=config.network,
        steps=tuple(steps),
        ways=tuple(_way(inner, source, source_ip, share, route) for share, route in said.outcomes),
        omitted=said.omitted,
    )


def _is_left_to_dns(route: OutboundRoute | NoOutboundRoute) -> bool:
    return (
        isinstance(route, OutboundRoute)
        and route.type is RouteType.PASSTHROUGH
        and isinstance(route.next_hop, Authority)
    )


def _way(
    asking: _Asking, source: Workload, source_ip: IPAddress, share: float | None, route: OutboundRoute | NoOutboundRoute
) -> Way:
    if isinstance(route, NoOutboundRoute):
        return Way(share=share, route=route)
    if asking.resolved is not None:
        route = route.resolved(asking.resolved)
    tunnelled = route.protocol is not OutboundProtocol.TCP
    identity = identity_of(source)
    if tunnelled and identity is None:
        reason = (
            f"{source.key} can have no certificate: its namespace, service account and trust domain make no SPIFFE id"
        )
        return Way(share=share, route=NoOutboundRoute(reason=reason))
    hop = route.next_hop
    if isinstance(hop, Authority):
        return Way(
            share=share, route=route, note=f"what becomes of it depends on the address that DNS has for {hop.host}"
        )
    seen = _seen(source, source_ip, hop.ip)
    if not tunnelled:
        network = asking.config.network if route.workload is None else route.workload.network
        arrival, note = _plain_arrival(asking.snapshot, asking.config, network, seen, hop)
        return Way(share=share, route=route, arrival=arrival, note=note)
    if route.type is RouteType.TO_GATEWAY:
        behind = _behind_gateway(asking, source, route, hop)
        note = "" if behind is not None else "who is behind the gateway is for the mesh over there to know"
        return Way(share=share, route=route, behind=behind, note=note)
    assert route.workload is not None
    assert identity is not None
    arrival, note = _arrival(asking, route, route.workload, hop, seen, identity)
    behind = None
    goes_on = route.type is RouteType.TO_SERVER_WAYPOINT and not asking.behind_waypoint
    if goes_on and (arrival is None or arrival.outcome is Outcome.THROUGH):
        behind = _behind_waypoint(asking, route, hop)
    return Way(share=share, route=route, arrival=arrival, behind=behind, note=note)


def _seen(source: Workload, source_ip: IPAddress, dialled: IPAddress) -> IPAddress:
    """The address that the far end sees: of the same family as its own."""
    if source_ip.version == dialled.version:
        return source_ip
    return next((each for each in source.addresses if each.version == dialled.version), source_ip)


# ----------------------------------------------------------------------------------------------------- at the far node


def _arrival(
    asking: _Asking,
    route: OutboundRoute,
    workload: Workload,
    dialled: Endpoint,
    source_ip: IPAddress,
    identity: SpiffeIdentity,
) -> tuple[Arrival | None, str]:
    """What the node before `workload` decides; or why there is no such node."""
    if workload.native_tunnel or workload.protocol is not TunnelProtocol.HBONE:
        return None, f"{workload.key} takes HBONE itself: no node stands before it"
    snapshot, network = asking.snapshot, workload.network
    steps = []
    owner = snapshot.workload_by_address(network, dialled.ip)
    if owner is None:
        steps.append(
            f"{dialled.ip} is its node's address: only a node that is dedicated to {workload.key} serves it there"
        )
        owner = workload
    elif owner is not workload:
        steps.append(f"{dialled.ip} is the address of several: its node takes it for that of {owner.key} ({owner.uid})")
    proved = identity_of(owner)
    arrival = Arrival(
        workload=owner,
        protocol=OutboundProtocol.HBONE,
        dialled=dialled,
        identity=proved,
        outcome=Outcome.THROUGH,
        reason="",
    )
    if proved not in route.expected:
        who = "can prove nothing" if proved is None else f"is {proved}"
        reason = f"wrong peer at {dialled}: {owner.key} {who}, expected {' or '.join(map(str, route.expected))}"
        return replace(arrival, steps=(*steps, reason), outcome=Outcome.WRONG_PEER, reason=reason), ""
    steps.append(f"the node of {owner.key} proves {proved}, which is expected")
    assert route.authority is not None
    said = explain_inbound(
        snapshot,
        replace(asking.config, network=network),
        workload=owner,
        dialled=dialled,
        authority=route.authority,
        forwarded_host=_forwarded_host(route.service),
    )
    arrival, inbound = replace(arrival, steps=(*steps, *said.steps)), said.outcome
    if isinstance(inbound, NoInboundRoute):
        outcome = Outcome.BAD_TARGET if inbound.status == 400 else Outcome.UNREACHABLE
        reason = f"refused with status {inbound.status} by the node of {owner.key}: {inbound.reason}"
        return replace(arrival, outcome=outcome, reason=reason), ""
    flow = Flow(
        source_ip=source_ip,
        source_identity=identity,
        destination_ip=inbound.rbac_destination.ip,
        destination_port=inbound.rbac_destination.port,
    )
    return _judged(snapshot, replace(arrival, upstream=inbound.upstream, service=inbound.service), flow), ""


def _plain_arrival(
    snapshot: MeshSnapshot, config: RoutingConfig, network: str, source_ip: IPAddress, dialled: Endpoint
) -> tuple[Arrival | None, str]:
    """What the node of whoever has an address decides about plain text; or why there is no such node."""
    owner = snapshot.workload_by_address(network, dialled.ip)
    if owner is None:
        return (
            None,
            f"{dialled.ip} is no address of a workload in the network {_quoted(network)}: no node stands before it",
        )
    steps = [f"{dialled.ip} is an address of {owner.key} ({owner.uid})", "the client has proved no identity"]
    if owner.protocol is not TunnelProtocol.HBONE:
        steps.append(f"{owner.key} does not speak HBONE: policy counts if a node captures its connections")
    arrival = Arrival(
        workload=owner,
        protocol=OutboundProtocol.TCP,
        dialled=dialled,
        steps=tuple(steps),
        outcome=Outcome.THROUGH,
        reason="",
    )
    if dialled.port in config.illegal_ports:
        reason = f"{dialled} is a port of the proxy itself: the connection would go in a circle"
        return replace(arrival, outcome=Outcome.UNREACHABLE, reason=reason), ""
    service = destination_service(snapshot, owner, dialled.port)
    flow = Flow(source_ip=source_ip, source_identity=None, destination_ip=dialled.ip, destination_port=dialled.port)
    return _judged(snapshot, replace(arrival, upstream=dialled, service=service), flow), ""


def _judged(snapshot: MeshSnapshot, arrival: Arrival, flow: Flow) -> Arrival:
    """With what policy says."""
    policy = explain_verdict(snapshot, arrival.workload, flow)
    if policy.verdict.allowed:
        return replace(arrival, flow=flow, policy=policy, reason=policy.verdict.reason)
    who = "plain text " if flow.source_identity is None else ""
    reason = f"{who}refused by policy at {arrival.workload.key}: {policy.verdict.reason}"
    return replace(arrival, flow=flow, policy=policy, outcome=Outcome.DENIED, reason=reason)


# ------------------------------------------------------------------------------------ behind a waypoint, or a gateway


def _behind_waypoint(asking: _Asking, route: OutboundRoute, hop: Endpoint) -> ConnectionExplanation:
    waypoint, target, service = route.workload, route.authority, route.service
    assert waypoint is not None
    assert target is not None
    config = replace(asking.config, network=waypoint.network)
    snapshot = asking.snapshot
    if service is not None:
        snapshot = snapshot.with_changes(upsert=[replace(service, waypoint=None, weighted_waypoints=())])
    inner = replace(asking, snapshot=snapshot, config=config, behind_waypoint=True)
    said = _carried(inner, waypoint, hop.ip, target)
    return replace(said, ways=tuple(replace(way, share=None) for way in said.ways))


def _behind_gateway(
    asking: _Asking, source: Workload, route: OutboundRoute, hop: Endpoint
) -> ConnectionExplanation | None:
    """The workloads behind a gateway that the client would accept; None when the mesh does not tell."""
    gateway, service, authority = route.workload, route.service, route.authority
    assert gateway is not None
    assert service is not None
    assert authority is not None
    identity = identity_of(source)
    assert identity is not None
    if service.waypoint is not None or service.weighted_waypoints:
        return None
    snapshot, network = asking.snapshot, ""
    ways = []
    for uid in sorted(snapshot.endpoints(service))[: asking.limit]:
        workload = snapshot.workloads.get(uid)
        if workload is None or not workload.addresses or not _leads_to(snapshot, workload, gateway):
            continue
        network = workload.network
        dialled = Endpoint(workload.addresses[0], asking.config.hbone_port)
        inner = replace(
            route,
            type=RouteType.DIRECT,
            protocol=OutboundProtocol.HBONE,
            next_hop=dialled,
            expected=route.inner_expected,
            inner_expected=(),
            workload=workload,
        )
        arrival, note = _arrival(asking, inner, workload, dialled, hop.ip, identity)
        ways.append(Way(share=None, route=inner, arrival=arrival, note=note))
    if not ways:
        return None
    return ConnectionExplanation(
        source=source,
        source_ip=hop.ip,
        target=authority,
        network=network,
        steps=(f"the gateway {gateway.key} passes the inner tunnel on to an endpoint of {service.key} over there",),
        ways=tuple(ways),
    )


def _leads_to(snapshot: MeshSnapshot, workload: Workload, gateway: Workload) -> bool:
    """Whether a workload is behind a gateway."""
    if workload.network_gateway is None:
        return False
    services: tuple[Service | None, ...]
    destination = workload.network_gateway.destination
    if isinstance(destination, NetworkAddress):
        if destination.network == gateway.network and destination.ip in gateway.addresses:
            return True
        services = snapshot.services_by_vip(destination.network, destination.ip)
    else:
        if snapshot.workload_by_hostname(destination.namespace, destination.hostname) is gateway:
            return True
        services = (snapshot.service(destination),)
    return any(service in services for service in snapshot.services_of(gateway))


# ---------------------------------------------------------------------------------------------------------- plain text


def _plain_way(
    snapshot: MeshSnapshot, config: RoutingConfig, source_ip: IPAddress, target: Authority, ip: IPAddress | None
) -> Way:
    services = snapshot.services_by_hostname(target.host) if ip is None else ()
    if ip is not None and snapshot.workload_by_address(config.network, ip) is None:
        services = snapshot.services_by_vip(config.network, ip)
    if services:
        service = services[0]
        proposed = ", ".join(_endpoints(snapshot, service, target.port))
        reason = f"{target.host} is the service {service.key}, and only nodes know its endpoints"
        return Way(
            share=1.0,
            route=NoOutboundRoute(reason=f"{reason}; ask for one of them: {proposed}" if proposed else reason),
        )
    hop = target if ip is None else Endpoint(ip, target.port)
    route = OutboundRoute(type=RouteType.PASSTHROUGH, protocol=OutboundProtocol.TCP, next_hop=hop)
    if isinstance(hop, Authority):
        return Way(
            share=1.0, route=route, note=f"what becomes of it depends on the address that DNS has for {hop.host}"
        )
    arrival, note = _plain_arrival(snapshot, config, config.network, source_ip, hop)
    return Way(share=1.0, route=route, arrival=arrival, note=note)


def _endpoints(snapshot: MeshSnapshot, service: Service, port: int) -> list[str]:
    """Some addresses behind a port of a service."""
    found = []
    for uid, endpoint in sorted(snapshot.endpoints(service).items()):
        workload = snapshot.workloads.get(uid)
        own = endpoint.ports.get(port) or service.ports.get(port)
        if workload is not None and workload.addresses and own:
            found.append(str(Endpoint(workload.addresses[0], own)))
    return found[:_PROPOSED]


# ------------------------------------------------------------------------------------------------------------- helpers


def _forwarded_host(service: Service | None) -> str | None:
    """What the far node is told of the service that was meant."""
    try:
        return None if service is None else Forwarded(host=service.hostname).host
    except ValueError:
        return None


def _quoted(name: str) -> str:
    return f'"{name}"'
