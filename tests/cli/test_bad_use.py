"""What users get wrong, and peers that are not what they should be: one line each, and an exit code for the cause.

Most cases run in this process, as the command does but for its start; `test_in_a_process` runs some as a shell would.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import ssl
import struct
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from subprocess import PIPE

import pytest
import trio
from click.testing import CliRunner
from support import ours
from support.backends import Backend, echo, own_loopback, refused_port
from support.certs import CLIENT, SERVER
from support.command import HBONE, WAIT, Node, environment, files, hbone, hbone_of_anybody

from hbone import RequestRejected
from hbone_cli import cli

MESH = "is that its HBONE port, and is it of our mesh?"
UP = "is the node up, and is that its HBONE port?"
LISTEN_FORM = "write PORT, ADDRESS:PORT or [IPV6]:PORT"
WE = "say who we are: --cert, --key and --roots, or --ca DIR and --identity spiffe://..."
OTHER_DB = "spiffe://cluster.local/ns/shop/sa/db"


@pytest.fixture(autouse=True)
def _logging_as_it_was():
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def fails(*words):
    """The exit code and the one line of a command that fails."""
    result = CliRunner().invoke(cli, [str(word) for word in words])
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("hbone: ")
    return result.exit_code, line.removeprefix("hbone: ")


# === our own certificate: 3 ===


def material(pki, tmp_path):
    """Files that are wrong in ways that a CA does not make."""
    names = {name: tmp_path / name for name in ("junk", "empty", "encrypted", "none")}
    names["junk"].write_text("junk")
    names["empty"].write_text("")
    from support.mint import key_pem, make

    names["encrypted"].write_bytes(key_pem(make(None).key, password=b"secret"))
    return {**names, "dir": tmp_path, "cert": pki.client.cert, "key": pki.client.key, "roots": pki.client.roots}


FILES = {
    "no_such_certificate": (
        {"cert": "none"},
        "{none}: cannot be read: No such file or directory; check the path and its permissions",
    ),
    "no_such_key": (
        {"key": "none"},
        "{none}: cannot be read: No such file or directory; check the path and its permissions",
    ),
    "no_such_roots": (
        {"roots": "none"},
        "{none}: cannot be read: No such file or directory; check the path and its permissions",
    ),
    "folder": ({"cert": "dir"}, "{dir}: cannot be read: Is a directory; check the path and its permissions"),
    "certificate_not_pem": (
        {"cert": "junk"},
        "{junk}: has no PEM block; give a file with -----BEGIN CERTIFICATE-----",
    ),
    "key_not_pem": (
        {"key": "junk"},
        "{junk}: has no private key in PEM form; give a file with -----BEGIN PRIVATE KEY-----",
    ),
    "roots_empty": ({"roots": "empty"}, "{empty}: has no PEM block; give a file with -----BEGIN CERTIFICATE-----"),
    "swapped": (
        {"cert": "key", "key": "cert"},
        "{key}: has no certificate, but other PEM blocks; were two files swapped?",
    ),
}


@pytest.mark.parametrize(("replaced", "line"), FILES.values(), ids=FILES)
@pytest.mark.parametrize("command", [["connect", "127.0.0.1:80"], ["inbound"], ["outbound", "--socks", "0"]], ids="cio")
def test_wrong_files(pki, tmp_path, command, replaced, line):
    have = material(pki, tmp_path)
    words = {name: have[replaced.get(name, name)] for name in ("cert", "key", "roots")}
    code, said = fails(*command, *(part for name, path in words.items() for part in (f"--{name}", path)))
    assert (code, said) == (3, "certificate: " + line.format(**have))


def test_encrypted_key(pki, tmp_path):
    have = material(pki, tmp_path)
    code, said = fails("inbound", "--cert", have["cert"], "--key", have["encrypted"], "--roots", have["roots"])
    assert code == 3
    assert said.startswith(f"certificate: {have['encrypted']}: ")
    assert "encrypted" in said


not_root = pytest.mark.skipif(
    os.geteuid() == 0 and sys.platform != "linux", reason="only Linux's root can do without its privileges"
)


@not_root
def test_unreadable_key(pki, tmp_path):
    locked = tmp_path / "locked"
    locked.touch(mode=0)
    words = ["--cert", pki.client.cert, "--key", locked, "--roots", pki.client.roots]
    result = hbone_of_anybody("inbound", *map(str, words))
    said = f"hbone: certificate: {locked}: cannot be read: Permission denied; check the path and its permissions"
    assert (result.code, result.line) == (3, said)


CERTIFICATES = {
    "expired": ("expired", "{cert}: it expired at {end:%F %T} UTC; get a new certificate"),
    "not_yet_valid": ("not_yet_valid", "{cert}: it is not valid before {start:%F %T} UTC; check the clock"),
    "ca_flagged": ("ca_flagged", "{cert}: the leaf is a CA certificate; an SVID's leaf must not be one"),
    "signs_others": ("cert_sign", "{cert}: the leaf has the key usage keyCertSign, which is for CAs only"),
    "no_identity": ("no_uri", "{cert}: the leaf has no SPIFFE id: no URI among its subject alternative names"),
    "two_identities": (
        "two_uris",
        "{cert}: the leaf has 2 URIs among its subject alternative names; an SVID has exactly one",
    ),
    "key_of_another": (
        "wrong_key",
        "{key}: is not the key of any certificate in {cert}; give the key that was made with the certificate",
    ),
}


@pytest.mark.parametrize(("kind", "line"), CERTIFICATES.values(), ids=CERTIFICATES)
def test_wrong_certificates(pki, kind, line):
    from hbone.certs import describe

    leaf = getattr(pki, kind)
    (facts,) = describe(leaf.cert)
    expected = line.format(cert=leaf.cert, key=leaf.key, start=facts.not_before, end=facts.not_after)
    assert fails("inbound", *files(leaf)) == (3, f"certificate: {expected}")


def test_roots_of_another_mesh(pki):
    words = ["--cert", pki.client.cert, "--key", pki.client.key, "--roots", pki.foreign_ca.roots]
    said = (
        f"certificate: {pki.foreign_ca.roots}: has no root for {pki.client.cert}, which was signed by "
        "O=cluster.local test root; add that CA's certificate"
    )
    assert fails("inbound", *words) == (3, said)


def test_no_ca(tmp_path):
    words = ["--ca", tmp_path, "--identity", CLIENT]
    said = f"certificate: {tmp_path}: holds no CA (root.pem is missing); create one first"
    assert fails("outbound", "--socks", "0", *words) == (3, said)


# === flags that cannot be read: 2 ===

FLAGS = {
    "no_identity": (["connect", "a:80"], WE),
    "half_of_the_files": (
        ["connect", "a:80", "--cert", "x"],
        "--key and --roots missing: --cert, --key, --roots go together",
    ),
    "ca_without_identity": (["connect", "a:80", "--ca", "x"], "--identity missing: --ca, --identity go together"),
    "two_identities": (
        ["connect", "a:80", "--ca", "x", "{files}"],
        "say who we are in one way: --cert, --key and --roots, or --ca and --identity",
    ),
    "identity_is_none": (
        ["connect", "a:80", "--ca", "x", "--identity", "me"],
        "Invalid value for '--identity': invalid SPIFFE identity 'me': it must start with spiffe://",
    ),
    "no_target": (["connect", "{files}"], "Missing argument 'HOST:PORT'"),
    "target_without_port": (
        ["connect", "10.0.0.1", "{files}"],
        "Invalid value for 'HOST:PORT': '10.0.0.1': the port is missing; write host:port",
    ),
    "target_with_a_name_of_a_port": (
        ["connect", "a:http", "{files}"],
        "Invalid value for 'HOST:PORT': 'a:http': the port is not a plain decimal number",
    ),
    "target_without_brackets": (
        ["connect", "::1:80", "{files}"],
        "Invalid value for 'HOST:PORT': '::1:80': write an IPv6 address in brackets, as in [::1]:80",
    ),
    "two_targets": (["connect", "a:80", "b:80", "{files}"], "Got unexpected extra argument (b:80)"),
    "via_port": (
        ["connect", "a:80", "--via", "1.2.3.4:99999", "{files}"],
        "Invalid value for '--via': '1.2.3.4:99999': the port 99999 is not between 1 and 65535",
    ),
    "expect": (
        ["connect", "a:80", "--expect", "cart", "{files}"],
        "Invalid value for '--expect': invalid SPIFFE identity 'cart': it must start with spiffe://",
    ),
    "listen_without_port": (
        ["inbound", "--listen", "here", "{files}"],
        f"Invalid value for '--listen': 'here': the port is missing; {LISTEN_FORM}",
    ),
    "listen_on_a_name": (
        ["inbound", "--listen", "host.example:1", "{files}"],
        f"Invalid value for '--listen': 'host.example:1': 'host.example' is not an IP address; {LISTEN_FORM}",
    ),
    "listen_port": (
        ["inbound", "--listen", "1.2.3.4:65536", "{files}"],
        f"Invalid value for '--listen': '1.2.3.4:65536': the port 65536 is not between 0 and 65535; {LISTEN_FORM}",
    ),
    "admin": (
        ["inbound", "--admin", "x", "{files}"],
        f"Invalid value for '--admin': 'x': the port is missing; {LISTEN_FORM}",
    ),
    "to": (
        ["inbound", "--to", "80", "{files}"],
        "Invalid value for '--to': '80': the port is missing; write host:port",
    ),
    "allow_target": (
        ["inbound", "--allow-target", "10.0.0.1/8", "{files}"],
        "Invalid value for '--allow-target': '10.0.0.1/8' is not CIDR or CIDR:PORT: 10.0.0.1/8 has host bits set",
    ),
    "allow_target_port": (
        ["inbound", "--allow-target", "10.0.0.0/8:x", "{files}"],
        "Invalid value for '--allow-target': '10.0.0.0/8:x' is not CIDR or CIDR:PORT: 'x' is not a port",
    ),
    "allow_peer": (
        ["inbound", "--allow-peer", "shop", "{files}"],
        "Invalid value for '--allow-peer': invalid SPIFFE identity 'shop': it must start with spiffe://",
    ),
    "to_and_allow_target": (
        ["inbound", "--to", "a:1", "--allow-target", "10.0.0.0/8", "{files}"],
        "--to sends everything to one application: --allow-target has no meaning besides it",
    ),
    "deadline": (
        ["inbound", "--drain-deadline", "-1", "{files}"],
        "Invalid value for '--drain-deadline': -1.0 is not in the range x>=0",
    ),
    "log_format": (
        ["inbound", "--log-format", "xml", "{files}"],
        "Invalid value for '--log-format': 'xml' is not one of 'plain', 'json'",
    ),
    "no_way_in": (
        ["outbound", "{files}"],
        "no way in: give at least one of --capture, --forward, --socks, --http-proxy",
    ),
    "forward_without_target": (
        ["outbound", "--forward", "9000", "{files}"],
        "Invalid value for '--forward': '9000' has no target: write [BIND:]PORT=HOST:PORT, as in 5432=10.0.0.9:5432",
    ),
    "forward_target": (
        ["outbound", "--forward", "9000=db", "{files}"],
        "Invalid value for '--forward': 'db': the port is missing; write host:port",
    ),
    "forward_port": (
        ["outbound", "--forward", "x=db:1", "{files}"],
        f"Invalid value for '--forward': 'x': the port is missing; {LISTEN_FORM}",
    ),
    "socks": (
        ["outbound", "--socks", "http", "{files}"],
        f"Invalid value for '--socks': 'http': the port is missing; {LISTEN_FORM}",
    ),
    "tproxy_alone": (["outbound", "--socks", "0", "--tproxy", "{files}"], "--tproxy is for --capture"),
    "shell": (
        ["completion", "tcsh"],
        "Invalid value for '{{bash|zsh|fish}}': 'tcsh' is not one of 'bash', 'zsh', 'fish'",
    ),
}


@pytest.mark.parametrize(("words", "line"), FLAGS.values(), ids=FLAGS)
def test_flags(pki, words, line):
    given = [part for word in words for part in (files(pki.client) if word == "{files}" else [word])]
    assert fails(*given) == (2, f"{line.replace('{{', '{').replace('}}', '}')}; see: hbone {words[0]} --help")


@pytest.mark.parametrize("words", [["wat"], ["inbound", "--wat"], ["ca", "wat"]])
def test_no_such_thing(words):
    code, said = fails(*words)
    assert code == 2
    assert said.startswith("No such ")
    assert said.endswith(" --help")


# === ports that cannot be had: 4 ===

TAKEN = "address already in use; the port is taken; choose another one, or find who has it with: ss -ltnp"
NOT_OURS = (
    "cannot assign requested address; the address is not one of this machine; choose one that is, or 0.0.0.0 for all"
)
LISTENERS = {
    "inbound": ["inbound", "--listen", "{}"],
    "admin": ["inbound", "--listen", "127.0.0.1:0", "--admin", "{}"],
    "capture": ["outbound", "--capture", "--listen", "{}"],
    "forward": ["outbound", "--forward", "{}=10.0.0.1:80"],
    "socks": ["outbound", "--socks", "{}"],
    "http-proxy": ["outbound", "--http-proxy", "{}"],
}


def fails_after_events(*words):
    """As `fails`, of a node that may have opened other ports before."""
    result = CliRunner().invoke(cli, [*map(str, words), "--json"])
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    *before, last = map(json.loads, result.stderr.splitlines())
    assert {event["event"] for event in before} <= {"listening", "warning"}
    assert (last["event"], last["exit_code"]) == ("error", result.exit_code)
    return result.exit_code, last["message"]


@pytest.mark.parametrize(("way", "words"), LISTENERS.items(), ids=LISTENERS)
@pytest.mark.parametrize(
    ("address", "why"), [("127.0.0.1:{}", TAKEN), ("192.0.2.1:{}", NOT_OURS)], ids=["busy", "away"]
)
def test_ports(pki, way, words, address, why):
    with socket.create_server(("127.0.0.1", 0)) as busy:
        where = address.format(busy.getsockname()[1])
        code, said = fails_after_events(*(word.format(where) for word in words), *files(pki.client))
    assert (code, said) == (4, f"cannot listen on {where} ({way}): {why}")


def first_free_port():
    """The first port that needs no privilege: Linux can be told, and some containers have no privileged ones."""
    told = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
    return int(told.read_text()) if told.exists() else 1024


@not_root
@pytest.mark.skipif(first_free_port() < 2, reason="no port needs a privilege here")
def test_privileged_port(pki):
    result = hbone_of_anybody("inbound", "--listen", "127.0.0.1:1", *files(pki.client))
    assert (result.code, "choose a higher one" in result.line) == (4, True)


# === a next hop that is not there: 5 ===


def connect(pki, via, *more, leaf=None, target="10.0.0.1:80"):
    return fails("connect", target, "--via", via, *files(leaf or pki.client), *more)


def test_next_hop_refuses(pki):
    with refused_port() as port:
        where = f"127.0.0.1:{port}"
        said = f"cannot connect: connecting to {where} failed: connection refused (nothing listens there); {UP}"
        assert connect(pki, where) == (5, said)


def test_next_hop_is_the_target_by_default(pki):
    host = own_loopback(77)
    with socket.socket() as sock:  # nobody gets this address's port while we hold it
        sock.bind((host, 15008))
        said = f"cannot connect: connecting to {host}:15008 failed: connection refused (nothing listens there); {UP}"
        assert fails("connect", f"{host}:80", *files(pki.client)) == (5, said)


def test_next_hop_is_unreachable(pki):
    said = f"cannot connect: connecting to 255.255.255.255:15008 failed: network is unreachable; {UP}"
    code, line = connect(pki, "255.255.255.255")
    assert (code, line.replace("permission denied", "network is unreachable")) == (5, said)


def test_next_hop_has_no_such_name(pki):
    code, said = connect(pki, "nosuch.invalid")
    assert code == 5
    assert said.startswith("cannot connect: nosuch.invalid does not resolve: ")
    assert said.endswith("; check the name, or use an address")


# === a next hop that is something else: 8, somebody else: 6, or does not want us: 7 ===


def says(data):
    """Answers whatever comes with `data`."""

    def habit(sock, seen):
        sock.recv(65_536)
        sock.sendall(data)
        while sock.recv(65_536):
            pass

    return habit


def tls(leaf, context=None, answer=b""):
    """The server's side of a TLS handshake with `leaf`; then reads, answers, and ends."""

    def habit(sock, seen):
        try:
            with (context or leaf.server_context()).wrap_socket(sock, server_side=True) as stream:
                stream.recv(65_536)
                if answer:
                    stream.sendall(answer)
                    while stream.recv(65_536):
                        pass
        except ssl.SSLError:
            pass

    return habit


