"""Outbound decisions as tables: a mesh, a target, where the connection goes.

`STEPS` has the rows of the table in docs/design/routing.md, by their names there; the other tables have the cases that
implementations of HBONE are known to get wrong, by the names under which ztunnel tests them where it does.
"""

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

from hbone.mesh import IpFamilies, NetworkMode, WeightedGateway
from hbone.routing import NoOutboundRoute, OutboundProtocol, OutboundRoute, RouteType, RoutingConfig

SVC = "shop/stock.example"
STOCK = {"endpoint_of": {SVC: {80: 8080}}, "service_account": "stock", **HBONE}
GATEWAY = workload("far//Pod/istio/gw-0", "10.22.1.1", network="far", service_account="gw", namespace="istio", **HBONE)
WAYPOINT = workload("lab//Pod/shop/waypoint-0", "10.0.9.1", service_account="waypoint", **HBONE)
WAYPOINT_DUAL = workload("lab//Pod/shop/waypoint-d", "10.0.9.2", "fd00::9:2", service_account="waypoint", **HBONE)
BY_IP = gateway("/10.0.9.1")
SANS = {"subject_alt_names": (f"{TD}/shop/sa/stock",)}


def stock(number: int, *addresses: str, **fields: Any) -> Any:
    return workload(f"lab//Pod/shop/stock-{number}", *(addresses or (f"10.0.1.{number}",)), **{**STOCK, **fields})


def only_name(hostname: str, **fields: Any) -> Any:
    return replace(stock(1, **fields), addresses=(), hostname=hostname)


FAR_GATEWAY = gateway("far/10.22.1.1", 15009)


def far(number: int, *addresses: str, gateway_at: Any = FAR_GATEWAY, **fields: Any) -> Any:
    uid = f"far//Pod/shop/stock-{number}"
    return workload(uid, *addresses, **{"network": "far", "network_gateway": gateway_at, **STOCK, **fields})


def vip(**fields: Any) -> Any:
    return service(SVC, "/10.96.0.1", **fields)


# --------------------------------------------------------------------------------------------------- the table of steps

WAYPOINT_SERVICE = service("shop/waypoint.example", "/10.96.9.1", ports={15008: 15008})
WAYPOINT_ENDPOINT = workload(
    "lab//Pod/shop/waypoint-1",
    "10.0.9.3",
    endpoint_of={"shop/waypoint.example": {15008: 15008}},
    service_account="waypoint",
    **HBONE,
)
FAR_WAYPOINT = workload(
    "far//Pod/shop/waypoint-0",
    network="far",
    network_gateway=gateway("far/10.22.1.1", 15009),
    endpoint_of={"shop/waypoint.example": {15008: 15008}},
    service_account="waypoint",
    **HBONE,
)

