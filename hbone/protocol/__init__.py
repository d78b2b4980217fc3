"""The wire, without I/O: frames, windows, CONNECT and its headers, PROXY protocol.

Nothing here reads a clock, logs, or waits. `Engine` is one side of a session; `hbone.transport` drives it over
sockets, and the tests drive it over nothing at all.
"""

from hbone.protocol._engine import Engine as Engine
from hbone.protocol._engine import Stream as Stream
from hbone.protocol._events import DataReceived as DataReceived
from hbone.protocol._events import Event as Event
from hbone.protocol._events import GoAwayReceived as GoAwayReceived
from hbone.protocol._events import InvalidRequest as InvalidRequest
from hbone.protocol._events import PingAcknowledged as PingAcknowledged
from hbone.protocol._events import RequestReceived as RequestReceived
from hbone.protocol._events import ResponseReceived as ResponseReceived
from hbone.protocol._events import SessionFailed as SessionFailed
from hbone.protocol._events import SettingsReceived as SettingsReceived
from hbone.protocol._events import StreamEnded as StreamEnded
from hbone.protocol._events import StreamReset as StreamReset
from hbone.protocol._events import WindowOpened as WindowOpened
from hbone.protocol._frames import ErrorCode as ErrorCode
from hbone.protocol._headers import Baggage as Baggage
from hbone.protocol._headers import ConnectRequest as ConnectRequest
from hbone.protocol._headers import ConnectResponse as ConnectResponse
from hbone.protocol._headers import Forwarded as Forwarded
from hbone.protocol._headers import MalformedRequest as MalformedRequest
from hbone.protocol._headers import TraceParent as TraceParent
from hbone.protocol._headers import WorkloadType as WorkloadType
from hbone.protocol._limits import Limits as Limits
from hbone.protocol._proxy_protocol import ProxyHeader as ProxyHeader

__all__ = [
    "Baggage",
    "ConnectRequest",
    "ConnectResponse",
    "DataReceived",
    "Engine",
    "ErrorCode",
    "Event",
    "Forwarded",
    "GoAwayReceived",
    "InvalidRequest",
    "Limits",
    "MalformedRequest",
    "PingAcknowledged",
    "ProxyHeader",
    "RequestReceived",
    "ResponseReceived",
    "SessionFailed",
    "SettingsReceived",
    "Stream",
    "StreamEnded",
    "StreamReset",
    "TraceParent",
    "WindowOpened",
    "WorkloadType",
]