def tls12(leaf):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(leaf.cert, leaf.key)
    return tls(leaf, context)


def http1(leaf):
    return tls(leaf, leaf.server_context(alpn=["http/1.1"]), b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")


NOT_TLS = "TLS handshake failed: what arrived is not TLS: the peer speaks plain text, or is not there for HBONE"
PEERS = {
    "plain_text": (lambda pki: says(b"220 mail.example ESMTP\r\n"), NOT_TLS),
    "plain_http": (lambda pki: says(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"), NOT_TLS),
    "tls12": (lambda pki: tls12(pki.server), "TLS handshake failed: the peer does not speak TLS 1.3"),
    "http1_in_tls": (
        lambda pki: http1(pki.server),
        "the peer does not speak HTTP/2 as it should: the peer answered in HTTP/1, not HTTP/2",
    ),
    "foreign_ca": (
        lambda pki: tls(pki.foreign_server),
        "we do not accept the peer's certificate: its root is not one of ours (certificate 2 of its chain)",
    ),
    "expired": (lambda pki: tls(pki.expired), "we do not accept the peer's certificate: it has expired"),
    "ca_flagged": (
        lambda pki: tls(pki.ca_flagged),
        "we do not accept the peer's certificate: it is a CA certificate; an SVID's leaf must not be one",
    ),
    "no_identity": (
        lambda pki: tls(pki.no_uri),
        "we do not accept the peer's certificate: it has no SPIFFE id: no URI among its subject alternative names",
    ),
    "other_trust_domain": (
        lambda pki: tls(pki.other_trust_domain),
        "the peer claims to be spiffe://elsewhere.example/ns/shop/sa/cart, but we have no roots for trust domain "
        "elsewhere.example; federate with it to talk to its workloads",
    ),
}


@pytest.mark.parametrize(("peer", "why"), PEERS.values(), ids=PEERS)
def test_peers(pki, peer, why):
    with Backend(peer(pki)) as there:
        assert connect(pki, there.target) == (8, f"no session with {there.target}: {why}; {MESH}")


def test_peer_closes_at_once(pki):
    with Backend(lambda sock, seen: None) as there:
        code, said = connect(pki, there.target)
    assert code == 8
    assert said.startswith(f"no session with {there.target}: the ")
    assert "during the TLS handshake" in said


def test_peer_is_somebody_else(pki, near):
    where = near.address()
    said = (
        f"wrong peer at {where}: peer is {SERVER}, expected {OTHER_DB}; if that is who you want, say so with --expect"
    )
    assert connect(pki, where, "--expect", OTHER_DB) == (6, said)


def test_peer_does_not_know_our_root(pki):
    untrusting = pki.ca.issue("untrusting", [SERVER], roots=pki.foreign_ca.roots)
    with Backend(tls(untrusting)) as there:
        code, said = connect(pki, there.target)
    assert code == 7
    # What is in between is the alert, unless TCP's reset was quicker.
    assert said.startswith(
        f"refused by {there.target}: the peer refused our certificate or identity (it closed before "
    )
    assert said.endswith("); check that it trusts our root and accepts our trust domain")


def test_our_node_does_not_know_a_foreign_root(pki, near):
    where = near.address()
    code, said = connect(pki, where, leaf=pki.foreign)
    assert code == 7
    assert said.startswith(f"refused by {where}: the peer refused our certificate or identity (")


# === a node that gives no tunnel: 9, 10, 11, 12; or breaks one: 13 ===


def test_denied(pki, near):
    said = (
        "no tunnel: tunnel to 127.0.0.1:80 refused with status 401: the peer's authorization policy does not allow our "
        "identity; ask its operator to allow our identity"
    )
    assert connect(pki, near.address(), leaf=pki.other, target="127.0.0.1:80") == (9, said)


def test_bad_target(pki, near):
    said = (
        "no tunnel: tunnel to 10.0.0.1:80 refused with status 400: the peer does not serve this target; "
        "check the target, and that this is its node"
    )
    assert connect(pki, near.address()) == (10, said)


def test_unreachable_target(pki, near):
    with refused_port() as port:
        said = (
            f"no tunnel: tunnel to 127.0.0.1:{port} refused with status 503: the peer could not connect to the target; "
            "is the application up, and at that port?"
        )
        assert connect(pki, near.address(), target=f"127.0.0.1:{port}") == (11, said)


@pytest.fixture(scope="module")
def odd(pki):
    """A server whose answer depends on the port that is asked for."""

    async def handler(request):
        if request.target.port == 429:
            raise RequestRejected(429)
        tunnel = await request.accept()
        await tunnel.send_all(b"half of it")
        tunnel.abort()

    with serving_in_thread(handler, pki.server) as port:
        yield f"127.0.0.1:{port}"


class serving_in_thread:  # noqa: N801 - used as a function
    def __init__(self, handler, leaf):
        self._handler, self._leaf = handler, leaf
        self._started = threading.Event()

    def __enter__(self):
        self._thread = threading.Thread(target=trio.run, args=(self._main,))
        self._thread.start()
        assert self._started.wait(WAIT)
        return self._port

    async def _main(self):
        async with trio.open_nursery() as nursery:
            self._token, self._scope = trio.lowlevel.current_trio_token(), nursery.cancel_scope
            server = ours.HBONEServer(ours.svid(self._leaf), self._handler)
            self._port = (await nursery.start(server.serve, "127.0.0.1", 0)).port
            self._started.set()

    def __exit__(self, *exc):
        self._token.run_sync_soon(self._scope.cancel)
        self._thread.join(WAIT)


def test_another_status(pki, odd):
    said = (
        "no tunnel: tunnel to 127.0.0.1:429 refused with status 429: the peer refused the tunnel; "
        "the peer's log says why"
    )
    assert connect(pki, odd, target="127.0.0.1:429") == (12, said)


def test_a_tunnel_that_breaks(pki, odd):
    words = [*HBONE, "connect", "127.0.0.1:1", "--via", odd, *files(pki.client)]
    with subprocess.Popen(words, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=environment()) as process:
        assert process.stdout.read() == b"half of it"  # while the input goes on
        assert process.wait(WAIT) == 13
        assert process.stderr.read() == b"hbone: tunnel broken: the peer reset the tunnel: CANCEL\n"


# === as a shell sees it ===

PROCESSES = {
    "usage": (["outbound", "{files}"], 2, "no way in"),
    "certificate": (["inbound", "--cert", "none.pem", "--key", "k", "--roots", "r"], 3, "none.pem"),
    "listen": (["inbound", "--listen", "192.0.2.1:0", "{files}"], 4, "192.0.2.1:0"),
    "connect": (["connect", "a.invalid:1", "{files}"], 5, "a.invalid"),
}


@pytest.mark.parametrize(("words", "code", "part"), PROCESSES.values(), ids=PROCESSES)
def test_in_a_process(pki, words, code, part):
    given = [one for word in words for one in (files(pki.client) if word == "{files}" else [word])]
    result = hbone(*given)
    assert (result.code, result.out) == (code, b"")
    assert result.line.startswith("hbone: ")
    assert part in result.line
    error = json.loads(hbone(*given, "--json").line)
    assert (error["event"], error["exit_code"], f"hbone: {error['message']}") == ("error", code, result.line)


# === what is allowed, and worth a word ===


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["--socks", "0.0.0.0:0"], "--socks 0.0.0.0:0"),
        (["--http-proxy", "[::]:0"], "--http-proxy [::]:0"),
        (["--forward", "0.0.0.0:0=10.0.0.1:80"], "--forward 0.0.0.0:0"),
    ],
)
def test_warning_about_open_proxies(pki, words, option):
    with Node.outbound(pki.client, *words) as node:
        assert node.event("warning")["message"] == (
            f"{option}: whoever reaches it goes through the mesh in our name; 127.0.0.1 keeps it to this machine"
        )
        assert node.stop() == 0


