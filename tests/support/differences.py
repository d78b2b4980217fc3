"""What a node does otherwise than ztunnel, and why: the data of docs/design/ztunnel-differences.md.

`DIFFERENCES` is what two nodes show otherwise in the same situation; `support.likeness.check` holds that nothing else
is different, and that all of it is. `TRAPS` is what surprises whoever expects a node proxy to do the obvious.

    cd tests && python -m support.differences

prints the tables of the page.
"""

from __future__ import annotations

import json
from itertools import groupby
from typing import Any, NamedTuple

from support.likeness import ABSENT, Difference, Some

__all__ = ["DIFFERENCES", "TRAPS", "Trap", "tables"]

STOCK = "stock.shop.svc.cluster.local"
BOTH = "{a,b}"


def _differs(where: str, ztunnel: Any, here: Any, why: str, only: str = "") -> Difference:
    return Difference(where=where, ztunnel=ztunnel, here=here, why=why, only=only)


def _more(where: str, words: str, why: str) -> Difference:
    return Difference(where=where, ztunnel=ABSENT, here=Some(words), why=why)


def _less(where: str, words: str, why: str) -> Difference:
    return Difference(where=where, ztunnel=Some(words), here=ABSENT, why=why)


_KNOWS = (
    "A workload of a mesh file stays an endpoint of its services. "
    "ztunnel forgets that when it reads the file, and knows it only from a control plane"
)
_FILE_CA = "The local CA is a file of yours and signs with EC keys; ztunnel's is built in, and everybody has its key"
_NO_DNS = "There is no DNS proxy"
_NO_INPOD = "There is no in-pod mode"
_ONE_LOOP = "One event loop in one thread; what it does is in `process_*` and `hbone_*`"
_CLIENT = "prometheus-client's words"
_VERSION = "It is another program"

ACCESS_LOG = (
    _differs(
        "a / access log / 3 denied / error",
        "http status: 401 Unauthorized",
        "http status: 401 Unauthorized: the peer's authorization policy does not allow our identity",
        "The same words, and then what they mean",
    ),
    _differs(
        "a / access log / 4 nobody listens / error",
        "http status: 503 Service Unavailable",
        "http status: 503 Service Unavailable: the peer could not connect to the target",
        "The same words, and then what they mean",
    ),
    _differs(
        "a / access log / 8 refused / error",
        "io error: Connection refused (os error 111)",
        "connecting to 10.77.0.3:7999 failed: connection refused (nothing listens there)",
        "Says where to, and what that means",
    ),
    _differs(
        "b / access log / 4 nobody listens / error",
        "connection failed: Connection refused (os error 111)",
        "connection failed: connecting to 10.77.0.2:7003 failed: connection refused (nothing listens there)",
        "Says where to, and what that means",
    ),
    _differs("b / access log / {1 workload,2 service,3 denied,4 nobody listens} / dst.service", ABSENT, STOCK, _KNOWS),
)

LOG = (
    _differs("{a,b} / scopes / in front, in JSON", "ztunnel", "hbone", "Scopes begin with the program's name", "json"),
    _less(
        "{a,b} / log / running with config / **",
        "a line with everything, over many lines",
        "A log line is one line. `/config_dump` has the configuration, and what has no effect is said one by one",
    ),
    _more("{a,b} / log / mesh loaded / **", "how many workloads, services and policies", "Says what was in the file"),
    _differs(
        "{a,b} / log / {listener readiness,listener admin,listener stats} / scope",
        "hyper_util",
        "admin",
        "ztunnel names a library here",
    ),
    _more("{a,b} / log / listener admin (2) / **", "also on `[::1]`", "`localhost` may mean either address"),
    _more("{a,b} / log / listener socks5 / **", "on 127.0.0.1:15080", "The SOCKS5 proxy is on by default"),
    _less("{a,b} / log / task dns proxy / **", "a step of the start", _NO_DNS),
    _more(
        "{a,b} / log / task certificates / **",
        "a step of the start",
        "A node is ready when its workloads have certificates; ztunnel is ready before, and the first connection waits",
    ),
    _differs(
        "{a,b} / log / task proxy / message",
        "Task 'proxy' complete (*ms), still awaiting 2 tasks",
        "Task 'proxy' complete (*ms), still awaiting 1 tasks",
        "The mesh is known before anything listens",
    ),
    _differs(
        "{a,b} / log / task state manager / message",
        "Task 'state manager' complete (*ms), marking server ready",
        "Task 'state manager' complete (*ms), still awaiting 2 tasks",
        "The mesh is known before anything listens",
    ),
    _more(
        "a / log / {way to 10.77.0.2:7001,way to 10.96.0.20:80,way to 10.96.0.20:81,way to 10.96.0.20:82,"
        "way to 10.77.0.3:7001,way to 10.77.0.3:7999} / **",
        "`proxy to ... using ... via ... type ...`",
        "The way that a connection takes, as it is decided; `proxy::outbound=warn` leaves it out",
    ),
    _more(
        "a / log / {complete dur=*ms,complete dur=*ms (2),complete dur=*ms (3),complete dur=*ms (4),"
        "complete dur=*ms (5),complete dur=*ms (6)} / **",
        "`complete dur=...`",
        "The end of that way",
    ),
    _less("{a,b} / log / listener drained / **", "of the readiness port, at the end", "`draining` says more"),
    _more(
        "{a,b} / log / draining / **",
        "how many connections are open, and how long they get",
        "Who reads the log of the end wants to know what it waits for",
    ),
)

