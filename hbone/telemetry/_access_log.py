"""The access log: one line a connection, in the form that Istio's tools already read.

A line is a fact about a connection that has ended, so it is written once, from plain values, by `format_plain` or
`format_json`; both are pure. Text that a peer chose (host names, error texts) is escaped, so a peer can end neither a
field nor a line.

Theory of operation of `AccessLog`: `write` only appends to a list. The first line of a burst starts a short-lived
system task which waits for `flush_interval` and then hands all lines to one ``write(2)`` in a worker thread, again
until no lines are left; an idle log has no task. While the reader of a pipe is slow that thread waits, not the event
loop. Lines that would make the buffer larger than `max_buffer` are dropped and counted: the next line that gets
through is preceded by a warning with their number, and `dropped` has the sum.
"""

from __future__ import annotations

import os
import re
import select
import stat
import threading
import time
from contextlib import suppress
from enum import Enum
from functools import lru_cache
from json.encoder import encode_basestring_ascii
from typing import TYPE_CHECKING, BinaryIO, Final, NamedTuple

import trio

from hbone.telemetry._levels import LogLevel

if TYPE_CHECKING:
    from hbone.address import Authority, Endpoint
    from hbone.identity import SpiffeIdentity

__all__ = [
    "AccessLog",
    "AccessPattern",
    "AccessRecord",
    "Direction",
    "LogFormat",
    "bare",
    "format_json",
    "format_plain",
    "quote",
    "timestamp",
]

_MAX_TEXT = 1024
_NO_STEP = 1 << 30
_POLL_MS = 100

_plain_text = re.compile(r"[ !#-\[\]-~]*").fullmatch
_bare_text = re.compile(r"[!#-<>-\[\]-~]+").fullmatch
_delete = re.compile("\x7f")


class Direction(Enum):
    """Which of our proxies the connection went through."""

    OUTBOUND = "outbound"
    INBOUND = "inbound"


class LogFormat(Enum):
    """How a line is written."""

    PLAIN = "plain"
    JSON = "json"


class AccessRecord(NamedTuple):
    """What is known of one connection. Unknown fields are None and are left out of the line.

    Give the fields by name. A tuple because it is quick to make and there is one for each connection.
    """

    direction: Direction
    src_addr: Endpoint | None = None
    """Who connected to the proxy."""
    src_workload: str | None = None
    """A pod's name; see `log_names`."""
    src_namespace: str | None = None
    src_identity: SpiffeIdentity | None = None
    """Only when proven by mutual TLS."""
    src_cluster: str | None = None
    dst_addr: Endpoint | Authority | None = None
    """Where the proxy itself connected to or was reached (outbound: the next hop; inbound: our own address)."""
    dst_hbone_addr: Authority | str | None = None
    """The authority of the CONNECT."""
    dst_service: str | None = None
    """The host name of the service that was asked for."""
    dst_workload: str | None = None
    dst_namespace: str | None = None
    dst_identity: SpiffeIdentity | None = None
    """Only when proven by mutual TLS."""
    dst_cluster: str | None = None
    bytes_sent: int | None = None
    """What the application of this side sent: the request (outbound), the response (inbound).

    None when the connection ended before there was anything to count.
    """
    bytes_recv: int | None = None
    """The other way."""
    duration: float | None = None
    """Seconds."""
    error: str | None = None
    """In words; None for a connection that went well."""
    reset: str | None = None
    """How an application reset the connection, in words; None when both directions ended. No error."""
    status: int | None = None
    """The HTTP status of a refusal."""
    flag: str | None = None
    """Istio's response flag (``DENY``, ``CONNECT``, ...)."""
    opened: bool = False
    """The connection begins; a line of level ``debug``."""

    @property
    def level(self) -> str:
        """``info`` for success, ``error`` for a failure, ``warn`` for one before the connection was routed.

        ``debug`` for the beginning of a connection.
        """
        if self.error is None:
            return "debug" if self.opened else "info"
        return "warn" if self.bytes_sent is None and self.bytes_recv is None else "error"

    @property
    def message(self) -> str:
        """``connection complete``, or ``connection failed`` for one that failed before it was routed.

        ``connection opened`` for the beginning of a connection.
        """
        return _MESSAGES[self.level]


