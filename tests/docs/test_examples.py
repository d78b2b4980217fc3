"""What the documentation shows, run as its readers would run it."""

from __future__ import annotations

import http.client
import os
import re
import runpy
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio

if TYPE_CHECKING:
    from hbone import Endpoint
    from hbone.proxy import Node

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "howto" / "examples"


def installed() -> bool:
    try:
        return any(point.group == "pytest11" for point in distribution("hbone").entry_points)
    except PackageNotFoundError:
        return False


# Clients honour proxies from the environment; the examples talk to loopback.
ENV = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}


def test_examples_pass(tmp_path: Path) -> None:
    files = [str(path) for path in sorted(EXAMPLES.glob("test_*.py"))]
    assert len(files) > 3
    finder = [] if installed() else ["-p", "hbone.testing.plugin"]
    environment = ENV if installed() else ENV | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", *finder),
            *("-c", os.devnull, "--rootdir", str(EXAMPLES), "--basetemp", str(tmp_path / "run"), *files),
        ],
        env=environment | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


class Server(ThreadingHTTPServer):
    daemon_threads = False  # so that its end waits for those of its connections


class Greeter(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"hello\n")

    def log_message(self, *args: Any) -> None:
        pass


def test_example_without_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    example = runpy.run_path(str(EXAMPLES / "without_pytest.py"))
    with Server(("127.0.0.1", 0), Greeter) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        assert example["ask_through_a_pair"](server.server_port) == b"hello\n"
        server.shutdown()
        thread.join()
    assert trio.run(example["ask_in_memory"]) == b"hello"


def test_example_of_a_node(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(EXAMPLES / "node.py"))

    def get(proxy: Endpoint) -> bytes:
        connection = http.client.HTTPConnection(str(proxy.ip), proxy.port, timeout=60)
        connection.set_tunnel("web.shop.svc.cluster.local", 80)
        try:
            connection.request("GET", "/")
            return connection.getresponse().read()
        finally:
            connection.close()

    async def use(node: Node, proxy: Endpoint) -> None:
        assert await trio.to_thread.run_sync(get, proxy) == b"hello\n"
        while node.statistics().live:  # its end comes a little after its answer, and must not be the shop's closing
            await trio.sleep(0.01)
        example["close_the_shop"](node, server.server_port)
        with pytest.raises(OSError, match="403"):
            await trio.to_thread.run_sync(get, proxy)

    with Server(("127.0.0.1", 0), Greeter) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            trio.run(example["with_a_node"], server.server_port, tmp_path / "ca", use)
        finally:
            server.shutdown()
            thread.join()
    lines = capfd.readouterr().out.splitlines()
    assert [line.split("\t")[1] for line in lines] == ["info", "info", "error", "error"]
    assert sum("explicitly denied by: shop/closed" in line for line in lines) == 1


def test_every_example_is_shown() -> None:
    pages = "".join(path.read_text("utf-8") for path in EXAMPLES.parent.glob("*.md"))
    shown = set(re.findall(r"examples/(\w+\.py)", pages))
    assert shown == {path.name for path in EXAMPLES.glob("*.py")}
