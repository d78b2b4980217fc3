"""HBONE for Python: TCP through Istio's ambient mesh, one HTTP/2 CONNECT stream a connection, TLS 1.3 with SPIFFE.

The layers, lowest first; each imports only from below (``tests/test_layers.py`` holds it):

    errors                   every exception
    identity, address        values
    protocol                 the wire, without I/O: engine, headers, PROXY protocol
    mesh                     workloads, services, policies: values, a picture of them, the file
    routing, rbac            where a connection goes, and whether it may: pure decisions
    explain                  the same decisions for a whole connection, in words
    tls                      SVIDs, whom we accept, the handshake's checks
    transport                sessions, tunnels, client, server, pool, relay on trio
    certs, telemetry, admin  where SVIDs come from; metrics and logs; the admin port
    control                  where the picture of the mesh comes from
    proxy                    the outbound and inbound proxies and the node, to run or to embed
    testing                  a mesh for tests, and the pytest plugin

Everything most programs need is in this module. `hbone.mesh`, `hbone.routing`, `hbone.rbac`, `hbone.telemetry`,
`hbone.admin`, `hbone.control`, `hbone.proxy` and `hbone.testing` are imported only by who uses them.

Importing it loads nothing, each name loads its package when it is first used: every pytest run in an environment that
has hbone imports its plugin, `hbone.testing.plugin`, and with it this module.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # what things are called
    from hbone.address import Authority as Authority
    from hbone.address import Endpoint as Endpoint

    # where SVIDs come from
    from hbone.certs import CaSvidSource as CaSvidSource
    from hbone.certs import FileSvidSource as FileSvidSource
    from hbone.certs import LocalCA as LocalCA
    from hbone.certs import SvidManager as SvidManager

    # what can go wrong
    from hbone.errors import BadTarget as BadTarget
    from hbone.errors import CertificateUnavailable as CertificateUnavailable
    from hbone.errors import ConfigError as ConfigError
    from hbone.errors import ConfigFault as ConfigFault
    from hbone.errors import ConnectFailed as ConnectFailed
    from hbone.errors import HboneError as HboneError
    from hbone.errors import IdentityRefused as IdentityRefused
    from hbone.errors import InvalidAddress as InvalidAddress
    from hbone.errors import InvalidCertificate as InvalidCertificate
    from hbone.errors import InvalidIdentity as InvalidIdentity
    from hbone.errors import ListenFailed as ListenFailed
    from hbone.errors import LocalProtocolError as LocalProtocolError
    from hbone.errors import MeshConfigError as MeshConfigError
    from hbone.errors import MeshFault as MeshFault
    from hbone.errors import NoRoute as NoRoute
    from hbone.errors import PeerIdentityMismatch as PeerIdentityMismatch
    from hbone.errors import PolicyDenied as PolicyDenied
    from hbone.errors import ProtocolError as ProtocolError
    from hbone.errors import RemoteProtocolError as RemoteProtocolError
    from hbone.errors import RequestRejected as RequestRejected
    from hbone.errors import SessionClosed as SessionClosed
    from hbone.errors import StreamRefused as StreamRefused
    from hbone.errors import TunnelRefused as TunnelRefused
    from hbone.errors import TunnelReset as TunnelReset
    from hbone.errors import Unreachable as Unreachable
    from hbone.identity import IdentityPattern as IdentityPattern
    from hbone.identity import SpiffeIdentity as SpiffeIdentity
    from hbone.identity import TrustDomain as TrustDomain

    # the wire
    from hbone.protocol import Baggage as Baggage
    from hbone.protocol import ConnectRequest as ConnectRequest
    from hbone.protocol import ConnectResponse as ConnectResponse
    from hbone.protocol import Engine as Engine
    from hbone.protocol import ErrorCode as ErrorCode
    from hbone.protocol import Forwarded as Forwarded
    from hbone.protocol import Limits as Limits
    from hbone.protocol import TraceParent as TraceParent

    # who we are and whom we accept
    from hbone.tls import PeerPolicy as PeerPolicy
    from hbone.tls import Svid as Svid
    from hbone.tls import SvidSource as SvidSource

    # sessions and tunnels
    from hbone.transport import HBONE_PORT as HBONE_PORT
    from hbone.transport import AllowNetworks as AllowNetworks
    from hbone.transport import BaseObserver as BaseObserver
    from hbone.transport import ConnectionPool as ConnectionPool
    from hbone.transport import DialledAddress as DialledAddress
    from hbone.transport import FixedTarget as FixedTarget
    from hbone.transport import ForwardHandler as ForwardHandler
    from hbone.transport import ForwardResult as ForwardResult
    from hbone.transport import HBONEClient as HBONEClient
    from hbone.transport import HBONEServer as HBONEServer
    from hbone.transport import Observer as Observer
    from hbone.transport import Peer as Peer
    from hbone.transport import PlainRelay as PlainRelay
    from hbone.transport import PoolLimits as PoolLimits
    from hbone.transport import PoolStatistics as PoolStatistics
    from hbone.transport import RelayResult as RelayResult
    from hbone.transport import ServerStatistics as ServerStatistics
    from hbone.transport import Session as Session
    from hbone.transport import SessionStatistics as SessionStatistics
    from hbone.transport import SocketOptions as SocketOptions
    from hbone.transport import TargetRule as TargetRule
    from hbone.transport import Timeouts as Timeouts
    from hbone.transport import Tunnel as Tunnel
    from hbone.transport import TunnelRequest as TunnelRequest
    from hbone.transport import TunnelStatistics as TunnelStatistics
    from hbone.transport import relay as relay
else:

    def __getattr__(name: str) -> object:
        if name in __all__:
            for package in _PACKAGES:
                module = importlib.import_module(package)
                if name in module.__all__:
                    value = globals()[name] = getattr(module, name)
                    return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


# Where the names come from, what is quick to load first.
_PACKAGES = (
    "hbone.errors",
    "hbone.identity",
    "hbone.address",
    "hbone.protocol",
    "hbone.tls",
    "hbone.transport",
    "hbone.certs",
)

__all__ = [
    "HBONE_PORT",
    "AllowNetworks",
    "Authority",
    "BadTarget",
    "Baggage",
    "BaseObserver",
    "CaSvidSource",
    "CertificateUnavailable",
    "ConfigError",
    "ConfigFault",
    "ConnectFailed",
    "ConnectRequest",
    "ConnectResponse",
    "ConnectionPool",
    "DialledAddress",
    "Endpoint",
    "Engine",
    "ErrorCode",
    "FileSvidSource",
    "FixedTarget",
    "ForwardHandler",
    "ForwardResult",
    "Forwarded",
    "HBONEClient",
    "HBONEServer",
    "HboneError",
    "IdentityPattern",
    "IdentityRefused",
    "InvalidAddress",
    "InvalidCertificate",
    "InvalidIdentity",
    "Limits",
    "ListenFailed",
    "LocalCA",
    "LocalProtocolError",
    "MeshConfigError",
    "MeshFault",
    "NoRoute",
    "Observer",
    "Peer",
    "PeerIdentityMismatch",
    "PeerPolicy",
    "PlainRelay",
    "PolicyDenied",
    "PoolLimits",
    "PoolStatistics",
    "ProtocolError",
    "RelayResult",
    "RemoteProtocolError",
    "RequestRejected",
    "ServerStatistics",
    "Session",
    "SessionClosed",
    "SessionStatistics",
    "SocketOptions",
    "SpiffeIdentity",
    "StreamRefused",
    "Svid",
    "SvidManager",
    "SvidSource",
    "TargetRule",
    "Timeouts",
    "TraceParent",
    "TrustDomain",
    "Tunnel",
    "TunnelRefused",
    "TunnelRequest",
    "TunnelReset",
    "TunnelStatistics",
    "Unreachable",
    "relay",
]