STEPS = [
    ("own-port: a port of the proxy at loopback", [], "127.0.0.1:15001", To(says="127.0.0.1:15001 is a port of the")),
    ("own-port: another port of the proxy", [], "[::1]:15008", To(says="[::1]:15008 is a port of the proxy itself")),
    ("own-port: by name", [], "localhost:15006", To(says="localhost:15006 is a port of the proxy itself")),
    (
        "own-port: not at loopback",
        [],
        "192.0.2.1:15001",
        To(says="192.0.2.1:15001 using TCP via 192.0.2.1:15001 type Passthrough"),
    ),
    (
        "service-waypoint: by address",
        [vip(waypoint=BY_IP), WAYPOINT, stock(1)],
        "10.96.0.1:80",
        To(
            says="10.96.0.1:80 using HBONE via 10.0.9.1:15008 type ToServerWaypoint",
            expected=(f"{TD}/shop/sa/waypoint",),
            workload=WAYPOINT.uid,
            service=SVC,
        ),
    ),
    (
        "service-waypoint: in another network",
        [
            vip(waypoint=gateway("shop/waypoint.example")),
            replace(WAYPOINT_SERVICE, subject_alt_names=(f"{TD}/shop/sa/waypoint",)),
            FAR_WAYPOINT,
            GATEWAY,
        ],
        "10.96.0.1:80",
        To(
            says="stock.example:80 using DOUBLEHBONE via 10.22.1.1:15009 type ToGateway",
            expected=(f"{TD}/istio/sa/gw",),
            inner=(f"{TD}/shop/sa/waypoint",),
            workload=GATEWAY.uid,
            service=SVC,
        ),
    ),
    (
        "service-waypoint: unknown",
        [vip(waypoint=gateway("/10.0.9.99")), stock(1)],
        "10.96.0.1:80",
        To(says="unknown waypoint: shop/stock.example refers to /10.0.9.99"),
    ),
    (
        "service-waypoint: without endpoints",
        [vip(waypoint=gateway("shop/waypoint.example")), WAYPOINT_SERVICE, stock(1)],
        "10.96.0.1:80",
        To(says="no healthy waypoint: shop/stock.example refers to shop/waypoint.example"),
    ),
    (
        "service-waypoint: not for an address that a workload has too",
        [vip(waypoint=BY_IP), WAYPOINT, stock(1), workload("lab//Pod/shop/pod-0", "10.96.0.1", **HBONE)],
        "10.96.0.1:80",
        To(says="10.0.1.1:8080 using HBONE via 10.0.1.1:15008 type Direct", service=SVC),
    ),
    (
        "no-endpoint: of a service",
        [vip()],
        "10.96.0.1:80",
        To(says="no healthy upstream: 10.96.0.1:80"),
    ),
    ("no-endpoint: port not of the service", [vip(), stock(1)], "10.96.0.1:81", To(says="no healthy upstream: 10.96")),
    (
        "unknown: an address",
        [],
        "192.0.2.1:443",
        To(says="192.0.2.1:443 using TCP via 192.0.2.1:443 type Passthrough", workload="", service=""),
    ),
    (
        "unknown: a service that is passed through",
        [vip(**PASSTHROUGH), stock(1)],
        "10.96.0.1:80",
        To(says="10.96.0.1:80 using TCP via 10.96.0.1:80 type Passthrough", workload="", service=""),
    ),
    (
        "unknown: a port that a passed through service has not",
        [vip(**PASSTHROUGH)],
        "10.96.0.1:81",
        To(says="10.96.0.1:81 using TCP via 10.96.0.1:81 type Passthrough", workload="", service=""),
    ),
    (
        "other-network: endpoint behind a gateway",
        [vip(**SANS), far(1), GATEWAY],
        "10.96.0.1:80",
        To(
            says="stock.example:80 using DOUBLEHBONE via 10.22.1.1:15009 type ToGateway",
            expected=(f"{TD}/istio/sa/gw",),
            inner=(f"{TD}/shop/sa/stock",),
            workload=GATEWAY.uid,
            service=SVC,
        ),
    ),
    (
        "other-network: no gateway",
        [vip(**SANS), far(1, "10.0.1.1", gateway_at=None), GATEWAY],
        "10.96.0.1:80",
        To(says='no valid destination: shop/stock-1 is in the network "far", and no gateway to there is known'),
    ),
    (
        "other-network: unknown gateway",
        [vip(**SANS), far(1)],
        "10.96.0.1:80",
        To(says="unknown network gateway: shop/stock-1 refers to far/10.22.1.1"),
    ),
    (
        "other-network: nobody to expect at the far end",
        [vip(), far(1), GATEWAY],
        "10.96.0.1:80",
        To(says="no valid destination: nobody is known to be shop/stock.example behind a gateway"),
    ),
    (
        "workload-waypoint: addressed workload",
        [stock(1, waypoint=BY_IP), WAYPOINT],
        "10.0.1.1:8080",
        To(
            says="10.0.1.1:8080 using HBONE via 10.0.9.1:15008 type ToServerWaypoint",
            expected=(f"{TD}/shop/sa/waypoint",),
            workload=WAYPOINT.uid,
            service="",
        ),
    ),
    (
        "workload-waypoint: of a workload that speaks TCP",
        [stock(1, waypoint=BY_IP, protocol=client().protocol.TCP), WAYPOINT],
        "10.0.1.1:8080",
        To(says="10.0.1.1:8080 using HBONE via 10.0.9.1:15008 type ToServerWaypoint"),
    ),
    (
        "workload-waypoint: not for traffic to a service",
        [vip(), stock(1, waypoint=BY_IP), WAYPOINT],
        "10.96.0.1:80",
        To(says="10.0.1.1:8080 using HBONE via 10.0.1.1:15008 type Direct", service=SVC),
    ),
    (
        "workload-waypoint: unknown",
        [stock(1, waypoint=gateway("shop/gone.example"))],
        "10.0.1.1:8080",
        To(says="unknown waypoint: shop/stock-1 refers to shop/gone.example"),
    ),
    (
        "workload-waypoint: in another network",
        [stock(1, waypoint=gateway("shop/waypoint.example")), WAYPOINT_SERVICE, FAR_WAYPOINT, GATEWAY],
        "10.0.1.1:8080",
        To(says='no valid destination: shop/waypoint-0 is in the network "far", and only services can be reached'),
    ),
    (
        "hbone: an endpoint of a service",
        [vip(), stock(1)],
        "10.96.0.1:80",
        To(
            says="10.0.1.1:8080 using HBONE via 10.0.1.1:15008 type Direct",
            expected=(f"{TD}/shop/sa/stock",),
            workload="lab//Pod/shop/stock-1",
            service=SVC,
        ),
    ),
    (
        "hbone: an addressed workload",
        [vip(), stock(1)],
        "10.0.1.1:9999",
        To(
            says="10.0.1.1:9999 using HBONE via 10.0.1.1:15008 type Direct",
            expected=(f"{TD}/shop/sa/stock",),
            workload="lab//Pod/shop/stock-1",
            service="",
        ),
    ),
    (
        "tcp: an endpoint of a service",
        [vip(), stock(1, protocol=client().protocol.TCP)],
        "10.96.0.1:80",
        To(
            says="10.0.1.1:8080 using TCP via 10.0.1.1:8080 type Direct",
            expected=(),
            workload="lab//Pod/shop/stock-1",
            service=SVC,
        ),
    ),
    (
        "tcp: an addressed workload",
        [stock(1, protocol=client().protocol.TCP)],
        "10.0.1.1:9999",
        To(says="10.0.1.1:9999 using TCP via 10.0.1.1:9999 type Direct", expected=(), service=""),
    ),
    (
        "tcp: a port of the proxy at loopback, behind a service",
        [vip(ports={80: 15001}), workload("lab//x", "127.0.0.1", endpoint_of={SVC: {}})],
        "10.96.0.1:80",
        To(says="127.0.0.1:15001 is a port of the proxy itself"),
    ),
]


@pytest.mark.parametrize(("parts", "target", "to"), [row[1:] for row in STEPS], ids=[row[0] for row in STEPS])
def test_steps(parts: list[Any], target: str, to: To) -> None:
    to.check(decide(mesh(*parts), target))


# ----------------------------------------------------------------------------------- build_request, as ztunnel names it

TCP = {"protocol": client().protocol.TCP}

