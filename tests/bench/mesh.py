"""A large mesh file: how long a node takes to read it, what it keeps, and how long a live tunnel waits meanwhile.

The file has workloads with all that a cluster says of them, services, and a policy for each service. It is read in a
process of its own, as a node reads it at its start. Then it is changed, and read again beside an event loop that sends
pieces through a tunnel and back, one after the other, and beside a task that wants to run every millisecond. The pause
is the longest time that a piece was under way, or that the task had to wait beyond its millisecond; of that, the CPU
time is what this process did meanwhile, whatever else the machine does.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from hbone import Tunnel, TunnelRequest

#: A tunnel's target that nobody dials.
TARGET = "192.0.2.1:80"
PIECE = bytes(1024)


def mesh_text(workloads: int, services: int, *, revision: str = "v1") -> str:
    lines = ["workloads:"]
    for n in range(workloads):
        s = n % services
        lines.append(f"""\
- uid: lab//Pod/ns-{s % 50}/app-{s}-{n}
  name: app-{s}-{n}
  namespace: ns-{s % 50}
  serviceAccount: app-{s}
  trustDomain: cluster.local
  workloadIps: ["10.{n >> 16 & 255}.{n >> 8 & 255}.{n & 255}"]
  node: node-{n % 100}
  protocol: HBONE
  workloadName: app-{s}
  workloadType: deployment
  canonicalName: app-{s}
  canonicalRevision: {revision}
  clusterId: Kubernetes
  locality: {{region: eu, zone: eu-{n % 3}, subzone: ""}}
  services:
    ns-{s % 50}/app-{s}.ns-{s % 50}.svc.cluster.local: {{80: 8080, 443: 8443}}""")
    lines.append("services:")
    for s in range(services):
        lines.append(f"""\
- name: app-{s}
  namespace: ns-{s % 50}
  hostname: app-{s}.ns-{s % 50}.svc.cluster.local
  vips: ["/10.96.{s >> 8 & 255}.{s & 255}"]
  ports: {{80: 8080, 443: 8443}}
  canonical: true""")
    lines.append("policies:")
    for s in range(services):
        lines.append(f"""\
