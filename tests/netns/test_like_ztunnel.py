"""Two nodes in two network namespaces tell of captured connections what ztunnel tells of them: everything.

See `support.ztunnel`, and `support.differences` for what they tell otherwise.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import urllib.request
from typing import TYPE_CHECKING

import pytest
from support.backends import Backend, echo
from support.command import WAIT, Node
from support.differences import DIFFERENCES
from support.likeness import check
from support.namespaces import made_namespace, skip_unless_possible
from support.two_nodes import TwoNodes, ask, environment_of
from support.ztunnel import ADDRESSES, CONNECTIONS, MESH, REQUEST

from hbone.transport import set_mark

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.namespaces import Namespace

if sys.platform != "linux":
    pytest.skip("network namespaces are for Linux", allow_module_level=True)

skip_unless_possible()

pytestmark = pytest.mark.netns

#: What tells the application's connections from those of the node, which has no mark, as it was recorded.
APPLICATION = 0x7
PORTS = {"admin": 15000, "stats": 15020}


@pytest.fixture(scope="module")
def namespaces() -> Iterator[dict[str, Namespace]]:
    with made_namespace("like-a", "ip link set lo up") as a, made_namespace("like-b", "ip link set lo up") as b:
        a.run(f"ip link add eth0 type veth peer name eth0 netns {b.name}")
        for namespace, addresses in ((a, ("a",)), (b, ("b", "db"))):
            for name in addresses:
                namespace.run(f"ip address add {ADDRESSES[name]}/24 dev eth0")
            namespace.run("ip link set eth0 up")
        a.run("ip route add 10.96.0.0/16 dev eth0")
        a.run(f"iptables -w -t nat -A OUTPUT -p tcp -m mark --mark {APPLICATION} -j REDIRECT --to-ports 15001")
        yield {"a": a, "b": b}


@contextlib.contextmanager
def captured(namespaces: dict[str, Namespace], folder: Path, log_format: str) -> Iterator[TwoNodes]:
    """Both nodes, with the ports that they have unless told otherwise."""
    (folder / "mesh.json").write_text(json.dumps(MESH))

    def fetch(name: str, way: str, path: str, accept: str) -> str:
        request = urllib.request.Request(f"http://127.0.0.1:{PORTS[way]}{path}", headers={"Accept": accept})

        def get() -> str:
            with urllib.request.urlopen(request, timeout=WAIT) as answer:
                text: str = answer.read().decode()
                return text

        return namespaces[name].call(get)

    def connect(target: str) -> bytes | None:
        host, _, port = target.rpartition(":")

        def dial() -> bytes | None:
            with socket.socket() as sock:
                set_mark(sock, APPLICATION)
                sock.settimeout(WAIT)
                try:
                    sock.connect((host, int(port)))
                except ConnectionResetError:  # as soon as it was captured
                    return None
                return ask(sock)

        return namespaces["a"].call(dial)

    with contextlib.ExitStack() as stack:
        for name in ("b", "db"):
            app = namespaces["b"].call(lambda host=ADDRESSES[name]: Backend(echo, host=host, port=7001))
            stack.enter_context(app)
        nodes = {}
        for name, namespace in namespaces.items():
            prefix = ("ip", "netns", "exec", namespace.name)
            env = environment_of(name, folder, log_format)
            nodes[name] = stack.enter_context(Node("node", json_lines=False, env=env, prefix=prefix))
        for node in nodes.values():
            node.log.wait(lambda line: "marking server ready" in line, "a node that is ready")
        yield TwoNodes(nodes=nodes, fetch=fetch, connect=connect, log_format=log_format)


@pytest.mark.parametrize("log_format", ["plain", "json"])
def test_captured(namespaces: dict[str, Namespace], tmp_path: Path, log_format: str) -> None:
    with captured(namespaces, tmp_path, log_format) as two:
        answers = two.make(CONNECTIONS)
        assert answers == [REQUEST if one.sees == "11 bytes" else None for one in CONNECTIONS]
        check(two.stop(), DIFFERENCES)