BUILD_REQUEST = [
    ("unknown_dest", [stock(1)], "192.0.2.1:80", To(says="192.0.2.1:80 using TCP via 192.0.2.1:80 type Passthrough")),
    (
        "wrong_network",
        [vip(**SANS), far(1, "10.0.1.1", gateway_at=None)],
        "10.96.0.1:80",
        To(says="no valid destination: shop/stock-1"),
    ),
    (
        "double_hbone1",  # the gateway by its address
        [vip(**SANS), far(1), GATEWAY],
        "10.96.0.1:80",
        To(
            says="stock.example:80 using DOUBLEHBONE via 10.22.1.1:15009 type ToGateway",
            inner=(f"{TD}/shop/sa/stock",),
            expected=(f"{TD}/istio/sa/gw",),
        ),
    ),
    (
        "double_hbone2",  # the gateway by the name of its service
        [
            vip(**SANS),
            far(1, gateway_at=gateway("istio/gw.example", 15008)),
            service("istio/gw.example", ports={15008: 15010}, subject_alt_names=(f"{TD}/istio/sa/gw-svc",)),
            workload(
                "far//Pod/istio/gw-1",
                "10.22.1.2",
                network="far",
                endpoint_of={"istio/gw.example": {}},
                service_account="gw",
                namespace="istio",
                **HBONE,
            ),
        ],
        "10.96.0.1:80",
        To(
            says="stock.example:80 using DOUBLEHBONE via 10.22.1.2:15010 type ToGateway",
            inner=(f"{TD}/shop/sa/stock",),
            expected=(f"{TD}/istio/sa/gw-svc", f"{TD}/istio/sa/gw"),
            workload="far//Pod/istio/gw-1",
            service=SVC,
        ),
    ),
    (
        "double_hbone: the gateway's service must have the port",
        [
            vip(**SANS),
            far(1, gateway_at=gateway("istio/gw.example", 15008)),
            service("istio/gw.example", ports={80: 80}),
            workload("far//gw", "10.22.1.2", endpoint_of={"istio/gw.example": {}}, **app_tunnel(), **HBONE),
        ],
        "10.96.0.1:80",
        To(says="no healthy network gateway: shop/stock-1 refers to istio/gw.example"),
    ),
    (
        "failover_to_remote: healthy here",
        [vip(**SANS, **balancer("Failover", "Network")), stock(1), far(2), GATEWAY],
        "10.96.0.1:80",
        To(says="10.0.1.1:8080 using HBONE via 10.0.1.1:15008 type Direct"),
    ),
    (
        "failover_to_remote: unhealthy here",
        [vip(**SANS, **balancer("Failover", "Network")), stock(1, **UNHEALTHY), far(2), GATEWAY],
        "10.96.0.1:80",
        To(
            says="stock.example:80 using DOUBLEHBONE via 10.22.1.1:15009 type ToGateway",
            inner=(f"{TD}/shop/sa/stock",),
        ),
    ),
    (
        "known_dest_remote_node_tcp",
        [stock(1, node="far-node", **TCP)],
        "10.0.1.1:80",
        To(says="10.0.1.1:80 using TCP via 10.0.1.1:80 type Direct"),
    ),
    (
        "known_dest_remote_node_hbone",
        [stock(1, node="far-node")],
        "10.0.1.1:80",
        To(says="10.0.1.1:80 using HBONE via 10.0.1.1:15008 type Direct"),
    ),
    (
        "known_dest_local_node_tcp",
        [stock(1, node="own-node", **TCP)],
        "10.0.1.1:80",
        To(says="10.0.1.1:80 using TCP via 10.0.1.1:80 type Direct"),
    ),
    (
        "known_dest_local_node_hbone",
        [stock(1, node="own-node")],
        "10.0.1.1:80",
        To(says="10.0.1.1:80 using HBONE via 10.0.1.1:15008 type Direct"),
    ),
    (
        "source_waypoint",  # the waypoint of the one who connects plays no part
        [client(node="own-node", waypoint=BY_IP), WAYPOINT, stock(1, **TCP)],
        "10.0.1.1:80",
        To(says="10.0.1.1:80 using TCP via 10.0.1.1:80 type Direct"),
    ),
    (
        "destination_waypoint",
        [stock(1, waypoint=BY_IP, **TCP), WAYPOINT],
        "10.0.1.1:80",
        To(says="10.0.1.1:80 using HBONE via 10.0.9.1:15008 type ToServerWaypoint"),
    ),
    (
        "destination_waypoint_mismatch_ip",  # an address of the waypoint pins its family, whatever was asked for
        [stock(1, "10.0.1.1", "fd00::1:1", waypoint=gateway("/10.0.9.2")), WAYPOINT_DUAL],
        "[fd00::1:1]:80",
        To(says="[fd00::1:1]:80 using HBONE via 10.0.9.2:15008 type ToServerWaypoint"),
    ),
    (
        "destination_svc_waypoint",
        [vip(waypoint=BY_IP), WAYPOINT],
        "10.96.0.1:80",
        To(says="10.96.0.1:80 using HBONE via 10.0.9.1:15008 type ToServerWaypoint", service=SVC),
    ),
    ("empty_service", [vip()], "10.96.0.1:80", To(says="no healthy upstream: 10.96.0.1:80")),
    (
        "target_port",  # a named port: only who maps it can be chosen
        [
            vip(ports={80: 0, 8080: 0}),
            stock(1, endpoint_of={SVC: {80: 1234}}),
            stock(2, endpoint_of={SVC: {8080: 9999}}),
        ],
        "10.96.0.1:80",
        To(says="10.0.1.1:1234 using HBONE via 10.0.1.1:15008 type Direct"),
    ),
    (
        "host_network: through a service, that one",
        [
            vip(),
            stock(1, "10.0.1.9", network_mode=NetworkMode.HOST_NETWORK, **TCP),
            stock(2, "10.0.1.9", network_mode=NetworkMode.HOST_NETWORK, endpoint_of={}, **TCP),
        ],
        "10.96.0.1:80",
        To(says="10.0.1.9:8080 using TCP via 10.0.1.9:8080 type Direct", workload="lab//Pod/shop/stock-1"),
    ),
    (
        "host_network: by the node's address, nobody in particular",
        [
            vip(),
            stock(1, "10.0.1.9", network_mode=NetworkMode.HOST_NETWORK),
            stock(2, "10.0.1.9", network_mode=NetworkMode.HOST_NETWORK, endpoint_of={}),
        ],
        "10.0.1.9:80",
        To(says="10.0.1.9:80 using TCP via 10.0.1.9:80 type Passthrough", workload=""),
    ),
    (
        "passthrough_svc",
        [vip(**PASSTHROUGH)],
        "10.96.0.1:80",
        To(says="10.96.0.1:80 using TCP via 10.96.0.1:80 type Passthrough"),
    ),
    (
        "passthrough_svc_with_waypoint",
        [vip(waypoint=BY_IP, **PASSTHROUGH), WAYPOINT],
        "10.96.0.1:80",
        To(says="10.96.0.1:80 using HBONE via 10.0.9.1:15008 type ToServerWaypoint", service=SVC),
    ),
]


