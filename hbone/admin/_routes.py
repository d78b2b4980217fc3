"""What the admin port of a proxy shows: index, metrics, readiness."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hbone.admin._server import AdminRequest, AdminResponse, Handler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = ["Readiness", "standard_routes"]


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
    more: Mapping[str, Handler] | None = None,
) -> dict[str, Handler]:
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
        return AdminResponse(body="".join(f"{line}\n" for line in (title, "", *sorted(routes))).encode())

    routes: dict[str, Handler] = {
        "/": index,
        "/metrics": metrics,
        "/stats/prometheus": metrics,
        "/healthz/ready": readiness.respond,
        **(more or {}),
    }
    return routes
