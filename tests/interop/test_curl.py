"""libcurl's HTTP/2 proxy support (``curl --proxy-http2 --proxytunnel``) to our server.

curl has no half-close of its own, so the half that ends first is the application's.
"""

from __future__ import annotations

import hashlib
import threading

import pytest
import trio
from support import ours
from support.backends import Backend, http_app, pattern, pattern_sha, receive_all, refused_port
from support.foreign import Curl, require
from support.ours import forwarding, run, serving

import hbone

MIB = 1 << 20
BULK = 64 * MIB


@pytest.fixture(autouse=True)
def _curl():
    require("curl")


def fetch(curl, url):
    digest = hashlib.sha256()
    status, _ = curl.get(url, digest.update)
    return status, digest.hexdigest()


async def test_curl_downloads_every_byte(pki):
    def script():
        with Curl(pki.client, near.port) as curl:
            assert fetch(curl, f"http://{app.target}/{BULK}") == (200, pattern_sha(BULK))
            assert curl.connect_status == 200

    with Backend(http_app) as app:
        async with forwarding() as near:
            await run(script)


async def test_curl_gets_every_byte_when_the_application_ends_first(pki):
    # libcurl 8.23 does not take END_STREAM for the end (test_foreign.py): we hang up for it once all is there.
    def script():
        with Curl(pki.client, near.port) as curl:
            got, digest = curl.get_until(f"http://{app.target}/until-close/{BULK}", BULK)
            assert (got, digest) == (BULK, pattern_sha(BULK))
        seen = app.wait_connection(0)
        assert seen.end in ("eof", "reset")

    with Backend(http_app) as app:
        async with forwarding() as near:
            await run(script)


async def test_curl_uploads_every_byte(pki):
    def script():
        with Curl(pki.client, near.port) as curl:
            assert curl.put(f"http://{app.target}/", pattern(BULK), BULK) == (200, pattern_sha(BULK).encode())

    with Backend(http_app) as app:
        async with forwarding() as near:
            await run(script)


async def test_curl_reuses_its_tunnel(pki):
    def script():
        with Curl(pki.client, near.port) as curl:
            for _ in range(5):
                assert fetch(curl, f"http://{app.target}/{MIB}") == (200, pattern_sha(MIB))

    with Backend(http_app) as app:
        async with forwarding() as near:
            await run(script)
        assert len(app.connections) == 1


@pytest.mark.parametrize("leaf", ["foreign", "other_trust_domain", "expired"])
async def test_curl_with_a_refused_certificate(pki, leaf):
    import pycurl

    def script():
        with Curl(getattr(pki, leaf), near.port) as curl, pytest.raises(pycurl.error):
            curl.get(f"http://{app.target}/10")

    with Backend(http_app) as app:
        async with forwarding() as near:
            await run(script)
        assert app.connections == []


async def test_curl_refused_by_policy(pki):
    import pycurl

    async def handler(request):
        if request.peer.identity.namespace != "shop":
            raise hbone.RequestRejected(401)
        await ours.forward()(request)

    def script():
        with Curl(pki.other, near.port) as curl:
            with pytest.raises(pycurl.error):
                curl.get(f"http://{app.target}/10")
            assert curl.connect_status == 401
        with Curl(pki.client, near.port) as curl:
            assert curl.get(f"http://{app.target}/10")[0] == 200

    with Backend(http_app) as app:
        async with serving(handler) as near:
            await run(script)
        assert len(app.connections) == 1


async def test_curl_refused_target(pki):
    import pycurl

    def script():
        with Curl(pki.client, near.port) as curl:
            with pytest.raises(pycurl.error):
                curl.get(f"http://127.0.0.1:{port}/10")
            assert curl.connect_status == 503

    with refused_port() as port:
        async with forwarding() as near:
            await run(script)


async def test_curl_our_goaway_lets_its_download_finish(pki):
    drained = threading.Event()

    def habit(sock, seen):
        sock.recv(65_536)
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % BULK)
        pieces = list(pattern(BULK))
        for piece in pieces[:16]:
            sock.sendall(piece)
        assert drained.wait(60)
        for piece in pieces[16:]:
            sock.sendall(piece)
        receive_all(sock, seen)

    def script(nursery):
        with Curl(pki.client, near.port) as curl:
            result = []
            thread = threading.Thread(target=lambda: result.append(fetch(curl, f"http://{app.target}/")))
            thread.start()
            app.connection(0)
            trio.from_thread.run_sync(nursery.start_soon, near.server.drain, 100.0)
            drained.set()
            thread.join(100)
            assert result == [(200, pattern_sha(BULK))]

    with Backend(habit) as app:
        async with forwarding() as near:
            async with trio.open_nursery() as nursery:
                await run(script, nursery)
