"""`MetricsObserver`: what sessions tell their observer, counted."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hbone.address import Authority
    from hbone.errors import HboneError
    from hbone.telemetry._metrics import Metrics
    from hbone.transport import Peer, Session, Tunnel

__all__ = ["MetricsObserver"]


class MetricsObserver:
    """An `hbone.transport.Observer` that counts sessions, tunnels, handshakes and refusals.

    Args:
        metrics: where to count; several observers may share it.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def handshake_finished(self, *, client: bool, seconds: float, peer: Peer | None, error: HboneError | None) -> None:
        """See `hbone.transport.Observer`."""
        self._metrics.handshake_finished(_role(client), seconds, error)

    def session_opened(self, session: Session) -> None:
        """See `hbone.transport.Observer`."""
        self._metrics.session_opened(_role(session.client), session)

    def session_closed(self, session: Session, error: HboneError | None) -> None:
        """See `hbone.transport.Observer`."""
        self._metrics.session_closed(_role(session.client), error, session)

    def tunnel_opened(self, tunnel: Tunnel) -> None:
        """See `hbone.transport.Observer`."""
        self._metrics.tunnel_opened(_role(tunnel.session.client))

    def tunnel_refused(self, session: Session, target: Authority | str, status: int | None, reason: str) -> None:
        """See `hbone.transport.Observer`."""
        self._metrics.tunnel_refused(_role(session.client), status)

    def tunnel_closed(self, tunnel: Tunnel, error: HboneError | None) -> None:
        """See `hbone.transport.Observer`."""
        self._metrics.tunnel_closed(_role(tunnel.session.client))


def _role(client: bool) -> str:
    return "client" if client else "server"
