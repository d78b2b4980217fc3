"""A running node with a large mesh: what its start costs, and what live connections notice of a change of the file.

    reload.py                        a mesh whose workloads are elsewhere, but for one
    reload.py --here                 all workloads are of this node, which needs a certificate for each service account
    reload.py --lookups              what a connection costs in meshes of 100, 1 000 and 10 000 workloads

`hbone node` runs as users run it, on the loopback. An application's client reaches its service through the node's
SOCKS5 proxy, over HBONE, and the node's own inbound side: both halves of each connection are in one process. Some
connections send small requests without a pause, one sends as much as it can, others only wait to be closed by a policy.
Then the mesh file is replaced by another one.

The pause is the longest time that a request took while the change was read and put in force. What of it is whose: CPU
is what the node did meanwhile, in all its threads; `waited` is for how long threads of the node, of the client and of
the application had work to do and no processor, because of others or of each other. Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mesh import mesh_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from multiprocessing.connection import Connection

LOAD = Path(__file__).with_name("load.py")
#: Small requests, one after the other on each.
PINGS = 4
PIECE = bytes(256)
#: Tunnels that do nothing; those of the second half are forbidden later.
IDLE = 500
#: Every connection of the bench goes to one of these: one that stays allowed, and one that does not.
STAYS, GOES = "10.200.0.1", "10.200.0.2"
SECTIONS = ("workloads", "services", "policies")
LISTENERS = ("outbound", "plaintext", "inbound", "socks5", "admin", "stats", "readiness")


# === the mesh ===


def local_entries(port: int, *, forbidden: bool = False) -> str:
    """The workload here, its services, and the policy that lets connections in."""
    ports = "[2]" if forbidden else "[]"
    return f"""\
workloads:
- uid: here
  name: here
  namespace: bench
  serviceAccount: here
  workloadIps: [127.0.0.1]
  protocol: HBONE
  services:
    bench/stays.bench: {{80: {port}}}
    bench/goes.bench: {{80: {port + 1}}}
services:
- {{name: stays, namespace: bench, hostname: stays.bench, vips: [/{STAYS}], ports: {{80: {port}}}}}
- {{name: goes, namespace: bench, hostname: goes.bench, vips: [/{GOES}], ports: {{80: {port + 1}}}}}
policies:
- name: stays
  namespace: bench
  scope: Namespace
  action: Allow
  dryRun: false
  rules: [[[{{destinationPorts: [{port}]}}]]]
- name: goes
  namespace: bench
  scope: Namespace
  action: Allow
  dryRun: false
  rules: [[[{{destinationPorts: [{port + 1}], notDestinationPorts: {ports.replace("2", str(port + 1))}}}]]]
