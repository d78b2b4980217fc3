"""What to tell an application of a tunnel that did not come up: our errors in the words of SOCKS5 and of HTTP.

Pure: a decision from an exception to one of a few values.
"""

from __future__ import annotations

import errno
import socket
from enum import Enum
from typing import TYPE_CHECKING

import trio

from hbone.errors import (
    CertificateUnavailable,
    ConnectFailed,
    IdentityRefused,
    NoRoute,
    PeerIdentityMismatch,
    PolicyDenied,
    RequestRejected,
    StreamRefused,
    Unreachable,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Failure", "failure_of", "one_line"]

_MAX_LINE = 300
_MAX_CAUSES = 20


class Failure(Enum):
    """Why there is no tunnel."""

    DENIED = "a policy does not allow it"
    TARGET = "the peer could not connect to the target"
    REFUSED = "the next hop refuses connections"
    UNREACHABLE = "the next hop cannot be reached"
    TIMEOUT = "somebody on the way did not answer in time"
    UNAVAILABLE = "not now: no certificate, or the peer is shutting down"
    OTHER = "anything else"

    @property
    def socks_reply(self) -> int:
        """RFC 1928 section 6."""
        return _SOCKS_REPLIES[self]

    @property
    def http_status(self) -> int:
        """RFC 9110 section 15.6; 403 for a policy."""
        return _HTTP_STATUSES[self]


_SOCKS_REPLIES = {
    Failure.DENIED: 0x02,
    Failure.TARGET: 0x05,
    Failure.REFUSED: 0x05,
    Failure.UNREACHABLE: 0x04,
    Failure.TIMEOUT: 0x04,
    Failure.UNAVAILABLE: 0x01,
    Failure.OTHER: 0x01,
}
_HTTP_STATUSES = {
    Failure.DENIED: 403,
    Failure.TARGET: 503,
    Failure.REFUSED: 502,
    Failure.UNREACHABLE: 502,
    Failure.TIMEOUT: 504,
    Failure.UNAVAILABLE: 503,
    Failure.OTHER: 502,
}
_UNREACHABLE = frozenset({errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EADDRNOTAVAIL})


def failure_of(error: BaseException) -> Failure:
    """The most telling value for an error and what it was raised from."""
    for cause in _causes(error):
        match cause:
            case PolicyDenied() | RequestRejected(status=401 | 403):
                return Failure.DENIED
            case Unreachable():
                return Failure.TARGET
            case NoRoute():
                return Failure.UNREACHABLE
            case CertificateUnavailable() | StreamRefused():
                return Failure.UNAVAILABLE
            case PeerIdentityMismatch() | IdentityRefused():
                return Failure.OTHER
            case trio.TooSlowError() | TimeoutError():
                return Failure.TIMEOUT
            case ConnectionRefusedError():
                return Failure.REFUSED
            case socket.gaierror():
                return Failure.UNREACHABLE
            case OSError(errno=number) if number in _UNREACHABLE:
                return Failure.UNREACHABLE
    return Failure.UNREACHABLE if isinstance(error, ConnectFailed) else Failure.OTHER


def one_line(error: BaseException) -> str:
    """The message of an error as one short line of printable text, fit for a body."""
    text = str(error) or type(error).__name__
    line = "".join(character if character.isprintable() else " " for character in text[: _MAX_LINE + 1])
    return line if len(line) <= _MAX_LINE else line[:_MAX_LINE] + "..."


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from, also the members of groups; bounded, in case of a loop."""
    todo = [error]
    for _ in range(_MAX_CAUSES):
        if not todo:
            return
        current = todo.pop(0)
        yield current
        if isinstance(current, BaseExceptionGroup):
            todo.extend(current.exceptions)
        if current.__cause__ is not None:
            todo.append(current.__cause__)
        elif current.__context__ is not None:  # ``from None`` hides it from readers, but it is what happened
            todo.append(current.__context__)
