"""What may be wrong around ``hbone node``: what it says, its exit code, and what goes on nevertheless."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.backends import Backend, http_app, own_loopback, pattern
from support.command import HBONE, WAIT, Lines, Node, environment, hbone_of_anybody
from support.mint import key_pem, make

from hbone.certs import LocalCA
from hbone.proxy._node_environment import VARIABLES
from hbone_cli import cli

VIP = "10.96.0.20"
MESH = """
workloads:
- {{uid: local, name: web-0, namespace: shop, serviceAccount: web, workloadIps: [127.0.0.1], protocol: HBONE,
   services: {{shop/web.shop: {{80: {port}}}}}}}
services:
- {{name: web, namespace: shop, hostname: web.shop, vips: [/{vip}], ports: {{80: {port}}}}}
"""
LISTENERS = ("outbound", "plaintext", "inbound", "socks5", "http-proxy", "admin", "stats", "readiness")
#: What each is called in messages, in the order in which they are opened.
NAMES = {
    "readiness": "readiness",
    "stats": "stats",
    "admin": "admin",
    "inbound": "inbound",
    "plaintext": "inbound plaintext",
    "outbound": "outbound",
    "socks5": "socks5",
    "http-proxy": "http proxy",
}
FREE = [word for name in LISTENERS for word in (f"--{name}", "127.0.0.1:0")] + ["--hbone-port", "0"]
TAKEN = "address already in use; the port is taken; choose another one, or find who has it with: ss -ltnp"
NOT_OURS = (
    "cannot assign requested address; the address is not one of this machine; choose one that is, or 0.0.0.0 for all"
)
NOT_ALLOWED = (
    "permission denied; ports below 1024 need a privilege; choose a higher one, or give the process "
    "CAP_NET_BIND_SERVICE"
)

linux = pytest.mark.skipif(sys.platform != "linux", reason="all of these listeners, /proc, and root without privileges")


@pytest.fixture
def mesh(tmp_path):
    path = tmp_path / "mesh.yaml"
    path.write_text(MESH.format(port=9, vip=VIP))
    return path


@pytest.fixture(scope="module")
def ca_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("node") / "ca"
    LocalCA.create(directory)
    return directory


@pytest.fixture
def fails(monkeypatch, tmp_path):
    """Runs it in this process: gives the exit code and the lines on standard error."""
    monkeypatch.chdir(tmp_path)
    for variable in VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)

    def run(*words, **env):
        result = CliRunner().invoke(cli, ["node", *map(str, words)], env=env)
        assert isinstance(result.exception, SystemExit), repr(result.exception)
        return result.exit_code, [line.removeprefix("hbone: ") for line in result.stderr.splitlines()]

    return run


# === words: 2 and 14 ===


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["--wat"], 2, "No such option"),
        (["--pool-stream", "1"], 2, "No such option"),
        (["--mesh"], 2, "Option '--mesh' requires an argument"),
        (["mesh.yaml"], 2, "Got unexpected extra argument (mesh.yaml); see: hbone node --help"),
        (["--config", "none"], 14, "none: cannot be read: no such file or directory; check the path and its permissi"),
        (["--config", "."], 14, ".: cannot be read: is a directory; check the path and its permissions"),
        (["--mode", "sidecar"], 14, "--mode: 'sidecar' cannot be used; expected shared or dedicated"),
    ],
)
def test_words(fails, words, code, line):
    found, lines = fails(*words, FAKE_CA="true", LOCAL_XDS_PATH="m", HBONE_CA_DIR="ca")
    assert (found, len(lines)) == (code, 1)
    assert lines[0].startswith(line)


def test_a_configuration_file_that_the_environment_names(fails):
    code, lines = fails(FAKE_CA="true", LOCAL_XDS_PATH="m", HBONE_CA_DIR="ca", HBONE_NODE_CONFIG="none")
    assert (code, len(lines)) == (14, 1)
    assert lines[0].startswith("none: cannot be read: no such file or directory")


# === the mesh file: 14 ===


def a_mesh_that_is(what, path):
    match what:
        case "missing":
            return "cannot be read: no such file or directory"
        case "a directory":
            path.mkdir()
            return "cannot be read: is a directory"
        case "empty":
            path.write_text("")
            return "the file is empty; write {} for a mesh with nothing in it"
        case "a link to itself":
            path.symlink_to(path)
            return "cannot be read: too many levels of symbolic links"
        case "a program":
            path.write_bytes(b"\x7fELF\x02\x01\x01\x00\x00")
            return "expected a text in UTF-8"
        case _:
            path.write_text("workloads:\n- {uid: a, name: x}\n- {uid: b, nome: x}\n")
            return "workloads[0].namespace: expected namespace, which is missing"


@pytest.mark.parametrize(
    "what", ["missing", "a directory", "empty", "a link to itself", "a program", "wrong in several places"]
)
@pytest.mark.parametrize("by", ["option", "variable"])
def test_a_mesh_that_is_of_no_use(fails, tmp_path, ca_dir, what, by):
    path = tmp_path / "m.yaml"
    expected = a_mesh_that_is(what, path)
    words, env = (["--mesh", path], {}) if by == "option" else ([], {"LOCAL_XDS_PATH": str(path)})
    code, lines = fails(*FREE, "--fake-ca", "--ca-dir", ca_dir, *words, **env)
    assert code == 14
    assert all(line.startswith(f"{path}:") for line in lines)
    assert expected in lines[0]
    assert len(lines) == (1 if what != "wrong in several places" else 7)


@linux
def test_files_that_we_may_not_read(tmp_path, mesh, ca_dir):
    """Each is named, with its own exit code."""
    locked = tmp_path / "locked"
    locked.write_text(mesh.read_text())
    locked.chmod(0)
    words = ["node", *FREE, "--fake-ca"]
    result = hbone_of_anybody(*words, "--ca-dir", str(ca_dir), "--mesh", str(locked))
    assert (result.code, result.line) == (14, f"hbone: {locked}: cannot be read: permission denied")
    result = hbone_of_anybody(*words, "--ca-dir", str(ca_dir), "--mesh", str(mesh), "--config", str(locked))
    assert result.code == 14
    assert result.line.startswith(f"hbone: {locked}: cannot be read: permission denied")
    for mode, why in (
        (0o500, "no CA can be made here: Permission denied; choose a new directory"),
        (0, "cannot be read: Permission denied; check the path and its permissions"),
    ):
        folder = tmp_path / f"folder-{mode}"
        folder.mkdir(mode=mode)
        result = hbone_of_anybody(*words, "--ca-dir", str(folder / "ca"), "--mesh", str(mesh))
        assert (result.code, result.line) == (3, f"hbone: certificate: {folder / 'ca'}: {why}")
        folder.chmod(0o700)


# === the CA: 3 ===


def a_ca_that_is(what, directory):
    ca = LocalCA.in_memory()
    if what == "a file":
        directory.write_text("")
        return "no CA can be made here: Not a directory; choose a new directory"
    if what == "somebody else's directory":
        directory.mkdir()
        (directory / "notes.txt").write_text("mine")
        return "no CA can be made here: Directory not empty; choose a new directory"
    LocalCA.create(directory)
    match what:
        case "without its key":
            (directory / "root-key.pem").unlink()
            return "root-key.pem"
        case "without its root":
            (directory / "root.pem").unlink()
            return "no CA can be made here: Directory not empty; choose a new directory"
        case "without its trust domain":
            (directory / "trust-domain").unlink()
            return "trust-domain"
        case "with the key of another":
            (directory / "root-key.pem").write_bytes(key_pem(make(None).key))
            return "root-key.pem"
        case "with a key that is none":
            (directory / "root-key.pem").write_text("junk")
            return "root-key.pem"
        case "with a root that is none":
            (directory / "root.pem").write_text("junk")
            return "root.pem"
        case "cut":
            (directory / "root.pem").write_bytes((directory / "root.pem").read_bytes()[:200])
            return "root.pem"
        case "with a leaf for its root":
            leaf = ca.issue("spiffe://cluster.local/ns/a/sa/b").chain[0]
            from cryptography.hazmat.primitives.serialization import Encoding

            (directory / "root.pem").write_bytes(leaf.public_bytes(Encoding.PEM))
            return "root"
        case _:
            (directory / "trust-domain").write_text("A B")
            return "trust-domain"


@pytest.mark.parametrize(
    "what",
    [
        "a file",
        "somebody else's directory",
        "without its key",
        "without its root",
        "without its trust domain",
        "with the key of another",
        "with a key that is none",
        "with a root that is none",
        "cut",
        "with a leaf for its root",
        "of a trust domain that is none",
    ],
)
def test_a_ca_that_is_of_no_use(fails, mesh, tmp_path, what):
    directory = tmp_path / "ca"
    expected = a_ca_that_is(what, directory)
    before = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else None
    code, lines = fails(*FREE, "--fake-ca", "--ca-dir", directory, "--mesh", mesh)
    assert (code, len(lines)) == (3, 1)
    assert lines[0].startswith(f"certificate: {directory}")
    assert expected in lines[0]
    if before is not None:
        assert sorted(path.name for path in directory.iterdir()) == before


def test_a_ca_of_another_trust_domain(fails, mesh, ca_dir):
    code, lines = fails(*FREE, "--fake-ca", "--ca-dir", ca_dir, "--mesh", mesh, "--trust-domain", "corp.example")
    assert (code, len(lines)) == (3, 1)
    assert "is the CA of cluster.local, not of corp.example" in lines[0]


def test_a_new_ca_is_ours_only(run, tmp_path, mesh):
    directory = tmp_path / "new" / "ca"
    assert run("--mesh", mesh, "--ca-dir", directory).stop() == 0
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((directory / "root-key.pem").stat().st_mode) == 0o600


# === ports: 4 ===


def test_a_port_for_each_listener_is_taken(fails, mesh, ca_dir):
    """All are named at once, with what to do."""
    with ExitStack() as stack:
        taken = {
            name: stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for name in LISTENERS
        }
        words = [word for name, port in taken.items() for word in (f"--{name}", f"127.0.0.1:{port}")]
        code, lines = fails(*words, "--mesh", mesh, "--fake-ca", "--ca-dir", ca_dir)
    assert code == 4
    captured = ("plaintext", "outbound") if sys.platform != "linux" else ()
    expected = [
        f"cannot listen on 127.0.0.1:{taken[name]} ({called}): {TAKEN}"
        for name, called in NAMES.items()
        if name not in captured
    ]
    assert lines == expected


@pytest.mark.parametrize("name", LISTENERS)
def test_one_port_that_is_taken_is_enough(fails, mesh, ca_dir, name):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, lines = fails(*FREE, f"--{name}", port, "--mesh", mesh, "--fake-ca", "--ca-dir", ca_dir, "--json")
    if sys.platform != "linux" and name in ("plaintext", "outbound"):
        pytest.skip("captured connections need Linux")
    assert code == 4
    error = json.loads(lines[-1])
    assert (error["event"], error["kind"], error["exit_code"]) == ("error", "listen", 4)
    assert error["message"] == f"cannot listen on {address_of(name, port)} ({NAMES[name]}): {TAKEN}"


def address_of(name, port):
    """What a bare port means."""
    host = {"socks5": "127.0.0.1", "http-proxy": "127.0.0.1", "admin": "localhost"}.get(name, "*")
    return f"{host}:{port}"


@linux
def test_addresses_that_are_not_ours(fails, mesh, ca_dir):
    ports = {name: port for port, name in enumerate(LISTENERS, 20001)}
    words = [word for name, port in ports.items() for word in (f"--{name}", f"192.0.2.1:{port}")]
    code, lines = fails(*words, "--mesh", mesh, "--fake-ca", "--ca-dir", ca_dir)
    assert code == 4
    assert lines == [
        f"cannot listen on 192.0.2.1:{ports[name]} ({called}): {NOT_OURS}" for name, called in NAMES.items()
    ]


def _low_ports_are_free():
    try:
        return int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) < 1024
    except OSError:
        return False


@linux
@pytest.mark.skipif(_low_ports_are_free(), reason="here everybody may have them")
def test_ports_that_need_a_privilege(mesh, ca_dir):
    ports = {name: port for port, name in enumerate(LISTENERS, 901)}
    words = [word for name, port in ports.items() for word in (f"--{name}", f"127.0.0.1:{port}")]
    result = hbone_of_anybody("node", *words, "--mesh", str(mesh), "--fake-ca", "--ca-dir", str(ca_dir))
    assert result.code == 4
    assert result.err.splitlines() == [
        f"hbone: cannot listen on 127.0.0.1:{ports[name]} ({called}): {NOT_ALLOWED}" for name, called in NAMES.items()
    ]


# === what goes on nevertheless ===


@pytest.fixture(scope="module")
def app():
    with Backend(http_app) as app:
        yield app


@pytest.fixture
def run(ca_dir):
    """Starts nodes and ends them."""
    nodes = []

    def start(*words, **options):
        env = {"FAKE_CA": "true", "XDS_ADDRESS": "", "HBONE_CA_DIR": str(ca_dir), **options.pop("env", {})}
        nodes.append(Node("node", *FREE, *map(str, words), env=env, **options))
        return nodes[-1]

    yield start
    for node in nodes:
        node.__exit__(None, None, None)


@pytest.fixture
def live(app, tmp_path):
    path = tmp_path / "live.yaml"
    path.write_text(MESH.format(port=app.port, vip=VIP))
    return path


def dial(port, host="127.0.0.1"):
    """A connection of an application to the service, or None when there is none to be had.

    Raises:
        ConnectionRefusedError: nobody listens.
    """
    try:
        sock = socket.create_connection((host, port), WAIT)
    except ConnectionResetError:
        return None
    try:
        sock.sendall(b"\5\1\0" + b"\5\1\0\1" + socket.inet_aton(VIP) + b"\0\x50")
        reply = b""
        while len(reply) < 12:
            got = sock.recv(12 - len(reply))
            if not got:
                break
            reply += got
    except OSError:
        reply = b""
    if len(reply) == 12 and reply[3] == 0:
        return sock
    sock.close()
    return None


def get(port, size=5, host="127.0.0.1"):
    """The body of an answer to an application, or None."""
    sock = dial(port, host)
    if sock is None:
        return None
    answer = b""
    with sock, suppress(OSError):
        sock.sendall(f"GET /{size} HTTP/1.1\r\n\r\n".encode())
        sock.shutdown(socket.SHUT_WR)
        while got := sock.recv(65536):
            answer += got
    return answer.partition(b"\r\n\r\n")[2]


#: With so few descriptors as can be had for ever.
FEW = (
    sys.executable,
    "-c",
    "import os, sys; from resource import *; setrlimit(RLIMIT_NOFILE, (64, 64)); os.execv(sys.argv[1], sys.argv[1:])",
)


@linux
def test_no_descriptors_left(run, live):
    """It neither ends nor spins; what there is goes on, and new connections come when there is room again."""
    node = run("--mesh", live, prefix=FEW)
    port = node.port("socks5")
    first = dial(port)
    assert first is not None
    with ExitStack() as stack:
        for _ in range(64):
            sock = stack.enter_context(socket.socket())
            sock.settimeout(WAIT)
            with suppress(OSError):
                sock.connect(("127.0.0.1", port))
                sock.sendall(b"\5\1\0")
        node.log.wait(lambda line: "many open files" in line.lower(), "a line about it")
        first.sendall(b"GET /5 HTTP/1.1\r\n\r\n")
        with first.makefile("rb") as answer:
            assert answer.readline() == b"HTTP/1.1 200 OK\r\n"
        first.close()
    assert any(get(port) == b"".join(pattern(5)) for _ in range(200))
    assert node.stop() == 0
    assert sum("accepting a connection failed" in line for line in node.log.all()) < 10


def start_with(stdout, *words, stderr=subprocess.PIPE, **env):
    variables = {"FAKE_CA": "true", "XDS_ADDRESS": "", **env}
    return subprocess.Popen(
        [*HBONE, "node", *FREE, *map(str, words)],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        env=environment(**variables),
    )


@pytest.mark.parametrize("log_format", ["plain", "json"])
def test_nobody_reads_the_log_any_more(live, ca_dir, log_format):
    """The node goes on serving, and ends well."""
    reader, writer = os.pipe()
    process = start_with(writer, "--json", "--log-format", log_format, "--mesh", live, HBONE_CA_DIR=str(ca_dir))
    os.close(writer)
    said = Lines(process.stderr)
    try:
        line = said.wait(lambda line: '"socks5"' in line, "its port")
        port = int(json.loads(line)["address"].rpartition(":")[2])
        said.wait(lambda line: '"ready"' in line, "ready")
        assert get(port) == b"".join(pattern(5))
        os.close(reader)
        for _ in range(5):
            assert get(port) == b"".join(pattern(5))
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT) == 0
    finally:
        process.kill()
        process.wait(WAIT)
        said.all()


@linux
@pytest.mark.parametrize("closed", [(1,), (2,), (1, 2), (0, 1, 2)], ids=str)
def test_started_without_standard_streams(live, ca_dir, closed):
    """As a careless supervisor does. Descriptors 0 to 2 are then those of our files: no line may get into them."""
    close = "".join(f"os.close({number});" for number in closed)
    start = f"import os, sys; {close} os.execv(sys.argv[1], sys.argv[1:])"
    here = own_loopback(91)
    words = [*FREE, "--mesh", str(live), "--socks5", f"{here}:15080"]
    env = environment(FAKE_CA="true", XDS_ADDRESS="", HBONE_CA_DIR=str(ca_dir))
    process = subprocess.Popen([sys.executable, "-c", start, *HBONE, "node", *words], env=env)
    try:
        while process.poll() is None:
            try:
                if get(15080, host=here) == b"".join(pattern(5)):
                    break
            except ConnectionRefusedError:
                time.sleep(0.01)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT) == 0
    finally:
        process.kill()
        process.wait(WAIT)


# === the beginning ===


@linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_starts(tmp_path, ca_dir, number):
    """Its mesh file never comes to an end: it is still being read."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    process = start_with(subprocess.DEVNULL, "--json", "--mesh", path, HBONE_CA_DIR=str(ca_dir))
    said = Lines(process.stderr)
    try:
        writer = open_when_read(path, process)
        process.send_signal(number)
        assert process.wait(WAIT) == 128 + number
        error = json.loads(said.all()[-1])
        assert (error["kind"], error["exit_code"]) == ("interrupted", 128 + number)
        os.close(writer)
    finally:
        process.kill()
        process.wait(WAIT)


def open_when_read(path, process):
    """The other end of a pipe, once somebody has it open: then it is in the middle of its start."""
    while process.poll() is None:
        try:
            return os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as problem:
            if problem.errno != errno.ENXIO:
                raise
            time.sleep(0.01)
    raise AssertionError("it has ended")
