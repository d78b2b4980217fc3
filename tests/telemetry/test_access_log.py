"""Lines of the access log: their form, what peers can do to them, and that none is lost or waited for."""

from __future__ import annotations

import io
import json
import os
import re
import threading
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from hbone.address import Authority, Endpoint
from hbone.identity import SpiffeIdentity
from hbone.telemetry import AccessLog, AccessPattern, AccessRecord, Direction, LogFormat, format_json, format_plain

CART = SpiffeIdentity.parse("spiffe://cluster.local/ns/shop/sa/cart")
STOCK = SpiffeIdentity.parse("spiffe://cluster.local/ns/shop/sa/stock")
NOW = 1795401930.974220


def record(**changes: Any) -> AccessRecord:
    facts: dict[str, Any] = {
        "direction": Direction.OUTBOUND,
        "src_addr": Endpoint.parse("10.77.0.1:50864"),
        "src_identity": CART,
        "dst_addr": Endpoint.parse("10.77.0.2:15008"),
        "dst_hbone_addr": Authority.parse("10.77.0.2:7001"),
        "dst_identity": STOCK,
        "bytes_sent": 11,
        "bytes_recv": 12,
        "duration": 0.0849,
    }
    return AccessRecord(**(facts | changes))


def test_plain_line() -> None:
    assert format_plain(record(), NOW) == (
        "2026-11-23T02:45:30.974220Z\tinfo\taccess\tconnection complete\t"
        'src.addr=10.77.0.1:50864 src.identity="spiffe://cluster.local/ns/shop/sa/cart" '
        'dst.addr=10.77.0.2:15008 dst.hbone_addr=10.77.0.2:7001 dst.identity="spiffe://cluster.local/ns/shop/sa/stock" '
        'direction="outbound" bytes_sent=11 bytes_recv=12 duration="84ms"'
    )


def test_json_line_has_the_same_fields_flat_and_in_order() -> None:
    line = format_json(record(error="no", status=401, flag="DENY"), NOW)
    assert list(json.loads(line).items()) == [
        ("level", "error"),
        ("time", "2026-11-23T02:45:30.974220Z"),
        ("scope", "access"),
        ("message", "connection complete"),
        ("src.addr", "10.77.0.1:50864"),
        ("src.identity", str(CART)),
        ("dst.addr", "10.77.0.2:15008"),
        ("dst.hbone_addr", "10.77.0.2:7001"),
        ("dst.identity", str(STOCK)),
        ("direction", "outbound"),
        ("bytes_sent", 11),
        ("bytes_recv", 12),
        ("duration", "84ms"),
        ("error", "no"),
        ("status", 401),
        ("flag", "DENY"),
    ]


@pytest.mark.parametrize(
    ("changes", "level", "message"),
    [
        ({}, "info", "connection complete"),
        ({"error": "reset"}, "error", "connection complete"),
        ({"error": "no route", "bytes_sent": None, "bytes_recv": None}, "warn", "connection failed"),
    ],
)
def test_level_and_message(changes: dict[str, Any], level: str, message: str) -> None:
    assert f"\t{level}\taccess\t{message}\t" in format_plain(record(**changes), NOW)
    fields = json.loads(format_json(record(**changes), NOW))
    assert (fields["level"], fields["message"]) == (level, message)


def test_unknown_fields_are_left_out() -> None:
    early = AccessRecord(direction=Direction.INBOUND, src_addr=Endpoint.parse("[::1]:5"), error="denied")
    assert format_plain(early, NOW).split("\t")[-1] == 'src.addr=[::1]:5 direction="inbound" error="denied"'
    assert list(json.loads(format_json(early, NOW)))[4:] == ["src.addr", "direction", "error"]


@pytest.mark.parametrize(
    ("now", "text"), [(0.0, "1970-01-01T00:00:00.000000Z"), (1.000001, "1970-01-01T00:00:01.000001Z")]
)
def test_time(now: float, text: str) -> None:
    assert format_plain(record(), now).startswith(text + "\t")


# One plain line as a grammar: what a peer chose cannot make a second field, a second line or an escape sequence.
PLAIN = re.compile(
    r"[0-9TZ:.-]+\t(info|warn|error)\taccess\t[a-z ]+\t"
    r'(?:[a-z._]+=(?:"(?:[ !#-\[\]-~]|\\["\\nrtbfu])*"|[!#-<>-\[\]-~]+)(?: |$))+'
)


