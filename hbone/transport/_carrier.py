"""TLS under a session: directly on a socket, or over any trio stream.

Both carriers are a pyOpenSSL `Connection` behind the same few calls. Reading and writing never wait; a separate call
waits until trying again makes sense. So a session decides by itself what to do when the network is full, and one
read can be dispatched without a task switch.

On a socket OpenSSL does the system calls. Over a stream (a tunnel inside a tunnel, memory in tests) it works on
memory BIOs and `wait_readable` / `wait_writable` move the ciphertext.
"""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING, Final, Protocol

import trio
from OpenSSL import SSL

from hbone.errors import ConnectFailed, IdentityRefused, SessionClosed
from hbone.tls import explain_tls_error, verification_error
from hbone.transport._openssl import read_records, write_records

if TYPE_CHECKING:
    from hbone.errors import HboneError

__all__ = ["Carrier", "SocketCarrier", "StreamCarrier", "WOULD_BLOCK"]

#: `read_into` found nothing.
WOULD_BLOCK: Final = -1
#: Seconds for a peer that we refuse to read why.
_FAREWELL: Final = 0.5
#: Ciphertext that may wait inside a `StreamCarrier`.
_MAX_CIPHERTEXT: Final = 256 * 1024


class Carrier(Protocol):
    """What a session needs of TLS."""

    connection: SSL.Connection

    def fileno(self) -> int:
        """The socket that all bytes go through, each read and write at once; -1 when there is none."""

    @property
    def needs_flush(self) -> bool:
        """Whether ciphertext waits for `wait_writable`."""

    async def handshake(self) -> None:
        """Do the TLS handshake. Cancelled: the carrier is of no more use.

        Raises:
            ConnectFailed: and its subclasses, saying what was wrong with whom.
        """

    def read_into(self, buffer: memoryview) -> int:
        """Fill as much of `buffer` as there is now: bytes, 0 at the end, or `WOULD_BLOCK`.

        Raises:
            SessionClosed: the connection broke.
        """

    async def wait_readable(self) -> None:
        """Wait until `read_into` may have something. A checkpoint."""

    def write(self, data: memoryview | bytes | bytearray) -> int:
        """Encrypt and send what fits now; returns how many bytes of `data` that was.

        Raises:
            SessionClosed: the connection broke.
        """

    async def wait_writable(self) -> None:
        """Wait until `write` may take something, and send what waits. A checkpoint."""

    def shutdown_write(self) -> None:
        """Send close_notify and end our direction, as far as that works without waiting."""

    def close(self) -> None:
        """Let go of everything, at once."""


def _broken(what: str, exc: Exception) -> SessionClosed:
    if isinstance(exc, SSL.SysCallError):
        code = exc.args[0]
        why = "ended without close_notify" if code == -1 else errno.errorcode.get(code, str(code))
        return SessionClosed(f"{what}: {why}")
    return SessionClosed(f"{what}: {explain_tls_error(exc)}")


class _TLS:
    """What both carriers share: calls into OpenSSL and its errors."""

    __slots__ = ("_at_end", "_failure", "connection")

    def __init__(self, connection: SSL.Connection) -> None:
        self.connection = connection
        self._at_end = False
        """Nothing comes any more, whatever happens below TLS: the next read says so without waiting."""
        self._failure: SessionClosed | None = None

    def _handshake_error(self, exc: Exception) -> HboneError:
        ours = verification_error(self.connection)
        if ours is not None:
            return ours
        if isinstance(exc, SSL.SysCallError):
            code = exc.args[0]
            if code == -1:
                return ConnectFailed("the peer closed the connection during the TLS handshake")
            return ConnectFailed(f"the connection broke during the TLS handshake: {errno.errorcode.get(code, code)}")
        why = explain_tls_error(exc)
        return ConnectFailed(f"TLS handshake failed: {why}")

    def read_into(self, buffer: memoryview) -> int:
        """Read records until nothing is left or the buffer is full."""
        if self._failure is not None:
            raise self._failure
        got, error = read_records(self.connection, buffer)
        if error is None:
            return got or WOULD_BLOCK
        self._at_end = True  # whether or not TCP goes on: a peer need not close it behind its close_notify
        if isinstance(error, SSL.ZeroReturnError):
            return got  # it says so again, as often as it is asked
        self._failure = _broken("the connection broke", error)
        if not got:
            raise self._failure from error
        return got

    def write(self, data: memoryview | bytes | bytearray) -> int:
        """See `Carrier`."""
        try:
            # One record a call: OpenSSL is in partial write mode, so that what it did not take can be kept elsewhere.
            return write_records(self.connection, memoryview(data))
        except SSL.Error as exc:
            raise _broken("the connection broke", exc) from exc


