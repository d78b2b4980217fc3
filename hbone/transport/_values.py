"""Small values of the transport: time-outs, who the peer is, and what `statistics()` returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cryptography import x509

    from hbone.address import Endpoint
    from hbone.identity import SpiffeIdentity

__all__ = ["Peer", "SessionStatistics", "Timeouts", "TunnelStatistics"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Every wait that a peer could make endless, in seconds. Other time-outs are the caller's cancel scopes."""

    connect: float = 10.0
    """TCP connect (as ztunnel)."""
    handshake: float = 10.0
    """TLS handshake."""
    settings: float = 10.0
    """From the end of the handshake to the peer's SETTINGS."""
    request: float = 20.0
    """From our CONNECT to its answer: more than the peer's own `connect`."""
    first_request: float = 60.0
    """How long a server keeps a session on which nothing was ever asked."""
    idle: float = 900.0
    """How long a server keeps a session without tunnels: well above the 300 s that ztunnel keeps its own."""
    close: float = 2.0
    """To say goodbye: GOAWAY, close_notify, and to read what is still under way."""
    ping_interval: float = 10.0
    """From the answer to a PING to the next one (as ztunnel)."""
    ping_timeout: float = 20.0
    """For the answer to a PING (as ztunnel), counted anew while DATA or WINDOW_UPDATE frames come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Whom a session was opened with, as TLS proved it."""

    identity: SpiffeIdentity
    address: Endpoint | None
    """Where the bytes come from; None when the session does not run on a socket."""
    tls_version: str
    cipher: str
    group: str | None
    """The key exchange, ``X25519MLKEM768`` for instance; None when the TLS library does not say."""
    chain: tuple[x509.Certificate, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TunnelStatistics:
    """One tunnel, now. Bytes, but for `open`."""

    bytes_sent: int
    bytes_received: int
    send_window: int
    """What the peer still lets us send on this tunnel."""
    receive_buffered: int
    """What has arrived and nobody has taken."""
    open: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionStatistics:
    """One session, now."""

    open_streams: int
    tunnels_opened: int
    tunnels_refused: int
    bytes_sent: int
    """Payload of tunnels."""
    bytes_received: int
    """Payload of tunnels."""
    send_window: int
    """Bytes that the peer still lets us send on the whole session."""
    unsent: int
    """Bytes that TLS has not taken yet."""
    receive_buffered: int
    """Bytes in the receive buffers of all tunnels."""
    draining: bool
    closed: bool
