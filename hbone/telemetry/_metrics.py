"""Metrics of a process, under the names that Istio's dashboards know.

Theory of operation: the data plane must not pay for being watched, so counting is plain integer arithmetic in dicts
that live in the event loop's thread, and only a scrape turns them into Prometheus families (`Metrics.collect`, the
custom collector of a registry of our own; nothing is registered globally). The bytes of an open connection are read
from its live statistics at scrape time and from its final ones at its end, so a tunnel that lives for days still shows.

Cardinality is bounded: after `max_label_sets` sets of labels, of a new one only what is said of our own side counts
and the far side becomes ``other``; all other labels take their values from this code, not from the network.

As ztunnel does, ``received`` is what flows from the connecting side to the destination and ``sent`` the response, for
both reporters; the opened and byte counters always have the response flag ``-``, the closed counter has the final one.
"""

from __future__ import annotations

from bisect import bisect_left
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics import exposition as openmetrics_exposition

from hbone.telemetry._cause import NO_FLAG, failure_cause
from hbone.telemetry._exposition import Family, Texts, exposition
from hbone.telemetry._labels import OTHER, UNKNOWN, TrafficLabels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from datetime import datetime

    from hbone.transport import PoolStatistics, Session

__all__ = ["CertificateSummary", "Metrics", "OpenConnection"]

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
_VERDICTS = frozenset({"allow", "deny"})
_PLAIN = "text/plain; version=0.0.4; charset=utf-8"
_OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
_EOF: Final = b"# EOF\n"
_ROLE: Final = ("role",)
_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_BOUNDS = (*map(str, _BUCKETS), "+Inf")
#: As a `CertificateSummary` calls them.
_CERTIFICATE_STATES: Final = ("available", "renewal_fails", "initializing", "unavailable")
_POOL_STATES: Final = ("connecting", "ready", "full", "draining")
_POOL_GAUGES: Final = {
    "tunnels": "Tunnels of the connection pools, open or being opened.",
    "waiting": "Callers that wait for a session of a connection pool.",
}
_POOL_COUNTERS: Final = {
    "dials": "Dials begun by the connection pools.",
    "dials_failed": "Dials that failed or were not wanted any more.",
    "requests": "CONNECT requests sent by the connection pools.",
    "reused": "CONNECT requests on a session that had carried another before.",
    "retried": "CONNECT requests sent again because the peer had not processed the one before.",
}


class _Histogram:
    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(_BUCKETS) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(_BUCKETS, value)] += 1
        self.total += value


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


class CertificateSummary(Protocol):
    """What there is to count of certificates; a `hbone.certs.SvidSummary` is one."""

    @property
    def available(self) -> int:
        """Identities that have a valid one."""

    @property
    def renewal_fails(self) -> int:
        """Those that have a valid one, too, but the last request for the next one failed."""

    @property
    def initializing(self) -> int:
        """Those for which one has been asked for."""

    @property
    def unavailable(self) -> int:
        """Those that have none."""

    @property
    def first_expiry(self) -> datetime | None:
        """When the first valid one expires."""

    @property
    def requests(self) -> int:
        """Requests so far."""

    @property
    def requests_failed(self) -> int:
        """Those that failed."""


