"""Counters as text for Prometheus: the text format 0.0.4 and OpenMetrics 1.0.0. Pure.

Our own writer, where prometheus-client has one too, for two reasons. Labels keep their order, so that a line reads as
ztunnel's does. And the text of a set of labels, which is nearly all of a scrape, is made once and not at each scrape,
which happens in the thread of the event loop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Family", "Sample", "Texts", "exposition"]

_MAX_TEXTS: Final = 65536


class Sample(NamedTuple):
    """One line."""

    names: tuple[str, ...]
    values: tuple[str, ...]
    number: float
    suffix: str = ""
    """After the name of the family."""


@dataclass(slots=True)
class Family:
    """Some lines of one name."""

    name: str
    """Without ``_total``."""
    kind: str
    """``counter``, ``gauge`` or ``histogram``."""
    documentation: str
    samples: list[Sample] = field(default_factory=list)

    def add(self, names: tuple[str, ...], values: tuple[str, ...], number: float, suffix: str = "") -> None:
        """One more line."""
        self.samples.append(Sample(names, values, number, suffix))


class Texts:
    """Remembers the text of label sets."""

    def __init__(self) -> None:
        self._known: dict[tuple[tuple[str, ...], tuple[str, ...]], str] = {}

    def of(self, names: tuple[str, ...], values: tuple[str, ...]) -> str:
        """``{name="value",...}``, or nothing for no labels."""
        if not names:
            return ""
        key = (names, values)
        text = self._known.get(key)
        if text is None:
            if len(self._known) >= _MAX_TEXTS:
                self._known.clear()
            pairs = (f'{name}="{_escape(value)}"' for name, value in zip(names, values, strict=True))
            text = self._known[key] = f"{{{','.join(pairs)}}}"
        return text


def exposition(families: Iterable[Family], texts: Texts, *, openmetrics: bool) -> str:
    """The families that have a line; for OpenMetrics the caller adds the ``# EOF``."""
    parts: list[str] = []
    for family in families:
        if not family.samples:
            continue
        counter = family.kind == "counter"
        shown = f"{family.name}_total" if counter and not openmetrics else family.name
        parts.append(f"# HELP {shown} {_one_line(family.documentation)}\n# TYPE {shown} {family.kind}\n")
        for names, values, number, suffix in family.samples:
            if counter:
                suffix = "_total"
            parts.append(f"{family.name}{suffix}{texts.of(names, values)} {_number(number)}\n")
    return "".join(parts)


def _number(number: float) -> str:
    """As Go reads it. Integers are written out, however large: a byte counter must not lose its last digits."""
    if isinstance(number, int):
        return f"{int(number)}.0"
    if math.isnan(number):
        return "NaN"
    if math.isinf(number):
        return "+Inf" if number > 0 else "-Inf"
    return repr(number)


def _escape(text: str) -> str:
    if "\\" in text or '"' in text or "\n" in text:
        return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return text


def _one_line(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")
