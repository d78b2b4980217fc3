"""HTTP/2 frames, byte by byte: builders that can write anything, right or wrong, and a reader.

Builders never check. Headers are written as literals without indexing and without Huffman code
(RFC 7541 section 6.2.2), so they need no shared state and can carry what no real encoder would emit.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

import hpack

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = [
    "ACK",
    "END_HEADERS",
    "END_STREAM",
    "PADDED",
    "PREFACE",
    "PRIORITY_FLAG",
    "Code",
    "Frame",
    "Kind",
    "Parser",
    "Setting",
    "block",
    "connect",
    "connect_headers",
    "continuation",
    "data",
    "frame",
    "goaway",
    "headers",
    "ping",
    "priority",
    "response",
    "rst",
    "settings",
    "window_update",
]

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

END_STREAM = ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8
PRIORITY_FLAG = 0x20


class Kind(IntEnum):
    """Frame types, RFC 9113 section 6."""

    DATA = 0
    HEADERS = 1
    PRIORITY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PUSH_PROMISE = 5
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


class Code(IntEnum):
    """Error codes, RFC 9113 section 7."""

    NO_ERROR = 0x0
    PROTOCOL_ERROR = 0x1
    INTERNAL_ERROR = 0x2
    FLOW_CONTROL_ERROR = 0x3
    SETTINGS_TIMEOUT = 0x4
    STREAM_CLOSED = 0x5
    FRAME_SIZE_ERROR = 0x6
    REFUSED_STREAM = 0x7
    CANCEL = 0x8
    COMPRESSION_ERROR = 0x9
    CONNECT_ERROR = 0xA
    ENHANCE_YOUR_CALM = 0xB
    INADEQUATE_SECURITY = 0xC


class Setting(IntEnum):
    """Settings, RFC 9113 section 6.5.2 and RFC 8441 section 3."""

    HEADER_TABLE_SIZE = 1
    ENABLE_PUSH = 2
    MAX_CONCURRENT_STREAMS = 3
    INITIAL_WINDOW_SIZE = 4
    MAX_FRAME_SIZE = 5
    MAX_HEADER_LIST_SIZE = 6
    ENABLE_CONNECT_PROTOCOL = 8


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"", *, length: int | None = None) -> bytes:
    """Any frame. `length` lies about the payload; a `stream` with bit 31 set puts the reserved bit on the wire."""
    size = len(payload) if length is None else length
    return struct.pack(">IBI", (size << 8) | kind, flags, stream) + payload


def data(stream: int, payload: bytes = b"", *, end: bool = False, pad: int | None = None) -> bytes:
    """DATA; `pad` is the number of padding bytes besides the length byte itself."""
    flags = END_STREAM if end else 0
    if pad is not None:
        return frame(Kind.DATA, flags | PADDED, stream, bytes([pad]) + payload + bytes(pad))
    return frame(Kind.DATA, flags, stream, payload)


def _integer(value: int, prefix: int) -> bytes:
    limit = (1 << prefix) - 1
    if value < limit:
        return bytes([value])
    out = [limit]
    value -= limit
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _bytes(text: str | bytes) -> bytes:
    return text.encode("latin-1") if isinstance(text, str) else text


def block(fields: Iterable[tuple[str | bytes, str | bytes]]) -> bytes:
    """A header block of literals."""
    out = bytearray()
    for name, value in fields:
        for index, part in enumerate((_bytes(name), _bytes(value))):
            out += (b"\x00" if index == 0 else b"") + _integer(len(part), 7) + part
    return bytes(out)


def headers(
    stream: int,
    fields: Iterable[tuple[str | bytes, str | bytes]] | bytes,
    *,
    end_stream: bool = False,
    end_headers: bool = True,
    pad: int | None = None,
    priority: bytes = b"",
) -> bytes:
    """HEADERS with any header list, or with a ready (perhaps broken) block of bytes."""
    payload = fields if isinstance(fields, bytes) else block(fields)
    flags = (END_STREAM if end_stream else 0) | (END_HEADERS if end_headers else 0)
    if priority:
        flags |= PRIORITY_FLAG
        payload = priority + payload
    if pad is not None:
        flags |= PADDED
        payload = bytes([pad]) + payload + bytes(pad)
    return frame(Kind.HEADERS, flags, stream, payload)


def continuation(stream: int, payload: bytes, *, end_headers: bool = False) -> bytes:
    """CONTINUATION with a piece of a header block."""
    return frame(Kind.CONTINUATION, END_HEADERS if end_headers else 0, stream, payload)


def connect_headers(target: str, *more: tuple[str | bytes, str | bytes]) -> list[tuple[str | bytes, str | bytes]]:
    """The header list of a good CONNECT."""
    return [(":method", "CONNECT"), (":authority", target), *more]


def connect(stream: int, target: str, *more: tuple[str | bytes, str | bytes], end_stream: bool = False) -> bytes:
    """HEADERS of a good CONNECT."""
    return headers(stream, connect_headers(target, *more), end_stream=end_stream)


def response(
    stream: int, status: int | str = 200, *more: tuple[str | bytes, str | bytes], end_stream: bool = False
) -> bytes:
    """HEADERS of an answer."""
    return headers(stream, [(":status", str(status)), *more], end_stream=end_stream)


def settings(values: Mapping[int, int] | Iterable[tuple[int, int]] = (), *, ack: bool = False) -> bytes:
    """SETTINGS; pairs may repeat, ids may be unknown."""
    pairs = values.items() if hasattr(values, "items") else values
    payload = b"".join(struct.pack(">HI", key, value) for key, value in pairs)
    return frame(Kind.SETTINGS, ACK if ack else 0, 0, payload)


def window_update(stream: int, increment: int) -> bytes:
    """WINDOW_UPDATE."""
    return frame(Kind.WINDOW_UPDATE, 0, stream, struct.pack(">I", increment))


def ping(payload: bytes = b"rawping!", *, ack: bool = False) -> bytes:
    """PING."""
    return frame(Kind.PING, ACK if ack else 0, 0, payload)


def goaway(last_stream: int = 0, code: int = Code.NO_ERROR, debug: bytes = b"") -> bytes:
    """GOAWAY."""
    return frame(Kind.GOAWAY, 0, 0, struct.pack(">II", last_stream, code) + debug)


def rst(stream: int, code: int = Code.CANCEL) -> bytes:
    """RST_STREAM."""
    return frame(Kind.RST_STREAM, 0, stream, struct.pack(">I", code))


def priority(stream: int, depends_on: int = 0, weight: int = 16) -> bytes:
    """PRIORITY."""
    return frame(Kind.PRIORITY, 0, stream, struct.pack(">IB", depends_on, weight - 1))


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame as read. `headers` is set on HEADERS whose block is complete (CONTINUATIONs joined)."""

    kind: int
    flags: int
    stream: int
    payload: bytes = field(repr=False)
    headers: tuple[tuple[str, str], ...] | None = None

    @property
    def end_stream(self) -> bool:
        return self.kind in (Kind.DATA, Kind.HEADERS) and bool(self.flags & END_STREAM)

    @property
    def ack(self) -> bool:
        return self.kind in (Kind.SETTINGS, Kind.PING) and bool(self.flags & ACK)

    @property
    def data(self) -> bytes:
        """The payload of DATA without padding."""
        if self.flags & PADDED:
            return self.payload[1 : len(self.payload) - self.payload[0]]
        return self.payload

    @property
    def code(self) -> int:
        """The error code of RST_STREAM or GOAWAY."""
        offset = 4 if self.kind == Kind.GOAWAY else 0
        return struct.unpack_from(">I", self.payload, offset)[0]

    @property
    def last_stream(self) -> int:
        """The last stream id of GOAWAY."""
        return struct.unpack_from(">I", self.payload)[0] & 0x7FFFFFFF

    @property
    def increment(self) -> int:
        """The increment of WINDOW_UPDATE."""
        return struct.unpack(">I", self.payload)[0]

    @property
    def settings(self) -> dict[int, int]:
        return dict(struct.iter_unpack(">HI", self.payload))

    @property
    def status(self) -> int | None:
        return int(dict(self.headers or ()).get(":status", 0)) or None

    def __str__(self) -> str:
        name = Kind(self.kind).name if self.kind in Kind._value2member_map_ else f"TYPE{self.kind}"
        more = {
            Kind.RST_STREAM: lambda: f" {self.code:#x}",
            Kind.GOAWAY: lambda: f" last={self.last_stream} {self.code:#x} {self.payload[8:]!r}",
            Kind.HEADERS: lambda: f" {self.headers}",
            Kind.WINDOW_UPDATE: lambda: f" +{self.increment}",
            Kind.SETTINGS: lambda: f" {self.settings}",
        }.get(self.kind, lambda: f" {len(self.payload)} bytes")()
        return f"{name}(stream={self.stream} flags={self.flags:#x}{more})"


