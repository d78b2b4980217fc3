"""``--socks PORT``: SOCKS5 (RFC 1928) without authentication, CONNECT only; IPv4, IPv6 and names.

A name is handed on as it is: the proxy resolves it. The reply is sent when the tunnel is up.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

from hbone.address import Authority
from hbone.errors import InvalidAddress
from hbone.proxy._ways._base import HANDSHAKE_TIMEOUT, BadHandshake, InBandWayIn, shake_hands
from hbone.proxy._ways._failure import failure_of

if TYPE_CHECKING:
    import socket

__all__ = ["Socks5Parser", "accept_socks5"]

_VERSION = 5
_NO_AUTHENTICATION = 0x00
_NO_ACCEPTABLE_METHOD = 0xFF
_CONNECT = 0x01
_IPV4, _NAME, _IPV6 = 0x01, 0x03, 0x04

_SUCCEEDED = 0x00
_GENERAL_FAILURE = 0x01
_COMMAND_NOT_SUPPORTED = 0x07
_ADDRESS_TYPE_NOT_SUPPORTED = 0x08

_SOCKS4_REJECTED = bytes((0, 91, 0, 0, 0, 0, 0, 0))


def _reply(code: int) -> bytes:
    """A reply (RFC 1928 section 6). The bound address is all zeros: the far end of a tunnel has none to show."""
    return bytes((_VERSION, code, 0, _IPV4, 0, 0, 0, 0, 0, 0))


class Socks5Parser:
    """The server side of the handshake, sans-IO: `feed` bytes, send what it gives, until `target` is there.

    Attributes:
        target: what the application asked for, or None as long as it is not known.
    """

    def __init__(self) -> None:
        self.target: Authority | None = None
        self._greeted = False
        self._buffer = bytearray()

    @property
    def leftover(self) -> bytes:
        """What came behind the request."""
        return bytes(self._buffer) if self.target is not None else b""

    def feed(self, data: bytes) -> bytes:
        """Takes what arrived, gives what to send.

        Raises:
            BadHandshake: it is not a SOCKS5 CONNECT that we can do; with the answer to that.
        """
        self._buffer += data
        answer = b""
        if self.target is not None:
            return answer
        if not self._greeted:
            answer = self._greeting()
        try:
            if self._greeted:
                self._request()
        except BadHandshake as problem:
            problem.answer = answer + problem.answer  # an application that did not wait still wants both
            raise
        return answer

    def late(self) -> bytes:
        """What to send when the time is up."""
        return _reply(_GENERAL_FAILURE) if self._greeted else b""

    def _greeting(self) -> bytes:
        """RFC 1928 section 3."""
        buffer = self._buffer
        if buffer and buffer[0] != _VERSION:
            if buffer[0] == 4:
                raise BadHandshake("the application speaks SOCKS4; this port speaks SOCKS5", _SOCKS4_REJECTED)
            hint = "; an HTTP proxy is another port" if chr(buffer[0]) in "CDGHOPT" else ""
            raise BadHandshake(f"the application does not speak SOCKS5 (first byte 0x{buffer[0]:02x}){hint}")
        if len(buffer) < 2 or len(buffer) < 2 + buffer[1]:
            return b""
        methods = bytes(buffer[2 : 2 + buffer[1]])
        del buffer[: 2 + len(methods)]
        if _NO_AUTHENTICATION not in methods:
            answer = bytes((_VERSION, _NO_ACCEPTABLE_METHOD))
            raise BadHandshake("the application wants to authenticate, which this port does not do", answer)
        self._greeted = True
        return bytes((_VERSION, _NO_AUTHENTICATION))

    def _request(self) -> None:
        """RFC 1928 section 4."""
        buffer = self._buffer
        if buffer and buffer[0] != _VERSION:
            raise BadHandshake("the SOCKS5 request has another version", _reply(_GENERAL_FAILURE))
        if len(buffer) >= 2 and buffer[1] != _CONNECT:
            name = {2: "BIND", 3: "UDP ASSOCIATE"}.get(buffer[1], f"0x{buffer[1]:02x}")
            raise BadHandshake(f"SOCKS5 command {name}: only CONNECT is supported", _reply(_COMMAND_NOT_SUPPORTED))
        if len(buffer) < 5:
            if len(buffer) == 4:
                _check_address_type(buffer[3])
            return
        _check_address_type(buffer[3])
        start, length = (5, buffer[4]) if buffer[3] == _NAME else (4, 4 if buffer[3] == _IPV4 else 16)
        end = start + length
        if len(buffer) < end + 2:
            return
        address = bytes(buffer[start:end])
        port = int.from_bytes(buffer[end : end + 2], "big")
        try:
            host = address.decode("ascii") if buffer[3] == _NAME else str(ipaddress.ip_address(address))
            target = Authority(host, port)
        except (UnicodeDecodeError, InvalidAddress) as problem:
            why = problem if isinstance(problem, InvalidAddress) else "the host name is not ASCII"
            raise BadHandshake(f"SOCKS5 target: {why}", _reply(_GENERAL_FAILURE)) from None
        del buffer[: end + 2]
        self.target = target


def _check_address_type(kind: int) -> None:
    if kind not in (_IPV4, _NAME, _IPV6):
        raise BadHandshake(f"SOCKS5 address type 0x{kind:02x} is not known", _reply(_ADDRESS_TYPE_NOT_SUPPORTED))


async def accept_socks5(sock: socket.socket, *, timeout: float = HANDSHAKE_TIMEOUT) -> InBandWayIn:
    """Reads a SOCKS5 request from a connected, non-blocking socket.

    Args:
        sock: of the application; it is closed if this raises.
        timeout: seconds for the whole handshake.

    Raises:
        BadHandshake: there was none that we can do. The application got its answer.
    """
    parser = Socks5Parser()
    target, source = await shake_hands(sock, parser, seconds=timeout)
    return InBandWayIn(
        target=target,
        source=source,
        sock=sock,
        leftover=parser.leftover,
        success=_reply(_SUCCEEDED),
        failure=lambda error: _reply(failure_of(error).socks_reply),
    )
