"""HTTP/2 frames as bytes: what is cut and written by ourselves (RFC 9113 sections 4 and 6)."""

from __future__ import annotations

import struct
from enum import IntEnum
from functools import lru_cache
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "FRAME_HEADER_SIZE",
    "PREFACE",
    "ErrorCode",
    "Flag",
    "FrameType",
    "Setting",
    "decode_header_block",
    "encode_header_block",
    "frame",
    "frame_header",
    "goaway_frame",
    "headers_frames",
    "pack_frame_header_into",
    "rst_stream_frame",
    "settings_frame",
    "window_update_frame",
]

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FRAME_HEADER_SIZE = 9

# Length is 24 bits: two fields, because struct has no 3-byte integer.
_HEADER = struct.Struct(">HBBBL")
_WINDOW_UPDATE = struct.Struct(">HBBBLL")


class FrameType(IntEnum):
    """RFC 9113 section 6."""

    DATA = 0x0
    HEADERS = 0x1
    PRIORITY = 0x2
    RST_STREAM = 0x3
    SETTINGS = 0x4
    PUSH_PROMISE = 0x5
    PING = 0x6
    GOAWAY = 0x7
    WINDOW_UPDATE = 0x8
    CONTINUATION = 0x9


class Flag(IntEnum):
    """RFC 9113 section 6: the flags of all frame types; one bit may mean two things."""

    END_STREAM = 0x1
    ACK = 0x1
    END_HEADERS = 0x4
    PADDED = 0x8
    PRIORITY = 0x20


class Setting(IntEnum):
    """RFC 9113 section 6.5.2."""

    HEADER_TABLE_SIZE = 0x1
    ENABLE_PUSH = 0x2
    MAX_CONCURRENT_STREAMS = 0x3
    INITIAL_WINDOW_SIZE = 0x4
    MAX_FRAME_SIZE = 0x5
    MAX_HEADER_LIST_SIZE = 0x6
    #: RFC 8441; never announced by us, refused when a request uses it
    ENABLE_CONNECT_PROTOCOL = 0x8


class ErrorCode(IntEnum):
    """RFC 9113 section 7."""

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
    HTTP_1_1_REQUIRED = 0xD

    @classmethod
    def name_of(cls, code: int) -> str:
        """The RFC's name, or the number of a code that the RFC does not know."""
        try:
            return cls(code).name
        except ValueError:
            return f"error code {code:#x}"


def frame_header(length: int, kind: int, flags: int, stream_id: int) -> bytes:
    """The nine bytes in front of a frame's payload (RFC 9113 section 4.1)."""
    return _HEADER.pack(length >> 8, length & 0xFF, kind, flags, stream_id)


def pack_frame_header_into(buffer: bytearray, offset: int, length: int, flags: int, stream_id: int) -> None:
    """Write the header of a DATA frame in place: `buffer[offset:offset + 9]`."""
    _HEADER.pack_into(buffer, offset, length >> 8, length & 0xFF, 0, flags, stream_id)


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """A whole frame."""
    return frame_header(len(payload), kind, flags, stream_id) + payload


def window_update_frame(stream_id: int, increment: int) -> bytes:
    """RFC 9113 section 6.9."""
    return _WINDOW_UPDATE.pack(0, 4, FrameType.WINDOW_UPDATE, 0, stream_id, increment)


def rst_stream_frame(stream_id: int, error_code: int) -> bytes:
    """RFC 9113 section 6.4."""
    return _WINDOW_UPDATE.pack(0, 4, FrameType.RST_STREAM, 0, stream_id, error_code)


def goaway_frame(last_stream_id: int, error_code: int, debug: bytes = b"") -> bytes:
    """RFC 9113 section 6.8."""
    return frame(FrameType.GOAWAY, 0, 0, struct.pack(">LL", last_stream_id, error_code) + debug)


def settings_frame(values: dict[Setting, int]) -> bytes:
    """RFC 9113 section 6.5."""
    return frame(FrameType.SETTINGS, 0, 0, b"".join(struct.pack(">HL", k, v) for k, v in values.items()))


