"""Where a connection goes: pure decisions over a picture of the mesh."""

from hbone.routing._balance import Rank, rank
from hbone.routing._explain import InboundExplanation, OutboundExplanation, explain_inbound, explain_outbound
from hbone.routing._inbound import destination_service, route_inbound
from hbone.routing._outbound import route_outbound
from hbone.routing._router import Router
from hbone.routing._values import (
    ILLEGAL_PORTS,
    InboundRoute,
    NoInboundRoute,
    NoOutboundRoute,
    Note,
    OutboundProtocol,
    OutboundRoute,
    RouteType,
    RoutingConfig,
)

__all__ = [
    "ILLEGAL_PORTS",
    "InboundExplanation",
    "InboundRoute",
    "NoInboundRoute",
    "NoOutboundRoute",
    "Note",
    "OutboundExplanation",
    "OutboundProtocol",
    "OutboundRoute",
    "Rank",
    "RouteType",
    "Router",
    "RoutingConfig",
    "destination_service",
    "explain_inbound",
    "explain_outbound",
    "rank",
    "route_inbound",
    "route_outbound",
]
