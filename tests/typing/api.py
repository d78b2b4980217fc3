"""The public API as users write it. mypy and pyright read this file; it is never run.

`assert_type` is for what a user relies on without thinking: what an ``async with`` gives, what a property is.
"""

from __future__ import annotations

from typing import assert_type

import trio

from hbone import (
    Authority,
    BadTarget,
    ConnectFailed,
    ConnectionPool,
    Endpoint,
    FileSvidSource,
    FixedTarget,
    ForwardHandler,
    HBONEClient,
    HboneError,
    HBONEServer,
    IdentityPattern,
    Limits,
    Peer,
    PeerIdentityMismatch,
    PeerPolicy,
    PolicyDenied,
    RequestRejected,
    SpiffeIdentity,
    Svid,
    SvidSource,
    TargetRule,
    Timeouts,
    TrustDomain,
    Tunnel,
    TunnelRefused,
    TunnelRequest,
    Unreachable,
    relay,
)


def identities() -> None:
    identity = SpiffeIdentity.parse("spiffe://cluster.local/ns/shop/sa/cart")
    assert_type(identity, SpiffeIdentity)
    assert_type(identity.trust_domain, TrustDomain)
    assert_type(identity.namespace, str | None)
    assert_type(identity.service_account, str | None)
    assert_type(IdentityPattern.parse("spiffe://cluster.local/ns/shop/*").matches(identity), bool)
    text: str = str(SpiffeIdentity.for_workload(namespace="shop", service_account="cart"))
    assert text
    assert len({identity, identity}) == 1


def addresses() -> None:
    authority = Authority.parse("[2001:db8::1]:8080")
    assert_type(authority.host, str)
    assert_type(authority.port, int)
    assert_type(Endpoint.parse("10.0.0.7:8080"), Endpoint)


def svids() -> list[SvidSource]:
    svid = Svid.from_files("a.pem", "a.key", "roots.pem")
    assert_type(svid.identity, SpiffeIdentity)
    return [svid, FileSvidSource("a.pem", "a.key", "roots.pem")]


async def client(svid: SvidSource) -> bytes | bytearray:
    expect = "spiffe://cluster.local/ns/shop/sa/cart"
    limits, timeouts = Limits(stream_window=2**20), Timeouts(connect=3.0)
    async with HBONEClient.connect("10.0.0.7", svid=svid, expect=expect, limits=limits, timeouts=timeouts) as session:
        assert_type(session, HBONEClient)
        assert_type(session.peer, Peer)
        assert_type(session.peer.identity, SpiffeIdentity)
        try:
            tunnel = await session.open_tunnel("10.0.0.7:8080", headers=[("x-request-id", "7")])
        except (PolicyDenied, BadTarget, Unreachable) as refused:
            assert_type(refused.status, int)
            assert_type(refused.reason, str | None)
            raise
        except PeerIdentityMismatch as mismatch:
            assert_type(mismatch.expected, tuple[str, ...])
            assert_type(mismatch.presented, str)
            raise
        except (TunnelRefused, ConnectFailed) as error:
            base: HboneError = error
            raise base from None
        async with tunnel:
            assert_type(tunnel, Tunnel)
            stream: trio.abc.HalfCloseableStream = tunnel
            await stream.send_all(b"...")
            await stream.send_eof()
            assert_type(tunnel.target, Authority)
            assert_type(tunnel.peer, Peer)
            assert_type(tunnel.statistics().bytes_sent, int)
            return await tunnel.receive_some()


async def tunnel_in_a_tunnel(svid: SvidSource, outer: HBONEClient) -> None:
    async with await outer.open_tunnel("10.0.0.8:15008") as link:
        async with HBONEClient.over_stream(link, svid=svid, expect=None) as inner:
            assert_type(inner, HBONEClient)


async def pool(svid: SvidSource) -> None:
    async with ConnectionPool(svid) as sessions:
        tunnel = await sessions.open_tunnel("10.0.0.7:8080", expect={"spiffe://cluster.local/ns/shop/sa/cart"})
        assert_type(tunnel, Tunnel)
        await tunnel.aclose()
        await sessions.open_tunnel("10.0.0.7:8080", via="10.0.0.1:15008")
        sessions.statistics()


async def handler(request: TunnelRequest) -> None:
    assert_type(request.peer.identity.namespace, str | None)
    assert_type(request.target, Authority)
    assert_type(request.local_address, Endpoint | None)
    if request.peer.identity.namespace != "shop":
        raise RequestRejected(401, flag="DENY", reason="only the shop may")
    upstream = await trio.open_tcp_stream("127.0.0.1", request.target.port)
    async with await request.accept() as downstream:
        assert_type(downstream, Tunnel)
        result = await relay(downstream, upstream)
        assert_type(result.bytes_up, int)
        assert_type(result.bytes_down, int)


async def server(svid: SvidSource) -> None:
    policy = PeerPolicy.trust_domain(TrustDomain.parse("cluster.local"))
    node = HBONEServer(svid, handler, accept=policy)
    async with trio.open_nursery() as nursery:
        endpoint: Endpoint = await nursery.start(node.serve, "0.0.0.0", 15008)
        assert_type(endpoint.port, int)
        await node.drain(5.0)
        node.statistics()


async def forwarder(svid: SvidSource) -> None:
    rule: TargetRule = FixedTarget(Authority.parse("127.0.0.1:8080"))
    await HBONEServer(svid, ForwardHandler(rule)).serve("::", 15008)
