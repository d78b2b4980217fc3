"""The picture of the mesh, case by case: who has an address, which service a client means, what is an endpoint."""

from __future__ import annotations

import gc
import sys
from dataclasses import replace
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import pytest
from support.meshes import name, policy, service, workload

from hbone.mesh import (
    HealthPolicy,
    HealthStatus,
    LoadBalancer,
    MeshSnapshot,
    NetworkMode,
    ServiceEndpoint,
    TunnelProtocol,
    Visibility,
)

if TYPE_CHECKING:
    from collections.abc import Callable

HBONE = {"protocol": TunnelProtocol.HBONE}
PRIVATE = {"visibility": Visibility.NAMESPACE}
CANONICAL = {"canonical": True}
UNHEALTHY = {"status": HealthStatus.UNHEALTHY}
ALLOW_ALL = {"load_balancer": LoadBalancer(health_policy=HealthPolicy.ALLOW_ALL)}


def by_address(snapshot: MeshSnapshot, ip: str, network: str = "") -> str | None:
    found = snapshot.workload_by_address(network, ip_address(ip))
    return None if found is None else found.uid


def by_vip(snapshot: MeshSnapshot, ip: str, client: str | None, network: str = "") -> str | None:
    found = snapshot.service_by_vip(network, ip_address(ip), client)
    return None if found is None else str(found.key)


# --------------------------------------------------------------------------------------------------------- workloads


def test_an_empty_mesh_has_nothing() -> None:
    empty = MeshSnapshot.build()
    assert (dict(empty.workloads), dict(empty.services), dict(empty.policies)) == ({}, {}, {})
    assert by_address(empty, "10.0.0.1") is None
    assert by_vip(empty, "10.0.0.1", "shop") is None
    assert empty.find_workload("shop", "cart", "default") is None
    assert empty.workload_by_hostname("shop", "cart") is None
    assert empty.service_by_hostname("cart", "shop") is None
    assert empty.service(name("shop/cart")) is None
    assert empty.workloads_on_node(None) == empty.workloads_on_node("a") == ()
    assert empty.endpoints(service("shop/cart")) == empty.staged_endpoints == {}
    assert empty.services_of(workload("w")) == ()
    assert empty.memo == {}


def test_an_address_is_one_in_its_network() -> None:
    snapshot = MeshSnapshot.build([
        workload("a", "10.0.0.1", "2001:db8::1"),
        workload("b", "10.0.0.1", "10.0.0.2", network="remote"),
    ])  # fmt: skip
    assert by_address(snapshot, "10.0.0.1") == "a"
    assert by_address(snapshot, "2001:db8::1") == "a"
    assert by_address(snapshot, "10.0.0.1", "remote") == "b"
    assert by_address(snapshot, "10.0.0.2") is None
    assert by_address(snapshot, "10.0.0.1", "elsewhere") is None


def test_an_ipv4_address_written_as_ipv6_is_the_same_address() -> None:
    snapshot = MeshSnapshot.build(
        [workload("a", "::ffff:10.0.0.1"), workload("b", "10.0.0.2")], [service("shop/c", "/::ffff:10.96.0.1")]
    )
    assert by_address(snapshot, "10.0.0.1") == "a"
    assert by_address(snapshot, "::ffff:10.0.0.2") == "b"
    assert by_vip(snapshot, "10.96.0.1", "shop") == "shop/c"
    # The bytes are the same, but one is an IPv6 address with zeros behind it.
    assert by_address(snapshot, "a00:2::") is None


POD, POD_HBONE = ("x//Pod/shop/b", {}), ("x//Pod/shop/c", HBONE)
ENTRY, ENTRY_HBONE = ("a-entry", {}), ("b-entry", HBONE)