- name: app-{s}
  namespace: ns-{s % 50}
  scope: Namespace
  action: Allow
  dryRun: false
  rules:
  - - - principals: [!Exact cluster.local/ns/ns-{s % 50}/sa/app-{s}]
        destinationPorts: [8080, 8443]""")
    return "\n".join([*lines, ""])


def memory() -> tuple[float, float]:
    """What this process has now, and the most that it ever had, in MB."""
    now = 0.0
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
        now = int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return now, peak / (1024 if sys.platform != "darwin" else 1024 * 1024)


def load(path: Path, out: Connection) -> None:
    """In a new process: read the file as a node does at its start."""
    import hbone.control
    import hbone.mesh
    import hbone.proxy  # the rest of a node, for what the memory is measured against

    assert hbone.proxy
    empty, _ = memory()
    state = hbone.mesh.MeshState()
    began, cpu = time.perf_counter(), time.process_time()
    trio.run(hbone.control.FileMeshSource(path, state, on_faults=print).load)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    gc.collect()
    began = time.perf_counter()
    gc.collect()
    collect = time.perf_counter() - began
    now, peak = memory()
    out.send({
        "load s": seconds,
        "load CPU s": cpu,
        "MB before": empty,
        "MB after": now,
        "MB at most": peak,
        "full collection ms": collect * 1000,
        "workloads": len(state.snapshot.workloads),
    })  # fmt: skip


class Pauses:
    """A tunnel and a ticking task, both in this event loop, and the longest that either had to wait."""

    def __init__(self) -> None:
        self.trips: list[float] = []
        self.ticks: list[float] = []
        self.ticks_cpu: list[float] = []
        self.collections: list[float] = []
        self._collecting = 0.0
        gc.callbacks.append(self._collect)

    def _collect(self, phase: str, _facts: dict[str, int]) -> None:
        if phase == "start":
            self._collecting = time.thread_time()
        else:
            self.collections.append(time.thread_time() - self._collecting)

    def take(self) -> dict[str, float]:
        trips, ticks = sorted(self.trips), sorted(self.ticks)
        cpu, collections = max(self.ticks_cpu), max(self.collections, default=0.0)
        self.trips, self.ticks, self.ticks_cpu, self.collections = [], [], [], []
        return {
            "round trips": len(trips),
            "longest round trip ms": trips[-1] * 1000,
            "round trip p99 ms": trips[len(trips) * 99 // 100] * 1000,
            "median round trip ms": statistics.median(trips) * 1000,
            "longest tick ms": ticks[-1] * 1000 - 1,
            "most CPU in a tick ms": cpu * 1000,
            "longest collection CPU ms": collections * 1000,
        }

    async def tick(self) -> None:
        last, last_cpu = time.perf_counter(), time.process_time()
        while True:
            await trio.sleep(0.001)
            now, cpu = time.perf_counter(), time.process_time()
            self.ticks.append(now - last)
            self.ticks_cpu.append(cpu - last_cpu)
            last, last_cpu = now, cpu

    async def ping(self, tunnel: Tunnel) -> None:
        while True:
            began = time.perf_counter()
            await tunnel.send_all(PIECE)
            missing = len(PIECE)
            while missing:
                missing -= len(await tunnel.receive_some())
            self.trips.append(time.perf_counter() - began)


async def echo(request: TunnelRequest) -> None:
    async with await request.accept() as tunnel:
        while data := await tunnel.receive_some():
            await tunnel.send_all(data)


async def reloads(path: Path, workloads: int, services: int) -> dict[str, dict[str, float]]:
    from hbone import HBONEClient, HBONEServer, LocalCA
    from hbone.control import FileMeshSource
    from hbone.mesh import MeshState

    svid = LocalCA.in_memory().issue("spiffe://cluster.local/ns/bench/sa/bench")
    state = MeshState()
    source = FileMeshSource(path, state, on_faults=print, poll_interval=0.1)
    await source.load()
    gc.collect()
    gc.freeze()  # as `hbone node` does when it is ready
    text = path.read_text()
    changes = {
        "nothing is read": None,
        "nothing changes": text + "# a comment\n",
        "one workload changes": text.replace("node: node-0", "node: node-x", 1),
        "every workload changes": mesh_text(workloads, services, revision="v2"),
        "every workload changes back": text,
    }
    pauses = Pauses()
    found = {}
    server = HBONEServer(svid, echo)
    async with trio.open_nursery() as nursery:
        endpoint = await nursery.start(server.serve, "127.0.0.1", 0)
        async with HBONEClient.connect("127.0.0.1", endpoint.port, svid=svid) as client:
            async with await client.open_tunnel(TARGET) as tunnel:
                async with trio.open_nursery() as beside:
                    beside.start_soon(pauses.tick)
                    beside.start_soon(pauses.ping, tunnel)
                    await beside.start(source.run)
                    for name, new in changes.items():
                        pauses.take() if pauses.trips else None
                        began = time.perf_counter()
                        if new is None:
                            await trio.sleep(2)
                        else:
                            await change(path, new, source.status.read_at, source)
                        found[name] = {"s": time.perf_counter() - began, **pauses.take()}
                        found[name]["reading s"] = source.status.seconds if new is not None else 0.0
                        await trio.sleep(0.3)
                    beside.cancel_scope.cancel()
        nursery.cancel_scope.cancel()
    return found


async def change(path: Path, text: str, read_at: object, source: object) -> None:
    new = path.with_suffix(".new")
    await trio.to_thread.run_sync(new.write_text, text)
    new.replace(path)
    while source.status.read_at == read_at:  # type: ignore[attr-defined]
        await trio.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", type=int, default=10_000)
    parser.add_argument("--services", type=int, default=1_000)
    parser.add_argument("--json", action="store_true", help="a JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "mesh.yaml"
        path.write_text(mesh_text(options.workloads, options.services))
        here, there = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=load, args=(path, there))
        process.start()
        loaded = here.recv()
        process.join()
        loaded["file MB"] = path.stat().st_size / 1e6
        reloaded = trio.run(reloads, path, options.workloads, options.services)
    if options.json:
        print(json.dumps({"load": loaded, "reload": reloaded}, indent=2))
        return
    print(", ".join(f"{name} {value:.4g}" for name, value in loaded.items()))
    for name, figures in reloaded.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in figures.items()))


if __name__ == "__main__":
    main()
