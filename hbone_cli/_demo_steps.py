"""What ``hbone demo`` does, step by step, each step with its own assertions; nothing here prints.

::

    client ── SOCKS5, HTTP CONNECT ──▶ node a ══ HBONE, mutual TLS ══▶ node b ── TCP ──▶ application

Both nodes are ``hbone node``, and know of each other what the mesh file says. The client names a service, never a node
or the application.
"""

from __future__ import annotations

import dataclasses
import hashlib
import http.client
import json
import re
import socket
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from hbone_cli._demo_app import pattern
from hbone_cli._demo_children import Child, ChildFailed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hbone import LocalCA, Svid

__all__ = ["CONNECTIONS", "HOSTNAME", "TUNNELS", "VIP", "Demo", "DemoFailed", "Route", "Show", "Step"]

#: How many connections are opened and closed.
CONNECTIONS: Final = 200
#: How many there are by way of both nodes: two requests, two transfers, one that policy closes and one after that.
TUNNELS: Final = CONNECTIONS + 6

HOSTNAME: Final = "web.shop.svc.cluster.local"
#: Nobody listens there: it is a name, too.
VIP: Final = "10.96.0.80"

_LOOPBACK: Final = "127.0.0.1"
#: Where the application and its node are: not where the client is, so that the nodes can tell them apart. Not every
#: system has more than one IPv4 loopback address.
_ADDRESSES: Final = ("127.0.0.2", _LOOPBACK)
_DOMAIN: Final = "spiffe://cluster.local/ns"
A: Final = f"{_DOMAIN}/shop/sa/cart"
B: Final = f"{_DOMAIN}/shop/sa/web"
STRANGER: Final = f"{_DOMAIN}/bank/sa/teller"

_MESH: Final = """\
# The mesh of this demo: both nodes read it, and take over what changes.
workloads:
- name: cart-0
  namespace: shop
  serviceAccount: cart
  workloadIps: ["127.0.0.1"]
  protocol: HBONE
  workloadName: cart
  workloadType: deployment
  services: {{}}
- name: web-0
  namespace: shop
  serviceAccount: web
  workloadIps: ["{host}"]
  protocol: HBONE
  workloadName: web
  workloadType: deployment
  services:
    shop/{hostname}: {{80: {port}}}

services:
- name: web
  namespace: shop
  hostname: {hostname}
  vips: ["/{vip}"]
  ports: {{80: {port}}}

policies:
- name: not-the-bank
  namespace: shop
  scope: Namespace
  action: Deny
  dryRun: false
  rules:
  - - - namespaces: [!Exact bank]
"""
_CLOSED: Final = """
- name: closed-today
  namespace: shop
  scope: Namespace
  action: Deny
  dryRun: false
  rules:
  - - - notPrincipals: [!Exact cluster.local/ns/shop/sa/nobody]
"""

#: Seconds without any progress after which a step has failed.
_PATIENCE: Final = 20.0
#: Seconds in which the last tunnels close, before we believe the counters.
_SETTLE: Final = 20.0
_READ: Final = 1 << 20


class DemoFailed(Exception):
    """A step did not do what it should.

    Attributes:
        step: its title.
        why: what happened instead.
    """

    def __init__(self, step: str, why: str) -> None:
        super().__init__(f"{step}: {why}")
        self.step = step
        self.why = why


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One thing that was tried and did what it should.

    Attributes:
        name: for machines.
        title: for people.
        result: for people.
        facts: for machines.
    """

    name: str
    title: str
    result: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """The way of a byte, with the facts of the live session."""

    service: str
    outbound: str
    inbound: str
    application: str
    source: str
    """Identity of node a, as node b saw it proved."""
    destination: str
    """Identity of node b, as node a saw it proved."""
    tls_version: str
    group: str | None
    cipher: str


class Show(Protocol):
    """Who is told how it goes."""

    def begins(self, title: str, size: int | None = None) -> None:
        """A step begins; it moves `size` bytes."""

    def moved(self, done: int) -> None:
        """So many bytes of the step's are through; called from its thread, often."""

    def ended(self, step: Step) -> None:
        """A step did what it should."""

    def route(self, route: Route) -> None:
        """The way is known."""

    def log_line(self, line: str) -> None:
        """A node wrote to its access log; called from any thread."""


