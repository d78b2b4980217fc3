"""Envoy as a waypoint between two nodes, with the files of ``examples/waypoint``: real hops.

`lab` has every hop in a process of its own. Tests that need another picture of the mesh put a client's node into this
process, in front of the same Envoy and the same node of the application.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import pytest
from support.apps import exchange
from support.backends import Backend, echo, ends_first, own_loopback, pattern, pattern_sha
from support.dataplanes import Refused as WayRefused
from support.dataplanes import ask, data_plane, labels_of, read_to_end, shared_port, total
from support.foreign import LIVE_LOGS, Envoy
from support.lab import Member, Refused, localized, socks5
from support.ours import run
from support.waypoints import waypoint

from hbone import Endpoint
from hbone.certs import LocalCA
from hbone.mesh import GatewayAddress, MeshSnapshot, NetworkAddress, Service, WeightedGateway, parse_mesh
from hbone.proxy import WorkloadInfo

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from support.backends import Seen
    from support.dataplanes import DataPlane

MIB = 1 << 20
CART, STOCK, WAYPOINT, OTHER = (own_loopback(number) for number in (87, 88, 89, 90))
SERVICE, VIP = "stock.shop.svc.cluster.local", "10.96.0.20"
DIRECT = "stock-direct.shop.svc.cluster.local"
CART_ID, STOCK_ID, WAYPOINT_ID = (f"spiffe://cluster.local/ns/shop/sa/{name}" for name in ("cart", "stock", "waypoint"))
CART_INFO = WorkloadInfo(namespace="shop", name="cart-0", service_account="cart")
NOT_ALLOWED = "http status: 401 Unauthorized: the peer's authorization policy does not allow our identity"
REJECTED = "connection closed due to policy rejection: allow policies exist, but none allowed"


def shows(sock: socket.socket, seen: Seen) -> None:
    """HTTP/1.1: ``GET /bytes/N`` sends `pattern(N)`, any other the request's head. Its client ends."""
    source = sock.makefile("rb")
    while line := source.readline():
        head = line
        while line.strip():
            line = source.readline()
            head += line
        path = head.split()[1].decode()
        body = b"".join(pattern(int(path.removeprefix("/bytes/")))) if path.startswith("/bytes/") else head
        sock.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    seen.finish("eof")


def get(sock: socket.socket, path: str, *more: str) -> tuple[str, bytes]:
    """A request, and the head (in lower case) and the body of the answer; to the end if it is to be closed."""
    sock.sendall("\r\n".join([f"GET {path} HTTP/1.1", "Host: stock", *more, "", ""]).encode())
    with sock.makefile("rb") as source:
        head = ""
        while (line := source.readline().decode().lower()).strip():
            head += line
        length = re.search(r"^content-length: (\d+)", head, re.MULTILINE)
        assert length is not None, head
        body = source.read(None if "Connection: close" in more else int(length[1]))
        assert len(body) == int(length[1])
        return head, body


