"""What the engine tells its driver. Values only; the one with payload is a view that lives until the next read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from hbone.errors import HboneError
    from hbone.protocol._headers import ConnectRequest, ConnectResponse

__all__ = [
    "DataReceived",
    "Event",
    "GoAwayReceived",
    "InvalidRequest",
    "PingAcknowledged",
    "RequestReceived",
    "ResponseReceived",
    "SessionFailed",
    "SettingsReceived",
    "StreamEnded",
    "StreamReset",
    "WindowOpened",
]


class DataReceived(NamedTuple):
    """Payload of a DATA frame, or a part of it (RFC 9113 section 6.1)."""

    stream_id: int
    data: memoryview
    """Valid until the next `Engine.receive_untrusted`: copy what is kept."""


class StreamEnded(NamedTuple):
    """The peer ended its half of the stream: END_STREAM (RFC 9113 section 8.5)."""

    stream_id: int


class WindowOpened(NamedTuple):
    """There is credit to send again (RFC 9113 section 6.9)."""

    stream_id: int
    """0 for the whole session."""


@dataclass(frozen=True, slots=True)
class SettingsReceived:
    """The peer's SETTINGS (RFC 9113 section 6.5)."""

    first: bool
    """Whether these are the ones that open the session."""


@dataclass(frozen=True, slots=True)
class RequestReceived:
    """A well-formed CONNECT (RFC 9113 section 8.5)."""

    stream_id: int
    request: ConnectRequest


@dataclass(frozen=True, slots=True)
class InvalidRequest:
    """A request that the engine has refused by itself; the stream is gone."""

    stream_id: int
    why: str
    status: int | None
    """The status that the peer got, or None when the stream was reset."""


@dataclass(frozen=True, slots=True)
class ResponseReceived:
    """The final answer to our CONNECT; informational ones are dropped."""

    stream_id: int
    response: ConnectResponse


@dataclass(frozen=True, slots=True)
class StreamReset:
    """The stream ended before its time: RST_STREAM of the peer, or a fault that made us send one."""

    stream_id: int
    error_code: int
    remote: bool
    unprocessed: bool = False
    """The peer did nothing for this request: asking again elsewhere is safe (RFC 9113 section 8.7)."""
    why: str = ""


@dataclass(frozen=True, slots=True)
class GoAwayReceived:
    """No new streams (RFC 9113 section 6.8). Streams up to `last_stream_id` go on."""

    last_stream_id: int
    error_code: int
    debug: bytes


@dataclass(frozen=True, slots=True)
class PingAcknowledged:
    """The answer to a PING of ours (RFC 9113 section 6.7)."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class SessionFailed:
    """The peer broke the session; always the last event. GOAWAY with the code is queued."""

    error: HboneError


Event = (
    DataReceived
    | StreamEnded
    | WindowOpened
    | SettingsReceived
    | RequestReceived
    | InvalidRequest
    | ResponseReceived
    | StreamReset
    | GoAwayReceived
    | PingAcknowledged
    | SessionFailed
)
