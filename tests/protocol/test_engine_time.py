"""Time is an argument: keep-alive, unanswered requests, and the deadlines between which nothing is to do."""

from __future__ import annotations

import math

import pytest
from support import frames
from support.engines import Pair, Side, failure, opened, resets
from support.frames import Code, Kind

from hbone.errors import SessionClosed
from hbone.protocol import PingAcknowledged, StreamEnded, StreamReset

KEEPALIVE = b"hbone-ka"


def deadline(side):
    return side.engine.next_deadline()


@pytest.mark.wire("W-PING-1")
@pytest.mark.parametrize("client", [True, False])
def test_a_ping_every_ten_seconds(client):
    side = opened(client=client, now=100.0)
    assert deadline(side) == 110.0
    assert side.at(109.99) == []
    assert side.said() == []
    assert side.at(110.0) == []
    assert [(f.kind, f.ack, f.payload) for f in side.sent()] == [(Kind.PING, False, KEEPALIVE)]
    assert deadline(side) == 130.0
    assert side.at(111.0) == []
    assert side.said() == [], "one at a time"
    assert side.receive(frames.ping(KEEPALIVE, ack=True), now=112.5) == [PingAcknowledged(KEEPALIVE)]
    assert deadline(side) == 122.5, "ten seconds after the answer"
    side.at(122.5)
    assert len(side.sent()) == 1


@pytest.mark.wire("W-PING-1")
def test_pings_do_not_depend_on_traffic():
    pair = Pair()
    pair.exchange()
    stream_id = pair.tunnel()
    for now in range(1, 11):
        pair.client.send(stream_id, b"x")
        pair.exchange(float(now))
    pair.client.at(10.0)
    assert pair.exchange(10.0)[0] == [PingAcknowledged(KEEPALIVE)]


@pytest.mark.wire("W-PING-3")
def test_a_peer_that_answers_no_ping_is_gone():
    side = opened(client=True)
    side.open()
    side.at(10.0)
    side.receive(frames.ping(b"a stray ", ack=True), now=12.0)
    assert deadline(side) == 20.0  # the request; see below
    side.reset(1, Code.CANCEL)
    assert deadline(side) == 30.0
    assert side.at(29.99) == []
    error = failure(side.at(30.0))
    assert type(error) is SessionClosed
    assert "20 s" in str(error)
    assert side.sent()[-1].kind == Kind.GOAWAY
    assert side.engine.closed


@pytest.mark.wire("W-PING-3")
@pytest.mark.parametrize("sign", ["data", "credit"])
def test_a_peer_that_is_slow_but_moves_is_not_gone(sign):
    """On a slow link a PING waits behind megabytes of DATA, both on its way there and back."""
    side = opened(client=False)
    side.receive(frames.connect(1, "10.0.0.7:80"))
    side.accept(1)
    side.at(10.0)
    side.receive(frames.data(1, b"x") if sign == "data" else frames.window_update(0, 1), now=25.0)
    assert side.at(30.0) == []
    assert deadline(side) == 45.0
    assert type(failure(side.at(45.0))) is SessionClosed


@pytest.mark.wire("W-PING-3")
def test_the_times_are_the_user_s():
    side = opened(client=False, ping_interval=1.5, ping_timeout=0.25)
    assert deadline(side) == 1.5
    side.at(1.5)
    assert deadline(side) == 1.75
    assert "0.25 s" in str(failure(side.at(1.75)))


@pytest.mark.wire("W-PING-2")
def test_a_ping_is_answered_with_its_own_bytes_and_first():
    side = opened(client=False)
    side.receive(frames.connect(1, "10.0.0.7:80") + frames.ping(b"12345678"))
    (answer,) = side.sent()
    assert (answer.ack, answer.payload) == (True, b"12345678")


def test_pings_before_the_session_is_open():
    """They count from the start: a peer that never says SETTINGS does not live for ever by its silence."""
    side = Side(client=True)
    side.at(10.0)
    assert type(failure(side.at(30.0))) is SessionClosed


