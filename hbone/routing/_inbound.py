"""Where a tunnel that reached a workload's proxy goes: to the workload, and nowhere else.

The target that a peer names is checked and gives the port; the address that is connected to is always the one that the
peer has dialled, or loopback. So a peer cannot use the proxy to get anywhere that it could not have dialled itself.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Final

from hbone.address import MAX_PORT, Endpoint
from hbone.mesh import ApplicationTunnelProtocol, NetworkAddress, Workload
from hbone.routing._values import InboundRoute, NoInboundRoute

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hbone.address import Authority, IPAddress
    from hbone.mesh import GatewayAddress, MeshSnapshot, Service
    from hbone.routing._values import Note, RoutingConfig

__all__ = ["destination_service", "route_inbound"]

_BAD_REQUEST: Final = 400
_UNAVAILABLE: Final = 503


def route_inbound(
    snapshot: MeshSnapshot,
    config: RoutingConfig,
    *,
    workload: Workload,
    dialled: Endpoint,
    authority: Authority,
    forwarded_host: str | None,
    note: Note | None = None,
) -> InboundRoute | NoInboundRoute:
    """Decide where the bytes of a tunnel go.

    Args:
        snapshot: the mesh.
        config: what the node knows besides.
        workload: the local workload that the peer has dialled.
        dialled: the address that it has dialled.
        authority: the ``:authority`` of its CONNECT.
        forwarded_host: the ``host`` of its ``forwarded`` header: a claim about which service was meant, taken only for
            what it tells of the workload's own services.
        note: hears how the decision came about.
    """
    ip = authority.ip
    service: Service | None
    if ip is not None:
        refusal = _check(snapshot, config, workload, dialled, ip, note)
        if refusal is not None:
            return refusal
        port, service = authority.port, None
    else:
        service = _named(snapshot, authority.host, workload)
        if service is None:
            return NoInboundRoute(status=_UNAVAILABLE, reason=f"unknown hostname: {authority.host}")
        found = _target_port(snapshot, service, workload, authority.port)
        if found is None:
            return NoInboundRoute(
                status=_UNAVAILABLE,
                reason=f"no port for hostname: {service.key} has no target port for {authority.port} at {workload.key}",
            )
        port = found
        if note is not None:
            note(f"{authority} is the service {service.key}: its port {authority.port} is port {port} here")

    if port in config.illegal_ports:
        return NoInboundRoute(status=_UNAVAILABLE, reason=_circle(dialled.ip, port))
    upstream_ip, keep_source, target = dialled.ip, True, None
    tunnel = workload.application_tunnel
    proxied = tunnel is not None and tunnel.protocol is ApplicationTunnelProtocol.PROXY
    if tunnel is not None and tunnel.port is not None:
        port = tunnel.port
        if note is not None:
            note(f"{workload.key} has an application tunnel at port {port}, whatever port was asked for")
        if port in config.illegal_ports:
            return NoInboundRoute(status=_UNAVAILABLE, reason=_circle(dialled.ip, port))
    if not 0 < port <= MAX_PORT:
        return NoInboundRoute(
            status=_UNAVAILABLE, reason=f"{workload.key} is said to listen at {port}, which is no port"
        )
    if proxied:
        if ip is not None:
            target = Endpoint(ip, authority.port)
        else:
            assert service is not None
            vip = _vip(service, config.network)
            if vip is None:
                return NoInboundRoute(
                    status=_UNAVAILABLE,
                    reason=f"no address for hostname: {service.key} has no VIP, and a PROXY header takes no name",
                )
            target = Endpoint(vip, authority.port)
        if config.localhost_app_tunnel:
            upstream_ip, keep_source = _loopback(dialled.ip), False
        if note is not None:
            note(f"a PROXY header tells it of {target}")

    services = snapshot.services_of(workload) if service is None else (service,)
    meant = _meant(snapshot, services, workload, port, forwarded_host)
    if note is not None:
        note("which service was meant cannot be told" if meant is None else f"the service {meant.key} was meant")
        note(f"to {Endpoint(upstream_ip, port)}; policies see {Endpoint(dialled.ip, port)}")
    return InboundRoute(
        upstream=Endpoint(upstream_ip, port),
        rbac_destination=Endpoint(dialled.ip, port),
        service=meant,
        proxy_protocol=proxied,
        tunnel_target=target,
        keep_source=keep_source,
    )


def _check(
    snapshot: MeshSnapshot,
    config: RoutingConfig,
    workload: Workload,
    dialled: Endpoint,
    ip: IPAddress,
    note: Note | None,
) -> NoInboundRoute | None:
    """Whether a peer may name this address to us."""
    if ip == dialled.ip:
        told = f"{ip} is the address that was dialled"
    elif workload.application_tunnel is not None:
        told = f"{workload.key} has an application tunnel: it may be told of any address"
    elif _is_waypoint_for(snapshot, config, workload, dialled, ip):
        told = f"{ip} has {workload.key} as its waypoint"
    else:
        return NoInboundRoute(
            status=_BAD_REQUEST,
            reason=f"ip mismatch: the peer dialled {dialled.ip} and asks for {ip}, which is not behind it",
        )
    if note is not None:
        note(told)
    return None


def _is_waypoint_for(
    snapshot: MeshSnapshot, config: RoutingConfig, workload: Workload, dialled: Endpoint, ip: IPAddress
) -> bool:
    owner = snapshot.workload_by_address(config.network, ip)
    # The peer has seen the service that it means; we do not know its namespace, so any of them will do.
    guarded = (owner,) if owner is not None else snapshot.services_by_vip(config.network, ip)
    return any(
        _resolves_to(snapshot, gateway, each, workload, dialled) for each in guarded for gateway in _waypoints(each)
    )


def _waypoints(guarded: Workload | Service) -> tuple[GatewayAddress, ...]:
    weighted = () if isinstance(guarded, Workload) else guarded.weighted_waypoints
    own = () if guarded.waypoint is None else (guarded.waypoint,)
    return (*own, *(each.destination for each in weighted))


def _resolves_to(
    snapshot: MeshSnapshot, gateway: GatewayAddress, guarded: Workload | Service, workload: Workload, dialled: Endpoint
) -> bool:
    destination = gateway.destination
    service: Service | None
    if isinstance(destination, NetworkAddress):
        owner = snapshot.workload_by_address(destination.network, destination.ip)
        service = snapshot.service_by_vip(destination.network, destination.ip, guarded.namespace)
    else:
        owner = snapshot.workload_by_hostname(destination.namespace, destination.hostname)
        service = snapshot.service(destination)
    if owner is not None and dialled.ip in owner.addresses:
        return True
    if service is None:
        return False
    # A waypoint that is unhealthy, and so no endpoint, is still the waypoint for those who reach it.
    return service.key in workload.services or workload.uid in snapshot.endpoints(service)


def _ports(snapshot: MeshSnapshot, service: Service, workload: Workload) -> Mapping[int, int]:
    endpoint = snapshot.endpoints(service).get(workload.uid)
    if endpoint is not None:
        return endpoint.ports
    return workload.services.get(service.key, {})


def _target_port(snapshot: MeshSnapshot, service: Service, workload: Workload, port: int) -> int | None:
    return _ports(snapshot, service, workload).get(port) or service.ports.get(port) or None


def _named(snapshot: MeshSnapshot, hostname: str, workload: Workload) -> Service | None:
    """Of the services with a name, the one of our namespace: the peer's is not known."""
    services = snapshot.services_by_hostname(hostname)
    return min(services, key=lambda each: (each.namespace != workload.namespace, not each.canonical), default=None)


