"""Authorities and endpoints: one spelling for each place, and nothing that only looks like one."""

from __future__ import annotations

import socket
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbone.address import Authority, Endpoint, parse_authority_untrusted
from hbone.errors import HboneError, InvalidAddress, RemoteProtocolError

ports = st.integers(1, 65535)
labels = st.from_regex(r"[a-z_]([a-z0-9_-]{0,10}[a-z0-9_])?", fullmatch=True)
names = st.lists(labels, min_size=1, max_size=5).map(".".join).filter(lambda n: not n.split(".")[-1].startswith("0x"))


@pytest.mark.parametrize(
    ("text", "host", "port", "canonical"),
    [
        ("1.2.3.4:80", "1.2.3.4", 80, "1.2.3.4:80"),
        ("[::1]:80", "::1", 80, "[::1]:80"),
        ("[ff06:0:0:0:0:0:0:C3]:65535", "ff06::c3", 65535, "[ff06::c3]:65535"),
        ("[::ffff:10.0.0.1]:1", "10.0.0.1", 1, "10.0.0.1:1"),
        ("web:80", "web", 80, "web:80"),
        ("Web.Shop.SVC.cluster.local:8080", "web.shop.svc.cluster.local", 8080, "web.shop.svc.cluster.local:8080"),
        ("example.com.:443", "example.com.", 443, "example.com.:443"),
        ("_sip._tcp.example.com:5060", "_sip._tcp.example.com", 5060, "_sip._tcp.example.com:5060"),
        ("xn--bcher-kva.example:80", "xn--bcher-kva.example", 80, "xn--bcher-kva.example:80"),
        ("1.2.3.4.example:80", "1.2.3.4.example", 80, "1.2.3.4.example:80"),
    ],
)
def test_authorities(text: str, host: str, port: int, canonical: str) -> None:
    authority = Authority.parse(text)
    assert (authority.host, authority.port, str(authority)) == (host, port, canonical)
    assert parse_authority_untrusted(text) == parse_authority_untrusted(text.encode()) == authority
    assert Authority(host, port) == authority


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        ":80",
        "web",
        "web:",
        "web:http",
        "web:0",
        "web:65536",
        "web:999999",
        "web:080",
        "web:+80",
        "web:-80",
        "web: 80",
        "web:8_0",
        "web:80 ",
        " web:80",
        "web\n:80",
        "web:80\n",
        "web:\N{ARABIC-INDIC DIGIT EIGHT}",
        "we b:80",
        "user@web:80",
        "user:pass@web:80",
        "http://web:80",
        "web:80/",
        "web/x:80",
        "web?x:80",
        "web..shop:80",
        ".web:80",
        "web..:80",
        ".:80",
        "-web:80",
        "web-:80",
        "web%41:80",
        "web,shop:80",
        "w\N{LATIN SMALL LETTER E WITH ACUTE}b:80",
        "\N{KELVIN SIGN}:80",
        "a\x00b:80",
        "::1:80",
        "::1",
        "[::1]",
        "[::1]80",
        "[::1:80",
        "::1]:80",
        "[[::1]]:80",
        "[]:80",
        "[1.2.3.4]:80",
        "[web]:80",
        "[fe80::1%eth0]:80",
        "[fe80::1%25eth0]:80",
        "[::g]:80",
        "1.2.3:80",
        "127.1:80",
        "2130706433:80",
        "0x7f000001:80",
        "0x7f.0.0.1:80",
        "127.0.0.0x1:80",
        "0x:80",
        "1.2.3.256:80",
        "01.2.3.4:80",
        "1.2.3.4.:80",
        "1.2.3.4.5:80",
        "web.1:80",
        "a" * 64 + ":80",
        ".".join(["a" * 60] * 5) + ":80",
        "x" * 100_000,
    ],
)
def test_refused_authorities(text: str) -> None:
    with pytest.raises(InvalidAddress) as caught:
        Authority.parse(text)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, HboneError)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    with pytest.raises(RemoteProtocolError):
        parse_authority_untrusted(text)
    with pytest.raises(RemoteProtocolError):
        parse_authority_untrusted(text.encode())


