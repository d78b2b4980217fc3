"""The outbound side of a node: applications' TCP connections, each carried the way that the mesh says.

One connection goes through these steps: where does it want to go (`hbone.proxy._ways`), whose is it
(`LocalWorkloads`), which way (`hbone.routing`), and then one of three carriers: plain TCP, a tunnel of the pool of the
source's identity, or a tunnel inside a tunnel. What is the same for all connections of a route (labels, whom to
expect) is worked out once and kept as long as the route is the same object.
"""

from __future__ import annotations

import logging
import os
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, Final, Self, TypeAlias

import trio

from hbone.address import Endpoint
from hbone.errors import BadTarget, ConnectFailed, HboneError, NoRoute, Unreachable
from hbone.protocol import Forwarded, TraceParent
from hbone.proxy._facts import baggage_of, cause_of, error_text, forwarded_host, identity_of, outcome, stopped
from hbone.proxy._listeners import Listeners
from hbone.proxy._pools import IdentityPools
from hbone.proxy._ways import BadHandshake, accept_http_connect, accept_socks5
from hbone.routing import NoOutboundRoute, OutboundProtocol, RouteType
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
from hbone.tls import PeerPolicy
from hbone.transport import HBONEClient, PlainRelay, Tunnel, connect_tcp, listen_tcp, relay, reset_socket, resolve

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable, Mapping
    from types import TracebackType

    from hbone.address import Authority
    from hbone.identity import SpiffeIdentity
    from hbone.mesh import Workload
    from hbone.protocol import Baggage
    from hbone.proxy._context import NodeContext
    from hbone.proxy._ways import WayIn
    from hbone.routing import OutboundRoute
    from hbone.telemetry import OpenConnection, TrafficLabels
    from hbone.transport import ConnectionPool

__all__ = ["NodeOutbound", "OutboundConnection"]

_log: Final = logging.getLogger("hbone.proxy.outbound")
#: Routes whose facts are kept.
_REMEMBERED: Final = 8192

_AcceptWay: TypeAlias = "Callable[[socket.socket], Awaitable[WayIn]]"


class _Facts:
    """What is the same for all connections of one workload on one route."""

    __slots__ = (
        "baggage",
        "destination",
        "destination_names",
        "expect",
        "forwarded_host",
        "host",
        "identity",
        "inner_expect",
        "labels",
        "pattern",
        "route",
        "source",
        "source_names",
        "way",
    )

    def __init__(self, source: Workload, route: OutboundRoute) -> None:
        tunnelled = route.protocol is not OutboundProtocol.TCP
        self.source = source
        self.route = route
        self.baggage = (b"baggage", baggage_of(source).encode())
        self.host = route.service.hostname if route.service is not None else None
        self.forwarded_host = forwarded_host(self.host)
        self.identity = source.identity if tunnelled else None
        self.way = f" using {route.protocol.value} via {route.next_hop} type {route.type.value}"
        self.pattern: AccessPattern | None = None
        self.source_names = log_names(source)
        self.destination_names = log_names(route.workload)
        self.destination = identity_of(route.workload)
        self.labels: TrafficLabels = labels_for(
            "source",
            source=source,
            destination=route.workload,
            service=route.service,
            source_principal=self.identity,
            destination_principal=self.destination,
            mutual_tls=tunnelled,
        )
        self.expect = PeerPolicy.exact(*route.expected) if tunnelled else None
        self.inner_expect = PeerPolicy.exact(*route.inner_expected) if route.inner_expected else None


class _Known(dict[int, _Facts]):
    """Facts by the `id` of their route; kept with the snapshot that the routes are of."""


