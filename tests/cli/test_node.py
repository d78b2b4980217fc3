"""``hbone node`` as users run it: what it is told and how, its life, and what may go wrong."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.backends import Backend, http_app, own_loopback, pattern
from support.command import Node, environment, hbone

from hbone.proxy._node_environment import VARIABLES
from hbone_cli import cli

EXAMPLES = Path(__file__).parents[2] / "examples"
VIP, NAME = "10.96.0.20", "web.shop.svc.cluster.local"
LOCAL = """
workloads:
- uid: local
  name: web-0
  namespace: shop
  serviceAccount: web
  workloadName: web
  workloadIps: [127.0.0.1]
  protocol: HBONE
  services:
    shop/{name}: {{80: {port}}}
services:
- name: web
  namespace: shop
  hostname: {name}
  vips: [/{vip}]
  ports: {{80: {port}}}
"""
DENY = """
policies:
- name: nobody
  namespace: shop
  scope: Namespace
  action: Deny
  dryRun: false
  rules:
  - - - notDestinationPorts: [1]
"""
LISTENERS = ("outbound", "plaintext", "inbound", "socks5", "http-proxy", "admin", "stats", "readiness")
#: Free ports of the loopback for everything.
FREE = [word for name in LISTENERS for word in (f"--{name}", "127.0.0.1:0")] + ["--hbone-port", "0"]


@pytest.fixture(scope="module")
def app():
    with Backend(http_app) as app:
        yield app


@pytest.fixture(scope="module")
def ca_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("node") / "ca"


@pytest.fixture
def mesh(app, tmp_path):
    path = tmp_path / "mesh.yaml"
    path.write_text(LOCAL.format(name=NAME, vip=VIP, port=app.port))
    return path


@pytest.fixture
def run(mesh, ca_dir):
    """Starts nodes and ends them."""
    nodes = []

    def start(*words, **options):
        env = {"FAKE_CA": "true", "XDS_ADDRESS": "", "LOCAL_XDS_PATH": str(mesh), "HBONE_CA_DIR": str(ca_dir)}
        nodes.append(Node("node", *FREE, *words, env={**env, **options.pop("env", {})}, **options))
        return nodes[-1]

    yield start
    for node in nodes:
        node.__exit__(None, None, None)


def fetch(node, listener, path, method="GET", headers=None):
    request = urllib.request.Request(f"http://{node.address(listener)}{path}", method=method, headers=headers or {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as answer:
        with answer:
            return answer.code, answer.read().decode()


def get(node, host, size=5):
    """An HTTP request of an application through the SOCKS5 proxy; gives the body, or None when it was refused."""
    with socket.create_connection(("127.0.0.1", node.port("socks5")), 60) as sock:
        name = host.encode()
        sock.sendall(b"\5\1\0" + b"\5\1\0\3" + bytes([len(name)]) + name + b"\0\x50")
        reply = b""
        while len(reply) < 12:
            got = sock.recv(12 - len(reply))
            if not got:
                return None
            reply += got
        if reply[3]:
            return None
        sock.sendall(f"GET /{size} HTTP/1.1\r\n\r\n".encode())
        sock.shutdown(socket.SHUT_WR)
        answer = b""
        while got := sock.recv(65536):
            answer += got
    return answer.partition(b"\r\n\r\n")[2]


# === the one command ===


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
@pytest.mark.parametrize("host", [VIP, NAME])
def test_curl_to_a_service(run, host):
    node = run()
    proxy = f"socks5h://127.0.0.1:{node.port('socks5')}"
    command = ["curl", "-q", "-sS", "--max-time", "60", "--noproxy", "", "-x", proxy, f"http://{host}/1000"]
    result = subprocess.run(command, capture_output=True, check=True, timeout=90)
    assert result.stdout == b"".join(pattern(1000))
    for direction in ("outbound", "inbound"):
        line = node.access(f'direction="{direction}"')
        assert "\tinfo\taccess\tconnection complete\t" in line
        assert f'dst.service="{NAME}" dst.workload="web-0" dst.namespace="shop"' in line
        assert 'src.identity="spiffe://cluster.local/ns/shop/sa/web"' in line
    _, metrics = fetch(node, "stats", "/metrics")
    for reporter in ("source", "destination"):
        assert f'istio_tcp_connections_opened_total{{reporter="{reporter}",source_workload="web"' in metrics
        assert f'istio_tcp_sent_bytes_total{{reporter="{reporter}",source_workload="web"' in metrics
    assert node.stop() == 0


def test_the_example(run, app, tmp_path):
    """As its first lines say, but for the ports."""
    path = tmp_path / "localhost.yaml"
    path.write_text((EXAMPLES / "localhost.yaml").read_text().replace("8080", str(app.port)))
    node = run(env={"LOCAL_XDS_PATH": str(path)})
    for host in ("local.default.svc.cluster.local", "127.10.0.1"):
        assert get(node, host) == b"".join(pattern(5))
        assert "dst.hbone_addr=" in node.access('direction="outbound"')
    assert node.stop() == 0
    lines = [line for line in node.log.all() if "\taccess\t" in line]
    assert len([line for line in lines if 'direction="inbound"' in line]) == 2
    assert not [line for line in lines if "error=" in line]


def test_http_connect_and_the_pages(run):
    node = run()
    with socket.create_connection(("127.0.0.1", node.port("http proxy")), 60) as sock:
        sock.sendall(f"CONNECT {NAME}:80 HTTP/1.1\r\nHost: {NAME}:80\r\n\r\n".encode())
        assert sock.recv(4096).startswith(b"HTTP/1.1 200 ")
        sock.sendall(b"GET /5 HTTP/1.1\r\n\r\n")
        sock.shutdown(socket.SHUT_WR)
        answer = b""
        while got := sock.recv(65536):
            answer += got
        assert answer.endswith(b"".join(pattern(5)))
    status, body = fetch(node, "admin", "/config_dump")
    assert status == 200
    assert [one["uid"] for one in json.loads(body)["workloads"]] == ["local"]
    assert fetch(node, "readiness", "/healthz/ready") == (200, "ready\n")
    assert fetch(node, "admin", "/config_dump", headers={"Host": "evil.example"})[0] == 403
    assert fetch(node, "admin", "/quitquitquit", "POST", headers={"Origin": "http://evil.example"})[0] == 403
    assert fetch(node, "admin", "/quitquitquit", "POST")[0] == 200
    assert node.event("draining")["signal"] == "/quitquitquit"
    assert node.wait() == 0


def test_the_log_on_standard_output(run):
    node = run(json_lines=False, env={"LOG_FORMAT": "json", "RUST_LOG": "info,access=off"})
    line = json.loads(node.log.wait(lambda line: "listener established" in line and "socks5" in line, "a listener"))
    assert {"level", "time", "scope", "message", "address", "component"} <= set(line)
    node.log.wait(lambda line: "marking server ready" in line, "ready")
    assert node.stop() == 0
    assert node.said.all() == []
    assert any("draining" in line for line in node.log.all())


def test_levels_while_it_runs(run):
    node = run()
    assert "access=off" in fetch(node, "admin", "/logging?level=access=off", "POST")[1]
    assert get(node, VIP) == b"".join(pattern(5))
    while 'istio_tcp_connections_closed_total{reporter="source"' not in fetch(node, "stats", "/metrics")[1]:
        time.sleep(0.01)  # its line, which is not to be seen, would come a little after its answer
    assert fetch(node, "admin", "/logging?reset", "POST")[0] == 200
    assert get(node, NAME) == b"".join(pattern(5))
    node.access('direction="outbound"')
    assert node.stop() == 0
    assert len([line for line in node.log.all() if 'direction="outbound"' in line]) == 1


def test_two_nodes_that_share_a_ca_trust_each_other(run, tmp_path):
    """A client's node and the node of the application, which is on another address."""
    address = own_loopback(79)
    with Backend(http_app, host=address) as app:
        path = tmp_path / "two.yaml"
        local = LOCAL.format(name=NAME, vip=VIP, port=app.port).replace("[127.0.0.1]", f"[{address}]")
        client = "- {uid: c, name: client-0, namespace: shop, serviceAccount: client, workloadIps: [127.0.0.1], "
        client += "services: {}}"
        path.write_text(local.replace("services:\n- name", f"{client}\nservices:\n- name"))
        env = {"LOCAL_XDS_PATH": str(path)}
        far = run("--inbound", f"{address}:0", env=env)
        near = run("--inbound", "off", "--hbone-port", str(far.port("inbound")), env=env)
        assert get(near, VIP) == b"".join(pattern(5))
        line = far.access('direction="inbound"')
        assert 'src.workload="client-0"' in line
        assert 'src.identity="spiffe://cluster.local/ns/shop/sa/client"' in line


