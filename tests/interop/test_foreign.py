"""Foreign peers among themselves: what they do right and wrong without us in the path.

This is the ground that the other interop tests stand on, and it pins the faults that docs/design/foreign-peers.md
lists: when a new release of a peer mends one, the test here fails and the page gets shorter.
"""

from __future__ import annotations

import contextlib
import ssl
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from support import frames
from support.apps import dial, exchange, transfer
from support.backends import (
    Backend,
    echo,
    ends_first,
    generate,
    http_app,
    own_loopback,
    pattern,
    pattern_sha,
    refused_port,
    sink,
)
from support.certs import CLIENT, SERVER
from support.foreign import Curl, Envoy, NodePeer, Process
from support.frames import Code, Kind
from support.lab import localized
from support.rawpeer import Ended, RawListener, RawPeer

MIB = 1 << 20
WAYPOINT = own_loopback(96)


def test_envoy_to_envoy_carries_both_ways_with_half_close(pki, tmp_path):
    with (
        Backend(echo) as app,
        Envoy.terminator(tmp_path, pki.server) as far,
        Envoy.originator(
            tmp_path, pki.client, hbone_port=far.port("hbone"), expect=SERVER, targets=[app.target]
        ) as near,
        dial(near.port(app.target)) as sock,
    ):
        outcome = exchange(sock, 8 * MIB)
        assert (outcome.received, outcome.sha, outcome.end) == (8 * MIB, pattern_sha(8 * MIB), "eof")
        assert CLIENT in far.wait_log("TERM")


def test_envoy_cuts_a_download_when_the_backend_ends_first(pki, tmp_path):
    # envoyproxy/envoy pull request 47378. Through two Envoys, so nobody but Envoy is to blame. How much is lost is a
    # race; now and then it is nothing but the clean end.
    size = 16 * MIB
    with (
        Backend(ends_first(size)) as app,
        Envoy.terminator(tmp_path, pki.server) as far,
        Envoy.originator(
            tmp_path, pki.client, hbone_port=far.port("hbone"), expect=SERVER, targets=[app.target]
        ) as near,
    ):
        for _ in range(50):
            with dial(near.port(app.target)) as sock:
                outcome = exchange(sock, 0, half_close=False)
            if (outcome.received, outcome.end) != (size, "eof"):
                return
        pytest.fail("Envoy has mended it: say so in docs/design/foreign-peers.md")


def test_node_to_envoy(pki, tmp_path):
    with (
        Backend(echo) as app,
        Envoy.terminator(tmp_path, pki.server) as far,
        NodePeer.client(tmp_path, pki.client, far.port("hbone"), expect=SERVER) as node,
    ):
        upload = tmp_path / "upload"
        upload.write_bytes(b"".join(pattern(4 * MIB)))
        node.wait("connected")
        node.tell("tunnel", id=1, target=app.target, upload=str(upload), half_close=True)
        assert node.wait("response", id=1)["status"] == 200
        end = node.wait("end", id=1)
        assert (end["size"], end["sha"]) == (4 * MIB, pattern_sha(4 * MIB))
        assert node.wait("stream-closed", id=1)["code"] == 0


def test_node_to_node(pki, tmp_path):
    with (
        Backend(echo) as app,
        NodePeer.server(tmp_path, pki.server, allow=[CLIENT]) as far,
        NodePeer.client(tmp_path, pki.client, far.port, expect=SERVER) as node,
        NodePeer.client(tmp_path, pki.other, far.port, expect=SERVER) as other,
    ):
        node.tell("tunnel", id=1, target=app.target, half_close=True)
        assert node.wait("end", id=1)["size"] == 0
        other.tell("tunnel", id=1, target=app.target, half_close=True)
        assert other.wait("response", id=1)["status"] == 401


def test_envoy_to_node_refuses_what_node_cannot_reach(pki, tmp_path):
    with (
        refused_port() as port,
        NodePeer.server(tmp_path, pki.server) as far,
        Envoy.originator(
            tmp_path, pki.client, hbone_port=far.port, expect=SERVER, targets=[f"127.0.0.1:{port}"]
        ) as near,
    ):
        assert transfer(near.port(f"127.0.0.1:{port}"), 10).received == 0
        assert far.wait("upstream-error")["error"] == "ECONNREFUSED"


def test_curl_to_envoy(pki, tmp_path):
    size = 8 * MIB
    with (
        Backend(http_app) as app,
        Envoy.terminator(tmp_path, pki.server) as far,
        Curl(pki.client, far.port("hbone")) as curl,
    ):
        status, body = curl.get(f"http://{app.target}/{size}")
        assert (curl.connect_status, status, body) == (200, 200, b"".join(pattern(size)))
        assert curl.put(f"http://{app.target}/", pattern(size), size) == (200, pattern_sha(size).encode())


