"""A router answers what the function answers, whatever it remembers; it remembers enough, and not too much."""

from __future__ import annotations

import gc
import random
import sys
import weakref
from dataclasses import replace
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.routes import (
    HBONE,
    PASSTHROUGH,
    PRIVATE,
    TD,
    UNHEALTHY,
    balancer,
    client,
    gateway,
    mesh,
    service,
    workload,
)

from hbone import Authority
from hbone.mesh import Locality, MeshSnapshot, ServiceEndpoint, WeightedGateway, Workload
from hbone.routing import OutboundRoute, Router, RoutingConfig, _router, route_outbound

if TYPE_CHECKING:
    from collections.abc import Callable

    from hbone.routing import NoOutboundRoute

SVC = "shop/stock.example"
VIP = Authority("10.96.0.1", 80)
CLIENT = "lab//Pod/shop/cart-0"
CONFIG = RoutingConfig()


def endpoint(number: int, **fields: Any) -> Workload:
    return workload(
        f"lab//stock-{number}",
        f"10.1.{number // 250}.{number % 250}",
        **{"endpoint_of": {SVC: {80: 8080}}, **HBONE, **fields},
    )


def world(count: int, **fields: Any) -> MeshSnapshot:
    return mesh(*(endpoint(number) for number in range(count)), service(SVC, "/10.96.0.1", **fields))


def ask(
    router: Router, snapshot: MeshSnapshot, target: Authority = VIP, source: str = CLIENT
) -> OutboundRoute | NoOutboundRoute:
    return router.outbound(snapshot, snapshot.workloads[source], None, target)


# ----------------------------------------------------------------------------------- the same answers, whatever happens

UIDS = [f"lab//w-{number}" for number in range(5)]
IPS = [f"10.0.1.{number}" for number in range(5)]
SERVICES = ["shop/a.example", "shop/b.example", "other/a.example"]
VIPS = ["10.96.0.1", "10.96.0.2"]
networks = st.sampled_from(["", "", "far"])
gateways = st.sampled_from([f"/{IPS[0]}", f"/{VIPS[1]}", SERVICES[1], f"far/{IPS[1]}", "shop/gone.example"]).map(
    gateway
)
ports = st.dictionaries(st.sampled_from([80, 15008]), st.sampled_from([0, 8080, 15008]), max_size=2)

workloads = st.builds(
    workload,
    st.sampled_from(UIDS),
    st.sampled_from(IPS),
    endpoint_of=st.dictionaries(st.sampled_from(SERVICES), ports, max_size=2),
    network=networks,
    waypoint=st.none() | gateways,
    network_gateway=st.none() | gateways,
    capacity=st.sampled_from([1, 1, 3, 0]),
    locality=st.sampled_from([Locality(), Locality(region="r")]),
    hostname=st.sampled_from(["", "vm.example"]),
    status=st.sampled_from([UNHEALTHY["status"], *[client().status] * 3]),
    protocol=st.sampled_from([HBONE["protocol"], HBONE["protocol"].TCP]),
)
BALANCERS = [
    None,
    *(
        fields["load_balancer"]
        for fields in (PASSTHROUGH, balancer("Failover", "Region"), balancer("Strict", "Network"))
    ),
]
services = st.builds(
    service,
    st.sampled_from(SERVICES),
    st.sampled_from([f"/{VIPS[0]}", f"/{VIPS[1]}", "/10.96.0.0/24", f"far/{VIPS[0]}"]),
    ports=ports,
    waypoint=st.none() | gateways,
    weighted_waypoints=st.lists(
        st.builds(WeightedGateway, destination=gateways, weight=st.sampled_from([0, 1, 2])), max_size=2
    ).map(tuple),
    subject_alt_names=st.sampled_from([(), (f"{TD}/shop/sa/stock", "no id")]),
    load_balancer=st.sampled_from(BALANCERS),
    visibility=st.sampled_from([PRIVATE["visibility"], PRIVATE["visibility"].PUBLIC]),
    endpoints=st.dictionaries(st.sampled_from(UIDS), st.none(), max_size=1).map(
        lambda uids: {uid: ServiceEndpoint(workload_uid=uid) for uid in uids}
    ),
)
changes = st.lists(
    st.tuples(
        st.lists(workloads | services, max_size=4),
        st.lists(st.sampled_from(UIDS), max_size=1),
        st.lists(st.sampled_from(SERVICES), max_size=1),
    ),
    min_size=1,
    max_size=4,
)
TARGETS = [Authority(host, port) for host in (*VIPS, *IPS[:2], "a.example", "vm.example") for port in (80, 81)]