@pytest.mark.parametrize(
    ("parts", "target", "to"), [row[1:] for row in BUILD_REQUEST], ids=[row[0] for row in BUILD_REQUEST]
)
def test_build_request(parts: list[Any], target: str, to: To) -> None:
    to.check(decide(mesh(*parts, source=client(node="own-node")), target))


DUAL = stock(1, "10.0.1.1", "fd00::1:1")
BOTH = service(SVC, "/10.96.0.1", "/fd00::96:1", ports={80: 8080})

FAMILIES = [
    # what the service has, what was asked for, where it goes
    ("multiple_address_workload: IPv4", None, "10.0.1.1:80", "10.0.1.1:80", "10.0.1.1:15008"),
    ("multiple_address_workload: IPv6", None, "[fd00::1:1]:80", "[fd00::1:1]:80", "[fd00::1:1]:15008"),
    ("service_ip_families: IPv6 only", IpFamilies.IPV6, "10.96.0.1:80", "[fd00::1:1]:8080", "[fd00::1:1]:15008"),
    ("service_ip_families: IPv4 only", IpFamilies.IPV4, "[fd00::96:1]:80", "10.0.1.1:8080", "10.0.1.1:15008"),
    ("service_ip_families: dual, IPv4", IpFamilies.DUAL, "10.96.0.1:80", "10.0.1.1:8080", "10.0.1.1:15008"),
    ("service_ip_families: dual, IPv6", IpFamilies.DUAL, "[fd00::96:1]:80", "[fd00::1:1]:8080", "[fd00::1:1]:15008"),
    ("service_ip_families: not said", None, "[fd00::96:1]:80", "[fd00::1:1]:8080", "[fd00::1:1]:15008"),
]


@pytest.mark.parametrize(
    ("families", "target", "authority", "hop"), [row[1:] for row in FAMILIES], ids=[row[0] for row in FAMILIES]
)
def test_which_address(families: IpFamilies | None, target: str, authority: str, hop: str) -> None:
    outcome = decide(mesh(DUAL, replace(BOTH, ip_families=families)), target)
    To(says=f"{authority} using HBONE via {hop} type Direct").check(outcome)


def test_the_first_address_when_none_is_of_the_family() -> None:
    outcome = decide(mesh(stock(1, "10.0.1.1", "10.0.1.2"), BOTH), "[fd00::96:1]:80")
    To(says="10.0.1.1:8080 using HBONE via 10.0.1.1:15008 type Direct").check(outcome)


@pytest.mark.parametrize("fields", [HBONE, TCP], ids=["HBONE", "TCP"])
def test_no_address_of_the_service_s_only_family(fields: dict[str, Any]) -> None:
    outcome = decide(mesh(stock(1, **fields), replace(BOTH, ip_families=IpFamilies.IPV6)), "10.96.0.1:80")
    To(says="no valid destination: shop/stock-1 has no address that can be used").check(outcome)


# ------------------------------------------------------------------------------------------------------------ waypoints

SANDWICH = workload(
    "lab//Pod/shop/waypoint-2",
    "10.0.9.4",
    "fd00::9:4",
    endpoint_of={"shop/waypoint.example": {}},
    service_account="waypoint",
    **app_tunnel(),
    **HBONE,
)
NAMED_WAYPOINT = workload(
    "lab//Pod/shop/waypoint-3", "10.0.9.5", hostname="waypoint.host.example", service_account="waypoint", **HBONE
)

