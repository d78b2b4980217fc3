"""The opening: what each side says first, what it takes for an opening, and when a session is open."""

from __future__ import annotations

import hpack
import pytest
from support import frames
from support.engines import REQUEST, Pair, Side, failure, merged, opened
from support.frames import Code, Kind, Setting

from hbone.errors import LocalProtocolError, RemoteProtocolError
from hbone.protocol import (
    ConnectRequest,
    Engine,
    Limits,
    RequestReceived,
    SessionFailed,
    SettingsReceived,
    WindowOpened,
)

MIB = 1 << 20


def code_of(side, raw):
    """Which error code the bytes cost the session; GOAWAY must carry it too."""
    error = failure(side.receive(raw))
    assert type(error) is RemoteProtocolError
    last = side.sent()[-1]
    assert (last.kind, last.code) == (Kind.GOAWAY, error.error_code)
    return error.error_code


@pytest.mark.wire("W-SET-1", "W-SET-2", "W-SET-5", "W-SET-6")
def test_each_side_opens_at_once():
    client, server = Pair().client, Pair().server
    assert client.said() == [
        "SETTINGS(stream=0 flags=0x0 {4: 4194304, 5: 1048576, 6: 65536, 2: 0})",
        "WINDOW_UPDATE(stream=0 flags=0x0 +16711681)",
    ]
    assert server.said() == [
        "SETTINGS(stream=0 flags=0x0 {4: 4194304, 5: 1048576, 6: 65536, 3: 200})",
        "WINDOW_UPDATE(stream=0 flags=0x0 +16711681)",
    ]


@pytest.mark.wire("W-SET-2")
def test_the_opening_says_the_limits_of_the_user():
    limits = Limits(
        stream_window=70_000,
        connection_window=65_535,
        max_frame_size=20_000,
        max_concurrent_streams=7,
        max_header_list_size=5000,
    )
    pair = Pair(client_limits=limits, server_limits=limits)
    assert pair.client.said() == ["SETTINGS(stream=0 flags=0x0 {4: 70000, 5: 20000, 6: 5000, 2: 0})"]
    assert pair.server.said() == ["SETTINGS(stream=0 flags=0x0 {4: 70000, 5: 20000, 6: 5000, 3: 7})"]
    assert pair.exchange() == ([SettingsReceived(True)], [SettingsReceived(True)])
    assert pair.client.engine.available_streams == 7
    assert pair.client.engine.send_window == 65_535
    assert pair.client.stream(pair.client.open()).send_window == 70_000


def test_windows_larger_than_the_default_are_told_in_full():
    pair = Pair()
    pair.exchange()
    assert pair.client.engine.send_window == pair.server.engine.send_window == 16 * MIB
    assert pair.client.engine.max_frame_size == pair.server.engine.max_frame_size == MIB


@pytest.mark.wire("W-SET-3")
def test_no_request_before_the_settings_of_the_peer():
    client = Side(client=True)
    assert client.engine.available_streams == 0
    with pytest.raises(LocalProtocolError, match="no stream may be opened"):
        client.open()
    assert client.receive(frames.settings({Setting.MAX_CONCURRENT_STREAMS: 1})) == [SettingsReceived(True)]
    assert client.engine.available_streams == 1
    assert client.open() == 1
    with pytest.raises(LocalProtocolError, match="no stream may be opened"):
        client.open()


@pytest.mark.wire("W-SET-3")
def test_without_a_word_about_it_a_hundred_streams_are_taken():
    assert opened(client=True).engine.available_streams == 100


@pytest.mark.wire("W-SET-4")
def test_the_limit_of_streams_is_the_latest():
    client = opened(client=True, settings={Setting.MAX_CONCURRENT_STREAMS: 2})
    client.open()
    client.open()
    assert client.engine.available_streams == 0
    assert client.receive(frames.settings({Setting.MAX_CONCURRENT_STREAMS: 3})) == [SettingsReceived(False)]
    assert client.engine.available_streams == 1
    client.receive(frames.settings({Setting.MAX_CONCURRENT_STREAMS: 1}))
    assert client.engine.available_streams == 0
    client.receive(frames.rst(1) + frames.rst(3))
    assert client.engine.available_streams == 1


