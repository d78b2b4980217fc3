"""What `hbone explain` says is what nodes do: every kind of route, asked and then taken, over real sockets.

One mesh file, and three nodes that live by it: one for all clients, one for all workloads of the network, one in a
network behind a gateway. A client's connection is compared with the way that was foretold for it: next hop, wrapping,
authority, who was judged there and how.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field, replace
from ipaddress import ip_network
from typing import TYPE_CHECKING, Any

import pytest
import trio
from click.testing import CliRunner
from support.backends import own_loopback
from support.dataplanes import (
    CART,
    FAR,
    GATEWAY,
    LEGACY,
    STOCK,
    TD,
    THIEF,
    WAIT,
    WAYPOINT,
    Captures,
    Names,
    Refused,
    application,
    ask,
    at_rest,
    data_plane,
    echo,
    hbone_peer,
    member,
    mesh_of,
    read_to_end,
    shared_port,
)
from support.meshes import policy, service
from support.routes import PASSTHROUGH, app_tunnel, balancer, gateway

from hbone import Authority, FixedTarget, ForwardHandler
from hbone.certs import LocalCA
from hbone.mesh import (
    Action,
    Locality,
    Match,
    Scope,
    StringMatch,
    StringMatchKind,
    TunnelProtocol,
    WeightedGateway,
    dump_policy,
    dump_service,
    dump_workload,
)
from hbone_cli import cli

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from support.dataplanes import DataPlane

    from hbone.mesh import AuthorizationPolicy, MeshSnapshot, Service, Workload
    from hbone.proxy._connections import InboundConnection
    from hbone.rbac import Verdict

WEB, SECOND, GUARDED, OUTSIDE, PASSED, STRANGER = THIEF, *(own_loopback(90 + number) for number in range(5))
TCP = {"protocol": TunnelProtocol.TCP}
VIPS = "10.96.1."
LOCAL = "svc.cluster.local"


def exact(text: str) -> StringMatch:
    return StringMatch(StringMatchKind.EXACT, text)


def named(short: str, number: int, **fields: Any) -> Service:
    return service(f"shop/{short}.shop.{LOCAL}", f"/{VIPS}{number}", **fields)


def behind(**services: dict[int, int]) -> dict[str, Any]:
    return {"endpoint_of": {f"shop/{short}.shop.{LOCAL}": ports for short, ports in services.items()}}


def the_mesh(port: int, apps: dict[str, int], gate: int) -> MeshSnapshot:
    """Every kind of entry that a route can depend on.

    Args:
        port: of HBONE.
        apps: the ports of the applications, by address.
        gate: the port of the gateway.
    """
    workloads: list[Workload] = [
        member("cart", CART, locality=Locality(region="eu")),
        member("web", WEB, namespace="web"),
        member(
            "stock",
            STOCK,
            authorization_policies=("shop/no-web",),
            locality=Locality(region="us"),
            hostname="stock-0.example",
            **behind(
                stock={80: apps[STOCK]},
                both={80: apps[STOCK]},
                guarded={80: apps[STOCK]},
                split={80: apps[STOCK]},
                near={80: apps[STOCK]},
                circle={80: 15006},
                range={80: apps[STOCK]},
            ),
        ),
        member(
            "second",
            SECOND,
            capacity=2,
            locality=Locality(region="eu"),
            **behind(stock={80: apps[SECOND]}, near={80: apps[SECOND]}),
        ),
        member("legacy", LEGACY, **TCP, **behind(both={80: apps[LEGACY]}, legacy={80: apps[LEGACY]})),
        member("guarded", GUARDED, waypoint=gateway(f"/{WAYPOINT}", port)),
        member("waypoint", WAYPOINT, **app_tunnel(apps["127.0.0.1"]), **behind(waypoint={port: port})),
        # One that takes HBONE itself, as waypoints mostly do.
        member("outside", OUTSIDE, **TCP),
        member("gate", GATEWAY, **TCP),
        member("far", FAR, network="far", network_gateway=gateway(f"/{GATEWAY}", gate), **behind(far={80: apps[FAR]})),
        member("adrift", FAR, network="adrift", **behind(adrift={80: 1})),
        # The mesh gives this one an address that its node takes for another's.
        replace(member("alias", STOCK, **behind(alias={80: apps[STOCK]})), uid="lab/Vm/alias"),
    ]
    outside = WeightedGateway(destination=gateway(f"/{OUTSIDE}", port), weight=2)
    inside = WeightedGateway(destination=gateway(f"/{WAYPOINT}", port), weight=1)
    services = [
        named("stock", 1, ports={80: 0}),
        named("both", 2),
        named("legacy", 3),
        named("empty", 4),
        named("guarded", 5, waypoint=gateway(f"shop/waypoint.shop.{LOCAL}", port)),
        named("lost", 6, waypoint=gateway("shop/nowhere.example")),
        named("split", 7, weighted_waypoints=(outside, inside)),
        named("far", 8, subject_alt_names=(f"{TD}/shop/sa/far",)),
        named("adrift", 9, subject_alt_names=(f"{TD}/shop/sa/adrift",)),
        named("circle", 10, ports={80: 0}),
        named("alias", 11),
        named("near", 12, **balancer("Failover", "Region")),
        named("waypoint", 13, ports={port: port}),
        service(f"shop/range.shop.{LOCAL}", "/10.97.0.0/16"),
        service("shop/passed.example", f"/{PASSED}", ports={apps[PASSED]: apps[PASSED]}, **PASSTHROUGH),
        service("web/private.example", f"/{VIPS}99"),
    ]
    policies: list[AuthorizationPolicy] = [
        policy(
            "shop/no-web",
            scope=Scope.WORKLOAD_SELECTOR,
            rules=(((Match(namespaces=(exact("web"),)),),),),
        ),
        policy(
            "shop/members",
            action=Action.ALLOW,
            rules=(
                ((Match(principals=(StringMatch(StringMatchKind.PREFIX, "cluster.local/ns/"),)),),),
                ((Match(source_ips=(ip_network("127.0.0.0/8"),), destination_ips=(ip_network(f"{LEGACY}/32"),)),),),
            ),
        ),
        policy("istio/try", scope=Scope.GLOBAL, rules=((),), dry_run=True),
    ]
    return mesh_of(*workloads, *services, *policies)


@dataclass(kw_only=True)
class Live:
    """The nodes, and what is needed to ask about them."""

    near: DataPlane
    nodes: dict[str, DataPlane]
    """Those that workloads are behind, by network."""
    file: Path
    port: int
    apps: dict[str, int]
    judged: list[tuple[str, InboundConnection, Verdict]] = field(default_factory=list)
    """By the nodes: whose network, what, and how."""

    def explain(self, source: str, target: str, *options: str) -> dict[str, Any]:
        """The answer of the command."""
        words = ["explain", "--mesh", str(self.file), "--from", source, "--to", target, "--json"]
        words += ["--hbone-port", str(self.port), *options]
        result = CliRunner().invoke(cli, words, env={"NETWORK": None})
        assert result.stderr == ""
        said: dict[str, Any] = json.loads(result.stdout)
        assert result.exit_code == EXIT_CODES[said["outcome"]]
        return said

    async def connect(self, source: str, target: str) -> dict[str, Any]:
        """What becomes of a connection."""
        self.judged.clear()
        log, told = self.near.log, len(self.near.log.told)
        host, _, port = target.rpartition(":")
        try:
            async with await self.near.connect(host, int(port), source=source) as stream:
                await ask(stream)
        except Refused:
            pass
        record = await log.next()
        await at_rest(self.near, *self.nodes.values())
        ways = [match for _, line in log.told[told:] if (match := TOLD.fullmatch(line))]
        error = record.error or ""
        return {
            "outcome": next(outcome for outcome, said in ERRORS.items() if re.search(said, error)),
            "error": error,
            "ways": [match.groupdict() for match in ways],
            "authority": None if record.dst_hbone_addr is None else str(record.dst_hbone_addr),
            "judged": [shown(*judged) for judged in self.judged],
        }


TOLD = re.compile(r"proxy to \S+ using (?P<protocol>\S+) via (?P<nextHop>\S+) type (?P<type>\S+)")
EXIT_CODES = {"through": 0, "no-route": 15, "peer-identity": 6, "denied": 9, "bad-target": 10, "unreachable": 11}
ERRORS = {
    "through": r"^$",
    "denied": "^http status: 401 ",
    "unreachable": "^http status: 503 ",
    "peer-identity": "^peer is ",
    "no-route": "",
}


def shown(network: str, connection: InboundConnection, verdict: Verdict) -> dict[str, Any]:
    """What a node has judged, with the words of an explanation."""
    flow = connection.flow
    return {
        "workload": connection.workload.uid,
        "network": network,
        "upstream": str(connection.actual),
        "sourceIdentity": None if flow.source_identity is None else str(flow.source_identity),
        "destination": (str(flow.destination_ip), flow.destination_port),
        "verdict": (verdict.allowed, verdict.policy, verdict.reason),
        "dryRun": [match.policy for match in verdict.dry_run],
        "wanted": connection.original,
    }


def foretold(arrival: dict[str, Any] | None, network: str = "") -> list[dict[str, Any]]:
    """The same from an explanation."""
    if arrival is None or arrival["flow"] is None:
        return []
    flow, said = arrival["flow"], arrival["policy"]
    return [
        {
            "workload": arrival["workload"]["uid"],
            "network": network,
            "upstream": arrival["upstream"],
            "sourceIdentity": flow["sourceIdentity"],
            "destination": (flow["destinationIp"], flow["destinationPort"]),
            "verdict": (said["allowed"], said["policy"], said["reason"]),
            "dryRun": [match["policy"] for match in said["dryRun"]],
            "wanted": arrival["service"] and arrival["service"].partition("/")[2],
        }
    ]


@pytest.fixture
async def live(
    nursery: trio.Nursery, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Live]:
    caplog.set_level(logging.INFO, "hbone.proxy.outbound")
    ca = LocalCA.in_memory()
    async with AsyncExitStack() as stack:
        apps = {}
        for host in (STOCK, SECOND, GUARDED, LEGACY, FAR, PASSED, "127.0.0.1"):
            apps[host] = (await stack.enter_async_context(application(host, echo))).port
        port = shared_port(STOCK, SECOND, GUARDED, WAYPOINT, OUTSIDE, FAR)
        forwards = ForwardHandler(FixedTarget(Authority(FAR, port)))
        gate = await stack.enter_async_context(hbone_peer(ca, f"{TD}/shop/sa/gate", GATEWAY, handler=forwards))
        await stack.enter_async_context(hbone_peer(ca, f"{TD}/shop/sa/outside", OUTSIDE, port))
        mesh = the_mesh(port, apps, gate.port)
        file = tmp_path / "mesh.yaml"
        file.write_text(
            json.dumps({
                "workloads": [dump_workload(each) for each in mesh.workloads.values()],
                "services": [dump_service(each) for each in mesh.services.values()],
                "policies": [dump_policy(each) for each in mesh.policies.values()],
            })
        )  # fmt: skip
        near = await stack.enter_async_context(data_plane(mesh, ca=ca, hbone_port=port, seed=7))
        here = await stack.enter_async_context(
            data_plane(mesh, ca=ca, hbone_port=port, listen=(STOCK, SECOND, GUARDED, WAYPOINT))
        )
        there = await stack.enter_async_context(data_plane(mesh, ca=ca, hbone_port=port, listen=FAR, network="far"))
        found = Live(near=near, nodes={"": here, "far": there}, file=file, port=port, apps=apps)
        for network, node in found.nodes.items():
            table = node.context.connections

            def admit(connection: InboundConnection, network: str = network, judge: Any = table.admit) -> Verdict:
                verdict: Verdict = judge(connection)
                found.judged.append((network, connection, verdict))
                return verdict

            monkeypatch.setattr(table, "admit", admit)
        yield found


def targets(live: Live) -> Iterator[str]:
    apps = live.apps
    for number in range(1, 13):
        yield f"{VIPS}{number}:80"
    yield f"{VIPS}1:81"
    yield f"stock.shop.{LOCAL}:80"
    yield f"guarded.shop.{LOCAL}:80"
    yield "10.97.3.4:80"
    for host in (STOCK, SECOND, GUARDED, LEGACY, PASSED, "127.0.0.1", "stock-0.example", "else.example"):
        yield f"{host}:{apps.get(host, apps[STOCK])}"
    yield "127.0.0.1:15001"


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Captures:
    return Captures(monkeypatch)


CLIENTS = {"shop/cart-0": CART, "web/web-0": WEB, "shop/waypoint-0": WAYPOINT}


async def test_every_connection_goes_as_it_was_foretold(live: Live) -> None:
    Names(**{"stock-0.example": [STOCK], "else.example": [STOCK]})
    kinds = set()
    for client, address in CLIENTS.items():
        for target in targets(live):
            said = live.explain(client, target, "--resolves-to", STOCK)
            by_address = live.explain(address, target, "--resolves-to", STOCK)
            assert by_address == said
            seen = []
            for _ in range(1 if len(said["ways"]) == 1 else 12):
                with trio.fail_after(WAIT):
                    seen.append(compare(said, await live.connect(address, target)))
            assert set(seen) == set(range(len(said["ways"]))), (client, target)
            kinds |= {(way["protocol"], way["type"], way["outcome"]) for way in said["ways"]}
    assert kinds == {
        ("HBONE", "Direct", "through"),
        ("HBONE", "Direct", "denied"),
        ("HBONE", "Direct", "unreachable"),
        ("HBONE", "Direct", "peer-identity"),
        ("HBONE", "ToServerWaypoint", "through"),
        ("DOUBLEHBONE", "ToGateway", "through"),
        ("TCP", "Direct", "through"),
        ("TCP", "Passthrough", "through"),
        (None, None, "no-route"),
    }


async def test_a_waypoint_goes_on_as_it_was_foretold(live: Live) -> None:
    """As waypoints do: to an endpoint of their choice, with their own identity."""
    for target in (f"{VIPS}5:80", f"{GUARDED}:{live.apps[GUARDED]}"):
        (way,) = live.explain("web/web-0", target)["ways"]
        assert way["behind"]["client"]["workload"]["name"] == "waypoint-0"
        (then,) = way["behind"]["ways"]
        taken = await live.connect(WAYPOINT, then["authority"])
        for judged in taken["judged"]:  # a waypoint says which service was meant; an application cannot
            judged["wanted"] = foretold(then["arrival"])[0]["wanted"]
        assert compare(way["behind"], taken) == 0
        assert [judged["sourceIdentity"] for judged in taken["judged"]] == [f"{TD}/shop/sa/waypoint"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux captures connections")
async def test_plain_text_is_judged_as_it_was_foretold(live: Live, nursery: trio.Nursery, captures: Captures) -> None:
    node = live.nodes[""]
    captured = await nursery.start(node.plaintext.serve, "127.0.0.1", 0)
    seen = set()
    for client in (CART, WEB, STRANGER):
        for host in (STOCK, SECOND, LEGACY, GUARDED):
            target = f"{host}:{live.apps[host]}"
            (way,) = live.explain(client, target, "--plain")["ways"]
            live.judged.clear()
            answer = b""
            with suppress(ConnectionResetError):  # what is denied may already be reset when it is made
                stream = await captures.dial(captured, target, client)
                with suppress(trio.BrokenResourceError):
                    await stream.send_all(b"hello")
                    await stream.send_eof()
                answer, _ = await read_to_end(stream)
                await stream.aclose()
            await at_rest(node)
            assert way["outcome"] == ("through" if answer == b"hello" else "denied")
            assert [shown(*judged) for judged in live.judged] == foretold(way["arrival"])
            ((_, connection, _),) = live.judged
            assert way["arrival"]["flow"]["sourceIp"] == str(connection.flow.source_ip) == client
            seen.add((host, way["outcome"]))
    assert {outcome for host, outcome in seen if host == LEGACY} == {"through"}
    assert {outcome for host, outcome in seen if host != LEGACY} == {"denied"}


def compare(said: dict[str, Any], live: dict[str, Any]) -> int:
    """Which of the ways that were foretold a connection took; fails if it took none."""
    if not live["ways"]:
        (way,) = said["ways"]
        assert (live["outcome"], live["error"]) == ("no-route", way["reason"])
        assert way["outcome"] == "no-route"
        return 0
    *_, taken = live["ways"]  # a name that the mesh leaves to DNS is looked at again when it has an address
    (index,) = [
        number
        for number, way in enumerate(said["ways"])
        if {key: way[key] for key in taken} == taken and way["authority"] == live["authority"]
    ]
    way = said["ways"][index]
    if way["behind"] is None:
        assert live["outcome"] == way["outcome"], live
    if way["type"] == "ToGateway":
        assert [judged for end in way["behind"]["ways"] for judged in foretold(end["arrival"], "far")] == live["judged"]
    elif way["protocol"] == "HBONE":
        assert foretold(way["arrival"]) == live["judged"]
        if way["outcome"] == "peer-identity":
            proved, expected = way["arrival"]["identity"], " or ".join(way["expected"])
            assert live["error"] == f"peer is {proved}, expected {expected}"
    return index
