"""A connection from end to end, as a table: what becomes of it, and what is said about it."""

from __future__ import annotations

import json
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest
from support.meshes import policy
from support.routes import CLIENT_IP, HBONE, PASSTHROUGH, TD, app_tunnel, client, gateway, service, workload

from hbone import Authority
from hbone.explain import ConnectionExplanation, Outcome, explain_connection, explain_plain_connection
from hbone.mesh import Action, Match, MeshSnapshot, NetworkMode, Scope, Service, StringMatch, StringMatchKind, Workload
from hbone.routing import NoOutboundRoute, RoutingConfig

SVC = "shop/stock.example"
STOCK = service(SVC, "/10.96.0.1")
VIP = "10.96.0.1:80"
CART = "lab//Pod/shop/cart-0"


def endpoint(number: int, **fields: Any) -> Workload:
    values = {"endpoint_of": {SVC: {80: 8080}}, "service_account": "stock", **HBONE, **fields}
    return workload(f"lab//Pod/shop/stock-{number}", f"10.0.1.{number}", **values)


def waypoint(**fields: Any) -> Workload:
    return workload("lab//Pod/shop/waypoint", "10.0.9.1", **{"service_account": "waypoint", **fields})


def far(number: int = 5, **fields: Any) -> Workload:
    """Somebody in another network."""
    return endpoint(number, **{"network": "far", "network_gateway": gateway("/10.0.8.1", 15009), **fields})


GATE = workload("lab//Pod/istio/gate", "10.0.8.1", namespace="istio", service_account="gate")
BEHIND_GATE = replace(STOCK, subject_alt_names=(f"{TD}/shop/sa/stock",))
GUARDED = replace(STOCK, waypoint=gateway("/10.0.9.1"))

NO_ONE = policy("shop/no-one", rules=((),))
ONLY_CART = policy(
    "shop/only-cart",
    action=Action.ALLOW,
    rules=(((Match(principals=(StringMatch(StringMatchKind.EXACT, "cluster.local/ns/shop/sa/cart"),)),),),),
)
ONLY_WAYPOINT = policy(
    "shop/only-waypoint",
    action=Action.ALLOW,
    rules=(((Match(principals=(StringMatch(StringMatchKind.SUFFIX, "/sa/waypoint"),)),),),),
)
NOT_ONE = policy("shop/not-one", scope=Scope.WORKLOAD_SELECTOR, rules=((),))


def build(*parts: Any) -> MeshSnapshot:
    everything = [client(), *parts]
    return MeshSnapshot.build(
        [each for each in everything if isinstance(each, Workload)],
        [each for each in everything if isinstance(each, Service)],
        [each for each in everything if not isinstance(each, Workload | Service)],
    )


def explain(
    *parts: Any, target: str = VIP, plain: bool = False, config: RoutingConfig | None = None, **more: Any
) -> ConnectionExplanation:
    snapshot = build(*parts)
    about: dict[str, Any] = {"source_ip": ip_address(CLIENT_IP), "target": Authority.parse(target), **more}
    if "resolved" in more:
        about["resolved"] = ip_address(more["resolved"])
    function: Any = explain_plain_connection if plain else explain_connection
    said: ConnectionExplanation = function(
        snapshot, config or RoutingConfig(), **{"source": snapshot.workloads[CART], **about}
    )
    json.dumps(said.to_dict())
    return said


THROUGH, DENIED = Outcome.THROUGH, Outcome.DENIED

