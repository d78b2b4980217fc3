"""Requests to the pages of a node that carries something: each gets its answer, and the transfer goes on."""

from __future__ import annotations

import json
import random
from contextlib import asynccontextmanager

import pytest
import trio
from support.meshes import workload
from support.whole_nodes import VIP, WAIT, application, connect, fetch, mesh, node_config, read, send

from hbone.certs import LocalCA
from hbone.proxy import Node
from hbone.telemetry import AccessLog, LogLevels, log_to

BLOCK = random.Random(11).randbytes(64 * 1024)


@pytest.fixture(autouse=True)
async def _bounded():
    with trio.fail_after(WAIT):
        yield


class Carrying:
    """A node, and a transfer through it that goes on until the block ends."""

    def __init__(self, node):
        self.node = node
        self.blocks = 0
        self._enough = trio.Event()

    async def transfer(self, stream):
        while not self._enough.is_set():
            await stream.send_all(BLOCK)
            assert await read(stream, len(BLOCK)) == BLOCK
            self.blocks += 1
        await stream.send_eof()
        assert await stream.receive_some() == b""

    async def goes_on(self):
        """Wait until more has come through."""
        before = self.blocks
        while self.blocks < before + 3:
            await trio.sleep(0.001)

    def stop(self):
        self._enough.set()


@asynccontextmanager
async def carrying(directory, *more):
    class Nowhere:
        def write(self, data):
            return len(data)

    LocalCA.create(directory / "ca")
    async with application() as port, AccessLog(Nowhere()) as access_log:
        with log_to(access_log, LogLevels.parse("info")) as levels:
            snapshot = mesh(port).with_changes(upsert=more)
            async with Node(
                node_config(directory / "ca"), mesh=snapshot, access_log=access_log, log_levels=levels
            ) as node:
                await node.ready.wait()
                it = Carrying(node)
                async with await connect(node, VIP, 80) as stream, trio.open_nursery() as nursery:
                    await read(stream, 6)
                    nursery.start_soon(it.transfer, stream)
                    await it.goes_on()
                    yield it
                    it.stop()


def ask(what, *headers, host="localhost", version="1.1"):
    lines = [f"{what} HTTP/{version}", *([f"Host: {host}"] if host is not None else []), *headers, "Connection: close"]
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode()


def row(name, status, listener, request, *words):
    return name, status, listener, request, words


