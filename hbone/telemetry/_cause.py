"""What went wrong, in the few words that logs and metrics have for it. Pure."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from hbone.errors import (
    CertificateUnavailable,
    ConnectFailed,
    IdentityRefused,
    PeerIdentityMismatch,
    ProtocolError,
    RequestRejected,
    SessionClosed,
    TunnelRefused,
    TunnelReset,
)
from hbone.protocol import ErrorCode

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["NO_FLAG", "OTHER", "failure_cause", "reset_in_words", "response_flag"]

OTHER = "other"
NO_FLAG = "-"
#: What a socket says whose other side is gone. What says that the network is broken (a time-out) is not here.
_GONE: Final = frozenset({errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN})
#: What peers send for an application that is gone (RFC 9113 section 8.5), or when they have let go of a tunnel.
_LET_GO: Final = frozenset({ErrorCode.NO_ERROR, ErrorCode.CANCEL, ErrorCode.STREAM_CLOSED, ErrorCode.CONNECT_ERROR})


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


def reset_in_words(error: BaseException) -> str | None:
    """How an application at one of its ends reset a connection that stood; None when something else ended it.

    Applications do that as they like, and it is no failure of what carries them: as with ztunnel such a connection has
    gone well. Only for what a relay ended with: before that, the same errors mean that there was no connection.
    """
    match error:
        case TunnelReset(remote=True):
            return str(error) if error.error_code in _LET_GO else None
        case TunnelReset(error_code=ErrorCode.CONNECT_ERROR):  # by us, as the socket behind it broke
            return str(error) if error.__cause__ is None or _is_gone(error.__cause__) else None
        case OSError() if _is_gone(error):
            return error.strerror or str(error)
        case _:
            return None


def _is_gone(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in _GONE


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