CASES: dict[str, tuple[dict[str, Any], list[Any], Outcome, str]] = {
    "let in": (
        {},
        [STOCK, endpoint(1), ONLY_CART],
        THROUGH,
        f"shop/cart-0 gets to {VIP}: over HBONE to shop/stock-1 (allowed by: shop/only-cart)",
    ),
    "without policies": (
        {},
        [STOCK, endpoint(1)],
        THROUGH,
        f"shop/cart-0 gets to {VIP}: over HBONE to shop/stock-1 (no allow policies)",
    ),
    "refused": (
        {},
        [STOCK, endpoint(1), NO_ONE],
        DENIED,
        f"shop/cart-0 does not get to {VIP}:"
        " refused by policy at shop/stock-1: explicitly denied by: shop/no-one",
    ),
    "several ways": (
        {},
        [STOCK, endpoint(1), endpoint(2)],
        THROUGH,
        f"shop/cart-0 gets to {VIP} by any of 2 ways",
    ),
    "some ways": (
        {},
        [STOCK, endpoint(1, authorization_policies=("shop/not-one",)), endpoint(2, capacity=3), NOT_ONE],
        DENIED,
        f"shop/cart-0 gets to {VIP} by 1 of 2 ways only (75 % of the connections):"
        " refused by policy at shop/stock-1: explicitly denied by: shop/not-one",
    ),
    "no way for many reasons": (
        {},
        [STOCK, NO_ONE, *(endpoint(number) for number in range(1, 6))],
        DENIED,
        f"shop/cart-0 does not get to {VIP}:"
        " refused by policy at shop/stock-1: explicitly denied by: shop/no-one;"
        " refused by policy at shop/stock-2: explicitly denied by: shop/no-one;"
        " and 3 other reasons",
    ),
    "no route": (
        {},
        [STOCK],
        Outcome.NO_ROUTE,
        f"shop/cart-0 does not get to {VIP}: no healthy upstream: {VIP}",
    ),
    "not of the mesh": (
        {"target": "192.0.2.1:443"},
        [],
        THROUGH,
        "shop/cart-0 gets to 192.0.2.1:443: in plain text to 192.0.2.1:443, where no node stands",
    ),
    "a name that is not of the mesh": (
        {"target": "www.example:443"},
        [],
        THROUGH,
        "shop/cart-0 gets to www.example:443: in plain text to whatever address DNS has for www.example",
    ),
    "a name that DNS knows": (
        {"target": "www.example:8080", "resolved": "10.0.1.1"},
        [endpoint(1), NO_ONE],
        DENIED,
        "shop/cart-0 does not get to www.example:8080:"
        " refused by policy at shop/stock-1: explicitly denied by: shop/no-one",
    ),
    "a workload that is known by name, and nobody asks DNS": (
        {},
        [STOCK, replace(endpoint(1), addresses=(), hostname="vm.example"), NO_ONE],
        THROUGH,
        f"shop/cart-0 gets to {VIP}: over HBONE to shop/stock-1",
    ),
    "a workload that is known by name, and DNS knows it": (
        {"resolved": "10.0.1.1"},
        [STOCK, replace(endpoint(1), addresses=(), hostname="vm.example"), NO_ONE],
        DENIED,
        f"shop/cart-0 does not get to {VIP}: refused by policy at shop/stock-1: explicitly denied by: shop/no-one",
    ),
    "plain text to who speaks nothing else": (
        {},
        [STOCK, endpoint(1, protocol=GATE.protocol), ONLY_CART],
        DENIED,
        f"shop/cart-0 does not get to {VIP}:"
        " plain text refused by policy at shop/stock-1: allow policies exist, but none allowed",
    ),
    "what is passed through, and is an address of the mesh": (
        {"target": "10.0.1.1:8080"},
        [service(SVC, "/10.0.0.0/16", **PASSTHROUGH), endpoint(1), ONLY_CART],
        DENIED,
        "shop/cart-0 does not get to 10.0.1.1:8080:"
        " plain text refused by policy at shop/stock-1: allow policies exist, but none allowed",
    ),
    "a waypoint that takes HBONE itself": (
        {},
        [GUARDED, endpoint(1), waypoint(), ONLY_WAYPOINT],
        THROUGH,
        f"shop/cart-0 gets to {VIP}: over HBONE to the waypoint shop/waypoint,"
        " then over HBONE to shop/stock-1 (allowed by: shop/only-waypoint)",
    ),
    "a waypoint, and behind it a policy that wants the client": (
        {},
        [GUARDED, endpoint(1), waypoint(native_tunnel=True, **HBONE), ONLY_CART],
        DENIED,
        f"shop/cart-0 does not get to {VIP}: over HBONE to the waypoint shop/waypoint,"
        " but then refused by policy at shop/stock-1: allow policies exist, but none allowed",
    ),
    "a waypoint with a node before it": (
        {},
        [GUARDED, endpoint(1), waypoint(**HBONE, **app_tunnel()), NO_ONE],
        DENIED,
        f"shop/cart-0 does not get to {VIP}: refused by policy at shop/waypoint: explicitly denied by: shop/no-one",
    ),
    "a waypoint, and several ways behind it": (
        {},
        [GUARDED, endpoint(1, authorization_policies=("shop/not-one",)), endpoint(2), waypoint(), NOT_ONE],
        DENIED,
        f"shop/cart-0 gets to {VIP}: over HBONE to the waypoint shop/waypoint, then by 1 of 2 ways only:"
        " refused by policy at shop/stock-1: explicitly denied by: shop/not-one",
    ),
    "the waypoint of a workload": (
        {"target": "10.0.1.1:9"},
        [endpoint(1, waypoint=gateway("/10.0.9.1")), waypoint(), ONLY_WAYPOINT],
        THROUGH,
        "shop/cart-0 gets to 10.0.1.1:9: over HBONE to the waypoint shop/waypoint,"
        " then over HBONE to shop/stock-1 (allowed by: shop/only-waypoint)",
    ),
    "a waypoint with no endpoints behind it": (
        {},
        [GUARDED, waypoint()],
        Outcome.NO_ROUTE,
        f"shop/cart-0 does not get to {VIP}: over HBONE to the waypoint shop/waypoint,"
        f" but then no healthy upstream: {VIP}",
    ),
    "a gateway, and who is behind it": (
        {},
        [BEHIND_GATE, far(), GATE, ONLY_CART],
        THROUGH,
        f"shop/cart-0 gets to {VIP}: with a tunnel in a tunnel through the gateway istio/gate,"
        " then over HBONE to shop/stock-5 (allowed by: shop/only-cart)",
    ),
    "a gateway by name": (
        {},
        [
            BEHIND_GATE,
            far(network_gateway=gateway("istio/gate.example", 15009)),
            replace(GATE, hostname="gate.example"),
        ],
        THROUGH,
        f"shop/cart-0 gets to {VIP}: with a tunnel in a tunnel through the gateway istio/gate,"
        " then over HBONE to shop/stock-5 (no allow policies)",
    ),
    "a gateway that is a service": (
        {},
        [
            BEHIND_GATE,
            far(network_gateway=gateway("istio/gates.example", 15009)),
            service("istio/gates.example", "/10.96.0.9", ports={15009: 15009}),
            replace(GATE, services={service("istio/gates.example").key: {15009: 15009}}),
        ],
        THROUGH,
        f"shop/cart-0 gets to {VIP}: with a tunnel in a tunnel through the gateway istio/gate,"
        " then over HBONE to shop/stock-5 (no allow policies)",
    ),
    "a gateway, and somebody else behind it": (
        {},
        [replace(BEHIND_GATE, subject_alt_names=(f"{TD}/shop/sa/other",)), far(), GATE],
        Outcome.WRONG_PEER,
        f"shop/cart-0 does not get to {VIP}: with a tunnel in a tunnel through the gateway istio/gate, but then wrong"
        f" peer at 10.0.1.5:15008: shop/stock-5 is {TD}/shop/sa/stock, expected {TD}/shop/sa/other",
    ),
    "a gateway, and nobody knows who is behind it": (
        {},
        [BEHIND_GATE, replace(far(), addresses=()), GATE],
        THROUGH,
        f"shop/cart-0 gets to {VIP}: with a tunnel in a tunnel through the gateway istio/gate",
    ),
    "a gateway, and a waypoint behind it": (
        {},
        [
            replace(BEHIND_GATE, waypoint=gateway("shop/waypoint.example")),
            service("shop/waypoint.example", ports={15008: 15008}, subject_alt_names=(f"{TD}/shop/sa/waypoint",)),
            waypoint(
                network="far",
                network_gateway=gateway("/10.0.8.1", 15009),
                endpoint_of={"shop/waypoint.example": {15008: 15008}},
            ),
            far(),
            GATE,
        ],
        THROUGH,
        f"shop/cart-0 gets to {VIP}: with a tunnel in a tunnel through the gateway istio/gate",
    ),
    "an address of two workloads": (
        {},
        [STOCK, endpoint(1, service_account="other"), replace(endpoint(1), uid="lab/Vm/stock", services={})],
        THROUGH,
        f"shop/cart-0 gets to {VIP}: over HBONE to shop/stock-1 (no allow policies)",
    ),
    "the address of somebody better": (
        {},
        [STOCK, endpoint(1, service_account="other", endpoint_of={}), replace(endpoint(1), uid="lab/Vm/stock")],
        Outcome.WRONG_PEER,
        f"shop/cart-0 does not get to {VIP}: wrong peer at 10.0.1.1:15008: shop/stock-1 is {TD}/shop/sa/other,"
        f" expected {TD}/shop/sa/stock",
    ),
    "the address of a node": (
        {},
        [STOCK, endpoint(1, network_mode=NetworkMode.HOST_NETWORK), NO_ONE],
        DENIED,
        f"shop/cart-0 does not get to {VIP}: refused by policy at shop/stock-1: explicitly denied by: shop/no-one",
    ),
    "who can prove nothing": (
        {},
        [
            replace(STOCK, subject_alt_names=(f"{TD}/shop/sa/stock",)),
            endpoint(1, service_account="not a name"),
        ],
        Outcome.WRONG_PEER,
        f"shop/cart-0 does not get to {VIP}: wrong peer at 10.0.1.1:15008: shop/stock-1 can prove nothing,"
        f" expected {TD}/shop/sa/stock",
    ),
    "a client that can prove nothing": (
        {"source": replace(client(), service_account="not a name")},
        [STOCK, endpoint(1)],
        Outcome.NO_ROUTE,
        f"shop/cart-0 does not get to {VIP}: shop/cart-0 can have no certificate: its namespace, service account and"
        " trust domain make no SPIFFE id",
    ),
    "what the far node does not serve": (
        {"config": RoutingConfig(network="other")},
        [
            service(SVC, "other/10.96.0.1", waypoint=gateway("/10.0.9.1")),
            waypoint(**HBONE),
        ],
        Outcome.BAD_TARGET,
        f"shop/cart-0 does not get to {VIP}: refused with status 400 by the node of shop/waypoint: ip mismatch: the"
        " peer dialled 10.0.9.1 and asks for 10.96.0.1, which is not behind it",
    ),
    "a circle at the far node": (
        {"target": "10.0.1.1:15006"},
        [endpoint(1)],
        Outcome.UNREACHABLE,
        "shop/cart-0 does not get to 10.0.1.1:15006: refused with status 503 by the node of shop/stock-1:"
        " 10.0.1.1:15006 is a port of the proxy itself: the connection would go in a circle",
    ),
    "plain text": (
        {"plain": True, "target": "10.0.1.1:8080"},
        [endpoint(1)],
        THROUGH,
        "shop/cart-0 gets to 10.0.1.1:8080: in plain text to shop/stock-1 (no allow policies)",
    ),
    "plain text from outside": (
        {"plain": True, "target": "10.0.1.1:8080", "source": None},
        [endpoint(1), ONLY_CART],
        DENIED,
        "10.0.0.1 does not get to 10.0.1.1:8080: plain text refused by policy at shop/stock-1:"
        " allow policies exist, but none allowed",
    ),
    "plain text to a port of the proxy": (
        {"plain": True, "target": "10.0.1.1:15001"},
        [endpoint(1)],
        Outcome.UNREACHABLE,
        "shop/cart-0 does not get to 10.0.1.1:15001: 10.0.1.1:15001 is a port of the proxy itself:"
        " the connection would go in a circle",
    ),
    "plain text to a service": (
        {"plain": True},
        [STOCK, *(endpoint(number) for number in range(1, 6))],
        Outcome.NO_ROUTE,
        f"shop/cart-0 does not get to {VIP}: 10.96.0.1 is the service {SVC}, and only nodes know its endpoints;"
        " ask for one of them: 10.0.1.1:8080, 10.0.1.2:8080, 10.0.1.3:8080",
    ),
    "plain text to a name of a service": (
        {"plain": True, "target": "stock.example:81"},
        [STOCK, endpoint(1)],
        Outcome.NO_ROUTE,
        f"shop/cart-0 does not get to stock.example:81: stock.example is the service {SVC}, and only nodes know its"
        " endpoints",
    ),
    "plain text to a name": (
        {"plain": True, "target": "www.example:80"},
        [],
        THROUGH,
        "shop/cart-0 gets to www.example:80: in plain text to whatever address DNS has for www.example",
    ),
    "plain text to a name that DNS knows": (
        {"plain": True, "target": "www.example:80", "resolved": "10.0.1.1"},
        [endpoint(1), NO_ONE],
        DENIED,
        "shop/cart-0 does not get to www.example:80: plain text refused by policy at shop/stock-1:"
        " explicitly denied by: shop/no-one",
    ),
    "plain text out of the mesh": (
        {"plain": True, "target": "192.0.2.1:80"},
        [],
        THROUGH,
        "shop/cart-0 gets to 192.0.2.1:80: in plain text to 192.0.2.1:80, where no node stands",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("about", "parts", "outcome", "conclusion"), CASES.values(), ids=CASES)
def test_what_becomes_of_it(about: dict[str, Any], parts: list[Any], outcome: Outcome, conclusion: str) -> None:
    said = explain(*parts, **about)
    assert said.conclusion == conclusion
    assert said.outcome is outcome
    assert said.possible is (" gets to " in conclusion)


def test_a_connection_has_an_identity_only_in_a_tunnel() -> None:
    said = explain(STOCK, endpoint(1), ONLY_CART)
    arrival = said.ways[0].arrival
    assert arrival is not None
    assert arrival.flow is not None
    assert said.identity == arrival.flow.source_identity == client().identity
    plain = explain(endpoint(1), plain=True, target="10.0.1.1:8080")
    assert plain.identity is None
    assert plain.steps == ("it comes in plain text, past the node of its client, and proves no identity",)


def test_the_far_end_sees_an_address_of_its_own_family() -> None:
    said = explain(replace(endpoint(1), addresses=(ip_address("fd00::9"),)), target="[fd00::9]:80")
    arrival = said.ways[0].arrival
    assert arrival is not None
    assert arrival.flow is not None
    assert arrival.flow.source_ip == ip_address("fd00::1")
    other = explain(
        replace(endpoint(1), addresses=(ip_address("fd00::9"),)),
        target="[fd00::9]:80",
        source=replace(client(), addresses=()),
    )
    assert other.ways[0].arrival.flow.source_ip == ip_address(CLIENT_IP)  # type: ignore[union-attr]


def test_the_far_end_of_a_gateway_sees_the_gateways_address_and_the_client() -> None:
    behind = explain(BEHIND_GATE, far(), GATE).ways[0].behind
    assert behind is not None
    assert behind.network == "far"
    (way,) = behind.ways
    assert way.share is None
    assert way.arrival is not None
    assert way.arrival.flow is not None
    assert way.arrival.flow.source_ip == ip_address("10.0.8.1")
    assert way.arrival.flow.source_identity == client().identity


def test_steps_of_the_far_node() -> None:
    said = explain(STOCK, endpoint(1))
    assert said.ways[0].arrival.steps == (  # type: ignore[union-attr]
        f"the node of shop/stock-1 proves {TD}/shop/sa/stock, which is expected",
        "10.0.1.1 is the address that was dialled",
        f"the service {SVC} was meant",
        "to 10.0.1.1:8080; policies see 10.0.1.1:8080",
    )
    said = explain(STOCK, endpoint(1, network_mode=NetworkMode.HOST_NETWORK))
    assert said.ways[0].arrival.steps[0] == (  # type: ignore[union-attr]
        "10.0.1.1 is its node's address: only a node that is dedicated to shop/stock-1 serves it there"
    )
    two = [endpoint(1, endpoint_of={}), replace(endpoint(1), uid="lab/Vm/stock", name="vm")]
    assert explain(STOCK, *two).ways[0].arrival.steps[0] == (  # type: ignore[union-attr]
        "10.0.1.1 is the address of several: its node takes it for that of shop/stock-1 (lab//Pod/shop/stock-1)"
    )


def test_why_there_is_no_node() -> None:
    notes = {
        name: explain(*parts, **about).ways[0].note
        for name, about, parts in (
            ("waypoint", {}, [GUARDED, endpoint(1), waypoint()]),
            ("outside", {"target": "192.0.2.1:80"}, []),
            ("name", {"target": "www.example:80"}, []),
            ("gateway", {}, [BEHIND_GATE, replace(far(), addresses=()), GATE]),
        )
    }
    assert notes == {
        "waypoint": "shop/waypoint takes HBONE itself: no node stands before it",
        "outside": '192.0.2.1 is no address of a workload in the network "": no node stands before it',
        "name": "what becomes of it depends on the address that DNS has for www.example",
        "gateway": "who is behind the gateway is for the mesh over there to know",
    }


def test_a_service_that_nobody_can_name_in_a_header_is_not_named() -> None:
    """The far node guesses then."""
    odd = service('shop/a"b', "/10.96.0.7", ports={80: 8080})
    said = explain(
        STOCK, odd, endpoint(1, endpoint_of={SVC: {80: 8080}, 'shop/a"b': {80: 8080}}), target="10.96.0.7:80"
    )
    assert said.ways[0].route.service is odd  # type: ignore[union-attr]
    assert said.ways[0].arrival.service is STOCK  # type: ignore[union-attr]


def test_more_ways_than_there_is_room_for() -> None:
    said = explain(STOCK, *(endpoint(number) for number in range(1, 41)), limit=10)
    assert len(said.ways) == 10
    assert said.omitted == pytest.approx(0.75)
    assert said.conclusion.endswith("by any of 10 ways; 75 % of the connections go other ways")


def test_a_way_that_is_none_says_so_in_json() -> None:
    said = explain(STOCK)
    assert isinstance(said.ways[0].route, NoOutboundRoute)
    (way,) = said.to_dict()["ways"]
    assert (way["outcome"], way["type"], way["nextHop"], way["arrival"]) == ("no-route", None, None, None)