def waypoint(pki, tmp_path, port, *, half_close=True):
    """Envoy as in the example, with what is behind it at `port` of the loopback, and itself at `WAYPOINT`."""
    names = {"10.1.0.50": WAYPOINT, "10.1.1.9": "127.0.0.1", "15008": port}
    files = {name: getattr(pki.client, name) for name in ("cert", "key", "roots")}
    text = localized("waypoint/envoy.yaml", names | {f"/etc/waypoint/{name}.pem": path for name, path in files.items()})
    switch = "envoy.reloadable_features.allow_multiplexed_upstream_half_close: "
    assert f"{switch}true" in text
    return Envoy(text.replace(f"{switch}true", f"{switch}{str(half_close).lower()}"), tmp_path)


def until_reset(peer):
    """What comes in stream 1 until it is reset, without an end, and with which code."""
    data = b""
    while True:
        got = peer.wait_for(stream=1, where=lambda got: got.kind in (Kind.DATA, Kind.RST_STREAM))
        if got.kind == Kind.RST_STREAM:
            return data, got.code
        assert not got.end_stream
        data += got.data


@pytest.mark.parametrize("size", [2, 200_000])
def test_envoy_as_a_waypoint_for_http_ends_by_resets(pki, tmp_path, size):
    # It answers 200 before it has asked anybody. What it is done with it resets, on both sides, and what the client's
    # window does not let through at that moment is lost.
    request = b"GET / HTTP/1.1\r\nhost: stock\r\nconnection: close\r\n\r\n"
    answer = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % size + b"." * size
    with (
        RawListener(pki.server) as behind,
        waypoint(pki, tmp_path, behind.port),
        RawPeer.dial(behind.port, pki.client, host=WAYPOINT) as near,
    ):
        near.open({})  # 65 535 bytes
        assert near.tunnel(1, "10.96.0.20:80") == 200
        assert not behind.has_more()
        near.send(frames.data(1, request))
        with behind.accept() as far:
            far.open()
            far.wait_for(Kind.HEADERS, stream=1)
            far.send(frames.response(1))
            assert far.take_data(1, 10).startswith(b"GET / HTTP")
            for at in range(0, len(answer), 16_384):
                far.send(frames.data(1, answer[at : at + 16_384]))
            assert until_reset(far)[1] == Code.INTERNAL_ERROR
        sent, code = until_reset(near)
        assert code == Code.CONNECT_ERROR
        assert (len(sent.partition(b"\r\n\r\n")[2]) == size) is (size == 2)


@pytest.mark.parametrize("half_close", [False, True])
def test_envoy_as_a_waypoint_for_tcp_needs_a_switch_for_half_close(pki, tmp_path, half_close):
    with (
        RawListener(pki.server) as behind,
        waypoint(pki, tmp_path, behind.port, half_close=half_close),
        RawPeer.dial(behind.port, pki.client, host=WAYPOINT) as near,
    ):
        near.open()
        near.send(frames.connect(1, "10.96.0.20:5432"))
        with behind.accept() as far:
            far.open()
            far.wait_for(Kind.HEADERS, stream=1)
            far.send(frames.response(1) + frames.data(1, b"bye", end=True))
            assert near.wait_for(Kind.HEADERS, stream=1)
            assert near.take_data(1) == b"bye"
            if half_close:
                near.send(frames.data(1, b"still here", end=True))
                assert far.take_data(1) == b"still here"
            else:
                assert far.wait_for(Kind.RST_STREAM, stream=1)
                assert near.wait_for(Kind.RST_STREAM, stream=1).code == Code.NO_ERROR


def test_envoy_ends_an_http_1_tunnel_with_the_clients_half(tmp_path):
    # tcp_proxy through an HTTP/1.1 proxy: the answer is lost, and its place is taken by a clean end.
    config = """
static_resources:
  listeners:
  - name: in
    address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.tcp_proxy
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: "in"
          cluster: proxy
          tunneling_config: {{hostname: "10.0.0.1:80"}}
  clusters:
  - name: proxy
    load_assignment:
      cluster_name: proxy
      endpoints:
      - lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}}}}}]
"""

    def tunnel(sock, seen):
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += sock.recv(1)
        assert head.startswith(b"CONNECT 10.0.0.1:80 HTTP/1.1\r\n")
        sock.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        sink(sock, seen)

    with (
        Backend(tunnel) as proxy,
        Envoy(config.format(port=proxy.port), tmp_path) as envoy,
        dial(envoy.port("in")) as sock,
    ):
        outcome = exchange(sock, 1000)
        assert (outcome.received, outcome.end) == (0, "eof")
        assert proxy.wait_connection().received == 1000


