"""A pool for each identity: made once, for all who ask, and gone when the identity is not ours any more."""

from __future__ import annotations

from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing
from support.dataplanes import STOCK, WAIT, application, ask, echo, samples, until

from hbone import (
    CertificateUnavailable,
    DialledAddress,
    ForwardHandler,
    HboneError,
    HBONEServer,
    SessionClosed,
    SpiffeIdentity,
)
from hbone.certs import SvidManager, local_ca_issuer
from hbone.proxy._context import NodeSettings
from hbone.proxy._pools import IdentityPools
from hbone.telemetry import Metrics

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from hbone import ConnectionPool
    from hbone.certs import LocalCA

A, B = (SpiffeIdentity.parse(f"spiffe://cluster.local/ns/shop/sa/{name}") for name in "ab")


@asynccontextmanager
async def pools_of(
    issue: Any, *, metrics: Metrics | None = None, patience: float = 10.0
) -> AsyncIterator[IdentityPools]:
    svids = SvidManager(issue)
    context: Any = SimpleNamespace(svids=svids, metrics=metrics, settings=NodeSettings())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(svids.run)
        async with IdentityPools(context, patience=patience) as pools:
            yield pools
        nursery.cancel_scope.cancel()


async def gather(count: int, pools: IdentityPools, identity: SpiffeIdentity) -> list[ConnectionPool | HboneError]:
    got: list[ConnectionPool | HboneError] = []

    async def get() -> None:
        try:
            got.append(await pools.get(identity))
        except HboneError as exc:
            got.append(exc)

    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(get)
    return got


async def test_one_pool_for_all_who_ask(ca: LocalCA) -> None:
    async with pools_of(local_ca_issuer(ca)) as pools:
        assert pools.ready(A) is None
        got = await gather(20, pools, A)
        assert set(got) == {pools.ready(A)}
        assert await pools.get(A) is pools.ready(A)
        (other,) = await gather(1, pools, B)
        assert other is pools.ready(B)
        assert pools.pools == {A: pools.ready(A), B: other}


async def test_an_identity_without_a_certificate() -> None:
    async def refuse(identity: SpiffeIdentity) -> Any:
        await trio.lowlevel.checkpoint()
        raise CertificateUnavailable(identity, "not today")

    async with pools_of(refuse) as pools:
        for error in await gather(5, pools, A):
            assert isinstance(error, CertificateUnavailable)
            assert "not today" in str(error)
        assert not pools.pools


async def test_all_wait_for_a_certificate_at_the_same_time(autojump_clock: trio.testing.MockClock) -> None:
    async def never(identity: SpiffeIdentity) -> Any:
        await trio.sleep_forever()

    async with pools_of(never) as pools:
        began = trio.current_time()
        for error in await gather(5, pools, A):
            assert isinstance(error, CertificateUnavailable)
            assert "none came within 10 s" in str(error)
        assert trio.current_time() - began == pytest.approx(10)


async def test_a_certificate_that_comes_late(ca: LocalCA) -> None:
    come = trio.Event()

    async def later(identity: SpiffeIdentity) -> Any:
        await come.wait()
        return ca.issue(identity)

    async with pools_of(later) as pools:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(gather, 3, pools, A)
            await trio.testing.wait_all_tasks_blocked()
            assert not pools.pools
            come.set()
        assert list(pools.pools) == [A]


async def test_who_asked_first_may_go(ca: LocalCA) -> None:
    """At any step: the pool is there for the others all the same."""
    for steps in range(12):
        async with pools_of(local_ca_issuer(ca)) as pools:
            scope = trio.CancelScope()

            async def get(scope: trio.CancelScope, pools: IdentityPools) -> None:
                with scope:
                    await pools.get(A)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(get, scope, pools)
                for _ in range(steps):
                    await trio.lowlevel.checkpoint()
                scope.cancel()
                with trio.fail_after(WAIT):
                    pool = await pools.get(A)
            assert pools.ready(A) is pool
            assert not pool.statistics().sessions
            assert "closed" not in repr(pool)


async def test_an_identity_that_is_not_ours_any_more(ca: LocalCA) -> None:
    """Its tunnels go on, new ones are of a new pool; what the old one counted stays counted."""
    metrics = Metrics()
    server = HBONEServer(ca.issue(B), ForwardHandler(DialledAddress()))
    async with application(STOCK, echo) as app, pools_of(local_ca_issuer(ca), metrics=metrics) as pools:
        async with trio.open_nursery() as nursery:
            via = await nursery.start(server.serve, STOCK, 0)
            old = await pools.get(A)
            await pools.get(B)
            tunnel = await old.open_tunnel(f"{STOCK}:{app.port}", via=via, expect=B)
            assert counted(metrics) == {"hbone_pool_requests": 1, "hbone_pool_tunnels": 1}
            pools.retain([B])
            assert list(pools.pools) == [B]
            new = await pools.get(A)
            assert new is not old
            await until(lambda: "closed" in repr(old))
            assert await ask(tunnel) == b"hello world"
            await until(lambda: not old.statistics().sessions)
            assert await ask(await new.open_tunnel(f"{STOCK}:{app.port}", via=via, expect=B)) == b"hello world"
            pools.retain([])
            assert not pools.pools
            pools.retain([A])
            await until(lambda: counted(metrics) == {"hbone_pool_requests": 2, "hbone_pool_tunnels": 0})
            nursery.cancel_scope.cancel()


def counted(metrics: Metrics) -> dict[str, float]:
    names = ("hbone_pool_requests", "hbone_pool_tunnels")
    return {name: sum(sample.value for sample in samples(metrics, name)) for name in names}


async def test_the_end(ca: LocalCA) -> None:
    waiting = trio.Event()

    async def slow(identity: SpiffeIdentity) -> Any:
        if identity == B:
            waiting.set()
            await trio.sleep_forever()
        return ca.issue(identity)

    async with pools_of(slow) as pools:
        pool = await pools.get(A)
        await pools.drain(0)
        assert "closed" in repr(pool)
        with pytest.raises(SessionClosed, match="stopping"):
            await pools.get(B)
        assert not waiting.is_set()
    assert not pools.pools
    with pytest.raises(SessionClosed, match="stopping"):
        await pools.get(A)


async def test_the_end_comes_while_somebody_waits(ca: LocalCA) -> None:
    come = trio.Event()

    async def later(identity: SpiffeIdentity) -> Any:
        await come.wait()
        return ca.issue(identity)

    async with pools_of(later) as pools, trio.open_nursery() as nursery:

        async def get() -> None:
            with pytest.raises(SessionClosed, match="stopping"):
                await pools.get(A)

        nursery.start_soon(get)
        await trio.testing.wait_all_tasks_blocked()
        await pools.drain(0)
        come.set()


async def test_the_end_comes_while_a_pool_opens(ca: LocalCA, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for it hears of the end, however the opening went."""
    from hbone.proxy import _pools

    class Slow(_pools.ConnectionPool):
        async def __aenter__(self) -> Any:
            await trio.sleep_forever()

    monkeypatch.setattr(_pools, "ConnectionPool", Slow)
    async with trio.open_nursery() as nursery:
        async with pools_of(local_ca_issuer(ca)) as pools:
            nursery.start_soon(_stopping, pools)
            await trio.testing.wait_all_tasks_blocked()
        assert not pools.pools


async def _stopping(pools: IdentityPools) -> None:
    with pytest.raises(SessionClosed, match="stopping"):
        await pools.get(A)
