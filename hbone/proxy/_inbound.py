"""The inbound proxy: HBONE in, TCP out."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import trio

from hbone.proxy._facts import outcome
from hbone.telemetry import AccessRecord, Direction, MetricsObserver, response_flag
from hbone.transport import ForwardHandler, HBONEServer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hbone.address import Endpoint
    from hbone.identity import IdentityPattern
    from hbone.protocol import Limits
    from hbone.telemetry import AccessLog, Metrics, OpenConnection
    from hbone.tls import PeerPolicy, SvidSource
    from hbone.transport import ForwardResult, TargetRule, Timeouts, TunnelRequest

__all__ = ["InboundProxy"]


class InboundProxy:
    """Terminates HBONE and forwards each tunnel to TCP, as far as its rules allow.

    Args:
        svid: who we are.
        allow: where tunnels may go; `DialledAddress` is what ztunnel does.
        peers: who may ask; everybody who may open a session when None.
        accept: who may open a session; any identity of our own trust domain when None.
        access_log: one line for each request.
        metrics: where to count.
        limits: what each session may use.
        timeouts: how long each step may take.
    """

    def __init__(
        self,
        svid: SvidSource,
        allow: TargetRule,
        *,
        peers: Iterable[IdentityPattern] | None = None,
        accept: PeerPolicy | None = None,
        access_log: AccessLog | None = None,
        metrics: Metrics | None = None,
        limits: Limits | None = None,
        timeouts: Timeouts | None = None,
    ) -> None:
        self._svid = svid
        self._access_log = access_log
        self._metrics = metrics
        self._open: dict[TunnelRequest, OpenConnection] = {}
        handler = ForwardHandler(
            allow,
            peers=peers,
            on_open=self._opened,
            on_done=self._done,
            **({"connect_timeout": timeouts.connect} if timeouts is not None else {}),
        )
        self.server: HBONEServer = HBONEServer(
            svid,
            handler,
            accept=accept,
            limits=limits,
            timeouts=timeouts,
            observer=MetricsObserver(metrics) if metrics is not None else None,
        )

    async def serve(
        self, host: str, port: int, *, task_status: trio.TaskStatus[Endpoint] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve until `drain` or cancelled; see `HBONEServer.serve`."""
        await self.server.serve(host, port, task_status=task_status)

    async def drain(self, deadline: float) -> None:
        """Stop gracefully; see `HBONEServer.drain`."""
        await self.server.drain(deadline)

    def _opened(self, request: TunnelRequest) -> None:
        if self._metrics is not None:
            self._open[request] = self._metrics.connection_opened(
                reporter="destination",
                source_principal=str(request.peer.identity),
                destination_principal=str(self._svid.identity),
                live=partial(_received_and_sent, request),
            )

    def _done(self, result: ForwardResult) -> None:
        connection = self._open.pop(result.request, None)
        refused = not 200 <= result.status <= 299
        error, reset = (result.error, None) if refused else outcome(result.error)
        if connection is not None:
            connection.closed(result.bytes_up, result.bytes_down, response_flag(error))
        if self._access_log is not None:
            request = result.request
            self._access_log.write(
                AccessRecord(
                    direction=Direction.INBOUND,
                    src_addr=request.peer.address,
                    src_identity=request.peer.identity,
                    dst_addr=result.upstream if result.upstream is not None else request.local_address,
                    dst_hbone_addr=request.headers.authority,
                    dst_identity=self._svid.identity,
                    bytes_sent=None if refused else result.bytes_down,
                    bytes_recv=None if refused else result.bytes_up,
                    duration=result.seconds,
                    error=str(error) if error is not None else None,
                    reset=reset,
                    status=result.status if refused and result.status else None,
                    flag=result.flag,
                )
            )


def _received_and_sent(request: TunnelRequest) -> tuple[int, int]:
    statistics = request.tunnel_statistics()
    return statistics.bytes_received, statistics.bytes_sent
