"""Nodes as processes, on the mesh of an example: its addresses and ports become ones that are free on this machine.

with Member.begin(directory, mesh, "--mode", "dedicated", "--workload", "shop/cart-0/cart") as near:
    near.event("ready")
    with near.dial("stock.shop.svc.cluster.local", 80) as sock: ...
    near.line(direction="outbound")
"""

from __future__ import annotations

import json
import re
import socket
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client.parser import text_string_to_metric_families

from support.command import WAIT, Node

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["EXAMPLES", "Member", "Refused", "localized", "socks5"]

EXAMPLES = Path(__file__).parents[2] / "examples"

_LISTENERS = ("outbound", "plaintext", "inbound", "http-proxy", "admin", "readiness")


def localized(example: str, names: Mapping[str, object]) -> str:
    """The text of an example, with other addresses, ports and paths."""
    pattern = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    text = (EXAMPLES / example).read_text()
    return re.sub(rf"(?<![\w.])(?:{pattern})(?!\w)", lambda found: str(names[found[0]]), text)


class Refused(Exception):
    """The SOCKS5 proxy said no; with its code."""


def socks5(proxy_port: int, host: str, port: int) -> socket.socket:
    """A connection to an address or a name by way of a proxy on this machine.

    Raises:
        Refused: the answer is no.
    """
    sock = socket.create_connection(("127.0.0.1", proxy_port), WAIT)
    try:
        name = host.encode()
        sock.sendall(b"\5\1\0\5\1\0\3" + bytes([len(name)]) + name + port.to_bytes(2, "big"))
        reply = b""
        while len(reply) < 12:
            chunk = sock.recv(12 - len(reply))
            if not chunk:
                raise Refused(f"closed after {reply!r}")
            reply += chunk
        if reply[3]:
            raise Refused(reply[3])
    except BaseException:
        sock.close()
        raise
    return sock


class Member(Node):
    """``hbone node`` with nothing but a SOCKS5 proxy and metrics, unless told otherwise."""

    @classmethod
    def begin(cls, ca_dir: Path, mesh: Path, *words: str) -> Member:
        """Start one with the CA in a directory, and do not wait until it is ready."""
        told = [word.partition("=")[0] for word in words]
        off = [word for name in _LISTENERS if f"--{name}" not in told for word in (f"--{name}", "off")]
        free = ["--socks5", "127.0.0.1:0", "--stats", "127.0.0.1:0", "--log-format", "json"]
        env = {"FAKE_CA": "true", "XDS_ADDRESS": "", "HBONE_CA_DIR": str(ca_dir), "LOCAL_XDS_PATH": str(mesh)}
        return cls("node", *off, *free, *words, "--json", env=env, json_lines=False)

    def __init__(self, *words: str, **options: Any) -> None:
        self._taken: set[int] = set()
        super().__init__(*words, **options)

    def dial(self, host: str, port: int) -> socket.socket:
        """As an application does; see `socks5`."""
        return socks5(self.port("socks5"), host, port)

    def line(self, **wanted: object) -> dict[str, Any]:
        """The next line of the access log that has these fields (``_`` for their dots); each is given once."""
        fields = {name.replace("_", ".", 1): value for name, value in wanted.items()}

        def fits(text: str) -> bool:
            line = json.loads(text)
            return line.get("scope") == "access" and all(line.get(name) == value for name, value in fields.items())

        def take() -> int | None:
            lines = self.log.now
            return next((at for at, text in enumerate(lines) if at not in self._taken and fits(text)), None)

        self.log.wait(lambda _: take() is not None, f"an access line with {fields}")
        at = take()
        assert at is not None
        self._taken.add(at)
        line: dict[str, Any] = json.loads(self.log.now[at])
        return line

    def forget_lines(self) -> None:
        """Those of all connections until now are of no interest: waits until each has ended, and has its line."""
        ending = time.monotonic() + WAIT
        while (ended := self.total("istio_tcp_connections_closed_total")) < self.total(
            "istio_tcp_connections_opened_total"
        ):
            assert time.monotonic() < ending, "a connection stays open"
            time.sleep(0.01)
        self.log.wait_number(lambda text: json.loads(text).get("scope") == "access", int(ended), "access lines")
        self._taken.update(range(len(self.log.now)))

    def scrape(self) -> Counter[tuple[tuple[str, str], ...]]:
        """All of ``/metrics``: how much by name and labels, as sorted pairs; the name is the label ``""``."""
        with urllib.request.urlopen(f"http://{self.address('stats')}/metrics", timeout=WAIT) as answer:
            text = answer.read().decode()
        counts: Counter[tuple[tuple[str, str], ...]] = Counter()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                counts[tuple(sorted({"": sample.name, **sample.labels}.items()))] += sample.value
        return counts

    def total(self, name: str, **labels: str) -> float:
        """The sum of a metric over all label sets that have these labels."""
        wanted = {"": name, **labels}.items()
        return sum(value for facts, value in self.scrape().items() if wanted <= dict(facts).items())