_INFO: Final = int(LogLevel.INFO)
_LEVELS: Final = {"debug": LogLevel.DEBUG, "info": LogLevel.INFO, "warn": LogLevel.WARN, "error": LogLevel.ERROR}
_MESSAGES: Final = {
    "debug": "connection opened",
    "info": "connection complete",
    "error": "connection complete",
    "warn": "connection failed",
}


def quote(text: str) -> str:
    """A double-quoted string, printable ASCII only, whatever is in it; cut at 1024 characters."""
    if len(text) > _MAX_TEXT:
        text = text[:_MAX_TEXT] + "..."
    if _plain_text(text):
        return f'"{text}"'
    return _delete.sub(r"\\u007f", encode_basestring_ascii(text))


def bare(value: object) -> str:
    """An address without quotes; with them if it is not the plain word that it should be."""
    text = str(value)
    return text if len(text) <= _MAX_TEXT and _bare_text(text) else quote(text)


# In one tuple, because other threads log too.
_this_second = (-1, "")


def timestamp(now: float) -> str:
    """RFC 3339 in UTC with microseconds; only the first line of each second pays for the calendar."""
    global _this_second
    micros = round(now * 1_000_000)
    second, text = _this_second
    if micros // 1_000_000 != second:
        second = micros // 1_000_000
        text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        _this_second = (second, text)
    return f"{text}.{micros - second * 1_000_000:06d}Z"


# What is said of a side is the same for many connections, and most of a line.
@lru_cache(maxsize=4096)
def _side_plain(
    side: str, service: str | None, workload: str | None, namespace: str | None, identity: object, cluster: str | None
) -> str:
    names = ("service", "workload", "namespace", "identity", "cluster")
    values = (service, workload, namespace, identity, cluster)
    return "".join(
        f"{side}.{name}={quote(str(value))} " for name, value in zip(names, values, strict=True) if value is not None
    )


@lru_cache(maxsize=4096)
def _side_json(
    side: str, service: str | None, workload: str | None, namespace: str | None, identity: object, cluster: str | None
) -> str:
    names = ("service", "workload", "namespace", "identity", "cluster")
    values = (service, workload, namespace, identity, cluster)
    return "".join(
        f',"{side}.{name}":{quote(str(value))}' for name, value in zip(names, values, strict=True) if value is not None
    )


def format_plain(record: AccessRecord, now: float) -> str:
    """The line in Istio's text format: time, level, scope and message, then ``k=v`` pairs; no line end.

    Args:
        record: the facts.
        now: seconds since the epoch.
    """
    (
        direction, src_addr, src_workload, src_namespace, src_identity, src_cluster,
        dst_addr, dst_hbone_addr, dst_service, dst_workload, dst_namespace, dst_identity, dst_cluster,
        bytes_sent, bytes_recv, duration, error, reset, status, flag, _,
    ) = record  # fmt: skip
    level = record.level
    text = f"{timestamp(now)}\t{level}\taccess\t{_MESSAGES[level]}\t"
    if src_addr is not None:
        text += f"src.addr={bare(src_addr)} "
    text += _side_plain("src", None, src_workload, src_namespace, src_identity, src_cluster)
    if dst_addr is not None:
        text += f"dst.addr={bare(dst_addr)} "
    if dst_hbone_addr is not None:
        text += f"dst.hbone_addr={bare(dst_hbone_addr)} "
    text += _side_plain("dst", dst_service, dst_workload, dst_namespace, dst_identity, dst_cluster)
    text += f'direction="{direction._value_}"'
    if bytes_sent is not None:
        text += f" bytes_sent={bytes_sent:d}"
    if bytes_recv is not None:
        text += f" bytes_recv={bytes_recv:d}"
    if duration is not None:
        text += f' duration="{int(duration * 1000)}ms"'
    if error is not None:
        text += f" error={quote(error)}"
    if reset is not None:
        text += f" reset={quote(reset)}"
    if status is not None:
        text += f" status={status:d}"
    if flag is not None:
        text += f" flag={quote(flag)}"
    return text


