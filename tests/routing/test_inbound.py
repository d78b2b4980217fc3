"""Inbound decisions as tables: who was dialled, what is asked for, where it ends.

The rows of `FIND_INBOUND_UPSTREAM` have the names under which ztunnel tests the same, once as `find_inbound_upstream`
(where it ends) and once as `build_inbound_request` (what the PROXY header says, too).
"""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest
from support.meshes import name
from support.routes import HBONE, PRIVATE, UNHEALTHY, app_tunnel, gateway, mesh, service, workload

from hbone import Authority, Endpoint
from hbone.mesh import MeshSnapshot, ServiceEndpoint, WeightedGateway
from hbone.routing import (
    InboundRoute,
    NoInboundRoute,
    RoutingConfig,
    destination_service,
    explain_inbound,
    route_inbound,
)

SERVER, WAYPOINT = "lab//Pod/shop/server", "lab//Pod/shop/waypoint"
SERVER_IP, WAYPOINT_IP, CLIENT_IP = "10.0.1.1", "10.0.9.1", "10.0.0.1"
SERVER_VIP, WAYPOINT_VIP = "10.96.0.1", "10.96.9.1"
HOST = "server.example"


def decide(
    snapshot: MeshSnapshot,
    dialled: str,
    authority: str,
    *,
    host: str | None = None,
    config: RoutingConfig | None = None,
    uid: str | None = None,
) -> InboundRoute | NoInboundRoute:
    endpoint = Endpoint.parse(f"{dialled}:15008")
    found = snapshot.workload_by_address("", endpoint.ip) if uid is None else snapshot.workloads[uid]
    assert found is not None
    arguments: dict[str, Any] = {"workload": found, "dialled": endpoint, "authority": Authority.parse(authority)}
    config = config or RoutingConfig()
    outcome = route_inbound(snapshot, config, **arguments, forwarded_host=host)
    assert explain_inbound(snapshot, config, **arguments, forwarded_host=host).outcome == outcome
    return outcome


def world(of_workload: Any = None, of_service: Any = None, tunnel: Any = None) -> MeshSnapshot:
    """A server and a waypoint, each with a service; either may have the waypoint before it."""
    return mesh(
        workload(SERVER, SERVER_IP, endpoint_of={f"shop/{HOST}": {}}, waypoint=of_workload, **HBONE),
        workload(WAYPOINT, WAYPOINT_IP, endpoint_of={"shop/waypoint.example": {}}, **(tunnel or {}), **HBONE),
        service(f"shop/{HOST}", f"/{SERVER_VIP}", waypoint=of_service),
        service("shop/waypoint.example", f"/{WAYPOINT_VIP}"),
    )


BY_POD, BY_VIP = gateway(f"/{WAYPOINT_IP}"), gateway(f"/{WAYPOINT_VIP}")
PLAIN = f"{SERVER_IP}:8080"
MISMATCH = "400 ip mismatch"

