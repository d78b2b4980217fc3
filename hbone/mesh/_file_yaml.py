"""The YAML of a mesh file as a stream of entries: plain maps, lists and texts, and where each was written.

PyYAML's events are put together here and not by its composer: that one makes a tree of the whole file first, takes the
second of two equal keys in silence, and guesses types. Here a scalar is its text, or None when nothing was written; a
tag of ours (``!Exact x``) is a map of one key, which is also how JSON writes it.

Nothing costs more than the size of the text: how deep an entry is nested and what aliases stand for are bounded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import yaml
from yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    DocumentEndEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from yaml._yaml import Mark
    from yaml.events import Event

__all__ = ["Path", "Place", "Problem", "RawEntry", "Unreadable", "entries_of", "spell"]

Path: TypeAlias = "tuple[str | int, ...]"
Place: TypeAlias = "tuple[int, int]"
"""Line and column, from 1."""

MAX_DEPTH: Final = 32
"""How deep an entry may be nested; a policy needs 8."""
MAX_NODES: Final = 200_000
"""How many values an entry may have."""
MAX_ALIASED: Final = 1_000_000
"""How many values all aliases of a file may stand for."""
_SHOWN: Final = 80

_NOTHING: Final = frozenset({"", "~", "null", "Null", "NULL"})
_STANDARD_TAGS: Final = frozenset(
    f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "bool", "float", "null", "seq", "map")
)


class Problem(NamedTuple):
    """Something that is wrong in an entry."""

    path: Path
    message: str
    at_key: bool = False
    """Whether the key is wrong, not the value."""
    place: Place | None = None
    """Where it is, when the path does not say it well enough."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreadable:
    """Something that is wrong with the file as a whole, not with one entry."""

    place: Place
    path: str
    message: str


@dataclass(slots=True, kw_only=True)
class RawEntry:
    """One entry: what was written, not yet looked at.

    Attributes:
        section: the list that it is in.
        index: its number in that list.
        value: dictionaries, lists, texts and None.
        problems: what is wrong with its YAML.
    """

    section: str
    index: int
    value: Any
    problems: list[Problem] = field(default_factory=list)
    _events: list[Event]
    _places: _Places | None = None

    def place(self, path: Path = (), *, key: bool = False) -> Place:
        """Where a value of it is, or its key; else the nearest that there is around it."""
        if self._places is None:
            self._places = _places(self._events)
        return self._places.nearest(path, key=key)

    def spell(self, path: Path = ()) -> str:
        """A path within the entry as the path within the file that people read."""
        return spell((self.section, self.index, *path))


def spell(path: Path) -> str:
    """A path as people read it: ``workloads[3].services["shop/stock"]``."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        elif step.isascii() and step.isidentifier():
            text += f".{step}" if text else step
        else:
            shown = step if len(step) <= _SHOWN else step[:_SHOWN] + "..."
            text += '["' + shown.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"]'
    return text


def entries_of(data: bytes, sections: tuple[str, ...]) -> Iterator[RawEntry | Unreadable]:
    """The entries of a text in UTF-8: a map with a list for each of some sections.

    Args:
        data: the text.
        sections: the keys that may be there.
    """
    return _Reader(data, sections).read()


# === where things are ===


@dataclass(slots=True)
class _Places:
    values: dict[Path, Place] = field(default_factory=dict)
    keys: dict[Path, Place] = field(default_factory=dict)
    paths: dict[int, Path] = field(default_factory=dict)
    """The path of an event, by its number in the entry."""

    def nearest(self, path: Path, *, key: bool) -> Place:
        if key and path in self.keys:
            return self.keys[path]
        while path not in self.values:
            path = path[:-1]
        return self.values[path]


def _place(mark: Mark | yaml.Mark | None) -> Place:
    return (1, 1) if mark is None else (mark.line + 1, mark.column + 1)


def _places(events: list[Event]) -> _Places:
    """Where the parts of an entry are; also of one that was read in part."""
    places = _Places()
    # What we are in, outermost first: its path, the next index of a sequence, the last key of a mapping.
    stack: list[tuple[Path, int | None, str | None]] = []
    for number, event in enumerate(events):
        if isinstance(event, CollectionEndEvent):
            stack.pop()
            continue
        path: Path = ()
        is_key = False
        if stack:
            outer, index, key = stack.pop()
            if index is not None:
                path = (*outer, index)
                stack.append((outer, index + 1, None))
            elif key is not None:
                path = (*outer, key)
                stack.append((outer, None, None))
            else:
                is_key = True
                # Another key than a text is a fault of the map.
                word = event.value if isinstance(event, ScalarEvent) else ""
                path = (*outer, word) if isinstance(event, ScalarEvent) else outer
                stack.append((outer, None, word))
        (places.keys if is_key else places.values).setdefault(path, _place(event.start_mark))
        places.paths[number] = path
        if isinstance(event, SequenceStartEvent):
            stack.append((path, 0, None))
        elif isinstance(event, MappingStartEvent):
            stack.append((path, None, None))
    return places


# === from events to entries ===


class _Feed:
    """The text for the parser, in the small pieces that it asks for: between two of them another thread can run."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def read(self, size: int) -> bytes:
        start = self._position
        self._position = start + size
        return self._data[start : start + size]


