"""A node between netfilter's own rules: what applications send goes out, and in, through the data plane."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeVar

import pytest
import trio
from support.dataplanes import (
    HOSTNAME,
    TD,
    application,
    ask,
    at_rest,
    data_plane,
    double_echo,
    member,
    mesh_of,
    read_to_end,
    stock_service,
)
from support.meshes import policy
from support.namespaces import MARK, Namespace, made_namespace, skip_unless_possible

from hbone.certs import LocalCA
from hbone.mesh import Match, StringMatch, StringMatchKind
from hbone.proxy._context import NodeSettings
from hbone.transport import SocketOptions

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

if sys.platform != "linux":
    pytest.skip("network namespaces are for Linux", allow_module_level=True)

skip_unless_possible()

pytestmark = pytest.mark.netns

T = TypeVar("T")
CLIENT, SERVER, VIP, APP = "10.99.1.1", "10.99.1.2", "10.96.0.20", 8080

# One machine with the addresses of two workloads. What goes to a service, or to the server's application, is redirected
# unless it has the mark of the node itself.
SETUP = f"""
ip link set lo up
ip address add {CLIENT}/32 dev lo
ip address add {SERVER}/32 dev lo
ip route add 10.96.0.0/16 dev lo src {CLIENT}
iptables -w -t nat -A OUTPUT -p tcp -m mark --mark {MARK} -j ACCEPT
iptables -w -t nat -A OUTPUT -p tcp -d 10.96.0.0/16 -j REDIRECT --to-ports 15001
iptables -w -t nat -A OUTPUT -p tcp -d {SERVER} --dport {APP} -j REDIRECT --to-ports 15006
"""

SETTINGS = NodeSettings(keep_source=False, socket_options=SocketOptions(mark=MARK))
STRICT = policy("shop/strict", rules=(((Match(not_principals=(StringMatch(StringMatchKind.PRESENCE),)),),),))


@pytest.fixture(scope="module")
def namespace() -> Iterator[Namespace]:
    with made_namespace("node", SETUP) as namespace:
        yield namespace


def inside(namespace: Namespace, work: Callable[[], Awaitable[T]]) -> T:
    return namespace.call(lambda: trio.run(work))


async def end_of_connection(host: str, port: int) -> tuple[bytes, str]:
    """What a connection that asks for nothing gets; it may be reset already when it is made."""
    with trio.socket.socket() as sock:
        try:
            await sock.connect((host, port))
        except ConnectionResetError:
            return b"", "reset"
        return await read_to_end(trio.SocketStream(sock))


def test_out_and_in(namespace: Namespace) -> None:
    async def work() -> None:
        cart = member("cart", CLIENT)
        stock = member("stock", SERVER, endpoint_of={f"shop/{HOSTNAME}": {80: APP}})
        mesh = mesh_of(cart, stock, stock_service())
        with trio.fail_after(60):
            async with application(SERVER, double_echo, port=APP):
                async with data_plane(mesh, ca=LocalCA.in_memory(), listen=SERVER, settings=SETTINGS) as node:
                    await node.nursery.start(node.outbound.serve_captured, "0.0.0.0", 15001)
                    await node.nursery.start(node.plaintext.serve, "0.0.0.0", 15006)

                    async with await trio.open_tcp_stream(VIP, 80) as stream:  # to a service: out, and in by HBONE
                        assert await ask(stream) == b"hello worldhello world"
                    await at_rest(node)
                    lines = {record.direction.value: record for record in node.log.records}
                    assert {str(record.dst_hbone_addr) for record in lines.values()} == {f"{SERVER}:{APP}"}
                    assert lines["outbound"].src_workload == "cart-0"
                    assert str(lines["inbound"].src_identity) == f"{TD}/shop/sa/cart"

                    node.log.records.clear()
                    async with await trio.open_tcp_stream(SERVER, APP) as stream:  # to the workload: in as plain text
                        assert await ask(stream) == b"hello worldhello world"
                    await at_rest(node)
                    (line,) = node.log.records
                    assert (line.src_identity, line.dst_workload) == (None, "stock-0")
                    assert str(line.dst_addr) == f"{SERVER}:{APP}"

                    node.mesh.replace(node.mesh.snapshot.with_changes(upsert=[STRICT]))
                    assert await end_of_connection(SERVER, APP) == (b"", "reset")
                    async with await trio.open_tcp_stream(VIP, 80) as stream:
                        assert await ask(stream) == b"hello worldhello world"

                    for host in (SERVER, "127.0.0.1"):  # straight to the ports of the node
                        for port in (15001, 15006):
                            assert await end_of_connection(host, port) == (b"", "reset")
                    assert await end_of_connection(VIP, 81) == (b"", "reset")
                    await at_rest(node)
                    assert node.log.records[-1].error == f"no healthy upstream: {VIP}:81"

    inside(namespace, work)
