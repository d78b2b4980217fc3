"""Engines on a pretend wire, played by hand: every exchange runs whole, byte by byte and at random splits.

A `Side` is one side of a session. It is three engines in lock-step that differ only in how the peer's bytes are cut;
after each step they must have said the same, must want to send the same, and must be in the same state. So every test
that is written with it also proves that the cuts of the network mean nothing.

    server = opened(client=False)
    assert server.receive(frames.connect(1, "10.0.0.1:80")) == [RequestReceived(1, ...)]
    server.accept(1)
    assert server.sent() == ["HEADERS(...)"]

`Pair` joins two of them; bytes go where they belong, in order, until both are quiet.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from hbone.protocol import (
    ConnectRequest,
    DataReceived,
    Engine,
    Event,
    InvalidRequest,
    RequestReceived,
    ResponseReceived,
    SessionFailed,
    StreamReset,
)
from support import frames
from support.frames import Frame, Kind, Parser

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from hbone.protocol import Limits, Stream

__all__ = ["REQUEST", "Pair", "Side", "merged", "opened", "streams_of"]

REQUEST = ConnectRequest.build("10.0.0.7:8080")

# How many bytes of one delivery go one by one; the rest of a long one goes in pieces of a prime's length.
_SINGLE_BYTES = 3000
_PIECE = 997


def merged(events: list[Event]) -> list[Event]:
    """The events with neighbouring pieces of one stream's data joined, as bytes: what does not depend on cuts."""
    out: list[Event] = []
    for event in events:
        if isinstance(event, DataReceived):
            last = out[-1] if out else None
            if isinstance(last, DataReceived) and last.stream_id == event.stream_id:
                out[-1] = DataReceived(event.stream_id, last.data + bytes(event.data))  # type: ignore[operator, arg-type]
            else:
                out.append(DataReceived(event.stream_id, bytes(event.data)))  # type: ignore[arg-type]
        else:
            out.append(event)
    return out


def _comparable(events: list[Event]) -> list[object]:
    return [
        (type(e.error), getattr(e.error, "error_code", None)) if isinstance(e, SessionFailed) else e for e in events
    ]


def streams_of(engine: Engine) -> dict[int, tuple[object, ...]]:
    """The streams that an engine knows, as values."""
    return {
        i: (s.life.state, *(getattr(s, name) for name in type(s).__slots__ if name != "life"))
        for i, s in sorted(engine.streams.items())
    }


