"""Pretty JSON in pieces, for pages of any size. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from json.encoder import encode_basestring_ascii
from typing import Final

from hbone.admin._server import AdminResponse

__all__ = ["json_pieces", "json_response"]

_INDENT: Final = "  "
_PIECE: Final = 16 * 1024
_encode = json.JSONEncoder(default=str).encode


def json_response(value: object, *, status: int = 200) -> AdminResponse:
    """An answer that shows `value`; see `json_pieces`."""
    return AdminResponse(status=status, content_type="application/json", body=json_pieces(value))


def json_pieces(value: object) -> Iterator[bytes]:
    """`value` as pretty-printed JSON with sorted keys and a line end, in pieces of some 16 KiB.

    In a mapping (or a mapping in it, and so on) an iterator may stand for a list: its items are asked for one at a
    time as the text is, so that ten thousand of them never have to be there at once. So are the values of a mapping.
    What JSON does not know is shown as its `str`.
    """
    waiting: list[str] = []
    size = 0
    for text in _texts(value, "\n"):
        waiting.append(text)
        size += len(text)
        if size >= _PIECE:
            yield "".join(waiting).encode("ascii")
            waiting.clear()
            size = 0
    waiting.append("\n")
    yield "".join(waiting).encode("ascii")


def _texts(value: object, line: str) -> Iterator[str]:
    """`line` is the line end together with the indentation that follows it."""
    if isinstance(value, Mapping):
        yield from _block("{}", ((f"{_encode(str(key))}: ", value[key]) for key in sorted(value, key=str)), line)
    elif isinstance(value, Iterator):
        yield from _block("[]", (("", item) for item in value), line, leaves=True)
    else:
        yield _leaf(value, line)


def _block(brackets: str, items: Iterable[tuple[str, object]], line: str, *, leaves: bool = False) -> Iterator[str]:
    inner = line + _INDENT
    before = brackets[0] + inner
    for label, item in items:
        yield before + label
        if leaves:
            yield _leaf(item, inner)
        else:
            yield from _texts(item, inner)
        before = "," + inner
    yield line + brackets[1] if before[0] == "," else brackets


def _leaf(value: object, line: str) -> str:
    """All of a value at once.

    Not by `json`, whose indented form is made by a dozen functions that are made for each value, and refer to each
    other: what is left of one dump of a large mesh is a million objects that only a garbage collection removes.
    """
    kind = type(value)
    if kind is str:
        return encode_basestring_ascii(value)  # type: ignore[arg-type]
    if isinstance(value, Mapping):
        inner = line + _INDENT
        items = [f"{_encode(str(key))}: {_leaf(value[key], inner)}" for key in sorted(value, key=str)]
        return f"{{{inner}{f',{inner}'.join(items)}{line}}}" if items else "{}"
    if isinstance(value, list | tuple | Iterator):
        inner = line + _INDENT
        items = [_leaf(item, inner) for item in value]
        return f"[{inner}{f',{inner}'.join(items)}{line}]" if items else "[]"
    return _encode(value)
