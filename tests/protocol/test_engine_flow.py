"""Flow control: both windows obeyed and enforced, credit given back, once and exactly."""

from __future__ import annotations

import pytest
from support import frames
from support.engines import Pair, failure, opened, resets
from support.frames import Code, Kind, Setting

from hbone.protocol import DataReceived, Limits, SettingsReceived, StreamEnded, WindowOpened

SMALL = Limits(stream_window=65_535, connection_window=4 * 65_535)
STEP = 65_535 // 4


def serving(*ids, limits=SMALL, settings=None):
    """A server with open tunnels."""
    server = opened(client=False, limits=limits, settings=settings)
    for stream_id in ids:
        server.receive(frames.connect(stream_id, "10.0.0.7:80"))
        server.accept(stream_id)
    server.sent()
    return server


def credits_of(side):
    """(stream, increment) of the WINDOW_UPDATEs sent since the last time."""
    return [(f.stream, f.increment) for f in side.sent() if f.kind == Kind.WINDOW_UPDATE]


# --- what we may send


@pytest.mark.wire("W-FLOW-5")
def test_no_more_is_sent_than_the_smaller_window():
    server = serving(1, 3, settings={Setting.INITIAL_WINDOW_SIZE: 40_000})
    assert server.send(1, bytes(50_000)) == 40_000
    assert server.send(1, b"x") == 0
    assert server.send(3, bytes(50_000)) == 25_535
    assert server.send(3, b"x") == 0
    assert server.engine.send_window == 0
    assert [len(f.payload) for f in server.sent()] == [16_384, 16_384, 7_232, 16_384, 9_151]


@pytest.mark.wire("W-FLOW-5")
def test_a_window_that_opens_is_told_once_and_where():
    server = serving(1, 3, settings={Setting.INITIAL_WINDOW_SIZE: 40_000})
    server.send(1, bytes(40_000))
    assert server.receive(frames.window_update(3, 5)) == [], "it was open"
    assert server.receive(frames.window_update(1, 5)) == [WindowOpened(1)]
    assert server.receive(frames.window_update(1, 5)) == []
    assert server.send(1, bytes(20)) == 10
    server.send(3, bytes(30_000))
    assert server.engine.send_window == 0
    assert server.receive(frames.window_update(0, 7)) == [WindowOpened(0)]
    assert server.receive(frames.window_update(0, 7)) == []
    assert server.send(3, bytes(100)) == 14


@pytest.mark.wire("W-SET-4", "W-FLOW-5")
def test_settings_can_make_a_window_negative():
    server = serving(1)
    server.send(1, bytes(60_000))
    server.receive(frames.settings({Setting.INITIAL_WINDOW_SIZE: 10_000}))
    assert server.stream(1).send_window == 10_000 - 60_000
    assert server.send(1, b"x") == 0
    assert server.receive(frames.window_update(1, 50_000)) == [], "0 is not open"
    assert server.receive(frames.window_update(1, 1)) == [WindowOpened(1)]
    assert server.send(1, b"xy") == 1
    told = server.receive(frames.settings({Setting.INITIAL_WINDOW_SIZE: 10_001}))
    assert told == [WindowOpened(1), SettingsReceived(False)]


@pytest.mark.wire("W-FLOW-6")
def test_windows_may_be_as_large_as_they_get():
    server = serving(1)
    most = 2**31 - 1 - 65_535
    assert server.receive(frames.window_update(0, most) + frames.window_update(1, most)) == []
    assert server.engine.send_window == server.stream(1).send_window == 2**31 - 1
    assert resets(server.receive(frames.window_update(1, 1))) == [(1, Code.FLOW_CONTROL_ERROR)]
    assert failure(server.receive(frames.window_update(0, 1))).error_code == Code.FLOW_CONTROL_ERROR


def test_credit_that_nobody_wants_is_not_taken():
    server = serving(1)
    assert server.credit(1, 0) == 0
    assert server.engine.send_window == 65_535


# --- what the peer may send


@pytest.mark.wire("W-FLOW-2", "W-FLOW-3", "W-LIM-8")
def test_the_session_s_credit_comes_back_on_arrival_the_tunnel_s_on_consumption():
    server = serving(1, 3)
    told = []
    for _ in range(4):
        told += server.receive(frames.data(1, bytes(16_383)))
    assert sum(len(e.data) for e in told) == 65_532
    assert credits_of(server) == []
    server.receive(frames.data(1, b"end"))
    assert credits_of(server) == [(0, 65_535)]
    assert server.consume(1, STEP - 1) is False
    assert server.consume(1, 1) is True
    assert credits_of(server) == [(1, STEP)]
    assert server.stream(1).recv_window == STEP