@pytest.mark.parametrize(
    ("rivals", "best"),
    [
        ([POD, POD_HBONE, ENTRY, ENTRY_HBONE], "x//Pod/shop/c"),
        ([POD, ENTRY, ENTRY_HBONE], "x//Pod/shop/b"),
        ([ENTRY, ENTRY_HBONE], "b-entry"),
        ([ENTRY, ("z-entry", {})], "a-entry"),
        ([POD_HBONE, ("x//Pod/shop/a", HBONE)], "x//Pod/shop/a"),
    ],
)
def test_the_best_of_several_at_one_address(rivals: list[tuple[str, dict[str, Any]]], best: str) -> None:
    workloads = [workload(uid, "10.0.0.1", name="n", hostname="h", **fields) for uid, fields in rivals]
    for order in (workloads, workloads[::-1]):
        snapshot = MeshSnapshot.build(order)
        assert by_address(snapshot, "10.0.0.1") == best
        for found in (snapshot.find_workload("shop", "n", "default"), snapshot.workload_by_hostname("shop", "h")):
            assert found is not None
            assert found.uid == best
        # When the best has gone, the next one has the address.
        without = snapshot.with_changes(remove_workloads=[best])
        next_best = by_address(MeshSnapshot.build([each for each in order if each.uid != best]), "10.0.0.1")
        assert by_address(without, "10.0.0.1") == next_best is not None


def test_a_workload_of_the_host_network_is_not_meant_by_the_address_of_its_node() -> None:
    in_host = workload("x//Pod/shop/agent", "10.0.0.1", network_mode=NetworkMode.HOST_NETWORK, **HBONE)
    snapshot = MeshSnapshot.build([in_host])
    assert by_address(snapshot, "10.0.0.1") is None
    assert snapshot.find_workload("shop", "agent", "default") is in_host
    moved = snapshot.with_changes(upsert=[replace(in_host, network_mode=NetworkMode.STANDARD)])
    assert by_address(moved, "10.0.0.1") == "x//Pod/shop/agent"
    assert by_address(moved.with_changes(upsert=[in_host]), "10.0.0.1") is None


def test_a_local_workload_has_the_three_names_and_is_on_the_node() -> None:
    here, there = workload("here", name="cart", node="a"), workload("there", name="cart", node="b")
    other = workload("other", name="cart", node="b", service_account="robot")
    snapshot = MeshSnapshot.build([here, there, other])
    assert snapshot.find_workload("shop", "cart", "default", "a") is here
    assert snapshot.find_workload("shop", "cart", "default", node="b") is there
    assert snapshot.find_workload("shop", "cart", "default", "c") is None
    assert snapshot.find_workload("shop", "cart", "default") is here
    assert snapshot.find_workload("shop", "cart", "robot") is other
    assert snapshot.find_workload("else", "cart", "default") is None
    assert snapshot.find_workload("shop", "shopping", "default") is None
    assert snapshot.workloads_on_node("a") == (here,)
    assert snapshot.workloads_on_node("b") == (other, there)
    assert snapshot.workloads_on_node("c") == ()
    assert snapshot.workloads_on_node(None) == (here, other, there)
    moved = snapshot.with_changes(upsert=[replace(here, node="c")])
    assert moved.workloads_on_node("a") == ()
    assert moved.find_workload("shop", "cart", "default", "c") == moved.workloads["here"]


def test_a_workload_that_is_known_by_its_name_only() -> None:
    snapshot = MeshSnapshot.build([workload("a", hostname="DB.example.com."), workload("b", "10.0.0.1")])
    assert snapshot.workload_by_hostname("shop", "db.example.com") is snapshot.workloads["a"]
    assert snapshot.workload_by_hostname("shop", "db.Example.com.") is snapshot.workloads["a"]
    assert snapshot.workload_by_hostname("else", "db.example.com") is None
    assert snapshot.workload_by_hostname("shop", "") is None


def test_a_workload_that_is_replaced_leaves_nothing_behind() -> None:
    before = workload("w", "10.0.0.1", hostname="old", node="a", endpoint_of={"shop/c": {80: 1}})
    after = workload("w", "10.0.0.2", name="new", hostname="new", node="b", endpoint_of={"shop/d": {80: 2}})
    snapshot = MeshSnapshot.build([before], [service("shop/c"), service("shop/d")]).with_changes(upsert=[after])
    assert by_address(snapshot, "10.0.0.1") is None
    assert by_address(snapshot, "10.0.0.2") == "w"
    assert snapshot.find_workload("shop", "w", "default") is None
    assert snapshot.workload_by_hostname("shop", "old") is None
    assert snapshot.workloads_on_node("a") == ()
    assert snapshot.endpoints(name("shop/c")) == {}
    assert snapshot.endpoints(name("shop/d")) == {"w": ServiceEndpoint(workload_uid="w", ports={80: 2})}


