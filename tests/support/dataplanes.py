"""The data planes of nodes in one process: outbound and inbound on loopback addresses that no other test has.

`data_plane` is a node without fixed ports, pages and files. `application` is what is behind it. What a node tells of
its connections is in `DataPlane.log` and in its metrics (`traffic`); `at_rest` waits until nothing is left of them.
"""

from __future__ import annotations

import errno
import random
import socket
from collections import Counter
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import trio

from hbone import Authority, Endpoint, FixedTarget, ForwardHandler, HBONEServer
from hbone.certs import LocalCA, SvidManager, local_ca_issuer
from hbone.mesh import Action, GatewayAddress, MeshSnapshot, MeshState, NetworkAddress, TunnelProtocol
from hbone.proxy._connections import ConnectionTable
from hbone.proxy._context import LocalWorkloads, NodeContext, NodeSettings, WorkloadInfo
from hbone.proxy._node_inbound import NodeInbound
from hbone.proxy._node_outbound import NodeOutbound
from hbone.proxy._node_plaintext import NodePlaintext
from hbone.rbac import Authorizer
from hbone.routing import ILLEGAL_PORTS, Router, RoutingConfig
from hbone.telemetry import AccessPattern, AccessRecord, LogLevel, Metrics
from support.backends import own_loopback
from support.meshes import service, workload
from support.tcp import connected

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    import pytest

    from hbone import SpiffeIdentity, TunnelRequest
    from hbone.mesh import AuthorizationPolicy, Service, Workload
    from hbone.rbac import Verdict
    from hbone.tls import Svid

#: Seconds that only something that hangs needs.
WAIT = 60.0

TD = "spiffe://cluster.local/ns"
CART, STOCK, LEGACY, WAYPOINT, GATEWAY, FAR, THIEF = (own_loopback(80 + number) for number in range(7))
VIP, HOSTNAME = "10.96.0.20", "stock.shop.svc.cluster.local"
CART_INFO = WorkloadInfo(namespace="shop", name="cart-0", service_account="cart")


async def until(condition: Callable[[], object]) -> None:
    """Wait for what the test did not do itself."""
    with trio.fail_after(WAIT):
        while not condition():
            await trio.sleep(0.001)


@asynccontextmanager
async def beside() -> AsyncIterator[trio.Nursery]:
    """For what runs beside a block and ends with it; what is raised in the block comes out as it is, not in a group."""
    error: BaseException | None = None
    async with trio.open_nursery() as nursery:
        try:
            yield nursery
        except BaseException as exc:
            error = exc
        nursery.cancel_scope.cancel()
    if error is not None:
        raise error


# === meshes ===


def member(short: str, address: str, **fields: Any) -> Workload:
    """A workload of the mesh, with all that labels are made of."""
    values: dict[str, Any] = {
        "service_account": short,
        "protocol": TunnelProtocol.HBONE,
        "workload_name": short,
        "workload_type": "deployment",
        "canonical_name": short,
        "canonical_revision": "v1",
    }
    addresses = (address,) if "addresses" not in fields else fields.pop("addresses")
    return workload(f"lab//Pod/shop/{short}-0", *addresses, **{**values, **fields})


def cart(**fields: Any) -> Workload:
    """Who connects."""
    return member("cart", CART, **fields)


def stock(port: int, **fields: Any) -> Workload:
    """Who is connected to: port 80 of the service is its port `port`."""
    return member("stock", STOCK, **{"endpoint_of": {f"shop/{HOSTNAME}": {80: port}}, **fields})


def stock_service(**fields: Any) -> Service:
    """How it is known."""
    return service(f"shop/{HOSTNAME}", f"/{VIP}", **fields)


def mesh_of(*parts: Workload | Service | AuthorizationPolicy) -> MeshSnapshot:
    """All of these."""
    kinds: dict[str, list[Any]] = {"Workload": [], "Service": [], "AuthorizationPolicy": []}
    for part in parts:
        kinds[type(part).__name__].append(part)
    return MeshSnapshot.build(*kinds.values())