@pytest.mark.wire("W-SET-4", "W-FLOW-5")
def test_frames_are_no_longer_than_the_peer_takes_them_now():
    client = opened(client=True)
    assert client.engine.max_frame_size == 16_384
    long = ConnectRequest.build("10.0.0.7:8080", [("baggage", "x" * 40_000)])
    client.open(long)
    assert [(f.kind, len(f.payload)) for f in _headers(client.raw())] == [(1, 16_384), (9, 16_384), (9, 7_269)]
    client.receive(frames.settings({Setting.MAX_FRAME_SIZE: 65_536}))
    client.raw()
    client.open(long)
    assert [(f.kind, len(f.payload)) for f in _headers(client.raw())] == [(1, 40_037)]


def _headers(raw):
    """The frames of a header block, not joined."""
    got = []
    while raw:
        size = int.from_bytes(raw[:3], "big")
        got.append(frames.Frame(raw[3], raw[4], int.from_bytes(raw[5:9], "big"), raw[9 : 9 + size]))
        raw = raw[9 + size :]
    return got


@pytest.mark.wire("W-SET-4")
def test_a_peer_that_shrinks_the_header_table_gets_the_size_update_that_it_must_see():
    """RFC 9113 section 4.3.1: else it would be right to end the session with COMPRESSION_ERROR."""
    client = opened(client=True, settings={Setting.HEADER_TABLE_SIZE: 0})
    decoder = hpack.Decoder()
    decoder.max_allowed_table_size = 0
    for _ in range(2):
        client.open()
        (block,) = (f.payload for f in _headers(client.raw()))
        assert decoder.decode(block, raw=True) == REQUEST.encode()


@pytest.mark.wire("W-SET-4")
def test_a_server_says_the_size_update_too_and_once():
    server = opened(client=False, settings={Setting.HEADER_TABLE_SIZE: 100})
    server.receive(frames.connect(1, "10.0.0.1:80") + frames.connect(3, "10.0.0.1:80") + frames.connect(5, "a:1"))
    server.accept(1)
    server.refuse(3, 503)
    server.receive(frames.settings({Setting.HEADER_TABLE_SIZE: 50}))
    server.raw()
    assert [f.payload for f in server.sent() if f.kind == Kind.HEADERS] == [b"\x20\x88", b"\x08\x03503"]
    server.accept(5)
    assert [f.payload for f in server.sent()] == [b"\x88"]


@pytest.mark.parametrize("size", [4096, 2**32 - 1])
def test_a_header_table_of_the_default_size_or_more_needs_no_update(size):
    client = opened(client=True, settings={Setting.HEADER_TABLE_SIZE: size})
    client.open()
    assert client.raw()[9:10] == b"\x02"


@pytest.mark.wire("W-SET-5", "W-ERR-2", "W-ERR-3")
def test_a_client_takes_no_push():
    assert code_of(opened(client=True), frames.settings({Setting.ENABLE_PUSH: 1})) == Code.PROTOCOL_ERROR
    promise = frames.frame(Kind.PUSH_PROMISE, frames.END_HEADERS, 1, b"\0\0\0\2\x88")
    client = opened(client=True)
    client.open()
    assert code_of(client, promise) == Code.PROTOCOL_ERROR
    assert code_of(opened(client=False), promise) == Code.PROTOCOL_ERROR


def test_a_server_takes_either_word_about_push():
    server = opened(client=False, settings={Setting.ENABLE_PUSH: 1})
    assert server.receive(frames.settings({Setting.ENABLE_PUSH: 0})) == [SettingsReceived(False)]
    assert code_of(server, frames.settings({Setting.ENABLE_PUSH: 2})) == Code.PROTOCOL_ERROR


