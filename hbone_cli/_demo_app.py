"""The web application of ``hbone demo``: it greets, gives bytes, and hashes what it gets."""

from __future__ import annotations

import hashlib
import random
import socketserver
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Application", "pattern"]

_BLOCK: Final = 1 << 20


def pattern(size: int) -> Iterator[memoryview]:
    """The same `size` bytes each time, no two blocks of them alike; a piece is valid until the next is asked for."""
    block = bytearray(random.Random(size).randbytes(_BLOCK))  # noqa: S311 - not a secret
    view = memoryview(block)
    for number in range(0, size, _BLOCK):
        block[:8] = number.to_bytes(8, "big")
        yield view[: min(_BLOCK, size - number)]


class _Handler(BaseHTTPRequestHandler):
    """``GET /`` greets, ``GET /bytes/N`` gives N bytes, ``PUT`` and ``POST`` say the SHA-256 of what came."""

    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        """Greet, or send bytes."""
        if self.path.startswith("/bytes/") and self.path[7:].isdecimal():
            size = int(self.path[7:])
            self._head(200, size)
            for piece in pattern(size):
                self.wfile.write(piece)
        elif self.path == "/":
            self._answer(200, "hello from the application behind node b\n")
        else:
            self._answer(404, "there are / and /bytes/NUMBER, and PUT of anything anywhere\n")

    def do_PUT(self) -> None:
        """Hash the body."""
        size = self.headers.get("Content-Length", "")
        if not size.isdecimal():
            self.close_connection = True
            self._answer(411, "say Content-Length\n")
            return
        left, digest, buffer = int(size), hashlib.sha256(), memoryview(bytearray(_BLOCK))
        while left:
            got = self.rfile.readinto(buffer[: min(left, _BLOCK)])
            if not got:
                self.close_connection = True
                return
            digest.update(buffer[:got])
            left -= got
        self._answer(200, f"{digest.hexdigest()}\n")

    do_POST = do_PUT  # noqa: N815 - the name is http.server's

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the access log is the nodes' to write."""

    def _answer(self, status: int, text: str) -> None:
        body = text.encode()
        self._head(status, len(body))
        self.wfile.write(body)

    def _head(self, status: int, size: int) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(size))
        self.end_headers()


class Application(ThreadingHTTPServer):
    """Listens on a free port of an address.

    Args:
        host: the address.

    Raises:
        OSError: it cannot be had.
    """

    request_queue_size = 128
    daemon_threads = True

    def __init__(self, host: str) -> None:
        super().__init__((host, 0), _Handler)

    def server_bind(self) -> None:
        """Take the port."""
        # HTTPServer's would look its own name up, which can take seconds where there is no network.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves is no error of the application."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)
