"""The library alone: `send_all` and `receive_some` on one tunnel, against a bare TLS socket.

Two processes on loopback. Bare: the standard library's `ssl` on a blocking socket, `sendall` and `recv_into`. Tunnel:
`HBONEClient` in one process, `HBONEServer` in the other, nothing relayed. Both use the same certificates, TLS 1.3,
pieces of 256 KiB, and the reader counts the bytes. Rounds alternate; the medians are compared.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import socket
import ssl
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from hbone import HBONEClient, HBONEServer, Svid, TunnelRequest
from hbone.certs import LocalCA, SvidFiles, write_svid

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

PIECE = 256 * 1024
#: Any address: the server does not dial it.
TARGET = "192.0.2.1:80"


def _context(files: SvidFiles, role: int) -> ssl.SSLContext:
    context = ssl.SSLContext(role)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(files.roots)
    context.load_cert_chain(files.cert, files.key)
    return context


def bare_sender(files: SvidFiles, pieces: int, port: Connection) -> None:
    context = _context(files, ssl.PROTOCOL_TLS_CLIENT)
    data = bytes(PIECE)
    with context.wrap_socket(socket.create_connection(("127.0.0.1", port.recv()))) as sock:
        for _ in range(pieces):
            sock.sendall(data)
        sock.recv(1)


def bare_receiver(files: SvidFiles, total: int, port: Connection) -> float:
    """Megabytes a second."""
    context = _context(files, ssl.PROTOCOL_TLS_SERVER)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port.send(listener.getsockname()[1])
        with context.wrap_socket(listener.accept()[0], server_side=True) as sock:
            buffer = bytearray(PIECE)
            got = sock.recv_into(buffer)
            began = time.perf_counter()
            while got < total:
                got += sock.recv_into(buffer)
            seconds = time.perf_counter() - began
            sock.sendall(b".")
    return total / seconds / 1e6


def tunnel_sender(files: SvidFiles, pieces: int, port: Connection) -> None:
    svid = Svid.from_files(files.cert, files.key, files.roots)
    where = port.recv()
    data = bytes(PIECE)

    async def send() -> None:
        async with HBONEClient.connect("127.0.0.1", where, svid=svid) as client:
            async with await client.open_tunnel(TARGET) as tunnel:
                for _ in range(pieces):
                    await tunnel.send_all(data)
                await tunnel.send_eof()
                await tunnel.receive_some()

    trio.run(send)


def tunnel_receiver(files: SvidFiles, total: int, port: Connection) -> float:
    """Megabytes a second."""
    svid = Svid.from_files(files.cert, files.key, files.roots)
    rates: list[float] = []

    async def receive() -> None:
        async def handler(request: TunnelRequest) -> None:
            async with await request.accept() as tunnel:
                got = len(await tunnel.receive_some())
                began = time.perf_counter()
                while data := await tunnel.receive_some():
                    got += len(data)
                rates.append(got / (time.perf_counter() - began) / 1e6)
                assert got == total
                await tunnel.send_eof()
            done.set()

        done = trio.Event()
        server = HBONEServer(svid, handler)
        async with trio.open_nursery() as nursery:
            endpoint = await nursery.start(server.serve, "127.0.0.1", 0)
            port.send(endpoint.port)
            await done.wait()
            await server.drain(1)
            nursery.cancel_scope.cancel()

    trio.run(receive)
    return rates[0]


if TYPE_CHECKING:
    Sender = Callable[[SvidFiles, int, Connection], None]
    Receiver = Callable[[SvidFiles, int, Connection], float]


def measure(sender: Sender, receiver: Receiver, files: dict[str, SvidFiles], total: int) -> float:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.Process(target=sender, args=(files["client"], total // PIECE, there), daemon=True)
    process.start()
    try:
        rate = receiver(files["server"], total, here)
        process.join(10)
        if process.exitcode != 0:
            raise SystemExit(f"{sender.__name__} ended with {process.exitcode}")
    finally:
        process.kill()
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less of everything")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    total = (128 if options.quick else 1024) << 20

    ways: dict[str, tuple[Sender, Receiver]] = {
        "bare": (bare_sender, bare_receiver),
        "tunnel": (tunnel_sender, tunnel_receiver),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory(prefix="hbone-bench-") as folder:
        ca = LocalCA.in_memory()
        files = {
            name: write_svid(ca.issue(f"spiffe://cluster.local/ns/bench/sa/{name}"), Path(folder) / name)
            for name in ("client", "server")
        }
        for number in range(options.rounds):
            for name, (sender, receiver) in ways.items():
                rate = measure(sender, receiver, files, total)
                rates[name].append(rate)
                print(json.dumps({"round": number + 1, "way": name, "MBps": round(rate, 1)}), flush=True)
    bare, tunnel = (statistics.median(rates[name]) for name in ("bare", "tunnel"))
    print(f"\nbare TLS {bare:.0f} MB/s, one tunnel {tunnel:.0f} MB/s, ratio {tunnel / bare:.2f}")


if __name__ == "__main__":
    main()