WAYPOINTS = [
    (
        "workload_waypoint",
        [stock(1, waypoint=BY_IP), WAYPOINT],
        "10.0.1.1:8080",
        To(says="10.0.1.1:8080 using HBONE via 10.0.9.1:15008 type ToServerWaypoint", service=""),
    ),
    (
        "service_waypoint",  # by the VIP of the waypoint's service
        [vip(waypoint=gateway("/10.96.9.1")), WAYPOINT_SERVICE, WAYPOINT_ENDPOINT],
        "10.96.0.1:80",
        To(says="10.96.0.1:80 using HBONE via 10.0.9.3:15008 type ToServerWaypoint", service=SVC),
    ),
    (
        "service_waypoint_hostname",
        [
            vip(waypoint=gateway("shop/waypoint.example")),
            replace(WAYPOINT_SERVICE, subject_alt_names=("not an id", f"{TD}/shop/sa/wp-svc")),
            WAYPOINT_ENDPOINT,
        ],
        "10.96.0.1:80",
        To(
            says="10.96.0.1:80 using HBONE via 10.0.9.3:15008 type ToServerWaypoint",
            expected=(f"{TD}/shop/sa/wp-svc", f"{TD}/shop/sa/waypoint"),
            workload=WAYPOINT_ENDPOINT.uid,
            service=SVC,
        ),
    ),
    (
        "service_waypoint_workload_hostname",
        [vip(waypoint=gateway("shop/waypoint.host.example", 15108)), NAMED_WAYPOINT],
        "10.96.0.1:80",
        To(says="10.96.0.1:80 using HBONE via 10.0.9.5:15108 type ToServerWaypoint", workload=NAMED_WAYPOINT.uid),
    ),
    (
        "workload waypoint by the name of a service",
        [stock(1, waypoint=gateway("shop/waypoint.example")), WAYPOINT_SERVICE, WAYPOINT_ENDPOINT],
        "10.0.1.1:8080",
        To(says="10.0.1.1:8080 using HBONE via 10.0.9.3:15008 type ToServerWaypoint", service=""),
    ),
    (
        "a name means one namespace's service",
        [vip(waypoint=gateway("other/waypoint.example")), WAYPOINT_SERVICE, WAYPOINT_ENDPOINT],
        "10.96.0.1:80",
        To(says="unknown waypoint: shop/stock.example refers to other/waypoint.example"),
    ),
    (
        "an application tunnel needs no port at the waypoint's service",
        [
            vip(waypoint=gateway("shop/waypoint.example")),
            replace(WAYPOINT_SERVICE, ports={}),
            WAYPOINT_ENDPOINT,
            SANDWICH,
        ],
        "10.96.0.1:80",
        To(says="10.96.0.1:80 using HBONE via 10.0.9.4:15008 type ToServerWaypoint", workload=SANDWICH.uid),
    ),
    (
        "a name of the waypoint follows the family that was asked for",
        [
            service(SVC, "/fd00::96:1", waypoint=gateway("shop/waypoint.example")),
            WAYPOINT_SERVICE,
            SANDWICH,
        ],
        "[fd00::96:1]:80",
        To(says="[fd00::96:1]:80 using HBONE via [fd00::9:4]:15008 type ToServerWaypoint"),
    ),
    (
        "an address of the waypoint pins the family",
        [service(SVC, "/fd00::96:1", waypoint=gateway("/10.96.9.1")), WAYPOINT_SERVICE, SANDWICH],
        "[fd00::96:1]:80",
        To(says="[fd00::96:1]:80 using HBONE via 10.0.9.4:15008 type ToServerWaypoint"),
    ),
    (
        "the target port of the waypoint's service",
        [
            vip(waypoint=gateway("shop/waypoint.example")),
            replace(WAYPOINT_SERVICE, ports={15008: 15408}),
            replace(WAYPOINT_ENDPOINT, services={WAYPOINT_SERVICE.key: {}}),
        ],
        "10.96.0.1:80",
        To(says="10.96.0.1:80 using HBONE via 10.0.9.3:15408 type ToServerWaypoint"),
    ),
    (
        "a waypoint that others do not see, but who refers to it does",
        [
            service("other/stock.example", "/10.96.0.1", waypoint=gateway("/10.96.9.1")),
            service("other/waypoint.example", "/10.96.9.1", ports={15008: 15008}, **PRIVATE),
            workload("lab//wp", "10.0.9.6", endpoint_of={"other/waypoint.example": {}}, namespace="other", **HBONE),
        ],
        "10.96.0.1:80",
        To(says="10.96.0.1:80 using HBONE via 10.0.9.6:15008 type ToServerWaypoint"),
    ),
    (
        "a waypoint that is passed through leads nowhere",
        [vip(waypoint=gateway("/10.96.9.1")), replace(WAYPOINT_SERVICE, **PASSTHROUGH), WAYPOINT_ENDPOINT],
        "10.96.0.1:80",
        To(says="no healthy waypoint"),
    ),
    (
        "a waypoint that has no address",
        [
            vip(waypoint=gateway("shop/waypoint.example")),
            WAYPOINT_SERVICE,
            replace(WAYPOINT_ENDPOINT, addresses=()),
        ],
        "10.96.0.1:80",
        To(says="no healthy waypoint"),
    ),
    (
        "a waypoint in another network, by address: nobody to expect at the far end",
        [vip(waypoint=gateway("far/10.22.9.1")), replace(FAR_WAYPOINT, addresses=(ip_address("10.22.9.1"),)), GATEWAY],
        "10.96.0.1:80",
        To(says="no valid destination: nobody is known to be shop/waypoint-0 behind a gateway"),
    ),
]


@pytest.mark.parametrize(("parts", "target", "to"), [row[1:] for row in WAYPOINTS], ids=[row[0] for row in WAYPOINTS])
def test_waypoints(parts: list[Any], target: str, to: To) -> None:
    to.check(decide(mesh(*parts), target))


DIRECT = To(says="10.0.1.1:8080 using HBONE via 10.0.1.1:15008 type Direct")
AROUND = To(says="10.0.1.1:8080 using HBONE via 10.0.9.1:15008 type ToServerWaypoint")
SERVICE_WAYPOINT = [stock(1, waypoint=gateway("shop/waypoint.example")), WAYPOINT_SERVICE, WAYPOINT_ENDPOINT]

FROM_WAYPOINT = [
    ("is the waypoint", WAYPOINT.uid, "10.0.9.1", [WAYPOINT, stock(1, waypoint=BY_IP)], DIRECT),
    ("its identity at another address", WAYPOINT.uid, "10.0.9.77", [WAYPOINT, stock(1, waypoint=BY_IP)], AROUND),
    ("its identity at no known address", WAYPOINT.uid, None, [WAYPOINT, stock(1, waypoint=BY_IP)], AROUND),
    (
        "its address with another identity",
        "lab//Pod/shop/cart-0",
        "10.0.9.1",
        [WAYPOINT, stock(1, waypoint=BY_IP)],
        AROUND,
    ),
    ("an endpoint of the waypoint's service", WAYPOINT_ENDPOINT.uid, "10.0.9.3", SERVICE_WAYPOINT, DIRECT),
    (
        "another workload with the waypoint's identity",
        WAYPOINT.uid,
        "10.0.9.1",
        [*SERVICE_WAYPOINT, WAYPOINT],
        To(says="10.0.1.1:8080 using HBONE via 10.0.9.3:15008 type ToServerWaypoint"),
    ),
]


@pytest.mark.parametrize(
    ("source", "source_ip", "parts", "to"), [row[1:] for row in FROM_WAYPOINT], ids=[row[0] for row in FROM_WAYPOINT]
)
def test_a_waypoint_does_not_go_through_itself(source: str, source_ip: str | None, parts: list[Any], to: To) -> None:
    to.check(decide(mesh(*parts), "10.0.1.1:8080", source=source, source_ip=source_ip))


def weighted(*weights: int, **fields: Any) -> Any:
    ways = tuple(
        WeightedGateway(destination=gateway(f"/10.0.9.{index}"), weight=weight)
        for index, weight in enumerate(weights, 1)
    )
    return vip(weighted_waypoints=ways, **fields)


