"""Decisions in words: these lines are what `hbone explain` prints."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest
from support.routes import (
    HBONE,
    PASSTHROUGH,
    PRIVATE,
    TD,
    UNHEALTHY,
    app_tunnel,
    balancer,
    client,
    gateway,
    mesh,
    service,
    workload,
)

from hbone import Authority, Endpoint
from hbone.mesh import Locality, MeshSnapshot, ServiceEndpoint, WeightedGateway
from hbone.routing import (
    NoOutboundRoute,
    OutboundExplanation,
    RoutingConfig,
    explain_inbound,
    explain_outbound,
    route_outbound,
)

SVC = "shop/stock.example"
CLIENT = 'shop/cart-0 (network "", node "") connects to'


def endpoint(number: int, **fields: Any) -> Any:
    return workload(
        f"lab//stock-{number}",
        f"10.0.1.{number}",
        **{"endpoint_of": {SVC: {80: 8080}}, "service_account": "stock", **HBONE, **fields},
    )


STOCK = service(SVC, "/10.96.0.1")
GATEWAY = workload("far//gw", "10.22.1.1", network="far", service_account="gw", namespace="istio", **HBONE)
WAYPOINT = workload("lab//waypoint", "10.0.9.1", service_account="waypoint", **HBONE)
EXPECTED = f"{TD}/shop/sa/stock is expected: it is the identity of shop/stock"


def explain(snapshot: MeshSnapshot, target: str, source_ip: str | None = None, limit: int = 100) -> OutboundExplanation:
    return explain_outbound(
        snapshot,
        RoutingConfig(),
        source=snapshot.workloads["lab//Pod/shop/cart-0"],
        source_ip=None if source_ip is None else ip_address(source_ip),
        target=Authority.parse(target),
        limit=limit,
    )


OUTBOUND: list[tuple[str, list[Any], str, str]] = [
    (
        "a workload",
        [endpoint(1)],
        "10.0.1.1:9999",
        f"""
        10.0.1.1 is an address of the workload shop/stock-1 (lab//stock-1)
        {EXPECTED}-1
        to 10.0.1.1:9999 using HBONE via 10.0.1.1:15008 type Direct
        """,
    ),
    (
        "who was left out and why",
        [
            replace(STOCK, endpoints={"lab//gone": ServiceEndpoint(workload_uid="lab//gone")}, ports={80: 0}),
            endpoint(1),
            endpoint(2, **UNHEALTHY),
            endpoint(3, capacity=0),
            endpoint(4, endpoint_of={SVC: {}}),
            replace(endpoint(5), addresses=()),
            replace(endpoint(6, network="far"), addresses=()),
        ],
        "10.96.0.1:80",
        f"""
        10.96.0.1 is a VIP of the service shop/stock.example
        shop/stock.example has 7 endpoint(s), of which 1 can be used
        left out: lab//gone: no such workload is known
        left out: shop/stock-2: it is unhealthy
        left out: shop/stock-3: its capacity is 0
        left out: shop/stock-4: it has no port for the service's port 80
        left out: shop/stock-5: it has neither address nor host name
        left out: shop/stock-6: it has neither address nor host name, and its network has no gateway
        shop/stock.example takes every endpoint alike, near or far
        shop/stock-1 is the only one
        shop/stock-1 (lab//stock-1) stands behind shop/stock.example port 80 with port 8080
        {EXPECTED}-1
        to 10.0.1.1:8080 using HBONE via 10.0.1.1:15008 type Direct
        """,
    ),
    (
        "ranks",
        [
            client(locality=Locality(region="eu", zone="eu-1")),
            replace(STOCK, **balancer("Failover", "Region", "Zone")),
            endpoint(1, locality=Locality(region="eu", zone="eu-1")),
            endpoint(2, locality=Locality(region="eu", zone="eu-2")),
            endpoint(3, locality=Locality(region="us", zone="us-1"), capacity=4),
            endpoint(4, locality=Locality(region="eu", zone="eu-1"), capacity=3),
        ],
        "10.96.0.1:80",
        f"""
        10.96.0.1 is a VIP of the service shop/stock.example
        shop/stock.example has 4 endpoint(s), of which 4 can be used
        shop/stock.example prefers the client's Region, Zone (Failover)
        shop/stock-1: rank 2
        shop/stock-4: rank 2
        shop/stock-2: rank 1: left out
        shop/stock-3: rank 0: left out
        shop/stock-4 is drawn, one of 2, with a share of 75 %
        shop/stock-4 (lab//stock-4) stands behind shop/stock.example port 80 with port 8080
        {EXPECTED}-4
        to 10.0.1.4:8080 using HBONE via 10.0.1.4:15008 type Direct
        """,
    ),
    (
        "all of the preferences or none",
        [
            client(locality=Locality(region="eu", zone="eu-1")),
            replace(STOCK, **balancer("Strict", "Region", "Zone")),
            endpoint(1, locality=Locality(region="eu", zone="eu-2")),
        ],
        "10.96.0.1:80",
        """
        10.96.0.1 is a VIP of the service shop/stock.example
        shop/stock.example has 1 endpoint(s), of which 1 can be used
        shop/stock.example insists on the client's Region, Zone (Strict)
        shop/stock-1: 1 of 2 in common: left out
        no endpoint of shop/stock.example can be used
        refused: no healthy upstream: 10.96.0.1:80
        """,
    ),
    (
        "which of several services",
        [
            service("z/canon.example", "/10.96.0.1", canonical=True),
            service("z/private.example", "/10.96.0.0/24", **PRIVATE),
            STOCK,
            endpoint(1),
        ],
        "10.96.0.1:81",
        """
        10.96.0.1 is a VIP of the service shop/stock.example
        z/canon.example has that address too, but shop/stock.example is of the client's own namespace
        z/private.example has that address too, but only clients of its own namespace see it
        shop/stock.example has no port 81; it has 80
        refused: no healthy upstream: 10.96.0.1:81
        """,
    ),
    (
        "the canonical service of a range",
        [
            service("y/one.example", "/10.96.0.0/16", ports={}),
            service("z/two.example", "/10.96.0.0/16", ports={}, canonical=True),
        ],
        "10.96.0.1:81",
        """
        10.96.0.1 is in the VIP range 10.96.0.0/16 of the service z/two.example
        y/one.example has that address too, but z/two.example is the canonical one
        z/two.example has no port 81; it has none
        refused: no healthy upstream: 10.96.0.1:81
        """,
    ),
    (
        "a service that nobody here sees",
        [service("z/private.example", "/10.96.0.1", **PRIVATE)],
        "10.96.0.1:80",
        """
        10.96.0.1 is no address of the mesh in the network "" that shop/cart-0 can see
        z/private.example has that address too, but only clients of its own namespace see it
        passed through in plain TCP to 10.96.0.1:80
        """,
    ),
    (
        "a waypoint",
        [replace(STOCK, waypoint=gateway("/10.0.9.1")), WAYPOINT],
        "10.96.0.1:80",
        f"""
        10.96.0.1 is a VIP of the service shop/stock.example
        the service shop/stock.example has a waypoint: /10.0.9.1 port 15008
        {TD}/shop/sa/waypoint is expected: it is the identity of shop/waypoint
        to 10.96.0.1:80 using HBONE via 10.0.9.1:15008 type ToServerWaypoint
        """,
    ),
    (
        "a waypoint that is not there",
        [replace(STOCK, waypoint=gateway("shop/gone.example")), endpoint(1)],
        "10.96.0.1:80",
        """
        10.96.0.1 is a VIP of the service shop/stock.example
        the service shop/stock.example has a waypoint: shop/gone.example port 15008
        refused: unknown waypoint: shop/stock.example refers to shop/gone.example,
        ... and there is no such service or workload
        """,
    ),
    (
        "waypoints by weight",
        [
            replace(
                STOCK,
                weighted_waypoints=(
                    WeightedGateway(destination=gateway("/10.0.9.1"), weight=3),
                    WeightedGateway(destination=gateway("/10.0.9.2"), weight=1),
                ),
            ),
            WAYPOINT,
        ],
        "10.96.0.1:80",
        f"""
        10.96.0.1 is a VIP of the service shop/stock.example
        the service shop/stock.example has a waypoint of weight 3: /10.0.9.1 port 15008
        the service shop/stock.example has a waypoint of weight 1: /10.0.9.2 port 15008
        /10.0.9.1 port 15008 is drawn, one of 2, with a share of 75 %
        {TD}/shop/sa/waypoint is expected: it is the identity of shop/waypoint
        to 10.96.0.1:80 using HBONE via 10.0.9.1:15008 type ToServerWaypoint
        """,
    ),
    (
        "weights that are all zero",
        [
            replace(
                STOCK,
                weighted_waypoints=(WeightedGateway(destination=gateway("/10.0.9.2"), weight=0),),
                waypoint=gateway("/10.0.9.1"),
            ),
            WAYPOINT,
        ],
        "10.96.0.1:80",
        f"""
        10.96.0.1 is a VIP of the service shop/stock.example
        all weighted waypoints of shop/stock.example weigh 0: its other one counts
        the service shop/stock.example has a waypoint: /10.0.9.1 port 15008
        {TD}/shop/sa/waypoint is expected: it is the identity of shop/waypoint
        to 10.96.0.1:80 using HBONE via 10.0.9.1:15008 type ToServerWaypoint
        """,
    ),
    (
        "a gateway",
        [
            replace(STOCK, subject_alt_names=(f"{TD}/shop/sa/stock", "stock.example")),
            replace(endpoint(1, network="far", network_gateway=gateway("far/10.22.1.1", 15009)), addresses=()),
            GATEWAY,
        ],
        "10.96.0.1:80",
        f"""
        10.96.0.1 is a VIP of the service shop/stock.example
        shop/stock.example has 1 endpoint(s), of which 1 can be used
        shop/stock.example takes every endpoint alike, near or far
        shop/stock-1 is the only one
        shop/stock-1 (lab//stock-1) stands behind shop/stock.example port 80 with port 8080
        shop/stock-1 is in the network "far", the client in "":
        ... the way is through that network's gateway, with a tunnel in a tunnel
        {TD}/shop/sa/stock is expected behind the gateway: it is among the subjectAltNames of shop/stock.example
        a subjectAltName of shop/stock.example is left out: invalid SPIFFE identity 'stock.example': it must start with spiffe://
        the gateway of shop/stock-1 is far/10.22.1.1 port 15009
        {TD}/istio/sa/gw is expected: it is the identity of istio/gw
        to stock.example:80 using DOUBLEHBONE via 10.22.1.1:15009 type ToGateway
        """,
    ),
    (
        "a name",
        [STOCK, endpoint(1, protocol=client().protocol.TCP)],
        "stock.example:80",
        """
        stock.example is the name of the service shop/stock.example
        its VIP in the network "" is 10.96.0.1
        shop/stock.example has 1 endpoint(s), of which 1 can be used
        shop/stock.example takes every endpoint alike, near or far
        shop/stock-1 is the only one
        shop/stock-1 (lab//stock-1) stands behind shop/stock.example port 80 with port 8080
        in plain TCP to 10.0.1.1:8080: its workload does not speak HBONE
        """,
    ),
    (
        "a name without VIP that is passed through",
        [service(SVC, **PASSTHROUGH)],
        "stock.example:80",
        """
        stock.example is the name of the service shop/stock.example
        that service has no VIP in the network ""
        shop/stock.example is passed through: its connections go where the application sent them
        passed through in plain TCP to stock.example:80
        """,
    ),
    (
        "a VIP that is passed through",
        [replace(STOCK, **PASSTHROUGH)],
        "10.96.0.1:80",
        """
        10.96.0.1 is a VIP of the service shop/stock.example
        shop/stock.example is passed through: its connections go where the application sent them
        passed through in plain TCP to 10.96.0.1:80
        """,
    ),
    (
        "the name of a workload",
        [endpoint(1, hostname="vm.example")],
        "vm.example:80",
        f"""
        vm.example is the name of the workload shop/stock-1 (lab//stock-1)
        {EXPECTED}-1
        to 10.0.1.1:80 using HBONE via 10.0.1.1:15008 type Direct
        """,
    ),
    (
        "a name that is not of the mesh",
        [],
        "www.example:443",
        """
        the mesh has no service and no workload with the name www.example that shop/cart-0 can see
        passed through in plain TCP to www.example:443
        """,
    ),
    (
        "an address that is not of the mesh",
        [],
        "192.0.2.1:443",
        """
        192.0.2.1 is no address of the mesh in the network "" that shop/cart-0 can see
        passed through in plain TCP to 192.0.2.1:443
        """,
    ),
    (
        "a circle",
        [],
        "127.0.0.1:15001",
        """
        refused: 127.0.0.1:15001 is a port of the proxy itself: the connection would go in a circle
        """,
    ),
    (
        "an application tunnel of a waypoint",
        [
            replace(STOCK, waypoint=gateway("shop/waypoint.example")),
            service("shop/waypoint.example", ports={}),
            replace(WAYPOINT, services={service("shop/waypoint.example").key: {}}),
        ],
        "10.96.0.1:80",
        """
        10.96.0.1 is a VIP of the service shop/stock.example
        the service shop/stock.example has a waypoint: shop/waypoint.example port 15008
        shop/waypoint.example has 1 endpoint(s), of which 0 can be used
        left out: shop/waypoint: the service has no port 15008 and the workload no application tunnel
        no endpoint of shop/waypoint.example can be used
        refused: no healthy waypoint: shop/stock.example refers to shop/waypoint.example,
        ... and shop/waypoint.example has no endpoint for port 15008
        """,
    ),
]


def lines(text: str) -> list[str]:
    """The lines of a text; one that begins with three dots continues the one before it."""
    return [line.strip() for line in text.strip().replace("\n        ...", "").splitlines()]


@pytest.mark.parametrize(("parts", "target", "said"), [row[1:] for row in OUTBOUND], ids=[row[0] for row in OUTBOUND])
def test_outbound_in_words(parts: list[Any], target: str, said: str) -> None:
    snapshot = mesh(*parts)
    explained = explain(snapshot, target)
    assert list(explained.steps) == [f"{CLIENT} {target}", *lines(said)]


@pytest.mark.parametrize(("parts", "target", "said"), [row[1:] for row in OUTBOUND], ids=[row[0] for row in OUTBOUND])
def test_the_function_says_the_same(parts: list[Any], target: str, said: str) -> None:
    """As a live node would: it draws, and says what it drew."""
    snapshot, heard = mesh(*parts), list[str]()
    outcome = route_outbound(
        snapshot,
        RoutingConfig(),
        source=snapshot.workloads["lab//Pod/shop/cart-0"],
        source_ip=None,
        target=Authority.parse(target),
        random=lambda: 0.5,
        note=heard.append,
    )
    assert outcome == explain(snapshot, target).outcome
    assert heard == [f"{CLIENT} {target}", *lines(said)]


def test_a_connection_of_the_waypoint_itself() -> None:
    snapshot = mesh(
        endpoint(1, waypoint=gateway("/10.0.9.1")), replace(WAYPOINT, service_account="cart"), source=client()
    )
    said = explain(snapshot, "10.0.1.1:80", source_ip="10.0.9.1").steps
    assert "the workload shop/stock-1 has a waypoint: /10.0.9.1 port 15008" in said
    assert "shop/cart-0 at 10.0.9.1 is that waypoint: it goes on directly" in said
    assert said[-1] == "to 10.0.1.1:80 using HBONE via 10.0.1.1:15008 type Direct"


def test_many_endpoints_are_not_all_named() -> None:
    snapshot = mesh(
        replace(STOCK, **balancer("Failover", "Node")),
        *(endpoint(number) for number in range(1, 41)),
        *(endpoint(number, **UNHEALTHY) for number in range(41, 81)),
    )
    said = explain(snapshot, "10.96.0.1:80").steps
    assert len(said) < 50
    assert "shop/stock.example has 80 endpoint(s), of which 40 can be used" in said
    assert "left out: 24 more" in said
    assert "24 more with the same or a lower rank" in said


# ---------------------------------------------------------------------------------------------- all that can come of it


def test_every_outcome_and_its_share() -> None:
    snapshot = mesh(STOCK, endpoint(1), endpoint(2, capacity=2), replace(endpoint(3), hostname="no name", addresses=()))
    explained = explain(snapshot, "10.96.0.1:80")
    assert [(share, str(outcome)) for share, outcome in explained.outcomes] == [
        (pytest.approx(0.5), "10.0.1.2:8080 using HBONE via 10.0.1.2:15008 type Direct"),
        (pytest.approx(0.25), "10.0.1.1:8080 using HBONE via 10.0.1.1:15008 type Direct"),
        (
            pytest.approx(0.25),
            "no valid destination: shop/stock-3: the host 'no name' is not a host name: it has the label 'no name'",
        ),
    ]
    assert explained.omitted == 0
    assert str(explained.outcome) == str(explained.outcomes[0][1])


def test_ways_that_end_alike_are_one() -> None:
    far = {"network": "far", "network_gateway": gateway("far/10.22.1.1", 15009)}
    snapshot = mesh(
        replace(STOCK, subject_alt_names=(f"{TD}/shop/sa/stock",)), endpoint(1, **far), endpoint(2, **far), GATEWAY
    )
    explained = explain(snapshot, "10.96.0.1:80")
    assert [share for share, _ in explained.outcomes] == [pytest.approx(1.0)]


def test_too_many_outcomes_to_list() -> None:
    snapshot = mesh(STOCK, *(endpoint(number) for number in range(1, 41)))
    explained = explain(snapshot, "10.96.0.1:80", limit=10)
    assert len(explained.outcomes) == 10
    assert explained.omitted == pytest.approx(0.75)
    assert not isinstance(explained.outcome, NoOutboundRoute)


# -------------------------------------------------------------------------------------------------------------- inbound

SERVER = workload("lab//server", "10.0.1.1", endpoint_of={SVC: {80: 8080}}, **HBONE)

INBOUND: list[tuple[str, list[Any], str, str]] = [
    (
        "an address",
        [SERVER, STOCK],
        "10.0.1.1:8080",
        """
        10.0.1.1 is the address that was dialled
        the service shop/stock.example was meant
        to 10.0.1.1:8080; policies see 10.0.1.1:8080
        """,
    ),
    (
        "a name",
        [SERVER, STOCK],
        "stock.example:80",
        """
        stock.example:80 is the service shop/stock.example: its port 80 is port 8080 here
        the service shop/stock.example was meant
        to 10.0.1.1:8080; policies see 10.0.1.1:8080
        """,
    ),
    (
        "a waypoint",
        [SERVER, replace(STOCK, vips=service(SVC, "/10.96.0.1").vips, waypoint=gateway("/10.0.1.1"))],
        "10.96.0.1:80",
        """
        10.96.0.1 has shop/server as its waypoint
        which service was meant cannot be told
        to 10.0.1.1:80; policies see 10.0.1.1:80
        """,
    ),
    (
        "an application tunnel",
        [replace(SERVER, **app_tunnel())],
        "192.0.2.7:443",
        """
        shop/server has an application tunnel: it may be told of any address
        shop/server has an application tunnel at port 15088, whatever port was asked for
        a PROXY header tells it of 192.0.2.7:443
        which service was meant cannot be told
        to 127.0.0.1:15088; policies see 10.0.1.1:15088
        """,
    ),
    (
        "refused",
        [SERVER],
        "192.0.2.7:443",
        """
        refused with status 400: ip mismatch: the peer dialled 10.0.1.1 and asks for 192.0.2.7, which is not behind it
        """,
    ),
]


@pytest.mark.parametrize(("parts", "authority", "said"), [row[1:] for row in INBOUND], ids=[row[0] for row in INBOUND])
def test_inbound_in_words(parts: list[Any], authority: str, said: str) -> None:
    snapshot = mesh(*parts)
    explained = explain_inbound(
        snapshot,
        RoutingConfig(),
        workload=snapshot.workloads["lab//server"],
        dialled=Endpoint.parse("10.0.1.1:15008"),
        authority=Authority.parse(authority),
    )
    assert list(explained.steps) == lines(said)
