"""Where to connect to: `Endpoint` is an IP address and port, `Authority` is what a CONNECT asks for.

Both hold one canonical spelling of what they mean (an IPv4 address mapped into IPv6 is the IPv4 address, host names are
lower case), because they are compared with allow lists and used as keys. What `getaddrinfo` alone takes for an address
(``127.1``, ``0x7f000001``) is refused, so that a check on the text and the dial that follows mean the same host.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

from hbone.errors import InvalidAddress, RemoteProtocolError

__all__ = ["Authority", "Endpoint", "parse_authority_untrusted"]

IPAddress: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
SockAddr: TypeAlias = tuple[str, int] | tuple[str, int, int, int]

MAX_PORT = 65535
MAX_HOST = 253
"""Longest host name, in bytes without a final dot (RFC 1035 section 3.1)."""

_PORT = re.compile(r"[1-9][0-9]{0,4}|0")
# The underscore is no letter of a host name, but names of Kubernetes and of SRV records have it.
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_SHOWN = 80


@dataclass(frozen=True, slots=True)
class Authority:
    """The target of a CONNECT: a host and a port (RFC 9113 section 8.5).

    Attributes:
        host: the canonical text of an IP address without brackets, or a host name in lower case (a final dot stays).
        port: 1 to 65535.

    Raises:
        InvalidAddress: the host is neither, or the port is out of range.
    """

    host: str
    port: int

    def __post_init__(self) -> None:
        host = _canonical_host(self.host)
        if host is not self.host:
            object.__setattr__(self, "host", host)
        if not 1 <= self.port <= MAX_PORT:
            raise _bad_port(self.port, lowest=1)

    @classmethod
    def parse(cls, text: str) -> Authority:
        """Parse ``host:port``, ``1.2.3.4:port`` or ``[::1]:port``.

        Raises:
            InvalidAddress: it is none of these; the message says what is wrong.
        """
        host, port = _split(text)
        try:
            return cls(host, port)
        except InvalidAddress as problem:
            raise InvalidAddress(f"{_shown(text)}: {problem}") from None

    @property
    def ip(self) -> IPAddress | None:
        """The host as an IP address, or None when it is a name."""
        try:
            return _parse_ip(self.host)
        except ValueError:
            return None

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_authority_untrusted(value: bytes | str) -> Authority:
    """Parse an ``:authority`` from the network: an IP address or a host name, and always a port.

    Raises:
        RemoteProtocolError: it is anything else. The answer to it is status 400 (wire profile, statuses).
    """
    try:
        text = value.decode("ascii") if isinstance(value, bytes) else value
        return Authority.parse(text)
    except (UnicodeDecodeError, InvalidAddress) as problem:
        why = problem if isinstance(problem, InvalidAddress) else "it is not ASCII"
        raise RemoteProtocolError(f"the peer sent a malformed :authority: {why}") from None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One end of a TCP connection.

    Attributes:
        ip: the address; an IPv4 address mapped into IPv6 becomes the IPv4 address.
        port: 0 to 65535; 0 only where a port is yet to be chosen.

    Raises:
        InvalidAddress: the port is out of range.
    """

    ip: IPAddress
    port: int

    def __post_init__(self) -> None:
        if self.ip.version == 6:
            object.__setattr__(self, "ip", _unmapped(self.ip))
        if not 0 <= self.port <= MAX_PORT:
            raise _bad_port(self.port, lowest=0)

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """Parse ``1.2.3.4:port`` or ``[::1]:port``; a zone (``[fe80::1%eth0]:port``) is kept.

        Raises:
            InvalidAddress: it is something else, a host name for example.
        """
        host, port = _split(text)
        try:
            return cls(_parse_ip(host), port)
        except InvalidAddress as problem:
            raise InvalidAddress(f"{_shown(text)}: {problem}") from None
        except ValueError:
            raise InvalidAddress(f"{_shown(text)}: {_shown(host)} is not an IP address") from None

    @classmethod
    def from_sockaddr(cls, sockaddr: tuple[object, ...]) -> Endpoint:
        """From what ``getpeername``, ``getsockname`` and ``accept`` give for AF_INET and AF_INET6.

        Raises:
            InvalidAddress: it is the address of another family.
        """
        match sockaddr:
            case (str(host), int(port)) | (str(host), int(port), _, 0):
                pass
            case (str(host), int(port), _, int(scope)):
                host = f"{host.partition('%')[0]}%{scope}"
            case _:
                raise InvalidAddress(f"{_shown(repr(sockaddr))} is not the address of an IP socket")
        try:
            return cls(_parse_ip(host), port)
        except InvalidAddress:
            raise
        except ValueError:
            raise InvalidAddress(f"{_shown(host)} is not an IP address") from None

    @property
    def sockaddr(self) -> SockAddr:
        """What ``connect`` and ``bind`` take."""
        if isinstance(self.ip, ipaddress.IPv4Address):
            return (str(self.ip), self.port)
        scope = self.ip.scope_id
        if scope is not None and scope.isdecimal():
            return (str(self.ip).partition("%")[0], self.port, 0, int(scope))
        return (str(self.ip), self.port, 0, 0)

    @property
    def authority(self) -> Authority:
        """The same place as the target of a CONNECT; a zone means nothing to a peer and is left out.

        Raises:
            InvalidAddress: the port is 0.
        """
        return Authority(str(self.ip).partition("%")[0], self.port)

    def __str__(self) -> str:
        return f"{self.ip}:{self.port}" if isinstance(self.ip, ipaddress.IPv4Address) else f"[{self.ip}]:{self.port}"


