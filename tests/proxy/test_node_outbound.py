"""Applications' connections, from the way in to the far application: every kind of route, and every kind of failure.

Everything runs over real sockets on the loopback. Each test looks at what the application sees, at the line in the log,
at the metrics, and that nothing is left.
"""

from __future__ import annotations

import hashlib
import logging
import re
import socket
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing
from support.backends import pattern, pattern_sha
from support.dataplanes import (
    CART,
    CART_INFO,
    HOSTNAME,
    LEGACY,
    STOCK,
    TD,
    THIEF,
    VIP,
    WAYPOINT,
    Names,
    Refused,
    application,
    ask,
    at_rest,
    cart,
    data_plane,
    double_echo,
    hbone_peer,
    labels_of,
    member,
    mesh_of,
    read_to_end,
    reset,
    samples,
    shared_port,
    shop,
    stock,
    stock_service,
    total,
    traffic,
    until,
)
from support.meshes import policy, service, workload
from support.routes import PASSTHROUGH, gateway
from support.tcp import receive_exactly

from hbone import (
    Authority,
    CertificateUnavailable,
    ConnectFailed,
    Endpoint,
    ErrorCode,
    RequestRejected,
    SpiffeIdentity,
    Timeouts,
    TunnelRequest,
)
from hbone.certs import LocalCA
from hbone.mesh import Locality, MeshState, TunnelProtocol
from hbone.proxy import _node_outbound
from hbone.proxy._context import NodeSettings
from hbone.telemetry import AccessRecord, Direction, LogLevel
from hbone.transport import SocketOptions

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from support.dataplanes import Captures, DataPlane, Shop

HELLO, TWICE = b"hello world", b"hello worldhello world"
TCP = {"protocol": TunnelProtocol.TCP}
CART_ID, STOCK_ID = (SpiffeIdentity.parse(f"{TD}/shop/sa/{name}") for name in ("cart", "stock"))
DENY_ALL = policy("shop/no", rules=((),))

#: One answer of 22 bytes to a request of 11.
WELL = {
    "source": {("source", "opened"): 1, ("source", "received"): 11, ("source", "sent"): 22, ("source", "closed -"): 1},
    "destination": {
        ("destination", "opened"): 1,
        ("destination", "received"): 11,
        ("destination", "sent"): 22,
        ("destination", "closed -"): 1,
    },
}

ways = pytest.mark.parametrize("way", ["socks", "http", "captured"])


def bare(record: AccessRecord) -> AccessRecord:
    """Without what is never the same."""
    assert record.duration is None or 0 <= record.duration < 60
    return record._replace(src_addr=None, duration=None)


def outbound(**fields: Any) -> AccessRecord:
    """The line of a connection of `cart` that went somewhere."""
    own = {"src_workload": "cart-0", "src_namespace": "shop", "src_cluster": "Kubernetes"}
    return AccessRecord(direction=Direction.OUTBOUND, **{**own, **fields})


def to_stock(**fields: Any) -> AccessRecord:
    """The line of one that went to `stock` in a tunnel."""
    known = {
        "src_identity": CART_ID,
        "dst_workload": "stock-0",
        "dst_namespace": "shop",
        "dst_identity": STOCK_ID,
        "dst_cluster": "Kubernetes",
    }
    return outbound(**{**known, **fields})


def denied(target: str, error: str) -> AccessRecord:
    """The line of one that never had a route."""
    return AccessRecord(direction=Direction.OUTBOUND, dst_addr=Authority.parse(target), error=error)


# === in a tunnel ===


@pytest.mark.parametrize(
    ("way", "host"),
    [
        ("socks", VIP),
        ("socks", HOSTNAME),
        ("socks", STOCK),
        ("http", VIP),
        ("http", HOSTNAME),
        ("http", STOCK),
        ("captured", VIP),
        ("captured", STOCK),
    ],
    ids=lambda value: {VIP: "vip", HOSTNAME: "name", STOCK: "workload"}.get(value, value),
)
async def test_in_a_tunnel(ca: LocalCA, captures: Captures, way: str, host: str) -> None:
    async with shop(ca, near={"captures": captures}) as it:
        port = it.app.port if host == STOCK else 80
        assert await it.near.ask(host, port, way=way) == TWICE
        near, far = await it.near.log.next(), await it.far.log.next()
        assert bare(near) == to_stock(
            dst_addr=Endpoint.parse(f"{STOCK}:{it.port}"),
            dst_hbone_addr=Authority(STOCK, it.app.port),
            dst_service=None if host == STOCK else HOSTNAME,
            bytes_sent=11,
            bytes_recv=22,
        )
        assert bare(far) == AccessRecord(
            direction=Direction.INBOUND,
            src_workload="cart",  # as it says itself: its address is nobody's
            src_namespace="shop",
            src_identity=CART_ID,
            src_cluster="Kubernetes",
            dst_addr=Endpoint.parse(f"{STOCK}:{it.port}"),
            dst_hbone_addr=f"{STOCK}:{it.app.port}",
            dst_service=HOSTNAME,
            dst_workload="stock-0",
            dst_namespace="shop",
            dst_identity=STOCK_ID,
            dst_cluster="Kubernetes",
            bytes_sent=22,
            bytes_recv=11,
        )
        await it.at_rest()
        assert traffic(it.near.metrics) == WELL["source"]
        assert traffic(it.far.metrics) == WELL["destination"]


async def test_labels_of_both_reporters(ca: LocalCA) -> None:
    async with shop(ca) as it:
        await it.near.ask(HOSTNAME, 80)
        await it.at_rest()
        both = {
            "source_workload": "cart",
            "source_canonical_service": "cart",
            "source_canonical_revision": "v1",
            "source_workload_namespace": "shop",
            "source_principal": str(CART_ID),
            "source_app": "cart",
            "source_version": "v1",
            "source_cluster": "Kubernetes",
            "destination_service": HOSTNAME,
            "destination_service_namespace": "shop",
            "destination_service_name": "stock",
            "destination_workload": "stock",
            "destination_canonical_service": "stock",
            "destination_canonical_revision": "v1",
            "destination_workload_namespace": "shop",
            "destination_principal": str(STOCK_ID),
            "destination_app": "stock",
            "destination_version": "v1",
            "destination_cluster": "Kubernetes",
            "request_protocol": "tcp",
            "response_flags": "-",
            "connection_security_policy": "mutual_tls",
        }
        assert labels_of(it.near.metrics, "source") == {"reporter": "source", **both}
        assert labels_of(it.far.metrics, "destination") == {"reporter": "destination", **both}