"""


class Mesh:
    """The file in its versions."""

    def __init__(self, workloads: int, services: int, port: int, *, here: bool) -> None:
        self._size = workloads, services
        self._port = port
        self._here = here

    def text(
        self, revision: str = "v1", *, forbidden: bool = False, policies: str = "", part: int = 0, renamed: bool = False
    ) -> str:
        """One version.

        Args:
            revision: of all workloads.
            forbidden: whether the second service is out of bounds.
            policies: put into the rules of all.
            part: in how many workloads, counted in percent, something else is different.
            renamed: whether all have other service accounts, so that those here need other certificates.
        """
        text = mesh_text(*self._size, revision=revision)
        if self._here:
            text = text.replace('workloadIps: ["10.', 'workloadIps: ["127.1')
        if policies:
            text = text.replace("destinationPorts: [8080", f"destinationPorts: [{policies}, 8080")
        if renamed:
            text = text.replace("serviceAccount: app-", "serviceAccount: new-")
        if part:
            count = self._size[0] * part // 100
            text = text.replace("canonicalRevision: v1", "canonicalRevision: v9", max(1, count))
        parts = zip(sections(local_entries(self._port, forbidden=forbidden)), sections(text), strict=True)
        return "".join(f"{name}:\n{own}{rest}" for name, (own, rest) in zip(SECTIONS, parts, strict=True))


def sections(text: str) -> list[str]:
    return re.split(f"^(?:{'|'.join(SECTIONS)}):\n", text, flags=re.MULTILINE)[1:]


# === the node ===


class Node:
    """`hbone node` in a process of its own."""

    def __init__(self, path: Path, ca_dir: Path, *words: str) -> None:
        listeners = [word for name in LISTENERS for word in (f"--{name}", "127.0.0.1:0")]
        if "--here" in words:
            listeners[listeners.index("--inbound") + 1] = "0.0.0.0:0"
        env = {name: value for name, value in os.environ.items() if not name.startswith("HBONE_")}
        env |= {"FAKE_CA": "true", "XDS_ADDRESS": "", "LOCAL_XDS_PATH": str(path), "HBONE_CA_DIR": str(ca_dir)}
        self.began = time.time()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hbone_cli", "node", "--json", "--hbone-port", "0", *listeners],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env | {"RUST_LOG": "info,access=off,proxy::outbound=warn"},
            text=True,
        )
        self.pid = self.process.pid
        self.addresses: dict[str, str] = {}
        self.ready = 0.0
        self._lines: list[str] = []
        self._came = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()
        assert self.process.stderr is not None
        for line in self.process.stderr:
            event = json.loads(line)
            if event["event"] == "listening":
                self.addresses[event["way"]] = event["address"]
            elif event["event"] == "ready":
                break
            elif event["event"] == "error":
                raise SystemExit(line)
        self.ready = time.time() - self.began
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._came:
                self._lines.append(line)
                self._came.notify_all()

    def said(self, words: str, number: int = 1, timeout: float = 300) -> float:
        """When it said these words in its log for the n-th time, in seconds since the epoch."""

        def found() -> list[str]:
            return [line for line in self._lines if words in line]

        with self._came:
            if not self._came.wait_for(lambda: len(found()) >= number, timeout):
                raise SystemExit(f"the node never said {words!r}:\n" + "".join(self._lines[-20:]))
            text = found()[number - 1].split("\t", 1)[0]
        return datetime.fromisoformat(text).timestamp()

    @property
    def said_changed(self) -> int:
        with self._came:
            return sum("\tmesh changed\t" in line for line in self._lines)

    def page(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://{self.addresses['admin']}{path}", timeout=60) as answer:
            return json.loads(answer.read())

    def certificates_missing(self) -> bool:
        with urllib.request.urlopen(f"http://{self.addresses['stats']}/metrics", timeout=60) as answer:
            return b'hbone_certificates{state="initializing"} 0.0\n' not in answer.read()

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.addresses["socks5"].rpartition(":")
        return host, int(port)

    def cpu(self) -> float:
        """Seconds of CPU, in all threads."""
        return time.clock_gettime(cpu_clock(self.pid))

    def memory(self) -> tuple[float, float]:
        """What it has now, and the most since `forget_peak`, in MB."""
        status = dict(line.split(":", 1) for line in Path(f"/proc/{self.pid}/status").read_text().splitlines())
        return int(status["VmRSS"].split()[0]) / 1024, int(status["VmHWM"].split()[0]) / 1024

    def forget_peak(self) -> None:
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


def cpu_clock(pid: int) -> int:
    """The clock that counts the CPU of a process (clock_getcpuclockid)."""
    return (~pid << 3) | 2


# === the load ===


def dial(proxy: tuple[str, int], host: str, kind: bytes) -> socket.socket:
    """A connection through the node, up to the application."""
    sock = socket.create_connection(proxy, 60)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(b"\5\1\0" + b"\5\1\0\1" + socket.inet_aton(host) + (80).to_bytes(2, "big"))
    reply = b""
    while len(reply) < 12:
        got = sock.recv(12 - len(reply))
        if not got:
            raise SystemExit("the proxy hung up")
        reply += got
    if reply[3]:
        raise SystemExit(f"the proxy says {reply[3]}")
    sock.sendall(kind)
    assert sock.recv(1) == kind
    return sock


class Waiting:
    """For how long the threads of some processes had work to do and no processor, all in all, in seconds."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = tuple(pids)
        self._files: dict[Path, int] = {}
        self._looked = 0.0
        self._last: dict[Path, int] = {}

    def __call__(self) -> float:
        now = time.perf_counter()
        if now - self._looked > 0.05:
            self._looked = now
            for pid in self._pids:
                for thread in Path(f"/proc/{pid}/task").iterdir():
                    if thread not in self._files:
                        with contextlib.suppress(OSError):
                            self._files[thread] = os.open(thread / "schedstat", os.O_RDONLY)
        for key, file in tuple(self._files.items()):
            try:
                self._last[key] = int(os.pread(file, 100, 0).split()[1])
            except OSError:  # the thread has ended
                os.close(self._files.pop(key))
        return sum(self._last.values()) / 1e9


def ping(proxy: tuple[str, int], pids: list[int], orders: Connection) -> None:
    """In a process of its own: small requests; for each order what has been since the one before."""
    socks = {sock.fileno(): sock for sock in (dial(proxy, STAYS, b"E") for _ in range(PINGS))}
    waiting = Waiting([*pids, os.getpid()])
    clock = cpu_clock(pids[0])

    def state() -> tuple[float, float, float]:
        return time.perf_counter(), time.clock_gettime(clock), waiting()

    epoll = select.epoll()
    epoll.register(orders.fileno(), select.EPOLLIN)
    began = {}
    for fd, sock in socks.items():
        epoll.register(fd, select.EPOLLIN)
        began[fd] = state()
        sock.sendall(PIECE)
    trips: list[tuple[float, float, float]] = []
    buffer = bytearray(len(PIECE))
    while True:
        for fd, _ in epoll.poll():
            if fd == orders.fileno():
                if orders.recv() is None:
                    return
                orders.send(summary(trips))
                trips = []
                continue
            sock = socks[fd]
            if not sock.recv_into(buffer):
                raise SystemExit("a connection that should stay has ended")
            now = state()
            trips.append(tuple(new - old for new, old in zip(now, began[fd], strict=True)))  # type: ignore[arg-type]
            began[fd] = now
            sock.sendall(PIECE)


