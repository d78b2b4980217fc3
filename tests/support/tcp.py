"""Real TCP connections inside one test, as the plain non-blocking sockets that the proxies work on."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, NoReturn, cast

import trio

if TYPE_CHECKING:
    from hbone import Endpoint

__all__ = ["connected", "connected_pair", "receive_all", "receive_exactly"]


def connected_pair(host: str = "127.0.0.1") -> tuple[trio.SocketStream, socket.socket]:
    """The application's end, and the proxy's end as `accept` would give it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.bind((host, 0))
        listener.listen()
        application = socket.socket(family)
        application.connect(listener.getsockname())
        accepted, peer = listener.accept()
        while peer != application.getsockname():  # somebody who looked for whom the port belonged to before
            accepted.close()
            accepted, peer = listener.accept()
    application.setblocking(False)
    accepted.setblocking(False)
    return trio.SocketStream(trio.socket.from_stdlib_socket(application)), accepted


async def connected(sock: trio.socket.SocketType, endpoint: Endpoint) -> trio.SocketStream:
    """Connect it; one that is reset while it is being made is given as one that is reset.

    Raises:
        OSError: nobody listens there, and all else that is no reset.
    """
    try:
        await sock.connect((str(endpoint.ip), endpoint.port))
    except ConnectionResetError:  # it stood, and was reset before we asked: the kernel tells that once
        return cast("trio.SocketStream", _WasReset(sock))
    except BaseException:
        sock.close()
        raise
    return trio.SocketStream(sock)


class _WasReset(trio.abc.HalfCloseableStream):
    """A connection that was reset: who uses it is told now."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self.socket = sock

    async def _broken(self, *_: object) -> NoReturn:
        await trio.lowlevel.checkpoint()
        raise trio.BrokenResourceError("it was reset while it was being made")

    receive_some = send_all = send_eof = wait_send_all_might_not_block = _broken

    async def aclose(self) -> None:
        self.socket.close()
        await trio.lowlevel.checkpoint()


async def receive_all(stream: trio.abc.ReceiveStream) -> bytes:
    """Everything until the end."""
    data = bytearray()
    async for chunk in stream:
        data += chunk
    return bytes(data)


async def receive_exactly(stream: trio.abc.ReceiveStream, size: int) -> bytes:
    """So many bytes, however they come."""
    data = bytearray()
    while len(data) < size:
        chunk = await stream.receive_some(size - len(data))
        assert chunk, f"an end after {len(data)} of {size} bytes"
        data += chunk
    return bytes(data)
