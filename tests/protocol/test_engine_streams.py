"""The life of a stream: asked for, answered, ended by halves in any order, reset, forgotten."""

from __future__ import annotations

import pytest
from support import frames
from support.engines import Pair, failure, only, opened, resets
from support.frames import Code, Kind, Setting

from hbone.errors import LocalProtocolError, RemoteProtocolError
from hbone.protocol import (
    ConnectRequest,
    ConnectResponse,
    DataReceived,
    Limits,
    RequestReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
)


def asked(*ids, **options):
    """A server with these requests, unanswered."""
    server = opened(client=False, **options)
    for stream_id in ids:
        server.receive(frames.connect(stream_id, "10.0.0.7:8080"))
    return server


def asking(count=1, **options):
    """A client with so many requests under way."""
    client = opened(client=True, **options)
    for _ in range(count):
        client.open()
    client.sent()
    client.raw()
    return client


# --- asking and answering


@pytest.mark.wire("W-REQ-1", "W-RSP-2", "W-RSP-8")
def test_a_tunnel_is_asked_for_and_granted():
    pair = Pair()
    pair.exchange()
    request = ConnectRequest.build("10.0.0.7:8080", [("baggage", "a=b")])
    assert pair.client.open(request) == 1
    assert pair.exchange() == ([], [RequestReceived(1, request)])
    pair.server.accept(1, ((b"baggage", b"c=d"),))
    assert pair.exchange() == ([ResponseReceived(1, ConnectResponse(200, ((b"baggage", b"c=d"),)))], [])
    assert pair.client.open() == 3
    assert pair.client.stream(1).answered
    assert not pair.client.stream(1).refused
    assert not pair.client.stream(3).answered


@pytest.mark.wire("W-RSP-4", "W-CLOSE-5")
def test_a_refusal_ends_both_halves():
    server = asked(1)
    server.refuse(1, 503)
    assert server.said() == [
        "HEADERS(stream=1 flags=0x5 ((':status', '503'),))",
        "RST_STREAM(stream=1 flags=0x0 0x0)",
    ]
    assert not server.engine.streams


@pytest.mark.wire("W-RSP-4")
def test_a_refusal_needs_no_reset_when_the_peer_has_ended_its_half():
    server = opened(client=False)
    told = server.receive(frames.connect(1, "10.0.0.7:8080", end_stream=True))
    assert [type(e) for e in told] == [RequestReceived, StreamEnded]
    server.refuse(1, 401)
    assert server.said() == ["HEADERS(stream=1 flags=0x5 ((':status', '401'),))"]
    assert not server.engine.streams


@pytest.mark.parametrize("status", [201, 204, 299])
@pytest.mark.wire("W-RSP-8")
def test_every_2xx_opens(status):
    client = asking()
    assert only(client.receive(frames.response(1, status)), ResponseReceived).response.status == status
    assert not client.stream(1).refused
    assert client.receive(frames.data(1, b"x")) == [DataReceived(1, b"x")]


@pytest.mark.parametrize("status", [300, 304, 400, 407, 503, 999])
@pytest.mark.wire("W-RSP-8")
def test_every_other_final_status_refuses(status):
    client = asking()
    client.receive(frames.response(1, status))
    assert client.stream(1).refused


@pytest.mark.wire("W-RSP-9")
@pytest.mark.parametrize("length", ["0", "5", "nonsense", ""])
def test_a_content_length_on_a_success_means_nothing(length):
    client = asking()
    client.receive(frames.response(1, 200, ("content-length", length)))
    assert client.receive(frames.data(1, b"123456")) == [DataReceived(1, b"123456")]


@pytest.mark.wire("W-RSP-10", "W-CLOSE-3")
def test_a_success_with_end_stream_is_a_tunnel_with_one_half():
    client = asking()
    told = client.receive(frames.response(1, 200, end_stream=True))
    assert [type(e) for e in told] == [ResponseReceived, StreamEnded]
    assert client.send(1, b"upload") == 6
    client.end(1)
    assert client.said() == ["DATA(stream=1 flags=0x0 6 bytes)", "DATA(stream=1 flags=0x1 0 bytes)"]
    assert not client.engine.streams