def shared_port(*hosts: str) -> int:
    """A port that is free on all of these addresses, which are nobody else's: HBONE's is one for a whole mesh.

    As nothing is left listening there, ask for it after all that take whatever port they get.
    """
    while True:
        try:
            with ExitStack() as stack:
                port = 0
                for host in hosts:
                    family = socket.AF_INET6 if ":" in host else socket.AF_INET
                    port = stack.enter_context(socket.create_server((host, port), family=family)).getsockname()[1]
                return port
        except OSError as problem:
            if problem.errno != errno.EADDRINUSE:
                raise


# === applications ===


async def echo(stream: trio.SocketStream) -> None:
    """Sends back what comes, and the end."""
    async for chunk in stream:
        await stream.send_all(chunk)
    await stream.send_eof()


async def double_echo(stream: trio.SocketStream) -> None:
    """Sends back what comes twice."""
    async for chunk in stream:
        await stream.send_all(2 * bytes(chunk))
    await stream.send_eof()


class Application:
    """A server on a free port of one address."""

    def __init__(self, host: str, port: int, arrived: trio.MemoryReceiveChannel[trio.SocketStream]) -> None:
        self.host = host
        self.port = port
        self._arrived = arrived

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(ip_address(self.host), self.port)

    async def accept(self) -> trio.SocketStream:
        """The next connection, when there is no habit."""
        with trio.fail_after(WAIT):
            return await self._arrived.receive()


@asynccontextmanager
async def application(
    host: str, habit: Callable[[trio.SocketStream], Awaitable[None]] | None = None, *, port: int = 0
) -> AsyncIterator[Application]:
    """Serves each connection with `habit`; without one they are for the test to `accept`."""
    send, receive = trio.open_memory_channel[trio.SocketStream](10_000)

    async def handle(stream: trio.SocketStream) -> None:
        if habit is None:
            send.send_nowait(stream)
            await trio.sleep_forever()
        try:
            await habit(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    async with beside() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, handle, port, host=host, backlog=1024))
        yield Application(host, listeners[0].socket.getsockname()[1], receive)


def reset(stream: trio.SocketStream) -> None:
    """End it with RST."""
    trio.lowlevel.notify_closing(stream.socket)
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    stream.socket.close()


async def read_to_end(stream: trio.abc.ReceiveStream) -> tuple[bytes, str]:
    """What came, and how it ended: ``eof`` or ``reset``."""
    data = bytearray()
    try:
        with trio.fail_after(WAIT):
            async for chunk in stream:
                data += chunk
    except trio.BrokenResourceError:
        return bytes(data), "reset"
    return bytes(data), "eof"


async def ask(stream: trio.abc.HalfCloseableStream, request: bytes = b"hello world") -> bytes:
    """Sends a request and the end, gives the whole answer."""
    await stream.send_all(request)
    await stream.send_eof()
    answer, end = await read_to_end(stream)
    assert end == "eof"
    return answer


# === peers ===


@dataclass
class Peer:
    """Somebody at the other end of HBONE, made of the library alone."""

    port: int
    server: HBONEServer
    requests: list[TunnelRequest]
    """What it was asked, in order."""
    handled: set[TunnelRequest]
    """What it is at."""


def trusting(ca: LocalCA, *others: LocalCA) -> Callable[[SpiffeIdentity], Awaitable[Svid]]:
    """An issuer of SVIDs whose owners trust the other CAs, too: as while a root is replaced."""

    async def issue(identity: SpiffeIdentity) -> Svid:
        await trio.lowlevel.checkpoint()
        roots = tuple(root for one in (ca, *others) for root in one.roots)
        return replace(ca.issue(identity), bundles={identity.trust_domain: roots})

    return issue


@asynccontextmanager
async def hbone_peer(
    ca: LocalCA,
    identity: str,
    host: str,
    port: int = 0,
    handler: Callable[[TunnelRequest], Awaitable[None]] | None = None,
    **options: Any,
) -> AsyncIterator[Peer]:
    """A server that does with each request what `handler` does; without one it echoes."""
    requests: list[TunnelRequest] = []
    handled: set[TunnelRequest] = set()

    async def echo_it(request: TunnelRequest) -> None:
        async with await request.accept() as tunnel:
            async for chunk in tunnel:
                await tunnel.send_all(chunk)
            await tunnel.send_eof()

    async def handle(request: TunnelRequest) -> None:
        requests.append(request)
        handled.add(request)
        try:
            await (handler or echo_it)(request)
        finally:
            handled.discard(request)

    server = HBONEServer(ca.issue(identity), handle, **options)
    async with beside() as nursery:
        endpoint = await nursery.start(server.serve, host, port)
        yield Peer(endpoint.port, server, requests, handled)