FIND_INBOUND_UPSTREAM = [
    # the mesh, who was dialled, what is asked for, where it ends, what the PROXY header says
    ("to workload no waypoint", world(), SERVER_IP, PLAIN, PLAIN, None),
    ("svc hostname to workload no waypoint", world(), SERVER_IP, f"{HOST}:80", PLAIN, None),
    (
        "to workload with waypoint referenced by pod",
        world(of_workload=BY_POD),
        WAYPOINT_IP,
        PLAIN,
        f"{WAYPOINT_IP}:8080",
        None,
    ),
    (
        "to workload with waypoint referenced by vip",
        world(of_workload=BY_VIP),
        WAYPOINT_IP,
        PLAIN,
        f"{WAYPOINT_IP}:8080",
        None,
    ),
    (
        "to workload with app tunnel",
        world(of_workload=BY_VIP, tunnel=app_tunnel()),
        WAYPOINT_IP,
        PLAIN,
        f"{WAYPOINT_IP}:15088",
        PLAIN,
    ),
    (
        "to service with waypoint referenced by pod",
        world(of_service=BY_POD),
        WAYPOINT_IP,
        f"{SERVER_VIP}:80",
        f"{WAYPOINT_IP}:80",
        None,
    ),
    (
        "to service with waypoint referenced by vip",
        world(of_service=BY_VIP),
        WAYPOINT_IP,
        f"{SERVER_VIP}:80",
        f"{WAYPOINT_IP}:80",
        None,
    ),
    (
        "to service with app tunnel",
        world(of_service=BY_VIP, tunnel=app_tunnel()),
        WAYPOINT_IP,
        f"{SERVER_VIP}:80",
        f"{WAYPOINT_IP}:15088",
        f"{SERVER_VIP}:80",
    ),
    ("to server ip mismatch", world(), SERVER_IP, f"{CLIENT_IP}:8080", MISMATCH, None),
    ("to waypoint without attachment", world(), WAYPOINT_IP, f"{CLIENT_IP}:8080", MISMATCH, None),
    (
        "to workload via waypoint with wrong attachment",
        world(of_service=BY_POD),
        WAYPOINT_IP,
        PLAIN,
        MISMATCH,
        None,
    ),
    (
        "to service via waypoint with wrong attachment",
        world(of_workload=BY_POD),
        WAYPOINT_IP,
        f"{SERVER_VIP}:80",
        MISMATCH,
        None,
    ),
]


@pytest.mark.parametrize(
    ("snapshot", "dialled", "authority", "ends", "told"),
    [row[1:] for row in FIND_INBOUND_UPSTREAM],
    ids=[row[0] for row in FIND_INBOUND_UPSTREAM],
)
def test_find_inbound_upstream(
    snapshot: MeshSnapshot, dialled: str, authority: str, ends: str, told: str | None
) -> None:
    outcome = decide(snapshot, dialled, authority)
    if isinstance(outcome, NoInboundRoute):
        assert f"{outcome.status} {outcome.reason}".startswith(ends)
        return
    assert str(outcome.rbac_destination) == ends
    assert outcome.proxy_protocol is (told is not None)
    assert (None if outcome.tunnel_target is None else str(outcome.tunnel_target)) == told
    # An application that hides behind a PROXY header is reached at loopback; the others where the peer dialled.
    assert str(outcome.upstream) == ("127.0.0.1:15088" if told else ends)
    assert outcome.keep_source is (told is None)


# -------------------------------------------------------------------------------------------------- may it be asked for


def guarded_by(destination: Any, **fields: Any) -> Any:
    return service(f"shop/{HOST}", f"/{SERVER_VIP}", waypoint=destination, **fields)


AT = workload(WAYPOINT, WAYPOINT_IP, endpoint_of={"shop/waypoint.example": {}}, **HBONE)
AT_SERVICE = service("shop/waypoint.example", f"/{WAYPOINT_VIP}")
WEIGHTED = (WeightedGateway(destination=BY_POD, weight=1), WeightedGateway(destination=gateway("/10.0.9.2"), weight=1))

ACCEPTED = [
    ("by the name of our service", [AT, AT_SERVICE, guarded_by(gateway("shop/waypoint.example"))], True),
    (
        "by our name",
        [replace(AT, hostname="wp.example"), AT_SERVICE, guarded_by(gateway("shop/wp.example"))],
        True,
    ),
    (
        "by the name of somebody else's service",
        [AT, AT_SERVICE, service("shop/else.example"), guarded_by(gateway("shop/else.example"))],
        False,
    ),
    ("as one of several by weight", [AT, guarded_by(None, weighted_waypoints=WEIGHTED)], True),
    ("as one of several, beside another", [AT, guarded_by(gateway("/10.0.9.9"), weighted_waypoints=WEIGHTED)], True),
    ("nobody's waypoint", [AT, guarded_by(None)], False),
    ("an unknown waypoint", [AT, guarded_by(gateway("/10.0.9.9"))], False),
    ("unhealthy, but it", [replace(AT, **UNHEALTHY), AT_SERVICE, guarded_by(BY_VIP)], True),
    (
        "written at the service",
        [
            replace(AT, services={}),
            replace(AT_SERVICE, endpoints={WAYPOINT: ServiceEndpoint(workload_uid=WAYPOINT)}),
            guarded_by(BY_VIP),
        ],
        True,
    ),
    (
        "for a service that only its own namespace sees",
        [AT, replace(guarded_by(BY_POD, **PRIVATE), namespace="other")],
        True,
    ),
    (
        "for one of two services with the address",
        [AT, guarded_by(None), replace(guarded_by(BY_POD), namespace="other")],
        True,
    ),
    ("for a range", [AT, service("shop/r.example", "/10.96.0.0/16", waypoint=BY_POD)], True),
    ("for an address in another network", [AT, service("shop/r.example", "far/10.96.0.1", waypoint=BY_POD)], False),
    (
        "for the service, but the address is a workload's",
        [AT, guarded_by(BY_POD), workload("lab//else", SERVER_VIP)],
        False,
    ),
]