# ---------------------------------------------------------------------------------------------------------- services

A, B = "10.96.0.1", "10.96.0.2"

WHICH_SERVICE: list[tuple[str, list[Any], str | None, str | None]] = [
    # what, services at 10.96.0.1 as seen, the client's namespace, which it means
    ("the only one", [service("n1/a", "/10.96.0.1")], "n9", "n1/a"),
    ("nobody's namespace", [service("n1/a", "/10.96.0.1")], None, "n1/a"),
    ("own namespace", [service("n1/a", "/10.96.0.1"), service("n2/a", "/10.96.0.1")], "n2", "n2/a"),
    ("first seen", [service("n2/a", "/10.96.0.1"), service("n1/a", "/10.96.0.1")], "n9", "n2/a"),
    ("canonical", [service("n1/a", "/10.96.0.1"), service("n2/a", "/10.96.0.1", **CANONICAL)], "n9", "n2/a"),
    (
        "own before canonical",
        [service("n1/a", "/10.96.0.1"), service("n2/a", "/10.96.0.1", **CANONICAL)],
        "n1",
        "n1/a",
    ),
    (
        "canonical in the own namespace",
        [service("n1/a", "/10.96.0.1"), service("n1/b", "/10.96.0.1", **CANONICAL)],
        "n1",
        "n1/b",
    ),
    (
        "first of canonical ones",
        [service(f"n{i}/a", "/10.96.0.1", **({} if i == 1 else CANONICAL)) for i in (1, 3, 2)],
        "n9",
        "n3/a",
    ),
    ("private, seen from elsewhere", [service("n1/a", "/10.96.0.1", **PRIVATE)], "n2", None),
    ("private, seen from nowhere", [service("n1/a", "/10.96.0.1", **PRIVATE)], None, None),
    ("private, seen at home", [service("n1/a", "/10.96.0.1", **PRIVATE)], "n1", "n1/a"),
    (
        "private and canonical, seen from elsewhere",
        [service("n1/a", "/10.96.0.1", **PRIVATE, **CANONICAL), service("n2/a", "/10.96.0.1")],
        "n9",
        "n2/a",
    ),
    ("another network", [service("n1/a", "remote/10.96.0.1")], "n1", None),
    ("another address", [service("n1/a", "/10.96.0.2")], "n1", None),
    ("a range", [service("n1/a", "/10.96.0.0/24")], "n9", "n1/a"),
    ("the end of a range", [service("n1/a", "/10.96.0.0/31")], "n9", "n1/a"),
    ("beside a range", [service("n1/a", "/10.96.0.2/31")], "n9", None),
    ("everything", [service("n1/a", "/0.0.0.0/0")], "n9", "n1/a"),
    ("everything of the other family", [service("n1/a", "/::/0")], "n9", None),
    ("a range of one", [service("n1/a", "/10.96.0.1/32")], "n9", "n1/a"),
    ("a range in another network", [service("n1/a", "remote/10.96.0.0/24")], "n1", None),
    ("longest prefix", [service("n1/a", "/10.96.0.0/16"), service("n2/a", "/10.96.0.0/24")], "n9", "n2/a"),
    (
        "longest prefix before canonical",
        [service("n1/a", "/10.96.0.0/16", **CANONICAL), service("n2/a", "/10.96.0.0/24")],
        "n9",
        "n2/a",
    ),
    (
        "own namespace before longest prefix",
        [service("n1/a", "/10.96.0.0/16"), service("n2/a", "/10.96.0.0/24", **CANONICAL)],
        "n1",
        "n1/a",
    ),
    (
        "canonical of equal prefixes",
        [service("n1/a", "/10.96.0.0/24"), service("n2/a", "/10.96.0.0/24", **CANONICAL)],
        "n9",
        "n2/a",
    ),
    (
        "first seen of equal prefixes",
        [service("n2/a", "/10.96.0.0/24"), service("n1/a", "/10.96.0.0/24")],
        "n9",
        "n2/a",
    ),
    (
        "an exact VIP before a range, even of the own namespace",
        [service("n1/a", "/10.96.0.0/24", **CANONICAL), service("n2/a", "/10.96.0.1")],
        "n1",
        "n2/a",
    ),
    (
        "a range, when the exact VIP is not visible",
        [service("n1/a", "/10.96.0.0/24"), service("n2/a", "/10.96.0.1", **PRIVATE)],
        "n1",
        "n1/a",
    ),
    (
        "a shorter prefix, when the longer one is not visible",
        [service("n1/a", "/10.96.0.0/16"), service("n2/a", "/10.96.0.0/24", **PRIVATE)],
        "n1",
        "n1/a",
    ),
    (
        "several ranges of one service",
        [service("n1/a", "/10.0.0.0/16", "/10.96.0.0/24"), service("n2/a", "/10.96.0.0/23")],
        "n9",
        "n1/a",
    ),
]


