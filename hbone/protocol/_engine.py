"""One HTTP/2 session of CONNECT tunnels, without I/O, clock or randomness.

Theory of operation
===================

Three parts share the work (docs/design/decisions.md says why):

* **This module reads and writes frames.** It walks frame headers in whatever pieces the bytes come, hands DATA out
  as views without copying, counts both directions' flow-control windows, and checks everything that RFC 9113 lets
  us check on a frame by itself. Frames that are not DATA are gathered whole first; their size is bounded.
* **h2 holds the life cycle**: its connection answers SETTINGS and PING, its stream state machine says of each stream
  what may come next. It is shown neither whole requests, because it ends the connection on things that must cost one
  stream (a malformed CONNECT, an excess stream, a trailer, a content-length), nor GOAWAY (it would close all live
  tunnels), nor DATA and WINDOW_UPDATE (five times slower than here).
* **hpack decodes header blocks**, each exactly once and in order, even those of streams that are gone. Two kinds are
  not shown to it: they leave its table alone. The same answer again, and a request of nothing but plain literals.

Time is an argument: `now` is any clock in seconds that does not go back; `next_deadline` and `on_deadline` are all
there is to keep-alive and to unanswered requests.

Faults of the peer come in two sizes. A *stream error* costs the stream: RST_STREAM is queued and `StreamReset` told.
A *session error* is the last event, `SessionFailed`, with GOAWAY queued. `receive_untrusted` itself never raises.
"""

from __future__ import annotations

import math
import struct
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
import hpack
import hpack.exceptions
from h2.stream import H2StreamStateMachine, StreamInputs

from hbone.errors import HboneError, LocalProtocolError, RemoteProtocolError, SessionClosed
from hbone.protocol import _events as ev
from hbone.protocol._frames import (
    FRAME_HEADER_SIZE,
    PREFACE,
    ErrorCode,
    Flag,
    FrameType,
    Setting,
    decode_header_block,
    encode_header_block,
    frame,
    frame_header,
    goaway_frame,
    headers_frames,
    rst_stream_frame,
    settings_frame,
    window_update_frame,
)
from hbone.protocol._headers import MalformedRequest, connect_request_untrusted, connect_response_untrusted
from hbone.protocol._limits import Limits

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hbone.protocol._headers import ConnectRequest

__all__ = ["Engine", "Stream"]

_MAX_WINDOW: Final = 2**31 - 1
_MAX_STREAM_ID: Final = 2**31 - 1
_DEFAULT_WINDOW: Final = 65_535
_DEFAULT_FRAME: Final = 16_384
_DEFAULT_TABLE: Final = 4096
#: Dynamic table size update to 0 (RFC 7541 section 6.3). Our blocks use no table.
_NO_TABLE: Final = b"\x20"
#: Frames that are neither DATA nor a header block have no business being longer.
_MAX_CONTROL_FRAME: Final = 16_384
#: Of so many streams that we reset we know that frames may still be under way.
_REMEMBERED_RESETS: Final = 1000
#: A WINDOW_UPDATE must stand for data that we sent: this many for nothing, then one for each 256 bytes, and two for
#: each time that we sent any, because there are peers that give credit back by the frame, to stream and session.
_FREE_WINDOW_UPDATES: Final = 1000
_BYTES_PER_UPDATE: Final = 256
_SMALL_SEND: Final = 2 * _BYTES_PER_UPDATE

_DATA: Final = int(FrameType.DATA)
_END_STREAM: Final = int(Flag.END_STREAM)
_PADDED: Final = int(Flag.PADDED)

_FIXED_LENGTH: Final = {FrameType.RST_STREAM: 4, FrameType.PING: 8, FrameType.WINDOW_UPDATE: 4}
_ON_SESSION: Final = frozenset((FrameType.SETTINGS, FrameType.PING, FrameType.GOAWAY))
#: Those of RFC 9113. ENABLE_CONNECT_PROTOCOL is not for us: we use no extended CONNECT.
_KNOWN_SETTINGS: Final = frozenset(Setting) - {Setting.ENABLE_CONNECT_PROTOCOL}

#: The PING between the two GOAWAYs of a graceful drain, told from keep-alive by its payload.
_KEEPALIVE: Final = b"hbone-ka"
_DRAIN: Final = b"hbone-dr"


class Stream:
    """The engine's view of one live stream. Readable by the driver; written by the engine only."""

    __slots__ = (
        "answered",
        "id",
        "life",
        "local_ended",
        "open",
        "recv_window",
        "refused",
        "remote_ended",
        "send_window",
        "unacknowledged",
    )

    def __init__(self, stream_id: int, send_window: int, recv_window: int) -> None:
        self.id: int = stream_id
        self.life: H2StreamStateMachine = H2StreamStateMachine(stream_id)
        """h2's table of what may come next (RFC 9113 section 5.1)."""
        self.send_window: int = send_window
        """Bytes that the peer still lets us send; may be negative (RFC 9113 section 6.9.2)."""
        self.recv_window: int = recv_window
        self.unacknowledged: int = 0
        """Bytes consumed here and not yet given back by WINDOW_UPDATE."""
        self.answered: bool = False
        """The final response was sent (server) or received (client)."""
        self.refused: bool = False
        """The final response was not 2xx."""
        self.local_ended: bool = False
        self.remote_ended: bool = False
        self.open: bool = True
        """False once it ended both ways or was reset; the engine has forgotten it then."""


class _Allowance:
    """A token bucket: `burst` at once, `rate` a second."""

    __slots__ = ("_burst", "_left", "_rate", "_since")

    def __init__(self, burst: int, rate: int, now: float) -> None:
        self._burst = self._left = float(burst)
        self._rate = rate
        self._since = now

    def spend(self, now: float, what: str) -> None:
        self._left = min(self._burst, self._left + (now - self._since) * self._rate) - 1
        self._since = now
        if self._left < 0:
            raise RemoteProtocolError(f"too many {what}", ErrorCode.ENHANCE_YOUR_CALM)


