"""Servers and pairs in the background, used by blocking clients and by trio ones."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import requests
import trio
from support.backends import refused_port

from hbone import (
    HBONEClient,
    IdentityRefused,
    InvalidIdentity,
    LocalCA,
    PolicyDenied,
    RequestRejected,
    TunnelRequest,
    Unreachable,
)
from hbone.telemetry import Direction
from hbone.testing import BackgroundError, Mesh

if TYPE_CHECKING:
    from collections.abc import Iterator


#: Seconds that only something that hangs needs.
WAIT = 60


@pytest.fixture
def mesh(hbone_ca: LocalCA) -> Iterator[Mesh]:
    with Mesh(hbone_ca) as mesh:
        yield mesh


@pytest.fixture
def app() -> Iterator[socket.socket]:
    """An application that answers each connection's bytes, up to their end, in upper case."""

    def serve_one(connection: socket.socket) -> None:
        with connection, contextlib.suppress(ConnectionResetError, BrokenPipeError):
            data = b"".join(iter(lambda: connection.recv(65536), b""))
            connection.sendall(data.upper())

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            worker = threading.Thread(target=serve_one, args=(connection,), name="application")
            worker.start()
            workers.append(worker)

    workers: list[threading.Thread] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield listener
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        for worker in workers:
            worker.join()


@pytest.fixture
def web_app() -> Iterator[int]:
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Server(ThreadingHTTPServer):
        daemon_threads = False  # so that its end waits for those of its connections

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = WAIT

        def do_GET(self) -> None:
            body = f"{self.path}\n".encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def ask(address: tuple[str, int], data: bytes) -> bytes:
    with socket.create_connection(address, timeout=WAIT) as sock:
        sock.sendall(data)
        try:
            sock.shutdown(socket.SHUT_WR)
        except OSError as exc:
            # A proxy that refuses at once has reset the connection already: the kernel says "not connected" of it.
            if exc.errno != errno.ENOTCONN:
                raise
            raise ConnectionResetError(errno.ECONNRESET, "reset before the end of our own data") from exc
        return b"".join(iter(lambda: sock.recv(65536), b""))


# === identities ===


def test_svids_by_short_and_by_whole_name(mesh: Mesh) -> None:
    whole = "spiffe://cluster.local/ns/shop/sa/cart"
    assert str(mesh.svid("shop/cart").identity) == whole
    assert str(mesh.svid(whole).identity) == whole
    assert mesh.svid(mesh.svid(whole).identity).identity == mesh.svid(whole).identity
    with pytest.raises(InvalidIdentity, match="namespace/service-account"):
        mesh.svid("cart")
    with pytest.raises(InvalidIdentity):
        mesh.svid("spiffe://elsewhere/ns/shop/sa/cart")


def test_a_mesh_of_another_trust_domain(app: socket.socket) -> None:
    with Mesh(LocalCA.in_memory(trust_domain="example.org")) as mesh:
        pair = mesh.pair(app.getsockname(), client="shop/cart", allow_peers=["shop/*"])
        assert str(pair.client) == "spiffe://example.org/ns/shop/sa/cart"
        assert ask(pair.address, b"hello") == b"HELLO"


# === pairs ===


@pytest.mark.parametrize("form", ["socket name", "port", "text"])
def test_bytes_and_half_close_go_through_a_pair(mesh: Mesh, app: socket.socket, form: str) -> None:
    port = app.getsockname()[1]
    pair = mesh.pair({"socket name": app.getsockname(), "port": port, "text": f"127.0.0.1:{port}"}[form])
    data = os.urandom(700_000)
    assert ask(pair.address, data) == data.upper()


def test_access_log_and_statistics_of_a_pair(mesh: Mesh, app: socket.socket) -> None:
    pair = mesh.pair(app.getsockname(), client="shop/cart", server="shop/web")
    assert pair.access_log == ()
    for _ in range(3):
        ask(pair.address, b"hello")
    records = pair.wait_for_access_log(6)
    assert pair.access_log == records
    for direction in Direction:
        mine = [record for record in records if record.direction is direction]
        assert len(mine) == 3
        assert {(record.src_identity, record.dst_identity) for record in mine} == {(pair.client, pair.server)}
        assert {(record.bytes_sent, record.bytes_recv, record.error) for record in mine} == {(5, 5, None)}
    statistics = pair.statistics()
    assert (statistics.outbound.requests, statistics.outbound.tunnels) == (3, 0)
    assert (statistics.inbound.accepted, statistics.inbound.tunnels) == (1, 0)