METRICS = (
    _differs("{a,b} / metrics / istio_build / samples / build / component", "ztunnel", "hbone", _VERSION),
    _differs(
        "b / metrics / istio_tcp_* / samples / into b * / destination_service",
        "unknown",
        STOCK,
        _KNOWS,
    ),
    _differs(
        "b / metrics / istio_tcp_* / samples / into b * / destination_service_namespace", "unknown", "shop", _KNOWS
    ),
    _differs("b / metrics / istio_tcp_* / samples / into b * / destination_service_name", "unknown", "stock", _KNOWS),
    _differs(
        "a / metrics / istio_tcp_sockets_open / samples / reporter=destination / value",
        ABSENT,
        0,
        "Each reporter is there from the start, so that a graph begins at 0",
    ),
    _differs(
        "a / metrics / istio_tcp_sockets_open / samples / reporter=destination / reporter",
        ABSENT,
        "destination",
        "The same",
    ),
    _differs("b / metrics / istio_tcp_sockets_open / samples / reporter=source / value", ABSENT, 0, "The same"),
    _differs(
        "b / metrics / istio_tcp_sockets_open / samples / reporter=source / reporter", ABSENT, "source", "The same"
    ),
    _less(
        "{a,b} / metrics / {tokio_num_workers,tokio_global_queue_depth,tokio_num_alive_tasks,"
        "tokio_worker_total_busy_duration_seconds,tokio_worker_park_count,tokio_worker_park_unpark_count} / **",
        "of Rust's tokio",
        _ONE_LOOP,
    ),
    _more(
        "{a,b} / metrics / {hbone_sessions_open,hbone_tunnels_open,hbone_tunnels_refused,hbone_buffered_bytes,"
        "hbone_connect_duration_seconds,hbone_handshake_duration_seconds} / **",
        "sessions, tunnels, refusals, buffers, durations",
        "What one wants to know of tunnels: see [](../reference/telemetry.md)",
    ),
    _more("b / metrics / hbone_policy_verdicts / **", "decisions, dry runs too", "What policies do, before they do it"),
    _more(
        "{a,b} / metrics / {hbone_mesh_reads,hbone_mesh_faults} / **",
        "readings of the mesh file, and what is wrong in it",
        "ztunnel reads it once; here it may change",
    ),
    _more(
        "{a,b} / metrics / {hbone_certificates,hbone_certificate_requests,hbone_certificate_expiry_timestamp_seconds}"
        " / **",
        "identities by the state of their certificates, requests, the first expiry",
        "Renewals that fail are seen before the certificate expires",
    ),
    _more(
        "a / metrics / {hbone_pool_sessions,hbone_pool_tunnels,hbone_pool_waiting,hbone_pool_dials,"
        "hbone_pool_dials_failed,hbone_pool_requests,hbone_pool_reused,hbone_pool_retried} / **",
        "of the connection pools",
        "Whether connections share sessions, and who waits for one",
    ),
    _more(
        "{a,b} / metrics / {process_virtual_memory_bytes,process_resident_memory_bytes,process_start_time_seconds,"
        "process_cpu_seconds} / **",
        "of the process",
        "What prometheus-client has",
    ),
    _differs(
        "{a,b} / metrics / process_open_fds / help",
        "Number of open file descriptors",
        "Number of open file descriptors.",
        _CLIENT,
    ),
    _differs(
        "{a,b} / metrics / process_max_fds / help",
        "Maximum number of file descriptors",
        "Maximum number of open file descriptors.",
        _CLIENT,
    ),
)