# === nodes ===


class Lines:
    """An access log that is a list."""

    def __init__(self) -> None:
        self.records: list[AccessRecord] = []
        self.told: list[tuple[str, str]] = []
        self.level: int = LogLevel.INFO
        self._read = 0

    def write(self, record: AccessRecord) -> None:
        self.records.append(record)

    def write_complete(
        self, pattern: AccessPattern, src_addr: Endpoint | None, sent: int, received: int, duration: float
    ) -> None:
        self.records.append(pattern.complete(src_addr, sent, received, duration))

    def write_info(self, scope: str, message: str) -> None:
        self.told.append((scope, message))

    async def next(self) -> AccessRecord:
        """The first line that was not asked for yet."""
        await until(lambda: len(self.records) > self._read)
        self._read += 1
        return self.records[self._read - 1]


class Refused(Exception):
    """What a way in answered."""


@dataclass
class DataPlane:
    """One node without its fixed ports."""

    context: NodeContext
    outbound: NodeOutbound
    inbound: NodeInbound
    plaintext: NodePlaintext
    log: Lines
    metrics: Metrics
    nursery: trio.Nursery
    socks: Endpoint
    http: Endpoint
    captured: Endpoint | None = None
    captures: Captures | None = None

    @property
    def mesh(self) -> MeshState:
        return self.context.mesh

    async def connect(
        self, host: str, port: int, *, way: str = "socks", source: str | None = None, early: bytes = b""
    ) -> trio.SocketStream:
        """As an application does, by way of ``socks``, ``http`` or ``captured``; the answer is read, if there is one.

        Args:
            host: where to; ``captured`` takes addresses only.
            port: of that.
            way: how.
            source: the address to come from.
            early: sent without waiting for an answer.

        Raises:
            Refused: the answer is no; with what it was.
        """
        if way == "captured":
            assert self.captures is not None
            assert self.captured is not None
            stream = await self.captures.dial(self.captured, f"{host}:{port}", source or "127.0.0.1")
            if early:
                await stream.send_all(early)
            return stream
        stream = await dial(self.http if way == "http" else self.socks, source)
        try:
            if way == "http":
                await stream.send_all(f"CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode() + early)
                head = b""
                while not head.endswith(b"\r\n\r\n"):
                    head += await _receive(stream, 1)
                status = int(head.split()[1])
                if status != 200:
                    body, _ = await read_to_end(stream)
                    raise Refused(status, body.decode().strip())
            else:
                name = host.encode()
                request = b"\5\1\0\3" + bytes([len(name)]) + name + port.to_bytes(2, "big")
                await stream.send_all(b"\5\1\0" + request + early)
                reply = await _receive(stream, 12)
                if reply[3]:
                    raise Refused(reply[3])
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return stream

    async def ask(self, host: str, port: int, *, way: str = "socks", request: bytes = b"hello world") -> bytes:
        """One request and its answer."""
        async with await self.connect(host, port, way=way) as stream:
            return await ask(stream, request)

    def left(self) -> dict[str, object]:
        """What is left of connections that are over; empty when nothing is."""
        context = self.context
        pools = [pool.statistics() for pool in self.outbound.pools.values()]
        opened, closed = total(self.metrics, "opened"), total(self.metrics, "closed")
        values: dict[str, object] = {
            "inbound": len(context.connections.inbound),
            "outbound": len(context.connections.outbound),
            "applications": self.outbound.connections,
            "plaintext": self.plaintext.connections,
            "pool tunnels": sum(pool.tunnels for pool in pools),
            "pool waiters": sum(pool.waiting for pool in pools),
            "tunnels": self.inbound.server.statistics().tunnels,
            "uncounted": opened - closed,
            "gauge": sum(s.value for s in samples(self.metrics, "hbone_tunnels_open")),
            "sockets": sum(
                s.value
                for s in samples(self.metrics, "istio_tcp_sockets_open")
                if s.labels["reporter"] == "source"  # sessions stay
            ),
        }
        return {name: value for name, value in values.items() if value}


async def dial(endpoint: Endpoint, source: str | None = None) -> trio.SocketStream:
    """A TCP connection, from any address of this machine."""
    if source is None:
        return await connected(trio.socket.socket(), endpoint)
    return await connected(await _bound(source), endpoint)


async def _bound(source: str) -> trio.socket.SocketType:
    sock = trio.socket.socket()
    await sock.bind((source, 0))
    return sock


async def _receive(stream: trio.SocketStream, size: int) -> bytes:
    data = b""
    with trio.fail_after(WAIT):
        while len(data) < size:
            chunk = await stream.receive_some(size - len(data))
            if not chunk:
                raise Refused(f"closed after {data!r}")
            data += chunk
    return data


async def at_rest(*planes: DataPlane) -> None:
    """Wait until nothing is left of any connection."""
    try:
        await until(lambda: not any(plane.left() for plane in planes))
    except trio.TooSlowError:
        raise AssertionError(f"left: {[plane.left() for plane in planes]}") from None


@asynccontextmanager
async def data_plane(
    mesh: MeshSnapshot | MeshState,
    *,
    ca: LocalCA | None = None,
    issue: Any = None,
    dedicated: WorkloadInfo | None = None,
    node: str | None = None,
    listen: str | tuple[str, ...] = (),
    hbone_port: int = 15008,
    settings: NodeSettings | None = None,
    localhost_app_tunnel: bool = True,
    network: str = "",
    patience: float = 5.0,
    seed: int = 1,
    captures: Captures | None = None,
    prefetch: bool = True,
) -> AsyncIterator[DataPlane]:
    """A node that runs until the block ends.

    Args:
        mesh: what it knows.
        ca: issues its certificates.
        issue: does so instead.
        dedicated: its one workload; by address when None.
        node: its name.
        listen: where it takes HBONE.
        hbone_port: at which port, and at which one others take it.
        settings: of its data plane.
        localhost_app_tunnel: whether application tunnels that want a PROXY header are at loopback.
        network: where it is.
        patience: seconds to wait for its own workload.
        seed: of its choices.
        captures: for connections that are captured.
        prefetch: whether it has its certificates before the block begins.
    """
    mesh = mesh if isinstance(mesh, MeshState) else MeshState(mesh)
    settings = settings or NodeSettings(keep_source=False, network=network)
    if issue is None:
        assert ca is not None
        issue = local_ca_issuer(ca)
    svids = SvidManager(issue)
    log, metrics, authorizer = Lines(), Metrics(), Authorizer()

    def on_verdict(verdict: Verdict) -> None:
        metrics.policy_verdict("allow" if verdict.allowed else "deny")
        for match in verdict.dry_run:
            metrics.policy_verdict("deny" if match.action is Action.DENY else "allow", dry_run=True)

    routing = RoutingConfig(
        network=network,
        hbone_port=hbone_port,
        illegal_ports=ILLEGAL_PORTS | {hbone_port},
        localhost_app_tunnel=localhost_app_tunnel,
    )
    context = NodeContext(
        mesh=mesh,
        router=Router(routing, random.Random(seed).random),
        authorizer=authorizer,
        svids=svids,
        local=LocalWorkloads(mesh, network=network, dedicated=dedicated, node=node, patience=patience),
        connections=ConnectionTable(mesh, authorizer, on_verdict=on_verdict),
        metrics=metrics,
        access_log=log,  # type: ignore[arg-type]
        settings=settings,
    )
    async with beside() as nursery:
        nursery.start_soon(svids.run)
        identities = [served.identity for served in context.local.served()]
        svids.want(identities)
        if prefetch:
            for identity in identities:
                await svids.get(identity)
        await nursery.start(context.connections.watch)
        inbound, plaintext = NodeInbound(context), NodePlaintext(context)
        error: BaseException | None = None
        async with NodeOutbound(context) as outbound:
            captured = None
            if captures is not None:
                captured = await nursery.start(outbound.serve_captured, "127.0.0.1", 0)
            socks = await nursery.start(outbound.serve_socks, "127.0.0.1", 0)
            http = await nursery.start(outbound.serve_http_connect, "127.0.0.1", 0)
            for host in (listen,) if isinstance(listen, str) else listen:
                await nursery.start(inbound.serve, host, hbone_port)
            try:
                yield DataPlane(
                    context, outbound, inbound, plaintext, log, metrics, nursery, socks, http, captured, captures
                )
            except BaseException as exc:
                error = exc
            await outbound.drain(0)
        if error is not None:
            raise error


@dataclass
class Shop:
    """A client's node, a server's node, and the application behind that."""

    near: DataPlane
    far: DataPlane
    app: Application
    mesh: MeshState
    port: int
    """For HBONE."""

    async def at_rest(self) -> None:
        await at_rest(self.near, self.far)


@asynccontextmanager
async def shop(
    ca: LocalCA,
    *parts: Workload | Service | AuthorizationPolicy,
    habit: Callable[[trio.SocketStream], Awaitable[None]] | None = double_echo,
    near: dict[str, Any] | None = None,
    far: dict[str, Any] | None = None,
    cart_fields: dict[str, Any] | None = None,
    stock_fields: dict[str, Any] | None = None,
    service_fields: dict[str, Any] | None = None,
) -> AsyncIterator[Shop]:
    """Two nodes with one picture of the mesh: `cart` on one, `stock` and an application on the other.

    Args:
        ca: whom both trust.
        parts: more of the mesh.
        habit: of the application; see `application`.
        near: of the client's `data_plane`.
        far: of the server's `data_plane`.
        cart_fields: of the client's workload.
        stock_fields: of the server's workload.
        service_fields: of its service.
    """
    async with application(STOCK, habit) as app:
        port = shared_port(CART, STOCK, LEGACY, WAYPOINT, GATEWAY, FAR, THIEF)  # not before: it might get that one
        own = (
            cart(**(cart_fields or {})),
            stock(app.port, **(stock_fields or {})),
            stock_service(**(service_fields or {})),
        )
        mesh = MeshState(mesh_of(*own, *parts))
        options: dict[str, Any] = {"ca": ca, "hbone_port": port}
        async with data_plane(mesh, **{"dedicated": CART_INFO, **options, **(near or {})}) as client:
            async with data_plane(mesh, **{"listen": STOCK, **options, **(far or {})}) as server:
                yield Shop(client, server, app, mesh, port)


# === two networks ===


@dataclass
class Across:
    """A client's node in one network, a server's node in another, and the gateway between them."""

    near: DataPlane
    gate: Peer
    far: DataPlane
    app: Application

    async def at_rest(self) -> None:
        await at_rest(self.near, self.far)
        await until(lambda: not self.gate.handled)


@asynccontextmanager
async def across(
    ca: LocalCA,
    *,
    habit: Callable[[trio.SocketStream], Awaitable[None]] | None = double_echo,
    near: dict[str, Any] | None = None,
    far: dict[str, Any] | None = None,
    gate_identity: str = f"{TD}/shop/sa/gate",
    gate_handler: Callable[[TunnelRequest], Awaitable[None]] | None = None,
    gate_ca: LocalCA | None = None,
    service_fields: dict[str, Any] | None = None,
    stock_fields: dict[str, Any] | None = None,
    policies: tuple[AuthorizationPolicy, ...] = (),
) -> AsyncIterator[Across]:
    """Networks ``near`` and ``far``; the gateway knows nothing but where to forward what it is sent.

    Args:
        ca: whom all trust.
        habit: of the application; see `application`.
        near: of the client's `data_plane`.
        far: of the server's `data_plane`.
        gate_identity: who the gateway is.
        gate_handler: what it does; forward unless given.
        gate_ca: whom it trusts instead, and who has issued its certificate.
        service_fields: of the service as the client knows it.
        stock_fields: of the server's workload as its own node knows it.
        policies: of the far network.
    """
    async with application(FAR, habit) as app:
        port = shared_port(FAR)
        forwards = ForwardHandler(FixedTarget(Authority(FAR, port)))
        async with hbone_peer(gate_ca or ca, gate_identity, GATEWAY, handler=gate_handler or forwards) as gate:
            gateway = GatewayAddress(destination=NetworkAddress("near", ip_address(GATEWAY)), hbone_mtls_port=gate.port)
            remote = stock(1, addresses=(), network="far", network_gateway=gateway)
            names = {"subject_alt_names": (f"{TD}/shop/sa/stock",), **(service_fields or {})}
            there = service(f"shop/{HOSTNAME}", f"near/{VIP}", **names)
            mesh = mesh_of(cart(network="near"), member("gate", GATEWAY, network="near"), remote, there)
            own = member("stock", FAR, endpoint_of={f"shop/{HOSTNAME}": {80: app.port}}, network="far")
            far_mesh = mesh_of(replace(own, **(stock_fields or {})), stock_service(), *policies)
            options: dict[str, Any] = {"ca": ca, "dedicated": CART_INFO, "network": "near", **(near or {})}
            async with data_plane(mesh, **options) as client:
                options = {"ca": ca, "listen": FAR, "hbone_port": port, "network": "far", **(far or {})}
                async with data_plane(far_mesh, **options) as server:
                    yield Across(client, gate, server, app)


# === names ===


class Names(trio.abc.HostnameResolver):
    """A resolver that knows these names."""

    def __init__(self, **names: list[str]) -> None:
        self.names = {name.replace("_", "."): addresses for name, addresses in names.items()}
        trio.socket.set_custom_hostname_resolver(self)

    async def getaddrinfo(self, host: Any, port: Any, *_: Any) -> Any:
        await trio.lowlevel.checkpoint()
        host = host.decode() if isinstance(host, bytes) else host
        if host not in self.names:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
        return [(*kind, (address, port)) for address in self.names[host]]

    async def getnameinfo(self, sockaddr: Any, flags: int) -> Any:
        raise NotImplementedError


# === captured connections ===


class Captures:
    """Stands in for netfilter: what the kernel would remember of each connection."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from hbone.proxy._ways import _capture

        self._targets: dict[Any, Endpoint] = {}
        self._real = _capture.original_destination
        monkeypatch.setattr(_capture, "original_destination", self._look_up)

    def _look_up(self, sock: socket.socket) -> Endpoint:
        return self._targets.get(sock.getpeername()) or self._real(sock)

    async def dial(self, proxy: Endpoint, target: str, source: str = "127.0.0.1") -> trio.SocketStream:
        """A connection to `target` that ends up at `proxy`."""
        sock = await _bound(source)
        self._targets[sock.getsockname()] = Endpoint.parse(target)
        return await connected(sock, proxy)


# === metrics ===


def samples(metrics: Metrics, family: str) -> list[Any]:
    """Of one family, as a scrape has them."""
    return [sample for each in metrics.collect() if each.name == family for sample in each.samples]


def total(metrics: Metrics, what: str, **labels: str) -> float:
    """How many connections were ``opened``, ``closed`` or have ``failed``, with these labels."""
    return sum(
        sample.value
        for sample in samples(metrics, f"istio_tcp_connections_{what}")
        if all(sample.labels[name] == value for name, value in labels.items())
    )


def traffic(metrics: Metrics) -> Counter[tuple[str, str]]:
    """Connections and bytes by reporter and what was counted: ``opened``, ``received``, ``sent``, ``closed FLAG``."""
    counts: Counter[tuple[str, str]] = Counter()
    for family, what in (
        ("istio_tcp_connections_opened", "opened"),
        ("istio_tcp_received_bytes", "received"),
        ("istio_tcp_sent_bytes", "sent"),
        ("istio_tcp_connections_closed", "closed"),
    ):
        for sample in samples(metrics, family):
            name = f"closed {sample.labels['response_flags']}" if what == "closed" else what
            counts[sample.labels["reporter"], name] += int(sample.value)
    return +counts


def labels_of(metrics: Metrics, reporter: str, *, without: tuple[str, ...] = ("unknown",)) -> dict[str, str]:
    """The labels of the only set of one reporter, but for those with these values."""
    (sample,) = [
        sample for sample in samples(metrics, "istio_tcp_connections_opened") if sample.labels["reporter"] == reporter
    ]
    return {name: value for name, value in sample.labels.items() if value not in without}
