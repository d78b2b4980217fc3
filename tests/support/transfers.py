"""Known bytes over trio streams."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from support.backends import pattern

if TYPE_CHECKING:
    import trio

__all__ = ["download", "receive_all", "send_pattern"]


async def send_pattern(stream: trio.abc.HalfCloseableStream, size: int, *, end: bool = True) -> None:
    """Sends `pattern(size)` and, unless told otherwise, our end."""
    for piece in pattern(size):
        await stream.send_all(piece)
    if end:
        await stream.send_eof()


async def receive_all(stream: trio.abc.ReceiveStream) -> tuple[int, str]:
    """How much came until the end, and its SHA-256 in hex."""
    digest = hashlib.sha256()
    size = 0
    while chunk := await stream.receive_some():
        digest.update(chunk)
        size += len(chunk)
    return size, digest.hexdigest()


async def download(stream: trio.abc.ReceiveStream) -> bytes:
    """What comes until the end."""
    return b"".join([bytes(chunk) async for chunk in stream])
