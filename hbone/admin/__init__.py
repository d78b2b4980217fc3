"""The admin port: metrics, readiness and an index, for people, probes and Prometheus."""

from __future__ import annotations

from hbone.admin._routes import Readiness, standard_routes
from hbone.admin._server import AdminRequest, AdminResponse, AdminServer, Handler

__all__ = ["AdminRequest", "AdminResponse", "AdminServer", "Handler", "Readiness", "standard_routes"]
