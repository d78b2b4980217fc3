"""Two networks with gateways between them, with the files of ``examples/gateway``: a tunnel in a tunnel, by real hops.

One gateway is Envoy, named by its address; the other one is ``hbone inbound``, named by its service.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import pytest
from support.apps import exchange
from support.backends import Backend, echo, ends_first, own_loopback, pattern_sha
from support.command import Node
from support.dataplanes import Refused, at_rest, data_plane, read_to_end, shared_port, total, trusting
from support.foreign import LIVE_LOGS, Envoy, Process
from support.lab import Member, localized
from support.ours import run

from hbone.certs import LocalCA
from hbone.mesh import MeshSnapshot, Service, parse_mesh
from hbone.proxy import WorkloadInfo
from hbone.proxy._context import NodeSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from support.dataplanes import DataPlane

MIB = 1 << 20
CART, STOCK, ENVOY, OURS, INSIDE = (own_loopback(number) for number in (91, 92, 93, 94, 95))
NAMES = {"stock": "stock.shop.svc.cluster.local", "orders": "orders.shop.svc.cluster.local"}
VIPS = {"stock": "10.96.0.20", "orders": "10.96.0.21"}
CART_ID, STOCK_ID = (f"spiffe://cluster.local/ns/shop/sa/{name}" for name in ("cart", "stock"))
GATEWAY_ID = "spiffe://cluster.local/ns/gateways/sa/gateway"
CART_INFO = WorkloadInfo(namespace="shop", name="cart-0", service_account="cart")

#: By which gateway each service is reached.
by_gateway = pytest.mark.parametrize("name", ["stock", "orders"], ids=["envoy", "ours"])


@dataclass
class Lab:
    """Two networks, as far as they can tell."""

    directory: Path
    names: dict[str, object]
    ca: LocalCA
    port: int
    """15008."""
    near: Member
    """A node of ``west``, of ``cart``."""
    far: Member
    """A node of ``east``, of ``stock``."""
    envoy: Envoy
    apps: dict[str, Backend]

    @property
    def arrived(self) -> int:
        """How many connections the applications have seen."""
        return sum(len(app.connections) for app in self.apps.values())

    def gateway(
        self, directory: Path, name: str, port: int, *, files: Path | None = None, to: int | None = None
    ) -> Process | Node:
        """Another gateway of the same kind, at another port; with other files, and to another port than the node's."""
        files = files or self.directory / "gateway"
        if name == "orders":
            return self.ours(files, f"{OURS}:{port}", to or self.port)
        text = localized("gateway/envoy.yaml", {**self.names, "198.51.100.7": OURS, "/etc/gateway": files})
        for host, its in ((OURS, port), (STOCK, to or self.port)):
            here = f"address: {host}, port_value: "
            assert f"{here}{self.port}" in text
            text = text.replace(f"{here}{self.port}", f"{here}{its}")
        return Envoy(text, directory)

    @staticmethod
    def ours(files: Path, listen: str, port: int) -> Node:
        names = {name: files / f"{name}.pem" for name in ("cert", "key", "roots")}
        options = [word for name, path in names.items() for word in (f"--{name}", str(path))]
        return Node("inbound", "--listen", listen, "--to", f"{STOCK}:{port}", *options)

    def client(
        self, change: Callable[[Any], Any] = lambda each: each, *, who: WorkloadInfo = CART_INFO, **options: Any
    ) -> AbstractAsyncContextManager[DataPlane]:
        """A node of ``west`` in this process, with another picture of the mesh."""
        parsed = parse_mesh(localized("gateway/west.yaml", self.names))
        mesh = MeshSnapshot.build(map(change, parsed.workloads), map(change, parsed.services))
        settings = NodeSettings(network="west", keep_source=False)
        options = {"ca": self.ca, "network": "west", "settings": settings, "prefetch": False, **options}
        return data_plane(mesh, dedicated=who, hbone_port=self.port, **options)

    @staticmethod
    def gateway_at(port: int) -> Callable[[Any], Any]:
        """For `client`: the gateway of ``stock`` is another one."""

        def change(each: Any) -> Any:
            if each.name == "stock" and not isinstance(each, Service):
                gateway = each.network_gateway
                there = replace(gateway.destination, ip=ip_address(OURS))
                return replace(each, network_gateway=replace(gateway, destination=there, hbone_mtls_port=port))
            return each

        return change


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    directory = tmp_path_factory.mktemp("gateway")
    ca_dir = directory / "ca"
    ca = LocalCA.create(ca_dir)
    ca.write(ca.issue(GATEWAY_ID), directory / "gateway")
    port = shared_port(STOCK, ENVOY, OURS)
    with ExitStack() as stack:
        habits = {"stock": echo, "orders": ends_first(8 * MIB)}
        apps = {name: stack.enter_context(Backend(habit, host=STOCK)) for name, habit in habits.items()}
        names: dict[str, object] = {"10.1.0.4": CART, "10.2.0.9": STOCK, "10.2.0.7": INSIDE, "15008": port}
        names |= {"198.51.100.7": ENVOY, "198.51.100.8": OURS, "/etc/gateway": directory / "gateway"}
        names |= {"8080": apps["stock"].port, "8081": apps["orders"].port}
        meshes = {name: directory / f"{name}.yaml" for name in ("west", "east")}
        for name, path in meshes.items():
            path.write_text(localized(f"gateway/{name}.yaml", names))
        words = ("--hbone-port", str(port), "--network")
        far = stack.enter_context(Member.begin(ca_dir, meshes["east"], *words, "east", "--inbound", f"{STOCK}:{port}"))
        who = ("--mode", "dedicated", "--workload", str(CART_INFO))
        near = stack.enter_context(Member.begin(ca_dir, meshes["west"], *words, "west", *who))
        envoy = stack.enter_context(Envoy(localized("gateway/envoy.yaml", names), directory))
        stack.enter_context(Lab.ours(directory / "gateway", f"{OURS}:{port}", port))
        far.event("ready")
        near.event("ready")
        yield Lab(directory, names, ca, port, near, far, envoy, apps)