def _split(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or port.endswith("]"):
        raise InvalidAddress(f"{_shown(text)}: the port is missing; write host:port")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        if ":" not in host:
            raise InvalidAddress(f"{_shown(text)}: brackets are for IPv6 addresses only")
    elif ":" in host:
        raise InvalidAddress(f"{_shown(text)}: write an IPv6 address in brackets, as in [::1]:80")
    if not _PORT.fullmatch(port):
        raise InvalidAddress(f"{_shown(text)}: the port is not a plain decimal number")
    return host, int(port)


# A proxy sees few addresses, each of them thousands of times a second, and parsing one takes 2 us.
@lru_cache(maxsize=4096)
def _parse_ip(text: str) -> IPAddress:
    """Without a detour by IPv6: dual-stack listeners name each IPv4 peer as mapped, and looking inside takes long."""
    return _unmapped(ipaddress.ip_address(text))


@lru_cache(maxsize=4096)
def _canonical_host(host: str) -> str:
    if "%" in host:
        raise InvalidAddress(f"the host {_shown(host)} has a '%'; neither zones nor percent encoding are allowed")
    try:
        return str(_parse_ip(host))
    except ValueError:
        pass
    if not host:
        raise InvalidAddress("the host is empty")
    # Python's lower() would turn some letters outside ASCII into ASCII ones, such as the Kelvin sign.
    if not host.isascii():
        raise InvalidAddress(f"the host {_shown(host)} is not ASCII; write its IDNA form (xn--...)")
    name = host.lower()
    labels = name.removesuffix(".").split(".")
    for label in labels:
        if not _LABEL.fullmatch(label):
            what = "an empty label" if not label else f"the label {_shown(label)}"
            raise InvalidAddress(f"the host {_shown(host)} is not a host name: it has {what}")
    if _NUMBER.fullmatch(labels[-1]):
        raise InvalidAddress(f"the host {_shown(host)} is neither an IP address nor a host name: it ends in a number")
    if len(name.removesuffix(".")) > MAX_HOST:
        raise InvalidAddress(f"the host name is longer than {MAX_HOST} bytes")
    return name


def _unmapped(ip: IPAddress) -> IPAddress:
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        return ip.ipv4_mapped
    return ip


def _bad_port(port: int, *, lowest: int) -> InvalidAddress:
    return InvalidAddress(f"the port {port} is not between {lowest} and {MAX_PORT}")


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")