def destination_service(
    snapshot: MeshSnapshot, workload: Workload, port: int, forwarded_host: str | None = None
) -> Service | None:
    """Which of its services a connection to a workload was probably meant for; None when it cannot be told.

    Args:
        snapshot: the mesh.
        workload: where the connection ends.
        port: of the workload.
        forwarded_host: what the peer says; it counts if the workload is an endpoint of such a service.
    """
    return _meant(snapshot, snapshot.services_of(workload), workload, port, forwarded_host)


def _meant(
    snapshot: MeshSnapshot, services: tuple[Service, ...], workload: Workload, port: int, forwarded_host: str | None
) -> Service | None:
    if forwarded_host:
        hostname = forwarded_host.lower()
        for service in services:
            if service.hostname.lower() == hostname:
                return service
    for service in services:
        if port in service.ports.values() or port in _ports(snapshot, service, workload).values():
            return service
    return None


def _vip(service: Service, network: str) -> IPAddress | None:
    ranked = sorted(service.vips, key=lambda vip: (vip.network != network, vip.ip.version))
    return ranked[0].ip if ranked else None


def _loopback(like: IPAddress) -> IPAddress:
    return IPv4Address("127.0.0.1") if like.version == 4 else IPv6Address("::1")


def _circle(ip: IPAddress, port: int) -> str:
    return f"{Endpoint(ip, port)} is a port of the proxy itself: the connection would go in a circle"
