"""What the process says about itself: lines written out, fields, injection, and where they go."""

from __future__ import annotations

import io
import json
import logging
import sys
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from hbone.address import Authority, Endpoint
from hbone.identity import SpiffeIdentity
from hbone.telemetry import AccessLog, AccessRecord, Direction, LogFormat, LogHandler, LogLevels, log_to
from hbone.telemetry._oplog import format_log_json, format_log_plain

NOW = 1767323045.031415


def record(
    message: str, *args: object, name: str = "hbone.proxy.inbound", level: int = logging.INFO, **fields: object
) -> logging.LogRecord:
    made = logging.LogRecord(name, level, "x.py", 1, message, args, None)
    made.created = NOW
    if fields:
        made.fields = fields
    return made


@pytest.mark.parametrize(
    ("made", "plain", "as_json"),
    [
        (
            record("listener established", address=Endpoint.parse("[::]:1"), component="inbound", transparent=False),
            'info\tproxy::inbound\tlistener established\taddress=[::]:1 component="inbound" transparent=false',
            '"info","time":"2026-01-02T03:04:05.031415Z","scope":"hbone::proxy::inbound",'
            '"message":"listener established","address":"[::]:1","component":"inbound","transparent":false',
        ),
        (
            record("Task '%s' complete", "proxy", name="hbone.readiness"),
            "info\treadiness\tTask 'proxy' complete\t",
            '"info","time":"2026-01-02T03:04:05.031415Z","scope":"hbone::readiness",'
            '"message":"Task \'proxy\' complete"',
        ),
        (
            record("of a private module", name="hbone.admin._server", level=logging.WARNING, n=3, share=0.5, gone=None),
            "warn\tadmin::server\tof a private module\tn=3 share=0.5",
            '"warn","time":"2026-01-02T03:04:05.031415Z","scope":"hbone::admin::server",'
            '"message":"of a private module","n":3,"share":0.5',
        ),
        (
            record(
                "kinds",
                name="hbone",
                level=logging.DEBUG,
                target=Authority.parse("a.example:80"),
                identity=SpiffeIdentity.parse("spiffe://td/x"),
                nothing=float("nan"),
            ),
            'debug\thbone\tkinds\ttarget=a.example:80 identity="spiffe://td/x" nothing="nan"',
            '"debug","time":"2026-01-02T03:04:05.031415Z","scope":"hbone","message":"kinds",'
            '"target":"a.example:80","identity":"spiffe://td/x","nothing":"nan"',
        ),
        (
            record("other libraries", name="h2.connection", level=5),
            "trace\th2::connection\tother libraries\t",
            '"trace","time":"2026-01-02T03:04:05.031415Z","scope":"h2::connection","message":"other libraries"',
        ),
    ],
)  # fmt: skip
def test_lines(made: logging.LogRecord, plain: str, as_json: str) -> None:
    assert format_log_plain(made) == f"2026-01-02T03:04:05.031415Z\t{plain}"
    assert format_log_json(made) == f'{{"level":{as_json}}}'
    json.loads(format_log_json(made))


def test_an_error_is_told_in_fields() -> None:
    made = record("reload failed", level=logging.ERROR)
    try:
        raise ValueError('bad\nvalue "x"')
    except ValueError:
        made.exc_info = sys.exc_info()
    line = format_log_plain(made)
    assert (
        '\treload failed\terror="ValueError: bad\\nvalue \\"x\\"" stack="Traceback (most recent call last):\\n' in line
    )
    document = json.loads(format_log_json(made))
    assert document["error"] == 'ValueError: bad\nvalue "x"'
    assert document["stack"].endswith('ValueError: bad\nvalue "x"')
    assert "test_oplog.py" in document["stack"]
    made.levelno = logging.WARNING
    assert "stack" not in json.loads(format_log_json(made))


@given(message=st.text(), value=st.text(), key=st.text(min_size=1, max_size=10))
def test_nobody_can_make_a_line_or_a_field(message: str, value: str, key: str) -> None:
    made = record("%s", message, **{key: value})
    line = format_log_plain(made)
    assert line.isascii()
    assert line.replace("\t", "").isprintable()
    assert line.count("\t") == 4
    document = json.loads(format_log_json(made))
    assert document["message"] == message or key == "message"
    assert value in document.values()


