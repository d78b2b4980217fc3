"""Sessions and tunnels on trio: the only place that drives a sans-IO object over a network."""

from hbone.transport._client import HBONE_PORT as HBONE_PORT
from hbone.transport._client import HBONEClient as HBONEClient
from hbone.transport._observer import BaseObserver as BaseObserver
from hbone.transport._observer import Observer as Observer
from hbone.transport._relay import RelayResult as RelayResult
from hbone.transport._relay import relay as relay
from hbone.transport._relay import reset_socket as reset_socket
from hbone.transport._server import HBONEServer as HBONEServer
from hbone.transport._server import ServerStatistics as ServerStatistics
from hbone.transport._server import TunnelRequest as TunnelRequest
from hbone.transport._session import Session as Session
from hbone.transport._tcp import connect_tcp as connect_tcp
from hbone.transport._tcp import listen_tcp as listen_tcp
from hbone.transport._tunnel import Tunnel as Tunnel
from hbone.transport._values import Peer as Peer
from hbone.transport._values import SessionStatistics as SessionStatistics
from hbone.transport._values import Timeouts as Timeouts
from hbone.transport._values import TunnelStatistics as TunnelStatistics

__all__ = [
    "HBONE_PORT",
    "BaseObserver",
    "HBONEClient",
    "HBONEServer",
    "Observer",
    "Peer",
    "RelayResult",
    "ServerStatistics",
    "Session",
    "SessionStatistics",
    "Timeouts",
    "Tunnel",
    "TunnelRequest",
    "TunnelStatistics",
    "connect_tcp",
    "listen_tcp",
    "relay",
    "reset_socket",
]
