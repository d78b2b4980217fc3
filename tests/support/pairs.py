"""Both ends of a session in one test: our client and our server, or one of them and a peer made by hand.

Over memory for what concerns the session, with `autojump_clock` where time matters; over sockets for what concerns
the kernel. The hand-made peer is `support.rawpeer` as trio code: its script shares the test's clock.
"""

from __future__ import annotations

import contextlib
import functools
import ssl
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import trio
import trio.testing

from hbone import HBONEClient, HBONEServer, Limits, Svid
from support import frames
from support.certs import SERVER, pki
from support.frames import Frame, Kind, Parser, Setting

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from hbone import Tunnel, TunnelRequest
    from support.certs import Leaf

__all__ = [
    "SMALL",
    "TARGET",
    "Pair",
    "Scripted",
    "client_svid",
    "memory_pair",
    "scripted_client",
    "scripted_server",
    "server_svid",
    "socket_pair",
    "svid_of",
]

TARGET = "10.0.0.7:8080"

#: The smallest windows there are, the session's as large as four tunnels'.
SMALL = Limits(stream_window=65_535, connection_window=4 * 65_535)


@functools.cache
def svid_of(leaf: Leaf) -> Svid:
    return Svid.from_files(leaf.cert, leaf.key, leaf.roots)


def client_svid() -> Svid:
    return svid_of(pki().client)


def server_svid() -> Svid:
    return svid_of(pki().server)


@dataclass
class Pair:
    """A client and a server of ours with a session between them."""

    client: HBONEClient
    server: HBONEServer
    arrived: trio.MemoryReceiveChannel[Tunnel]
    port: int | None = None

    async def open(self, target: str = TARGET, **options: Any) -> tuple[Tunnel, Tunnel]:
        """A tunnel: the client's end, the server's end."""
        near = await self.client.open_tunnel(target, **options)
        return near, await self.arrived.receive()

    @property
    def far_session(self) -> Any:
        (session,) = self.server.sessions
        return session

    @property
    def near_session(self) -> Any:
        return self.client._session


def _holding() -> tuple[Callable[[TunnelRequest], Any], trio.MemoryReceiveChannel[Tunnel]]:
    """A handler that accepts, hands the tunnel to the test, and keeps out of its way."""
    send, receive = trio.open_memory_channel[Any](1000)

    async def handler(request: TunnelRequest) -> None:
        tunnel = await request.accept()
        send.send_nowait(tunnel)
        await trio.sleep_forever()

    return handler, receive


@contextlib.asynccontextmanager
async def _beside() -> AsyncIterator[trio.Nursery]:
    """A nursery that ends with the block and lets the block's error out as it is."""
    error: BaseException | None = None
    async with trio.open_nursery() as nursery:
        try:
            yield nursery
        except BaseException as exc:
            error = exc
        nursery.cancel_scope.cancel()
    if error is not None:
        raise error


@contextlib.asynccontextmanager
async def memory_pair(
    *,
    limits: Limits | None = None,
    server_limits: Limits | None = None,
    handler: Any = None,
    server_options: dict[str, Any] | None = None,
    streams: tuple[Any, Any] | None = None,
    **options: Any,
) -> AsyncIterator[Pair]:
    """Over memory streams, or over the two ends of a stream that you have (client's end first)."""
    default, arrived = _holding()
    server = HBONEServer(server_svid(), handler or default, limits=server_limits or limits, **(server_options or {}))
    near, far = streams or trio.testing.memory_stream_pair()
    async with _beside() as nursery:
        nursery.start_soon(server.serve_stream, far)
        async with HBONEClient.over_stream(near, svid=client_svid(), limits=limits, **options) as client:
            yield Pair(client, server, arrived)


@contextlib.asynccontextmanager
async def socket_pair(
    *,
    limits: Limits | None = None,
    server_limits: Limits | None = None,
    handler: Any = None,
    server_options: dict[str, Any] | None = None,
    **options: Any,
) -> AsyncIterator[Pair]:
    """Over a TCP connection on the loopback."""
    default, arrived = _holding()
    server = HBONEServer(server_svid(), handler or default, limits=server_limits or limits, **(server_options or {}))
    async with _beside() as nursery:
        endpoint = await nursery.start(server.serve, "127.0.0.1", 0)
        async with HBONEClient.connect(
            "127.0.0.1", endpoint.port, svid=client_svid(), expect=SERVER, limits=limits, **options
        ) as client:
            yield Pair(client, server, arrived, endpoint.port)