def test_who_is_not_allowed_gets_a_reset_and_the_log_says_why(mesh: Mesh, app: socket.socket) -> None:
    pair = mesh.pair(app.getsockname(), client="bank/teller", allow_peers=["shop/*", "test/client"])
    with pytest.raises(ConnectionResetError):
        ask(pair.address, b"hello")
    records = {record.direction: record for record in pair.wait_for_access_log()}
    assert records[Direction.INBOUND].status == 401
    assert records[Direction.INBOUND].flag == "DENY"
    assert records[Direction.OUTBOUND].status == 401


def test_one_who_is_allowed_by_name(mesh: Mesh, app: socket.socket) -> None:
    pair = mesh.pair(app.getsockname(), client="bank/teller", allow_peers=["bank/teller"])
    assert ask(pair.address, b"hello") == b"HELLO"


def test_an_unexpected_server_is_not_talked_to(mesh: Mesh, app: socket.socket) -> None:
    pair = mesh.pair(app.getsockname(), expect=["shop/web"])
    with pytest.raises(ConnectionResetError):
        ask(pair.address, b"hello")
    (record,) = pair.wait_for_access_log(1)
    assert record.error is not None
    assert "expected spiffe://cluster.local/ns/shop/sa/web" in record.error


def test_a_client_with_an_svid_from_elsewhere(mesh: Mesh, app: socket.socket) -> None:
    foreign = LocalCA.in_memory().issue("spiffe://cluster.local/ns/test/sa/client")
    pair = mesh.pair(app.getsockname(), client=foreign)
    with pytest.raises(ConnectionResetError):
        ask(pair.address, b"hello")


def test_an_application_that_is_down(mesh: Mesh) -> None:
    with refused_port() as port:
        pair = mesh.pair(port)
        with pytest.raises(ConnectionResetError):
            ask(pair.address, b"hello")
        assert {record.status for record in pair.wait_for_access_log()} == {503}


def test_waiting_for_too_much_says_what_there_is(mesh: Mesh, app: socket.socket) -> None:
    pair = mesh.pair(app.getsockname())
    ask(pair.address, b"hello")
    pair.wait_for_access_log()
    with pytest.raises(TimeoutError, match=r"not 3 records were logged within 0.1 s, only .*Direction.OUTBOUND"):
        pair.wait_for_access_log(3, timeout=0.1)


def test_requests_through_a_pair(mesh: Mesh, web_app: int) -> None:
    pair = mesh.pair(web_app)
    with requests.Session() as session:
        session.trust_env = False
        assert session.get(f"{pair.url}/one", timeout=WAIT).text == "/one\n"
        assert session.get(f"{pair.url}/two", timeout=WAIT).text == "/two\n"


def test_httpx_through_a_pair(mesh: Mesh, web_app: int) -> None:
    pair = mesh.pair(web_app)
    with httpx.Client(trust_env=False, timeout=WAIT) as client:
        assert client.get(f"{pair.url}/one").text == "/one\n"


async def test_httpx_in_trio_through_a_pair(mesh: Mesh, web_app: int) -> None:
    pair = mesh.pair(web_app)
    async with httpx.AsyncClient(trust_env=False, timeout=WAIT) as client:
        assert (await client.get(f"{pair.url}/one")).text == "/one\n"
    records = await trio.to_thread.run_sync(pair.wait_for_access_log)
    assert len(records) == 2