class SocketCarrier(_TLS):
    """TLS straight on a non-blocking socket (docs/design/decisions.md: twice as fast as `trio.SSLStream`)."""

    __slots__ = ("_sock",)

    def __init__(self, sock: socket.socket, connection: SSL.Connection) -> None:
        """
        Args:
            sock: connected and non-blocking; closed with the carrier.
            connection: made on that socket, in its role.
        """
        super().__init__(connection)
        self._sock = sock

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def needs_flush(self) -> bool:
        return False

    async def handshake(self) -> None:
        while True:
            try:
                self.connection.do_handshake()
            except SSL.WantReadError:
                await trio.lowlevel.wait_readable(self._sock)
            except SSL.WantWriteError:
                await trio.lowlevel.wait_writable(self._sock)
            except SSL.Error as exc:
                error = self._handshake_error(exc)
                await self._let_read_alert()
                raise error from exc
            else:
                return

    async def _let_read_alert(self) -> None:
        """Closing while the peer's bytes are unread makes the kernel send RST, and the alert would be lost with it."""
        try:
            self._sock.shutdown(socket.SHUT_WR)
            with trio.move_on_after(_FAREWELL):
                while True:
                    await trio.lowlevel.wait_readable(self._sock)
                    if not self._sock.recv(_MAX_CIPHERTEXT):
                        return
        except OSError:
            pass  # it is gone already

    async def wait_readable(self) -> None:
        if self._at_end:
            await trio.lowlevel.checkpoint()
            return
        await trio.lowlevel.wait_readable(self._sock)

    async def wait_writable(self) -> None:
        await trio.lowlevel.wait_writable(self._sock)

    def shutdown_write(self) -> None:
        try:
            self.connection.shutdown()
            self._sock.shutdown(socket.SHUT_WR)
        except (SSL.Error, OSError):
            pass  # the peer was quicker

    def close(self) -> None:
        if self._sock.fileno() >= 0:
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()


class StreamCarrier(_TLS):
    """TLS over any trio stream, by memory BIOs."""

    __slots__ = ("_ciphertext", "_ended", "stream")

    def __init__(self, stream: trio.abc.Stream, connection: SSL.Connection) -> None:
        """
        Args:
            stream: closed with the carrier.
            connection: made without a socket, in its role.
        """
        super().__init__(connection)
        self.stream = stream
        self._ciphertext = bytearray()
        self._ended = False

    def fileno(self) -> int:
        return -1

    @property
    def needs_flush(self) -> bool:
        return bool(self._ciphertext)

    def _collect(self) -> None:
        try:
            while True:
                self._ciphertext += self.connection.bio_read(_MAX_CIPHERTEXT)
        except SSL.WantReadError:
            pass

    async def _flush(self) -> None:
        while self._ciphertext:
            out, self._ciphertext = self._ciphertext, bytearray()
            await self.stream.send_all(out)

    async def handshake(self) -> None:
        try:
            while True:
                try:
                    self.connection.do_handshake()
                except SSL.WantReadError:
                    self._collect()
                    await self._flush()
                    await self._receive()
                except SSL.Error as exc:
                    self._collect()  # the alert
                    error = self._handshake_error(exc)
                    try:
                        await self._flush()
                    except (trio.BrokenResourceError, trio.ClosedResourceError):
                        pass
                    raise error from exc
                else:
                    self._collect()
                    await self._flush()
                    return
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise ConnectFailed("the stream broke during the TLS handshake") from exc

    async def _receive(self) -> None:
        data = await self.stream.receive_some(65_536)
        if data:
            self.connection.bio_write(data)
        else:
            self._ended = True
            self.connection.bio_shutdown()

    def read_into(self, buffer: memoryview) -> int:
        got = super().read_into(buffer)
        self._collect()  # reading can make TLS answer: a KeyUpdate
        return got

    async def wait_readable(self) -> None:
        if self._ended or self._at_end:
            await trio.lowlevel.checkpoint()
            return
        try:
            await self._receive()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            self._failure = SessionClosed("the stream under the session broke")
            self._failure.__cause__ = exc

    def write(self, data: memoryview | bytes | bytearray) -> int:
        if len(self._ciphertext) >= _MAX_CIPHERTEXT:
            return 0
        done = super().write(memoryview(data)[:_MAX_CIPHERTEXT])
        self._collect()
        return done

    async def wait_writable(self) -> None:
        if not self._ciphertext:
            await trio.lowlevel.checkpoint()
            return
        try:
            await self._flush()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise SessionClosed("the stream under the session broke") from exc

    def shutdown_write(self) -> None:
        try:
            self.connection.shutdown()
        except SSL.Error:
            pass
        self._collect()

    async def send_eof(self) -> None:
        """End the stream's direction if it can do that alone. Never raises the stream's errors."""
        try:
            if isinstance(self.stream, trio.abc.HalfCloseableStream):
                await self.stream.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    def close(self) -> None:
        # A stream can only be closed with await; the session does that. Here no byte may go through it any more.
        self._ended = True


def refused_identity(error: HboneError) -> IdentityRefused:
    """Before the peer's SETTINGS an end means: the peer judged our certificate (see `IdentityRefused`)."""
    refused = IdentityRefused(
        "the peer refused our certificate or identity "
        f"(it closed before its SETTINGS: {error}); check that it trusts our root and accepts our trust domain"
    )
    refused.__cause__ = error
    return refused