@pytest.mark.wire("W-FLOW-1", "W-FLOW-2", "W-LIM-8")
def test_tunnels_that_nobody_reads_stop_only_themselves():
    stalled = range(1, 41, 2)
    server = serving(*stalled, 41)
    for stream_id in stalled:
        for _ in range(5):
            server.receive(frames.data(stream_id, bytes(13_107)))
        assert server.stream(stream_id).recv_window == 0
    server.sent()
    for _ in range(100):
        assert server.receive(frames.data(41, bytes(13_107))) == [DataReceived(41, bytes(13_107))]
        server.consume(41, 13_107)
    assert {s for s, _ in credits_of(server)} == {0, 41}


@pytest.mark.wire("W-FLOW-6", "W-LIM-8")
def test_the_window_of_the_session_is_exact():
    limits = Limits(stream_window=65_535, connection_window=65_535, max_frame_size=2**20)
    server = serving(1, limits=limits)
    server.receive(frames.data(1, bytes(65_535)))
    assert credits_of(server) == [(0, 65_535)]
    # a frame longer than the whole window is too much however fast credit comes back
    assert failure(server.receive(frames.data(1, bytes(65_536))[:9])).error_code == Code.FLOW_CONTROL_ERROR


@pytest.mark.wire("W-FLOW-6")
def test_the_window_of_a_tunnel_is_exact():
    server = serving(1, 3)
    assert server.receive(frames.data(1, bytes(65_535), end=True))[-1] == StreamEnded(1)
    assert resets(server.receive(frames.data(3, bytes(65_536)))) == [(3, Code.FLOW_CONTROL_ERROR)]


@pytest.mark.wire("W-FLOW-4")
@pytest.mark.parametrize("pad", [0, 1, 254, 255])
@pytest.mark.parametrize("size", [0, 1, 1000])
def test_padding_is_given_back_in_full(pad, size):
    """For ever: more than a hundred windows' worth of padding goes through."""
    server = serving(1)
    length = size + pad + 1
    got = returned = told = 0
    data = frames.data(1, bytes(size), pad=pad)
    rounds = min(200, 100 * 65_535 // length)
    for now in range(rounds):
        for event in server.receive(data, now=float(now)):
            got += len(event.data)
            server.consume(1, len(event.data))
        for stream_id, increment in credits_of(server):
            told += increment if stream_id == 0 else 0
            returned += increment if stream_id == 1 else 0
    assert got == rounds * size
    assert returned + server.stream(1).unacknowledged == rounds * length
    assert server.stream(1).recv_window == 65_535 - server.stream(1).unacknowledged
    assert rounds * length - told < SMALL.connection_window // 4


def test_a_padded_frame_may_end_the_stream():
    server = serving(1, 3)
    assert server.receive(frames.data(1, b"x", end=True, pad=200)) == [DataReceived(1, b"x"), StreamEnded(1)]
    assert server.receive(frames.data(3, b"", end=True, pad=0)) == [StreamEnded(3)]


@pytest.mark.wire("W-FLOW-9")
def test_data_of_dead_streams_counts_for_the_session():
    server = serving(1)
    server.reset(1, Code.CANCEL)
    server.sent()
    for _ in range(5):
        assert server.receive(frames.data(1, bytes(16_000), pad=100)) == []
    assert credits_of(server) == [(0, 5 * 16_101)]


def test_no_credit_for_a_stream_that_has_ended():
    server = serving(1, 3)
    stream = server.stream(3)
    server.receive(frames.data(1, bytes(60_000), end=True) + frames.data(3, bytes(60_000)))
    server.reset(3, Code.CANCEL)
    server.sent()
    assert server.consume(1, 60_000) is False
    assert [engine.consumed(stream, 60_000) for engine in server.engines] == [False] * 3
    assert server.said() == []


@pytest.mark.wire("W-DATA-1", "W-FLOW-3")
def test_a_transfer_many_times_the_windows():
    pair = Pair(client_limits=SMALL, server_limits=SMALL)
    pair.exchange()
    stream_id = pair.tunnel()
    payload = bytes(range(256)) * 2048  # 512 KiB, with windows of 64
    at, got = 0, b""
    while len(got) < len(payload):
        at += pair.client.send(stream_id, payload[at : at + 30_000])
        _, told = pair.exchange()
        for event in told:
            if isinstance(event, DataReceived):
                got += event.data
                pair.server.consume(stream_id, len(event.data))
    assert got == payload
    pair.exchange()
    assert pair.client.stream(stream_id).send_window + pair.server.stream(stream_id).unacknowledged == 65_535
    updates = [f for f in pair.server.log if f.kind == Kind.WINDOW_UPDATE and f.stream]
    assert len(updates) <= len(payload) // STEP
