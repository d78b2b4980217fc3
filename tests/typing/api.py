"""The public API as users write it. mypy and pyright read this file; it is never run.

`assert_type` is for what a user relies on without thinking: what an ``async with`` gives, what a property is.
"""

from __future__ import annotations

import os
import random
import sys
from ipaddress import IPv4Address
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
from hbone.certs import LocalCA, SvidManager, local_ca_issuer
from hbone.control import FileMeshSource
from hbone.errors import ConfigError, MeshConfigError
from hbone.explain import Outcome, explain_connection
from hbone.mesh import (
    Action,
    AuthorizationPolicy,
    Clause,
    Match,
    MeshSnapshot,
    MeshState,
    NamespacedHostname,
    NetworkAddress,
    Rule,
    Scope,
    Service,
    ServiceAccount,
    ServiceEndpoint,
    TunnelProtocol,
    Workload,
    dump_workload,
    load_mesh,
    parse_mesh,
)
from hbone.proxy import Node, NodeConfig, NodeStatistics
from hbone.rbac import Authorizer, Flow, Verdict, authorize, explain_verdict
from hbone.routing import (
    InboundRoute,
    NoInboundRoute,
    NoOutboundRoute,
    OutboundRoute,
    Router,
    RouteType,
    RoutingConfig,
    explain_outbound,
    route_inbound,
    route_outbound,
)
from hbone.telemetry import AccessLog, Metrics


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


# === a mesh, decided about and served ===

CART_IP = IPv4Address("10.1.0.2")


def mesh() -> MeshSnapshot:
    shop = NamespacedHostname("shop", "cart.shop.svc.cluster.local")
    cart = Workload(
        uid="cluster/shop/cart",
        name="cart",
        namespace="shop",
        addresses=(CART_IP,),
        protocol=TunnelProtocol.HBONE,
        services={shop: {80: 8080}},
    )
    service = Service(
        name="cart", namespace="shop", hostname=shop.hostname, vips=(NetworkAddress("", CART_IP),), ports={80: 8080}
    )
    accounts = (ServiceAccount(namespace="shop", service_account="web"),)
    policy = AuthorizationPolicy(
        name="callers",
        namespace="shop",
        scope=Scope.NAMESPACE,
        action=Action.ALLOW,
        rules=(Rule((Clause((Match(service_accounts=accounts),)),)),),
    )
    snapshot = MeshSnapshot.build([cart], [service], [policy])
    assert_type(snapshot, MeshSnapshot)
    assert_type(snapshot.workload_by_address("", CART_IP), Workload | None)
    assert_type(snapshot.service_by_vip("", CART_IP, "shop"), Service | None)
    for uid, endpoint in snapshot.endpoints(service).items():
        assert_type(uid, str)
        assert_type(endpoint, ServiceEndpoint)
    assert_type(cart.identity, SpiffeIdentity)
    dump_workload(cart)
    return snapshot.with_changes(upsert=[cart], remove_policies=["shop/callers"])


def mesh_from_text() -> MeshSnapshot:
    try:
        return load_mesh("mesh.yaml").snapshot()
    except MeshConfigError as error:
        assert_type(error.line, int)
        assert_type([fault.message for fault in error.faults], list[str])
    parsed = parse_mesh("workloads: []", source="a test")
    return parsed.snapshot_after(MeshSnapshot.build())


async def mesh_from_file() -> None:
    state = MeshState()
    unsubscribe = state.subscribe(lambda old, new: print(len(old.workloads), len(new.workloads)))
    source = FileMeshSource("mesh.yaml", state, on_faults=print, poll_interval=0.5)
    await source.load()
    async with trio.open_nursery() as nursery:
        await nursery.start(source.run)
        assert_type(state.snapshot, MeshSnapshot)
        unsubscribe()


def routes(snapshot: MeshSnapshot, source: Workload) -> Endpoint | Authority | None:
    config = RoutingConfig(network="east")
    target = Authority.parse("10.96.0.1:80")
    route = route_outbound(
        snapshot, config, source=source, source_ip=CART_IP, target=target, random=random.random, note=print
    )
    assert_type(Router(config, random.random).outbound(snapshot, source, None, target), OutboundRoute | NoOutboundRoute)
    inbound = route_inbound(
        snapshot, config, workload=source, dialled=Endpoint(CART_IP, 15008), authority=target, forwarded_host=None
    )
    if not isinstance(inbound, NoInboundRoute):
        assert_type(inbound, InboundRoute)
        assert_type(inbound.upstream, Endpoint)
    why = explain_outbound(snapshot, config, source=source, source_ip=None, target=target)
    assert_type(why.steps, tuple[str, ...])
    whole = explain_connection(snapshot, config, source=source, source_ip=CART_IP, target=target)
    assert_type(whole.outcome, Outcome)
    match route:
        case NoOutboundRoute(reason=reason):
            assert_type(reason, str)
            return None
        case OutboundRoute(type=RouteType.PASSTHROUGH):
            return route.next_hop
        case OutboundRoute():
            assert_type(route.expected, tuple[SpiffeIdentity, ...])
            return route.authority


def policies(snapshot: MeshSnapshot, workload: Workload) -> bool:
    flow = Flow(
        source_ip=CART_IP,
        source_identity=SpiffeIdentity.parse("spiffe://cluster.local/ns/shop/sa/web"),
        destination_ip=CART_IP,
        destination_port=8080,
    )
    verdict = authorize(snapshot, workload, flow)
    assert_type(verdict, Verdict)
    assert_type(verdict.policy, str | None)
    authorizer = Authorizer()
    authorizer.prepare(snapshot, [workload])
    for line in explain_verdict(snapshot, workload, flow).lines():
        assert_type(line, str)
    return verdict.allowed and authorizer.authorize(snapshot, workload, flow).allowed


async def many_identities(ca: LocalCA, identity: SpiffeIdentity) -> Svid:
    svids = SvidManager(local_ca_issuer(ca))
    async with trio.open_nursery() as nursery:
        await nursery.start(svids.run)
        svids.want([identity])
        svid = await svids.get(identity)
        nursery.cancel_scope.cancel()
    assert_type(svid, Svid)
    return svid


async def node() -> None:
    try:
        config = NodeConfig.from_environment(os.environ, overrides={"mesh": "mesh.yaml"})
    except ConfigError as error:
        assert_type([fault.source for fault in error.faults], list[str])
        raise
    async with (
        AccessLog(sys.stdout.buffer) as access_log,
        Node(config, access_log=access_log, metrics=Metrics()) as one,
    ):
        assert_type(one, Node)
        await one.ready.wait()
        for name, endpoints in one.addresses.items():
            assert_type(name, str)
            assert_type(endpoints, tuple[Endpoint, ...])
        one.mesh.replace(mesh())
        assert_type(one.statistics(), NodeStatistics)
        assert_type(one.statistics().live, int)
        await one.drain(deadline=1.0)


def what_is_not_there() -> None:
    """Names that are loaded when they are first used leave no room for others."""
    from hbone import Nod  # type: ignore[attr-defined] # pyright: ignore[reportAttributeAccessIssue] # noqa: F401
    from hbone.proxy import Nod as B  # type: ignore[attr-defined] # pyright: ignore[reportAttributeAccessIssue] # noqa: F401
    from hbone.telemetry import Nod as C  # type: ignore[attr-defined] # pyright: ignore[reportAttributeAccessIssue] # noqa: F401
