"""Pages that do something, large ones, and who may ask for them."""

from __future__ import annotations

import errno
import gzip
import json
import logging
import re
import zlib
from typing import TYPE_CHECKING, Any

import h11
import httpx
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from hbone.admin import (
    AdminRequest,
    AdminResponse,
    AdminServer,
    Readiness,
    Route,
    json_pieces,
    json_response,
    logging_route,
    quit_route,
    standard_routes,
)
from hbone.telemetry import LogControl, LogLevels, Metrics

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hbone.address import Endpoint

BIG = b"0123456789abcdef\n" * 20_000


class Node:
    """A server with every kind of page, and what was asked of it."""

    def __init__(self, **options: Any) -> None:
        self.stopped = 0
        self.control = LogControl(LogLevels())
        more = {
            "/logging": logging_route(self.control),
            "/quitquitquit": quit_route(self.stop),
            "/both": Route(handler=lambda r: AdminResponse(body=r.method.encode()), methods=("GET", "POST")),
            "/big": lambda _: AdminResponse(body=BIG),
            "/pieces": lambda _: AdminResponse(body=iter([b"one ", b"", b"two ", BIG])),
            "/torn": lambda _: AdminResponse(body=torn()),
            "/slow": self.slow,
            "/parameters": lambda r: json_response(r.parameters),
        }
        routes = standard_routes(render_metrics=Metrics().render, readiness=Readiness(), more=more)
        self.server = AdminServer(routes, **options)

    def stop(self) -> None:
        self.stopped += 1

    async def slow(self, request: AdminRequest) -> AdminResponse:
        await trio.sleep(float(request.query))
        return AdminResponse(body=b"at last")


def torn() -> Iterator[bytes]:
    yield b"begins"
    raise RuntimeError("and breaks")


@pytest.fixture
def node() -> Iterator[Node]:
    node = Node()
    yield node
    node.control.close()


async def talk(node: Node, *chunks: bytes, local_only: bool = True) -> bytes:
    """What the server answers to these bytes and their end."""
    ours, theirs = trio.testing.memory_stream_pair()
    answer = bytearray()

    async def read() -> None:
        async for data in ours:
            answer.extend(data)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: node.server.serve_stream(theirs, local_only=local_only))
        nursery.start_soon(read)
        try:
            for chunk in chunks:
                await ours.send_all(chunk)
            await ours.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
    return bytes(answer)


def ask(target: str = "/quitquitquit", *headers: str, method: str = "POST", host: str | None = "localhost") -> bytes:
    lines = [f"{method} {target} HTTP/1.1", *([f"Host: {host}"] if host is not None else []), *headers, "", ""]
    return "\r\n".join(lines).encode()


def answers(data: bytes, count: int = 1, method: str = "GET") -> list[tuple[int, dict[str, str], bytes]]:
    """Status, headers and body of each answer, as another HTTP implementation's client reads them."""
    client = h11.Connection(h11.CLIENT)
    found = []
    client.receive_data(data)
    client.receive_data(b"")
    for n in range(count):
        if n:
            client.start_next_cycle()
        client.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
        client.send(h11.EndOfMessage())
        body = b""
        head: h11.Response | None = None
        while not isinstance(event := client.next_event(), h11.EndOfMessage):
            if isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
        assert head is not None
        found.append((head.status_code, {k.decode(): v.decode() for k, v in head.headers}, body))
    return found


async def answer(node: Node, *chunks: bytes, **options: Any) -> tuple[int, dict[str, str], bytes]:
    return answers(await talk(node, *chunks, **options))[0]


# -- who may ----------------------------------------------------------------------------------------------------------

B = "/quitquitquit"
PAGE = "Sec-Fetch-Mode: cors"
LINK = "Sec-Fetch-Mode: navigate"

