"""Across networks: a tunnel in a tunnel, through a gateway that cannot look inside."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import trio
from support.dataplanes import (
    FAR,
    GATEWAY,
    HOSTNAME,
    LEGACY,
    TD,
    THIEF,
    VIP,
    Names,
    Refused,
    across,
    ask,
    hbone_peer,
    labels_of,
    member,
    read_to_end,
    samples,
    total,
    traffic,
    trusting,
    until,
)
from support.meshes import name, policy
from support.tcp import receive_exactly

from hbone import (
    Authority,
    Endpoint,
    ErrorCode,
    FixedTarget,
    ForwardHandler,
    RequestRejected,
    SpiffeIdentity,
)
from hbone.certs import LocalCA
from hbone.mesh import GatewayAddress, Match, StringMatch, StringMatchKind
from hbone.proxy._context import NodeSettings

if TYPE_CHECKING:
    from hbone import TunnelRequest

HELLO, TWICE = b"hello world", b"hello worldhello world"
CART_ID, STOCK_ID, GATE_ID = (SpiffeIdentity.parse(f"{TD}/shop/sa/{name}") for name in ("cart", "stock", "gate"))


@pytest.mark.parametrize("host", [VIP, HOSTNAME])
async def test_across_networks(ca: LocalCA, host: str) -> None:
    async with across(ca) as it:
        assert await it.near.ask(host, 80) == TWICE
        near, far = await it.near.log.next(), await it.far.log.next()
        # The next hop is the gateway; who is behind it, its answer and its certificate say.
        assert near.dst_addr == Endpoint.parse(f"{GATEWAY}:{it.gate.port}")
        assert near.dst_hbone_addr == Authority(HOSTNAME, 80)
        assert (near.dst_service, near.dst_workload, near.dst_namespace) == (HOSTNAME, "stock", "shop")
        assert (near.src_identity, near.dst_identity, near.dst_cluster) == (CART_ID, STOCK_ID, "Kubernetes")
        assert (near.bytes_sent, near.bytes_recv, near.error) == (11, 22, None)
        assert (far.src_workload, far.src_identity, far.dst_workload) == ("cart", CART_ID, "stock-0")
        assert far.dst_hbone_addr == f"{HOSTNAME}:80"
        assert (far.bytes_sent, far.bytes_recv, far.error) == (22, 11, None)
        await it.at_rest()
        assert traffic(it.near.metrics) == {
            ("source", "opened"): 1,
            ("source", "received"): 11,
            ("source", "sent"): 22,
            ("source", "closed -"): 1,
        }
        labels = labels_of(it.near.metrics, "source")
        assert {name: value for name, value in labels.items() if name.startswith("destination")} == {
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
        }
        assert (labels["source_principal"], labels["connection_security_policy"]) == (str(CART_ID), "mutual_tls")


async def test_the_headers_of_both_requests(ca: LocalCA) -> None:
    """The same on both, but for the network: it is told inside, and not to the gateway."""
    inner: list[TunnelRequest] = []

    async with across(ca) as it:
        handle = it.far.inbound.server._handler

        async def handler(request: TunnelRequest) -> None:
            inner.append(request)
            await handle(request)

        it.far.inbound.server._handler = handler
        await it.near.ask(VIP, 80)
        (outside,), (inside,) = it.gate.requests, inner
        assert outside.headers.authority == inside.headers.authority == f"{HOSTNAME}:80"
        assert [name for name, _ in outside.headers.headers] == [b"baggage", b"forwarded", b"traceparent"]
        assert inside.headers.headers == (*outside.headers.headers, (b"x-forwarded-network", b"near"))
        assert outside.peer.identity == inside.peer.identity == CART_ID


async def test_each_connection_has_a_session_of_its_own(ca: LocalCA) -> None:
    """The next one may be for another endpoint. The one to the gateway is shared; the inner ones end with theirs."""
    async with across(ca) as it:
        streams = [await it.near.connect(VIP, 80) for _ in range(3)]
        await until(lambda: len(it.far.inbound.server.sessions) == 3)
        assert len(it.gate.server.sessions) == 1
        (shown, *_) = it.near.context.connections.outbound
        assert shown.protocol == "DOUBLEHBONE"
        for stream in streams:
            await stream.send_eof()
            assert await read_to_end(stream) == (b"", "eof")
            await stream.aclose()
        await until(lambda: not it.far.inbound.server.sessions)
        await it.at_rest()
        assert len(it.gate.server.sessions) == 1


async def test_without_baggage_in_the_answer(ca: LocalCA) -> None:
    """Then only the certificate says who is there. It is not the gateway."""
    settings = NodeSettings(keep_source=False, network="far", response_baggage=False)
    async with across(ca, far={"settings": settings}) as it:
        assert await it.near.ask(VIP, 80) == TWICE
        near, far = await it.near.log.next(), await it.far.log.next()
        assert (near.dst_workload, near.dst_identity, near.dst_service) == (None, STOCK_ID, HOSTNAME)
        assert (far.src_workload, far.src_identity) == (None, CART_ID)
        await it.at_rest()
        labels = labels_of(it.near.metrics, "source")
        assert "destination_workload" not in labels
        assert labels["destination_principal"] == str(STOCK_ID)


# === who is who ===


async def test_somebody_else_at_the_gateway(ca: LocalCA) -> None:
    async with across(ca, gate_identity=f"{TD}/shop/sa/thief") as it:
        with pytest.raises(Refused, match=f"peer is {TD}/shop/sa/thief, expected {GATE_ID}"):
            await it.near.ask(VIP, 80, way="http")
        line = await it.near.log.next()
        assert line.error == f"peer is {TD}/shop/sa/thief, expected {GATE_ID}"
        # Nobody answered, so all that is known of the next hop is what the mesh says of the gateway.
        assert (line.dst_workload, line.dst_identity) == ("gate-0", GATE_ID)
        await it.at_rest()
        assert not it.gate.requests
        assert traffic(it.near.metrics) == {("source", "opened"): 1, ("source", "closed TLS_FAILURE"): 1}


async def test_a_gateway_that_trusts_another_root(ca: LocalCA) -> None:
    """It refuses the client's certificate. That is told at once, each time, and nothing begins inside."""
    theirs = LocalCA.in_memory()
    async with across(ca, near={"issue": trusting(ca, theirs)}, gate_ca=theirs) as it:
        for _ in range(2):
            with pytest.raises(Refused, match="the peer refused our certificate or identity"):
                await it.near.ask(VIP, 80, way="http")
            line = await it.near.log.next()
            assert line.error is not None
            # What is in between is the alert, unless TCP's reset was quicker.
            assert line.error.startswith("the peer refused our certificate or identity (")
            assert line.error.endswith("check that it trusts our root and accepts our trust domain")
            assert (line.level, line.dst_addr) == ("error", Endpoint.parse(f"{GATEWAY}:{it.gate.port}"))
            assert (line.dst_service, line.dst_hbone_addr) == (HOSTNAME, Authority(HOSTNAME, 80))
            assert (line.dst_workload, line.src_identity, line.dst_identity) == ("gate-0", CART_ID, GATE_ID)
        await it.at_rest()
        assert traffic(it.near.metrics) == {("source", "opened"): 2, ("source", "closed TLS_FAILURE"): 2}
        assert not it.gate.requests
        assert not it.gate.server.sessions
        server = it.far.inbound.server.statistics()
        assert (server.sessions, server.half_open) == (0, 0)
        assert not samples(it.far.metrics, "hbone_handshake_duration_seconds_count")
        assert not samples(it.far.metrics, "hbone_handshake_failures_total")


