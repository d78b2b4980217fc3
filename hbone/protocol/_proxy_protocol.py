"""PROXY protocol version 2, with the TLV that carries a SPIFFE identity.

A proxy that ends HBONE in front of an application (or of a waypoint behind it) loses what the application may want to
know: who called, and what for. This header, written before the first byte of the tunnel, says it. Type 0xD0 is Istio's:
the peer's SPIFFE id, proven by the handshake (wire profile, PROXY protocol).

Whoever accepts this header believes it: only a sender that nobody else can impersonate (loopback, a private network)
may be listened to.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from hbone.address import Endpoint
from hbone.errors import InvalidIdentity, RemoteProtocolError
from hbone.identity import SpiffeIdentity

__all__ = ["ProxyHeader"]

_SIGNATURE: Final = b"\r\n\r\n\0\r\nQUIT\n"
_FIXED: Final = 16

_VERSION_LOCAL: Final = 0x20
_VERSION_PROXY: Final = 0x21
_UNSPECIFIED: Final = 0x00
_TCP4: Final = 0x11
_TCP6: Final = 0x21

_TLV_IDENTITY: Final = 0xD0
_MAPPED: Final = bytes(10) + b"\xff\xff"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyHeader:
    """One PROXY v2 header.

    Attributes:
        source: who connected; None for a connection of the proxy's own (LOCAL), or of unknown origin.
        destination: what was asked for; None exactly if ``source`` is.
        identity: the proven SPIFFE id of the peer, if any (TLV 0xD0).
        tlvs: the other TLVs as (type, value), in order.

    Raises:
        ValueError: one address without the other, an identity or TLV without addresses, a bad TLV.
    """

    source: Endpoint | None = None
    destination: Endpoint | None = None
    identity: SpiffeIdentity | None = None
    tlvs: tuple[tuple[int, bytes], ...] = ()

    def __post_init__(self) -> None:
        if (self.source is None) is not (self.destination is None):
            raise ValueError("source and destination go together")
        if self.source is None and (self.identity is not None or self.tlvs):
            raise ValueError("an identity or TLV needs addresses")
        for kind, value in self.tlvs:
            if not 0 <= kind <= 255 or kind == _TLV_IDENTITY or len(value) > 0xFFFF:
                raise ValueError(f"bad TLV of type {kind}")

    def encode(self) -> bytes:
        """The header's bytes. Addresses of two families are written as IPv6, the IPv4 one mapped.

        Raises:
            ValueError: more than 65,535 bytes of addresses and TLVs.
        """
        if self.source is None or self.destination is None:
            return _SIGNATURE + bytes((_VERSION_LOCAL, _UNSPECIFIED, 0, 0))
        source, destination = self.source.ip, self.destination.ip
        ports = struct.pack("!HH", self.source.port, self.destination.port)
        if source.version == destination.version == 4:
            family = _TCP4
            body = source.packed + destination.packed + ports
        else:
            family = _TCP6
            body = _packed16(source) + _packed16(destination) + ports
        tlvs = self.tlvs
        if self.identity is not None:
            tlvs = ((_TLV_IDENTITY, str(self.identity).encode("ascii")), *tlvs)
        body += b"".join(struct.pack("!BH", kind, len(value)) + value for kind, value in tlvs)
        if len(body) > 0xFFFF:
            raise ValueError("PROXY header longer than 65,535 bytes")
        return _SIGNATURE + struct.pack("!BBH", _VERSION_PROXY, family, len(body)) + body

    @classmethod
    def parse_untrusted(
        cls, data: bytes | bytearray | memoryview, *, max_length: int = 4096
    ) -> tuple[ProxyHeader, int] | None:
        """Read a header from the front of ``data``.

        Returns:
            The header and how many bytes of ``data`` it took, or None while more bytes are needed.

        Raises:
            RemoteProtocolError: these bytes are not, and will not become, a PROXY v2 header over TCP of at most
                ``max_length`` bytes.
        """
        start = bytes(data[:_FIXED])
        if start[:12] != _SIGNATURE[: len(start)]:
            raise RemoteProtocolError("not a PROXY v2 header")
        if len(start) > 12 and start[12] not in (_VERSION_LOCAL, _VERSION_PROXY):
            raise RemoteProtocolError(f"PROXY version and command 0x{start[12]:02x}")
        if len(start) > 13 and start[13] not in (_UNSPECIFIED, _TCP4, _TCP6):
            raise RemoteProtocolError(f"PROXY address family and protocol 0x{start[13]:02x}, not TCP")
        if len(start) < _FIXED:
            return None
        end = _FIXED + int.from_bytes(start[14:], "big")
        if end > max_length:
            raise RemoteProtocolError(f"PROXY header of {end} bytes")
        if len(data) < end:
            return None
        if start[12] == _VERSION_LOCAL or start[13] == _UNSPECIFIED:
            return cls(), end
        return cls._parse_body_untrusted(bytes(data[_FIXED:end]), 4 if start[13] == _TCP4 else 16), end

    @classmethod
    def _parse_body_untrusted(cls, body: bytes, size: int) -> ProxyHeader:
        position = 2 * size + 4
        if len(body) < position:
            raise RemoteProtocolError("PROXY header too short for its addresses")
        source_port, destination_port = struct.unpack_from("!HH", body, 2 * size)
        identity: SpiffeIdentity | None = None
        others: list[tuple[int, bytes]] = []
        while position < len(body):
            kind = body[position]
            begin = position + 3
            position = begin + int.from_bytes(body[position + 1 : begin], "big")
            if begin > len(body) or position > len(body):
                raise RemoteProtocolError("PROXY TLV cut short")
            value = body[begin:position]
            if kind != _TLV_IDENTITY:
                others.append((kind, value))
                continue
            if identity is not None:
                raise RemoteProtocolError("PROXY header with two identities")
            try:
                identity = SpiffeIdentity.parse(value.decode("ascii"))
            except (InvalidIdentity, UnicodeDecodeError) as error:
                # Reading it as "no identity" would let a policy for plain-text peers judge it.
                raise RemoteProtocolError(f"PROXY identity is no SPIFFE id: {value[:100]!r}") from error
        return cls(
            source=Endpoint(ip=_address(body[:size]), port=source_port),
            destination=Endpoint(ip=_address(body[size : 2 * size]), port=destination_port),
            identity=identity,
            tlvs=tuple(others),
        )


def _packed16(ip: IPv4Address | IPv6Address) -> bytes:
    return ip.packed if ip.version == 6 else _MAPPED + ip.packed


def _address(packed: bytes) -> IPv4Address | IPv6Address:
    return IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed)
