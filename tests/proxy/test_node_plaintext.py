"""Plain TCP into a node's workloads. Where it was going is what netfilter would have remembered (`Captures`)."""

from __future__ import annotations

import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import trio
from support.dataplanes import (
    CART,
    HOSTNAME,
    LEGACY,
    STOCK,
    TD,
    application,
    ask,
    cart,
    data_plane,
    dial,
    double_echo,
    labels_of,
    mesh_of,
    read_to_end,
    reset,
    samples,
    shared_port,
    stock,
    stock_service,
    total,
    traffic,
    until,
)
from support.meshes import policy, workload
from support.tcp import receive_exactly

from hbone import Authority, Endpoint, NoRoute
from hbone.mesh import Action, Match, StringMatch, StringMatchKind, TunnelProtocol
from hbone.proxy import _node_plaintext
from hbone.proxy._context import NodeSettings, WorkloadInfo
from hbone.telemetry import AccessRecord, Direction, LogLevel

if sys.platform != "linux":
    pytest.skip("capturing is for Linux", allow_module_level=True)

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator

    from support.dataplanes import Application, Captures, DataPlane

    from hbone.certs import LocalCA
    from hbone.mesh import AuthorizationPolicy

HELLO, TWICE = b"hello world", b"hello worldhello world"
DENY_ALL = policy("shop/no", rules=((),))
STRICT = policy("shop/strict", rules=(((Match(not_principals=(StringMatch(StringMatchKind.PRESENCE),)),),),))


class Plain:
    """One node with plain-text peers, and the application behind it."""

    def __init__(self, node: DataPlane, proxy: Endpoint, app: Application, captures: Captures) -> None:
        self.node = node
        self.proxy = proxy
        self.app = app
        self._captures = captures

    async def dial(self, target: str | None = None, source: str = "127.0.0.1") -> trio.SocketStream:
        return await self._captures.dial(self.proxy, target or str(self.app.endpoint), source)

    async def at_rest(self) -> None:
        await until(lambda: not self.node.left())


@asynccontextmanager
async def plain(
    ca: LocalCA, captures: Captures, *policies: AuthorizationPolicy, habit: Any = double_echo, **options: Any
) -> AsyncIterator[Plain]:
    async with application(STOCK, habit) as app:
        mesh = mesh_of(cart(), stock(app.port, **options.pop("fields", {})), stock_service(), *policies)
        async with data_plane(mesh, ca=ca, patience=0.01, **options) as node:
            yield Plain(node, await node.nursery.start(node.plaintext.serve, "127.0.0.1", 0), app, captures)


def bare(record: AccessRecord) -> AccessRecord:
    """Without what is never the same."""
    assert record.duration is None or 0 <= record.duration < 60
    return record._replace(src_addr=None, duration=None)


@pytest.mark.parametrize("protocol", list(TunnelProtocol))
@pytest.mark.parametrize(
    ("source", "names"),
    [(CART, ("cart-0", "shop", "Kubernetes")), ("127.0.0.1", (None, None, None))],
    ids=["known", "unknown"],
)
async def test_in(
    ca: LocalCA, captures: Captures, source: str, names: tuple[str | None, ...], protocol: TunnelProtocol
) -> None:
    """Whether or not its workload speaks HBONE: who comes without is let in as long as no policy says otherwise."""
    async with plain(ca, captures, fields={"protocol": protocol}) as it:
        async with await it.dial(source=source) as near:
            assert await ask(near) == TWICE
            local = near.socket.getsockname()
        line = await it.node.log.next()
        assert line.src_addr == Endpoint.from_sockaddr(local)
        assert bare(line) == AccessRecord(
            direction=Direction.INBOUND,
            src_workload=names[0],
            src_namespace=names[1],
            src_cluster=names[2],
            dst_addr=it.app.endpoint,
            dst_service=HOSTNAME,
            dst_workload="stock-0",
            dst_namespace="shop",
            dst_cluster="Kubernetes",
            bytes_sent=22,
            bytes_recv=11,
        )
        await it.at_rest()
        assert traffic(it.node.metrics) == {
            ("destination", "opened"): 1,
            ("destination", "received"): 11,
            ("destination", "sent"): 22,
            ("destination", "closed -"): 1,
        }
        labels = labels_of(it.node.metrics, "destination", without=())
        assert labels["source_principal"] == labels["connection_security_policy"] == "unknown"
        assert labels["source_workload"] == ("cart" if names[0] else "unknown")
        assert labels["destination_principal"] == f"{TD}/shop/sa/stock"
        assert labels["destination_service"] == HOSTNAME