@pytest.mark.parametrize(("parts", "accepted"), [row[1:] for row in ACCEPTED], ids=[row[0] for row in ACCEPTED])
def test_acceptance_as_a_waypoint(parts: list[Any], accepted: bool) -> None:
    outcome = decide(mesh(*parts), WAYPOINT_IP, f"{SERVER_VIP}:80")
    if accepted:
        assert isinstance(outcome, InboundRoute)
        assert str(outcome.upstream) == f"{WAYPOINT_IP}:80"
    else:
        assert isinstance(outcome, NoInboundRoute)
        assert outcome.status == 400


# --------------------------------------------------------------------------------------------------------- which port


def server(*, ports: dict[int, int], of_service: dict[int, int], **fields: Any) -> MeshSnapshot:
    return mesh(
        workload(SERVER, SERVER_IP, endpoint_of={f"shop/{HOST}": ports}, **{**HBONE, **fields}),
        service(f"shop/{HOST}", f"/{SERVER_VIP}", ports=of_service),
    )


PORTS = [
    ("svc_hostname_port: the service's target port", server(ports={}, of_service={80: 8080}), f"{HOST}:80", 8080),
    (
        "svc_hostname_named_port: the endpoint's",
        server(ports={80: 9090}, of_service={80: 0}),
        f"{HOST}:80",
        9090,
    ),
    ("the endpoint's before the service's", server(ports={80: 9090}, of_service={80: 8080}), f"{HOST}:80", 9090),
    (
        "the endpoint's also while it is unhealthy",
        server(ports={80: 9090}, of_service={80: 8080}, **UNHEALTHY),
        f"{HOST}:80",
        9090,
    ),
    ("a name in other letters", server(ports={}, of_service={80: 8080}), "SERVER.example.:80", 8080),
    ("an address: its port as it is", server(ports={80: 9090}, of_service={80: 8080}), f"{SERVER_IP}:80", 80),
    (
        "an application tunnel's instead",
        server(ports={}, of_service={80: 8080}, **app_tunnel(15088)),
        f"{HOST}:80",
        15088,
    ),
    (
        "an application tunnel without a port of its own",
        server(ports={}, of_service={80: 8080}, **app_tunnel(None)),
        f"{HOST}:80",
        8080,
    ),
    (
        "an application tunnel that wants no header",
        server(ports={}, of_service={80: 8080}, **app_tunnel(15088, "NONE")),
        f"{SERVER_IP}:80",
        15088,
    ),
]


@pytest.mark.parametrize(("snapshot", "authority", "port"), [row[1:] for row in PORTS], ids=[row[0] for row in PORTS])
def test_which_port(snapshot: MeshSnapshot, authority: str, port: int) -> None:
    outcome = decide(snapshot, SERVER_IP, authority)
    assert isinstance(outcome, InboundRoute)
    assert outcome.rbac_destination == Endpoint(ip_address(SERVER_IP), port)
    assert outcome.upstream.port == port