@pytest.mark.parametrize(
    ("services", "client", "meant"), [row[1:] for row in WHICH_SERVICE], ids=[row[0] for row in WHICH_SERVICE]
)
def test_which_service_a_client_means_by_an_address(services: list[Any], client: str | None, meant: str | None) -> None:
    assert by_vip(MeshSnapshot.build(services=services), A, client) == meant


# The same rows for services of one name, where they are about exact VIPs. A namespace has one service of a name.
BY_NAME = [
    row
    for row in WHICH_SERVICE
    if all(len(each.vips) == 1 and str(each.vips[0]) == f"/{A}" for each in row[1])
    and len({each.namespace for each in row[1]}) == len(row[1])
]


@pytest.mark.parametrize(("services", "client", "meant"), [row[1:] for row in BY_NAME], ids=[row[0] for row in BY_NAME])
def test_which_service_a_client_means_by_a_host_name(
    services: list[Any], client: str | None, meant: str | None
) -> None:
    snapshot = MeshSnapshot.build(services=[replace(each, hostname="shop.example.com") for each in services])
    found = snapshot.service_by_hostname("shop.example.com", client)
    assert (None if found is None else found.namespace) == (None if meant is None else meant.partition("/")[0])


def test_all_services_with_an_address_or_a_name_whoever_sees_them() -> None:
    snapshot = MeshSnapshot.build(
        services=[
            service("n1/a", "/10.96.0.0/16", **PRIVATE),
            service("n2/a", "/10.96.0.0/24", "/10.96.0.1"),
            service("n3/a", "/10.96.0.1", **PRIVATE),
            service("n4/b", "remote/10.96.0.1"),
        ]
    )
    found = snapshot.services_by_vip("", ip_address("10.96.0.1"))
    assert [each.namespace for each in found] == ["n2", "n3", "n1"]
    assert [each.namespace for each in snapshot.services_by_vip("", ip_address("10.96.1.1"))] == ["n1"]
    assert snapshot.services_by_vip("remote", ip_address("10.96.1.1")) == ()
    host = snapshot.services[name("n1/a")].hostname
    assert [each.namespace for each in snapshot.services_by_hostname(host.upper())] == ["n1", "n2", "n3"]
    assert snapshot.services_by_hostname("nobody") == ()


def test_ranges_of_ipv6() -> None:
    snapshot = MeshSnapshot.build(
        services=[service("n1/a", "/2001:db8::/32"), service("n1/b", "/2001:db8:1::/48"), service("n1/c", "/::/0")]
    )
    assert by_vip(snapshot, "2001:db8:1::1", "n9") == "n1/b"
    assert by_vip(snapshot, "2001:db8:2::1", "n9") == "n1/a"
    assert by_vip(snapshot, "2001:db9::1", "n9") == "n1/c"
    assert by_vip(snapshot, "32.1.13.184", "n9") is None