def format_json(record: AccessRecord, now: float) -> str:
    """The line as one flat JSON object with the same names (``"src.addr"``); no line end.

    Args:
        record: the facts.
        now: seconds since the epoch.
    """
    (
        direction, src_addr, src_workload, src_namespace, src_identity, src_cluster,
        dst_addr, dst_hbone_addr, dst_service, dst_workload, dst_namespace, dst_identity, dst_cluster,
        bytes_sent, bytes_recv, duration, error, reset, status, flag, _,
    ) = record  # fmt: skip
    level = record.level
    text = f'{{"level":"{level}","time":"{timestamp(now)}","scope":"access","message":"{_MESSAGES[level]}"'
    if src_addr is not None:
        text += f',"src.addr":{quote(str(src_addr))}'
    text += _side_json("src", None, src_workload, src_namespace, src_identity, src_cluster)
    if dst_addr is not None:
        text += f',"dst.addr":{quote(str(dst_addr))}'
    if dst_hbone_addr is not None:
        text += f',"dst.hbone_addr":{quote(str(dst_hbone_addr))}'
    text += _side_json("dst", dst_service, dst_workload, dst_namespace, dst_identity, dst_cluster)
    text += f',"direction":"{direction._value_}"'
    if bytes_sent is not None:
        text += f',"bytes_sent":{bytes_sent:d}'
    if bytes_recv is not None:
        text += f',"bytes_recv":{bytes_recv:d}'
    if duration is not None:
        text += f',"duration":"{int(duration * 1000)}ms"'
    if error is not None:
        text += f',"error":{quote(error)}'
    if reset is not None:
        text += f',"reset":{quote(reset)}'
    if status is not None:
        text += f',"status":{status:d}'
    if flag is not None:
        text += f',"flag":{quote(flag)}'
    return text + "}"


class AccessPattern:
    """The lines of connections that differ only in whose address they come from, their bytes and their duration.

    Nearly all of such a line is the same each time: it is formatted once, which makes a line four times as cheap.

    Args:
        record: with all that does not change; of a connection that went well.
    """

    __slots__ = ("json", "plain", "record")

    def __init__(self, record: AccessRecord) -> None:
        self.record: AccessRecord = record._replace(src_addr=None, bytes_sent=None, bytes_recv=None, duration=None)
        self.plain: str = format_plain(self.record, 0).split("\t", 4)[4]
        """The fields after ``src.addr``, up to ``bytes_sent``."""
        self.json: str = format_json(self.record, 0)[_JSON_HEAD:-1]

    def complete(self, src_addr: Endpoint | None, sent: int, received: int, duration: float) -> AccessRecord:
        """One of these connections as a record."""
        return self.record._replace(src_addr=src_addr, bytes_sent=sent, bytes_recv=received, duration=duration)


_JSON_HEAD: Final = len(format_json(AccessRecord(direction=Direction.INBOUND), 0).partition(',"direction"')[0])


def _dropped_line(log_format: LogFormat, count: int, now: float) -> str:
    if log_format is LogFormat.JSON:
        head = f'{{"level":"warn","time":"{timestamp(now)}","scope":"access"'
        return f'{head},"message":"lines dropped: the reader of this log is too slow","count":{count}}}'
    return f"{timestamp(now)}\twarn\taccess\tlines dropped: the reader of this log is too slow\tcount={count}"