@pytest.mark.parametrize(
    "expected",
    [f"{TD}/shop/sa/other", f"{TD}/bank/sa/stock", str(GATE_ID)],
    ids=["another account", "another namespace", "the gateway"],
)
async def test_somebody_else_behind_the_gateway(ca: LocalCA, expected: str) -> None:
    """Only whom the service names is good for the inner tunnel; not the workload, and not the gateway."""
    async with across(ca, service_fields={"subject_alt_names": (expected,)}) as it:
        why = f"peer is {STOCK_ID}, expected {expected}"
        with pytest.raises(Refused, match=why):
            await it.near.ask(VIP, 80, way="http")
        line = await it.near.log.next()
        assert (line.error, line.dst_workload) == (why, "gate-0")
        await it.at_rest()
        await until(lambda: not it.far.inbound.server.sessions)
        assert traffic(it.near.metrics) == {("source", "opened"): 1, ("source", "closed TLS_FAILURE"): 1}
        assert not it.far.log.records


async def test_a_service_that_names_nobody(ca: LocalCA) -> None:
    async with across(ca, service_fields={"subject_alt_names": ()}) as it:
        with pytest.raises(Refused, match="nobody is known to be shop/stock.shop.svc.cluster.local behind a gateway"):
            await it.near.ask(VIP, 80, way="http")
        assert (await it.near.log.next()).level == "warn"
        await it.at_rest()
        assert not traffic(it.near.metrics)
        assert not it.gate.requests