def test_no_warning_about_the_loopback(pki):
    words = ["--socks", "0", "--http-proxy", "127.0.0.1:0", "--forward", "[::1]:0=10.0.0.1:80"]
    with Node.outbound(pki.client, *words) as node:
        assert node.stop() == 0
        assert "warning" not in {json.loads(line)["event"] for line in node.said.all()}


# === proxies outlive bad next hops, and tell the application ===


def ask_socks(port, target_port):
    with socket.create_connection(("127.0.0.1", port), WAIT) as sock:
        sock.sendall(b"\x05\x01\x00")
        assert sock.recv(2) == b"\x05\x00"
        sock.sendall(b"\x05\x01\x00\x01" + socket.inet_aton("127.0.0.1") + struct.pack("!H", target_port))
        return sock.recv(10)[1]


def ask_http(port, target_port):
    with socket.create_connection(("127.0.0.1", port), WAIT) as sock:
        sock.sendall(f"CONNECT 127.0.0.1:{target_port} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        return int(sock.recv(4096).split()[1])


def is_reset(port):
    try:
        with socket.create_connection(("127.0.0.1", port), WAIT) as sock:  # may already be reset when it is made
            return sock.recv(1) and False
    except ConnectionResetError:
        return True


HOPS = {
    "refuses_connections": (None, {}, "connection refused", 0x05, 502),
    "plain_text": (lambda pki: says(b"220 mail.example ESMTP\r\n"), {}, "not TLS", None, 502),
    "tls12": (lambda pki: tls12(pki.server), {}, "does not speak TLS 1.3", None, 502),
    "http1": (lambda pki: http1(pki.server), {}, "HTTP/1", None, 502),
    "foreign": (lambda pki: tls(pki.foreign_server), {}, "we do not accept the peer's certificate", None, 502),
    "denies": ("near", {"leaf": "other"}, "status 401", 0x02, 403),
    "unreachable": ("near", {}, "status 503", 0x05, 503),
    "somebody_else": ("near", {"words": ["--expect", OTHER_DB]}, f"expected {OTHER_DB}", 0x01, 502),
}


@pytest.mark.parametrize(("peer", "options", "why", "socks", "http"), HOPS.values(), ids=HOPS)
def test_outbound_lives_on(pki, near, peer, options, why, socks, http):
    with ExitStack() as stack:
        target = stack.enter_context(refused_port())
        if peer is None:
            via = f"127.0.0.1:{stack.enter_context(refused_port())}"
        elif peer == "near":
            via = near.address()
        else:
            via = stack.enter_context(Backend(peer(pki))).target
        words = ["--via", via, "--socks", "0", "--http-proxy", "0", "--forward", f"0=127.0.0.1:{target}"]
        leaf = getattr(pki, options.get("leaf", "client"))
        node = stack.enter_context(Node.outbound(leaf, *words, *options.get("words", [])))
        reply = ask_socks(node.port("socks"), target)
        assert reply == socks if socks is not None else reply in (0x01, 0x04)
        assert ask_http(node.port("http-proxy"), target) == http
        assert is_reset(node.port("forward"))
        assert node.process.poll() is None
        assert node.stop() == 0
        lines = node.log.all()
        assert len(lines) == 3
        assert all(why in line for line in lines), lines


def test_inbound_lives_on(pki):
    with Backend(echo) as app, Node.inbound(pki.server, "--to", app.target, "-v") as node:
        with socket.create_connection(("127.0.0.1", node.port()), WAIT) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
            node.event("log")
        log = node.event("log")
        assert "no session with 127.0.0.1:" in log["message"]
        assert "plain HTTP" in log["message"]
        result = hbone("connect", app.target, "--via", node.address(), *files(pki.client), input=b"still there")
        assert (result.code, result.out) == (0, b"still there")
        assert node.stop() == 0