@dataclass
class Lab:
    """Three machines, as far as they can tell."""

    directory: Path
    names: dict[str, object]
    ca: LocalCA
    mesh: Path
    port: int
    """15008."""
    near: Member
    """The node of ``cart``."""
    far: Member
    """The node of ``stock``."""
    envoy: Envoy
    web: Backend
    """Port 8080 of ``stock``."""
    side: Backend
    """Its port 8081."""
    db: Backend
    """Its port 5432."""

    @property
    def arrived(self) -> int:
        """How many connections the applications have seen."""
        return sum(len(app.connections) for app in (self.web, self.side, self.db))

    def client(
        self, change: Callable[[Any], Any] | None = None, **names: object
    ) -> AbstractAsyncContextManager[DataPlane]:
        """A node of ``cart`` in this process, with another picture of the mesh.

        Args:
            change: makes another resource of one.
            names: of the example, with ``_`` for dots, that stand for something else.
        """
        other = {name.strip("_").replace("_", "."): value for name, value in names.items()}
        parsed = parse_mesh(localized("waypoint/mesh.yaml", {**self.names, **other}))
        resources = [
            [change(each) if change else each for each in kind] for kind in (parsed.workloads, parsed.services)
        ]
        mesh = MeshSnapshot.build(*resources)
        return data_plane(mesh, ca=self.ca, dedicated=CART_INFO, hbone_port=self.port)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    directory = tmp_path_factory.mktemp("waypoint")
    ca = LocalCA.create(directory / "ca")
    ca.write(ca.issue(WAYPOINT_ID), directory / "waypoint")
    port = shared_port(STOCK, WAYPOINT, OTHER)
    with ExitStack() as stack:
        web, side, db = (stack.enter_context(Backend(habit, host=STOCK)) for habit in (shows, shows, echo))
        names = {"10.1.0.4": CART, "10.1.1.9": STOCK, "10.1.0.50": WAYPOINT, "15008": port}
        names |= {"8080": web.port, "8081": side.port, "5432": db.port, "/etc/waypoint": directory / "waypoint"}
        mesh = directory / "mesh.yaml"
        mesh.write_text(localized("waypoint/mesh.yaml", names))
        words = ("--hbone-port", str(port), "--mesh-interval", "50ms")
        who = ("--mode", "dedicated", "--workload", "shop/cart-0/cart")
        ca_dir = directory / "ca"
        far = stack.enter_context(Member.begin(ca_dir, mesh, *words, "--inbound", f"{STOCK}:{port}"))
        near = stack.enter_context(Member.begin(ca_dir, mesh, *words, *who))
        envoy = stack.enter_context(Envoy(localized("waypoint/envoy.yaml", names), directory))
        far.event("ready")
        near.event("ready")
        yield Lab(directory, names, ca, mesh, port, near, far, envoy, web, side, db)


@pytest.fixture(autouse=True)
def _only_its_own_lines(lab: Lab) -> None:
    LIVE_LOGS.append(lab.envoy.log)
    lab.near.forget_lines()
    lab.far.forget_lines()


# === through Envoy ===


@pytest.mark.parametrize("host", [VIP, SERVICE])
def test_http(lab: Lab, host: str) -> None:
    with lab.near.dial(host, 80) as sock:
        head, body = get(sock, "/shelf?of=3")
    assert "x-waypoint: waypoint-0" in head
    assert body.startswith(b"GET /shelf?of=3 HTTP/1.1\r\n")
    assert f"x-caller: {CART_ID}" in body.decode()
    near, far = lab.near.line(direction="outbound"), lab.far.line(direction="inbound")
    assert near["dst.hbone_addr"] == f"{VIP}:80"
    assert far["dst.hbone_addr"] == lab.web.target
    # Envoy ends its tunnel by a reset when HTTP is done with it.
    assert far.get("error") in (None, "the peer reset the tunnel: INTERNAL_ERROR")
    assert (far["src.identity"], far["dst.identity"]) == (WAYPOINT_ID, STOCK_ID)


def test_http_that_the_waypoint_answers_itself(lab: Lab) -> None:
    before = lab.arrived
    with lab.near.dial(VIP, 80) as sock:
        head, body = get(sock, "/admin/keys")
    assert (head.split()[1], body) == ("403", b"not through this waypoint\n")
    lab.near.line(direction="outbound")
    assert lab.arrived == before


