"""For whom a node has certificates ahead of the first connection.

For every workload that it serves and that speaks HBONE. A node that was not told its name serves the workloads of all
nodes, if only their addresses are here; of many of them it asks for the certificates of those whose addresses are.

A mesh may have ten thousand workloads, so who they are is worked out in a thread, once for each snapshot.
"""

from __future__ import annotations

import logging
import socket
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from hbone.address import Endpoint
from hbone.errors import InvalidIdentity
from hbone.mesh import TunnelProtocol
from hbone.proxy._facts import identity_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from hbone.address import IPAddress
    from hbone.identity import SpiffeIdentity
    from hbone.mesh import MeshSnapshot, Workload

__all__ = ["Prefetch", "identities_of"]

_log: Final = logging.getLogger("hbone.proxy.node")

#: More workloads than a machine has.
_MANY: Final = 250
#: Addresses to try in a row.
_A_PAUSE: Final = 50


class _Served:
    """The workloads that a node serves by one snapshot; kept in its memo."""

    __slots__ = ("addresses", "ahead", "identities", "tunnelled", "workloads")

    def __init__(self, workloads: Collection[Workload]) -> None:
        self.workloads = workloads
        self.identities = frozenset(identities_of(workloads))
        self.tunnelled: tuple[Workload, ...] = tuple(filter(_speaks_hbone, workloads))
        self.addresses: frozenset[IPAddress] = frozenset(ip for workload in self.tunnelled for ip in workload.addresses)
        self.ahead: frozenset[SpiffeIdentity] | None = None

    def work_out_ahead(self, here: frozenset[IPAddress] | None) -> frozenset[SpiffeIdentity]:
        """Whose certificates are to be had, if only those with addresses in `here` may need them; None: all may."""
        workloads: Iterable[Workload] = self.tunnelled
        if here is not None:
            workloads = (workload for workload in workloads if not here.isdisjoint(workload.addresses))
        self.ahead = frozenset(found for found in map(identity_of, workloads) if found is not None)
        return self.ahead


class Prefetch:
    """Says who is served, and whose certificates to ask for.

    Args:
        served: the workloads that the node serves by a snapshot.
        all_nodes: whether these are the workloads of all nodes.
        pause: called about every millisecond of work in a thread; see `hbone.mesh.parse_mesh`.
    """

    def __init__(
        self,
        served: Callable[[MeshSnapshot], Collection[Workload]],
        *,
        all_nodes: bool,
        pause: Callable[[], object],
    ) -> None:
        self._served = served
        self._all_nodes = all_nodes
        self._pause = pause
        self._here: frozenset[IPAddress] = frozenset()

    async def look(self, snapshot: MeshSnapshot) -> Collection[Workload]:
        """Work out ahead what the other methods will say of a snapshot, and see which addresses this machine has.

        Returns:
            the workloads that are served.
        """
        return await trio.to_thread.run_sync(partial(self._look, snapshot))

    def _look(self, snapshot: MeshSnapshot) -> Collection[Workload]:
        served = self._of(snapshot)
        if self._many(served):
            self._here |= _own(served.addresses - self._here, self._pause)
        self._work_out(served)
        return served.workloads

    def identities(self, snapshot: MeshSnapshot) -> frozenset[SpiffeIdentity]:
        """All whom the node may speak for."""
        return self._of(snapshot).identities

    def ahead(self, snapshot: MeshSnapshot) -> frozenset[SpiffeIdentity]:
        """Those of them that certificates are to be had for."""
        served = self._of(snapshot)
        return self._work_out(served) if served.ahead is None else served.ahead

    def _work_out(self, served: _Served) -> frozenset[SpiffeIdentity]:
        return served.work_out_ahead(self._here if self._many(served) else None)

    def _many(self, served: _Served) -> bool:
        return self._all_nodes and len(served.tunnelled) > _MANY

    def _of(self, snapshot: MeshSnapshot) -> _Served:
        known = snapshot.memo.get(self)
        if not isinstance(known, _Served):
            known = snapshot.memo[self] = _Served(self._served(snapshot))
        return known


def identities_of(workloads: Iterable[Workload]) -> set[SpiffeIdentity]:
    """Who they are, but for those whose names cannot be part of an identity."""
    found = set()
    for workload in workloads:
        try:
            found.add(workload.identity)
        except InvalidIdentity as problem:
            _log.warning("workload %s gets no certificate: %s", workload.uid, problem)
    return found


def _speaks_hbone(workload: Workload) -> bool:
    return workload.protocol is TunnelProtocol.HBONE or workload.native_tunnel


def _own(addresses: Iterable[IPAddress], pause: Callable[[], object]) -> set[IPAddress]:
    """Those that a socket can be bound to here."""
    own = set()
    for count, ip in enumerate(addresses, 1):
        if count % _A_PAUSE == 0:
            pause()
        try:
            with socket.socket(socket.AF_INET if ip.version == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as probe:
                probe.bind(Endpoint(ip, 0).sockaddr)
        except OSError:
            continue
        own.add(ip)
    return own
