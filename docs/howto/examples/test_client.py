import hashlib

import pytest
import trio

from hbone import HBONEClient, PolicyDenied, RequestRejected


@pytest.mark.trio
async def test_an_upload(hbone_server, hbone_svid):
    server = hbone_server("sink", identity="shop/db")

    async with HBONEClient.connect(*server.address, svid=hbone_svid("shop/cart"), expect=server.identity) as client:
        async with await client.open_tunnel("10.0.0.7:5432") as tunnel:
            await tunnel.send_all(b"some bytes")
            await tunnel.send_eof()
            assert await tunnel.receive_some() == b""

    (request,) = await trio.to_thread.run_sync(server.wait_for_requests)
    assert str(request.target) == "10.0.0.7:5432"
    assert request.sha256 == hashlib.sha256(b"some bytes").hexdigest()


@pytest.mark.trio
async def test_a_handler_of_ones_own(hbone_memory_session):
    async def only_the_shop(request):
        if request.peer.identity.namespace != "shop":
            raise RequestRejected(401)
        async with await request.accept() as tunnel:
            await tunnel.send_all(b"welcome")

    async with hbone_memory_session(only_the_shop, client="shop/cart") as session:
        async with await session.client.open_tunnel("10.0.0.7:5432") as tunnel:
            assert await tunnel.receive_some() == b"welcome"

    async with hbone_memory_session(only_the_shop, client="bank/teller") as session:
        with pytest.raises(PolicyDenied):
            await session.client.open_tunnel("10.0.0.7:5432")
