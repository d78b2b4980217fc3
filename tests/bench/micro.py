"""Microseconds of the pieces that every byte and every tunnel goes through, one at a time, in one process.

Each number is the best of several runs: what the piece costs when nothing disturbs it.
"""

from __future__ import annotations

import argparse
import json
import select
import socket
import time
from typing import TYPE_CHECKING

import trio
from OpenSSL import SSL

from hbone import Authority, Endpoint, SpiffeIdentity, Svid
from hbone.certs import LocalCA
from hbone.mesh import Workload
from hbone.protocol import ConnectRequest, Engine, Forwarded, TraceParent
from hbone.telemetry import (
    AccessLog,
    AccessRecord,
    Direction,
    LogFormat,
    Metrics,
    TrafficLabels,
    format_json,
    format_plain,
    labels_for,
)
from hbone.tls import PeerPolicy, client_connection, server_connection
from hbone.transport import _openssl

if TYPE_CHECKING:
    from collections.abc import Callable

RUNS = 5
RECORD = _openssl.RECORD


class Bench:
    """Measures and prints."""

    def __init__(self, scale: float) -> None:
        self._scale = scale

    def __call__(self, name: str, work: Callable[[], object], count: int, *, each: int = 1) -> None:
        """
        Args:
            name: of the line.
            work: what to measure.
            count: how often in one run.
            each: pieces that one call of it does.
        """
        count = max(10, int(count * self._scale))
        best = float("inf")
        for _ in range(RUNS):
            began = time.perf_counter()
            for _ in range(count):
                work()
            best = min(best, time.perf_counter() - began)
        self.told(name, best / count / each)

    @staticmethod
    def told(name: str, seconds: float) -> None:
        print(json.dumps({"what": name, "us": round(seconds * 1e6, 2)}), flush=True)


def engines() -> tuple[Engine, Engine]:
    """A client and a server that know each other's settings."""
    client, server = Engine(client=True, now=0.0), Engine(client=False, now=0.0)
    while client.has_data_to_send or server.has_data_to_send:
        server.receive_untrusted(bytes(client.data_to_send()), 0.0)
        client.receive_untrusted(bytes(server.data_to_send()), 0.0)
    return client, server


def request() -> ConnectRequest:
    """With the headers that the outbound proxy sends."""
    baggage = b"k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.deployment.name=cart,service.name=cart"
    return ConnectRequest.build(
        "10.0.0.7:8080",
        [
            (b"baggage", baggage),
            (b"forwarded", Forwarded(source=Endpoint.parse("10.0.0.1:40000")).encode()),
            (b"traceparent", TraceParent.from_random(bytes(range(24))).encode()),
        ],
    )