class OutboundConnection:
    """One application connection and what is known of it so far; a `hbone.proxy.ShownConnection`."""

    __slots__ = (
        "attempts",
        "began",
        "counted",
        "facts",
        "far_end",
        "far_identity",
        "inner",
        "plain",
        "route",
        "source",
        "tunnel",
        "way",
        "workload",
    )

    def __init__(self, way: WayIn, began: float) -> None:
        self.way = way
        self.began = began
        self.source: Endpoint = way.source
        self.workload: Workload | None = None
        self.route: OutboundRoute | None = None
        self.facts: _Facts | None = None
        self.tunnel: Tunnel | None = None
        self.plain: PlainRelay | None = None
        self.counted: OpenConnection | None = None
        self.attempts: int = 0
        """How often its beginning was counted: once for each address of a name that was tried."""
        self.inner: AsyncExitStack | None = None
        self.far_end: Baggage | None = None
        self.far_identity: SpiffeIdentity | None = None

    @property
    def original(self) -> Authority:
        """Where the application wanted to go."""
        return self.way.target

    @property
    def actual(self) -> Endpoint | Authority | None:
        """Where it goes; None before that is known."""
        return self.route.next_hop if self.route is not None else None

    @property
    def protocol(self) -> str:
        """What it is wrapped in."""
        return (self.route.protocol if self.route is not None else OutboundProtocol.TCP).value

    def received_and_sent(self) -> tuple[int, int]:
        """Bytes so far in Istio's sense: received from the application, sent to it."""
        if self.tunnel is not None:
            return self.tunnel.bytes_sent, self.tunnel.bytes_received
        if self.plain is not None:
            return self.plain.bytes_up, self.plain.bytes_down
        return 0, 0

    def end_count(self, error: Exception | None) -> None:
        """Count its end, if its beginning was counted."""
        if self.counted is not None:
            received, sent = self.received_and_sent()
            self.counted.closed(received, sent, response_flag(error))
            self.counted = None