# === settings ===


def test_from_a_file_and_what_wins(run, tmp_path):
    path = tmp_path / "node.yaml"
    path.write_text("poolStreams: 3\nnetwork: west\nclusterId: c1\n")
    env = {"CLUSTER_ID": "c2", "POOL_MAX_STREAMS_PER_CONNECTION": "4"}
    node = run("--config", str(path), "--cluster-id", "c3", env=env)
    config = json.loads(fetch(node, "admin", "/config_dump")[1])["config"]
    assert (config["poolMaxStreamsPerConn"], config["network"], config["clusterId"]) == (4, "west", "c3")


def test_a_switch_alone_is_on(mesh, ca_dir):
    with Node("node", *FREE, "--mesh", str(mesh), "--fake-ca", "--ca-dir", str(ca_dir)) as node:
        assert get(node, VIP) == b"".join(pattern(5))
        assert node.stop() == 0


def test_help_by_groups():
    result = hbone("node", "--help")
    text = result.out.decode()
    for heading in ("Mesh:", "Who we are:", "Where to listen:", "Tunnels:", "Sockets:", "Life:", "Log:", "Options:"):
        assert f"\n{heading}\n" in text
    assert "env: LOCAL_XDS_PATH" in " ".join(text.split())


def test_completion_of_its_options():
    words = environment(_HBONE_COMPLETE="bash_complete", COMP_WORDS="hbone node --pool-s", COMP_CWORD="2")
    assert hbone(env=words).out == b"plain,--pool-streams\n"