def test_host_names_have_no_case_and_the_final_dot_does_not_count() -> None:
    snapshot = MeshSnapshot.build(services=[service("n1/Cart.example.com.")])
    for spelling in ("cart.example.com", "CART.example.com.", "Cart.example.com"):
        found = snapshot.service_by_hostname(spelling, "n1")
        assert found is not None
    assert snapshot.service_by_hostname("art.example.com", "n1") is None
    # The name as a key is exactly what was written.
    assert snapshot.service(name("n1/Cart.example.com.")) is found
    assert snapshot.service(name("n1/cart.example.com")) is None


def test_first_seen_survives_a_replacement_and_ends_with_a_removal() -> None:
    first, second = service("n1/a", f"/{A}"), service("n2/a", f"/{A}")
    snapshot = MeshSnapshot.build(services=[first, second])
    replaced = snapshot.with_changes(upsert=[replace(first, ports={81: 81})])
    assert by_vip(replaced, A, "n9") == "n1/a"
    both = snapshot.with_changes(upsert=[replace(first, ports={81: 81})], remove_services=[first.key])
    assert by_vip(both, A, "n9") == "n1/a"
    again = snapshot.with_changes(remove_services=[first.key]).with_changes(upsert=[first])
    assert by_vip(again, A, "n9") == "n2/a"
    assert list(again.services) == [second.key, first.key]


def test_a_service_that_is_replaced_or_removed_leaves_nothing_behind() -> None:
    old = service("n1/a", f"/{A}", "/10.97.0.0/16", endpoints={"w": ServiceEndpoint(workload_uid="w")})
    new = service("n1/a", f"/{B}", "/10.98.0.0/17")
    before = MeshSnapshot.build([workload("w")], [old])
    assert before.services_of(before.workloads["w"]) == (old,)
    after = before.with_changes(upsert=[new])
    assert [by_vip(after, ip, "n1") for ip in (A, "10.97.0.1", B, "10.98.0.1")] == [None, None, "n1/a", "n1/a"]
    assert after.endpoints(new) == {}
    assert after.services_of(after.workloads["w"]) == ()
    gone = before.with_changes(remove_services=[old.key])
    assert [by_vip(gone, ip, "n1") for ip in (A, "10.97.0.1")] == [None, None]
    assert gone.service(old.key) is gone.service_by_hostname("a", "n1") is None
    assert gone.endpoints(old) == gone.staged_endpoints == {}
    # The snapshot before still says what it said.
    assert [by_vip(before, ip, "n1") for ip in (A, "10.97.0.1", B)] == ["n1/a", "n1/a", None]


# --------------------------------------------------------------------------------------------------------- endpoints

CART = {"shop/cart": {80: 8080}}
IN_CART = ServiceEndpoint(workload_uid="w", ports={80: 8080})


def test_endpoints_come_from_workloads_in_whatever_order() -> None:
    cart, one = service("shop/cart"), workload("w", endpoint_of=CART)
    staged = MeshSnapshot.build([one])
    assert staged.endpoints(cart) == {}
    assert staged.staged_endpoints == {cart.key: {"w": IN_CART}}
    assert staged.services_of(one) == ()
    for snapshot in (
        staged.with_changes(upsert=[cart]),
        MeshSnapshot.build(services=[cart]).with_changes(upsert=[one]),
        MeshSnapshot.build([one], [cart]),
    ):
        assert snapshot.endpoints(cart) == snapshot.endpoints(cart.key) == {"w": IN_CART}
        assert snapshot.staged_endpoints == {}
        assert snapshot.services_of(one) == (cart,)
    # What workloads say holds for as long as they say it, whatever happens to the service.
    without = snapshot.with_changes(remove_services=[cart.key])
    assert without.staged_endpoints == {cart.key: {"w": IN_CART}}
    assert without.with_changes(upsert=[cart]).endpoints(cart) == {"w": IN_CART}