REFUSED = [
    ("unknown hostname", world(), "nobody.example:80", 503, "unknown hostname: nobody.example"),
    ("a port that the service has not", world(), f"{HOST}:81", 503, "no port for hostname: shop/server.example has no"),
    (
        "a named port that we do not map",
        server(ports={}, of_service={80: 0}),
        f"{HOST}:80",
        503,
        "no port for hostname",
    ),
    ("a port of the proxy", world(), f"{SERVER_IP}:15008", 503, "10.0.1.1:15008 is a port of the proxy itself"),
    ("another port of the proxy", world(), f"{SERVER_IP}:15001", 503, "10.0.1.1:15001 is a port of the proxy itself"),
    (
        "a service whose target port is the proxy's",
        server(ports={}, of_service={80: 15006}),
        f"{HOST}:80",
        503,
        "10.0.1.1:15006 is a port of the proxy itself",
    ),
    (
        "an application tunnel to the proxy",
        server(ports={}, of_service={80: 8080}, **app_tunnel(15008)),
        f"{HOST}:80",
        503,
        "10.0.1.1:15008 is a port of the proxy itself",
    ),
    (
        "a service without VIP for a PROXY header",
        mesh(
            workload(SERVER, SERVER_IP, endpoint_of={f"shop/{HOST}": {}}, **app_tunnel(), **HBONE),
            service(f"shop/{HOST}"),
        ),
        f"{HOST}:80",
        503,
        "no address for hostname: shop/server.example has no VIP",
    ),
    (
        "a target port that is none",
        server(ports={80: 70000}, of_service={80: 0}),
        f"{HOST}:80",
        503,
        "shop/server is said to listen at 70000, which is no port",
    ),
    (
        "an application tunnel at no port",
        server(ports={}, of_service={}, **app_tunnel(0)),
        PLAIN,
        503,
        "shop/server is",
    ),
    ("hbone_ip_mismatch", world(), "192.0.2.1:80", 400, "ip mismatch: the peer dialled 10.0.1.1 and asks for 192."),
]


