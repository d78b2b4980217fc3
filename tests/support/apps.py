"""The application at the near end: plain blocking TCP clients, for what sits in front of an originator."""

from __future__ import annotations

import hashlib
import socket
import threading
from dataclasses import dataclass

from support.backends import pattern

__all__ = ["Outcome", "dial", "exchange", "transfer"]


def dial(port: int, *, host: str = "127.0.0.1", timeout: float = 60) -> socket.socket:
    sock = socket.create_connection((host, port), timeout)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


@dataclass(slots=True)
class Outcome:
    """How a transfer ended, as the application saw it."""

    received: int = 0
    sha: str = ""
    end: str = ""
    """``eof`` or ``reset``."""
    head: bytes = b""
    """The first 64 bytes."""
    send_error: str = ""


def exchange(sock: socket.socket, upload: int = 0, *, half_close: bool = True) -> Outcome:
    """Sends `pattern(upload)` and our FIN (unless not `half_close`) while reading to the other side's end."""
    outcome = Outcome()

    def send() -> None:
        try:
            for piece in pattern(upload):
                sock.sendall(piece)
            if half_close:
                sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            outcome.send_error = type(error).__name__

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    digest = hashlib.sha256()
    try:
        while chunk := sock.recv(1 << 18):
            if len(outcome.head) < 64:
                outcome.head += chunk[: 64 - len(outcome.head)]
            digest.update(chunk)
            outcome.received += len(chunk)
        outcome.end = "eof"
    except ConnectionResetError:
        outcome.end = "reset"
    sender.join(60)
    if outcome.send_error == ConnectionResetError.__name__:
        outcome.end = "reset"  # the kernel tells of it once: what is read after that looks like an end
    outcome.sha = digest.hexdigest()
    return outcome


def transfer(port: int, upload: int = 0, *, host: str = "127.0.0.1") -> Outcome:
    """A connection, and `exchange` on it; a proxy may reset it while it is still being made."""
    try:
        sock = dial(port, host=host)
    except ConnectionResetError:
        return Outcome(end="reset")
    with sock:
        return exchange(sock, upload)
