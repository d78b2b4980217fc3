"""Handlers for a server under test, and what they remember of each request."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import trio

from hbone.address import Authority
from hbone.errors import RequestRejected
from hbone.transport import AllowNetworks, BaseObserver, ForwardHandler

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from hbone.protocol import ConnectRequest
    from hbone.transport import Peer, Tunnel, TunnelRequest

__all__ = ["AppAddress", "Handler", "ReceivedRequest", "Recorder", "authority_of"]

Handler: TypeAlias = "Literal['echo', 'sink', 'forward'] | Callable[[TunnelRequest], Awaitable[Any]]"
"""What a server does with a request.

``"echo"`` sends back what comes, and its end; ``"sink"`` takes what comes and ends when that ends; ``"forward"``
connects to where the request wants to go, on loopback addresses only. Or a handler of your own.
"""

AppAddress: TypeAlias = "int | str | tuple[Any, ...] | Authority"
"""Where an application listens: a port of 127.0.0.1, ``"host:port"``, or what `socket.getsockname` gives."""


def authority_of(address: AppAddress) -> Authority:
    """The address of an application.

    Raises:
        InvalidAddress: it is none.
    """
    if isinstance(address, Authority):
        return address
    if isinstance(address, int):
        return Authority("127.0.0.1", address)
    if isinstance(address, str):
        return Authority.parse(address)
    host, port, *_ = address
    return Authority(host, port)


@dataclass(slots=True, kw_only=True, eq=False)
class ReceivedRequest:
    """A CONNECT that a server under test was asked for, and what became of it."""

    peer: Peer
    """Who asked, as proved by TLS."""
    target: Authority
    """What for."""
    headers: ConnectRequest
    """What came with it: raw, and parsed (`.baggage`, `.forwarded`, `.traceparent`)."""
    status: int | None = None
    """The answer; None before there is one, and when a handler of your own called `TunnelRequest.reject`."""
    bytes_received: int = 0
    """Payload, once `done`."""
    bytes_sent: int = 0
    """Payload, once `done`."""
    sha256: str | None = None
    """Of the received payload in hex, once ``echo`` or ``sink`` is done with it."""
    done: bool = False
    """Whether the handler has returned."""
    error: BaseException | None = None
    """How the handler ended if not by returning: a refusal, a tunnel that broke, a fault in it."""


class Recorder(BaseObserver):
    """A server's handler that remembers requests; also the server's observer.

    Args:
        handler: what answers them.
        on_failure: gets what a handler raises that is neither a refusal nor the fault of the peer.
    """

    def __init__(self, handler: Handler, on_failure: Callable[[Exception], None]) -> None:
        self.requests: list[ReceivedRequest] = []
        self._answer = _answer_of(handler)
        self._on_failure = on_failure
        self._open: dict[int, ReceivedRequest] = {}
        self._change = trio.Event()

    async def __call__(self, request: TunnelRequest) -> None:
        """Answer a request, and remember it."""
        received = ReceivedRequest(peer=request.peer, target=request.target, headers=request.headers)
        self.requests.append(received)
        self._open[id(request.headers)] = received
        try:
            await self._answer(request, received)
        except RequestRejected as error:
            received.status, received.error = error.status, error
            raise
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            received.error = error
            if error.__cause__ is None:
                self._on_failure(error)
            raise
        except Exception as error:
            received.error = error
            if received.status is None:
                received.status = 503
            self._on_failure(error)
            raise
        finally:
            statistics = request.tunnel_statistics()
            received.bytes_received, received.bytes_sent = statistics.bytes_received, statistics.bytes_sent
            received.done = True
            del self._open[id(request.headers)]
            self._tell()

    async def wait_done(self, count: int) -> None:
        """Until so many requests are done."""
        while sum(received.done for received in self.requests) < count:
            await self._change.wait()

    def tunnel_opened(self, tunnel: Tunnel) -> None:
        """See `hbone.Observer`."""
        received = self._open.get(id(tunnel.request))
        if received is not None:
            received.status = 200

    def _tell(self) -> None:
        self._change.set()
        self._change = trio.Event()


async def _take_all(request: TunnelRequest, received: ReceivedRequest, *, send_back: bool) -> None:
    """``echo`` and ``sink``: takes what comes to its end, ends the other direction then."""
    digest = hashlib.sha256()
    try:
        async with await request.accept() as tunnel:
            async for chunk in tunnel:
                digest.update(chunk)
                if send_back:
                    await tunnel.send_all(chunk)
    finally:
        received.sha256 = digest.hexdigest()


def _answer_of(handler: Handler) -> Callable[[TunnelRequest, ReceivedRequest], Awaitable[Any]]:
    match handler:
        case "echo":
            return partial(_take_all, send_back=True)
        case "sink":
            return partial(_take_all, send_back=False)
        case "forward":
            to_loopback = ForwardHandler(AllowNetworks.parse(["127.0.0.0/8", "::1/128"]))
            return lambda request, _: to_loopback(request)
        case str():
            raise ValueError(f"no handler is called {handler!r}; there are echo, sink and forward")
        case _:
            return lambda request, _: handler(request)