def test_a_workload_takes_its_endpoints_along() -> None:
    cart, stock = service("shop/cart"), service("shop/stock")
    both = workload("w", endpoint_of={**CART, "shop/stock": {90: 9090}})
    snapshot = MeshSnapshot.build([both, workload("v", endpoint_of=CART)], [stock, cart])
    assert snapshot.endpoints(cart).keys() == {"v", "w"}
    assert snapshot.services_of(both) == (stock, cart)  # as they were first seen
    gone = snapshot.with_changes(remove_workloads=["w"])
    assert gone.endpoints(cart).keys() == {"v"}
    assert gone.endpoints(stock) == {}
    fewer = snapshot.with_changes(upsert=[replace(both, services={})])
    assert fewer.endpoints(cart).keys() == {"v"}


def test_a_service_that_is_replaced_keeps_its_endpoints() -> None:
    cart = service("shop/cart")
    snapshot = MeshSnapshot.build([workload("w", endpoint_of=CART)], [cart])
    changed = snapshot.with_changes(upsert=[replace(cart, ports={80: 1, 81: 2})])
    assert changed.endpoints(cart) == {"w": IN_CART}


def test_unhealthy_endpoints_are_used_only_where_all_are() -> None:
    cart, all_of = service("shop/cart"), service("shop/cart", **ALLOW_ALL)
    one, other = workload("w", endpoint_of=CART), workload("v", endpoint_of=CART)
    ill = replace(one, **UNHEALTHY)
    ill_in_cart = replace(IN_CART, **UNHEALTHY)
    snapshot = MeshSnapshot.build([one, other], [cart])
    assert snapshot.endpoints(cart).keys() == {"v", "w"}
    fell_ill = snapshot.with_changes(upsert=[ill])
    assert fell_ill.endpoints(cart).keys() == {"v"}
    assert fell_ill.services_of(ill) == (cart,)
    assert fell_ill.with_changes(upsert=[one]).endpoints(cart).keys() == {"v", "w"}
    # Another health policy is another choice among the same workloads, and back.
    anybody = fell_ill.with_changes(upsert=[all_of])
    assert anybody.endpoints(cart)["w"] == ill_in_cart
    assert anybody.with_changes(upsert=[cart]).endpoints(cart).keys() == {"v"}
    assert anybody.with_changes(remove_workloads=["w"]).endpoints(cart).keys() == {"v"}
    # Staged ones are not chosen from yet.
    staged = MeshSnapshot.build([ill, other])
    assert staged.staged_endpoints[cart.key].keys() == {"v", "w"}
    assert staged.with_changes(upsert=[cart]).endpoints(cart).keys() == {"v"}
    assert staged.with_changes(upsert=[all_of]).endpoints(cart).keys() == {"v", "w"}


def test_endpoints_that_are_written_at_the_service() -> None:
    written = {
        uid: ServiceEndpoint(workload_uid=uid, ports={80: 1}, **fields)
        for uid, fields in {"w": {}, "v": {}, "ill": UNHEALTHY, "unknown": {}}.items()
    }
    cart = service("shop/cart", endpoints=written)
    one = workload("w", endpoint_of=CART)
    other = workload("v", endpoint_of=CART, **UNHEALTHY)
    snapshot = MeshSnapshot.build([one, other, workload("ill")], [cart])
    # What a workload says of itself counts more.
    assert snapshot.endpoints(cart) == {"w": IN_CART, "unknown": written["unknown"]}
    anybody = snapshot.with_changes(upsert=[replace(cart, **ALLOW_ALL)])
    assert anybody.endpoints(cart) == {
        **written,
        "w": IN_CART,
        "v": replace(IN_CART, workload_uid="v", **UNHEALTHY),
    }
    assert snapshot.services_of(workload("ill")) == (cart,)
    assert snapshot.with_changes(remove_workloads=["w"]).endpoints(cart)["w"] == written["w"]


# ----------------------------------------------------------------------------------------------------------- changes


