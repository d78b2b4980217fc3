"""What went wrong, in the few words that logs and metrics have for it. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hbone.errors import (
    CertificateUnavailable,
    ConnectFailed,
    IdentityRefused,
    PeerIdentityMismatch,
    ProtocolError,
    RequestRejected,
    SessionClosed,
    TunnelRefused,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["NO_FLAG", "OTHER", "failure_cause", "response_flag"]

OTHER = "other"
NO_FLAG = "-"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from or because of, outermost first; bounded, in case of a loop."""
    current: BaseException | None = error
    for _ in range(10):
        if current is None:
            return
        yield current
        # ``from None`` hides a context from readers of a traceback; it is still what happened.
        current = current.__cause__ or current.__context__


def _timed_out(error: BaseException) -> bool:
    return any(isinstance(e, TimeoutError) or type(e).__name__ == "TooSlowError" for e in _causes(error))


def response_flag(error: BaseException | None) -> str:
    """Istio's response flag for how a connection ended.

    ``-`` went well; ``DENY`` policy said no here; ``TLS_FAILURE`` one side does not accept the other's identity;
    ``H2_HANDSHAKE_FAILURE`` the peer broke the protocol; ``NETWORK_POLICY`` the peer's port does not answer at all;
    ``IDENTITY_ERROR`` we have no certificate; ``CONNECT`` everything else, also a CONNECT that the peer refused.
    """
    match error:
        case None:
            return NO_FLAG
        case RequestRejected(flag=str(flag)):
            return flag
        case RequestRejected(status=401 | 403):
            return "DENY"
        case PeerIdentityMismatch() | IdentityRefused():
            return "TLS_FAILURE"
        case CertificateUnavailable():
            return "IDENTITY_ERROR"
        case ProtocolError():
            return "H2_HANDSHAKE_FAILURE"
        case ConnectFailed() if not isinstance(error, SessionClosed) and _timed_out(error):
            return "NETWORK_POLICY"
        case _:
            return "CONNECT"


def failure_cause(error: BaseException) -> str:
    """One of a few words for why a handshake failed or a session ended; the label of the counters."""
    match error:
        case PeerIdentityMismatch():
            return "peer_identity"
        case IdentityRefused():
            return "identity_refused"
        case CertificateUnavailable():
            return "no_certificate"
        case TunnelRefused():
            return "refused"
        case ProtocolError():
            return "protocol"
        case _ if _timed_out(error):
            return "timeout"
        case SessionClosed():
            return "closed"
        case _ if any(isinstance(e, OSError) for e in _causes(error)):
            return "network"
        case ConnectFailed():
            return "tls"
        case _:
            return OTHER
