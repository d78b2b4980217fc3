"""The ways in to the outbound proxy: how an application says where it wants to go.

Each is one function from an accepted socket to a `WayIn`: the target, the source, and how to tell the application what
became of it. The application is told only when the tunnel is up or has failed, so what it sees is the truth.

- `accept_socks5` and `accept_http_connect` are asked in band, and answer in band;
- `accept_forward` has a fixed target, `accept_captured` (Linux) the one that the application dialled before netfilter
  redirected it. Both have no words for a failure, so they reset the connection.

Sockets are the plain, non-blocking ones of the standard library: the relay wants them afterwards.
"""

from __future__ import annotations

from hbone.proxy._ways._base import BadHandshake, InBandWayIn, SilentWayIn, WayIn, reset
from hbone.proxy._ways._failure import Failure, failure_of
from hbone.proxy._ways._forward import accept_forward
from hbone.proxy._ways._http_connect import HttpConnectParser, accept_http_connect
from hbone.proxy._ways._socks5 import Socks5Parser, accept_socks5

# _capture is not here: it is for Linux only, and imported by who captures.
__all__ = [
    "BadHandshake",
    "Failure",
    "HttpConnectParser",
    "InBandWayIn",
    "SilentWayIn",
    "Socks5Parser",
    "WayIn",
    "accept_forward",
    "accept_http_connect",
    "accept_socks5",
    "failure_of",
    "reset",
]