CONFIG = (
    _more(
        "{a,b} / config_dump / config / {caDir,hbonePort,httpProxyAddr,localXdsPath,logFormat,logLevel,trustDomain}",
        "as it was set",
        "Settings that ztunnel has not, or does not show",
    ),
    _differs("{a,b} / config_dump / config / dnsProxy", True, False, _NO_DNS),
    _differs("{a,b} / config_dump / config / dnsProxyAddr / Localhost", [True, 15053], ABSENT, _NO_DNS),
    _differs("{a,b} / config_dump / config / dnsProxyAddr", ABSENT, None, _NO_DNS),
    _differs(
        "{a,b} / config_dump / config / illegalPorts",
        [15001, 15006, 15008],
        [15001, 15006, 15008, 15080],
        "The SOCKS5 proxy is on by default",
    ),
    _differs("{a,b} / config_dump / config / inpodPortReuse", True, False, _NO_INPOD),
    _differs("{a,b} / config_dump / config / inpodUds", "/var/run/ztunnel/ztunnel.sock", None, _NO_INPOD),
    _differs("{a,b} / config_dump / config / numWorkerThreads", 2, 1, "One event loop in one thread"),
    _differs("{a,b} / config_dump / config / socks5Addr", None, "127.0.0.1:15080", "The SOCKS5 proxy is on by default"),
)

DUMP = (
    _differs("{a,b} / config_dump / workloads / b / services", ABSENT, [f"shop/{STOCK}"], _KNOWS),
    _more(
        "{a,b} / config_dump / workloadState / **",
        "the node's workload and its live connections",
        "Who looks for a connection wants to find it; ztunnel shows them in shared mode only",
    ),
    _differs(
        "both / config_dump / certificates / keys",
        1,
        2,
        "Each certificate has a key of its own; ztunnel's local CA gives the same private key to all",
    ),
    _differs("{a,b} / config_dump / certificates / * / certChain / signature", "RSA", "EC", _FILE_CA),
    _differs(
        "{a,b} / config_dump / certificates / * / certChain / subject",
        "O=cluster.local",
        "",
        "An SVID says who somebody is in its URI, and nowhere else",
    ),
    _differs(
        "{a,b} / config_dump / certificates / * / certChain / names its issuer's key",
        False,
        True,
        "Strict verifiers refuse a certificate without an authority key identifier",
    ),
    _differs("{a,b} / config_dump / certificates / * / rootCerts / {key,signature}", "RSA", "EC", _FILE_CA),
    _differs(
        "{a,b} / config_dump / certificates / * / rootCerts / subject",
        "O=cluster.local",
        Some("its own name"),
        "Two local CAs can be told apart",
    ),
    _differs(
        "{a,b} / config_dump / certificates / * / rootCerts / days", 100_000, Some("up to the year 3000"), _FILE_CA
    ),
    _differs(
        "{a,b} / config_dump / certificates / * / rootCerts / names its issuer's key",
        True,
        False,
        "It is its own issuer",
    ),
    _less("{a,b} / config_dump / version / rustVersion", "of Rust", _VERSION),
    _more("{a,b} / config_dump / version / pythonVersion", "of Python", _VERSION),
    _differs(
        "{a,b} / config_dump / version / {buildProfile,buildStatus,cryptoProvider,gitRevision,version}",
        Some("its own"),
        Some("its own"),
        _VERSION,
    ),
)

GROUPS = {
    "Access log": ACCESS_LOG,
    "The node's own log": LOG,
    "Metrics": METRICS,
    "`/config_dump`: the configuration": CONFIG,
    "`/config_dump`: everything else": DUMP,
}
DIFFERENCES = tuple(difference for group in GROUPS.values() for difference in group)


# === traps ===


class Trap(NamedTuple):
    """Something about ztunnel that one does not expect."""

    ztunnel: str
    here: str
    avoided: bool
    tests: tuple[str, ...]
    """Files below tests/ and functions in them."""


LIKENESS = "cli/test_like_ztunnel.py::test_"

