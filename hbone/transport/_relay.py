"""Between a tunnel and a socket, at full speed: the data path of both proxies.

Theory of operation
===================

A `Link` ties one tunnel to one socket. It has no task of its own: the session's reader calls `feed` with what came
through the tunnel, and the hub calls `io_ready` when the socket can be read or written. The task that called `relay`
sleeps until both directions have ended; a tunnel at rest is that task and a few hundred bytes.

Tunnel to socket: what came is sent to the socket at once, from the session's read buffer. Only what the socket does
not take is copied, into a buffer that the tunnel's window bounds, and credit for it goes back once the socket took it.

Socket to tunnel: what can be read (and windows allow) is read into a buffer that all links of a thread share, behind
nine spare bytes; the DATA header goes in front, and that is what TLS gets. Small pieces of many tunnels leave in one
write at the end of a round of the hub. While the network takes nothing, a link does not read.

Each direction ends by itself: the socket's end of file becomes END_STREAM, END_STREAM becomes shutdown(SHUT_WR).
Trouble goes through as trouble (RFC 9113 section 8.5): a broken socket becomes RST_STREAM(CONNECT_ERROR), a tunnel
that was reset or whose session ended becomes a TCP reset. Never an end of file that was none. What the peer had sent
before is not lost with that: the socket gets it first, as long as it takes it. Some peers reset what they have sent
in full.
"""

from __future__ import annotations

import logging
import socket
from typing import Final

import trio

from hbone.errors import HboneError, TunnelReset
from hbone.protocol import ErrorCode
from hbone.protocol._frames import FRAME_HEADER_SIZE
from hbone.transport._ends import LINGER, RelayResult, let_it_read, reset_socket, until_sent, until_writable
from hbone.transport._hub import Hub, shared_hub
from hbone.transport._poller import READABLE, WRITABLE
from hbone.transport._session import RECORD_PAYLOAD
from hbone.transport._splice import relay_sockets
from hbone.transport._tunnel import Tunnel, reset_by_us

__all__ = ["Link", "relay"]

_log: Final = logging.getLogger("hbone")

#: One read of a socket. Twice as much brought nothing.
_READ_SIZE: Final = 256 * 1024
_COPY_SIZE: Final = 256 * 1024


class _Buffer:
    """What sockets are read into, with room for a frame header in front."""

    __slots__ = ("bytes", "hub", "view")

    def __init__(self) -> None:
        self.bytes: bytearray = bytearray(FRAME_HEADER_SIZE + _READ_SIZE)
        self.view: memoryview = memoryview(self.bytes)
        self.hub: Hub = shared_hub()


_buffer: trio.lowlevel.RunVar[_Buffer] = trio.lowlevel.RunVar("hbone-relay-buffer")


def _shared_buffer() -> _Buffer:
    try:
        return _buffer.get()
    except LookupError:
        buffer = _Buffer()
        _buffer.set(buffer)
        return buffer