async def test_what_is_under_way_shows(ca: LocalCA, captures: Captures) -> None:
    async with plain(ca, captures) as it, await it.dial() as near:
        await near.send_all(HELLO)
        assert await receive_exactly(near, len(TWICE)) == TWICE
        assert it.node.plaintext.connections == 1
        (shown,) = it.node.context.connections.inbound
        assert (shown.protocol, shown.original, shown.actual) == ("TCP", HOSTNAME, it.app.endpoint)
        assert shown.source == Endpoint.from_sockaddr(near.socket.getsockname())
        assert traffic(it.node.metrics)["destination", "sent"] == 22
        sockets = {s.labels["reporter"]: s.value for s in samples(it.node.metrics, "istio_tcp_sockets_open")}
        assert sockets == {"source": 0, "destination": 1}


async def test_a_connection_that_begins_is_told_at_debug(ca: LocalCA, captures: Captures) -> None:
    async with plain(ca, captures) as it:
        it.node.log.level = LogLevel.DEBUG
        async with await it.dial() as near:
            await ask(near)
        first, last = await it.node.log.next(), await it.node.log.next()
        assert first.level == "debug"
        assert first._replace(opened=False) == last._replace(bytes_sent=None, bytes_recv=None, duration=None)


async def test_without_log_and_metrics(ca: LocalCA, captures: Captures) -> None:
    async with plain(ca, captures) as it:
        it.node.context.metrics = it.node.context.access_log = None
        async with await it.dial() as near:
            assert await ask(near) == TWICE
        async with await it.dial("192.0.2.1:80") as near:
            assert await read_to_end(near) == (b"", "reset")


# === refused ===


async def test_refused_by_policy(ca: LocalCA, captures: Captures) -> None:
    """Strict is a policy that denies whoever has no principal."""
    async with plain(ca, captures, STRICT) as it:
        async with await it.dial(source=CART) as near:
            assert await read_to_end(near) == (b"", "reset")
        line = await it.node.log.next()
        assert line.error == "connection closed due to policy rejection: explicitly denied by: shop/strict"
        assert (line.level, line.bytes_sent, line.bytes_recv) == ("error", 0, 0)
        await it.at_rest()
        assert traffic(it.node.metrics) == {("destination", "opened"): 1, ("destination", "closed DENY"): 1}
        (verdict,) = samples(it.node.metrics, "hbone_policy_verdicts")
        assert (verdict.labels, verdict.value) == ({"verdict": "deny", "dry_run": "false"}, 1)


async def test_policies_see_where_it_goes(ca: LocalCA, captures: Captures) -> None:
    """The port and the address of the packet; and the namespace of nobody is empty."""
    async with application(STOCK, double_echo) as other:
        rules = (((Match(destination_ports=(other.port,)),),),)
        async with plain(ca, captures, policy("shop/port", action=Action.ALLOW, rules=rules)) as it:
            async with await it.dial(f"{STOCK}:{other.port}") as near:
                assert await ask(near) == TWICE
            assert (await it.node.log.next()).error is None
            async with await it.dial() as near:
                assert await read_to_end(near) == (b"", "reset")
            error = (await it.node.log.next()).error
            assert error == "connection closed due to policy rejection: allow policies exist, but none allowed"


@pytest.mark.parametrize("target", ["192.0.2.1:80", f"{LEGACY}:80"], ids=["nobody's", "another node's"])
async def test_an_address_without_a_workload(ca: LocalCA, captures: Captures, target: str) -> None:
    async with plain(ca, captures) as it:
        async with await it.dial(target) as near:
            assert await read_to_end(near) == (b"", "reset")
        line = await it.node.log.next()
        host = target.partition(":")[0]
        assert bare(line) == AccessRecord(
            direction=Direction.INBOUND,
            dst_addr=Authority.parse(target),
            error=f"no workload of this node has the address {host}",
        )
        assert (line.level, line.src_addr is None) == ("warn", False)
        await it.at_rest()
        assert not traffic(it.node.metrics)


