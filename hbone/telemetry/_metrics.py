"""Metrics of a process, under the names that Istio's dashboards know.

Theory of operation: the data plane must not pay for being watched, so counting is plain integer arithmetic in dicts
that live in the event loop's thread, and only a scrape turns them into Prometheus families (`Metrics.collect`, the
custom collector of a registry of our own; nothing is registered globally). The bytes of an open connection are read
from its live statistics at scrape time and from its final ones at its end, so a tunnel that lives for days still shows.

Cardinality is bounded: after `max_label_sets` pairs of principals, new ones are counted under ``other``; all other
labels take their values from this code, not from the network.

As ztunnel does, ``received`` is what flows from the connecting side to the destination and ``sent`` the response, for
both reporters; the opened and byte counters always have the response flag ``-``, the closed counter has the final one.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics import exposition as openmetrics

from hbone.telemetry._cause import NO_FLAG, failure_cause
from hbone.telemetry._labels import OTHER, UNKNOWN, TrafficLabels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from prometheus_client.metrics_core import Metric

__all__ = ["Metrics", "OpenConnection"]

_FLAGS = frozenset(
    {
        NO_FLAG,
        "DENY",
        "CONNECT",
        "TLS_FAILURE",
        "H2_HANDSHAKE_FAILURE",
        "NETWORK_POLICY",
        "IDENTITY_ERROR",
        "CERT_REVOKED",
    }
)
_STATUSES = frozenset({400, 401, 403, 404, 429, 500, 502, 503, 504})
_PLAIN = "text/plain; version=0.0.4; charset=utf-8"
_OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class _Histogram:
    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(_BUCKETS) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(_BUCKETS, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative, as the exposition wants them."""
        bounds = [*map(str, _BUCKETS), "+Inf"]
        so_far = 0
        result: list[tuple[str, float]] = []
        for bound, count in zip(bounds, self.counts, strict=True):
            so_far += count
            result.append((bound, so_far))
        return result


class _Traffic:
    """The sums of one label set; `closed` by response flag."""

    __slots__ = ("closed", "open", "opened", "received", "sent")

    def __init__(self) -> None:
        self.opened: int = 0
        self.received: int = 0
        self.sent: int = 0
        self.closed: dict[str, int] = {}
        self.open: set[OpenConnection] = set()


class OpenConnection:
    """One connection under way; made by `Metrics.connection_opened`."""

    __slots__ = ("_live", "_received", "_sent", "_traffic")

    def __init__(self, traffic: _Traffic, live: Callable[[], tuple[int, int]] | None) -> None:
        self._traffic = traffic
        self._live = live
        self._received = 0
        self._sent = 0

    def closed(self, received: int, sent: int, flag: str = NO_FLAG) -> None:
        """Counts the end; a second call does nothing.

        Args:
            received: bytes from the connecting side to the destination, all in all.
            sent: bytes of the response, all in all.
            flag: see `response_flag`.
        """
        traffic = self._traffic
        if self not in traffic.open:
            return
        traffic.open.remove(self)
        traffic.received += max(received - self._received, 0)
        traffic.sent += max(sent - self._sent, 0)
        if flag not in _FLAGS:
            flag = OTHER
        traffic.closed[flag] = traffic.closed.get(flag, 0) + 1

    def catch_up(self) -> None:
        """Moves what the live statistics say into the sums."""
        if self._live is None:
            return
        received, sent = self._live()
        traffic = self._traffic
        if received > self._received:
            traffic.received += received - self._received
            self._received = received
        if sent > self._sent:
            traffic.sent += sent - self._sent
            self._sent = sent