async def test_policy_behind_the_gateway_sees_the_client(ca: LocalCA) -> None:
    """The inner certificate counts, and not the gateway's."""
    cart = Match(principals=(StringMatch(StringMatchKind.EXACT, "cluster.local/ns/shop/sa/cart"),))
    async with across(ca, policies=(policy("shop/no-cart", rules=(((cart,),),)),)) as it:
        with pytest.raises(Refused, match="403"):
            await it.near.ask(VIP, 80, way="http")
        near, far = await it.near.log.next(), await it.far.log.next()
        assert (
            near.error == "http status: 401 Unauthorized: the peer's authorization policy does not allow our identity"
        )
        assert far.error == "connection closed due to policy rejection: explicitly denied by: shop/no-cart"
        assert far.src_identity == CART_ID
        await it.at_rest()
        await until(lambda: not it.far.inbound.server.sessions)
        assert traffic(it.near.metrics) == {("source", "opened"): 1, ("source", "closed CONNECT"): 1}
        assert traffic(it.far.metrics) == {("destination", "opened"): 1, ("destination", "closed DENY"): 1}


async def test_a_gateway_with_several_addresses(ca: LocalCA) -> None:
    """What is behind the first one cannot help: its tunnel is closed before the next one is tried."""

    async def refuse(request: TunnelRequest) -> None:
        raise RequestRejected(503)

    async with across(ca) as it, hbone_peer(ca, str(STOCK_ID), LEGACY, handler=refuse) as useless:
        leads_there = ForwardHandler(FixedTarget(Authority(LEGACY, useless.port)))
        async with hbone_peer(ca, str(GATE_ID), THIEF, it.gate.port, leads_there) as other:
            Names(gate_example=[THIEF, GATEWAY])
            named = member("gate", "", addresses=(), hostname="gate.example", network="near")
            destination = GatewayAddress(destination=name("shop/gate.example"), hbone_mtls_port=it.gate.port)
            remote = replace(it.near.mesh.snapshot.workloads["lab//Pod/shop/stock-0"], network_gateway=destination)
            it.near.mesh.replace(it.near.mesh.snapshot.with_changes(upsert=[named, remote]))
            async with await it.near.connect(VIP, 80) as stream:
                assert len(other.requests) == len(useless.requests) == len(it.gate.requests) == 1
                await until(lambda: not useless.server.sessions)
                assert await ask(stream) == TWICE
            line = await it.near.log.next()
            assert (line.dst_addr, line.error) == (Endpoint.parse(f"{GATEWAY}:{it.gate.port}"), None)
            await it.at_rest()
            assert total(it.near.metrics, "opened") == 1


# === what breaks ===


