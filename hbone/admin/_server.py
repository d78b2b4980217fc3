"""A small HTTP/1.1 server on trio and h11 for a handful of pages.

It is reachable by whoever reaches the port, so everything is bounded: the size of a request's head, the time that it
may take to arrive, the time that an answer may take to leave, and the connections. When those are used up a new one
takes the place of the connection that has waited longest for a request, so idle ones cannot lock out a probe. Requests
have no body: what a page is to do stands in the query.

Bound to a loopback address, it answers only requests that were sent to a loopback name or address by their Host
header: a web page that made its own name resolve to 127.0.0.1 (DNS rebinding) reads nothing. On every address it
refuses what a browser sends for a page of another origin, so that no page on the web can press a button here.
"""

from __future__ import annotations

import errno
import gzip
import ipaddress
import logging
import zlib
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Final, TypeAlias
from urllib.parse import parse_qs

import h11
import trio

from hbone.address import Endpoint

__all__ = ["AdminRequest", "AdminResponse", "AdminServer", "Handler", "Route"]

_log = logging.getLogger(__name__)

_MAX_HEAD: Final = 16 * 1024
_READ: Final = 4096
_LINGER_BYTES: Final = 64 * 1024
_MAX_PARAMETERS: Final = 32
#: How often to look for a port that is free on several addresses.
_TRIES: Final = 20
#: Smaller answers are not worth compressing.
_MIN_GZIP: Final = 1024
#: What takes longer than a millisecond to compress is compressed in another thread.
_BIG: Final = 64 * 1024
_GZIP: Final = 31
"""`zlib.compressobj`: with the header and the checksum of gzip."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdminRequest:
    """A request, which has no body.

    Attributes:
        path: without the query.
        query: after the first ``?``, or the empty string.
        headers: names in lower case.
        method: one of those that the route has; HEAD where it has GET.
        parameters: the query, decoded; each name with all its values, which may be empty.
    """

    path: str
    query: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    method: str = "GET"

    def header(self, name: str) -> str | None:
        """All values of a header joined by commas, or None."""
        values = [value for key, value in self.headers if key == name]
        return ", ".join(values) if values else None

    @property
    def parameters(self) -> dict[str, list[str]]:
        """See the class."""
        return parse_qs(self.query, keep_blank_values=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdminResponse:
    """An answer.

    Attributes:
        status: the HTTP status.
        content_type: of the body.
        body: all of it; or its pieces, each made when the one before has left, so that a large page neither takes
            memory nor holds up the event loop.
        headers: more headers.
    """

    status: int = 200
    content_type: str = "text/plain; charset=utf-8"
    body: bytes | Iterator[bytes] = b""
    headers: tuple[tuple[str, str], ...] = ()


Handler: TypeAlias = Callable[[AdminRequest], AdminResponse | Awaitable[AdminResponse]]
"""Answers one path, in the event loop's thread: what takes long must be awaited, or come in pieces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A path with other methods than GET.

    Attributes:
        handler: answers.
        methods: GET includes HEAD.
        help: a line for who comes with another method.
    """

    handler: Handler
    methods: tuple[str, ...] = ("GET",)
    help: str = ""


class _Refused(Exception):
    """A request that gets an answer of ours and the end of its connection."""

    def __init__(self, status: int, why: str, *headers: tuple[str, str]) -> None:
        super().__init__(why)
        self.response = AdminResponse(status=status, body=f"{why}\n".encode(), headers=headers)


class AdminServer:
    """Serves `routes` over HTTP/1.1, on as many addresses as `serve` is called for.

    Args:
        routes: handler by path.
        header_timeout: seconds from the first byte of a request (or the start of the connection) to its last.
        idle_timeout: seconds that a connection may stay without a further request.
        page_timeout: seconds that a handler may take.
        write_timeout: seconds that a peer may take to read an answer, or a piece of one that comes in pieces.
        max_connections: how many are served at once.
    """

    def __init__(
        self,
        routes: Mapping[str, Handler | Route],
        *,
        header_timeout: float = 2.0,
        idle_timeout: float = 75.0,
        page_timeout: float = 30.0,
        write_timeout: float = 10.0,
        max_connections: int = 64,
    ) -> None:
        self._routes = {
            path: route if isinstance(route, Route) else Route(handler=route) for path, route in routes.items()
        }
        self._header_timeout = header_timeout
        self._idle_timeout = idle_timeout
        self._page_timeout = page_timeout
        self._write_timeout = write_timeout
        self._max_connections = max_connections
        self._connections = 0
        self._waiting: dict[trio.CancelScope, None] = {}

    async def serve(
        self,
        host: str | Sequence[str] | None,
        port: int,
        *,
        task_status: trio.TaskStatus[Endpoint] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Listens and serves until cancelled; open connections end then, too.

        Args:
            host: address or name to bind, or several, of which those that this machine does not have are left out as
                long as there is one; None for all addresses.
            port: 0 for a free one; `nursery.start` gives what was bound (the first, if there are several addresses).
            task_status: for `nursery.start`.

        Raises:
            OSError: the address cannot be bound, or none of several.
        """
        listeners = await _listen((host,) if host is None or isinstance(host, str) else host, port)
        bound = [Endpoint.from_sockaddr(listener.socket.getsockname()) for listener in listeners]
        async with trio.open_nursery() as nursery:
            for listener, endpoint in zip(listeners, bound, strict=True):
                handler = partial(self.serve_stream, local_only=endpoint.ip.is_loopback)
                nursery.start_soon(trio.serve_listeners, handler, [listener])
            task_status.started(bound[0])

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
            except Exception:  # noqa: BLE001 - as in _respond
                # The rest of a page that comes in pieces: its end is missing, so the client knows.
                _log.exception("an admin page failed half way")
            finally:
                self._connections -= 1

    def _extend(self, scope: trio.CancelScope) -> None:
        scope.deadline = trio.current_time() + self._write_timeout

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
                response = await self._respond(request, local_only)
                last = False
            except _Refused as refused:
                response = refused.response
            with trio.move_on_after(self._write_timeout) as scope:
                await connection.send(response, last=last, progress=partial(self._extend, scope))
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

    async def _respond(self, request: h11.Request, local_only: bool) -> AdminResponse:
        headers = tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in request.headers)
        method = request.method.decode("latin-1")
        _check_sender(method, headers, local_only=local_only)
        target = request.target.decode("latin-1")
        if not target.startswith("/"):
            raise _Refused(400, "the request target must be a path")
        path, _, query = target.partition("?")
        route = self._routes.get(path)
        if route is None:
            raise _Refused(404, "no such page; / lists what there is")
        if method not in route.methods and not (method == "HEAD" and "GET" in route.methods):
            raise _not_allowed(route)
        if any(name == "transfer-encoding" or (name == "content-length" and value != "0") for name, value in headers):
            raise _Refused(400, "a request here has no body; what it asks for stands in the query")
        if query.count("&") >= _MAX_PARAMETERS:
            raise _Refused(400, "too many parameters")
        try:
            answer = route.handler(AdminRequest(path=path, query=query, headers=headers, method=method))
            if isinstance(answer, AdminResponse):
                return answer
            with trio.fail_after(self._page_timeout):
                return await answer
        except trio.TooSlowError:
            raise _Refused(503, "this page took too long") from None
        except Exception:  # noqa: BLE001 - a page that fails must not end the process that it tells about
            _log.exception("the admin page %s failed", path)
            raise _Refused(500, "this page failed; the log says why") from None