class _TooMuch(Exception):
    """The entry that is being read goes beyond a bound."""


class _Reader:
    """One reading of one text."""

    def __init__(self, data: bytes, sections: tuple[str, ...]) -> None:
        self._data = data
        self._sections = sections
        self._anchors: dict[str, tuple[Any, int]] = {}
        self._aliased = 0
        self._texts: dict[str, str] = {}
        # The entry that is being read: where it is, its events, how many values they stand for, and what is wrong with
        # which of the events.
        self._at: Path = ()
        self._events: list[Event] = []
        self._nodes = 0
        self._problems: list[tuple[int, str]] = []

    def read(self) -> Iterator[RawEntry | Unreadable]:
        # Two of them in one file make libyaml compare each with all the others.
        if b"\n%TAG" in self._data or self._data.startswith(b"%TAG"):
            line = self._data[: self._data.find(b"%TAG")].count(b"\n") + 1
            yield Unreadable(place=(line, 1), path="", message="expected no %TAG directives")
            return
        # Without libyaml PyYAML has only the slow one.
        loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        try:
            self._next: Callable[[], Event] = loader(_Feed(self._data)).get_event
            yield from self._file()
        except yaml.MarkedYAMLError as problem:
            yield self._syntax(problem)
        except yaml.reader.ReaderError as problem:
            yield self._not_text(problem)
        except _TooMuch as problem:
            last = len(self._events) - 1
            path = spell((*self._at, *_places(self._events).paths[last]))
            yield Unreadable(place=_place(self._events[last].start_mark), path=path, message=str(problem))

    def _syntax(self, problem: yaml.MarkedYAMLError) -> Unreadable:
        place = _place(problem.problem_mark or problem.context_mark)
        why = str(problem.problem or "")
        if problem.context:
            why += f" {problem.context}"
            if problem.context_mark is not None and problem.context_mark.line + 1 != place[0]:
                why += f" that begins in line {problem.context_mark.line + 1}"
        lines = self._data.split(b"\n", place[0])
        if len(lines) >= place[0] and lines[place[0] - 1][: place[1]].strip(b" ").startswith(b"\t"):
            why += "; indent with spaces, not with tabs"
        return Unreadable(place=place, path="", message=f"expected YAML: {why}")

    def _not_text(self, problem: yaml.reader.ReaderError) -> Unreadable:
        before = self._data[: problem.position]
        last = before.rfind(b"\n") + 1
        place = (before.count(b"\n") + 1, len(before[last:].decode(errors="replace")) + 1)
        return Unreadable(place=place, path="", message=f"expected a text in UTF-8: {problem.reason}")

    def _file(self) -> Iterator[RawEntry | Unreadable]:
        self._next()  # the start of the stream
        start = self._next()
        top = start if isinstance(start, StreamEndEvent) else self._next()
        if not isinstance(top, MappingStartEvent):
            message = f"expected a map with {_listed(self._sections)}, not {_kind(top)}"
            if _is_nothing(top) or top is start:
                message = "the file is empty; write {} for a mesh with nothing in it"
            yield Unreadable(place=_place(top.start_mark), path="", message=message)
            return
        seen: dict[str, int] = {}
        while not isinstance(key := self._next(), MappingEndEvent):
            yield from self._section(key, seen)
        while isinstance(event := self._next(), DocumentEndEvent):
            pass
        if not isinstance(event, StreamEndEvent):
            yield Unreadable(
                place=_place(event.start_mark), path="", message="expected the end of the file, not a second document"
            )

    def _section(self, key: Event, seen: dict[str, int]) -> Iterator[RawEntry | Unreadable]:
        place = _place(key.start_mark)
        if not isinstance(key, ScalarEvent):
            self._skip(key)
            self._skip(self._next())
            yield Unreadable(place=place, path="", message=f"expected {_listed(self._sections)}, not {_kind(key)}")
            return
        section = key.value
        value = self._next()
        message = None
        if section not in self._sections:
            from hbone.mesh._file_model import suggestion

            hint = suggestion(section, self._sections)
            message = "unknown key" + (hint or f"; expected one of {', '.join(self._sections)}")
        elif section in seen:
            message = f"expected each key once; the first {section} is in line {seen[section]}"
        elif not isinstance(value, SequenceStartEvent) and not _is_nothing(value):
            place = _place(value.start_mark)
            message = f"expected a list, not {_kind(value)}"
        seen.setdefault(section, place[0])
        if message is not None:
            self._skip(value)
            yield Unreadable(place=place, path=spell((section,)), message=message)
        elif isinstance(value, SequenceStartEvent):
            index = 0
            while not isinstance(event := self._next(), SequenceEndEvent):
                yield self._entry(section, index, event)
                index += 1

    def _skip(self, event: Event) -> None:
        depth = 0
        while True:
            if isinstance(event, MappingStartEvent | SequenceStartEvent):
                depth += 1
            elif isinstance(event, CollectionEndEvent):
                depth -= 1
            if depth == 0:
                return
            event = self._next()

    def _entry(self, section: str, index: int, event: Event) -> RawEntry:
        self._at = (section, index)
        self._events = []
        self._nodes = 0
        self._problems = []
        entry = RawEntry(section=section, index=index, value=self._node(event, 1), _events=self._events)
        if self._problems:
            places = _places(self._events)
            for number, message in self._problems:
                # Only a key can be there twice, and the second one is meant.
                place = _place(self._events[number].start_mark)
                entry.problems.append(Problem(places.paths[number], message, place=place))
        return entry

    # ---------------------------------------------------------------------------------------------- values of an entry

    def _node(self, event: Any, depth: int) -> Any:
        number = len(self._events)
        self._events.append(event)
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise _TooMuch(f"expected an entry of at most {MAX_NODES} values")
        kind = type(event)
        if kind is AliasEvent:
            return self._alias(event, number)
        before = self._nodes
        tag = event.tag
        if kind is ScalarEvent:
            text = event.value
            value: Any = None if event.implicit[0] and text in _NOTHING else self._texts.setdefault(text, text)
        else:
            if depth > MAX_DEPTH:
                raise _TooMuch(f"expected at most {MAX_DEPTH} levels of nesting")
            value = self._sequence(depth) if kind is SequenceStartEvent else self._mapping(depth)
        if tag is not None and tag != "!" and tag not in _STANDARD_TAGS:
            if tag.startswith("!"):
                value = {tag[1:]: value}
            else:
                self._problems.append((number, f"expected no tag, or !Exact and the like, not {tag[:_SHOWN]!r}"))
        if event.anchor is not None:
            self._anchors[event.anchor] = value, self._nodes - before + 1
        return value

    def _sequence(self, depth: int) -> list[Any]:
        found = []
        while type(event := self._next()) is not SequenceEndEvent:
            found.append(self._node(event, depth + 1))
        self._events.append(event)
        return found

    def _mapping(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while type(event := self._next()) is not MappingEndEvent:
            number = len(self._events)
            if type(event) is not ScalarEvent:
                self._problems.append((number, f"expected a key, not {_kind(event)}"))
                self._node(event, depth + 1)
                self._node(self._next(), depth + 1)
                continue
            self._events.append(event)
            key = self._texts.setdefault(event.value, event.value)
            value = self._node(self._next(), depth + 1)
            if key == "<<" and event.implicit[0]:
                self._problems.append((number, "expected no merge key (<<): write out what is meant, or use an alias"))
            elif key in found:
                self._problems.append((number, "expected each key once in a map"))
            else:
                found[key] = value
        self._events.append(event)
        return found

    def _alias(self, event: AliasEvent, number: int) -> Any:
        name = event.anchor or ""
        if name not in self._anchors:
            self._problems.append((number, f"expected an alias of something before it: there is no &{name[:_SHOWN]}"))
            return None
        value, size = self._anchors[name]
        self._nodes += size
        self._aliased += size
        if self._aliased > MAX_ALIASED:
            raise _TooMuch(f"expected aliases that stand for at most {MAX_ALIASED} values")
        return value


def _is_nothing(event: Event) -> bool:
    return isinstance(event, ScalarEvent) and event.implicit[0] and event.value in _NOTHING


def _kind(event: Event) -> str:
    if isinstance(event, MappingStartEvent):
        return "a map"
    if isinstance(event, SequenceStartEvent):
        return "a list"
    return "an alias" if isinstance(event, AliasEvent) else "nothing" if _is_nothing(event) else "a text"


def _listed(words: tuple[str, ...]) -> str:
    return ", ".join(words[:-1]) + f" and {words[-1]}"
