"""The connections of a node, and the watch over those that policy has let in.

An inbound connection is registered before it is judged, so that no change of policy can fall in between. After each
change of the mesh every registered connection is judged again, against the newest picture and the newest version of
the workload that it goes to; what is no longer allowed is closed. That happens in slices with room for the data plane
in between: ten thousand connections must not hold up the bytes of one. A change that comes meanwhile counts from the
next slice on, and is followed by another round: a mesh that never rests does not keep those at the end from their turn.

Should judging itself fail, it fails closed: the connection that was judged is not let in, or is closed, and the others
go on. Nothing of the mesh can do that as far as we know; but what guards must not stand open when we are wrong.

Outbound connections are registered only to be shown.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final, Protocol

import trio

from hbone.mesh import Action
from hbone.rbac import PolicyFailed, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from hbone.address import Authority, Endpoint
    from hbone.mesh import MeshSnapshot, MeshState, Workload
    from hbone.rbac import Authorizer, DryRunMatch, Flow

__all__ = ["ConnectionTable", "InboundConnection", "ShownConnection"]

_log: Final = logging.getLogger("hbone.proxy.connections")

#: Seconds of judging between two chances for the data plane.
_SLICE: Final = 0.002


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
        dry_run: what policies that are only tried out said of it last.
    """

    __slots__ = ("_close", "actual", "dry_run", "flow", "original", "protocol", "revoked", "source", "workload")

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
        self.dry_run: tuple[DryRunMatch, ...] = ()
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
        on_verdict: told of each decision: whether a connection is let in, and that it is closed.
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
        verdict = self._judge(connection, self._mesh.snapshot)
        self._tell(connection, verdict)
        return verdict

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
                await self._judge_all()
                if not self._changed.is_set():
                    self._settled.set()
        finally:
            unsubscribe()

    async def settled(self) -> None:
        """Wait until every connection has been judged by the newest picture of the mesh."""
        while not self._settled.is_set():
            await self._settled.wait()

    def _note_change(self, _old: MeshSnapshot, _new: MeshSnapshot) -> None:
        if self._settled.is_set():
            self._settled = trio.Event()
        self._changed.set()

    async def _judge_all(self) -> None:
        began = time.perf_counter()
        # Whoever comes while we wait is judged by the newest picture anyway.
        for connection in tuple(self._inbound):
            if time.perf_counter() - began > _SLICE:
                await trio.lowlevel.checkpoint()
                began = time.perf_counter()
            if connection not in self._inbound or connection.revoked is not None:
                continue
            try:
                self._judge_again(connection)
            except Exception:  # noqa: BLE001 - one of thousands, and the others are to be judged as well
                _log.exception("policy: %s: what was decided could not be done", _words(connection))

    def _judge_again(self, connection: InboundConnection) -> None:
        verdict = self._judge(connection, self._mesh.snapshot)
        if not verdict.allowed:
            connection.revoke(verdict)
            self._tell(connection, verdict)
        elif verdict.dry_run != connection.dry_run:
            self._tell_dry_run(connection, verdict)

    def _judge(self, connection: InboundConnection, snapshot: MeshSnapshot) -> Verdict:
        # A workload that has left the mesh is judged as it was last: its connections are still to it.
        newest = snapshot.workloads.get(connection.workload.uid)
        if newest is not None:
            connection.workload = newest
        try:
            return self._authorizer.authorize(snapshot, connection.workload, connection.flow)
        except Exception as problem:  # noqa: BLE001 - whatever it is: nobody has said yes
            return self._failed(connection, snapshot, problem)

    def _failed(self, connection: InboundConnection, snapshot: MeshSnapshot, problem: Exception) -> Verdict:
        policy = problem.policy if isinstance(problem, PolicyFailed) else None
        reason = str(problem) if policy is not None else f"policies cannot be evaluated: {problem!r}"
        # The stack once for each picture of the mesh: whoever connects a thousand times must not fill the log.
        first = snapshot.memo.get(self) is None
        snapshot.memo[self] = reason
        _log.error("policy: %s: denied (%s)", _words(connection), reason, exc_info=problem if first else None)
        return Verdict(allowed=False, policy=policy, reason=reason)

    # === what is told ===

    def _tell(self, connection: InboundConnection, verdict: Verdict) -> None:
        if self._on_verdict is not None:
            self._on_verdict(verdict)
        if _log.isEnabledFor(self._log_level):
            decided = "allowed" if verdict.allowed else "denied"
            _log.log(self._log_level, "policy: %s: %s (%s)", _words(connection), decided, verdict.reason)
        if verdict.dry_run:
            self._tell_dry_run(connection, verdict)

    def _tell_dry_run(self, connection: InboundConnection, verdict: Verdict) -> None:
        connection.dry_run = verdict.dry_run
        if _log.isEnabledFor(self._log_level):
            for match in verdict.dry_run:
                would = "denied" if match.action is Action.DENY else "allowed"
                _log.log(self._log_level, "policy: %s would be %s by %s", _words(connection), would, match.policy)


def _words(connection: InboundConnection) -> str:
    who = connection.flow.source_identity or "a plain-text peer"
    to = f"{connection.workload.key} port {connection.flow.destination_port}"
    return f"{who} from {connection.source} to {to}"
