"""`SocketOptions`: what the sockets of a proxy have in common."""

from __future__ import annotations

import socket
import sys
from dataclasses import dataclass
from typing import Final

from hbone.transport._netfilter import set_mark

__all__ = ["SocketOptions"]

#: Linux' own bounds.
_MAX_TIME: Final = 32_767
_MAX_RETRIES: Final = 127


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketOptions:
    """For each socket that is connected, accepted or listened on. The defaults are ztunnel's.

    With keep-alive a peer that is gone is noticed after `keepalive_time` + `keepalive_retries` * `keepalive_interval`
    seconds, when nothing else notices it before.

    Raises:
        ValueError: a number is out of its range.
    """

    mark: int | None = None
    """SO_MARK (Linux, CAP_NET_ADMIN); what a listener accepts inherits it."""
    keepalive: bool = True
    keepalive_time: int = 180
    """Seconds of silence before the first probe: 1 to 32767."""
    keepalive_interval: int = 180
    """Seconds between probes: 1 to 32767."""
    keepalive_retries: int = 9
    """Probes without an answer before the connection is given up: 1 to 127."""
    user_timeout: bool = False
    """Whether sent bytes, too, must be acknowledged within the time that keep-alive gives (Linux: TCP_USER_TIMEOUT)."""

    def __post_init__(self) -> None:
        if self.mark is not None and not 0 <= self.mark <= 0xFFFF_FFFF:
            raise ValueError(f"a packet mark is 0 to 0xffffffff, not {self.mark}")
        for name, most in (
            ("keepalive_time", _MAX_TIME),
            ("keepalive_interval", _MAX_TIME),
            ("keepalive_retries", _MAX_RETRIES),
        ):
            value = getattr(self, name)
            if not 1 <= value <= most:
                raise ValueError(f"{name} is 1 to {most}, not {value}")

    def prepare(self, sock: socket.socket) -> None:
        """Before it is connected or bound: what concerns its first packet.

        Raises:
            OSError: the mark needs a privilege, or another system.
        """
        if self.mark is not None:
            set_mark(sock, self.mark)

    def tune(self, sock: socket.socket) -> None:
        """Once it is connected: no delay, keep-alive, user time-out.

        Raises:
            OSError: some systems say so of a connection that is gone.
        """
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.keepalive:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if sys.platform == "linux":
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, self.keepalive_time)
            elif hasattr(socket, "TCP_KEEPALIVE"):  # macOS' name for it
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPALIVE, self.keepalive_time)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, self.keepalive_interval)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, self.keepalive_retries)
        if self.user_timeout and sys.platform == "linux":
            seconds = self.keepalive_time + self.keepalive_interval * self.keepalive_retries
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, seconds * 1000)
