"""Whatever a peer sends: the engine answers by events, a broken session is a `RemoteProtocolError`, memory is bounded.

Nothing here catches anything: an exception of any kind out of `receive_untrusted` or a parser fails the test. The bytes
come from four sources, from blind to sly: arbitrary ones, valid sessions that were changed in places, frames with a
right header and any content, and valid frames in any order. Each is fed whole and in pieces, which must tell the same.

``nox -s fuzz`` runs this with many more examples.
"""

from __future__ import annotations

import contextlib
import random
import struct

import hpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support import frames
from support.engines import merged, streams_of
from support.frames import Setting

from hbone.address import parse_authority_untrusted
from hbone.errors import RemoteProtocolError, SessionClosed
from hbone.protocol import (
    Baggage,
    ConnectRequest,
    ConnectResponse,
    Engine,
    Event,
    Forwarded,
    Limits,
    MalformedRequest,
    RequestReceived,
    ResponseReceived,
    SessionFailed,
    TraceParent,
)
from hbone.protocol._headers import connect_request_untrusted, connect_response_untrusted
from hbone.protocol._proxy_protocol import ProxyHeader

# Small enough for the fuzzer to reach every bound.
LIMITS = Limits(
    stream_window=65_535,
    connection_window=65_535,
    max_frame_size=16_384,
    max_concurrent_streams=3,
    max_header_list_size=1024,
    max_header_block=2048,
    control_burst=30,
    early_reset_burst=10,
)
MOST_OUTPUT = 16_384
"""What a peer can make the engine say at a time: some 40 bytes for each of its allowances, and a few answers."""

# --- frames of any kind

stream_ids = st.one_of(st.integers(0, 9), st.integers(0, 2**32 - 1), st.sampled_from([2**31 - 1, 2**31, 2**31 + 1]))
small = st.integers(0, 300)
words = st.one_of(st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 65_535, 2**31 - 1, 2**31, 16_384, 2**24 - 1]))
codes = st.one_of(st.integers(0, 14), words)
flags = st.integers(0, 255)
texts = st.one_of(
    st.sampled_from([b"", b"x", b"CONNECT", b"10.0.0.7:80", b"200", b"103", b"503", b"trailers", b"5", b"GET", b"/"]),
    st.binary(max_size=40),
)
names = st.one_of(
    st.sampled_from(
        [
            b":method",
            b":authority",
            b":status",
            b":path",
            b":scheme",
            b":protocol",
            b"host",
            b"te",
            b"content-length",
            b"connection",
            b"baggage",
            b"Upper",
        ]
    ),
    st.binary(max_size=12),
)
fields = st.lists(st.tuples(names, texts), max_size=6)
requests = st.builds(lambda more: frames.connect_headers("10.0.0.7:80", *more), fields)
statuses = st.sampled_from([100, 200, 204, 503])
answers = st.builds(lambda status, more: [(":status", str(status)), *more], statuses, fields)
lists = st.one_of(requests, answers, fields)
compressed = st.builds(lambda f, huffman: hpack.Encoder().encode(f, huffman=huffman), lists, st.booleans())
blocks = st.one_of(lists.map(frames.block), compressed, st.binary(max_size=60))
pads = st.none() | st.integers(0, 255)


def _split(stream: int, block: bytes, at: int, end_stream: bool, finished: bool) -> bytes:
    """HEADERS and one CONTINUATION."""
    at = min(at, len(block))
    first = frames.headers(stream, block[:at], end_stream=end_stream, end_headers=False)
    return first + frames.continuation(stream, block[at:], end_headers=finished)


