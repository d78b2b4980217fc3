"""Metrics: names and labels that dashboards know, bytes of open connections, bounded cardinality."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from hbone.errors import (
    CertificateUnavailable,
    ConnectFailed,
    HboneError,
    IdentityRefused,
    PeerIdentityMismatch,
    PolicyDenied,
    RemoteProtocolError,
    RequestRejected,
    SessionClosed,
    TunnelReset,
    Unreachable,
)
from hbone.protocol import ErrorCode
from hbone.telemetry import Metrics, MetricsObserver, TrafficLabels, failure_cause, reset_in_words, response_flag

if TYPE_CHECKING:
    from hbone.transport import Observer

CART = "spiffe://cluster.local/ns/shop/sa/cart"
OPENMETRICS = "application/openmetrics-text; version=1.0.0"
STOCK = "spiffe://cluster.local/ns/shop/sa/stock"


def samples(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    _, body = metrics.render()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


def value(metrics: Metrics, sample: str, **labels: str) -> float | None:
    """The sample whose labels are these, and no others unless they are ``unknown``."""
    wanted = set(labels.items())
    found = [
        number
        for (name, said), number in samples(metrics).items()
        if name == sample and wanted <= said and all(text == "unknown" for _, text in said - wanted)
    ]
    assert len(found) <= 1
    return found[0] if found else None


def tcp(flags: str = "-", reporter: str = "source") -> dict[str, str]:
    return {
        "reporter": reporter,
        "source_principal": CART,
        "destination_principal": STOCK,
        "request_protocol": "tcp",
        "response_flags": flags,
        "connection_security_policy": "mutual_tls",
    }


def test_a_connection_from_open_to_closed() -> None:
    metrics = Metrics(version="1.2")
    connection = metrics.connection_opened(reporter="source", source_principal=CART, destination_principal=STOCK)
    assert value(metrics, "istio_tcp_connections_opened_total", **tcp()) == 1
    assert value(metrics, "istio_tcp_connections_closed_total", **tcp()) is None
    connection.closed(11, 22)
    connection.closed(11, 22)
    assert value(metrics, "istio_tcp_connections_closed_total", **tcp()) == 1
    assert value(metrics, "istio_tcp_received_bytes_total", **tcp()) == 11
    assert value(metrics, "istio_tcp_sent_bytes_total", **tcp()) == 22
    assert value(metrics, "istio_build", component="hbone", tag="1.2") == 1


def test_a_failed_one_has_its_flag_only_on_the_closed_counter() -> None:
    metrics = Metrics()
    metrics.connection_opened(reporter="source", source_principal=CART, destination_principal=STOCK).closed(
        5, 0, "CONNECT"
    )
    assert value(metrics, "istio_tcp_connections_opened_total", **tcp()) == 1
    assert value(metrics, "istio_tcp_received_bytes_total", **tcp()) == 5
    assert value(metrics, "istio_tcp_connections_closed_total", **tcp("CONNECT")) == 1
    assert value(metrics, "istio_tcp_connections_failed_total", **tcp("CONNECT")) == 1
    assert value(metrics, "istio_tcp_connections_closed_total", **tcp()) is None


def test_bytes_of_open_connections_show_at_each_scrape_and_never_twice() -> None:
    metrics = Metrics()
    now = [0, 0]
    connection = metrics.connection_opened(
        reporter="source", source_principal=CART, destination_principal=STOCK, live=lambda: (now[0], now[1])
    )
    for received, sent in [(0, 0), (10, 5), (10, 5), (30, 7)]:
        now[:] = received, sent
        assert value(metrics, "istio_tcp_received_bytes_total", **tcp()) == received
        assert value(metrics, "istio_tcp_sent_bytes_total", **tcp()) == sent
    connection.closed(31, 6)  # a final count below a live one must not make a counter go down
    assert value(metrics, "istio_tcp_received_bytes_total", **tcp()) == 31
    assert value(metrics, "istio_tcp_sent_bytes_total", **tcp()) == 7


def test_principals_are_bounded() -> None:
    metrics = Metrics(max_label_sets=10)
    for n in range(500):
        metrics.connection_opened(reporter="destination", source_principal=f"{CART}{n}").closed(1, 1, f"nonsense {n}")
    opened = {k: v for k, v in samples(metrics).items() if k[0] == "istio_tcp_connections_opened_total"}
    assert len(opened) == 11
    assert sum(opened.values()) == 500
    rest = {
        **{name: "other" for name in TrafficLabels._fields if name.startswith("source_")},
        "reporter": "destination",
        "request_protocol": "tcp",
        "response_flags": "-",
        "connection_security_policy": "mutual_tls",
    }
    assert value(metrics, "istio_tcp_connections_opened_total", **rest) == 490
    assert value(metrics, "istio_tcp_connections_closed_total", **rest | {"response_flags": "other"}) == 490


def test_sets_of_labels_are_bounded_whatever_both_sides_are() -> None:
    """A flood of far sides folds into ``other`` and leaves our own workloads apart; a flood of both folds wholly."""
    metrics = Metrics(max_label_sets=10)
    for n in range(2000):
        metrics.connection_opened(
            labels=TrafficLabels(
                "destination",
                source_workload=f"far{n}",
                destination_workload=f"own{n % 3}",
                destination_service=f"s{n}",
            )
            if n >= 1000
            else TrafficLabels("destination", source_workload=f"far{n}", destination_workload=f"own{n % 3}")
        ).closed(1, 1)
    opened = {k[1]: v for k, v in samples(metrics).items() if k[0] == "istio_tcp_connections_opened_total"}
    assert len(opened) <= 2 * 10 + 2
    assert sum(opened.values()) == 2000
    own = [
        v for k, v in opened.items() if ("source_workload", "other") in k and ("destination_service", "unknown") in k
    ]
    assert sum(own) == 990  # the first thousand but ten: which of our own workloads is still known
    assert len(own) == 3


def test_plain_connections_and_unknown_principals() -> None:
    metrics = Metrics()
    metrics.connection_opened(reporter="source", mutual_tls=False).closed(1, 1)
    labels = {
        "reporter": "source",
        "source_principal": "unknown",
        "destination_principal": "unknown",
        "request_protocol": "tcp",
        "response_flags": "-",
        "connection_security_policy": "unknown",
    }
    assert value(metrics, "istio_tcp_connections_closed_total", **labels) == 1


def test_sessions_and_tunnels() -> None:
    metrics = Metrics()
    metrics.session_opened("client")
    metrics.session_opened("client")
    metrics.session_closed("client", SessionClosed("gone"))
    metrics.connect_finished("client", 0.004)
    metrics.tunnel_opened("client")
    metrics.tunnel_opened("client")
    metrics.tunnel_closed("client")
    metrics.tunnel_refused("server", 401)
    metrics.tunnel_refused("server", 499)
    metrics.tunnel_refused("client", None)
    assert value(metrics, "hbone_sessions_open", role="client") == 1
    assert value(metrics, "hbone_sessions_ended_total", role="client", cause="closed") == 1
    assert value(metrics, "hbone_tunnels_open", role="client") == 1
    assert value(metrics, "hbone_tunnels_refused_total", role="server", status="401") == 1
    assert value(metrics, "hbone_tunnels_refused_total", role="server", status="other") == 1
    assert value(metrics, "hbone_tunnels_refused_total", role="client", status="none") == 1
    assert value(metrics, "hbone_connect_duration_seconds_count", role="client") == 1
    assert value(metrics, "hbone_connect_duration_seconds_bucket", role="client", le="0.0025") == 0
    assert value(metrics, "hbone_connect_duration_seconds_bucket", role="client", le="0.005") == 1
    assert value(metrics, "hbone_connect_duration_seconds_bucket", role="client", le="+Inf") == 1


def test_handshakes() -> None:
    metrics = Metrics()
    metrics.handshake_finished("server", 0.002)
    metrics.handshake_finished("server", 99.0)
    metrics.handshake_finished("server", 1.0, TimeoutError())
    assert value(metrics, "hbone_handshake_duration_seconds_count", role="server") == 2
    assert value(metrics, "hbone_handshake_duration_seconds_sum", role="server") == pytest.approx(99.002)
    assert value(metrics, "hbone_handshake_failures_total", role="server", cause="timeout") == 1


def test_readings_of_others() -> None:
    metrics = Metrics()
    metrics.add_reading("hbone_access_log_dropped", "Lines lost.", lambda: 3, counter=True)
    metrics.add_reading("hbone_pool_waiting", "Waiters.", lambda: 4)
    assert value(metrics, "hbone_access_log_dropped_total") == 3
    assert value(metrics, "hbone_pool_waiting") == 4


@pytest.mark.parametrize(
    ("accept", "kind", "end"),
    [
        (None, "text/plain; version=0.0.4", "\n"),
        ("text/plain", "text/plain; version=0.0.4", "\n"),
        (
            "application/openmetrics-text; version=1.0.0, text/plain;q=0.5",
            OPENMETRICS,
            "# EOF\n",
        ),
        ("application/openmetrics-text; version=garbage", OPENMETRICS, "# EOF\n"),
        (",;,", "text/plain; version=0.0.4", "\n"),
    ],
)
def test_formats(accept: str | None, kind: str, end: str) -> None:
    metrics = Metrics()
    metrics.connection_opened(reporter="source").closed(1, 1)
    metrics.handshake_finished("client", 0.1)
    content_type, body = metrics.render(accept)
    assert content_type.startswith(kind)
    assert body.decode().endswith(end)
    assert b"_created" not in body


def test_two_instances_share_nothing() -> None:
    one, two = Metrics(), Metrics()
    one.session_opened("client")
    assert value(two, "hbone_sessions_open", role="client") is None


def chained(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def hidden(error: Exception, context: Exception) -> Exception:
    error.__context__ = context
    error.__suppress_context__ = True
    return error


def test_what_sessions_tell_is_counted() -> None:
    metrics = Metrics()
    observer: Observer = MetricsObserver(metrics)
    session: Any = SimpleNamespace(client=True)
    tunnel: Any = SimpleNamespace(session=session)
    observer.handshake_finished(client=True, seconds=0.1, peer=None, error=None)
    observer.handshake_finished(client=False, seconds=0.1, peer=None, error=IdentityRefused("no"))
    observer.session_opened(session)
    observer.session_opened(session)
    observer.session_closed(session, None)
    observer.tunnel_opened(tunnel)
    observer.tunnel_opened(tunnel)
    observer.tunnel_closed(tunnel, None)
    observer.tunnel_refused(session, "a:1", 503, "no")
    assert value(metrics, "hbone_handshake_duration_seconds_count", role="client") == 1
    assert value(metrics, "hbone_handshake_failures_total", role="server", cause="identity_refused") == 1
    assert value(metrics, "hbone_sessions_open", role="client") == 1
    assert value(metrics, "hbone_sessions_ended_total", role="client", cause="none") == 1
    assert value(metrics, "hbone_tunnels_open", role="client") == 1
    assert value(metrics, "hbone_tunnels_refused_total", role="client", status="503") == 1


@pytest.mark.parametrize(
    ("error", "flag", "cause"),
    [
        (RequestRejected(401), "DENY", "other"),
        (RequestRejected(503), "CONNECT", "other"),
        (RequestRejected(503, flag="CERT_REVOKED"), "CERT_REVOKED", "other"),
        (PolicyDenied(401), "CONNECT", "refused"),
        (Unreachable(503), "CONNECT", "refused"),
        (PeerIdentityMismatch(expected=["a"], presented="b"), "TLS_FAILURE", "peer_identity"),
        (IdentityRefused("no"), "TLS_FAILURE", "identity_refused"),
        (CertificateUnavailable("x", "y"), "IDENTITY_ERROR", "no_certificate"),
        (RemoteProtocolError("x"), "H2_HANDSHAKE_FAILURE", "protocol"),
        (chained(ConnectFailed("x"), TimeoutError()), "NETWORK_POLICY", "timeout"),
        (hidden(ConnectFailed("x"), trio.TooSlowError()), "NETWORK_POLICY", "timeout"),
        (chained(ConnectFailed("x"), ConnectionRefusedError()), "CONNECT", "network"),
        (chained(SessionClosed("ping"), TimeoutError()), "CONNECT", "timeout"),
        (SessionClosed("x"), "CONNECT", "closed"),
        (ConnectFailed("bad TLS"), "CONNECT", "tls"),
        (HboneError("x"), "CONNECT", "other"),
    ],
)
def test_words_for_errors(error: Exception, flag: str, cause: str) -> None:
    assert response_flag(error) == flag
    assert failure_cause(error) == cause


def broken(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def reset(code: ErrorCode, *, remote: bool) -> TunnelReset:
    return TunnelReset(f"{'theirs' if remote else 'ours'}: {code.name}", error_code=code, remote=remote)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (broken(errno.ECONNRESET), "Connection reset by peer"),
        (broken(errno.EPIPE), "Broken pipe"),
        (broken(errno.ETIMEDOUT), None),
        (broken(errno.EHOSTUNREACH), None),
        (reset(ErrorCode.NO_ERROR, remote=True), "theirs: NO_ERROR"),
        (reset(ErrorCode.CANCEL, remote=True), "theirs: CANCEL"),
        (reset(ErrorCode.STREAM_CLOSED, remote=True), "theirs: STREAM_CLOSED"),
        (reset(ErrorCode.CONNECT_ERROR, remote=True), "theirs: CONNECT_ERROR"),
        (reset(ErrorCode.INTERNAL_ERROR, remote=True), None),
        (reset(ErrorCode.FLOW_CONTROL_ERROR, remote=True), None),
        (reset(ErrorCode.CONNECT_ERROR, remote=False), "ours: CONNECT_ERROR"),
        (chained(reset(ErrorCode.CONNECT_ERROR, remote=False), broken(errno.ECONNRESET)), "ours: CONNECT_ERROR"),
        (chained(reset(ErrorCode.CONNECT_ERROR, remote=False), broken(errno.ETIMEDOUT)), None),
        (reset(ErrorCode.CANCEL, remote=False), None),
        (reset(ErrorCode.FLOW_CONTROL_ERROR, remote=False), None),
        (SessionClosed("x"), None),
        (chained(ConnectFailed("x"), broken(errno.ECONNRESET)), None),
    ],
)
def test_what_is_the_reset_of_an_application(error: Exception, words: str | None) -> None:
    assert reset_in_words(error) == words


def test_no_error_no_flag() -> None:
    assert response_flag(None) == "-"


def test_a_loop_of_causes_ends() -> None:
    error = HboneError("x")
    error.__context__ = inner = HboneError("y")
    inner.__context__ = error
    assert failure_cause(error) == "other"
