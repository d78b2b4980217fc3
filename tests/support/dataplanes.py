"""The data plane of nodes in one process: outbound and inbound on addresses of the loopback network."""

from __future__ import annotations

import random
import socket
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from hbone.certs import LocalCA, SvidManager, local_ca_issuer
from hbone.mesh import MeshSnapshot, MeshState
from hbone.proxy._connections import ConnectionTable
from hbone.proxy._context import LocalWorkloads, NodeContext, NodeSettings, WorkloadInfo
from hbone.proxy._node_inbound import NodeInbound
from hbone.proxy._node_outbound import NodeOutbound
from hbone.rbac import Authorizer
from hbone.routing import Router, RoutingConfig
from hbone.telemetry import AccessRecord, Metrics

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from hbone.address import Endpoint


def shared_port(*hosts: str) -> int:
    """A port that was free a moment ago on all of these addresses: HBONE's is one for a whole mesh."""
    while True:
        socks = []
        try:
            with socket.create_server((hosts[0], 0)) as first:
                port = first.getsockname()[1]
                for host in hosts[1:]:
                    socks.append(socket.create_server((host, port)))
                return port
        except OSError:
            continue
        finally:
            for sock in socks:
                sock.close()


@dataclass
class Lines:
    """An access log that is a list."""

    records: list[AccessRecord] = field(default_factory=list)

    def write(self, record: AccessRecord) -> None:
        self.records.append(record)


@dataclass
class DataPlane:
    """One node without its listeners' fixed ports."""

    context: NodeContext
    outbound: NodeOutbound
    inbound: NodeInbound
    log: Lines
    metrics: Metrics
    nursery: trio.Nursery
    socks: Endpoint | None = None

    async def connect(self, host: str, port: int) -> trio.SocketStream:
        """Through SOCKS5, as an application does; the reply is read."""
        assert self.socks is not None
        stream = await trio.open_tcp_stream(str(self.socks.ip), self.socks.port)
        name = host.encode()
        await stream.send_all(b"\5\1\0" + b"\5\1\0\3" + bytes([len(name)]) + name + port.to_bytes(2, "big"))
        reply = b""
        while len(reply) < 12:
            got = await stream.receive_some(12 - len(reply))
            if not got:
                raise ConnectionError(f"SOCKS5 said {reply!r}")
            reply += got
        if reply[3]:
            await stream.aclose()
            raise ConnectionError(f"SOCKS5 says {reply[3]}")
        return stream


@asynccontextmanager
async def data_plane(
    snapshot: MeshSnapshot | MeshState,
    *,
    ca: LocalCA,
    workload: WorkloadInfo | None = None,
    inbound_host: str | None = None,
    hbone_port: int = 15008,
    settings: NodeSettings | None = None,
    seed: int = 1,
) -> AsyncIterator[DataPlane]:
    mesh = snapshot if isinstance(snapshot, MeshState) else MeshState(snapshot)
    settings = settings or NodeSettings(keep_source=False)
    svids = SvidManager(local_ca_issuer(ca))
    log, metrics, authorizer = Lines(), Metrics(), Authorizer()
    local = LocalWorkloads(mesh, network=settings.network, dedicated=workload)
    context = NodeContext(
        mesh=mesh,
        router=Router(RoutingConfig(network=settings.network, hbone_port=hbone_port), random.Random(seed).random),
        authorizer=authorizer,
        svids=svids,
        local=local,
        connections=ConnectionTable(mesh, authorizer),
        metrics=metrics,
        access_log=log,  # type: ignore[arg-type]
        settings=settings,
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(svids.run)
        identities = [served.identity for served in local.served()]
        svids.want(identities)
        for identity in identities:
            await svids.get(identity)
        await nursery.start(context.connections.watch)
        inbound = NodeInbound(context)
        async with NodeOutbound(context) as outbound:
            plane = DataPlane(context, outbound, inbound, log, metrics, nursery)
            plane.socks = await nursery.start(outbound.serve_socks, "127.0.0.1", 0)
            if inbound_host is not None:
                await nursery.start(inbound.serve, inbound_host, hbone_port)
            yield plane
            await outbound.drain(0)
        nursery.cancel_scope.cancel()
