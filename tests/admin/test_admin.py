"""The admin port: right answers to right requests, bounded patience with everything else."""

from __future__ import annotations

import random
import subprocess
from functools import partial
from typing import TYPE_CHECKING

import httpx
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from hbone.admin import AdminRequest, AdminResponse, AdminServer, Readiness, standard_routes
from hbone.telemetry import Metrics

if TYPE_CHECKING:
    from hbone.address import Endpoint

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


def fail(_request: AdminRequest) -> AdminResponse:
    raise RuntimeError("broken page")


def make_server(**options: float) -> tuple[AdminServer, Readiness]:
    readiness = Readiness(["certificates", "listeners"])
    routes = standard_routes(
        render_metrics=Metrics(version="9").render,
        readiness=readiness,
        more={"/fail": fail, "/echo": lambda r: AdminResponse(body=f"{r.query} {r.header('x')}".encode())},
    )
    return AdminServer(routes, **options), readiness  # type: ignore[arg-type]


async def talk(*chunks: bytes, local_only: bool = True, server: AdminServer | None = None) -> bytes:
    """What a server answers to these bytes and their end."""
    server = server or make_server()[0]
    ours, theirs = trio.testing.memory_stream_pair()
    answer = bytearray()

    async def read() -> None:
        async for data in ours:
            answer.extend(data)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(server.serve_stream, theirs, local_only=local_only))
        nursery.start_soon(read)
        try:
            for chunk in chunks:
                await ours.send_all(chunk)
            await ours.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
    return bytes(answer)


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


@pytest.fixture
async def address(nursery: trio.Nursery) -> Endpoint:
    server, _ = make_server()
    bound: Endpoint = await nursery.start(server.serve, "127.0.0.1", 0)
    return bound


async def test_over_a_real_socket(address: Endpoint) -> None:
    async with httpx.AsyncClient(base_url=f"http://{address}", trust_env=False, timeout=60) as client:
        index = await client.get("/")
        assert index.status_code == 200
        assert index.text.split() == ["hbone", "/", "/echo", "/fail", "/healthz/ready", "/metrics", "/stats/prometheus"]
        metrics = await client.get("/metrics")
        assert 'istio_build{component="hbone",tag="9"} 1.0' in metrics.text
        assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert (await client.get("/stats/prometheus")).status_code == 200
        openmetrics = await client.get("/metrics", headers={"accept": "application/openmetrics-text"})
        assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")
        assert openmetrics.text.endswith("# EOF\n")
        head = await client.head("/metrics")
        assert (head.status_code, head.content) == (200, b"")
        assert int(head.headers["content-length"]) > 100
        assert (await client.get("/echo?a=b", headers={"x": "1"})).text == "a=b 1"


async def test_curl(address: Endpoint) -> None:
    try:
        done = await trio.run_process(["curl", "-sS", "-i", f"http://{address}/healthz/ready"], capture_stdout=True)
    except FileNotFoundError:
        pytest.skip("curl is not installed")
    except subprocess.CalledProcessError as error:
        pytest.fail(str(error))
    assert done.stdout.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")


async def test_readiness() -> None:
    server, readiness = make_server()
    request = b"GET /healthz/ready HTTP/1.1\r\nHost: localhost\r\n\r\n"
    answer = await talk(request, server=server)
    assert status(answer) == 503
    assert answer.endswith(b"not ready, waiting for:\ncertificates\nlisteners\n")
    readiness.unblock("certificates")
    readiness.unblock("certificates")
    readiness.unblock("listeners")
    assert readiness.ready
    answer = await talk(request, server=server)
    assert status(answer) == 200
    assert answer.endswith(b"\r\n\r\nready\n")
    readiness.block("draining")
    assert readiness.blockers == ("draining",)
    assert status(await talk(request, server=server)) == 503


async def test_keep_alive_and_pipelining() -> None:
    assert (await talk(GET + GET)).count(b"HTTP/1.1 200 OK") == 2
    assert (await talk(GET, GET, GET)).count(b"HTTP/1.1 200 OK") == 3


