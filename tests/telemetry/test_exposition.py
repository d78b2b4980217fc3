"""The text of a scrape: what both of prometheus' formats say, read back by prometheus' own parsers."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_plain

from hbone.certs import SvidSummary
from hbone.errors import IdentityRefused
from hbone.telemetry import Metrics, TrafficLabels
from hbone.telemetry._exposition import Family, Texts, exposition
from hbone.transport import PoolStatistics, SessionStatistics

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
CART = TrafficLabels(
    reporter="source",
    source_workload="cart",
    source_principal="spiffe://cluster.local/ns/shop/sa/cart",
    destination_service="stock.shop.svc.cluster.local",
    connection_security_policy="mutual_tls",
)
#: As it stands in a scrape.
CART_TEXT = (
    'reporter="source",source_workload="cart",source_canonical_service="unknown",source_canonical_revision="unknown",'
    'source_workload_namespace="unknown",source_principal="spiffe://cluster.local/ns/shop/sa/cart",'
    'source_app="unknown",source_version="unknown",source_cluster="unknown",'
    'destination_service="stock.shop.svc.cluster.local",destination_service_namespace="unknown",'
    'destination_service_name="unknown",destination_workload="unknown",destination_canonical_service="unknown",'
    'destination_canonical_revision="unknown",destination_workload_namespace="unknown",'
    'destination_principal="unknown",destination_app="unknown",destination_version="unknown",'
    'destination_cluster="unknown",request_protocol="tcp",response_flags="-",'
    'connection_security_policy="mutual_tls",source_region="unknown",source_zone="unknown",'
    'destination_region="unknown",destination_zone="unknown"'
)


def session(unsent: int, buffered: int) -> Any:
    class Session:
        def statistics(self) -> SessionStatistics:
            return SessionStatistics(
                open_streams=0,
                tunnels_opened=0,
                tunnels_refused=0,
                bytes_sent=0,
                bytes_received=0,
                send_window=0,
                unsent=unsent,
                receive_buffered=buffered,
                draining=False,
                closed=False,
            )

    return Session()


def pool(**numbers: int) -> PoolStatistics:
    names = "connecting ready full draining tunnels waiting dials dials_failed requests reused retried".split()
    return PoolStatistics(**dict.fromkeys(names, 0) | numbers, sessions=())


def busy() -> Metrics:
    """Something in every family."""
    metrics = Metrics(version="1.2")
    metrics.connection_opened(labels=CART).closed(11, 22)
    metrics.connection_opened(labels=CART).closed(0, 0, "DENY")
    metrics.connection_opened(reporter="destination")
    metrics.socket_opened("source")
    metrics.session_opened("client", session(1, 2))
    metrics.session_opened("client")
    metrics.session_closed("client", None)
    metrics.tunnel_opened("client")
    metrics.tunnel_refused("client", 503)
    metrics.connect_finished("client", 0.004)
    metrics.handshake_finished("client", 0.002)
    metrics.handshake_finished("server", 0.002, IdentityRefused("no"))
    metrics.policy_verdict("deny")
    metrics.mesh_read(1, used=True)
    metrics.add_pool(lambda: pool(ready=1, dials=2))
    metrics.add_reading("hbone_access_log_dropped", "Lost.", lambda: 3, counter=True)
    return metrics


def read(metrics: Metrics, *, openmetrics: bool) -> dict[str, Any]:
    kind, body = metrics.render(OPENMETRICS if openmetrics else None)
    assert kind.startswith("application/openmetrics-text" if openmetrics else "text/plain")
    parse = parse_openmetrics if openmetrics else parse_plain
    return {family.name: family for family in parse(body.decode())}  # type: ignore[no-untyped-call]


def number(metrics: Metrics, name: str, **labels: str) -> float | None:
    families = read(metrics, openmetrics=True)
    found = [
        sample.value
        for family in families.values()
        for sample in family.samples
        if sample.name == name and sample.labels == labels
    ]
    assert len(found) <= 1
    return found[0] if found else None


@pytest.mark.parametrize("openmetrics", [False, True])
def test_both_formats_are_valid_and_say_the_same(openmetrics: bool) -> None:
    families = read(busy(), openmetrics=openmetrics)
    ours = {name: family for name, family in families.items() if name.startswith(("istio_", "hbone_"))}
    assert list(ours) == [
        "istio_build",
        "istio_tcp_connections_opened",
        "istio_tcp_connections_closed",
        "istio_tcp_received_bytes",
        "istio_tcp_sent_bytes",
        "istio_tcp_connections_failed",
        "istio_tcp_sockets_open",
        "hbone_sessions_open",
        "hbone_sessions_ended",
        "hbone_tunnels_open",
        "hbone_tunnels_refused",
        "hbone_buffered_bytes",
        "hbone_connect_duration_seconds",
        "hbone_handshake_duration_seconds",
        "hbone_handshake_failures",
        "hbone_policy_verdicts",
        "hbone_mesh_reads",
        "hbone_mesh_faults",
        "hbone_pool_sessions",
        "hbone_pool_tunnels",
        "hbone_pool_waiting",
        "hbone_pool_dials",
        "hbone_pool_dials_failed",
        "hbone_pool_requests",
        "hbone_pool_reused",
        "hbone_pool_retried",
        "hbone_access_log_dropped",
    ]
    assert {family.type for family in ours.values()} == {"counter", "gauge", "histogram"}
    for name, family in ours.items():
        # Counters are named without their suffix in both, the plain parser takes it off.
        assert family.documentation.endswith("."), name
        assert family.samples, name
    assert ours["hbone_connect_duration_seconds"].type == "histogram"
    assert ours["istio_tcp_received_bytes"].type == "counter"


def test_a_line_is_as_ztunnel_writes_it() -> None:
    """Apart from the ``.0``, which Go does not write."""
    metrics = Metrics(version="1.2", component="hbone")
    metrics.connection_opened(labels=CART).closed(11, 22)
    metrics.connection_opened(labels=CART).closed(0, 0, "DENY")
    lines = metrics.render(OPENMETRICS)[1].decode().splitlines()
    flagged = CART_TEXT.replace('response_flags="-"', 'response_flags="DENY"')
    assert lines[: lines.index(next(line for line in lines if "process_" in line))] == [
        "# HELP istio_build Istio component build info.",
        "# TYPE istio_build gauge",
        'istio_build{component="hbone",tag="1.2"} 1.0',
        "# HELP istio_tcp_connections_opened The total number of TCP connections opened.",
        "# TYPE istio_tcp_connections_opened counter",
        f"istio_tcp_connections_opened_total{{{CART_TEXT}}} 2.0",
        "# HELP istio_tcp_connections_closed The total number of TCP connections closed.",
        "# TYPE istio_tcp_connections_closed counter",
        f"istio_tcp_connections_closed_total{{{CART_TEXT}}} 1.0",
        f"istio_tcp_connections_closed_total{{{flagged}}} 1.0",
        "# HELP istio_tcp_received_bytes The size of total bytes received during request in case of a TCP connection.",
        "# TYPE istio_tcp_received_bytes counter",
        f"istio_tcp_received_bytes_total{{{CART_TEXT}}} 11.0",
        "# HELP istio_tcp_sent_bytes The size of total bytes sent during response in case of a TCP connection.",
        "# TYPE istio_tcp_sent_bytes counter",
        f"istio_tcp_sent_bytes_total{{{CART_TEXT}}} 22.0",
        "# HELP istio_tcp_connections_failed The total number of TCP connections that failed to establish (unstable).",
        "# TYPE istio_tcp_connections_failed counter",
        f"istio_tcp_connections_failed_total{{{flagged}}} 1.0",
    ]
    assert lines[-1] == "# EOF"
    plain = metrics.render()[1].decode()
    assert "# TYPE istio_tcp_connections_opened_total counter\n" in plain
    assert "# HELP istio_tcp_connections_opened_total The total" in plain
    assert "# EOF" not in plain


def test_families_without_lines_are_left_out() -> None:
    ours = [name for name in read(Metrics(), openmetrics=True) if name.startswith(("istio_", "hbone_"))]
    assert ours == ["istio_build"]


@pytest.mark.parametrize("openmetrics", [False, True])
@settings(max_examples=60)
@given(text=st.text(max_size=20))
def test_any_text_is_read_back(openmetrics: bool, text: str) -> None:
    metrics = Metrics()
    metrics.connection_opened(labels=CART._replace(source_workload=text)).closed(1, 2)
    (sample,) = read(metrics, openmetrics=openmetrics)["istio_tcp_received_bytes"].samples
    expected = text.encode("utf-8", "replace").decode()
    assert sample.labels["source_workload"] == expected
    assert sample.labels["destination_service"] == CART.destination_service
    assert sample.value == 1


def test_injection_through_a_label() -> None:
    metrics = Metrics()
    evil = 'x"} 1\nistio_tcp_sent_bytes_total{reporter="source"} 999\n# EOF\\'
    metrics.connection_opened(labels=CART._replace(source_workload=evil)).closed(1, 2)
    body = metrics.render()[1].decode()
    (line,) = [line for line in body.splitlines() if line.startswith("istio_tcp_sent_bytes_total{")]
    assert (
        'source_workload="x\\"} 1\\nistio_tcp_sent_bytes_total{reporter=\\"source\\"} 999\\n# EOF\\\\",source_can'
        in line
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.0"),
        (2**63 + 1, "9223372036854775809.0"),
        (True, "1.0"),
        (0.25, "0.25"),
        (1e-05, "1e-05"),
        (math.inf, "+Inf"),
        (-math.inf, "-Inf"),
        (math.nan, "NaN"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    family = Family("a", "gauge", "A\nb \\ c.")
    family.add((), (), value)
    assert exposition([family], Texts(), openmetrics=True) == f"# HELP a A\\nb \\\\ c.\n# TYPE a gauge\na {text}\n"


def test_remembered_texts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hbone.telemetry._exposition._MAX_TEXTS", 10)
    texts = Texts()
    for n in range(100):
        assert texts.of(("a", "b"), (str(n), "")) == f'{{a="{n}",b=""}}'
        assert len(texts._known) <= 10


def test_a_program_can_have_it_in_its_own_registry() -> None:
    registry = CollectorRegistry()
    metrics = busy()
    registry.register(metrics)
    labels = CART._asdict()
    assert registry.get_sample_value("istio_tcp_received_bytes_total", labels) == 11
    assert registry.get_sample_value("istio_tcp_connections_opened_total", labels) == 2
    assert registry.get_sample_value("hbone_connect_duration_seconds_bucket", {"role": "client", "le": "0.005"}) == 1
    assert registry.get_sample_value("hbone_connect_duration_seconds_sum", {"role": "client"}) == 0.004


@pytest.mark.parametrize("openmetrics", [False, True])
def test_collectors_of_a_program_are_shown_too(openmetrics: bool) -> None:
    metrics = Metrics()
    Gauge("shop_carts", "Carts.", registry=metrics.registry).set(7)
    families = read(metrics, openmetrics=openmetrics)
    assert families["shop_carts"].samples[0].value == 7
    assert "process_open_fds" in families or "process_max_fds" not in families


def test_sockets() -> None:
    metrics = Metrics()
    for _ in range(3):
        metrics.socket_opened("source")
    metrics.socket_closed("source")
    metrics.add_sockets("destination", lambda: 4)
    metrics.add_sockets("destination", lambda: 5)
    metrics.add_sockets("source", lambda: 10)
    assert number(metrics, "istio_tcp_sockets_open", reporter="source") == 12
    assert number(metrics, "istio_tcp_sockets_open", reporter="destination") == 9


def test_policy_verdicts() -> None:
    metrics = Metrics()
    metrics.policy_verdict("allow")
    metrics.policy_verdict("deny")
    metrics.policy_verdict("deny")
    metrics.policy_verdict("deny", dry_run=True)
    metrics.policy_verdict("whatever the peer likes")
    name = "hbone_policy_verdicts_total"
    assert number(metrics, name, verdict="allow", dry_run="false") == 1
    assert number(metrics, name, verdict="deny", dry_run="false") == 2
    assert number(metrics, name, verdict="deny", dry_run="true") == 1
    assert number(metrics, name, verdict="other", dry_run="false") == 1


def test_readings_of_the_mesh_file() -> None:
    metrics = Metrics()
    assert number(metrics, "hbone_mesh_faults") is None
    for faults, used in ((0, True), (3, True), (2, False), (7, False)):
        metrics.mesh_read(faults, used=used)
    assert [number(metrics, "hbone_mesh_reads_total", result=name) for name in ("ok", "partial", "failed")] == [1, 1, 2]
    assert number(metrics, "hbone_mesh_faults") == 7
    metrics.mesh_read(0, used=True)
    assert number(metrics, "hbone_mesh_faults") == 0


def test_buffers_of_the_sessions_that_are_open() -> None:
    metrics = Metrics()
    one, two, three = session(1, 20), session(300, 4000), session(5, 5)
    metrics.session_opened("client", one)
    metrics.session_opened("client", two)
    metrics.session_opened("server", three)
    assert number(metrics, "hbone_buffered_bytes", role="client", direction="unsent") == 301
    assert number(metrics, "hbone_buffered_bytes", role="client", direction="received") == 4020
    assert number(metrics, "hbone_buffered_bytes", role="server", direction="received") == 5
    metrics.session_closed("client", None, two)
    metrics.session_closed("client", None, two)
    assert number(metrics, "hbone_buffered_bytes", role="client", direction="unsent") == 1


def test_pools_are_summed_up_and_what_they_counted_stays() -> None:
    metrics = Metrics()
    first, second = pool(ready=2, full=1, tunnels=7, dials=5, requests=9), pool(ready=1, draining=1, dials=2, retried=1)
    remove = metrics.add_pool(lambda: first)
    metrics.add_pool(lambda: second)
    assert number(metrics, "hbone_pool_sessions", state="ready") == 3
    assert number(metrics, "hbone_pool_sessions", state="draining") == 1
    assert number(metrics, "hbone_pool_sessions", state="connecting") == 0
    assert number(metrics, "hbone_pool_tunnels") == 7
    assert number(metrics, "hbone_pool_dials_total") == 7
    remove()
    remove()
    assert number(metrics, "hbone_pool_sessions", state="ready") == 1
    assert number(metrics, "hbone_pool_dials_total") == 7
    assert number(metrics, "hbone_pool_requests_total") == 9
    assert number(metrics, "hbone_pool_retried_total") == 1


def test_certificates_are_summed_up_and_what_was_asked_for_stays() -> None:
    def keeps(first_expiry: datetime | None, **numbers: int) -> SvidSummary:
        none = dict.fromkeys("available renewal_fails initializing unavailable requests requests_failed".split(), 0)
        return SvidSummary(first_expiry=first_expiry, **{**none, **numbers})

    metrics = Metrics()
    assert b"hbone_certificate" not in metrics.render()[1]
    soon, later = (datetime(2030, 1, day, tzinfo=UTC) for day in (1, 2))
    first = keeps(later, available=2, renewal_fails=1, requests=7, requests_failed=3)
    second = keeps(soon, available=1, initializing=2, unavailable=3, requests=4)
    remove = metrics.add_certificates(lambda: first)
    assert number(metrics, "hbone_certificate_expiry_timestamp_seconds") == later.timestamp()
    metrics.add_certificates(lambda: second)
    metrics.add_certificates(lambda: keeps(None))
    for state, count in {"available": 3, "renewal_fails": 1, "initializing": 2, "unavailable": 3}.items():
        assert number(metrics, "hbone_certificates", state=state) == count
    assert number(metrics, "hbone_certificate_expiry_timestamp_seconds") == soon.timestamp()
    remove()
    remove()
    assert number(metrics, "hbone_certificates", state="available") == 1
    assert number(metrics, "hbone_certificate_requests_total", result="ok") == 8
    assert number(metrics, "hbone_certificate_requests_total", result="failed") == 3


def test_readings_with_labels() -> None:
    metrics = Metrics()
    metrics.add_reading("x_up", "Up.", lambda: 1, labels={"who": "a"})
    metrics.add_reading("x_up", "Up.", lambda: 2, labels={"who": "b"})
    assert number(metrics, "x_up", who="a") == 1
    assert number(metrics, "x_up", who="b") == 2
    for labels in ({"who": "a"}, {"other": "a"}, None):
        with pytest.raises(ValueError, match="x_up"):
            metrics.add_reading("x_up", "Up.", lambda: 3, labels=labels)
    with pytest.raises(ValueError, match="x_up"):
        metrics.add_reading("x_up", "Up.", lambda: 3, labels={"who": "c"}, counter=True)
