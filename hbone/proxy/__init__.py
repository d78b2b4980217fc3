"""The two proxies, to run from the command line or to embed: built only from the library's public names.

`InboundProxy` terminates HBONE and forwards to applications; `OutboundProxy` takes applications' connections, in one
or more ways, and carries them as HBONE. Both write one access-log line a connection and count it.
"""

from hbone.proxy._inbound import InboundProxy as InboundProxy
from hbone.proxy._outbound import OutboundProxy as OutboundProxy

__all__ = ["InboundProxy", "OutboundProxy"]
