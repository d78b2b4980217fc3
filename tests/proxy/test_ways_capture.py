"""Capturing, as far as it goes without netfilter: what is refused, and what the errors say."""

from __future__ import annotations

import errno
import socket
import sys
from typing import Any

import pytest
import trio
from support.tcp import connected_pair

from hbone.address import Endpoint
from hbone.proxy._ways import BadHandshake

if sys.platform != "linux":
    pytest.skip("capturing is for Linux", allow_module_level=True)

from hbone.proxy._ways._capture import accept_captured, original_destination
from hbone.transport import set_mark, set_transparent


async def test_without_a_rule_the_destination_is_the_sockets_own_address() -> None:
    application, sock = connected_pair()
    async with application:
        assert original_destination(sock).sockaddr == sock.getsockname()
        way = await accept_captured(sock, own_ports={1})
        assert way.target.port == sock.getsockname()[1]
        assert way.source.sockaddr == application.socket.getsockname()
        sock.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1"])
async def test_a_connection_straight_to_us_is_refused_with_a_reset(host: str) -> None:
    try:
        application, sock = connected_pair(host)
    except OSError as error:
        pytest.skip(f"no {host} here: {error}")
    async with application:
        with pytest.raises(BadHandshake, match="this proxy itself"):
            await accept_captured(sock, own_ports={sock.getsockname()[1]})
        assert sock.fileno() == -1
        with pytest.raises(trio.BrokenResourceError):
            await application.receive_some()


async def test_an_application_that_left() -> None:
    application, sock = connected_pair()
    application.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    await application.aclose()
    await trio.lowlevel.wait_readable(sock)
    with pytest.raises(BadHandshake, match="left"):
        await accept_captured(sock, own_ports=())
    assert sock.fileno() == -1


class Table(socket.socket):
    """A socket whose entry in the connection table a test writes."""

    entry: bytes | OSError = b""

    def getsockopt(self, level: int, option: int, size: int = 0) -> Any:
        assert option == 80
        if isinstance(self.entry, OSError):
            raise self.entry
        assert size == len(self.entry)
        return self.entry


@pytest.mark.parametrize(
    ("family", "entry", "text"),
    [
        (socket.AF_INET, "0200 1f90 0a090909 0000000000000000", "10.9.9.9:8080"),
        (socket.AF_INET6, "0a00 0050 00000000 fd990000000000000000000000000009 00000000", "[fd99::9]:80"),
        (socket.AF_INET6, "0a00 0050 00000000 00000000000000000000ffff0a090909 00000000", "10.9.9.9:80"),
    ],
)
def test_what_the_kernel_answers(family: int, entry: str, text: str) -> None:
    with Table(family) as sock:
        sock.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", 0))
        sock.entry = bytes.fromhex(entry)
        assert original_destination(sock) == Endpoint.parse(text)


def test_errors_of_the_kernel_that_mean_no_entry_and_those_that_do_not() -> None:
    with Table(socket.AF_INET) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.entry = OSError(errno.ENOENT, "no entry")
        assert original_destination(sock) == Endpoint.from_sockaddr(sock.getsockname())
        sock.entry = OSError(errno.ENOTCONN, "gone")
        with pytest.raises(OSError, match="gone"):
            original_destination(sock)


async def test_a_target_without_a_port_is_refused() -> None:
    application, sock = connected_pair()
    async with application:
        table = Table(fileno=sock.detach())
        table.entry = bytes.fromhex("0200 0000 0a090909 0000000000000000")
        with pytest.raises(BadHandshake, match="port"):
            await accept_captured(table, own_ports=())
        assert table.fileno() == -1


class Powerless(socket.socket):
    """A socket of a process without capabilities."""

    def setsockopt(self, *_arguments: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_missing_capabilities_are_named(family: int) -> None:
    with Powerless(family) as sock:
        with pytest.raises(PermissionError, match="packet mark 0x539 needs CAP_NET_ADMIN"):
            set_mark(sock, 0x539)
        with pytest.raises(PermissionError, match="need CAP_NET_ADMIN or CAP_NET_RAW"):
            set_transparent(sock)