def summary(trips: list[tuple[float, float, float]]) -> dict[str, float]:
    if not trips:
        return {}
    wall, cpu, waited = max(trips)
    # Several threads may have waited at once.
    rest, rest_cpu = max((max(wall - waited, 0), cpu) for wall, cpu, waited in trips)
    times = sorted(trip[0] for trip in trips)
    return {
        "pings": len(trips),
        "longest ms": wall * 1e3,
        "its CPU ms": cpu * 1e3,
        "it waited ms": waited * 1e3,
        "longest but for waiting ms": rest * 1e3,
        "its CPU, too": rest_cpu * 1e3,
        "most CPU ms": max(cpu for _, cpu, _ in trips) * 1e3,
        "p99 ms": times[len(times) * 99 // 100] * 1e3,
        "median ms": times[len(times) // 2] * 1e3,
    }


def bulk(proxy: tuple[str, int], orders: Connection) -> None:
    """In a process of its own: as much as goes; for each order how much went since the one before, and in what time."""
    sock = dial(proxy, STAYS, b"S")
    buffer = memoryview(bytearray(1 << 20))
    sent, since = 0, time.perf_counter()
    while True:
        sent += sock.send(buffer)
        if orders.poll():
            if orders.recv() is None:
                return
            now = time.perf_counter()
            orders.send({"bulk MB/s": sent / (now - since) / 1e6})
            sent, since = 0, now


class Idle:
    """Connections that wait for their end."""

    def __init__(self, proxy: tuple[str, int], count: int) -> None:
        self.kept = [dial(proxy, STAYS, b"E") for _ in range(count - count // 2)]
        self.condemned = [dial(proxy, GOES, b"E") for _ in range(count // 2)]

    def wait_for_the_end(self) -> list[float]:
        """When each of those that are forbidden ended, in seconds since the epoch."""
        poll = select.poll()
        left = {sock.fileno() for sock in self.condemned}
        for fd in left:
            poll.register(fd, select.POLLIN)
        ended = []
        while left:
            ready = poll.poll(60_000)
            if not ready:
                raise SystemExit(f"{len(left)} connections that are forbidden are still open")
            for fd, _ in ready:
                ended.append(time.time())
                left.remove(fd)
                poll.unregister(fd)
        return ended

    def check(self) -> None:
        """Those that are allowed go on."""
        for sock in self.kept:
            sock.sendall(b"x")
            assert sock.recv(1) == b"x"


class Worker:
    """A load in a process of its own."""

    def __init__(self, target: Any, *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._orders, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(*args, theirs), daemon=True)
        self._process.start()

    def take(self) -> Any:
        """What has been since the last time."""
        self._orders.send("take")
        return self._orders.recv()

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self._orders.send(None)
        self._process.join(10)
        self._process.kill()


@contextlib.contextmanager
def application() -> Iterator[tuple[int, list[int]]]:
    """Gives its port, of which the next one is its, too, and its processes."""
    apps: list[subprocess.Popen[bytes]] = []

    def start(number: int) -> bool:
        command = [sys.executable, LOAD, "serve", f"127.0.0.1:{number}"]
        app = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
        apps.append(app)
        assert app.stdout is not None
        return bool(app.stdout.readline())

    def end() -> None:
        for app in apps:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(app.pid, signal.SIGKILL)
            app.wait()
        apps.clear()

    try:
        while True:
            with socket.create_server(("127.0.0.1", 0)) as probe:
                port = probe.getsockname()[1]
            if all(map(start, (port, port + 1))):
                break
            end()
        groups = {app.pid for app in apps}
        pids = [int(process.name) for process in Path("/proc").glob("[0-9]*") if group_of(int(process.name)) in groups]
        yield port, pids
    finally:
        end()


def group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


# === what is measured ===


def replace(path: Path, text: str) -> float:
    """Put another file in place; gives the time of it."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)
    return time.time()


def reloads(options: argparse.Namespace, directory: Path) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    path = directory / "mesh.yaml"
    with application() as (port, apps):
        mesh = Mesh(options.workloads, options.services, port, here=options.here)
        path.write_text(mesh.text())
        node = Node(path, directory / "ca", *(["--here"] if options.here else []))
        workers: list[Worker] = []
        try:
            loaded = node.said("\tmesh loaded\t") - node.began
            now, peak = node.memory()
            facts = {"mesh loaded s": loaded, "ready s": node.ready, "CPU s": node.cpu(), "MB": now, "MB at most": peak}
            found["start"] = {**facts, "file MB": path.stat().st_size / 1e6}
            pings = Worker(ping, node.address, [node.pid, *apps])
            workers.append(pings)
            if not options.no_bulk:
                workers.append(Worker(bulk, node.address))
            idle = Idle(node.address, options.idle)

            def measure(name: str, text: str | None, seconds: float = 3.0, *, certificates: bool = False) -> None:
                time.sleep(0.5)
                before = node.said_changed
                node.forget_peak()
                cpu = node.cpu()
                for worker in workers:
                    worker.take()
                row: dict[str, float] = {}
                if text is None:
                    time.sleep(seconds)
                else:
                    began = replace(path, text)
                    row["in force after s"] = node.said("\tmesh changed\t", before + 1) - began
                    row["reading s"] = node.page("/debug/mesh")["file"]["seconds"]
                    if certificates:
                        while node.certificates_missing():
                            time.sleep(0.01)
                        row["certificates after s"] = time.time() - began
                    time.sleep(0.3)  # what comes after it belongs to it
                row["node CPU s"] = node.cpu() - cpu
                for worker in workers:
                    row.update(worker.take())
                row["MB"], row["MB at most"] = node.memory()
                found[name] = row

            measure("nothing changes", None)
            measure("one workload", mesh.text(part=1) if options.workloads < 100 else one_changed(mesh.text()))
            measure("a tenth of the workloads", mesh.text(part=10))
            measure("policies only", mesh.text(part=10, policies="7"))
            measure("everything", mesh.text("v2", policies="8"))
            measure("everything back", mesh.text())
            if options.here:
                measure("everybody", mesh.text(renamed=True), certificates=True)
                measure("everybody back", mesh.text(), certificates=True)
            measure("nothing changes again", None)
            if options.dump:
                for worker in workers:
                    worker.take()
                began = time.perf_counter()
                size = len(json.dumps(node.page("/config_dump")))
                row = {"config_dump s": time.perf_counter() - began, "config_dump MB": size / 1e6}
                for worker in workers:
                    row.update(worker.take())
                row["MB"], row["MB at most"] = node.memory()
                found["config_dump"] = row
            number = node.said_changed + 1
            began = replace(path, mesh.text(forbidden=True))
            ended = idle.wait_for_the_end()
            in_force = node.said("\tmesh changed\t", number)
            idle.check()
            found["permission removed"] = {
                "connections closed": len(ended),
                "first closed after in force ms": (ended[0] - in_force) * 1e3,
                "last closed after in force ms": (ended[-1] - in_force) * 1e3,
                "last closed after the edit s": ended[-1] - began,
            }
        finally:
            for worker in workers:
                worker.stop()
            node.stop()
    return found


def one_changed(text: str) -> str:
    return text.replace("node: node-0", "node: node-x", 1)


def lookups(directory: Path) -> dict[str, dict[str, float]]:
    """CPU of the node for a connection to one of ten services, by the size of the mesh."""
    found = {}
    path = directory / "mesh.yaml"
    with application() as (port, _):
        for size in (100, 1_000, 10_000):
            path.write_text(Mesh(size, size // 10, port, here=False).text())
            node = Node(path, directory / "ca")
            try:
                for _ in range(50):
                    dial(node.address, STAYS, b"E").close()
                rounds = []
                for _ in range(5):
                    cpu = node.cpu()
                    for _ in range(200):
                        dial(node.address, STAYS, b"E").close()
                    rounds.append((node.cpu() - cpu) / 200)
                found[f"{size} workloads"] = {"CPU of a connection ms": sorted(rounds)[2] * 1e3, "MB": node.memory()[0]}
            finally:
                node.stop()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", type=int, default=10_000)
    parser.add_argument("--services", type=int, default=1_000)
    parser.add_argument("--idle", type=int, default=IDLE, help="connections that wait for their end")
    parser.add_argument("--no-bulk", action="store_true", help="without the connection that sends all it can")
    parser.add_argument("--here", action="store_true", help="all workloads are of this node")
    parser.add_argument("--no-dump", dest="dump", action="store_false", help="without /config_dump")
    parser.add_argument("--lookups", action="store_true", help="measure look-ups instead")
    parser.add_argument("--json", action="store_true", help="a JSON object")
    options = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory() as directory:
        found = lookups(Path(directory)) if options.lookups else reloads(options, Path(directory))
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for name, figures in found.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in figures.items()))


if __name__ == "__main__":
    main()