class Metrics:
    """All counters of one process (or one node, when a process runs several).

    Methods are synchronous, cost a few microseconds at most and belong to the event loop's thread; so does a scrape.

    Args:
        version: shown by ``istio_build``.
        component: shown by ``istio_build``.
        max_label_sets: how many `TrafficLabels` are told apart; of further ones the far side is counted as ``other``.
    """

    def __init__(self, *, version: str = UNKNOWN, component: str = "hbone", max_label_sets: int = 1000) -> None:
        self._build = (component, version)
        self._max_label_sets = max_label_sets
        self._tcp: dict[TrafficLabels, _Traffic] = {}
        self._sessions_open: dict[str, int] = {}
        self._sessions_ended: dict[tuple[str, str], int] = {}
        self._tunnels_open: dict[str, int] = {}
        self._handshakes: dict[str, _Histogram] = {}
        self._handshake_failures: dict[tuple[str, str], int] = {}
        self._connects: dict[str, _Histogram] = {}
        self._refusals: dict[tuple[str, str], int] = {}
        self._readings: list[tuple[str, str, bool, Callable[[], float]]] = []
        self.registry: CollectorRegistry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    # -- connections through the proxies ------------------------------------------------------------------------------

    def connection_opened(
        self,
        *,
        labels: TrafficLabels | None = None,
        reporter: str = "source",
        source_principal: str | None = None,
        destination_principal: str | None = None,
        mutual_tls: bool = True,
        live: Callable[[], tuple[int, int]] | None = None,
    ) -> OpenConnection:
        """Counts a connection, also one that is going to fail.

        Args:
            labels: all that is known (see `labels_for`); the next four arguments are for who knows no more than them.
            reporter: ``source`` (outbound) or ``destination`` (inbound).
            source_principal: the source's identity as text, if proven.
            destination_principal: the destination's identity as text, if known.
            mutual_tls: False for plain TCP.
            live: gives (received, sent) so far, in the sense of `OpenConnection.closed`; read at each scrape.

        Returns:
            What to tell the end to.
        """
        if labels is None:
            labels = TrafficLabels(
                reporter=reporter,
                source_principal=source_principal or UNKNOWN,
                destination_principal=destination_principal or UNKNOWN,
                connection_security_policy="mutual_tls" if mutual_tls else UNKNOWN,
            )
        traffic = self._tcp.get(labels) or self._new_traffic(labels)
        traffic.opened += 1
        connection = OpenConnection(traffic, live)
        traffic.open.add(connection)
        return connection

    def _new_traffic(self, labels: TrafficLabels) -> _Traffic:
        if len(self._tcp) >= self._max_label_sets:
            labels = labels.without_peer()
            if labels not in self._tcp and len(self._tcp) >= 2 * self._max_label_sets:
                labels = labels.without_parties()
        return self._tcp.setdefault(labels, _Traffic())

    # -- sessions and tunnels; role is "client" or "server" ------------------------------------------------------------

    def handshake_finished(self, role: str, duration: float, error: BaseException | None = None) -> None:
        """Counts a handshake: its seconds if it went well, its cause if not."""
        if error is not None:
            key = (role, failure_cause(error))
            self._handshake_failures[key] = self._handshake_failures.get(key, 0) + 1
            return
        histogram = self._handshakes.get(role)
        if histogram is None:
            histogram = self._handshakes[role] = _Histogram()
        histogram.observe(duration)

    def session_opened(self, role: str) -> None:
        """One more session."""
        self._sessions_open[role] = self._sessions_open.get(role, 0) + 1

    def session_closed(self, role: str, error: BaseException | None = None) -> None:
        """One session less, and why."""
        self._sessions_open[role] = self._sessions_open.get(role, 0) - 1
        key = (role, "none" if error is None else failure_cause(error))
        self._sessions_ended[key] = self._sessions_ended.get(key, 0) + 1

    def connect_finished(self, role: str, duration: float) -> None:
        """The seconds from asking for a tunnel (client) or being asked (server) to its 200."""
        histogram = self._connects.get(role)
        if histogram is None:
            histogram = self._connects[role] = _Histogram()
        histogram.observe(duration)

    def tunnel_opened(self, role: str) -> None:
        """One more tunnel."""
        self._tunnels_open[role] = self._tunnels_open.get(role, 0) + 1

    def tunnel_closed(self, role: str) -> None:
        """One tunnel less."""
        self._tunnels_open[role] = self._tunnels_open.get(role, 0) - 1

    def tunnel_refused(self, role: str, status: int | None) -> None:
        """A CONNECT that was refused: by us (server) or by the peer (client); no status if it was reset instead."""
        key = (role, "none" if status is None else str(status) if status in _STATUSES else OTHER)
        self._refusals[key] = self._refusals.get(key, 0) + 1

    # -- others' numbers ----------------------------------------------------------------------------------------------

    def add_reading(self, name: str, documentation: str, read: Callable[[], float], *, counter: bool = False) -> None:
        """Shows a number that somebody else keeps; `read` is called at each scrape.

        Args:
            name: without ``_total``.
            documentation: one sentence.
            read: gives the value now.
            counter: whether it only grows.
        """
        self._readings.append((name, documentation, counter, read))

    # -- scrape -------------------------------------------------------------------------------------------------------

    def render(self, accept: str | None = None) -> tuple[str, bytes]:
        """The content type and the text of a scrape.

        Args:
            accept: the Accept header; OpenMetrics 1.0.0 if it is asked for, else the text format 0.0.4.
        """
        kinds = [part.partition(";")[0].strip().lower() for part in (accept or "").split(",")]
        if "application/openmetrics-text" in kinds:
            text: bytes = openmetrics.generate_latest(self.registry)  # type: ignore[no-untyped-call]
            return _OPENMETRICS, text
        return _PLAIN, generate_latest(self.registry)

    def collect(self) -> Iterable[Metric]:
        """The families of a scrape; called by the registry."""
        yield from self._collect_tcp()
        yield self._gauge("hbone_sessions_open", "HTTP/2 sessions that are open now.", self._sessions_open)
        yield self._counter(
            "hbone_sessions_ended", "HTTP/2 sessions that have ended, by cause.", "cause", self._sessions_ended
        )
        yield self._gauge("hbone_tunnels_open", "Tunnels (CONNECT streams) that are open now.", self._tunnels_open)
        yield self._counter(
            "hbone_tunnels_refused", "CONNECT requests that were refused, by status.", "status", self._refusals
        )
        yield self._histogram(
            "hbone_connect_duration_seconds", "From a CONNECT request to its 200 response.", self._connects
        )
        yield self._histogram(
            "hbone_handshake_duration_seconds",
            "TLS handshakes that went well, up to the peer's SETTINGS.",
            self._handshakes,
        )
        yield self._counter(
            "hbone_handshake_failures", "TLS handshakes that failed, by cause.", "cause", self._handshake_failures
        )
        build = GaugeMetricFamily("istio_build", "What runs here; always 1.", labels=("component", "tag"))
        build.add_metric(self._build, 1)
        yield build
        for name, documentation, counter, read in self._readings:
            family = CounterMetricFamily if counter else GaugeMetricFamily
            yield family(name, documentation, value=read())

    def _collect_tcp(self) -> Iterator[Metric]:
        names = TrafficLabels._fields
        opened = CounterMetricFamily(
            "istio_tcp_connections_opened", "The total number of TCP connections opened.", labels=names
        )
        closed = CounterMetricFamily(
            "istio_tcp_connections_closed", "The total number of TCP connections closed.", labels=names
        )
        failed = CounterMetricFamily(
            "istio_tcp_connections_failed",
            "The total number of TCP connections that failed to establish (unstable).",
            labels=names,
        )
        received = CounterMetricFamily(
            "istio_tcp_received_bytes",
            "The size of total bytes received during request in case of a TCP connection.",
            labels=names,
        )
        sent = CounterMetricFamily(
            "istio_tcp_sent_bytes",
            "The size of total bytes sent during response in case of a TCP connection.",
            labels=names,
        )
        for labels, traffic in self._tcp.items():
            for connection in traffic.open:
                connection.catch_up()
            opened.add_metric(labels, traffic.opened)
            received.add_metric(labels, traffic.received)
            sent.add_metric(labels, traffic.sent)
            for flag, count in traffic.closed.items():
                flagged = labels._replace(response_flags=flag)
                closed.add_metric(flagged, count)
                if flag != NO_FLAG:
                    failed.add_metric(flagged, count)
        yield from (opened, closed, received, sent, failed)

    @staticmethod
    def _gauge(name: str, documentation: str, values: dict[str, int]) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, documentation, labels=("role",))
        for role, value in values.items():
            family.add_metric((role,), value)
        return family

    @staticmethod
    def _counter(name: str, documentation: str, label: str, values: dict[tuple[str, str], int]) -> CounterMetricFamily:
        family = CounterMetricFamily(name, documentation, labels=("role", label))
        for key, value in values.items():
            family.add_metric(key, value)
        return family

    @staticmethod
    def _histogram(name: str, documentation: str, values: dict[str, _Histogram]) -> HistogramMetricFamily:
        family = HistogramMetricFamily(name, documentation, labels=("role",))
        for role, histogram in values.items():
            family.add_metric((role,), histogram.buckets(), histogram.total)
        return family
