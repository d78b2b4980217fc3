"""HTTP CONNECT: the parser at all splits, the statuses, and curl and requests as clients."""

from __future__ import annotations

import random
import socket
from typing import TYPE_CHECKING

import pytest
import requests
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from support.tcp import connected_pair, receive_all

from hbone.address import Authority
from hbone.errors import BadTarget, ConnectFailed, PolicyDenied, StreamRefused, Unreachable
from hbone.proxy._ways import BadHandshake, HttpConnectParser, WayIn, accept_http_connect, accept_socks5

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Awaitable, Callable

HEAD = b"CONNECT cart.shop:8080 HTTP/1.1\r\nHost: cart.shop:8080\r\nUser-Agent: x\r\n\r\n"


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


@pytest.mark.parametrize(
    ("head", "target"),
    [
        (HEAD, "cart.shop:8080"),
        (b"CONNECT [::1]:80 HTTP/1.1\r\nHost: [::1]:80\r\n\r\n", "[::1]:80"),
        (b"CONNECT 10.0.0.7:80 HTTP/1.0\r\n\r\n", "10.0.0.7:80"),
        (b"CONNECT 10.0.0.7:80 HTTP/1.1\r\nHost: other\r\nContent-Length: 0\r\n\r\n", "10.0.0.7:80"),
        (b"CONNECT 10.0.0.7:80 HTTP/1.1\r\nhost:x\r\nProxy-Authorization: Basic eA==\r\n\r\n", "10.0.0.7:80"),
    ],
)
def test_requests_whole_in_bytes_and_in_pieces(head: bytes, target: str) -> None:
    early = b"\x16\x03\x01\r\n\r\nGET / HTTP/1.1\r\n"
    data = head + early
    random_ = random.Random(2)
    splits = [[data], [head, early], [bytes([byte]) for byte in data]]
    for _ in range(20):
        cuts = sorted(random_.sample(range(1, len(data)), 4))
        splits.append([data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)])
    for chunks in splits:
        parser = HttpConnectParser()
        assert b"".join(parser.feed(chunk) for chunk in chunks) == b""
        assert parser.target == Authority.parse(target)
        assert parser.leftover == early


def test_nothing_is_known_before_the_last_byte() -> None:
    for cut in range(len(HEAD)):
        parser = HttpConnectParser()
        parser.feed(HEAD[:cut])
        assert parser.target is None
        assert parser.leftover == b""


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"GET http://cart.shop/ HTTP/1.1\r\nHost: cart.shop\r\n\r\n", 405),
        (b"GET / HTTP/1.1\r\nHost: cart.shop\r\n\r\n", 405),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc", 405),
        (b"CONNECT cart.shop HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"CONNECT cart.shop:0 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"CONNECT cart.shop:99999 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"CONNECT http://cart.shop:80/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"CONNECT user@cart.shop:80 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"CONNECT :80 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"CONNECT ::1:80 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"CONNECT / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"CONNECT cart.shop:80 HTTP/1.1\r\n\r\n", 400),
        (b"CONNECT cart.shop:80 HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"CONNECT cart.shop:80 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello", 400),
        (b"CONNECT cart.shop:80 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"CONNECT cart.shop:80 HTTP/2.0\r\nHost: a\r\n\r\n", 400),
        (b"CONNECT cart.shop:80\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"\x05\x01\x00\r\n\r\n", 400),
        (b"\x16\x03\x01\x00\xf1\x01\r\n\r\n", 400),
        (b"CONNECT cart.shop:80 HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 40_000, 431),
        (b"x" * 40_000, 431),
    ],
)
def test_refusals(data: bytes, expected: int) -> None:
    head, _, body = refusal(data).partition(b"\r\n\r\n")
    assert status(head) == expected
    assert b"\r\nConnection: close" in head
    assert (b"\r\nAllow: CONNECT" in head) == (expected == 405)
    assert body.count(b"\n") == 1
    assert f"Content-Length: {len(body)}".encode() in head


def refusal(data: bytes) -> bytes:
    parser = HttpConnectParser()
    try:
        for start in range(0, len(data), 4096):
            parser.feed(data[start : start + 4096])
    except BadHandshake as problem:
        return problem.answer
    pytest.fail(f"taken as {parser.target}")


@given(st.lists(st.binary(max_size=60), max_size=6), st.sampled_from([b"", HEAD[:20], HEAD[:-3], HEAD]))
def test_garbage_raises_nothing_else(chunks: list[bytes], start: bytes) -> None:
    parser = HttpConnectParser()
    try:
        for chunk in [start, *chunks]:
            parser.feed(chunk)
    except BadHandshake as error:
        answer = error.answer
        assert parser.target is None
        assert status(answer) in (400, 405, 431)
    if start == HEAD:
        assert parser.leftover == b"".join(chunks)


# -- over sockets ------------------------------------------------------------------------------------------------------


async def test_success_is_said_only_when_the_tunnel_is_up() -> None:
    application, sock = connected_pair()
    async with application:
        await application.send_all(HEAD + b"early")
        way = await accept_http_connect(sock)
        assert str(way.target) == "cart.shop:8080"
        assert way.leftover == b"early"
        await way.succeeded()
        assert await application.receive_some() == b"HTTP/1.1 200 Connection established\r\n\r\n"
        sock.close()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (PolicyDenied(401), 403),
        (Unreachable(503), 503),
        (BadTarget(400), 502),
        (StreamRefused("draining"), 503),
        (ConnectFailed("TLS handshake failed"), 502),
        (trio.TooSlowError(), 504),
        (TimeoutError(), 504),
        (socket.gaierror("no such name"), 502),
        (RuntimeError("two\r\nInjected: lines\x00"), 502),
    ],
)
async def test_failures(error: Exception, expected: int) -> None:
    application, sock = connected_pair()
    async with application:
        await application.send_all(HEAD + b"x" * 10_000)
        way = await accept_http_connect(sock)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(way.failed, error)
            head, _, body = (await receive_all(application)).partition(b"\r\n\r\n")
            await application.aclose()
    assert status(head) == expected
    assert b"\r\nInjected" not in head
    assert body.count(b"\n") == 1
    assert body.strip()
    assert sock.fileno() == -1


async def test_a_slow_head(autojump_clock: trio.testing.MockClock) -> None:
    application, sock = connected_pair()
    async with application:
        await application.send_all(HEAD[:-2])
        with pytest.raises(BadHandshake, match="within 10 s"):
            await accept_http_connect(sock)
        assert status(await receive_all(application)) == 408


# -- clients that people have ------------------------------------------------------------------------------------------


async def serve_one(
    listener: socket.socket, accept: Callable[[socket.socket], Awaitable[WayIn]], error: Exception | None
) -> WayIn:
    """Takes one connection; an HTTP server stands at the end of the tunnel."""
    await trio.lowlevel.wait_readable(listener)
    sock, _ = listener.accept()
    sock.setblocking(False)
    way = await accept(sock)
    if error is not None:
        await way.failed(error)
        return way
    await way.succeeded()
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(way.sock))
    async with stream:
        request = way.leftover
        while b"\r\n\r\n" not in request:
            request += await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello")
        await stream.send_eof()
        await receive_all(stream)
    return way


