"""One session at work: the engine on a carrier, the tunnels on the engine.

Theory of operation
===================

* **One reader**, always reading (`_receive`): read everything there is, let the engine make events of it, hand each to
  its tunnel at once. It never waits for a consumer: a tunnel's data goes to its socket, or into its buffer, which
  its own window bounds. Nothing is awaited between a read and its dispatch, so all sessions of a thread share one
  read buffer and an idle session needs none. On a socket it is called by the hub, outside of any task; over a stream
  by the task that also sees to the end in both cases (`_read`).
* **Anybody writes**, without waiting: `flush` and `send_payload` encrypt and send what the network takes now. What it
  does not take is kept in `_unsent`, and goes as the network takes it (`_write_unsent`, called by the hub;
  `_drain_unsent`, a task, over a stream). Who sends much waits for that (`wait_uncongested`; a relay is `muted`). So no
  sender can be cancelled inside a frame: the rest of the frame belongs to the session.
* **One timer** (`_keep_alive`) calls the engine at its deadlines.

A failure is recorded once, breaks all tunnels with that cause, and ends `run`, which never raises it.
"""

from __future__ import annotations

import logging
from collections import deque
from enum import Enum, auto
from typing import TYPE_CHECKING, Final

import trio

from hbone.errors import (
    ConnectFailed,
    HboneError,
    RemoteProtocolError,
    SessionClosed,
    StreamRefused,
    TunnelRefused,
    TunnelReset,
)
from hbone.protocol import ConnectRequest, Engine, ErrorCode
from hbone.protocol import _events as ev
from hbone.protocol._frames import FRAME_HEADER_SIZE, pack_frame_header_into
from hbone.transport._carrier import WOULD_BLOCK, StreamCarrier, refused_identity
from hbone.transport._hub import shared_hub
from hbone.transport._poller import READABLE, WRITABLE
from hbone.transport._tunnel import Tunnel
from hbone.transport._values import SessionStatistics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from hbone.address import Authority, Endpoint
    from hbone.identity import SpiffeIdentity
    from hbone.protocol import Limits, Stream
    from hbone.transport._carrier import Carrier
    from hbone.transport._observer import Observer
    from hbone.transport._relay import Link
    from hbone.transport._values import Peer, Timeouts

__all__ = ["Session"]

_log: Final = logging.getLogger("hbone")

#: One read: 32 records, shared by all sessions of a thread. Twice as much brought nothing, half cost a tenth of bulk
#: throughput (docs/design/performance.md).
READ_BUFFER: Final = 512 * 1024
#: A frame of this payload fills one TLS record with its header.
RECORD_PAYLOAD: Final = 16_384 - FRAME_HEADER_SIZE
#: What senders may leave unsent before they wait: one turn of a tunnel, one read of a relay.
_SENDERS_UNSENT: Final = 512 * 1024
#: How much of a refusal's body is kept as its reason.
_MAX_REASON: Final = 512

_read_buffer: trio.lowlevel.RunVar[memoryview] = trio.lowlevel.RunVar("hbone-read-buffer")


def _shared_read_buffer() -> memoryview:
    try:
        return _read_buffer.get()
    except LookupError:
        buffer = memoryview(bytearray(READ_BUFFER))
        _read_buffer.set(buffer)
        return buffer


class _Step(Enum):
    """What a read was followed by."""

    WAIT = auto()
    AGAIN = auto()
    """There may be more already."""
    ENDED = auto()
    FAILED = auto()


