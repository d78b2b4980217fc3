"""Frames as bytes, against the hand-made ones of the tests, and header blocks against hpack."""

from __future__ import annotations

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import frames
from support.frames import Code, Kind

from hbone.protocol import Engine, ErrorCode
from hbone.protocol._frames import (
    Flag,
    FrameType,
    encode_header_block,
    frame,
    frame_header,
    goaway_frame,
    headers_frames,
    pack_frame_header_into,
    rst_stream_frame,
    settings_frame,
    window_update_frame,
)

stream_ids = st.integers(0, 2**31 - 1)
words = st.integers(0, 2**32 - 1)


@given(st.integers(0, 2**24 - 1), st.integers(0, 255), st.integers(0, 255), stream_ids)
def test_frame_headers(length: int, kind: int, flags: int, stream_id: int) -> None:
    assert frame_header(length, kind, flags, stream_id) == frames.frame(kind, flags, stream_id, length=length)
    buffer = bytearray(b"x" * 12)
    pack_frame_header_into(buffer, 2, length, flags, stream_id)
    assert buffer == b"xx" + frames.frame(Kind.DATA, flags, stream_id, length=length) + b"x"


@given(stream_ids, words, st.binary(max_size=30))
def test_frames(stream_id: int, word: int, payload: bytes) -> None:
    assert frame(FrameType.DATA, Flag.END_STREAM, stream_id, payload) == frames.data(stream_id, payload, end=True)
    assert window_update_frame(stream_id, word) == frames.window_update(stream_id, word)
    assert rst_stream_frame(stream_id, word) == frames.rst(stream_id, word)
    assert goaway_frame(stream_id, word, payload) == frames.goaway(stream_id, word, payload)
    assert settings_frame({}) == frames.settings()


@given(
    st.lists(st.tuples(st.binary(max_size=300), st.binary(max_size=40_000)), max_size=4),
    st.sampled_from([16_384, 20_000, 2**20]),
    st.booleans(),
)
def test_header_blocks_are_read_by_hpack(headers: list[tuple[bytes, bytes]], largest: int, end: bool) -> None:
    headers = [(b":method", b"CONNECT"), (b":authority", b"a:1"), (b":status", b"200"), (b":status", b"503"), *headers]
    raw = headers_frames(5, encode_header_block(headers), largest, end_stream=end)
    block = b""
    kinds = []
    while raw:
        size = int.from_bytes(raw[:3], "big")
        assert size <= largest
        kinds.append((raw[3], raw[4]))
        assert raw[5:9] == b"\0\0\0\5"
        block += raw[9 : 9 + size]
        raw = raw[9 + size :]
    assert hpack.Decoder(max_header_list_size=2**20).decode(block, raw=True) == headers
    assert [kind for kind, _ in kinds] == [Kind.HEADERS] + [Kind.CONTINUATION] * (len(kinds) - 1)
    assert bool(kinds[0][1] & frames.END_STREAM) is end
    assert [bool(flags & frames.END_HEADERS) for _, flags in kinds] == [False] * (len(kinds) - 1) + [True]


@pytest.mark.wire("W-ERR-2")
def test_error_codes_have_the_numbers_and_names_of_the_rfc() -> None:
    for code in Code:
        assert ErrorCode[code.name] == code
        assert ErrorCode.name_of(code) == code.name
    assert ErrorCode.name_of(0xBEEF) == "error code 0xbeef"


def test_an_engine_says_whether_it_has_something_to_say() -> None:
    engine = Engine(client=True, now=0)
    assert engine.has_data_to_send
    engine.data_to_send()
    assert not engine.has_data_to_send
    assert engine.data_to_send() == b""