def test_tcp(lab: Lab) -> None:
    """Every byte both ways, and what both nodes say of it."""
    before = lab.near.scrape(), lab.far.scrape()
    with lab.near.dial(SERVICE, lab.db.port) as sock:
        outcome = exchange(sock, 8 * MIB)
    assert (outcome.end, outcome.sha) == ("eof", pattern_sha(8 * MIB))
    near, far = lab.near.line(direction="outbound"), lab.far.line(direction="inbound")
    expected = {
        "level": "info",
        "message": "connection complete",
        "src.workload": "cart-0",
        "src.identity": CART_ID,
        "dst.addr": f"{WAYPOINT}:{lab.port}",
        "dst.hbone_addr": f"{VIP}:{lab.db.port}",
        "dst.service": SERVICE,
        "dst.workload": "waypoint-0",
        "dst.identity": WAYPOINT_ID,
        "bytes_sent": 8 * MIB,
        "bytes_recv": 8 * MIB,
    }
    assert {name: near.get(name) for name in expected} == expected
    expected |= {
        "src.workload": "waypoint-0",
        "src.identity": WAYPOINT_ID,
        "dst.addr": f"{STOCK}:{lab.port}",
        "dst.hbone_addr": lab.db.target,
        "dst.workload": "stock-0",
        "dst.identity": STOCK_ID,
    }
    assert {name: far.get(name) for name in expected} == expected
    assert "error" not in near | far

    hops = (CART_ID, "cart", WAYPOINT_ID, "waypoint"), (WAYPOINT_ID, "waypoint", STOCK_ID, "stock")
    for member, old, (source, source_name, destination, name) in zip((lab.near, lab.far), before, hops, strict=True):
        grown = {dict(facts)[""]: (dict(facts), value) for facts, value in (member.scrape() - old).items()}
        for metric in ("connections_opened", "connections_closed", "received_bytes", "sent_bytes"):
            labels, value = grown[f"istio_tcp_{metric}_total"]
            assert value == (8 * MIB if "bytes" in metric else 1)
            assert (labels["source_principal"], labels["source_workload"]) == (source, source_name)
            assert (labels["destination_principal"], labels["destination_workload"]) == (destination, name)
            assert (labels["destination_service"], labels["response_flags"]) == (SERVICE, "-")
            assert labels["connection_security_policy"] == "mutual_tls"
        assert "istio_tcp_connections_failed_total" not in grown


def test_to_the_workload_itself(lab: Lab) -> None:
    """Also when the application ends first: both directions to their last byte."""
    with Backend(ends_first(8 * MIB), host=STOCK) as app:
        with lab.near.dial(STOCK, app.port) as sock:
            outcome = exchange(sock, 8 * MIB)
        assert (outcome.end, outcome.sha, outcome.send_error) == ("eof", pattern_sha(8 * MIB), "")
        assert app.wait_connection().sha == pattern_sha(8 * MIB)
    near, far = lab.near.line(direction="outbound"), lab.far.line(direction="inbound")
    assert near["dst.addr"] == f"{WAYPOINT}:{lab.port}"
    assert near["dst.hbone_addr"] == far["dst.hbone_addr"] == app.target
    assert (near["dst.workload"], far["src.workload"], far["dst.workload"]) == ("waypoint-0", "waypoint-0", "stock-0")
    assert "dst.service" not in near


def test_what_the_waypoint_does_not_know(lab: Lab) -> None:
    with pytest.raises(Refused):
        lab.near.dial(VIP, 81)
    assert lab.near.line(direction="outbound")["error"].startswith("http status: 404 Not Found")


# === policy ===


def test_only_the_waypoint_may(lab: Lab) -> None:
    before, arrived = lab.far.scrape(), lab.arrived
    with pytest.raises(Refused, match="2"):  # not allowed, in SOCKS5
        lab.near.dial(DIRECT, 80)
    near, far = lab.near.line(direction="outbound"), lab.far.line(direction="inbound")
    assert (near["error"], far["error"]) == (NOT_ALLOWED, REJECTED)
    assert (near["dst.addr"], near["dst.service"]) == (f"{STOCK}:{lab.port}", DIRECT)
    assert far["src.identity"] == CART_ID
    grown = {dict(facts)[""]: (dict(facts), value) for facts, value in (lab.far.scrape() - before).items()}
    assert grown["istio_tcp_connections_failed_total"][0]["response_flags"] == "DENY"
    assert grown["hbone_policy_verdicts_total"] == (
        {"": "hbone_policy_verdicts_total", "verdict": "deny", "dry_run": "false"},
        1,
    )
    assert lab.arrived == arrived


