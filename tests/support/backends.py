"""Plain TCP applications to put behind a tunnel, one thread a connection, each with one habit.

with Backend(sink) as app:
    ...send through the tunnel to app.target...
    assert app.wait_connection(0).received == size
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import random
import socket
import struct
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "Backend",
    "Seen",
    "echo",
    "ends_first",
    "generate",
    "hard_close",
    "hold",
    "http_app",
    "own_loopback",
    "pattern",
    "pattern_sha",
    "receive_all",
    "refused_port",
    "resets_after",
    "send_then_receive",
    "sink",
]

_BLOCK = 1 << 20


@functools.cache
def _random_block() -> bytes:
    return random.Random(20).randbytes(2 * _BLOCK)


def pattern(size: int, piece: int = 1 << 18) -> Iterator[memoryview]:
    """`size` bytes that do not repeat soon, in pieces of up to 256 KiB; always the same ones."""
    block = memoryview(_random_block())
    for at in range(0, size, 1 << 18):
        offset = (at * 31) % _BLOCK
        whole = block[offset : offset + min(1 << 18, size - at)]
        for start in range(0, len(whole), piece):
            yield whole[start : start + piece]


@functools.cache
def pattern_sha(size: int) -> str:
    """SHA-256 of `pattern(size)`, in hex."""
    digest = hashlib.sha256()
    for piece in pattern(size):
        digest.update(piece)
    return digest.hexdigest()


@dataclass(slots=True)
class Seen:
    """What a backend saw of one connection."""

    received: int = 0
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    end: str | None = None
    """``eof``, ``reset``, or None while the other side has not ended."""
    done: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    """Set when the other side has ended its direction, however."""
    sock: socket.socket | None = None

    @property
    def sha(self) -> str:
        return self.digest.hexdigest()

    def take(self, chunk: bytes) -> None:
        self.received += len(chunk)
        self.digest.update(chunk)

    def finish(self, how: str) -> None:
        self.end = self.end or how
        self.ended.set()


class Backend:
    """A TCP server whose connections all do `habit(sock, seen)`; by default on a free port of the loopback."""

    def __init__(
        self,
        habit: Callable[[socket.socket, Seen], None],
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        receive_buffer: int | None = None,
    ) -> None:
        self._habit = habit
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._sock = socket.socket(family, socket.SOCK_STREAM)
        if receive_buffer is not None:  # inherited by accepted sockets
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._sock.bind((host, port))
        self._sock.listen(512)
        self.host = host
        self.port: int = self._sock.getsockname()[1]
        self.target = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
        self.connections: list[Seen] = []
        self._arrived = threading.Condition()
        self._accepting = threading.Thread(target=self._accept, name="backend", daemon=True)

    def __enter__(self) -> Self:
        self._accepting.start()
        return self

    def __exit__(self, *exc: object) -> None:
        # shutdown wakes the accepting thread, which close alone does not
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        self._accepting.join(5)  # what it accepted last belongs to those that are ended here
        for seen in self.connections:
            if seen.sock is not None:
                with contextlib.suppress(OSError):
                    seen.sock.shutdown(socket.SHUT_RDWR)
        for seen in self.connections:
            seen.done.wait(30)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._sock.accept()
            except OSError:
                return
            seen = Seen(sock=sock)
            with self._arrived:
                self.connections.append(seen)
                self._arrived.notify_all()
            threading.Thread(target=self._serve, args=(sock, seen), name="backend", daemon=True).start()

    def _serve(self, sock: socket.socket, seen: Seen) -> None:
        try:
            with sock:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._habit(sock, seen)
        except ConnectionResetError:
            seen.finish("reset")
            seen.end = "reset"  # the kernel tells of it once: to another thread that reads it looks like an end
        except BrokenPipeError:
            seen.finish("reset")
        except OSError as error:
            seen.finish("reset" if error.errno == errno.ENOTCONN else "error")  # shutdown() says it so
        finally:
            seen.done.set()

    def connection(self, index: int = 0, timeout: float = 60) -> Seen:
        """The index-th connection, as soon as it is there."""
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(self.connections) > index, timeout), "no connection came"
            return self.connections[index]

    def wait_connection(self, index: int = 0, timeout: float = 60) -> Seen:
        """The index-th connection, once its habit is over."""
        seen = self.connection(index, timeout)
        assert seen.done.wait(timeout), "the backend's connection is still open"
        return seen


def receive_all(sock: socket.socket, seen: Seen) -> None:
    """Reads to the end of the other side, counting."""
    try:
        while chunk := sock.recv(1 << 18):
            seen.take(chunk)
    except ConnectionResetError:
        seen.finish("reset")
        raise
    seen.finish("eof")


def echo(sock: socket.socket, seen: Seen) -> None:
    """Sends back what comes; ends when the other side has."""
    while chunk := sock.recv(1 << 18):
        seen.take(chunk)
        sock.sendall(chunk)
    seen.finish("eof")
    sock.shutdown(socket.SHUT_WR)


def sink(sock: socket.socket, seen: Seen) -> None:
    """Reads to the end, then answers with the SHA-256 in hex."""
    receive_all(sock, seen)
    sock.sendall(seen.sha.encode())


def hold(sock: socket.socket, seen: Seen) -> None:
    """Sends nothing; reads until the other side ends."""
    receive_all(sock, seen)


def generate(size: int) -> Callable[[socket.socket, Seen], None]:
    """Waits for the other side's end, then sends `pattern(size)`."""

    def habit(sock: socket.socket, seen: Seen) -> None:
        receive_all(sock, seen)
        for piece in pattern(size):
            sock.sendall(piece)

    return habit