class Demo:
    """Two nodes and an application, as a ``with`` block; `run` sends traffic through.

    Args:
        show: is told how it goes.
        size: bytes of each bulk transfer.
    """

    def __init__(self, show: Show, size: int) -> None:
        self._show = show
        self._size = size
        self._stack = ExitStack()
        self._step = "start"
        self._expected = ""
        self._leaving = False
        self.steps: list[Step] = []
        self.route: Route | None = None
        self.counters: dict[str, dict[str, int]] = {}
        self._ca: LocalCA
        self._foreign_ca: LocalCA
        self.a: Child
        self.b: Child
        self.app: Child
        self.ports: dict[str, dict[str, int]] = {}
        self.mesh_file: Path | None = None
        self._host = ""
        self._mesh = ""

    def __enter__(self) -> Demo:
        return self

    def __exit__(self, *_exc: object) -> None:
        """Stop what runs and remove what was written."""
        self._stack.close()

    @property
    def access_log(self) -> dict[str, list[str]]:
        """What both nodes have logged."""
        return {"node a": list(self.a.lines), "node b": list(self.b.lines)}

    def run(self) -> None:
        """All steps.

        Raises:
            DemoFailed: one of them did not do what it should.
        """
        import hbone

        digesting = threading.Thread(target=self._digest)
        try:
            digesting.start()
            self._start()
            self._request()
            self._look_at_the_session()
            self._upload(digesting)
            self._download()
            self._connections()
            self._denied()
            self._foreign()
            self._change()
            self._count()
        except DemoFailed:
            raise
        except (OSError, http.client.HTTPException, hbone.HboneError, ChildFailed, ValueError) as problem:
            words = str(problem) or type(problem).__name__
            raise DemoFailed(self._step, words) from problem
        finally:
            self._leaving = True
            digesting.join()

    # === steps ===

    @contextmanager
    def _doing(self, title: str, size: int | None = None) -> Iterator[None]:
        self._step = title
        self._show.begins(title, size)
        yield

    def _done(self, name: str, result: str, **facts: Any) -> None:
        step = Step(name=name, title=self._step, result=result, facts=facts)
        self.steps.append(step)
        self._show.ended(step)

    def _check(self, fine: bool, why: str) -> None:
        if not fine:
            raise DemoFailed(self._step, why)

    def _digest(self) -> None:
        """What both transfers must come to; worked out while the nodes start."""
        digest = hashlib.sha256()
        for piece in pattern(self._size):
            digest.update(piece)
            if self._leaving:
                return
        self._expected = digest.hexdigest()

    def _start(self) -> None:
        with self._doing("start two nodes and an application"):
            began = time.monotonic()
            on_line = self._show.log_line
            # All at once: what takes time is loading Python.
            closing = self._stack.enter_context(_Together())
            self.app = closing.add(Child("the application", "app"))
            self.a = closing.add(Child("node a", "node", on_line))
            self.b = closing.add(Child("node b", "node", on_line))

            from hbone import LocalCA

            directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="hbone-demo-"))).resolve()
            self._ca = LocalCA.create(directory / "ca")
            self._foreign_ca = LocalCA.in_memory()
            self._host = _own_address()
            self.app.run(directory, "app", self._host)
            app = _port(self.app.address("app"))
            self.mesh_file = directory / "mesh.yaml"
            self._mesh = _MESH.format(host=self._host, port=app, hostname=HOSTNAME, vip=VIP)
            self._write_mesh(self._mesh)
            b = ("--inbound", f"{self._host}:0", "--socks5", "off")
            self.b.run(directory, *_node("shop/web-0/web"), *b)
            hbone = _port(self.b.address("inbound"))
            a = (
                "--inbound",
                "off",
                "--hbone-port",
                str(hbone),
                "--socks5",
                "127.0.0.1:0",
                "--http-proxy",
                "127.0.0.1:0",
            )
            self.a.run(directory, *_node("shop/cart-0/cart"), *a)
            self.ports = {
                "app": {"port": app},
                "a": {
                    "socks": _port(self.a.address("socks5")),
                    "http_proxy": _port(self.a.address("http proxy")),
                    "admin": _port(self.a.address("admin")),
                    "stats": _port(self.a.address("stats")),
                },
                "b": {
                    "inbound": hbone,
                    "admin": _port(self.b.address("admin")),
                    "stats": _port(self.b.address("stats")),
                },
            }
            self.a.wait_ready()
            self.b.wait_ready()
            seconds = time.monotonic() - began
            self._done("start", f"{seconds:.1f} s", seconds=round(seconds, 3))

    def _write_mesh(self, text: str) -> None:
        # Renamed, so that nobody reads half of it.
        assert self.mesh_file is not None
        new = self.mesh_file.with_suffix(".new")
        new.write_text(text)
        new.replace(self.mesh_file)

    def _request(self) -> None:
        with self._doing(f"a request to {HOSTNAME}, and one to its address {VIP}"):
            began = time.monotonic()
            for host in (HOSTNAME, VIP):
                with self._connection(host) as connection:
                    text = self._greeting(connection)
            seconds = time.monotonic() - began
        self._logged(2, 2)
        self._done("request", f'200 "{text}"', status=200, seconds=round(seconds, 4), hosts=[HOSTNAME, VIP])

    def _greeting(self, connection: http.client.HTTPConnection) -> str:
        connection.request("GET", "/")
        answer = connection.getresponse()
        text = answer.read().decode().strip()
        self._check(answer.status == 200, f"status {answer.status} instead of 200: {text}")
        self._check(text.startswith("hello from the application"), f"this is not our application's answer: {text}")
        return text

    def _look_at_the_session(self) -> None:
        """Not a step of its own: a session stays open when its tunnels have ended."""
        (session,) = json.loads(self._get("b", "admin", "/debug/sessions"))["inbound"]
        peer = session["peer"]
        self._check(peer["identity"] == A, f"node b sees {peer['identity']}, not {A}")
        line = self.a.lines[-1]
        self._check(f'dst.identity="{B}"' in line, f"node a did not see {B}: {line}")
        self.route = Route(
            service=f"{HOSTNAME}:80",
            outbound=f"{_LOOPBACK}:{self.ports['a']['socks']}",
            inbound=f"{self._host}:{self.ports['b']['inbound']}",
            application=self._application,
            source=peer["identity"],
            destination=B,
            tls_version=peer["tls"],
            group=peer["group"],
            cipher=peer["cipher"],
        )
        self._show.route(self.route)

    def _upload(self, digesting: threading.Thread) -> None:
        with self._doing(f"upload {_mib(self._size)}", self._size), self._connection() as connection:
            began = time.monotonic()
            connection.putrequest("PUT", "/upload")
            connection.putheader("Content-Length", str(self._size))
            connection.endheaders()
            assert connection.sock is not None
            sent = 0
            for piece in pattern(self._size):
                connection.sock.sendall(piece)
                sent += len(piece)
                self._show.moved(sent)
            answer = connection.getresponse()
            digest = answer.read().decode().strip()
            seconds = time.monotonic() - began
            self._check(answer.status == 200, f"status {answer.status} instead of 200: {digest}")
            digesting.join()
            self._compare(digest)
        self._logged(3, 3)
        self._transferred("upload", seconds)

    def _download(self) -> None:
        with self._doing(f"download {_mib(self._size)}", self._size), self._connection() as connection:
            began = time.monotonic()
            connection.request("GET", f"/bytes/{self._size}")
            answer = connection.getresponse()
            self._check(answer.status == 200, f"status {answer.status} instead of 200")
            digest, buffer, received = hashlib.sha256(), memoryview(bytearray(_READ)), 0
            while got := answer.readinto(buffer):
                digest.update(buffer[:got])
                received += got
                self._show.moved(received)
            seconds = time.monotonic() - began
            self._check(received == self._size, f"{received} bytes came instead of {self._size}")
            self._compare(digest.hexdigest())
        self._logged(4, 4)
        self._transferred("download", seconds)

    def _compare(self, digest: str) -> None:
        self._check(digest == self._expected, f"SHA-256 is {digest} instead of {self._expected}")

    def _transferred(self, name: str, seconds: float) -> None:
        rate = self._size / seconds / 1e6
        self._done(
            name,
            f"{rate:,.0f} MB/s, SHA-256 equal",
            bytes=self._size,
            seconds=round(seconds, 3),
            megabytes_per_second=round(rate, 1),
            sha256=self._expected,
        )

    def _connections(self) -> None:
        with self._doing(f"{CONNECTIONS} connections, one after the other"):
            ask = f"GET / HTTP/1.1\r\nHost: {HOSTNAME}\r\nConnection: close\r\n\r\n".encode()
            began = time.monotonic()
            for number in range(1, CONNECTIONS + 1):
                with self._connection() as connection:
                    connection.connect()
                    connection.sock.sendall(ask)
                    answer = b"".join(iter(lambda sock=connection.sock: sock.recv(4096), b""))  # type: ignore[misc]
                self._check(answer.startswith(b"HTTP/1.1 200 "), f"connection {number}: {answer[:100]!r}")
            seconds = time.monotonic() - began
        self._logged(4 + CONNECTIONS, 4 + CONNECTIONS)
        rate = CONNECTIONS / seconds
        self._done(
            "connections",
            f"{rate:,.0f} a second",
            connections=CONNECTIONS,
            seconds=round(seconds, 3),
            per_second=round(rate, 1),
        )

    def _denied(self) -> None:
        from hbone import PolicyDenied

        with self._doing(f"a request from {_short(STRANGER)}, which policy denies"):
            refusal = self._ask_for_a_tunnel(self._ca.issue(STRANGER), PolicyDenied)
        line = self._logged(4 + CONNECTIONS, 5 + CONNECTIONS)
        why = _error(line)
        self._check(why.endswith(": shop/not-the-bank") and STRANGER in line, f"node b's log does not say so: {line}")
        self._done(
            "denied",
            f"refused by node b, status 401: {_short_reason(why)}",
            status=401,
            error=str(refusal),
            reason=why,
            log=line,
        )

    def _foreign(self) -> None:
        from hbone import IdentityRefused

        with self._doing(f"somebody who claims to be {_short(A)}, with a certificate from another CA"):
            # It trusts our root, so that it is node b who has to find out.
            foreign = dataclasses.replace(self._foreign_ca.issue(A), bundles={self._ca.trust_domain: self._ca.roots})
            refusal = self._ask_for_a_tunnel(foreign, IdentityRefused)
        line = self.b.wait_note("no session with")
        why = line.partition(": ")[2].strip()
        self._done("foreign", f"refused by node b: {why}", error=str(refusal), log=line)

    def _change(self) -> None:
        """A connection is open when a policy comes that denies it; then that policy goes."""
        with self._doing("a policy is added to the mesh file while a connection is open"):
            with self._connection() as connection:
                self._greeting(connection)
                began = time.monotonic()
                self._write_mesh(self._mesh + _CLOSED)
                try:
                    self._check(connection.sock.recv(1) == b"", "bytes came that nobody had asked for")
                except ConnectionResetError:
                    pass
                except TimeoutError:
                    raise DemoFailed(self._step, f"the connection stayed open for {_PATIENCE:g} s") from None
                seconds = time.monotonic() - began
            line = self._logged(5 + CONNECTIONS, 6 + CONNECTIONS)
            why = _error(line)
            self._check(why.endswith(": shop/closed-today"), f"node b's log does not say so: {line}")
            self._write_mesh(self._mesh)
            self.b.wait_note("mesh changed", 2)
            with self._connection() as connection:
                self._greeting(connection)
        self._logged(6 + CONNECTIONS, 7 + CONNECTIONS)
        result = f"closed after {seconds:.2f} s: {_short_reason(why)}; without it all is as before"
        self._done("change", result, seconds=round(seconds, 3), reason=why, log=line)

    def _ask_for_a_tunnel(self, svid: Svid, refusal: type[Exception]) -> Exception:
        import trio

        from hbone import HBONEClient

        async def ask() -> None:
            with trio.fail_after(_PATIENCE):
                async with (
                    HBONEClient.connect(self._host, self.ports["b"]["inbound"], svid=svid, expect=B) as client,
                    await client.open_tunnel(self._application),
                ):
                    pass

        try:
            trio.run(ask)
        except refusal as error:
            return error
        except Exception as error:
            raise DemoFailed(self._step, f"refused, but not as it should: {type(error).__name__}: {error}") from error
        raise DemoFailed(self._step, "it was let in")

    def _count(self) -> None:
        with self._doing("the counters of both nodes"):
            deadline = time.monotonic() + _SETTLE
            while True:
                a, b = self._counters("a", "source", "client"), self._counters("b", "destination", "server")
                self.counters = {"node a": a, "node b": b}
                wrong = [
                    f"{where}: {name} is {values[name]}, not {wanted}"
                    for where, values, denied in (("node a", a, 0), ("node b", b, 1))
                    for name, wanted in (
                        ("connections opened", TUNNELS + denied),
                        ("connections closed", TUNNELS + denied),
                        ("closed by policy", denied + (1 if values is b else 0)),
                        ("tunnels open", 0),
                        ("tunnels refused (401)", denied),
                        ("handshakes failed", denied),
                    )
                    if values[name] != wanted
                ]
                wrong += [
                    f"{name}: {a[name]} at node a, {b[name]} at node b"
                    for name in ("bytes up", "bytes down")
                    if a[name] != b[name] or a[name] < self._size
                ]
                if not wrong:
                    break
                if time.monotonic() > deadline:
                    raise DemoFailed(self._step, "; ".join(wrong))
                time.sleep(0.05)
        self._done("counters", "they add up, and agree")

    # === helpers ===

    @property
    def _application(self) -> str:
        return f"{self._host}:{self.ports['app']['port']}"

    def _logged(self, at_a: int, at_b: int) -> str:
        """Wait for the access log; the last line of node b."""
        self.a.wait_lines(at_a)
        return self.b.wait_lines(at_b)[-1]

    @contextmanager
    def _connection(self, host: str = HOSTNAME) -> Iterator[http.client.HTTPConnection]:
        # Not urllib: it would use a proxy of the environment's.
        connection = http.client.HTTPConnection(_LOOPBACK, self.ports["a"]["http_proxy"], timeout=_PATIENCE)
        connection.set_tunnel(host, 80)
        try:
            yield connection
        finally:
            connection.close()

    def _get(self, node: str, listener: str, path: str) -> str:
        connection = http.client.HTTPConnection(_LOOPBACK, self.ports[node][listener], timeout=_PATIENCE)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            text = answer.read().decode()
            self._check(answer.status == 200, f"{path} of node {node}: status {answer.status}")
            return text
        finally:
            connection.close()

    def _counters(self, node: str, reporter: str, role: str) -> dict[str, int]:
        scrape = self._get(node, "stats", "/metrics")

        def total(name: str, **labels: str) -> int:
            lines = re.findall(rf"^{name}(?:\{{(.*)\}})? (\S+)$", scrape, re.MULTILINE)
            wanted = [f'{label}="{value}"' for label, value in labels.items()]
            return sum(int(float(value)) for found, value in lines if all(want in found for want in wanted))

        return {
            "connections opened": total("istio_tcp_connections_opened_total", reporter=reporter),
            "connections closed": total("istio_tcp_connections_closed_total", reporter=reporter),
            "closed by policy": total("istio_tcp_connections_closed_total", reporter=reporter, response_flags="DENY"),
            "bytes up": total("istio_tcp_received_bytes_total", reporter=reporter),
            "bytes down": total("istio_tcp_sent_bytes_total", reporter=reporter),
            "sessions opened": total("hbone_handshake_duration_seconds_count", role=role),
            "handshakes failed": total("hbone_handshake_failures_total", role=role),
            "tunnels open": total("hbone_tunnels_open", role=role),
            "tunnels refused (401)": total("hbone_tunnels_refused_total", role=role, status="401"),
        }