ORIGIN, CROSS = "Origin: http://evil.example", "Sec-Fetch-Site: cross-site"
REQUESTS = [
    row("the dump", 200, "admin", ask("GET /config_dump"), '"workloads": ['),
    row("its head", 200, "admin", ask("HEAD /config_dump")),
    row("the tunnels", 200, "admin", ask("GET /debug/tunnels"), '"bytes_received": '),
    row("no such page", 404, "admin", ask("GET /config-dump"), "no such page; / lists what there is"),
    row("a way out", 404, "admin", ask("GET /../../etc/passwd")),
    row("POST where it is GET", 405, "admin", ask("POST /config_dump"), "only GET and HEAD"),
    row("DELETE", 405, "admin", ask("DELETE /config_dump")),
    row("a method of ours", 405, "admin", ask("BREW /config_dump")),
    row("GET where it is POST", 405, "admin", ask("GET /quitquitquit"), "only POST"),
    row("GET of levels", 405, "admin", ask("GET /logging?level=off"), "POST /logging?level=debug"),
    row("a level that is none", 400, "admin", ask("POST /logging?level=loud"), "loud", "Levels: off, error, warn"),
    row("a scope without a level", 400, "admin", ask("POST /logging?level=access="), "Levels: off, error, warn"),
    row("no level", 400, "admin", ask("POST /logging?level="), "level says nothing"),
    row("no such parameter", 400, "admin", ask("POST /logging?levels=debug"), "unknown parameter 'levels'"),
    row("very many parameters", 400, "admin", ask("POST /logging?" + "&".join(["level=off"] * 40)), "too many"),
    row("another host", 403, "admin", ask("GET /config_dump", host="evil.example"), "answers to localhost only"),
    row("another host's port", 403, "admin", ask("GET /config_dump", host="evil.example:15000")),
    row("no host", 400, "admin", ask("GET /config_dump", host=None)),
    row("two hosts", 400, "admin", ask("GET /config_dump", "Host: localhost")),
    row("another origin", 403, "admin", ask("POST /quitquitquit", ORIGIN), "a web page of another origin"),
    row("another site", 403, "admin", ask("POST /quitquitquit", CROSS), "a web page of another origin"),
    row("a body", 400, "admin", ask("POST /quitquitquit", "Content-Length: 5") + b"hello", "no body"),
    row("chunks", 400, "admin", ask("POST /quitquitquit", "Transfer-Encoding: chunked") + b"0\r\n\r\n"),
    row("a long head", 431, "admin", ask("GET /", "X: " + "x" * 30_000), "must not exceed 16384 bytes"),
    row("a long path", 431, "admin", ask("GET /" + "x" * 30_000)),
    row("a proxy's request", 400, "admin", ask("GET http://localhost/config_dump"), "must be a path"),
    row("CONNECT", 400, "admin", ask("CONNECT localhost:80")),
    row("HTTP/0.9", 400, "admin", b"GET /config_dump\r\n\r\n"),
    row("HTTP/2", 400, "admin", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    row("TLS", 400, "admin", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"),
    row("nothing that is text", 400, "admin", bytes(range(256)) + b"\r\n\r\n"),
    row("metrics", 200, "stats", ask("GET /metrics"), "istio_tcp_connections_opened_total"),
    row("no dump where the metrics are", 404, "stats", ask("GET /config_dump")),
    row("no levels there", 404, "stats", ask("POST /logging?level=off")),
    row("no end there", 404, "stats", ask("POST /quitquitquit")),
    row("a host that is not here, for metrics", 403, "stats", ask("GET /metrics", host="evil.example")),
    row("ready", 200, "readiness", ask("GET /healthz/ready"), "ready"),
    row("ready, for an old prober", 200, "readiness", ask("GET /healthz/ready", host=None, version="1.0"), "ready"),
    row("no metrics where the probes go", 404, "readiness", ask("GET /metrics")),
    row("no end there either", 404, "readiness", ask("POST /quitquitquit")),
]


async def test_requests_beside_a_transfer(tmp_path):
    async with carrying(tmp_path) as it:
        node = it.node
        for name, status, listener, request, words in REQUESTS:
            answer = (await send(node, listener, request)).decode("latin-1")
            assert answer.startswith(f"HTTP/1.1 {status} "), f"{name}: {answer[:200]}"
            for word in words:
                assert word in answer, name
            assert "\r\nConnection: close\r\n" in answer, name
            await it.goes_on()
        assert not node.stop_requested.is_set()
        assert node.readiness.ready
        assert await fetch(node, "admin", "/logging", "POST") == (200, "current log level is info\n")
        shown = json.loads((await fetch(node, "admin", "/config_dump"))[1])
        assert len(shown["workloadState"]["c//Pod/shop/web-0"]["connections"]["inbound"]) == 1


async def test_those_that_never_finish_a_request(tmp_path):
    """More connections than are served at once: the ones that came first make room for a probe."""

    async def begin(stream):
        try:
            await stream.send_all(b"GET / HTTP/1.1\r\nHost:")
        except trio.BrokenResourceError:  # it had to make room
            pass

    async with carrying(tmp_path) as it, trio.open_nursery() as nursery:
        for listener in ("readiness", "admin"):
            endpoint = it.node.addresses[listener][0]
            slow = [await trio.open_tcp_stream(str(endpoint.ip), endpoint.port) for _ in range(70)]
            for stream in slow:
                nursery.start_soon(begin, stream)
            assert (await fetch(it.node, listener, "/healthz/ready"))[0] == 200
            await it.goes_on()
            for stream in slow:
                await stream.aclose()


async def test_those_that_never_read_an_answer(tmp_path):
    """A dump of some megabytes is made as it is read."""
    others = (workload(f"w{n}", f"10.1.{n // 250}.{n % 250}") for n in range(3000))
    async with carrying(tmp_path, *others) as it:
        endpoint = it.node.addresses["admin"][0]
        lazy = [await trio.open_tcp_stream(str(endpoint.ip), endpoint.port) for _ in range(8)]
        for stream in lazy:
            await stream.send_all(ask("GET /config_dump"))
        await it.goes_on()
        status, body = await fetch(it.node, "admin", "/config_dump")
        assert (status, len(json.loads(body)["workloads"])) == (200, 3001)
        await it.goes_on()
        for stream in lazy:
            await stream.aclose()
        assert (await fetch(it.node, "readiness", "/healthz/ready"))[0] == 200