def bench_engine(bench: Bench) -> None:
    asked = request()
    for size, frames in ((1024, 1), (RECORD - 9, 1), (RECORD - 9, 32)):
        client, server = engines()
        stream = client.open_stream(asked, deadline=9.0)
        server.receive_untrusted(bytes(client.data_to_send()), 0.0)
        server.accept(stream.id)
        received = server.streams[stream.id]
        data = memoryview((client.data_header(stream.id, size) + bytes(size)) * frames)

        def receive(server: Engine = server, data: memoryview = data, stream: object = received) -> None:
            for event in server.receive_untrusted(data, 0.0):
                server.consumed(stream, len(event.data))
            server.data_to_send()

        bench(f"engine: receive a DATA frame of {size}, {frames} a read", receive, 20_000 // frames, each=frames)

    client, server = engines()
    stream = client.open_stream(asked, deadline=9.0)
    payload = bytes(1024)

    def queue() -> None:
        client.queue_data(stream.id, payload)
        client.data_to_send()

    bench("engine: queue a DATA frame of 1024", queue, 20_000)

    client, server = engines()

    def open_and_close() -> None:
        stream = client.open_stream(asked, deadline=9.0)
        server.receive_untrusted(bytes(client.data_to_send()), 0.0)
        server.accept(stream.id)
        client.receive_untrusted(bytes(server.data_to_send()), 0.0)
        client.end_stream(stream.id)
        server.receive_untrusted(bytes(client.data_to_send()), 0.0)
        server.end_stream(stream.id)
        client.receive_untrusted(bytes(server.data_to_send()), 0.0)

    bench("engine: open and close a tunnel, both ends", open_and_close, 1000)


def svids() -> tuple[Svid, Svid]:
    ca = LocalCA.in_memory()
    a, b = (ca.issue(f"spiffe://cluster.local/ns/bench/sa/{name}") for name in "ab")
    return a, b


def tls_pair(own: tuple[Svid, Svid]) -> tuple[SSL.Connection, SSL.Connection]:
    """Two ends of a session after the handshake, on a pair of sockets."""
    socks = socket.socketpair()
    for sock in socks:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    policy = PeerPolicy.exact(*(svid.identity for svid in own))
    a = client_connection(own[0], policy, socks[0])
    b = server_connection(own[1], policy, socks[1])
    waiting = [a, b]
    while waiting:
        for connection in list(waiting):
            try:
                connection.do_handshake()
            except SSL.WantReadError:
                continue
            waiting.remove(connection)
    return a, b


def bench_handshake(bench: Bench) -> None:
    own = svids()

    def shake() -> None:
        for connection in tls_pair(own):
            connection.sock_shutdown(socket.SHUT_RDWR)
            connection.close()

    bench("TLS: handshake, both ends", shake, 100)


def bench_tls(bench: Bench) -> None:
    ways = {
        "direct": (_openssl.write_records, _openssl.read_records),
        "public": (_openssl._write_public, _openssl._read_public),
    }
    a, b = tls_pair(svids())
    records = 8
    data, buffer = memoryview(bytes(records * RECORD)), memoryview(bytearray((records + 1) * RECORD))
    small = data[: 1024 + 9]
    for name, (write, read) in ways.items():
        writing = reading = 0.0
        best = [float("inf"), float("inf")]
        for _ in range(RUNS):
            writing = reading = 0.0
            count = 100
            for _ in range(count):
                t0 = time.perf_counter()
                assert write(a, data) == len(data)
                t1 = time.perf_counter()
                got, error = read(b, buffer)
                t2 = time.perf_counter()
                assert (got, error) == (len(data), None)
                writing += t1 - t0
                reading += t2 - t1
            best = [min(best[0], writing / count / records), min(best[1], reading / count / records)]
        bench.told(f"TLS: write a full record, {name} calls", best[0])
        bench.told(f"TLS: read a full record, {name} calls", best[1])

        def message(write: Callable = write, read: Callable = read) -> None:
            write(a, small)
            read(b, buffer)

        bench(f"TLS: a 1 KiB message, out and in, {name} calls", message, 5000)


def bench_telemetry(bench: Bench) -> None:
    def record() -> AccessRecord:
        return AccessRecord(
            direction=Direction.OUTBOUND,
            src_addr=source,
            src_workload="web-7c9d",
            src_namespace="shop",
            src_identity=web,
            src_cluster="Kubernetes",
            dst_addr=hop,
            dst_hbone_addr=authority,
            dst_service="cart.shop.svc.cluster.local",
            dst_workload="cart-0",
            dst_namespace="shop",
            dst_identity=cart,
            dst_cluster="Kubernetes",
            bytes_sent=1000,
            bytes_recv=100_000,
            duration=0.012,
        )

    source, hop = Endpoint.parse("10.0.0.1:40000"), Endpoint.parse("10.0.0.7:15008")
    authority = Authority.parse("10.0.0.7:8080")
    web = SpiffeIdentity.parse("spiffe://cluster.local/ns/shop/sa/web")
    cart = SpiffeIdentity.parse("spiffe://cluster.local/ns/shop/sa/cart")
    made = record()
    bench("access log: a record, made", record, 5000)
    bench("access log: a plain line", lambda: format_plain(made, 1_700_000_000.5), 5000)
    bench("access log: a JSON line", lambda: format_json(made, 1_700_000_000.5), 5000)

    async def write() -> None:
        with open("/dev/null", "wb", buffering=0) as out:  # noqa: PTH123
            async with AccessLog(out, LogFormat.PLAIN, max_buffer=1 << 30) as log:
                bench("access log: a plain line, written", lambda: log.write(made), 5000)

    trio.run(write)

    metrics = Metrics()
    workload = Workload(uid="a", name="web-7c9d", namespace="shop", workload_name="web", canonical_name="web")

    def labels() -> TrafficLabels:
        return labels_for(
            "source",
            source=workload,
            destination=workload,
            source_principal=web,
            destination_principal=cart,
            mutual_tls=True,
        )

    known = labels()
    bench("metrics: a set of labels, made", labels, 5000)
    bench("metrics: a connection, labels known", lambda: metrics.connection_opened(labels=known).closed(1, 1), 5000)
    bench(
        "metrics: a connection, two names", lambda: metrics.connection_opened(source_principal="a").closed(1, 1), 5000
    )
    for n in range(1000):
        metrics.connection_opened(labels=known._replace(source_workload=str(n))).closed(1, 1)
    bench("metrics: a scrape of a thousand sets of labels", metrics.render, 10)


def bench_trio(bench: Bench) -> None:
    """What the event loop takes for itself, for comparison."""

    async def run() -> None:
        a, b = socket.socketpair()
        with a, b:
            a.setblocking(False)
            b.setblocking(False)
            count = 5000
            best = [float("inf"), float("inf")]
            for _ in range(RUNS):
                began = time.perf_counter()
                for _ in range(count):
                    await trio.lowlevel.checkpoint()
                best[0] = min(best[0], time.perf_counter() - began)
            a.send(b".")
            for _ in range(RUNS):
                began = time.perf_counter()
                for _ in range(count):
                    await trio.lowlevel.wait_readable(b)
                best[1] = min(best[1], time.perf_counter() - began)
            bench.told("trio: a checkpoint", best[0] / count)
            bench.told("trio: wait_readable of a socket that is readable", best[1] / count)
            best[0] = float("inf")

            async def nothing() -> None:
                pass

            for _ in range(RUNS):
                began = time.perf_counter()
                async with trio.open_nursery() as nursery:
                    for _ in range(count):
                        nursery.start_soon(nothing)
                best[0] = min(best[0], time.perf_counter() - began)
            bench.told("trio: a task, started and ended", best[0] / count)
            epoll = select.epoll()
            epoll.register(b, select.EPOLLIN)
            bench("epoll: poll with one socket ready", epoll.poll, 5000)
            buffer = bytearray(1024)
            b.recv(1)

            def message() -> None:
                a.send(buffer)
                b.recv_into(buffer)

            bench("sockets: 1 KiB through a socketpair, send and recv_into", message, 5000)

    trio.run(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less of everything")
    parser.add_argument("--rounds", type=int, default=1, help="how often all of it")
    options = parser.parse_args()
    bench = Bench(0.1 if options.quick else 1.0)
    for _ in range(options.rounds):
        for part in (bench_engine, bench_tls, bench_handshake, bench_telemetry, bench_trio):
            part(bench)


if __name__ == "__main__":
    main()
