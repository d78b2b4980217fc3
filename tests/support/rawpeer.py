"""A hand-made HTTP/2 peer over TLS, that sends exactly what it is told.

It knows frames (`support.frames`), not HTTP/2: no state machine stands between a test and the wire. What it does by
itself can be switched off: acknowledging SETTINGS and PING, and giving back credit for DATA.

One `RawPeer` belongs to one thread and blocks, so that an evil script reads from top to bottom. In a trio test run
the script with `trio.to_thread.run_sync`. TLS is the standard library's, over memory BIOs, so that TCP can be ended
in each of the ways it can end (`reset`, `fin`, `close_notify`) and sending can read at the same time.

    with RawPeer.dial(port, pki.client) as peer:
        peer.open()                                     # preface, SETTINGS both ways
        peer.send(frames.connect(1, "127.0.0.1:80"))
        assert peer.wait_for(Kind.HEADERS, stream=1).status == 200
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import ssl
import struct
import time
from typing import TYPE_CHECKING, Self

from support import frames
from support.frames import Frame, Kind, Parser, Setting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from support.certs import Leaf

__all__ = ["Ended", "RawListener", "RawPeer"]

WAIT = 60.0
"""Default bound of every wait, in seconds: reached only when the other side is wrong."""


def _wait(sock: socket.socket, events: int, timeout: float) -> int:
    """What of `events` is ready within `timeout` seconds; 0 for nothing. Any descriptor, unlike `select.select`."""
    poll = select.poll()
    poll.register(sock, events)
    ready = poll.poll(max(timeout, 0) * 1000)
    if not ready:
        return 0
    return ready[0][1] & events or events & (select.POLLIN if events & select.POLLIN else select.POLLOUT)


class Ended(Exception):
    """The other side ended the connection while something was awaited; `how` is ``eof``, ``reset`` or ``alert``."""

    def __init__(self, how: str, waiting_for: str, log: list[Frame]) -> None:
        self.how = how
        super().__init__(f"connection ended ({how}) while waiting for {waiting_for}; got {[str(f) for f in log[-12:]]}")


class RawPeer:
    """One end of an HTTP/2 connection. Frames that arrive go to `log` (all) and `pending` (not yet waited for)."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext | None, *, server: bool = False) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.server = server
        self.log: list[Frame] = []
        self.pending: list[Frame] = []
        self.ended: str | None = None
        self.end_reason: str | None = None
        self.raw_received = 0
        self.ack_settings = True
        self.ack_pings = True
        self.give_credit = True
        self.keep_data = True
        """Whether DATA frames go to `log` and `pending`; off for bulk, where `on_data` sees them."""
        self.on_data: Callable[[Frame], None] | None = None
        self.reading = True
        """Whether sending may read meanwhile; off for the peer that never reads."""
        self.credit: dict[int, int] = {0: 65_535}
        """What the other side's windows let us send, by stream; 0 is the connection. Told, never obeyed by `send`."""
        self._initial_credit = 65_535
        self._parser = Parser(preface=server)
        self._in = ssl.MemoryBIO()
        self._out = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side=server) if context else None
        self._shaken = context is None
        self._unsent = bytearray()
        self._auto = bytearray()
        self._eof_read = False

    # -- making one

    @classmethod
    def dial(
        cls,
        port: int,
        leaf: Leaf | None,
        *,
        host: str = "127.0.0.1",
        context: ssl.SSLContext | None = None,
        handshake: bool = True,
        receive_buffer: int | None = None,
        quiet: bool = False,
    ) -> Self:
        """Connects as a client and, unless told otherwise, shakes hands. If `quiet`, it acknowledges nothing."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        try:
            sock.settimeout(WAIT)
            sock.connect((host, port))
            peer = cls(sock, context or (leaf.client_context() if leaf else None))
            peer.ack_settings = peer.ack_pings = not quiet
            if handshake:
                peer.handshake()
        except BaseException:
            sock.close()
            raise
        return peer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.sock.close()

    # -- opening

    def handshake(self, timeout: float = WAIT) -> None:
        """The TLS handshake, whole. Raises `ssl.SSLError` or `Ended`."""
        if self._tls is None:
            return
        deadline = time.monotonic() + timeout
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush(deadline)
                self._fill(deadline, "TLS handshake")
                continue
            except ssl.SSLError:
                with contextlib.suppress(OSError, TimeoutError):
                    self._flush(deadline)
                raise
            self._flush(deadline)
            self._shaken = True
            with contextlib.suppress(Ended):  # what came together with the end of the handshake
                self._decrypt("the first bytes")
            return

    def open(
        self,
        settings: Mapping[int, int] | None = None,
        *,
        connection_window: int = 1 << 24,
        timeout: float = WAIT,
    ) -> dict[int, int]:
        """The HTTP/2 opening of this role; returns the other side's SETTINGS once they and its ACK are here."""
        values = {Setting.INITIAL_WINDOW_SIZE: 1 << 22} if settings is None else settings
        first = b"" if self.server else frames.PREFACE
        first += frames.settings(values)
        if connection_window > 65535:
            first += frames.window_update(0, connection_window - 65535)
        self.send(first)
        got = self.wait_for(Kind.SETTINGS, where=lambda f: not f.ack, timeout=timeout)
        self.wait_for(Kind.SETTINGS, where=lambda f: f.ack, timeout=timeout)
        return got.settings

    def tunnel(self, stream: int, target: str, *more: tuple[str, str], timeout: float = WAIT) -> int:
        """Sends a good CONNECT and returns the status of the answer."""
        self.send(frames.connect(stream, target, *more))
        status = self.wait_for(Kind.HEADERS, stream=stream, timeout=timeout).status
        assert status is not None
        return status

    # -- sending

    def send(self, raw: bytes, *, timeout: float = WAIT) -> None:
        """Sends bytes as they are and blocks until TCP has taken them; reads meanwhile if `reading`.

        Raises:
            Ended: the other side ended the connection first.
            TimeoutError: it does not read.
        """
        deadline = time.monotonic() + timeout
        view = memoryview(raw)
        if self._tls is None:
            self._unsent += view
            self._flush(deadline)
            return
        for at in range(0, len(view), 1 << 16):
            self._tls.write(view[at : at + (1 << 16)])
            self._flush(deadline)

    def send_some(self, raw: bytes) -> None:
        """Sends what TCP takes now and forgets the rest: for floods that may hit a closed connection."""
        with contextlib.suppress(Ended, TimeoutError, OSError):
            self.send(raw, timeout=0.5)

    def _flush(self, deadline: float) -> None:
        while True:
            if self._tls is not None:
                self._unsent += self._out.read()
            if not self._unsent:
                return
            try:
                sent = self.sock.send(self._unsent)
                del self._unsent[:sent]
                continue
            except BlockingIOError:
                pass
            except (ConnectionResetError, BrokenPipeError) as error:
                self._drain_dead_socket()
                if self.ended == "eof" and isinstance(error, ConnectionResetError):
                    self.ended = "reset"  # the kernel tells of it once: what is read after that looks like an end
                raise self._end("reset", "sending") from error
            wants = select.POLLOUT | (select.POLLIN if self.reading and not self._eof_read else 0)
            ready = _wait(self.sock, wants, deadline - time.monotonic())
            if ready & select.POLLIN:
                self._receive("sending")
            elif not ready:
                raise TimeoutError(f"the other side takes no more; {len(self._unsent)} bytes unsent")

    def _drain_dead_socket(self) -> None:
        """Reads what arrived before the reset, so that a GOAWAY that explains it is not lost."""
        with contextlib.suppress(Ended, OSError, ssl.SSLError):
            while not self._eof_read:
                self._receive("its last words")

    # -- receiving

    def wait_for(
        self,
        kind: int | None = None,
        *,
        stream: int | None = None,
        where: Callable[[Frame], bool] | None = None,
        timeout: float = WAIT,
    ) -> Frame:
        """Takes the first frame that matches out of `pending`, reading until there is one.

        Raises:
            Ended: the connection ended before.
            TimeoutError: nothing matching came in `timeout` seconds.
        """

        def matches(got: Frame) -> bool:
            return (
                (kind is None or got.kind == kind)
                and (stream is None or got.stream == stream)
                and (where is None or where(got))
            )

        name = f"{Kind(kind).name if kind is not None else 'a frame'} on stream {stream}"
        deadline = time.monotonic() + timeout
        seen = 0
        ended: Ended | None = None
        while True:
            for index in range(seen, len(self.pending)):
                if matches(self.pending[index]):
                    return self.pending.pop(index)
            if ended is not None:
                raise ended
            seen = len(self.pending)
            try:
                self._fill(deadline, name)
            except Ended as error:  # with the last read may have come what was waited for
                ended = error

    def take_data(self, stream: int, size: int | None = None, *, timeout: float = WAIT) -> bytes:
        """Collects DATA of a stream until END_STREAM, or until `size` bytes are there."""
        out = bytearray()
        deadline = time.monotonic() + timeout
        while size is None or len(out) < size:
            got = self.wait_for(Kind.DATA, stream=stream, timeout=deadline - time.monotonic())
            out += got.data
            if got.end_stream:
                break
        return bytes(out)

    def upload(
        self,
        stream: int,
        pieces: Iterable[bytes | memoryview],
        *,
        end: bool = True,
        frame_size: int = 16_384,
        pad: int | None = None,
        timeout: float = WAIT,
    ) -> int:
        """Sends DATA within the other side's windows; returns how many bytes. Raises `TimeoutError` when starved."""
        deadline = time.monotonic() + timeout
        extra = 0 if pad is None else pad + 1
        sent = 0
        for piece in pieces:
            at = 0
            while at < len(piece):
                room = min(frame_size, self.stream_credit(stream) - extra, self.credit[0] - extra)
                if room <= 0:
                    self._fill(deadline, f"credit on stream {stream}")
                    continue
                part = bytes(piece[at : at + room])
                self._spend(stream, len(part) + extra)
                self.send(frames.data(stream, part, pad=pad), timeout=max(deadline - time.monotonic(), 0.01))
                at += len(part)
                sent += len(part)
        if end:
            self.send(frames.data(stream, end=True))
        return sent

    def fill_window(self, stream: int, *, most: int = 1 << 26) -> int:
        """Uploads until the other side gives no more credit for the stream; returns how many bytes."""
        sent = idle = 0
        while sent < most and idle < 3:
            room = min(16_384, self.stream_credit(stream), self.credit[0])
            if room <= 0:
                self.fence()
                if self.stream_credit(stream) <= 0 or self.credit[0] <= 0:
                    with contextlib.suppress(TimeoutError):
                        self._fill(time.monotonic() + 0.05, "credit")
                    idle += self.stream_credit(stream) <= 0 or self.credit[0] <= 0
                continue
            idle = 0
            self._spend(stream, room)
            self.send(frames.data(stream, bytes(room)))
            sent += room
        return sent

    def stream_credit(self, stream: int) -> int:
        """What the other side's window of a stream lets us send."""
        return self.credit.setdefault(stream, self._initial_credit)

    def _spend(self, stream: int, size: int) -> None:
        self.credit[stream] = self.stream_credit(stream) - size
        self.credit[0] -= size

    def fence(self, payload: bytes = b"\0fence\0\0", *, timeout: float = WAIT) -> None:
        """PING and its answer: whatever was sent before has been processed by the other side."""
        self.send(frames.ping(payload))
        self.wait_for(Kind.PING, where=lambda f: f.ack and f.payload == payload, timeout=timeout)

    def wait_end(self, timeout: float = WAIT) -> str:
        """Reads until the other side ends it: ``eof`` (bare FIN), ``close_notify``, ``alert``, ``reset``."""
        deadline = time.monotonic() + timeout
        while self.ended is None:
            try:
                self._fill(deadline, "the end")
            except Ended:
                break
        assert self.ended is not None
        return self.ended

    def goaway_code(self) -> int | None:
        """The error code of the last GOAWAY that arrived, if any."""
        codes = [f.code for f in self.log if f.kind == Kind.GOAWAY]
        return codes[-1] if codes else None

    def read_now(self) -> None:
        """Takes what is there, without waiting."""
        while self.ended is None and _wait(self.sock, select.POLLIN, 0):
            try:
                self._receive("whatever is there")
            except Ended:
                return

    def _fill(self, deadline: float, waiting_for: str) -> None:
        """Blocks until something has arrived."""
        if self.ended is not None:
            raise Ended(self.ended, waiting_for, self.log)
        self._send_auto()
        left = deadline - time.monotonic()
        if left <= 0 or not _wait(self.sock, select.POLLIN, left):
            raise TimeoutError(f"no {waiting_for}; got {[str(f) for f in self.log[-12:]]}")
        self._receive(waiting_for)
        self._send_auto()

    def _send_auto(self) -> None:
        """What is answered by itself; sending may receive, and so make more of it."""
        while self._auto:
            raw = bytes(self._auto)
            self._auto.clear()
            with contextlib.suppress(Ended):  # the next read says how it ended
                self.send(raw)

    def _receive(self, waiting_for: str) -> None:
        try:
            chunk = self.sock.recv(1 << 18)
        except BlockingIOError:
            return
        except ConnectionResetError as error:
            self._eof_read = True
            raise self._end("reset", waiting_for) from error
        self.raw_received += len(chunk)
        if not chunk:
            self._eof_read = True
            raise self._end("eof", waiting_for)
        if self._tls is None:
            self._take(chunk)
            return
        self._in.write(chunk)
        if self._shaken:
            self._decrypt(waiting_for)

    def _decrypt(self, waiting_for: str) -> None:
        assert self._tls is not None
        try:
            while True:
                plain = self._tls.read(1 << 18)
                if not plain:
                    raise self._end("close_notify", waiting_for)
                self._take(plain)
        except ssl.SSLWantReadError:
            return
        except ssl.SSLZeroReturnError as error:
            raise self._end("close_notify", waiting_for) from error
        except ssl.SSLError as error:
            self.end_reason = str(error)
            raise self._end("alert", waiting_for) from error

    def _end(self, how: str, waiting_for: str) -> Ended:
        self.ended = self.ended or how
        return Ended(self.ended, waiting_for, self.log)

    def _take(self, plain: bytes) -> None:
        for got in self._parser.feed(plain):
            if got.kind == Kind.DATA:
                if self.on_data is not None:
                    self.on_data(got)
                if self.give_credit and got.payload:
                    self._auto += frames.window_update(0, len(got.payload))
                    if not got.end_stream:
                        self._auto += frames.window_update(got.stream, len(got.payload))
                if not self.keep_data:
                    continue
            elif got.kind == Kind.WINDOW_UPDATE:
                self.credit[got.stream] = self.stream_credit(got.stream) + got.increment
            elif got.kind == Kind.SETTINGS and not got.ack:
                initial = got.settings.get(Setting.INITIAL_WINDOW_SIZE, self._initial_credit)
                for stream in self.credit:
                    self.credit[stream] += (initial - self._initial_credit) if stream else 0
                self._initial_credit = initial
                if self.ack_settings:
                    self._auto += frames.settings(ack=True)
            elif got.kind == Kind.PING and not got.ack and self.ack_pings:
                self._auto += frames.ping(got.payload, ack=True)
            self.log.append(got)
            self.pending.append(got)

    # -- ending, each way on its own

    def close_notify(self) -> None:
        """TLS close_notify, TCP left open."""
        assert self._tls is not None
        with contextlib.suppress(ssl.SSLWantReadError):
            self._tls.unwrap()
        self._flush(time.monotonic() + WAIT)

    def fin(self) -> None:
        """A bare FIN: no close_notify before it. Nothing when the other side was quicker with a reset."""
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise

    def reset(self) -> None:
        """A TCP RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def close(self) -> None:
        """Closes the socket, whatever that makes TCP do."""
        self.sock.close()


class RawListener:
    """Listens on a free port of the loopback for a product client to come."""

    def __init__(
        self, leaf: Leaf | None, *, context: ssl.SSLContext | None = None, receive_buffer: int | None = None
    ) -> None:
        self._context = context or (leaf.server_context() if leaf else None)
        self._sock = socket.socket()
        if receive_buffer is not None:  # inherited by accepted sockets; set later, it would make the kernel crawl
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._sock.bind(("127.0.0.1", 0))
        self._sock.listen(64)
        self.port: int = self._sock.getsockname()[1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._sock.close()

    def accept(self, *, handshake: bool = True, quiet: bool = False, timeout: float = WAIT) -> RawPeer:
        """The next connection, handshaken unless told otherwise; see `RawPeer.dial`. Raises `TimeoutError`."""
        self._sock.settimeout(timeout)
        sock, _ = self._sock.accept()
        peer = RawPeer(sock, self._context, server=True)
        peer.ack_settings = peer.ack_pings = not quiet
        if handshake:
            try:
                peer.handshake(timeout)
            except BaseException:
                sock.close()
                raise
        return peer

    def has_more(self, timeout: float = 0) -> bool:
        """Whether another connection waits to be accepted."""
        return bool(_wait(self._sock, select.POLLIN, timeout))
