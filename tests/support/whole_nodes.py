"""A whole node in this process, on free ports of the loopback, and who talks to it.

The mesh is one workload at the loopback, with a service that is its application's.
"""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from functools import partial

import trio

from hbone.mesh import MeshSnapshot, TunnelProtocol
from hbone.proxy import ListenAddress, NodeConfig
from support.meshes import service, workload

__all__ = [
    "ANY",
    "LISTENERS",
    "NAME",
    "VIP",
    "WAIT",
    "application",
    "connect",
    "dump",
    "end_of",
    "fetch",
    "mesh",
    "node_config",
    "read",
    "send",
]

#: A free port of the loopback.
ANY = ListenAddress("127.0.0.1", 0)
#: Seconds that only something that hangs needs.
WAIT = 60
VIP, NAME = "10.96.0.20", "web.shop.svc.cluster.local"
LISTENERS = ("outbound", "plaintext", "inbound", "socks5", "http_proxy", "admin", "stats", "readiness")


def node_config(ca_dir, **more):
    """Everything on a free port, with certificates of this CA."""
    return NodeConfig(
        fake_ca=True, ca_dir=ca_dir, hbone_port=0, orig_src=False, **dict.fromkeys(LISTENERS, ANY), **more
    )


@asynccontextmanager
async def application():
    """Echoes, and says so first."""

    async def serve(stream):
        try:
            await stream.send_all(b"hello ")
            async for data in stream:
                await stream.send_all(data)
            await stream.send_eof()
        except trio.BrokenResourceError:
            pass

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


def mesh(port, *policies, **fields):
    local = workload(
        "c//Pod/shop/web-0",
        "127.0.0.1",
        protocol=TunnelProtocol.HBONE,
        service_account="web",
        workload_name="web",
        endpoint_of={f"shop/{NAME}": {80: port}},
        **fields,
    )
    return MeshSnapshot.build([local], [service(f"shop/{NAME}", f"/{VIP}", ports={80: port})], policies)


async def connect(node, host, port):
    """A connection of an application to a service.

    Raises:
        ConnectionError: the node says no.
    """
    endpoint = node.addresses["socks5"][0]
    stream = await trio.open_tcp_stream(str(endpoint.ip), endpoint.port)
    try:
        name = host.encode()
        await stream.send_all(b"\5\1\0" + b"\5\1\0\3" + bytes([len(name)]) + name + port.to_bytes(2, "big"))
        reply = await read(stream, 12)
        if reply[3]:
            raise ConnectionError(f"SOCKS5 says {reply[3]}")
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    return stream


async def read(stream, count):
    data = b""
    while len(data) < count:
        got = await stream.receive_some(count - len(data))
        assert got, f"ended after {data!r}"
        data += got
    return data


async def end_of(stream):
    """How the other side ends it."""
    try:
        while await stream.receive_some():
            pass
    except trio.BrokenResourceError:
        return "reset"
    return "eof"


async def send(node, listener, request):
    """What a page answers to these bytes, to its end."""
    endpoint = node.addresses[listener][0]
    answer = b""
    async with await trio.open_tcp_stream(str(endpoint.ip), endpoint.port) as stream:
        await stream.send_all(request)
        async for data in stream:
            answer += data
    return answer


async def fetch(node, listener, path, method="GET"):
    """Status and body."""
    request = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    answer = await send(node, listener, request.encode())
    head, _, body = answer.partition(b"\r\n\r\n")
    if b"chunked" in head:
        body = b"".join(dechunked(body))
    return int(head.split()[1]), body.decode()


def dechunked(body):
    while body:
        size, _, body = body.partition(b"\r\n")
        yield body[: int(size, 16)]
        body = body[int(size, 16) + 2 :]


async def dump(node):
    status, body = await fetch(node, "admin", "/config_dump")
    assert status == 200
    return json.loads(body)