class Parser:
    """Cuts a byte stream into frames. Strict only about its own need: lengths and header blocks."""

    def __init__(self, *, preface: bool = False) -> None:
        """`preface`: whether the client's preface comes first."""
        self._buffer = bytearray()
        self._preface = preface
        self._decoder = hpack.Decoder(max_header_list_size=1 << 24)
        self._pending: tuple[Frame, bytearray] | None = None

    def feed(self, raw: bytes) -> list[Frame]:
        """Returns the frames that are complete now."""
        buffer = self._buffer
        buffer += raw
        if self._preface:
            if len(buffer) < len(PREFACE):
                return []
            assert buffer.startswith(PREFACE), bytes(buffer[:40])
            del buffer[: len(PREFACE)]
            self._preface = False
        out = []
        at = 0
        while len(buffer) - at >= 9:
            word, flags, stream = struct.unpack_from(">IBI", buffer, at)
            end = at + 9 + (word >> 8)
            if len(buffer) < end:
                break
            parsed = Frame(word & 0xFF, flags, stream, bytes(buffer[at + 9 : end]))
            at = end
            if (done := self._join(parsed)) is not None:
                out.append(done)
        del buffer[:at]
        return out

    def _join(self, got: Frame) -> Frame | None:
        if got.kind == Kind.HEADERS:
            payload = got.data
            if got.flags & PRIORITY_FLAG:
                payload = payload[5:]
            self._pending = (got, bytearray(payload))
        elif got.kind == Kind.CONTINUATION:
            assert self._pending is not None, "CONTINUATION without HEADERS"
            assert self._pending[0].stream == got.stream, "CONTINUATION of another stream"
            self._pending[1].extend(got.payload)
        else:
            return got
        if not got.flags & END_HEADERS:
            return None
        first, whole = self._pending
        self._pending = None
        fields = tuple((_text(name), _text(value)) for name, value in self._decoder.decode(bytes(whole), raw=True))
        return Frame(first.kind, first.flags, first.stream, bytes(whole), fields)


def _text(raw: str | bytes) -> str:
    return raw if isinstance(raw, str) else raw.decode("latin-1")