def test_what_did_not_change_is_the_same_object() -> None:
    one, cart, deny = workload("w", "10.0.0.1", endpoint_of=CART), service("shop/cart", f"/{A}"), policy("shop/deny")
    snapshot = MeshSnapshot.build([one], [cart], [deny])
    snapshot.memo["derived"] = 1
    assert snapshot.with_changes() is snapshot
    same = [workload("w", "10.0.0.1", endpoint_of=CART), service("shop/cart", f"/{A}"), policy("shop/deny")]
    assert same[0] is not one
    assert snapshot.with_changes(upsert=same) is snapshot
    assert (
        snapshot.with_changes(remove_workloads=["?"], remove_services=[name("?/?")], remove_policies=["?"]) is snapshot
    )
    cases = [
        ({"upsert": [replace(one, node="b"), *same[1:]]}, "workloads"),
        ({"upsert": [replace(cart, canonical=True)]}, "services"),
        ({"upsert": [replace(deny, dry_run=True)]}, "policies"),
        ({"remove_workloads": ["w"]}, "workloads"),
        ({"remove_services": [cart.key]}, "services"),
        ({"remove_policies": ["shop/deny"]}, "policies"),
    ]
    for changes, what in cases:
        changed = snapshot.with_changes(**changes)
        assert changed is not snapshot
        assert changed.memo == {}
        for each in ("workloads", "services", "policies"):
            assert (getattr(changed, each) is getattr(snapshot, each)) == (each != what)
    assert snapshot.memo == {"derived": 1}


def test_policies_are_known_by_their_names() -> None:
    deny, other = policy("shop/deny"), policy("else/deny")
    snapshot = MeshSnapshot.build(policies=[deny, other])
    assert snapshot.policies == {"shop/deny": deny, "else/deny": other}
    changed = snapshot.with_changes(upsert=[replace(deny, dry_run=True)], remove_policies=["else/deny"])
    assert changed.policies == {"shop/deny": replace(deny, dry_run=True)}


def test_of_two_with_one_name_the_last_counts() -> None:
    snapshot = MeshSnapshot.build(
        [workload("w", "10.0.0.1"), workload("w", "10.0.0.2")],
        [service("n1/a", f"/{A}"), service("n1/a", f"/{B}")],
        [policy("shop/deny"), policy("shop/deny", dry_run=True)],
    )
    assert [by_address(snapshot, ip) for ip in ("10.0.0.1", "10.0.0.2")] == [None, "w"]
    assert [by_vip(snapshot, ip, "n1") for ip in (A, B)] == [None, "n1/a"]
    assert snapshot.policies["shop/deny"].dry_run


def test_replaced_by_is_a_build_that_shares_what_is_equal() -> None:
    one, other = workload("w", "10.0.0.1"), workload("v", "10.0.0.2")
    a, b, c = (service(f"n{i}/a", f"/{A}") for i in (1, 2, 3))
    deny = policy("shop/deny")
    snapshot = MeshSnapshot.build([one, other], [a, b], [deny])

    def fresh() -> tuple[Any, ...]:
        return workload("w", "10.0.0.1"), service("n1/a", f"/{A}"), service("n2/a", f"/{A}"), policy("shop/deny")

    one2, a2, b2, deny2 = fresh()
    assert snapshot.replaced_by([other, one2], [a2, b2], [deny2]) is snapshot
    fewer = snapshot.replaced_by([one2], [a2, b2], [deny2])
    assert list(fewer.workloads.values()) == [one]
    assert fewer.workloads["w"] is one
    assert fewer.services is snapshot.services
    assert fewer.policies is snapshot.policies
    appended = snapshot.replaced_by([one2, other], [a2, b2, c], [])
    assert by_vip(appended, A, "n9") == "n1/a"
    assert appended.services[a.key] is a
    assert dict(appended.policies) == {}
    # The order of a file says who is seen first.
    for order, first in (([b2, a2], "n2/a"), ([c, a2, b2], "n3/a"), ([b2, c], "n2/a"), ([], None)):
        reordered = snapshot.replaced_by([one2, other], order, [deny2])
        assert by_vip(reordered, A, "n9") == first
        assert list(reordered.services) == [each.key for each in order]
        assert reordered.workloads is snapshot.workloads
        assert all(each is snapshot.services.get(key, each) for key, each in reordered.services.items())