# === what may go wrong ===


@pytest.fixture
def fails(monkeypatch, tmp_path):
    """Runs it in this process: gives the exit code and the lines on standard error."""
    monkeypatch.chdir(tmp_path)
    for variable in VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)

    def run(*words, **env):
        result = CliRunner().invoke(cli, ["node", *map(str, words)], env=env)
        assert isinstance(result.exception, SystemExit), repr(result.exception)
        return result.exit_code, result.stderr.splitlines()

    return run


def test_nothing_said(fails):
    code, lines = fails()
    assert code == 14
    assert [line.partition(": ")[2].partition(":")[0] for line in lines] == ["LOCAL_XDS_PATH", "FAKE_CA"]


def test_every_fault_has_its_line(fails, tmp_path):
    path = tmp_path / "node.yaml"
    path.write_text("nonsense: 1\npoolIdle: soon\n")
    code, lines = fails("--config", str(path), "--pool-streams", "0", FAKE_CA="true", LOCAL_XDS_PATH="m", CRL_PATH="x")
    assert code == 14
    assert lines == [
        "hbone: --pool-streams: '0' cannot be used; expected a number from 1 to 65535",
        f"hbone: {path}:1: there is no setting 'nonsense'; hbone node --help lists them",
        f"hbone: {path}:2: poolIdle: 'soon' cannot be used; expected a number with its unit: 100ms, 10s, 5m or 1h30m",
        "hbone: CRL_PATH: 'x' cannot be had: revocation lists are not checked; "
        "unset it, and use certificates of a short life",
    ]


def test_faults_as_json(fails):
    code, (line,) = fails("--json", XDS_ADDRESS="https://istiod:15012")
    error = json.loads(line)
    assert (code, error["kind"], error["exit_code"], len(error["messages"])) == (14, "config", 14, 3)


def test_a_mesh_that_is_wrong(fails, ca_dir, tmp_path):
    mesh = tmp_path / "mesh.yaml"
    mesh.write_text("workloads:\n- name: x\n  nonsense: 1\n")
    code, lines = fails("--mesh", str(mesh), "--fake-ca", "--ca-dir", str(ca_dir), *FREE)
    assert code == 14
    assert len(lines) > 1
    assert all(line.startswith(f"hbone: {mesh}:") for line in lines)
    code, lines = fails("--mesh", str(tmp_path / "none"), "--fake-ca", "--ca-dir", str(ca_dir), *FREE)
    assert (code, len(lines)) == (14, 1)


