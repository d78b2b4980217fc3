"""The bounds of `Limits`: as many as allowed are allowed, one more costs the session, and allowances come back."""

from __future__ import annotations

import itertools

import pytest
from support import frames
from support.engines import failure, only, opened, refusals, resets
from support.frames import Code, Kind, Setting

from hbone.errors import RemoteProtocolError
from hbone.protocol import Limits, RequestReceived, ResponseReceived, SessionFailed, WindowOpened

N = 50
RATE = 10
LIMITS = Limits(
    control_burst=N,
    control_per_second=RATE,
    early_reset_burst=N,
    early_reset_per_second=RATE,
    max_concurrent_streams=5,
    stream_window=65_535,
    connection_window=4 * 65_535,
    max_header_list_size=2000,
    max_header_block=4000,
)
LATE = 1000.0
"""When what the opening spent has come back."""


def calm(*, client=False, limits=LIMITS):
    """A side with all its allowances: streams 1 and 3 are open tunnels, 5 was ended both ways, 7 was reset by us."""
    side = opened(client=client, limits=limits)
    for stream_id in (1, 3, 5, 7):
        if client:
            side.open(deadline=1e9)
            side.receive(frames.response(stream_id))
        else:
            side.receive(frames.connect(stream_id, "10.0.0.7:80"))
            side.accept(stream_id)
    side.end(5)
    side.receive(frames.data(5, end=True) + frames.rst(5))  # the one that may have crossed our end
    side.reset(7, Code.CANCEL)
    side.sent()
    return side


def bound(side, raw, now=LATE, most=10_000):
    """How many times the bytes are taken before they cost the session."""
    for count in range(most):
        told = side.receive(raw(count) if callable(raw) else raw, now)
        if told and isinstance(told[-1], SessionFailed):
            error = failure(told)
            assert type(error) is RemoteProtocolError
            assert error.error_code == Code.ENHANCE_YOUR_CALM
            assert side.sent()[-1].code == Code.ENHANCE_YOUR_CALM
            return count
    return most


CONTROL = {
    "ping": frames.ping(),
    "ping_ack": frames.ping(ack=True),
    "settings": frames.settings(),
    "settings_with_values": frames.settings({Setting.INITIAL_WINDOW_SIZE: 1}),
    "settings_ack": frames.settings(ack=True),
    "goaway": frames.goaway(2**31 - 1),
    "priority": frames.priority(1),
    "priority_on_an_idle_stream": frames.priority(99),
    "unknown": frames.frame(0x42, 0, 0),
    "unknown_with_payload": frames.frame(0x42, 0, 0, bytes(100)),
    "empty_data": frames.data(1),
    "padding_only": frames.data(1, pad=0),
    "much_padding_only": frames.data(1, pad=255),
    "rst_of_an_ended_stream": frames.rst(5),
    "data_on_an_ended_stream": frames.data(5, b"x"),
    "empty_data_on_an_ended_stream": frames.data(5),
    "empty_data_on_a_reset_stream": frames.data(7),
    "headers_on_a_reset_stream": frames.headers(7, [("a", "b")]),
    "continuation": None,
}


@pytest.mark.wire("W-LIM-4", "W-ERR-2")
@pytest.mark.parametrize("client", [True, False], ids=["client", "server"])
@pytest.mark.parametrize("name", CONTROL)
def test_frames_that_carry_nothing(name, client):
    side = calm(client=client)
    raw = CONTROL[name]
    if name == "continuation":
        side.receive(frames.headers(9, b"", end_headers=False), LATE)
        raw = frames.continuation(9, b"")
    assert bound(side, raw) == N


@pytest.mark.wire("W-LIM-4")
@pytest.mark.parametrize("name", ["ping", "settings", "empty_data", "padding_only", "unknown"])
def test_the_allowance_comes_back_with_time(name):
    side = calm()
    raw = CONTROL[name]
    for _ in range(N):
        side.receive(raw, LATE)
    for second in range(1, 4):
        for _ in range(RATE):
            side.receive(raw, LATE + second)
    assert bound(side, raw, LATE + 3.5) == RATE // 2

    side = calm()
    for _ in range(N):
        side.receive(raw, LATE)
    assert bound(side, raw, LATE + 3600) == N, "never more than the burst"