@pytest.mark.parametrize("port", [15001, 15006, 15008])
async def test_a_port_of_the_mesh(ca: LocalCA, captures: Captures, port: int) -> None:
    async with plain(ca, captures) as it:
        async with await it.dial(f"10.9.9.9:{port}") as near:
            assert await read_to_end(near) == (b"", "reset")
        error = (await it.node.log.next()).error
        assert error == f"10.9.9.9:{port} is a port of the proxy itself: the connection would go in a circle"
        await it.at_rest()


async def test_straight_to_the_port(ca: LocalCA, captures: Captures) -> None:
    """Not by way of netfilter."""
    async with plain(ca, captures) as it:
        async with await dial(it.proxy) as near:
            source = Endpoint.from_sockaddr(near.socket.getsockname())
            assert await read_to_end(near) == (b"", "reset")
        line = await it.node.log.next()
        assert line.error == f"{it.proxy} is this proxy itself: nothing redirected the connection here"
        assert (line.src_addr, line.dst_addr) == (source, it.proxy.authority)
        await it.at_rest()


async def test_an_application_that_is_down(ca: LocalCA, captures: Captures) -> None:
    async with plain(ca, captures) as it:
        port = shared_port(STOCK)
        async with await it.dial(f"{STOCK}:{port}") as near:
            assert await read_to_end(near) == (b"", "reset")
        line = await it.node.log.next()
        assert line.error == f"connecting to {STOCK}:{port} failed: connection refused (nothing listens there)"
        assert (line.level, line.dst_workload) == ("error", "stock-0")
        await it.at_rest()
        assert traffic(it.node.metrics) == {("destination", "opened"): 1, ("destination", "closed CONNECT"): 1}


# === bytes and ends ===


@pytest.mark.parametrize("first", ["near", "far"])
async def test_each_direction_ends_by_itself(ca: LocalCA, captures: Captures, first: str) -> None:
    async with plain(ca, captures, habit=None) as it, await it.dial() as near:
        ends = near, await it.app.accept()
        one, other = ends if first == "near" else ends[::-1]
        await one.send_all(b"first")
        await one.send_eof()
        assert await read_to_end(other) == (b"first", "eof")
        await other.send_all(b"still")
        assert await receive_exactly(one, 5) == b"still"
        await other.send_eof()
        assert await read_to_end(one) == (b"", "eof")
        assert (await it.node.log.next()).error is None


@pytest.mark.parametrize("who", ["near", "far"])
async def test_a_reset_goes_through(ca: LocalCA, captures: Captures, who: str) -> None:
    async with plain(ca, captures, habit=None) as it, await it.dial() as near:
        far = await it.app.accept()
        one, other = (near, far) if who == "near" else (far, near)
        reset(one)
        assert await read_to_end(other) == (b"", "reset")
        line = await it.node.log.next()
        assert (line.level, line.error, line.reset) == ("info", None, "Connection reset by peer")
        await it.at_rest()
        assert total(it.node.metrics, "closed", response_flags="-") == 1
        assert total(it.node.metrics, "failed") == 0