def test_the_waypoint_may_not(lab: Lab) -> None:
    with lab.near.dial(DIRECT, 81) as sock:
        assert get(sock, "/")[1].startswith(b"GET / ")
    assert lab.far.line(direction="inbound")["src.identity"] == CART_ID
    lab.near.line(direction="outbound")
    arrived = lab.arrived
    with pytest.raises(Refused, match="2"):
        lab.near.dial(STOCK, lab.side.port)
    near, far = lab.near.line(direction="outbound"), lab.far.line(direction="inbound")
    assert (near["error"], far["error"]) == (NOT_ALLOWED, REJECTED)
    assert (near["dst.identity"], far["src.identity"]) == (WAYPOINT_ID, WAYPOINT_ID)
    assert lab.arrived == arrived


def test_what_is_taken_back_ends(lab: Lab) -> None:
    """The node at the end closes what the waypoint may no longer do, and the client is told by a reset."""
    right = lab.mesh.read_text()
    changes = sum("mesh changed" in line for line in lab.far.log.now)
    with lab.near.dial(VIP, lab.db.port) as sock:
        sock.sendall(b"hello")
        assert sock.recv(5) == b"hello"
        try:
            lab.mesh.write_text(right.replace("sa/waypoint]", "sa/somebody]"))
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
            far = lab.far.line(direction="inbound")
            assert far["error"].startswith("connection closed due to policy change: allow policies exist")
            assert lab.near.line(direction="outbound")["error"].startswith("the peer reset the tunnel")
        finally:
            lab.mesh.write_text(right)
            lab.far.log.wait_number(lambda line: "mesh changed" in line, changes + 2, "changes of the mesh")


# === who the waypoint is, and whether ===


async def test_somebody_else_at_the_waypoint(lab: Lab) -> None:
    def change(each: Any) -> Any:
        return replace(each, service_account="keeper") if each.name == "waypoint-0" else each

    arrived = lab.arrived
    async with lab.client(change) as near:
        why = f"peer is {WAYPOINT_ID}, expected spiffe://cluster.local/ns/shop/sa/keeper"
        with pytest.raises(WayRefused, match=why):
            await near.ask(VIP, lab.db.port, way="http")
        assert (await near.log.next()).error == why
        assert total(near.metrics, "failed", response_flags="TLS_FAILURE") == 1
        assert labels_of(near.metrics, "source")["destination_principal"].endswith("/sa/keeper")
    assert lab.arrived == arrived


async def test_without_its_waypoint_nothing_goes(lab: Lab, tmp_path: Path) -> None:
    """What is open breaks on both sides, and nothing goes directly."""
    text = localized("waypoint/envoy.yaml", {**lab.names, "10.1.0.50": OTHER})
    envoy = await run(Envoy, text, tmp_path)
    try:
        async with lab.client(_10_1_0_50=OTHER) as near:
            async with await near.connect(VIP, lab.db.port) as stream:
                await stream.send_all(b"hello")
                assert await stream.receive_some() == b"hello"
                seen = lab.db.connections[-1]
                envoy.popen.kill()
                assert await read_to_end(stream) == (b"", "reset")
                line = await near.log.next()
                assert (line.dst_addr, line.bytes_recv) == (Endpoint.parse(f"{OTHER}:{lab.port}"), 5)
                assert line.error is not None
                assert await run(seen.done.wait, 60)
                assert seen.end == "reset"
            await run(envoy.popen.wait)
            arrived = lab.arrived
            for target in ((VIP, lab.db.port), (SERVICE, 80)):
                with pytest.raises(WayRefused, match=f"connecting to {OTHER}:{lab.port} failed: connection refused"):
                    await near.ask(*target, way="http")
            assert lab.arrived == arrived
    finally:
        await run(envoy.stop)


