"""The numbers that bound what a peer can make us spend, each with where it comes from."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Limits"]

_SMALLEST_WINDOW = 65_535  # RFC 9113 section 6.9.2: where every window starts, before any SETTINGS
_LARGEST_WINDOW = 2**31 - 1
_SMALLEST_FRAME = 2**14  # RFC 9113 section 6.5.2
_LARGEST_FRAME = 2**24 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one HTTP/2 session may use. All sizes are bytes.

    The most that a peer can make one session hold is ``max_concurrent_streams * stream_window`` of unread data (the
    application's readers are all stalled), plus ``max_header_block`` and one read. A stalled tunnel never takes
    the connection window from its neighbours, because that is refilled on arrival.

    Raises:
        ValueError: a number is outside what RFC 9113 allows, or so small that no session could live with it.
    """

    stream_window: int = 4 * 2**20
    """INITIAL_WINDOW_SIZE, the receive buffer of one tunnel (as ztunnel)."""
    connection_window: int = 16 * 2**20
    """The window of the whole session; at least four times `stream_window` keeps one tunnel from filling it."""
    max_frame_size: int = 2**20
    """MAX_FRAME_SIZE that we announce (as ztunnel)."""
    max_concurrent_streams: int = 200
    """Tunnels a peer may have open on one session (as ztunnel); the next one gets REFUSED_STREAM."""
    max_header_list_size: int = 2**16
    """Decoded size of a header list (RFC 9113 section 6.5.2); more is refused with status 431."""
    max_header_block: int = 2**17
    """Encoded size of one header block over all its CONTINUATION frames; more ends the session."""
    control_burst: int = 1000
    """PING, SETTINGS, empty DATA, unknown and refused frames that may come at once (Envoy allows 1000 of the like)."""
    control_per_second: int = 100
    """How fast that allowance comes back."""
    early_reset_burst: int = 200
    """Requests that a peer may reset before we answered them: the rapid reset attack (CVE-2023-44487)."""
    early_reset_per_second: int = 20
    """How fast that allowance comes back."""
    max_unsent: int = 2**20
    """Control bytes that may wait for a peer that does not read."""

    def __post_init__(self) -> None:
        for name in ("stream_window", "connection_window"):
            if not _SMALLEST_WINDOW <= getattr(self, name) <= _LARGEST_WINDOW:
                raise ValueError(f"{name} must be from {_SMALLEST_WINDOW} to {_LARGEST_WINDOW} bytes")
        if not _SMALLEST_FRAME <= self.max_frame_size <= _LARGEST_FRAME:
            raise ValueError(f"max_frame_size must be from {_SMALLEST_FRAME} to {_LARGEST_FRAME} bytes")
        if self.max_concurrent_streams < 1 or self.max_header_list_size < 1024 or self.max_header_block < 1024:
            raise ValueError("max_concurrent_streams needs at least 1, header sizes at least 1024 bytes")
        for name in ("control_burst", "control_per_second", "early_reset_burst", "early_reset_per_second"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.max_unsent < _SMALLEST_FRAME:
            raise ValueError(f"max_unsent must be at least {_SMALLEST_FRAME} bytes")
