"""How relays end, and how they end their sockets."""

from __future__ import annotations

import fcntl
import select
import socket
import struct
import sys
import termios
from dataclasses import dataclass
from typing import Final

import trio

__all__ = ["LINGER", "RelayResult", "let_it_read", "reset_socket", "until_sent", "until_writable"]

#: Seconds that an application gets to read on, before it is reset: it takes something in that time, or nothing more.
_LET_READ: Final = 1.0
#: Seconds between two looks at what the other side's kernel has taken: of that there is no event.
_LOOK_AGAIN: Final = 0.001
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


async def until_writable(sock: socket.socket) -> bool:
    """Wait until it takes bytes again; False when it has not for so long that it gets no more."""
    with trio.move_on_after(_LET_READ):
        await trio.lowlevel.wait_writable(sock)
        return True
    return False


async def until_sent(sock: socket.socket) -> None:
    """A reset makes the kernel drop unsent output: wait until there is none, as long as it gets less."""
    left, deadline, pause = _unsent(sock), trio.current_time() + _LET_READ, _LOOK_AGAIN
    while left and trio.current_time() < deadline:
        await trio.sleep(pause)
        pause = min(2 * pause, _LET_READ / 20)
        now = _unsent(sock)
        if now < left:
            left, deadline = now, trio.current_time() + _LET_READ


def _unsent(sock: socket.socket) -> int:
    """Bytes that the other side's kernel has not taken; 0 where that cannot be known, and when it never will."""
    asked = select.poll()
    asked.register(sock, 0)
    if asked.poll(0):  # it is broken; Linux goes on counting what it has thrown away then
        return 0
    try:
        return int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    except OSError:
        return 0