@dataclass
class Scripted:
    """A peer over a trio stream that sends exactly what it is told. Reads only while it waits for something."""

    stream: trio.abc.Stream
    leaf: Leaf
    server: bool
    alpn: tuple[str, ...] = ("h2",)
    log: list[Frame] = field(default_factory=list)
    pending: list[Frame] = field(default_factory=list)
    ended: str | None = None
    ack_settings: bool = True
    ack_pings: bool = True

    def __post_init__(self) -> None:
        leaf = self.leaf
        context = (leaf.server_context if self.server else leaf.client_context)(alpn=self.alpn)
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._in, self._out, server_side=self.server)
        self._parser = Parser(preface=self.server)

    async def handshake(self) -> None:
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
                await self._fill()
            else:
                await self._flush()
                return

    async def open(self, settings: dict[int, int] | None = None, *, window: int = 1 << 24) -> None:
        """Handshake and the opening of this role, to the other side's acknowledgement."""
        await self.handshake()
        values = {Setting.INITIAL_WINDOW_SIZE: 1 << 22} if settings is None else settings
        first = b"" if self.server else frames.PREFACE
        first += frames.settings(values)
        if window > 65_535:
            first += frames.window_update(0, window - 65_535)
        await self.send(first)
        await self.wait_for(Kind.SETTINGS, where=lambda f: not f.ack)
        await self.wait_for(Kind.SETTINGS, where=lambda f: f.ack)

    async def send(self, *raw: bytes) -> None:
        self.tls.write(b"".join(raw))
        await self._flush()

    async def close_notify(self) -> None:
        """The TLS alert alone; the stream stays open."""
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.unwrap()
        await self._flush()

    async def fence(self) -> None:
        """PING and its answer: what was sent before has been processed."""
        await self.send(frames.ping(b"\0fence\0\0"))
        await self.wait_for(Kind.PING, where=lambda f: f.ack)

    async def wait_for(
        self, kind: int, *, stream: int | None = None, where: Callable[[Frame], bool] = lambda f: True
    ) -> Frame:
        """Takes the first frame that matches, reading until there is one. `EOFError`: the other side ended before."""
        while True:
            for frame in self.pending:
                if frame.kind == kind and stream in (None, frame.stream) and where(frame):
                    self.pending.remove(frame)
                    return frame
            if self.ended:
                raise EOFError(f"{self.ended}; got {[str(f) for f in self.log[-12:]]}")
            await self.read()

    async def wait_end(self) -> str:
        """Reads to the end: ``close_notify`` or ``eof``."""
        while not self.ended:
            await self.read()
        return self.ended

    async def read(self) -> None:
        """What comes next, at least one TLS record."""
        while True:
            try:
                plain = self.tls.read(1 << 20)
            except ssl.SSLWantReadError:
                await self._fill()
                continue
            except ssl.SSLZeroReturnError:
                plain = b""
            except ssl.SSLEOFError:
                self.ended = "eof"
                return
            if not plain:
                self.ended = "close_notify"
                return
            for frame in self._parser.feed(plain):
                self.log.append(frame)
                self.pending.append(frame)
                if frame.kind == Kind.SETTINGS and not frame.ack and self.ack_settings:
                    await self.send(frames.settings(ack=True))
                elif frame.kind == Kind.PING and not frame.ack and self.ack_pings:
                    await self.send(frames.ping(frame.payload, ack=True))
            return

    async def _fill(self) -> None:
        try:
            data = await self.stream.receive_some(1 << 16)
        except trio.BrokenResourceError:
            data = b""
        if data:
            self._in.write(data)
        else:
            self._in.write_eof()

    async def _flush(self) -> None:
        data = self._out.read()
        if data:
            await self.stream.send_all(data)


def scripted_client(server: HBONEServer, nursery: trio.Nursery, *, leaf: Leaf | None = None) -> Scripted:
    """A hand-made client, connected to a server of ours through memory."""
    near, far = trio.testing.memory_stream_pair()
    nursery.start_soon(server.serve_stream, far)
    return Scripted(near, leaf or pki().client, server=False)


async def _play(script: Any, peer: Scripted) -> None:
    async with peer.stream:
        await script(peer)


@contextlib.asynccontextmanager
async def scripted_server(script: Any, *, leaf: Leaf | None = None, **options: Any) -> AsyncIterator[HBONEClient]:
    """A client of ours, connected through memory to ``await script(peer)``, which runs beside the block."""
    near, far = trio.testing.memory_stream_pair()
    peer = Scripted(far, leaf or pki().server, server=True)
    async with _beside() as nursery:
        nursery.start_soon(_play, script, peer)
        async with HBONEClient.over_stream(near, svid=client_svid(), **options) as client:
            yield client
