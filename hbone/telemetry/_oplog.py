"""What the process says about itself, in the form and on the stream of the access log.

`LogHandler` is a handler of `logging`: it formats records as Istio's components do and gives the lines to an
`AccessLog`, so that both logs keep one order and neither ever holds up the event loop. Facts go into fields::

    _log.info("listener established", extra={"fields": {"address": endpoint, "component": "inbound"}})
"""

from __future__ import annotations

import logging
import math
import re
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv6Address
from json.encoder import encode_basestring_ascii
from typing import TYPE_CHECKING, Final

from hbone.address import Authority, Endpoint
from hbone.telemetry._access_log import LogFormat, bare, quote, timestamp
from hbone.telemetry._levels import LogControl, LogLevels, level_name, scope_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from hbone.telemetry._access_log import AccessLog

__all__ = ["LogHandler", "format_log_json", "format_log_plain", "log_to"]

_MAX_MESSAGE: Final = 8192
_BARE: Final = (Endpoint, Authority, IPv4Address, IPv6Address)

_unclean = re.compile(r"[^ -\[\]-~]").sub
_unclean_key = re.compile(r"[^a-zA-Z0-9_.]").sub


def format_log_plain(record: logging.LogRecord) -> str:
    """Time, level, scope, message and fields (``k=v``), with tabs in between; no line end."""
    pairs = " ".join(f"{key}={_plain_value(value)}" for key, value in _fields(record).items())
    message = _unclean(_escaped, _message(record))
    scope = scope_of(record.name).removeprefix("hbone::")
    return f"{timestamp(record.created)}\t{level_name(record.levelno)}\t{scope}\t{message}\t{pairs}"


def format_log_json(record: logging.LogRecord) -> str:
    """The same as one flat JSON object; the scope is whole. No line end."""
    pairs = "".join(f',"{key}":{_json_value(value)}' for key, value in _fields(record).items())
    head = f'{{"level":"{level_name(record.levelno)}","time":"{timestamp(record.created)}"'
    scope, message = _json_text(scope_of(record.name)), _json_text(_message(record))
    return f'{head},"scope":{scope},"message":{message}{pairs}}}'


class LogHandler(logging.Handler):
    """Writes records into an access log. From any thread.

    Args:
        access_log: says the format, too.
    """

    def __init__(self, access_log: AccessLog) -> None:
        super().__init__()
        self._write = access_log.write_line
        self._format_line = format_log_json if access_log.log_format is LogFormat.JSON else format_log_plain

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return self._format_line(record)

    def emit(self, record: logging.LogRecord) -> None:
        """Formats and hands over; never waits for the output while trio runs."""
        try:
            line = self._format_line(record)
        except Exception:  # noqa: BLE001 - what `logging` asks of a handler: a bad log call must not raise at its caller
            self.handleError(record)
            return
        self._write(line)


@contextmanager
def log_to(access_log: AccessLog, levels: LogLevels | None = None) -> Iterator[LogControl]:
    """While the block lasts, all that the process logs goes to `access_log`.

    It takes the place of the root logger's handlers, so it is for programs, not for libraries. Loggers of others than
    hbone are heard from level ``warn``, or from the default level where that is higher.

    Args:
        access_log: where to, and in which format.
        levels: what is written; ``info`` when None.
    """
    root = logging.getLogger()
    before = root.handlers[:], root.level
    levels = levels or LogLevels()
    control = LogControl(levels, access_log=access_log)
    root.handlers[:] = [LogHandler(access_log)]
    root.setLevel(max(levels.default, logging.WARNING))
    try:
        yield control
    finally:
        root.handlers[:] = before[0]
        root.setLevel(before[1])
        control.close()


def _fields(record: logging.LogRecord) -> dict[str, object]:
    said: Mapping[str, object] = getattr(record, "fields", None) or {}
    fields = {_unclean_key("_", str(key)): value for key, value in said.items() if value is not None}
    if record.exc_info and record.exc_info[1] is not None:
        error = record.exc_info[1]
        fields.setdefault("error", f"{type(error).__name__}: {error}")
        if record.levelno >= logging.ERROR:
            fields["stack"] = _Long(_formatter.formatException(record.exc_info))
    return fields


_formatter: Final = logging.Formatter()


class _Long(str):
    """A text that may be longer than others."""

    __slots__ = ()


def _message(record: logging.LogRecord) -> str:
    text = record.getMessage()
    return text if len(text) <= _MAX_MESSAGE else text[:_MAX_MESSAGE] + "..."


def _escaped(found: re.Match[str]) -> str:
    return _json_text(found[0])[1:-1]


def _json_text(text: str) -> str:
    return encode_basestring_ascii(text).replace("\x7f", "\\u007f")


def _number(value: object) -> str | None:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return repr(value)
    return None


def _plain_value(value: object) -> str:
    if (number := _number(value)) is not None:
        return number
    return bare(value) if isinstance(value, _BARE) else _quoted(value)


def _json_value(value: object) -> str:
    number = _number(value)
    return number if number is not None else _quoted(value)


def _quoted(value: object) -> str:
    if isinstance(value, _Long):
        return _json_text(value if len(value) <= _MAX_MESSAGE else value[-_MAX_MESSAGE:])
    return quote(str(value))