def test_one_purse_for_all_of_them():
    side = calm()
    some = frames.ping() + frames.priority(1) + frames.data(1) + frames.settings() + frames.frame(0x42, 0, 0)
    assert bound(side, some) == N // 5


def test_data_that_carries_something_is_free():
    side = calm()
    stream = side.stream(1)
    for _ in range(3 * N):
        side.receive(frames.data(1, b"x") + frames.data(1, b"y", pad=3), LATE)
    assert not side.engine.closed
    assert stream.recv_window == 65_535 - 3 * N * (1 + 1 + 1 + 3)


@pytest.mark.wire("W-RST-8", "W-LIM-4")
def test_data_that_was_under_way_when_we_reset_is_free():
    """All that the peer had credit for, in frames as small as it likes; not a byte more."""
    side = calm()
    side.receive(frames.data(3, bytes(65_535 - 4 * N)), LATE)
    side.reset(3, Code.CANCEL)
    for _ in range(2 * N):
        assert side.receive(frames.data(3, b"xy"), LATE) == []
    assert bound(side, frames.data(3, b"x")) == N


def test_after_the_end_nothing_was_under_way():
    side = calm()
    side.receive(frames.data(3, end=True), LATE)
    side.reset(3, Code.CANCEL)
    assert bound(side, frames.data(3, b"x")) == N


@pytest.mark.wire("W-LIM-5")
def test_rapid_reset():
    """CVE-2023-44487: requests that their own sender takes back."""
    side = opened(client=False, limits=LIMITS)

    def raw(count):
        return frames.connect(2 * count + 1, "10.0.0.7:80") + frames.rst(2 * count + 1)

    assert bound(side, raw) == N


@pytest.mark.wire("W-LIM-5")
@pytest.mark.parametrize(
    "provocation",
    [
        lambda i: frames.window_update(i, 0),
        lambda i: frames.window_update(i, 2**31 - 1),
        lambda i: frames.frame(Kind.PRIORITY, 0, i, b"?"),
        lambda i: frames.data(i, end=True) + frames.data(i, b"x"),
        lambda i: frames.headers(i, [("a", "b")]),
        lambda i: frames.data(i, bytes(65_535)) + frames.data(i, b"x"),
    ],
    ids=["window_0", "overflow", "priority", "after_end", "trailers", "too_much"],
)
def test_resets_that_we_are_made_to_send(provocation):
    """CVE-2025-8671: the same, by provoking our RST_STREAM."""
    limits = Limits(early_reset_burst=N, stream_window=65_535, connection_window=4 * 65_535)
    side = opened(client=False, limits=limits)
    assert bound(side, lambda i: frames.connect(2 * i + 1, "10.0.0.7:80") + provocation(2 * i + 1)) == N


@pytest.mark.wire("W-LIM-5")
def test_malformed_requests():
    side = opened(client=False, limits=Limits(early_reset_burst=N, early_reset_per_second=RATE))
    assert bound(side, lambda i: frames.headers(2 * i + 1, [(":method", "CONNECT")])) == N


def test_requests_that_we_answer_by_ourselves():
    side = opened(client=False, limits=LIMITS)
    assert bound(side, lambda i: frames.connect(2 * i + 1, "nowhere")) == N


@pytest.mark.wire("W-LIM-5")
def test_the_allowance_of_resets_comes_back_with_time():
    side = opened(client=False, limits=LIMITS)
    ids = iter(range(1, 10_000, 2))

    def raw(_):
        i = next(ids)
        return frames.connect(i, "10.0.0.7:80") + frames.rst(i)

    for _ in range(N):
        side.receive(raw(0), LATE)
    assert bound(side, raw, LATE + 2) == 2 * RATE


@pytest.mark.wire("W-LIM-5")
def test_resets_after_the_answer_are_free():
    side = opened(client=False, limits=LIMITS)
    for i in range(1, 20 * N, 2):
        side.receive(frames.connect(i, "10.0.0.7:80"), LATE)
        side.accept(i)
        assert resets(side.receive(frames.rst(i), LATE)) == [(i, Code.CANCEL)]


