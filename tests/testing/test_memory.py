"""A session in memory: any clock, no port, with and without pytest-trio."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from hbone import ConnectFailed, LocalCA, PolicyDenied, RequestRejected, TunnelRequest, Unreachable
from hbone.testing import memory_session

if TYPE_CHECKING:
    from collections.abc import Callable


async def test_a_session_in_memory(hbone_memory_session: Callable[..., Any], autojump_clock: Any) -> None:
    async with hbone_memory_session("echo", client="shop/cart", server="shop/web") as session:
        assert str(session.client.peer.identity) == "spiffe://cluster.local/ns/shop/sa/web"
        async with await session.client.open_tunnel("10.0.0.7:80") as tunnel:
            await tunnel.send_all(b"hello")
            assert await tunnel.receive_some() == b"hello"
            assert session.server.statistics().tunnels == 1
            await trio.sleep(3600)  # on the test's clock, pings and all
            await tunnel.send_all(b"again")
            await tunnel.send_eof()
            assert b"".join([bytes(chunk) async for chunk in tunnel]) == b"again"
        await trio.testing.wait_all_tasks_blocked()
        (received,) = session.requests
        assert (received.status, received.bytes_received, received.done) == (200, 10, True)
        assert str(received.peer.identity) == "spiffe://cluster.local/ns/shop/sa/cart"


def test_without_pytest_trio() -> None:
    async def main() -> bytes:
        async with memory_session() as session, await session.client.open_tunnel("10.0.0.7:80") as tunnel:
            await tunnel.send_all(b"hello")
            return bytes(await tunnel.receive_some())

    assert trio.run(main) == b"hello"


async def test_the_error_of_the_block_comes_out_as_it_is() -> None:
    with pytest.raises(LookupError, match="mine"):
        async with memory_session():
            raise LookupError("mine")


async def test_a_refusal_is_for_the_client() -> None:
    async def handler(request: TunnelRequest) -> None:
        raise RequestRejected(401)

    async with memory_session(handler) as session:
        with pytest.raises(PolicyDenied):
            await session.client.open_tunnel("10.0.0.7:80")
        assert [received.status for received in session.requests] == [401]


async def test_a_fault_in_the_handler_is_raised_at_the_end() -> None:
    async def handler(request: TunnelRequest) -> None:
        raise LookupError("a fault in the handler")

    async def script() -> None:
        async with memory_session(handler) as session:
            with pytest.raises(Unreachable):
                await session.client.open_tunnel("10.0.0.7:80")

    with pytest.raises(LookupError, match="a fault"):
        await script()


async def test_svids_of_ones_own() -> None:
    foreign = LocalCA.in_memory().issue("spiffe://cluster.local/ns/shop/sa/cart")
    with pytest.raises(ConnectFailed):
        async with memory_session(client=foreign):
            raise AssertionError("not reached")
