"""What routing decides: values that say where a connection goes, in what wrapping, and whom to expect there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Final, TypeAlias

from hbone.address import Authority, Endpoint

if TYPE_CHECKING:
    from hbone.address import IPAddress
    from hbone.identity import SpiffeIdentity
    from hbone.mesh import Service, Workload

__all__ = [
    "ILLEGAL_PORTS",
    "InboundRoute",
    "NoInboundRoute",
    "NoOutboundRoute",
    "Note",
    "OutboundProtocol",
    "OutboundRoute",
    "RouteType",
    "RoutingConfig",
]

Note: TypeAlias = Callable[[str], None]
"""Hears how a decision came about: one fact a call, in words."""

#: Ports of the proxies themselves: forwarding to them would go round in a circle.
ILLEGAL_PORTS: Final = frozenset((15001, 15006, 15008))


class OutboundProtocol(Enum):
    """What a connection is wrapped in; the values are the names in logs and dumps."""

    TCP = "TCP"
    HBONE = "HBONE"
    DOUBLE_HBONE = "DOUBLEHBONE"


class RouteType(Enum):
    """What the next hop is to the connection; the values are the names in the log."""

    DIRECT = "Direct"
    TO_SERVER_WAYPOINT = "ToServerWaypoint"
    TO_GATEWAY = "ToGateway"
    PASSTHROUGH = "Passthrough"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingConfig:
    """What a node knows besides the mesh."""

    network: str = ""
    """The network that the node is in."""
    hbone_port: int = 15008
    """Where workloads of the mesh listen for HBONE. Another value is for tests."""
    illegal_ports: frozenset[int] = ILLEGAL_PORTS
    localhost_app_tunnel: bool = True
    """Whether an application that wants a PROXY header is reached at loopback."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutboundRoute:
    """Where a connection goes."""

    type: RouteType
    protocol: OutboundProtocol
    next_hop: Endpoint | Authority
    """Where TCP connects to; an `Authority` is a name that is resolved first (a workload known by its name only)."""
    authority: Authority | None = None
    """The ``:authority`` of the CONNECT, of both of them when there are two; None for TCP. See `resolved`."""
    expected: tuple[SpiffeIdentity, ...] = ()
    """Who may be at `next_hop`: never empty for HBONE and DOUBLEHBONE, always for TCP."""
    inner_expected: tuple[SpiffeIdentity, ...] = ()
    """Who may be at the far end of the inner tunnel: never empty for DOUBLEHBONE, always otherwise."""
    workload: Workload | None = None
    """The next hop: the endpoint, the waypoint or the gateway; None when nothing is known of it."""
    service: Service | None = None
    """What the application wanted, if that is a service of the mesh."""

    def resolved(self, ip: IPAddress) -> OutboundRoute:
        """The same route when the name in `next_hop` turned out to be this address.

        An `authority` that names the next hop itself gets the address too: to its proxy, a name would be a service.
        """
        if isinstance(self.next_hop, Endpoint):
            return self
        next_hop = Endpoint(ip, self.next_hop.port)
        authority = self.authority
        if authority is not None and authority.host == self.next_hop.host and self.type is RouteType.DIRECT:
            authority = Endpoint(ip, authority.port).authority
        return replace(self, next_hop=next_hop, authority=authority)

    def __str__(self) -> str:
        """As it stands in the log: ``10.96.0.20:80 using HBONE via 10.0.0.9:15008 type ToServerWaypoint``."""
        target = self.next_hop if self.authority is None else self.authority
        return f"{target} using {self.protocol.value} via {self.next_hop} type {self.type.value}"


@dataclass(frozen=True, slots=True, kw_only=True)
class NoOutboundRoute:
    """Why a connection goes nowhere."""

    reason: str
    """``no healthy upstream: 10.96.0.21:80``, for instance."""

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True, slots=True, kw_only=True)
class InboundRoute:
    """Where a tunnel's bytes go."""

    upstream: Endpoint
    """The application. Always the address that the peer dialled, or loopback."""
    rbac_destination: Endpoint
    """What policies see: the dialled address, and the port after all translation."""
    service: Service | None = None
    """What the peer wanted, as far as it can be told."""
    proxy_protocol: bool = False
    """Whether a PROXY v2 header goes first."""
    tunnel_target: Endpoint | None = None
    """The destination in that header; None without one."""
    keep_source: bool = True
    """Whether to dial from the peer's address, where that is switched on; False where it goes to loopback."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NoInboundRoute:
    """Why a request is refused."""

    status: int
    """400 or 503."""
    reason: str
