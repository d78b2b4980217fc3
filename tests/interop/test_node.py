"""Node's own http2 (nghttp2 underneath), both ways."""

from __future__ import annotations

import pytest
import trio
from support import ours
from support.backends import (
    Backend,
    echo,
    ends_first,
    generate,
    pattern,
    pattern_sha,
    refused_port,
    send_then_receive,
    sink,
)
from support.certs import CLIENT, SERVER
from support.foreign import NodePeer, require
from support.ours import forwarding, run, serving, svid
from support.transfers import download, receive_all, send_pattern

import hbone

MIB = 1 << 20
BULK = 64 * MIB


@pytest.fixture(autouse=True)
def _node():
    require("node")


@pytest.fixture(scope="session")
def bulk_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("node") / "bulk"
    with path.open("wb") as out:
        for piece in pattern(BULK):
            out.write(piece)
    return str(path)


# --- Node's client, our server


@pytest.mark.parametrize(
    ("habit", "upload", "down"),
    [
        pytest.param(echo, BULK, BULK, id="echo"),
        pytest.param(sink, BULK, None, id="upload"),
        pytest.param(generate(BULK), 0, BULK, id="download_after_our_end"),
        pytest.param(ends_first(BULK), BULK, BULK, id="backend_ends_first"),
        pytest.param(send_then_receive(BULK), BULK, BULK, id="both_at_once"),
    ],
)
async def test_node_to_us_every_byte_both_ways(pki, tmp_path, bulk_file, habit, upload, down):
    def script():
        with NodePeer.client(tmp_path, pki.client, near.port, expect=SERVER) as node:
            assert node.wait("tls")["alpn"] == "h2"
            node.wait("connected")
            node.tell("tunnel", id=1, target=app.target, upload=bulk_file if upload else None, half_close=True)
            assert node.wait("response", id=1)["status"] == 200
            end = node.wait("end", id=1)
            assert node.wait("stream-closed", id=1)["code"] == 0
            if down is not None:
                assert (end["size"], end["sha"]) == (down, pattern_sha(down))
            seen = app.wait_connection(0)
            assert (seen.end, seen.sha) == ("eof", pattern_sha(upload))

    with Backend(habit) as app:
        async with forwarding() as near:
            await run(script)


@pytest.mark.parametrize("leaf", ["foreign", "other_trust_domain", "expired"])
async def test_node_to_us_refused_certificate(pki, tmp_path, leaf):
    def script():
        with NodePeer.client(tmp_path, getattr(pki, leaf), near.port, expect=SERVER) as node:
            # Node tells nobody that its idle session was refused: only a request on it fails.
            node.tell("tunnel", id=1, target="127.0.0.1:1", half_close=True)
            closed = node.wait("stream-closed", id=1)
            assert closed["status"] is None
            assert not [event for event in node.seen if event["event"] == "connected"]

    async with forwarding() as near:
        await run(script)


async def test_node_to_us_refused_by_policy(pki, tmp_path):
    async def handler(request):
        if request.peer.identity.namespace != "shop":
            raise hbone.RequestRejected(401)
        await ours.forward()(request)

    def script():
        with (
            NodePeer.client(tmp_path, pki.other, near.port, expect=SERVER) as bad,
            NodePeer.client(tmp_path, pki.client, near.port, expect=SERVER) as good,
        ):
            for number in (1, 2):
                bad.tell("tunnel", id=number, target=app.target, half_close=True)
                assert bad.wait("response", id=number)["status"] == 401
                assert bad.wait("stream-closed", id=number)["code"] == 0
            good.tell("tunnel", id=1, target=app.target, half_close=True)
            assert good.wait("response", id=1)["status"] == 200

    with Backend(echo) as app:
        async with serving(handler) as near:
            await run(script)


async def test_node_to_us_refused_target(pki, tmp_path):
    def script():
        with NodePeer.client(tmp_path, pki.client, near.port, expect=SERVER) as node:
            node.tell("tunnel", id=1, target=f"127.0.0.1:{port}", half_close=True)
            assert node.wait("response", id=1)["status"] == 503
            node.tell("tunnel", id=2, target="not an authority", half_close=True)
            assert node.wait("response", id=2)["status"] == 400
            node.tell("tunnel", id=3, target=app.target, half_close=True)
            assert node.wait("response", id=3)["status"] == 200

    with refused_port() as port, Backend(echo) as app:
        async with forwarding() as near:
            await run(script)


@pytest.mark.parametrize("whose", ["ours", "theirs"])
async def test_node_to_us_goaway_lets_the_transfer_finish(pki, tmp_path, bulk_file, whose):
    def script(nursery):
        with NodePeer.client(tmp_path, pki.client, near.port, expect=SERVER) as node:
            node.wait("connected")
            node.tell("tunnel", id=1, target=app.target, upload=bulk_file, half_close=True)
            node.wait("first-byte", id=1)
            if whose == "ours":
                trio.from_thread.run_sync(nursery.start_soon, near.server.drain, 100.0)
                assert node.wait("goaway")["code"] == 0
            else:
                node.tell("goaway")
            end = node.wait("end", id=1)
            assert (end["size"], end["sha"]) == (BULK, pattern_sha(BULK))
            assert app.wait_connection(0).sha == pattern_sha(BULK)

    with Backend(send_then_receive(BULK)) as app:
        async with forwarding() as near:
            async with trio.open_nursery() as nursery:
                await run(script, nursery)