class Draws:
    """Random numbers that can be had again."""

    def start(self, numbers: list[float]) -> None:
        self.numbers = numbers
        self._remaining = iter(numbers)

    def __call__(self) -> float:
        return next(self._remaining, 0.0)


@settings(max_examples=25, deadline=None)
@given(st.lists(workloads | services, max_size=12), changes, st.randoms(use_true_random=False))
def test_a_router_answers_what_the_function_answers(
    parts: list[Any], history: list[Any], chance: random.Random
) -> None:
    draws = Draws()
    router = Router(CONFIG, draws)
    snapshot = mesh(*parts, client())
    waypoint_ip = ip_address(IPS[0])
    for upsert, gone, gone_services in [([], [], []), *history]:
        snapshot = snapshot.with_changes(
            upsert=upsert,
            remove_workloads=gone,
            remove_services=[service(key).key for key in gone_services],
        )
        for source in (snapshot.workloads[CLIENT], *list(snapshot.workloads.values())[:2]):
            for target in TARGETS:
                for source_ip in (None, waypoint_ip):
                    draws.start([chance.random() for _ in range(3)])
                    wanted = route_outbound(
                        snapshot, CONFIG, source=source, source_ip=source_ip, target=target, random=draws
                    )
                    draws.start(draws.numbers)
                    assert router.outbound(snapshot, source, source_ip, target) == wanted


def test_clients_of_one_uid_are_told_apart() -> None:
    """The mesh may know a client anew: another network, another namespace, and the answer is another."""
    snapshot = world(1, **PRIVATE)
    router = Router(CONFIG, random.random)
    here, elsewhere = client(), client(namespace="other")
    for source, says in ((here, "10.1.0.0:8080 using HBONE"), (elsewhere, "10.96.0.1:80 using TCP")) * 2:
        assert str(router.outbound(snapshot, source, None, VIP)).startswith(says)


# ------------------------------------------------------------------------------------------------------------ remembers