async def test_a_gateway_that_refuses(ca: LocalCA) -> None:
    async def handler(request: TunnelRequest) -> None:
        raise RequestRejected(503)

    async with across(ca, gate_handler=handler) as it:
        with pytest.raises(Refused, match="503"):
            await it.near.ask(VIP, 80, way="http")
        line = await it.near.log.next()
        assert line.error == "http status: 503 Service Unavailable: the peer could not connect to the target"
        await it.at_rest()
        assert traffic(it.near.metrics) == {("source", "opened"): 1, ("source", "closed CONNECT"): 1}


async def test_a_gateway_that_leads_nowhere(ca: LocalCA) -> None:
    """No TLS inside the outer tunnel."""

    async def handler(request: TunnelRequest) -> None:
        async with await request.accept() as tunnel:
            await tunnel.receive_some()
            await tunnel.send_all(b"HTTP/1.1 200 OK\r\n\r\n")

    async with across(ca, gate_handler=handler) as it:
        with pytest.raises(Refused, match="502"):
            await it.near.ask(VIP, 80, way="http")
        assert (await it.near.log.next()).error
        await it.at_rest()
        assert total(it.near.metrics, "closed") == total(it.near.metrics, "failed") == 1


@pytest.mark.parametrize("how", ["reset", "end"])
async def test_a_cut_in_the_middle_is_no_end(ca: LocalCA, how: str) -> None:
    """Whatever the gateway does to the outer tunnel: the application must not take what came for all there is."""
    outer: list[Any] = []

    async def handler(request: TunnelRequest) -> None:
        tunnel = await request.accept()
        stream = await trio.open_tcp_stream(FAR, far_port)
        outer.append((tunnel, stream))
        async with trio.open_nursery() as nursery:

            async def carry(source: trio.abc.ReceiveStream, sink: trio.abc.HalfCloseableStream) -> None:
                try:
                    async for chunk in source:
                        await sink.send_all(chunk)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    pass

            nursery.start_soon(carry, tunnel, stream)
            nursery.start_soon(carry, stream, tunnel)

    async with across(ca, habit=None, gate_handler=handler) as it:
        far_port = it.far.context.router.config.hbone_port
        async with await it.near.connect(VIP, 80) as near:
            far = await it.app.accept()
            await far.send_all(HELLO)
            assert await receive_exactly(near, len(HELLO)) == HELLO
            tunnel, stream = outer[0]
            if how == "reset":
                tunnel.abort(ErrorCode.CONNECT_ERROR)
            else:
                await tunnel.send_eof()
            assert await read_to_end(near) == (b"", "reset")
            line = await it.near.log.next()
            assert (line.bytes_recv, line.dst_workload) == (11, "stock")
            assert line.error is not None
            await stream.aclose()
            assert await read_to_end(far) == (b"", "reset")
            assert (await it.far.log.next()).error is not None
        await it.at_rest()
        assert total(it.near.metrics, "closed", response_flags="CONNECT") == 1
        assert total(it.far.metrics, "closed", response_flags="CONNECT") == 1


async def test_each_direction_ends_by_itself(ca: LocalCA) -> None:
    async with across(ca, habit=None) as it, await it.near.connect(VIP, 80) as near:
        far = await it.app.accept()
        await near.send_all(HELLO)
        await near.send_eof()
        assert await read_to_end(far) == (HELLO, "eof")
        for _ in range(3):
            await far.send_all(b"still")
            assert await receive_exactly(near, 5) == b"still"
        await far.send_eof()
        assert await read_to_end(near) == (b"", "eof")
        line = await it.near.log.next()
        assert (line.bytes_sent, line.bytes_recv, line.error) == (11, 15, None)
        await it.at_rest()


async def test_the_end_of_the_node(ca: LocalCA) -> None:
    async with across(ca, habit=None) as it, await it.near.connect(VIP, 80) as near:
        far = await it.app.accept()
        await it.near.outbound.drain(0)
        assert await read_to_end(near) == (b"", "reset")
        assert await read_to_end(far) == (b"", "reset")
        assert (await it.near.log.next()).error == "the node was stopped"
        await it.at_rest()