@pytest.mark.parametrize(
    ("request_bytes", "expected"),
    [
        (b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (b"POST /metrics HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello", 405),
        (b"DELETE / HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", 400),
        (b"GET http://localhost/ HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"CONNECT localhost:1 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\nHost: localhost\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET /fail HTTP/1.1\r\nHost: localhost\r\n\r\n", 500),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 30_000 + b"\r\n\r\n", 431),
        (b"GET /" + b"x" * 30_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 431),
        (b"GET / HTTP/1.0\r\n\r\n", 200),
    ],
)
async def test_other_requests(request_bytes: bytes, expected: int) -> None:
    answer = await talk(request_bytes)
    assert status(answer) == expected
    if expected >= 400:
        assert b"\r\nConnection: close\r\n" in answer
    assert (b"\r\nAllow: GET, HEAD\r\n" in answer) == (expected == 405)


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost", True),
        ("LocalHost.:15000", True),
        ("127.0.0.1:15000", True),
        ("127.9.9.9", True),
        ("[::1]", True),
        ("[::1]:15000", True),
        ("evil.example", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example:15000", False),
        ("10.0.0.1", False),
        ("[::2]:1", False),
        ("[", False),
        ("", False),
    ],
)
async def test_host_on_a_loopback_port(host: str, allowed: bool) -> None:
    request = f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
    assert status(await talk(request)) == (200 if allowed else 403)
    assert status(await talk(request, local_only=False)) == 200


async def test_the_check_follows_the_bound_address(nursery: trio.Nursery) -> None:
    for host, expected in (("127.0.0.1", 403), ("0.0.0.0", 200)):
        bound: Endpoint = await nursery.start(make_server()[0].serve, host, 0)
        async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
            answer = await client.get(f"http://127.0.0.1:{bound.port}/", headers={"host": "evil.example"})
        assert answer.status_code == expected


async def test_byte_by_byte() -> None:
    assert status(await talk(*(bytes([byte]) for byte in GET))) == 200


@pytest.mark.parametrize("sent", [b"", b"GET / HT"])
async def test_a_slow_head(autojump_clock: trio.testing.MockClock, sent: bytes) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(make_server()[0].serve_stream, theirs)
        start = trio.current_time()
        if sent:
            await ours.send_all(sent)
        answer = await ours.receive_some()
        assert trio.current_time() - start == pytest.approx(2.0)
        assert answer.startswith(b"HTTP/1.1 408") if sent else not answer
        await ours.aclose()


async def test_a_dripping_head(autojump_clock: trio.testing.MockClock) -> None:
    ours, theirs = trio.testing.memory_stream_pair()

    async def drip() -> None:
        try:
            while True:
                await ours.send_all(b"x")
                await trio.sleep(0.1)
        except trio.BrokenResourceError:
            return

    async with trio.open_nursery() as nursery:
        nursery.start_soon(make_server()[0].serve_stream, theirs)
        nursery.start_soon(drip)
        answer = await ours.receive_some()
        assert answer.startswith(b"HTTP/1.1 408")
        assert trio.current_time() < 2.2


async def test_an_idle_connection_ends(autojump_clock: trio.testing.MockClock) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(make_server(idle_timeout=30.0)[0].serve_stream, theirs)
        await ours.send_all(GET)
        assert (await ours.receive_some()).startswith(b"HTTP/1.1 200")
        start = trio.current_time()
        assert await ours.receive_some() == b""
        assert trio.current_time() - start == pytest.approx(30.0)


async def test_a_reader_that_does_not_read(autojump_clock: trio.testing.MockClock) -> None:
    ours, theirs = trio.testing.lockstep_stream_pair()
    server, _ = make_server()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve_stream, theirs)
        await ours.send_all(GET)
    assert trio.current_time() == pytest.approx(10.0)


async def test_a_full_house_makes_room_for_a_probe() -> None:
    server, _ = make_server(max_connections=5)
    async with trio.open_nursery() as nursery:
        idle = []
        for _ in range(5):
            ours, theirs = trio.testing.memory_stream_pair()
            nursery.start_soon(server.serve_stream, theirs)
            await ours.send_all(GET)
            assert (await ours.receive_some()).startswith(b"HTTP/1.1 200")
            idle.append(ours)
        assert status(await talk(GET, server=server)) == 200
        assert await idle[0].receive_some() == b""  # the longest waiting one
        for stream in idle[1:]:
            await stream.send_all(GET)
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 200")
            await stream.aclose()


async def test_a_full_house_that_is_busy_stays_bounded(autojump_clock: trio.testing.MockClock) -> None:
    server, _ = make_server(max_connections=2)
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            ours, theirs = trio.testing.lockstep_stream_pair()
            nursery.start_soon(server.serve_stream, theirs)
            await ours.send_all(GET)
        await trio.testing.wait_all_tasks_blocked()
        assert await talk(GET, server=server) == b""


@given(
    data=st.one_of(st.binary(max_size=300), st.text(max_size=200).map(lambda t: f"GET /{t} HTTP/1.1\r\n\r\n".encode()))
)
def test_garbage(data: bytes) -> None:
    answer = trio.run(talk, data)
    assert not answer or status(answer) in (200, 400, 403, 404, 405)


async def test_random_splits() -> None:
    random_ = random.Random(3)
    data = GET * 4
    for _ in range(30):
        cuts = sorted(random_.sample(range(1, len(data)), 6))
        chunks = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        assert (await talk(*chunks)).count(b"HTTP/1.1 200 OK") == 4


async def test_a_reset_is_no_error(address: Endpoint) -> None:
    stream = await trio.open_tcp_stream("127.0.0.1", address.port)
    await stream.send_all(b"GET ")
    stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    await stream.aclose()
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        assert (await client.get(f"http://{address}/")).status_code == 200


async def test_a_busy_port_is_an_oserror(address: Endpoint) -> None:
    with pytest.raises(OSError, match="in use"):
        await make_server()[0].serve("127.0.0.1", address.port)