def headers_frames(stream_id: int, block: bytes, max_frame_size: int, *, end_stream: bool = False) -> bytes:
    """A header block as HEADERS and, where the peer's frames are too small for it, CONTINUATION frames."""
    flags = Flag.END_STREAM if end_stream else 0
    if len(block) <= max_frame_size:
        return frame(FrameType.HEADERS, flags | Flag.END_HEADERS, stream_id, block)
    pieces = [block[i : i + max_frame_size] for i in range(0, len(block), max_frame_size)]
    out = [frame(FrameType.HEADERS, flags, stream_id, pieces[0])]
    out += [frame(FrameType.CONTINUATION, 0, stream_id, piece) for piece in pieces[1:-1]]
    out.append(frame(FrameType.CONTINUATION, Flag.END_HEADERS, stream_id, pieces[-1]))
    return b"".join(out)


# RFC 7541 appendix A: what of the static table a CONNECT and its answer use.
_STATIC_FIELD: Final = {(b":status", b"200"): b"\x88", (b":method", b"CONNECT"): b"\x02\x07CONNECT"}
_STATIC_NAME: Final = {b":authority": 1, b":method": 2, b":status": 8}


def _integer(value: int, prefix_bits: int) -> bytes:
    """RFC 7541 section 5.1, with the bits in front of the prefix all zero."""
    top = (1 << prefix_bits) - 1
    if value < top:
        return bytes((value,))
    out = bytearray((top,))
    value -= top
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def encode_header_block(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """HPACK in its simplest form: literals without indexing, without Huffman coding (RFC 7541 section 6.2.2).

    The block depends on nothing that was sent before, so a request's bytes may be made before its turn comes, and an
    encoder's table cannot get out of step. A CONNECT through `hpack.Encoder` takes five to ten times as long, to
    save 160 to 180 bytes a tunnel.
    """
    out = []
    for field in headers:
        known = _STATIC_FIELD.get(field)
        if known is not None:
            out.append(known)
            continue
        name, value = field
        out.append(_literal_name(name))
        out.append(_integer(len(value), 7))
        out.append(value)
    return b"".join(out)


@lru_cache(maxsize=64)
def _literal_name(name: bytes) -> bytes:
    index = _STATIC_NAME.get(name)
    return bytes((index,)) if index else b"\x00" + _integer(len(name), 7) + name


#: Fields of a block that `decode_header_block` reads; more are for a decoder that bounds their size.
_MAX_PLAIN_FIELDS: Final = 64
_NAME_OF_INDEX: Final = {index: name for name, index in _STATIC_NAME.items()}


def decode_header_block(block: bytes) -> list[tuple[bytes, bytes]] | None:
    """What `encode_header_block` writes for a request, read back; None if anything else is in it.

    Such a block depends on nothing before it and leaves a decoder's table alone, so a decoder need not see it, and a
    CONNECT of ours costs a tenth of what it costs in `hpack.Decoder`.
    """
    fields: list[tuple[bytes, bytes]] = []
    pos, end = 0, len(block)
    try:
        while pos < end:
            first = block[pos]
            pos += 1
            if first:
                name = _NAME_OF_INDEX[first]
            else:
                size = block[pos]
                if size >= 0x7F:  # Huffman, or very long
                    return None
                name = block[pos + 1 : pos + 1 + size]
                pos += 1 + size
            size = block[pos]
            pos += 1
            if size >= 0x7F:
                if size > 0x7F:
                    return None
                low, high = block[pos], block[pos + 1] if block[pos] & 0x80 else 0
                if high & 0x80:  # 16 KB and more
                    return None
                pos += 2 if low & 0x80 else 1
                size += (low & 0x7F) + (high << 7)
            if len(fields) == _MAX_PLAIN_FIELDS:
                return None
            fields.append((name, block[pos : pos + size]))
            pos += size
    except (IndexError, KeyError):
        return None
    return fields if pos == end else None
