"""The two proxies as users run them: real applications through all ways in, and the life of the processes."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import requests
from support.apps import dial, exchange, transfer
from support.backends import Backend, echo, http_app, own_loopback, pattern, pattern_sha, sink
from support.certs import CLIENT, SERVER
from support.command import WAIT, Node, files, hbone

MIB = 1 << 20


@pytest.fixture(scope="module")
def app():
    with Backend(http_app) as app:
        yield app


@pytest.fixture(scope="module")
def far(pki, near):
    """All ways in that need no firewall, on one node."""
    words = ["--via", near.address(), "--http-proxy", "0", "--socks", "0", "--admin", "0"]
    with Node.outbound(pki.client, *words) as node:
        yield node


@pytest.fixture
def pair(pki):
    """A way to the application behind it: gives the outbound node and the inbound one."""
    nodes = []

    def start(app, *words, leaf=None, inbound=()):
        behind = Node.inbound(pki.server, "--to", app.target, *inbound)
        nodes.append(behind)
        before = Node.outbound(leaf or pki.client, "--via", behind.address(), "--forward", "0=10.9.9.9:80", *words)
        nodes.append(before)
        return before, behind

    yield start
    for node in reversed(nodes):
        node.__exit__(None, None, None)


# === ways in ===


def test_requests_through_the_http_proxy(pki, pair):
    """HTTPS, from end to end: the proxies carry it and cannot read it."""
    leaf = pki.ca.issue("web", [], dns=["localhost"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(leaf.cert, leaf.key)

    def https_app(sock, seen):
        with context.wrap_socket(sock, server_side=True) as stream:
            http_app(stream, seen)

    with Backend(https_app) as app:
        before, _ = pair(app, "--http-proxy", "0", "--drain-deadline", "0")
        proxies = {"https": f"http://127.0.0.1:{before.port('http-proxy')}"}
        with requests.Session() as session:
            session.trust_env = False
            url = f"https://localhost:{app.port}/{MIB}"
            answer = session.get(url, proxies=proxies, verify=str(pki.ca.roots), timeout=WAIT)
        assert answer.content == b"".join(pattern(MIB))
        assert before.stop() == 0  # requests keeps connections open for longer than its sessions
        assert f":{app.port} " in before.access("dst.hbone_addr=")


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
@pytest.mark.parametrize("way", ["http-proxy", "socks", "socks-name"])
def test_curl(far, app, way):
    proxy = {
        "http-proxy": ["-p", "-x", f"http://127.0.0.1:{far.port('http-proxy')}"],
        "socks": ["-x", f"socks5://127.0.0.1:{far.port('socks')}"],
        "socks-name": ["-x", f"socks5h://127.0.0.1:{far.port('socks')}"],
    }[way]
    command = ["curl", "-q", "-sS", "--max-time", "60", "--noproxy", "", *proxy, f"http://{app.target}/{MIB}"]
    result = subprocess.run(command, capture_output=True, check=True, timeout=90)
    assert result.stdout == b"".join(pattern(MIB))


def test_http_proxy_by_hand(far, app):
    with socket.create_connection(("127.0.0.1", far.port("http-proxy")), WAIT) as sock:
        sock.sendall(f"CONNECT {app.target} HTTP/1.1\r\nHost: {app.target}\r\n\r\n".encode())
        assert sock.recv(4096).startswith(b"HTTP/1.1 200 ")
        sock.sendall(b"GET /5 HTTP/1.1\r\n\r\n")
        answer = b""
        while not answer.endswith(b"\r\n\r\n" + b"".join(pattern(5))):
            answer += sock.recv(4096)


def test_socks_by_hand(far, app):
    with socket.create_connection(("127.0.0.1", far.port("socks")), WAIT) as sock:
        sock.sendall(b"\x05\x01\x00")
        assert sock.recv(2) == b"\x05\x00"
        sock.sendall(b"\x05\x01\x00\x01" + socket.inet_aton(app.host) + struct.pack("!H", app.port))
        assert sock.recv(10)[:2] == b"\x05\x00"
        sock.sendall(b"GET /5 HTTP/1.1\r\n\r\n")
        assert sock.recv(4096).startswith(b"HTTP/1.1 200 OK")


def test_names_are_resolved_here(far, near):
    """A node serves addresses: it would not know what to do with a name."""
    with Backend(http_app) as app, socket.create_connection(("127.0.0.1", far.port("socks")), WAIT) as sock:
        sock.sendall(b"\x05\x01\x00")
        assert sock.recv(2) == b"\x05\x00"
        sock.sendall(b"\x05\x01\x00\x03\x09localhost" + struct.pack("!H", app.port))
        assert sock.recv(10)[:2] == b"\x05\x00"
        sock.sendall(b"GET /5 HTTP/1.1\r\n\r\n")
        assert sock.recv(4096).startswith(b"HTTP/1.1 200 OK")
    assert f"dst.hbone_addr={app.target} " in near.access(app.target)
    with socket.create_connection(("127.0.0.1", far.port("http-proxy")), WAIT) as sock:
        sock.sendall(b"CONNECT nosuch.invalid:80 HTTP/1.1\r\nHost: nosuch.invalid:80\r\n\r\n")
        assert sock.recv(4096).startswith(b"HTTP/1.1 502 ")
    assert "nosuch.invalid does not resolve" in far.access("nosuch.invalid")


def test_forward_to_one_application(pair):
    with Backend(sink) as app:
        before, behind = pair(app)
        outcome = transfer(before.port("forward"), 8 * MIB)
        assert (outcome.end, outcome.head) == ("eof", pattern_sha(8 * MIB).encode())
        assert before.event("listening", way="forward")["target"] == "10.9.9.9:80"
        assert behind.event("listening", way="inbound")["target"] == app.target


def test_several_forwards(pki, near):
    with Backend(http_app) as one, Backend(sink) as two:
        words = ["--via", near.address(), "--forward", f"0={one.target}", "--forward", f"[::1]:0={two.target}"]
        with Node.outbound(pki.client, *words) as node:
            first = node.event("listening", target=one.target)["address"]
            second = node.event("listening", target=two.target)["address"]
            assert second.startswith("[::1]:")
            with urllib.request.urlopen(f"http://{first}/7", timeout=WAIT) as answer:
                assert answer.read() == b"".join(pattern(7))
            outcome = transfer(int(second.rpartition(":")[2]), 10, host="::1")
            assert outcome.head == pattern_sha(10).encode()


def test_default_next_hop_and_default_rule(pki):
    """Without --via the next hop is port 15008 of the target; without --to its own address is what it forwards to."""
    with Backend(echo, host=own_loopback(78)) as app:
        with (
            Node("inbound", "--listen", f"{app.host}:15008", *files(pki.server)),
            Node.outbound(pki.client, "--forward", f"0={app.target}") as node,
        ):
            outcome = transfer(node.port("forward"), 1000)
            assert (outcome.end, outcome.sha) == ("eof", pattern_sha(1000))
            result = hbone("connect", app.target, *files(pki.client), input=b"x")
            assert (result.code, result.out) == (0, b"x")


@pytest.mark.skipif(sys.platform != "linux", reason="capture needs Linux")
def test_capture_refuses_who_comes_directly(pki):
    with Node.outbound(pki.client, "--capture", "--listen", "127.0.0.1:0") as node:
        with pytest.raises(ConnectionResetError):
            connect_and_read(node.port("capture"))
        assert "is this proxy itself" in node.access("error=")
        assert node.stop() == 0


# === logs and the admin port ===


def test_access_log_names_both(pair):
    with Backend(sink) as app:
        before, behind = pair(app)
        transfer(before.port("forward"), 1000)
        for node, sent, direction in ((before, 1000, "outbound"), (behind, 64, "inbound")):
            line = node.access("bytes_sent=")
            for part in (
                f'src.identity="{CLIENT}"',
                f'dst.identity="{SERVER}"',
                "dst.hbone_addr=10.9.9.9:80",
                f"bytes_sent={sent} ",
                f"bytes_recv={1064 - sent} ",
                f'direction="{direction}"',
                'duration="',
            ):
                assert part in line
            assert "error" not in line


def test_access_log_as_json(pair):
    with Backend(sink) as app:
        before, _ = pair(app, "--log-format", "json")
        transfer(before.port("forward"), 10)
        line = json.loads(before.access("bytes_sent"))
        assert (line["src.identity"], line["bytes_sent"], line["bytes_recv"]) == (CLIENT, 10, 64)


def fetch(node, path):
    try:
        with urllib.request.urlopen(f"http://{node.address('admin')}{path}", timeout=WAIT) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as answer:
        with answer:
            return answer.code, answer.read().decode()


def test_admin_port(pair):
    with Backend(sink) as app:
        before, behind = pair(app, "--admin", "0", inbound=("--admin", "127.0.0.1:0"))
        transfer(before.port("forward"), 1000)
        for node, reporter in ((before, "source"), (behind, "destination")):
            node.access("bytes_sent=")
            assert fetch(node, "/healthz/ready") == (200, "ready\n")
            status, text = fetch(node, "/metrics")
            assert status == 200
            (line,) = [one for one in text.splitlines() if one.startswith("istio_tcp_received_bytes_total{")]
            assert f'reporter="{reporter}"' in line
            assert line.endswith(" 1000.0")


def test_plain_lines_at_start(pki):
    """For people, without --json."""
    words = ["outbound", "--forward", "0=db.example:5432", *files(pki.client)]
    with Node(*words, json_lines=False) as command:
        command.said.wait(lambda line: line == f"hbone: ready as {CLIENT}", "ready")
        assert command.said.now[0].startswith("hbone: forward listens on 127.0.0.1:")
        assert command.said.now[0].endswith(" -> db.example:5432")
        command.signal(signal.SIGINT)
        assert command.wait() == 0
        assert command.said.all()[-2:] == ["hbone: SIGINT: draining 0 connections, 5 s at most", "hbone: stopped"]


# === stopping ===


@pytest.mark.parametrize("which", ["outbound", "inbound"])
def test_drain_lets_a_transfer_finish(pair, which):
    with Backend(echo) as app:
        before, behind = pair(
            app, "--drain-deadline", "60", "--admin", "0", inbound=("--drain-deadline", "60", "--admin", "0")
        )
        node = {"outbound": before, "inbound": behind}[which]
        way = {"outbound": "forward", "inbound": "inbound"}[which]
        sock = dial(before.port("forward"))
        sock.sendall(b"before")
        assert sock.recv(6) == b"before"

        node.signal(signal.SIGTERM)
        assert node.event("draining")["connections"] == 1
        with pytest.raises(ConnectionRefusedError):
            refused_soon(node.port(way))
        assert fetch(node, "/healthz/ready") == (503, "not ready, waiting for:\ndraining\n")
        assert node.process.poll() is None

        with sock:
            outcome = exchange(sock, 4 * MIB)
        assert (outcome.end, outcome.sha) == ("eof", pattern_sha(4 * MIB))
        assert node.wait() == 0
        node.event("stopped")
        # Not any line: a connection of `refused_soon` may have come in before the listener was closed.
        assert "error" not in node.access(f"bytes_sent={4 * MIB + 6} ")


def connect_and_read(port):
    with socket.create_connection(("127.0.0.1", port), WAIT) as sock:
        sock.recv(1)


def refused_soon(port):
    """The listener closes as soon as the signal is worked off, not with it."""
    for _ in range(1000):
        try:
            with socket.create_connection(("127.0.0.1", port), WAIT) as sock:
                sock.shutdown(socket.SHUT_WR)
                sock.recv(1)
        except ConnectionRefusedError:
            raise
        except OSError:
            pass  # it was in the queue of a listener that closed
    raise AssertionError("the port is still open")


def test_peers_go_elsewhere_when_a_node_drains(pair):
    """GOAWAY: the other node opens its next tunnel on a new session, which finds nobody."""
    with Backend(echo) as app:
        before, behind = pair(app, inbound=("--drain-deadline", "60"))
        with dial(before.port("forward")) as live:
            live.sendall(b"1")
            assert live.recv(1) == b"1"
            behind.signal(signal.SIGTERM)
            behind.event("draining")
            with pytest.raises(ConnectionRefusedError):
                refused_soon(behind.port())
            assert transfer(before.port("forward"), 0).end == "reset"
            assert "connection refused" in before.access("connection refused")
            live.sendall(b"2")
            assert live.recv(1) == b"2"
            assert exchange(live).end == "eof"
        assert behind.wait() == 0


@pytest.mark.parametrize("which", ["outbound", "inbound"])
def test_the_deadline_ends_what_is_left(pair, which):
    with Backend(echo) as app:
        before, behind = pair(app, "--drain-deadline", "0.1", inbound=("--drain-deadline", "0.1"))
        sock = dial(before.port("forward"))
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        node = {"outbound": before, "inbound": behind}[which]
        assert node.stop() == 0
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
        sock.close()
        assert app.wait_connection().end == "reset"
        assert "error=" in node.access("bytes_sent=")


@pytest.mark.parametrize("which", ["outbound", "inbound"])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_quits_at_once(pair, which, second):
    with Backend(echo) as app:
        before, behind = pair(app, "--drain-deadline", "600", inbound=("--drain-deadline", "600"))
        sock = dial(before.port("forward"))
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        node = {"outbound": before, "inbound": behind}[which]
        node.signal(signal.SIGTERM)
        node.event("draining")
        node.signal(second)
        assert node.wait() == 128 + second
        assert node.event("error", kind="interrupted")["exit_code"] == 128 + second
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
        sock.close()
        assert "error=" in node.access("bytes_sent=")


# === certificates ===


def copy(leaf, folder):
    folder.mkdir(exist_ok=True)
    for path, name in ((leaf.key, "key.pem"), (leaf.roots, "roots.pem"), (leaf.cert, "cert.pem")):
        draft = folder / "draft"
        draft.write_bytes(path.read_bytes())
        draft.replace(folder / name)
    return ["--cert", str(folder / "cert.pem"), "--key", str(folder / "key.pem"), "--roots", str(folder / "roots.pem")]


@pytest.mark.parametrize("which", ["outbound", "inbound"])
def test_new_certificates_do_not_drop_tunnels(pki, tmp_path, which):
    with Backend(echo) as app:
        mine = copy(pki.server if which == "inbound" else pki.client, tmp_path / "mine")
        theirs = files(pki.client if which == "inbound" else pki.server)
        inbound = mine if which == "inbound" else theirs
        outbound = mine if which == "outbound" else theirs
        often = ["--reload-interval", "0.05"]
        with (
            Node("inbound", "--listen", "127.0.0.1:0", "--to", app.target, *inbound, *often) as behind,
            Node("outbound", "--via", behind.address(), "--forward", "0=10.9.9.9:80", *outbound, *often) as before,
        ):
            node = {"outbound": before, "inbound": behind}[which]
            sock = dial(before.port("forward"))
            sock.sendall(b"before")
            assert sock.recv(6) == b"before"

            identity = SERVER if which == "inbound" else CLIENT
            copy(pki.ca.issue(f"renewed-{which}", [identity]), tmp_path / "mine")
            assert node.event("certificate")["identity"] == identity

            (tmp_path / "mine" / "cert.pem").write_text("half a fi")
            assert "the old one stays in use" in node.event("warning")["message"]

            with sock:
                outcome = exchange(sock, MIB)
            assert (outcome.end, outcome.sha) == ("eof", pattern_sha(MIB))
            assert transfer(before.port("forward"), 10).end == "eof"
            assert before.stop() == 0
            assert behind.stop() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_node_has_as_many_files_as_it_may(far):
    for line in Path(f"/proc/{far.process.pid}/limits").read_text().splitlines():
        if line.startswith("Max open files"):
            soft, hard = line.split()[3:5]
            assert soft == hard or int(soft) >= 1 << 20
