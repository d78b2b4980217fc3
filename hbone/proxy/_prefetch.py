"""For whom a node has certificates ahead of the first connection.

For every workload that it serves and that speaks HBONE. A node that was not told its name serves the workloads of all
nodes, if only their addresses are here; of many of them it asks for the certificates of those whose addresses are.
"""

from __future__ import annotations

import logging
import socket
from typing import TYPE_CHECKING, Final

import trio

from hbone.address import Endpoint
from hbone.errors import InvalidIdentity
from hbone.mesh import TunnelProtocol

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hbone.address import IPAddress
    from hbone.identity import SpiffeIdentity
    from hbone.mesh import Workload

__all__ = ["Prefetch", "identities_of"]

_log: Final = logging.getLogger("hbone.proxy.node")

#: More workloads than a machine has.
_MANY: Final = 250


class Prefetch:
    """Says whose certificates to ask for.

    Args:
        all_nodes: whether the served workloads are those of all nodes.
    """

    def __init__(self, *, all_nodes: bool) -> None:
        self._all_nodes = all_nodes
        self._here: set[IPAddress] = set()

    async def look(self, served: Iterable[Workload]) -> None:
        """See which addresses are of this machine; in a thread, as it is a system call or two for each."""
        workloads = [workload for workload in served if _speaks_hbone(workload)]
        if self._all_nodes and len(workloads) > _MANY:
            unknown = {ip for workload in workloads for ip in workload.addresses} - self._here
            self._here |= await trio.to_thread.run_sync(_own, unknown)

    def identities(self, served: Iterable[Workload]) -> set[SpiffeIdentity]:
        """The identities of those among `served` that certificates are to be had for."""
        workloads = [workload for workload in served if _speaks_hbone(workload)]
        if self._all_nodes and len(workloads) > _MANY:
            workloads = [workload for workload in workloads if not self._here.isdisjoint(workload.addresses)]
        return identities_of(workloads)


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


def _own(addresses: Iterable[IPAddress]) -> set[IPAddress]:
    """Those that a socket can be bound to here."""
    own = set()
    for ip in addresses:
        try:
            with socket.socket(socket.AF_INET if ip.version == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as probe:
                probe.bind(Endpoint(ip, 0).sockaddr)
        except OSError:
            continue
        own.add(ip)
    return own