def test_injection_reads_back_as_text() -> None:
    evil = 'x\t\\ "\n2026-01-01T00:00:00Z\tinfo\taccess\t\x1b[2J\x7f\U0001f600'
    line = format_log_plain(record("%s", evil, why=evil))
    assert line.split("\t")[3] == r'x\t\\ "\n2026-01-01T00:00:00Z\tinfo\taccess\t\u001b[2J\u007f\ud83d\ude00'
    assert line.endswith(r'why="x\t\\ \"\n2026-01-01T00:00:00Z\tinfo\taccess\t\u001b[2J\u007f\ud83d\ude00"')


def test_long_ones_are_cut() -> None:
    assert len(format_log_plain(record("x" * 100_000, why="y" * 100_000))) < 10_000


# -- where it goes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_format", list(LogFormat))
async def test_one_stream_with_the_access_log(log_format: LogFormat) -> None:
    stream = io.BytesIO()
    logger = logging.getLogger("hbone.proxy.outbound")
    async with AccessLog(stream, log_format) as access_log:
        with log_to(access_log, LogLevels.parse("warn,proxy::outbound=info")) as control:
            logger.info("one", extra={"fields": {"n": 1}})
            access_log.write(AccessRecord(direction=Direction.OUTBOUND, error="two"))
            logger.debug("not said")
            logging.getLogger("hbone.proxy.inbound").info("not said")
            logging.getLogger("somebody.else").info("not said")
            logging.getLogger("somebody.else").warning("three")
            control.add("proxy::outbound=off")
            logger.error("not said")
    lines = stream.getvalue().decode().splitlines()
    if log_format is LogFormat.JSON:
        assert [json.loads(line)["message"] for line in lines] == ["one", "connection failed", "three"]
    else:
        assert [line.split("\t", 1)[1] for line in lines] == [
            "info\tproxy::outbound\tone\tn=1",
            'warn\taccess\tconnection failed\tdirection="outbound" error="two"',
            "warn\tsomebody::else\tthree\t",
        ]


async def test_afterwards_the_root_logger_is_as_before() -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    async with AccessLog(io.BytesIO()) as access_log:
        try:
            with log_to(access_log):
                assert [type(handler) for handler in root.handlers] == [LogHandler]
                raise KeyError
        except KeyError:
            pass
    assert (root.handlers[:], root.level) == before


async def test_a_quiet_default_quiets_others_too() -> None:
    stream = io.BytesIO()
    async with AccessLog(stream) as access_log:
        with log_to(access_log, LogLevels.parse("error")):
            logging.getLogger("somebody.else").warning("not said")
    assert not stream.getvalue()


async def test_threads_log_too() -> None:
    stream = io.BytesIO()

    def work() -> None:
        for n in range(100):
            logging.getLogger("hbone.mesh").warning("line %d", n)

    async with AccessLog(stream, flush_interval=0.001) as access_log:
        with log_to(access_log):
            await trio.to_thread.run_sync(work)
        await trio.testing.wait_all_tasks_blocked()
    said = [line.split("\t")[3] for line in stream.getvalue().decode().splitlines()]
    assert said == [f"line {n}" for n in range(100)]


async def test_a_bad_log_call_is_no_error_at_its_caller(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", True)
    stream = io.BytesIO()
    async with AccessLog(stream) as access_log:
        with log_to(access_log):
            logging.getLogger("hbone").warning("%d", "no number")
            logging.getLogger("hbone").warning("next")
    assert stream.getvalue().endswith(b"\tnext\t\n")
    assert "TypeError" in capsys.readouterr().err


def test_a_handler_of_its_own(tmp_path: Any) -> None:
    """For a program that has its own idea of its root logger."""
    path = tmp_path / "log"
    logger = logging.getLogger("hbone.test_oplog")
    with path.open("wb") as file:
        handler = LogHandler(AccessLog(file, LogFormat.JSON))
        logger.addHandler(handler)
        try:
            logger.warning("hello", extra={"fields": {"n": 1}})
        finally:
            logger.removeHandler(handler)
    document = json.loads(path.read_text())
    assert (document["message"], document["n"]) == ("hello", 1)
    assert handler.format(record("x")).startswith('{"level":"info"')