def _not_allowed(route: Route) -> _Refused:
    methods = [*route.methods, *(("HEAD",) if "GET" in route.methods else ())]
    why = f"only {' and '.join(methods)}"
    return _Refused(405, f"{why}\n{route.help}" if route.help else why, ("Allow", ", ".join(methods)))


async def _listen(hosts: Iterable[str | None], port: int) -> list[trio.SocketListener]:
    hosts = tuple(hosts)
    tries = 1 if port else _TRIES
    while True:
        tries -= 1
        try:
            return await _listen_on_all(hosts, port)
        except OSError as problem:
            # The free port of one address may be somebody's on another one.
            if not tries or problem.errno != errno.EADDRINUSE:
                raise


async def _listen_on_all(hosts: Iterable[str | None], port: int) -> list[trio.SocketListener]:
    listeners: list[trio.SocketListener] = []
    missing: OSError | None = None
    try:
        for host in hosts:
            try:
                found = await trio.open_tcp_listeners(port, host=host)
            except OSError as problem:
                if problem.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                missing = problem
                continue
            listeners += found
            port = port or found[0].socket.getsockname()[1]
        if not listeners:
            raise missing or OSError(errno.EADDRNOTAVAIL, "no address to listen on")
    except BaseException:
        for listener in listeners:
            listener.socket.close()
        raise
    return listeners


