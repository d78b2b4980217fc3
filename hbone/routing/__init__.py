"""Where a connection goes: pure decisions over a picture of the mesh."""

from hbone.routing._values import (
    ILLEGAL_PORTS,
    InboundRoute,
    NoInboundRoute,
    NoOutboundRoute,
    OutboundProtocol,
    OutboundRoute,
    RouteType,
    RoutingConfig,
)

__all__ = [
    "ILLEGAL_PORTS",
    "InboundRoute",
    "NoInboundRoute",
    "NoOutboundRoute",
    "OutboundProtocol",
    "OutboundRoute",
    "RouteType",
    "RoutingConfig",
]
