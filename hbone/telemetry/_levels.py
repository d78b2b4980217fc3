"""Which lines of the log are written: levels by scope, as ``RUST_LOG`` and Istio's ``scope:level`` say them.

`LogLevels` is a value; `LogControl` makes it so, for the loggers of the process and for the access log, and changes it
while the process runs.

A scope is the name of a logger as the log shows it: ``proxy::outbound`` is ``hbone.proxy.outbound``, ``access`` the
access log. What is said of a scope holds for those below it, and the longest one that fits counts.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from enum import IntEnum
from itertools import product
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hbone.telemetry._access_log import AccessLog

__all__ = ["LogControl", "LogLevel", "LogLevels", "level_name", "scope_of"]

_MAX_SCOPES: Final = 64
_MAX_PARTS: Final = 6


class LogLevel(IntEnum):
    """The levels; numbers as in `logging`."""

    TRACE = 5
    DEBUG = logging.DEBUG
    INFO = logging.INFO
    WARN = logging.WARNING
    ERROR = logging.ERROR
    OFF = 100


_NAMES: Final = {**{level.name.lower(): level for level in LogLevel}, "warning": LogLevel.WARN}
_CHOICE: Final = ", ".join(level.name.lower() for level in reversed(LogLevel))
_directive = re.compile(r"(?:(?P<scope>.*?)(?:=|(?<!:):(?!:)))?(?P<level>[^=]*)", re.DOTALL).fullmatch
_is_part = re.compile(r"[a-zA-Z0-9_-]+").fullmatch


def level_name(number: int) -> str:
    """How the log writes a level."""
    if number >= logging.ERROR:
        return "error"
    if number >= logging.WARNING:
        return "warn"
    if number >= logging.INFO:
        return "info"
    return "debug" if number >= logging.DEBUG else "trace"


def scope_of(logger: str) -> str:
    """How the log names a logger: ``hbone.proxy.outbound`` is ``hbone::proxy::outbound``."""
    return "::".join(part.lstrip("_") or part for part in logger.split("."))


@dataclass(frozen=True, slots=True)
class LogLevels:
    """What is written.

    Attributes:
        default: for scopes that nothing is said of.
        scopes: level by scope, without the leading ``hbone::``.
    """

    default: LogLevel = LogLevel.INFO
    scopes: tuple[tuple[str, LogLevel], ...] = ()

    @classmethod
    def parse(cls, text: str, *, base: LogLevels | None = None) -> LogLevels:
        """Read ``info,access=debug,proxy::outbound=trace``; ``scope:level`` is the same as ``scope=level``.

        Args:
            text: directives joined by commas; of two for one scope the last one counts.
            base: what holds where nothing is said; ``info`` for everything when None.

        Raises:
            ValueError: a directive is none; the message says which one and what it should be.
        """
        base = base or cls()
        default, scopes = base.default, dict(base.scopes)
        for directive in text.split(","):
            directive = directive.strip()
            if not directive:
                continue
            found = _directive(directive)
            assert found
            level = _NAMES.get(found["level"].strip().lower())
            if level is None:
                raise ValueError(_no_level(directive, found["scope"], found["level"].strip()))
            scope = _scope(directive, found["scope"])
            if scope:
                scopes[scope] = level
            else:
                default = level
        if len(scopes) > _MAX_SCOPES:
            raise ValueError(f"levels for more than {_MAX_SCOPES} scopes")
        return cls(default, tuple(sorted(scopes.items())))

    def level_of(self, scope: str) -> LogLevel:
        """The level of a scope: of the longest one that it is or is below of."""
        best, level = -1, self.default
        for known, said in self.scopes:
            if (scope == known or scope.startswith(f"{known}::")) and len(known) > best:
                best, level = len(known), said
        return level

    def __str__(self) -> str:
        """In the form that `parse` reads."""
        said = (f"{scope}={level.name.lower()}" for scope, level in self.scopes)
        return ",".join((self.default.name.lower(), *said))


def _no_level(directive: str, scope: str | None, level: str) -> str:
    directive, level = repr(directive[:80]), repr(level[:80])
    if scope is None:
        return f"{level} is no log level; write a level ({_CHOICE}) or SCOPE=LEVEL"
    return f"{directive}: {level} is no log level; the levels are {_CHOICE}"


def _scope(directive: str, text: str | None) -> str:
    if text is None:
        return ""
    parts = [part.lstrip("_") for part in text.strip().replace(".", "::").split("::")]
    if len(parts) > _MAX_PARTS or not all(map(_is_part, parts)):
        raise ValueError(f"{directive[:80]!r}: not the name of a scope, as in access=debug or proxy::outbound=trace")
    # Who comes from ztunnel may have its name in front.
    return "::".join(parts[1:] if parts[0] in ("hbone", "ztunnel") else parts)


class LogControl:
    """Applies levels to the loggers below ``hbone`` and to an access log. Other loggers keep theirs.

    Args:
        levels: to begin with, and what `reset` goes back to.
        access_log: has the scope ``access``.
    """

    def __init__(self, levels: LogLevels | None = None, *, access_log: AccessLog | None = None) -> None:
        self._start = levels or LogLevels()
        self._access_log = access_log
        self._before: dict[logging.Logger, int] = {}
        self._levels = self._start
        self._apply(self._start)

    @property
    def levels(self) -> LogLevels:
        """What holds now."""
        return self._levels

    def add(self, text: str) -> None:
        """Change what `text` says and keep the rest.

        Raises:
            ValueError: see `LogLevels.parse`; nothing was changed then.
        """
        self._apply(LogLevels.parse(text, base=self._levels))

    def reset(self, text: str = "") -> None:
        """Go back to the levels of the start, and from there change what `text` says.

        Raises:
            ValueError: see `LogLevels.parse`; nothing was changed then.
        """
        self._apply(LogLevels.parse(text, base=self._start))

    def close(self) -> None:
        """Give all loggers the levels back that they had."""
        for logger, level in self._before.items():
            logger.setLevel(level)
        self._before.clear()

    def _apply(self, levels: LogLevels) -> None:
        wanted = {logging.getLogger("hbone"): levels.default}
        for scope, level in levels.scopes:
            for name in _loggers(scope):
                wanted[logging.getLogger(name)] = level
        for logger in self._before.keys() - wanted.keys():
            logger.setLevel(self._before.pop(logger))
        for logger, level in wanted.items():
            self._before.setdefault(logger, logger.level)
            logger.setLevel(level)
        if self._access_log is not None:
            self._access_log.level = levels.level_of("access")
        self._levels = levels


def _loggers(scope: str) -> Iterator[str]:
    """The names that a logger of this scope may have: private modules have an underscore that the log does not show."""
    for parts in product(*((part, f"_{part}") for part in scope.split("::"))):
        yield ".".join(("hbone", *parts))
