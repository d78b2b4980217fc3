"""A relay of plain connections: what does passing through cost, for what is not for the mesh?

    application's client -> one relay -> application

Ways: `direct` (no relay), `splice` (as connections that are not for the mesh are relayed on Linux), `copy` (the same
without `os.splice`), `hbone` (two processes, `hbone outbound` and `hbone inbound`, with a tunnel between them; for
comparison). All on loopback, each in processes of its own, with load.py as both the application and its client.

Prints one JSON object for each measurement, then a table of medians over the rounds. Compare within one run only.
Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from hbone.certs import LocalCA, write_svid
from hbone.transport import _splice, accept_from, connect_tcp, listen_tcp, relay_sockets

if TYPE_CHECKING:
    from collections.abc import Iterator

LOAD = Path(__file__).with_name("load.py")
WAYS = ("direct", "splice", "copy", "hbone")


# === the relay ===


async def relay_to(port: int) -> None:
    listener = listen_tcp("127.0.0.1", 0)
    print(json.dumps({"port": listener.getsockname()[1]}), flush=True)

    async def carry(sock: socket.socket) -> None:
        upstream = await connect_tcp("127.0.0.1", port, timeout=10)
        await relay_sockets(sock, upstream)

    async with trio.open_nursery() as nursery:
        await accept_from(listener, partial(nursery.start_soon, carry))


# === what runs ===


@contextlib.contextmanager
def running(argv: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(argv, text=True, **options)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def printing_port(argv: list[str]) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    with running(argv, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())["port"], process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 15)  # load.py serves with more than one process


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def proxies(way: str, app: int, folder: Path) -> Iterator[tuple[int, list[int]]]:
    """The port to connect to, and the processes in between."""
    if way == "direct":
        yield app, []
    elif way != "hbone":
        with printing_port([sys.executable, __file__, "--relay", str(app), "--way", way]) as (port, process):
            yield port, [process.pid]
    else:
        ca = LocalCA.in_memory()
        near, far = free_port(), free_port()
        cli = [sys.executable, "-m", "hbone_cli"]
        argv = {
            "outbound": ["--forward", f"127.0.0.1:{near}=127.0.0.1:{app}", "--via", f"127.0.0.1:{far}"],
            "inbound": ["--listen", f"127.0.0.1:{far}", "--to", f"127.0.0.1:{app}"],
        }
        with contextlib.ExitStack() as stack:
            pids = []
            for name, more in argv.items():
                files = write_svid(ca.issue(f"spiffe://cluster.local/ns/bench/sa/{name}"), folder / name)
                pem = ["--cert", str(files.cert), "--key", str(files.key), "--roots", str(files.roots)]
                log = stack.enter_context((folder / f"{name}.log").open("w"))
                process = stack.enter_context(running([*cli, name, *more, *pem], stdout=log, stderr=log))
                pids.append(process.pid)
            for port in (near, far):
                load("wait", port)
            yield near, pids


def load(what: str, port: int, *options: str) -> dict[str, float]:
    argv = [sys.executable, str(LOAD), what, f"127.0.0.1:{port}", *options]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, timeout=300, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def cpu_seconds(pids: list[int]) -> float:
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def resident_kb(pids: list[int]) -> int:
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return pages * os.sysconf("SC_PAGE_SIZE") // 1024


def idle_kb(port: int, pids: list[int], count: int) -> float:
    """Resident memory of a connection at rest."""
    before = resident_kb(pids)
    argv = [sys.executable, str(LOAD), "hold", f"127.0.0.1:{port}", "-n", str(count)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        held = json.loads(process.stdout.readline())["held"]
        after = resident_kb(pids)
        process.communicate("")
    return (after - before) / held


def measure(way: str, port: int, pids: list[int], *, quick: bool) -> Iterator[tuple[str, float]]:
    total = (256 if quick else 2048) << 20
    few, many = (1000, 5000) if quick else (5000, 30_000)
    for name, options in (
        ("upload, 1 connection, MB/s", ()),
        ("download, 1 connection, MB/s", ("--down",)),
        ("upload, 8 connections, MB/s", ("-c", "8")),
    ):
        before = cpu_seconds(pids)
        yield name, load("bulk", port, "--bytes", str(total), *options)["MBps"]
        if pids:
            yield f"CPU, {name.rpartition(',')[0]}, s/GB", (cpu_seconds(pids) - before) / total * 1e9
    yield "1 KiB there and back, median, us", load("ping", port, "-n", str(few))["p50_ms"] * 1000
    yield "1 KiB there and back, 16 at a time, /s", load("ping", port, "-n", str(many), "-c", "16")["per_s"]
    yield "new connections, one at a time, /s", load("conns", port, "-n", str(few))["per_s"]
    yield "new connections, 16 at a time, /s", load("conns", port, "-n", str(few), "-c", "16")["per_s"]
    if pids:
        yield "a connection at rest, KB", idle_kb(port, pids, 500 if quick else 2000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less of everything")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", default=",".join(WAYS), help="which of them, with commas between")
    parser.add_argument("--relay", type=int, metavar="PORT", help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.relay:
        if options.way == "copy":
            _splice._SPLICE = False
        trio.run(relay_to, options.relay)
        return

    ways = options.ways.split(",")
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory(prefix="hbone-bench-") as folder:
        for number in range(options.rounds):
            for way in ways:
                with (
                    printing_port([sys.executable, str(LOAD), "serve", "127.0.0.1:0"]) as (app, _),
                    proxies(way, app, Path(folder)) as (port, pids),
                ):
                    for what, value in measure(way, port, pids, quick=options.quick):
                        found.setdefault(what, {}).setdefault(way, []).append(value)
                        print(json.dumps({"round": number + 1, "way": way, "what": what, "value": round(value, 3)}))
                sys.stdout.flush()

    print(f"\n{'':44}" + "".join(f"{way:>12}" for way in ways))
    for what, by_way in found.items():
        medians = [statistics.median(by_way[way]) if way in by_way else None for way in ways]
        cells = ("-" if m is None else f"{m:.3f}" if m < 10 else f"{m:.0f}" for m in medians)
        print(f"{what:44}" + "".join(f"{cell:>12}" for cell in cells))


if __name__ == "__main__":
    main()