WEIGHTED = [
    ("sample_weighted_waypoint: the first", weighted(1, 3), 0.0, "10.0.9.1"),
    ("sample_weighted_waypoint: still the first", weighted(1, 3), 0.249, "10.0.9.1"),
    ("sample_weighted_waypoint: the second", weighted(1, 3), 0.25, "10.0.9.2"),
    ("sample_weighted_waypoint: still the second", weighted(1, 3), 0.999, "10.0.9.2"),
    ("sample_weighted_waypoint: one without weight is never drawn", weighted(0, 1), 0.0, "10.0.9.2"),
    ("sample_weighted_waypoint: nor at the end", weighted(1, 0), 0.999, "10.0.9.1"),
    ("sample_weighted_waypoint: a single one", weighted(7), 0.5, "10.0.9.1"),
    ("sample_weighted_waypoint: before the other one", weighted(1, waypoint=gateway("/10.0.9.2")), 0.0, "10.0.9.1"),
    ("sample_weighted_waypoint: all zero", weighted(0, 0, waypoint=gateway("/10.0.9.2")), 0.0, "10.0.9.2"),
]


@pytest.mark.parametrize(("guarded", "drawn", "hop"), [row[1:] for row in WEIGHTED], ids=[row[0] for row in WEIGHTED])
def test_weighted_waypoints(guarded: Any, drawn: float, hop: str) -> None:
    outcome = decide(mesh(guarded, WAYPOINT, WAYPOINT_DUAL), "10.96.0.1:80", random=[drawn])
    To(says=f"10.96.0.1:80 using HBONE via {hop}:15008 type ToServerWaypoint").check(outcome)


def test_all_weights_zero_and_no_other_waypoint() -> None:
    DIRECT.check(decide(mesh(weighted(0, 0), stock(1)), "10.96.0.1:80"))


def test_a_weighted_waypoint_that_is_unknown_is_not_gone_around() -> None:
    snapshot = mesh(weighted(1, 1, waypoint=BY_IP), WAYPOINT, stock(1))
    To(says="unknown waypoint").check(decide(snapshot, "10.96.0.1:80", random=[0.9]))


def test_each_draw_is_its_own() -> None:
    """A waypoint by weight, then one of its endpoints, by two numbers."""
    again = replace(WAYPOINT_ENDPOINT, uid="lab//Pod/shop/waypoint-9", addresses=(ip_address("10.0.9.9"),))
    guarded = vip(
        weighted_waypoints=(
            WeightedGateway(destination=BY_IP, weight=1),
            WeightedGateway(destination=gateway("shop/waypoint.example"), weight=1),
        )
    )
    snapshot = mesh(guarded, WAYPOINT, WAYPOINT_SERVICE, WAYPOINT_ENDPOINT, again)
    hops = set()
    for draws in ([0.9, 0.1], [0.9, 0.9]):
        outcome = decide(snapshot, "10.96.0.1:80", random=draws)
        assert isinstance(outcome, OutboundRoute)
        hops.add(str(outcome.next_hop))
    assert hops == {"10.0.9.3:15008", "10.0.9.9:15008"}


# ---------------------------------------------------------------------------------------------- names, ranges, networks

HOST = "vm.example"
NAMES = [
    (
        "a service by its name, as if by its VIP",
        [vip(waypoint=BY_IP), WAYPOINT],
        "stock.example:80",
        To(says="10.96.0.1:80 using HBONE via 10.0.9.1:15008 type ToServerWaypoint", service=SVC),
    ),
    (
        "a service by its name, its endpoints",
        [vip(), stock(1)],
        "STOCK.example.:80",
        To(says="10.0.1.1:8080 using HBONE via 10.0.1.1:15008 type Direct", service=SVC),
    ),
    (
        "a name stands for the IPv4 VIP of the own network",
        [
            service(SVC, "far/10.96.0.9", "/fd00::96:1", "/10.96.0.2", waypoint=BY_IP),
            WAYPOINT,
        ],
        "stock.example:80",
        To(says="10.96.0.2:80 using HBONE via 10.0.9.1:15008 type ToServerWaypoint"),
    ),
    (
        "a service without VIP, through its waypoint",
        [service(SVC, waypoint=BY_IP), WAYPOINT],
        "stock.example:80",
        To(says="stock.example:80 using HBONE via 10.0.9.1:15008 type ToServerWaypoint", service=SVC),
    ),
    (
        "a service without VIP, its endpoints",
        [service(SVC), stock(1)],
        "stock.example:80",
        To(says="10.0.1.1:8080 using HBONE via 10.0.1.1:15008 type Direct", service=SVC),
    ),
    ("a service without endpoints", [vip()], "stock.example:80", To(says="no healthy upstream: stock.example:80")),
    (
        "a service that is passed through",
        [vip(**PASSTHROUGH)],
        "stock.example:80",
        To(says="10.96.0.1:80 using TCP via 10.96.0.1:80 type Passthrough"),
    ),
    (
        "a service without VIP that is passed through",
        [service(SVC, **PASSTHROUGH)],
        "stock.example:80",
        To(says="stock.example:80 using TCP via stock.example:80 type Passthrough"),
    ),
    (
        "a service in another network, by its name",
        [vip(**SANS), far(1), GATEWAY],
        "stock.example:80",
        To(
            says="stock.example:80 using DOUBLEHBONE via 10.22.1.1:15009 type ToGateway",
            inner=(f"{TD}/shop/sa/stock",),
        ),
    ),
    (
        "a service that the client does not see",
        [service("other/stock.example", "/10.96.0.1", **PRIVATE), stock(1)],
        "stock.example:80",
        To(says="stock.example:80 using TCP via stock.example:80 type Passthrough"),
    ),
    (
        "a workload by its name",
        [stock(1, hostname=HOST)],
        f"{HOST}:9999",
        To(says="10.0.1.1:9999 using HBONE via 10.0.1.1:15008 type Direct", service=""),
    ),
    (
        "a workload that is only a name",
        [only_name(HOST)],
        f"{HOST}:9999",
        To(says=f"{HOST}:9999 using HBONE via {HOST}:15008 type Direct", workload="lab//Pod/shop/stock-1"),
    ),
    (
        "a workload that is only a name, in plain TCP",
        [only_name(HOST, **TCP)],
        f"{HOST}:9999",
        To(says=f"{HOST}:9999 using TCP via {HOST}:9999 type Direct"),
    ),
    (
        "an endpoint that is only a name",
        [vip(), only_name(HOST)],
        "10.96.0.1:80",
        To(says=f"{HOST}:8080 using HBONE via {HOST}:15008 type Direct"),
    ),
    (
        "an endpoint whose name is none",
        [vip(), only_name("no name")],
        "10.96.0.1:80",
        To(says="no valid destination: shop/stock-1: the host 'no name'"),
    ),
    (
        "a workload's name of another namespace",
        [stock(1, hostname=HOST, namespace="other")],
        f"{HOST}:9999",
        To(says=f"{HOST}:9999 using TCP via {HOST}:9999 type Passthrough"),
    ),
    (
        "an unknown name",
        [],
        "www.example:443",
        To(says="www.example:443 using TCP via www.example:443 type Passthrough", workload="", service=""),
    ),
    (
        "a range of VIPs",
        [service(SVC, "/10.97.0.0/16"), stock(1)],
        "10.97.3.4:80",
        To(says="10.0.1.1:8080 using HBONE via 10.0.1.1:15008 type Direct", service=SVC),
    ),
    (
        "a range of VIPs, guarded",
        [service(SVC, "/10.97.0.0/16", waypoint=BY_IP), WAYPOINT],
        "10.97.3.4:80",
        To(says="10.97.3.4:80 using HBONE via 10.0.9.1:15008 type ToServerWaypoint"),
    ),
    (
        "a VIP before a range",
        [service("shop/all.example", "/10.0.0.0/8"), vip(), stock(1)],
        "10.96.0.1:80",
        To(says="10.0.1.1:8080 using HBONE via 10.0.1.1:15008 type Direct", service=SVC),
    ),
    (
        "a workload in a service's range, and the service has nobody: not in plain text",
        [service("shop/all.example", "/10.0.0.0/8"), stock(1)],
        "10.0.1.1:8080",
        DIRECT,
    ),
    (
        "a workload in the range of a service that is passed through",
        [service("shop/all.example", "/10.0.0.0/8", **PASSTHROUGH), stock(1)],
        "10.0.1.1:8080",
        To(says="10.0.1.1:8080 using TCP via 10.0.1.1:8080 type Passthrough"),
    ),
    (
        "the service of the own namespace",
        [service("other/x.example", "/10.96.0.1", canonical=True), vip(), stock(1)],
        "10.96.0.1:80",
        To(says="10.0.1.1:8080 using HBONE via 10.0.1.1:15008 type Direct", service=SVC),
    ),
    (
        "an address that only a service has that the client does not see",
        [service("other/stock.example", "/10.96.0.1", **PRIVATE)],
        "10.96.0.1:80",
        To(says="10.96.0.1:80 using TCP via 10.96.0.1:80 type Passthrough"),
    ),
    (
        "an address of another network",
        [service(SVC, "far/10.96.0.1"), stock(1)],
        "10.96.0.1:80",
        To(says="10.96.0.1:80 using TCP via 10.96.0.1:80 type Passthrough"),
    ),
    (
        "an IPv4 address written as IPv6",
        [vip(), stock(1)],
        "[::ffff:10.96.0.1]:80",
        To(says="10.0.1.1:8080 using HBONE via 10.0.1.1:15008 type Direct", service=SVC),
    ),
]


