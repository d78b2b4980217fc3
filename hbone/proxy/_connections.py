"""The connections of a node, and the watch over those that policy has let in.

An inbound connection is registered before it is judged, so that no change of policy can fall in between. After each
change of the mesh every registered connection is judged again, against the newest picture and the newest version of
the workload that it goes to; what is no longer allowed is closed. That happens in slices with room for the data plane
in between: ten thousand connections must not hold up the bytes of one. A change that comes meanwhile starts it over.

Outbound connections are registered only to be shown.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final, Protocol

import trio

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from hbone.address import Authority, Endpoint
    from hbone.mesh import MeshSnapshot, MeshState, Workload
    from hbone.rbac import Authorizer, Flow, Verdict

__all__ = ["ConnectionTable", "InboundConnection", "ShownConnection"]

_log: Final = logging.getLogger("hbone.proxy.connections")

#: Seconds of judging between two chances for the data plane.
_SLICE: Final = 0.005


class ShownConnection(Protocol):
    """What a dump shows of a connection."""

    @property
    def workload(self) -> Workload | None:
        """Whose it is."""

    @property
    def source(self) -> Endpoint | None:
        """Where it comes from."""

    @property
    def original(self) -> Authority | str | None:
        """What was asked for."""

    @property
    def actual(self) -> Authority | Endpoint | None:
        """Where it goes."""

    @property
    def protocol(self) -> str:
        """``TCP``, ``HBONE`` or ``DOUBLEHBONE``."""


class InboundConnection:
    """One connection into a workload of this node.

    Attributes:
        workload: where it goes; the version that it was judged by last.
        source: where it comes from; None when that cannot be known.
        original: the service that was asked for, or None.
        actual: where it goes.
        protocol: ``HBONE`` or ``TCP``.
        flow: what policies see.
        revoked: why it was closed from here, or None.
    """

    __slots__ = ("_close", "actual", "flow", "original", "protocol", "revoked", "source", "workload")

    def __init__(
        self,
        *,
        workload: Workload,
        source: Endpoint | None,
        original: str | None,
        actual: Endpoint,
        protocol: str,
        flow: Flow,
        close: Callable[[], None],
    ) -> None:
        self.workload = workload
        self.source = source
        self.original = original
        self.actual = actual
        self.protocol = protocol
        self.flow = flow
        self.revoked: Verdict | None = None
        self._close = close

    def revoke(self, verdict: Verdict) -> None:
        """Close it, because policy says no now. Once."""
        if self.revoked is None:
            self.revoked = verdict
            self._close()


class ConnectionTable:
    """All connections of a node. Start `watch` in a nursery: without it no change closes anything.

    Args:
        mesh: whose changes matter.
        authorizer: judges.
        log_level: of the line for each decision.
        on_verdict: told of each decision.
    """

    def __init__(
        self,
        mesh: MeshState,
        authorizer: Authorizer,
        *,
        log_level: int = logging.DEBUG,
        on_verdict: Callable[[Verdict], None] | None = None,
    ) -> None:
        self._mesh = mesh
        self._authorizer = authorizer
        self._log_level = log_level
        self._on_verdict = on_verdict
        self._inbound: dict[InboundConnection, None] = {}
        self._outbound: dict[ShownConnection, None] = {}
        self._changed = trio.Event()
        self._settled = trio.Event()
        self._settled.set()

    @property
    def inbound(self) -> Collection[InboundConnection]:
        """Connections into workloads, oldest first."""
        return self._inbound.keys()

    @property
    def outbound(self) -> Collection[ShownConnection]:
        """Connections from workloads, oldest first."""
        return self._outbound.keys()

    def add_outbound(self, connection: ShownConnection) -> None:
        """Show it from now on."""
        self._outbound[connection] = None

    def remove_outbound(self, connection: ShownConnection) -> None:
        """Show it no more."""
        self._outbound.pop(connection, None)

    def admit(self, connection: InboundConnection) -> Verdict:
        """Register it, then judge it. Call `release` in the end, whatever the verdict is.

        Returns:
            The verdict. One that is allowed may be taken back at any time: then ``connection.revoked`` is set and its
            ``close`` was called, in the event loop's thread.
        """
        self._inbound[connection] = None
        return self._judge(connection, self._mesh.snapshot)

    def release(self, connection: InboundConnection) -> None:
        """It is over."""
        self._inbound.pop(connection, None)

    async def watch(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Judge all again after each change of the mesh, until cancelled."""
        unsubscribe = self._mesh.subscribe(self._note_change)
        try:
            task_status.started()
            while True:
                await self._changed.wait()
                self._changed = trio.Event()
                if await self._judge_all(self._mesh.snapshot):
                    self._settled.set()
        finally:
            unsubscribe()

    async def settled(self) -> None:
        """Wait until every connection has been judged by the newest picture of the mesh."""
        await self._settled.wait()

    def _note_change(self, _old: MeshSnapshot, _new: MeshSnapshot) -> None:
        if self._settled.is_set():
            self._settled = trio.Event()
        self._changed.set()

    async def _judge_all(self, snapshot: MeshSnapshot) -> bool:
        """False when a newer picture came meanwhile."""
        began = time.perf_counter()
        # Whoever comes while we wait is judged by the newest picture anyway.
        for connection in tuple(self._inbound):
            if time.perf_counter() - began > _SLICE:
                await trio.lowlevel.checkpoint()
                if self._changed.is_set():
                    return False
                began = time.perf_counter()
            if connection in self._inbound and connection.revoked is None:
                verdict = self._judge(connection, snapshot)
                if not verdict.allowed:
                    connection.revoke(verdict)
        return True

    def _judge(self, connection: InboundConnection, snapshot: MeshSnapshot) -> Verdict:
        # A workload that has left the mesh is judged as it was last: its connections are still to it.
        newest = snapshot.workloads.get(connection.workload.uid)
        if newest is not None:
            connection.workload = newest
        verdict = self._authorizer.authorize(snapshot, connection.workload, connection.flow)
        if self._on_verdict is not None:
            self._on_verdict(verdict)
        if _log.isEnabledFor(self._log_level):
            who = connection.flow.source_identity or "a plain-text peer"
            _log.log(
                self._log_level,
                "policy: %s from %s to %s port %d: %s (%s)",
                who,
                connection.source,
                connection.workload.key,
                connection.flow.destination_port,
                "allowed" if verdict.allowed else "denied",
                verdict.reason,
            )
        return verdict
