"""From what the mesh and the peers say to the labels of a connection: each rule a row."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbone.identity import SpiffeIdentity
from hbone.mesh import Locality, Service, Workload
from hbone.protocol import Baggage, WorkloadType
from hbone.telemetry import LogNames, TrafficLabels, labels_for, log_names

TILL = Workload(
    uid="x//Pod/market/till-7",
    name="till-7",
    namespace="market",
    service_account="clerk",
    workload_name="till",
    workload_type="deployment",
    canonical_name="checkout",
    canonical_revision="v3",
    cluster_id="north",
    locality=Locality(region="eu", zone="eu-2", subzone="rack"),
)
LEDGER = Workload(
    uid="x//Pod/books/ledger-0",
    name="ledger-0",
    namespace="books",
    service_account="writer",
    trust_domain="corp.example",
    workload_name="ledger",
    canonical_name="ledger",
    cluster_id="south",
)
BARE = Workload(uid="x", name="x", namespace="ns", cluster_id="")
FAR = Baggage(
    cluster="far",
    namespace="abroad",
    workload_type=WorkloadType.CRONJOB,
    workload="nightly",
    service="reports",
    version="v9",
    region="us",
    zone="us-1",
)
LEDGER_SERVICE = Service(name="ledger", namespace="books", hostname="ledger.books.svc.cluster.local")
CLERK = SpiffeIdentity.parse("spiffe://cluster.local/ns/market/sa/clerk")

ORDER = """
    reporter
    source_workload source_canonical_service source_canonical_revision source_workload_namespace source_principal
    source_app source_version source_cluster
    destination_service destination_service_namespace destination_service_name
    destination_workload destination_canonical_service destination_canonical_revision destination_workload_namespace
    destination_principal destination_app destination_version destination_cluster
    request_protocol response_flags connection_security_policy
    source_region source_zone destination_region destination_zone