@given(st.one_of(st.binary(max_size=60), st.text(max_size=60), st.text("0123456789abcdefx.:[]%-", max_size=40)))
def test_untrusted_bytes_never_raise_anything_else(value: bytes | str) -> None:
    try:
        authority = parse_authority_untrusted(value)
    except RemoteProtocolError:
        return
    assert parse_authority_untrusted(str(authority)) == authority


@given(names, ports)
def test_names_round_trip(name: str, port: int) -> None:
    authority = Authority.parse(f"{name}:{port}")
    assert str(authority) == f"{name}:{port}"
    assert authority.ip is None
    assert Authority.parse(f"{name.upper()}:{port}") == authority


@given(st.ip_addresses(), ports)
def test_addresses_round_trip(ip: IPv4Address | IPv6Address, port: int) -> None:
    endpoint = Endpoint(ip, port)
    assert Endpoint.parse(str(endpoint)) == endpoint
    assert Endpoint.from_sockaddr(endpoint.sockaddr) == endpoint
    authority = endpoint.authority
    assert authority.ip == endpoint.ip
    assert Authority.parse(str(authority)) == authority
    assert str(authority) == str(endpoint)


def test_ports() -> None:
    assert Endpoint.parse("127.0.0.1:0").port == 0
    with pytest.raises(InvalidAddress, match="between 1 and 65535"):
        Authority("web", 0)
    with pytest.raises(InvalidAddress, match="between 0 and 65535"):
        Endpoint(ip_address("::1"), 65536)
    with pytest.raises(InvalidAddress, match="between 0 and 65535"):
        Endpoint.parse("127.0.0.1:70000")
    with pytest.raises(InvalidAddress):
        Endpoint.parse("127.0.0.1:0").authority  # noqa: B018


@pytest.mark.parametrize("text", ["web:80", "127.1:80", "::1:80", "[::1]", "1.2.3.4", "[1.2.3.4]:80", ":80"])
def test_refused_endpoints(text: str) -> None:
    with pytest.raises(InvalidAddress):
        Endpoint.parse(text)


def test_mapped_addresses_are_ipv4() -> None:
    mapped = Endpoint(ip_address("::ffff:10.0.0.1"), 80)
    assert mapped == Endpoint(ip_address("10.0.0.1"), 80)
    assert mapped.sockaddr == ("10.0.0.1", 80)
    assert Endpoint.from_sockaddr(("::ffff:10.0.0.1", 80, 0, 0)) == mapped


def test_zones_stay_with_endpoints() -> None:
    numbered = Endpoint.from_sockaddr(("fe80::1", 80, 0, 3))
    assert str(numbered) == "[fe80::1%3]:80"
    assert numbered.sockaddr == ("fe80::1", 80, 0, 3)
    assert Endpoint.from_sockaddr(("fe80::1%eth0", 80, 0, 3)) == numbered
    assert Endpoint.parse("[fe80::1%eth0]:80").sockaddr == ("fe80::1%eth0", 80, 0, 0)
    assert str(numbered.authority) == "[fe80::1]:80"


@pytest.mark.parametrize("sockaddr", [(), ("/run/socket",), ("web", 80), ("1.2.3.4", "80"), ("::1", 80, 0), (1, 2)])
def test_other_socket_addresses(sockaddr: tuple[object, ...]) -> None:
    with pytest.raises(InvalidAddress):
        Endpoint.from_sockaddr(sockaddr)
    with pytest.raises(InvalidAddress):
        Endpoint.from_sockaddr(("1.2.3.4", 70000))


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_the_address_of_a_real_socket(family: socket.AddressFamily) -> None:
    with socket.socket(family) as listener:
        listener.bind(("localhost" if family == socket.AF_INET else "::1", 0))
        endpoint = Endpoint.from_sockaddr(listener.getsockname())
        assert endpoint.ip.is_loopback
        assert endpoint.sockaddr == listener.getsockname()