class Side:
    """One side of a session; see the module."""

    def __init__(
        self, *, client: bool, limits: Limits | None = None, now: float = 0.0, seed: int = 0, **options: Any
    ) -> None:
        self.client = client
        self.now = now
        self.engines = tuple(Engine(client=client, limits=limits, now=now, **options) for _ in range(3))
        self.log: list[Frame] = []
        """All frames that were sent."""
        self._random = random.Random(seed)
        self._cuts: tuple[Callable[[bytes], Iterator[bytes]], ...] = (_whole, _bytewise, self._randomly)
        self._parser = Parser(preface=client)
        self._parsed: list[Frame] = []

    @property
    def engine(self) -> Engine:
        """The one that gets its bytes whole."""
        return self.engines[0]

    def stream(self, stream_id: int) -> Stream:
        return self.engine.streams[stream_id]

    # --- the peer's bytes

    def receive(self, data: bytes, now: float | None = None) -> list[Event]:
        """Feed all three; returns the events, joined by `merged`. Views are copied."""
        self.now = self.now if now is None else now
        told = [
            merged([e for piece in cut(data) for e in _copied(engine.receive_untrusted(piece, self.now))])
            for engine, cut in zip(self.engines, self._cuts, strict=True)
        ]
        assert _comparable(told[1]) == _comparable(told[0]), "byte by byte is not whole"
        assert _comparable(told[2]) == _comparable(told[0]), "random splits are not whole"
        self._check()
        return told[0]

    def _randomly(self, data: bytes) -> Iterator[bytes]:
        at = 0
        while at < len(data):
            size = self._random.choice((0, 1, 2, 8, 9, 10, 13, 100, 5000))
            yield data[at : at + size]
            at += size

    def _check(self) -> None:
        first = self.engine
        for other in self.engines[1:]:
            assert streams_of(other) == streams_of(first)
            assert other.send_window == first.send_window
            assert repr(other) == repr(first)
        outputs = [bytes(engine.data_to_send()) for engine in self.engines]
        assert outputs[1] == outputs[2] == outputs[0]
        self.unsent = outputs[0]
        got = self._parser.feed(outputs[0])
        self.log += got
        self._parsed += got
        self._raw = getattr(self, "_raw", b"") + outputs[0]

    # --- what we do

    def _each(self, name: str, *arguments: Any, **more: Any) -> Any:
        """The same call on all three; all return the same, or raise the same."""
        results: list[tuple[object, BaseException | None]] = []
        for engine in self.engines:
            try:
                results.append((getattr(engine, name)(*arguments, **more), None))
            except Exception as error:
                results.append((None, error))
        value, error = results[0]
        for _, other in results[1:]:
            assert (type(other), str(other)) == (type(error), str(error))
        self._check()
        if error is not None:
            raise error
        return value

    def open(self, request: ConnectRequest = REQUEST, *, deadline: float = 20.0) -> int:
        """Open a stream; returns its id."""
        return self._each("open_stream", request, deadline=deadline).id

    def accept(self, stream_id: int, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        self._each("accept", stream_id, headers)

    def refuse(self, stream_id: int, status: int) -> None:
        self._each("refuse", stream_id, status)

    def end(self, stream_id: int) -> None:
        self._each("end_stream", stream_id)

    def reset(self, stream_id: int, error_code: int) -> None:
        self._each("reset", stream_id, error_code)

    def drain(self) -> None:
        self._each("begin_drain")

    def close(self, *arguments: Any) -> None:
        self._each("close", *arguments)

    def at(self, now: float) -> list[Event]:
        """The clock strikes: `on_deadline`."""
        self.now = now
        return list(self._each("on_deadline", now))

    def credit(self, stream_id: int, wanted: int) -> int:
        """Take credit without sending."""
        taken = {engine.take_credit(engine.streams[stream_id], wanted) for engine in self.engines}
        self._check()
        (credit,) = taken
        return credit

    def send(self, stream_id: int, payload: bytes) -> int:
        """Send what the windows allow of `payload`; returns how much that was."""
        credit = self.credit(stream_id, len(payload))
        largest = self.engine.max_frame_size
        for at in range(0, credit, largest):
            self._each("queue_data", stream_id, payload[at : min(at + largest, credit)])
        return credit

    def consume(self, stream_id: int, count: int) -> bool:
        """The application has taken `count` bytes."""
        told = {engine.consumed(engine.streams[stream_id], count) for engine in self.engines}
        self._check()
        (queued,) = told
        return queued

    # --- what we sent

    def sent(self) -> list[Frame]:
        """The frames that were sent since the last time somebody asked, without SETTINGS acknowledgements."""
        got, self._parsed = self._parsed, []
        return [f for f in got if not (f.kind == Kind.SETTINGS and f.ack)]

    def said(self) -> list[str]:
        """The same in words, for comparing."""
        return [str(f) for f in self.sent()]

    def raw(self) -> bytes:
        """The bytes themselves, since the last time somebody asked."""
        raw, self._raw = getattr(self, "_raw", b""), b""
        return raw


def _whole(data: bytes) -> Iterator[bytes]:
    yield data


def _bytewise(data: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(data):
        size = 1 if at < _SINGLE_BYTES else _PIECE
        yield data[at : at + size]
        at += size


def _copied(events: list[Event]) -> list[Event]:
    """Views live until the next read only."""
    return [DataReceived(e[0], bytes(e[1])) if isinstance(e, DataReceived) else e for e in events]  # type: ignore[arg-type]


def opened(
    *, client: bool, settings: Mapping[int, int] | None = None, limits: Limits | None = None, **options: Any
) -> Side:
    """A side whose peer has sent its opening, with nothing left in what it sent."""
    side = Side(client=client, limits=limits, **options)
    side.receive((b"" if client else frames.PREFACE) + frames.settings(settings or {}) + frames.settings(ack=True))
    side._check()
    side.sent()
    side.raw()
    return side


class Pair:
    """A client and a server on a pretend wire that loses nothing."""

    def __init__(
        self, *, client_limits: Limits | None = None, server_limits: Limits | None = None, **options: Any
    ) -> None:
        self.client = Side(client=True, limits=client_limits, seed=1, **options)
        self.server = Side(client=False, limits=server_limits, seed=2, **options)
        self.client._check()
        self.server._check()

    def exchange(self, now: float | None = None) -> tuple[list[Event], list[Event]]:
        """Deliver until both are quiet; returns what the client was told, and the server."""
        told: tuple[list[Event], list[Event]] = ([], [])
        for _ in range(1000):
            up, down = self.client.raw(), self.server.raw()
            if not up and not down:
                return merged(told[0]), merged(told[1])
            if up:
                told[1].extend(self.server.receive(up, now))
            if down:
                told[0].extend(self.client.receive(down, now))
        raise AssertionError("the two never stop talking")

    def tunnel(self) -> int:
        """A tunnel, open at both ends; returns its id."""
        stream_id = self.client.open()
        _, told = self.exchange()
        assert RequestReceived(stream_id, REQUEST) in told
        self.server.accept(stream_id)
        told, _ = self.exchange()
        assert any(isinstance(e, ResponseReceived) and e.response.success for e in told)
        return stream_id


def only(events: list[Event], kind: type[Any]) -> Any:
    """The one event of a kind."""
    (found,) = (e for e in events if isinstance(e, kind))
    return found


def failure(events: list[Event]) -> BaseException:
    """The error of the session, which is the last event."""
    assert isinstance(events[-1], SessionFailed), events
    assert sum(isinstance(e, SessionFailed) for e in events) == 1
    return events[-1].error


def resets(events: list[Event]) -> list[tuple[int, int]]:
    """(stream, code) of the streams that were reset."""
    return [(e.stream_id, e.error_code) for e in events if isinstance(e, StreamReset)]


def refusals(events: list[Event]) -> list[tuple[int, int | None]]:
    """(stream, status) of the requests that the engine refused by itself."""
    return [(e.stream_id, e.status) for e in events if isinstance(e, InvalidRequest)]