async def test_one_that_cannot_be_judged(ca: LocalCA, captures: Captures, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is closed, and one that comes then is not let in."""
    async with plain(ca, captures, habit=None) as it, await it.dial() as near:
        far = await it.app.accept()
        monkeypatch.setattr(it.node.context.authorizer, "authorize", lambda *_: 1 / 0)
        it.node.mesh.replace(it.node.mesh.snapshot.with_changes(upsert=[workload("c//Pod/shop/new-0", "10.9.9.9")]))
        assert await read_to_end(near) == (b"", "reset")
        assert await read_to_end(far) == (b"", "reset")
        why = "policies cannot be evaluated: ZeroDivisionError('division by zero')"
        assert (await it.node.log.next()).error == f"connection closed due to policy change: {why}"
        async with await it.dial() as again:
            assert await read_to_end(again) == (b"", "reset")
        assert (await it.node.log.next()).error == f"connection closed due to policy rejection: {why}"
        await it.at_rest()
        assert total(it.node.metrics, "closed", response_flags="DENY") == 2


async def test_one_that_is_forbidden_while_its_application_is_dialled(
    ca: LocalCA, captures: Captures, monkeypatch: pytest.MonkeyPatch
) -> None:
    dialling = trio.Event()

    async def connect_tcp(*_: Any, **__: Any) -> socket.socket:
        dialling.set()
        return await trio.sleep_forever()

    monkeypatch.setattr(_node_plaintext, "connect_tcp", connect_tcp)
    async with plain(ca, captures) as it, await it.dial() as near:
        await dialling.wait()
        it.node.mesh.replace(it.node.mesh.snapshot.with_changes(upsert=[DENY_ALL]))
        await it.node.context.connections.settled()
        assert await read_to_end(near) == (b"", "reset")
        error = (await it.node.log.next()).error
        assert error == "connection closed due to policy change: explicitly denied by: shop/no"
        await it.at_rest()
        assert total(it.node.metrics, "closed", response_flags="DENY") == 1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (NodeSettings(keep_source=True), (CART, True)),
        (NodeSettings(keep_source=None), (CART, True)),
        (NodeSettings(keep_source=False), (None, False)),
    ],
    ids=["must", "may", "must not"],
)
async def test_the_source_address(
    ca: LocalCA,
    captures: Captures,
    monkeypatch: pytest.MonkeyPatch,
    settings: NodeSettings,
    expected: tuple[str | None, bool],
) -> None:
    """What is asked of the kernel."""
    asked: list[tuple[str | None, bool]] = []

    async def connect_tcp(host: str, port: int, *, source_ip: Any, transparent: bool, **_: Any) -> socket.socket:
        asked.append((None if source_ip is None else str(source_ip), transparent))
        raise NoRoute(host, "this was only to see what is asked")

    monkeypatch.setattr(_node_plaintext, "connect_tcp", connect_tcp)
    async with plain(ca, captures, settings=settings) as it, await it.dial(source=CART) as near:
        await read_to_end(near)
    assert asked == [expected]


async def test_a_fault_of_ours_costs_one_connection(
    ca: LocalCA, captures: Captures, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with plain(ca, captures) as it:
        with monkeypatch.context() as patch:
            patch.setattr(it.node.context.connections, "admit", lambda *_: 1 / 0)
            async with await it.dial() as near:
                assert await read_to_end(near) == (b"", "reset")
        assert "ZeroDivisionError" in str((await it.node.log.next()).error)
        assert [record.message for record in caplog.records] == ["serving a connection failed"]
        async with await it.dial() as near:
            assert await ask(near) == TWICE
        await it.at_rest()


async def test_a_dedicated_node(ca: LocalCA, captures: Captures) -> None:
    """Everything is its workload's, whatever the address."""
    info = WorkloadInfo(namespace="shop", name="stock-0", service_account="stock")
    async with application(LEGACY, double_echo) as app:
        async with plain(ca, captures, dedicated=info) as it, await it.dial(str(app.endpoint)) as near:
            assert await ask(near) == TWICE
            assert (await it.node.log.next()).dst_workload == "stock-0"


# === the end ===


async def test_the_end_of_the_node(ca: LocalCA, captures: Captures) -> None:
    async with plain(ca, captures, habit=None) as it, await it.dial() as near:
        far = await it.app.accept()
        await near.send_all(HELLO)
        assert await receive_exactly(far, len(HELLO)) == HELLO
        await it.node.plaintext.drain(0)
        assert await read_to_end(near) == (b"", "reset")
        assert await read_to_end(far) == (b"", "reset")
        line = await it.node.log.next()
        assert (line.error, line.bytes_recv) == ("the node was stopped", 11)
        with pytest.raises(OSError):
            await it.dial(source=CART)  # from the same address it might be given that very port, and be its own peer
        await it.at_rest()


async def test_what_is_open_may_finish(ca: LocalCA, captures: Captures) -> None:
    async with plain(ca, captures, habit=None) as it, await it.dial() as near, trio.open_nursery() as nursery:
        far = await it.app.accept()
        nursery.start_soon(it.node.plaintext.drain, 60)
        await far.send_all(HELLO)
        await far.send_eof()
        assert await ask(near) == HELLO
        await far.aclose()
    assert (await it.node.log.next()).error is None
