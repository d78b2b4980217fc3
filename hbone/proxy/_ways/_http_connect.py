"""``--http-proxy PORT``: HTTP/1.1 CONNECT (RFC 9110 section 9.3.6), for ``https_proxy`` and ``curl -p -x``.

The head is parsed by h11. A refusal is a status and a line that says why; the 200 is sent when the tunnel is up.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING

import h11

from hbone.address import Authority, parse_authority_untrusted
from hbone.errors import RemoteProtocolError
from hbone.proxy._ways._base import HANDSHAKE_TIMEOUT, BadHandshake, InBandWayIn, shake_hands
from hbone.proxy._ways._failure import failure_of, one_line

if TYPE_CHECKING:
    import socket

__all__ = ["HttpConnectParser", "accept_http_connect"]

_MAX_HEAD = 16 * 1024
_SUCCESS = b"HTTP/1.1 200 Connection established\r\n\r\n"


def _refusal(status: int, why: str, *, headers: str = "") -> bytes:
    body = f"{why}\n".encode()
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
        f"Content-Type: text/plain; charset=utf-8\r\nContent-Length: {len(body)}\r\n{headers}Connection: close\r\n\r\n"
    )
    return head.encode() + body


def _bad(status: int, why: str, *, headers: str = "") -> BadHandshake:
    return BadHandshake(f"HTTP proxy request: {why}", _refusal(status, why, headers=headers))


class HttpConnectParser:
    """The server side of a CONNECT, sans-IO: `feed` bytes until `target` is there.

    Attributes:
        target: what the application asked for, or None as long as it is not known.
    """

    def __init__(self) -> None:
        self.target: Authority | None = None
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=_MAX_HEAD)

    @property
    def leftover(self) -> bytes:
        """What came behind the head: the first bytes for the tunnel."""
        return self._h11.trailing_data[0] if self.target is not None else b""

    def feed(self, data: bytes) -> bytes:
        """Takes what arrived; there is never something to send before the tunnel is up.

        Raises:
            BadHandshake: it is not a CONNECT; with the answer to that.
        """
        if not data:  # for h11 that would be the end
            return b""
        try:
            self._h11.receive_data(data)
            if self.target is not None:
                return b""
            event = self._h11.next_event()
        except h11.RemoteProtocolError as problem:
            if problem.error_status_hint == 431:
                raise _bad(431, f"its head is longer than {_MAX_HEAD} bytes") from None
            raise _bad(400, "it is not a request in HTTP/1.1") from None
        if isinstance(event, h11.Request):
            self.target = _target_untrusted(event)
        return b""

    def late(self) -> bytes:
        """What to send when the time is up."""
        return _refusal(408, "the request took too long to arrive")


def _target_untrusted(request: h11.Request) -> Authority:
    if request.http_version not in (b"1.0", b"1.1"):
        raise _bad(400, "it is not a request in HTTP/1.1")
    if request.method != b"CONNECT":
        why = "this port does CONNECT only; plain http:// targets need it too (curl: --proxytunnel)"
        raise _bad(405, why, headers="Allow: CONNECT\r\n")
    for name, value in request.headers:
        if name == b"transfer-encoding" or (name == b"content-length" and value != b"0"):
            raise _bad(400, "a CONNECT has no body")
    try:
        return parse_authority_untrusted(request.target)
    except RemoteProtocolError:
        raise _bad(400, "the target of a CONNECT is host:port") from None


async def accept_http_connect(sock: socket.socket, *, timeout: float = HANDSHAKE_TIMEOUT) -> InBandWayIn:
    """Reads a CONNECT request from a connected, non-blocking socket.

    Args:
        sock: of the application; it is closed if this raises.
        timeout: seconds for the whole head.

    Raises:
        BadHandshake: there was none. The application got its answer.
    """
    parser = HttpConnectParser()
    target, source = await shake_hands(sock, parser, seconds=timeout)
    return InBandWayIn(
        target=target,
        source=source,
        sock=sock,
        leftover=parser.leftover,
        success=_SUCCESS,
        failure=lambda error: _refusal(failure_of(error).http_status, one_line(error)),
    )