@given(text=st.text(), host=st.text(min_size=1), flag=st.text())
def test_text_of_a_peer_stays_in_its_field(text: str, host: str, flag: str) -> None:
    hostile = record(error=text, dst_hbone_addr=host, flag=flag)
    line = format_plain(hostile, NOW)
    assert PLAIN.fullmatch(line)
    assert re.findall(r"(?:^| )([a-z._]+)=", re.sub(r'"(?:[^"\\]|\\.)*"', '""', line.split("\t")[-1])) == [
        "src.addr",
        "src.identity",
        "dst.addr",
        "dst.hbone_addr",
        "dst.identity",
        "direction",
        "bytes_sent",
        "bytes_recv",
        "duration",
        "error",
        "flag",
    ]
    as_json = format_json(hostile, NOW)
    assert as_json.isascii()
    assert as_json.isprintable()
    fields = json.loads(as_json)
    assert fields["error"] == text
    assert fields["dst.hbone_addr"] == host
    assert fields["flag"] == flag


def test_injection_reads_back_as_text() -> None:
    evil = 'x"\n2026-01-01T00:00:00Z\tinfo\taccess\t\x1b[2J\x7f\u202e'
    line = format_plain(record(error=evil), NOW)
    assert line.endswith(r'error="x\"\n2026-01-01T00:00:00Z\tinfo\taccess\t\u001b[2J\u007f\u202e"')


def test_long_text_is_cut() -> None:
    assert len(json.loads(format_json(record(error="x" * 100_000), NOW))["error"]) == 1027
    assert len(format_plain(record(dst_hbone_addr="x" * 100_000), NOW)) < 2000


# -- the writer -------------------------------------------------------------------------------------------------------


class Counted(io.BytesIO):
    writes = 0

    def write(self, data: Any) -> int:
        self.writes += 1
        return super().write(data)


async def test_a_burst_is_one_write(autojump_clock: trio.testing.MockClock) -> None:
    stream = Counted()
    log = AccessLog(stream)
    for _ in range(50):
        log.write(record())
    assert stream.writes == 0
    await trio.sleep(0.2)
    assert stream.writes == 1
    assert stream.getvalue().count(b"\n") == 50
    log.write(record())
    await trio.sleep(0.2)
    assert stream.writes == 2
    assert (log.written, log.dropped) == (51, 0)
    await log.aclose()


async def test_the_last_lines_come_out_even_when_cancelled() -> None:
    stream = io.BytesIO()
    with trio.CancelScope() as scope:
        async with AccessLog(stream, LogFormat.JSON) as log:
            try:
                scope.cancel()
                await trio.sleep_forever()
            finally:
                log.write(record(error="closed by us"))
    log.write(record())  # after the end: written at once
    assert [json.loads(line).get("error") for line in stream.getvalue().splitlines()] == ["closed by us", None]
    assert log.written == 2


async def test_a_file_gets_every_line_in_order(tmp_path: Any) -> None:
    path = tmp_path / "access.log"
    with path.open("wb") as file:
        async with AccessLog(file, flush_interval=0.001) as log:
            for n in range(500):
                log.write(record(bytes_sent=n))
                if n % 50 == 0:
                    await trio.sleep(0.001)
    sent = [int(re.findall(r"bytes_sent=(\d+)", line)[0]) for line in path.read_text().splitlines()]
    assert sent == list(range(500))


async def test_a_slow_reader_costs_lines_not_the_event_loop() -> None:
    reading, writing = os.pipe()
    received = bytearray()

    def read_all() -> None:
        while data := os.read(reading, 65536):
            received.extend(data)

    with os.fdopen(writing, "wb", buffering=0) as pipe:
        async with AccessLog(pipe, flush_interval=0.001, max_buffer=100_000, close_timeout=60) as log:
            for n in range(5000):  # far more than pipe and buffer hold; nobody reads yet
                log.write(record(bytes_sent=n))
                if n % 100 == 0:
                    await trio.sleep(0.001)
            assert log.dropped > 0
            dropped = log.dropped
            reader = threading.Thread(target=read_all)
            reader.start()
            while log.written < 5000 - dropped:
                await trio.sleep(0.001)
            log.write(record(bytes_sent=5000))
    reader.join()
    os.close(reading)
    following, lost = 0, []  # each line is there, or counted by a notice in its place: one if the loop was never late
    for line in received.decode().splitlines():
        if "lines dropped" in line:
            before, _, count = line.partition("\tcount=")
            assert before.endswith("\twarn\taccess\tlines dropped: the reader of this log is too slow")
            lost.append(int(count))
            following += int(count)
        else:
            assert f" bytes_sent={following} " in line
            following += 1
    assert following == 5001
    assert sum(lost) == dropped