ATTACKS: list[tuple[str, bytes, int]] = [
    # programs and people
    ("curl", ask(), 200),
    ("curl -d ''", ask("/quitquitquit", "Content-Length: 0", "Content-Type: application/x-www-form-urlencoded"), 200),
    ("HTTP/1.0 without a host", b"POST /quitquitquit HTTP/1.0\r\n\r\n", 200),
    ("another loopback name", ask(host="[::1]:15000"), 200),
    # DNS rebinding: the page's own name leads here
    ("foreign host", ask(host="evil.example"), 403),
    ("foreign host that begins well", ask(host="localhost.evil.example"), 403),
    ("foreign host, GET", ask("/", method="GET", host="evil.example:15000"), 403),
    ("foreign host that agrees with its origin", ask(B, "Origin: http://evil.example", host="evil.example"), 403),
    # a page elsewhere presses the button
    ("foreign origin", ask("/quitquitquit", "Origin: https://evil.example"), 403),
    ("foreign origin on this machine", ask(B, "Origin: http://localhost:3000", host="localhost:15000"), 403),
    ("origin of a sandbox", ask("/quitquitquit", "Origin: null"), 403),
    ("no scheme", ask("/quitquitquit", "Origin: localhost"), 403),
    ("empty origin", ask("/quitquitquit", "Origin:"), 403),
    ("origin that only begins like ours", ask("/quitquitquit", "Origin: http://localhost.evil.example"), 403),
    ("two origins", ask("/quitquitquit", "Origin: http://localhost", "Origin: http://evil.example"), 403),
    ("origin without a host", b"POST /quitquitquit HTTP/1.0\r\nOrigin: http://\r\n\r\n", 403),
    ("cross-site form", ask("/quitquitquit", "Sec-Fetch-Site: cross-site", LINK), 403),
    ("cross-site fetch", ask("/quitquitquit", "Sec-Fetch-Site: cross-site", PAGE), 403),
    ("same-site is another origin", ask("/quitquitquit", "Sec-Fetch-Site: same-site", PAGE), 403),
    ("nonsense", ask("/quitquitquit", "Sec-Fetch-Site: whatever"), 403),
    ("in upper case", ask("/quitquitquit", "SEC-FETCH-SITE: CROSS-SITE"), 403),
    ("foreign origin reads", ask("/", "Origin: https://evil.example", method="GET"), 403),
    ("cross-site image", ask("/", "Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: no-cors", method="GET"), 403),
    ("preflight", ask("/quitquitquit", "Origin: https://evil.example", method="OPTIONS"), 403),
    ("preflight of our own", ask(method="OPTIONS"), 405),
    # our own pages
    ("our own page", ask(B, "Origin: http://[::1]:15000", "Sec-Fetch-Site: same-origin", host="[::1]:15000"), 200),
    ("our own page over TLS in front", ask("/quitquitquit", "Origin: https://LOCALHOST"), 200),
    ("typed into the address bar", ask("/", "Sec-Fetch-Site: none", LINK, method="GET"), 200),
    ("a link on another page", ask("/", "Sec-Fetch-Site: cross-site", LINK, method="GET"), 200),
    # methods
    ("GET presses no button", ask(method="GET"), 405),
    ("HEAD neither", ask(method="HEAD"), 405),
    ("PUT", ask(method="PUT"), 405),
    ("another method in a header", ask("/quitquitquit", "X-HTTP-Method-Override: POST", method="GET"), 405),
    ("methods have upper case", ask(method="post"), 405),
    ("POST to a page", ask("/metrics"), 405),
    ("POST to nothing", ask("/nothing"), 404),
    ("TRACE", ask(method="TRACE"), 405),
    # bodies
    ("a body", ask("/quitquitquit", "Content-Length: 3") + b"x=1", 400),
    ("an endless body", ask("/quitquitquit", "Content-Length: 99999999999") + b"x" * 50_000, 400),
    ("chunks", ask("/quitquitquit", "Transfer-Encoding: chunked") + b"1\r\nx\r\n0\r\n\r\n", 400),
    ("no chunks", ask("/quitquitquit", "Transfer-Encoding: chunked") + b"0\r\n\r\n", 400),
    ("two lengths", ask("/quitquitquit", "Content-Length: 0", "Content-Length: 5") + b"xxxxx", 400),
    ("length and chunks", ask("/quitquitquit", "Content-Length: 0", "Transfer-Encoding: chunked") + b"0\r\n\r\n", 400),
    ("negative length", ask("/quitquitquit", "Content-Length: -1"), 400),
    ("expects to go on", ask("/quitquitquit", "Expect: 100-continue", "Content-Length: 5"), 400),
    # too much
    ("a large head", ask("/quitquitquit", *(f"X-{n}: {'x' * 200}" for n in range(200))), 431),
    ("a long query", ask("/logging?level=" + "x" * 30_000), 431),
    ("many parameters", ask("/logging?" + "&".join(f"a{n}" for n in range(100))), 400),
    ("two hosts", ask("/quitquitquit", "Host: localhost"), 400),
    ("no host", ask(host=None), 400),
]  # fmt: skip


