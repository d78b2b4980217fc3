"""Waypoints that are behind a node themselves: what they connect to goes on, and never to themselves again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from support.dataplanes import CART, STOCK, TD, THIEF, WAYPOINT, ask, hbone_peer, member, shop, until
from support.routes import gateway

from hbone.proxy._context import WorkloadInfo

if TYPE_CHECKING:
    from hbone.certs import LocalCA

HELLO, TWICE = b"hello world", b"hello worldhello world"
WAY_INFO = WorkloadInfo(namespace="shop", name="way-0", service_account="way")


@pytest.mark.parametrize(
    ("dedicated", "source", "through"),
    [
        pytest.param(None, WAYPOINT, False, id="from the waypoint"),
        pytest.param(None, THIEF, True, id="from another workload of its account"),
        pytest.param(None, CART, True, id="from a client"),
        pytest.param(WAY_INFO, WAYPOINT, False, id="from a node of its own"),
        pytest.param(WAY_INFO, "127.0.0.1", False, id="from a node of its own by loopback"),
    ],
)
async def test_a_waypoint_goes_on_directly(
    ca: LocalCA, dedicated: WorkloadInfo | None, source: str, through: bool
) -> None:
    """To the workload that it guards; for others that is the waypoint's to do."""
    async with hbone_peer(ca, f"{TD}/shop/sa/way", WAYPOINT) as peer:
        parts = member("way", WAYPOINT), member("double", THIEF, service_account="way")
        guarded: dict[str, Any] = {"waypoint": gateway(f"/{WAYPOINT}", peer.port)}
        async with shop(ca, *parts, near={"dedicated": dedicated}, stock_fields=guarded) as it:
            async with await it.near.connect(STOCK, it.app.port, source=source) as stream:
                assert await ask(stream) == (HELLO if through else TWICE)  # the peer echoes, the application doubles
            line = await it.near.log.next()
            assert line.dst_workload == ("way-0" if through else "stock-0")
            assert len(peer.requests) == through
            if not through:
                await until(lambda: it.far.log.records)
                assert str(it.far.log.records[0].src_identity) == f"{TD}/shop/sa/way"
