"""What the admin port of a proxy shows and does: index, metrics, readiness, log levels, the end."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol

from hbone.admin._server import AdminRequest, AdminResponse, Handler, Route

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = ["Levels", "Readiness", "logging_route", "quit_route", "standard_routes"]

_log = logging.getLogger(__name__)


class Readiness:
    """Ready when nothing blocks it any more; each blocker has a name that a probe shows.

    Args:
        blockers: what must happen first.
    """

    def __init__(self, blockers: Iterable[str] = ()) -> None:
        self._blockers = dict.fromkeys(blockers)

    @property
    def blockers(self) -> tuple[str, ...]:
        """What is missing, in the order in which it was named."""
        return tuple(self._blockers)

    @property
    def ready(self) -> bool:
        """Whether nothing is missing."""
        return not self._blockers

    def block(self, name: str) -> None:
        """From now on `name` is missing; again is harmless."""
        self._blockers[name] = None

    def unblock(self, name: str) -> None:
        """`name` is there; again is harmless."""
        self._blockers.pop(name, None)

    def respond(self, _request: AdminRequest) -> AdminResponse:
        """200 ``ready``, or 503 with a line for each blocker."""
        if self.ready:
            return AdminResponse(body=b"ready\n")
        lines = "".join(f"{name}\n" for name in self._blockers)
        return AdminResponse(status=503, body=f"not ready, waiting for:\n{lines}".encode())


def standard_routes(
    *,
    render_metrics: Callable[[str | None], tuple[str, bytes]],
    readiness: Readiness,
    title: str = "hbone",
    more: Mapping[str, Handler | Route] | None = None,
) -> dict[str, Handler | Route]:
    """The routes ``/``, ``/metrics``, ``/stats/prometheus`` and ``/healthz/ready``.

    Args:
        render_metrics: from an Accept header (or None) to content type and body; `hbone.telemetry.Metrics.render`.
        readiness: what the probe shows.
        title: the first line of the index.
        more: further routes, shown in the index too.
    """

    def metrics(request: AdminRequest) -> AdminResponse:
        content_type, body = render_metrics(request.header("accept"))
        return AdminResponse(content_type=content_type, body=body)

    def index(_request: AdminRequest) -> AdminResponse:
        lines = (title, "", *(_shown(path, routes[path]) for path in sorted(routes)))
        return AdminResponse(body="".join(f"{line}\n" for line in lines).encode())

    routes: dict[str, Handler | Route] = {
        "/": index,
        "/metrics": metrics,
        "/stats/prometheus": metrics,
        "/healthz/ready": readiness.respond,
        **(more or {}),
    }
    return routes


def _shown(path: str, route: Handler | Route) -> str:
    if isinstance(route, Route) and "GET" not in route.methods:
        return f"{path} ({', '.join(route.methods)})"
    return path


class Levels(Protocol):
    """What `logging_route` needs; `hbone.telemetry.LogControl` has it."""

    @property
    def levels(self) -> object:
        """What holds now; its text is shown."""
        raise NotImplementedError

    def add(self, text: str) -> None:
        """Change what `text` says and keep the rest; a ValueError says what is wrong with it."""
        raise NotImplementedError

    def reset(self, text: str = "") -> None:
        """Go back to the levels of the start, then change what `text` says."""
        raise NotImplementedError


_LOGGING_HELP = """
POST /logging                              the levels of the log
POST /logging?level=debug                  a level for everything that has none of its own
POST /logging?level=access=debug,info      levels by scope; access:debug is the same
POST /logging?reset                        back to the levels of the start
POST /logging?reset&level=access=debug     the same, then change one

Levels: off, error, warn, info, debug, trace.
"""


def logging_route(levels: Levels) -> Route:
    """``/logging``: shows the log levels and changes them while the process runs. POST only, as ztunnel has it."""

    def respond(request: AdminRequest) -> AdminResponse:
        parameters = request.parameters
        unknown = sorted(parameters.keys() - {"level", "reset"})
        if unknown:
            return _bad(f"unknown parameter {unknown[0][:80]!r}")
        text = ",".join(parameters.get("level", ()))
        if "level" in parameters and not text.strip(", "):
            return _bad("level says nothing")
        try:
            if "reset" in parameters:
                levels.reset(text)
            elif text:
                levels.add(text)
        except ValueError as problem:
            return _bad(str(problem))
        if parameters:
            _log.info("log levels changed", extra={"fields": {"levels": str(levels.levels)}})
        return AdminResponse(body=f"current log level is {levels.levels}\n".encode())

    return Route(handler=respond, methods=("POST",), help=_LOGGING_HELP)


def _bad(why: str) -> AdminResponse:
    return AdminResponse(status=400, body=f"{why}\n{_LOGGING_HELP}".encode())


def quit_route(stop: Callable[[], object]) -> Route:
    """``/quitquitquit``: begins the end of the process, gracefully. POST only.

    Args:
        stop: begins it and returns at once; called once for each request.
    """

    def respond(_request: AdminRequest) -> AdminResponse:
        _log.info("asked to shut down", extra={"fields": {"page": "/quitquitquit"}})
        stop()
        return AdminResponse(body=b"shutting down now\n")

    return Route(handler=respond, methods=("POST",), help="POST ends this process after a graceful drain")