@pytest.fixture(autouse=True)
def _only_its_own_lines(lab: Lab) -> None:
    LIVE_LOGS.append(lab.envoy.log)
    lab.near.forget_lines()
    lab.far.forget_lines()


@by_gateway
@pytest.mark.parametrize("by_name", [True, False], ids=["name", "vip"])
def test_every_byte_both_ways(lab: Lab, name: str, by_name: bool) -> None:
    """Whoever ends first; and what both nodes say of it."""
    before = lab.near.scrape(), lab.far.scrape()
    app, index = lab.apps[name], len(lab.apps[name].connections)
    with lab.near.dial(NAMES[name] if by_name else VIPS[name], 80) as sock:
        outcome = exchange(sock, 8 * MIB)
    assert (outcome.end, outcome.sha, outcome.send_error) == ("eof", pattern_sha(8 * MIB), "")
    assert app.wait_connection(index).sha == pattern_sha(8 * MIB)
    near, far = lab.near.line(direction="outbound"), lab.far.line(direction="inbound")
    expected = {
        "level": "info",
        "src.workload": "cart-0",
        "src.identity": CART_ID,
        "src.cluster": "west",
        "dst.addr": f"{ENVOY if name == 'stock' else OURS}:{lab.port}",
        "dst.hbone_addr": f"{NAMES[name]}:80",
        "dst.service": NAMES[name],
        "dst.workload": "stock",
        "dst.identity": STOCK_ID,
        "dst.cluster": "east",
        "bytes_sent": 8 * MIB,
        "bytes_recv": 8 * MIB,
    }
    assert {key: near.get(key) for key in expected} == expected
    # Not the gateway, from whose address it comes.
    expected |= {"src.workload": "cart", "dst.addr": f"{STOCK}:{lab.port}", "dst.workload": "stock-0"}
    assert {key: far.get(key) for key in expected} == expected
    assert far["src.addr"].startswith(f"{INSIDE if name == 'stock' else '127.0.0.1'}:")
    assert "error" not in near | far

    for member, old in zip((lab.near, lab.far), before, strict=True):
        grown = {dict(facts)[""]: (dict(facts), value) for facts, value in (member.scrape() - old).items()}
        for metric in ("connections_opened", "connections_closed", "received_bytes", "sent_bytes"):
            labels, value = grown[f"istio_tcp_{metric}_total"]
            assert value == (8 * MIB if "bytes" in metric else 1)
            assert (labels["source_workload"], labels["source_principal"]) == ("cart", CART_ID)
            assert (labels["destination_workload"], labels["destination_principal"]) == ("stock", STOCK_ID)
            assert (labels["source_cluster"], labels["destination_cluster"]) == ("west", "east")
            assert (labels["destination_service"], labels["response_flags"]) == (NAMES[name], "-")
        assert "istio_tcp_connections_failed_total" not in grown


# === who is who ===


@by_gateway
async def test_somebody_else_at_the_gateway(lab: Lab, name: str) -> None:
    def change(each: Any) -> Any:
        return replace(each, service_account="keeper") if each.name.startswith("gateway-") else each

    arrived = lab.arrived
    async with lab.client(change) as near:
        why = f"peer is {GATEWAY_ID}, expected spiffe://cluster.local/ns/gateways/sa/keeper"
        with pytest.raises(Refused, match=why):
            await near.ask(NAMES[name], 80, way="http")
        assert (await near.log.next()).error == why
        assert total(near.metrics, "failed", response_flags="TLS_FAILURE") == 1
    assert lab.arrived == arrived


