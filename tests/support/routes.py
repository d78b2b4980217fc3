"""A small mesh to decide routes in, and what is expected of a decision."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from hbone import Authority
from hbone.mesh import (
    ApplicationTunnel,
    ApplicationTunnelProtocol,
    GatewayAddress,
    HealthStatus,
    LoadBalancer,
    LoadBalancerMode,
    MeshSnapshot,
    NetworkAddress,
    RoutingPreference,
    Service,
    TunnelProtocol,
    Visibility,
    Workload,
)
from hbone.routing import NoOutboundRoute, Router, RoutingConfig, route_outbound
from support.meshes import name, service, workload

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hbone.routing import OutboundRoute

HBONE = {"protocol": TunnelProtocol.HBONE}
PRIVATE = {"visibility": Visibility.NAMESPACE}
UNHEALTHY = {"status": HealthStatus.UNHEALTHY}
PASSTHROUGH = {"load_balancer": LoadBalancer(mode=LoadBalancerMode.PASSTHROUGH)}

TD = "spiffe://cluster.local/ns"
CLIENT_IP = "10.0.0.1"


def client(**fields: Any) -> Workload:
    """The local workload that connects."""
    return workload("lab//Pod/shop/cart-0", CLIENT_IP, "fd00::1", **{"service_account": "cart", **HBONE, **fields})


def gateway(destination: str, port: int = 15008) -> GatewayAddress:
    """By ``network/ip`` or ``namespace/hostname``."""
    network, _, rest = destination.partition("/")
    try:
        return GatewayAddress(destination=NetworkAddress(network, ip_address(rest)), hbone_mtls_port=port)
    except ValueError:
        return GatewayAddress(destination=name(destination), hbone_mtls_port=port)


def app_tunnel(port: int | None = 15088, protocol: str = "PROXY") -> dict[str, Any]:
    """The field of a workload that has one."""
    return {"application_tunnel": ApplicationTunnel(protocol=ApplicationTunnelProtocol(protocol), port=port)}


def balancer(mode: str, *preferences: str) -> dict[str, Any]:
    """The field of a service that has one."""
    wanted = tuple(RoutingPreference(preference) for preference in preferences)
    return {"load_balancer": LoadBalancer(mode=LoadBalancerMode(mode), preferences=wanted)}


def mesh(*parts: Workload | Service, source: Workload | None = None) -> MeshSnapshot:
    """The client and these."""
    everything: list[Any] = [client() if source is None else source, *parts]
    return MeshSnapshot.build(
        [each for each in everything if isinstance(each, Workload)],
        [each for each in everything if isinstance(each, Service)],
    )


@dataclass(frozen=True, kw_only=True)
class To:
    """What is expected of a decision; what is None is not looked at."""

    says: str
    """The route as it stands in the log, or the beginning of the reason why there is none."""
    expected: tuple[str, ...] | None = None
    inner: tuple[str, ...] | None = None
    workload: str | None = None
    """The uid of the next hop; empty for none."""
    service: str | None = None
    """``namespace/hostname`` of what was wanted; empty for none."""

    def check(self, outcome: OutboundRoute | NoOutboundRoute) -> None:
        """Fails when it is anything else."""
        if isinstance(outcome, NoOutboundRoute):
            assert outcome.reason.startswith(self.says)
            return
        assert str(outcome) == self.says
        if self.expected is not None:
            assert tuple(map(str, outcome.expected)) == self.expected
        assert tuple(map(str, outcome.inner_expected)) == (self.inner or ())
        if self.workload is not None:
            assert (outcome.workload.uid if outcome.workload else "") == self.workload
        if self.service is not None:
            assert (str(outcome.service.key) if outcome.service else "") == self.service


def decide(
    snapshot: MeshSnapshot,
    target: str,
    *,
    random: Iterable[float] = (),
    source_ip: str | None = CLIENT_IP,
    config: RoutingConfig | None = None,
    source: str = "lab//Pod/shop/cart-0",
) -> OutboundRoute | NoOutboundRoute:
    """Decide, with the function and with a router: they must agree.

    Args:
        snapshot: the mesh.
        target: as the application said it.
        random: what is drawn, 0 after these.
        source_ip: of the application.
        config: of the node.
        source: the uid of the local workload.
    """
    config = config or RoutingConfig()
    workload, ip = snapshot.workloads[source], None if source_ip is None else ip_address(source_ip)
    authority, draws = Authority.parse(target), tuple(random)
    remaining = iter(draws)

    def draw() -> float:
        return next(remaining, 0.0)

    outcome = route_outbound(snapshot, config, source=workload, source_ip=ip, target=authority, random=draw)
    router = Router(config, draw)
    for _ in range(2):  # worked out, then remembered
        remaining = iter(draws)
        assert router.outbound(snapshot, workload, ip, authority) == outcome
    return outcome


__all__ = [
    "CLIENT_IP",
    "HBONE",
    "PASSTHROUGH",
    "PRIVATE",
    "TD",
    "UNHEALTHY",
    "To",
    "app_tunnel",
    "balancer",
    "client",
    "decide",
    "gateway",
    "mesh",
    "name",
    "service",
    "workload",
]
