"""What the ways in share: their result, and the few socket calls of a handshake, bounded in time and size."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Protocol

import trio

from hbone.address import Endpoint
from hbone.errors import RemoteProtocolError
from hbone.transport import reset_socket

if TYPE_CHECKING:
    from collections.abc import Callable

    from hbone.address import Authority

__all__ = [
    "HANDSHAKE_TIMEOUT",
    "BadHandshake",
    "HandshakeParser",
    "InBandWayIn",
    "SilentWayIn",
    "WayIn",
    "peer_of",
    "reset",
    "shake_hands",
]

HANDSHAKE_TIMEOUT = 10.0
"""Seconds for an application to say where it wants to go."""

_READ = 4096
_FAREWELL_TIMEOUT = 2.0
_FAREWELL_BYTES = 256 * 1024


class BadHandshake(RemoteProtocolError):
    """The application did not say where it wants to go, or left while it was told.

    Attributes:
        answer: what to send before closing.
        source: who it was, if that is known.
        target: where it would have gone to, if that is known.
    """

    def __init__(self, message: str, answer: bytes = b"", *, target: Authority | None = None) -> None:
        super().__init__(message)
        self.answer = answer
        self.source: Endpoint | None = None
        self.target = target


class WayIn(Protocol):
    """One application connection whose target is known.

    Call exactly one of `succeeded` and `failed`. After `succeeded` the socket belongs to the caller.
    """

    @property
    def target(self) -> Authority:
        """Where the application wants to go."""

    @property
    def source(self) -> Endpoint:
        """Where it comes from."""

    @property
    def sock(self) -> socket.socket:
        """Its connection; non-blocking."""

    @property
    def leftover(self) -> bytes:
        """What it has sent after the handshake already: the first bytes of the tunnel."""

    async def succeeded(self) -> None:
        """Tells the application that the tunnel is up.

        Raises:
            BadHandshake: it has gone; the socket is closed. Also closed when cancelled.
        """

    async def failed(self, error: BaseException) -> None:
        """Tells the application why there is no tunnel, as well as the way in can, and closes the socket.

        Takes two seconds at most and raises nothing but `trio.Cancelled`; the socket is closed then, too.
        """


class _Way:
    """The facts of a `WayIn`."""

    __slots__ = ("leftover", "sock", "source", "target")

    def __init__(self, *, target: Authority, source: Endpoint, sock: socket.socket, leftover: bytes = b"") -> None:
        self.target = target
        self.source = source
        self.sock = sock
        self.leftover = leftover

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.source} -> {self.target}>"


class InBandWayIn(_Way):
    """A way in with words for success and for failure.

    Args:
        target: see `WayIn`.
        source: see `WayIn`.
        sock: see `WayIn`.
        leftover: see `WayIn`.
        success: what to send when the tunnel is up.
        failure: what to send when it is not.
    """

    __slots__ = ("_failure", "_success")

    def __init__(
        self,
        *,
        target: Authority,
        source: Endpoint,
        sock: socket.socket,
        leftover: bytes = b"",
        success: bytes,
        failure: Callable[[BaseException], bytes],
    ) -> None:
        super().__init__(target=target, source=source, sock=sock, leftover=leftover)
        self._success = success
        self._failure = failure

    async def succeeded(self) -> None:
        """See `WayIn`."""
        try:
            with trio.fail_after(HANDSHAKE_TIMEOUT):
                await _send_all(self.sock, self._success)
        except (OSError, trio.TooSlowError) as error:
            reset(self.sock)
            raise BadHandshake("the application left before it was told that its tunnel is up") from error
        except BaseException:
            reset(self.sock)
            raise

    async def failed(self, error: BaseException) -> None:
        """See `WayIn`."""
        await _say_and_close(self.sock, self._failure(error))


class SilentWayIn(_Way):
    """A way in where the application believes that it talks to the target already: failure is a reset."""

    __slots__ = ()

    async def succeeded(self) -> None:
        """See `WayIn`. There is nothing to say, and no time to lose: not a checkpoint."""

    async def failed(self, _error: BaseException) -> None:
        """Resets the connection: a clean end would look like an empty answer."""
        reset(self.sock)
        await trio.lowlevel.checkpoint()


class HandshakeParser(Protocol):
    """The sans-IO side of a handshake."""

    @property
    def target(self) -> Authority | None:
        """The target, once it is known."""

    def feed(self, data: bytes) -> bytes:
        """Takes what arrived, gives what to send.

        Raises:
            BadHandshake: it is not the protocol; with the answer to that.
        """

    def late(self) -> bytes:
        """What to send when the time is up."""


async def shake_hands(sock: socket.socket, parser: HandshakeParser, *, seconds: float) -> tuple[Authority, Endpoint]:
    """Drives `parser` until it knows the target; gives target and source.

    Raises:
        BadHandshake: there is no target. It was answered and the socket is closed. Also closed when cancelled.
    """
    source = None
    try:
        source = peer_of(sock)
        with trio.move_on_after(seconds):
            while (target := parser.target) is None:
                data = await _receive(sock)
                if not data:
                    raise BadHandshake("the application closed its connection before it named a target")
                reply = parser.feed(data)
                if reply:
                    await _send_all(sock, reply)
            return target, source
        raise BadHandshake(f"the application did not name its target within {seconds:g} s", parser.late())
    except BadHandshake as error:
        error.source = source
        await _say_and_close(sock, error.answer)
        raise
    except OSError as error:
        reset(sock)
        broken = BadHandshake(f"the application's connection broke: {error.strerror or error}")
        broken.source = source
        raise broken from error
    except BaseException:
        reset(sock)
        raise


def peer_of(sock: socket.socket) -> Endpoint:
    """Who is at the other end.

    Raises:
        OSError: nobody any more.
    """
    return Endpoint.from_sockaddr(sock.getpeername())


def reset(sock: socket.socket) -> None:
    """Closes with RST instead of FIN, so that the application sees an error and not an end of data."""
    if sock.fileno() >= 0:
        trio.lowlevel.notify_closing(sock)
        reset_socket(sock)


def _close(sock: socket.socket) -> None:
    if sock.fileno() >= 0:
        trio.lowlevel.notify_closing(sock)
        sock.close()


async def _receive(sock: socket.socket) -> bytes:
    await trio.lowlevel.checkpoint_if_cancelled()
    while True:
        try:
            return sock.recv(_READ)
        except BlockingIOError:
            await trio.lowlevel.wait_readable(sock)


async def _send_all(sock: socket.socket, data: bytes) -> None:
    await trio.lowlevel.checkpoint_if_cancelled()
    view = memoryview(data)
    while view:
        try:
            view = view[sock.send(view) :]
        except BlockingIOError:
            await trio.lowlevel.wait_writable(sock)


async def _say_and_close(sock: socket.socket, data: bytes) -> None:
    """Sends the last word and closes so that it arrives.

    Closing while bytes of the application are unread makes TCP send a reset, which throws away what the application has
    not read yet; so first end our direction, then read on for a little.
    """
    try:
        with trio.move_on_after(_FAREWELL_TIMEOUT):
            await _send_all(sock, data)
            sock.shutdown(socket.SHUT_WR)
            left = _FAREWELL_BYTES
            while left > 0 and (unread := await _receive(sock)):
                left -= len(unread)
    except OSError:
        pass  # the application has gone: nobody to tell
    finally:
        _close(sock)
