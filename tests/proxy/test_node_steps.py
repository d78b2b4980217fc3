"""The data plane, stopped at every step of a connection: no task, file, tunnel, entry or count is left behind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio
from support.dataplanes import (
    STOCK,
    TD,
    VIP,
    Names,
    across,
    echo,
    shop,
)
from support.routes import app_tunnel
from support.steps import everywhere, in_one_order
from support.tcp import connected_pair

from hbone import Endpoint, HBONEClient
from hbone.mesh import TunnelProtocol
from hbone.proxy._ways import SilentWayIn, accept_socks5

if TYPE_CHECKING:
    from hbone.certs import LocalCA

both_moments = pytest.mark.parametrize("waking", [False, True], ids=["waiting", "waking"])


@pytest.fixture(autouse=True)
def always_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    in_one_order(monkeypatch)


async def talk(stream: trio.SocketStream, request: bytes = b"") -> None:
    """An application that says where to, something, and the end; and reads to the end."""
    await stream.send_all(request + b"hello")
    await stream.send_eof()
    async for _ in stream:
        pass


def socks(host: str, port: int) -> bytes:
    name = host.encode()
    return b"\5\1\0" + b"\5\1\0\3" + bytes([len(name)]) + name + port.to_bytes(2, "big")


async def carried(node: Any, host: str, port: int) -> None:
    """One connection of an application; both ends of the way in are of this task's."""
    near, sock = connected_pair()
    async with near, trio.open_nursery() as nursery:
        nursery.start_soon(node.outbound._carry, accept_socks5, sock)
        await talk(near, socks(host, port))


@both_moments
@pytest.mark.parametrize("kind", ["tunnel", "plain", "name"])
async def test_out(ca: LocalCA, waking: bool, kind: str) -> None:
    fields = {"protocol": TunnelProtocol.TCP if kind == "plain" else TunnelProtocol.HBONE}
    async with shop(ca, habit=echo, stock_fields=fields) as it:
        Names(alias_example=[STOCK])
        target = ("alias.example", it.app.port) if kind == "name" else (VIP, 80)

        async def check() -> None:
            await it.near.ask(*target)
            await it.at_rest()

        await check()
        steps = await everywhere(lambda: carried(it.near, *target), check, waking=waking)
        assert steps > 5


@both_moments
async def test_out_across_networks(ca: LocalCA, waking: bool) -> None:
    async with across(ca, habit=echo) as it:
        await it.near.ask(VIP, 80)
        steps = await everywhere(lambda: carried(it.near, VIP, 80), it.at_rest, waking=waking)
        assert steps > 20
        await it.near.ask(VIP, 80)


@both_moments
@pytest.mark.parametrize("kind", ["plain", "proxy"])
async def test_in(ca: LocalCA, waking: bool, kind: str) -> None:
    fields = app_tunnel(None) if kind == "proxy" else {}
    async with shop(ca, habit=echo, stock_fields=fields, far={"localhost_app_tunnel": False}) as it:
        svid = ca.issue(f"{TD}/shop/sa/cart")
        async with HBONEClient.connect(STOCK, it.port, svid=svid) as client:

            async def asks() -> None:
                async with await client.open_tunnel(f"{STOCK}:{it.app.port}") as tunnel:
                    await tunnel.send_all(b"hello")
                    await tunnel.send_eof()
                    async for _ in tunnel:
                        pass

            async def check() -> None:
                await asks()
                await it.at_rest()

            await check()
            steps = await everywhere(asks, check, waking=waking)
            assert steps > 5


@both_moments
async def test_in_as_plain_text(ca: LocalCA, waking: bool) -> None:
    async with shop(ca, habit=echo) as it:
        target = Endpoint.parse(f"{STOCK}:{it.app.port}")

        async def asks() -> None:
            near, sock = connected_pair()
            way = SilentWayIn(target=target.authority, source=Endpoint.from_sockaddr(sock.getpeername()), sock=sock)
            async with near, trio.open_nursery() as nursery:
                nursery.start_soon(it.far.plaintext._carry, way)
                await talk(near)

        async def check() -> None:
            await asks()
            await it.at_rest()

        await check()
        steps = await everywhere(asks, check, waking=waking)
        assert steps > 3