async def test_waypoints_by_weight(lab: Lab) -> None:
    """Envoy gets three of four, one of ours the rest; when that is gone, its share fails."""

    def change(each: Any) -> Any:
        if isinstance(each, Service) and each.hostname == SERVICE:
            shares = tuple(
                WeightedGateway(
                    destination=GatewayAddress(
                        destination=NetworkAddress("", ip_address(host)), hbone_mtls_port=lab.port
                    ),
                    weight=weight,
                )
                for host, weight in ((WAYPOINT, 3), (OTHER, 1))
            )
            return replace(each, waypoint=None, weighted_waypoints=shares)
        return each

    endpoints = {f"{VIP}:{lab.db.port}": lab.db.target}
    via = Endpoint.parse(f"{STOCK}:{lab.port}")
    async with lab.client(change) as near:
        ours = replace(
            next(each for each in near.mesh.snapshot.workloads.values() if each.name == "waypoint-0"),
            uid="cluster1//Pod/shop/waypoint-1",
            name="waypoint-1",
            addresses=(ip_address(OTHER),),
        )
        near.mesh.replace(near.mesh.snapshot.with_changes(upsert=(ours,)))
        taken: Counter[str | None] = Counter()
        async with waypoint(lab.ca, WAYPOINT_ID, OTHER, lab.port, endpoints=endpoints, via=via, expect=STOCK_ID):
            for _ in range(40):
                async with await near.connect(VIP, lab.db.port) as stream:
                    assert await ask(stream) == b"hello world"
                taken[(await near.log.next()).dst_workload] += 1
        assert set(taken) == {"waypoint-0", "waypoint-1"}
        assert 20 <= taken["waypoint-0"] <= 38
        arrived = lab.arrived
        answered = 0
        for _ in range(20):
            try:
                async with await near.connect(VIP, lab.db.port) as stream:
                    answered += await ask(stream) == b"hello world"
            except WayRefused:
                pass
        assert 0 < answered < 20
        assert lab.arrived == arrived + answered


# === behind a node ===


async def test_a_waypoint_behind_a_node(lab: Lab, tmp_path: Path) -> None:
    """Envoy without certificates: a node in front of it, and the same node behind it."""
    ports = {lab.port}
    while len(ports) < 3:
        ports.add(shared_port(OTHER))
    proxy, tunnel = ports - {lab.port}
    names = {**lab.names, "10.1.0.50": OTHER, "127.0.0.1": OTHER, "15081": proxy, "15088": tunnel}
    mesh = tmp_path / "mesh.yaml"
    mesh.write_text(localized("waypoint/mesh.yaml", names))
    words = ["--hbone-port", str(lab.port), "--inbound", f"{OTHER}:{lab.port}", "--http-proxy", f"{OTHER}:{proxy}"]
    words += ["--mode", "dedicated", "--workload", "shop/waypoint-0/waypoint", "--localhost-app-tunnel", "false"]

    def script() -> None:
        with (
            Member.begin(lab.directory / "ca", mesh, *words) as way,
            Envoy(localized("waypoint/envoy-behind-a-node.yaml", names), tmp_path),
        ):
            way.event("ready")
            for host, port in ((VIP, 80), (STOCK, lab.web.port)):
                with socks5(near.socks.port, host, port) as sock:
                    head, body = get(sock, "/", "Connection: close")
                assert "x-waypoint: waypoint-0" in head
                assert f"x-caller: {CART_ID}" in body.decode()
                asked = way.line(direction="inbound")
                assert (asked["dst.hbone_addr"], asked["src.identity"]) == (f"{host}:{port}", CART_ID)
                went = way.line(direction="outbound")
                assert (went["dst.addr"], went["dst.hbone_addr"]) == (f"{STOCK}:{lab.port}", lab.web.target)
                came = lab.far.line(direction="inbound", src_workload="waypoint")  # by what its node says of it
                assert came["src.identity"] == WAYPOINT_ID
            with socks5(near.socks.port, VIP, 80) as sock:
                _, body = get(sock, f"/bytes/{8 * MIB}", "Connection: close")
            assert hashlib.sha256(body).hexdigest() == pattern_sha(8 * MIB)
            with socks5(near.socks.port, STOCK, lab.db.port) as sock:  # Envoy closes what it has no chain for
                sock.sendall(b"hello")
                assert exchange(sock).received == 0
            # Nothing went in a circle.
            assert way.total("istio_tcp_connections_opened_total", reporter="destination") == 4

    async with lab.client(_10_1_0_50=OTHER) as near:
        await run(script)
