"""What the parts of a node share, and which of the mesh's workloads the node serves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from collections.abc import Callable

    from hbone.address import IPAddress
    from hbone.certs import SvidManager
    from hbone.mesh import MeshState, Workload
    from hbone.protocol import Limits
    from hbone.proxy._connections import ConnectionTable
    from hbone.rbac import Authorizer
    from hbone.routing import Router
    from hbone.telemetry import AccessLog, Metrics
    from hbone.transport import PoolLimits, SocketOptions, Timeouts

__all__ = ["LocalWorkloads", "NodeContext", "NodeSettings", "WorkloadInfo"]

#: Addresses whose owner is remembered: anybody may connect from any address.
_REMEMBERED: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadInfo:
    """The one workload of a dedicated node."""

    namespace: str
    name: str
    service_account: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}/{self.service_account}"


class _Known(dict["IPAddress | None", "Workload | None"]):
    """Whose connections are; kept with the snapshot that says so."""


class LocalWorkloads:
    """Which workload a connection of this node belongs to.

    A dedicated node has one workload, and everything is that one's, whatever its address. Otherwise a connection
    belongs to the workload that has its address, and only workloads of this node are served.

    Args:
        mesh: what there is.
        network: the network that this node is in.
        dedicated: the one workload; by address when None.
        node: the name of this node; all nodes' workloads when None.
        patience: seconds to wait for a workload that the mesh does not have yet (as ztunnel).
    """

    def __init__(
        self,
        mesh: MeshState,
        *,
        network: str = "",
        dedicated: WorkloadInfo | None = None,
        node: str | None = None,
        patience: float = 5.0,
    ) -> None:
        self._mesh = mesh
        self._network = network
        self._dedicated = dedicated
        self._node = node
        self._patience = patience

    @property
    def dedicated(self) -> WorkloadInfo | None:
        """The one workload, or None when connections are told apart by address."""
        return self._dedicated

    def find(self, ip: IPAddress) -> Workload | None:
        """The workload that a connection from or to this local address belongs to; None when we serve none there."""
        snapshot = self._mesh.snapshot
        known = snapshot.memo.get(self)
        if not isinstance(known, _Known) or len(known) >= _REMEMBERED:
            known = snapshot.memo[self] = _Known()
        key = None if self._dedicated is not None else ip
        try:
            return known[key]
        except KeyError:
            pass
        info = self._dedicated
        if info is not None:
            found = snapshot.find_workload(info.namespace, info.name, info.service_account, node=self._node)
        else:
            found = snapshot.workload_by_address(self._network, ip)
            if found is not None and self._node is not None and found.node != self._node:
                found = None
        known[key] = found
        return found

    async def wait_for(self, ip: IPAddress) -> Workload | None:
        """`find`, but waits a little for a workload that is not there yet. No checkpoint when it is there."""
        found = self.find(ip)
        if found is not None:
            return found
        with trio.move_on_after(self._patience):
            while found is None:
                changed = trio.Event()
                unsubscribe = self._mesh.subscribe(lambda _old, _new, changed=changed: changed.set())  # type: ignore[misc]
                try:
                    await changed.wait()
                finally:
                    unsubscribe()
                found = self.find(ip)
        return found

    def served(self) -> tuple[Workload, ...]:
        """All workloads that this node serves now."""
        info = self._dedicated
        if info is None:
            return self._mesh.snapshot.workloads_on_node(self._node)
        found = self._mesh.snapshot.find_workload(info.namespace, info.name, info.service_account, node=self._node)
        return () if found is None else (found,)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSettings:
    """What the data plane of a node needs to know besides the mesh."""

    network: str = ""
    keep_source: bool | None = None
    """Whether the application sees the peer's address: True must work, None where it is allowed, False never."""
    response_baggage: bool = True
    """Whether answers say who the destination is, and whether requests' baggage is read."""
    socket_options: SocketOptions | None = None
    limits: Limits | None = None
    pool_limits: PoolLimits | None = None
    timeouts: Timeouts | None = None


@dataclass(slots=True, kw_only=True)
class NodeContext:
    """What a node's ways in have in common."""

    mesh: MeshState
    router: Router
    authorizer: Authorizer
    svids: SvidManager
    local: LocalWorkloads
    connections: ConnectionTable
    metrics: Metrics | None = None
    access_log: AccessLog | None = None
    settings: NodeSettings = field(default_factory=NodeSettings)
    own_ports: set[int] = field(default_factory=set)
    """Ports that this node listens on, besides the mesh's fixed ones: a captured connection to one is a loop."""
    on_stop: list[Callable[[], None]] = field(default_factory=list)
