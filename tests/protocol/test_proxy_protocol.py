"""PROXY v2 with the identity TLV: exact bytes, incremental reading, one exception for all that strangers send."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbone.address import Endpoint
from hbone.errors import RemoteProtocolError
from hbone.identity import SpiffeIdentity
from hbone.protocol._proxy_protocol import ProxyHeader

SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
CART = SpiffeIdentity.parse("spiffe://cluster.local/ns/shop/sa/cart")
V4 = ProxyHeader(source=Endpoint.parse("10.0.0.1:40000"), destination=Endpoint.parse("10.0.0.7:8080"))
V4_BYTES = SIGNATURE + b"\x21\x11\x00\x0c" + bytes([10, 0, 0, 1, 10, 0, 0, 7]) + b"\x9c\x40\x1f\x90"

endpoints = st.builds(Endpoint, st.ip_addresses(), st.integers(0, 65535))
identities = st.none() | st.builds(
    SpiffeIdentity.parse, st.from_regex(r"spiffe://[a-z0-9]{1,20}(/[a-zA-Z0-9_-]{1,10}){1,4}", fullmatch=True)
)
tlvs = st.lists(st.tuples(st.integers(0, 255).filter(lambda kind: kind != 0xD0), st.binary(max_size=50)), max_size=4)
headers = st.just(ProxyHeader()) | st.builds(
    ProxyHeader, source=endpoints, destination=endpoints, identity=identities, tlvs=tlvs.map(tuple)
)


@pytest.mark.wire("W-PROXY-2")
def test_ipv4_byte_for_byte() -> None:
    assert V4.encode() == V4_BYTES


@pytest.mark.wire("W-PROXY-2", "W-PROXY-3")
def test_ipv6_with_identity_byte_for_byte() -> None:
    header = ProxyHeader(source=Endpoint.parse("[fd00::1]:1"), destination=Endpoint.parse("[fd00::2]:2"), identity=CART)
    uri = b"spiffe://cluster.local/ns/shop/sa/cart"
    address = b"\xfd" + bytes(14)
    assert header.encode() == (
        SIGNATURE
        + b"\x21\x21\x00"
        + bytes([36 + 3 + len(uri)])
        + address
        + b"\x01"
        + address
        + b"\x02\x00\x01\x00\x02\xd0\x00"
        + bytes([len(uri)])
        + uri
    )


@pytest.mark.wire("W-PROXY-2")
def test_two_families_travel_as_ipv6() -> None:
    header = ProxyHeader(source=Endpoint.parse("10.0.0.1:1"), destination=Endpoint.parse("[fd00::2]:2"))
    data = header.encode()
    assert data[13] == 0x21
    assert data[16:32] == bytes(10) + b"\xff\xff\x0a\x00\x00\x01"
    assert ProxyHeader.parse_untrusted(data) == (header, len(data))


def test_local_byte_for_byte() -> None:
    assert ProxyHeader().encode() == SIGNATURE + b"\x20\x00\x00\x00"


@given(headers, st.binary(max_size=20))
def test_headers_come_back_as_they_were(header: ProxyHeader, rest: bytes) -> None:
    data = header.encode()
    assert ProxyHeader.parse_untrusted(data + rest) == (header, len(data))
    assert ProxyHeader.parse_untrusted(memoryview(bytearray(data + rest))) == (header, len(data))


@pytest.mark.wire("W-PROXY-4")
@given(headers)
def test_every_prefix_needs_more(header: ProxyHeader) -> None:
    data = header.encode()
    for end in range(len(data)):
        assert ProxyHeader.parse_untrusted(data[:end]) is None


@pytest.mark.wire("W-PROXY-4")
@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"G", id="HTTP"),
        pytest.param(b"PROXY TCP4 10.0.0.1 10.0.0.7 1 2\r\n", id="version 1"),
        pytest.param(SIGNATURE[:11] + b"x", id="signature"),
        pytest.param(SIGNATURE + b"\x11", id="version"),
        pytest.param(SIGNATURE + b"\x22", id="command"),
        pytest.param(SIGNATURE + b"\x21\x12", id="UDP"),
        pytest.param(SIGNATURE + b"\x21\x31", id="UNIX"),
        pytest.param(SIGNATURE + b"\x21\x11\x10\x00", id="too long"),
        pytest.param(SIGNATURE + b"\x21\x11\x00\x0b" + bytes(11), id="too short for IPv4"),
        pytest.param(SIGNATURE + b"\x21\x21\x00\x0c" + bytes(12), id="too short for IPv6"),
        pytest.param(SIGNATURE + b"\x21\x11\x00\x0d" + bytes(12) + b"\x01", id="TLV without length"),
        pytest.param(SIGNATURE + b"\x21\x11\x00\x0f" + bytes(12) + b"\x01\x00\x01", id="TLV without value"),
        pytest.param(SIGNATURE + b"\x21\x11\x00\x0f" + bytes(12) + b"\xd0\x00\x00", id="empty identity"),
        pytest.param(SIGNATURE + b"\x21\x11\x00\x10" + bytes(12) + b"\xd0\x00\x01\xff", id="identity not ASCII"),
    ],
)
def test_other_bytes_are_refused_as_soon_as_they_show(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        ProxyHeader.parse_untrusted(data)


@pytest.mark.wire("W-PROXY-3")
def test_two_identities_are_refused() -> None:
    tlv = b"\xd0\x00\x12spiffe://a.b/c/d/e"
    body = bytes(12) + tlv + tlv
    with pytest.raises(RemoteProtocolError, match="two identities"):
        ProxyHeader.parse_untrusted(SIGNATURE + b"\x21\x11" + len(body).to_bytes(2, "big") + body)


def test_unknown_origin_says_nothing() -> None:
    data = SIGNATURE + b"\x21\x00\x00\x05hello"
    assert ProxyHeader.parse_untrusted(data) == (ProxyHeader(), len(data))
    local = SIGNATURE + b"\x20\x11\x00\x0c" + bytes(12)
    assert ProxyHeader.parse_untrusted(local) == (ProxyHeader(), len(local))


@given(st.binary(max_size=60) | st.binary(max_size=80).map((SIGNATURE + b"\x21\x11\x00").__add__))
def test_arbitrary_bytes_cause_only_remote_protocol_errors(data: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        ProxyHeader.parse_untrusted(data)


@pytest.mark.parametrize(
    "arguments",
    [
        {"source": V4.source},
        {"destination": V4.source},
        {"identity": CART},
        {"tlvs": ((1, b""),)},
        {"source": V4.source, "destination": V4.source, "tlvs": ((0xD0, b""),)},
        {"source": V4.source, "destination": V4.source, "tlvs": ((256, b""),)},
        {"source": V4.source, "destination": V4.source, "tlvs": ((1, bytes(65536)),)},
    ],
)
def test_a_header_that_cannot_be_written(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"TLV|source"):
        ProxyHeader(**arguments)  # type: ignore[arg-type]


def test_a_header_that_is_too_long() -> None:
    header = ProxyHeader(source=V4.source, destination=V4.destination, tlvs=((1, bytes(65000)), (2, bytes(600))))
    with pytest.raises(ValueError, match="65,535"):
        header.encode()
