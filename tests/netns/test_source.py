"""Foreign source addresses and marks, with the rules and routes that an in-pod proxy has."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
import trio
from support.namespaces import MARK, Namespace, accept, made_namespace, skip_unless_possible
from support.tcp import receive_all

from hbone import ConnectionPool, HBONEServer
from hbone.certs import LocalCA
from hbone.errors import ConnectFailed
from hbone.transport import SocketOptions, connect_tcp, listen_tcp

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

if sys.platform != "linux":
    pytest.skip("network namespaces are for Linux", allow_module_level=True)

skip_unless_possible()

pytestmark = pytest.mark.netns

T = TypeVar("T")
SO_MARK = 36
APP = {4: "10.99.7.1", 6: "fd97::1"}
CLIENT = {4: "10.99.5.5", 6: "fd95::5"}
OPTIONS = SocketOptions(mark=MARK)

# Connections with the proxy's mark are remembered, and what answers them comes back to this machine, whomever it is
# addressed to. All others are redirected to a port at which nothing listens.
SETUP = "ip link set lo up\n" + "\n".join(
    f"""
ip {option} address add {APP[version]}/{bits} dev lo
ip {option} rule add fwmark 0x111/0xfff pref 32764 lookup 100
ip {option} route add local default dev lo table 100
ip {option} route add default dev lo
{tables} -w -t mangle -A PREROUTING -m mark --mark {MARK}/0xfff -j CONNMARK --set-xmark 0x111/0xfff
{tables} -w -t mangle -A OUTPUT -m connmark --mark 0x111/0xfff -j CONNMARK --restore-mark --nfmask 0xfff --ctmask 0xfff
{tables} -w -t nat -A OUTPUT -p tcp -m mark --mark 0x111/0xfff -j ACCEPT
{tables} -w -t nat -A OUTPUT -p tcp -m mark ! --mark {MARK}/0xfff -j REDIRECT --to-ports 9
""".strip()
    for version, option, tables, bits in ((4, "-4", "iptables", 32), (6, "-6", "ip6tables", 128))
)


@pytest.fixture(scope="module")
def namespace() -> Iterator[Namespace]:
    with made_namespace("source", SETUP) as namespace:
        yield namespace


def inside(namespace: Namespace, work: Callable[[], Awaitable[T]]) -> T:
    return namespace.call(lambda: trio.run(work))


async def talk(near: socket.socket, far: socket.socket) -> None:
    streams = [trio.SocketStream(trio.socket.from_stdlib_socket(sock)) for sock in (near, far)]
    async with streams[0] as one, streams[1] as other:
        for sender, receiver in ((one, other), (other, one)):
            await sender.send_all(bytes(100_000))
            await sender.send_eof()
            assert await receive_all(receiver) == bytes(100_000)


@pytest.mark.parametrize("version", [4, 6])
def test_an_application_sees_its_client_and_not_the_proxy(namespace: Namespace, version: int) -> None:
    async def work() -> None:
        with listen_tcp(APP[version], 80) as listener, trio.fail_after(60):
            sock = await connect_tcp(
                APP[version], 80, timeout=30, source_ip=CLIENT[version], transparent=True, options=OPTIONS
            )
            accepted = await accept(listener)
            assert accepted.getpeername()[0] == CLIENT[version]
            assert accepted.getpeername()[:2] == sock.getsockname()[:2]
            await talk(sock, accepted)

    inside(namespace, work)


@pytest.mark.parametrize("version", [4, 6])
def test_who_calls_itself_is_called_from_here(namespace: Namespace, version: int) -> None:
    async def work() -> None:
        with listen_tcp(APP[version], 80) as listener, trio.fail_after(60):
            sock = await connect_tcp(
                APP[version], 80, timeout=30, source_ip=APP[version], transparent=True, options=OPTIONS
            )
            accepted = await accept(listener)
            assert accepted.getpeername()[0] == APP[version]
            await talk(sock, accepted)

    inside(namespace, work)


def test_one_client_has_as_many_connections_as_it_needs(namespace: Namespace) -> None:
    """Each to another destination: the same port may serve all of them."""
    ports = Path("/proc/sys/net/ipv4/ip_local_port_range")

    async def work() -> None:
        ports.write_text("40000 40003")
        with trio.fail_after(60):
            socks: list[socket.socket] = []
            for port in range(90, 100):
                with listen_tcp(APP[4], port) as listener:
                    socks.append(
                        await connect_tcp(
                            APP[4], port, timeout=30, source_ip=CLIENT[4], transparent=True, options=OPTIONS
                        )
                    )
                    socks.append(await accept(listener))
            for sock in socks:
                sock.close()

    before = namespace.call(ports.read_text)
    try:
        inside(namespace, work)
    finally:
        namespace.call(lambda: ports.write_text(before))


@pytest.mark.parametrize("host", ["10.99.7.1", "fd97::1", "app.example"])
def test_the_mark_is_there_from_the_first_packet_on(namespace: Namespace, host: str) -> None:
    class Resolver(trio.abc.HostnameResolver):
        async def getaddrinfo(self, host: Any, port: Any, *_: Any) -> Any:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (APP[4], port))]

        async def getnameinfo(self, sockaddr: Any, flags: int) -> Any:
            raise NotImplementedError

    async def work() -> None:
        trio.socket.set_custom_hostname_resolver(Resolver())
        with listen_tcp("::", 80, options=OPTIONS) as listener, trio.fail_after(60):
            with pytest.raises(ConnectFailed, match="refused"):
                await connect_tcp(host, 80, timeout=30)
            with await connect_tcp(host, 80, timeout=30, options=OPTIONS) as sock, await accept(listener) as accepted:
                assert sock.getsockopt(socket.SOL_SOCKET, SO_MARK) == MARK
                assert accepted.getsockopt(socket.SOL_SOCKET, SO_MARK) == MARK

    inside(namespace, work)


@pytest.mark.parametrize("marked", [True, False])
def test_servers_and_pools_mark_their_connections(namespace: Namespace, marked: bool) -> None:
    async def work() -> None:
        ca = LocalCA.in_memory()
        near, far = (ca.issue(f"spiffe://cluster.local/ns/shop/sa/{name}") for name in ("near", "far"))

        async def handler(request: Any) -> None:
            async with await request.accept() as tunnel:
                await tunnel.send_all(b"hello")

        server = HBONEServer(far, handler, socket_options=OPTIONS)
        options = OPTIONS if marked else None
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery, ConnectionPool(near, socket_options=options) as pool:
                await nursery.start(server.serve, APP[4])
                opening = pool.open_tunnel("10.0.0.7:80", via=APP[4])
                if marked:
                    async with await opening as tunnel:
                        assert await tunnel.receive_some() == b"hello"
                else:
                    with pytest.raises(ConnectFailed, match="refused"):
                        await opening
                nursery.cancel_scope.cancel()

    inside(namespace, work)