async def test_many_connections_share_a_session_and_its_facts(ca: LocalCA) -> None:
    async with shop(ca) as it:
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(it.near.ask, HOSTNAME, 80)
        await it.at_rest()
        assert total(it.near.metrics, "opened") == total(it.far.metrics, "opened") == 20
        (pool,) = it.near.outbound.pools.values()
        assert pool.statistics().dials == 1
        assert {s.labels["role"]: s.value for s in samples(it.near.metrics, "hbone_sessions_open")} == {"client": 1}
        assert sum(s.value for s in samples(it.near.metrics, "hbone_pool_requests")) == 20


async def test_live_bytes_and_live_connections(ca: LocalCA) -> None:
    """What is under way shows while it is."""
    async with shop(ca) as it:
        async with await it.near.connect(VIP, 80) as stream:
            await stream.send_all(HELLO)
            assert await receive_exactly(stream, len(TWICE)) == TWICE
            (shown,) = it.near.context.connections.outbound
            assert shown.workload is it.mesh.snapshot.workloads["lab//Pod/shop/cart-0"]
            assert (str(shown.original), str(shown.actual), shown.protocol) == (
                f"{VIP}:80",
                f"{STOCK}:{it.port}",
                "HBONE",
            )
            assert shown.source == Endpoint.from_sockaddr(stream.socket.getsockname())
            assert traffic(it.near.metrics)["source", "sent"] == 22
            assert sockets(it.near) == {"source": 1, "destination": 0}
            await until(lambda: sockets(it.far) == {"source": 0, "destination": 1})
        await it.at_rest()


def sockets(plane: DataPlane) -> dict[str, float]:
    return {s.labels["reporter"]: s.value for s in samples(plane.metrics, "istio_tcp_sockets_open")}


async def test_the_keep_alive_that_was_asked_for(ca: LocalCA, captures: Captures) -> None:
    """For what applications open, and for what is opened for them."""
    options = SocketOptions(keepalive_time=77, keepalive_interval=7)
    settings = NodeSettings(keep_source=False, socket_options=options)
    fields = {"protocol": TunnelProtocol.TCP}
    async with shop(ca, habit=None, stock_fields=fields, near={"captures": captures, "settings": settings}) as it:
        for way in ("socks", "http", "captured"):
            async with await it.near.connect(VIP, 80, way=way) as stream:
                await it.app.accept()
                (connection,) = it.near.context.connections.outbound
                await until(lambda connection=connection: connection.plain)  # the kernel was there before its task
                for end in (connection.way.sock, connection.plain._upstream.sock):
                    assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
                    assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 77
                reset(stream)
            await it.at_rest()