""".split()

# what we have of a side -> its labels without the prefix
PARTIES: list[tuple[str, Any, dict[str, str]]] = [
    (
        "a workload of the mesh",
        TILL,
        {
            "workload": "till",
            "canonical_service": "checkout",
            "canonical_revision": "v3",
            "workload_namespace": "market",
            "app": "checkout",
            "version": "v3",
            "cluster": "north",
            "region": "eu",
            "zone": "eu-2",
        },
    ),
    (
        "one that has no revision and no locality",
        LEDGER,
        {
            "workload": "ledger",
            "canonical_service": "ledger",
            "workload_namespace": "books",
            "app": "ledger",
            "cluster": "south",
        },
    ),
    ("one that has only a name", BARE, {"workload_namespace": "ns"}),
    (
        "baggage: the app is the workload",
        FAR,
        {
            "workload": "nightly",
            "canonical_service": "reports",
            "canonical_revision": "v9",
            "workload_namespace": "abroad",
            "app": "nightly",
            "version": "v9",
            "cluster": "far",
            "region": "us",
            "zone": "us-1",
        },
    ),
    (
        "baggage with a service only",
        Baggage(service="reports"),
        {"canonical_service": "reports"},
    ),
    ("empty baggage", Baggage(), {}),
    ("nothing", None, {}),
]
NAMES = "workload canonical_service canonical_revision workload_namespace app version cluster region zone".split()


def test_order() -> None:
    assert list(TrafficLabels._fields) == ORDER


@pytest.mark.parametrize("side", ["source", "destination"])
@pytest.mark.parametrize(("who", "expected"), [row[1:] for row in PARTIES], ids=[row[0] for row in PARTIES])
def test_values_of_a_side(side: str, who: Any, expected: dict[str, str]) -> None:
    labels = labels_for("source", **{side: who})._asdict()
    other = "destination" if side == "source" else "source"
    assert {name: labels[f"{side}_{name}"] for name in NAMES} == dict.fromkeys(NAMES, "unknown") | expected
    assert {labels[f"{other}_{name}"] for name in (*NAMES, "principal")} == {"unknown"}


@pytest.mark.parametrize(
    ("arguments", "source", "destination"),
    [
        # the source's principal is what it proved, never what the mesh says
        ({"source": TILL}, "unknown", "unknown"),
        ({"source": TILL, "source_principal": CLERK}, str(CLERK), "unknown"),
        ({"source": FAR, "source_principal": CLERK}, str(CLERK), "unknown"),
        # the destination's is the workload's, for plain TCP too
        ({"destination": LEDGER}, "unknown", "spiffe://corp.example/ns/books/sa/writer"),
        ({"destination": LEDGER, "mutual_tls": True}, "unknown", "spiffe://corp.example/ns/books/sa/writer"),
        ({"destination": FAR}, "unknown", "unknown"),
        ({"destination": FAR, "destination_principal": CLERK}, "unknown", str(CLERK)),
        ({"destination": LEDGER, "destination_principal": CLERK}, "unknown", str(CLERK)),
        ({"destination": Workload(uid="x", name="x", namespace="a b")}, "unknown", "unknown"),
        ({"source_principal": "spiffe://td/x", "destination_principal": "spiffe://td/y"}, "spiffe://td/x", "spiffe://td/y"),
    ],
)  # fmt: skip
def test_principals(arguments: Any, source: str, destination: str) -> None:
    labels = labels_for("source", **arguments)
    assert (labels.source_principal, labels.destination_principal) == (source, destination)


@pytest.mark.parametrize(
    ("service", "expected"),
    [
        (LEDGER_SERVICE, ("ledger.books.svc.cluster.local", "books", "ledger")),
        (None, ("unknown", "unknown", "unknown")),
    ],
)
def test_the_service_that_was_meant(service: Service | None, expected: tuple[str, str, str]) -> None:
    labels = labels_for("source", destination=LEDGER, service=service)
    assert (
        labels.destination_service,
        labels.destination_service_namespace,
        labels.destination_service_name,
    ) == expected


def test_what_is_fixed() -> None:
    plain = labels_for("destination")
    assert (plain.reporter, plain.request_protocol, plain.response_flags) == ("destination", "tcp", "-")
    assert plain.connection_security_policy == "unknown"
    assert labels_for("source", mutual_tls=True).connection_security_policy == "mutual_tls"


def test_a_whole_set() -> None:
    """A workload of the mesh through a waypoint: the next hop is the destination, the service is what was meant."""
    waypoint = Workload(
        uid="w", name="wp-1", namespace="books", service_account="wp", workload_name="wp", canonical_name="wp"
    )
    labels = labels_for(
        "source",
        source=TILL,
        destination=waypoint,
        service=LEDGER_SERVICE,
        source_principal=TILL.identity,
        mutual_tls=True,
    )
    assert ",".join(labels) == (
        "source,till,checkout,v3,market,spiffe://cluster.local/ns/market/sa/clerk,checkout,v3,north,"
        "ledger.books.svc.cluster.local,books,ledger,"
        "wp,wp,unknown,books,spiffe://cluster.local/ns/books/sa/wp,wp,unknown,Kubernetes,"
        "tcp,-,mutual_tls,eu,eu-2,unknown,unknown"
    )


@pytest.mark.parametrize(
    ("said", "label"),
    [
        ("x" * 1000, "x" * 256),
        ('a"b\\c', 'a"b\\c'),
        ("line\nend\r\x00\x1b[2J\u202e", "line\ufffdend\ufffd\ufffd\ufffd[2J\ufffd"),
        ("caf\u00e9", "caf\u00e9"),
    ],
)
def test_what_a_peer_says_is_bounded(said: str, label: str) -> None:
    assert labels_for("destination", source=Baggage(workload=said)).source_workload == label


@given(text=st.text())
def test_baggage_from_the_wire_becomes_printable(text: str) -> None:
    baggage = Baggage.parse_untrusted([Baggage(workload=text, service=text).encode()])
    for label in labels_for("destination", source=baggage):
        assert label.isprintable()
        assert 0 < len(label) <= 256


def test_folding_keeps_our_own_side() -> None:
    inbound = labels_for("destination", source=FAR, destination=LEDGER, service=LEDGER_SERVICE, mutual_tls=True)
    folded = inbound.without_peer()
    assert folded.source_workload == folded.source_principal == folded.source_zone == "other"
    assert folded.destination_workload == "ledger"
    assert (folded.reporter, folded.connection_security_policy) == ("destination", "mutual_tls")
    outbound = labels_for("source", source=TILL, destination=LEDGER, service=LEDGER_SERVICE).without_peer()
    assert outbound.source_workload == "till"
    assert outbound.destination_service == outbound.destination_workload == "other"
    nobody = inbound.without_parties()
    assert {value for name, value in nobody._asdict().items() if name.startswith(("source_", "destination_"))} == {
        "other"
    }


@pytest.mark.parametrize(
    ("who", "names"),
    [
        (TILL, LogNames("till-7", "market", "north")),
        (Workload(uid="u", name="", namespace="a", canonical_name="svc"), LogNames("svc", "a", "Kubernetes")),
        (BARE, LogNames("x", "ns", None)),
        (FAR, LogNames("reports", "abroad", "far")),
        (Baggage(workload="w"), LogNames(None, None, None)),
        (Baggage(namespace="n" * 999), LogNames(None, "n" * 256, None)),
        (None, LogNames(None, None, None)),
    ],
)
def test_names_for_the_access_log(who: Any, names: LogNames) -> None:
    assert log_names(who) == names
