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
    decode_header_block,
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


lengths = st.sampled_from([0, 1, 126, 127, 128, 254, 255, 256, 16_383, 16_384, 16_510, 16_511, 20_000])


@given(st.lists(st.tuples(st.sampled_from([b":method", b":authority", b"baggage", b"x"]), lengths), max_size=5))
def test_header_blocks_of_our_own_are_read_without_hpack(sizes: list[tuple[bytes, int]]) -> None:
    fields = [(name, bytes(range(33, 127)) * 300) for name, _ in sizes]
    fields = [(name, value[:size]) for (name, value), (_, size) in zip(fields, sizes, strict=True)]
    read = decode_header_block(encode_header_block(fields))
    assert read == (fields if all(size < 16_511 for _, size in sizes) else None)


# Indexed fields, table sizes, literals of every kind, lengths of one byte and more, Huffman code.
pieces = st.one_of(
    st.sampled_from(
        [b"\x00", b"\x01", b"\x02", b"\x08", b"\x03", b"\x10", b"\x0f\x2f", b"\x40", b"\x82", b"\x20", b"\x3f\xe1\x1f"]
    ),
    st.sampled_from(
        [b"\x00", b"\x03abc", b"\x7e" + b"v" * 126, b"\x7f\x00" + b"v" * 127, b"\x7f\x81\x01" + b"v" * 256]
    ),
    st.sampled_from([b"\x82\xe3\x31", b"\xff\x00", b"\x7f\xff\xff\x7f", b"\x7f\x80", b"\x05ab"]),
    st.binary(max_size=4),
)


@given(st.lists(pieces, max_size=12).map(b"".join))
def test_what_is_read_without_hpack_is_what_hpack_reads(block: bytes) -> None:
    read = decode_header_block(block)
    if read is None:
        return
    decoder = hpack.Decoder(max_header_list_size=2**20)
    assert decoder.decode(block, raw=True) == read
    assert not decoder.header_table.dynamic_entries


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_cut_header_block_is_for_hpack(cut: int) -> None:
    block = encode_header_block([(b":method", b"CONNECT"), (b"name", b"v" * 130)])
    whole = [encode_header_block([(b":method", b"CONNECT")])]
    if block[:-cut] not in whole:
        assert decode_header_block(block[:-cut]) is None


def test_many_fields_are_for_hpack() -> None:
    assert decode_header_block(encode_header_block([(b"", b"")] * 64)) == [(b"", b"")] * 64
    assert decode_header_block(encode_header_block([(b"", b"")] * 65)) is None


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