async def test_what_is_remembered_is_bounded(ca: LocalCA, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a client that goes through all ports, too."""
    asked: list[int] = []

    async def connect_tcp(host: str, port: int, **_: Any) -> socket.socket:
        await trio.lowlevel.checkpoint()
        asked.append(port)
        raise ConnectFailed("this was only to see what is remembered")

    monkeypatch.setattr(_node_outbound, "connect_tcp", connect_tcp)
    monkeypatch.setattr(_node_outbound, "_REMEMBERED", 10)
    async with data_plane(mesh_of(cart()), ca=ca, dedicated=CART_INFO) as near:
        for port in range(2000, 2030):
            with pytest.raises(Refused):
                await near.connect(THIEF, port)
            known = [v for v in near.mesh.snapshot.memo.values() if isinstance(v, _node_outbound._Known)]
            assert 1 <= sum(map(len, known)) <= 10
    assert asked == list(range(2000, 2030))


async def test_by_ipv6(ca: LocalCA) -> None:
    """The service's address, the workload's, the application's; the client speaks IPv4."""
    try:
        shared_port("::1")
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    async with application("::1", double_echo) as app:
        port = shared_port("::1")
        mesh = mesh_of(
            member("cart", "127.0.0.1"),
            member("stock", "::1", endpoint_of={f"shop/{HOSTNAME}": {80: app.port}}),
            service(f"shop/{HOSTNAME}", "/fd00::20"),
        )
        async with data_plane(mesh, ca=ca, listen="::1", hbone_port=port) as node:
            for host in ("fd00::20", HOSTNAME):
                assert await node.ask(host, 80) == TWICE
                lines = {line.direction.value: line for line in (await node.log.next(), await node.log.next())}
                assert str(lines["outbound"].dst_addr) == f"[::1]:{port}"
                assert str(lines["outbound"].dst_hbone_addr) == f"[::1]:{app.port}"
                assert lines["inbound"].dst_hbone_addr == f"[::1]:{app.port}"
            await at_rest(node)


async def test_two_workloads_of_one_node(ca: LocalCA) -> None:
    """Told apart by the address that they come from; each speaks for itself."""
    async with shop(ca, member("till", THIEF), near={"dedicated": None}) as it:
        for source, name in ((CART, "cart"), (THIEF, "till"), (CART, "cart")):
            async with await it.near.connect(VIP, 80, source=source) as stream:
                assert await ask(stream) == TWICE
            line = await it.near.log.next()
            assert (line.src_workload, str(line.src_identity)) == (f"{name}-0", f"{TD}/shop/sa/{name}")
            assert str((await it.far.log.next()).src_identity) == f"{TD}/shop/sa/{name}"
        assert {str(identity) for identity in it.near.outbound.pools} == {f"{TD}/shop/sa/cart", f"{TD}/shop/sa/till"}
        await it.at_rest()
        it.near.outbound.retain(frozenset([CART_ID]))
        assert list(it.near.outbound.pools) == [CART_ID]


async def test_through_the_waypoint_of_a_service(ca: LocalCA) -> None:
    """The waypoint is told of what was asked for; the labels name it, and the service."""
    async with hbone_peer(ca, f"{TD}/shop/sa/way", WAYPOINT) as peer:
        waypoint = {"waypoint": gateway(f"/{WAYPOINT}", peer.port)}
        async with shop(ca, member("way", WAYPOINT), service_fields=waypoint) as it:
            assert await it.near.ask(HOSTNAME, 80) == HELLO
            (request,) = peer.requests
            assert request.headers.authority == f"{VIP}:80"
            line = await it.near.log.next()
            assert bare(line) == to_stock(
                dst_addr=Endpoint.parse(f"{WAYPOINT}:{peer.port}"),
                dst_hbone_addr=Authority(VIP, 80),
                dst_service=HOSTNAME,
                dst_workload="way-0",
                dst_identity=SpiffeIdentity.parse(f"{TD}/shop/sa/way"),
                bytes_sent=11,
                bytes_recv=11,
            )
            labels = labels_of(it.near.metrics, "source")
            assert labels["destination_workload"] == "way"
            assert labels["destination_service"] == HOSTNAME


@pytest.mark.parametrize("dedicated", [True, False])
async def test_a_waypoint_goes_on_to_the_workload(ca: LocalCA, dedicated: bool) -> None:
    """It does not send to itself again what it is the waypoint for; a dedicated one wherever it comes from."""
    near = {} if dedicated else {"dedicated": None}
    async with shop(ca, near=near, stock_fields={"waypoint": gateway(f"/{CART}")}) as it:
        async with await it.near.connect(STOCK, it.app.port, source=None if dedicated else CART) as stream:
            assert await ask(stream) == TWICE
        assert str((await it.near.log.next()).dst_addr) == f"{STOCK}:{it.port}"
        await it.at_rest()


# === in plain TCP ===


@ways
async def test_to_a_workload_without_hbone(ca: LocalCA, captures: Captures, way: str) -> None:
    async with application(LEGACY, double_echo) as app:
        mesh = mesh_of(cart(), member("db", LEGACY, **TCP))
        async with data_plane(mesh, ca=ca, dedicated=CART_INFO, captures=captures) as near:
            assert await near.ask(LEGACY, app.port, way=way) == TWICE
            assert bare(await near.log.next()) == outbound(
                dst_addr=app.endpoint,
                dst_workload="db-0",
                dst_namespace="shop",
                dst_cluster="Kubernetes",
                bytes_sent=11,
                bytes_recv=22,
            )
            await at_rest(near)
            assert traffic(near.metrics) == WELL["source"]
            labels = labels_of(near.metrics, "source", without=())
            assert labels["connection_security_policy"] == labels["source_principal"] == "unknown"
            assert labels["destination_principal"] == f"{TD}/shop/sa/db"
            assert not near.outbound.pools


@ways
async def test_to_where_the_mesh_knows_nothing(ca: LocalCA, captures: Captures, way: str) -> None:
    async with application(THIEF, double_echo) as app:
        async with data_plane(mesh_of(cart()), ca=ca, dedicated=CART_INFO, captures=captures) as near:
            assert await near.ask(THIEF, app.port, way=way) == TWICE
            assert bare(await near.log.next()) == outbound(dst_addr=app.endpoint, bytes_sent=11, bytes_recv=22)
            await at_rest(near)
            labels = labels_of(near.metrics, "source")
            assert not [name for name in labels if name.startswith("destination")]
            assert labels["source_workload"] == "cart"


async def test_a_service_that_is_passed_through(ca: LocalCA) -> None:
    async with application(THIEF, double_echo) as app:
        through = service("shop/direct.example", f"/{THIEF}", ports={app.port: 1}, **PASSTHROUGH)
        async with data_plane(mesh_of(cart(), through), ca=ca, dedicated=CART_INFO) as near:
            assert await near.ask(THIEF, app.port) == TWICE
            assert await near.ask("direct.example", app.port) == TWICE
            await at_rest(near)


async def test_a_workload_that_cannot_have_an_identity(ca: LocalCA) -> None:
    """Its service account makes no SPIFFE id: for plain TCP it needs none."""
    async with application(LEGACY, double_echo) as app:
        nobody = member("db", LEGACY, **{**TCP, "service_account": "a/b"})
        async with data_plane(mesh_of(cart(), nobody), ca=ca, dedicated=CART_INFO) as near:
            assert await near.ask(LEGACY, app.port) == TWICE
            await at_rest(near)
            assert "destination_principal" not in labels_of(near.metrics, "source")


# === names ===


async def test_a_name_that_is_not_of_the_mesh(ca: LocalCA) -> None:
    Names(app_example=[THIEF])
    async with application(THIEF, double_echo) as app:
        async with data_plane(mesh_of(cart()), ca=ca, dedicated=CART_INFO) as near:
            for way in ("socks", "http"):
                assert await near.ask("app.example", app.port, way=way) == TWICE
                line = await near.log.next()
                assert (str(line.dst_addr), line.error) == (f"{THIEF}:{app.port}", None)
            await at_rest(near)


async def test_a_name_with_several_addresses(ca: LocalCA) -> None:
    """They are tried in turn; each attempt is counted, and the application hears of one that works."""
    Names(app_example=[LEGACY, THIEF])
    async with application(THIEF, double_echo) as app:
        async with data_plane(mesh_of(cart()), ca=ca, dedicated=CART_INFO) as near:
            assert await near.ask("app.example", app.port) == TWICE
            assert (await near.log.next()).dst_addr == app.endpoint
            await at_rest(near)
            assert traffic(near.metrics) == {**WELL["source"], ("source", "opened"): 2, ("source", "closed CONNECT"): 1}


async def test_a_name_of_which_no_address_works(ca: LocalCA) -> None:
    """The line is about the first one, which is the best one."""
    Names(app_example=[LEGACY, THIEF])
    port = shared_port(LEGACY, THIEF)
    async with data_plane(mesh_of(cart()), ca=ca, dedicated=CART_INFO) as near:
        with pytest.raises(Refused, match=f"502, 'connecting to {LEGACY}:{port} failed: connection refused"):
            await near.ask("app.example", port, way="http")
        line = await near.log.next()
        assert line.dst_addr == Endpoint.parse(f"{LEGACY}:{port}")
        assert line.error == f"connecting to {LEGACY}:{port} failed: connection refused (nothing listens there)"
        await at_rest(near)
        assert traffic(near.metrics) == {("source", "opened"): 2, ("source", "closed CONNECT"): 2}


async def test_a_name_that_nobody_knows(ca: LocalCA) -> None:
    Names(empty_example=[])
    async with data_plane(mesh_of(cart()), ca=ca, dedicated=CART_INFO) as near:
        with pytest.raises(Refused, match="502, 'nosuch.example does not resolve: Name or service not known'"):
            await near.ask("nosuch.example", 80, way="http")
        with pytest.raises(Refused, match="4"):
            await near.ask("nosuch.example", 80)
        for _ in range(2):
            line = await near.log.next()
            assert line.dst_addr == Authority("nosuch.example", 80)
            assert line.error == "nosuch.example does not resolve: Name or service not known"
            assert line.level == "error"
        with pytest.raises(Refused, match="502, 'empty.example has no address'"):
            await near.ask("empty.example", 80, way="http")
        await at_rest(near)
        assert traffic(near.metrics) == {("source", "opened"): 3, ("source", "closed CONNECT"): 3}


async def test_a_name_that_turns_out_to_be_of_the_mesh(ca: LocalCA) -> None:
    async with shop(ca) as it:
        Names(alias_example=[STOCK])
        assert await it.near.ask("alias.example", it.app.port) == TWICE
        assert (await it.near.log.next()).dst_identity == STOCK_ID
        await it.at_rest()


async def test_a_workload_that_is_known_by_its_name_only(ca: LocalCA) -> None:
    """Its addresses are asked for, and its proxy is told of the address and not of the name."""
    async with shop(ca) as it:
        Names(vm_example=[LEGACY, STOCK])
        vm = replace(stock(it.app.port, hostname="vm.example"), addresses=())
        near_mesh = mesh_of(cart(), vm, stock_service())
        async with data_plane(near_mesh, ca=ca, dedicated=CART_INFO, hbone_port=it.port) as near:
            for host in (HOSTNAME, "vm.example"):
                assert await near.ask(host, 80 if host == HOSTNAME else it.app.port) == TWICE
                line = await near.log.next()
                assert str(line.dst_hbone_addr) == f"{STOCK}:{it.app.port}"
                assert line.dst_workload == "stock-0"
            await at_rest(near)


# === no way ===


NO_WAY = {
    "a port that the service has not": (VIP, 99, f"no healthy upstream: {VIP}:99"),
    "a service without endpoints": ("10.96.0.21", 80, "no healthy upstream: 10.96.0.21:80"),
    "a name without endpoints": ("empty.shop", 80, "no healthy upstream: empty.shop:80"),
    "a waypoint that is not there": (
        "10.96.0.22",
        80,
        "unknown waypoint: shop/guarded.shop refers to /10.96.0.99, and there is no such service or workload",
    ),
    "another network, and no gateway": (
        "10.96.0.23",
        80,
        'no valid destination: shop/away-0 is in the network "far", and no gateway to there is known',
    ),
}


@pytest.mark.parametrize(
    ("way", "case"),
    [
        (way, case)
        for way in ("socks", "http", "captured")
        for case in NO_WAY
        if (way, case) != ("captured", "a name without endpoints")  # what is captured has an address
    ],
)
async def test_no_way(ca: LocalCA, captures: Captures, way: str, case: str) -> None:
    host, port, why = NO_WAY[case]
    mesh = mesh_of(
        cart(),
        stock(1),
        stock_service(),
        member("away", "10.9.9.9", network="far", endpoint_of={"shop/away.shop": {80: 80}}),
        service("shop/empty.shop", "/10.96.0.21"),
        service("shop/guarded.shop", "/10.96.0.22", waypoint=gateway("/10.96.0.99")),
        service("shop/away.shop", "/10.96.0.23"),
    )
    async with data_plane(mesh, ca=ca, dedicated=CART_INFO, captures=captures) as near:
        await refused(near, way, host, port, socks=4, http=502, says=why)
        line = await near.log.next()
        assert bare(line) == denied(f"{host}:{port}", why)
        assert line.src_addr is not None
        assert (line.level, line.message) == ("warn", "connection failed")
        await at_rest(near)
        assert not traffic(near.metrics)


async def refused(
    near: DataPlane, way: str, host: str, port: int, *, socks: int, http: int, says: str, source: str | None = None
) -> None:
    """What an application sees of a connection that comes to nothing."""
    if way == "captured":  # it believes that it is connected
        async with await near.connect(host, port, way=way, source=source) as stream:
            assert await read_to_end(stream) == (b"", "reset")
        return
    with pytest.raises(Refused) as caught:
        await near.connect(host, port, way=way, source=source)
    assert caught.value.args[0] == (socks if way == "socks" else http)
    if way == "http":
        assert says in caught.value.args[1]


@ways
async def test_in_a_circle(ca: LocalCA, captures: Captures, way: str) -> None:
    """To the node's own ports, by address or by name."""
    Names(me_example=["127.0.0.1"])
    async with data_plane(mesh_of(cart()), ca=ca, dedicated=CART_INFO, captures=captures) as near:
        assert near.captured is not None
        own = near.captured.port
        hosts = ["127.0.0.1", "127.0.0.5", *([] if way == "captured" else ["me.example"])]
        for host in hosts:
            await refused(near, way, host, own, socks=4, http=502, says="in a circle")
            line = await near.log.next()
            assert line.error is not None
            assert "itself" in line.error
            assert line.src_addr is not None
        await refused(near, way, "127.0.0.1", 15001, socks=4, http=502, says="in a circle")
        await at_rest(near)
        assert not traffic(near.metrics)


async def test_a_bad_handshake_is_told_with_its_source(ca: LocalCA) -> None:
    async with data_plane(mesh_of(cart()), ca=ca, dedicated=CART_INFO) as near:
        async with await trio.open_tcp_stream("127.0.0.1", near.socks.port) as stream:
            await stream.send_all(b"GET / HTTP/1.1\r\n\r\n")
            await read_to_end(stream)
            source = Endpoint.from_sockaddr(stream.socket.getsockname())
        line = await near.log.next()
        assert (line.src_addr, line.level) == (source, "warn")
        assert line.error is not None
        assert "does not speak SOCKS5" in line.error
        await at_rest(near)


@ways
async def test_an_unknown_source(ca: LocalCA, captures: Captures, way: str) -> None:
    async with data_plane(mesh_of(cart()), ca=ca, patience=0.01, captures=captures) as near:
        await refused(near, way, THIEF, 80, socks=4, http=502, says="unknown source: a workload with the address 127.0")
        assert bare(await near.log.next()) == denied(
            f"{THIEF}:80",
            "unknown source: a workload with the address 127.0.0.1 is not in the mesh, or not on this node",
        )
        await at_rest(near)
        assert not traffic(near.metrics)


async def test_a_dedicated_node_whose_workload_is_missing(ca: LocalCA) -> None:
    async with data_plane(mesh_of(stock(1)), ca=ca, dedicated=CART_INFO, patience=0.01) as near:
        await refused(
            near, "http", THIEF, 80, socks=4, http=502, says="unknown source: workload shop/cart-0/cart is not"
        )


async def test_a_source_that_comes_in_time(ca: LocalCA) -> None:
    """The mesh may be slower than the application."""
    async with application(THIEF, double_echo) as app:
        async with data_plane(MeshState(), ca=ca) as near, trio.open_nursery() as nursery:
            answers: list[bytes] = []

            async def asks() -> None:
                answers.append(await near.ask(THIEF, app.port))

            nursery.start_soon(asks)
            await until(lambda: near.context.connections.outbound)
            near.mesh.replace(mesh_of(member("cart", "127.0.0.1")))
            await until(lambda: answers)
            assert answers == [TWICE]
            assert (await near.log.next()).src_workload == "cart-0"


# === certificates ===


async def test_a_certificate_that_comes_late(ca: LocalCA) -> None:
    come, asked = trio.Event(), trio.Event()

    async def issue(identity: SpiffeIdentity) -> Any:
        asked.set()
        await come.wait()
        return ca.issue(identity)

    async with shop(ca, near={"issue": issue, "prefetch": False}) as it, trio.open_nursery() as nursery:
        nursery.start_soon(it.near.ask, VIP, 80)
        await asked.wait()
        come.set()
        assert (await it.near.log.next()).error is None


@ways
async def test_a_certificate_that_never_comes(ca: LocalCA, captures: Captures, way: str) -> None:
    async def issue(identity: SpiffeIdentity) -> Any:
        await trio.lowlevel.checkpoint()
        raise CertificateUnavailable(identity, "the CA is on holiday")

    async with shop(ca, near={"issue": issue, "prefetch": False, "captures": captures}) as it:
        why = f"no certificate for {CART_ID}: the CA is on holiday"
        await refused(it.near, way, VIP, 80, socks=1, http=503, says=why)
        line = await it.near.log.next()
        assert bare(line) == to_stock(
            dst_addr=Endpoint.parse(f"{STOCK}:{it.port}"),
            dst_hbone_addr=Authority(STOCK, it.app.port),
            dst_service=HOSTNAME,
            bytes_sent=0,
            bytes_recv=0,
            error=why,
        )
        await it.at_rest()
        assert traffic(it.near.metrics) == {("source", "opened"): 1, ("source", "closed IDENTITY_ERROR"): 1}


# === refused by the peer ===


@ways
async def test_refused_by_policy(ca: LocalCA, captures: Captures, way: str) -> None:
    async with shop(ca, DENY_ALL, near={"captures": captures}) as it:
        await refused(it.near, way, VIP, 80, socks=2, http=403, says="policy does not allow our identity")
        near, far = await it.near.log.next(), await it.far.log.next()
        assert (
            near.error == "http status: 401 Unauthorized: the peer's authorization policy does not allow our identity"
        )
        assert near.level == "error"
        assert (near.bytes_sent, near.bytes_recv, near.dst_service) == (0, 0, HOSTNAME)
        assert far.error == "connection closed due to policy rejection: explicitly denied by: shop/no"
        assert far.level == "error"
        await it.at_rest()
        assert traffic(it.near.metrics) == {("source", "opened"): 1, ("source", "closed CONNECT"): 1}
        assert traffic(it.far.metrics) == {("destination", "opened"): 1, ("destination", "closed DENY"): 1}
        assert total(it.near.metrics, "failed", response_flags="CONNECT") == 1
        assert total(it.far.metrics, "failed", response_flags="DENY") == 1


@ways
async def test_an_application_that_is_down(ca: LocalCA, captures: Captures, way: str) -> None:
    async with shop(ca, near={"captures": captures}) as it:
        port = shared_port(STOCK)
        await refused(it.near, way, STOCK, port, socks=5, http=503, says="the peer could not connect to the target")
        near, far = await it.near.log.next(), await it.far.log.next()
        assert near.error == "http status: 503 Service Unavailable: the peer could not connect to the target"
        refusal = "connection refused (nothing listens there)"
        assert far.error == f"connection failed: connecting to {STOCK}:{port} failed: {refusal}"
        assert far.level == "error"
        await it.at_rest()
        assert traffic(it.near.metrics) == {("source", "opened"): 1, ("source", "closed CONNECT"): 1}
        assert traffic(it.far.metrics) == {("destination", "opened"): 1, ("destination", "closed CONNECT"): 1}


@ways
async def test_a_target_that_the_peer_does_not_have(ca: LocalCA, captures: Captures, way: str) -> None:
    """The client's picture of the mesh is another one: it takes `stock` for a waypoint."""
    async with shop(ca) as it:
        wrong = mesh_of(cart(), stock(1), stock_service(waypoint=gateway(f"/{STOCK}", it.port)))
        async with data_plane(wrong, ca=ca, dedicated=CART_INFO, hbone_port=it.port, captures=captures) as near:
            says = "the peer does not serve this target"
            await refused(near, way, VIP, 80, socks=1, http=502, says=says)
            assert (await near.log.next()).error == f"http status: 400 Bad Request: {says}"
            far = await it.far.log.next()
            assert far.error == f"ip mismatch: the peer dialled {STOCK} and asks for {VIP}, which is not behind it"
            assert (far.level, far.dst_workload) == ("warn", None)
            await at_rest(near, it.far)
            assert traffic(near.metrics) == {("source", "opened"): 1, ("source", "closed CONNECT"): 1}
            assert not traffic(it.far.metrics)


async def test_a_status_that_has_no_name(ca: LocalCA) -> None:
    async def handler(request: TunnelRequest) -> None:
        raise RequestRejected(599)

    async with tunnels_to(ca, handler) as near:
        await refused(near, "http", STOCK, 80, socks=1, http=502, says="")
        assert (await near.log.next()).error == "http status: 599 an unknown status: the peer refused the tunnel"


# === the next hop ===


@ways
async def test_somebody_else_at_the_next_hop(ca: LocalCA, captures: Captures, way: str) -> None:
    mesh = mesh_of(cart(), stock(1), stock_service())
    async with hbone_peer(ca, f"{TD}/shop/sa/thief", STOCK) as peer:
        async with data_plane(mesh, ca=ca, dedicated=CART_INFO, hbone_port=peer.port, captures=captures) as near:
            why = f"peer is {TD}/shop/sa/thief, expected {STOCK_ID}"
            await refused(near, way, VIP, 80, socks=1, http=502, says=why)
            line = await near.log.next()
            assert (line.error, line.dst_identity) == (why, STOCK_ID)
            await at_rest(near)
            assert traffic(near.metrics) == {("source", "opened"): 1, ("source", "closed TLS_FAILURE"): 1}
            assert not peer.requests


@ways
async def test_a_peer_that_does_not_accept_us(captures: Captures, ca: LocalCA, way: str) -> None:
    mesh = mesh_of(cart(), stock(1), stock_service())
    async with hbone_peer(LocalCA.in_memory(), str(STOCK_ID), STOCK) as peer:
        async with data_plane(mesh, ca=ca, dedicated=CART_INFO, hbone_port=peer.port, captures=captures) as near:
            await refused(near, way, VIP, 80, socks=4, http=502, says="certificate")
            await at_rest(near)
            assert total(near.metrics, "closed") == 1
            assert not peer.requests


@ways
async def test_nobody_at_the_next_hop(ca: LocalCA, captures: Captures, way: str) -> None:
    port = shared_port(STOCK)
    mesh = mesh_of(cart(), stock(1), stock_service())
    async with data_plane(mesh, ca=ca, dedicated=CART_INFO, hbone_port=port, captures=captures) as near:
        why = f"connecting to {STOCK}:{port} failed: connection refused (nothing listens there)"
        await refused(near, way, VIP, 80, socks=5, http=502, says=why)
        line = await near.log.next()
        assert (line.error, line.dst_addr) == (why, Endpoint.parse(f"{STOCK}:{port}"))
        await at_rest(near)
        assert traffic(near.metrics) == {("source", "opened"): 1, ("source", "closed CONNECT"): 1}


@pytest.mark.parametrize("protocol", list(TunnelProtocol))
async def test_a_next_hop_that_does_not_answer(ca: LocalCA, protocol: TunnelProtocol) -> None:
    settings = NodeSettings(keep_source=False, timeouts=Timeouts(connect=0.05))
    with socket.socket() as silent, socket.socket() as queued, socket.socket() as more:
        silent.bind((STOCK, 0))
        silent.listen(0)
        port = silent.getsockname()[1]
        for sock in (queued, more):  # what the backlog holds; the next one gets no answer
            sock.setblocking(False)
            sock.connect_ex((STOCK, port))
        mesh = mesh_of(cart(), stock(port, protocol=protocol), stock_service())
        hbone = port if protocol is TunnelProtocol.HBONE else 15008
        async with data_plane(mesh, ca=ca, dedicated=CART_INFO, hbone_port=hbone, settings=settings) as near:
            await refused(near, "http", VIP, 80, socks=4, http=504, says=f"connecting to {STOCK}:{port} timed out")
            await at_rest(near)
            assert traffic(near.metrics) == {("source", "opened"): 1, ("source", "closed NETWORK_POLICY"): 1}


@ways
async def test_a_plain_application_that_is_down(ca: LocalCA, captures: Captures, way: str) -> None:
    port = shared_port(LEGACY)
    mesh = mesh_of(cart(), member("db", LEGACY, **TCP))
    async with data_plane(mesh, ca=ca, dedicated=CART_INFO, captures=captures) as near:
        why = f"connecting to {LEGACY}:{port} failed: connection refused (nothing listens there)"
        await refused(near, way, LEGACY, port, socks=5, http=502, says=why)
        assert bare(await near.log.next()) == outbound(
            dst_addr=Endpoint.parse(f"{LEGACY}:{port}"),
            dst_workload="db-0",
            dst_namespace="shop",
            dst_cluster="Kubernetes",
            bytes_sent=0,
            bytes_recv=0,
            error=why,
        )
        await at_rest(near)
        assert traffic(near.metrics) == {("source", "opened"): 1, ("source", "closed CONNECT"): 1}


# === bytes and ends ===


kinds = pytest.mark.parametrize("kind", ["tunnel", "plain"])


def of_kind(ca: LocalCA, kind: str, habit: Any = None) -> Any:
    """A shop whose server speaks HBONE, or does not."""
    fields = {"protocol": TunnelProtocol.HBONE if kind == "tunnel" else TunnelProtocol.TCP}
    return shop(ca, habit=habit, stock_fields=fields)


@asynccontextmanager
async def both(it: Shop, **options: Any) -> AsyncIterator[tuple[trio.SocketStream, trio.SocketStream]]:
    """The two ends of one connection."""
    async with await it.near.connect(VIP, 80, **options) as near:
        yield near, await it.app.accept()


async def nodes_at_rest(it: Shop, kind: str) -> None:
    await it.at_rest()
    assert bool(it.far.log.records) is (kind == "tunnel")


@kinds
@pytest.mark.parametrize("first", ["near", "far"])
async def test_each_direction_ends_by_itself(ca: LocalCA, kind: str, first: str) -> None:
    async with of_kind(ca, kind) as it, both(it) as ends:
        one, other = ends if first == "near" else ends[::-1]
        await one.send_all(b"first")
        await one.send_eof()
        assert await read_to_end(other) == (b"first", "eof")
        for _ in range(3):  # the other direction goes on
            await other.send_all(b"still")
            assert await receive_exactly(one, 5) == b"still"
        await other.send_eof()
        assert await read_to_end(one) == (b"", "eof")
        line = await it.near.log.next()
        sent, received = (5, 15) if first == "near" else (15, 5)
        assert (line.bytes_sent, line.bytes_recv, line.error) == (sent, received, None)
        await nodes_at_rest(it, kind)
        assert total(it.near.metrics, "closed", response_flags="-") == 1


@kinds
async def test_every_byte_both_ways(ca: LocalCA, kind: str) -> None:
    size = 3_000_000

    async def send(stream: trio.SocketStream) -> None:
        for piece in pattern(size):
            await stream.send_all(piece)
        await stream.send_eof()

    async def receive(stream: trio.SocketStream) -> None:
        data, end = await read_to_end(stream)
        assert (len(data), hashlib.sha256(data).hexdigest(), end) == (size, pattern_sha(size), "eof")

    async with of_kind(ca, kind) as it, both(it) as ends:
        async with trio.open_nursery() as nursery:
            for stream in ends:
                nursery.start_soon(send, stream)
                nursery.start_soon(receive, stream)
        await nodes_at_rest(it, kind)
        counts = traffic(it.near.metrics)
        assert (counts["source", "received"], counts["source", "sent"]) == (size, size)


@kinds
@ways
async def test_what_an_application_sends_without_waiting(ca: LocalCA, captures: Captures, kind: str, way: str) -> None:
    fields = {"protocol": TunnelProtocol.HBONE if kind == "tunnel" else TunnelProtocol.TCP}
    async with shop(ca, stock_fields=fields, near={"captures": captures}) as it:
        async with await it.near.connect(VIP, 80, way=way, early=b"early ") as stream:
            answer = await ask(stream, b"late")
            assert answer in (b"early early latelate", b"early lateearly late")  # in one piece or in two
        line = await it.near.log.next()
        assert (line.bytes_sent, line.bytes_recv) == (10, 20)
        await it.at_rest()


@kinds
@pytest.mark.parametrize("who", ["near", "far"])
async def test_an_application_that_resets(ca: LocalCA, kind: str, who: str) -> None:
    """It is a reset at the other end, too, and never an end; it is no failure, and the logs tell of it."""
    async with of_kind(ca, kind) as it, both(it) as (near, far):
        await near.send_all(HELLO)
        assert await receive_exactly(far, len(HELLO)) == HELLO
        one, other = (near, far) if who == "near" else (far, near)
        reset(one)
        assert await read_to_end(other) == (b"", "reset")
        here, there = (
            "the relayed connection broke: Connection reset by peer",
            "the peer reset the tunnel: CONNECT_ERROR",
        )
        told = (here, there) if who == "near" else (there, here)
        line = await it.near.log.next()
        assert (line.level, line.error, line.bytes_sent, line.bytes_recv) == ("info", None, 11, 0)
        assert line.reset == ("Connection reset by peer" if kind == "plain" else told[0])
        if kind != "plain":
            line = await it.far.log.next()
            assert (line.level, line.error, line.bytes_recv, line.reset) == ("info", None, 11, told[1])
        await nodes_at_rest(it, kind)
        for node in [it.near, *([it.far] if kind != "plain" else [])]:
            assert total(node.metrics, "closed", response_flags="-") == total(node.metrics, "closed") == 1
            assert total(node.metrics, "failed") == 0


async def test_a_reset_is_of_its_own_connection_only(ca: LocalCA) -> None:
    """What is written alike for all connections of a route is not made from one that was reset."""
    async with of_kind(ca, "tunnel") as it:
        for _ in range(2):
            async with both(it) as (near, far):
                reset(near)
                assert await read_to_end(far) == (b"", "reset")
            assert (await it.near.log.next()).reset is not None
            assert (await it.far.log.next()).reset is not None
            async with both(it) as (near, far):
                for one, other in ((near, far), (far, near)):
                    await one.send_eof()
                    assert await read_to_end(other) == (b"", "eof")
            assert (await it.near.log.next()).reset is None
            assert (await it.far.log.next()).reset is None
        await nodes_at_rest(it, "tunnel")


@pytest.mark.parametrize("code", [ErrorCode.CANCEL, ErrorCode.CONNECT_ERROR])
async def test_a_reset_instead_of_an_answer_is_a_failure(ca: LocalCA, code: ErrorCode) -> None:
    """The same that is an application's reset later: there was no connection yet."""

    async def handler(request: TunnelRequest) -> None:
        request.abort(code)

    async with tunnels_to(ca, handler) as near:
        with pytest.raises(Refused):
            await near.connect(STOCK, 80)
        line = await near.log.next()
        assert (line.level, line.error, line.reset) == ("error", f"the peer reset the tunnel: {code.name}", None)
        await at_rest(near)
        assert traffic(near.metrics) == {("source", "opened"): 1, ("source", "closed CONNECT"): 1}


async def test_an_application_that_leaves_before_it_was_told(ca: LocalCA) -> None:
    asked = trio.Event()
    go_on = trio.Event()

    async def handler(request: TunnelRequest) -> None:
        asked.set()
        await go_on.wait()
        await request.accept()
        await trio.sleep_forever()

    async with tunnels_to(ca, handler) as near:
        async with await trio.open_tcp_stream("127.0.0.1", near.socks.port) as stream:
            name = STOCK.encode()
            await stream.send_all(b"\5\1\0" + b"\5\1\0\3" + bytes([len(name)]) + name + b"\0\x50")
            await stream.receive_some(2)
            await asked.wait()
            (connection,) = near.context.connections.outbound
            reset(stream)
        await until(lambda: is_broken(connection.way.sock))
        go_on.set()
        line = await near.log.next()
        assert line.error == "the application left before it was told that its tunnel is up"
        await at_rest(near)
        assert traffic(near.metrics) == {("source", "opened"): 1, ("source", "closed CONNECT"): 1}


async def test_an_application_that_leaves_while_a_plain_one_is_dialled(
    ca: LocalCA, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, dialling, go_on = _node_outbound.connect_tcp, trio.Event(), trio.Event()

    async def connect_tcp(*args: Any, **options: Any) -> socket.socket:
        dialling.set()
        await go_on.wait()
        return await real(*args, **options)

    monkeypatch.setattr(_node_outbound, "connect_tcp", connect_tcp)
    async with of_kind(ca, "plain") as it, trio.open_nursery() as nursery:
        async with await trio.open_tcp_stream("127.0.0.1", it.near.http.port) as stream:
            await stream.send_all(f"CONNECT {VIP}:80 HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            await dialling.wait()
            (connection,) = it.near.context.connections.outbound
            reset(stream)
        await until(lambda: is_broken(connection.way.sock))
        go_on.set()
        assert await read_to_end(await it.app.accept()) == (b"", "reset")
        assert (await it.near.log.next()).error == "the application left before it was told that its tunnel is up"
        await it.at_rest()
        nursery.cancel_scope.cancel()


def is_broken(sock: socket.socket) -> bool:
    """Whether the kernel has heard of the other side's reset; looking at it does not take it away."""
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == b"\7"


async def test_a_tunnel_that_breaks_under_the_first_bytes(ca: LocalCA) -> None:
    async def handler(request: TunnelRequest) -> None:
        tunnel = await request.accept()
        tunnel.abort(ErrorCode.INTERNAL_ERROR)

    async with tunnels_to(ca, handler) as near:
        async with await near.connect(STOCK, 80, early=HELLO) as stream:
            assert await read_to_end(stream) == (b"", "reset")
        line = await near.log.next()
        assert line.error == "the peer reset the tunnel: INTERNAL_ERROR"
        await at_rest(near)
        assert traffic(near.metrics) == {("source", "opened"): 1, ("source", "closed CONNECT"): 1}


# === on the wire ===


@asynccontextmanager
async def tunnels_to(ca: LocalCA, handler: Any = None, **options: Any) -> AsyncIterator[DataPlane]:
    """A node whose tunnels to `stock` end at `handler`; `DataPlane.peer` is who has it."""
    async with hbone_peer(ca, str(STOCK_ID), STOCK, handler=handler) as peer:
        mesh = options.pop("mesh", None) or mesh_of(cart(), stock(80), stock_service())
        async with data_plane(mesh, ca=ca, dedicated=CART_INFO, hbone_port=peer.port, **options) as near:
            near.peer = peer  # type: ignore[attr-defined]
            yield near


async def test_the_headers_of_a_request(ca: LocalCA) -> None:
    """The wire profile, byte by byte: these and no others, in this order."""
    locality = Locality(region="eu", zone="eu-1")
    source = cart(cluster_id="lab", locality=locality, canonical_revision="v 2")
    async with tunnels_to(ca, mesh=mesh_of(source, stock(80), stock_service())) as near:
        for host, hosts in ((VIP, b";host=" + HOSTNAME.encode()), (STOCK, b"")):
            async with await near.connect(host, 80) as stream:
                await ask(stream)
                port = stream.socket.getsockname()[1]
            request = near.peer.requests[-1]
            assert request.headers.authority == f"{STOCK}:80"
            baggage, forwarded, traceparent = request.headers.headers
            assert baggage == (
                b"baggage",
                b"k8s.cluster.name=lab,k8s.namespace.name=shop,k8s.deployment.name=cart,service.name=cart,"
                b"service.version=v%202,cloud.region=eu,cloud.availability_zone=eu-1",
            )
            assert forwarded == (b"forwarded", b'for="127.0.0.1:%d"' % port + hosts)
            assert re.fullmatch(rb"00-[0-9a-f]{32}-[0-9a-f]{16}-00", traceparent[1])
            assert traceparent[0] == b"traceparent"
        ids = {request.headers.headers[2][1] for request in near.peer.requests}
        assert len(ids) == 2


async def test_a_source_of_which_nothing_is_known_says_so(ca: LocalCA) -> None:
    nobody = workload("lab//Pod/shop/cart-0", CART, service_account="cart", cluster_id="", workload_type="whatever")
    async with tunnels_to(ca, mesh=mesh_of(nobody, stock(80))) as near:
        await near.ask(STOCK, 80)
        assert near.peer.requests[0].headers.headers[0] == (b"baggage", b"k8s.namespace.name=shop")


async def test_a_service_whose_name_no_header_can_have(ca: LocalCA) -> None:
    odd = service("shop/not a name", f"/{VIP}")
    behind = stock(80, endpoint_of={"shop/not a name": {80: 80}})
    async with tunnels_to(ca, mesh=mesh_of(cart(), behind, odd)) as near:
        async with await near.connect(VIP, 80) as stream:
            await ask(stream)
            port = stream.socket.getsockname()[1]
        assert near.peer.requests[0].headers.headers[1] == (b"forwarded", b'for="127.0.0.1:%d"' % port)
        assert (await near.log.next()).dst_service == "not a name"


# === what is told besides ===


async def test_a_connection_that_begins_is_told_at_debug(ca: LocalCA) -> None:
    async with shop(ca) as it:
        it.near.log.level = it.far.log.level = LogLevel.DEBUG
        await it.near.ask(VIP, 80)
        for log in (it.near.log, it.far.log):
            first, last = await log.next(), await log.next()
            assert (first.level, first.message) == ("debug", "connection opened")
            assert (first.bytes_sent, first.bytes_recv, first.duration) == (None, None, None)
            assert first._replace(opened=False) == last._replace(bytes_sent=None, bytes_recv=None, duration=None)
        await it.at_rest()


@pytest.mark.parametrize("access_log", [True, False])
async def test_the_way_is_told(ca: LocalCA, caplog: pytest.LogCaptureFixture, access_log: bool) -> None:
    """In the stream of the access log if there is one, else as other messages are."""
    caplog.set_level(logging.INFO, "hbone.proxy.outbound")
    async with shop(ca) as it:
        if not access_log:
            it.near.context.access_log = None
        await it.near.ask(VIP, 80)
        await it.at_rest()
        if access_log:
            told = it.near.log.told
        else:
            told = [("proxy::outbound", each.message) for each in caplog.records if each.name == "hbone.proxy.outbound"]
        first, last = told
        assert first == ("proxy::outbound", f"proxy to {VIP}:80 using HBONE via {STOCK}:{it.port} type Direct")
        assert re.fullmatch(r"complete dur=\d+\.\d{3}ms", last[1])


async def test_without_log_and_metrics(ca: LocalCA) -> None:
    async with shop(ca) as it:
        for plane in (it.near, it.far):
            plane.context.metrics = plane.context.access_log = None
        assert await it.near.ask(VIP, 80) == TWICE
        with pytest.raises(Refused):
            await it.near.ask(VIP, 81)


async def test_a_fault_of_ours_costs_one_connection(
    ca: LocalCA, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with shop(ca) as it:
        with monkeypatch.context() as patch:
            patch.setattr(it.near.context.router, "outbound", lambda *_: 1 / 0)
            async with await trio.open_tcp_stream("127.0.0.1", it.near.http.port) as stream:
                await stream.send_all(f"CONNECT {VIP}:80 HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                assert await read_to_end(stream) == (b"", "reset")
        assert [record.message for record in caplog.records] == ["serving a connection failed"]
        assert (await it.near.log.next()).error == "unexpected: ZeroDivisionError('division by zero')"
        assert await it.near.ask(VIP, 80) == TWICE
        await it.at_rest()


# === the end ===


@kinds
async def test_the_end_of_the_node(ca: LocalCA, kind: str) -> None:
    """What is open then is reset; nobody connects any more."""
    async with of_kind(ca, kind) as it, both(it) as (near, far):
        await near.send_all(HELLO)
        assert await receive_exactly(far, len(HELLO)) == HELLO
        await it.near.outbound.drain(0)
        assert await read_to_end(near) == (b"", "reset")
        assert await read_to_end(far) == (b"", "reset")
        line = await it.near.log.next()
        assert (line.error, line.bytes_sent) == ("the node was stopped", 11)
        with pytest.raises(OSError):
            await it.near.connect(VIP, 80)
        late = await it.near.nursery.start(it.near.outbound.serve_socks, "127.0.0.1", 0)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(OSError):
            await trio.open_tcp_stream("127.0.0.1", late.port)
        await nodes_at_rest(it, kind)
        assert total(it.near.metrics, "closed", response_flags="CONNECT") == 1


@kinds
async def test_what_is_open_may_finish(ca: LocalCA, kind: str) -> None:
    async with of_kind(ca, kind) as it, both(it) as (near, far), trio.open_nursery() as nursery:
        nursery.start_soon(it.near.outbound.drain, 60)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(OSError):
            await it.near.connect(VIP, 80)
        await far.send_all(HELLO)
        await far.send_eof()
        assert await ask(near) == HELLO
        assert await read_to_end(far) == (HELLO, "eof")
        assert (await it.near.log.next()).error is None


async def test_the_end_while_a_connection_is_being_opened(ca: LocalCA) -> None:
    async def handler(request: TunnelRequest) -> None:
        await trio.sleep_forever()

    async with tunnels_to(ca, handler) as near:
        async with await trio.open_tcp_stream("127.0.0.1", near.http.port) as stream:
            await stream.send_all(f"CONNECT {STOCK}:80 HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            await until(lambda: near.peer.requests)
            await near.outbound.drain(0)
            assert await read_to_end(stream) == (b"", "reset")
        assert (await near.log.next()).error == "the node was stopped"
        await at_rest(near)
        assert traffic(near.metrics) == {("source", "opened"): 1, ("source", "closed CONNECT"): 1}