TRAPS = (
    Trap(
        "Two workloads of one node talk through HBONE, too: there is no shorter way.",
        "The same, so policy, identities and both reports are there.",
        False,
        ("cli/test_node.py::test_curl_to_a_service",),
    ),
    Trap(
        "A CONNECT has neither `:scheme` nor `:path`, which some HTTP/2 libraries insist on.",
        "The same. What has them is malformed.",
        False,
        ("wire/test_malformed_connect.py::test_a_malformed_connect_costs_its_own_stream",),
    ),
    Trap(
        "It takes frames of 1 MiB and has windows of 4 and 16 MiB; who announces nothing gets 16 and 64 KiB.",
        "Announces the same, and sends as much as the peer announces.",
        False,
        ("proxy/test_config_dump.py::test_the_defaults_in_ztunnels_form",),
    ),
    Trap(
        "Refusals are 401 for policy, not 403; 400 for a target that is not here; 503 for everything else.",
        "The same.",
        False,
        ("proxy/test_node_inbound.py::test_refused", "proxy/test_node_outbound.py::test_refused_by_policy"),
    ),
    Trap(
        "The address in a CONNECT is checked and never dialled: what is dialled is the address that the peer dialled.",
        "The same.",
        False,
        ("routing/test_inbound.py::test_find_inbound_upstream",),
    ),
    Trap(
        "A peer is the workload that the mesh has at its address, whatever identity it has proved.",
        "Unless that workload has another identity than was proved; then it is what its baggage says.",
        True,
        ("proxy/test_node_inbound.py::test_the_source",),
    ),
    Trap(
        "A `traceparent` of the right length is taken to have its dashes.",
        "Whatever is not a `traceparent` is ignored.",
        True,
        ("protocol/test_headers.py::test_reading_traceparent_raises_nothing",),
    ),
    Trap(
        "Any one of the expected identities will do, exactly as written; at the end of a tunnel in a tunnel "
        "only those that the service names.",
        "The same. A tunnel with nobody to expect is not opened at all.",
        False,
        (
            "routing/test_outbound.py::test_who_is_expected",
            "routing/test_outbound.py::test_nobody_to_expect_is_no_route",
            "proxy/test_node_double.py::test_somebody_else_behind_the_gateway",
        ),
    ),
    Trap(
        "A workload of a mesh file without `trustDomain` has an empty one, and is refused by everybody.",
        "It has `cluster.local`.",
        True,
        ("mesh/test_file.py::test_absent_keys_have_the_defaults_of_a_cluster",),
    ),
    Trap(
        "A server takes only clients of its own trust domain.",
        "The same: of others it has no roots.",
        False,
        ("proxy/test_node_inbound.py::test_a_peer_of_another_trust_domain",),
    ),
    Trap(
        "`received` is the request and `sent` the response for both reporters, but `bytes_sent` of the "
        "access log is what that side's application sent.",
        "The same.",
        False,
        (f"{LIKENESS}eleven_bytes_and_twenty_two",),
    ),
    Trap(
        "The opened counter has the response flag `-`, the closed one the final flag: a failed connection "
        "opens and closes under different labels.",
        "The same.",
        False,
        (f"{LIKENESS}everybody_sees_what_ztunnel_shows",),
    ),
    Trap(
        "An application that resets its connection is no failure: neither log nor metrics tell it from an end.",
        "The same, also for a peer that sends CONNECT_ERROR for it, which ztunnel takes for a failure; "
        "the log tells of it in a field `reset`.",
        True,
        (
            "proxy/test_node_outbound.py::test_an_application_that_resets",
            "proxy/test_node_plaintext.py::test_a_reset_goes_through",
        ),
    ),
    Trap(
        "A peer whose certificate is not the expected one counts as `CONNECT`.",
        "It counts as `TLS_FAILURE`.",
        True,
        ("proxy/test_node_outbound.py::test_somebody_else_at_the_next_hop",),
    ),
    Trap(
        "`source_app` is the canonical name of a workload that is known, but the workload's name of one that "
        "only its baggage tells of.",
        "The same.",
        False,
        ("telemetry/test_labels.py::test_values_of_a_side",),
    ),
    Trap(
        "A session that was full once is never used again.",
        "It is, as soon as there is room.",
        True,
        ("transport/test_pool_real.py::test_a_session_that_was_full_is_used_again",),
    ),
    Trap(
        "In dedicated mode the application's address does not matter.",
        "The same.",
        False,
        ("proxy/test_local_workloads.py::test_whose_an_address_is",),
    ),
    Trap(
        "In dedicated mode the dump shows no live connections.",
        "It does.",
        True,
        ("proxy/test_config_dump.py::test_live_connections_both_ways",),
    ),
    Trap(
        "SIGTERM closes the listeners at once, and open connections have 5 seconds.",
        "The same. Sessions are told before, so that peers go elsewhere.",
        False,
        ("proxy/test_node_life.py::test_drain_lets_connections_finish",),
    ),
    Trap(
        "Open connections are judged again when policies change, and by what was known of the workload when "
        "they began.",
        "Whenever anything changes, and by what is known now.",
        True,
        (
            "proxy/test_node_life.py::test_a_policy_closes_what_it_forbids",
            "proxy/test_connections.py::test_a_workload_that_is_selected_by_a_policy_now",
        ),
    ),
    Trap(
        "Strict mutual TLS is no mode: it is a DENY policy for whoever has no identity.",
        "The same.",
        False,
        ("rbac/test_semantics.py::test_strict",),
    ),
    Trap(
        "Its documents show other log lines and other names of metrics than it has.",
        "What it does counts, and is compared.",
        True,
        (f"{LIKENESS}everybody_sees_what_ztunnel_shows", "netns/test_like_ztunnel.py::test_captured"),
    ),
    Trap(
        "`/logging` documents `scope:level` and takes only `scope=level`.",
        "Both are taken.",
        True,
        ("telemetry/test_levels.py::test_what_can_be_written",),
    ),
    Trap(
        "Certificates of its local CA share one private key and have no authority key identifier.",
        "Each has its own key, and passes strict verification.",
        True,
        (
            "certs/test_local_ca.py::test_what_it_issues_is_a_strict_svid",
            f"{LIKENESS}everybody_sees_what_ztunnel_shows",
        ),
    ),
    Trap(
        "Handshakes, answers to CONNECT and sessions without tunnels may take for ever; only dialling and "
        "pings are bounded.",
        "All of them are bounded.",
        True,
        (
            "wire/test_faults.py::test_fault_22_an_opening_that_stalls_ends",
            "wire/test_faults.py::test_fault_22_an_unanswered_connect_ends",
            "wire/test_abuse.py::test_no_connect_ever",
        ),
    ),
    Trap(
        "It checks the peer's identity inside the handshake, which Python's `ssl` cannot.",
        "The same, with OpenSSL by another way (pyOpenSSL): who is refused gets an alert.",
        False,
        ("tls/test_contexts.py::test_bad_peers", "tls/test_contexts.py::test_the_policy_has_the_last_word"),
    ),
)


