"""`Tunnel`: the byte stream of one CONNECT, as trio wants streams to be.

Received bytes are in one of three places: given to the task that waits in `receive_some`, in `_buffer`, or, once the
tunnel is relayed, straight in the socket of the relay's link (`_link`), which then is told everything in place of
the buffer.
"""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Final

import trio

from hbone.errors import HboneError, SessionClosed, TunnelReset
from hbone.protocol import ErrorCode
from hbone.transport._values import TunnelStatistics

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from hbone.address import Authority
    from hbone.protocol import ConnectRequest, ConnectResponse, Stream
    from hbone.transport._relay import Link
    from hbone.transport._session import Session
    from hbone.transport._values import Peer

__all__ = ["Tunnel"]

#: Bytes that one turn of `send_all` takes of the windows: large enough for bulk, small enough to take turns.
_TURN: Final = 256 * 1024
#: The same while others wait for the session's window.
_SHORT_TURN: Final = 64 * 1024


class Tunnel(trio.abc.HalfCloseableStream):
    """One tunnel: send, receive, and end each direction by itself (RFC 9113 section 8.5; wire profile, data and close).

    Made by `HBONEClient.open_tunnel`, `ConnectionPool.open_tunnel` and `TunnelRequest.accept`. It raises only trio's
    stream errors; their ``__cause__`` is an `HboneError` that says what happened. A tunnel that was reset, or whose
    session ended, before the peer's END_STREAM is an error, never an end of stream.
    """

    # Thousands are held idle: no instance dict.
    __slots__ = (
        "__weakref__",
        "_buffer",
        "_closed",
        "_eof",
        "_error",
        "_granted",
        "_link",
        "_receiver",
        "_sender",
        "_sending",
        "_sent_eof",
        "_session",
        "_waiter",
        "_wanted",
        "bytes_received",
        "bytes_sent",
        "established",
        "on_gone",
        "request",
        "response",
        "stream",
    )

    def __init__(self, session: Session, stream: Stream, request: ConnectRequest) -> None:
        self._session = session
        self.stream: Stream = stream
        self.request: ConnectRequest = request
        self.response: ConnectResponse | None = None
        self.established: bool = False
        self.on_gone: Callable[[], None] | None = None
        """Called when the stream ends before it was established: the handler of a request is not needed any more."""
        self.bytes_sent: int = 0
        self.bytes_received: int = 0
        self._buffer: bytearray | None = None
        self._eof = False
        self._sent_eof = False
        self._closed = False
        self._error: HboneError | None = None
        self._link: Link | None = None
        self._receiver: trio.lowlevel.Task | None = None
        self._sender: trio.lowlevel.Task | None = None
        self._sending = False
        self._wanted = 0
        self._granted = 0
        """Credit that was taken for the sender while it waited."""
        self._waiter: trio.lowlevel.Task | HboneError | None = None

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open" if self.stream.open else "ended"
        return f"<Tunnel {state} to {self.request.authority} peer={self.peer.identity}>"

    @property
    def target(self) -> Authority:
        """Where the bytes go: the CONNECT's authority."""
        return self.request.target

    @property
    def peer(self) -> Peer:
        """Who is at the other end of the session."""
        return self._session.peer

    @property
    def session(self) -> Session:
        """The session that carries it."""
        return self._session

    def statistics(self) -> TunnelStatistics:
        """A snapshot."""
        buffered = len(self._buffer) if self._buffer is not None else 0
        if self._link is not None:
            buffered += self._link.buffered
        return TunnelStatistics(
            bytes_sent=self.bytes_sent,
            bytes_received=self.bytes_received,
            send_window=self.stream.send_window,
            receive_buffered=buffered,
            open=self.stream.open,
        )

    # === trio.abc.HalfCloseableStream ===

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send `data`; returns when TLS has it or the session keeps it.

        Cancelled: an unknown part was sent, always whole frames; the session and its other tunnels are unharmed.

        Raises:
            trio.BrokenResourceError: the tunnel was reset or the session ended; see ``__cause__``.
            trio.ClosedResourceError: `aclose` or `send_eof` was called before.
            trio.BusyResourceError: another task is sending.
        """
        self._begin_sending()
        try:
            await trio.lowlevel.checkpoint()
            self._check_sendable()
            session, stream = self._session, self.stream
            with memoryview(data) as whole, whole.cast("B") as view:
                done, size = 0, len(view)
                while done < size:
                    if session.congested:
                        await session.wait_uncongested()
                        self._check_sendable()
                        continue
                    turn = _SHORT_TURN if session.credit_queue else _TURN
                    credit = session.engine.take_credit(stream, min(size - done, turn))
                    if not credit:
                        credit = await self._wait_credit(size - done)
                    if credit:
                        self.bytes_sent += credit
                        session.send_view(stream.id, view[done : done + credit])
                        done += credit
                    self._check_sendable()
        finally:
            self._sending = False

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until there is credit to send.

        Raises:
            trio.BrokenResourceError: as `send_all`.
            trio.ClosedResourceError: as `send_all`.
            trio.BusyResourceError: as `send_all`.
        """
        self._begin_sending()
        try:
            await trio.lowlevel.checkpoint()
            self._check_sendable()
            while self.stream.send_window <= 0 or self._session.engine.send_window <= 0:
                await self._wait_credit(0)
                self._check_sendable()
            await self._session.wait_uncongested()
        finally:
            self._sending = False

    async def send_eof(self) -> None:
        """End our direction: END_STREAM. Receiving goes on. A second call does nothing.

        Raises:
            trio.BrokenResourceError: as `send_all`.
            trio.ClosedResourceError: `aclose` was called before.
            trio.BusyResourceError: as `send_all`.
        """
        self._begin_sending()
        try:
            await trio.lowlevel.checkpoint()
            if self._sent_eof and not self._closed:
                return
            self._check_sendable()
            self.end()
        finally:
            self._sending = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """Wait for bytes, at least one; ``b""`` once the peer ended its direction and all was received.

        Cancelled: nothing was taken.

        Raises:
            trio.BrokenResourceError: the tunnel was reset, or the session ended, before the peer ended its direction;
                what came before was received before.
            trio.ClosedResourceError: `aclose` was called.
            trio.BusyResourceError: another task is receiving.
            ValueError: `max_bytes` is less than 1.
        """
        if max_bytes is not None and operator.index(max_bytes) < 1:
            raise ValueError("max_bytes must be at least 1")
        if self._receiver is not None or self._link is not None:
            raise trio.BusyResourceError("another task is already receiving from this tunnel")
        self._receiver = task = trio.lowlevel.current_task()
        try:
            await trio.lowlevel.checkpoint()
            while True:
                if self._closed:
                    raise trio.ClosedResourceError("this tunnel was closed")
                if self._buffer:
                    break
                if self._eof:
                    return b""
                if self._error is not None:
                    raise trio.BrokenResourceError(str(self._error)) from self._error
                # `feed` and the like reschedule this task, so the mark must stand while it waits and only then.
                task.custom_sleep_data = self
                await trio.lowlevel.wait_task_rescheduled(self._abort_receive)
        finally:
            task.custom_sleep_data = None
            self._receiver = None  # not sooner: the next receiver would be forgotten
        if max_bytes is None or len(self._buffer) <= max_bytes:
            data: bytes | bytearray = self._buffer
            self._buffer = None
        else:
            data = bytes(memoryview(self._buffer)[:max_bytes])
            del self._buffer[:max_bytes]
        self.bytes_received += len(data)
        if self._session.engine.consumed(self.stream, len(data)):
            self._session.flush()
        return data

    async def aclose(self) -> None:
        """Close both directions, as closing a socket does.

        Ours ends with END_STREAM if it has not ended; if the peer's has not ended either, RST_STREAM(CANCEL) behind
        that says that nobody reads any more. When both had ended nothing is said. In a cancelled scope, and when an
        ``async with`` block is left by an exception, there is no END_STREAM, only the reset: what was cut short must
        not look complete. Everything is queued before the checkpoint, so it leaves in any case.
        """
        if not self._closed:
            whole = self._link is None and trio.current_effective_deadline() > -math.inf
            if whole and self.stream.open and not self._sent_eof:
                self.end()
            self._closed = True
            self._buffer = None
            if self.stream.open:
                self._session.reset(self, ErrorCode.CANCEL, None)
            self._wake(self._receiver)
            self._wake(self._sender)
        await trio.lowlevel.checkpoint()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if exc is not None:
            self.abort()
        await self.aclose()

    def abort(self, error_code: int = ErrorCode.CANCEL) -> None:
        """Reset the tunnel now: RST_STREAM with `error_code` (RFC 9113 section 7). Does not wait."""
        if self.stream.open:
            self._session.reset(self, error_code, None)

    # === sending, inside ===

    def _begin_sending(self) -> None:
        if self._sending or self._link is not None:
            raise trio.BusyResourceError("another task is already sending on this tunnel")
        self._sending = True

    def _check_sendable(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this tunnel was closed")
        if self._error is not None:
            raise trio.BrokenResourceError(str(self._error)) from self._error
        if self._sent_eof:
            raise trio.ClosedResourceError("send_eof was called on this tunnel")

    def end(self) -> None:
        """END_STREAM, without waiting."""
        self._sent_eof = True
        session = self._session
        session.engine.end_stream(self.stream.id)
        session.flush()
        if not self.stream.open:
            session.forget(self, None)

    async def _wait_credit(self, wanted: int) -> int:
        """Wait for credit, for the session's in turn. Returns how much of `wanted` bytes was taken of it.

        It is taken at the moment it comes, in the order of the queue: trio wakes tasks in any order, and whoever
        happened to run first would take everything, again and again.
        """
        queue = self._session.credit_queue
        if self._session.engine.send_window <= 0 and self not in queue:
            queue.append(self)
        self._wanted = wanted
        self._sender = task = trio.lowlevel.current_task()
        task.custom_sleep_data = self
        try:
            await trio.lowlevel.wait_task_rescheduled(self._abort_send)
        finally:
            task.custom_sleep_data = None
            self._sender = None
        granted, self._granted = self._granted, 0
        session = self._session
        try:
            # Many are woken at once; together they would write more than a network that is full should have to keep.
            while granted and session.congested and not session.closed:
                await session.wait_uncongested()
        except trio.Cancelled:
            session.return_credit(self.stream, granted)
            raise
        if granted and (self._closed or self._error is not None):
            session.return_credit(self.stream, granted)
            return 0
        return granted

    def _abort_send(self, _: object) -> trio.lowlevel.Abort:
        self._sender = None
        return trio.lowlevel.Abort.SUCCEEDED

    def _abort_receive(self, _: object) -> trio.lowlevel.Abort:
        assert self._receiver is not None
        self._receiver.custom_sleep_data = None  # it is on its way: nobody must wake it again
        return trio.lowlevel.Abort.SUCCEEDED

    def _wake(self, task: trio.lowlevel.Task | None) -> None:
        if task is not None and task.custom_sleep_data is self:
            task.custom_sleep_data = None
            trio.lowlevel.reschedule(task)

    # === told by the session ===

    async def wait_answer(self) -> None:
        """Wait for the answer to CONNECT. Cancelled: the request is reset."""
        if self._waiter is None and not self.established:
            self._waiter = trio.lowlevel.current_task()
            try:
                await trio.lowlevel.wait_task_rescheduled(self._abort_wait)
            except BaseException:
                self._waiter = None
                if self.stream.open:
                    self._session.reset(self, ErrorCode.CANCEL, None)
                raise
        else:
            await trio.lowlevel.checkpoint()
        if isinstance(self._waiter, HboneError):
            error, self._waiter = self._waiter, None
            raise error

    def _abort_wait(self, _: object) -> trio.lowlevel.Abort:
        # The task is on its way from here on: an answer that comes before it runs must not reschedule it again.
        self._waiter = None
        return trio.lowlevel.Abort.SUCCEEDED

    def answered(self, error: HboneError | None) -> None:
        """The CONNECT was answered (client), or never will be."""
        if self.established or isinstance(self._waiter, HboneError):
            return
        if error is None:
            self.established = True
        waiter, self._waiter = self._waiter, error
        if isinstance(waiter, trio.lowlevel.Task):
            trio.lowlevel.reschedule(waiter)

    def feed(self, data: memoryview) -> None:
        """Bytes came. `data` is a view into the session's buffer: copy or send it now."""
        if self._link is not None:
            self._link.feed(data)
        elif self._closed:
            self._session.engine.consumed(self.stream, len(data))
        else:
            if self._buffer is None:
                self._buffer = bytearray(data)
            else:
                self._buffer += data
            self._wake(self._receiver)

    def feed_eof(self) -> None:
        """The peer ended its direction."""
        self._eof = True
        if self._link is not None:
            self._link.feed_eof()
        else:
            self._wake(self._receiver)

    def ended(self, error: HboneError | None) -> None:
        """The stream is over: after both ends (`error` is None) or by a reset."""
        if error is not None and self._error is None and not self._closed:
            self._error = error
        if self._link is not None:
            self._link.tunnel_ended(error)
        if self.on_gone is not None and not self.established:
            self.on_gone()
        self._wake(self._receiver)
        self._wake(self._sender)

    def credit_came(self) -> None:
        """A window opened."""
        if self._link is not None:
            self._link.credit_came()
            return
        task = self._sender
        if task is None or task.custom_sleep_data is not self:
            return
        session = self._session
        if self._wanted:
            self._granted = session.engine.take_credit(self.stream, min(self._wanted, _SHORT_TURN))
            if not self._granted:
                if session.engine.send_window <= 0 and self not in session.credit_queue:
                    session.credit_queue.append(self)
                return
        self._wake(task)

    def sending_failed(self, error: SessionClosed) -> None:
        """Nothing can be written any more; what was sent to us may still come."""
        if self._link is None:
            self._wake(self._sender)

    def take_buffer(self) -> bytearray:
        """What was received and not taken, handed over to the relay or to a refusal's reason."""
        data, self._buffer = self._buffer, None
        return data if data is not None else bytearray()

    def attach(self, link: Link) -> None:
        """From now on the link is told, in place of the buffer.

        Raises:
            trio.BusyResourceError: a task is receiving or sending.
            trio.ClosedResourceError: it was closed.
        """
        if self._closed:
            raise trio.ClosedResourceError("this tunnel was closed")
        if self._receiver is not None or self._sending or self._link is not None:
            raise trio.BusyResourceError("this tunnel is in use")
        self._link = link

    @property
    def reset_error(self) -> HboneError | None:
        """Why the tunnel broke, if it did."""
        return self._error

    @property
    def eof_received(self) -> bool:
        """Whether the peer ended its direction."""
        return self._eof

    @property
    def eof_sent(self) -> bool:
        """Whether we ended ours."""
        return self._sent_eof


def reset_by_us(why: str, error_code: int) -> TunnelReset:
    """The error of a tunnel that we give up."""
    return TunnelReset(why, error_code=error_code, remote=False)
