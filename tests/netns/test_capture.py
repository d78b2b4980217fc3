"""Capturing with netfilter's own rules, in a network namespace of the test's own."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
import trio
from support.namespaces import MARK, Namespace, accept, made_namespace, skip_unless_possible
from support.tcp import receive_all

from hbone.errors import ConnectFailed
from hbone.proxy._ways import BadHandshake, SilentWayIn

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

if sys.platform != "linux":
    pytest.skip("network namespaces are for Linux", allow_module_level=True)

from hbone.proxy._ways._capture import accept_captured

skip_unless_possible()

pytestmark = pytest.mark.netns

PORT = 15001

# 10.99.9.0/24 and fd99::/64 are redirected; 10.99.7.1 as well, but it is also an address of this machine;
# 10.99.8.0/24 and fd98::/64 go through TPROXY.
SETUP = f"""
ip link set lo up
ip address add 10.99.7.1/32 dev lo
ip route add 10.99.9.0/24 dev lo
ip route add 10.99.8.0/24 dev lo
ip -6 route add fd99::/64 dev lo
ip -6 route add fd98::/64 dev lo
iptables -w -t nat -A OUTPUT -p tcp -m mark --mark {MARK} -j ACCEPT
iptables -w -t nat -A OUTPUT -p tcp -d 10.99.9.0/24 -j REDIRECT --to-ports {PORT}
iptables -w -t nat -A OUTPUT -p tcp -d 10.99.7.1 --dport 80 -j REDIRECT --to-ports {PORT}
ip6tables -w -t nat -A OUTPUT -p tcp -d fd99::/64 -j REDIRECT --to-ports {PORT}
ip rule add fwmark 1 lookup 100
ip route add local 0.0.0.0/0 dev lo table 100
iptables -w -t mangle -A OUTPUT -p tcp -d 10.99.8.0/24 -j MARK --set-mark 1
iptables -w -t mangle -A PREROUTING -p tcp -d 10.99.8.0/24 -j TPROXY --on-port {PORT} --tproxy-mark 1
ip -6 rule add fwmark 1 lookup 100
ip -6 route add local ::/0 dev lo table 100
ip6tables -w -t mangle -A OUTPUT -p tcp -d fd98::/64 -j MARK --set-mark 1
ip6tables -w -t mangle -A PREROUTING -p tcp -d fd98::/64 -j TPROXY --on-port {PORT} --tproxy-mark 1
"""


@pytest.fixture(scope="module")
def namespace() -> Iterator[Namespace]:
    with made_namespace("capture", SETUP) as namespace:
        yield namespace


def accepted_in(namespace: Namespace, sock: socket.socket) -> SilentWayIn:
    """In the namespace, as a proxy would be: whose address a destination is, is asked there."""

    async def work() -> SilentWayIn:
        return await accept_captured(sock, own_ports={PORT})

    return namespace.call(lambda: trio.run(work))


@pytest.mark.parametrize(
    ("bind", "host", "transparent"),
    [
        ("0.0.0.0", "10.99.9.9", False),
        ("::", "10.99.9.9", False),
        ("::", "fd99::9", False),
        ("0.0.0.0", "10.99.7.1", False),
        ("0.0.0.0", "10.99.8.8", True),
        ("::", "10.99.8.8", True),
        ("::", "fd98::8", True),
    ],
    ids=lambda value: str(value),
)
async def test_the_original_destination(namespace: Namespace, bind: str, host: str, transparent: bool) -> None:
    with namespace.listener(bind, PORT, transparent=transparent) as listener:
        async with namespace.dial(host, 80) as application:
            way = await accept_captured(await accept(listener), own_ports={PORT})
            assert (way.target.host, way.target.port) == (host, 80)
            assert way.source.sockaddr[:2] == application.socket.getsockname()[:2]
            await way.succeeded()
            async with trio.SocketStream(trio.socket.from_stdlib_socket(way.sock)) as stream:
                await application.send_all(b"hello")
                assert await stream.receive_some() == b"hello"
                await stream.send_eof()
                assert await receive_all(application) == b""


async def test_a_failure_is_a_reset(namespace: Namespace) -> None:
    with namespace.listener("0.0.0.0", PORT) as listener:
        async with namespace.dial("10.99.9.9", 80) as application:
            way = await accept_captured(await accept(listener), own_ports={PORT})
            await way.failed(ConnectFailed("no"))
            with pytest.raises(trio.BrokenResourceError):
                await application.receive_some()


@pytest.mark.parametrize("host", ["127.0.0.1", "10.99.7.1", "::1"])
async def test_a_connection_straight_to_the_proxy_is_no_loop(namespace: Namespace, host: str) -> None:
    with namespace.listener("::", PORT, transparent=True) as listener:
        async with namespace.dial(host, PORT) as application:
            sock = await accept(listener)
            with pytest.raises(BadHandshake, match="this proxy itself"):
                accepted_in(namespace, sock)
            with pytest.raises(trio.BrokenResourceError):
                await application.receive_some()


async def test_the_same_port_elsewhere_is_a_target_like_others(namespace: Namespace) -> None:
    with namespace.listener("0.0.0.0", PORT) as listener:
        async with namespace.dial("10.99.9.9", PORT):
            sock = await accept(listener)
            way = accepted_in(namespace, sock)
            assert str(way.target) == f"10.99.9.9:{PORT}"
            sock.close()


async def test_the_mark_gets_the_proxys_own_connections_past_the_rules(namespace: Namespace) -> None:
    with namespace.listener("0.0.0.0", PORT) as proxy, namespace.listener("10.99.7.1", 80) as application:
        async with namespace.dial("10.99.7.1", 80, mark=MARK):
            (await accept(application)).close()
        async with namespace.dial("10.99.7.1", 80):
            (await accept(proxy)).close()