class Session:
    """The HTTP/2 session under `HBONEClient` and `HBONEServer`. Made by those; the pool works with it directly."""

    def __init__(
        self,
        carrier: Carrier,
        *,
        client: bool,
        peer: Peer,
        local_address: Endpoint | None,
        limits: Limits,
        timeouts: Timeouts,
        observer: Observer | None,
        on_request: Callable[[Session, Tunnel], None] | None = None,
    ) -> None:
        self.peer = peer
        self.local_address = local_address
        """Our end of the socket: what the peer dialled, on a server."""
        self.local_identity: SpiffeIdentity | None = None
        """Who the peer knows us as, on a server."""
        self.client = client
        self.limits = limits
        self.timeouts = timeouts
        self.observer = observer
        self.error: HboneError | None = None
        """Why the session ended; None while it lives and after a graceful end."""
        self.closed: bool = False
        self.ready: trio.Event = trio.Event()
        """The peer's SETTINGS have come, or the session has failed before."""
        self.on_change: Callable[[], None] | None = None
        """Called, synchronously, when streams end, the peer's limits change, GOAWAY comes, or the session ends."""
        self.finished: trio.Event = trio.Event()
        self.tunnels_opened: int = 0
        self.tunnels_refused: int = 0
        self.bytes_sent: int = 0
        self.bytes_received: int = 0
        self.since_idle: float = trio.current_time()
        """When the last tunnel ended, on trio's clock."""

        self.engine: Engine = Engine(
            client=client,
            limits=limits,
            now=trio.current_time(),
            ping_interval=timeouts.ping_interval,
            ping_timeout=timeouts.ping_timeout,
        )
        self._carrier = carrier
        self._tunnels: dict[int, Tunnel] = {}
        self._on_request = on_request
        self._unsent = bytearray()
        self._draining_unsent = False
        self._uncongested = trio.lowlevel.ParkingLot()
        self._write_error: SessionClosed | None = None
        self._nursery: trio.Nursery | None = None
        self._timer = trio.CancelScope()
        self._alarm = float("inf")
        self._closing = False
        self._killed = False
        self._buffer = _shared_read_buffer()
        self._hub = shared_hub()
        self._fd = carrier.fileno()
        self._interest = 0
        self._reader: trio.lowlevel.Task | None = None
        self._last_step = _Step.ENDED
        self._crash: Exception | None = None
        self.muted: dict[Link, None] = {}
        """Relays that do not read, as the network does not take what was sent before; who is first goes on first."""
        self.credit_queue: deque[Tunnel] = deque()
        """Tunnels that wait for credit of the session's window, first come, first served."""

    def __repr__(self) -> str:
        state = "closed" if self.closed else "draining" if self.draining else "open"
        return f"<Session {state} peer={self.peer.identity} tunnels={len(self._tunnels)}>"

    # === what the pool and the public classes ask ===

    @property
    def available_streams(self) -> int:
        """How many more tunnels may be opened now."""
        return 0 if self._closing else self.engine.available_streams

    @property
    def open_streams(self) -> int:
        """Tunnels that are open or being opened."""
        return len(self._tunnels)

    @property
    def draining(self) -> bool:
        """GOAWAY was sent or seen: the tunnels there are go on, new ones are not to be had."""
        return self.closed or self._closing or self.engine.draining or self.engine.goaway_received

    @property
    def tunnels(self) -> tuple[Tunnel, ...]:
        """The live tunnels."""
        return tuple(self._tunnels.values())

    def statistics(self) -> SessionStatistics:
        """A snapshot."""
        return SessionStatistics(
            open_streams=len(self._tunnels),
            tunnels_opened=self.tunnels_opened,
            tunnels_refused=self.tunnels_refused,
            bytes_sent=self.bytes_sent,
            bytes_received=self.bytes_received,
            send_window=self.engine.send_window,
            unsent=len(self._unsent),
            receive_buffered=sum(t.statistics().receive_buffered for t in self._tunnels.values()),
            draining=self.draining,
            closed=self.closed,
        )

    # === life ===

    async def run(self, *, task_status: trio.TaskStatus[Session] = trio.TASK_STATUS_IGNORED) -> None:
        """Drive the session until it ends. Never raises what ended it: see `error`. Cancelled: ends at once."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                if self._killed:
                    nursery.cancel_scope.cancel()
                try:
                    nursery.start_soon(self._keep_alive)
                    self.flush()
                    self._maybe_say_goodbye()  # a server that drains may have told it so before it ran
                    task_status.started(self)
                    await self._read()
                finally:
                    self._nursery = None  # no new tasks: a tunnel may still be reset while the last ones end
                    nursery.cancel_scope.cancel()
        finally:
            self._end(self.error or SessionClosed("the session was closed"))
            # OpenSSL knows the socket by its number, and the next socket gets that: not a byte may be written to it.
            self._write_error = SessionClosed("the session has ended")
            self._watch(self._interest, False)
            self._carrier.close()
            if isinstance(self._carrier, StreamCarrier):
                with trio.CancelScope(shield=True):
                    await trio.aclose_forcefully(self._carrier.stream)
            self.finished.set()

    async def wait_ready(self) -> None:
        """Wait for the peer's SETTINGS: only then the session is open.

        Raises:
            IdentityRefused: the peer closed before that.
            ConnectFailed: no SETTINGS in time, or something that is not HTTP/2.
        """
        with trio.move_on_after(self.timeouts.settings):
            await self.ready.wait()
        if not self.ready.is_set():
            raise ConnectFailed(f"the peer sent no SETTINGS within {self.timeouts.settings:g} s")
        if self.error is not None:
            if isinstance(self.error, SessionClosed):
                raise refused_identity(self.error)
            raise ConnectFailed(f"the peer does not speak HTTP/2 as it should: {self.error}") from self.error

    async def _read(self) -> None:
        """Until the peer's end, or the session's."""
        step = self._receive()
        if self._fd >= 0:
            step = await self._be_told(step)
        while step is _Step.WAIT or step is _Step.AGAIN:
            if step is _Step.WAIT:
                await self._carrier.wait_readable()
            else:
                await trio.lowlevel.checkpoint()
            step = self._receive()
        if step is _Step.FAILED:
            await self._say_goodbye()

    async def _be_told(self, step: _Step) -> _Step:
        """Let the hub do the reading; returns the last step."""
        if step is not _Step.WAIT and step is not _Step.AGAIN:
            return step
        self._reader = trio.lowlevel.current_task()
        self._watch(READABLE, True)
        try:
            await trio.lowlevel.wait_task_rescheduled(self._abort_read)
        finally:
            self._watch(READABLE, False)
        if self._crash is not None:
            raise self._crash
        return self._last_step

    def _abort_read(self, _: object) -> trio.lowlevel.Abort:
        self._reader = None
        return trio.lowlevel.Abort.SUCCEEDED

    def io_ready(self, what: int) -> None:
        """The hub says: our socket is readable, writable, or both when it has broken."""
        if what & WRITABLE and self._draining_unsent:
            self._write_unsent()
        if what & READABLE and self._reader is not None:
            step = self._receive()
            if step is not _Step.WAIT and step is not _Step.AGAIN:
                self._last_step = step
                self._wake_reader()

    def io_failed(self, error: Exception) -> None:
        """See `Watcher`: whoever runs the session gets it."""
        self._crash = error
        self._wake_reader()

    def _wake_reader(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            self._watch(READABLE, False)
            trio.lowlevel.reschedule(reader)

    def _watch(self, what: int, yes: bool) -> None:
        """Be told of this as well, or not."""
        before = self._interest
        self._interest = after = before | what if yes else before & ~what
        if before == after:
            return
        if not before:
            self._hub.add(self._fd, self, after)
        elif after:
            self._hub.change(self._fd, after)
        else:
            self._hub.remove(self._fd)

    def _receive(self) -> _Step:
        """Read once, and do all that follows from it."""
        carrier, engine = self._carrier, self.engine
        buffer = self._buffer
        try:
            got = carrier.read_into(buffer)
        except SessionClosed as exc:
            if self._tunnels or not self._closing:  # once we have said goodbye, any end of theirs is one
                self._fail(exc)
            return _Step.ENDED
        if got == WOULD_BLOCK:
            return _Step.WAIT
        if got == 0:
            if not engine.ready or (self._tunnels and not self._closing):
                self._fail(SessionClosed("the peer closed the session"))
            self._carrier.shutdown_write()
            return _Step.ENDED
        if self._dispatch(engine.receive_untrusted(buffer[:got], trio.current_time())):
            return _Step.FAILED
        return _Step.AGAIN if got > READ_BUFFER - RECORD_PAYLOAD else _Step.WAIT

    def _dispatch(self, events: list[ev.Event]) -> bool:
        """Hand the events out. Returns whether the session has failed."""
        failed = False
        tunnels = self._tunnels
        for event in events:
            kind = type(event)
            if kind is ev.DataReceived:
                tunnel = tunnels.get(event.stream_id)  # type: ignore[union-attr]
                if tunnel is not None:
                    self.bytes_received += len(event.data)  # type: ignore[union-attr]
                    tunnel.feed(event.data)  # type: ignore[union-attr]
            elif kind is ev.StreamEnded:
                tunnel = tunnels.get(event.stream_id)  # type: ignore[union-attr]
                if tunnel is not None:
                    self._stream_ended(tunnel)
            elif kind is ev.WindowOpened:
                if event.stream_id == 0:  # type: ignore[union-attr]
                    self._share_credit()
                else:
                    tunnel = tunnels.get(event.stream_id)  # type: ignore[union-attr]
                    if tunnel is not None:
                        tunnel.credit_came()
            elif kind is ev.SessionFailed:
                self._fail(event.error)  # type: ignore[union-attr]
                failed = True
            else:
                self._control_event(event)
        self.flush()
        if not failed and len(self._unsent) > self.limits.max_unsent + _SENDERS_UNSENT:
            # Only what the peer sends makes for more: it asks, and does not read the answers.
            self.engine.close(ErrorCode.ENHANCE_YOUR_CALM)
            self._fail(RemoteProtocolError("the peer does not read our answers", ErrorCode.ENHANCE_YOUR_CALM))
            return True
        return failed

    def _control_event(self, event: ev.Event) -> None:
        match event:
            case ev.ResponseReceived(stream_id, response):
                tunnel = self._tunnels.get(stream_id)
                if tunnel is not None:
                    tunnel.response = response
                    if not tunnel.stream.refused:
                        self.tunnels_opened += 1
                        self.tell("tunnel_opened", tunnel)
                        tunnel.answered(None)
            case ev.RequestReceived(stream_id, request):
                stream = self.engine.streams.get(stream_id)
                if stream is None:
                    return  # reset in the same read
                tunnel = Tunnel(self, stream, request)
                self._tunnels[stream_id] = tunnel
                assert self._on_request is not None
                self._on_request(self, tunnel)
            case ev.StreamReset(stream_id, error_code, remote, unprocessed, why):
                tunnel = self._tunnels.get(stream_id)
                if tunnel is not None:
                    self._stream_reset(tunnel, error_code, remote, unprocessed, why)
            case ev.SettingsReceived(first):
                if first:
                    self.ready.set()
                    self.tell("session_opened", self)
                self._changed()
            case ev.GoAwayReceived(_, error_code, debug):
                if error_code:
                    name, text = ErrorCode.name_of(error_code), debug[:200].decode("ascii", "replace")
                    _log.info("peer %s sent GOAWAY %s %s", self.peer.identity, name, ascii(text))
                self._changed()
                self._maybe_say_goodbye()
            case ev.PingAcknowledged():
                self._wake_at(self.engine.next_deadline())
            case ev.InvalidRequest(_, why, status):
                self.tunnels_refused += 1
                self.tell("tunnel_refused", self, "", status, why)
            case _:
                pass

    def _stream_ended(self, tunnel: Tunnel) -> None:
        if tunnel.stream.refused:
            self._refused(tunnel)
            return
        tunnel.feed_eof()
        # Not `stream.open`: the engine is ahead of its events, and a reset behind this one must not look like an end.
        if tunnel.stream.local_ended:
            self.forget(tunnel, None)

    def _refused(self, tunnel: Tunnel) -> None:
        """The answer was not 2xx, and all of it is there (Envoy sends a body with a 503)."""
        response = tunnel.response
        assert response is not None
        reason = bytes(tunnel.take_buffer()[:_MAX_REASON]).decode("utf-8", "replace").strip().partition("\n")[0]
        self.tunnels_refused += 1
        self.tell("tunnel_refused", self, tunnel.request.authority, response.status, reason)
        self.engine.reset(tunnel.stream.id, ErrorCode.CANCEL)
        tunnel.answered(TunnelRefused.for_status(response.status, reason or None, target=tunnel.request.authority))
        self.forget(tunnel, None)

    def _stream_reset(self, tunnel: Tunnel, error_code: int, remote: bool, unprocessed: bool, why: str) -> None:
        if tunnel.stream.refused:
            self._refused(tunnel)
            return
        name = ErrorCode.name_of(error_code)
        error: HboneError
        if unprocessed:
            error = StreamRefused(f"the peer did not process the request ({name})")
        elif remote:
            error = TunnelReset(f"the peer reset the tunnel: {name}", error_code=error_code, remote=True)
        else:
            error = TunnelReset(f"the tunnel was reset ({name}): {why}", error_code=error_code, remote=False)
        if self.client and tunnel.response is None:
            self.tunnels_refused += 1
            self.tell("tunnel_refused", self, tunnel.request.authority, None, str(error))
            if not remote:
                error = ConnectFailed(f"no tunnel to {tunnel.request.authority}: {why}")
        tunnel.answered(error)
        self.forget(tunnel, error)

    def forget(self, tunnel: Tunnel, error: HboneError | None) -> None:
        """A tunnel has ended: `error` is None when both directions ended as they should."""
        if self._tunnels.pop(tunnel.stream.id, None) is None:
            return
        tunnel.ended(error)
        if tunnel.established:
            self.tell("tunnel_closed", tunnel, error)
        if not self._tunnels:
            self.since_idle = trio.current_time()
            if not self.client:
                self._wake_at(self._idle_deadline())
            self._maybe_say_goodbye()
        self._changed()

    # === sending ===

    @property
    def congested(self) -> bool:
        """Whether the network does not take what we write: wait before sending more."""
        return bool(self._unsent)

    def flush(self) -> None:
        """Write what the engine has queued. Does not wait."""
        out = self.engine.data_to_send()
        if out:
            self._write(out)
        elif self._fd < 0 and self._carrier.needs_flush:
            self._start_drain()

    def send_payload(self, stream_id: int, buffer: bytearray, view: memoryview, length: int) -> None:
        """Write `length` bytes as DATA frames; they start at `buffer[9]` and credit was taken for them.

        The nine bytes in front of each frame's payload are overwritten with its header: first the spare ones, then
        bytes that are already on their way. Nothing is copied unless the network is full.
        """
        self.bytes_sent += length
        self.flush()
        largest = self.engine.max_frame_size
        if largest < length:
            largest = max(largest // 16_384 * 16_384 - FRAME_HEADER_SIZE, RECORD_PAYLOAD)
        pos = 0
        while pos < length:
            size = min(length - pos, largest)
            pack_frame_header_into(buffer, pos, size, 0, stream_id)
            self._write(view[pos : pos + FRAME_HEADER_SIZE + size])
            pos += size

    def queue_payload(self, stream_id: int, payload: memoryview | bytes) -> None:
        """Put one DATA frame of up to `RECORD_PAYLOAD` bytes among what `flush` writes; credit was taken for it."""
        self.bytes_sent += len(payload)
        self.engine.queue_data(stream_id, payload)

    def send_view(self, stream_id: int, view: memoryview) -> None:
        """Write `view` as DATA frames from where it is; credit was taken for it."""
        if len(view) <= RECORD_PAYLOAD:
            self.queue_payload(stream_id, view)
            self.flush()
            return
        self.bytes_sent += len(view)
        largest = self.engine.max_frame_size
        if largest < len(view):
            largest = max(largest // 16_384 * 16_384 - FRAME_HEADER_SIZE, RECORD_PAYLOAD)
        pos = 0
        while pos < len(view):
            piece = view[pos : pos + largest]
            pos += len(piece)
            # Header and first payload go into one TLS record; the rest is encrypted from where it lies.
            first = piece[:RECORD_PAYLOAD]
            self.engine.queue_header(stream_id, len(piece))
            self._write(self.engine.data_to_send() + first)
            if len(piece) > RECORD_PAYLOAD:
                self._write(piece[RECORD_PAYLOAD:])

    def _write(self, data: bytearray | memoryview) -> None:
        if self._write_error is not None:
            return
        if self._unsent:
            self._unsent += data
            return
        try:
            done = self._carrier.write(data)
        except SessionClosed as exc:
            self._write_failed(exc)
            return
        if done < len(data):
            self._unsent += memoryview(data)[done:]
            self._start_drain()
        elif self._fd < 0 and self._carrier.needs_flush:
            self._start_drain()

    def _start_drain(self) -> None:
        if not self._draining_unsent and self._nursery is not None:
            self._draining_unsent = True
            if self._fd >= 0:
                self._watch(WRITABLE, True)
            else:
                self._nursery.start_soon(self._drain_unsent)

    def _write_unsent(self) -> None:
        self._write_some()
        if not self._unsent:
            self._drained()
            self._watch(WRITABLE, self._draining_unsent)

    async def _drain_unsent(self) -> None:
        """The same for a carrier without a socket."""
        try:
            while self._unsent or self._carrier.needs_flush:
                await self._carrier.wait_writable()
                self._write_some()
        except SessionClosed as exc:
            self._write_failed(exc)
        finally:
            self._drained()

    def _write_some(self) -> None:
        if self._unsent:
            try:
                with memoryview(self._unsent) as view:
                    done = self._carrier.write(view)
                del self._unsent[:done]
            except SessionClosed as exc:
                self._write_failed(exc)

    def _drained(self) -> None:
        self._draining_unsent = False
        self._uncongested.unpark_all()
        while self.muted and not self._unsent:
            link = next(iter(self.muted))
            del self.muted[link]
            link.go_on()
        self.flush()

    async def wait_uncongested(self) -> None:
        """Wait until all that was written is on its way, or never will be. A checkpoint only if it waits."""
        while self._unsent and not self.closed:
            await self._uncongested.park()

    def _write_failed(self, error: SessionClosed) -> None:
        # The reader goes on: what the peer sent before it closed (an alert, the tail of a download) is still there,
        # and it is the reader that sees the end. Only sending is over.
        self._write_error = error
        self._unsent.clear()
        self._uncongested.unpark_all()
        if self.engine.ready:
            for tunnel in self._tunnels.values():
                tunnel.sending_failed(error)

    def _share_credit(self) -> None:
        queue, self.credit_queue = self.credit_queue, deque()
        for tunnel in queue:
            tunnel.credit_came()

    def return_credit(self, stream: Stream, count: int) -> None:
        """Credit that was taken for a tunnel which ended, or was cancelled, before it could use it."""
        self.engine.send_window += count
        stream.send_window += count
        self._share_credit()

    # === opening and ending ===

    async def open_tunnel(
        self, target: Authority | str, *, headers: Iterable[tuple[str | bytes, str | bytes]] = ()
    ) -> Tunnel:
        """See `HBONEClient.open_tunnel`."""
        request = ConnectRequest.build(target, headers)
        if self.error is not None:
            raise SessionClosed(f"the session has ended: {self.error}") from self.error
        if self.draining:
            raise StreamRefused("the session takes no new tunnels: GOAWAY was seen")
        deadline = trio.current_time() + self.timeouts.request
        tunnel = Tunnel(self, self.engine.open_stream(request, deadline=deadline), request)
        self._tunnels[tunnel.stream.id] = tunnel
        self._wake_at(deadline)
        self.flush()
        await tunnel.wait_answer()
        return tunnel

    def reset(self, tunnel: Tunnel, error_code: int, error: HboneError | None) -> None:
        """RST_STREAM and forget. Synchronous: it works in a cancelled scope."""
        self.engine.reset(tunnel.stream.id, error_code)
        self.flush()
        if error is None:
            name = ErrorCode.name_of(error_code)
            error = TunnelReset(f"the tunnel was reset by us: {name}", error_code=error_code, remote=False)
        tunnel.answered(error)
        self.forget(tunnel, error)

    def close_soon(self) -> None:
        """No new tunnels; a graceful end once the last one is over. Does not wait."""
        self._closing = True
        self._maybe_say_goodbye()

    def begin_drain(self) -> None:
        """Tell the peer that no new tunnels are to be had here (GOAWAY), and end when the last one does."""
        self.engine.begin_drain()
        self.flush()
        self._maybe_say_goodbye()
        self._changed()

    async def aclose(self) -> None:
        """Reset the tunnels, say goodbye and wait for the end, for at most `Timeouts.close` twice.

        Cancelled: the session ends at once.
        """
        self._closing = True
        for tunnel in self.tunnels:
            tunnel.answered(SessionClosed("the session was closed"))
            tunnel.abort()
        try:
            with trio.move_on_after(2 * self.timeouts.close):
                self._maybe_say_goodbye()
                await self.finished.wait()
        finally:
            self.kill()

    def kill(self) -> None:
        """End at once, without a word."""
        self._killed = True  # `run` may not have begun
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()

    def _maybe_say_goodbye(self) -> None:
        if self.draining and not self._tunnels and not self.engine.closed and self._nursery is not None:
            self.engine.close()
            self._nursery.start_soon(self._goodbye_then_wait)

    async def _goodbye_then_wait(self) -> None:
        await self._say_goodbye()
        self.kill()

    async def _say_goodbye(self) -> None:
        """Send what waits, end our direction, and read to the peer's end, within `Timeouts.close`.

        Closing while the peer still sends (WINDOW_UPDATE for the last upload) would make the kernel send RST, and that
        destroys what the peer has not read yet (docs/design/wire.md).
        """
        self._closing = True
        with trio.move_on_after(self.timeouts.close):
            self.flush()
            await self._wait_all_sent()
            self._carrier.shutdown_write()
            if isinstance(self._carrier, StreamCarrier):
                await self._wait_all_sent()
                await self._carrier.send_eof()
            if self.error is None:
                await trio.sleep_forever()  # the reader sees the end
            buffer = memoryview(bytearray(2 * RECORD_PAYLOAD))
            try:
                while True:
                    got = self._carrier.read_into(buffer)
                    if got == 0:
                        return
                    # Also when there was something: a peer that never stops must not keep the other tasks waiting.
                    await self._carrier.wait_readable()
            except SessionClosed:
                return

    async def _wait_all_sent(self) -> None:
        while self._draining_unsent or ((self._unsent or self._carrier.needs_flush) and self._write_error is None):
            self._start_drain()
            await self._uncongested.park()

    def _fail(self, error: HboneError) -> None:
        if self.error is None:
            self.error = error
        self._end(error)

    def _end(self, error: HboneError) -> None:
        """All tunnels break with this cause. Once."""
        if self.closed:
            return
        self.closed = True
        self.ready.set()
        self.engine.close()
        for tunnel in list(self._tunnels.values()):
            tunnel.answered(self._unanswered_error(tunnel, error))
            self.forget(tunnel, error)
        self._uncongested.unpark_all()
        self.tell("session_closed", self, self.error)
        self._changed()

    @staticmethod
    def _unanswered_error(tunnel: Tunnel, error: HboneError) -> HboneError:
        if isinstance(error, SessionClosed):
            return error
        gone = SessionClosed(f"the session ended before {tunnel.request.authority} was answered: {error}")
        gone.__cause__ = error
        return gone

    async def _keep_alive(self) -> None:
        while True:
            self._alarm = self.engine.next_deadline()
            if not self.client:
                self._alarm = min(self._alarm, self._idle_deadline())
            with trio.CancelScope(deadline=self._alarm) as self._timer:
                await trio.sleep_forever()
            now = trio.current_time()
            if not self.client and not self._tunnels and now >= self._idle_deadline():
                if not self.engine.ready:
                    self._fail(SessionClosed(f"the peer sent no SETTINGS within {now - self.since_idle:.1f} s"))
                    self.flush()
                    self.kill()
                    return
                self.begin_drain()
            if self._dispatch(self.engine.on_deadline(now)):
                self._carrier.shutdown_write()
                self.kill()

    def _wake_at(self, deadline: float) -> None:
        """See to it that `_keep_alive` looks then at the latest."""
        if deadline < self._alarm:
            self._alarm = self._timer.deadline = deadline

    def _idle_deadline(self) -> float:
        if self._tunnels or self.draining:
            return float("inf")
        if not self.engine.ready:  # a client waits for it in `wait_ready`
            return self.since_idle + min(self.timeouts.settings, self.timeouts.first_request)
        asked = self.engine.last_inbound_stream > 0
        return self.since_idle + (self.timeouts.idle if asked else self.timeouts.first_request)

    # === helpers ===

    @property
    def running(self) -> bool:
        """Whether it has begun and has not ended."""
        return self._nursery is not None and not self.closed

    def _changed(self) -> None:
        if self.on_change is not None:
            self.on_change()

    def tell(self, what: str, *args: object) -> None:
        """Call a method of the observer; what it raises is logged."""
        if self.observer is not None:
            try:
                getattr(self.observer, what)(*args)
            except Exception:  # noqa: BLE001 - told, never asked: it cannot break what it watches
                _log.exception("observer %r failed in %s", self.observer, what)
