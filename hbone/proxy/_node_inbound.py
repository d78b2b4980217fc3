"""The inbound side of a node: HBONE in, the workloads of this node behind it.

Each CONNECT goes through the steps of the wire profile in their order: whose is it, does the mesh place its target
here (400), where to (503), is it allowed (401), can it be reached (503), 200. Where TCP goes is always the address
that the peer dialled, never one that the peer wrote.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from hbone.errors import CertificateUnavailable, ConnectFailed, RequestRejected
from hbone.protocol import Baggage, ConnectResponse, ErrorCode, ProxyHeader
from hbone.proxy._connections import InboundConnection
from hbone.proxy._facts import baggage_of, cause_of, error_text, identity_of, inbound_record, outcome, stopped
from hbone.rbac import Flow
from hbone.routing import NoInboundRoute, route_inbound
from hbone.telemetry import (
    AccessPattern,
    AccessRecord,
    Direction,
    LogLevel,
    MetricsObserver,
    labels_for,
    log_names,
    response_flag,
)
from hbone.transport import HBONEServer, connect_tcp, listen_tcp, relay, reset_socket

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from hbone.address import Endpoint
    from hbone.mesh import MeshSnapshot, Workload
    from hbone.proxy._context import NodeContext
    from hbone.routing import InboundRoute
    from hbone.telemetry import OpenConnection, TrafficLabels
    from hbone.tls import SvidSource
    from hbone.transport import Peer, TunnelRequest

__all__ = ["NodeInbound"]

#: Peers and targets whose facts are kept.
_REMEMBERED: Final = 8192
#: Bytes of a peer's headers up to which its facts are kept: it chooses them.
_MAX_REMEMBERED: Final = 1024
_OK: Final = ConnectResponse(status=200)


class _Facts:
    """What is the same for all tunnels of one peer to one target."""

    __slots__ = ("flow", "host", "labels", "pattern", "response", "route", "source_names", "workload")

    def __init__(
        self,
        *,
        workload: Workload,
        route: InboundRoute,
        source: Workload | None,
        baggage: Baggage | None,
        peer: Peer,
        response_baggage: bool,
    ) -> None:
        assert peer.address is not None  # as it dialled an address of ours
        destination = route.rbac_destination
        self.flow = Flow(
            source_ip=peer.address.ip,
            source_identity=peer.identity,
            destination_ip=destination.ip,
            destination_port=destination.port,
        )
        self.workload = workload
        self.route = route
        self.host = str(route.upstream.ip)
        self.pattern: AccessPattern | None = None
        who = source if source is not None else baggage
        self.source_names = log_names(who)
        self.labels: TrafficLabels = labels_for(
            "destination",
            source=who,
            destination=workload,
            service=route.service,
            source_principal=peer.identity,
            destination_principal=workload.identity,
            mutual_tls=True,
        )
        self.response = (
            ConnectResponse.build(200, [(b"baggage", baggage_of(workload).encode())]) if response_baggage else _OK
        )


class _Known(dict[object, _Facts]):
    """Facts by what decides them; kept with the snapshot that they are of."""


class NodeInbound:
    """Terminates HBONE for the workloads of a node.

    Args:
        context: what the node's parts share.
    """

    def __init__(self, context: NodeContext) -> None:
        self._context = context
        settings = context.settings
        self.server: HBONEServer = HBONEServer(
            self._svid_for,
            self._handle,
            limits=settings.limits,
            timeouts=settings.timeouts,
            observer=MetricsObserver(context.metrics) if context.metrics is not None else None,
            socket_options=settings.socket_options,
        )
        if context.metrics is not None:
            context.metrics.add_sockets("destination", self._sockets)

    async def serve(
        self, host: str, port: int, *, task_status: trio.TaskStatus[Endpoint] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve until `drain` or cancelled.

        Raises:
            OSError: it cannot listen there.
        """
        listener = listen_tcp(host, port, options=self._context.settings.socket_options)
        self._context.own_ports.add(int(listener.getsockname()[1]))
        unsubscribe = self._context.mesh.subscribe(self._mesh_changed)
        try:
            await self.server.serve_listener(listener, task_status=task_status)
        finally:
            unsubscribe()

    async def drain(self, deadline: float) -> None:
        """Stop gracefully; see `HBONEServer.drain`."""
        await self.server.drain(deadline)

    def _svid_for(self, dialled: Endpoint | None) -> SvidSource:
        """Who we are, to a peer that dialled this address.

        Raises:
            CertificateUnavailable: we serve no workload there.
        """
        workload = None if dialled is None else self._context.local.find(dialled.ip)
        if workload is None:
            raise CertificateUnavailable(dialled, "no workload of this node has this address")
        return self._context.svids.source(workload.identity)

    def _mesh_changed(self, _old: MeshSnapshot, _new: MeshSnapshot) -> None:
        """Peers have checked whom they speak to when they opened their sessions: if that has changed, check again."""
        for session in self.server.sessions:
            dialled = session.local_address
            workload = None if dialled is None else self._context.local.find(dialled.ip)
            if session.local_identity != identity_of(workload) and not session.draining:
                session.begin_drain()

    def _sockets(self) -> int:
        statistics = self.server.statistics()
        return statistics.sessions + statistics.half_open

    # === one tunnel ===

    async def _handle(self, request: TunnelRequest) -> None:
        began = trio.current_time()
        context = self._context
        counted: OpenConnection | None = None
        connection: InboundConnection | None = None
        facts: _Facts | None = None
        error: Exception | None = None
        reset: str | None = None

        def close() -> None:
            # Not CANCEL, which some peers take for an end of file. The relay ends with it. One that is not answered
            # yet ends when the application has been dialled, with a 401: a cancel scope for that, which seldom is,
            # would cost every connection a tenth of its opening.
            if request.answered:
                request.abort(ErrorCode.CONNECT_ERROR)

        try:
            facts = self._find(request)
            if context.metrics is not None:
                counted = context.metrics.connection_opened(labels=facts.labels, live=request.received_and_sent)
            if context.access_log is not None and context.access_log.level <= LogLevel.DEBUG:
                self._record(request, facts, None, None, None)
            connection = self._register(request, facts, close)
            verdict = context.connections.admit(connection)
            if not verdict.allowed:
                why = f"connection closed due to policy rejection: {verdict.reason}"
                raise RequestRejected(401, flag="DENY", reason=why)
            broke = await self._forward(request, facts, connection, began)
            if connection.revoked is not None:
                raise _taken_back(connection)
            error, reset = outcome(broke)
        except RequestRejected as exc:
            error = exc
            raise
        except trio.BrokenResourceError as exc:
            error = cause_of(exc)
        except trio.Cancelled:
            error = ConnectFailed("cancelled: the request was taken back, or the node is stopping")
            raise
        except BaseException as exc:
            error = stopped(exc)
            raise
        finally:
            if connection is not None:
                context.connections.release(connection)
            received, sent = request.received_and_sent()
            if counted is not None:
                counted.closed(received, sent, response_flag(error))
            self._record(request, facts, (received, sent), trio.current_time() - began, error, reset)

    def _find(self, request: TunnelRequest) -> _Facts:
        """Steps 2 to 7 of the wire profile, remembered for each peer and target.

        Raises:
            RequestRejected: 400 or 503.
        """
        context = self._context
        snapshot = context.mesh.snapshot
        known = snapshot.memo.get(self)
        if not isinstance(known, _Known) or len(known) >= _REMEMBERED:
            known = snapshot.memo[self] = _Known()
        headers, peer, dialled = request.headers, request.peer, request.local_address
        address = peer.address
        baggage = forwarded = network = b""
        for name, value in headers.headers:
            if name == b"baggage":
                baggage = baggage + b"," + value if baggage else value
            elif name == b"forwarded":
                forwarded = forwarded or value  # the first of several counts
            elif name == b"x-forwarded-network":
                network = network or value
        if forwarded.startswith(b"for="):
            forwarded = forwarded.partition(b";")[2]  # the application's port: another one each time
        key = (dialled, headers.authority, peer.identity, address.ip if address else None, baggage, forwarded, network)
        facts = known.get(key)
        if facts is None:
            facts = self._work_out(request, snapshot)
            if len(baggage) + len(forwarded) + len(network) + len(headers.authority) < _MAX_REMEMBERED:
                known[key] = facts
        return facts

    def _work_out(self, request: TunnelRequest, snapshot: MeshSnapshot) -> _Facts:
        context, settings = self._context, self._context.settings
        dialled, headers, peer = request.local_address, request.headers, request.peer
        workload = None if dialled is None else context.local.find(dialled.ip)
        if workload is None or dialled is None:
            raise RequestRejected(503, flag="CONNECT", reason=f"no workload of this node has the address {dialled}")
        if request.local_identity != identity_of(workload):  # the session is older than the workload
            why = f"{dialled} has become {identity_of(workload)}, and the peer knows it as {request.local_identity}"
            raise RequestRejected(503, flag="CONNECT", reason=why)
        forwarded = headers.forwarded
        route = route_inbound(
            snapshot,
            context.router.config,
            workload=workload,
            dialled=dialled,
            authority=request.target,
            forwarded_host=forwarded.host if forwarded is not None else None,
        )
        if isinstance(route, NoInboundRoute):
            raise RequestRejected(route.status, flag="CONNECT", reason=route.reason)
        if route.upstream.port in context.own_ports:
            raise RequestRejected(503, flag="CONNECT", reason=f"{route.upstream} is a port of this node itself")
        # Behind a gateway the address is the gateway's and says nothing of the source.
        source = None
        if peer.address is not None and not headers.crossed_networks(settings.network):
            source = snapshot.workload_by_address(settings.network, peer.address.ip)
            if source is not None and source.identity != peer.identity:
                source = None  # its node dialled from an address that is somebody else's, as nodes on one machine do
        return _Facts(
            workload=workload,
            route=route,
            source=source,
            baggage=headers.baggage if settings.response_baggage else None,
            peer=peer,
            response_baggage=settings.response_baggage,
        )

    @staticmethod
    def _register(request: TunnelRequest, facts: _Facts, close: Callable[[], None]) -> InboundConnection:
        route = facts.route
        return InboundConnection(
            workload=facts.workload,
            source=request.peer.address,
            original=route.service.hostname if route.service is not None else None,
            actual=route.upstream,
            protocol="HBONE",
            flow=facts.flow,
            close=close,
        )

    async def _forward(
        self, request: TunnelRequest, facts: _Facts, connection: InboundConnection, began: float
    ) -> Exception | None:
        """Dial, answer, relay. Returns what broke the relay, if anything did.

        Raises:
            RequestRejected: 503, the application cannot be reached; 401, a policy forbids it meanwhile.
        """
        settings, route, address = self._context.settings, facts.route, request.peer.address
        keep = route.keep_source and settings.keep_source is not False and address is not None
        try:
            sock = await connect_tcp(
                facts.host,
                route.upstream.port,
                timeout=settings.timeouts.connect if settings.timeouts is not None else 10.0,
                source_ip=address.ip if keep and address is not None and address.ip != route.upstream.ip else None,
                transparent=keep,
                options=settings.socket_options,
            )
        except ConnectFailed as exc:
            raise RequestRejected(503, flag="CONNECT", reason=f"connection failed: {exc}") from exc
        try:
            if connection.revoked is not None:
                raise _taken_back(connection)
            tunnel = request.accept_nowait(facts.response)
            if route.proxy_protocol:
                await _send_all(sock, self._proxy_header(request, facts))
        except BaseException:
            reset_socket(sock)
            raise
        if self._context.metrics is not None:
            self._context.metrics.connect_finished("server", trio.current_time() - began)
        return (await relay(tunnel, sock)).error

    @staticmethod
    def _proxy_header(request: TunnelRequest, facts: _Facts) -> bytes:
        """Wire profile, PROXY protocol."""
        peer, target = request.peer, facts.route.tunnel_target
        assert target is not None
        assert peer.address is not None  # as it dialled an address of ours
        return ProxyHeader(source=peer.address, destination=target, identity=peer.identity).encode()

    def _record(
        self,
        request: TunnelRequest,
        facts: _Facts | None,
        counts: tuple[int, int] | None,
        seconds: float | None,
        error: Exception | None,
        reset: str | None = None,
    ) -> None:
        log = self._context.access_log
        if log is None:
            return
        peer, dialled = request.peer, request.local_address
        if facts is None:
            text = error_text(error) if error is not None else None
            log.write(AccessRecord(direction=Direction.INBOUND, src_addr=peer.address, dst_addr=dialled, error=text))
            return
        well = error is None and reset is None and counts is not None
        if well and counts is not None and seconds is not None and facts.pattern is not None:
            log.write_complete(facts.pattern, peer.address, counts[1], counts[0], seconds)
            return
        record = inbound_record(
            source=peer.address,
            source_names=facts.source_names,
            dialled=dialled,
            workload=facts.workload,
            service=facts.route.service,
            counts=counts,
            seconds=seconds,
            error=error,
            reset=reset,
            peer=peer.identity,
            authority=request.headers.authority,
        )
        if well:
            facts.pattern = AccessPattern(record)
        log.write(record)


def _taken_back(connection: InboundConnection) -> RequestRejected:
    assert connection.revoked is not None
    why = f"connection closed due to policy change: {connection.revoked.reason}"
    return RequestRejected(401, flag="DENY", reason=why)


async def _send_all(sock: socket.socket, data: bytes) -> None:
    """To a fresh socket, which mostly takes it at once."""
    view = memoryview(data)
    while view:
        try:
            view = view[sock.send(view) :]
        except BlockingIOError:
            await trio.lowlevel.wait_writable(sock)
        except OSError as exc:
            raise trio.BrokenResourceError("the application left before it was told who calls") from exc