def test_all_ports_that_are_taken(fails, mesh, ca_dir):
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        ports = [sock.getsockname()[1] for sock in (one, two)]
        words = ["--socks5", str(ports[0]), "--stats", f"127.0.0.1:{ports[1]}"]
        code, lines = fails(*FREE, *words, "--mesh", mesh, "--fake-ca", "--ca-dir", ca_dir)
    assert code == 4
    hint = "address already in use; the port is taken; choose another one, or find who has it with: ss -ltnp"
    assert lines == [
        f"hbone: cannot listen on 127.0.0.1:{ports[1]} (stats): {hint}",
        f"hbone: cannot listen on 127.0.0.1:{ports[0]} (socks5): {hint}",
    ]


def test_certificates_that_are_not_there(fails, mesh, tmp_path):
    none = ["--cert", "none", "--key", "none", "--roots", "none"]
    code, lines = fails("--mesh", str(mesh), "--mode", "dedicated", "--workload", "shop/web-0/web", *none, *FREE)
    assert (code, len(lines)) == (3, 1)


# === life ===


def test_a_changed_file_is_in_force_and_a_broken_one_changes_nothing(run, mesh):
    def write(text):
        draft = mesh.with_name("draft")
        draft.write_text(text)
        draft.replace(mesh)  # at once: a file that is empty for a moment would be another fault

    node = run("--mesh-interval", "50ms")
    right = mesh.read_text()
    assert get(node, VIP) == b"".join(pattern(5))
    write(right + DENY)
    node.log.wait(lambda line: "\tmesh changed\t" in line and "policies=1" in line, "the change")
    assert get(node, VIP) is None
    assert "explicitly denied by: shop/nobody" in node.access("explicitly denied")
    write("workloads: [")
    node.log.wait(lambda line: "\terror\t" in line and str(mesh) in line, "the fault")
    assert get(node, VIP) is None
    state = json.loads(fetch(node, "admin", "/debug/mesh")[1])
    assert state["inForce"] == {"policies": 1, "services": 1, "workloads": 1}
    assert state["file"]["faults"][0].startswith(f"{mesh}:")
    write(right)
    node.log.wait(lambda line: "\tmesh changed\t" in line and "policies=0" in line, "the change back")
    node.log.wait(lambda line: "the mesh file is right again" in line, "no fault")
    assert get(node, VIP) == b"".join(pattern(5))
    assert node.stop() == 0


def test_a_transfer_finishes_before_the_end(run):
    """The node is told to stop in the middle of an answer, and stops behind it."""
    size = 8 << 20
    node = run("--drain-deadline", "1h")
    with socket.create_connection(("127.0.0.1", node.port("socks5")), 60) as sock:
        sock.sendall(b"\5\1\0" + b"\5\1\0\1" + socket.inet_aton(VIP) + b"\0\x50")
        sock.sendall(f"GET /{size} HTTP/1.1\r\n\r\n".encode())
        source = sock.makefile("rb")
        assert source.read(12)[2:4] == b"\5\0"
        while source.readline() != b"\r\n":
            pass
        first = source.read(size // 2)
        node.signal(signal.SIGTERM)
        assert node.event("draining")["connections"] == 2
        assert fetch(node, "readiness", "/healthz/ready") == (503, "not ready, waiting for:\ndraining\n")
        assert first + source.read(size - len(first)) == b"".join(pattern(size))
        sock.shutdown(socket.SHUT_WR)
        assert source.read() == b""
    assert node.wait() == 0
    node.event("stopped")


def test_the_second_signal_ends_it_at_once(run):
    node = run("--drain-deadline", "1h")
    with socket.create_connection(("127.0.0.1", node.port("socks5")), 60) as sock:
        sock.sendall(b"\5\1\0")
        assert sock.recv(2) == b"\5\0"
        node.signal(signal.SIGTERM)
        assert node.event("draining")["connections"] == 1
        node.signal(signal.SIGINT)
        assert node.wait() == 128 + signal.SIGINT
