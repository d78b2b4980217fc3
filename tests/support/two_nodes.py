"""Two ``hbone node`` processes that do what was recorded of two ztunnels: see `support.ztunnel`.

with on_loopback(tmp_path) as two:
    two.make(CONNECTIONS)
    check(two.stop(), DIFFERENCES)

`on_loopback` is for everybody: applications are on loopback addresses, and connect through SOCKS. In network namespaces
connections are captured; that is in the tests that need it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
import socket
import time
import urllib.request
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from support.backends import Backend, echo, own_loopback
from support.command import WAIT, Node
from support.likeness import Said, access_lines
from support.ztunnel import ADDRESSES, MESH, PORTS, REQUEST

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from support.backends import Seen
    from support.ztunnel import Connection

__all__ = ["TwoNodes", "ask", "environment_of", "on_loopback", "written"]

OPENMETRICS = "application/openmetrics-text"
PLAIN = "text/plain"
#: How the kernel says that the other side has reset a connection: the last one is what shutdown() makes of it.
RESET = (errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN)


def environment_of(node: str, folder: Path, log_format: str) -> dict[str, str]:
    """What a node was told when it was recorded."""
    workload = {"a": "shop/a/cart", "b": "shop/b/stock"}[node]
    return {
        "XDS_ADDRESS": "",
        "LOCAL_XDS_PATH": str(folder / "mesh.json"),
        "FAKE_CA": "true",
        "HBONE_CA_DIR": str(folder / "ca"),
        "PROXY_MODE": "dedicated",
        "PROXY_WORKLOAD_INFO": workload,
        "NODE_NAME": f"n{node}",
        "ENABLE_ORIG_SRC": "false",
        "LOG_FORMAT": log_format,
        "RUST_LOG": "info",
    }


def is_access(line: str) -> bool:
    return "\taccess\t" in line or '"scope":"access"' in line


@dataclass(kw_only=True)
class TwoNodes:
    """Both, and how to reach them."""

    nodes: Mapping[str, Node]
    fetch: Callable[[str, str, str, str], str]
    """A page: of which node, at which listener, its path, and the value of Accept."""
    connect: Callable[[str], bytes | None]
    """As the application: sends the request, gives the answer, or None for a reset or a refusal."""
    log_format: str = "plain"
    names: Mapping[str, str] = field(default_factory=dict)
    ports: Mapping[int, int] = field(default_factory=dict)

    def make(self, connections: Iterable[Connection]) -> list[bytes | None]:
        """One after the other: each is over, and told on each node that tells it, before the next one begins."""
        answers = []
        for number, connection in enumerate(connections, 1):
            answers.append(self.connect(connection.target))
            for name, node in self.nodes.items():
                lines = min(number, len(access_lines(name)))
                node.log.wait_number(is_access, lines, f"access lines of {name} after {connection.name}")
        return answers

    def metrics(self, node: str, accept: str = OPENMETRICS) -> str:
        """A scrape, once the last connection has let go of its socket."""
        ending = time.monotonic() + WAIT
        while True:
            text = self.fetch(node, "stats", "/metrics", accept)
            if re.search(r'^istio_tcp_sockets_open\{reporter="source"\} 0', text, re.MULTILINE):
                return text
            assert time.monotonic() < ending, "a socket stays open"
            time.sleep(0.01)

    def stop(self) -> dict[str, Said]:
        """End both; gives all that they showed until then."""
        pages = {name: (self.metrics(name), self.fetch(name, "admin", "/config_dump", "*/*")) for name in self.nodes}
        said = {}
        for name, node in self.nodes.items():
            assert node.stop() == 0
            metrics, dump = pages[name]
            said[name] = Said(
                log=node.log.all(),
                metrics=metrics,
                dump=dump,
                log_format=self.log_format,
                names=self.names,
                ports=self.ports,
            )
        return said


def ask(sock: socket.socket) -> bytes | None:
    """What an application does with its connection."""
    answer = b""
    try:
        sock.sendall(REQUEST)
        sock.shutdown(socket.SHUT_WR)
        while got := sock.recv(65536):
            answer += got
    except OSError as problem:
        if problem.errno in RESET:
            return None
        raise
    return answer


def written(value: Any, names: Mapping[str, str], ports: Mapping[int, int]) -> Any:
    """The mesh with other addresses and ports."""
    if isinstance(value, dict):
        return {key: written(one, names, ports) for key, one in value.items()}
    if isinstance(value, list):
        return [written(one, names, ports) for one in value]
    return names.get(value, value) if isinstance(value, str) else ports.get(value, value)


# === on loopback addresses ===


def _fetch(url: str, accept: str) -> str:
    request = urllib.request.Request(url, headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=WAIT) as answer:
        text: str = answer.read().decode()
        return text


def _socks(port: int, target: str) -> bytes | None:
    host, _, target_port = target.rpartition(":")
    with socket.create_connection(("127.0.0.1", port), WAIT) as sock:
        sock.sendall(b"\5\1\0" + b"\5\1\0\1" + socket.inet_aton(host) + int(target_port).to_bytes(2, "big"))
        reply = b""
        while len(reply) < 12:
            got = sock.recv(12 - len(reply))
            assert got
            reply += got
        return ask(sock) if reply[3] == 0 else None


def _bound(stack: contextlib.ExitStack, host: str) -> int:
    """A port at which nobody listens, and nobody will."""
    sock = stack.enter_context(socket.socket())
    sock.bind((host, 0))
    port: int = sock.getsockname()[1]
    return port


@contextlib.contextmanager
def on_loopback(
    folder: Path, *, log_format: str = "plain", habit: Callable[[socket.socket, Seen], None] = echo
) -> Iterator[TwoNodes]:
    """Both nodes on free ports: ``a`` is 127.0.0.1, from where we connect; the others are addresses of our own."""
    hosts = {"a": "127.0.0.1", "b": own_loopback(74), "db": own_loopback(75)}
    with contextlib.ExitStack() as stack:
        app, db = (stack.enter_context(Backend(habit, host=hosts[name])) for name in ("b", "db"))
        ports = dict(zip(PORTS, (app.port, _bound(stack, hosts["b"]), _bound(stack, hosts["b"])), strict=True))
        places = {f"{ADDRESSES['b']}:{there}": f"{hosts['b']}:{here}" for there, here in ports.items()}
        places[f"{ADDRESSES['db']}:7001"] = f"{hosts['db']}:{db.port}"
        places[f"{ADDRESSES['db']}:7999"] = f"{hosts['db']}:{_bound(stack, hosts['db'])}"
        names = {ADDRESSES[name]: host for name, host in hosts.items()} | {"10.77.0.0/24": "127.0.0.0/8"}
        (folder / "mesh.json").write_text(json.dumps(written(MESH, names, ports)))

        def start(name: str, *words: str) -> Node:
            free = [f"--{what}={hosts[name]}:0" for what in ("outbound", "plaintext", "inbound", "stats", "readiness")]
            free += ["--socks5=127.0.0.1:0", "--admin=127.0.0.1:0"]
            env = environment_of(name, folder, log_format)
            return stack.enter_context(Node("node", *free, *words, env=env))

        b = start("b", "--hbone-port=0")
        a = start("a", f"--hbone-port={b.port('inbound')}")
        nodes = {"a": a, "b": b}
        places[f"{ADDRESSES['b']}:15008"] = b.address("inbound")
        yield TwoNodes(
            nodes=nodes,
            fetch=lambda name, way, path, accept: _fetch(f"http://{nodes[name].address(way)}{path}", accept),
            connect=lambda target: _socks(a.port("socks5"), places.get(target, target)),
            log_format=log_format,
            names={here: there for there, here in (*places.items(), *names.items())},
            ports={here: there for there, here in ports.items()},
        )
