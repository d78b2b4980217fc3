"""The processes of ``hbone demo``: a node with both proxies, and the web application behind one of them.

A hidden command. What they say to the demo goes to standard output, a JSON object a line; a node's access log goes
there, too. What the demo says to them comes on standard input, and its end is theirs: nobody survives the demo,
however that ends.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import socketserver
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    from collections.abc import Iterator

    import trio

    from hbone.admin import AdminResponse
    from hbone.proxy import InboundProxy

__all__ = ["command", "pattern"]

_LOOPBACK: Final = "127.0.0.1"
_BLOCK: Final = 1 << 20
#: Seconds that open connections get when the demo ends.
_DRAIN: Final = 1.0


@click.command("demo-node", hidden=True)
@click.argument("what", type=click.Choice(["node", "app"]))
def command(*, what: str) -> None:
    """A process of hbone demo."""
    if what == "app":
        _run_app()
    else:
        import trio

        trio.run(_run_node)


def pattern(size: int) -> Iterator[memoryview]:
    """The same `size` bytes each time, no two blocks of them alike; a piece is valid until the next is asked for."""
    block = bytearray(random.Random(size).randbytes(_BLOCK))  # noqa: S311 - not a secret
    view = memoryview(block)
    for number in range(0, size, _BLOCK):
        block[:8] = number.to_bytes(8, "big")
        yield view[: min(_BLOCK, size - number)]


def _say(**facts: object) -> None:
    # To the descriptor, as the access log does, so that lines stay whole.
    os.write(sys.stdout.fileno(), json.dumps(facts).encode() + b"\n")


class _Say(logging.Handler):
    """Hands the library's log on: it says which sessions did not come to be, and why."""

    def emit(self, record: logging.LogRecord) -> None:
        _say(log=record.getMessage())


# === the application ===


class _Application(BaseHTTPRequestHandler):
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
        """Nothing: the access log is the proxies' to write."""

    def _answer(self, status: int, text: str) -> None:
        body = text.encode()
        self._head(status, len(body))
        self.wfile.write(body)

    def _head(self, status: int, size: int) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(size))
        self.end_headers()


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True

    def server_bind(self) -> None:
        # HTTPServer's would look its own name up, which can take seconds where there is no network.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = _LOOPBACK, self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves is no error of the application."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def _run_app() -> None:
    with _Server((_LOOPBACK, 0), _Application) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        _say(port=server.server_port)
        sys.stdin.buffer.read()
        server.shutdown()


# === a node ===


async def _run_node() -> None:
    """Start in two steps, because the nodes need each other's ports: inbound and admin first, then outbound."""
    import trio

    from hbone import AllowNetworks, Authority, CaSvidSource, IdentityPattern, LocalCA, PeerPolicy
    from hbone.admin import AdminServer, Readiness, standard_routes
    from hbone.proxy import InboundProxy, OutboundProxy
    from hbone.telemetry import AccessLog, Metrics
    from hbone_cli._life import raise_file_limit

    raise_file_limit()
    logging.basicConfig(level=logging.INFO, handlers=[_Say()])
    orders = _Orders(trio.lowlevel.FdStream(os.dup(sys.stdin.fileno())))
    order = await orders.next()
    if order is None:
        return
    source = CaSvidSource(LocalCA.open(order["ca"]), order["identity"])
    metrics = Metrics(component="hbone-demo")
    async with AccessLog(sys.stdout.buffer) as access_log, trio.open_nursery() as nursery:
        nursery.start_soon(source.run)
        inbound = InboundProxy(
            source,
            AllowNetworks.parse(order["targets"]),
            peers=[IdentityPattern.parse(text) for text in order["peers"]],
            access_log=access_log,
            metrics=metrics,
        )
        routes = standard_routes(
            render_metrics=metrics.render,
            readiness=Readiness(),
            title=f"hbone demo: {source.identity}",
            more={"/sessions": lambda _: _sessions(inbound)},
        )
        admin = await nursery.start(AdminServer(routes).serve, _LOOPBACK, 0)
        hbone = await nursery.start(inbound.serve, _LOOPBACK, 0)
        _say(inbound=hbone.port, admin=admin.port)

        order = await orders.next()
        if order is not None:
            via, expect = order["via"], PeerPolicy.exact(order["expect"])
            async with OutboundProxy(
                source, via=via, expect=expect, access_log=access_log, metrics=metrics
            ) as outbound:
                forward = await nursery.start(outbound.serve_forward, _LOOPBACK, 0, Authority.parse(order["target"]))
                socks = await nursery.start(outbound.serve_socks, _LOOPBACK, 0)
                proxy = await nursery.start(outbound.serve_http_connect, _LOOPBACK, 0)
                _say(forward=forward.port, socks=socks.port, http_proxy=proxy.port)
                await orders.next()
                async with trio.open_nursery() as draining:
                    draining.start_soon(outbound.drain, _DRAIN)
                    draining.start_soon(inbound.drain, _DRAIN)
        nursery.cancel_scope.cancel()


def _sessions(inbound: InboundProxy) -> AdminResponse:
    """Who is connected now, and how: from the live sessions."""
    from hbone.admin import AdminResponse

    facts = [
        {
            "peer": str(session.peer.identity),
            "tls_version": session.peer.tls_version,
            "group": session.peer.group,
            "cipher": session.peer.cipher,
        }
        for session in inbound.server.sessions
    ]
    return AdminResponse(content_type="application/json", body=json.dumps(facts).encode())


class _Orders:
    """JSON lines on a stream."""

    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self._stream = stream
        self._bytes = b""

    async def next(self) -> Any:
        """The next one, or None: the demo is over."""
        while b"\n" not in self._bytes:
            more = await self._stream.receive_some()
            if not more:
                return None
            self._bytes += more
        line, _, self._bytes = self._bytes.partition(b"\n")
        return json.loads(line)