@pytest.mark.wire("W-RSP-6")
def test_informational_answers_are_passed_over():
    client = asking()
    assert client.receive(frames.response(1, 100) + frames.response(1, 103, ("link", "x"))) == []
    assert not client.stream(1).answered
    assert only(client.receive(frames.response(1)), ResponseReceived).response.status == 200


@pytest.mark.wire("W-RSP-6", "W-RSP-7")
@pytest.mark.parametrize(
    "answer",
    [
        frames.response(1, 101),
        frames.response(1, 100, end_stream=True),
        frames.headers(1, []),
        frames.headers(1, [("date", "now")]),
        frames.headers(1, [(":status", "200"), (":status", "200")]),
        frames.headers(1, [(":status", "20")]),
        frames.headers(1, [(":status", "2000")]),
        frames.headers(1, [(":status", "2x0")]),
        frames.headers(1, [("a", "b"), (":status", "200")]),
        frames.headers(1, [(":status", "200"), (":path", "/")]),
        frames.response(1, 200, ("Date", "now")),
        frames.response(1, 200, ("date", "a\nb")),
        frames.response(1, 200, ("connection", "close")),
        frames.response(1, 503, ("content-length", "x")),
    ],
)
def test_a_malformed_answer_costs_its_stream(answer):
    client = asking(2)
    assert resets(client.receive(answer)) == [(1, Code.PROTOCOL_ERROR)]
    assert client.said() == ["RST_STREAM(stream=1 flags=0x0 0x1)"]
    assert only(client.receive(frames.response(3)), ResponseReceived).stream_id == 3


@pytest.mark.wire("W-RSP-13")
def test_data_before_the_answer():
    client = asking(2)
    assert resets(client.receive(frames.data(1, b"x"))) == [(1, Code.PROTOCOL_ERROR)]
    assert only(client.receive(frames.response(3)), ResponseReceived).stream_id == 3


@pytest.mark.wire("W-REQ-11")
def test_data_before_our_answer_is_kept_for_the_target():
    server = asked(1)
    assert server.receive(frames.data(1, b"early")) == [DataReceived(1, b"early")]
    server.accept(1)
    assert server.receive(frames.data(1, b"late")) == [DataReceived(1, b"late")]


@pytest.mark.wire("W-REQ-12")
def test_a_request_that_ends_its_half():
    server = opened(client=False)
    server.receive(frames.connect(1, "10.0.0.7:8080", end_stream=True))
    server.accept(1)
    assert server.send(1, b"download") == 8
    server.end(1)
    assert not server.engine.streams
    assert [f.kind for f in server.sent()] == [Kind.HEADERS, Kind.DATA, Kind.DATA]


@pytest.mark.wire("W-RSP-11")
def test_the_body_of_a_refusal():
    client = asking(2)
    told = client.receive(frames.response(1, 503) + frames.data(1, b"no such ") + frames.data(1, b"host", end=True))
    assert [type(e) for e in told] == [ResponseReceived, DataReceived, StreamEnded]
    assert told[1].data == b"no such host"
    client.reset(1, Code.CANCEL)
    assert only(client.receive(frames.response(3)), ResponseReceived).stream_id == 3


@pytest.mark.wire("W-RSP-11")
def test_a_refusal_may_have_trailers():
    client = asking(2)
    told = client.receive(frames.response(1, 503) + frames.headers(1, [("grpc-status", "1")], end_stream=True))
    assert [type(e) for e in told] == [ResponseReceived, StreamEnded]
    told = client.receive(frames.response(3, 503) + frames.headers(3, [("grpc-status", "1")]))
    assert resets(told) == [(3, Code.PROTOCOL_ERROR)], "trailers end the stream"


# --- both halves


@pytest.mark.wire("W-DATA-1", "W-CLOSE-1", "W-CLOSE-3", "W-CLOSE-4", "W-CLOSE-5")
@pytest.mark.parametrize("first", ["client", "server"])
def test_each_half_ends_by_itself(first):
    pair = Pair()
    pair.exchange()
    stream_id = pair.tunnel()
    one, other = (pair.client, pair.server) if first == "client" else (pair.server, pair.client)
    swap = 1 if first == "client" else -1
    one.send(stream_id, b"first words")
    one.end(stream_id)
    assert pair.exchange()[::swap] == ([], [DataReceived(stream_id, b"first words"), StreamEnded(stream_id)])
    for i in range(3):  # the other half goes on
        other.send(stream_id, b"%d" % i)
        assert pair.exchange()[::swap] == ([DataReceived(stream_id, b"%d" % i)], [])
    other.send(stream_id, b"last words")
    other.end(stream_id)
    assert not other.engine.streams
    assert pair.exchange()[::swap] == ([DataReceived(stream_id, b"last words"), StreamEnded(stream_id)], [])
    assert not one.engine.streams
    assert Kind.RST_STREAM not in {f.kind for f in one.log + other.log}
    assert pair.tunnel() == stream_id + 2