class Link:
    """One tunnel tied to one socket; see the module's theory of operation."""

    __slots__ = (
        "_buffer",
        "_done",
        "_fd",
        "_hub",
        "_interest",
        "_pending",
        "_sock",
        "_tunnel",
        "_waiter",
        "_watched",
        "cut",
        "error",
        "from_socket",
        "linger",
        "read_ended",
        "to_socket",
        "write_ended",
    )

    def __init__(self, tunnel: Tunnel, sock: socket.socket) -> None:
        self._tunnel = tunnel
        self._sock = sock
        self._fd = sock.fileno()
        self._buffer = _shared_buffer()
        self._hub = self._buffer.hub
        self._pending: bytearray | None = None
        self._interest = READABLE
        self._watched = False
        self._done = False
        self._waiter: trio.lowlevel.Task | None = None
        self.error: Exception | None = None
        self.from_socket: int = 0
        """Bytes read from the socket and sent through the tunnel."""
        self.to_socket: int = 0
        """Bytes that the socket took."""
        self.cut: bool = False
        """The tunnel broke before the peer had ended its direction: the socket is reset behind what came."""
        self.linger: bool = False
        """The tunnel broke, or was half ended, and the application may still send: it must get its end first."""
        self.read_ended: bool = False
        self.write_ended: bool = False

    @property
    def buffered(self) -> int:
        """Bytes that came through the tunnel and that the socket has not taken."""
        return len(self._pending) if self._pending is not None else 0

    def start(self) -> None:
        """Take the tunnel over, with what it has received so far.

        Raises:
            trio.BusyResourceError: the tunnel is in use.
            trio.ClosedResourceError: it was closed.
        """
        tunnel = self._tunnel
        tunnel.attach(self)
        early = tunnel.take_buffer()
        live = tunnel.session.running  # otherwise it is about to end, and will tell the tunnel so
        if live:
            self._hub.add(self._fd, self, self._interest)
            self._watched = True
        if early:
            self.feed(memoryview(early))
        if tunnel.eof_sent:
            self.read_ended = self.linger = True
            self._want(self._interest & ~READABLE)
        if tunnel.eof_received:
            self.feed_eof()
        if not tunnel.stream.open:
            self.tunnel_ended(tunnel.reset_error)
        if tunnel.session.client and self._watched and not self._done and self._interest & READABLE:
            self._read()  # whoever asked for a tunnel has mostly written into it already: do not wait for the hub
        tunnel.session.flush()

    async def wait(self) -> None:
        """Wait for the end of both directions. Cancelled: the caller resets."""
        if not self._done:
            self._waiter = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._abort)
        else:
            await trio.lowlevel.checkpoint()

    def _abort(self, _: object) -> trio.lowlevel.Abort:
        self._waiter = None
        return trio.lowlevel.Abort.SUCCEEDED

    def detach(self) -> None:
        """Let go of the hub, and of the tunnel, which knows us: without a cycle both are gone with their relay."""
        self._finish()
        del self._tunnel

    async def finish_writing(self) -> None:
        """Write what is left when the tunnel is over: by the relay's own task."""
        try:
            while self._pending:
                if not self.cut:
                    await trio.lowlevel.wait_writable(self._sock)
                elif not await until_writable(self._sock):
                    return
                try:
                    sent = self._sock.send(self._pending)
                except BlockingIOError:
                    continue
                del self._pending[:sent]
                self._took(sent)
            if not self.write_ended and self._tunnel.eof_received:
                self._sock.shutdown(socket.SHUT_WR)
                self.write_ended = True
            if self.cut:
                await until_sent(self._sock)
            elif self.linger and self.write_ended:
                await let_it_read(self._sock)
        except OSError as exc:
            self.error = self.error or exc.with_traceback(None)

    # === tunnel to socket ===

    def feed(self, data: memoryview) -> None:
        """Bytes came through the tunnel."""
        if self._done:
            return
        if self._pending is not None:
            self._pending += data
            return
        try:
            sent = self._sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError as exc:
            self._socket_failed(exc)
            return
        if sent:
            self._took(sent)
        if sent < len(data):
            self._pending = bytearray(data[sent:])
            self._want(self._interest | WRITABLE)

    def _took(self, count: int) -> None:
        self.to_socket += count
        tunnel = self._tunnel
        tunnel.bytes_received += count
        tunnel.session.engine.consumed(tunnel.stream, count)

    def _write_pending(self) -> None:
        pending = self._pending
        assert pending is not None
        try:
            with memoryview(pending) as view:
                sent = self._sock.send(view)
        except BlockingIOError:
            return
        except OSError as exc:
            self._socket_failed(exc)
            return
        del pending[:sent]
        self._took(sent)
        if not pending:
            self._pending = None
            self._want(self._interest & ~WRITABLE)
            if self._tunnel.eof_received:
                self._end_writing()

    def feed_eof(self) -> None:
        """END_STREAM came."""
        if self._pending is None:
            self._end_writing()

    def _end_writing(self) -> None:
        if self._done or self.write_ended:
            return
        self.write_ended = True
        if not self.read_ended or self.linger:
            try:
                self._sock.shutdown(socket.SHUT_WR)
            except OSError as exc:
                self._socket_failed(exc)
                return
        self._maybe_finish()

    # === socket to tunnel ===

    def io_ready(self, what: int) -> None:
        """The hub says: readable, writable, or both when the socket has broken."""
        if self._done:
            return
        if what & WRITABLE and self._pending is not None:
            self._write_pending()
            self._hub.flush_later(self._tunnel.session)  # credit for what was taken
            if self._done:
                return
        if what & READABLE:
            if self._interest & READABLE:
                self._read()
            elif what & WRITABLE:
                self._look_broken()

    def io_failed(self, error: Exception) -> None:
        """See `Watcher`."""
        _log.error("a relay failed", exc_info=error)
        self._socket_failed(OSError(0, f"the relay failed: {error!r}"))

    def go_on(self) -> None:
        """The network takes more again, and it is our turn: there is probably something to read."""
        if not self._done and not self.read_ended and self._read():
            session = self._tunnel.session
            if session.congested:
                session.muted[self] = None  # without being told in between: that would be two system calls
            else:
                self._want(self._interest | READABLE)

    def _read(self) -> bool:
        """Read once. Returns whether to go on when there is more."""
        tunnel = self._tunnel
        session, stream = tunnel.session, tunnel.stream
        if session.congested:
            self._want(self._interest & ~READABLE)
            session.muted[self] = None
            return False
        engine = session.engine
        credit = min(stream.send_window, engine.send_window)
        if session.credit_queue and credit > _COPY_SIZE // 4:
            credit = _COPY_SIZE // 4  # others wait for the session's window: take turns
        if credit <= 0:
            if engine.send_window <= 0 and tunnel not in session.credit_queue:
                session.credit_queue.append(tunnel)
            self._want(self._interest & ~READABLE)
            return False
        try:
            buffer = self._buffer
            count = self._sock.recv_into(buffer.view[FRAME_HEADER_SIZE : FRAME_HEADER_SIZE + min(credit, _READ_SIZE)])
        except BlockingIOError:
            return True
        except OSError as exc:
            self._socket_failed(exc)
            return False
        if count:
            engine.take_credit(stream, count)
            self.from_socket += count
            tunnel.bytes_sent += count
            if count <= RECORD_PAYLOAD:
                session.queue_payload(stream.id, buffer.view[FRAME_HEADER_SIZE : FRAME_HEADER_SIZE + count])
                self._hub.flush_later(session)
            else:
                session.send_payload(stream.id, buffer.bytes, buffer.view, count)
            return True
        self.read_ended = True
        self._want(self._interest & ~READABLE)
        tunnel.end()
        self._maybe_finish()
        return False

    def credit_came(self) -> None:
        """A window opened."""
        if not self.read_ended and not self._done and not self._interest & READABLE:
            self._want(self._interest | READABLE)

    def _look_broken(self) -> None:
        """Told of a socket that we do not want to read: it broke, or both its directions ended."""
        code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._socket_failed(OSError(code, "the application's connection broke"))
        elif self._watched and not self._interest:
            # Both ended, and bytes wait for credit: level-triggered, epoll would tell us of it for ever.
            self._hub.remove(self._fd)
            self._watched = False

    # === ends ===

    def tunnel_ended(self, error: HboneError | None) -> None:
        """The tunnel is over. With an error the socket is reset, behind what has come for it."""
        if self._done:
            return
        if error is not None:
            self.error = error
            given_up = isinstance(error, TunnelReset) and not error.remote  # by us, because it must end now
            if given_up:
                self._pending = None
            elif self._tunnel.eof_received:
                # All of the other direction has come: the socket gets it, and only then learns that nobody reads it.
                self.linger = self.read_ended = True
            else:
                self.cut = True
            self._finish()
        elif self._pending is not None:
            self._finish()

    def _socket_failed(self, exc: OSError) -> None:
        self.error = exc.with_traceback(None)  # which has us in its frames
        self._pending = None
        tunnel = self._tunnel
        if tunnel.stream.open:
            # RFC 9113 section 8.5: any error of the TCP connection is a stream error of type CONNECT_ERROR.
            reason = reset_by_us(f"the relayed connection broke: {exc.strerror or exc}", ErrorCode.CONNECT_ERROR)
            reason.__cause__ = self.error
            tunnel.session.reset(tunnel, ErrorCode.CONNECT_ERROR, reason)
        self._finish()

    def _maybe_finish(self) -> None:
        if self.read_ended and self.write_ended:
            self._finish()

    def _finish(self) -> None:
        if self._done:
            return
        self._done = True
        if self._watched:
            self._hub.remove(self._fd)
            self._watched = False
        if self._waiter is not None:
            waiter, self._waiter = self._waiter, None
            trio.lowlevel.reschedule(waiter)

    def _want(self, interest: int) -> None:
        if interest == self._interest or self._done:
            return
        self._interest = interest
        if self._watched:
            self._hub.change(self._fd, interest)
        elif self._tunnel.session.running:
            self._hub.add(self._fd, self, interest)
            self._watched = True