@pytest.mark.parametrize(("request_bytes", "status"), [row[1:] for row in ATTACKS], ids=[row[0] for row in ATTACKS])
async def test_who_may(node: Node, request_bytes: bytes, status: int) -> None:
    data = await talk(node, request_bytes)
    assert int(data.split(b" ", 2)[1]) == status
    button = status == 200 and b"/quitquitquit" in request_bytes
    assert node.stopped == (1 if button else 0)
    assert b"access-control" not in data.lower()
    if status != 200:
        assert b"\r\nConnection: close\r\n" in data
        assert data.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize(
    ("headers", "host", "status"),
    [
        ((), "node-7.example:15000", 200),
        (("Origin: http://10.0.0.7:15000", "Sec-Fetch-Site: same-origin"), "10.0.0.7:15000", 200),
        (("Origin: http://[fd00::7]",), "[fd00::7]", 200),
        # the name may lead here because somebody made it so
        (("Origin: http://evil.example", "Sec-Fetch-Site: same-origin"), "evil.example", 403),
        (("Origin: http://evil.example",), "node-7.example", 403),
        (("Sec-Fetch-Site: cross-site",), "10.0.0.7", 403),
    ],
)
async def test_who_may_on_another_address(node: Node, headers: tuple[str, ...], host: str, status: int) -> None:
    assert (await answer(node, ask("/quitquitquit", *headers, host=host), local_only=False))[0] == status
    assert node.stopped == (status == 200)


async def test_pipelining(node: Node) -> None:
    requests = ask("/both"), ask("/both", method="GET"), ask("/both", method="HEAD"), ask("/both")
    for chunks in (requests, (b"".join(requests),)):
        data = await talk(node, *chunks)
        assert data.count(b"HTTP/1.1 200 OK") == 4
        assert re.findall(rb"\r\n\r\n([A-Z]*?)(?=HTTP|$)", data) == [b"POST", b"GET", b"", b"POST"]


async def test_nothing_is_smuggled_behind_a_refused_body(node: Node) -> None:
    inner = ask()
    data = await talk(node, ask("/both", f"Content-Length: {len(inner)}") + inner)
    assert data.startswith(b"HTTP/1.1 400 ")
    assert data.count(b"HTTP/1.1") == 1
    assert node.stopped == 0


async def test_a_405_says_how(node: Node) -> None:
    status, headers, body = await answer(node, ask("/logging", method="GET"))
    assert (status, headers["allow"]) == (405, "POST")
    assert b"POST /logging?level=debug" in body
    status, headers, _ = await answer(node, ask("/both", method="DELETE"))
    assert (status, headers["allow"]) == (405, "GET, POST, HEAD")


async def test_the_index_says_so_too(node: Node) -> None:
    _, _, body = await answer(node, ask("/", method="GET"))
    assert b"\n/logging (POST)\n" in body
    assert b"\n/both\n" in body