@pytest.mark.wire("W-CLOSE-4")
def test_both_halves_end_at_once():
    pair = Pair()
    pair.exchange()
    stream_id = pair.tunnel()
    for side in (pair.client, pair.server):
        side.send(stream_id, b"bye")
        side.end(stream_id)
    told = [DataReceived(stream_id, b"bye"), StreamEnded(stream_id)]
    assert pair.exchange() == (told, told)
    assert not pair.client.engine.streams
    assert not pair.server.engine.streams


@pytest.mark.wire("W-CLOSE-2")
def test_the_end_may_come_with_the_last_bytes():
    server = asked(1)
    server.accept(1)
    assert server.receive(frames.data(1, b"all", end=True)) == [DataReceived(1, b"all"), StreamEnded(1)]


@pytest.mark.wire("W-DATA-1")
def test_an_empty_frame_means_nothing():
    server = asked(1)
    assert server.receive(frames.data(1)) == []
    assert server.receive(frames.data(1, b"x") + frames.data(1, end=True)) == [DataReceived(1, b"x"), StreamEnded(1)]


@pytest.mark.wire("W-DATA-2")
def test_small_pieces_are_frames_of_their_own():
    client = asking()
    client.receive(frames.response(1))
    for piece in (b"a", b"b"):
        client.send(1, piece)
    assert [f.data for f in client.sent()] == [b"a", b"b"]
    assert client.engine.data_header(1, 5) == frames.frame(Kind.DATA, 0, 1, bytes(5))[:9]
    client._each("queue_header", 1, 5)
    assert client.engine.data_to_send() == b""  # the pair took it; the payload is the caller's to write
    assert client.raw()[-9:] == frames.frame(Kind.DATA, 0, 1, bytes(5))[:9]


@pytest.mark.wire("W-DATA-3", "W-ERR-1")
def test_headers_inside_a_tunnel():
    server = asked(1, 3)
    server.accept(1)
    server.accept(3)
    assert resets(server.receive(frames.headers(1, [("trailer", "x")], end_stream=True))) == [(1, Code.PROTOCOL_ERROR)]
    assert server.receive(frames.data(3, b"goes on")) == [DataReceived(3, b"goes on")]

    client = asking(2)
    client.receive(frames.response(1) + frames.response(3))
    assert resets(client.receive(frames.response(1))) == [(1, Code.PROTOCOL_ERROR)]
    assert client.receive(frames.data(3, b"goes on")) == [DataReceived(3, b"goes on")]


@pytest.mark.wire("W-DATA-3")
def test_a_second_request_on_the_same_stream():
    server = asked(1)
    assert resets(server.receive(frames.connect(1, "10.0.0.7:8080"))) == [(1, Code.PROTOCOL_ERROR)]


@pytest.mark.wire("W-CLOSE-6", "W-ERR-2")
@pytest.mark.parametrize("client", [True, False], ids=["client", "server"])
@pytest.mark.parametrize(
    "late",
    [frames.data(1, b"x"), frames.data(1), frames.data(1, end=True), frames.headers(1, [("a", "b")])],
    ids=["data", "empty", "end", "headers"],
)
def test_frames_after_the_end(client, late):
    if client:
        side = asking()
        side.receive(frames.response(1))
    else:
        side = asked(1)
        side.accept(1)
    side.receive(frames.data(1, end=True))
    assert resets(side.receive(late)) == [(1, Code.STREAM_CLOSED)]
    assert not side.engine.streams


# --- resets


@pytest.mark.wire("W-RST-5")
@pytest.mark.parametrize("code", [Code.NO_ERROR, Code.CANCEL, Code.CONNECT_ERROR, 0xDEAD_BEEF])
def test_a_reset_is_a_reset_whatever_its_code(code):
    server = asked(1)
    server.accept(1)
    assert server.receive(frames.data(1, b"x") + frames.rst(1, code)) == [
        DataReceived(1, b"x"),
        StreamReset(1, code, True),
    ]
    assert not server.engine.streams