class Metrics:
    """All counters of one process (or one node, when a process runs several).

    Methods are synchronous, cost a few microseconds at most and belong to the event loop's thread; so does a scrape.
    It is a collector: a program with a registry of its own can register it there.

    Args:
        version: shown by ``istio_build`` as its tag.
        component: shown by ``istio_build``.
        max_label_sets: how many `TrafficLabels` are told apart; of further ones the far side is counted as ``other``.

    Attributes:
        registry: what a scrape shows after our own families: the process, and what else is registered in it.
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
        self._verdicts: dict[tuple[str, str], int] = {}
        self._mesh_reads: dict[tuple[str], int] = {}
        self._mesh_faults: int | None = None
        self._sessions: dict[int, tuple[str, Session]] = {}
        self._sockets_open: dict[str, int] = {}
        self._sockets: list[tuple[str, Callable[[], int]]] = []
        self._pools: list[Callable[[], PoolStatistics]] = []
        self._pools_gone: dict[str, int] = dict.fromkeys(_POOL_COUNTERS, 0)
        self._certificates: list[Callable[[], CertificateSummary]] = []
        self._certificate_requests: dict[tuple[str], int] = {}
        self._readings: dict[str, _Reading] = {}
        self._texts = Texts()
        self.registry: CollectorRegistry = CollectorRegistry(auto_describe=False)
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

    def session_opened(self, role: str, session: Session | None = None) -> None:
        """One more session; what it has buffered is asked at each scrape."""
        self._sessions_open[role] = self._sessions_open.get(role, 0) + 1
        if session is not None:
            self._sessions[id(session)] = (role, session)

    def session_closed(self, role: str, error: BaseException | None = None, session: Session | None = None) -> None:
        """One session less, and why."""
        if session is not None:
            self._sessions.pop(id(session), None)
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

    # -- sockets ------------------------------------------------------------------------------------------------------

    def socket_opened(self, reporter: str) -> None:
        """One more accepted connection; ``source`` or ``destination``."""
        self._sockets_open[reporter] = self._sockets_open.get(reporter, 0) + 1

    def socket_closed(self, reporter: str) -> None:
        """One accepted connection less."""
        self._sockets_open[reporter] = self._sockets_open.get(reporter, 0) - 1

    # -- policy -------------------------------------------------------------------------------------------------------

    def policy_verdict(self, verdict: str, *, dry_run: bool = False) -> None:
        """Counts a decision about a connection, or what a dry run would have decided.

        Args:
            verdict: ``allow`` or ``deny``.
            dry_run: nothing came of it.
        """
        key = (verdict if verdict in _VERDICTS else OTHER, "true" if dry_run else "false")
        self._verdicts[key] = self._verdicts.get(key, 0) + 1

    # -- the mesh file ------------------------------------------------------------------------------------------------

    def mesh_read(self, faults: int, *, used: bool) -> None:
        """Counts a reading of the mesh file.

        Args:
            faults: how many are in it now.
            used: whether what is right in it is in force.
        """
        key = (("partial" if used else "failed") if faults else "ok",)
        self._mesh_reads[key] = self._mesh_reads.get(key, 0) + 1
        self._mesh_faults = faults

    # -- others' numbers; asked at each scrape ------------------------------------------------------------------------

    def add_sockets(self, reporter: str, read: Callable[[], int]) -> None:
        """A listener's part of ``istio_tcp_sockets_open``, for one that counts its connections itself.

        Args:
            reporter: ``source`` or ``destination``.
            read: how many accepted connections are open now.
        """
        self._sockets.append((reporter, read))

    def add_pool(self, statistics: Callable[[], PoolStatistics]) -> Callable[[], None]:
        """Shows the numbers of a pool, summed up with those of other pools.

        Args:
            statistics: `hbone.transport.ConnectionPool.statistics`.

        Returns:
            To call when the pool is no more; what it counted stays counted.
        """
        self._pools.append(statistics)
        return partial(self._remove_pool, statistics)

    def _remove_pool(self, statistics: Callable[[], PoolStatistics]) -> None:
        if statistics in self._pools:
            self._pools.remove(statistics)
            last = statistics()
            for name in _POOL_COUNTERS:
                self._pools_gone[name] += getattr(last, name)

    def add_certificates(self, summary: Callable[[], CertificateSummary]) -> Callable[[], None]:
        """Shows the state of the certificates of somebody who keeps some, summed up with those of others.

        Args:
            summary: `hbone.certs.SvidManager.summary`.

        Returns:
            To call when it keeps them no more; what it counted stays counted.
        """
        self._certificates.append(summary)
        return partial(self._remove_certificates, summary)

    def _remove_certificates(self, summary: Callable[[], CertificateSummary]) -> None:
        if summary in self._certificates:
            self._certificates.remove(summary)
            _add_requests(self._certificate_requests, summary())

    def add_reading(
        self,
        name: str,
        documentation: str,
        read: Callable[[], float],
        *,
        counter: bool = False,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """Shows a number that somebody else keeps; `read` is called at each scrape.

        Args:
            name: without ``_total``.
            documentation: one sentence.
            read: gives the value now.
            counter: whether it only grows.
            labels: of this number; further ones of the same name must have the same labels with other values.

        Raises:
            ValueError: the name is known already, with other labels or the same values of them.
        """
        labels = labels or {}
        reading = self._readings.setdefault(name, _Reading(documentation, counter, tuple(labels), {}))
        values = tuple(labels.values())
        if reading.labels != tuple(labels) or reading.counter is not counter or values in reading.read:
            raise ValueError(f"{name} with these labels is known already")
        reading.read[values] = read

    # -- scrape -------------------------------------------------------------------------------------------------------

    def render(self, accept: str | None = None) -> tuple[str, bytes]:
        """The content type and the text of a scrape.

        Args:
            accept: the Accept header; OpenMetrics 1.0.0 if it is asked for, else the text format 0.0.4.
        """
        kinds = [part.partition(";")[0].strip().lower() for part in (accept or "").split(",")]
        openmetrics = "application/openmetrics-text" in kinds
        text = exposition(self._families(), self._texts, openmetrics=openmetrics).encode("utf-8", "replace")
        if openmetrics:
            rest: bytes = openmetrics_exposition.generate_latest(self.registry)  # type: ignore[no-untyped-call]
            return _OPENMETRICS, text + rest.removesuffix(_EOF) + _EOF
        return _PLAIN, text + generate_latest(self.registry)

    def collect(self) -> Iterable[Metric]:
        """The families of a scrape as prometheus-client has them; called by a registry."""
        for family in self._families():
            if family.samples:
                metric = Metric(family.name, family.documentation, family.kind)
                for names, values, number, suffix in family.samples:
                    suffix = "_total" if family.kind == "counter" else suffix
                    metric.add_sample(family.name + suffix, dict(zip(names, values, strict=True)), number)
                yield metric

    def _families(self) -> Iterator[Family]:
        build = Family("istio_build", "gauge", "Istio component build info.")
        build.add(("component", "tag"), self._build, 1)
        yield build
        yield from self._collect_tcp()
        sockets = Family("istio_tcp_sockets_open", "gauge", "The current number of open TCP sockets (unstable).")
        open_now = self._sockets_open.copy()
        for reporter, read in self._sockets:
            open_now[reporter] = open_now.get(reporter, 0) + read()
        for reporter, number in open_now.items():
            sockets.add(("reporter",), (reporter,), number)
        yield sockets
        yield _by_role("hbone_sessions_open", "HTTP/2 sessions that are open now.", self._sessions_open)
        yield _counter(
            "hbone_sessions_ended",
            "HTTP/2 sessions that have ended, by cause.",
            ("role", "cause"),
            self._sessions_ended,
        )
        yield _by_role("hbone_tunnels_open", "Tunnels (CONNECT streams) that are open now.", self._tunnels_open)
        yield _counter(
            "hbone_tunnels_refused",
            "CONNECT requests that were refused, by status.",
            ("role", "status"),
            self._refusals,
        )
        yield self._collect_buffered()
        yield _histogram(
            "hbone_connect_duration_seconds", "From a CONNECT request to its 200 response.", self._connects
        )
        yield _histogram(
            "hbone_handshake_duration_seconds",
            "TLS handshakes that went well, up to the peer's SETTINGS.",
            self._handshakes,
        )
        yield _counter(
            "hbone_handshake_failures",
            "TLS handshakes that failed, by cause.",
            ("role", "cause"),
            self._handshake_failures,
        )
        yield _counter(
            "hbone_policy_verdicts",
            "Decisions of authorization policies about connections.",
            ("verdict", "dry_run"),
            self._verdicts,
        )
        yield _counter(
            "hbone_mesh_reads", "Readings of the mesh file, by what came of them.", ("result",), self._mesh_reads
        )
        faults = Family("hbone_mesh_faults", "gauge", "What is wrong in the mesh file now.")
        if self._mesh_faults is not None:
            faults.add((), (), self._mesh_faults)
        yield faults
        yield from self._collect_certificates()
        yield from self._collect_pools()
        for name, reading in self._readings.items():
            family = Family(name, "counter" if reading.counter else "gauge", reading.documentation)
            for values, read_one in reading.read.items():
                family.add(reading.labels, values, read_one())
            yield family

    def _collect_tcp(self) -> Iterator[Family]:
        opened = Family("istio_tcp_connections_opened", "counter", "The total number of TCP connections opened.")
        closed = Family("istio_tcp_connections_closed", "counter", "The total number of TCP connections closed.")
        received = Family(
            "istio_tcp_received_bytes",
            "counter",
            "The size of total bytes received during request in case of a TCP connection.",
        )
        sent = Family(
            "istio_tcp_sent_bytes",
            "counter",
            "The size of total bytes sent during response in case of a TCP connection.",
        )
        failed = Family(
            "istio_tcp_connections_failed",
            "counter",
            "The total number of TCP connections that failed to establish (unstable).",
        )
        names = TrafficLabels._fields
        for labels, traffic in self._tcp.items():
            for connection in traffic.open:
                connection.catch_up()
            opened.add(names, labels, traffic.opened)
            received.add(names, labels, traffic.received)
            sent.add(names, labels, traffic.sent)
            for flag, count in traffic.closed.items():
                flagged = labels._replace(response_flags=flag)
                closed.add(names, flagged, count)
                if flag != NO_FLAG:
                    failed.add(names, flagged, count)
        yield from (opened, closed, received, sent, failed)

    def _collect_buffered(self) -> Family:
        family = Family(
            "hbone_buffered_bytes",
            "gauge",
            "Bytes in the buffers of sessions: received and not taken yet, or to be sent and not taken by TLS yet.",
        )
        sums: dict[tuple[str, str], int] = {}
        for role, session in self._sessions.values():
            statistics = session.statistics()
            sums[role, "received"] = sums.get((role, "received"), 0) + statistics.receive_buffered
            sums[role, "unsent"] = sums.get((role, "unsent"), 0) + statistics.unsent
        for key, number in sums.items():
            family.add(("role", "direction"), key, number)
        return family

    def _collect_certificates(self) -> Iterator[Family]:
        summaries = [summary() for summary in self._certificates]
        states = Family("hbone_certificates", "gauge", "Identities by the state of their certificates.")
        if summaries:
            for state in _CERTIFICATE_STATES:
                states.add(("state",), (state,), sum(getattr(one, state) for one in summaries))
        yield states
        expiry = Family(
            "hbone_certificate_expiry_timestamp_seconds",
            "gauge",
            "When the first of the valid certificates expires, in seconds since the epoch.",
        )
        expiries = [one.first_expiry for one in summaries if one.first_expiry is not None]
        if expiries:
            expiry.add((), (), min(expiries).timestamp())
        yield expiry
        requests = self._certificate_requests.copy()
        for one in summaries:
            _add_requests(requests, one)
        yield _counter(
            "hbone_certificate_requests",
            "Requests for certificates, first ones and renewals, by what came of them.",
            ("result",),
            requests,
        )

    def _collect_pools(self) -> Iterator[Family]:
        if not self._pools and not any(self._pools_gone.values()):
            return
        pools = [statistics() for statistics in self._pools]
        sessions = Family("hbone_pool_sessions", "gauge", "Sessions of the connection pools, by state.")
        for state in _POOL_STATES:
            sessions.add(("state",), (state,), sum(getattr(pool, state) for pool in pools))
        yield sessions
        for name, documentation in _POOL_GAUGES.items():
            gauge = Family(f"hbone_pool_{name}", "gauge", documentation)
            gauge.add((), (), sum(getattr(pool, name) for pool in pools))
            yield gauge
        for name, documentation in _POOL_COUNTERS.items():
            counter = Family(f"hbone_pool_{name}", "counter", documentation)
            counter.add((), (), self._pools_gone[name] + sum(getattr(pool, name) for pool in pools))
            yield counter


class _Reading(NamedTuple):
    documentation: str
    counter: bool
    labels: tuple[str, ...]
    read: dict[tuple[str, ...], Callable[[], float]]


def _add_requests(requests: dict[tuple[str], int], summary: CertificateSummary) -> None:
    for result, number in (("ok", summary.requests - summary.requests_failed), ("failed", summary.requests_failed)):
        requests[result,] = requests.get((result,), 0) + number


def _by_role(name: str, documentation: str, values: dict[str, int]) -> Family:
    family = Family(name, "gauge", documentation)
    for role, value in values.items():
        family.add(_ROLE, (role,), value)
    return family


def _counter(
    name: str,
    documentation: str,
    labels: tuple[str, ...],
    values: Mapping[tuple[str, str], int] | Mapping[tuple[str], int],
) -> Family:
    family = Family(name, "counter", documentation)
    for key, value in values.items():
        family.add(labels, key, value)
    return family


def _histogram(name: str, documentation: str, values: dict[str, _Histogram]) -> Family:
    family = Family(name, "histogram", documentation)
    for role, histogram in values.items():
        count = 0
        for bound, number in zip(_BOUNDS, histogram.counts, strict=True):
            count += number
            family.add(("role", "le"), (role, bound), count, "_bucket")
        family.add(_ROLE, (role,), count, "_count")
        family.add(_ROLE, (role,), histogram.total, "_sum")
    return family