async def test_parameters(node: Node) -> None:
    _, _, body = await answer(node, ask("/parameters?a=1&b&a=%20x%3d&=z", method="GET"))
    assert json.loads(body) == {"a": ["1", " x="], "b": [""], "": ["z"]}


# -- pages ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "status", "levels"),
    [
        ("", 200, "info"),
        ("?level=debug", 200, "debug"),
        ("?level=access=debug,warn", 200, "warn,access=debug"),
        ("?level=access:debug", 200, "info,access=debug"),
        ("?level=proxy::outbound:trace", 200, "info,proxy::outbound=trace"),
        ("?level=proxy::outbound%3Dtrace", 200, "info,proxy::outbound=trace"),
        ("?level=a=debug&level=b=debug", 200, "info,a=debug,b=debug"),
        ("?reset", 200, "info"),
        ("?reset&level=error", 200, "error"),
        ("?reset=1", 200, "info"),
        ("?level=loud", 400, "info"),
        ("?level=access", 400, "info"),
        ("?level=", 400, "info"),
        ("?level", 400, "info"),
        ("?reset&level=loud", 400, "info"),
        ("?levle=debug", 400, "info"),
        ("?level=debug&x=1", 400, "info"),
    ],
)
async def test_logging(node: Node, query: str, status: int, levels: str) -> None:
    found, _, body = await answer(node, ask(f"/logging{query}"))
    assert found == status
    assert str(node.control.levels) == levels
    if status == 200:
        assert body == f"current log level is {levels}\n".encode()
    else:
        assert b"POST /logging?level=debug" in body


async def test_logging_adds_and_resets(node: Node) -> None:
    for query, levels in [
        ("?level=warn", "warn"),
        ("?level=proxy=debug", "warn,proxy=debug"),
        ("?level=access=off", "warn,access=off,proxy=debug"),
        ("", "warn,access=off,proxy=debug"),
        ("?reset&level=proxy=error", "info,proxy=error"),
        ("?reset", "info"),
    ]:
        _, _, body = await answer(node, ask(f"/logging{query}"))
        assert body == f"current log level is {levels}\n".encode()


async def test_what_was_pressed_is_logged(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "hbone"):
        await talk(node, ask())
        await talk(node, ask("/logging?level=proxy=debug"))
        await talk(node, ask("/logging"))
    assert [record.getMessage() for record in caplog.records] == ["asked to shut down", "log levels changed"]


async def test_a_page_that_waits(node: Node, autojump_clock: trio.testing.MockClock) -> None:
    assert (await answer(node, ask("/slow?5", method="GET")))[2] == b"at last"
    status, _, body = await answer(node, ask("/slow?31", method="GET"))
    assert (status, body) == (503, b"this page took too long\n")
    assert trio.current_time() == pytest.approx(35)


async def test_a_page_that_waits_holds_up_nobody(node: Node, autojump_clock: trio.testing.MockClock) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(talk, node, ask("/slow?20", method="GET"))
        await trio.testing.wait_all_tasks_blocked()
        assert (await answer(node, ask("/", method="GET")))[0] == 200
        assert trio.current_time() == 0


async def test_a_page_that_comes_in_pieces(node: Node) -> None:
    status, headers, body = await answer(node, ask("/pieces", method="GET"))
    assert (status, body) == (200, b"one two " + BIG)
    assert headers["transfer-encoding"] == "chunked"
    assert "content-length" not in headers
    data = await talk(node, b"GET /pieces HTTP/1.0\r\n\r\n")
    assert data.partition(b"\r\n\r\n")[2] == b"one two " + BIG
    assert (await talk(node, ask("/pieces", method="HEAD"))).endswith(b"\r\n\r\n")