@pytest.fixture
def listener() -> socket.socket:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    listener.setblocking(False)
    return listener


async def curl(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    command = ["curl", "-sS", "--noproxy", "", "--max-time", "60", *arguments]
    try:
        return await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
    except FileNotFoundError:
        pytest.skip("curl is not installed")


@pytest.mark.parametrize(
    ("scheme", "target"),
    [("http", "cart.shop:80"), ("socks5h", "cart.shop:80"), ("socks5", "10.9.8.7:80")],
)
async def test_curl(listener: socket.socket, scheme: str, target: str) -> None:
    accept = accept_http_connect if scheme == "http" else accept_socks5
    proxy = f"{scheme}://127.0.0.1:{listener.getsockname()[1]}"
    ways = []
    with listener:
        async with trio.open_nursery() as nursery:

            async def serve() -> None:
                ways.append(await serve_one(listener, accept, None))

            nursery.start_soon(serve)
            done = await curl("--proxytunnel", "-x", proxy, f"http://{target}/")
            nursery.cancel_scope.deadline = trio.current_time() + 60  # should curl not even have connected
    assert (done.returncode, done.stdout) == (0, b"hello"), done.stderr
    assert str(ways[0].target) == target


@pytest.mark.parametrize(
    ("scheme", "code", "words"),
    [("http", 56, b"403"), ("socks5h", 97, b"(2)")],
)
async def test_curl_is_told_why(listener: socket.socket, scheme: str, code: int, words: bytes) -> None:
    accept = accept_http_connect if scheme == "http" else accept_socks5
    proxy = f"{scheme}://127.0.0.1:{listener.getsockname()[1]}"
    with listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_one, listener, accept, PolicyDenied(401))
            done = await curl("--proxytunnel", "-x", proxy, "http://cart.shop/")
            nursery.cancel_scope.deadline = trio.current_time() + 60
    assert done.returncode == code
    assert words in done.stderr


async def test_requests(listener: socket.socket) -> None:
    """Plain http:// through `requests` is not CONNECT: the answer says what to do."""
    proxy = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with listener:
        async with trio.open_nursery() as nursery:

            async def refuse() -> None:
                with pytest.raises(BadHandshake):
                    await serve_one(listener, accept_http_connect, None)

            nursery.start_soon(refuse)
            answer = await trio.to_thread.run_sync(
                lambda: requests.get("http://cart.shop/", proxies={"http": proxy}, timeout=60)
            )
    assert answer.status_code == 405
    assert "CONNECT" in answer.text