_SOCKETS = (socket.socket, trio.SocketStream)
_End = socket.socket | trio.SocketStream | trio.abc.HalfCloseableStream


async def relay(downstream: _End, upstream: _End) -> RelayResult:
    """Carry bytes both ways until both directions have ended, then close both ends.

    Each direction ends by itself, exactly: nothing is lost or added whoever ends first. When one end breaks, the
    other is reset (RST_STREAM, TCP RST), so that no cut transfer looks complete.

    Args:
        downstream: who asked; `bytes_up` counts what comes from here.
        upstream: who was asked.
            Either may be a `Tunnel`, a connected non-blocking `socket.socket`, a `trio.SocketStream`, or any
            half-closeable trio stream. A tunnel with a socket takes the fast path, and so do two sockets. Both are
            closed in the end, also when cancelled: then both are reset.

    Returns:
        How it ended; a broken end is reported in there, not raised.
    """
    if isinstance(upstream, Tunnel):
        sock = _plain_socket(downstream)
        if sock is not None:
            link = await _relay_socket(upstream, sock)
            return RelayResult(bytes_up=link.from_socket, bytes_down=link.to_socket, error=link.error)
    elif isinstance(downstream, Tunnel):
        sock = _plain_socket(upstream)
        if sock is not None:
            link = await _relay_socket(downstream, sock)
            return RelayResult(bytes_up=link.to_socket, bytes_down=link.from_socket, error=link.error)
    elif isinstance(downstream, _SOCKETS) and isinstance(upstream, _SOCKETS):
        socks = _plain_socket(downstream), _plain_socket(upstream)
        assert socks[0] is not None
        assert socks[1] is not None
        return await relay_sockets(socks[0], socks[1])
    return await _relay_streams(_as_stream(downstream), _as_stream(upstream))


