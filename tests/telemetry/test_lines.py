"""Whole lines of the access log, written out: what Istio's tools find, byte for byte, in both formats."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
import trio

from hbone.address import Authority, Endpoint
from hbone.identity import SpiffeIdentity
from hbone.telemetry import AccessLog, AccessRecord, Direction, LogFormat, LogLevel, format_json, format_plain

NOW = 1767323045.031415
TILL = SpiffeIdentity.parse("spiffe://cluster.local/ns/market/sa/clerk")
LEDGER = SpiffeIdentity.parse("spiffe://cluster.local/ns/books/sa/writer")

SOURCE: dict[str, Any] = {
    "src_addr": Endpoint.parse("10.9.0.1:50864"),
    "src_workload": "till-7",
    "src_namespace": "market",
    "src_identity": TILL,
    "src_cluster": "Kubernetes",
}
PLAIN_SOURCE = SOURCE | {"src_identity": None}
DESTINATION: dict[str, Any] = {
    "dst_addr": Endpoint.parse("10.9.0.2:15008"),
    "dst_hbone_addr": Authority.parse("10.9.0.2:7001"),
    "dst_workload": "ledger-0",
    "dst_namespace": "books",
    "dst_identity": LEDGER,
    "dst_cluster": "Kubernetes",
}
LEGACY: dict[str, Any] = {
    "dst_addr": Endpoint.parse("10.9.0.3:7001"),
    "dst_workload": "db-0",
    "dst_namespace": "legacy",
    "dst_cluster": "Kubernetes",
}
OUT, IN = {"direction": Direction.OUTBOUND}, {"direction": Direction.INBOUND}
ECHO: dict[str, Any] = {"bytes_sent": 11, "bytes_recv": 22, "duration": 0.0849}
NONE: dict[str, Any] = {"bytes_sent": 0, "bytes_recv": 0, "duration": 0.0004}

# what a line is about, its facts, level and message, fields
LINES: list[tuple[str, dict[str, Any], str, str]] = [
    (
        "a workload over HBONE, where the connection begins",
        OUT | SOURCE | DESTINATION | ECHO,
        "info\taccess\tconnection complete",
        'src.addr=10.9.0.1:50864 src.workload="till-7" src.namespace="market" '
        'src.identity="spiffe://cluster.local/ns/market/sa/clerk" src.cluster="Kubernetes" '
        'dst.addr=10.9.0.2:15008 dst.hbone_addr=10.9.0.2:7001 dst.workload="ledger-0" dst.namespace="books" '
        'dst.identity="spiffe://cluster.local/ns/books/sa/writer" dst.cluster="Kubernetes" '
        'direction="outbound" bytes_sent=11 bytes_recv=22 duration="84ms"',
    ),
    (
        "the same where it ends: sent is the response",
        IN | SOURCE | DESTINATION | ECHO | {"bytes_sent": 22, "bytes_recv": 11},
        "info\taccess\tconnection complete",
        'src.addr=10.9.0.1:50864 src.workload="till-7" src.namespace="market" '
        'src.identity="spiffe://cluster.local/ns/market/sa/clerk" src.cluster="Kubernetes" '
        'dst.addr=10.9.0.2:15008 dst.hbone_addr=10.9.0.2:7001 dst.workload="ledger-0" dst.namespace="books" '
        'dst.identity="spiffe://cluster.local/ns/books/sa/writer" dst.cluster="Kubernetes" '
        'direction="inbound" bytes_sent=22 bytes_recv=11 duration="84ms"',
    ),
    (
        "a service, and the peer refuses",
        OUT
        | SOURCE
        | DESTINATION
        | NONE
        | {"dst_service": "ledger.books.svc.cluster.local", "error": "http status: 401 Unauthorized"},
        "error\taccess\tconnection complete",
        'src.addr=10.9.0.1:50864 src.workload="till-7" src.namespace="market" '
        'src.identity="spiffe://cluster.local/ns/market/sa/clerk" src.cluster="Kubernetes" '
        'dst.addr=10.9.0.2:15008 dst.hbone_addr=10.9.0.2:7001 dst.service="ledger.books.svc.cluster.local" '
        'dst.workload="ledger-0" dst.namespace="books" '
        'dst.identity="spiffe://cluster.local/ns/books/sa/writer" dst.cluster="Kubernetes" '
        'direction="outbound" bytes_sent=0 bytes_recv=0 duration="0ms" error="http status: 401 Unauthorized"',
    ),
    (
        "the same at the peer, where the policy has a name",
        IN
        | SOURCE
        | DESTINATION
        | NONE
        | {"error": "connection closed due to policy rejection: explicitly denied by: books/no-clerks"},
        "error\taccess\tconnection complete",
        'src.addr=10.9.0.1:50864 src.workload="till-7" src.namespace="market" '
        'src.identity="spiffe://cluster.local/ns/market/sa/clerk" src.cluster="Kubernetes" '
        'dst.addr=10.9.0.2:15008 dst.hbone_addr=10.9.0.2:7001 dst.workload="ledger-0" dst.namespace="books" '
        'dst.identity="spiffe://cluster.local/ns/books/sa/writer" dst.cluster="Kubernetes" '
        'direction="inbound" bytes_sent=0 bytes_recv=0 duration="0ms" '
        'error="connection closed due to policy rejection: explicitly denied by: books/no-clerks"',
    ),
    (
        "an application reset it: no failure",
        OUT | PLAIN_SOURCE | LEGACY | ECHO | {"reset": "Connection reset by peer"},
        "info\taccess\tconnection complete",
        'src.addr=10.9.0.1:50864 src.workload="till-7" src.namespace="market" src.cluster="Kubernetes" '
        'dst.addr=10.9.0.3:7001 dst.workload="db-0" dst.namespace="legacy" dst.cluster="Kubernetes" '
        'direction="outbound" bytes_sent=11 bytes_recv=22 duration="84ms" reset="Connection reset by peer"',
    ),
    (
        "no endpoint: nothing is known but where it came from and went",
        OUT
        | {
            "src_addr": Endpoint.parse("10.9.0.1:44144"),
            "dst_addr": Endpoint.parse("10.96.0.21:80"),
            "error": "no healthy upstream: 10.96.0.21:80",
        },
        "warn\taccess\tconnection failed",
        'src.addr=10.9.0.1:44144 dst.addr=10.96.0.21:80 direction="outbound" '
        'error="no healthy upstream: 10.96.0.21:80"',
    ),
    (
        "plain TCP: no identities and no CONNECT",
        OUT | PLAIN_SOURCE | LEGACY | ECHO,
        "info\taccess\tconnection complete",
        'src.addr=10.9.0.1:50864 src.workload="till-7" src.namespace="market" src.cluster="Kubernetes" '
        'dst.addr=10.9.0.3:7001 dst.workload="db-0" dst.namespace="legacy" dst.cluster="Kubernetes" '
        'direction="outbound" bytes_sent=11 bytes_recv=22 duration="84ms"',
    ),
    (
        "plain TCP, refused",
        OUT | PLAIN_SOURCE | LEGACY | NONE | {"error": "io error: Connection refused (os error 111)"},
        "error\taccess\tconnection complete",
        'src.addr=10.9.0.1:50864 src.workload="till-7" src.namespace="market" src.cluster="Kubernetes" '
        'dst.addr=10.9.0.3:7001 dst.workload="db-0" dst.namespace="legacy" dst.cluster="Kubernetes" '
        'direction="outbound" bytes_sent=0 bytes_recv=0 duration="0ms" '
        'error="io error: Connection refused (os error 111)"',
    ),
    (
        "a host name, IPv6 and a connection that begins",
        OUT
        | {
            "src_addr": Endpoint.parse("[fd00::1]:5000"),
            "dst_addr": Endpoint.parse("[fd00::2]:15008"),
            "dst_hbone_addr": Authority.parse("ledger.books.svc.cluster.local:80"),
            "opened": True,
        },
        "debug\taccess\tconnection opened",
        "src.addr=[fd00::1]:5000 dst.addr=[fd00::2]:15008 dst.hbone_addr=ledger.books.svc.cluster.local:80 "
        'direction="outbound"',
    ),
]
IDS = [line[0] for line in LINES]


@pytest.mark.parametrize(("facts", "head", "fields"), [line[1:] for line in LINES], ids=IDS)
def test_text(facts: dict[str, Any], head: str, fields: str) -> None:
    assert format_plain(AccessRecord(**facts), NOW) == f"2026-01-02T03:04:05.031415Z\t{head}\t{fields}"


@pytest.mark.parametrize(("facts", "head", "fields"), [line[1:] for line in LINES], ids=IDS)
def test_json_says_the_same_under_the_same_names_in_the_same_order(
    facts: dict[str, Any], head: str, fields: str
) -> None:
    document = json.loads(format_json(AccessRecord(**facts), NOW))
    level, scope, message = head.split("\t")
    assert list(document.items())[:4] == [
        ("level", level),
        ("time", "2026-01-02T03:04:05.031415Z"),
        ("scope", scope),
        ("message", message),
    ]
    again = " ".join(
        f"{name}={value}" if isinstance(value, int) or name.endswith("addr") else f'{name}="{value}"'
        for name, value in list(document.items())[4:]
    )
    assert again == fields


def test_json_text() -> None:
    facts = OUT | PLAIN_SOURCE | LEGACY | ECHO
    assert format_json(AccessRecord(**facts), NOW) == (
        '{"level":"info","time":"2026-01-02T03:04:05.031415Z","scope":"access","message":"connection complete",'
        '"src.addr":"10.9.0.1:50864","src.workload":"till-7","src.namespace":"market","src.cluster":"Kubernetes",'
        '"dst.addr":"10.9.0.3:7001","dst.workload":"db-0","dst.namespace":"legacy","dst.cluster":"Kubernetes",'
        '"direction":"outbound","bytes_sent":11,"bytes_recv":22,"duration":"84ms"}'
    )


@pytest.mark.parametrize(
    "field", ["src_workload", "src_namespace", "src_cluster", "dst_service", "dst_workload", "dst_namespace", "error"]
)
def test_names_that_a_peer_chose_stay_in_their_field(field: str) -> None:
    evil = 'x" dst.workload="y\n\t\x1b[2J\u2028'
    name = field.replace("_", ".", 1)
    line = format_plain(AccessRecord(direction=Direction.INBOUND, **{field: evil}), NOW)  # type: ignore[arg-type]
    assert f'{name}="x\\" dst.workload=\\"y\\n\\t\\u001b[2J\\u2028"' in line
    assert line.count("\n") == 0
    assert line.count("\t") == 4
    record = AccessRecord(direction=Direction.INBOUND, **{field: evil})  # type: ignore[arg-type]
    assert json.loads(format_json(record, NOW))[name] == evil


@pytest.mark.parametrize(
    ("level", "written"),
    [
        (LogLevel.TRACE, ["debug", "info", "error", "warn"]),
        (LogLevel.DEBUG, ["debug", "info", "error", "warn"]),
        (LogLevel.INFO, ["info", "error", "warn"]),
        (LogLevel.WARN, ["error", "warn"]),
        (LogLevel.ERROR, ["error"]),
        (LogLevel.OFF, []),
    ],
)
async def test_levels(level: LogLevel, written: list[str]) -> None:
    stream = io.BytesIO()
    async with AccessLog(stream, LogFormat.JSON) as log:
        log.level = level
        log.write(AccessRecord(direction=Direction.INBOUND, opened=True))
        log.write(AccessRecord(direction=Direction.INBOUND))
        log.write(AccessRecord(direction=Direction.INBOUND, bytes_sent=0, error="x"))
        log.write(AccessRecord(direction=Direction.INBOUND, error="x"))
    assert [json.loads(line)["level"] for line in stream.getvalue().splitlines()] == written


async def test_lines_of_two_logs_keep_their_order(tmp_path: Any) -> None:
    path = tmp_path / "log"
    with path.open("wb") as file:
        async with AccessLog(file, flush_interval=0.001) as log:
            for n in range(100):
                log.write_line(f"line {n}")
                log.write(AccessRecord(direction=Direction.INBOUND, bytes_sent=n))
                if n % 30 == 0:
                    await trio.sleep(0.002)
    lines = path.read_text().splitlines()
    assert lines[::2] == [f"line {n}" for n in range(100)]
    assert [line.rpartition("=")[2] for line in lines[1::2]] == [str(n) for n in range(100)]


async def test_lines_from_other_threads(tmp_path: Any) -> None:
    path = tmp_path / "log"

    def talk(name: str) -> None:
        for n in range(200):
            log.write_line(f"{name} {n}")

    with path.open("wb") as file:
        async with AccessLog(file, flush_interval=0.001) as log:
            async with trio.open_nursery() as nursery:
                for name in "ab":
                    nursery.start_soon(trio.to_thread.run_sync, talk, name)
            await trio.testing.wait_all_tasks_blocked()
    lines = path.read_text().splitlines()
    for name in "ab":
        assert [line for line in lines if line.startswith(name)] == [f"{name} {n}" for n in range(200)]


def test_lines_before_and_after_the_event_loop(tmp_path: Any) -> None:
    path = tmp_path / "log"
    with path.open("wb") as file:
        log = AccessLog(file)
        log.write_line("before")

        async def main() -> None:
            async with log:
                log.write_line("during")

        trio.run(main)
        log.write_line("after")
        assert path.read_text() == "before\nduring\nafter\n"
    assert (log.written, log.dropped) == (3, 0)
