"""HBONE in: the steps of a CONNECT in their order, what is behind them, and what is told of it.

The clients are made of the library alone, so that they can ask for anything.
"""

from __future__ import annotations

import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing
from support.dataplanes import (
    CART,
    HOSTNAME,
    LEGACY,
    STOCK,
    TD,
    THIEF,
    VIP,
    application,
    ask,
    cart,
    data_plane,
    double_echo,
    echo,
    labels_of,
    member,
    mesh_of,
    read_to_end,
    samples,
    shared_port,
    shop,
    total,
    traffic,
    until,
)
from support.meshes import policy, service
from support.routes import app_tunnel, gateway
from support.tcp import receive_exactly

from hbone import (
    BadTarget,
    ConnectFailed,
    ConnectionPool,
    Endpoint,
    HBONEClient,
    HboneError,
    IdentityRefused,
    PeerIdentityMismatch,
    PolicyDenied,
    SpiffeIdentity,
    StreamRefused,
    TunnelRefused,
    Unreachable,
)
from hbone.mesh import Locality, Match
from hbone.proxy import _node_inbound
from hbone.proxy._context import NodeSettings, WorkloadInfo
from hbone.telemetry import AccessRecord, Direction

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from hbone.certs import LocalCA

HELLO, TWICE = b"hello world", b"hello worldhello world"
CART_ID, STOCK_ID = (SpiffeIdentity.parse(f"{TD}/shop/sa/{name}") for name in ("cart", "stock"))
DENY_ALL = policy("shop/no", rules=((),))


@asynccontextmanager
async def peer(
    ca: LocalCA, port: int, *, who: str = "cart", host: str = STOCK, source: str | None = None, expect: Any = None
) -> AsyncIterator[HBONEClient]:
    """A session as one of the mesh would open it."""
    async with HBONEClient.connect(
        host, port, svid=ca.issue(f"{TD}/shop/sa/{who}"), expect=expect, source_ip=source
    ) as client:
        yield client


async def ask_for(client: HBONEClient, target: str, **headers: str) -> bytes:
    """One request through a tunnel of its own."""
    fields = [(name.replace("_", "-"), value) for name, value in headers.items()]
    return await ask(await client.open_tunnel(target, headers=fields))


def bare(record: AccessRecord) -> AccessRecord:
    """Without what is never the same."""
    assert record.duration is None or 0 <= record.duration < 60
    return record._replace(src_addr=None, duration=None)


# === the steps, in order ===