def test_an_answer_that_nobody_waits_for():
    side = opened(client=True)
    assert side.receive(frames.ping(KEEPALIVE, ack=True), now=1.0) == []
    assert side.receive(frames.ping(b"hbone-dr", ack=True), now=1.0) == []
    assert deadline(side) == 10.0


@pytest.mark.wire("W-PING-3")
def test_an_answer_comes_too_late():
    side = opened(client=True)
    side.at(10.0)
    side.at(30.0)
    assert side.receive(frames.ping(KEEPALIVE, ack=True), now=30.5) == []
    assert side.engine.closed


@pytest.mark.parametrize("how", ["close", "fault", "silence"])
def test_a_closed_session_has_nothing_to_do(how):
    """Else its driver would ask for ever about a deadline in the past, while it says goodbye."""
    side = opened(client=True)
    side.open()
    if how == "close":
        side.close()
    elif how == "fault":
        side.receive(frames.ping(bytes(7)))
    else:
        side.reset(1, Code.CANCEL)
        side.at(10.0)
        side.at(30.0)
    assert deadline(side) == math.inf
    assert side.at(1000.0) == []


# --- requests


@pytest.mark.wire("W-RSP-12")
def test_a_request_that_is_not_answered_is_given_up():
    client = opened(client=True)
    client.open(deadline=5.0)
    client.open(deadline=5.0)
    client.open(deadline=6.0)
    client.sent()
    assert deadline(client) == 5.0
    client.receive(frames.response(3))
    assert client.at(4.99) == []
    (told,) = client.at(5.0)
    assert (told.stream_id, told.error_code, told.remote, told.unprocessed) == (1, Code.CANCEL, False, False)
    assert "did not answer" in told.why
    assert client.said() == ["RST_STREAM(stream=1 flags=0x0 0x8)"]
    assert deadline(client) == 6.0
    assert resets(client.at(6.0)) == [(5, Code.CANCEL)]
    assert list(client.engine.streams) == [3]
    assert deadline(client) == 10.0


def test_the_next_deadline_is_the_earliest():
    client = opened(client=True)
    client.open(deadline=9.0)
    client.open(deadline=3.0)
    assert deadline(client) == 3.0
    assert resets(client.at(3.0)) == [(3, Code.CANCEL)]
    assert deadline(client) == 9.0


@pytest.mark.wire("W-RSP-12")
def test_informational_answers_do_not_put_the_deadline_off():
    client = opened(client=True)
    client.open(deadline=5.0)
    client.receive(frames.response(1, 100), now=4.0)
    assert resets(client.at(5.0)) == [(1, Code.CANCEL)]


def test_several_are_given_up_at_once():
    client = opened(client=True)
    for _ in range(3):
        client.open(deadline=5.0)
    assert [type(e) for e in client.at(5.0)] == [StreamReset] * 3


@pytest.mark.wire("W-RSP-11")
def test_the_body_of_a_refusal_has_the_same_deadline():
    client = opened(client=True)
    client.open(deadline=5.0)
    client.receive(frames.response(1, 503) + frames.data(1, b"sorry, but "), now=1.0)
    client.sent()
    assert deadline(client) == 5.0
    assert client.at(5.0) == [StreamEnded(1)]
    assert client.said() == ["RST_STREAM(stream=1 flags=0x0 0x8)"]
    assert not client.engine.streams


@pytest.mark.parametrize("body", [frames.data(1, b"no", end=True), b""])
def test_a_refusal_that_has_ended_has_no_deadline(body):
    client = opened(client=True)
    client.open(deadline=5.0)
    client.receive(frames.response(1, 503, end_stream=not body) + body, now=1.0)
    assert deadline(client) == 10.0
    assert client.at(5.0) == []


def test_a_reset_takes_its_deadline_along():
    client = opened(client=True)
    client.open(deadline=5.0)
    client.open(deadline=5.0)
    client.open(deadline=5.0)
    client.reset(1, Code.CANCEL)
    client.receive(frames.rst(3))
    client.receive(frames.goaway(3))
    assert deadline(client) == 10.0
