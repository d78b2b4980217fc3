"""Sessions and tunnels on trio: the only place that drives a sans-IO object over a network."""

from hbone.transport._client import HBONE_PORT as HBONE_PORT
from hbone.transport._client import HBONEClient as HBONEClient
from hbone.transport._client import expected_peers as expected_peers
from hbone.transport._ends import RelayResult as RelayResult
from hbone.transport._ends import reset_socket as reset_socket
from hbone.transport._forward import AllowNetworks as AllowNetworks
from hbone.transport._forward import DialledAddress as DialledAddress
from hbone.transport._forward import FixedTarget as FixedTarget
from hbone.transport._forward import ForwardHandler as ForwardHandler
from hbone.transport._forward import ForwardResult as ForwardResult
from hbone.transport._forward import TargetRule as TargetRule
from hbone.transport._netfilter import set_mark as set_mark
from hbone.transport._netfilter import set_transparent as set_transparent
from hbone.transport._observer import BaseObserver as BaseObserver
from hbone.transport._observer import Observer as Observer
from hbone.transport._options import SocketOptions as SocketOptions
from hbone.transport._pool import ConnectionPool as ConnectionPool
from hbone.transport._pool import PooledSessionStatistics as PooledSessionStatistics
from hbone.transport._pool import PoolStatistics as PoolStatistics
from hbone.transport._pool_state import PoolKey as PoolKey
from hbone.transport._pool_state import PoolLimits as PoolLimits
from hbone.transport._pool_state import SessionState as SessionState
from hbone.transport._relay import relay as relay
from hbone.transport._server import HBONEServer as HBONEServer
from hbone.transport._server import ServerStatistics as ServerStatistics
from hbone.transport._server import TunnelRequest as TunnelRequest
from hbone.transport._session import Session as Session
from hbone.transport._splice import PlainRelay as PlainRelay
from hbone.transport._splice import relay_sockets as relay_sockets
from hbone.transport._tcp import accept_from as accept_from
from hbone.transport._tcp import connect_tcp as connect_tcp
from hbone.transport._tcp import listen_tcp as listen_tcp
from hbone.transport._tcp import resolve as resolve
from hbone.transport._tunnel import Tunnel as Tunnel
from hbone.transport._values import Peer as Peer
from hbone.transport._values import SessionStatistics as SessionStatistics
from hbone.transport._values import Timeouts as Timeouts
from hbone.transport._values import TunnelStatistics as TunnelStatistics

__all__ = [
    "HBONE_PORT",
    "AllowNetworks",
    "BaseObserver",
    "ConnectionPool",
    "DialledAddress",
    "FixedTarget",
    "ForwardHandler",
    "ForwardResult",
    "HBONEClient",
    "HBONEServer",
    "Observer",
    "Peer",
    "PlainRelay",
    "PoolKey",
    "PoolLimits",
    "PoolStatistics",
    "PooledSessionStatistics",
    "RelayResult",
    "ServerStatistics",
    "Session",
    "SessionState",
    "SessionStatistics",
    "SocketOptions",
    "TargetRule",
    "Timeouts",
    "Tunnel",
    "TunnelRequest",
    "TunnelStatistics",
    "accept_from",
    "connect_tcp",
    "expected_peers",
    "listen_tcp",
    "relay",
    "relay_sockets",
    "reset_socket",
    "resolve",
    "set_mark",
    "set_transparent",
]