def test_the_http_proxy_of_a_pair_leads_to_the_application(mesh: Mesh, web_app: int) -> None:
    pair = mesh.pair(web_app)
    host, _, port = pair.http_proxy.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=WAIT) as sock:
        sock.sendall(b"CONNECT 10.0.0.7:80 HTTP/1.1\r\nHost: 10.0.0.7:80\r\n\r\n")
        assert sock.recv(4096).startswith(b"HTTP/1.1 200 ")
        sock.sendall(b"GET /proxied HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = b"".join(iter(lambda: sock.recv(4096), b""))
    assert answer.endswith(b"/proxied\n")


def test_the_socks_proxy_of_a_pair_leads_to_the_application(mesh: Mesh, web_app: int) -> None:
    pair = mesh.pair(web_app)
    host, _, port = pair.socks.removeprefix("socks5h://").partition(":")
    with socket.create_connection((host, int(port)), timeout=WAIT) as sock:
        sock.sendall(b"\x05\x01\x00")
        assert sock.recv(2) == b"\x05\x00"
        sock.sendall(b"\x05\x01\x00\x01" + bytes([10, 0, 0, 7]) + (80).to_bytes(2, "big"))
        assert sock.recv(10)[:2] == b"\x05\x00"
        sock.sendall(b"GET /proxied HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = b"".join(iter(lambda: sock.recv(4096), b""))
    assert answer.endswith(b"/proxied\n")


# === servers ===


async def test_an_echo_server_and_what_it_remembers(mesh: Mesh) -> None:
    server = mesh.server("echo", identity="shop/web")
    async with HBONEClient.connect(*server.address, svid=mesh.svid("shop/cart"), expect=server.identity) as client:
        assert client.peer.identity == server.svid.identity
        async with await client.open_tunnel("10.0.0.7:8080", headers=[("x-color", "blue")]) as tunnel:
            await tunnel.send_all(b"hello")
            await tunnel.send_eof()
            assert b"".join([bytes(chunk) async for chunk in tunnel]) == b"hello"
            assert server.statistics().sessions == 1
    (received,) = await trio.to_thread.run_sync(server.wait_for_requests)
    assert str(received.peer.identity) == "spiffe://cluster.local/ns/shop/sa/cart"
    assert str(received.target) == "10.0.0.7:8080"
    assert (b"x-color", b"blue") in received.headers.headers
    assert (received.status, received.bytes_received, received.bytes_sent) == (200, 5, 5)
    assert received.sha256 == hashlib.sha256(b"hello").hexdigest()
    assert received.error is None


async def test_a_sink_hashes_what_it_takes(mesh: Mesh) -> None:
    server = mesh.server("sink")
    data = os.urandom(3_000_000)
    async with HBONEClient.connect(*server.address, svid=mesh.svid("shop/cart")) as client:
        async with await client.open_tunnel("10.0.0.7:8080") as tunnel:
            await tunnel.send_all(data)
            await tunnel.send_eof()
            assert await tunnel.receive_some() == b""
    (received,) = await trio.to_thread.run_sync(server.wait_for_requests)
    assert (received.bytes_received, received.bytes_sent) == (len(data), 0)
    assert received.sha256 == hashlib.sha256(data).hexdigest()


async def test_a_forwarding_server_and_its_refusals(mesh: Mesh, app: socket.socket) -> None:
    server = mesh.server("forward")
    with refused_port() as dead:
        async with HBONEClient.connect(*server.address, svid=mesh.svid("shop/cart")) as client:
            async with await client.open_tunnel(f"127.0.0.1:{app.getsockname()[1]}") as tunnel:
                await tunnel.send_all(b"hello")
                await tunnel.send_eof()
                assert b"".join([bytes(chunk) async for chunk in tunnel]) == b"HELLO"
            with pytest.raises(Unreachable):
                await client.open_tunnel(f"127.0.0.1:{dead}")
    assert [received.status for received in server.requests] == [200, 503]


async def test_a_handler_of_ones_own_may_refuse(mesh: Mesh) -> None:
    async def handler(request: TunnelRequest) -> None:
        raise RequestRejected(401)

    server = mesh.server(handler)
    async with HBONEClient.connect(*server.address, svid=mesh.svid("shop/cart")) as client:
        with pytest.raises(PolicyDenied):
            await client.open_tunnel("10.0.0.7:80")
    (received,) = await trio.to_thread.run_sync(server.wait_for_requests)
    assert received.status == 401
    assert isinstance(received.error, RequestRejected)


async def test_a_handler_that_fails_fails_the_test(hbone_ca: LocalCA) -> None:
    async def handler(request: TunnelRequest) -> None:
        raise LookupError("a fault in the handler")

    stack = contextlib.ExitStack()
    mesh = stack.enter_context(Mesh(hbone_ca))
    server = mesh.server(handler)
    async with HBONEClient.connect(*server.address, svid=mesh.svid("shop/cart")) as client:
        with pytest.raises(Unreachable):
            await client.open_tunnel("10.0.0.7:80")
    assert [received.status for received in server.requests] == [503]
    with pytest.raises(BackgroundError, match="LookupError: a fault in the handler"):
        stack.close()


async def test_a_peer_that_leaves_is_no_failure_of_the_server(mesh: Mesh) -> None:
    server = mesh.server("echo")
    async with HBONEClient.connect(*server.address, svid=mesh.svid("shop/cart")) as client:
        tunnel = await client.open_tunnel("10.0.0.7:80")
        await tunnel.send_all(b"hello")
        assert await tunnel.receive_some() == b"hello"
        tunnel.abort()
        (received,) = await trio.to_thread.run_sync(server.wait_for_requests)
    assert isinstance(received.error, trio.BrokenResourceError)
    mesh.check()


async def test_strangers_are_refused(mesh: Mesh) -> None:
    server = mesh.server()
    stranger = LocalCA.in_memory(trust_domain="elsewhere.example").issue(
        "spiffe://elsewhere.example/ns/shop/sa/cart", federated={mesh.ca.trust_domain: mesh.ca.roots}
    )
    with pytest.raises(IdentityRefused):
        async with HBONEClient.connect(*server.address, svid=stranger, expect=server.identity):
            raise AssertionError("not reached")
    assert server.requests == ()


def test_unknown_handlers_are_named(mesh: Mesh) -> None:
    with pytest.raises(ValueError, match="there are echo, sink and forward"):
        mesh.server("ehco")  # type: ignore[arg-type]


# === the end ===


# In a process of its own: what threads of other tests open and close late is not ours to count.
LEAVES_OPEN_CONNECTIONS = """
import contextlib, gc, os, socket, sys, threading
from hbone import LocalCA
from hbone.testing import Mesh

WAIT = 60

def descriptors():
    gc.collect()
    found = {}
    for fd in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):  # that of the listing itself
            found[fd] = os.fstat(int(fd)).st_ino
    return found

def answer(connection):
    with connection, contextlib.suppress(OSError):
        connection.sendall(b"".join(iter(lambda: connection.recv(65536), b"")).upper())

def serve():
    while True:
        connection, peer = listener.accept()
        if peer == last.getsockname():
            connection.close()
            return
        answering.append(threading.Thread(target=answer, args=(connection,), daemon=True))
        answering[-1].start()

ca = LocalCA.in_memory()
listener = socket.create_server(("127.0.0.1", 0))
last = socket.socket()
last.settimeout(WAIT)
last.bind(("127.0.0.1", 0))
answering = []
serving = threading.Thread(target=serve, daemon=True)
before = descriptors()
serving.start()
with contextlib.ExitStack() as stack:
    with Mesh(ca) as mesh:
        pair = mesh.pair(listener.getsockname())
        mesh.server()
        socks = [stack.enter_context(socket.create_connection(pair.address, timeout=WAIT)) for _ in range(3)]
        for sock in socks:
            sock.sendall(b"hello")
        socks[0].shutdown(socket.SHUT_WR)
        assert socks[0].recv(100) == b"HELLO"
    for sock in socks[1:]:
        with contextlib.suppress(ConnectionResetError):
            sys.exit(f"no reset but {sock.recv(100)!r}")
names = [thread.name for thread in threading.enumerate()]
assert "hbone testing" not in names, names
# The application's ends are not ours to count, and it may not even have accepted them: it is done with all that came
# before the last connection.
last.connect(listener.getsockname())
serving.join(WAIT)
for thread in (serving, *answering):
    thread.join(WAIT)
    assert not thread.is_alive()
left = {fd: inode for fd, inode in descriptors().items() if before.get(fd) != inode}
assert len(descriptors()) == len(before), left
"""


def test_nothing_is_left_even_of_connections_that_are_open() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LEAVES_OPEN_CONNECTIONS], capture_output=True, text=True, timeout=110, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
