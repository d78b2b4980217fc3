"""A small HTTP/1.1 server on trio and h11, for GET and HEAD of a handful of paths.

It is reachable by whoever reaches the port, so everything is bounded: the size of a request's head, the time that it
may take to arrive, the time that an answer may take to leave, and the connections. When those are used up a new one
takes the place of the connection that has waited longest for a request, so idle ones cannot lock out a probe.

Bound to a loopback address, it answers only requests that were sent to a loopback name or the bound address by their
Host header: a web page that made its own name resolve to 127.0.0.1 (DNS rebinding) reads nothing.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import TypeAlias

import h11
import trio

from hbone.address import Endpoint

__all__ = ["AdminRequest", "AdminResponse", "AdminServer", "Handler"]

_log = logging.getLogger(__name__)

_MAX_HEAD = 16 * 1024
_READ = 4096
_LINGER_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class AdminRequest:
    """A GET or HEAD.

    Attributes:
        path: without the query.
        query: after the first ``?``, or the empty string.
        headers: names in lower case.
    """

    path: str
    query: str = ""
    headers: tuple[tuple[str, str], ...] = ()

    def header(self, name: str) -> str | None:
        """All values of a header joined by commas, or None."""
        values = [value for key, value in self.headers if key == name]
        return ", ".join(values) if values else None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdminResponse:
    """An answer.

    Attributes:
        status: the HTTP status.
        content_type: of the body.
        body: all of it.
        headers: more headers.
    """

    status: int = 200
    content_type: str = "text/plain; charset=utf-8"
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()


Handler: TypeAlias = Callable[[AdminRequest], AdminResponse]
"""Answers one path. Called in the event loop's thread: it must not take long."""


class _Refused(Exception):
    """A request that gets an answer of ours and the end of its connection."""

    def __init__(self, status: int, why: str, *headers: tuple[str, str]) -> None:
        super().__init__(why)
        self.response = AdminResponse(status=status, body=f"{why}\n".encode(), headers=headers)