@pytest.mark.parametrize(("parts", "target", "to"), [row[1:] for row in NAMES], ids=[row[0] for row in NAMES])
def test_names_and_ranges(parts: list[Any], target: str, to: To) -> None:
    to.check(decide(mesh(*parts), target))


def test_the_node_s_network_guards_and_the_client_s_serves() -> None:
    """Who guards an address is asked in the node's network, where it leads in the client's."""
    guarded = service("shop/a.example", "node/10.96.0.1", waypoint=gateway("node/10.0.9.1"))
    serving = service("shop/b.example", "own/10.96.0.1")
    waypoint = replace(WAYPOINT, network="node")
    endpoint = workload("lab//b", "10.0.2.1", network="own", endpoint_of={"shop/b.example": {}}, **HBONE)
    source, config = client(network="own"), RoutingConfig(network="node")
    both = mesh(guarded, serving, waypoint, endpoint, source=source)
    # That waypoint is in another network and has no gateway; what matters is that it is asked for.
    To(says='no valid destination: shop/waypoint-0 is in the network "node"').check(
        decide(both, "10.96.0.1:80", config=config)
    )
    To(says="10.0.2.1:8080 using HBONE via 10.0.2.1:15008 type Direct", service="shop/b.example").check(
        decide(mesh(serving, endpoint, source=source), "10.96.0.1:80", config=config)
    )
    To(says="no healthy upstream: 10.96.0.1:80").check(
        decide(mesh(replace(guarded, waypoint=None), source=source), "10.96.0.1:80", config=config)
    )
    passed = replace(guarded, waypoint=None, **PASSTHROUGH)
    To(says="10.96.0.1:80 using TCP via 10.96.0.1:80 type Passthrough").check(
        decide(mesh(passed, source=source), "10.96.0.1:80", config=config)
    )


def test_an_address_of_the_own_network_in_a_mesh_of_several() -> None:
    there = workload("far//stock", "10.0.1.1", network="far", **HBONE)
    here = workload("lab//stock", "10.0.1.1", network="near", **HBONE)
    config = RoutingConfig(network="near")
    outcome = decide(mesh(there, here, source=client(network="near")), "10.0.1.1:80", config=config)
    To(says="10.0.1.1:80 using HBONE via 10.0.1.1:15008 type Direct", workload=here.uid).check(outcome)


# ------------------------------------------------------------------------------------------------------ who is expected

IDENTITIES = [
    ("an addressed workload: itself", [vip(**SANS), stock(1, service_account="s1")], "10.0.1.1:80", ("s1",)),
    (
        "a service: whom it names, then the workload",
        [vip(**SANS), stock(1, service_account="s1")],
        "10.96.0.1:80",
        ("stock", "s1"),
    ),
    ("a service that names the workload: once", [vip(**SANS), stock(1)], "10.96.0.1:80", ("stock",)),
    (
        "names that are no SPIFFE ids are left out",
        [vip(subject_alt_names=("stock.example", "spiffe://", f"{TD}/shop/sa/x")), stock(1, service_account="s1")],
        "10.96.0.1:80",
        ("x", "s1"),
    ),
    (
        "a service for a workload without identity",
        [vip(**SANS), stock(1, service_account="no good")],
        "10.96.0.1:80",
        ("stock",),
    ),
]