class _Together:
    """Children that are told to leave at once, and then waited for one by one."""

    def __init__(self) -> None:
        self._children: list[Child] = []

    def add(self, child: Child) -> Child:
        self._children.append(child)
        return child

    def __enter__(self) -> _Together:
        return self

    def __exit__(self, *_exc: object) -> None:
        for child in self._children:
            child.close_soon()
        for child in self._children:
            child.close()


def _node(workload: str) -> tuple[str, ...]:
    """A node for one workload, on free ports."""
    return (
        *("node", "--json", "--mesh", "mesh.yaml", "--mesh-interval", "100ms", "--fake-ca", "--ca-dir", "ca"),
        *("--mode", "dedicated", "--workload", workload, "--drain-deadline", "1s"),
        *("--outbound", "off", "--plaintext", "off", "--readiness", "off"),
        *("--admin", "127.0.0.1:0", "--stats", "127.0.0.1:0"),
    )


def _own_address() -> str:
    for host in _ADDRESSES[:-1]:
        with socket.socket() as sock:
            try:
                sock.bind((host, 0))
            except OSError:
                continue
            return host
    return _ADDRESSES[-1]


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])


def _error(line: str) -> str:
    """Of a line of the access log."""
    found = re.search(r'\berror="([^"]*)"', line)
    return found[1] if found else ""


def _short_reason(why: str) -> str:
    """Without "connection closed due to ...", which goes without saying here."""
    return why.partition(": ")[2]


def _mib(size: int) -> str:
    return f"{size / (1 << 20):g} MiB"


def _short(identity: str) -> str:
    """``shop/cart`` of the whole id."""
    return identity.removeprefix(f"{_DOMAIN}/").replace("/sa/", "/")
