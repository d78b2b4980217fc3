"""How relays end, and how they end their sockets."""

from __future__ import annotations

import fcntl
import socket
import struct
import sys
import termios
from dataclasses import dataclass
from typing import Final

import trio

__all__ = ["LINGER", "RelayResult", "let_it_read", "reset_socket"]

#: Seconds that an application gets to read the end of a download when its upload cannot go on.
_LET_READ: Final = 1.0
_READ_SIZE: Final = 256 * 1024
#: SO_LINGER on, zero seconds: close() sends RST.
LINGER: Final = struct.pack("ii", 1, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayResult:
    """How a relay ended."""

    bytes_up: int
    """From downstream to upstream."""
    bytes_down: int
    """From upstream to downstream."""
    error: Exception | None
    """None when both directions ended as they should; otherwise what broke, and both ends were reset."""


def reset_socket(sock: socket.socket) -> None:
    """Close so that the other side sees a reset: TCP RST."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER)
    except OSError:
        pass  # not a TCP socket, or gone
    sock.close()


async def let_it_read(sock: socket.socket) -> None:
    """A reset makes the kernel drop unsent output: read until the application has had its end, or could have.

    Raises:
        OSError: it has broken.
    """
    while True:
        with trio.move_on_after(_LET_READ):
            while True:
                await trio.lowlevel.wait_readable(sock)
                try:
                    if not sock.recv(_READ_SIZE):
                        return
                except BlockingIOError:
                    pass
        if not _unsent(sock):
            return


def _unsent(sock: socket.socket) -> int:
    """Bytes that the other side's kernel has not taken; 0 where that cannot be known."""
    try:
        return int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    except OSError:
        return 0
