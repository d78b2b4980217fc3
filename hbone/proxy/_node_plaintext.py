"""The plain-text inbound side of a node: connections to its workloads that netfilter redirected here (15006).

A plain-text peer has no identity, so policies that want one say no. Permissive is the absence of such a policy, strict
a DENY policy for whoever has no principal.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import trio

from hbone.address import Endpoint
from hbone.errors import HboneError, NoRoute, RequestRejected
from hbone.proxy._connections import InboundConnection
from hbone.proxy._facts import error_text, inbound_record, outcome, stopped
from hbone.proxy._listeners import Listeners
from hbone.proxy._ways import BadHandshake
from hbone.rbac import Flow
from hbone.routing import destination_service
from hbone.telemetry import AccessRecord, Direction, LogLevel, labels_for, log_names, response_flag
from hbone.transport import PlainRelay, connect_tcp, listen_tcp, reset_socket

if TYPE_CHECKING:
    import socket

    from hbone.address import Authority
    from hbone.proxy._context import NodeContext
    from hbone.proxy._ways import SilentWayIn
    from hbone.telemetry import OpenConnection

__all__ = ["NodePlaintext"]


class NodePlaintext:
    """Lets plain TCP into the workloads of a node, as far as policy allows.

    Args:
        context: what the node's parts share.
    """

    def __init__(self, context: NodeContext) -> None:
        self._context = context
        self._listeners = Listeners()
        if context.metrics is not None:
            context.metrics.add_sockets("destination", lambda: self._listeners.live)

    @property
    def connections(self) -> int:
        """Connections that are being served."""
        return self._listeners.live

    async def serve(
        self,
        host: str,
        port: int,
        *,
        transparent: bool | None = False,
        task_status: trio.TaskStatus[Endpoint] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until `drain` or cancelled. Linux.

        Args:
            host: the IP address to listen on.
            port: 0 for a free one.
            transparent: whether TPROXY may bring connections: True must work, None where it is allowed.
            task_status: gets the bound address.

        Raises:
            OSError: it cannot listen there; PermissionError also when `transparent` is True without CAP_NET_ADMIN.
        """
        from hbone.proxy._ways import _capture

        context = self._context
        listener = listen_tcp(
            host,
            port,
            prepare=partial(_capture.prepare_listener, transparent=transparent),
            options=context.settings.socket_options,
        )
        context.own_ports.add(int(listener.getsockname()[1]))
        accept_way = partial(_capture.accept_captured, own_ports=context.own_ports)

        async def carry(sock: socket.socket) -> None:
            try:
                way = await accept_way(sock)
            except BadHandshake as exc:
                self._log_denied(exc.source, exc.target, exc)
                return
            await self._carry(way)

        await self._listeners.serve(listener, carry, options=context.settings.socket_options, task_status=task_status)

    async def drain(self, deadline: float) -> None:
        """Stop accepting, let connections finish for `deadline` seconds, then reset the rest."""
        await self._listeners.drain(deadline)

    async def _carry(self, way: SilentWayIn) -> None:
        began = trio.current_time()
        context = self._context
        ip = way.target.ip
        assert ip is not None  # captured: an address of the packet
        target = Endpoint(ip, way.target.port)
        workload, why = None, f"{target} is a port of the proxy itself: the connection would go in a circle"
        if target.port not in context.router.config.illegal_ports:
            workload, why = await context.local.wait_for(ip), f"no workload of this node has the address {ip}"
        if workload is None:
            error = NoRoute(target, why)
            self._log_denied(way.source, way.target, error)
            await way.failed(error)
            return
        snapshot, network = context.mesh.snapshot, context.settings.network
        source = snapshot.workload_by_address(network, way.source.ip)
        service = destination_service(snapshot, workload, target.port)
        relay: PlainRelay | None = None

        def received_and_sent() -> tuple[int, int]:
            return (relay.bytes_up, relay.bytes_down) if relay is not None else (0, 0)

        counted: OpenConnection | None = None
        if context.metrics is not None:
            labels = labels_for("destination", source=source, destination=workload, service=service)
            counted = context.metrics.connection_opened(labels=labels, live=received_and_sent)
        scope = trio.CancelScope()
        flow = Flow(
            source_ip=way.source.ip, source_identity=None, destination_ip=target.ip, destination_port=target.port
        )
        connection = InboundConnection(
            workload=workload,
            source=way.source,
            original=service.hostname if service is not None else None,
            actual=target,
            protocol="TCP",
            flow=flow,
            close=scope.cancel,
        )
        names = log_names(source)

        def record(
            counts: tuple[int, int] | None, seconds: float | None, error: Exception | None, reset: str | None = None
        ) -> AccessRecord:
            return inbound_record(
                source=way.source,
                source_names=names,
                dialled=target,
                workload=workload,
                service=service,
                counts=counts,
                seconds=seconds,
                error=error,
                reset=reset,
            )

        if context.access_log is not None and context.access_log.level <= LogLevel.DEBUG:
            context.access_log.write(record(None, None, None))
        failure: Exception | None = None
        reset: str | None = None
        try:
            with scope:
                verdict = context.connections.admit(connection)
                if not verdict.allowed:
                    why = f"connection closed due to policy rejection: {verdict.reason}"
                    raise RequestRejected(401, flag="DENY", reason=why)
                relay = PlainRelay(way.sock, await self._connect(way, target))
                failure, reset = outcome((await relay.run()).error)
            if connection.revoked is not None:
                why = f"connection closed due to policy change: {connection.revoked.reason}"
                raise RequestRejected(401, flag="DENY", reason=why)
        except HboneError as exc:
            failure, reset = exc, None
            if relay is None:
                await way.failed(exc)
        except BaseException as exc:
            failure = stopped(exc)
            if relay is None:
                reset_socket(way.sock)
            raise
        finally:
            context.connections.release(connection)
            received, sent = received_and_sent()
            if counted is not None:
                counted.closed(received, sent, response_flag(failure))
            if context.access_log is not None:
                context.access_log.write(record((received, sent), trio.current_time() - began, failure, reset))

    async def _connect(self, way: SilentWayIn, target: Endpoint) -> socket.socket:
        settings = self._context.settings
        return await connect_tcp(
            str(target.ip),
            target.port,
            timeout=settings.timeouts.connect if settings.timeouts is not None else 10.0,
            source_ip=way.source.ip if settings.keep_source is not False else None,
            transparent=settings.keep_source is not False,
            options=settings.socket_options,
        )

    def _log_denied(self, source: Endpoint | None, target: Authority | None, error: Exception) -> None:
        log = self._context.access_log
        if log is not None:
            log.write(
                AccessRecord(direction=Direction.INBOUND, src_addr=source, dst_addr=target, error=error_text(error))
            )
