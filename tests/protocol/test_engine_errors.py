"""Which fault costs what, and by which code: the stream where RFC 9113 lets it live, else the session."""

from __future__ import annotations

import pytest
from support import frames
from support.engines import failure, only, opened, resets
from support.frames import Code, Kind, Setting

from hbone.errors import RemoteProtocolError
from hbone.protocol import DataReceived, Limits, RequestReceived, ResponseReceived, StreamReset

MIB = 1 << 20


def busy(client=False, **options):
    """A side with two open tunnels, 1 and 3."""
    side = opened(client=client, **options)
    for stream_id in (1, 3):
        if client:
            side.open()
            side.receive(frames.response(stream_id))
        else:
            side.receive(frames.connect(stream_id, "10.0.0.7:8080"))
            side.accept(stream_id)
    side.sent()
    return side


SESSION_ERRORS = {
    "data_on_the_session": (frames.data(0, b"x"), Code.PROTOCOL_ERROR),
    "data_on_an_idle_stream": (frames.data(99, b"x"), Code.PROTOCOL_ERROR),
    "data_on_an_idle_even_stream": (frames.data(2, b"x"), Code.PROTOCOL_ERROR),
    "data_all_padding_and_more": (frames.frame(Kind.DATA, frames.PADDED, 1, b"\x05abc"), Code.PROTOCOL_ERROR),
    "data_padding_as_long_as_the_frame": (frames.frame(Kind.DATA, frames.PADDED, 1, b"\x04abc"), Code.PROTOCOL_ERROR),
    "data_padded_and_empty": (frames.frame(Kind.DATA, frames.PADDED, 1), Code.FRAME_SIZE_ERROR),
    "frame_too_long": (frames.frame(Kind.DATA, 0, 1, length=MIB + 1), Code.FRAME_SIZE_ERROR),
    "unknown_frame_too_long": (frames.frame(0x42, 0, 0, length=MIB + 1), Code.FRAME_SIZE_ERROR),
    "headers_too_long": (frames.frame(Kind.HEADERS, 4, 5, length=MIB + 1), Code.FRAME_SIZE_ERROR),
    "headers_on_the_session": (frames.connect(0, "10.0.0.7:80"), Code.PROTOCOL_ERROR),
    "headers_on_an_even_stream": (frames.connect(2, "10.0.0.7:80"), Code.PROTOCOL_ERROR),
    "headers_padding_too_long": (
        frames.frame(Kind.HEADERS, frames.PADDED | frames.END_HEADERS, 5, b"\xff" + bytes(9)),
        Code.PROTOCOL_ERROR,
    ),
    "headers_padded_and_empty": (
        frames.frame(Kind.HEADERS, frames.PADDED | frames.END_HEADERS, 5),
        Code.FRAME_SIZE_ERROR,
    ),
    "headers_without_room_for_priority": (
        frames.frame(Kind.HEADERS, frames.PRIORITY_FLAG | frames.END_HEADERS, 5, bytes(4)),
        Code.FRAME_SIZE_ERROR,
    ),
    "headers_without_room_for_padding_and_priority": (
        frames.frame(Kind.HEADERS, frames.PADDED | frames.PRIORITY_FLAG | frames.END_HEADERS, 5, bytes(5)),
        Code.FRAME_SIZE_ERROR,
    ),
    "block_broken": (frames.headers(5, b"\xff\xff\xff\xff\xff\xff"), Code.COMPRESSION_ERROR),
    "block_with_unknown_index": (frames.headers(5, b"\xbe"), Code.COMPRESSION_ERROR),
    "block_with_index_0": (frames.headers(5, b"\x80"), Code.COMPRESSION_ERROR),
    "block_cut": (frames.headers(5, b"\x00\x0aabc"), Code.COMPRESSION_ERROR),
    "block_with_a_larger_table": (frames.headers(5, b"\x3f\xe1\xff\x03"), Code.COMPRESSION_ERROR),
    "block_with_a_late_size_update": (frames.headers(5, b"\x88\x20"), Code.COMPRESSION_ERROR),
    "block_with_bad_huffman": (frames.headers(5, b"\x00\x84\xff\xff\xff\xff\x01x"), Code.COMPRESSION_ERROR),
    "broken_block_on_a_live_stream": (frames.headers(1, b"\xbe"), Code.COMPRESSION_ERROR),
    "continuation_without_headers": (frames.continuation(5, b"", end_headers=True), Code.PROTOCOL_ERROR),
    "continuation_on_the_session": (frames.continuation(0, b"", end_headers=True), Code.PROTOCOL_ERROR),
    "priority_on_the_session": (frames.priority(0), Code.PROTOCOL_ERROR),
    "rst_stream_of_3_bytes": (frames.frame(Kind.RST_STREAM, 0, 1, bytes(3)), Code.FRAME_SIZE_ERROR),
    "rst_stream_on_the_session": (frames.rst(0), Code.PROTOCOL_ERROR),
    "rst_stream_on_an_idle_stream": (frames.rst(99), Code.PROTOCOL_ERROR),
    "rst_stream_on_an_idle_even_stream": (frames.rst(2), Code.PROTOCOL_ERROR),
    "settings_of_5_bytes": (frames.frame(Kind.SETTINGS, 0, 0, bytes(5)), Code.FRAME_SIZE_ERROR),
    "settings_on_a_stream": (frames.frame(Kind.SETTINGS, 0, 1), Code.PROTOCOL_ERROR),
    "settings_over_all_bounds": (frames.frame(Kind.SETTINGS, 0, 0, bytes(16_386)), Code.ENHANCE_YOUR_CALM),
    "push_promise": (frames.frame(Kind.PUSH_PROMISE, frames.END_HEADERS, 1, bytes(4)), Code.PROTOCOL_ERROR),
    "ping_of_7_bytes": (frames.ping(bytes(7)), Code.FRAME_SIZE_ERROR),
    "ping_of_9_bytes": (frames.ping(bytes(9), ack=True), Code.FRAME_SIZE_ERROR),
    "ping_on_a_stream": (frames.frame(Kind.PING, 0, 1, bytes(8)), Code.PROTOCOL_ERROR),
    "goaway_of_7_bytes": (frames.frame(Kind.GOAWAY, 0, 0, bytes(7)), Code.FRAME_SIZE_ERROR),
    "goaway_on_a_stream": (frames.frame(Kind.GOAWAY, 0, 1, bytes(8)), Code.PROTOCOL_ERROR),
    "goaway_of_a_novel": (frames.goaway(0, 0, bytes(16_384)), Code.ENHANCE_YOUR_CALM),
    "window_update_of_3_bytes": (frames.frame(Kind.WINDOW_UPDATE, 0, 1, bytes(3)), Code.FRAME_SIZE_ERROR),
    "window_update_0_of_the_session": (frames.window_update(0, 0), Code.PROTOCOL_ERROR),
    "window_update_on_an_idle_stream": (frames.window_update(99, 1), Code.PROTOCOL_ERROR),
    "session_window_overflows": (frames.window_update(0, 2**31 - 1), Code.FLOW_CONTROL_ERROR),
    "stream_window_overflows_by_settings": (
        frames.window_update(1, 2**31 - 1 - 65_535) + frames.settings({Setting.INITIAL_WINDOW_SIZE: 65_536}),
        Code.FLOW_CONTROL_ERROR,
    ),
}

