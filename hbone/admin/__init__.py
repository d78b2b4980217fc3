"""The admin port: metrics, readiness, log levels and an index, for people, probes and Prometheus."""

from __future__ import annotations

from hbone.admin._json import json_pieces, json_response
from hbone.admin._routes import Levels, Readiness, logging_route, quit_route, standard_routes
from hbone.admin._server import AdminRequest, AdminResponse, AdminServer, Handler, Route

__all__ = [
    "AdminRequest",
    "AdminResponse",
    "AdminServer",
    "Handler",
    "Levels",
    "Readiness",
    "Route",
    "json_pieces",
    "json_response",
    "logging_route",
    "quit_route",
    "standard_routes",
]