# === the page ===


def _text(value: Any) -> str:
    match value:
        case Some(words):
            return words
        case _ if value is ABSENT:
            return "-"
        case "":
            return "empty"
        case str():
            return f"`{value}`"
    return f"`{json.dumps(value)}`"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _where(difference: Difference) -> str:
    """Without the parts that the heading says, and what is the same for both nodes."""
    where = difference.where.replace(" / samples / ", " / ").removesuffix(" / **").removeprefix(f"{BOTH} / ")
    for heading in ("access log", "log", "metrics", "config_dump / config", "config_dump"):
        for node in ("", "a / ", "b / ", "both / "):
            if where.startswith(f"{node}{heading} / "):
                return f"`{node}{where.removeprefix(f'{node}{heading} / ')}`"
    return f"`{where}`"


def tables() -> str:
    """What the page has to say."""
    lines: list[str] = []
    for heading, group in GROUPS.items():
        lines += [f"### {heading}", "", "| what | ztunnel | here | why |", "|---|---|---|---|"]
        lines += [_row(_where(one), _text(one.ztunnel), _text(one.here), f"{one.why}.") for one in group]
        lines.append("")
    for avoided, traps in groupby(sorted(TRAPS, key=lambda trap: not trap.avoided), key=lambda trap: trap.avoided):
        lines += [f"### {'Done otherwise' if avoided else 'Done the same way'}", ""]
        lines += ["| ztunnel | here | held by |", "|---|---|---|"]
        lines += [_row(trap.ztunnel, trap.here, ", ".join(f"`{test}`" for test in trap.tests)) for trap in traps]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables())