CIRCLE = "is a port of the proxy itself: the connection would go in a circle"
REFUSALS: dict[str, tuple[str, type[HboneError], str, bool]] = {
    # what is asked for, the answer, the reason in the log, and whether it got as far as labels
    "an address that is not here": (
        f"{VIP}:80",
        BadTarget,
        f"ip mismatch: the peer dialled {STOCK} and asks for {VIP}, which is not behind it",
        False,
    ),
    "an unknown name": ("nosuch.shop:80", Unreachable, "unknown hostname: nosuch.shop", False),
    "a port that the service has not": (
        f"{HOSTNAME}:81",
        Unreachable,
        f"no port for hostname: shop/{HOSTNAME} has no target port for 81 at shop/stock-0",
        False,
    ),
    "the port for applications": (f"{STOCK}:15001", Unreachable, f"{STOCK}:15001 {CIRCLE}", False),
    "the port for HBONE": (f"{STOCK}:15008", Unreachable, f"{STOCK}:15008 {CIRCLE}", False),
    "a port at which nobody listens": (
        f"{STOCK}:1",
        Unreachable,
        f"connection failed: connecting to {STOCK}:1 failed: connection refused (nothing listens there)",
        True,
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
async def test_refused(ca: LocalCA, case: str) -> None:
    target, kind, why, labelled = REFUSALS[case]
    async with shop(ca) as it, peer(ca, it.port) as client:
        with pytest.raises(TunnelRefused) as caught:
            await client.open_tunnel(target)
        assert type(caught.value) is kind
        line = await it.far.log.next()
        assert line.error == why
        assert line.src_addr is not None
        if labelled:
            assert (line.level, line.message) == ("error", "connection complete")
            assert (line.dst_workload, line.bytes_sent, line.bytes_recv) == ("stock-0", 0, 0)
            assert line.dst_hbone_addr == target
        else:
            assert (line.level, line.message) == ("warn", "connection failed")
            assert bare(line) == AccessRecord(
                direction=Direction.INBOUND, dst_addr=Endpoint.parse(f"{STOCK}:{it.port}"), error=why
            )
        await it.at_rest()
        counts = {("destination", "opened"): 1, ("destination", "closed CONNECT"): 1} if labelled else {}
        assert traffic(it.far.metrics) == counts
        status = str(caught.value.status)
        (refused,) = samples(it.far.metrics, "hbone_tunnels_refused")
        assert refused.labels == {"role": "server", "status": status}


async def test_earlier_steps_come_first(ca: LocalCA) -> None:
    """A wrong address is told before a policy that would deny it, and that before an application that is down."""
    async with shop(ca, DENY_ALL) as it, peer(ca, it.port) as client:
        with pytest.raises(BadTarget):
            await client.open_tunnel(f"{VIP}:80")
        with pytest.raises(Unreachable):
            await client.open_tunnel("nosuch.shop:80")
        with pytest.raises(Unreachable):
            await client.open_tunnel(f"{STOCK}:15001")
        assert not it.far.context.connections.inbound
        assert not samples(it.far.metrics, "hbone_policy_verdicts")
        with pytest.raises(PolicyDenied):
            await client.open_tunnel(f"{STOCK}:1")
        (verdict,) = samples(it.far.metrics, "hbone_policy_verdicts")
        assert (verdict.labels, verdict.value) == ({"verdict": "deny", "dry_run": "false"}, 1)


async def test_a_port_of_the_node_itself(ca: LocalCA) -> None:
    async with shop(ca) as it, peer(ca, it.port) as client:
        it.far.context.own_ports.add(it.app.port)
        with pytest.raises(Unreachable):
            await client.open_tunnel(f"{STOCK}:{it.app.port}")
        assert (await it.far.log.next()).error == f"{STOCK}:{it.app.port} is a port of this node itself"


async def test_policies_see_the_port_behind_an_application_tunnel(ca: LocalCA) -> None:
    """And the address that was dialled."""
    rules = (((Match(destination_ports=(4711,)),),),)
    async with shop(ca, policy("shop/no-4711", rules=rules), stock_fields=app_tunnel(4711, "NONE")) as it:
        async with peer(ca, it.port) as client:
            with pytest.raises(PolicyDenied):
                await client.open_tunnel("192.0.2.1:80")
            assert (await it.far.log.next()).error == (
                "connection closed due to policy rejection: explicitly denied by: shop/no-4711"
            )


# === where it goes ===


async def test_a_name(ca: LocalCA) -> None:
    """Of several services with that name, the one of the workload's own namespace; the port is the endpoint's."""
    other = service(f"bank/{HOSTNAME}", ports={80: 1})
    async with shop(ca, other) as it, peer(ca, it.port) as client:
        assert await ask_for(client, f"{HOSTNAME}:80") == TWICE
        line = await it.far.log.next()
        assert (line.dst_hbone_addr, line.dst_service) == (f"{HOSTNAME}:80", HOSTNAME)
        assert labels_of(it.far.metrics, "destination")["destination_service_namespace"] == "shop"


@pytest.mark.parametrize("what", ["service by address", "service by name", "workload"])
async def test_as_the_waypoint(ca: LocalCA, what: str) -> None:
    """An address that has this workload as its waypoint may be asked for; TCP goes to the address that was dialled."""
    by_address, by_name = gateway(f"/{STOCK}"), gateway(f"shop/{HOSTNAME}")
    guarded = {
        "service by address": service("shop/guarded.shop", "/10.96.0.30", waypoint=by_address),
        "service by name": service("shop/guarded.shop", "/10.96.0.30", waypoint=by_name),
        "workload": member("guarded", "10.96.0.30", waypoint=by_address),
    }[what]
    async with shop(ca, guarded) as it, peer(ca, it.port) as client:
        assert await ask_for(client, f"10.96.0.30:{it.app.port}") == TWICE
        line = await it.far.log.next()
        assert (line.dst_hbone_addr, line.dst_workload) == (f"10.96.0.30:{it.app.port}", "stock-0")
        with pytest.raises(BadTarget):
            await client.open_tunnel(f"10.96.0.31:{it.app.port}")


@pytest.mark.parametrize(
    ("target", "destination"),
    [("192.0.2.7:9000", "192.0.2.7:9000"), (f"{STOCK}:9000", f"{STOCK}:9000"), (f"{HOSTNAME}:80", f"{VIP}:80")],
    ids=["any address", "its own address", "a name"],
)
@pytest.mark.parametrize("local", [True, False], ids=["at loopback", "at its address"])
async def test_an_application_that_wants_to_know(ca: LocalCA, target: str, destination: str, local: bool) -> None:
    """PROXY protocol v2, byte by byte: who calls, what for, and the proven identity."""
    host = "127.0.0.1" if local else STOCK
    async with application(host) as app:
        far = {"localhost_app_tunnel": local}
        async with shop(ca, stock_fields=app_tunnel(app.port), far=far) as it, peer(ca, it.port) as client:
            tunnel = await client.open_tunnel(target)
            await tunnel.send_all(HELLO)
            await tunnel.send_eof()
            behind = await app.accept()
            got, end = await read_to_end(behind)
            assert end == "eof"
            source = Endpoint.from_sockaddr(client._session.local_address.sockaddr)
            identity = str(CART_ID).encode()
            wanted = Endpoint.parse(destination)
            size = 12 + 3 + len(identity)
            assert got == (
                b"\r\n\r\n\0\r\nQUIT\n\x21\x11"
                + size.to_bytes(2, "big")
                + source.ip.packed
                + wanted.ip.packed
                + source.port.to_bytes(2, "big")
                + wanted.port.to_bytes(2, "big")
                + b"\xd0"
                + len(identity).to_bytes(2, "big")
                + identity
                + HELLO
            )
            await behind.send_eof()
            assert await read_to_end(tunnel) == (b"", "eof")
            line = await it.far.log.next()
            assert (line.bytes_recv, line.bytes_sent) == (11, 0)  # the header is ours


async def test_an_application_tunnel_without_a_header(ca: LocalCA) -> None:
    """Another port, and any address may be asked for."""
    async with application(STOCK, double_echo) as app:
        async with shop(ca, stock_fields=app_tunnel(app.port, "NONE")) as it, peer(ca, it.port) as client:
            assert await ask_for(client, "192.0.2.7:9000") == TWICE


async def test_a_header_needs_an_address(ca: LocalCA) -> None:
    headless = service("shop/headless.shop")
    fields = {**app_tunnel(4711), "endpoint_of": {"shop/headless.shop": {80: 80}}}
    async with shop(ca, headless, stock_fields=fields) as it, peer(ca, it.port) as client:
        with pytest.raises(Unreachable):
            await client.open_tunnel("headless.shop:80")
        error = (await it.far.log.next()).error
        assert error == "no address for hostname: shop/headless.shop has no VIP, and a PROXY header takes no name"


async def test_an_application_that_leaves_before_it_was_told(ca: LocalCA, monkeypatch: pytest.MonkeyPatch) -> None:
    real = _node_inbound.connect_tcp

    async def connect_tcp(*args: Any, **options: Any) -> socket.socket:
        sock = await real(*args, **options)
        sock.shutdown(socket.SHUT_WR)
        return sock

    monkeypatch.setattr(_node_inbound, "connect_tcp", connect_tcp)
    async with application("127.0.0.1", echo) as app:
        async with shop(ca, stock_fields=app_tunnel(app.port)) as it, peer(ca, it.port) as client:
            tunnel = await client.open_tunnel(f"{STOCK}:80")
            assert await read_to_end(tunnel) == (b"", "reset")
            assert (await it.far.log.next()).error == "the application left before it was told who calls"
            await it.at_rest()
            assert total(it.far.metrics, "closed", response_flags="CONNECT") == 1


async def test_a_header_for_which_there_is_no_room() -> None:
    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        far.setblocking(False)
        while True:
            try:
                near.send(bytes(4096))
            except BlockingIOError:
                break
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_node_inbound._send_all, near, b"header")
            await trio.testing.wait_all_tasks_blocked()
            data = b""
            while not data.endswith(b"header"):
                await trio.lowlevel.wait_readable(far)
                data = far.recv(1 << 20)


# === what the client is told ===


async def test_the_answer_says_who_answers(ca: LocalCA) -> None:
    fields = {"cluster_id": "lab", "locality": Locality(region="eu", zone="eu-1")}
    async with shop(ca, stock_fields=fields) as it, peer(ca, it.port) as client:
        tunnel = await client.open_tunnel(f"{STOCK}:{it.app.port}")
        assert tunnel.response is not None
        assert (tunnel.response.status, tunnel.response.headers) == (
            200,
            (
                (
                    b"baggage",
                    b"k8s.cluster.name=lab,k8s.namespace.name=shop,k8s.deployment.name=stock,service.name=stock,"
                    b"service.version=v1,cloud.region=eu,cloud.availability_zone=eu-1",
                ),
            ),
        )
        await ask(tunnel)


async def test_without_baggage(ca: LocalCA) -> None:
    """Neither told nor read."""
    settings = NodeSettings(keep_source=False, response_baggage=False)
    async with shop(ca, far={"settings": settings}) as it, peer(ca, it.port) as client:
        tunnel = await client.open_tunnel(
            f"{STOCK}:{it.app.port}", headers=[("baggage", "k8s.namespace.name=shop,service.name=cart")]
        )
        assert tunnel.response is not None
        assert tunnel.response.headers == ()
        await ask(tunnel)
        line = await it.far.log.next()
        assert (line.src_workload, line.src_namespace, line.src_identity) == (None, None, CART_ID)
        assert set(labels_of(it.far.metrics, "destination")) & {"source_workload", "source_principal"} == {
            "source_principal"
        }


# === who the source is ===


BAGGAGE = "k8s.cluster.name=other,k8s.namespace.name=far,k8s.job.name=batch,service.name=night,service.version=v9"


@pytest.mark.parametrize(
    ("source", "network", "names"),
    [
        (CART, None, ("cart-0", "shop", "Kubernetes", "cart", "cart")),
        (CART, "", ("cart-0", "shop", "Kubernetes", "cart", "cart")),
        ("127.0.0.1", None, ("night", "far", "other", "batch", "batch")),
        (STOCK, None, ("night", "far", "other", "batch", "batch")),
        (CART, "elsewhere", ("night", "far", "other", "batch", "batch")),
    ],
    ids=[
        "the mesh knows its address",
        "an empty network",
        "it says so itself",
        "not who proved another identity",
        "behind a gateway",
    ],
)
async def test_the_source(ca: LocalCA, source: str, network: str | None, names: tuple[str, ...]) -> None:
    """What the mesh says of an address, else what the peer says; behind a gateway the address says nothing."""
    headers = {"baggage": BAGGAGE}
    if network is not None:
        headers["x_forwarded_network"] = network
    async with shop(ca) as it, peer(ca, it.port, source=source) as client:
        for _ in range(2):  # worked out, then remembered
            assert await ask_for(client, f"{STOCK}:{it.app.port}", **headers) == TWICE
            line = await it.far.log.next()
            assert (line.src_workload, line.src_namespace, line.src_cluster) == names[:3]
            assert line.src_identity == CART_ID
        labels = labels_of(it.far.metrics, "destination")
        assert (labels["source_workload"], labels["source_app"]) == names[3:]
        assert labels["source_principal"] == str(CART_ID)


async def test_the_own_network_is_no_other_one(ca: LocalCA) -> None:
    """Upper and lower case are the same."""
    own = member("stock", STOCK, network="Lab", endpoint_of={})
    async with application(STOCK, double_echo) as app:
        port = shared_port(STOCK)
        mesh = mesh_of(own, cart(network="Lab"))
        async with data_plane(mesh, ca=ca, listen=STOCK, hbone_port=port, network="Lab") as far:
            async with peer(ca, port, source=CART) as client:
                for network, workload in (("lab", "cart-0"), ("LAB", "cart-0"), ("lab2", None)):
                    await ask_for(client, f"{STOCK}:{app.port}", x_forwarded_network=network)
                    assert (await far.log.next()).src_workload == workload


@pytest.mark.parametrize(
    ("headers", "meant"),
    [
        ([("forwarded", 'for="10.0.0.1:1";host=b.shop')], "b.shop"),
        ([("forwarded", "host=b.shop")], "b.shop"),
        ([("forwarded", 'Host="b.shop";for="10.0.0.1:1"')], "b.shop"),
        ([("forwarded", 'for="10.0.0.1:1"'), ("forwarded", "host=b.shop")], "a.shop"),
        ([("forwarded", "host=b.shop"), ("forwarded", "host=a.shop")], "b.shop"),
        ([("forwarded", "host=elsewhere.shop")], "a.shop"),
        ([("forwarded", "host=")], "a.shop"),
        ([], "a.shop"),
    ],
    ids=str,
)
async def test_the_service_that_was_meant(ca: LocalCA, headers: Any, meant: str) -> None:
    """What the peer says counts if it is a service of the workload; else the first one with that port."""
    async with application(STOCK, double_echo) as app:
        own = member("stock", STOCK, endpoint_of={"shop/a.shop": {80: app.port}, "shop/b.shop": {80: app.port}})
        port = shared_port(STOCK)
        mesh = mesh_of(own, service("shop/a.shop"), service("shop/b.shop"))
        async with data_plane(mesh, ca=ca, listen=STOCK, hbone_port=port) as far, peer(ca, port) as client:
            # Another claim before, to be remembered and not to be mistaken for this one.
            for claim in ([("forwarded", "host=a.shop")], headers):
                await ask(await client.open_tunnel(f"{STOCK}:{app.port}", headers=claim))
                line = await far.log.next()
            assert line.dst_service == meant


async def test_hostile_headers_do_not_fill_the_memory(ca: LocalCA, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a peer chooses is remembered up to a number, and only when it is short."""
    monkeypatch.setattr(_node_inbound, "_REMEMBERED", 10)
    async with shop(ca) as it, peer(ca, it.port) as client:

        def remembered() -> int:
            return sum(len(v) for v in it.mesh.snapshot.memo.values() if isinstance(v, _node_inbound._Known))

        target = f"{STOCK}:{it.app.port}"
        for number in range(25):
            await ask_for(client, target, baggage=f"service.name=s{number}")
            assert 1 <= remembered() <= 10
            assert (await it.far.log.next()).src_workload == f"s{number}"
        before = remembered()
        for name in ("baggage", "forwarded", "x_forwarded_network"):
            long = ",".join(f"key{number}=value" for number in range(200))
            assert await ask_for(client, target, **{name: long}) == TWICE
        with pytest.raises(Unreachable):
            await client.open_tunnel(f"{'a' * 60}.shop:80")
        assert remembered() == before


# === who we are ===


async def test_each_address_has_its_own_certificate(ca: LocalCA) -> None:
    async with application(LEGACY, double_echo) as other:
        async with shop(ca, member("till", LEGACY), far={"listen": (STOCK, LEGACY)}) as it:
            for host, who, port in ((STOCK, "stock", it.app.port), (LEGACY, "till", other.port)):
                async with peer(ca, it.port, host=host, expect=f"{TD}/shop/sa/{who}") as client:
                    assert str(client.peer.identity) == f"{TD}/shop/sa/{who}"
                    assert await ask_for(client, f"{host}:{port}") == TWICE
                    assert (await it.far.log.next()).dst_identity == client.peer.identity
            with pytest.raises(PeerIdentityMismatch):
                async with peer(ca, it.port, host=LEGACY, expect=STOCK_ID):
                    pass


async def test_an_address_of_nobody(ca: LocalCA, caplog: pytest.LogCaptureFixture) -> None:
    """No certificate, no session; and the log is not filled with it."""
    async with shop(ca, far={"listen": (STOCK, THIEF)}) as it:
        for _ in range(3):
            with pytest.raises(ConnectFailed):
                async with peer(ca, it.port, host=THIEF):
                    pass
        warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert warnings == [
            f"no session: no certificate for {THIEF}:{it.port}: no workload of this node has this address"
        ]
        assert it.far.inbound.server.statistics().failed == 3


async def test_a_dedicated_node_is_one_workload_at_all_addresses(ca: LocalCA) -> None:
    info = WorkloadInfo(namespace="shop", name="stock-0", service_account="stock")
    async with application(THIEF, double_echo) as app:
        async with shop(ca, far={"listen": (STOCK, THIEF), "dedicated": info}) as it:
            async with peer(ca, it.port, host=THIEF, expect=STOCK_ID) as client:
                assert await ask_for(client, f"{THIEF}:{app.port}") == TWICE


async def test_a_peer_of_another_trust_domain(ca: LocalCA) -> None:
    from hbone.certs import LocalCA

    other = LocalCA.in_memory(trust_domain="other.example")
    async with shop(ca) as it:
        svid = other.issue("spiffe://other.example/ns/shop/sa/cart")
        with pytest.raises((IdentityRefused, ConnectFailed)):
            async with HBONEClient.connect(STOCK, it.port, svid=svid, expect=STOCK_ID):
                pass
        await until(lambda: it.far.inbound.server.statistics().failed == 1)


async def test_an_address_that_becomes_somebody_else(ca: LocalCA) -> None:
    """Who had a session to the old one is sent away to look again; what is open goes on."""
    async with shop(ca, habit=None) as it:
        svid = ca.issue(CART_ID)
        async with ConnectionPool(svid) as pool:
            via = Endpoint.parse(f"{STOCK}:{it.port}")
            target = f"{STOCK}:{it.app.port}"
            tunnel = await pool.open_tunnel(target, via=via, expect=STOCK_ID)
            behind = await it.app.accept()
            thief = member("thief", STOCK)
            it.mesh.replace(it.mesh.snapshot.with_changes(upsert=[thief], remove_workloads=["lab//Pod/shop/stock-0"]))
            await it.far.context.svids.get(thief.identity)
            with pytest.raises(PeerIdentityMismatch, match=f"peer is {thief.identity}, expected {STOCK_ID}"):
                await pool.open_tunnel(target, via=via, expect=STOCK_ID)
            async with await pool.open_tunnel(target, via=via, expect=thief.identity) as other:
                await (await it.app.accept()).aclose()
                await read_to_end(other)
            await tunnel.send_all(HELLO)
            assert await receive_exactly(behind, len(HELLO)) == HELLO
            await tunnel.send_eof()
            await behind.send_eof()
            assert await read_to_end(tunnel) == (b"", "eof")


async def test_a_session_that_does_not_hear_of_it(ca: LocalCA) -> None:
    """A request that is faster than the news is refused all the same."""
    async with shop(ca, far={"listen": ()}) as it:
        # Not by way of NodeInbound.serve, which tells sessions of changes.
        endpoint = await it.far.nursery.start(it.far.inbound.server.serve, STOCK, 0)
        async with peer(ca, endpoint.port) as client:
            target = f"{STOCK}:{it.app.port}"
            assert await ask_for(client, target) == TWICE
            await it.far.log.next()
            upsert = [member("thief", STOCK)]
            it.mesh.replace(it.mesh.snapshot.with_changes(upsert=upsert, remove_workloads=["lab//Pod/shop/stock-0"]))
            with pytest.raises(Unreachable):
                await client.open_tunnel(target)
            line = await it.far.log.next()
            why = f"{STOCK}:{endpoint.port} has become {TD}/shop/sa/thief, and the peer knows it as {STOCK_ID}"
            assert (line.error, line.level) == (why, "warn")
            it.mesh.replace(it.mesh.snapshot.with_changes(remove_workloads=["lab//Pod/shop/thief-0"]))
            with pytest.raises(Unreachable):
                await client.open_tunnel(target)
            assert (
                await it.far.log.next()
            ).error == f"no workload of this node has the address {STOCK}:{endpoint.port}"


# === from whom the application is called ===


@pytest.mark.parametrize(
    ("keep", "fields", "source", "expected"),
    [
        (True, {}, CART, (CART, True)),
        (None, {}, CART, (CART, True)),
        (False, {}, CART, (None, False)),
        (True, {}, STOCK, (None, True)),
        (True, app_tunnel(4711), CART, (None, False)),
    ],
    ids=["must", "may", "must not", "a workload calls itself", "at loopback"],
)
async def test_the_source_address(
    ca: LocalCA,
    monkeypatch: pytest.MonkeyPatch,
    keep: bool | None,
    fields: dict[str, Any],
    source: str,
    expected: tuple[str | None, bool],
) -> None:
    """What is asked of the kernel; that it does it is for a network namespace to show."""
    asked: list[tuple[str | None, bool]] = []

    async def connect_tcp(host: str, port: int, *, source_ip: Any, transparent: bool, **_: Any) -> socket.socket:
        asked.append((None if source_ip is None else str(source_ip), transparent))
        raise ConnectFailed("this was only to see what is asked")

    monkeypatch.setattr(_node_inbound, "connect_tcp", connect_tcp)
    settings = NodeSettings(keep_source=keep)
    async with shop(ca, stock_fields=fields, far={"settings": settings}) as it:
        async with peer(ca, it.port, source=source) as client:
            with pytest.raises(Unreachable):
                await client.open_tunnel(f"{STOCK}:80")
    assert asked == [expected]


# === the end ===


async def test_a_request_that_is_taken_back(ca: LocalCA, monkeypatch: pytest.MonkeyPatch) -> None:
    dialling = trio.Event()

    async def connect_tcp(*_: Any, **__: Any) -> socket.socket:
        dialling.set()
        return await trio.sleep_forever()

    monkeypatch.setattr(_node_inbound, "connect_tcp", connect_tcp)
    async with shop(ca) as it, peer(ca, it.port) as client, trio.open_nursery() as nursery:
        nursery.start_soon(client.open_tunnel, f"{STOCK}:80")
        await dialling.wait()
        assert len(it.far.context.connections.inbound) == 1
        nursery.cancel_scope.cancel()
    line = it.far.log.records[0]
    assert line.error == "cancelled: the request was taken back, or the node is stopping"
    assert it.far.left() == {}
    assert traffic(it.far.metrics) == {("destination", "opened"): 1, ("destination", "closed CONNECT"): 1}


async def test_a_request_that_is_gone_when_the_application_answers(
    ca: LocalCA, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the very moment: it has been dialled, and nobody wants it any more."""
    real = _node_inbound.connect_tcp

    async def connect_tcp(*args: Any, **options: Any) -> socket.socket:
        sock = await real(*args, **options)
        for session in it.far.inbound.server.sessions:
            for tunnel in session.tunnels:
                tunnel.on_gone = None
                tunnel.abort()
        return sock

    monkeypatch.setattr(_node_inbound, "connect_tcp", connect_tcp)
    async with shop(ca, habit=None) as it, peer(ca, it.port) as client:
        with pytest.raises(HboneError):
            await client.open_tunnel(f"{STOCK}:{it.app.port}")
        assert await read_to_end(await it.app.accept()) == (b"", "reset")
        assert "reset" in str((await it.far.log.next()).error)
        await it.at_rest()


async def test_draining(ca: LocalCA) -> None:
    """New requests are refused in a way that says: ask elsewhere. What is open may finish."""
    async with shop(ca, habit=None) as it, peer(ca, it.port) as client, trio.open_nursery() as nursery:
        tunnel = await client.open_tunnel(f"{STOCK}:{it.app.port}")
        behind = await it.app.accept()
        nursery.start_soon(it.far.inbound.drain, 60)
        await until(lambda: client.draining)
        with pytest.raises(StreamRefused):
            await client.open_tunnel(f"{STOCK}:{it.app.port}")
        with pytest.raises(ConnectFailed):
            async with peer(ca, it.port):
                pass
        await behind.send_all(TWICE)
        await behind.send_eof()
        assert await ask(tunnel) == TWICE
    await it.at_rest()


async def test_the_end_of_the_node(ca: LocalCA) -> None:
    async with shop(ca, habit=None) as it, peer(ca, it.port) as client:
        tunnel = await client.open_tunnel(f"{STOCK}:{it.app.port}")
        behind = await it.app.accept()
        await it.far.inbound.drain(0)
        assert await read_to_end(tunnel) == (b"", "reset")
        assert await read_to_end(behind) == (b"", "reset")
        await it.at_rest()
        assert (await it.far.log.next()).error
