"""``--forward [BIND:]PORT=HOST:PORT``: every connection to one port goes to one target."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hbone.proxy._ways._base import BadHandshake, SilentWayIn, peer_of, reset

if TYPE_CHECKING:
    import socket

    from hbone.address import Authority

__all__ = ["accept_forward"]


async def accept_forward(sock: socket.socket, target: Authority) -> SilentWayIn:
    """A way in whose target is configured; nothing is read.

    Raises:
        BadHandshake: the application has gone; the socket is closed.
    """
    try:
        source = peer_of(sock)
    except OSError as error:
        reset(sock)
        raise BadHandshake("the application left at once") from error
    return SilentWayIn(target=target, source=source, sock=sock)
