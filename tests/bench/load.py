"""The load of the two-node bench: a plain TCP server and the clients that measure through whatever is in between.

    load.py serve HOST:PORT                      the application: echoes, sinks or generates, as the first byte says
    load.py wait  HOST:PORT                      until something listens there
    load.py bulk  HOST:PORT --bytes N -c C [--down]   MB/s over C connections that are open already
    load.py ping  HOST:PORT -n N --size B -c C   request and response, on C connections at a time
    load.py conns HOST:PORT -n N -c C            connect, one byte each way, close; C at a time
    load.py hold  HOST:PORT -n N                 open N connections, say so, keep them until stdin ends

Each prints one JSON object. It knows nothing of HBONE, and does as little as Python can: blocking sockets and one
large buffer for bulk, one epoll loop for everything small. Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
#: Processes that serve; the kernel spreads connections over them.
SERVERS = 2
#: Connections that `hold` opens at a time.
OPENING = 16

Address = tuple[str, int]


# === the application ===


def serve(address: Address) -> None:
    listener = socket.create_server(address, backlog=4096)
    listener.setblocking(False)
    print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
    for _ in range(SERVERS - 1):
        if os.fork() == 0:
            break
    _serve_process(listener)


def _serve_process(listener: socket.socket) -> None:
    """Echo from one loop; who wants bulk gets a thread, in which the system calls are all the work."""
    epoll = select.epoll()
    epoll.register(listener, select.EPOLLIN | select.EPOLLEXCLUSIVE)
    echoing: dict[int, socket.socket] = {}
    kinds: dict[int, socket.socket] = {}
    buffer = memoryview(bytearray(64 * 1024))

    def close(fd: int, sock: socket.socket) -> None:
        echoing.pop(fd, None)
        kinds.pop(fd, None)
        sock.close()

    while True:
        for fd, _ in epoll.poll():
            sock = echoing.get(fd)
            if sock is not None:
                try:
                    got = sock.recv_into(buffer)
                    if got:
                        _send_all(sock, buffer[:got])
                        continue
                except BlockingIOError:
                    continue
                except OSError:
                    pass
                close(fd, sock)
                continue
            sock = kinds.get(fd)
            if sock is None:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    continue  # another process was quicker
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                kinds[sock.fileno()] = sock
                epoll.register(sock, select.EPOLLIN)
                continue
            try:
                kind = sock.recv(1)
                if not kind:
                    close(fd, sock)
                    continue
                sock.send(kind)  # the connection is up, end to end
            except BlockingIOError:
                continue
            except OSError:
                close(fd, sock)
                continue
            del kinds[fd]
            if kind == b"E":
                echoing[fd] = sock
                continue
            epoll.unregister(fd)
            sock.setblocking(True)
            work = _sink if kind == b"S" else _generate
            threading.Thread(target=work, args=(sock,), daemon=True).start()


def _send_all(sock: socket.socket, data: memoryview) -> None:
    sent = sock.send(data)
    while sent < len(data):  # more than the socket's buffer: rare enough to wait for
        select.select([], [sock], [])
        sent += sock.send(data[sent:])


def _sink(sock: socket.socket) -> None:
    """Read to the end, then say how much that was."""
    with sock:
        buffer = bytearray(MIB)
        total = 0
        try:
            while got := sock.recv_into(buffer):
                total += got
            sock.sendall(total.to_bytes(8, "big"))
        except OSError:
            pass


def _generate(sock: socket.socket) -> None:
    """Send as much as asked for."""
    with sock:
        buffer = memoryview(bytearray(MIB))
        try:
            left = int.from_bytes(_receive(sock, 8), "big")
            while left > 0:
                left -= sock.send(buffer[:left])
            # The client ends first: Envoy cuts what is under way when the target does.
            sock.recv(1)
        except OSError:
            pass


# === the clients ===


def _receive(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        if not more:
            raise ConnectionError(f"the connection ended after {len(data)} of {count} bytes")
        data += more
    return data


def _connect(address: Address) -> socket.socket:
    sock = socket.socket()  # not create_connection: the user that we have become may not read Python's codecs
    try:
        sock.connect(address)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError:
        sock.close()
        raise
    return sock


def _dial(address: Address, kind: bytes) -> socket.socket:
    """A connection that is up, end to end."""
    sock = _connect(address)
    sock.sendall(kind)
    _receive(sock, 1)
    return sock


def wait(address: Address) -> dict[str, object]:
    began = time.monotonic()
    while True:
        try:
            _connect(address).close()
        except OSError:
            time.sleep(0.05)
        else:
            return {"seconds": time.monotonic() - began}


def bulk(address: Address, total: int, connections: int, *, down: bool) -> dict[str, object]:
    socks = [_dial(address, b"G" if down else b"S") for _ in range(connections)]
    each = total // connections
    wrong: list[str] = []

    def upload(sock: socket.socket) -> None:
        buffer = memoryview(bytearray(MIB))
        left = each
        while left > 0:
            left -= sock.send(buffer[:left])
        sock.shutdown(socket.SHUT_WR)
        arrived = int.from_bytes(_receive(sock, 8), "big")
        if arrived != each:
            raise ConnectionError(f"{arrived} of {each} bytes arrived")

    def download(sock: socket.socket) -> None:
        buffer = bytearray(MIB)
        sock.sendall(each.to_bytes(8, "big"))
        got = 0
        while got < each:
            more = sock.recv_into(buffer)
            if not more:
                raise ConnectionError(f"{got} of {each} bytes arrived")
            got += more
        sock.close()

    def run(sock: socket.socket) -> None:
        try:
            (download if down else upload)(sock)
        except OSError as exc:
            wrong.append(str(exc))

    threads = [threading.Thread(target=run, args=(sock,)) for sock in socks]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    if wrong:
        raise SystemExit(wrong[0])
    return {"MBps": each * connections / seconds / 1e6}


def ping(address: Address, count: int, connections: int, size: int) -> dict[str, object]:
    socks = [_dial(address, b"E") for _ in range(connections)]
    payload, buffer = bytes(size), memoryview(bytearray(size))
    clock = time.perf_counter
    times: list[float] = []
    if connections == 1:
        sock = socks[0]
        first = clock()
        for _ in range(count):
            began = clock()
            sock.sendall(payload)
            got = 0
            while got < size:
                got += _more(sock.recv_into(buffer[got:]))
            times.append(clock() - began)
        return _latencies(times, clock() - first)

    by_fd = {sock.fileno(): sock for sock in socks}
    epoll = select.epoll()
    for fd in by_fd:
        epoll.register(fd, select.EPOLLIN)
    missing = dict.fromkeys(by_fd, size)
    left = count - connections
    first = clock()
    sent_at = {}
    for fd, sock in by_fd.items():
        sent_at[fd] = clock()
        sock.sendall(payload)
    while len(times) < count:
        for fd, _ in epoll.poll():
            sock = by_fd[fd]
            missing[fd] -= _more(sock.recv_into(buffer[: missing[fd]]))
            if missing[fd]:
                continue
            now = clock()
            times.append(now - sent_at[fd])
            if left > 0:
                left -= 1
                missing[fd] = size
                sent_at[fd] = now
                sock.sendall(payload)
            else:
                epoll.unregister(fd)
    return _latencies(times, clock() - first)


def _more(got: int) -> int:
    if not got:
        raise SystemExit("the connection ended")
    return got


def conns(address: Address, count: int, at_a_time: int) -> dict[str, object]:
    clock = time.perf_counter
    times: list[float] = []
    first = clock()
    failed = 0
    for took, sock in _open(address, count, at_a_time):
        if sock is None:
            failed += 1
        else:
            times.append(took)
            sock.close()
    return _latencies(times, clock() - first) | {"failed": failed}


def hold(address: Address, count: int) -> dict[str, object]:
    began = time.perf_counter()
    held = [sock for _, sock in _open(address, count, OPENING) if sock is not None]
    seconds = time.perf_counter() - began
    print(json.dumps({"held": len(held), "failed": count - len(held), "seconds": round(seconds, 2)}), flush=True)
    sys.stdin.read()
    # Read what has arrived in the meantime: nothing, unless a tunnel has ended.
    lost = 0
    for sock in held:
        sock.setblocking(False)
        try:
            lost += not sock.recv(1)
        except BlockingIOError:
            pass
        except OSError:
            lost += 1
    return {"lost": lost}


def _open(address: Address, count: int, at_a_time: int) -> Iterator[tuple[float, socket.socket | None]]:
    """Open `count` connections, `at_a_time` at once: yields how long each took and its socket, None if it failed."""
    clock = time.perf_counter
    epoll = select.epoll()
    opening: dict[int, tuple[float, socket.socket]] = {}
    left = count
    while left or opening:
        while left and len(opening) < at_a_time:
            left -= 1
            began = clock()
            try:
                sock = _connect(address)  # ends in our own node's kernel, or one hop away: it does not wait long
                sock.sendall(b"E")
            except OSError:
                yield 0.0, None
                continue
            opening[sock.fileno()] = began, sock
            epoll.register(sock, select.EPOLLIN)
        for fd, _ in epoll.poll():
            began, sock = opening.pop(fd)
            epoll.unregister(fd)
            try:
                arrived = sock.recv(1)
            except OSError:
                arrived = b""
            if not arrived:
                sock.close()
            yield clock() - began, sock if arrived else None


def _latencies(times: list[float], seconds: float) -> dict[str, object]:
    if not times:
        return {"per_s": 0.0, "p50_ms": None, "p99_ms": None}
    times.sort()
    last = len(times) - 1
    return {
        "per_s": len(times) / seconds,
        "p50_ms": times[last // 2] * 1e3,
        "p99_ms": times[last * 99 // 100] * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["serve", "wait", "bulk", "ping", "conns", "hold"])
    parser.add_argument("address")
    parser.add_argument("-n", type=int, default=1000)
    parser.add_argument("-c", type=int, default=1)
    parser.add_argument("--bytes", type=int, default=1 << 30)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--down", action="store_true")
    parser.add_argument("--uid", type=int, help="become this user first")
    options = parser.parse_args()
    if options.uid is not None:
        os.setgroups([])
        os.setgid(options.uid)
        os.setuid(options.uid)
    host, _, port = options.address.rpartition(":")
    address = (host, int(port))
    result: dict[str, object]
    match options.what:
        case "serve":
            return serve(address)
        case "wait":
            result = wait(address)
        case "bulk":
            result = bulk(address, options.bytes, options.c, down=options.down)
        case "ping":
            result = ping(address, options.n, options.c, options.size)
        case "conns":
            result = conns(address, options.n, options.c)
        case _:
            result = hold(address, options.n)
    print(json.dumps({key: round(value, 4) if isinstance(value, float) else value for key, value in result.items()}))
    return None


if __name__ == "__main__":
    main()