def ends_first(size: int) -> Callable[[socket.socket, Seen], None]:
    """Sends `pattern(size)` and its FIN at once, then reads to the other side's end."""

    def habit(sock: socket.socket, seen: Seen) -> None:
        for piece in pattern(size):
            sock.sendall(piece)
        sock.shutdown(socket.SHUT_WR)
        receive_all(sock, seen)

    return habit


def send_then_receive(size: int) -> Callable[[socket.socket, Seen], None]:
    """Both directions at once: sends `pattern(size)` while it reads; FIN when the other side's has come."""

    def habit(sock: socket.socket, seen: Seen) -> None:
        reader = threading.Thread(target=lambda: _quietly(receive_all, sock, seen), daemon=True)
        reader.start()
        for piece in pattern(size):
            sock.sendall(piece)
        seen.ended.wait()
        sock.shutdown(socket.SHUT_WR)
        reader.join()

    return habit


def _quietly(what: Callable[[socket.socket, Seen], None], sock: socket.socket, seen: Seen) -> None:
    try:
        what(sock, seen)
    except OSError:
        seen.finish("reset")


def resets_after(size: int, *, read: int = 0) -> Callable[[socket.socket, Seen], None]:
    """Reads `read` bytes, sends `pattern(size)`, waits until they were taken, then resets."""

    def habit(sock: socket.socket, seen: Seen) -> None:
        while seen.received < read:
            chunk = sock.recv(1 << 18)
            if not chunk:
                seen.finish("eof")
                return
            seen.take(chunk)
        for piece in pattern(size):
            sock.sendall(piece)
        hard_close(sock)

    return habit


def hard_close(sock: socket.socket) -> None:
    """Ends a TCP connection with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@contextlib.contextmanager
def refused_port() -> Iterator[int]:
    """A port of the loopback that refuses connections: bound, so that nobody else gets it, and not listening."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


def own_loopback(network: int) -> str:
    """An address in 127.`network`.0.0/16 that no other process of tests has: for ports that cannot be chosen."""
    return "127.{}.{}.{}".format(network, *divmod(os.getpid() & 0xFFFF, 256))


def http_app(sock: socket.socket, seen: Seen) -> None:
    """HTTP/1.1: ``GET /N`` sends `pattern(N)`; ``GET /until-close/N`` the same without a length, ended by FIN;
    ``PUT`` answers with the SHA-256 of the body in hex."""
    source = sock.makefile("rb")
    while line := source.readline():
        method, path, _ = line.decode().split()
        fields = {}
        while (text := source.readline().strip()) != b"":
            name, _, value = text.decode().partition(":")
            fields[name.lower()] = value.strip()
        if method == "PUT":
            digest = hashlib.sha256()
            left = int(fields["content-length"])
            while left and (chunk := source.read(min(left, 1 << 18))):
                digest.update(chunk)
                seen.received += len(chunk)
                left -= len(chunk)
            body = digest.hexdigest().encode()
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            continue
        size = int(path.rpartition("/")[2])
        until_close = "until-close" in path
        framing = b"Connection: close" if until_close else b"Content-Length: %d" % size
        sock.sendall(b"HTTP/1.1 200 OK\r\n" + framing + b"\r\n\r\n")
        for piece in pattern(size):
            sock.sendall(piece)
        if until_close:
            sock.shutdown(socket.SHUT_WR)
            receive_all(sock, seen)
            return
    seen.finish("eof")
