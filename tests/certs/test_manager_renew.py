"""An SVID is asked for again when somebody knows of a newer one."""

from __future__ import annotations

import trio
import trio.testing

from hbone.certs import LocalCA, SvidManager, local_ca_issuer
from hbone.identity import SpiffeIdentity

CART = SpiffeIdentity.parse("spiffe://cluster.local/ns/shop/sa/cart")
DB = SpiffeIdentity.parse("spiffe://cluster.local/ns/shop/sa/db")


async def test_renewed_on_request(nursery, autojump_clock):
    manager = SvidManager(local_ca_issuer(LocalCA.in_memory()))
    await nursery.start(manager.run)
    manager.want([CART])
    first = await manager.get(CART)
    source = manager.source(CART)
    manager.renew(CART)
    assert source.current() is first
    await trio.testing.wait_all_tasks_blocked()
    assert source.current() is not first
    manager.renew(DB)  # nobody wants it
    await trio.testing.wait_all_tasks_blocked()
    assert [status.identity for status in manager.states()] == [CART]