def test_envoy_says_goaway_and_finishes_its_tunnels(pki, tmp_path):
    with (
        Backend(echo) as app,
        Envoy.terminator(tmp_path, pki.server, requests_before_goaway=2) as far,
        RawPeer.dial(far.port("hbone"), pki.client) as peer,
    ):
        peer.open()
        assert peer.tunnel(1, app.target) == 200
        assert peer.tunnel(3, app.target) == 200
        final = peer.wait_for(Kind.GOAWAY, where=lambda got: got.last_stream < 1000)
        assert (final.last_stream, final.code) == (3, 0)
        peer.send(frames.data(1, b"still here", end=True))
        assert peer.take_data(1) == b"still here"


def test_curl_does_not_take_end_stream_for_an_end(pki):
    # libcurl 8.23 as the client of an HTTP/2 proxy: all bytes are there and the stream has ended, and it waits on.
    body = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nall of it"

    def serve():
        with listener.accept() as peer:
            peer.open()
            peer.wait_for(Kind.HEADERS, stream=1)
            peer.send(frames.response(1))
            peer.wait_for(Kind.DATA, stream=1)
            peer.send(frames.data(1, body, end=True))
            with contextlib.suppress(Ended):
                peer.wait_end()

    with RawListener(pki.server) as listener, ThreadPoolExecutor(1) as pool:
        served = pool.submit(serve)
        with Curl(pki.client, listener.port) as curl:
            got, whole = [], []

            def write(chunk):
                got.append(chunk)
                if b"".join(got) == b"all of it":
                    whole.append(time.monotonic())

            def hang_up(*_):
                return int(bool(whole) and time.monotonic() > whole[0] + 2)

            curl.handle.setopt(curl.handle.NOPROGRESS, 0)
            curl.handle.setopt(curl.handle.XFERINFOFUNCTION, hang_up)
            with pytest.raises(Exception, match="aborted"):
                curl.get("http://10.0.0.1/", write)
            assert b"".join(got) == b"all of it"
        served.result(60)


def test_node_ends_its_half_before_it_resets(pki, tmp_path):
    # stream.close(CANCEL) with nothing left to write: END_STREAM first, so a cut upload looks whole for a moment.
    with RawListener(pki.server) as listener, NodePeer.client(tmp_path, pki.client, listener.port) as node:
        with listener.accept() as peer:
            peer.open()
            node.tell("tunnel", id=1, target="10.0.0.1:80", half_close=False)
            peer.wait_for(Kind.HEADERS, stream=1)
            peer.send(frames.response(1) + frames.data(1, b"x"))
            node.wait("first-byte", id=1)
            node.tell("reset", id=1)
            assert peer.wait_for(stream=1).end_stream
            assert peer.wait_for(Kind.RST_STREAM, stream=1).code == Code.CANCEL


def test_node_tells_nobody_that_its_idle_session_was_refused(pki, tmp_path):
    with (
        RawListener(pki.server) as listener,
        NodePeer.client(tmp_path, pki.foreign, listener.port) as node,
    ):
        with pytest.raises(ssl.SSLError):
            listener.accept()
        node.wait("tls")
        with pytest.raises(TimeoutError):
            node.wait("session-closed", timeout=0.5)
        node.tell("tunnel", id=1, target="10.0.0.1:80")
        assert node.wait("stream-closed", id=1)["status"] is None


@pytest.mark.parametrize("habit", ["generate", "sink"])
def test_envoy_terminator_moves_bulk_when_the_client_ends_first(pki, tmp_path, habit):
    size = 16 * MIB
    with (
        Backend(generate(size) if habit == "generate" else sink) as app,
        Envoy.terminator(tmp_path, pki.server) as far,
        Envoy.originator(
            tmp_path, pki.client, hbone_port=far.port("hbone"), expect=SERVER, targets=[app.target]
        ) as near,
        dial(near.port(app.target)) as sock,
    ):
        outcome = exchange(sock, 0 if habit == "generate" else size)
        if habit == "generate":
            assert outcome.sha == pattern_sha(size)
        else:
            assert outcome.head == pattern_sha(size).encode()


def test_a_stubborn_process_is_killed(tmp_path):
    script = "trap '' TERM; echo up; while :; do sleep 1; done"
    with Process(["bash", "-c", script], tmp_path / "stubborn.log", stdout=subprocess.PIPE) as process:
        process.popen.stdout.readline()
        assert process.stop(timeout=0.2) == -9
