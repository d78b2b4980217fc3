"""What counts is what TLS proved and where HBONE lives by default; what headers say is only said."""

from __future__ import annotations

import inspect

import pytest
import trio

from hbone import (
    HBONE_PORT,
    DialledAddress,
    FixedTarget,
    ForwardHandler,
    HBONEClient,
    HBONEServer,
    IdentityPattern,
    LocalCA,
    PolicyDenied,
    TunnelRequest,
)
from hbone.address import Authority


@pytest.mark.wire("W-ID-8")
async def test_headers_that_claim_another_identity_open_nothing() -> None:
    ca = LocalCA.in_memory()
    server_svid = ca.issue("spiffe://cluster.local/ns/shop/sa/web")
    teller = ca.issue("spiffe://cluster.local/ns/bank/sa/teller")
    handler = ForwardHandler(
        FixedTarget(Authority("127.0.0.1", 9)), peers=[IdentityPattern.parse("spiffe://cluster.local/ns/shop/*")]
    )
    claims = [
        ("baggage", "k8s.namespace.name=shop,service.name=cart"),
        ("forwarded", 'for="10.0.0.1:40000";host=cart.shop.svc.cluster.local'),
        ("x-forwarded-client-cert", "URI=spiffe://cluster.local/ns/shop/sa/cart"),
    ]
    async with trio.open_nursery() as nursery:
        server = HBONEServer(server_svid, handler)
        here = await nursery.start(server.serve, "127.0.0.1", 0)
        async with HBONEClient.connect("127.0.0.1", here.port, svid=teller) as client:
            with pytest.raises(PolicyDenied):
                await client.open_tunnel("127.0.0.1:9", headers=claims)
        await server.drain(0)


@pytest.mark.wire("W-TCP-1")
async def test_the_port_is_15008_and_the_target_must_be_the_address_that_was_dialled() -> None:
    assert HBONE_PORT == 15008
    assert inspect.signature(HBONEClient.connect).parameters["port"].default == 15008
    assert inspect.signature(HBONEServer.serve).parameters["port"].default == 15008
    ca = LocalCA.in_memory()
    svid = ca.issue("spiffe://cluster.local/ns/shop/sa/web")
    dialled: list[str] = []

    async def handler(request: TunnelRequest) -> None:
        dialled.append(str(request.local_address))
        DialledAddress().resolve(request.target, request.local_address)
        await (await request.accept()).aclose()

    async with trio.open_nursery() as nursery:
        server = HBONEServer(svid, handler)
        here = await nursery.start(server.serve, "127.0.0.1", 0)
        async with HBONEClient.connect("127.0.0.1", here.port, svid=svid) as client:
            await (await client.open_tunnel("127.0.0.1:9")).aclose()
        await server.drain(0)
    assert dialled == [str(here)]