class _Sink:
    """Writes bytes where they belong, in whatever thread it is called; one caller at a time, in order.

    A file with a descriptor is written with ``os.write``: a worker thread that is stuck in a `BufferedWriter` would
    hold its lock at the end of the process and make the interpreter abort. What is not a regular file is asked before
    each write and gets no more than it takes without blocking (``PIPE_BUF``), so that a deadline can end the wait.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._deadline = float("inf")
        try:
            self.fd = stream.fileno()
        except (OSError, AttributeError, ValueError):
            self.fd = -1
            return
        stream.flush()
        self._step = _NO_STEP if stat.S_ISREG(os.fstat(self.fd).st_mode) else select.PIPE_BUF

    def stop_within(self, seconds: float) -> None:
        """From now on a reader who does not read is waited for no longer than this."""
        self._deadline = time.monotonic() + seconds

    def write(self, data: bytes) -> bool:
        """Writes all of it; False if nobody reads any more, not in time, or the disk is full."""
        with self._lock:
            try:
                if self.fd < 0:
                    self._stream.write(data)
                    return True
                poller = select.poll()
                poller.register(self.fd, select.POLLOUT)
                view = memoryview(data)
                while view:
                    if poller.poll(_POLL_MS):
                        with suppress(BlockingIOError):  # made non-blocking by somebody else, and full after all
                            view = view[os.write(self.fd, view[: self._step]) :]
                    elif time.monotonic() > self._deadline:
                        return False
            except (OSError, ValueError):  # ValueError: a stream that was closed under us
                return False
            return True


class AccessLog:
    """Writes access records to a stream without ever holding up the event loop.

    Use it as ``async with AccessLog(sys.stdout.buffer) as log`` *around* whatever writes to it, so that the last lines
    of a shutdown are in it, or call `aclose`. `write` needs a running trio; one log belongs to one `trio.run`.

    Policy when the reader is slower than the log: up to `max_buffer` characters wait, further lines are dropped and
    counted.

    Args:
        stream: a binary stream, best one with a file descriptor. It is not closed.
        log_format: plain or JSON.
        flush_interval: seconds for which lines are gathered into one write.
        max_buffer: bound of what waits, in characters (lines are ASCII, so also in bytes).
        close_timeout: seconds that `aclose` waits for a slow reader.

    Attributes:
        level: records below it are not written (`LogLevel`). With ``debug`` those of connections that begin are.
    """

    def __init__(
        self,
        stream: BinaryIO,
        log_format: LogFormat = LogFormat.PLAIN,
        *,
        flush_interval: float = 0.1,
        max_buffer: int = 4 * 1024 * 1024,
        close_timeout: float = 2.0,
    ) -> None:
        self._sink = _Sink(stream)
        self._log_format = log_format
        self.level: int = LogLevel.INFO
        self._format = format_json if log_format is LogFormat.JSON else format_plain
        self._flush_interval = flush_interval
        self._max_buffer = max_buffer
        self._close_timeout = close_timeout
        self._lines: list[str] = []
        self._size = 0
        self._dropped = 0
        self._dropped_unsaid = 0
        self._written = 0
        self._flushing = False
        self._closed = False
        self._writing = trio.Lock()  # first come, first served: lines keep their order
        self._limiter = trio.CapacityLimiter(1)  # not one of the threads that the program has for itself
        self._token: trio.lowlevel.TrioToken | None = None

    @property
    def log_format(self) -> LogFormat:
        """How lines are written."""
        return self._log_format

    @property
    def dropped(self) -> int:
        """How many lines were lost: to a reader that was too slow, or to an output that failed."""
        return self._dropped

    @property
    def written(self) -> int:
        """How many lines have left for the output."""
        return self._written

    def write(self, record: AccessRecord) -> None:
        """Takes one record. Never waits, never raises for what the output does."""
        if (self.level != _INFO or record.opened) and _LEVELS[record.level] < self.level:
            return
        now = time.time()
        self._add(self._format(record, now), now)

    def write_complete(
        self, pattern: AccessPattern, src_addr: Endpoint | None, sent: int, received: int, duration: float
    ) -> None:
        """The same as ``write(pattern.complete(...))``, for the many connections that end well."""
        if self.level > _INFO:
            return
        now = time.time()
        address = str(src_addr) if src_addr is not None else None
        milliseconds = int(duration * 1000)
        if self._log_format is LogFormat.JSON:
            source = f',"src.addr":"{address}"' if address is not None else ""
            line = (
                f'{{"level":"info","time":"{timestamp(now)}","scope":"access","message":"connection complete"{source}'
                f'{pattern.json},"bytes_sent":{sent},"bytes_recv":{received},"duration":"{milliseconds}ms"}}'
            )
        else:
            source = f"src.addr={address} " if address is not None else ""
            line = (
                f"{timestamp(now)}\tinfo\taccess\tconnection complete\t{source}"
                f'{pattern.plain} bytes_sent={sent} bytes_recv={received} duration="{milliseconds}ms"'
            )
        self._add(line, now)

    def write_info(self, scope: str, message: str) -> None:
        """Takes a message of level ``info`` about a connection. Never waits; not for other threads.

        Args:
            scope: ``proxy::outbound``, for instance; as it stands in the plain format.
            message: is escaped, as it may have parts that a peer chose.
        """
        now = time.time()
        if not message.isprintable() or not message.isascii() or '"' in message or "\\" in message:
            message = quote(message)[1:-1]
        if self._log_format is LogFormat.JSON:
            line = f'{{"level":"info","time":"{timestamp(now)}","scope":"hbone::{scope}","message":"{message}"}}'
        else:
            line = f"{timestamp(now)}\tinfo\t{scope}\t{message}\t"
        self._add(line, now)

    def write_line(self, line: str) -> None:
        """Takes a line of another log, printable ASCII only, that is to be in this stream too.

        May be called from any thread; what other threads say is a little late, and before and after `trio.run` it
        waits for the output.
        """
        try:
            self._token = trio.lowlevel.current_trio_token()
        except RuntimeError:
            if self._token is not None:
                try:
                    self._token.run_sync_soon(self._add, line, time.time())
                except trio.RunFinishedError:
                    self._token = None
                else:
                    return
            self._account(1, self._sink.write(f"{line}\n".encode("ascii")))
        else:
            self._add(line, time.time())

    def _add(self, line: str, now: float) -> None:
        size = len(line) + 1
        if self._size + size > self._max_buffer:
            self._dropped += 1
            self._dropped_unsaid += 1
            return
        if self._dropped_unsaid:
            notice = _dropped_line(self._log_format, self._dropped_unsaid, now)
            self._dropped_unsaid = 0
            self._lines.append(notice)
            self._size += len(notice) + 1
        self._lines.append(line)
        self._size += size
        if self._closed:
            self.flush_now()
        elif not self._flushing:
            self._flushing = True
            trio.lowlevel.spawn_system_task(self._flush_while_busy, name="hbone access log")

    def flush_now(self) -> None:
        """Writes what waits, from here, and may block: for the way out of a process that does not stop in order."""
        data, count = self._take()
        self._account(count, self._sink.write(data))

    async def aclose(self) -> None:
        """Writes what waits, within `close_timeout` seconds also when cancelled; later lines are written at once."""
        self._closed = True
        self._sink.stop_within(self._close_timeout)
        # The sink keeps the time; the second more is for what hangs in spite of poll, such as a stopped terminal.
        with trio.move_on_after(self._close_timeout + 1, shield=True):
            await self._write_in_thread()
        await trio.lowlevel.checkpoint_if_cancelled()

    async def __aenter__(self) -> AccessLog:
        self._token = trio.lowlevel.current_trio_token()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.aclose()

    def _take(self) -> tuple[bytes, int]:
        if not self._lines:
            return b"", 0
        count = len(self._lines)
        self._lines.append("")
        data = "\n".join(self._lines).encode("ascii")
        self._lines = []
        self._size = 0
        return data, count

    def _account(self, count: int, arrived: bool) -> None:
        if arrived:
            self._written += count
        else:
            self._dropped += count

    async def _write_in_thread(self) -> None:
        """Writes what waits, after a write under way."""
        async with self._writing:
            data, count = self._take()
            arrived = False
            try:
                if self._sink.fd < 0:
                    arrived = self._sink.write(data)
                elif data:
                    arrived = await trio.to_thread.run_sync(
                        self._sink.write, data, abandon_on_cancel=True, limiter=self._limiter
                    )
            finally:
                self._account(count, arrived)

    async def _flush_while_busy(self) -> None:
        try:
            while not self._closed:
                await trio.sleep(self._flush_interval)
                if not self._lines:
                    return
                await self._write_in_thread()
        finally:
            self._flushing = False