def _check_sender(method: str, headers: Iterable[tuple[str, str]], *, local_only: bool) -> None:
    """Refuses what a web page of somebody else makes a browser send. Programs and people at a terminal pass.

    A browser says where a request comes from: by Origin with every POST and every request to another origin, by
    Sec-Fetch-Site with all of them. The name in the Host header is the one that the page used.
    """
    said: dict[str, str] = {}
    for name, value in headers:
        said[name] = f"{said[name]}, {value}" if name in said else value
    host = said.get("host")
    if local_only and host is not None and not _is_loopback(host):  # HTTP/1.0 may have none; a browser always sends one
        raise _Refused(403, "this port answers to localhost only; the Host header names something else")
    origin = said.get("origin")
    if origin is not None:
        if host is None or origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}"):
            raise _Refused(403, "this comes from a web page of another origin")
        if method not in ("GET", "HEAD") and not _is_literal(host):
            raise _Refused(403, "a web page must use an address here, not a name: names can be made to lead anywhere")
    site = said.get("sec-fetch-site", "none").lower()
    followed_link = method in ("GET", "HEAD") and said.get("sec-fetch-mode", "").lower() == "navigate"
    if site not in ("none", "same-origin") and not followed_link:
        raise _Refused(403, "this comes from a web page of another origin")


def _host_name(host: str) -> str:
    return host.partition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]


def _is_loopback(host: str) -> bool:
    name = _host_name(host)
    if name.lower().removesuffix(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(_host_name(host))
    except ValueError:
        return _is_loopback(host)
    return True


def _takes_gzip(accept_encoding: bytes) -> bool:
    """RFC 9110 section 12.5.3, as far as clients use it."""
    for part in accept_encoding.decode("latin-1").lower().split(","):
        coding, *parameters = (word.strip() for word in part.split(";"))
        if coding in ("gzip", "x-gzip", "*"):
            quality = next((word[2:] for word in parameters if word.startswith("q=")), "1")
            try:
                return float(quality) > 0
            except ValueError:
                return False
    return False


class _Connection:
    """h11 over a stream."""

    def __init__(self, stream: trio.abc.HalfCloseableStream) -> None:
        self._stream = stream
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=_MAX_HEAD)
        self._head_only = False
        self._gzip = False

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
        self._head_only = self._gzip = False
        try:
            while (event := self._h11.next_event()) is h11.NEED_DATA:
                await self.receive()
            if not isinstance(event, h11.Request):
                return None
            if event.http_version not in (b"1.0", b"1.1"):
                raise _Refused(400, "this is not a request in HTTP/1.1")
            self._head_only = event.method == b"HEAD"
            self._gzip = any(name == b"accept-encoding" and _takes_gzip(value) for name, value in event.headers)
            self._h11.next_event()  # the end of a request without a body; of others the body stays unread
        except h11.RemoteProtocolError as problem:
            if problem.error_status_hint == 431:
                raise _Refused(431, f"the head of a request must not exceed {_MAX_HEAD} bytes") from None
            raise _Refused(400, "this is not a request in HTTP/1.1") from None
        return event

    async def send(self, response: AdminResponse, *, last: bool, progress: Callable[[], None]) -> None:
        """Sends an answer.

        Args:
            response: what to send.
            last: announces the end of the connection.
            progress: called when a piece has left.
        """
        headers = [
            ("Content-Type", response.content_type),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            *response.headers,
        ]
        if last:
            headers.append(("Connection", "close"))
        body = response.body
        pieces = body if not isinstance(body, bytes) else iter((body,))
        if not isinstance(body, bytes) or len(body) >= _MIN_GZIP:
            headers.append(("Vary", "Accept-Encoding"))
            if self._gzip and not self._head_only:
                headers.append(("Content-Encoding", "gzip"))
                if isinstance(body, bytes):
                    body = await _compressed(body)
                    pieces = iter((body,))
                else:
                    pieces = _compressed_pieces(body)
        if isinstance(body, bytes):
            headers.append(("Content-Length", str(len(body))))
        reason = HTTPStatus(response.status).phrase
        data = self._h11.send(h11.Response(status_code=response.status, headers=headers, reason=reason)) or b""
        if not self._head_only:
            for piece in pieces:
                data += self._h11.send(h11.Data(data=piece)) or b""
                if not isinstance(body, bytes):
                    await self._stream.send_all(data)
                    progress()
                    data = b""
        data += self._h11.send(h11.EndOfMessage()) or b""
        await self._stream.send_all(data)

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


async def _compressed(body: bytes) -> bytes:
    if len(body) < _BIG:
        return gzip.compress(body, 1, mtime=0)
    return await trio.to_thread.run_sync(partial(gzip.compress, body, 1, mtime=0))


def _compressed_pieces(pieces: Iterator[bytes]) -> Iterator[bytes]:
    compressor = zlib.compressobj(1, zlib.DEFLATED, _GZIP)
    for piece in pieces:
        yield compressor.compress(piece)
    yield compressor.flush()
