"""Two engines on a wire that loses nothing but cuts and delays as it likes, doing whatever sessions do, in any order.

Whatever happens: no side breaks the session, every byte arrives in order, and at every moment of quiet both agree on
which streams there are and no credit is lost: what the sender may still send, what the receiver has and what it will
give back add up to the window that was announced.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support import frames
from support.engines import REQUEST
from support.frames import Setting

from hbone.protocol import (
    DataReceived,
    Engine,
    InvalidRequest,
    Limits,
    RequestReceived,
    ResponseReceived,
    SessionFailed,
    StreamEnded,
    StreamReset,
    WindowOpened,
)

WINDOW = 70_000
SESSION = 150_000
LIMITS = Limits(
    stream_window=WINDOW,
    connection_window=SESSION,
    max_frame_size=30_000,
    max_concurrent_streams=4,
    # honest sides: what costs allowance is tested elsewhere
    control_burst=10**6,
    early_reset_burst=10**6,
)
PATTERN = random.Random(1).randbytes(WINDOW) * 2

seeds = st.integers(0, 2**32)
sizes = st.one_of(st.integers(1, 40), st.integers(1, WINDOW), st.just(WINDOW))


def payload(stream_id: int, client: bool, at: int, size: int) -> bytes:
    """What is sent, from `at` on: different for each stream and direction, and nowhere periodic in a short time."""
    start = (at + 31 * stream_id + 17 * client) % WINDOW
    return PATTERN[start : start + size]


class End:
    """One side: an engine, the bytes that travel to it, and what its application knows."""

    def __init__(self, client: bool) -> None:
        self.client = client
        self.engine = Engine(client=client, limits=LIMITS, now=0, ping_interval=7.0, ping_timeout=1e9)
        self.wire = bytearray()
        self.sent: dict[int, int] = {}
        self.received: dict[int, int] = {}
        self.unconsumed: dict[int, int] = {}
        self.ended: set[int] = set()
        self.reset: set[int] = set()
        self.answered: set[int] = set()
        self.requests: list[int] = []
        self.peer_window = WINDOW
        """The INITIAL_WINDOW_SIZE that the peer announced last, as far as it has arrived."""
        self.announced = WINDOW
        self.blocked: set[int] = set()
        """Streams that got no credit and wait for WindowOpened."""


class Sessions(RuleBasedStateMachine):
    @initialize(seed=seeds, tunnels=st.integers(0, 4))
    def begin(self, seed: int, tunnels: int) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.client, self.server = End(True), End(False)
        self.settle()
        for _ in range(tunnels):
            self.tunnel()

    def other(self, end: End) -> End:
        return self.server if end is self.client else self.client

    def end_of(self, client: bool) -> End:
        return self.client if client else self.server

    # --- the wire

    def flush(self, end: End, extra: bytes = b"") -> None:
        self.other(end).wire += end.engine.data_to_send() + extra

    def deliver(self, end: End, size: int) -> None:
        piece = bytes(end.wire[:size])
        del end.wire[:size]
        for event in end.engine.receive_untrusted(piece, self.now):
            self.hear(end, event)
        self.flush(end)

    def hear(self, end: End, event: object) -> None:
        match event:
            case DataReceived(stream_id, data):
                at = end.received.get(stream_id, 0)
                assert stream_id not in end.ended
                assert bytes(data) == payload(stream_id, not end.client, at, len(data))
                end.received[stream_id] = at + len(data)
                end.unconsumed[stream_id] = end.unconsumed.get(stream_id, 0) + len(data)
            case StreamEnded(stream_id):
                end.ended.add(stream_id)
                other = self.other(end)
                assert end.received.get(stream_id, 0) == other.sent.get(stream_id, 0), "an end in the wrong place"
            case StreamReset(stream_id):
                assert stream_id not in end.reset
                end.reset.add(stream_id)
            case RequestReceived(stream_id, request):
                assert request == REQUEST
                end.requests.append(stream_id)
            case ResponseReceived(stream_id):
                assert stream_id not in end.answered
                end.answered.add(stream_id)
            case WindowOpened(0):
                end.blocked.clear()
            case WindowOpened(stream_id):
                end.blocked.discard(stream_id)
            case SessionFailed(error):
                raise AssertionError(f"the session failed: {error}")
            case InvalidRequest():
                raise AssertionError("an honest request was refused")

    def settle(self) -> None:
        """Until nothing is under way any more."""
        for end in (self.client, self.server):
            self.flush(end)
        while self.client.wire or self.server.wire:
            for end in (self.client, self.server):
                while end.wire:
                    self.deliver(end, self.random.choice((1, 5, 9, 10, 100, 5000, 100_000)))
        for end in (self.client, self.server):
            end.peer_window = self.other(end).announced

    @rule(client=st.booleans(), size=sizes)
    def some_bytes_arrive(self, client: bool, size: int) -> None:
        self.deliver(self.end_of(client), size)

    @rule(client=st.booleans(), pieces=st.lists(st.integers(1, 12), min_size=1, max_size=20))
    def bytes_arrive_in_crumbs(self, client: bool, pieces: list[int]) -> None:
        for size in pieces:
            self.deliver(self.end_of(client), size)

    @rule()
    def all_arrives(self) -> None:
        self.settle()
        assert sorted(self.client.engine.streams) == sorted(self.server.engine.streams)
        for sender, receiver in ((self.client, self.server), (self.server, self.client)):
            assert sender.engine.send_window + receiver.engine._unacknowledged == SESSION
            assert receiver.engine._recv_window + receiver.engine._unacknowledged == SESSION
            for stream_id, here in receiver.engine.streams.items():
                there = sender.engine.streams[stream_id]
                kept = receiver.unconsumed.get(stream_id, 0) + here.unacknowledged
                assert here.recv_window + kept == WINDOW
                assert there.send_window + kept == sender.peer_window
                credit = min(there.send_window, sender.engine.send_window)
                assert credit <= 0 or stream_id not in sender.blocked, "nobody told it to go on"
                assert (here.remote_ended, here.local_ended) == (there.local_ended, there.remote_ended)
                assert receiver.received.get(stream_id, 0) == sender.sent.get(stream_id, 0)

    # --- what applications do

    def choose(self, number: int, ids: list[int]) -> int | None:
        return ids[number % len(ids)] if ids else None

    @rule()
    def tunnel(self) -> None:
        """A tunnel without any delay, so that most of the steps find one."""
        self.settle()
        self.open(1e9)
        self.settle()
        self.answer(0, 1)
        self.settle()

    @rule(patience=st.sampled_from([3.0, 1e9]))
    def open(self, patience: float) -> None:
        if self.client.engine.available_streams:
            self.client.engine.open_stream(REQUEST, deadline=self.now + patience)
            self.flush(self.client)

    @rule(number=seeds, granted=st.integers(0, 3))
    def answer(self, number: int, granted: int) -> None:
        waiting = [i for i in self.server.requests if i in self.server.engine.streams]
        stream_id = self.choose(number, waiting)
        if stream_id is not None:
            self.server.requests.remove(stream_id)
            if granted:
                self.server.engine.accept(stream_id, [(b"baggage", b"a=b")])
            else:
                self.server.engine.refuse(stream_id, 503)
            self.flush(self.server)

    def sendable(self, end: End) -> list[int]:
        return [i for i, s in end.engine.streams.items() if s.answered and not s.local_ended]

    @rule(client=st.booleans(), number=seeds, size=sizes, frame_size=sizes, pad=st.none() | st.integers(0, 255))
    def send(self, client: bool, number: int, size: int, frame_size: int, pad: int | None) -> None:
        end = self.end_of(client)
        stream_id = self.choose(number, self.sendable(end))
        if stream_id is None:
            return
        stream = end.engine.streams[stream_id]
        extra = 0 if pad is None else pad + 1
        largest = min(max(frame_size, size // 20), end.engine.max_frame_size - extra)
        credit = end.engine.take_credit(stream, size + extra)
        if not credit:
            end.blocked.add(stream_id)
        if credit and credit <= extra:
            pad, extra = credit - 1, credit
        out = bytearray()
        while credit > 0:
            take = min(largest, max(credit - extra, 0))
            at = end.sent.get(stream_id, 0)
            out += frames.data(stream_id, payload(stream_id, client, at, take), pad=pad)
            end.sent[stream_id] = at + take
            credit -= take + extra
            pad, extra = None, 0
        self.flush(end, bytes(out))

    @rule(client=st.booleans(), number=seeds, size=sizes)
    def consume(self, client: bool, number: int, size: int) -> None:
        end = self.end_of(client)
        stream_id = self.choose(number, [i for i in end.engine.streams if end.unconsumed.get(i)])
        if stream_id is not None:
            size = min(size, end.unconsumed[stream_id])
            end.unconsumed[stream_id] -= size
            end.engine.consumed(end.engine.streams[stream_id], size)
            self.flush(end)

    @rule(client=st.booleans(), number=seeds)
    def end(self, client: bool, number: int) -> None:
        end = self.end_of(client)
        stream_id = self.choose(number, self.sendable(end))
        if stream_id is not None:
            end.engine.end_stream(stream_id)
            self.flush(end)

    @rule(client=st.booleans(), number=seeds, size=sizes, arrives=sizes)
    def transfer(self, client: bool, number: int, size: int, arrives: int) -> None:
        """Bytes that are sent, arrive in part, and are taken in part."""
        self.send(client, number, size, size, None)
        self.deliver(self.end_of(not client), arrives)
        self.consume(not client, number, size)
        self.deliver(self.end_of(client), size)

    @rule(client=st.booleans(), number=seeds, code=st.integers(0, 13))
    def give_up(self, client: bool, number: int, code: int) -> None:
        end = self.end_of(client)
        stream_id = self.choose(number, list(end.engine.streams))
        if stream_id is not None and number % 4 == 0:
            end.engine.reset(stream_id, code)
            end.reset.add(stream_id)
            self.flush(end)

    @rule(
        client=st.booleans(),
        window=st.none() | st.integers(0, WINDOW),
        frame=st.none() | st.integers(2**14, 30_000),
        streams=st.none() | st.integers(0, 6),
        table=st.none() | st.integers(0, 4096),
    )
    def announce(
        self, client: bool, window: int | None, frame: int | None, streams: int | None, table: int | None
    ) -> None:
        """SETTINGS in mid-session, by hand: the engine has no method for it. No window grows beyond what it counts."""
        end = self.end_of(client)
        values = {
            Setting.INITIAL_WINDOW_SIZE: window,
            Setting.MAX_FRAME_SIZE: frame,
            Setting.MAX_CONCURRENT_STREAMS: streams,
            Setting.HEADER_TABLE_SIZE: table,
        }
        self.flush(end, frames.settings({k: v for k, v in values.items() if v is not None}))
        if window is not None:
            end.announced = window

    @rule(seconds=st.floats(0, 4))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        for end in (self.client, self.server):
            before = set(end.engine.streams)
            if end.engine.next_deadline() <= self.now:
                for event in end.engine.on_deadline(self.now):
                    self.hear(end, event)
            assert end.engine.next_deadline() > self.now
            assert before >= set(end.engine.streams)
            self.flush(end)

    @precondition(lambda self: self.now > 10)
    @rule(client=st.booleans())
    def drain(self, client: bool) -> None:
        self.end_of(client).engine.begin_drain()
        self.flush(self.end_of(client))

    # --- what is always so

    @invariant()
    def windows_are_windows(self) -> None:
        for end in (self.client, self.server):
            engine = end.engine
            assert 0 <= engine.send_window <= SESSION
            assert 0 <= engine._recv_window <= SESSION
            for stream in engine.streams.values():
                assert 0 <= stream.recv_window <= WINDOW
                assert -WINDOW <= stream.send_window <= WINDOW
            assert not engine.closed

    def teardown(self) -> None:
        """All tunnels come to their end, and nothing is left on either side."""
        self.all_arrives()
        for end in (self.client, self.server):
            for stream_id in list(end.engine.streams):
                if stream_id in self.sendable(end):
                    end.engine.end_stream(stream_id)
                else:
                    stream = end.engine.streams[stream_id]
                    if not stream.answered:
                        end.engine.reset(stream_id, 8)
                        end.reset.add(stream_id)
        self.all_arrives()
        assert not self.client.engine.streams
        assert not self.server.engine.streams
        assert not self.client.engine._unanswered
        for end in (self.client, self.server):
            assert not end.engine._tail
            assert not end.engine._left
            for stream_id in end.ended - end.reset - self.other(end).reset:
                assert end.received.get(stream_id, 0) == self.other(end).sent.get(stream_id, 0)


TestSessions = pytest.mark.wire("W-CLOSE-4", "W-DATA-1", "W-FLOW-5", "W-SET-4")(Sessions.TestCase)