class AdminServer:
    """Serves `routes` over HTTP/1.1.

    Args:
        routes: handler by path.
        header_timeout: seconds from the first byte of a request (or the start of the connection) to its last.
        idle_timeout: seconds that a connection may stay without a further request.
        write_timeout: seconds that a peer may take to read an answer.
        max_connections: how many are served at once.
    """

    def __init__(
        self,
        routes: Mapping[str, Handler],
        *,
        header_timeout: float = 2.0,
        idle_timeout: float = 75.0,
        write_timeout: float = 10.0,
        max_connections: int = 64,
    ) -> None:
        self._routes = dict(routes)
        self._header_timeout = header_timeout
        self._idle_timeout = idle_timeout
        self._write_timeout = write_timeout
        self._max_connections = max_connections
        self._connections = 0
        self._waiting: dict[trio.CancelScope, None] = {}

    async def serve(
        self,
        host: str | None,
        port: int,
        *,
        task_status: trio.TaskStatus[Endpoint] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Listens and serves until cancelled; open connections end then, too.

        Args:
            host: address or name to bind; None for all addresses.
            port: 0 for a free one; `nursery.start` gives what was bound (the first, if the name has several addresses).
            task_status: for `nursery.start`.

        Raises:
            OSError: the address cannot be bound.
        """
        listeners = await trio.open_tcp_listeners(port, host=host)
        bound = [Endpoint.from_sockaddr(listener.socket.getsockname()) for listener in listeners]
        task_status.started(bound[0])
        local_only = all(endpoint.ip.is_loopback for endpoint in bound)
        await trio.serve_listeners(partial(self.serve_stream, local_only=local_only), listeners)

    async def serve_stream(self, stream: trio.abc.HalfCloseableStream, *, local_only: bool = False) -> None:
        """Serves one connection and closes it. Never raises for what the peer does.

        Args:
            stream: the connection.
            local_only: whether the Host header must be a loopback name.
        """
        async with stream:
            if self._connections >= self._max_connections and not self._evict():
                return
            self._connections += 1
            try:
                await self._serve_requests(_Connection(stream), local_only)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass
            finally:
                self._connections -= 1

    def _evict(self) -> bool:
        """Ends the connection that has waited longest for a request."""
        for scope in self._waiting:
            scope.cancel()
            del self._waiting[scope]
            return True
        return False

    async def _serve_requests(self, connection: _Connection, local_only: bool) -> None:
        first = True
        while True:
            last = True
            try:
                request = await self._next_request(connection, first)
                if request is None:
                    return
                response = self._respond(request, local_only)
                last = False
            except _Refused as refused:
                response = refused.response
            with trio.move_on_after(self._write_timeout):
                await connection.send(response, last=last)
                if not connection.start_next_cycle():
                    await connection.linger()
                    return
                first = False
                continue
            return

    async def _next_request(self, connection: _Connection, first: bool) -> h11.Request | None:
        """The next request; None when the peer is done or quiet for too long, or its place is needed."""
        with trio.CancelScope(deadline=trio.current_time() + self._idle_timeout) as scope:
            self._waiting[scope] = None
            try:
                if not first and not connection.has_data and not await connection.receive():
                    return None
                scope.deadline = trio.current_time() + self._header_timeout
                return await connection.read_request()
            finally:
                self._waiting.pop(scope, None)
        if connection.has_data and trio.current_time() >= scope.deadline:
            raise _Refused(408, "the request took too long to arrive")
        return None

    def _respond(self, request: h11.Request, local_only: bool) -> AdminResponse:
        headers = tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in request.headers)
        if local_only:
            _check_host(dict(headers).get("host"))
        target = request.target.decode("latin-1")
        if not target.startswith("/"):
            raise _Refused(400, "the request target must be a path")
        path, _, query = target.partition("?")
        handler = self._routes.get(path)
        if handler is None:
            raise _Refused(404, "no such page; / lists what there is")
        if request.method not in (b"GET", b"HEAD"):
            raise _Refused(405, "only GET and HEAD", ("Allow", "GET, HEAD"))
        if any(name == "transfer-encoding" or (name == "content-length" and value != "0") for name, value in headers):
            raise _Refused(400, "a request here has no body")
        try:
            return handler(AdminRequest(path=path, query=query, headers=headers))
        except Exception:  # noqa: BLE001 - a page that fails must not end the process that it tells about
            _log.exception("the admin page %s failed", path)
            raise _Refused(500, "this page failed; the log says why") from None


def _check_host(host: str | None) -> None:
    """Refuses a Host that is no loopback name. HTTP/1.0 may have none; a browser always sends one."""
    if host is None:
        return
    name = host.partition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
    if name.lower().removesuffix(".") == "localhost":
        return
    try:
        if ipaddress.ip_address(name).is_loopback:
            return
    except ValueError:
        pass
    raise _Refused(403, "this port answers to localhost only; the Host header names something else")


class _Connection:
    """h11 over a stream."""

    def __init__(self, stream: trio.abc.HalfCloseableStream) -> None:
        self._stream = stream
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=_MAX_HEAD)
        self._head_only = False

    @property
    def has_data(self) -> bool:
        """Whether bytes of a request have arrived that was not read yet."""
        return bool(self._h11.trailing_data[0])

    async def receive(self) -> bool:
        """Waits for more bytes; False at the end."""
        data = await self._stream.receive_some(_READ)
        self._h11.receive_data(bytes(data))
        return bool(data)

    async def read_request(self) -> h11.Request | None:
        """The head of the next request, None at the end of the stream.

        Raises:
            _Refused: it is not HTTP/1.1, or too large.
        """
        self._head_only = False
        try:
            while (event := self._h11.next_event()) is h11.NEED_DATA:
                await self.receive()
            if not isinstance(event, h11.Request):
                return None
            if event.http_version not in (b"1.0", b"1.1"):
                raise _Refused(400, "this is not a request in HTTP/1.1")
            self._head_only = event.method == b"HEAD"
            self._h11.next_event()  # the end of a request without a body; of others the body stays unread
        except h11.RemoteProtocolError as problem:
            if problem.error_status_hint == 431:
                raise _Refused(431, f"the head of a request must not exceed {_MAX_HEAD} bytes") from None
            raise _Refused(400, "this is not a request in HTTP/1.1") from None
        return event

    async def send(self, response: AdminResponse, *, last: bool) -> None:
        """Sends an answer; `last` announces the end of the connection."""
        headers = [
            ("Content-Type", response.content_type),
            ("Content-Length", str(len(response.body))),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            *response.headers,
        ]
        if last:
            headers.append(("Connection", "close"))
        reason = HTTPStatus(response.status).phrase
        events = (
            h11.Response(status_code=response.status, headers=headers, reason=reason),
            h11.Data(data=b"" if self._head_only else response.body),
            h11.EndOfMessage(),
        )
        await self._stream.send_all(b"".join(self._h11.send(event) or b"" for event in events))

    def start_next_cycle(self) -> bool:
        """Whether there may be another request."""
        if self._h11.our_state is not h11.DONE or self._h11.their_state is not h11.DONE:
            return False
        self._h11.start_next_cycle()
        return True

    async def linger(self) -> None:
        """Reads on for a little: closing with unread input makes TCP throw away an answer that is still under way."""
        await self._stream.send_eof()
        left = _LINGER_BYTES
        while left > 0 and (data := await self._stream.receive_some(_READ)):
            left -= len(data)
