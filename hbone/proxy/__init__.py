"""Proxies, to run from the command line or to embed: built only from the library's public names.

`InboundProxy` terminates HBONE and forwards to applications; `OutboundProxy` takes applications' connections, in one
or more ways, and carries them as HBONE. `Node` is both, for all the workloads of a machine, as a mesh says. Each writes
one access-log line a connection and counts it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

from hbone.proxy._inbound import InboundProxy as InboundProxy
from hbone.proxy._outbound import OutboundProxy as OutboundProxy

if TYPE_CHECKING:
    from hbone.proxy._context import WorkloadInfo as WorkloadInfo
    from hbone.proxy._node import Node as Node
    from hbone.proxy._node import NodeStatistics as NodeStatistics
    from hbone.proxy._node_config import NodeConfig as NodeConfig
    from hbone.proxy._node_config import ProxyMode as ProxyMode
    from hbone.proxy._node_config import Setting as Setting
    from hbone.proxy._node_config import node_settings as node_settings
    from hbone.proxy._node_values import ListenAddress as ListenAddress
else:

    def __getattr__(name: str) -> object:
        module = _LAZY.get(name)
        if module is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
        return value


__all__ = [
    "InboundProxy",
    "ListenAddress",
    "Node",
    "NodeConfig",
    "NodeStatistics",
    "OutboundProxy",
    "ProxyMode",
    "Setting",
    "WorkloadInfo",
    "node_settings",
]

# A node brings policies, routing and an HTTP server along, which the two others have no use for.
_LAZY: Final = {
    "ListenAddress": "_node_values",
    "Node": "_node",
    "NodeConfig": "_node_config",
    "NodeStatistics": "_node",
    "ProxyMode": "_node_config",
    "Setting": "_node_config",
    "WorkloadInfo": "_context",
    "node_settings": "_node_config",
}