@pytest.mark.parametrize(
    ("parts", "target", "accounts"), [row[1:] for row in IDENTITIES], ids=[row[0] for row in IDENTITIES]
)
def test_who_is_expected(parts: list[Any], target: str, accounts: tuple[str, ...]) -> None:
    outcome = decide(mesh(*parts), target)
    assert isinstance(outcome, OutboundRoute)
    assert [str(each) for each in outcome.expected] == [f"{TD}/shop/sa/{account}" for account in accounts]


@pytest.mark.parametrize(
    ("parts", "target"),
    [
        ([stock(1, service_account="no good")], "10.0.1.1:80"),
        ([stock(1, waypoint=BY_IP), replace(WAYPOINT, namespace="")], "10.0.1.1:80"),
        ([vip(**SANS), far(1), replace(GATEWAY, service_account="no good")], "10.96.0.1:80"),
    ],
    ids=["a workload", "a waypoint", "a gateway"],
)
def test_nobody_to_expect_is_no_route(parts: list[Any], target: str) -> None:
    outcome = decide(mesh(*parts), target)
    assert isinstance(outcome, NoOutboundRoute)
    assert "cannot be recognised" in outcome.reason


def test_another_trust_domain_is_expected_as_it_is() -> None:
    outcome = decide(mesh(stock(1, trust_domain="far.example")), "10.0.1.1:80")
    To(
        says="10.0.1.1:80 using HBONE via 10.0.1.1:15008 type Direct",
        expected=("spiffe://far.example/ns/shop/sa/stock",),
    ).check(outcome)


def test_a_workload_without_identity_is_reached_in_plain_tcp() -> None:
    To(says="10.0.1.1:80 using TCP via 10.0.1.1:80 type Direct", expected=()).check(
        decide(mesh(stock(1, service_account="no good", **TCP)), "10.0.1.1:80")
    )


def test_a_client_without_identity_is_no_waypoint() -> None:
    snapshot = mesh(stock(1, waypoint=BY_IP), WAYPOINT, source=client(service_account="no good"))
    AROUND.check(decide(snapshot, "10.0.1.1:8080", source_ip="10.0.9.1"))


def test_a_service_whose_name_is_none_has_no_authority_behind_a_gateway() -> None:
    odd = service("shop/*.example", "/10.96.0.1", **SANS)
    endpoint = far(1, endpoint_of={"shop/*.example": {}})
    To(says="no valid destination: shop/*.example: the host '*.example'").check(
        decide(mesh(odd, endpoint, GATEWAY), "10.96.0.1:80")
    )


# ------------------------------------------------------------------------------------------------ a name turned address


def test_what_a_name_turned_out_to_be() -> None:
    outcome = decide(mesh(only_name(HOST)), f"{HOST}:9999")
    assert isinstance(outcome, OutboundRoute)
    resolved = outcome.resolved(ip_address("192.0.2.7"))
    assert str(resolved) == "192.0.2.7:9999 using HBONE via 192.0.2.7:15008 type Direct"
    assert resolved.resolved(ip_address("192.0.2.8")) is resolved
    assert resolved.expected == outcome.expected


def test_a_waypoint_that_is_a_name_is_told_the_target_as_it_was() -> None:
    named = replace(NAMED_WAYPOINT, addresses=())
    outcome = decide(mesh(vip(waypoint=gateway("shop/waypoint.host.example")), named), "10.96.0.1:80")
    assert isinstance(outcome, OutboundRoute)
    assert str(outcome) == "10.96.0.1:80 using HBONE via waypoint.host.example:15008 type ToServerWaypoint"
    resolved = outcome.resolved(ip_address("fd00::9"))
    assert str(resolved) == "10.96.0.1:80 using HBONE via [fd00::9]:15008 type ToServerWaypoint"


def test_a_gateway_that_has_the_service_s_name_is_told_the_name() -> None:
    hop = workload("far//gw", hostname="stock.example", namespace="istio", network="far", **HBONE)
    endpoint = far(1, gateway_at=gateway("istio/stock.example", 15009))
    outcome = decide(mesh(vip(**SANS), endpoint, hop), "10.96.0.1:80")
    assert isinstance(outcome, OutboundRoute)
    assert (outcome.type, outcome.protocol) == (RouteType.TO_GATEWAY, OutboundProtocol.DOUBLE_HBONE)
    resolved = outcome.resolved(ip_address("192.0.2.7"))
    assert str(resolved) == "stock.example:80 using DOUBLEHBONE via 192.0.2.7:15009 type ToGateway"


@pytest.mark.parametrize(
    "parts",
    [
        [vip(ports={80: 70000}), stock(1, endpoint_of={SVC: {}})],
        [vip(), stock(1, endpoint_of={SVC: {80: 70000}})],
        [vip(waypoint=gateway("/10.0.9.1", 0)), WAYPOINT],
        [vip(**SANS), far(1, gateway_at=gateway("far/10.22.1.1", 70000)), GATEWAY],
    ],
    ids=["target port", "endpoint's port", "waypoint's port", "gateway's port"],
)
def test_what_is_no_port_is_no_route(parts: list[Any]) -> None:
    """Whoever wrote the mesh: a decision never raises."""
    outcome = decide(mesh(*parts), "10.96.0.1:80")
    assert isinstance(outcome, NoOutboundRoute)
    assert "is not between 1 and 65535" in outcome.reason


def test_an_endpoint_that_maps_a_port_to_0_has_the_service_s() -> None:
    DIRECT.check(decide(mesh(vip(), stock(1, endpoint_of={SVC: {80: 0}})), "10.96.0.1:80"))


def test_another_hbone_port() -> None:
    outcome = decide(mesh(stock(1)), "10.0.1.1:80", config=RoutingConfig(hbone_port=16008))
    To(says="10.0.1.1:80 using HBONE via 10.0.1.1:16008 type Direct").check(outcome)
