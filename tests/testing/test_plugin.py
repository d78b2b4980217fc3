"""The plugin as a user has it: in a pytest of its own, with a test file that imports nothing of hbone."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution

import pytest

pytest_plugins = ["pytester"]


def installed() -> bool:
    """Whether pytest finds the plugin by itself, as it does when hbone is installed."""
    try:
        return any(point.group == "pytest11" for point in distribution("hbone").entry_points)
    except PackageNotFoundError:
        return False


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A pytester whose pytests are strict about what is left behind."""
    pytester.makeini("[pytest]\nfilterwarnings = error\n")
    pytester.plugins = [] if installed() else ["hbone.testing.plugin"]
    if not installed():
        pytester.syspathinsert(str(pytester._request.config.rootpath))
        monkeypatch.setenv("PYTHONPATH", str(pytester._request.config.rootpath))
    return pytester


def outcomes(run: pytest.Pytester, source: str, *args: str) -> tuple[dict[str, int], str]:
    run.makepyfile(source)
    result = run.runpytest_subprocess(*args, timeout=110)
    return result.parseoutcomes(), result.stdout.str()


@pytest.mark.skipif(not installed(), reason="hbone runs from its source tree")
def test_pytest_finds_it_by_itself() -> None:
    (point,) = distribution("hbone").entry_points.select(group="pytest11")
    assert (point.name, point.value) == ("hbone", "hbone.testing.plugin")


def test_a_run_that_does_not_use_it_loads_nothing() -> None:
    script = """
import sys, pytest
before = set(sys.modules)
import hbone.testing.plugin
new = {name for name in set(sys.modules) - before if name.partition(".")[0] not in sys.stdlib_module_names}
print(sorted(new))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "['hbone', 'hbone.testing', 'hbone.testing.plugin']"


def test_plain_tests_use_it(run: pytest.Pytester) -> None:
    source = """
import socket, socketserver, threading
import pytest

@pytest.fixture
def app():
    class Upper(socketserver.StreamRequestHandler):
        def handle(self):
            self.wfile.write(self.rfile.readline().upper())

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Upper) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_address
        server.shutdown()
        thread.join()

def test_pair(app, hbone_pair):
    pair = hbone_pair(app, client="shop/cart")
    with socket.create_connection(pair.address) as sock:
        sock.sendall(b"hello\\n")
        assert sock.recv(100) == b"HELLO\\n"
    assert {str(record.src_identity) for record in pair.wait_for_access_log()} == {
        "spiffe://cluster.local/ns/shop/sa/cart"
    }

def test_server_and_svids(hbone_server, hbone_svid, hbone_ca):
    server = hbone_server("sink", identity="shop/web")
    assert server.identity == hbone_svid("shop/web").identity
    assert hbone_svid("shop/web").bundles[hbone_ca.trust_domain] == hbone_ca.roots
    assert server.requests == () and server.statistics().sessions == 0

def test_memory_session_with_a_trio_of_ones_own(hbone_memory_session):
    import trio

    async def main():
        async with hbone_memory_session() as session:
            async with await session.client.open_tunnel("10.0.0.7:80") as tunnel:
                await tunnel.send_all(b"hello")
                return await tunnel.receive_some()

    assert trio.run(main) == b"hello"

def test_nothing_is_left():
    assert [t.name for t in threading.enumerate()] == ["MainThread"]
"""
    # Without pytest-trio: the plugin does not need it.
    counts, text = outcomes(run, source, "-p", "no:trio")
    assert counts == {"passed": 4}, text


def test_trio_tests_use_it(run: pytest.Pytester) -> None:
    source = """
from functools import partial
import pytest, trio
from hbone import HBONEClient, PolicyDenied

@pytest.mark.trio
async def test_server(hbone_server, hbone_svid):
    server = hbone_server("echo", identity="shop/web")
    async with HBONEClient.connect(*server.address, svid=hbone_svid("shop/cart"), expect=server.identity) as client:
        async with await client.open_tunnel("10.0.0.7:80") as tunnel:
            await tunnel.send_all(b"hello")
            assert await tunnel.receive_some() == b"hello"

@pytest.mark.trio
async def test_pair(hbone_pair, nursery):
    async def app(stream):
        await stream.send_all((await stream.receive_some()).upper())

    (listener,) = await nursery.start(partial(trio.serve_tcp, app, 0, host="127.0.0.1"))
    pair = hbone_pair(listener.socket.getsockname()[1])
    async with await trio.open_tcp_stream(*pair.address) as stream:
        await stream.send_all(b"hello")
        assert await stream.receive_some() == b"HELLO"

@pytest.mark.trio
async def test_refused(hbone_pair, hbone_svid):
    pair = hbone_pair(9, allow_peers=["shop/cart"])
    async with HBONEClient.connect(*pair.hbone_address, svid=hbone_svid("bank/teller")) as client:
        with pytest.raises(PolicyDenied):
            await client.open_tunnel("127.0.0.1:9")

@pytest.mark.trio
async def test_memory(hbone_memory_session, autojump_clock):
    async with hbone_memory_session("sink") as session:
        async with await session.client.open_tunnel("10.0.0.7:80") as tunnel:
            await tunnel.send_all(b"hello")
            await tunnel.send_eof()
            assert await tunnel.receive_some() == b""
"""
    counts, text = outcomes(run, source)
    assert counts == {"passed": 4}, text


def test_a_failure_in_the_background_is_an_error_of_its_test_only(run: pytest.Pytester) -> None:
    source = """
import pytest, trio
from hbone import HBONEClient, Unreachable

def test_fails(hbone_server, hbone_svid):
    async def handler(request):
        raise LookupError("a fault in the handler")

    server = hbone_server(handler)

    async def main():
        async with HBONEClient.connect(*server.address, svid=hbone_svid("shop/cart")) as client:
            with pytest.raises(Unreachable):
                await client.open_tunnel("10.0.0.7:80")

    trio.run(main)

def test_goes_on(hbone_server):
    assert hbone_server().requests == ()
"""
    counts, text = outcomes(run, source)
    assert counts == {"passed": 2, "errors": 1}, text
    assert "BackgroundError: in the background: LookupError: a fault in the handler" in text


def test_fixtures_can_be_overridden_and_say_what_they_are(run: pytest.Pytester) -> None:
    run.makeconftest(
        """
import pytest
from hbone import LocalCA

@pytest.fixture(scope="session")
def hbone_ca():
    return LocalCA.in_memory(trust_domain="example.org")
"""
    )
    counts, text = outcomes(
        run,
        'def test_domain(hbone_server):\n    assert str(hbone_server().identity) == "spiffe://example.org/ns/test/sa/server"',
    )
    assert counts == {"passed": 1}, text
    listed = run.runpytest_subprocess("--fixtures", timeout=110).stdout.str()
    for name in ("hbone_ca", "hbone_svid", "hbone_server", "hbone_pair", "hbone_memory_session"):
        assert name in listed