# What may come between HEADERS and its CONTINUATION: nothing.
INTERRUPTIONS = {
    "ping": frames.ping(),
    "data": frames.data(1, b"x"),
    "headers": frames.connect(5, "10.0.0.7:80"),
    "continuation_of_another": frames.continuation(7, b"", end_headers=True),
    "unknown": frames.frame(0x42, 0, 0),
    "settings": frames.settings(),
}
for _name, _raw in INTERRUPTIONS.items():
    _first = frames.headers(5, b"", end_headers=False)
    SESSION_ERRORS[f"block_interrupted_by_{_name}"] = (_first + _raw, Code.PROTOCOL_ERROR)


@pytest.mark.wire("W-ERR-1", "W-ERR-2", "W-ERR-3", "W-LIM-3")
@pytest.mark.parametrize("client", [True, False], ids=["client", "server"])
@pytest.mark.parametrize("name", SESSION_ERRORS)
def test_a_session_error_has_the_code_of_the_rfc(name, client):
    raw, code = SESSION_ERRORS[name]
    side = busy(client)
    error = failure(side.receive(raw))
    assert type(error) is RemoteProtocolError
    assert Code(error.error_code) == code
    goaway = side.sent()[-1]
    assert (goaway.kind, goaway.code, goaway.last_stream) == (Kind.GOAWAY, code, 0 if client else 3)
    assert goaway.payload[8:] == str(error).encode()[:200], "it says why"
    assert side.engine.closed