def test_nobody_changes_a_snapshot() -> None:
    snapshot = MeshSnapshot.build([workload("w", endpoint_of=CART)], [service("shop/cart")], [policy("shop/deny")])
    mappings: list[Any] = [
        snapshot.workloads,
        snapshot.services,
        snapshot.policies,
        snapshot.endpoints(name("shop/cart")),
    ]
    for mapping in mappings:
        with pytest.raises(TypeError):
            mapping["w"] = None
    for attribute in ("workloads", "services", "policies", "anything"):
        with pytest.raises(AttributeError):
            setattr(snapshot, attribute, {})
    assert repr(snapshot) == "<MeshSnapshot: 1 workloads, 1 services, 1 policies>"


# ------------------------------------------------------------------------------------------------------------- scale


def large(workloads: int, services: int) -> MeshSnapshot:
    return MeshSnapshot.build(
        [
            workload(
                f"c//Pod/n{i % 50}/w{i}",
                str(ip_address(0x0A000000 + i)),
                namespace=f"n{i % 50}",
                node=f"node{i % 20}",
                hostname=f"w{i}",
                endpoint_of={f"n{i % services}/s{i % services}": {80: 8080}},
            )
            for i in range(workloads)
        ],
        # One VIP of its own each; one VIP, one range and one name that all of them share.
        [
            service(f"n{i}/s{i}", f"/{ip_address(0x0A600000 + i)}", "/10.97.0.1", "/10.98.0.0/16")
            for i in range(services)
        ]
        + [service(f"n{i}/shared", canonical=i % 2 == 0) for i in range(services)],
    )


def steps(call: Callable[[], object]) -> int:
    """How many calls of functions it makes, in Python and in C: what a clock would say without its noise."""
    count = 0

    def hear(_frame: object, event: str, _arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    gc.disable()  # others may have something called at each collection
    sys.setprofile(hear)
    try:
        call()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def test_look_ups_take_no_more_steps_in_a_large_mesh() -> None:
    def costs(snapshot: MeshSnapshot) -> list[int]:
        some = next(iter(snapshot.services.values()))
        one = next(iter(snapshot.workloads.values()))
        calls: list[Callable[[], object]] = [
            lambda: snapshot.workload_by_address("", ip_address("10.0.0.7")),
            lambda: snapshot.find_workload("n7", "w7", "default", "node7"),
            lambda: snapshot.workload_by_hostname("n7", "w7"),
            lambda: snapshot.service_by_vip("", ip_address("10.96.0.7"), "n7"),
            lambda: snapshot.service_by_vip("", ip_address("10.97.0.1"), "n7"),
            lambda: snapshot.service_by_vip("", ip_address("10.97.0.1"), "elsewhere"),
            lambda: snapshot.service_by_vip("", ip_address("10.98.0.1"), "elsewhere"),
            lambda: snapshot.service_by_hostname("shared", "n7"),
            lambda: snapshot.service_by_hostname("shared", "elsewhere"),
            lambda: snapshot.endpoints(some),
            lambda: snapshot.services_of(one),
        ]
        for call in calls:
            assert call()
            call()
        return [steps(call) for call in calls]

    assert costs(large(100, 20)) == costs(large(4_000, 400))


def test_a_change_takes_no_more_steps_in_a_large_mesh() -> None:
    def costs(snapshot: MeshSnapshot) -> list[int]:
        one = snapshot.workloads["c//Pod/n7/w7"]
        some = snapshot.services[name("n7/s7")]
        changes: list[dict[str, Any]] = [
            {"upsert": [replace(one, **UNHEALTHY)]},
            {"upsert": [replace(one, addresses=(ip_address("10.1.2.3"),))]},
            {"upsert": [replace(some, vips=some.vips[:1], cidr_vips=(), canonical=True)]},
            {"upsert": [policy("shop/deny")]},
            {"remove_workloads": [one.uid]},
        ]
        return [steps(lambda change=change: snapshot.with_changes(**change)) for change in changes]

    small, big = costs(large(100, 20)), costs(large(4_000, 20))
    assert small == big
