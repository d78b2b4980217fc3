"""GOAWAY: no new tunnels, and those that live go on; which of ours were not processed."""

from __future__ import annotations

import pytest
from support import frames
from support.engines import REQUEST, Pair, opened
from support.frames import Code, Kind

from hbone.errors import LocalProtocolError
from hbone.protocol import (
    DataReceived,
    GoAwayReceived,
    PingAcknowledged,
    RequestReceived,
    StreamEnded,
    StreamReset,
)

LAST = 2**31 - 1


@pytest.mark.wire("W-GOAWAY-3")
def test_a_drain_is_two_goaways_around_a_ping():
    server = opened(client=False)
    server.receive(frames.connect(1, "10.0.0.7:80"))
    server.drain()
    first, ping = server.sent()
    assert (first.kind, first.last_stream, first.code) == (Kind.GOAWAY, LAST, Code.NO_ERROR)
    assert (ping.kind, ping.ack) == (Kind.PING, False)
    server.drain()
    assert server.said() == [], "once"
    assert server.receive(frames.ping(ping.payload, ack=True)) == [PingAcknowledged(ping.payload)]
    (second,) = server.sent()
    assert (second.kind, second.last_stream, second.code) == (Kind.GOAWAY, 1, Code.NO_ERROR)
    assert server.receive(frames.ping(ping.payload, ack=True)) == []
    assert server.said() == []


@pytest.mark.wire("W-GOAWAY-1", "W-GOAWAY-3")
@pytest.mark.parametrize("drainer", ["server", "client"])
def test_tunnels_outlive_a_drain(drainer):
    pair = Pair()
    pair.exchange()
    stream_id = pair.tunnel()
    (pair.server if drainer == "server" else pair.client).drain()
    up, down = pair.exchange()
    told = up if drainer == "server" else down
    assert [e.last_stream_id for e in told if isinstance(e, GoAwayReceived)] == [LAST, stream_id if told is up else 0]
    for side, swap in ((pair.client, 1), (pair.server, -1)):
        side.send(stream_id, b"still here")
        assert pair.exchange()[::swap] == ([], [DataReceived(stream_id, b"still here")])
    pair.client.end(stream_id)
    pair.exchange()
    pair.server.end(stream_id)
    assert pair.exchange() == ([StreamEnded(stream_id)], [])
    assert not pair.client.engine.streams
    assert not pair.server.engine.streams


@pytest.mark.wire("W-GOAWAY-4")
def test_requests_during_a_drain_are_sent_elsewhere():
    pair = Pair()
    pair.exchange()
    pair.tunnel()
    late = pair.client.open()
    pair.server.drain()
    up, down = pair.exchange()
    assert StreamReset(late, Code.REFUSED_STREAM, True, True) in up
    assert not [e for e in down if isinstance(e, RequestReceived)]
    assert not pair.client.engine.closed


@pytest.mark.wire("W-GOAWAY-4")
def test_requests_that_were_there_before_the_drain_are_answered():
    pair = Pair()
    pair.exchange()
    early = pair.client.open()
    assert pair.exchange()[1] == [RequestReceived(early, REQUEST)]
    pair.server.drain()
    pair.exchange()
    pair.server.accept(early)
    pair.exchange()
    assert pair.client.stream(early).answered


@pytest.mark.wire("W-GOAWAY-1", "W-POOL-7")
def test_no_streams_after_a_goaway():
    client = opened(client=True)
    client.open()
    client.receive(frames.goaway(LAST))
    assert client.engine.available_streams == 0
    with pytest.raises(LocalProtocolError, match="no stream may be opened"):
        client.open()
    assert list(client.engine.streams) == [1]


@pytest.mark.wire("W-GOAWAY-2", "W-POOL-6")
def test_what_lies_above_the_last_id_was_not_processed():
    client = opened(client=True)
    for _ in range(4):
        client.open()
    client.receive(frames.response(1) + frames.response(5))
    told = client.receive(frames.goaway(3, Code.INTERNAL_ERROR, b"sorry"))
    assert told == [
        GoAwayReceived(3, Code.INTERNAL_ERROR, b"sorry"),
        # an answer, and yet "not processed": no ground to ask again
        StreamReset(5, Code.REFUSED_STREAM, True, False, "GOAWAY below it"),
        StreamReset(7, Code.REFUSED_STREAM, True, True, "GOAWAY below it"),
    ]
    assert list(client.engine.streams) == [1, 3]
    client.receive(frames.response(3))
    assert client.receive(frames.data(3, b"x")) == [DataReceived(3, b"x")]
    assert client.receive(frames.goaway(1))[1:] == [
        StreamReset(3, Code.REFUSED_STREAM, True, False, "GOAWAY below it"),
    ]


def test_a_server_goes_on_after_a_goaway():
    """A client that says goodbye opens no more; what it opened is not concerned."""
    server = opened(client=False)
    server.receive(frames.connect(1, "10.0.0.7:80"))
    assert server.receive(frames.goaway(0)) == [GoAwayReceived(0, Code.NO_ERROR, b"")]
    server.accept(1)
    assert server.receive(frames.data(1, b"x")) == [DataReceived(1, b"x")]


@pytest.mark.wire("W-GOAWAY-1")
def test_a_goaway_with_an_error_ends_no_tunnel_by_itself():
    client = opened(client=True)
    client.open()
    client.receive(frames.response(1) + frames.goaway(1, Code.ENHANCE_YOUR_CALM))
    assert client.receive(frames.data(1, b"tail", end=True)) == [DataReceived(1, b"tail"), StreamEnded(1)]


def test_the_reserved_bit_of_the_last_id_means_nothing():
    client = opened(client=True)
    client.open()
    assert client.receive(frames.goaway(0x8000_0001)) == [GoAwayReceived(1, 0, b"")]


@pytest.mark.wire("W-ERR-3")
def test_the_last_word():
    server = opened(client=False)
    server.receive(frames.connect(5, "10.0.0.7:80"))
    server.close(Code.INTERNAL_ERROR, b"why")
    server.close()
    assert server.said() == ["GOAWAY(stream=0 flags=0x0 last=5 0x2 b'why')"]
    server.drain()
    assert server.said() == []
    assert server.at(1000.0) == []