async def test_a_page_that_breaks_half_way_is_not_complete(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    data = await talk(node, ask("/torn", method="GET"))
    assert b"begins" in data
    with pytest.raises(h11.RemoteProtocolError):
        answers(data)
    assert "and breaks" in caplog.text
    assert (await answer(node, ask("/", method="GET")))[0] == 200


async def test_a_reader_of_pieces_may_take_its_time_for_each(autojump_clock: trio.testing.MockClock) -> None:
    node = Node(write_timeout=10.0)
    node.control.close()
    ours, theirs = trio.testing.lockstep_stream_pair()
    received = bytearray()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.server.serve_stream, theirs)
        await ours.send_all(ask("/pieces", method="GET"))
        for _ in range(3):
            await trio.sleep(9)
            received += await ours.receive_some()
        await trio.sleep(11)
        with pytest.raises(trio.BrokenResourceError):
            await ours.send_all(b"x")
        await ours.aclose()
    assert b"two " in received


# -- gzip -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accept", "packed"),
    [
        ("gzip", True),
        ("gzip, deflate, br", True),
        ("GZIP", True),
        ("x-gzip", True),
        ("deflate, gzip;q=0.5", True),
        ("*", True),
        ("gzip;q=0", False),
        ("gzip; q=0.0, identity", False),
        ("gzip;q=nonsense", False),
        ("identity", False),
        ("br", False),
        ("", False),
        (",;,", False),
    ],
)
@pytest.mark.parametrize("page", ["/big", "/pieces"])
async def test_gzip_for_who_takes_it(node: Node, page: str, accept: str, packed: bool) -> None:
    status, headers, body = await answer(node, ask(page, f"Accept-Encoding: {accept}", method="GET"))
    assert status == 200
    assert headers["vary"] == "Accept-Encoding"
    assert (headers.get("content-encoding") == "gzip") == packed
    plain = gzip.decompress(body) if packed else body
    assert plain == (BIG if page == "/big" else b"one two " + BIG)
    assert (len(body) < len(BIG) / 50) == packed


async def test_small_answers_are_not_packed(node: Node) -> None:
    _, headers, body = await answer(node, ask("/both", "Accept-Encoding: gzip", method="GET"))
    assert "content-encoding" not in headers
    assert body == b"GET"


async def test_head_of_a_large_page(node: Node) -> None:
    data = await talk(node, ask("/big", "Accept-Encoding: gzip", method="HEAD"))
    _, headers, body = answers(data, method="HEAD")[0]
    assert (headers["content-length"], body) == (str(len(BIG)), b"")


async def test_over_a_socket(nursery: trio.Nursery, node: Node) -> None:
    bound: Endpoint = await nursery.start(node.server.serve, "127.0.0.1", 0)
    async with httpx.AsyncClient(base_url=f"http://{bound}", trust_env=False, timeout=60) as client:
        big = await client.get("/big")
        assert big.headers["content-encoding"] == "gzip"
        assert big.content == BIG
        assert (await client.post("/quitquitquit")).text == "shutting down now\n"
        assert (await client.post("/quitquitquit", content=b"x")).status_code == 400
    assert node.stopped == 1


# -- listeners --------------------------------------------------------------------------------------------------------


def has_ipv6() -> bool:
    try:
        with trio.socket.socket(trio.socket.AF_INET6) as sock:
            sock._sock.bind(("::1", 0))
    except OSError:
        return False
    return True


async def test_several_addresses_one_port(nursery: trio.Nursery, node: Node) -> None:
    if not has_ipv6():
        pytest.skip("no IPv6 here")
    bound: Endpoint = await nursery.start(node.server.serve, ("127.0.0.1", "::1"), 0)
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        for host in ("127.0.0.1", "[::1]", "localhost"):
            assert (await client.get(f"http://{host}:{bound.port}/")).status_code == 200
            headers = {"host": "evil.example"}
            assert (await client.get(f"http://{host}:{bound.port}/", headers=headers)).status_code == 403


