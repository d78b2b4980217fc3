"""The outbound proxy: TCP in, in several ways, HBONE out."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Self

import trio

from hbone.errors import BadTarget, ConnectFailed, HboneError, Unreachable
from hbone.protocol import Forwarded, TraceParent
from hbone.proxy._facts import cause_of, outcome
from hbone.proxy._listeners import Listeners
from hbone.proxy._ways import BadHandshake, accept_forward, accept_http_connect, accept_socks5
from hbone.telemetry import AccessRecord, Direction, MetricsObserver, response_flag
from hbone.transport import ConnectionPool, listen_tcp, relay, reset_socket, resolve

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable
    from types import TracebackType

    from hbone.address import Authority, Endpoint
    from hbone.protocol import Baggage, Limits
    from hbone.proxy._ways import WayIn
    from hbone.telemetry import AccessLog, Metrics
    from hbone.tls import PeerPolicy, SvidSource
    from hbone.transport import PoolLimits, PoolStatistics, Timeouts, Tunnel

__all__ = ["OutboundProxy"]


class OutboundProxy:
    """Carries applications' TCP connections as HBONE, all on one pool of sessions.

    An ``async with`` block; leaving it closes the sessions. Inside, start one `serve_*` for each way in.

    Args:
        svid: who we are.
        via: the next hop for everything; the target's own address, port 15008, when None.
        expect: whom we accept as the next hop; any identity of our own trust domain when None.
        baggage: says who sends, for the other side's telemetry.
        access_log: one line for each connection.
        metrics: where to count.
        pool_limits: bounds of the pool.
        limits: what each session may use.
        timeouts: how long each step may take.
    """

    def __init__(
        self,
        svid: SvidSource,
        *,
        via: str | Endpoint | Authority | None = None,
        expect: PeerPolicy | None = None,
        baggage: Baggage | None = None,
        access_log: AccessLog | None = None,
        metrics: Metrics | None = None,
        pool_limits: PoolLimits | None = None,
        limits: Limits | None = None,
        timeouts: Timeouts | None = None,
    ) -> None:
        self._svid = svid
        self._via = via
        self._expect = expect
        self._baggage = (b"baggage", baggage.encode() if baggage is not None else b"")
        self._access_log = access_log
        self._metrics = metrics
        self._pool = ConnectionPool(
            svid,
            limits=pool_limits,
            session_limits=limits,
            timeouts=timeouts,
            observer=MetricsObserver(metrics) if metrics is not None else None,
        )
        self._listeners = Listeners()

    async def __aenter__(self) -> Self:
        await self._pool.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._pool.__aexit__(kind, problem, traceback)

    @property
    def connections(self) -> int:
        """Applications' connections that are being served."""
        return self._listeners.live

    def statistics(self) -> PoolStatistics:
        """The pool's numbers."""
        return self._pool.statistics()

    # === ways in ===

    async def serve_forward(
        self,
        host: str,
        port: int,
        target: Authority,
        *,
        task_status: trio.TaskStatus[Endpoint] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Every connection to `host:port` is one to `target`. Until `drain` or cancelled.

        Raises:
            OSError: it cannot listen there. The same for the other ways in.
        """
        await self._serve(listen_tcp(host, port), partial(accept_forward, target=target), task_status)

    async def serve_socks(
        self, host: str, port: int, *, task_status: trio.TaskStatus[Endpoint] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """SOCKS5 without authentication: listen on loopback only, unless everybody who can connect may."""
        await self._serve(listen_tcp(host, port), accept_socks5, task_status)

    async def serve_http_connect(
        self, host: str, port: int, *, task_status: trio.TaskStatus[Endpoint] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """An HTTP/1.1 proxy that knows CONNECT only: for ``https_proxy`` and ``curl --proxytunnel -x``."""
        await self._serve(listen_tcp(host, port), accept_http_connect, task_status)

    async def serve_captured(
        self,
        host: str,
        port: int,
        *,
        transparent: bool = False,
        task_status: trio.TaskStatus[Endpoint] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Connections that netfilter redirected here (REDIRECT, or TPROXY with `transparent`). Linux.

        Raises:
            PermissionError: `transparent` without CAP_NET_ADMIN.
        """
        from hbone.proxy._ways import _capture

        listener = listen_tcp(host, port, prepare=partial(_capture.prepare_listener, transparent=transparent))
        own = {int(listener.getsockname()[1])}
        await self._serve(listener, partial(_capture.accept_captured, own_ports=own), task_status)

    # === life ===

    async def drain(self, deadline: float) -> None:
        """Stop accepting, let connections finish for `deadline` seconds, then reset the rest and close the sessions."""
        await self._listeners.drain(deadline)
        await self._pool.aclose()

    async def _serve(
        self,
        listener: socket.socket,
        accept_way: Callable[[socket.socket], Awaitable[WayIn]],
        task_status: trio.TaskStatus[Endpoint],
    ) -> None:
        await self._listeners.serve(listener, partial(self._carry, accept_way), task_status=task_status)

    async def _carry(self, accept_way: Callable[[socket.socket], Awaitable[WayIn]], sock: socket.socket) -> None:
        began = trio.current_time()
        try:
            way = await accept_way(sock)
        except BadHandshake as exc:
            self._record(None, None, None, began, exc)
            return
        try:
            if way.target.ip is None:
                tunnel = await self._open_by_name(way)
            else:
                tunnel = await self._pool.open_tunnel(
                    way.target, expect=self._expect, via=self._via, headers=self._headers(way)
                )
        except HboneError as exc:
            self._record(way, None, None, began, exc)
            await way.failed(exc)
            return
        except BaseException:
            self._record(way, None, None, began, HboneError("the proxy was stopped"))
            reset_socket(way.sock)
            raise
        if self._metrics is not None:
            self._metrics.connect_finished("client", trio.current_time() - began)
        await self._relay(way, tunnel, began)

    async def _open_by_name(self, way: WayIn) -> Tunnel:
        """Names are resolved here: a node serves addresses, and perhaps another one than the first."""
        try_again: tuple[type[HboneError], ...] = (BadTarget, Unreachable)
        if self._via is None:  # then each address is a next hop of its own
            try_again = (*try_again, ConnectFailed)
        first: HboneError | None = None
        for target in await resolve(way.target):
            try:
                return await self._pool.open_tunnel(
                    target, expect=self._expect, via=self._via, headers=self._headers(way)
                )
            except try_again as exc:
                first = first or exc
        raise first or ConnectFailed(f"{way.target.host} has no address")

    async def _relay(self, way: WayIn, tunnel: Tunnel, began: float) -> None:
        counted = None
        if self._metrics is not None:
            counted = self._metrics.connection_opened(
                reporter="source",
                source_principal=str(self._svid.identity),
                destination_principal=str(tunnel.peer.identity),
                live=partial(_received_and_sent, tunnel),
            )
        error: Exception | None = None
        reset: str | None = None
        try:
            try:
                await way.succeeded()
                if way.leftover:
                    await tunnel.send_all(way.leftover)
            except (BadHandshake, trio.BrokenResourceError) as exc:
                error, reset = outcome(cause_of(exc))
                tunnel.abort()
                reset_socket(way.sock)
            except BaseException:
                tunnel.abort()
                reset_socket(way.sock)
                raise
            else:
                error, reset = outcome((await relay(way.sock, tunnel)).error)
        except trio.Cancelled:
            error = HboneError("the proxy was stopped")
            raise
        finally:
            received, sent = _received_and_sent(tunnel)
            if counted is not None:
                counted.closed(received, sent, response_flag(error))
            self._record(way, tunnel, (received, sent), began, error, reset)

    def _headers(self, way: WayIn) -> list[tuple[bytes, bytes]]:
        return [
            self._baggage,
            (b"forwarded", Forwarded(source=way.source).encode()),
            (b"traceparent", TraceParent.from_random(os.urandom(24)).encode()),
        ]

    def _record(
        self,
        way: WayIn | None,
        tunnel: Tunnel | None,
        counts: tuple[int, int] | None,
        began: float,
        error: Exception | None,
        reset: str | None = None,
    ) -> None:
        if self._access_log is None:
            return
        authority = None if way is None else str(way.target) if tunnel is None else tunnel.request.authority
        self._access_log.write(
            AccessRecord(
                direction=Direction.OUTBOUND,
                src_addr=way.source if way is not None else None,
                src_identity=self._svid.identity,
                dst_addr=tunnel.peer.address if tunnel is not None else None,
                dst_hbone_addr=authority,
                dst_identity=tunnel.peer.identity if tunnel is not None else None,
                bytes_sent=counts[0] if counts is not None else None,
                bytes_recv=counts[1] if counts is not None else None,
                duration=trio.current_time() - began,
                error=str(error) if error is not None else None,
                reset=reset,
                status=getattr(error, "status", None),
                flag=response_flag(error) if error is not None else None,
            )
        )


def _received_and_sent(tunnel: Tunnel) -> tuple[int, int]:
    """In Istio's sense: received from the application, sent to it."""
    return tunnel.bytes_sent, tunnel.bytes_received
