"""A waypoint of our own, made of the library alone: HBONE in, HBONE out."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from hbone import ConnectionPool, HboneError, RequestRejected, TunnelRefused, relay
from support.dataplanes import hbone_peer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from hbone import Endpoint, LocalCA, TunnelRequest
    from support.dataplanes import Peer

__all__ = ["waypoint"]


@asynccontextmanager
async def waypoint(
    ca: LocalCA, identity: str, host: str, port: int, *, endpoints: Mapping[str, str], via: Endpoint, expect: str
) -> AsyncIterator[Peer]:
    """Serves until the block ends.

    Args:
        ca: issues its certificate.
        identity: who it is.
        host: where it listens.
        port: of that.
        endpoints: where each target really is.
        via: the node behind which all of them are.
        expect: whom that node speaks for.
    """
    async with ConnectionPool(ca.issue(identity)) as pool:

        async def handle(request: TunnelRequest) -> None:
            target = endpoints.get(str(request.target))
            if target is None:
                raise RequestRejected(503, reason=f"no endpoint for {request.target}")
            try:
                onward = await pool.open_tunnel(target, expect=expect, via=via)
            except HboneError as exc:
                raise RequestRejected(exc.status if isinstance(exc, TunnelRefused) else 503) from exc
            await relay(await request.accept(), onward)

        async with hbone_peer(ca, identity, host, port, handle) as peer:
            yield peer
