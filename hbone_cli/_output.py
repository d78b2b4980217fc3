"""What the commands print about themselves: lines for people on standard error, or JSON objects with ``--json``.

Standard output is for what was asked for: the access log, a tunnel's bytes, a certificate's facts.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hbone_cli._errors import Failure

__all__ = ["Reporter", "start_logging"]


class Reporter:
    """Says what happens, a line each.

    Args:
        as_json: one JSON object a line.
        events: whether to say what goes well, too.
    """

    def __init__(self, *, as_json: bool = False, events: bool = True) -> None:
        self._as_json = as_json
        self._events = events

    def event(self, name: str, text: str, **facts: object) -> None:
        """Something that is as it should be.

        Args:
            name: for scripts.
            text: for people.
            facts: for scripts.
        """
        if self._events:
            self._say({"event": name, **facts}, text)

    def warning(self, text: str, **facts: object) -> None:
        """Something that works, but that somebody should know of."""
        self._say({"event": "warning", "message": text, **facts}, f"warning: {text}")

    def failure(self, failure: Failure) -> None:
        """Why the command ends."""
        facts = {"event": "error", "kind": failure.kind, "exit_code": failure.code, "message": failure.message}
        more = {"messages": failure.lines} if failure.more else {}
        if self._as_json:
            self._say({**facts, **failure.facts, **more}, "")
            return
        for line in failure.lines:
            self._say({}, line)

    def _say(self, facts: dict[str, object], text: str) -> None:
        line = json.dumps(facts, default=str) if self._as_json else f"hbone: {text}"
        _write(line)


def _write(line: str) -> None:
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        pass  # nobody listens; the exit code says it too


class _Formatter(logging.Formatter):
    """One line a record. Tracebacks only for who asked for more."""

    def __init__(self, *, as_json: bool, verbose: int) -> None:
        super().__init__()
        self._as_json = as_json
        self._verbose = verbose

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            text += f": {type(error).__name__}: {error}"
        level = record.levelname.lower()
        if self._as_json:
            return json.dumps({"event": "log", "level": level, "logger": record.name, "message": text})
        line = f"hbone: {level}: {text}" if record.name == "hbone" else f"hbone: {level}: {record.name}: {text}"
        if record.exc_info and self._verbose:
            line += "\n" + self.formatException(record.exc_info)
        return line


def start_logging(*, verbose: int, as_json: bool) -> None:
    """Show the library's log on standard error: warnings; with ``-v`` what happens, with ``-vv`` everything."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter(as_json=as_json, verbose=verbose))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)])