def test_faults_inside_tunnels_are_counted_too():
    side = opened(client=False, limits=LIMITS)

    def raw(count):
        i = 2 * count + 1
        side.receive(frames.connect(i, "10.0.0.7:80"), LATE)
        side.accept(i)
        return frames.headers(i, [("trailer", "x")])

    assert bound(side, raw) == N


@pytest.mark.wire("W-RST-9", "W-LIM-4")
def test_requests_beyond_the_limit():
    side = opened(client=False, limits=LIMITS)
    for i in range(1, 11, 2):
        side.receive(frames.connect(i, "10.0.0.7:80"), LATE)
    assert len(side.engine.streams) == 5
    assert bound(side, lambda i: frames.connect(2 * i + 11, "10.0.0.7:80")) == N


def test_requests_while_we_drain():
    side = opened(client=False, limits=LIMITS)
    side.drain()
    assert bound(side, lambda i: frames.connect(2 * i + 1, "10.0.0.7:80")) == N


def test_informational_answers():
    side = opened(client=True, limits=LIMITS)
    side.open(deadline=1e9)
    assert bound(side, frames.response(1, 103)) == N
    side = opened(client=True, limits=LIMITS)
    side.open(deadline=1e9)
    side.receive(frames.response(1, 103) * N, LATE)
    assert only(side.receive(frames.response(1), LATE), ResponseReceived).response.status == 200


def test_malformed_answers():
    side = opened(client=True, limits=LIMITS, settings={Setting.MAX_CONCURRENT_STREAMS: 10_000})
    assert bound(side, lambda _: frames.headers(side.open(deadline=1e9), [])) == N


# --- WINDOW_UPDATE


@pytest.mark.wire("W-LIM-6")
@pytest.mark.parametrize("stream_id", [0, 1, 5], ids=["session", "stream", "ended"])
def test_window_updates_must_stand_for_data(stream_id):
    side = calm()
    assert bound(side, frames.window_update(stream_id, 1)) == 1000


@pytest.mark.wire("W-LIM-6")
def test_what_we_sent_explains_window_updates():
    side = calm()
    side.send(1, bytes(25_600))
    assert bound(side, frames.window_update(1, 1)) == 1000 + 100 + 2


@pytest.mark.wire("W-LIM-6")
def test_a_peer_that_gives_back_every_byte_by_itself_is_no_abuser():
    """Keystrokes, and a peer that gives credit for each small frame, to the stream and to the session."""
    side = calm()
    for _ in range(5000):
        assert side.send(1, b"k") == 1
        assert side.receive(frames.window_update(1, 1) + frames.window_update(0, 1), LATE) == []


def test_a_peer_of_tiny_windows_is_no_abuser():
    side = opened(client=True, settings={Setting.INITIAL_WINDOW_SIZE: 1})
    side.open()
    side.receive(frames.response(1))
    for _ in range(3000):
        assert side.send(1, b"long") == 1
        assert side.receive(frames.window_update(1, 1)) == [WindowOpened(1)]


# --- headers


def listed(size):
    """A request whose header list counts `size` bytes (RFC 9113 section 6.5.2)."""
    fixed = sum(len(n) + len(v) + 32 for n, v in frames.connect_headers("10.0.0.7:80"))
    return ("baggage", "x" * (size - fixed - len("baggage") - 32))


@pytest.mark.wire("W-LIM-1")
def test_a_header_list_as_large_as_announced():
    server = opened(client=False, limits=LIMITS)
    only(server.receive(frames.connect(1, "10.0.0.7:80", listed(2000))), RequestReceived)
    assert refusals(server.receive(frames.connect(3, "10.0.0.7:80", listed(2001)))) == [(3, 431)]
    assert list(server.engine.streams) == [1]


@pytest.mark.wire("W-LIM-1")
def test_a_header_list_that_grows_in_decoding():
    """An HPACK bomb: one entry of the table, referred to again and again."""
    limits = Limits(max_header_list_size=2000)
    entry = b"\x40\x01a" + bytes((127, 1000 - 127 - 128 & 0x7F | 0x80, 1000 - 127 >> 7)) + b"x" * 1000
    server = opened(client=False, limits=limits)
    good = frames.block(frames.connect_headers("10.0.0.7:80"))
    assert refusals(server.receive(frames.headers(1, good + entry + b"\xbe" * 6))) == [(1, 431)]
    assert failure(server.receive(frames.headers(3, good + b"\xbe" * 8))).error_code == Code.ENHANCE_YOUR_CALM