@pytest.mark.wire("W-RST-6")
def test_a_reset_after_the_end_comes_after_the_end():
    server = asked(1)
    server.accept(1)
    assert server.receive(frames.data(1, b"x", end=True) + frames.rst(1)) == [
        DataReceived(1, b"x"),
        StreamEnded(1),
        StreamReset(1, Code.CANCEL, True),
    ]


@pytest.mark.wire("W-RST-7")
def test_we_give_a_tunnel_up():
    pair = Pair()
    pair.exchange()
    stream_id = pair.tunnel()
    pair.client.reset(stream_id, Code.CANCEL)
    pair.client.reset(stream_id, Code.CANCEL)
    assert pair.exchange() == ([], [StreamReset(stream_id, Code.CANCEL, True)])
    assert sum(f.kind == Kind.RST_STREAM for f in pair.client.log) == 1


@pytest.mark.wire("W-RST-8", "W-FLOW-9")
def test_frames_on_a_stream_that_we_reset_are_passed_over():
    server = asked(1)
    server.accept(1)
    server.reset(1, Code.CONNECT_ERROR)
    server.sent()
    late = frames.data(1, b"x") + frames.window_update(1, 5) + frames.headers(1, [("a", "b")], end_stream=True)
    assert server.receive(late) == []
    assert server.receive(frames.data(1, end=True) + frames.rst(1)) == []
    assert server.said() == []


@pytest.mark.wire("W-RST-8")
def test_header_blocks_of_streams_that_are_gone_are_decoded():
    """They may add to the table that later blocks refer to."""
    server = asked(1)
    server.reset(1, Code.CANCEL)
    adds = frames.headers(1, b"\x40\x07x-later\x05value")  # RFC 7541 section 6.2.1: with indexing
    refers = frames.headers(3, frames.block(frames.connect_headers("10.0.0.7:8080")) + b"\xbe")
    (event,) = server.receive(adds + refers)
    assert event.request.headers == ((b"x-later", b"value"),)

    client = asking(2)
    client.reset(1, Code.CANCEL)
    told = client.receive(frames.headers(1, b"\x88\x40\x07x-later\x05value") + frames.headers(3, b"\x88\xbe"))
    assert told == [ResponseReceived(3, ConnectResponse(200, ((b"x-later", b"value"),)))]


@pytest.mark.wire("W-RST-9")
def test_a_request_beyond_the_limit_costs_itself():
    server = asked(1, 3, limits=Limits(max_concurrent_streams=2))
    server.accept(1)
    assert server.receive(frames.connect(5, "10.0.0.7:8080")) == []
    assert server.said()[-1] == "RST_STREAM(stream=5 flags=0x0 0x7)"
    assert server.receive(frames.data(1, b"goes on")) == [DataReceived(1, b"goes on")]
    server.reset(3, Code.CANCEL)
    assert [type(e) for e in server.receive(frames.connect(7, "10.0.0.7:8080"))] == [RequestReceived]


@pytest.mark.wire("W-POOL-6")
def test_a_refused_stream_was_not_processed():
    client = asking(2)
    assert client.receive(frames.rst(1, Code.REFUSED_STREAM)) == [StreamReset(1, Code.REFUSED_STREAM, True, True)]
    client.receive(frames.response(3))
    assert client.receive(frames.rst(3, Code.REFUSED_STREAM)) == [StreamReset(3, Code.REFUSED_STREAM, True, False)]


# --- what we may not do


def test_a_server_opens_no_tunnels():
    with pytest.raises(LocalProtocolError, match="only a client"):
        opened(client=False).open()


def test_an_answer_is_given_once_and_to_a_request():
    server = asked(1, 3, 5)
    server.accept(1)
    server.refuse(3, 503)
    server.reset(5, Code.CANCEL)
    for stream_id in (1, 3, 5, 7):
        with pytest.raises(LocalProtocolError, match=f"stream {stream_id} has no request"):
            server.accept(stream_id)
        with pytest.raises(LocalProtocolError, match=f"stream {stream_id} has no request"):
            server.refuse(stream_id, 503)
    client = asking()
    with pytest.raises(LocalProtocolError, match="stream 1 has no request"):
        client.accept(1)