@pytest.mark.parametrize(
    ("snapshot", "authority", "status", "reason"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
def test_refused(snapshot: MeshSnapshot, authority: str, status: int, reason: str) -> None:
    outcome = decide(snapshot, SERVER_IP, authority)
    assert isinstance(outcome, NoInboundRoute)
    assert outcome.status == status
    assert outcome.reason.startswith(reason)


# ------------------------------------------------------------------------------------------------------- PROXY headers

TUNNELLED = {**app_tunnel(), **HBONE}
TARGETS = [
    ("an address as it was asked for", [f"/{SERVER_VIP}"], "192.0.2.7:443", "192.0.2.7:443"),
    ("an IPv6 address", [f"/{SERVER_VIP}"], "[2001:db8::7]:443", "[2001:db8::7]:443"),
    ("a name: the VIP with the service's port", [f"/{SERVER_VIP}"], f"{HOST}:80", f"{SERVER_VIP}:80"),
    ("IPv4 before IPv6", ["/2001:db8::1", f"/{SERVER_VIP}"], f"{HOST}:80", f"{SERVER_VIP}:80"),
    ("the own network before IPv4", ["far/10.96.0.9", "/2001:db8::1"], f"{HOST}:80", "[2001:db8::1]:80"),
    ("another network's if there is no other", ["far/10.96.0.9"], f"{HOST}:80", "10.96.0.9:80"),
]


@pytest.mark.parametrize(("vips", "authority", "target"), [row[1:] for row in TARGETS], ids=[row[0] for row in TARGETS])
def test_the_target_in_a_proxy_header(vips: list[str], authority: str, target: str) -> None:
    snapshot = mesh(workload(SERVER, SERVER_IP, **TUNNELLED), service(f"shop/{HOST}", *vips))
    outcome = decide(snapshot, SERVER_IP, authority)
    assert isinstance(outcome, InboundRoute)
    assert outcome.tunnel_target == Endpoint.parse(target)
    assert outcome.proxy_protocol


def test_an_application_tunnel_is_at_loopback_of_the_family_that_was_dialled() -> None:
    snapshot = mesh(workload(SERVER, SERVER_IP, "fd00::1:1", **TUNNELLED))
    for dialled, upstream in ((SERVER_IP, "127.0.0.1:15088"), ("[fd00::1:1]", "[::1]:15088")):
        outcome = decide(snapshot, dialled, "192.0.2.7:80", uid=SERVER)
        assert isinstance(outcome, InboundRoute)
        assert (str(outcome.upstream), outcome.keep_source) == (upstream, False)


def test_an_application_tunnel_that_is_not_at_loopback() -> None:
    outcome = decide(
        mesh(workload(SERVER, SERVER_IP, **TUNNELLED)),
        SERVER_IP,
        "192.0.2.7:80",
        config=RoutingConfig(localhost_app_tunnel=False),
    )
    assert isinstance(outcome, InboundRoute)
    assert (str(outcome.upstream), outcome.keep_source) == (f"{SERVER_IP}:15088", True)
    assert outcome.proxy_protocol


# ---------------------------------------------------------------------------------------------- which service was meant

A, B = f"shop/{HOST}", "shop/other.example"


def services(**by_letter: dict[int, int]) -> MeshSnapshot:
    """A server that is an endpoint of `a` and `b`; the ports of these, and its own for them."""
    of = {A: by_letter.get("maps_a", {}), B: by_letter.get("maps_b", {})}
    return mesh(
        workload(SERVER, SERVER_IP, endpoint_of=of, **HBONE),
        service(A, "/10.96.0.1", ports=by_letter["a"]),
        service(B, "/10.96.0.2", ports=by_letter["b"]),
        service("shop/foreign.example", "/10.96.0.3", ports={80: 8080}),
    )


MEANT = [
    ("the only one with the port", services(a={80: 8080}, b={81: 8081}), 8081, None, B),
    ("the first of two with the port", services(a={80: 8080}, b={81: 8080}), 8080, None, A),
    ("what the peer says", services(a={80: 8080}, b={81: 8080}), 8080, "other.example", B),
    ("what the peer says, whatever the port", services(a={80: 8080}, b={81: 8081}), 8080, "OTHER.example", B),
    ("not what is none of its services", services(a={80: 8080}, b={81: 8081}), 8080, "foreign.example", A),
    ("not what is no service", services(a={80: 8080}, b={81: 8081}), 8080, "nobody.example", A),
    ("a named port", services(a={80: 0}, b={80: 0}, maps_b={80: 9090}), 9090, None, B),
    ("none with the port", services(a={80: 8080}, b={81: 8081}), 9999, None, None),
]


@pytest.mark.parametrize(
    ("snapshot", "port", "host", "meant"), [row[1:] for row in MEANT], ids=[row[0] for row in MEANT]
)
def test_which_service_was_meant(snapshot: MeshSnapshot, port: int, host: str | None, meant: str | None) -> None:
    outcome = decide(snapshot, SERVER_IP, f"{SERVER_IP}:{port}", host=host)
    assert isinstance(outcome, InboundRoute)
    assert (None if outcome.service is None else str(outcome.service.key)) == meant
    assert destination_service(snapshot, snapshot.workloads[SERVER], port, host) is outcome.service


def test_a_name_says_which_service_was_meant() -> None:
    snapshot = mesh(
        workload(SERVER, SERVER_IP, endpoint_of={A: {}, f"other/{HOST}": {}}, **HBONE),
        service(f"other/{HOST}", "/10.96.0.2", canonical=True, ports={80: 9999}),
        service(A, "/10.96.0.1", ports={80: 8080}),
        service(B, "/10.96.0.3", ports={80: 8080}),
    )
    outcome = decide(snapshot, SERVER_IP, f"{HOST}:80", host="other.example")
    assert isinstance(outcome, InboundRoute)
    assert (outcome.service, outcome.upstream.port) == (snapshot.services[name(A)], 8080)


def test_a_name_that_only_others_see() -> None:
    """Behind a gateway, a waypoint serves what its own namespace does not see."""
    snapshot = mesh(workload(SERVER, SERVER_IP, **HBONE), service(f"other/{HOST}", "/10.96.0.2", **PRIVATE))
    outcome = decide(snapshot, SERVER_IP, f"{HOST}:80")
    assert isinstance(outcome, InboundRoute)
    assert outcome.upstream.port == 8080