def calls(work: Callable[[], object]) -> int:
    """How many calls of functions it takes, of Python's and of C's."""
    count = 0

    def profile(frame: object, event: str, arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    previous = sys.getprofile()
    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(previous)
    return count


def test_a_repeated_decision_takes_no_more_steps_with_many_endpoints() -> None:
    counts = []
    for size in (2, 10, 1000):
        snapshot, router = world(size), Router(CONFIG, lambda: 0.5)
        ask(router, snapshot)
        counts.append(calls(lambda snapshot=snapshot, router=router: ask(router, snapshot)))  # type: ignore[misc]
    assert len(set(counts)) == 1
    assert counts[0] < 25


def test_a_decision_after_a_change_elsewhere_takes_no_more_steps_with_many_endpoints() -> None:
    counts = []
    for size in (2, 10, 1000):
        before, router = world(size), Router(CONFIG, lambda: 0.5)
        ask(router, before)
        after = before.with_changes(upsert=[workload("lab//else", "10.0.3.1")])
        counts.append(calls(lambda after=after, router=router: ask(router, after)))  # type: ignore[misc]
    assert len(set(counts)) == 1


def test_the_same_route_is_the_same_object() -> None:
    snapshot, router = world(1), Router(CONFIG, random.random)
    assert ask(router, snapshot) is ask(router, snapshot)
    other = workload("lab//Pod/shop/cart-1", "10.0.0.2", **HBONE)
    snapshot = snapshot.with_changes(upsert=[other])
    assert ask(router, snapshot) is ask(router, snapshot, source=other.uid), "clients that are alike share it"


@pytest.mark.parametrize(
    ("change", "remains"),
    [
        ([workload("lab//else", "10.0.3.1")], True),
        ([service("shop/else.example", "/10.96.0.9")], True),
        ([endpoint(0, capacity=0)], False),
        ([endpoint(0, **UNHEALTHY)], False),
        ([endpoint(5)], False),
        ([service(SVC, "/10.96.0.1", ports={80: 9090})], False),
    ],
    ids=["another workload", "another service", "capacity", "health", "a new endpoint", "the service"],
)
def test_what_is_taken_over_from_the_snapshot_before(change: list[Any], remains: bool) -> None:
    before, router = world(3), Router(CONFIG, random.random)
    ask(router, before)
    (old,) = router._latest.values()
    after = before.with_changes(upsert=change)
    assert (len(old.still_true(after)) == 1) is remains
    assert len(old.still_true(after.with_changes(remove_services=[service(SVC).key]))) == 0


def test_nothing_is_taken_over_of_endpoints_that_are_written_at_the_service() -> None:
    stock = service(SVC, "/10.96.0.1", endpoints={"lab//x": ServiceEndpoint(workload_uid="lab//x")})
    before, router = mesh(stock, workload("lab//x", "10.0.1.1", **HBONE)), Router(CONFIG, random.random)
    assert str(ask(router, before)).startswith("10.0.1.1:8080")
    after = before.with_changes(upsert=[workload("lab//x", "10.0.1.2", **HBONE)])
    assert str(ask(router, after)).startswith("10.0.1.2:8080")


# --------------------------------------------------------------------------------------------------------- not too much


def test_a_snapshot_goes_as_soon_as_nobody_has_it() -> None:
    """Without the garbage collector: with ten thousand workloads, waiting for it would be felt."""

    class Canary:
        pass

    canary = Canary()
    gone = weakref.ref(canary)
    waypoint = workload("lab//wp", "10.0.9.1", **HBONE)
    snapshot = mesh(
        waypoint,
        *(endpoint(number, waypoint=gateway("/10.0.9.1")) for number in range(3)),
        service(SVC, "/10.96.0.1"),
        service("shop/guarded.example", "/10.96.0.2", waypoint=gateway("/10.0.9.1")),
    )
    snapshot.memo["canary"] = canary
    del canary
    router = Router(CONFIG, random.random)
    for target in ("10.96.0.1:80", "10.96.0.2:80", "10.1.0.0:80", "stock.example:80", "192.0.2.1:80"):
        ask(router, snapshot, Authority.parse(target))
    gc.disable()
    try:
        del snapshot
        assert gone() is None
    finally:
        gc.enable()


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_router, "_MAX_PLANS", 50)
    snapshot, router = world(3), Router(CONFIG, random.random)
    for port in range(1, 500):
        for host in ("10.96.0.1", "192.0.2.1", "stock.example"):
            ask(router, snapshot, Authority(host, port))
        memory = snapshot.memo[router]
        assert isinstance(memory, _router._Memory)
        assert sum(len(kept.plans) for kept in memory.by_likeness.values()) <= 50
        assert sum(len(kept.candidates) for kept in memory.by_likeness.values()) <= 50


def test_many_endpoints_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_router, "_MAX_BRANCHES", 100)
    ports = dict.fromkeys(range(1, 50), 8080)
    snapshot, router = world(40, ports=ports), Router(CONFIG, random.random)
    for port in ports:
        assert str(ask(router, snapshot, Authority("10.96.0.1", port))).endswith("type Direct")
        memory = snapshot.memo[router]
        assert isinstance(memory, _router._Memory)
        assert sum(len(kept.plans) for kept in memory.by_likeness.values()) <= 3


def test_two_routers_do_not_share() -> None:
    snapshot = world(1)
    near, far = Router(CONFIG, random.random), Router(RoutingConfig(hbone_port=16008), random.random)
    assert str(ask(near, snapshot)).endswith("via 10.1.0.0:15008 type Direct")
    assert str(ask(far, snapshot)).endswith("via 10.1.0.0:16008 type Direct")


def test_a_router_of_one_endpoint_draws_nothing() -> None:
    def never() -> float:
        raise AssertionError("nothing to draw")

    snapshot = world(1)
    assert str(ask(Router(CONFIG, never), snapshot)).endswith("type Direct")
    assert str(ask(Router(CONFIG, never), snapshot, Authority("192.0.2.1", 80))).endswith("type Passthrough")


def test_a_service_s_old_value_is_not_used() -> None:
    before, router = world(2), Router(CONFIG, lambda: 0.0)
    assert str(ask(router, before)).endswith("type Direct")
    stock = before.services[service(SVC).key]
    after = before.with_changes(upsert=[replace(stock, subject_alt_names=(f"{TD}/shop/sa/new",))])
    outcome = ask(router, after)
    assert isinstance(outcome, OutboundRoute)
    assert str(outcome.expected[0]) == f"{TD}/shop/sa/new"
    assert outcome.service is after.services[stock.key]
