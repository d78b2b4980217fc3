"""Real TCP connections inside one test, as the plain non-blocking sockets that the proxies work on."""

from __future__ import annotations

import socket

import trio

__all__ = ["connected_pair", "receive_all", "receive_exactly"]


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