valid_frames = st.one_of(
    st.builds(frames.data, stream_ids, st.binary(max_size=50), end=st.booleans(), pad=pads),
    st.builds(frames.data, stream_ids, st.integers(0, 16_384).map(bytes)),
    st.builds(frames.headers, stream_ids, blocks, end_stream=st.booleans(), pad=pads),
    st.builds(frames.headers, stream_ids, blocks, priority=st.binary(min_size=5, max_size=5)),
    st.builds(_split, stream_ids, blocks, small, st.booleans(), st.booleans()),
    st.builds(frames.rst, stream_ids, codes),
    st.builds(frames.window_update, stream_ids, words),
    st.builds(frames.settings, st.lists(st.tuples(st.integers(0, 9), words), max_size=5)),
    st.builds(frames.settings, ack=st.booleans()),
    st.builds(frames.ping, st.binary(min_size=8, max_size=8), ack=st.booleans()),
    st.builds(frames.ping, st.sampled_from([b"hbone-ka", b"hbone-dr"]), ack=st.booleans()),
    st.builds(frames.goaway, stream_ids, codes, st.binary(max_size=30)),
    st.builds(frames.priority, stream_ids),
    st.builds(frames.connect, st.integers(0, 6).map(lambda n: 2 * n + 1), st.just("10.0.0.7:80")),
    st.builds(frames.response, st.integers(0, 6).map(lambda n: 2 * n + 1), st.sampled_from([100, 200, 503])),
)
any_frames = st.builds(
    frames.frame,
    st.integers(0, 12),
    flags,
    stream_ids,
    st.binary(max_size=60),
    length=st.none() | st.integers(0, 20_000),
)
sessions = st.lists(st.one_of(valid_frames, valid_frames, any_frames), max_size=25).map(b"".join)


# --- feeding


def begun(client: bool) -> Engine:
    """An engine with some life in it: the client has asked for two tunnels, one of which it gave up."""
    engine = Engine(client=client, limits=LIMITS, now=0)
    engine.receive_untrusted((b"" if client else frames.PREFACE) + frames.settings({Setting.MAX_FRAME_SIZE: 20_000}), 0)
    if client:
        for _ in range(3):
            engine.open_stream(ConnectRequest.build("10.0.0.7:80"), deadline=5.0)
        engine.receive_untrusted(frames.response(1), 0)
        engine.reset(5, 8)
    engine.data_to_send()
    return engine