def _resizes_table(block: bytes) -> bool:
    """Whether it begins with a dynamic table size update (RFC 7541 section 6.3), which stands nowhere else."""
    return block[:1] != b"" and block[0] & 0xE0 == 0x20


@lru_cache(maxsize=256)
def _answer_block(headers: tuple[tuple[bytes, bytes], ...]) -> bytes:
    """A server gives the same answer to many requests."""
    return encode_header_block([(b":status", b"200"), *headers])


class Engine:
    """The HTTP/2 half of HBONE (RFC 9113, wire profile), for either side of one session.

    Feed it the peer's bytes with `receive_untrusted`, act on the events, call the methods, and write what
    `data_to_send` returns. DATA is not in there: take credit with `take_credit`, write `data_header` and the payload
    after everything that `data_to_send` returned before.
    """

    def __init__(
        self,
        *,
        client: bool,
        limits: Limits | None = None,
        now: float,
        ping_interval: float = 10.0,
        ping_timeout: float = 20.0,
    ) -> None:
        """
        Args:
            client: which side we are.
            limits: what the peer may use.
            now: the clock.
            ping_interval: seconds from the last PING's answer to the next PING.
            ping_timeout: seconds that a PING may stay unanswered.
        """
        self._client = client
        self._limits = limits = limits or Limits()
        self._out = bytearray()
        self._h2 = h2.connection.H2Connection(
            h2.config.H2Configuration(
                client_side=client,
                header_encoding=None,
                validate_inbound_headers=False,
                normalize_inbound_headers=False,
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        # h2 must not enforce the stream limit, because it ends the connection over it: it is told of no limit.
        self._h2.local_settings = h2.settings.Settings(
            client=client, initial_values={h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: _MAX_STREAM_ID}
        )
        self._decoder = hpack.Decoder(max_header_list_size=4 * limits.max_header_list_size)
        # The last answer's block and what it says. Most answers of a peer are the same bytes, and as long as the
        # decoder's table is empty the same bytes say the same, and leave it empty.
        self._answer_block: tuple[bytes | None, tuple[tuple[bytes, bytes], ...]] = (None, ())

        self.streams: dict[int, Stream] = {}
        self.send_window: int = _DEFAULT_WINDOW
        """Bytes that the peer still lets us send on the whole session."""
        self.max_frame_size: int = _DEFAULT_FRAME
        """Longest payload that the peer takes in one frame."""
        self.max_outbound_streams: int = 100
        """Streams that the peer lets us have open; RFC 9113 names no default, 100 is the least it recommends."""
        self.ready: bool = False
        """The peer's SETTINGS have come: now, not before, the session is open."""
        self.closed: bool = False
        """The peer broke the session, or we closed it."""
        self.goaway_received: bool = False
        self.draining: bool = False
        """We sent GOAWAY: new streams of the peer are refused."""
        self.last_inbound_stream: int = 0

        self._next_stream_id = 1 if client else 2
        self._peer_initial_window = _DEFAULT_WINDOW
        self._settings_acknowledged = False
        self._recv_window = limits.connection_window
        self._unacknowledged = 0
        self._stream_credit_step = limits.stream_window // 4
        self._session_credit_step = limits.connection_window // 4
        self._resets: dict[int, int] = {}
        """Streams that we reset, with how many bytes of DATA may still be under way: what the peer had credit for."""
        self._ended_well = 0
        """Streams that ended in both directions, less those for which a late RST_STREAM came."""
        self._table_size = _DEFAULT_TABLE
        self._table_shrunk = False

        # where we are in the peer's bytes
        self._tail = bytearray()
        self._preface_left = b"" if client else PREFACE
        self._skip = 0
        self._left = 0
        self._padding = 0
        self._pad_length_next = False
        self._data_stream: Stream | None = None
        self._data_ends = False
        self._block: bytearray | None = None
        self._block_stream = 0
        self._block_ends = False

        self._control = _Allowance(limits.control_burst, limits.control_per_second, now)
        self._early_resets = _Allowance(limits.early_reset_burst, limits.early_reset_per_second, now)
        self._window_updates = 0
        self._explained = 0

        self._ping_interval = ping_interval
        self._ping_timeout = ping_timeout
        self._ping_sent: float | None = None
        self._progress = now
        """When DATA or WINDOW_UPDATE came last."""
        self._next_ping = now + ping_interval
        self._drain_ping = False
        self._unanswered: dict[int, float] = {}

        self._h2.initiate_connection()
        self._h2.clear_outbound_data_buffer()
        if not client:
            self._h2.receive_data(PREFACE)
        settings = {
            Setting.INITIAL_WINDOW_SIZE: limits.stream_window,
            Setting.MAX_FRAME_SIZE: limits.max_frame_size,
            Setting.MAX_HEADER_LIST_SIZE: limits.max_header_list_size,
        }
        if client:
            settings[Setting.ENABLE_PUSH] = 0
            self._out += PREFACE
        else:
            settings[Setting.MAX_CONCURRENT_STREAMS] = limits.max_concurrent_streams
        self._out += settings_frame(settings)
        if limits.connection_window > _DEFAULT_WINDOW:
            self._out += window_update_frame(0, limits.connection_window - _DEFAULT_WINDOW)

    def __repr__(self) -> str:
        state = "closed" if self.closed else "draining" if self.draining or self.goaway_received else "open"
        return f"<Engine {'client' if self._client else 'server'} {state} streams={len(self.streams)}>"

    # === what the driver asks ===

    def data_to_send(self) -> bytearray:
        """Everything but DATA that is to be written now, in order; empty when there is nothing."""
        out, self._out = self._out, bytearray()
        return out

    @property
    def has_data_to_send(self) -> bool:
        return bool(self._out)

    @property
    def available_streams(self) -> int:
        """How many more streams may be opened now (client)."""
        if self.closed or self.goaway_received or not self.ready or self._next_stream_id > _MAX_STREAM_ID:
            return 0
        return max(0, self.max_outbound_streams - len(self.streams))

    def next_deadline(self) -> float:
        """When `on_deadline` wants to be called next, on the driver's clock; infinity once the session is closed."""
        if self.closed:
            return math.inf
        ping = self._next_ping if self._ping_sent is None else self._given_up_at(self._ping_sent)
        return min(ping, min(self._unanswered.values(), default=ping))

    def on_deadline(self, now: float) -> list[ev.Event]:
        """Do what is due: send a PING, give up on one, or give up on requests without an answer."""
        events: list[ev.Event] = []
        if self.closed:
            return events
        for stream_id in [i for i, deadline in self._unanswered.items() if deadline <= now]:
            stream = self.streams[stream_id]
            if stream.refused:
                self.reset(stream_id, ErrorCode.CANCEL)
                events.append(ev.StreamEnded(stream_id))
            else:
                self.reset(stream_id, ErrorCode.CANCEL)
                events.append(ev.StreamReset(stream_id, ErrorCode.CANCEL, False, why="the peer did not answer CONNECT"))
        if self._ping_sent is not None:
            if now >= self._given_up_at(self._ping_sent):
                error = SessionClosed(f"the peer did not answer a PING within {self._ping_timeout:g} s")
                self._fail(error, ErrorCode.NO_ERROR, events)
        elif now >= self._next_ping:
            self._ping_sent = now
            self._h2.ping(_KEEPALIVE)
            self._pull()
        return events

    # === what the driver does ===

    def open_stream(self, request: ConnectRequest, *, deadline: float) -> Stream:
        """Queue a CONNECT (client).

        Args:
            request: what to ask for.
            deadline: when `on_deadline` gives up waiting for the answer.

        Raises:
            LocalProtocolError: no stream may be opened now; see `available_streams`.
        """
        if not self._client:
            raise LocalProtocolError("only a client opens tunnels")
        if not self.available_streams:
            raise LocalProtocolError("no stream may be opened on this session now")
        stream_id = self._next_stream_id
        self._next_stream_id += 2
        self._out += headers_frames(stream_id, self._encode(request.encode()), self.max_frame_size)
        stream = self.streams[stream_id] = Stream(stream_id, self._peer_initial_window, self._limits.stream_window)
        stream.life.process_input(StreamInputs.SEND_HEADERS)
        self._unanswered[stream_id] = deadline
        return stream

    def accept(self, stream_id: int, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        """Queue the 200 that opens the tunnel (server).

        Raises:
            LocalProtocolError: there is no such request, or it was answered.
        """
        stream = self._unanswered_request(stream_id)
        stream.answered = True
        stream.life.process_input(StreamInputs.SEND_HEADERS)
        block = self._encode_answer(tuple(headers))
        self._out += headers_frames(stream_id, block, self.max_frame_size)

    def refuse(self, stream_id: int, status: int, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        """Queue a final answer without a tunnel, and forget the stream (server).

        HEADERS with END_STREAM, then RST_STREAM(NO_ERROR) when the peer has not ended its half (RFC 9113 section 8.1).

        Raises:
            LocalProtocolError: there is no such request, or it was answered.
        """
        stream = self._unanswered_request(stream_id)
        stream.answered = True
        stream.life.process_input(StreamInputs.SEND_HEADERS)
        stream.life.process_input(StreamInputs.SEND_END_STREAM)
        block = self._encode([(b":status", b"%d" % status), *headers])
        self._out += headers_frames(stream_id, block, self.max_frame_size, end_stream=True)
        stream.local_ended = True
        if stream.remote_ended:
            self._forget(stream)
        else:
            self._reset(stream, ErrorCode.NO_ERROR)

    def end_stream(self, stream_id: int) -> None:
        """Queue the end of our half: an empty DATA frame with END_STREAM (RFC 9113 section 8.5).

        Raises:
            LocalProtocolError: our half has ended before, the stream is gone, or (server) was not answered.
        """
        stream = self.streams.get(stream_id)
        if stream is None or stream.local_ended:
            raise LocalProtocolError(f"stream {stream_id} has ended")
        if not (stream.answered or self._client):
            raise LocalProtocolError(f"stream {stream_id} has a request that waits for an answer")
        stream.local_ended = True
        stream.life.process_input(StreamInputs.SEND_END_STREAM)
        self._out += frame_header(0, _DATA, _END_STREAM, stream_id)
        if stream.remote_ended:
            self._ended_well += 1
            self._forget(stream)

    def reset(self, stream_id: int, error_code: int) -> None:
        """Queue RST_STREAM and forget the stream. Nothing happens when it is gone."""
        stream = self.streams.get(stream_id)
        if stream is not None:
            self._reset(stream, error_code)

    def take_credit(self, stream: Stream, wanted: int) -> int:
        """Take what both windows allow of `wanted` bytes; they count as sent.

        Returns:
            Bytes that must now be written, in frames of at most `max_frame_size`; 0 when there is no credit: wait for
            `WindowOpened` of this stream or of stream 0.
        """
        credit = min(wanted, stream.send_window, self.send_window)
        if credit <= 0:
            return 0
        stream.send_window -= credit
        self.send_window -= credit
        self._explained += credit + _SMALL_SEND
        return credit

    @staticmethod
    def data_header(stream_id: int, length: int) -> bytes:
        """The nine bytes in front of `length` bytes of payload."""
        return frame_header(length, _DATA, 0, stream_id)

    def queue_header(self, stream_id: int, length: int) -> None:
        """Queue a DATA frame's header; its payload must be written right behind what `data_to_send` then returns."""
        self._out += frame_header(length, _DATA, 0, stream_id)

    def queue_data(self, stream_id: int, payload: memoryview | bytes) -> None:
        """Queue a whole DATA frame: for small ones, of which many can go out in one write."""
        self._out += frame_header(len(payload), _DATA, 0, stream_id)
        self._out += payload

    def consumed(self, stream: Stream, count: int) -> bool:
        """Say that `count` received bytes of a stream need no buffer any more.

        Credit goes back in steps of a quarter of the window: fewer frames, and the window is never the limit.

        Returns:
            Whether a WINDOW_UPDATE was queued.
        """
        stream.unacknowledged += count
        if stream.unacknowledged < self._stream_credit_step or stream.remote_ended or not stream.open:
            return False
        self._out += window_update_frame(stream.id, stream.unacknowledged)
        stream.recv_window += stream.unacknowledged
        stream.unacknowledged = 0
        return True

    def begin_drain(self) -> None:
        """Queue the first half of a graceful end: GOAWAY(2^31-1), and a PING to see it has come (RFC 9113 section 6.8).

        From now on new streams are refused with REFUSED_STREAM, so that the peer asks elsewhere at once. Tunnels go on.
        """
        if self.draining or self.closed:
            return
        self.draining = True
        self._out += goaway_frame(_MAX_STREAM_ID, ErrorCode.NO_ERROR)
        self._h2.ping(_DRAIN)
        self._pull()

    def close(self, error_code: int = ErrorCode.NO_ERROR, debug: bytes = b"") -> None:
        """Queue the last GOAWAY. Nothing more will be sent or understood: the streams are gone."""
        if self.closed:
            return
        self.closed = True
        self._out += goaway_frame(self.last_inbound_stream, error_code, debug)
        for stream in self.streams.values():
            stream.open = False
        self.streams.clear()
        self._unanswered.clear()

    # === what the peer sends ===

    def receive_untrusted(self, data: memoryview | bytes, now: float) -> list[ev.Event]:
        """Take the peer's bytes, in pieces of any size.

        Args:
            data: the next bytes of the session. Views in the events point into it.
            now: the clock.

        Returns:
            What they mean, in order. `SessionFailed`, if it comes, is the last; bytes after it are ignored.
        """
        events: list[ev.Event] = []
        if self.closed:
            return events
        if not isinstance(data, memoryview):
            data = memoryview(data)
        try:
            self._receive(data, now, events)
            if len(self._out) > self._limits.max_unsent:
                raise RemoteProtocolError("the peer does not read our answers", ErrorCode.ENHANCE_YOUR_CALM)
        except RemoteProtocolError as error:
            self._fail(error, error.error_code, events)
        except h2.exceptions.ProtocolError as error:
            code = int(getattr(error, "error_code", ErrorCode.PROTOCOL_ERROR))
            self._fail(RemoteProtocolError(str(error), code), code, events)
        return events

    def _receive(self, data: memoryview, now: float, events: list[ev.Event]) -> None:
        pos, end = 0, len(data)
        if self._preface_left:
            pos = self._preface(data)
        tail = self._tail
        while True:
            if self._left:  # the payload of a DATA frame
                if pos == end:
                    return
                if self._pad_length_next:
                    self._pad_length_next = False
                    self._padding = data[pos]
                    pos += 1
                    self._left -= 1
                    if self._padding > self._left:
                        raise RemoteProtocolError("padding is longer than the frame")
                    self._pass_over(self._padding + 1)
                    if self._padding == self._left and not self._data_ends:
                        self._control.spend(now, "DATA frames of nothing but padding")
                    if not self._left:
                        self._data_done(events)
                    continue
                payload = self._left - self._padding
                if payload > 0:
                    take = min(payload, end - pos)
                    stream = self._data_stream
                    if stream is not None and stream.open:
                        events.append(ev.DataReceived(stream.id, data[pos : pos + take]))
                else:
                    take = min(self._left, end - pos)
                    self._padding -= take
                pos += take
                self._left -= take
                if not self._left:
                    self._data_done(events)
                continue
            if self._skip:
                take = min(self._skip, end - pos)
                pos += take
                self._skip -= take
                if self._skip:
                    return
                continue
            # the header of the next frame, and all of it when it is not DATA
            if tail:
                pos = self._gather(data, pos, FRAME_HEADER_SIZE)
                if len(tail) < FRAME_HEADER_SIZE:
                    return
                at: bytearray | memoryview = tail
                start = 0
            elif end - pos < FRAME_HEADER_SIZE:
                tail += data[pos:]
                return
            else:
                at, start = data, pos
            length = at[start] << 16 | at[start + 1] << 8 | at[start + 2]
            kind = at[start + 3]
            flags = at[start + 4]
            stream_id = (at[start + 5] & 0x7F) << 24 | at[start + 6] << 16 | at[start + 7] << 8 | at[start + 8]
            if len(tail) <= FRAME_HEADER_SIZE:
                if not self.ready and (kind != FrameType.SETTINGS or flags & Flag.ACK):
                    raise RemoteProtocolError(_not_settings(bytes(at[start : start + FRAME_HEADER_SIZE])))
                if length > self._limits.max_frame_size:
                    raise RemoteProtocolError(f"a frame of {length} bytes", ErrorCode.FRAME_SIZE_ERROR)
                if kind == _DATA:
                    if tail:
                        tail.clear()
                    else:
                        pos += FRAME_HEADER_SIZE
                    self._data_frame(length, flags, stream_id, now, events)
                    continue
                if self._check_size(kind, length, stream_id, now):
                    if tail:
                        tail.clear()
                    else:
                        pos += FRAME_HEADER_SIZE
                    self._skip = length
                    continue
            if tail:
                pos = self._gather(data, pos, FRAME_HEADER_SIZE + length)
                if len(tail) < FRAME_HEADER_SIZE + length:
                    return
                payload_bytes = bytes(tail[FRAME_HEADER_SIZE:])
                tail.clear()
            elif end - pos < FRAME_HEADER_SIZE + length:
                tail += data[pos:]
                return
            else:
                pos += FRAME_HEADER_SIZE
                payload_bytes = bytes(data[pos : pos + length])
                pos += length
            self._control_frame(kind, flags, stream_id, payload_bytes, now, events)

    def _gather(self, data: memoryview, pos: int, size: int) -> int:
        """Fill `_tail` up to `size` bytes from `data[pos:]`; returns the new position."""
        take = max(0, min(size - len(self._tail), len(data) - pos))
        self._tail += data[pos : pos + take]
        return pos + take

    def _preface(self, data: memoryview) -> int:
        want = self._preface_left
        got = bytes(data[: len(want)])
        if not want.startswith(got):
            raise RemoteProtocolError(_not_http2(PREFACE[: len(PREFACE) - len(want)] + got))
        self._preface_left = want[len(got) :]
        return len(got)

    def _check_size(self, kind: int, length: int, stream_id: int, now: float) -> bool:
        """Judge a frame by its header. Returns whether to skip its payload unseen."""
        if self._block is not None and (kind != FrameType.CONTINUATION or stream_id != self._block_stream):
            raise RemoteProtocolError("a header block was interrupted by another frame")
        if kind in (FrameType.HEADERS, FrameType.CONTINUATION):
            if length + len(self._block or b"") > self._limits.max_header_block:
                raise RemoteProtocolError("a header block is too long", ErrorCode.ENHANCE_YOUR_CALM)
            return False
        if kind > FrameType.CONTINUATION:  # RFC 9113 section 4.1: unknown types are ignored
            self._control.spend(now, "frames of unknown type")
            return True
        if length != _FIXED_LENGTH.get(FrameType(kind), length):
            raise RemoteProtocolError(f"{FrameType(kind).name} of {length} bytes", ErrorCode.FRAME_SIZE_ERROR)
        if length > _MAX_CONTROL_FRAME:
            raise RemoteProtocolError(f"{FrameType(kind).name} of {length} bytes", ErrorCode.ENHANCE_YOUR_CALM)
        return False

    # --- DATA ---

    def _data_frame(self, length: int, flags: int, stream_id: int, now: float, events: list[ev.Event]) -> None:
        if self._block is not None:
            raise RemoteProtocolError("a header block was interrupted by DATA")
        stream = self.streams.get(stream_id)
        if stream is None and (stream_id == 0 or self._is_idle(stream_id)):
            raise RemoteProtocolError(f"DATA on stream {stream_id}, which was never opened")
        self._progress = now
        # The session's credit goes back on arrival, whatever becomes of the stream: a tunnel that nobody reads holds
        # its own window, not its neighbours'.
        self._recv_window -= length
        if self._recv_window < 0:
            raise RemoteProtocolError("more DATA than the session's window", ErrorCode.FLOW_CONTROL_ERROR)
        self._unacknowledged += length
        if self._unacknowledged >= self._session_credit_step:
            self._out += window_update_frame(0, self._unacknowledged)
            self._recv_window += self._unacknowledged
            self._unacknowledged = 0
        self._left = length
        self._data_ends = bool(flags & _END_STREAM)
        self._data_stream = stream
        self._padding = 0
        self._pad_length_next = bool(flags & _PADDED)
        if self._pad_length_next and not length:
            raise RemoteProtocolError("padded DATA without room for the pad length", ErrorCode.FRAME_SIZE_ERROR)
        if stream is None:
            self._data_ends = False
            under_way = self._resets.get(stream_id, 0)
            if not 0 < length <= under_way:
                self._control.spend(now, "DATA frames on closed streams")
            if stream_id in self._resets:
                self._resets[stream_id] = under_way - length
            else:
                self._out += rst_stream_frame(stream_id, ErrorCode.STREAM_CLOSED)
                self._remember_reset(stream_id, 0)
            return
        if stream.remote_ended:
            self._stream_error(stream, ErrorCode.STREAM_CLOSED, "DATA after END_STREAM", now, events)
        elif self._client and not stream.answered:
            self._stream_error(stream, ErrorCode.PROTOCOL_ERROR, "DATA before the answer to CONNECT", now, events)
        else:
            stream.recv_window -= length
            if stream.recv_window < 0:
                self._stream_error(
                    stream, ErrorCode.FLOW_CONTROL_ERROR, "more DATA than the stream's window", now, events
                )
            elif not length:
                if not self._data_ends:
                    self._control.spend(now, "empty DATA frames")
                self._data_done(events)

    def _pass_over(self, count: int) -> None:
        """Padding counts against the window (RFC 9113 section 6.1) and is consumed at once."""
        if self._data_stream is not None and self._data_stream.open:
            self.consumed(self._data_stream, count)

    def _data_done(self, events: list[ev.Event]) -> None:
        stream = self._data_stream
        if stream is not None and self._data_ends and stream.open:
            self._remote_end(stream, events)

    def _remote_end(self, stream: Stream, events: list[ev.Event]) -> None:
        stream.remote_ended = True
        if stream.refused:
            self._unanswered.pop(stream.id, None)
        stream.life.process_input(StreamInputs.RECV_END_STREAM)
        events.append(ev.StreamEnded(stream.id))
        if stream.local_ended:
            self._ended_well += 1
            self._forget(stream)

    # --- everything else ---

    def _control_frame(
        self, kind: int, flags: int, stream_id: int, payload: bytes, now: float, events: list[ev.Event]
    ) -> None:
        if (kind in _ON_SESSION) is not (stream_id == 0) and kind != FrameType.WINDOW_UPDATE:
            raise RemoteProtocolError(f"{FrameType(kind).name} on stream {stream_id}")
        match kind:
            case FrameType.WINDOW_UPDATE:
                self._window_update(stream_id, int.from_bytes(payload, "big") & _MAX_WINDOW, now, events)
            case FrameType.HEADERS:
                self._headers_frame(flags, stream_id, payload, now, events)
            case FrameType.CONTINUATION:
                self._control.spend(now, "CONTINUATION frames")
                if self._block is None:
                    raise RemoteProtocolError("CONTINUATION without HEADERS")
                self._block += payload
                if flags & Flag.END_HEADERS:
                    self._header_block(now, events)
            case FrameType.RST_STREAM:
                self._rst_stream(stream_id, int.from_bytes(payload, "big"), now, events)
            case FrameType.SETTINGS:
                self._settings(flags, payload, now, events)
            case FrameType.PING:
                self._ping(flags, payload, now, events)
            case FrameType.GOAWAY:
                self._goaway(payload, now, events)
            case FrameType.PRIORITY:  # deprecated (RFC 9113 section 5.3.2)
                self._control.spend(now, "PRIORITY frames")
                stream = self.streams.get(stream_id)
                if len(payload) != 5 and stream is not None:  # the one frame whose wrong size costs only its stream
                    self._stream_error(stream, ErrorCode.FRAME_SIZE_ERROR, "PRIORITY of a wrong size", now, events)
            case _:
                raise RemoteProtocolError("PUSH_PROMISE, which we do not allow")

    def _given_up_at(self, ping_sent: float) -> float:
        """On a slow link a PING waits behind megabytes of our own data: as long as those move, the peer is there."""
        return max(ping_sent, self._progress) + self._ping_timeout

    def _window_update(self, stream_id: int, increment: int, now: float, events: list[ev.Event]) -> None:
        self._progress = now
        self._window_updates += 1
        if self._window_updates > _FREE_WINDOW_UPDATES + self._explained // _BYTES_PER_UPDATE:
            raise RemoteProtocolError("more WINDOW_UPDATE frames than data", ErrorCode.ENHANCE_YOUR_CALM)
        if stream_id == 0:
            if not increment:
                raise RemoteProtocolError("WINDOW_UPDATE of 0")
            before, self.send_window = self.send_window, self.send_window + increment
            if self.send_window > _MAX_WINDOW:
                raise RemoteProtocolError("the session's window overflows", ErrorCode.FLOW_CONTROL_ERROR)
            if before <= 0 < self.send_window:
                events.append(ev.WindowOpened(0))
            return
        stream = self.streams.get(stream_id)
        if stream is None:
            if self._is_idle(stream_id):
                raise RemoteProtocolError(f"WINDOW_UPDATE on stream {stream_id}, which was never opened")
            return
        if not increment:
            self._stream_error(stream, ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of 0", now, events)
            return
        before, stream.send_window = stream.send_window, stream.send_window + increment
        if stream.send_window > _MAX_WINDOW:
            self._stream_error(stream, ErrorCode.FLOW_CONTROL_ERROR, "the stream's window overflows", now, events)
        elif before <= 0 < stream.send_window:
            events.append(ev.WindowOpened(stream_id))

    def _headers_frame(self, flags: int, stream_id: int, payload: bytes, now: float, events: list[ev.Event]) -> None:
        start, padding = 0, 0
        if flags & Flag.PADDED:
            if not payload:
                raise RemoteProtocolError("padded HEADERS without a pad length", ErrorCode.FRAME_SIZE_ERROR)
            start, padding = 1, payload[0]
        if flags & Flag.PRIORITY:
            start += 5
        if start > len(payload):
            raise RemoteProtocolError("HEADERS without room for its priority", ErrorCode.FRAME_SIZE_ERROR)
        if start + padding > len(payload):
            raise RemoteProtocolError("padding is longer than the frame")
        self._block = bytearray(payload[start : len(payload) - padding])
        self._block_stream = stream_id
        self._block_ends = bool(flags & _END_STREAM)
        if flags & Flag.END_HEADERS:
            self._header_block(now, events)

    def _header_block(self, now: float, events: list[ev.Event]) -> None:
        block, self._block = bytes(self._block or b""), None
        if self._client:
            known, headers_of_known = self._answer_block
            if block == known and not self._decoder.header_table.dynamic_entries:
                self._response(self._block_stream, list(headers_of_known), now, events)
                return
        else:
            simple = decode_header_block(block)
            if simple is not None:
                self._request(self._block_stream, simple, now, events)
                return
        try:
            headers = self._decoder.decode(block, raw=True)
        except hpack.exceptions.OversizedHeaderListError:
            raise RemoteProtocolError("a header list is too large", ErrorCode.ENHANCE_YOUR_CALM) from None
        except hpack.exceptions.HPACKError as error:
            # not in its words: some name an address of our memory, and GOAWAY would carry that to the peer
            raise RemoteProtocolError("a header block is broken", ErrorCode.COMPRESSION_ERROR) from error
        plain = [(bytes(name), bytes(value)) for name, value in headers]
        if self._client:
            if not self._decoder.header_table.dynamic_entries and not _resizes_table(block):
                self._answer_block = (block, tuple(plain))
            self._response(self._block_stream, plain, now, events)
        else:
            self._request(self._block_stream, plain, now, events)

    def _request(self, stream_id: int, headers: list[tuple[bytes, bytes]], now: float, events: list[ev.Event]) -> None:
        live = self.streams.get(stream_id)
        if live is not None:
            # RFC 9113 section 8.5: nothing but DATA and stream management on a connected stream.
            code = ErrorCode.STREAM_CLOSED if live.remote_ended else ErrorCode.PROTOCOL_ERROR
            self._stream_error(live, code, "HEADERS inside a tunnel", now, events)
            return
        if not stream_id % 2:
            raise RemoteProtocolError(f"HEADERS on stream {stream_id}, which is not the client's to open")
        if stream_id <= self.last_inbound_stream:
            if stream_id not in self._resets:
                raise RemoteProtocolError(f"HEADERS on closed stream {stream_id}", ErrorCode.STREAM_CLOSED)
            self._control.spend(now, "HEADERS on closed streams")
            return
        excess = len(self.streams) >= self._limits.max_concurrent_streams
        self.last_inbound_stream = stream_id
        ends = self._block_ends
        stream = self.streams[stream_id] = Stream(stream_id, self._peer_initial_window, self._limits.stream_window)
        stream.remote_ended = ends
        stream.life.process_input(StreamInputs.RECV_HEADERS)
        if ends:
            stream.life.process_input(StreamInputs.RECV_END_STREAM)
        if self.draining or excess:
            self._control.spend(now, "refused streams")
            self._reset(stream, ErrorCode.REFUSED_STREAM)
            return
        if sum(len(n) + len(v) + 32 for n, v in headers) > self._limits.max_header_list_size:
            self._invalid(stream, "the header list is too large", 431, now, events)
            return
        try:
            request = connect_request_untrusted(headers)
        except MalformedRequest as error:
            if error.status is not None:
                self._invalid(stream, str(error), error.status, now, events)
            else:
                self._early_resets.spend(now, "malformed requests")
                self._reset(stream, error.error_code)
                events.append(ev.InvalidRequest(stream_id, str(error), None))
            return
        events.append(ev.RequestReceived(stream_id, request))
        if ends:
            events.append(ev.StreamEnded(stream_id))

    def _invalid(self, stream: Stream, why: str, status: int, now: float, events: list[ev.Event]) -> None:
        self._control.spend(now, "malformed requests")
        self.refuse(stream.id, status)
        events.append(ev.InvalidRequest(stream.id, why, status))

    def _response(self, stream_id: int, headers: list[tuple[bytes, bytes]], now: float, events: list[ev.Event]) -> None:
        stream = self.streams.get(stream_id)
        if stream is None:
            if self._is_idle(stream_id):
                raise RemoteProtocolError(f"HEADERS on stream {stream_id}, which was never opened")
            self._control.spend(now, "HEADERS on closed streams")  # one may have crossed our RST_STREAM
            return
        ends = self._block_ends
        if stream.remote_ended:
            self._stream_error(stream, ErrorCode.STREAM_CLOSED, "HEADERS after END_STREAM", now, events)
            return
        if stream.answered:
            if stream.refused and ends:  # trailers of a refusal's body
                self._remote_end(stream, events)
            else:
                self._stream_error(stream, ErrorCode.PROTOCOL_ERROR, "HEADERS inside a tunnel", now, events)
            return
        try:
            response = connect_response_untrusted(headers)
        except RemoteProtocolError as error:
            self._stream_error(stream, ErrorCode.PROTOCOL_ERROR, str(error), now, events)
            return
        if response.informational:
            self._control.spend(now, "informational responses")
            if ends:
                why = "END_STREAM on an informational response"
                self._stream_error(stream, ErrorCode.PROTOCOL_ERROR, why, now, events)
            return
        stream.answered = True
        stream.refused = not 200 <= response.status <= 299
        if not stream.refused or ends:
            # the body of a refusal stays under the deadline
            self._unanswered.pop(stream_id, None)
        stream.life.process_input(StreamInputs.RECV_HEADERS)
        events.append(ev.ResponseReceived(stream_id, response))
        if ends:
            self._remote_end(stream, events)

    def _rst_stream(self, stream_id: int, error_code: int, now: float, events: list[ev.Event]) -> None:
        stream = self.streams.get(stream_id)
        if stream is None:
            if self._is_idle(stream_id):
                raise RemoteProtocolError(f"RST_STREAM on stream {stream_id}, which was never opened")
            if stream_id in self._resets:
                del self._resets[stream_id]  # it crossed ours, and is the last frame there; no charge
            elif self._ended_well:
                self._ended_well -= 1  # nor for one that crossed our END_STREAM
            else:
                self._control.spend(now, "RST_STREAM frames on closed streams")
            return
        if not self._client and not stream.answered:
            self._early_resets.spend(now, "requests reset before they were answered")
        unprocessed = self._client and not stream.answered and error_code == ErrorCode.REFUSED_STREAM
        stream.life.process_input(StreamInputs.RECV_RST_STREAM)
        self._forget(stream)
        events.append(ev.StreamReset(stream_id, error_code, True, unprocessed))

    def _settings(self, flags: int, payload: bytes, now: float, events: list[ev.Event]) -> None:
        if len(payload) % 6 or (flags & Flag.ACK and payload):
            raise RemoteProtocolError(f"SETTINGS of {len(payload)} bytes", ErrorCode.FRAME_SIZE_ERROR)
        if flags & Flag.ACK:
            if self._settings_acknowledged:
                self._control.spend(now, "SETTINGS acknowledgements")
            self._settings_acknowledged = True
            self._h2.receive_data(frame(FrameType.SETTINGS, Flag.ACK, 0))
            return
        self._control.spend(now, "SETTINGS frames")
        # Of a setting given many times only the last is acted upon, and h2 is shown those that we know: else one frame
        # could change the windows of all streams thousands of times, and h2 would remember all 65 536 ids.
        values: dict[Setting, int] = {}
        for code, value in struct.iter_unpack(">HL", payload):
            if code in _KNOWN_SETTINGS:
                self._check_setting(code, value)
                values[Setting(code)] = value
        for setting, value in values.items():
            self._setting(setting, value, events)
        self._h2.receive_data(settings_frame(values))
        self._pull()
        first = not self.ready
        self.ready = True
        events.append(ev.SettingsReceived(first))

    def _check_setting(self, code: int, value: int) -> None:
        # RFC 9113 section 6.5.2; a server must not announce ENABLE_PUSH = 1
        if code == Setting.ENABLE_PUSH and value > (0 if self._client else 1):
            raise RemoteProtocolError(f"ENABLE_PUSH of {value}")
        if code == Setting.MAX_FRAME_SIZE and not _DEFAULT_FRAME <= value < 2**24:
            raise RemoteProtocolError(f"MAX_FRAME_SIZE of {value}")
        if code == Setting.INITIAL_WINDOW_SIZE and value > _MAX_WINDOW:
            raise RemoteProtocolError(f"INITIAL_WINDOW_SIZE of {value}", ErrorCode.FLOW_CONTROL_ERROR)

    def _setting(self, setting: Setting, value: int, events: list[ev.Event]) -> None:
        match setting:
            case Setting.MAX_CONCURRENT_STREAMS:
                self.max_outbound_streams = value
            case Setting.MAX_FRAME_SIZE:
                self.max_frame_size = value
            case Setting.HEADER_TABLE_SIZE if value < self._table_size:
                # RFC 9113 section 4.3.1: the next block must say that we follow. We go to 0 at once, where nothing is
                # ever left to shrink.
                self._table_size = 0
                self._table_shrunk = True
            case Setting.INITIAL_WINDOW_SIZE:
                delta = value - self._peer_initial_window
                self._peer_initial_window = value
                for stream in self.streams.values():
                    before, stream.send_window = stream.send_window, stream.send_window + delta
                    if stream.send_window > _MAX_WINDOW:
                        raise RemoteProtocolError("a stream's window overflows", ErrorCode.FLOW_CONTROL_ERROR)
                    if before <= 0 < stream.send_window:
                        events.append(ev.WindowOpened(stream.id))
            case _:
                pass

    def _ping(self, flags: int, payload: bytes, now: float, events: list[ev.Event]) -> None:
        self._h2.receive_data(frame(FrameType.PING, flags & Flag.ACK, 0, payload))
        if not flags & Flag.ACK:
            self._control.spend(now, "PING frames")
            self._pull()
            return
        if payload == _KEEPALIVE and self._ping_sent is not None:
            self._ping_sent = None
            self._next_ping = now + self._ping_interval
        elif payload == _DRAIN and self.draining and not self._drain_ping:
            # Every stream that was under way when the first GOAWAY left has arrived and was answered by now.
            self._drain_ping = True
            self._out += goaway_frame(self.last_inbound_stream, ErrorCode.NO_ERROR)
        else:
            self._control.spend(now, "PING acknowledgements")
            return
        events.append(ev.PingAcknowledged(payload))

    def _goaway(self, payload: bytes, now: float, events: list[ev.Event]) -> None:
        if len(payload) < 8:
            raise RemoteProtocolError(f"GOAWAY of {len(payload)} bytes", ErrorCode.FRAME_SIZE_ERROR)
        self._control.spend(now, "GOAWAY frames")
        last = int.from_bytes(payload[:4], "big") & _MAX_STREAM_ID
        error_code = int.from_bytes(payload[4:8], "big")
        self.goaway_received = True
        events.append(ev.GoAwayReceived(last, error_code, payload[8:]))
        if self._client:
            for stream in [s for s in self.streams.values() if s.id > last]:
                stream.life.process_input(StreamInputs.RECV_RST_STREAM)
                self._forget(stream)
                events.append(
                    ev.StreamReset(stream.id, ErrorCode.REFUSED_STREAM, True, not stream.answered, "GOAWAY below it")
                )

    # === helpers ===

    def _encode_answer(self, headers: tuple[tuple[bytes, bytes], ...]) -> bytes:
        if self._table_shrunk:
            return self._encode([(b":status", b"200"), *headers])
        return _answer_block(headers)

    def _encode(self, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
        block = encode_header_block(headers)
        if self._table_shrunk:
            self._table_shrunk = False
            block = _NO_TABLE + block
        return block

    def _unanswered_request(self, stream_id: int) -> Stream:
        stream = self.streams.get(stream_id)
        if stream is None or stream.answered or self._client:
            raise LocalProtocolError(f"stream {stream_id} has no request that waits for an answer")
        return stream

    def _is_idle(self, stream_id: int) -> bool:
        """Whether no HEADERS were ever seen for it, either way."""
        if stream_id % 2 == (1 if self._client else 0):
            return stream_id >= self._next_stream_id
        return stream_id > self.last_inbound_stream

    def _stream_error(
        self, stream: Stream, error_code: ErrorCode, why: str, now: float, events: list[ev.Event]
    ) -> None:
        # Making us reset is as cheap for an attacker as resetting (CVE-2025-8671): it is paid from the same purse.
        if not self._client and not stream.answered:
            self._early_resets.spend(now, "requests that we had to reset")
        self._control.spend(now, "stream errors")
        self._reset(stream, error_code)
        events.append(ev.StreamReset(stream.id, error_code, False, why=why))

    def _reset(self, stream: Stream, error_code: int) -> None:
        stream.life.process_input(StreamInputs.SEND_RST_STREAM)
        self._out += rst_stream_frame(stream.id, error_code)
        self._remember_reset(stream.id, 0 if stream.remote_ended else stream.recv_window)
        self._forget(stream)

    def _remember_reset(self, stream_id: int, under_way: int) -> None:
        self._resets[stream_id] = under_way
        if len(self._resets) > _REMEMBERED_RESETS:
            del self._resets[next(iter(self._resets))]

    def _forget(self, stream: Stream) -> None:
        stream.open = False
        del self.streams[stream.id]
        self._unanswered.pop(stream.id, None)

    def _fail(self, error: HboneError, error_code: int, events: list[ev.Event]) -> None:
        self.close(error_code, str(error).encode()[:200])
        events.append(ev.SessionFailed(error))

    def _pull(self) -> None:
        """What h2 wants to say (acknowledgements, PING). Its buffer is empty at all other times."""
        self._out += self._h2.data_to_send()


def _not_settings(header: bytes) -> str:
    """The first bytes were no SETTINGS frame: say what they look like."""
    if header.startswith(b"HTTP/1."):
        return "the peer answered in HTTP/1, not HTTP/2"
    return "the peer's first frame is not SETTINGS"


def _not_http2(got: bytes) -> str:
    methods = (b"GET ", b"POST", b"PUT ", b"HEAD", b"CONN", b"OPTI", b"DELE", b"PATC")
    if got[:4] in methods:
        return "the client speaks HTTP/1, not HTTP/2"
    return "the client did not send the HTTP/2 preface"