@pytest.mark.wire("W-SET-7")
def test_what_is_not_known_is_ignored():
    server = opened(client=False)
    unknown = frames.settings({0x7: 1, 0x9: 2, 0xABCD: 2**32 - 1, Setting.ENABLE_CONNECT_PROTOCOL: 77})
    assert server.receive(unknown) == [SettingsReceived(False)]
    raw = (
        frames.frame(0x0A, 0xFF, 0, b"alt-svc?")
        + frames.frame(0xFF, 0, 77)
        + frames.frame(Kind.PING, 0xFE, 0, b"12345678")  # all flags but ACK
        + frames.priority(1)
        + frames.priority(77)
        + frames.frame(Kind.PRIORITY, 0, 77, b"?")
    )
    server.sent()
    assert server.receive(raw) == []
    assert server.said() == ["PING(stream=0 flags=0x1 8 bytes)"]


def test_the_reserved_bits_mean_nothing():
    server = opened(client=False)
    told = server.receive(frames.connect(0x8000_0001, "10.0.0.1:80"))
    assert [type(e) for e in told] == [RequestReceived]
    before = server.stream(1).send_window
    server.receive(frames.window_update(0x8000_0001, 0x8000_0005))
    assert server.stream(1).send_window == before + 5


@pytest.mark.wire("W-SET-8")
@pytest.mark.parametrize(
    "raw",
    [
        frames.connect(1, "10.0.0.1:80"),
        frames.ping(),
        frames.settings(ack=True),
        frames.window_update(0, 1),
        frames.data(1, b"x"),
        frames.frame(0x42, 0, 0),
        b"HTTP/1.1 200 OK\r\n\r\n",
        bytes(9),
    ],
    ids=["headers", "ping", "ack", "window_update", "data", "unknown", "http1", "zeros"],
)
@pytest.mark.parametrize("client", [True, False], ids=["client", "server"])
def test_nothing_comes_before_settings(client, raw):
    side = Side(client=client)
    assert code_of(side, (b"" if client else frames.PREFACE) + raw) == Code.PROTOCOL_ERROR
    assert not side.engine.ready
    assert side.engine.available_streams == 0


@pytest.mark.wire("W-SET-8")
def test_settings_that_are_too_long_are_so_even_as_the_first_frame():
    assert code_of(Side(client=True), frames.frame(Kind.SETTINGS, length=MIB + 1)) == Code.FRAME_SIZE_ERROR


def test_a_peer_that_speaks_http1_is_called_so():
    told = Engine(client=True, now=0).receive_untrusted(b"HTTP/1.1 400 Bad Request\r\n", 0)
    assert "HTTP/1" in str(failure(told))
    told = Engine(client=False, now=0).receive_untrusted(b"GET / HTTP/1.1\r\n", 0)
    assert "HTTP/1" in str(failure(told))


@pytest.mark.wire("W-SET-8")
@pytest.mark.parametrize("at", range(24))
def test_every_byte_of_the_preface_counts(at):
    raw = bytearray(frames.PREFACE)
    raw[at] ^= 0x20
    assert code_of(Side(client=False), bytes(raw) + frames.settings()) == Code.PROTOCOL_ERROR


def test_the_preface_may_come_with_everything_behind_it():
    server = Side(client=False)
    told = server.receive(frames.PREFACE + frames.settings() + frames.connect(1, "10.0.0.1:80") + frames.data(1, b"x"))
    assert [type(e).__name__ for e in told] == ["SettingsReceived", "RequestReceived", "DataReceived"]


@pytest.mark.wire("W-ERR-2")
@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (frames.frame(Kind.SETTINGS, 0, 0, bytes(5)), Code.FRAME_SIZE_ERROR),
        (frames.frame(Kind.SETTINGS, frames.ACK, 0, bytes(6)), Code.FRAME_SIZE_ERROR),
        (frames.frame(Kind.SETTINGS, 0, 1), Code.PROTOCOL_ERROR),
        (frames.settings({Setting.MAX_FRAME_SIZE: 16_383}), Code.PROTOCOL_ERROR),
        (frames.settings({Setting.MAX_FRAME_SIZE: 2**24}), Code.PROTOCOL_ERROR),
        (frames.settings({Setting.INITIAL_WINDOW_SIZE: 2**31}), Code.FLOW_CONTROL_ERROR),
        (frames.settings([(Setting.INITIAL_WINDOW_SIZE, 2**31), (Setting.INITIAL_WINDOW_SIZE, 1)]), 3),
    ],
)
def test_settings_that_are_none(raw, code):
    assert code_of(opened(client=False), raw) == code