async def test_node_to_us_a_reset_of_its_is_a_reset_of_the_backends(pki, tmp_path):
    # Node ends its half before it resets the stream, so the backend may see a FIN first. What it sends then tells it.
    def script():
        with NodePeer.client(tmp_path, pki.client, near.port, expect=SERVER) as node:
            node.wait("connected")
            node.tell("tunnel", id=1, target=app.target, half_close=False)
            node.wait("first-byte", id=1)
            node.tell("reset", id=1)
            assert app.wait_connection(0).end == "reset"

    with Backend(ends_first(1 << 40)) as app:
        async with forwarding() as near:
            await run(script)


# --- our client, Node's server


def client_of(leaf, port, *, expect=SERVER):
    return hbone.HBONEClient.connect("127.0.0.1", port, svid=svid(leaf), expect=expect)


@pytest.mark.parametrize(
    ("habit", "upload", "down"),
    [
        pytest.param(echo, BULK, BULK, id="echo"),
        pytest.param(generate(BULK), 0, BULK, id="download_after_our_end"),
        pytest.param(ends_first(BULK), BULK, BULK, id="backend_ends_first"),
        pytest.param(send_then_receive(BULK), BULK, BULK, id="both_at_once"),
    ],
)
async def test_us_to_node_every_byte_both_ways(pki, tmp_path, habit, upload, down):
    with Backend(habit) as app, NodePeer.server(tmp_path, pki.server) as node, trio.fail_after(100):
        async with client_of(pki.client, node.port) as client, await client.open_tunnel(app.target) as tunnel:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send_pattern, tunnel, upload)
                assert await receive_all(tunnel) == (down, pattern_sha(down))
        seen = await run(app.wait_connection, 0)
        assert (seen.end, seen.sha) == ("eof", pattern_sha(upload))
        assert node.wait("request")["peer"] == [CLIENT]
        assert node.wait("stream-closed")["code"] == 0


async def test_us_to_node_refused_certificate(pki, tmp_path):
    with NodePeer.server(tmp_path, pki.server) as node, trio.fail_after(100):
        with pytest.raises(hbone.IdentityRefused):
            async with client_of(pki.foreign, node.port):
                pytest.fail("connected")
        assert node.wait("tls-error")


async def test_us_to_node_refused_by_policy_and_refused_target(pki, tmp_path):
    with (
        Backend(echo) as app,
        refused_port() as port,
        NodePeer.server(tmp_path, pki.server, allow=[CLIENT]) as node,
        trio.fail_after(100),
    ):
        async with client_of(pki.other, node.port) as client:
            with pytest.raises(hbone.PolicyDenied):
                await client.open_tunnel(app.target)
        async with client_of(pki.client, node.port) as client:
            with pytest.raises(hbone.Unreachable):
                await client.open_tunnel(f"127.0.0.1:{port}")
            async with await client.open_tunnel(app.target) as tunnel:
                await tunnel.send_all(b"hello")
                await tunnel.send_eof()
                assert await download(tunnel) == b"hello"


async def test_we_refuse_nodes_identity(pki, tmp_path):
    with NodePeer.server(tmp_path, pki.server) as node, trio.fail_after(100):
        with pytest.raises(hbone.PeerIdentityMismatch):
            async with client_of(pki.client, node.port, expect="spiffe://cluster.local/ns/a/sa/b"):
                pytest.fail("connected")
    with NodePeer.server(tmp_path, pki.foreign_server) as node, trio.fail_after(100):
        with pytest.raises(hbone.ConnectFailed):
            async with client_of(pki.client, node.port):
                pytest.fail("connected")


async def test_us_to_node_its_goaway_lets_our_transfer_finish(pki, tmp_path):
    with (
        Backend(send_then_receive(BULK)) as app,
        NodePeer.server(tmp_path, pki.server) as node,
        trio.fail_after(100),
    ):
        async with client_of(pki.client, node.port) as client, await client.open_tunnel(app.target) as tunnel:
            got = []

            async def receive():
                got.append(await receive_all(tunnel))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive)
                await send_pattern(tunnel, BULK // 2, end=False)
                node.tell("goaway")
                while not client.statistics().draining:
                    await trio.sleep(0.01)
                with pytest.raises((hbone.StreamRefused, hbone.SessionClosed)):
                    await client.open_tunnel(app.target)
                await send_pattern(tunnel, BULK // 2)
            assert got == [(BULK, pattern_sha(BULK))]
        assert app.wait_connection(0).received == BULK


async def test_us_to_node_our_reset_is_a_reset_of_the_backends(pki, tmp_path):
    with Backend(send_then_receive(MIB)) as app, NodePeer.server(tmp_path, pki.server) as node, trio.fail_after(100):
        async with client_of(pki.client, node.port) as client:
            tunnel = await client.open_tunnel(app.target)
            await tunnel.send_all(b"half of it")
            assert await tunnel.receive_some()
            tunnel.abort()
            seen = await run(app.wait_connection, 0)
            assert seen.end == "reset"
