"""Where metrics and logs hang on: told of what happens, never asked, never awaited."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from hbone.address import Authority
    from hbone.errors import HboneError
    from hbone.transport._session import Session
    from hbone.transport._tunnel import Tunnel
    from hbone.transport._values import Peer

__all__ = ["BaseObserver", "Observer"]


class Observer(Protocol):
    """What a session tells. Calls come in trio's thread, must not block, and what they raise is only logged.

    Most come outside of any task: there is no current one, and context variables are nobody's in particular.
    """

    def handshake_finished(self, *, client: bool, seconds: float, peer: Peer | None, error: HboneError | None) -> None:
        """A session was opened, or was not: `error` then says why, and `peer` is None."""

    def session_opened(self, session: Session) -> None:
        """The peer's SETTINGS have come."""

    def session_closed(self, session: Session, error: HboneError | None) -> None:
        """The session has ended; `error` is None after a graceful end."""

    def tunnel_opened(self, tunnel: Tunnel) -> None:
        """The 200 was sent or has come."""

    def tunnel_refused(self, session: Session, target: Authority | str, status: int | None, reason: str) -> None:
        """A CONNECT got another answer, or a reset (`status` is None)."""

    def tunnel_closed(self, tunnel: Tunnel, error: HboneError | None) -> None:
        """Both directions ended (`error` is None) or the tunnel was reset."""


class BaseObserver:
    """Hears everything, does nothing: a base for observers that want a part."""

    def handshake_finished(self, *, client: bool, seconds: float, peer: Peer | None, error: HboneError | None) -> None:
        """See `Observer`."""

    def session_opened(self, session: Session) -> None:
        """See `Observer`."""

    def session_closed(self, session: Session, error: HboneError | None) -> None:
        """See `Observer`."""

    def tunnel_opened(self, tunnel: Tunnel) -> None:
        """See `Observer`."""

    def tunnel_refused(self, session: Session, target: Authority | str, status: int | None, reason: str) -> None:
        """See `Observer`."""

    def tunnel_closed(self, tunnel: Tunnel, error: HboneError | None) -> None:
        """See `Observer`."""