@by_gateway
async def test_a_gateway_that_trusts_another_root(lab: Lab, name: str, tmp_path: Path) -> None:
    """It refuses the client's certificate: the client is told so at once, each time, and nothing begins inside."""
    theirs = LocalCA.in_memory()
    theirs.write(theirs.issue(GATEWAY_ID), tmp_path / "theirs")
    port = shared_port(OURS)
    with Backend(echo, host=STOCK) as behind:
        options = {"files": tmp_path / "theirs", "to": behind.port}
        process = await run(partial(lab.gateway, tmp_path, name, port, **options))
        try:
            async with lab.client(lab.gateway_at(port), issue=trusting(lab.ca, theirs)) as near:
                for _ in range(2):
                    with pytest.raises(Refused, match="the peer refused our certificate or identity"):
                        await near.ask(NAMES["stock"], 80, way="http")
                    line = await near.log.next()
                    assert line.error is not None
                    # What is in between is the alert, unless TCP's reset was quicker.
                    assert line.error.startswith("the peer refused our certificate or identity (")
                    assert line.error.endswith("check that it trusts our root and accepts our trust domain")
                    assert (str(line.dst_addr), str(line.dst_hbone_addr)) == (f"{OURS}:{port}", f"{NAMES['stock']}:80")
                await at_rest(near)
                assert total(near.metrics, "failed", response_flags="TLS_FAILURE") == 2
        finally:
            await run(process.__exit__, None, None, None)
        assert not behind.connections


@by_gateway
@pytest.mark.parametrize("expected", ["spiffe://cluster.local/ns/shop/sa/orders", GATEWAY_ID])
async def test_somebody_else_behind_the_gateway(lab: Lab, name: str, expected: str) -> None:
    """The gateway is not good enough either, though the outer tunnel ends there."""

    def change(each: Any) -> Any:
        return replace(each, subject_alt_names=(expected,)) if isinstance(each, Service) else each

    arrived = lab.arrived
    async with lab.client(change) as near:
        why = f"peer is {STOCK_ID}, expected {expected}"
        with pytest.raises(Refused, match=why):
            await near.ask(NAMES[name], 80, way="http")
        assert (await near.log.next()).error == why
        assert total(near.metrics, "failed", response_flags="TLS_FAILURE") == 1
    assert lab.arrived == arrived


@by_gateway
async def test_the_node_behind_the_gateway_knows_who_asks(lab: Lab, name: str) -> None:
    """Its policy is about the client; the gateway would not be let in either."""

    def change(each: Any) -> Any:
        return replace(each, service_account="till") if each.name == "cart-0" else each

    arrived = lab.arrived
    async with lab.client(change, who=WorkloadInfo(namespace="shop", name="cart-0", service_account="till")) as near:
        with pytest.raises(Refused, match="403"):
            await near.ask(NAMES[name], 80, way="http")
        error = (await near.log.next()).error
    assert error == "http status: 401 Unauthorized: the peer's authorization policy does not allow our identity"
    far = await run(lab.far.line, direction="inbound", src_identity="spiffe://cluster.local/ns/shop/sa/till")
    assert far["error"] == "connection closed due to policy rejection: allow policies exist, but none allowed"
    assert lab.arrived == arrived


async def test_a_service_that_the_gateway_does_not_know(lab: Lab) -> None:
    def change(each: Any) -> Any:
        return replace(each, ports={**each.ports, 81: 1}) if isinstance(each, Service) else each

    async with lab.client(change) as near:
        with pytest.raises(Refused, match="404"):
            await near.ask(NAMES["stock"], 81, way="http")


# === what breaks ===


@by_gateway
async def test_a_gateway_that_is_killed(lab: Lab, name: str, tmp_path: Path) -> None:
    """In the middle of a connection, which must not look complete at either end."""
    port = shared_port(OURS)
    process = await run(lab.gateway, tmp_path, name, port)
    try:
        async with lab.client(lab.gateway_at(port)) as near:
            async with await near.connect(NAMES["stock"], 80) as stream:
                await stream.send_all(b"hello")
                assert await stream.receive_some() == b"hello"
                seen = lab.apps["stock"].connections[-1]
                popen = process.process if isinstance(process, Node) else process.popen
                popen.kill()
                assert await read_to_end(stream) == (b"", "reset")
                line = await near.log.next()
                assert line.error is not None
                assert (line.bytes_recv, line.dst_workload) == (5, "stock")
                assert await run(seen.done.wait, 60)
                assert seen.end == "reset"
                assert "error" in await run(lab.far.line, direction="inbound")
            await run(popen.wait)
            with pytest.raises(Refused, match=f"connecting to {OURS}:{port} failed: connection refused"):
                await near.ask(NAMES["stock"], 80, way="http")
    finally:
        await run(process.__exit__, None, None, None)
