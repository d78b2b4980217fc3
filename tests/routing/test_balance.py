"""Which endpoints a client may get, and how one is drawn: tables, and the laws that they all obey."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.routes import (
    CLIENT_IP,
    HBONE,
    UNHEALTHY,
    To,
    app_tunnel,
    balancer,
    client,
    decide,
    gateway,
    mesh,
    service,
    workload,
)

from hbone import Authority
from hbone.mesh import (
    HealthPolicy,
    HealthStatus,
    LoadBalancer,
    LoadBalancerMode,
    Locality,
    MeshSnapshot,
    RoutingPreference,
    ServiceEndpoint,
    Workload,
)
from hbone.routing import OutboundRoute, Rank, Router, RoutingConfig, explain_outbound, rank
from hbone.routing._balance import Weights, candidates

if TYPE_CHECKING:
    from collections.abc import Sequence

SVC = "shop/stock.example"
NEAR = ("Network", "Region", "Zone")


def at(place: str, **fields: Any) -> dict[str, Any]:
    """``network region zone subzone``, as far as given."""
    network, region, zone, subzone = [*place.split(), "", "", "", ""][:4]
    network = "" if network == "-" else network
    return {"network": network, "locality": Locality(region=region, zone=zone, subzone=subzone), **fields}


def endpoint(number: int, place: str = "-", ports: dict[int, int] | None = None, **fields: Any) -> Workload:
    return workload(
        f"lab//stock-{number}",
        f"10.0.1.{number}",
        endpoint_of={SVC: {80: 80} if ports is None else ports},
        **{**at(place), **HBONE, **fields},
    )


def choices(snapshot: MeshSnapshot, target: str = "10.96.0.1:80") -> dict[str, float]:
    """The name of each workload that the client may get, and its share."""
    explained = explain_outbound(
        snapshot,
        RoutingConfig(),
        source=snapshot.workloads["lab//Pod/shop/cart-0"],
        source_ip=None,
        target=Authority.parse(target),
    )
    assert sum(share for share, _ in explained.outcomes) == pytest.approx(1.0)
    return {
        outcome.workload.name: share
        for share, outcome in explained.outcomes
        if isinstance(outcome, OutboundRoute) and outcome.workload is not None
    }


# -------------------------------------------------------------------------------------------------------------- modes

PLACES = [
    endpoint(1, "n reg zone"),
    endpoint(2, "n reg other-zone"),
    endpoint(3, "not-n not-reg unmatched"),
    replace(endpoint(4, "n reg zone"), addresses=()),  # cannot be reached from anywhere
]
HERE, ALMOST, NOWHERE = "n reg zone", "n reg not-zone", "-"
STRICT, FAILOVER = ("Strict", *NEAR), ("Failover", *NEAR)

LOAD_BALANCE = [
    ("strict: no place", NOWHERE, STRICT, set()),
    ("strict: almost", ALMOST, STRICT, set()),
    ("strict: match", HERE, STRICT, {1}),
    ("strict: by region only", ALMOST, ("Strict", "Region"), {1, 2}),
    ("strict: nothing preferred", NOWHERE, ("Strict",), {1, 2, 3}),
    ("failover: no place, any", NOWHERE, FAILOVER, {1, 2, 3}),
    ("failover: almost, any that is close", ALMOST, FAILOVER, {1, 2}),
    ("failover: match", HERE, FAILOVER, {1}),
    ("failover: another network, the nearest there", "else reg zone", FAILOVER, {1}),
    ("failover: nothing preferred", HERE, ("Failover",), {1, 2, 3}),
    ("standard: all, whatever is preferred", HERE, ("Standard", *NEAR), {1, 2, 3}),
]


@pytest.mark.parametrize(
    ("place", "mode", "numbers"), [row[1:] for row in LOAD_BALANCE], ids=[row[0] for row in LOAD_BALANCE]
)
def test_load_balance(place: str, mode: tuple[str, ...], numbers: set[int]) -> None:
    stock = service(SVC, "/10.96.0.1", ports={80: 80}, **balancer(*mode))
    source = client(**at(place))
    found = candidates(mesh(*PLACES, stock, source=source), source, stock, 80)
    assert {each.workload_uid for each in found.endpoints} == {f"lab//stock-{number}" for number in numbers}


RANKS = [
    # preferences, what the client has in common with the endpoint, how many match, rank
    ("all", NEAR, ("n r z", "n r z"), 3, 5),
    ("network and region", NEAR, ("n r z", "n r y"), 2, 4),
    ("network only", NEAR, ("n r z", "n q z"), 1, 3),
    ("another network, all else", NEAR, ("n r z", "m r z"), 2, 2),
    ("another network, region", NEAR, ("n r z", "m r y"), 1, 1),
    ("another network, nothing", NEAR, ("n r z", "m q z"), 0, 0),
    ("a network that is not first: no bonus", ("Region", "Network"), ("n r", "n r"), 2, 2),
    ("a network that is not first: it ends there", ("Region", "Network", "Zone"), ("n r z", "m r z"), 1, 1),
    ("region, zone, subzone", ("Region", "Zone", "Subzone"), ("n r z s", "n r z s"), 3, 3),
    ("subzone without zone does not count", ("Region", "Zone", "Subzone"), ("n r z s", "n r y s"), 1, 1),
    ("network alone", ("Network",), ("n", "n"), 1, 1),
    ("network alone, another", ("Network",), ("n", "m"), 0, 0),
    ("nothing preferred", (), ("n r", "m q"), 0, 0),
    ("both nowhere is the same place", ("Region",), ("n", "n"), 1, 1),
]


@pytest.mark.parametrize(
    ("preferences", "places", "matched", "value"), [row[1:] for row in RANKS], ids=[row[0] for row in RANKS]
)
def test_ranks(preferences: tuple[str, ...], places: tuple[str, str], matched: int, value: int) -> None:
    wanted = tuple(map(RoutingPreference, preferences))
    own, other = client(**at(places[0])), endpoint(1, places[1])
    assert rank(wanted, own, other) == Rank(matched, value)


@pytest.mark.parametrize(
    ("preference", "fields"),
    [
        ("Node", {"node": "n1"}),
        ("Cluster", {"cluster_id": "c1"}),
        ("Network", {"network": "n1"}),
        ("Region", {"locality": Locality(region="r1")}),
        ("Zone", {"locality": Locality(zone="z1")}),
        ("Subzone", {"locality": Locality(subzone="s1")}),
    ],
)
def test_each_preference_has_its_own_field(preference: str, fields: dict[str, Any]) -> None:
    kind = RoutingPreference(preference)
    own = client(**fields)
    assert rank((kind,), own, replace(endpoint(1), **fields)) == Rank(1, 1)
    assert rank((kind,), own, endpoint(1)) == Rank(0, 0)


def test_strict_counts_before_the_bonus() -> None:
    """A leading network is worth as much as all the rest, but does not stand for the rest."""
    source, near = client(**at("n r z")), endpoint(1, "n r y")
    assert rank((RoutingPreference.NETWORK, RoutingPreference.ZONE), source, near) == Rank(1, 2)
    stock = service(SVC, "n/10.96.0.1", ports={80: 80}, **balancer("Strict", "Network", "Zone"))
    outcome = decide(mesh(stock, near, source=source), "10.96.0.1:80", config=RoutingConfig(network="n"))
    To(says="no healthy upstream: 10.96.0.1:80").check(outcome)


# ------------------------------------------------------------------------------------------------- who can be chosen

STOCK = service(SVC, "/10.96.0.1", ports={80: 8080})
NAMED = service(SVC, "/10.96.0.1", ports={80: 0})
ALL_HEALTH = {"load_balancer": LoadBalancer(health_policy=HealthPolicy.ALLOW_ALL)}

USABLE = [
    ("one", [STOCK, endpoint(1)], {"stock-1"}),
    ("several", [STOCK, endpoint(1), endpoint(2)], {"stock-1", "stock-2"}),
    ("an unhealthy one", [STOCK, endpoint(1), endpoint(2, **UNHEALTHY)], {"stock-1"}),
    (
        "an unhealthy one where all are taken",
        [replace(STOCK, **ALL_HEALTH), endpoint(1), endpoint(2, **UNHEALTHY)],
        {"stock-1", "stock-2"},
    ),
    ("capacity 0", [STOCK, endpoint(1), endpoint(2, capacity=0)], {"stock-1"}),
    ("capacity 0 alone", [STOCK, endpoint(2, capacity=0)], set()),
    (
        "capacity 0 does not keep others away by its rank",
        [replace(STOCK, **balancer("Failover", "Region")), endpoint(1, "- far"), endpoint(2, "-", capacity=0)],
        {"stock-1"},
    ),
    (
        "an endpoint written at the service, of an unknown workload",
        [replace(STOCK, endpoints={"x": ServiceEndpoint(workload_uid="x")}), endpoint(1)],
        {"stock-1"},
    ),
    (
        "an endpoint written at the service",
        [
            replace(STOCK, endpoints={"lab//x": ServiceEndpoint(workload_uid="lab//x", ports={80: 99})}),
            workload("lab//x", "10.0.2.1", **HBONE),
        ],
        {"x"},
    ),
    (
        "an unhealthy one written at the service",
        [
            replace(
                STOCK,
                endpoints={"lab//x": ServiceEndpoint(workload_uid="lab//x", status=HealthStatus.UNHEALTHY)},
            ),
            workload("lab//x", "10.0.2.1", **HBONE),
        ],
        set(),
    ),
    ("a named port that it has not", [NAMED, endpoint(1, ports={81: 8081})], set()),
    ("a named port", [NAMED, endpoint(1), endpoint(2, ports={})], {"stock-1"}),
    ("a named port, and an application tunnel", [NAMED, endpoint(1, ports={}, **app_tunnel())], set()),
    ("only a name", [STOCK, replace(endpoint(1), addresses=(), hostname="vm.example")], {"stock-1"}),
    ("neither address nor name", [STOCK, replace(endpoint(1), addresses=())], set()),
    (
        "neither, and a gateway of its own network",
        [STOCK, replace(endpoint(1), addresses=(), network_gateway=gateway("/10.22.1.1")), endpoint(2, capacity=0)],
        set(),
    ),
    (
        "neither, and no gateway of another network",
        [STOCK, replace(endpoint(1, "far"), addresses=())],
        set(),
    ),
]


@pytest.mark.parametrize(("parts", "names"), [row[1:] for row in USABLE], ids=[row[0] for row in USABLE])
def test_who_can_be_chosen(parts: list[Any], names: set[str]) -> None:
    snapshot = mesh(*parts)
    assert set(choices(snapshot)) == names
    if not names:
        To(says="no healthy upstream: 10.96.0.1:80").check(decide(snapshot, "10.96.0.1:80"))


PORTS = [
    # the service, the endpoint, the port, where it goes
    ("find_upstream_port_mappings: ep mapping", {80: 0}, endpoint(1, ports={80: 9090}), "10.0.1.1:9090"),
    ("find_upstream_port_mappings: svc mapping", {80: 8080}, endpoint(1, ports={}), "10.0.1.1:8080"),
    ("the endpoint's before the service's", {80: 8080}, endpoint(1, ports={80: 9090}), "10.0.1.1:9090"),
    ("another port of the endpoint's", {80: 8080}, endpoint(1, ports={81: 9090}), "10.0.1.1:8080"),
]


@pytest.mark.parametrize(("ports", "backend", "where"), [row[1:] for row in PORTS], ids=[row[0] for row in PORTS])
def test_target_ports(ports: dict[int, int], backend: Workload, where: str) -> None:
    snapshot = mesh(backend, service(SVC, "/10.96.0.1", ports=ports))
    To(says=f"{where} using HBONE via 10.0.1.1:15008 type Direct").check(decide(snapshot, "10.96.0.1:80"))


WAYPOINT_PORTS = [
    ("find_upstream_port_mappings: app tunnel", {15008: 0}, {}, app_tunnel(15088), 15008),
    ("app tunnel, and the service has not the port", {}, {}, app_tunnel(15088), 15008),
    ("app tunnel without port: the endpoint's", {}, {15008: 15108}, app_tunnel(None), 15108),
    ("app tunnel without port, and no port", {}, {}, app_tunnel(None), None),
    ("no app tunnel: the service's", {15008: 15208}, {}, {}, 15208),
    ("no app tunnel: the endpoint's", {15008: 15208}, {15008: 15108}, {}, 15108),
    ("no app tunnel: a named port", {15008: 0}, {15008: 15108}, {}, 15108),
    ("no app tunnel, a named port that it has not", {15008: 0}, {}, {}, None),
    ("no app tunnel, and the service has not the port", {}, {15008: 15108}, {}, None),
]


@pytest.mark.parametrize(
    ("of_service", "of_endpoint", "tunnel", "port"),
    [row[1:] for row in WAYPOINT_PORTS],
    ids=[r[0] for r in WAYPOINT_PORTS],
)
def test_target_ports_of_waypoints(
    of_service: dict[int, int], of_endpoint: dict[int, int], tunnel: dict[str, Any], port: int | None
) -> None:
    waypoint = workload("lab//wp", "10.0.9.1", endpoint_of={"shop/waypoint.example": of_endpoint}, **tunnel, **HBONE)
    snapshot = mesh(
        service(SVC, "/10.96.0.1", waypoint=gateway("shop/waypoint.example")),
        service("shop/waypoint.example", ports=of_service),
        waypoint,
    )
    says = f"10.96.0.1:80 using HBONE via 10.0.9.1:{port} type ToServerWaypoint" if port else "no healthy waypoint"
    To(says=says).check(decide(snapshot, "10.96.0.1:80"))


# --------------------------------------------------------------------------------------------------------------- draws


def test_shares_follow_capacity() -> None:
    snapshot = mesh(STOCK, endpoint(1, capacity=1), endpoint(2, capacity=3), endpoint(3, capacity=0))
    assert choices(snapshot) == {"stock-1": pytest.approx(0.25), "stock-2": pytest.approx(0.75)}


@pytest.mark.parametrize("capacities", [(1, 1, 1, 1), (1, 2, 3, 4), (0, 1, 0, 9)], ids=str)
def test_draws_follow_shares(capacities: tuple[int, ...]) -> None:
    snapshot = mesh(STOCK, *(endpoint(number, capacity=each) for number, each in enumerate(capacities, 1)))
    router = Router(RoutingConfig(), random.Random(4).random)
    source, target = snapshot.workloads["lab//Pod/shop/cart-0"], Authority.parse("10.96.0.1:80")
    drawn: Counter[str] = Counter()
    for _ in range(4000):
        outcome = router.outbound(snapshot, source, None, target)
        assert isinstance(outcome, OutboundRoute)
        assert outcome.workload is not None
        drawn[outcome.workload.name] += 1
    for number, capacity in enumerate(capacities, 1):
        assert drawn[f"stock-{number}"] / 4000 == pytest.approx(capacity / sum(capacities), abs=0.03)


weights = st.lists(st.integers(0, 2**32), min_size=1, max_size=20).filter(any)


@given(weights, st.floats(0, 1, exclude_max=True))
def test_who_weighs_nothing_is_never_drawn(of: list[int], number: float) -> None:
    assert of[Weights(of).draw(number)] > 0


@given(weights)
def test_even_numbers_draw_by_weight(of: list[int]) -> None:
    drawing = Weights(of)
    assert sum(drawing.share(index) for index in range(len(of))) == pytest.approx(1.0)
    for index, weight in enumerate(of):
        assert drawing.share(index) == pytest.approx(weight / sum(of))
    drawn = Counter(drawing.draw(step / 1000) for step in range(1000))
    for index in range(len(of)):
        assert drawn[index] / 1000 == pytest.approx(drawing.share(index), abs=0.0021)


@given(weights, st.floats(0, 1), st.floats(0, 1))
def test_greater_numbers_never_draw_earlier_ones(of: list[int], one: float, other: float) -> None:
    """Not even a 1, which a source of random numbers should never give."""
    drawing = Weights(of)
    assert drawing.draw(min(one, other)) <= drawing.draw(max(one, other)) < len(of)


# ---------------------------------------------------------------------------------------------------------------- laws

names = st.sampled_from(["", "a", "b"])
localities = st.builds(Locality, region=names, zone=names, subzone=names)
places = st.fixed_dictionaries({"locality": localities, "node": names, "cluster_id": names})
preferences = st.lists(st.sampled_from(list(RoutingPreference)), max_size=4, unique=True).map(tuple)
modes = st.sampled_from([LoadBalancerMode.STANDARD, LoadBalancerMode.STRICT, LoadBalancerMode.FAILOVER])
capacities = st.integers(0, 3)


def naive_rank(wanted: Sequence[RoutingPreference], own: Workload, other: Workload) -> tuple[int, int]:
    """Matches up to the first miss, and the rank with the bonus of a leading network."""

    def same(preference: RoutingPreference) -> bool:
        return {
            RoutingPreference.NETWORK: own.network == other.network,
            RoutingPreference.REGION: own.locality.region == other.locality.region,
            RoutingPreference.ZONE: own.locality.zone == other.locality.zone,
            RoutingPreference.SUBZONE: own.locality.subzone == other.locality.subzone,
            RoutingPreference.NODE: own.node == other.node,
            RoutingPreference.CLUSTER: own.cluster_id == other.cluster_id,
        }[preference]

    first, rest = wanted[:1], wanted[1:]
    network_first = list(first) == [RoutingPreference.NETWORK]
    if not network_first:
        first, rest = (), wanted
    matched = 0
    for preference in rest:
        if not same(preference):
            break
        matched += 1
    if network_first and same(RoutingPreference.NETWORK):
        return matched + 1, matched + 1 + len(rest)
    return matched, matched


@given(preferences, places, places)
def test_rank_is_what_the_rule_says(
    wanted: tuple[RoutingPreference, ...], own: dict[str, Any], other: dict[str, Any]
) -> None:
    source, target = client(**own), endpoint(1, **other)
    found = rank(wanted, source, target)
    assert (found.matched, found.value) == naive_rank(wanted, source, target)
    assert 0 <= found.matched <= found.value
    assert rank(wanted, target, source) == found


@given(modes, preferences, places, st.lists(st.tuples(places, capacities, st.booleans()), max_size=6))
def test_who_is_chosen_is_what_the_rules_say(
    mode: LoadBalancerMode,
    wanted: tuple[RoutingPreference, ...],
    own: dict[str, Any],
    others: list[tuple[dict[str, Any], int, bool]],
) -> None:
    source = client(**own)
    endpoints = [
        endpoint(number, capacity=capacity, **(UNHEALTHY if ill else {}), **place)
        for number, (place, capacity, ill) in enumerate(others, 1)
    ]
    stock = replace(STOCK, load_balancer=LoadBalancer(mode=mode, preferences=wanted))
    usable = [each for each in endpoints if each.capacity and each.status is HealthStatus.HEALTHY]
    if mode is LoadBalancerMode.STRICT:
        usable = [each for each in usable if naive_rank(wanted, source, each)[0] == len(wanted)]
    elif mode is LoadBalancerMode.FAILOVER:
        best = max((naive_rank(wanted, source, each)[1] for each in usable), default=0)
        usable = [each for each in usable if naive_rank(wanted, source, each)[1] == best]
    total = sum(each.capacity for each in usable)
    shares = choices(mesh(stock, *endpoints, source=source))
    assert shares == {each.name: pytest.approx(each.capacity / total) for each in usable}


def test_a_client_is_no_endpoint_s_neighbour_by_itself() -> None:
    """A client that is an endpoint of the service may get itself."""
    source = replace(client(), services=endpoint(1).services)
    outcome = decide(mesh(STOCK, source=source), "10.96.0.1:80")
    To(says=f"{CLIENT_IP}:80 using HBONE via {CLIENT_IP}:15008 type Direct", workload=source.uid).check(outcome)