def test_a_half_ends_once():
    server = asked(1)
    server.accept(1)
    server.end(1)
    for stream_id in (1, 3):
        with pytest.raises(LocalProtocolError, match=f"stream {stream_id} has ended"):
            server.end(stream_id)


def test_a_server_answers_before_it_ends():
    server = asked(1)
    server.sent()
    with pytest.raises(LocalProtocolError, match="stream 1"):
        server.end(1)
    server.accept(1)
    server.end(1)
    assert [f.kind for f in server.sent()] == [Kind.HEADERS, Kind.DATA]


def test_a_client_may_end_before_the_answer():
    client = asking()
    client.end(1)
    assert [type(e) for e in client.receive(frames.response(1))] == [ResponseReceived]
    assert client.receive(frames.data(1, b"x", end=True)) == [DataReceived(1, b"x"), StreamEnded(1)]
    assert not client.engine.streams


def test_stream_ids_run_out():
    client = asking()
    for engine in client.engines:
        engine._next_stream_id = 2**31 - 1
    assert client.open() == 2**31 - 1
    assert client.engine.available_streams == 0
    with pytest.raises(LocalProtocolError):
        client.open()


def test_a_session_that_is_closed_has_no_streams():
    server = asked(1, 3)
    server.accept(1)
    stream = server.stream(1)
    server.close()
    server.sent()
    assert not server.engine.streams
    assert not stream.open
    server.reset(1, Code.CANCEL)
    with pytest.raises(LocalProtocolError):
        server.accept(3)
    with pytest.raises(LocalProtocolError):
        server.end(1)
    assert server.said() == []
    client = asking()
    client.close()
    assert client.engine.available_streams == 0


def test_a_broken_session_has_no_streams_either():
    server = asked(1)
    assert type(failure(server.receive(frames.ping(bytes(7))))) is RemoteProtocolError
    assert not server.engine.streams


def test_the_number_of_streams_is_that_of_live_ones():
    client = opened(client=True, settings={Setting.MAX_CONCURRENT_STREAMS: 3})
    for _ in range(30):
        a, b, c = client.open(), client.open(), client.open()
        assert client.engine.available_streams == 0
        client.receive(frames.response(a) + frames.response(b, 503, end_stream=True) + frames.rst(c))
        client.end(a)
        client.receive(frames.data(a, end=True))
        client.reset(b, Code.CANCEL)
        assert client.engine.available_streams == 3


# --- answers that are the same bytes


def literal(name: str, value: str, *, index: bool = False) -> bytes:
    """A header field as HPACK writes it: never indexed for later, or put into the table (RFC 7541 section 6.2)."""
    return (b"\x40" if index else b"\x00") + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


SAME = b"\x88" + literal("baggage", "a=1")
INDEXED = b"\x88" + literal("baggage", "b=2", index=True)
BY_INDEX = b"\x88\xbe"  # the first entry of the table
SHRUNK = b"\x20" + SAME  # the table gets no room
A, B = (b"baggage", b"a=1"), (b"baggage", b"b=2")


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        ([SAME, SAME, SAME], [A, A, A]),
        ([SAME, INDEXED, BY_INDEX, SAME, BY_INDEX, BY_INDEX], [A, B, B, A, B, B]),
        ([INDEXED, INDEXED, BY_INDEX], [B, B, B]),
        ([INDEXED, SHRUNK, SAME, SAME, SHRUNK, SAME], [B, A, A, A, A, A]),
        ([SHRUNK, SHRUNK, SAME, b"\x88", SAME], [A, A, A, None, A]),
    ],
    ids=["the same", "a table in between", "indexed", "resized", "another in between"],
)
def test_answers_of_the_same_bytes_say_what_their_table_makes_of_them(blocks, said):
    client = asking(len(blocks))
    got = []
    for number, block in enumerate(blocks):
        told = only(client.receive(frames.headers(2 * number + 1, block)), ResponseReceived)
        got.append(told.response.headers)
    assert got == [() if header is None else (header,) for header in said]


def test_an_index_into_a_table_that_was_emptied_is_an_error():
    client = asking(4)
    for number, block in enumerate((INDEXED, BY_INDEX, SHRUNK)):
        client.receive(frames.headers(2 * number + 1, block))
    assert failure(client.receive(frames.headers(7, BY_INDEX))).error_code == Code.COMPRESSION_ERROR