def test_the_largest_and_smallest_values():
    client = opened(client=True)
    largest = {Setting.MAX_FRAME_SIZE: 2**24 - 1, Setting.INITIAL_WINDOW_SIZE: 2**31 - 1}
    client.receive(frames.settings({**largest, Setting.MAX_CONCURRENT_STREAMS: 2**32 - 1}))
    assert client.engine.max_frame_size == 2**24 - 1
    assert client.stream(client.open()).send_window == 2**31 - 1
    client.receive(frames.settings({Setting.MAX_FRAME_SIZE: 2**14, Setting.INITIAL_WINDOW_SIZE: 0}))
    assert client.stream(client.open()).send_window == 0


def test_of_a_setting_said_twice_the_last_counts():
    client = opened(client=True)
    first = client.open()
    wild = [(Setting.INITIAL_WINDOW_SIZE, value) for value in (0, 2**31 - 1, 0, 12)]
    assert client.receive(frames.settings(wild)) == [SettingsReceived(False)]
    assert client.stream(first).send_window == 12


def test_a_window_that_settings_open_is_told_once():
    client = opened(client=True, settings={Setting.INITIAL_WINDOW_SIZE: 0})
    first = client.open()
    wild = [(Setting.INITIAL_WINDOW_SIZE, i % 2) for i in range(2000)]
    assert client.receive(frames.settings(wild)) == [WindowOpened(first), SettingsReceived(False)]


def test_settings_of_any_id_cost_no_memory():
    """Each of the 65 536 ids once: what is remembered must not grow with what a peer makes up."""
    server = Engine(client=False, now=0)
    server.receive_untrusted(frames.PREFACE + frames.settings(), 0)
    for start in range(0, 65_536, 2048):
        raw = frames.settings({i: 1 for i in range(start, start + 2048) if i not in set(range(9))})
        assert server.receive_untrusted(raw, 0) == [SettingsReceived(False)]
    assert len(server._h2.remote_settings) < 20


def test_settings_are_acknowledged_in_their_turn():
    server = Side(client=False)
    server.receive(frames.PREFACE + frames.settings() + frames.ping())
    assert [(f.kind, f.ack) for f in server.log[-2:]] == [(Kind.SETTINGS, True), (Kind.PING, True)]


def test_after_the_end_nothing_is_understood():
    server = opened(client=False)
    assert code_of(server, frames.ping(bytes(7))) == Code.FRAME_SIZE_ERROR
    assert server.engine.closed
    assert server.receive(frames.connect(1, "10.0.0.1:80")) == []
    assert server.said() == []


def test_a_view_of_the_read_buffer_is_not_copied():
    server = Engine(client=False, now=0)
    raw = bytearray(frames.PREFACE + frames.settings() + frames.connect(1, "10.0.0.1:80") + frames.data(1, b"payload"))
    told = server.receive_untrusted(memoryview(raw), 0)
    raw[-7:] = b"changed"
    assert bytes(told[-1].data) == b"changed"
    assert merged(told)[-1].data == b"changed"


def test_what_a_side_calls_itself():
    client = opened(client=True)
    assert repr(client.engine) == "<Engine client open streams=0>"
    client.receive(frames.goaway())
    assert repr(client.engine) == "<Engine client draining streams=0>"
    server = opened(client=False)
    server.drain()
    assert repr(server.engine) == "<Engine server draining streams=0>"
    server.close()
    assert repr(server.engine) == "<Engine server closed streams=0>"


def test_the_end_of_a_session_is_the_last_event():
    server = opened(client=False)
    told = server.receive(frames.connect(1, "10.0.0.1:80") + frames.ping(bytes(7)) + frames.connect(3, "10.0.0.1:80"))
    assert [type(e) for e in told] == [RequestReceived, SessionFailed]