def _plain_socket(end: _End) -> socket.socket | None:
    """The socket itself, for system calls without trio; None when there is none."""
    if isinstance(end, socket.socket):
        return end
    if isinstance(end, trio.SocketStream):
        # trio does not hand its socket out, so ours is a second descriptor of the same connection.
        theirs = end.socket
        mine = socket.fromfd(theirs.fileno(), theirs.family, theirs.type)
        mine.setblocking(False)
        theirs.close()
        return mine
    return None


def _as_stream(end: _End) -> trio.abc.HalfCloseableStream:
    return trio.SocketStream(trio.socket.from_stdlib_socket(end)) if isinstance(end, socket.socket) else end


async def _relay_socket(tunnel: Tunnel, sock: socket.socket) -> Link:
    link = Link(tunnel, sock)
    try:
        link.start()
        await link.wait()
        await link.finish_writing()
    finally:
        link.detach()
        if link.read_ended and link.write_ended and link.error is None:
            sock.close()
        else:
            reset_socket(sock)
            tunnel.abort(ErrorCode.CONNECT_ERROR if link.error is not None else ErrorCode.CANCEL)
    return link


async def _relay_streams(
    downstream: trio.abc.HalfCloseableStream, upstream: trio.abc.HalfCloseableStream
) -> RelayResult:
    counts = [0, 0]
    broken: list[Exception] = []

    async def carry(source: trio.abc.HalfCloseableStream, sink: trio.abc.HalfCloseableStream, which: int) -> None:
        try:
            while data := await source.receive_some(_COPY_SIZE):
                await sink.send_all(data)
                counts[which] += len(data)
            await sink.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            broken.append(exc)
            nursery.cancel_scope.cancel()

    clean = False
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(carry, downstream, upstream, 0)
            nursery.start_soon(carry, upstream, downstream, 1)
        clean = not broken
    finally:
        # Also when cancelled in between: the second end is closed whatever happens to the first.
        try:
            await (downstream.aclose() if clean else _reset_stream(downstream))
        finally:
            await (upstream.aclose() if clean else _reset_stream(upstream))
    return RelayResult(bytes_up=counts[0], bytes_down=counts[1], error=broken[0] if broken else None)


async def _reset_stream(end: trio.abc.HalfCloseableStream) -> None:
    if isinstance(end, Tunnel):
        end.abort(ErrorCode.CONNECT_ERROR)
    elif isinstance(end, trio.SocketStream):
        try:
            end.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER)
        except OSError:
            pass
    await trio.aclose_forcefully(end)