class Driver:
    """What a driver does with events, in its simplest form: grant, send, consume, end."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.engine = engine
        self.random = random.Random(seed)
        self.unconsumed: dict[int, int] = {}
        self.events: list[Event] = []
        self.failed = False
        self.longest = 0

    def feed(self, data: bytes, now: float) -> None:
        """One delivery, and the reaction to it, which depends on nothing but what was told."""
        self.hear(self.engine.receive_untrusted(data, now))

    def hear(self, events: list[Event]) -> None:
        assert not (self.failed and events), "told something after the end"
        for index, event in enumerate(events):
            if isinstance(event, SessionFailed):
                assert index == len(events) - 1
                assert type(event.error) in (RemoteProtocolError, SessionClosed)
                assert self.engine.closed
                self.failed = True
        self.events += merged(events)
        self.collect()

    def collect(self) -> None:
        out = self.engine.data_to_send()
        assert len(out) <= MOST_OUTPUT
        self.longest = max(self.longest, len(out))
        assert len(self.engine._tail) <= LIMITS.max_frame_size + 9
        assert len(self.engine.streams) <= LIMITS.max_concurrent_streams

    def react(self) -> None:
        """Do something to each live stream."""
        engine = self.engine
        for stream in list(engine.streams.values()):
            what = self.random.randrange(8)
            if not stream.answered and not engine._client:
                if what < 4:
                    engine.accept(stream.id)
                elif what < 6:
                    engine.refuse(stream.id, 503)
            elif what == 0:
                engine.reset(stream.id, 8)
            elif what == 1 and not stream.local_ended:
                engine.end_stream(stream.id)
            elif what < 5 and stream.answered and not stream.local_ended:
                engine.take_credit(stream, self.random.choice((1, 1000, 70_000)))
            elif what < 7:
                engine.consumed(stream, self.random.randrange(0, 20_000))
        self.collect()


def judge(client: bool, raw: bytes, cuts: list[int], *, fresh: bool = False) -> None:
    """Feed the bytes whole and in pieces: the same is told, and nothing else than events comes of it."""
    whole = Driver(Engine(client=client, limits=LIMITS, now=0) if fresh else begun(client), 0)
    pieces = Driver(Engine(client=client, limits=LIMITS, now=0) if fresh else begun(client), 0)
    whole.collect()
    pieces.collect()
    whole.feed(raw, 1.0)
    at = 0
    for size in [*cuts, len(raw)]:
        pieces.feed(raw[at : at + size], 1.0)
        at += size
    told = [merged(driver.events) for driver in (whole, pieces)]
    for events in told:
        if events and isinstance(events[-1], SessionFailed):
            error = events.pop().error
            assert isinstance(error, RemoteProtocolError)
            events.append(error.error_code)
    assert told[0] == told[1]
    assert streams_of(whole.engine) == streams_of(pieces.engine)


sides = st.booleans()
cut_lists = st.lists(st.integers(0, 40), max_size=40)


# --- the engine


@given(client=sides, raw=st.binary(max_size=400), cuts=cut_lists, opening=st.booleans())
@example(client=True, raw=b"HTTP/1.1 400 Bad Request\r\n\r\n", cuts=[], opening=False)
@example(client=False, raw=b"GET / HTTP/1.1\r\n\r\n", cuts=[], opening=False)
@example(client=False, raw=b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", cuts=[], opening=False)
def test_arbitrary_bytes(client: bool, raw: bytes, cuts: list[int], opening: bool) -> None:
    judge(client, (b"" if client or not opening else frames.PREFACE) + raw, cuts, fresh=True)
    judge(client, raw, cuts)


@given(client=sides, raw=sessions, cuts=cut_lists)
def test_frames_in_any_order(client: bool, raw: bytes, cuts: list[int]) -> None:
    judge(client, raw, cuts)
    judge(client, (b"" if client else frames.PREFACE) + raw, cuts, fresh=True)


@given(client=sides, deliveries=st.lists(sessions, max_size=8), seed=st.integers(0, 2**32), step=st.floats(0, 12))
def test_with_a_driver_that_reacts(client: bool, deliveries: list[bytes], seed: int, step: float) -> None:
    """Answers, ends, resets and deadlines between the deliveries."""
    driver = Driver(begun(client), seed)
    now = 0.0
    for raw in deliveries:
        now += step
        driver.feed(raw, now)
        driver.react()
        if driver.engine.next_deadline() <= now:
            driver.hear(driver.engine.on_deadline(now))
    if driver.failed:
        assert not driver.engine.streams
    else:
        assert driver.engine.next_deadline() > now


GOOD = {
    False: frames.settings(ack=True)
    + frames.connect(1, "10.0.0.7:80", ("baggage", "k8s.namespace.name=shop"), ("forwarded", 'for="10.0.0.1:40000"'))
    + frames.data(1, b"hello, this is data", pad=5)
    + frames.window_update(1, 1000)
    + frames.ping()
    + frames.headers(3, hpack.Encoder().encode(frames.connect_headers("[ff06::c3]:8080"), huffman=True))
    + frames.settings({Setting.INITIAL_WINDOW_SIZE: 100_000, Setting.MAX_FRAME_SIZE: 20_000})
    + frames.data(3, b"more", end=True)
    + frames.rst(1)
    + frames.goaway(0),
    True: frames.settings(ack=True)
    + frames.response(3, 103, ("link", "x"))
    + frames.response(3, 200, ("date", "today"))
    + frames.data(1, b"hello, this is data", pad=5)
    + frames.data(3, b"more of it", end=True)
    + frames.window_update(0, 1000)
    + frames.ping()
    + frames.ping(b"hbone-ka", ack=True)
    + frames.data(1, b"the end", end=True)
    + frames.goaway(5),
}


@given(
    client=sides,
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 3), st.integers(0, 255)), max_size=6),
    cuts=cut_lists,
)
def test_valid_sessions_that_were_changed_in_places(
    client: bool, changes: list[tuple[int, int, int]], cuts: list[int]
) -> None:
    raw = bytearray(GOOD[client])
    for at, how, value in changes:
        at %= len(raw) or 1
        if how == 0:
            raw[at : at + 1] = bytes([value])
        elif how == 1:
            raw[at:at] = bytes([value])
        elif how == 2:
            del raw[at : at + 1 + value % 12]
        else:
            raw[at:at] = raw[at : at + value]
    judge(client, bytes(raw), cuts)


def test_the_valid_sessions_are_valid() -> None:
    for client, raw in GOOD.items():
        driver = Driver(begun(client), 0)
        driver.feed(raw, 0.0)
        assert not driver.failed, driver.events[-1]
        kinds = {type(e) for e in driver.events}
        assert (ResponseReceived if client else RequestReceived) in kinds


# --- what no peer can make grow


FLOODS = {
    "ping": frames.ping(),
    "settings": frames.settings([(Setting.INITIAL_WINDOW_SIZE, i % 2) for i in range(2000)]),
    "unknown": frames.frame(0x42),
    "data": frames.data(1, b"x"),
    "data_on_a_dead_stream": frames.data(5, b"x"),
    "priority": frames.priority(1),
    "window_update": frames.window_update(0, 1),
}


@pytest.mark.wire("W-LIM-7")
@pytest.mark.parametrize("client", [True, False])
@pytest.mark.parametrize("name", FLOODS)
def test_one_read_full_of_the_same(name: str, client: bool) -> None:
    """With the limits as they are by default."""
    engine = Engine(client=client, now=0)
    engine.receive_untrusted((b"" if client else frames.PREFACE) + frames.settings(), 0)
    for stream_id in (1, 3, 5):
        if client:
            engine.open_stream(ConnectRequest.build("10.0.0.7:80"), deadline=5.0)
            engine.receive_untrusted(frames.response(stream_id), 0)
        else:
            engine.receive_untrusted(frames.connect(stream_id, "10.0.0.7:80"), 0)
            engine.accept(stream_id)
    engine.reset(5, 8)
    engine.data_to_send()
    raw = FLOODS[name] * (2**20 // len(FLOODS[name]))
    events = engine.receive_untrusted(raw, 0)
    assert len(engine.data_to_send()) < 64_000
    if not name.startswith("data"):
        assert len(events) < 5000


# --- header lists and values

header_lists = st.lists(st.tuples(names, texts), max_size=8)


@given(header_lists)
def test_request_lists(headers: list[tuple[bytes, bytes]]) -> None:
    try:
        request = connect_request_untrusted(headers)
    except MalformedRequest:
        return
    assert request.target.port
    read_all(request)
    assert connect_request_untrusted(request.encode()) == request


@given(fields)
def test_what_a_good_request_says_besides(more: list[tuple[bytes, bytes]]) -> None:
    headers = [(b":method", b"CONNECT"), (b":authority", b"10.0.0.7:80"), *more]
    try:
        request = connect_request_untrusted(headers)
    except MalformedRequest:
        return
    read_all(request)


@given(st.sampled_from([b"baggage", b"forwarded", b"traceparent", b"x-forwarded-network"]), st.binary(max_size=80))
def test_values_of_the_fields_that_mean_something(name: bytes, value: bytes) -> None:
    read_all(ConnectRequest("10.0.0.7:80", ((name, value),)))
    ConnectResponse(200, ((name, value),)).baggage.encode()


def read_all(request: ConnectRequest) -> None:
    """All values that a request has; unreadable ones are None or empty, and what is readable can be written."""
    Baggage.encode(request.baggage)
    for value in (request.forwarded, request.traceparent):
        if value is not None:
            value.encode()
    request.crossed_networks(request.forwarded_network or "")


@given(header_lists)
def test_response_lists(headers: list[tuple[bytes, bytes]]) -> None:
    try:
        response = connect_response_untrusted(headers)
    except RemoteProtocolError:
        return
    assert 100 <= response.status <= 999
    assert connect_response_untrusted(response.encode()) == response


@given(st.one_of(st.binary(max_size=60), st.text(max_size=60), st.from_regex(r"[\[\]0-9a-f:.%@-]{0,30}:[0-9]{0,6}")))
def test_authorities(text: bytes | str) -> None:
    try:
        authority = parse_authority_untrusted(text)
    except RemoteProtocolError:
        return
    assert 1 <= authority.port <= 65_535
    assert parse_authority_untrusted(str(authority)) == authority


@given(
    st.one_of(
        st.binary(max_size=120), st.text('0123456789abcdefABCDEF;=,-": .[]khost%for', max_size=60).map(str.encode)
    )
)
def test_values(value: bytes) -> None:
    for parse in (Forwarded.parse_untrusted, TraceParent.parse_untrusted):
        got = parse(value)
        if got is not None:
            assert parse(got.encode()) == got
    Baggage.parse_untrusted([value, value]).encode()


SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"


@given(
    st.one_of(
        st.binary(max_size=100),
        st.binary(max_size=100).map(lambda b: SIGNATURE + b),
        st.builds(
            lambda command, family, body, length: (
                SIGNATURE + struct.pack(">BBH", command, family, len(body) if length is None else length) + body
            ),
            st.sampled_from([0x20, 0x21, 0x11, 0x22]),
            st.sampled_from([0x00, 0x11, 0x21, 0x12, 0x31]),
            st.binary(max_size=80),
            st.none() | st.integers(0, 5000),
        ),
    )
)
def test_proxy_headers(raw: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        ProxyHeader.parse_untrusted(raw)