async def test_closing_does_not_wait_for_a_reader_for_ever() -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb", buffering=0) as pipe:
        log = AccessLog(pipe, close_timeout=0.05)
        for _ in range(1000):
            log.write(record())
        await log.aclose()
        assert (log.written, log.dropped) == (0, 1000)
    os.close(reading)


async def test_a_reader_that_left_is_no_error_here() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb", buffering=0) as pipe:
        async with AccessLog(pipe, flush_interval=0.001) as log:
            log.write(record())
        assert (log.written, log.dropped) == (0, 1)


async def test_a_stream_that_was_closed_is_no_error_here(tmp_path: Any) -> None:
    for stream in (io.BytesIO(), (tmp_path / "access.log").open("wb")):
        async with AccessLog(stream, flush_interval=0.001) as log:
            log.write(record())
            stream.close()
        assert (log.written, log.dropped) == (0, 1)


async def test_flush_now_for_a_sudden_end(tmp_path: Any) -> None:
    path = tmp_path / "access.log"
    with path.open("wb") as file:
        log = AccessLog(file)
        log.write(record())
        log.flush_now()
        assert path.read_bytes().count(b"\n") == 1
        await log.aclose()


async def test_dropped_lines_are_told_in_json_too(autojump_clock: trio.testing.MockClock) -> None:
    stream = io.BytesIO()
    async with AccessLog(stream, LogFormat.JSON, max_buffer=700) as log:
        for _ in range(5):
            log.write(record())
        await trio.sleep(1)
        log.write(record())
    assert [json.loads(line).get("count") for line in stream.getvalue().splitlines()][-2] == log.dropped > 0


@pytest.mark.parametrize("log_format", LogFormat)
@pytest.mark.parametrize("src_addr", [None, Endpoint.parse("10.0.0.1:4000"), Endpoint.parse("[fe80::1]:4000")])
@pytest.mark.parametrize(
    "record",
    [
        AccessRecord(direction=Direction.INBOUND),
        AccessRecord(
            direction=Direction.OUTBOUND,
            src_workload='we"b\t',
            src_namespace="shop",
            dst_addr=Endpoint.parse("10.0.0.2:15008"),
            dst_hbone_addr="stock.shop:80",
            dst_service="stock.shop",
        ),
    ],
)
async def test_a_pattern_writes_what_its_records_do(
    record: AccessRecord, src_addr: Endpoint | None, log_format: LogFormat
) -> None:
    pattern = AccessPattern(record)
    stream = io.BytesIO()
    async with AccessLog(stream, log_format) as log:
        log.write_complete(pattern, src_addr, 11, 22, 0.0335)
        log.write(pattern.complete(src_addr, 11, 22, 0.0335))
    clocks = re.compile(rb"\d{4}-\d\d-\d\dT[0-9:.]+Z").sub(b"", stream.getvalue())
    one, other = clocks.splitlines()
    assert one == other


@pytest.mark.parametrize("log_format", LogFormat)
async def test_messages_about_a_connection(log_format: LogFormat) -> None:
    stream = io.BytesIO()
    async with AccessLog(stream, log_format) as log:
        log.write_info("proxy::outbound", 'proxy to a"\n:80')
    (line,) = stream.getvalue().decode("ascii").splitlines()
    if log_format is LogFormat.JSON:
        said = json.loads(line)
        assert said.pop("time")
        assert said == {"level": "info", "scope": "hbone::proxy::outbound", "message": 'proxy to a"\n:80'}
    else:
        assert line.split("\t")[1:] == ["info", "proxy::outbound", 'proxy to a\\"\\n:80', ""]