@pytest.mark.wire("W-LIM-3")
@pytest.mark.parametrize("kind", [Kind.DATA, Kind.HEADERS, Kind.SETTINGS, 0x42])
def test_a_long_frame_is_refused_by_its_header_alone(kind):
    side = busy(limits=Limits(max_frame_size=20_000))
    whole = frames.frame(kind, 0, 0 if kind == Kind.SETTINGS else 1, length=20_001)
    assert side.receive(whole[:8]) == []
    assert failure(side.receive(whole[8:9])).error_code == Code.FRAME_SIZE_ERROR


def test_a_frame_of_exactly_the_length_that_we_announced():
    side = busy(limits=Limits(max_frame_size=20_000))
    assert side.receive(frames.data(1, bytes(20_000))) == [DataReceived(1, bytes(20_000))]
    assert side.receive(frames.frame(0x42, 0, 0, bytes(20_000))) == []


STREAM_ERRORS = {
    "stream_window_overflows": (frames.window_update(1, 2**31 - 1), Code.FLOW_CONTROL_ERROR),
    "window_update_0": (frames.window_update(1, 0), Code.PROTOCOL_ERROR),
    "priority_of_4_bytes": (frames.frame(Kind.PRIORITY, 0, 1, bytes(4)), Code.FRAME_SIZE_ERROR),
    "more_data_than_the_window": (frames.data(1, bytes(65_535)) + frames.data(1, b"x"), Code.FLOW_CONTROL_ERROR),
    "more_padding_than_the_window": (
        frames.data(1, bytes(65_535)) + frames.data(1, pad=0),
        Code.FLOW_CONTROL_ERROR,
    ),
    "data_after_end_stream": (frames.data(1, end=True) + frames.data(1, b"x"), Code.STREAM_CLOSED),
    "headers_after_end_stream": (frames.data(1, end=True) + frames.headers(1, [("a", "b")]), Code.STREAM_CLOSED),
    "headers": (frames.headers(1, [("a", "b")]), Code.PROTOCOL_ERROR),
    "headers_with_continuation": (
        frames.headers(1, frames.block([("a", "b")]), end_headers=False)
        + frames.continuation(1, b"", end_headers=True),
        Code.PROTOCOL_ERROR,
    ),
}


@pytest.mark.wire("W-ERR-1", "W-ERR-2", "W-FLOW-6", "W-FLOW-7")
@pytest.mark.parametrize("client", [True, False], ids=["client", "server"])
@pytest.mark.parametrize("name", STREAM_ERRORS)
def test_a_stream_error_has_the_code_of_the_rfc_and_costs_its_stream(name, client):
    raw, code = STREAM_ERRORS[name]
    side = busy(client, limits=Limits(stream_window=65_535, connection_window=10 * 65_535))
    told = side.receive(frames.data(3, b"before") + raw + frames.data(3, b"behind"))
    (reset,) = (e for e in told if isinstance(e, StreamReset))
    assert (reset.stream_id, Code(reset.error_code), reset.remote) == (1, code, False)
    assert reset.why
    assert told[0] == DataReceived(3, b"before")
    assert told[-1] == DataReceived(3, b"behind")
    (sent,) = (f for f in side.sent() if f.kind == Kind.RST_STREAM)
    assert (sent.stream, sent.code) == (1, code)
    assert list(side.engine.streams) == [3]
    assert side.send(3, b"still here") == 10
    side.end(3)
    side.receive(frames.data(3, end=True))
    assert not side.engine.streams


@pytest.mark.wire("W-ERR-2")
def test_data_on_a_stream_that_has_ended_both_ways():
    server = busy()
    server.end(1)
    server.receive(frames.data(1, end=True))
    server.sent()
    assert server.receive(frames.data(1, b"x") + frames.data(1, b"y") + frames.data(3, b"z")) == [DataReceived(3, b"z")]
    assert server.said() == ["RST_STREAM(stream=1 flags=0x0 0x5)"], "said once"


def test_a_late_reset_or_window_update_of_a_stream_that_has_ended():
    client = busy(client=True)
    client.end(1)
    client.receive(frames.data(1, end=True))
    assert client.receive(frames.window_update(1, 5) + frames.rst(1, Code.NO_ERROR)) == []