@pytest.mark.parametrize("number", [errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT])
async def test_addresses_that_this_machine_does_not_have(
    nursery: trio.Nursery, node: Node, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    really = trio.open_tcp_listeners

    async def without_ipv6(port: int, *, host: str | None) -> list[trio.SocketListener]:
        if host and ":" in host:
            raise OSError(number, "not here")
        return await really(port, host=host)

    monkeypatch.setattr(trio, "open_tcp_listeners", without_ipv6)
    bound: Endpoint = await nursery.start(node.server.serve, ("::1", "127.0.0.1"), 0)
    assert str(bound.ip) == "127.0.0.1"
    for hosts in (("::1", "::2"), ("::1",)):
        with pytest.raises(OSError) as caught:
            await node.server.serve(hosts, 0)
        assert caught.value.errno == number
    with pytest.raises(OSError):
        await node.server.serve((), 0)


async def test_a_free_port_is_free_on_every_address(
    nursery: trio.Nursery, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the system gives for the first one may be somebody's on the second one: another port, then."""
    really, asked = trio.open_tcp_listeners, []
    problems = [errno.EADDRINUSE, errno.EADDRINUSE, errno.EADDRNOTAVAIL]

    async def without_ipv6(port: int, *, host: str | None) -> list[trio.SocketListener]:
        asked.append(port)
        if host == "::1":
            raise OSError(problems.pop(0), "no")
        return await really(port, host=host)

    monkeypatch.setattr(trio, "open_tcp_listeners", without_ipv6)
    bound: Endpoint = await nursery.start(node.server.serve, ("127.0.0.1", "::1"), 0)
    assert problems == []
    assert asked[::2] == [0, 0, 0]
    assert asked[-1] == bound.port
    problems += [errno.EADDRINUSE] * 100
    with pytest.raises(OSError, match="no"):
        await node.server.serve(("127.0.0.1", "::1"), 0)
    assert problems


async def test_a_port_that_is_taken_is_an_error_for_all(nursery: trio.Nursery, node: Node) -> None:
    bound: Endpoint = await nursery.start(node.server.serve, "127.0.0.1", 0)
    with pytest.raises(OSError, match="in use"):
        await node.server.serve(("127.0.0.2", "127.0.0.1"), bound.port)


# -- JSON -------------------------------------------------------------------------------------------------------------


def test_json_text() -> None:
    value = {"b": iter([{"y": 1, "x": [1, 2]}, "\n"]), "a": {"c": {}, "d": [], "e": iter([])}, "n": None}
    assert b"".join(json_pieces(value)).decode() == (
        "{\n"
        '  "a": {\n'
        '    "c": {},\n'
        '    "d": [],\n'
        '    "e": []\n'
        "  },\n"
        '  "b": [\n'
        "    {\n"
        '      "x": [\n'
        "        1,\n"
        "        2\n"
        "      ],\n"
        '      "y": 1\n'
        "    },\n"
        '    "\\n"\n'
        "  ],\n"
        '  "n": null\n'
        "}\n"
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(value=JSON)
def test_json_is_what_json_would_write(value: Any) -> None:
    expected = json.dumps(value, indent=2, sort_keys=True) + "\n"
    assert b"".join(json_pieces(value)).decode() == expected
    if isinstance(value, dict):
        lazy = {key: iter(item) if isinstance(item, list) else item for key, item in value.items()}
        assert b"".join(json_pieces(lazy)).decode() == expected


def test_json_of_what_json_does_not_know() -> None:
    assert b"".join(json_pieces({"p": zlib, 1: LogLevels()}))


def test_large_json_comes_in_pieces_as_it_is_asked_for() -> None:
    made = 0

    def items() -> Iterator[dict[str, int]]:
        nonlocal made
        for n in range(20_000):
            made = n
            yield {"number": n}

    pieces = json_pieces({"items": items()})
    first = next(pieces)
    assert 16_000 < len(first) < 20_000
    assert made < 1000
    assert len(list(pieces)) > 20