@pytest.mark.wire("W-LIM-2")
@pytest.mark.parametrize("pieces", [1, 2, 40])
def test_a_header_block_as_large_as_allowed(pieces):
    server = opened(client=False, limits=Limits(max_header_list_size=65_536, max_header_block=4000))
    for stream_id, size in ((1, 4000), (3, 4001)):
        block = frames.block([*frames.connect_headers("10.0.0.7:80"), ("baggage", "x" * (size - 53))])
        assert len(block) == size
        cuts = [len(block) * i // pieces for i in range(pieces + 1)]
        parts = [block[a:b] for a, b in itertools.pairwise(cuts)]
        raw = frames.headers(stream_id, parts[0], end_headers=pieces == 1)
        for i, part in enumerate(parts[1:], 2):
            raw += frames.continuation(stream_id, part, end_headers=i == pieces)
        told = server.receive(raw)
        if stream_id == 1:
            only(told, RequestReceived)
        else:
            assert failure(told).error_code == Code.ENHANCE_YOUR_CALM


@pytest.mark.wire("W-LIM-2")
def test_a_header_block_without_end_is_refused_by_the_header_of_the_frame_too_many():
    server = opened(client=False, limits=LIMITS)
    server.receive(frames.headers(1, bytes(3000), end_headers=False))
    assert failure(server.receive(frames.continuation(1, bytes(1001))[:9])).error_code == Code.ENHANCE_YOUR_CALM


# --- answers that nobody reads


@pytest.mark.wire("W-LIM-7")
def test_answers_that_pile_up():
    """A driver that cannot write leaves the answers with the engine."""
    limits = Limits(control_burst=10**6, max_unsent=17_000)
    server = opened(client=False, limits=limits)
    engine = server.engine
    assert engine.receive_untrusted(frames.ping() * 1000, 0.0) == []
    assert failure(engine.receive_untrusted(frames.ping(), 0.0)).error_code == Code.ENHANCE_YOUR_CALM


@pytest.mark.wire("W-LIM-7")
def test_refusals_that_pile_up():
    server = opened(client=False, limits=Limits(max_unsent=20_000)).engine
    for i in range(1, 10_000, 2):
        told = server.receive_untrusted(frames.connect(i, "10.0.0.7:80"), 0.0)
        if isinstance(told[-1], SessionFailed):
            break
        server.refuse(i, 401)
    assert failure(told).error_code == Code.ENHANCE_YOUR_CALM
    assert len(server.data_to_send()) < 20_300


@pytest.mark.parametrize("name", ["control_burst", "control_per_second", "early_reset_burst", "early_reset_per_second"])
def test_limits_that_no_session_could_live_with(name):
    with pytest.raises(ValueError, match=name):
        Limits(**{name: 0})
    Limits(**{name: 1})


def test_limits_outside_the_rfc():
    for name, value in (
        ("stream_window", 65_534),
        ("stream_window", 2**31),
        ("connection_window", 65_534),
        ("connection_window", 2**31),
        ("max_frame_size", 2**14 - 1),
        ("max_frame_size", 2**24),
        ("max_concurrent_streams", 0),
        ("max_header_list_size", 1023),
        ("max_header_block", 1023),
        ("max_unsent", 2**14 - 1),
    ):
        with pytest.raises(ValueError, match=r"must be|needs at least"):
            Limits(**{name: value})
    Limits(stream_window=65_535, connection_window=2**31 - 1, max_frame_size=2**14, max_concurrent_streams=1)


def test_resets_are_remembered_to_a_bound():
    server = opened(client=False)
    for i in range(1, 4000, 2):
        server.receive(frames.connect(i, "10.0.0.7:80"), LATE)
        server.refuse(i, 503)
    assert len(server.engine._resets) == 1000
    assert server.receive(frames.data(3999, b"x"), LATE) == []
    server.sent()
    server.receive(frames.data(1, b"x"), LATE)
    assert server.said() == ["RST_STREAM(stream=1 flags=0x0 0x5)"]