@pytest.mark.wire("W-ERR-2")
def test_a_request_on_a_stream_that_has_ended():
    """RFC 9113 section 5.1: it cannot be an honest one, each stream has one request."""
    server = busy()
    server.end(3)
    server.receive(frames.data(3, end=True))
    assert failure(server.receive(frames.connect(3, "10.0.0.7:80"))).error_code == Code.STREAM_CLOSED
    server = busy()
    server.receive(frames.rst(3))
    assert failure(server.receive(frames.connect(3, "10.0.0.7:80"))).error_code == Code.STREAM_CLOSED


def test_an_even_stream_is_never_the_client_s_to_open():
    server = busy()
    assert failure(server.receive(frames.connect(2, "10.0.0.7:80"))).error_code == Code.PROTOCOL_ERROR


def test_an_answer_on_a_stream_that_was_never_opened():
    for stream_id in (5, 2):
        client = busy(client=True)
        assert failure(client.receive(frames.response(stream_id))).error_code == Code.PROTOCOL_ERROR


def test_stream_ids_may_leave_gaps():
    server = busy()
    assert only(server.receive(frames.connect(2**31 - 1, "10.0.0.7:80")), RequestReceived).stream_id == 2**31 - 1


def test_a_fault_on_a_stream_that_is_gone_costs_nothing():
    server = busy()
    server.reset(1, Code.CANCEL)
    server.sent()
    odd = frames.window_update(1, 0) + frames.frame(Kind.PRIORITY, 0, 1, bytes(4)) + frames.data(1, b"x", pad=3)
    assert server.receive(odd + frames.data(3, b"x")) == [DataReceived(3, b"x")]
    assert server.said() == []


def test_the_rest_of_a_frame_whose_stream_was_reset_meanwhile():
    server = busy()
    whole = frames.data(1, b"0123456789", end=True)
    assert server.receive(whole[:12]) == [DataReceived(1, b"012")]
    server.reset(1, Code.CANCEL)
    assert server.receive(whole[12:] + frames.data(3, b"x")) == [DataReceived(3, b"x")]
    padded = frames.data(3, b"y", pad=9)
    assert server.receive(padded[:9]) == []
    server.reset(3, Code.CANCEL)
    assert server.receive(padded[9:]) == []


@pytest.mark.wire("W-RST-8")
def test_resets_that_cross_are_free():
    """Both gave the tunnel up at the same time, thousands of times: nobody abuses anything."""
    server = opened(client=False)
    for stream_id in range(1, 5000, 2):
        server.receive(frames.connect(stream_id, "10.0.0.7:80"))
        if stream_id % 4 == 1:
            server.refuse(stream_id, 503)
        else:
            server.accept(stream_id)
            server.reset(stream_id, Code.CONNECT_ERROR)
        assert server.receive(frames.rst(stream_id)) == []
    assert not server.engine.closed


@pytest.mark.parametrize("first", ["peer", "we"])
def test_resets_that_cross_an_end_are_free(first):
    """A peer that drops a stream before it has seen our END_STREAM, thousands of times."""
    client = opened(client=True)
    for stream_id in range(1, 5000, 2):
        client.open()
        client.receive(frames.response(stream_id, end_stream=first == "peer"))
        client.end(stream_id)
        if first == "we":
            client.receive(frames.data(stream_id, end=True))
        assert client.receive(frames.rst(stream_id)) == []
    assert not client.engine.closed


def test_a_client_forgets_what_goaway_has_ended():
    client = opened(client=True)
    client.open()
    client.open()
    assert resets(client.receive(frames.goaway(1))) == [(3, Code.REFUSED_STREAM)]
    assert client.receive(frames.response(3) + frames.rst(3) + frames.window_update(3, 1)) == []
    assert only(client.receive(frames.response(1)), ResponseReceived).stream_id == 1


def test_what_h2_objects_to_is_the_peer_s_fault(monkeypatch):
    """It sees only what we have judged, so nothing is known that would make it object."""
    import h2.exceptions

    server = busy()

    def object_to(_):
        raise h2.exceptions.FlowControlError("no")

    for engine in server.engines:
        monkeypatch.setattr(engine._h2, "receive_data", object_to)
    assert failure(server.receive(frames.ping())).error_code == Code.FLOW_CONTROL_ERROR