class NodeOutbound:
    """Carries applications' connections as the mesh says. An ``async with`` block; inside, start `serve_*`.

    Args:
        context: what the node's parts share.
    """

    def __init__(self, context: NodeContext) -> None:
        self._context = context
        self._listeners = Listeners()
        self._observer = MetricsObserver(context.metrics) if context.metrics is not None else None
        self._pools = IdentityPools(context, observer=self._observer)
        if context.metrics is not None:
            context.metrics.add_sockets("source", lambda: self._listeners.live)

    async def __aenter__(self) -> Self:
        await self._pools.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return await self._pools.__aexit__(kind, problem, traceback)

    @property
    def connections(self) -> int:
        """Applications' connections that are being served."""
        return self._listeners.live

    @property
    def pools(self) -> Mapping[SpiffeIdentity, ConnectionPool]:
        """The pool of each identity that has carried something."""
        return self._pools.pools

    def retain(self, identities: frozenset[SpiffeIdentity]) -> None:
        """Drain the pools of all other identities: the node no longer serves them."""
        self._pools.retain(identities)

    # === ways in ===

    async def serve_captured(
        self,
        host: str,
        port: int,
        *,
        transparent: bool | None = False,
        task_status: trio.TaskStatus[Endpoint] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Connections that netfilter redirected here. Linux. Until `drain` or cancelled.

        Args:
            host: the IP address to listen on.
            port: 0 for a free one.
            transparent: whether TPROXY may bring connections: True must work, None where it is allowed.
            task_status: gets the bound address.

        Raises:
            OSError: it cannot listen there; PermissionError also when `transparent` is True without CAP_NET_ADMIN.
                The same for the other ways in.
        """
        from hbone.proxy._ways import _capture

        listener = listen_tcp(
            host,
            port,
            prepare=partial(_capture.prepare_listener, transparent=transparent),
            options=self._context.settings.socket_options,
        )
        self._context.own_ports.add(int(listener.getsockname()[1]))
        accept_way = partial(_capture.accept_captured, own_ports=self._context.own_ports)
        await self._serve(listener, accept_way, task_status)

    async def serve_socks(
        self, host: str, port: int, *, task_status: trio.TaskStatus[Endpoint] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """SOCKS5 without authentication. Whoever can connect speaks as the workload that has its address."""
        listener = listen_tcp(host, port, options=self._context.settings.socket_options)
        await self._serve(listener, accept_socks5, task_status)

    async def serve_http_connect(
        self, host: str, port: int, *, task_status: trio.TaskStatus[Endpoint] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """An HTTP/1.1 proxy that knows CONNECT only. Who may use it: see `serve_socks`."""
        listener = listen_tcp(host, port, options=self._context.settings.socket_options)
        await self._serve(listener, accept_http_connect, task_status)

    async def _serve(
        self, listener: socket.socket, accept_way: _AcceptWay, task_status: trio.TaskStatus[Endpoint]
    ) -> None:
        options = self._context.settings.socket_options
        await self._listeners.serve(
            listener, partial(self._carry, accept_way), options=options, task_status=task_status
        )

    async def drain(self, deadline: float) -> None:
        """Stop accepting, let connections finish for `deadline` seconds, then reset the rest and close the sessions."""
        await self._listeners.drain(deadline)
        await self._pools.drain(0)

    # === one connection ===

    async def _carry(self, accept_way: _AcceptWay, sock: socket.socket) -> None:
        began = trio.current_time()
        try:
            way = await accept_way(sock)
        except BadHandshake as exc:
            self._log_denied(exc.source, exc.target, exc)
            return
        connection = OutboundConnection(way, began)
        self._context.connections.add_outbound(connection)
        try:
            await self._carry_way(connection)
        finally:
            self._context.connections.remove_outbound(connection)
            if connection.inner is not None:
                await connection.inner.aclose()

    async def _carry_way(self, connection: OutboundConnection) -> None:
        way = connection.way
        try:
            upstream = await self._open(connection)
        except HboneError as exc:
            self._finished(connection, exc)
            await way.failed(exc)
            return
        except BaseException as exc:
            self._finished(connection, stopped(exc))
            reset_socket(way.sock)
            raise
        error: Exception | None = None
        reset: str | None = None
        try:
            try:
                await way.succeeded()
                if isinstance(upstream, Tunnel):
                    if way.leftover:
                        await upstream.send_all(way.leftover)
                else:
                    connection.plain = PlainRelay(way.sock, upstream, first=way.leftover)
            except BadHandshake as exc:
                error = ConnectFailed(str(exc))  # the application's end, not a fault in our protocol
                _reset(upstream)
            except trio.BrokenResourceError as exc:
                error, reset = outcome(cause_of(exc))
                _reset(upstream)
                reset_socket(way.sock)
            except BaseException:
                _reset(upstream)
                reset_socket(way.sock)
                raise
            else:
                if isinstance(upstream, Tunnel):
                    result = await relay(way.sock, upstream)
                else:
                    assert connection.plain is not None
                    result = await connection.plain.run()
                error, reset = outcome(result.error)
        except BaseException as exc:
            error = stopped(exc)
            raise
        finally:
            self._finished(connection, error, reset)

    async def _open(self, connection: OutboundConnection) -> Tunnel | socket.socket:
        """Route it and connect.

        Raises:
            HboneError: there is no way, or it does not work.
        """
        way, context = connection.way, self._context
        source = context.local.find(way.source.ip)
        if source is None:
            source = await context.local.wait_for(way.source.ip)
            if source is None:
                dedicated = context.local.dedicated
                whose = f"workload {dedicated}" if dedicated else f"a workload with the address {way.source.ip}"
                raise NoRoute(way.target, f"unknown source: {whose} is not in the mesh, or not on this node")
        connection.workload = source
        route = self._route(connection, source, way.target)
        hop = route.next_hop
        if isinstance(hop, Endpoint) or hop.ip is not None:
            return await self._connect(connection, source, route)
        # A name: of a workload that the mesh knows by its name only, or one that the mesh does not have. One of the
        # addresses of the latter may be one that the mesh has.
        failed: list[tuple[HboneError, OutboundRoute | None, _Facts | None]] = []
        for address in await resolve(hop):
            try:
                if route.type is RouteType.PASSTHROUGH:
                    chosen = self._route(connection, source, address)
                else:
                    assert address.ip is not None
                    chosen = route.resolved(address.ip)
                    self._take(connection, source, chosen)
                return await self._connect(connection, source, chosen)
            except NoRoute as exc:
                failed.append((exc, None, None))
            except (BadTarget, Unreachable, ConnectFailed) as exc:
                connection.end_count(exc)
                inner, connection.inner = connection.inner, None
                if inner is not None:
                    await inner.aclose()
                failed.append((exc, connection.route, connection.facts))
        if not failed:
            raise ConnectFailed(f"{hop.host} has no address")
        first, connection.route, connection.facts = failed[0]  # the best address, and why it would not do
        raise first

    def _route(self, connection: OutboundConnection, source: Workload, target: Authority) -> OutboundRoute:
        if target.port in self._context.own_ports and target.ip is not None and target.ip.is_loopback:
            raise NoRoute(target, f"{target} is a port of this node itself: the connection would go in a circle")
        source_ip = connection.source.ip
        if self._context.local.dedicated is not None and source.addresses:
            # All are its connections, also those that come from loopback: a waypoint's must not go to itself again.
            source_ip = source.addresses[0]
        route = self._context.router.outbound(self._context.mesh.snapshot, source, source_ip, target)
        if isinstance(route, NoOutboundRoute):
            raise NoRoute(target, route.reason)
        self._take(connection, source, route)
        return route

    def _take(self, connection: OutboundConnection, source: Workload, route: OutboundRoute) -> None:
        snapshot = self._context.mesh.snapshot
        known = snapshot.memo.get(self)
        if not isinstance(known, _Known) or len(known) >= _REMEMBERED:
            known = snapshot.memo[self] = _Known()
        facts = known.get(id(route))
        if facts is None or facts.route is not route or facts.source is not source:
            facts = known[id(route)] = _Facts(source, route)
        connection.route, connection.facts = route, facts
        if _log.isEnabledFor(logging.INFO):
            self._tell(f"proxy to {connection.original}{facts.way}")

    async def _connect(
        self, connection: OutboundConnection, source: Workload, route: OutboundRoute
    ) -> Tunnel | socket.socket:
        facts, settings, metrics = connection.facts, self._context.settings, self._context.metrics
        assert facts is not None
        if route.protocol is not OutboundProtocol.DOUBLE_HBONE:  # whom to count that for, its far end tells
            self._count(connection, facts.labels)
        if route.protocol is OutboundProtocol.TCP:
            hop = route.next_hop
            timeout = settings.timeouts.connect if settings.timeouts is not None else 10.0
            host = str(hop.ip) if isinstance(hop, Endpoint) else hop.host
            return await connect_tcp(host, hop.port, timeout=timeout, options=settings.socket_options)
        assert route.authority is not None
        assert facts.identity is not None
        pool = self._pools.ready(facts.identity)
        if pool is None:
            pool = await self._pools.get(facts.identity)
        headers = self._headers(connection, facts)
        began = trio.current_time()
        tunnel = await pool.open_tunnel(route.authority, expect=facts.expect, via=route.next_hop, headers=headers)
        if route.protocol is OutboundProtocol.DOUBLE_HBONE:
            tunnel = await self._open_inner(connection, facts, tunnel, headers)
        connection.tunnel = tunnel
        if metrics is not None:
            metrics.connect_finished("client", trio.current_time() - began)
        return tunnel

    async def _open_inner(
        self,
        connection: OutboundConnection,
        facts: _Facts,
        outer: Tunnel,
        headers: list[tuple[bytes, bytes]],
    ) -> Tunnel:
        """The tunnel inside the tunnel. Not shared: the next connection may be for another endpoint over there.

        Wire profile, double HBONE.
        """
        context, route, source = self._context, facts.route, facts.source
        assert route.authority is not None
        connection.inner = AsyncExitStack()
        inner = await connection.inner.enter_async_context(
            HBONEClient.over_stream(
                outer,
                svid=context.svids.source(source.identity),
                expect=facts.inner_expect,
                limits=context.settings.limits,
                timeouts=context.settings.timeouts,
                observer=self._observer,
            )
        )
        network = (b"x-forwarded-network", context.settings.network.encode())
        tunnel = await inner.open_tunnel(route.authority, headers=[*headers, network])
        assert tunnel.response is not None
        connection.far_end, connection.far_identity = tunnel.response.baggage, inner.peer.identity
        labels = labels_for(
            "source",
            source=source,
            destination=connection.far_end,
            service=route.service,
            source_principal=source.identity,
            destination_principal=connection.far_identity,
            mutual_tls=True,
        )
        self._count(connection, labels)
        return tunnel

    def _headers(self, connection: OutboundConnection, facts: _Facts) -> list[tuple[bytes, bytes]]:
        """Wire profile, request headers."""
        return [
            facts.baggage,
            (b"forwarded", Forwarded(source=connection.source, host=facts.forwarded_host).encode()),
            (b"traceparent", TraceParent.from_random(os.urandom(24)).encode()),
        ]

    # === what is told ===

    def _tell(self, message: str) -> None:
        """A line of level info for each connection: not by way of `logging`, which takes five times as long."""
        log = self._context.access_log
        if log is not None:
            log.write_info("proxy::outbound", message)
        else:
            _log.info("%s", message)

    def _count(self, connection: OutboundConnection, labels: TrafficLabels) -> None:
        context = self._context
        connection.attempts += 1
        if context.metrics is not None:
            connection.counted = context.metrics.connection_opened(labels=labels, live=connection.received_and_sent)
        if context.access_log is not None and context.access_log.level <= LogLevel.DEBUG:
            context.access_log.write(self._record(connection, None, opened=True))

    def _finished(self, connection: OutboundConnection, error: Exception | None, reset: str | None = None) -> None:
        facts = connection.facts
        if facts is None:
            self._log_denied(connection.source, connection.original, error)
            return
        if not connection.attempts:  # it did not get as far: no address for a name, no far end of a tunnel in a tunnel
            self._count(connection, facts.labels)
        connection.end_count(error)
        duration = trio.current_time() - connection.began
        if _log.isEnabledFor(logging.INFO):
            self._tell(f"complete dur={duration * 1000:.3f}ms")
        log = self._context.access_log
        if log is None:
            return
        if error is not None or reset is not None or connection.far_end is not None:
            log.write(self._record(connection, error, reset))
            return
        if facts.pattern is None:
            facts.pattern = AccessPattern(self._record(connection, None))
        received, sent = connection.received_and_sent()
        log.write_complete(facts.pattern, connection.source, received, sent, duration)

    @staticmethod
    def _record(
        connection: OutboundConnection, error: Exception | None, reset: str | None = None, *, opened: bool = False
    ) -> AccessRecord:
        """The line of a connection that went somewhere, or was meant to."""
        facts = connection.facts
        assert facts is not None
        source, destination, route = facts.source_names, facts.destination_names, facts.route
        tunnelled = route.authority is not None
        identity = facts.destination
        if connection.far_end is not None:
            destination, identity = log_names(connection.far_end), connection.far_identity
        received, sent = connection.received_and_sent()
        return AccessRecord(
            direction=Direction.OUTBOUND,
            src_addr=connection.source,
            src_workload=source.workload,
            src_namespace=source.namespace,
            src_identity=facts.identity,
            src_cluster=source.cluster,
            dst_addr=route.next_hop,
            dst_hbone_addr=route.authority,
            dst_service=facts.host,
            dst_workload=destination.workload,
            dst_namespace=destination.namespace,
            dst_identity=identity if tunnelled else None,
            dst_cluster=destination.cluster,
            bytes_sent=None if opened else received,
            bytes_recv=None if opened else sent,
            duration=None if opened else trio.current_time() - connection.began,
            error=error_text(error) if error is not None else None,
            reset=reset,
            opened=opened,
        )

    def _log_denied(self, source: Endpoint | None, target: Authority | None, error: Exception | None) -> None:
        """The line of a connection that never had a route."""
        log = self._context.access_log
        if log is not None:
            text = error_text(error) if error is not None else None
            log.write(AccessRecord(direction=Direction.OUTBOUND, src_addr=source, dst_addr=target, error=text))


def _reset(upstream: Tunnel | socket.socket) -> None:
    if isinstance(upstream, Tunnel):
        upstream.abort()
    else:
        reset_socket(upstream)
